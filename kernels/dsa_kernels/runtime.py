"""Where the kernels run: compiled on a GPU, or on the CPU in Triton's interpreter. Imported before any kernel.

Without a usable GPU, or where TRITON_INTERPRET=1 stands in the environment, this module turns the interpreter on, in
this process alone: the package's one import-time side effect. It makes no difference who imported triton first.
"""

import functools
import importlib.util
import os
import threading
import types

import torch
from torch.autograd import forward_ad

from . import cards, interpreter

FLOATS = (torch.float32, torch.bfloat16, torch.float16)  # what the kernels take; fp64 is the reference's alone
FEWEST_FOR_HOPPER = 512  # queries, for `index_scores` and `lightning_select`; a block of Hopper's kernels takes eight
SCORES_AT_ONCE = 1 << 28  # of `lightning_select`: 1 GiB of fp32
GRADIENTS_AT_ONCE = 7 << 29  # bytes of `sparse_attention_backward`: probabilities and rows between its kernels
REDONE_AT_ONCE = 1 << 27  # of its flagged rows, while lists of a fused kernel may still be in memory
PAIRS_AT_ONCE = 1 << 26  # of `indexer_loss`: of p and of scores in fp32, 256 MiB each
SHARES_AT_ONCE = 1 << 29  # of its sparse stage: what keys get from each place of the lists, 1 GiB of bf16
# The steps that can read e4m3 as bytes.
WIDENED = ("index_scores", "lightning_select", "paged_index_scores", "paged_sparse_attention")
IMPORTING = threading.Lock()  # Gluon's modules import each other: threads that begin at once would deadlock
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
    "triton.language.extra.cuda": ("gdc_launch_dependents", "gdc_wait"),
}

try:
    found = importlib.util.find_spec("triton") is not None
except ValueError:  # something without a spec stands for it in sys.modules
    found = False
if not found:
    raise ModuleNotFoundError(
        "dsa_kernels needs Triton, which cannot be imported here (it has wheels for Linux only): dsa_ref has the same "
        "steps and runs without it",
        name="triton",
    )
INTERPRETED = interpreter.chosen()
if INTERPRETED:
    interpreter.turn_on()


def mode() -> str:
    """How kernels run in this process: "interpreter" or "compiled"."""
    return "interpreter" if INTERPRETED else "compiled"


def dispatched() -> bool:
    """Whether somebody looks at operators: torch.compile while it traces, or a mode such as selective checkpointing."""
    return torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack() > 0


def wants_gradient(*tensors: torch.Tensor | None) -> bool:
    """Whether autograd would record what is done with these tensors (None is skipped)."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def check_runnable(differentiable: bool = False, /, **tensors: torch.Tensor | None) -> None:
    """Raise unless the kernels can serve these tensors (None is skipped).

    ValueError: a CPU tensor in compiled mode, a GPU of AMD's or older than compute capability 8.0, one that carries a
    tangent of forward mode or that `torch.func` has wrapped, and, unless the step is differentiable, one that asks for
    a gradient. A derivative that no kernel computes must not pass as zero.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        if not differentiable and torch.is_grad_enabled() and tensor.requires_grad:
            raise ValueError(f"{name} must not require a gradient, which only dsa_ref computes: use torch.no_grad()")
        if torch._C._functorch.is_functorch_wrapped_tensor(tensor):  # it has no memory that a kernel could read
            raise ValueError(
                f"{name} must not be wrapped by torch.func, whose derivatives only dsa_ref computes: call outside of it"
            )
        # no_grad does not take a tangent away; outside of forward mode there is none, and looking takes the host long
        if forward_ad._current_level >= 0 and forward_ad.unpack_dual(tensor).tangent is not None:
            raise ValueError(f"{name} must not carry a tangent, which only dsa_ref computes: use {name}.detach()")
        if INTERPRETED:
            continue
        if torch.version.hip:
            raise ValueError(f"{name} must be on an NVIDIA GPU, got one of ROCm {torch.version.hip}: use dsa_ref there")
        card = cards.card_of(tensor)
        if card is None:
            said = f", and {interpreter.SWITCH} is {os.environ.get(interpreter.SWITCH)!r}"
            raise ValueError(
                f"{name} must be on a CUDA device in compiled mode, got {tensor.device}{said}: move it to the GPU, or "
                f"start Python with {interpreter.SWITCH}=1 to interpret the kernels on the CPU"
            )
        if card.capability < cards.OLDEST:
            got = ".".join(map(str, card.capability))
            raise ValueError(f"{name} must be on a GPU of compute capability 8.0 or newer, got {got}")


def dot_dtype(tensor: torch.Tensor) -> torch.dtype:
    """The type in which a tile of `tensor` goes into `tl.dot`.

    The interpreter takes bf16's bits for integers in `tl.dot`, so there everything is widened to fp32. Bytes of e4m3
    become bf16, which holds every e4m3 value exactly.
    """
    if INTERPRETED:
        return torch.float32
    return torch.bfloat16 if tensor.dtype == torch.uint8 else tensor.dtype


def multiprocessors(tensor: torch.Tensor) -> int:
    """How many blocks run side by side at least: 1 in the interpreter."""
    return 1 if INTERPRETED else cards.card_of(tensor).multiprocessors


def hopper_variant(
    step: str, variant: str | None, default: str, *inputs: torch.Tensor | int | None
) -> types.ModuleType | None:
    """The module `dsa_kernels.hopper.<step>`, or None for the portable kernel.

    variant: "portable", "hopper", or None for `default`, where "hopper" means: if it can serve these inputs. Steps that
    take FP8 know "widened", too.
    Raises ValueError for any other variant, and for one that cannot serve. An error inside the module itself is never
    taken for "cannot serve": it surfaces.
    """
    names = ("portable", "hopper", "widened") if step in WIDENED else ("portable", "hopper")
    if variant not in (None, *names):
        allowed = ", ".join(f'"{name}"' for name in names)
        raise ValueError(f"variant must be {allowed} or None, got {variant!r}")
    fp8 = any(isinstance(x, torch.Tensor) and x.dtype in (torch.float8_e4m3fn, torch.uint8) for x in inputs)
    if variant == "widened" and not fp8:
        raise ValueError(f'variant "widened" needs float8_e4m3fn, got {str(inputs[0].dtype).removeprefix("torch.")}')
    if (variant or default) != "hopper":
        return None
    module, reason = None, NO_GLUON
    with IMPORTING:
        if gluon_compiles():
            module = importlib.import_module(f".hopper.{step}", __package__)
    if module:
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


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up: `triton.cdiv`, which takes the host some microseconds."""
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The least power of two that is at least n, 0 for 0: `triton.next_power_of_2`, likewise."""
    return 1 << (n - 1).bit_length() if n else 0


def aligned(x: torch.Tensor) -> torch.Tensor:
    """x contiguous from a 16-byte boundary, as TMA and asynchronous copies want it."""
    x = x.contiguous()
    return x if x.data_ptr() % 16 == 0 else x.clone()
