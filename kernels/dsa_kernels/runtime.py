"""Where the kernels run: compiled on a GPU, or on the CPU in Triton's interpreter. Imported before triton, always.

Triton decides at import time whether `@triton.jit` interprets, by the environment variable TRITON_INTERPRET. Without a
usable GPU this module sets it: the package's one import-time side effect. Where another library has imported triton
before, it is too late for that, and the first call of a kernel says so.
"""

import functools
import importlib
import os
import sys

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take; fp64 is the reference's alone
OLDEST = (8, 0)  # compute capability: Ampere's bf16 tensor cores
NATIVE_FP8 = (8, 9)

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")  # as triton reads it


def mode() -> str:
    """How kernels run in this process: "interpreter" or "compiled"."""
    return "interpreter" if INTERPRETED else "compiled"


def check_runnable(**tensors) -> None:
    """Raise unless the kernels can serve these tensors (None is skipped).

    ValueError: a CPU tensor in compiled mode, a GPU older than compute capability 8.0, or a tensor that asks for a
    gradient, which these kernels do not compute: a missing gradient must not pass as a zero one.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, which only dsa_ref computes: use torch.no_grad()")
        if INTERPRETED:
            continue
        if not tensor.is_cuda:
            hint = "" if torch.cuda.is_available() else "; to interpret on the CPU, import dsa_kernels before triton"
            raise ValueError(f"{name} must be on a CUDA device in compiled mode, got {tensor.device}{hint}")
        if torch.cuda.get_device_capability(tensor.device) < OLDEST:
            got = ".".join(map(str, torch.cuda.get_device_capability(tensor.device)))
            raise ValueError(f"{name} must be on a GPU of compute capability 8.0 or newer, got {got}")


def dot_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which a tile of `tensor` goes into `tl.dot`.

    The interpreter takes bf16's bits for integers in `tl.dot`, so there everything is widened to fp32. Cards without
    FP8 tensor cores get bf16, which holds every e4m3 value exactly.
    """
    if INTERPRETED:
        return torch.float32
    if tensor.dtype == torch.float8_e4m3fn and torch.cuda.get_device_capability(tensor.device) < NATIVE_FP8:
        return torch.bfloat16
    return tensor.dtype


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many blocks run side by side at least: 1 in the interpreter."""
    return 1 if INTERPRETED else torch.cuda.get_device_properties(tensor.device).multi_processor_count


def hopper_variant(step, variant, default, *inputs):
    """The module `dsa_kernels.hopper.<step>`, or None for the portable kernel.

    variant: "portable", "hopper", or None for `default`, where "hopper" means: if it can serve these inputs.
    Raises ValueError for any other variant, and for "hopper" where it cannot serve.
    """
    if variant not in (None, "portable", "hopper"):
        raise ValueError(f'variant must be "portable", "hopper" or None, got {variant!r}')
    if (variant or default) == "portable":
        return None
    module = _hopper_module(step)
    reason = module.cannot_serve(*inputs) if module else "needs a triton with Gluon, and no interpreter"
    if variant and reason:
        raise ValueError(f'variant "hopper" {reason}')
    return None if reason else module


@functools.cache
def _hopper_module(step):
    """None where this triton has no Gluon that will do, or interprets."""
    try:
        return None if INTERPRETED else importlib.import_module(f".hopper.{step}", __package__)
    except (ImportError, AttributeError):
        return None


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x contiguous from a 16-byte boundary, as TMA and asynchronous copies want it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
