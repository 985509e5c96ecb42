"""Launch a learner's Triton kernel so that it cannot pass by luck: guarded memory, poisoned outputs, odd strides.

The kernel arrives from the notebook as an object, so nothing here imports triton. What is seen in the interpreter alone
comes from `interpreting`.
"""

import contextlib
import inspect
import math
import re
import textwrap

import numpy as np
import torch

from dsa_ref.testing import Failed

from . import interpreting
from .checking import NOT_WRITTEN, bits, crashed, expect_close

# Elements of NaN (or the largest integer) on either side of every buffer, at least, and as many as it has itself: wide,
# so strays land in it, and so do those of a number that wrapped around in 16 bits.
GUARD = 4096
LONG, NARROW = 9 * 8192, "do numbers of places, rows or keys pass through 8 or 16 bits?"  # a length above 2^16


def device():
    """Where kernels run: on the GPU if there is one, else interpreted on the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# ----------------------------------------------------------------------------------------------------------- memory


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
        made = _inside(shape, dtype, row_gap, lambda buffer: buffer.view(torch.uint8).fill_(255))  # NaN in any format
    else:
        made = _inside(shape, dtype, row_gap, lambda buffer: buffer.fill_(torch.iinfo(dtype).max - 1))
        made.fill_(torch.iinfo(dtype).max)
    made.may_be_written = True  # every other tensor is an input to `launch`
    return made


def unwritten(tensor):
    """Where an `output` still holds its poison, bool of its shape."""
    return bits(tensor) == (-1 if tensor.dtype.is_floating_point else torch.iinfo(tensor.dtype).max)


def _inside(shape, dtype, row_gap, poison):
    *rows, width = shape
    n = math.prod(rows) * (width + row_gap)
    guard = max(GUARD, n)
    buffer = torch.empty(n + 2 * guard, dtype=dtype, device=device())
    poison(buffer)
    return buffer[guard : guard + n].view(*rows, width + row_gap)[..., :width]


def _outside(tensor):
    """Everything of the buffer that `tensor` does not cover, as bytes."""
    buffer = torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0).clone()
    torch.as_strided(buffer, tensor.shape, tensor.stride(), tensor.storage_offset()).zero_()
    return buffer.view(torch.uint8)


# --------------------------------------------------------------------------------------------------------- launches


def launch(kernel, grid, *args, **constants):
    """Run kernel[grid](*args, **constants) and fail if it wrote to anything but its outputs; what Triton returned.

    The tensors come from this module: outputs from `output`, all others are inputs. Interpreted, what a masked lane of
    a load without `other` holds is as undefined as Triton says: NaN or interpreting.STRAY.
    Raises: NotImplementedError for an untouched stub, Failed for an error of its own, for a write out of bounds, and
    for an input that was changed.
    """
    _check_kernel(kernel)
    tensors = {i: x for i, x in enumerate(args) if isinstance(x, torch.Tensor)}
    outside = {i: _outside(x) for i, x in tensors.items()}
    inputs = {i: x.clone() for i, x in tensors.items() if not getattr(x, "may_be_written", False)}
    try:
        with interpreting.alone(), interpreting.undefined_others():
            launched = kernel[grid](*args, **constants)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
    except Exception as error:
        raise crashed(error.__cause__ or error) from error
    names = _names(kernel)
    for i, tensor in tensors.items():
        if not torch.equal(outside[i], _outside(tensor)):
            raise Failed(
                f"{names[i]}: memory outside the tensor of shape {list(tensor.shape)} was written",
                "the store has no mask, or the wrong one, or a wrong stride; or more was stored than there is room "
                "for; or an offset wrapped around in 8 or 16 bits",
                "bounds",
            )
    for i, given in inputs.items():
        if not torch.equal(bits(given), bits(tensors[i])):
            raise Failed(
                f"{names[i]} was changed by the kernel",
                "an input is only read: other programs, and whoever launched the kernel, still need it",
                "inputs",
            )
    return launched


def expect_reads_inside(kernel, grid, *args, **constants):
    """Run the kernel as `launch` does and fail if a `tl.load` read outside its tensors, even if no result shows it.

    Only the interpreter can tell; compiled, this is a launch like any other. To be called after the results were
    judged, since a read that spoils them has a better name there.
    """
    tensors = {name: x for name, x in zip(_names(kernel), args, strict=False) if isinstance(x, torch.Tensor)}
    inside = np.concatenate([_addresses(x) for x in tensors.values()])
    with interpreting.accesses() as seen:
        launch(kernel, grid, *args, **constants)
    for access in seen:
        stray = access.addresses[~np.isin(access.addresses, inside)]
        if len(stray) and not access.store:  # `launch` judges the stores
            name, offset = _place(tensors, int(stray[0]))
            x = tensors[name]
            raise Failed(
                f"program {access.program} read {name} + {offset}, outside the tensor of shape {list(x.shape)} and "
                f"strides {list(x.stride())}; no result shows it, but nobody promises what lies there, or that it may "
                "be read",
                "a load without a mask, or with the wrong one: masking the store does not undo the read",
                "bounds",
            )


def expect_own_places(kernel, grid, *args, own, cause, **constants):
    """Run the kernel as `launch` does and fail if a program wrote an element of the output that is not its own.

    own: (program ids) -> the part of the output that is that program's, a view. Only the interpreter can tell.
    """
    tensors = {name: x for name, x in zip(_names(kernel), args, strict=False) if isinstance(x, torch.Tensor)}
    with interpreting.accesses() as seen:
        launch(kernel, grid, *args, **constants)
    for access in seen:
        if access.store:
            stray = access.addresses[~np.isin(access.addresses, _addresses(own(*access.program)))]
            if len(stray):
                name, offset = _place(tensors, int(stray[0]))
                program = access.program[: len(grid)]
                raise Failed(
                    f"program {program if len(grid) > 1 else program[0]} of {math.prod(grid)} wrote {name} + {offset}, "
                    "which is another program's",
                    cause,
                )


def expect_full_precision(kernel, grid, *args, **constants):
    """Run the kernel as `launch` does and fail if a `tl.dot` of fp32 numbers cuts them to TF32, or to parts in it.

    However the precision is given, and in helper kernels too: the interpreter is asked when it runs, a compiled kernel
    by its intermediate code.
    """
    with interpreting.dots() as precisions:
        launched = launch(kernel, grid, *args, **constants)
    if launched is not None:  # compiled: `ieee` is the attribute's default, which is not printed
        found = re.findall(r"tt\.dot .*inputPrecision = (\w+) : tensor<[\dx]*f32>", launched.asm["ttir"])
        precisions = [name.upper() for name in found]
    for name in precisions:
        if name != "IEEE":
            raise Failed(
                f"a tl.dot of fp32 numbers in {name}, expected IEEE",
                'say input_precision="ieee": on a GPU, tl.dot cuts fp32 numbers to TF32\'s 10 bits unless told '
                "otherwise, and the interpreter does not show it",
            )


def expect_result(got, expected, tolerance, axes, cause, suspects=None):
    """`expect_close` for what a kernel wrote. Places never written are said so; NaN keeps the `cause`, since it was
    taken in from outside of a tensor as a rule."""
    try:
        expect_close(got, expected, tolerance, axes, cause, suspects)
    except Failed as failure:
        if failure.cause == NOT_WRITTEN:
            failure.cause = cause
        if missing := int(unwritten(got).sum()):
            failure.what += f"; {missing} of {got.numel()} places were never written"
        raise


# ---------------------------------------------------------------------------------------------------------- details


def _addresses(x):
    """The address of every element of the tensor."""
    offsets = sum(
        (torch.arange(n) * step).reshape([-1 if i == dim else 1 for i in range(x.dim())])
        for dim, (n, step) in enumerate(zip(x.shape, x.stride(), strict=True))
    )
    return (x.data_ptr() + x.element_size() * offsets).numpy().ravel()


def _place(tensors, address):
    """(name, offset in elements) of the tensor in or near whose buffer the address lies."""

    def distance(item):
        first = item[1].untyped_storage().data_ptr()
        return max(first - address, address - (first + item[1].untyped_storage().nbytes() - 1), 0)

    name, x = min(tensors.items(), key=distance)
    return name, (address - x.data_ptr()) // x.element_size()


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
