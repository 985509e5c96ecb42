"""What only Triton's interpreter can show of a kernel: every address that it reads or writes, and every `tl.dot`.

Compiled, nothing can be watched: each of these contexts then yields an empty list. Nothing here imports triton.
"""

import contextlib
import dataclasses
import sys
from unittest import mock

import numpy as np

STRAY = 100  # an undefined integer: as a row of a small tensor it leads into the guard, not to a crash


@dataclasses.dataclass
class Access:
    """One `tl.load` or `tl.store` of one program, lanes that its mask switched off left out."""

    program: tuple  # its three program ids
    store: bool
    floats: bool  # whether the elements are floating-point numbers
    addresses: np.ndarray  # int64, in bytes


def interpreter():
    """What executes a kernel's operations in the interpreter; None in compiled mode."""
    return getattr(sys.modules.get("triton.runtime.interpreter"), "interpreter_builder", None)


def alone():
    """While interpreting, no other thread's kernel runs: what is changed for this one would change that one too."""
    if interpreter() is None:
        return contextlib.nullcontext()
    from dsa_kernels.interpreter import LOCK  # here: where nothing is interpreted, nothing needs triton

    return LOCK


@contextlib.contextmanager
def accesses(real=True):
    """The list of Access that grows while kernels are interpreted.

    real: False only watches. Nothing is stored and no float is loaded, so offsets may lead anywhere.
    """
    seen, builder = [], interpreter()
    if builder is None:
        yield seen
        return

    def watched(access, store, at):  # at: where the mask stands behind the pointers
        def watch(ptrs, *rest):
            mask, floats = rest[at], bool(ptrs.get_element_ty().is_floating())
            on = np.broadcast_to(np.asarray(mask.data).astype(bool), np.shape(ptrs.data))
            program = tuple(int(i) for i in builder.grid_idx)
            seen.append(Access(program, store, floats, np.asarray(ptrs.data)[on].astype(np.int64).ravel()))
            if not real and (floats or store):
                rest = list(rest)
                rest[at] = type(mask)(np.zeros_like(on), mask.dtype)
            return access(ptrs, *rest)

        return watch

    with contextlib.ExitStack() as stack:
        stack.enter_context(alone())
        for name, store, at in (("create_masked_load", False, 0), ("create_masked_store", True, 1)):
            method = watched(getattr(builder, name), store, at)
            stack.enter_context(mock.patch.object(builder, name, method))
        yield seen


@contextlib.contextmanager
def dots():
    """The input precisions of every `tl.dot` on fp32 numbers, in capitals: ["IEEE", "TF32"]."""
    seen, builder = [], interpreter()
    if builder is None:
        yield seen
        return
    dot = builder.create_dot

    def watched(a, b, d, precision, *rest):
        if a.get_element_ty().primitive_bitwidth == 32:
            seen.append(precision.name.upper())
        return dot(a, b, d, precision, *rest)

    with alone(), mock.patch.object(builder, "create_dot", watched):
        yield seen


@contextlib.contextmanager
def undefined_others():
    """While interpreting, a masked lane of a `tl.load` without `other` holds NaN (or the integer STRAY).

    Triton leaves it undefined. The zero that the interpreter and NVIDIA's compiler put there is luck.
    """
    builder = interpreter()
    if builder is None:
        yield
        return
    load = builder.create_masked_load

    def poisoned(ptrs, mask, other, *rest):
        loaded = load(ptrs, mask, other, *rest)
        if other is None:
            kind = loaded.data.dtype
            poison = np.nan if kind.kind == "f" else True if kind.kind == "b" else STRAY
            loaded.data = np.where(mask.data, loaded.data, kind.type(poison))
        return loaded

    with mock.patch.object(builder, "create_masked_load", poisoned):
        yield
