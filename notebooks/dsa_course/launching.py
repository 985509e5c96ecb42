"""Launch a learner's Triton kernel so that it cannot pass by luck: guarded memory, poisoned outputs, odd strides.

The kernel arrives from the notebook as an object, so nothing here imports triton.
"""

import ast
import contextlib
import inspect
import math
import sys
import textwrap
from unittest import mock

import numpy as np
import torch

from dsa_ref.testing import Failed

from .checking import crashed

GUARD = 4096  # elements of NaN (or the largest integer) on either side of every buffer: wide, so strays land in it
STRAY = 100  # an undefined integer: as a row of a small tensor it leads into the guard, not to a crash


def device():
    """Where kernels run: on the GPU if there is one, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def guarded(values, row_gap=0):
    """A copy of values inside a larger buffer of NaN, on the kernels' device: reading past its end is then seen.

    row_gap: so many NaN elements between the rows of the last dim as well, so that a wrong stride is seen.
    """
    poison = torch.nan if values.dtype.is_floating_point else torch.iinfo(values.dtype).max
    return _inside(values.shape, values.dtype, row_gap, lambda buffer: buffer.fill_(poison)).copy_(values)


def output(*shape, dtype=torch.float32, row_gap=0):
    """An output full of NaN (or the largest integer), guarded as `guarded` does: what is not written is seen.

    Its poison has other bits than an input's: a kernel that copies one guard over the other is then seen as well.
    """
    if dtype.is_floating_point:
        return _inside(shape, dtype, row_gap, lambda buffer: buffer.view(torch.uint8).fill_(255))  # NaN in every format
    made = _inside(shape, dtype, row_gap, lambda buffer: buffer.fill_(torch.iinfo(dtype).max - 1))
    return made.fill_(torch.iinfo(dtype).max)


def _inside(shape, dtype, row_gap, poison):
    *rows, width = shape
    n = math.prod(rows) * (width + row_gap)
    buffer = torch.empty(n + 2 * GUARD, dtype=dtype, device=device())
    poison(buffer)
    return buffer[GUARD : GUARD + n].view(*rows, width + row_gap)[..., :width]


def _outside(tensor):
    """Everything of the buffer that `tensor` does not cover, as bytes."""
    buffer = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).clone()
    torch.as_strided(buffer, tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return buffer.view(torch.uint8)


def launch(kernel, grid, *args, **constants):
    """Run kernel[grid](*args, **constants) and fail if it wrote outside its tensors (which come from this module).

    Interpreted, what a masked lane of a load without `other` holds is as undefined as Triton says: NaN or STRAY.
    Raises: NotImplementedError for an untouched stub, Failed for an error of its own and for a write out of bounds.
    """
    _check_kernel(kernel)
    tensors = {i: x for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
    before = {i: _outside(x) for i, x in tensors.items()}
    try:
        with _alone(), _undefined_others():
            kernel[grid](*args, **constants)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        raise crashed(error.__cause__ or error) from error
    names = _names(kernel)
    for i, tensor in tensors.items():
        if not torch.equal(before[i], _outside(tensor)):
            raise Failed(
                f"{names[i]}: memory outside the tensor of shape {list(tensor.shape)} was written",
                "the store has no mask, or the wrong one, or a wrong stride",
                "bounds",
            )


def expect_reads_inside(kernel, grid, *args, **constants):
    """Run the kernel as `launch` does and fail if a `tl.load` read outside its tensors, even if no result shows it.

    Only the interpreter can tell; compiled, this is a launch like any other. To be called after the results were
    judged, since a read that spoils them has a better name there.
    """
    tensors = {name: x for name, x in zip(_names(kernel), args, strict=False) if isinstance(x, torch.Tensor)}
    with _alone(), _watched_loads(tensors) as strays:
        launch(kernel, grid, *args, **constants)
    if strays:
        program, address = strays[0]
        name, x = min(tensors.items(), key=lambda item: _distance(item[1], address))
        offset = (address - x.data_ptr()) // x.element_size()
        raise Failed(
            f"program {program} read {name} + {offset}, outside the tensor of shape {list(x.shape)} and strides "
            f"{list(x.stride())}; no result shows it, but nobody promises what lies there, or that it may be read",
            "a load without a mask, or with the wrong one: masking the store does not undo the read",
            "bounds",
        )


def _alone():
    """While interpreting, no other thread's kernel runs: what is changed for this one would change that one too."""
    if interpreter() is None:
        return contextlib.nullcontext()
    from dsa_kernels.interpreter import LOCK  # here: where nothing is interpreted, nothing needs triton

    return LOCK


@contextlib.contextmanager
def _watched_loads(tensors):
    """A list of (program id, address), one for each stray `tl.load` in the interpreter; empty in compiled mode."""
    strays, builder = [], interpreter()
    if builder is None or any(x.is_cuda for x in tensors.values()):
        yield strays
        return
    inside = [_addresses(x) for x in tensors.values()]
    load = builder.create_masked_load

    def watched(ptrs, mask, *rest):
        read = np.asarray(ptrs.data)[np.asarray(mask.data, dtype=bool)].astype(np.int64).ravel()
        stray = read[~np.isin(read, np.concatenate(inside))]
        if len(stray):
            strays.append((tuple(int(i) for i in builder.grid_idx), int(stray[0])))
        return load(ptrs, mask, *rest)

    with mock.patch.object(builder, "create_masked_load", watched):
        yield strays


@contextlib.contextmanager
def _undefined_others():
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


def interpreter():
    """What executes a kernel's operations in the interpreter; None in compiled mode."""
    return getattr(sys.modules.get("triton.runtime.interpreter"), "interpreter_builder", None)


def _addresses(x):
    """The address of every element of the tensor."""
    offsets = sum(
        (torch.arange(n) * step).reshape([-1 if i == dim else 1 for i in range(x.dim())])
        for dim, (n, step) in enumerate(zip(x.shape, x.stride(), strict=True))
    )
    return (x.data_ptr() + x.element_size() * offsets).numpy().ravel()


def _distance(x, address):
    """How far the address lies from the tensor's buffer, in bytes; 0 inside."""
    first = x.untyped_storage().data_ptr()
    return max(first - address, address - (first + x.untyped_storage().nbytes() - 1), 0)


def _check_kernel(kernel):
    """Raise NotImplementedError for an untouched stub, Failed for a function that is no kernel."""
    if not hasattr(kernel, "__getitem__"):  # a plain function: the stub raises when called, whatever it is given
        with contextlib.suppress(Failed, TypeError):
            kernel()
        raise Failed(
            "got a plain function, expected a Triton kernel", "the line @triton.jit above it is missing", "runs"
        )
    if "raise NotImplementedError" in source(kernel):
        raise NotImplementedError


def _names(kernel):
    return list(inspect.signature(getattr(kernel, "fn", kernel)).parameters)


def source(kernel):
    """The text of the kernel, as the learner wrote it."""
    return textwrap.dedent(inspect.getsource(getattr(kernel, "fn", kernel)))


def dots_are_exact(kernel):
    """Whether every `tl.dot` in the kernel says input_precision="ieee"; without it, fp32 is cut to TF32 on a GPU.

    Read from the source, since the interpreter does not round to TF32.
    """
    calls = [n for n in ast.walk(ast.parse(source(kernel))) if isinstance(n, ast.Call)]
    dots = [n for n in calls if isinstance(n.func, ast.Attribute) and n.func.attr == "dot"]
    return all(
        any(k.arg == "input_precision" and getattr(k.value, "value", None) == "ieee" for k in n.keywords) for n in dots
    )
