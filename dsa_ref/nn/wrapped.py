"""Weights that the layer uses other than by calling their module, and modules that somebody has wrapped.

The layer absorbs kv_b_proj into queries and outputs, and computes the indexer's norm and head weights in fp32 whatever
the weights' dtype. A plain module's weight is read for that. An adapter (LoRA), a hook, a parametrisation or a shard is
not in that weight: such a module is called, so that what was put around it takes effect.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules import module as torch_module
from torch.overrides import TorchFunctionMode

from ..contracts import FLOATS, values_readable
from ..precision import autocast_on, exact

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
# Functions of torch and methods of tensors that want one dtype and write to no argument, as a norm of batches would.
# Sums and the like take the wider dtype by themselves.
ONE_DTYPE = {"linear", "bilinear", "matmul", "__matmul__", "__rmatmul__", "mm", "mv", "bmm", "addmm", "addmv", "addbmm"}
ONE_DTYPE |= {"baddbmm", "einsum", "tensordot", "inner", "dot", "vdot", "layer_norm", "rms_norm", "group_norm"}
ONE_DTYPE |= {"chain_matmul", "linalg_multi_dot", "linalg_matmul", "linalg_vecdot", "conv1d", "prelu", "lerp", "cdist"}
ONE_DTYPE |= {"to", "type_as"}  # an input that is cast like a weight
WIDE, NARROW = 1 / 8, 1e-3  # what rounding may do to a sum, see `_agree`: with a dtype below fp32 in it, and without


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
    """module(x) with input and weights in fp32, buffers as well; what its module alone can read keeps its dtype."""
    x = x.float()
    if is_plain(module) and type(module) is nn.Linear:
        return F.linear(x, module.weight.float(), None if module.bias is None else module.bias.float())
    if _is_sealed(module):
        dtypes = [weight.dtype for weight in _weights(module) if weight.dtype in FLOATS]
        return module(x.to(dtypes[0]) if dtypes else x).float()
    if all(weight.dtype == torch.float32 for weight in _weights(module) if weight.dtype in FLOATS):
        return module(x)
    with _InFp32():
        return module(x).float()


class _InFp32(TorchFunctionMode):
    """In this thread, a product of fp32 and another float is one of fp32, and every float says that it is fp32.

    The module and its weights stay what they are, for hooks and for other threads and processes.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func == Tensor.dtype.__get__:  # or a module would cast its input to its weights' dtype
            dtype = func(*args)
            return torch.float32 if dtype in FLOATS else dtype
        if getattr(func, "__name__", "") in ONE_DTYPE and kwargs.get("out") is None:
            floats = {value.dtype for value in _tensors(*args, *kwargs.values()) if value.dtype in FLOATS}
            if len(floats) > 1:
                args = [_widened(value) for value in args]
                kwargs = {name: _widened(value) for name, value in kwargs.items()}
        return func(*args, **kwargs)


def _tensors(*values):
    """The tensors among values, and in lists among them."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(*value)


def _widened(value):
    """A float tensor, or those in a list, in fp32; anything else as it is."""
    if isinstance(value, (list, tuple)) and any(True for _ in _tensors(value)):
        return [_widened(item) for item in value]
    return value.float() if isinstance(value, Tensor) and value.dtype in FLOATS else value


def _weights(module: nn.Module) -> list[Tensor]:
    return [*module.parameters(), *module.buffers()]


def _is_sealed(module: nn.Module) -> bool:
    """Whether the module alone can read its weights: shards, quantised numbers, compiled TorchScript."""
    return any(isinstance(part, torch.jit.ScriptModule) for part in module.modules()) or any(
        type(weight) not in (nn.Parameter, Tensor)
        or weight.dim()
        and weight.dtype not in (*FLOATS, torch.bool, torch.int64)  # these two: masks and counts
        for weight in _weights(module)
    )


def matrix(name: str, module: nn.Module, columns: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The matrix [out, columns] by which a linear module multiplies: a plain one's weight, else what it makes of the
    unit vectors in `dtype`, so that adapters count. An adapter's dropout then drops channels of the latent.

    A module that rounds its input, as with quantised activations, does not round what is absorbed.
    Raises: ValueError for a module that also adds something, or that is not linear but for rounding, of which fp32
    excuses little; a module that draws random numbers, as dropout does in training, is taken at its word.
    """
    if is_plain(module) and getattr(module, "bias", None) is None:
        return module.weight
    units = torch.eye(columns, dtype=dtype, device=device)
    sums = _combinations(columns).to(units)
    checked = values_readable(units)
    before = _random_state(device) if checked else None
    rows, of_sums, of_zero = module(torch.cat((units, sums, torch.zeros_like(units[:1])))).split(
        (columns, len(sums), 1)
    )
    if checked:
        got = f"to be absorbed, got {type(module).__name__}"
        if of_zero.any():
            raise ValueError(f"{name} must be linear, without a bias, {got} with one")
        tolerance = WIDE if _rounds(module, rows) else NARROW
        same = _agree(of_sums.detach(), sums, rows.detach(), tolerance)
        if not same and torch.equal(before, _random_state(device)):
            raise ValueError(
                f"{name} must be linear {got}, whose output for a sum is not the sum of its outputs, to {tolerance:g} "
                "of it: it is not linear, or it rounds its input or output to far fewer bits than its weights have"
            )
    return rows.T


def _combinations(columns: int) -> Tensor:
    """Two sums of unit vectors, fp32 [2, columns]: their weights have both signs, and even FP8 holds them exactly.

    The second is 16 times the first, no more: a module may quantise its whole input by the largest number in it.
    """
    weights = (torch.arange(columns, dtype=torch.float32, device="cpu") * 5 % 8 - 3.5) / 4
    return torch.stack((weights, 16 * weights))


@exact
def _agree(got: Tensor, sums: Tensor, rows: Tensor, tolerance: float) -> bool:
    """Whether got [2, out] is sums [2, columns] @ rows [columns, out], but for rounding.

    What rounding may do is measured by what the terms of a sum come to if their signs were random. bf16 errs by up to
    1/256 in each, and an adapter rounds some four times: its largest of 10^5 outputs stays below a tenth, and fp32's
    below 10^-5. An overflow is no sign of anything.
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    got, sums, rows = got.to(wide), sums.to(wide), rows.to(wide)
    size = (sums.square() @ rows.square()).sqrt()
    size = torch.maximum(size, size.square().mean(dim=1, keepdim=True).sqrt())  # where base and adapter cancel
    return not (got.isfinite() & ((got - sums @ rows).abs() > size * tolerance)).any()


def _rounds(module: nn.Module, rows: Tensor) -> bool:
    """Whether a dtype below fp32 may take part in the module: in weights, in the output, by autocast or by TF32."""
    wide, floats = (torch.float32, torch.float64), [w.dtype for w in _weights(module) if w.dtype in FLOATS]
    return (
        not floats  # weights that torch does not show, as those of its dynamic quantisation
        or any(dtype not in wide for dtype in (rows.dtype, *floats))
        or _is_sealed(module)
        or autocast_on(rows.device)
        or _products_are_short()
    )


def _products_are_short() -> bool:
    """Whether the process lets fp32 products shorten their factors, as TF32 does, on a GPU or on the CPU."""
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # before torch 2.9
        return torch.get_float32_matmul_precision() != "highest"
    kinds = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    return any(kind.fp32_precision not in ("ieee", "none") for kind in kinds)


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()
