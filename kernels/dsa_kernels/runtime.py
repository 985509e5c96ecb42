"""Where the kernels run: compiled on a GPU, or on the CPU in Triton's interpreter. Imported before triton, always.

Triton decides at import time whether `@triton.jit` interprets, by the environment variable TRITON_INTERPRET. Without a
usable GPU this module sets it: the package's one import-time side effect. Where another library has imported triton
before, it is too late for that, and the first call of a kernel says so.
"""

import functools
import importlib
import os
import sys
import types

import torch

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take; fp64 is the reference's alone
OLDEST = (8, 0)  # compute capability: Ampere's bf16 tensor cores
NATIVE_FP8 = (8, 9)
FEWEST_FOR_HOPPER = 512  # queries, for `index_scores` and `lightning_select`; a block of Hopper's kernels takes eight
SCORES_AT_ONCE = 1 << 28  # of `lightning_select`: 1 GiB of fp32
REDONE_AT_ONCE = 1 << 27  # of its flagged rows, while lists of a fused kernel may still be in memory
NO_GLUON = "needs a triton with Gluon, and no interpreter"
GLUON = {  # what `dsa_kernels.hopper` imports of it; a test keeps the two in agreement
    "triton.experimental": ("gluon",),
    "triton.experimental.gluon": ("constexpr_function", "language"),
    "triton.experimental.gluon.language.nvidia.hopper": (
        "async_copy",
        "fence_async_shared",
        "mbarrier",
        "tma",
        "warpgroup_mma",
        "warpgroup_mma_wait",
    ),
    "triton.experimental.gluon.nvidia.hopper": ("TensorDescriptor",),
    "triton.language.core": ("_aggregate",),
}

if not torch.cuda.is_available() and "triton" not in sys.modules:
    os.environ["TRITON_INTERPRET"] = "1"

INTERPRETED = os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "y", "yes")  # as triton reads it


def mode() -> str:
    """How kernels run in this process: "interpreter" or "compiled"."""
    return "interpreter" if INTERPRETED else "compiled"


def check_runnable(**tensors: torch.Tensor | None) -> None:
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


def hopper_variant(
    step: str, variant: str | None, default: str, *inputs: torch.Tensor | int | None
) -> types.ModuleType | None:
    """The module `dsa_kernels.hopper.<step>`, or None for the portable kernel.

    variant: "portable", "hopper", or None for `default`, where "hopper" means: if it can serve these inputs.
    Raises ValueError for any other variant, and for "hopper" where it cannot serve. An error inside the module itself
    is never taken for "cannot serve": it surfaces.
    """
    if variant not in (None, "portable", "hopper"):
        raise ValueError(f'variant must be "portable", "hopper" or None, got {variant!r}')
    if (variant or default) == "portable":
        return None
    module, reason = None, NO_GLUON
    if gluon_compiles():
        module = importlib.import_module(f".hopper.{step}", __package__)
        reason = module.cannot_serve(*inputs)
    if variant and reason:
        raise ValueError(f'variant "hopper" {reason}')
    return None if reason else module


@functools.cache
def gluon_compiles() -> bool:
    """Whether this triton has all of Gluon that `dsa_kernels.hopper` imports, and compiles."""
    if INTERPRETED:
        return False
    try:
        modules = {name: importlib.import_module(name) for name in GLUON}  # all first: a package's name may be a module
    except ImportError:
        return False
    return all(hasattr(modules[module], name) for module, names in GLUON.items() for name in names)


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x contiguous from a 16-byte boundary, as TMA and asynchronous copies want it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
