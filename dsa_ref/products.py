"""Products over the (query, key) pairs that a mask allows, and over no others: backward too, and next to NaN.

A hidden pair has the weight 0. That keeps its key out of a sum unless the key holds NaN or infinity, as 0 · NaN is NaN.
In each einsum here "t" is the query and "s" the key; it is computed as `precision` says, also in the backward pass.
"""

import torch
from torch import Tensor

from .precision import exact_arithmetic


def masked_einsum(equation: str, a: Tensor, b: Tensor, mask: Tensor | None = None) -> Tensor:
    """torch.einsum of two tensors over the pairs where mask [T, S] holds, all without one. Differentiable twice, and in
    forward mode.

    A result that has both t and s is 0 for hidden pairs. Where t or s is summed over, the operands that have both must
    hold 0 for hidden pairs, and the other may hold anything there.
    """
    return _MaskedEinsum.apply(equation, a, b, mask)


def gather_rows(table: Tensor, lists: Tensor, mask: Tensor) -> Tensor:
    """The rows of table [S, D] that lists [T, k] name, [T, k, D], and zeros where the mask [T, k] does not hold."""
    gathered = table[lists.clamp(min=0)]
    return gathered if mask.all() else gathered.masked_fill(~mask[:, :, None], 0.0)


class _MaskedEinsum(torch.autograd.Function):
    """The derivative of such a product is such a product, with the same mask."""

    @staticmethod
    def forward(equation, a, b, mask):
        operands, result = equation.split("->")
        with exact_arithmetic():
            if mask is None:
                return torch.einsum(equation, a, b)
            if _has_pairs(result):
                return torch.einsum(equation, a, b).masked_fill_(_hidden(mask, result), 0.0)
            for dims, values in zip(operands.split(","), (a, b), strict=True):
                if mask.numel() and not _has_pairs(dims) and not values.isfinite().all():  # no pair: sums of nothing
                    return _one_by_one(equation, a, b, mask)
            if result == "sd":
                return torch.einsum(f"{operands}->ds", a, b).T  # on a CPU, 8 times as fast as to [s, d]
            return torch.einsum(equation, a, b)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.equation, a, b, mask = inputs
        ctx.save_for_backward(a, b, mask)
        ctx.save_for_forward(a, b, mask)

    @staticmethod
    def backward(ctx, gradient):
        a, b, mask = ctx.saved_tensors
        operands, result = ctx.equation.split("->")
        of_a, of_b = operands.split(",")
        if mask is not None and _has_pairs(result):
            gradient = gradient.masked_fill(_hidden(mask, result), 0.0)
        _, for_a, for_b, _ = ctx.needs_input_grad
        grad_a = masked_einsum(f"{result},{of_b}->{of_a}", gradient, b, mask) if for_a else None
        grad_b = masked_einsum(f"{result},{of_a}->{of_b}", gradient, a, mask) if for_b else None
        return None, grad_a, grad_b, None

    @staticmethod
    def jvp(ctx, _equation, change_of_a, change_of_b, _mask):
        a, b, mask = ctx.saved_tensors
        pairs = ((change_of_a, b), (a, change_of_b))
        return sum(masked_einsum(ctx.equation, *pair, mask) for pair in pairs if None not in pair)


def _has_pairs(dims: str) -> bool:
    return "t" in dims and "s" in dims


def _hidden(mask: Tensor, dims: str) -> Tensor:
    """Where the mask [T, S] does not hold, in the shape of a tensor with these dims, which begin with t."""
    return ~mask[(slice(None), *(slice(None) if dim == "s" else None for dim in dims[1:]))]


def _one_by_one(equation, a, b, mask):
    """A sum over t or s, for one place of the other at a time: there, what the place cannot see is replaced by 0."""
    operands, result = equation.split("->")
    kept = result[0]  # t where s is summed over, and s where t is
    rows = []
    for place, sees in enumerate(mask if kept == "t" else mask.T):
        seen = []
        for dims, values in zip(operands.split(","), (a, b), strict=True):
            if kept in dims:
                seen.append(values.select(dims.index(kept), place))
            else:
                seen.append(values.masked_fill(~sees[(..., *(None,) * (values.dim() - 1))], 0.0))
        rows.append(torch.einsum(equation.replace(kept, ""), *seen))
    return torch.stack(rows)
