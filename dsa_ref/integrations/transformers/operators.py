"""The three steps that a sparse layer takes from a package: as functions, and as operators for torch.compile.

A package is named by its import name, since an operator takes no module. A compiled graph holds an operator whole: what
it launches, and what it looks at, is not traced. An operator has no gradient: where one is wanted, the step itself
runs, between two graphs.
"""

import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from ...contracts import unchecked_values
from ...quantize import dequantize

MANY = 16  # times one sequence's selected rows, up to which a copy of all is quicker than ten small steps


def narrow(x: Tensor, rotate: bool, ops: str) -> tuple[Tensor, Tensor]:
    """FP8, after Hadamard if rotate, as V3.2 does with its indexer's q and k: x [.., Di] as (float8_e4m3fn, scale fp32
    [..])."""
    steps = importlib.import_module(ops)
    return steps.quantize(steps.hadamard(x) if rotate else x)


def widened(x: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """What FP8 numbers stand for, exactly: four bits and a power of two fit into any dtype."""
    return dequantize(x, scale).to(dtype)


def select(
    q: Tensor, keys: Tensor, w: Tensor, scale: Tensor | None, start: Tensor, end: Tensor, seen: Tensor | None, k: int,
    ops: str,
) -> Tensor:  # fmt: skip
    """The k best keys of each query, int32 [B, S, k], by `lightning_select` of the package, a sequence at a time.

    q: [B, S, Hi, Di]; keys: [B, T, Di] in its dtype; w: fp32 [B, S, Hi]; scale: fp32 [B, T] or None; start, end int32
    [B, S] and seen bool [B, T]: as in `Visible`.
    """
    lists, best = [], importlib.import_module(ops).lightning_select
    for b in range(len(q)):
        own, factors, there = keys[b], None if scale is None else scale[b], None
        if seen is not None:
            there = seen[b].nonzero()[:, 0]
            own, factors = own[there], None if scale is None else factors[there]
        if len(own) == 0:
            lists.append(torch.full((q.shape[1], k), -1, dtype=torch.int32, device=q.device))
            continue
        chosen = best(q[b], own, w[b], k, k_scale=factors, start=start[b], end=end[b])
        if there is not None:
            chosen = torch.where(chosen < 0, -1, there[chosen.clamp(min=0)]).int()
        lists.append(chosen)
    return torch.stack(lists)


def attend(q: Tensor, latent: Tensor, turned: Tensor, indices: Tensor, scale: float, ops: str) -> Tensor:
    """`sparse_attention` of the package over the rows latent | turned that indices name: [B, S, H, C].

    q: [B, S, H, C + R]; latent: [B, T, C]; turned: [B, T, R]; indices: int32 [B, S, k]. Of long caches only the
    selected rows are put together.
    """
    attention, (B, S, k), (_, T, C) = importlib.import_module(ops).sparse_attention, indices.shape, latent.shape
    with unchecked_values():  # the selection was made here
        if (MANY if B == 1 else 2) * S * k > T:
            rows = torch.cat((latent, turned), dim=-1)
            return torch.stack([attention(q[b], rows[b], indices[b], scale, C)[0] for b in range(B)])
        places = (indices.clamp(min=0).long() + T * torch.arange(B, device=q.device)[:, None, None]).flatten()
        rows = torch.cat((latent.flatten(0, 1)[places], turned.flatten(0, 1)[places]), dim=-1)
        own = torch.arange(B * S * k, dtype=torch.int32, device=q.device).view(B * S, k)
        own = torch.where(indices.flatten(0, 1) < 0, -1, own)
        return attention(q.flatten(0, 1), rows, own, scale, C)[0].unflatten(0, (B, S))


def run(step: Callable, *args) -> Tensor | tuple[Tensor, ...]:
    """step(*args); where torch.compile is tracing, its operator, or a break in the graph for gradients."""
    if not torch.compiler.is_compiling():
        return step(*args)
    wanted = torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in args)
    return BREAKS[step](*args) if wanted else OPERATORS[step](*args)


OPERATORS = {
    step: torch.library.custom_op(f"dsa_ref_transformers::{step.__name__}", step, mutates_args=())
    for step in (narrow, select, attend)
}
BREAKS = {
    step: torch.compiler.disable(
        step, reason=f"{step.__name__} in a graph has no gradient: call within torch.no_grad(), or without fullgraph"
    )
    for step in OPERATORS
}


@OPERATORS[narrow].register_fake
def _(x, rotate, ops):
    return x.new_empty(x.shape, dtype=torch.float8_e4m3fn), x.new_empty(x.shape[:-1], dtype=torch.float32)


@OPERATORS[select].register_fake
def _(q, keys, w, scale, start, end, seen, k, ops):
    return q.new_empty((*q.shape[:2], k), dtype=torch.int32)


@OPERATORS[attend].register_fake
def _(q, latent, turned, indices, scale, ops):
    return q.new_empty((*q.shape[:3], latent.shape[-1]))
