"""Are gradients right? All of them, against the reference in fp32 on the same inputs.

A check returns a note with the errors and raises `Wrong` else. The errors of kernels in bf16 are those of P and dS,
which are rounded to bf16 before their products: some 2^-9 of what is summed.
"""

import torch

from ..checks import Wrong

GRADIENT_ERROR = 1e-2  # ||got - wanted|| / ||wanted||
ROW_ERROR = 0.1  # the same of each row, a query and head or a key
TARGET_ERROR = 1e-2  # sum over a row of |got - wanted|: the row sums to 1
LOSS_ERROR = 1e-3


def check_gradients(got, wanted, error=GRADIENT_ERROR, row_error=ROW_ERROR):
    """got: tensors, in the order of the dict wanted, {name: fp32 tensor of the same shape}; a row is a last dimension.

    A row that is small is judged by a tenth of a usual row's norm, and one that is wanted to be 0 by a thousandth of
    that: where a query sees one key alone, rounding leaves a little of what cancels.
    """
    notes = []
    for (name, want), found in zip(wanted.items(), got, strict=True):
        if found.shape != want.shape:
            raise Wrong(f"{name} has shape {list(found.shape)}, not {list(want.shape)}")
        if not found.isfinite().all():
            raise Wrong(f"{name} is not finite")
        wrong, size = (found.float() - want).norm(dim=-1).flatten(), want.norm(dim=-1).flatten()
        whole = (wrong.norm() / size.norm()).item()
        if not whole <= error:
            raise Wrong(f"{name} is off by {whole:.1e} of its norm")
        least = 0.1 * size.norm() / len(size) ** 0.5
        usual = torch.where(size > 0, size.clamp(min=least), 1e-3 * least)
        if (wrong > row_error * usual).any():
            row = int((wrong - row_error * usual).argmax())
            raise Wrong(f"row {row} of {len(size)} of {name} is off by {wrong[row]:.1e} where it is {size[row]:.1e}")
        notes.append(f"{name} {whole:.1e}")
    return "errors: " + ", ".join(notes)


def check_target(got, wanted):
    """The mean probabilities fp32 [T, k] against the reference's."""
    error = (got - wanted).abs().sum(dim=1).max().item()
    if not error <= TARGET_ERROR:
        raise Wrong(f"target is off by {error:.1e} in a row that sums to 1")
    return f"target {error:.1e}"


def check_loss(got, wanted):
    """A loss, a scalar, against the reference's."""
    error = abs(got.item() / wanted.item() - 1)
    if not error <= LOSS_ERROR:
        raise Wrong(f"the loss is {got.item():.6g}, not {wanted.item():.6g}")
    return f"loss {error:.1e}"
