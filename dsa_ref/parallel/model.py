"""A model whose attention layers work over a group of ranks, with the weights and names of the model it came from."""

import copy
import functools
import zlib

import torch.distributed as dist
from torch import nn

from ..contracts import check_count
from ..nn.layer import DSALayer
from ..nn.model import SmallModel
from .gathered import GatheredLayer
from .ranks import Ranks, sum_of_bits
from .sharded import ShardedLayer
from .sharded_cache import ShardedCache

PLANS = GatheredLayer, ShardedLayer


def over_group(
    model: nn.Module, plan: type[GatheredLayer] | type[ShardedLayer], group: dist.ProcessGroup | None = None
) -> nn.Module:
    """The model with `plan(layer, group)` in the place of each DSALayer: the same parameters under the same names.

    The model itself stays as it is, and both can be used: so one model prefills by one plan and decodes by the other,
    and its checkpoints are those of one rank. All else in it sees this rank's tokens alone: pass positions. All ranks
    call it, and their weights are compared. What it refuses on one rank before the first layer, as a token that is
    none, is an error on all; what fails between two layers on one rank alone, the others meet as one that is late.

    Raises: TypeError for another plan or model, ValueError for a model without a DSALayer; ValueError on all ranks for
    weights that are not the same on all.
    """
    if plan not in PLANS:
        raise TypeError(f"plan must be GatheredLayer or ShardedLayer, got {plan!r}")
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if not any(isinstance(module, DSALayer) for module in model.modules()):
        raise ValueError("model must hold a DSALayer, got none")
    ranks, weights = Ranks(group), dict(model.named_parameters())
    names = zlib.crc32(repr([(name, list(weight.shape)) for name, weight in weights.items()]).encode())
    sums = zlib.crc32(repr([sum_of_bits(weight) for weight in weights.values()]).encode())
    ranks.agree({"call": "over_group", "plan": plan.__name__, "names": names, "weights": sums})
    twin = _replaced(model, plan, group)
    for number, layer in enumerate(module for module in twin.modules() if isinstance(module, plan)):
        layer.ranks, layer.number = ranks, number  # ranks: one for all, which counts all their meetings
    if not isinstance(twin, plan):
        twin.__class__ = _failing_together(type(twin))
    return twin


@functools.cache
def _failing_together(kind: type[nn.Module]) -> type[nn.Module]:
    """The class of a model whose errors, before its first layer meets the other ranks, come to them there."""

    class OverGroup(kind):
        def forward(self, *arguments, **more):
            ranks = next(module.ranks for module in self.modules() if isinstance(module, PLANS))
            with ranks.failing_together():
                return super().forward(*arguments, **more)

    OverGroup.__name__ = OverGroup.__qualname__ = kind.__name__
    return OverGroup


def _replaced(module, plan, group):
    if isinstance(module, DSALayer):
        return plan(module, group)
    twin = copy.copy(module)  # shares everything with the module, and then has a list of submodules of its own
    twin._modules = {name: child and _replaced(child, plan, group) for name, child in module._modules.items()}
    return twin


def new_sharded_caches(model: SmallModel, capacity: int, group: dist.ProcessGroup | None = None) -> list[ShardedCache]:
    """One empty ShardedCache a layer, for a sequence of up to `capacity` tokens, of which each rank keeps its share.

    A rank has room for ceil(capacity / size) + 2 rows: a Zigzag of a prompt, and the turns in which later tokens are
    kept, may each give it one more than the mean. Where a prompt comes in parts, let 2 · size divide the length of all
    but the last, or ask for more: each other part may give a rank two rows more than the mean.

    Raises: TypeError for another model, else as `ShardedCache`.
    """
    if not isinstance(model, SmallModel):
        raise TypeError(f"model must be a SmallModel, got {type(model).__name__}")
    weight, size = next(model.parameters()), Ranks(group).size
    check_count("capacity", capacity)
    rows = -(-capacity // size) + 2
    return [ShardedCache(model.config.attention, rows, weight.dtype, weight.device) for _ in model.layers]
