"""Weights that the layer uses other than by calling their module, and modules that somebody has wrapped.

The layer absorbs kv_b_proj into queries and outputs, and computes the indexer's norm and head weights in fp32 whatever
the weights' dtype. A plain module's weight is read for that. An adapter (LoRA), a hook, a parametrisation or a shard is
not in that weight: such a module is called, so that what was put around it takes effect.
"""

import threading

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional as F
from torch.nn.modules import module as torch_module

from ..contracts import values_readable
from ..precision import exact

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_swapping = threading.RLock()  # functional_call exchanges a module's weights for the time of a call


def is_plain(module: nn.Module, *kinds: type) -> bool:
    """Whether calling the module does no more than its weights say: torch's own class or one of `kinds`, no hook, no
    sharded weight."""
    return (
        type(module) in (nn.Linear, nn.LayerNorm, nn.Embedding, *kinds)
        and all(type(weight) in (nn.Parameter, Tensor) for weight in module._parameters.values() if weight is not None)
        and not any(getattr(module, hooks) for hooks in HOOKS)
        and "forward" not in vars(module)
        and not torch_module._has_any_global_hook()
    )


@exact
def in_fp32(module: nn.Module, x: Tensor) -> Tensor:
    """module(x) with input and weights in fp32; only weights that their module alone can read keep their dtype."""
    x = x.float()
    if is_plain(module) and type(module) is nn.Linear:
        return F.linear(x, module.weight.float(), None if module.bias is None else module.bias.float())
    with _swapping:
        weights = {name: weight for name, weight in module.named_parameters() if weight.dtype != torch.float32}
        if not weights:
            return module(x)
        if all(type(weight) in (nn.Parameter, Tensor) and weight.is_floating_point() for weight in weights.values()):
            return functional_call(module, {name: weight.float() for name, weight in weights.items()}, x)
        dtypes = [weight.dtype for weight in module.parameters() if weight.is_floating_point()]
        return module(x.to(dtypes[0]) if dtypes else x).float()


def matrix(name: str, module: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [out, columns] by which a linear module multiplies: a plain one's weight, else what it makes of the
    unit vectors in `dtype`, so that adapters count. An adapter's dropout then drops channels of the latent.

    Raises: ValueError for a module that also adds something, or that is not linear; a module that draws random numbers,
    as dropout does in training, is taken at its word.
    """
    if is_plain(module) and getattr(module, "bias", None) is None:
        return module.weight
    units = torch.eye(columns, dtype=dtype, device=device)
    sums = _combinations(columns).to(units)
    before = _random_state(device)
    rows, of_sums, of_zero = module(torch.cat((units, sums, torch.zeros_like(units[:1])))).split(
        (columns, len(sums), 1)
    )
    if values_readable(rows):
        got = f"to be absorbed, got {type(module).__name__}"
        if of_zero.any():
            raise ValueError(f"{name} must be linear, without a bias, {got} with one")
        if torch.equal(before, _random_state(device)) and not _agree(of_sums.detach(), sums, rows.detach()):
            raise ValueError(f"{name} must be linear {got}, whose output for a sum is not the sum of its outputs")
    return rows.T


def _combinations(columns: int) -> Tensor:
    """Two sums of unit vectors, fp32 [2, columns]: their weights have both signs, and even FP8 holds them exactly.

    The second is 16 times the first, no more: a module may quantise its whole input by the largest number in it.
    """
    weights = (torch.arange(columns, dtype=torch.float32, device="cpu") * 5 % 8 - 3.5) / 4
    return torch.stack((weights, 16 * weights))


@exact
def _agree(got: Tensor, sums: Tensor, rows: Tensor) -> bool:
    """Whether got [2, out] is sums [2, columns] @ rows [columns, out], but for rounding.

    What rounding may do is measured by what the terms of a sum come to if their signs were random. bf16 errs by up to
    1/256 in each, and an adapter rounds some four times: its largest of 10^5 outputs stays below a tenth. A wider dtype
    is allowed as much, since autocast, TF32 or a quantised base round inside it. An overflow is no sign of anything.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    got, sums, rows = got.to(wide), sums.to(wide), rows.to(wide)
    size = (sums.square() @ rows.square()).sqrt()
    size = torch.maximum(size, size.square().mean(dim=1, keepdim=True).sqrt())  # where base and adapter cancel
    return not (got.isfinite() & ((got - sums @ rows).abs() > size / 8)).any()


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
