"""The kernels of `indexer_loss`: attention's side (`attention`), the rows' losses and their gradients (`kl`)."""
