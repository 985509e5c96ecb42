"""How a layer of either plan takes over another layer's weights."""

import torch.distributed as dist

from ..nn.layer import DSALayer
from .ranks import Ranks


def take_over(own: DSALayer, layer: DSALayer, group: dist.ProcessGroup | None) -> None:
    """Give `own` the modules, settings and names of `layer` itself, its group as `ranks`, and its `number`.

    The number is the layer's place in a model, see `over_group`, on which ranks agree: one that failed between two
    layers and is called again would meet the others in a later layer.

    group: a process group, or None for all processes. Raises: TypeError for another layer, else as `Ranks`.
    """
    if not isinstance(layer, DSALayer):
        raise TypeError(f"layer must be a DSALayer, got {type(layer).__name__}")
    vars(own).update(vars(layer))  # the same modules, not copies of them
    own.ranks, own.number = Ranks(group), 0
