"""Launch a learner's Triton kernel so that it cannot pass by luck: guarded memory, poisoned outputs, odd strides.

The kernel arrives from the notebook as an object, so nothing here imports triton.
"""

import ast
import inspect
import math
import textwrap

import torch

from ..compare import Failed
from .core import crashed

GUARD = 512  # elements of NaN (or the largest integer) on either side of every buffer


def device():
    """Where kernels run: on the GPU if there is one, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def guarded(values, row_gap=0):
    """A copy of values inside a larger buffer of NaN, on the kernels' device: reading past its end is then seen.

    row_gap: so many NaN elements between the rows of the last dim as well, so that a wrong stride is seen.
    """
    return _inside(values.shape, values.dtype, row_gap).copy_(values)


def output(*shape, dtype=torch.float32, row_gap=0):
    """An output full of NaN (or the largest integer), guarded as `guarded` does: what is not written is seen."""
    return _inside(shape, dtype, row_gap)


def _inside(shape, dtype, row_gap):
    *rows, width = shape
    n = math.prod(rows) * (width + row_gap)
    poison = torch.nan if dtype.is_floating_point else torch.iinfo(dtype).max
    buffer = torch.full((n + 2 * GUARD,), poison, dtype=dtype, device=device())
    return buffer[GUARD : GUARD + n].view(*rows, width + row_gap)[..., :width]


def _outside(tensor):
    """Everything of the buffer that `tensor` does not cover, as bytes."""
    buffer = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).clone()
    torch.as_strided(buffer, tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return buffer.view(torch.uint8)


def launch(kernel, grid, *args, **constants):
    """Run kernel[grid](*args, **constants) and fail if it wrote outside its tensors (which come from this module).

    Raises: NotImplementedError for an untouched stub, Failed for an error of its own and for a write out of bounds.
    """
    if "raise NotImplementedError" in source(kernel):
        raise NotImplementedError
    tensors = {i: x for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
    before = {i: _outside(x) for i, x in tensors.items()}
    try:
        kernel[grid](*args, **constants)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        raise crashed(error.__cause__ or error) from error
    names = list(inspect.signature(getattr(kernel, "fn", kernel)).parameters)
    for i, tensor in tensors.items():
        if not torch.equal(before[i], _outside(tensor)):
            raise Failed(
                f"{names[i]}: memory outside the tensor of shape {list(tensor.shape)} was written",
                "the store has no mask, or the wrong one, or a wrong stride",
                "bounds",
            )


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
