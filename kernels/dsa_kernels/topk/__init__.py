"""The portable algorithms of `select_topk`, and the pieces of them that Hopper's kernels use too.

`ordering`: scores as integers, and the exact choice among scores that are in registers. `bound`: a number that some
more than k scores of a row should reach, from a sample. `listed`, `sampled`, `radix`: one algorithm each, with one
`launch`. `dsa_kernels.select_topk` checks the arguments and chooses among them.
"""
