"""The small steps around a decode step's selection and attention: what is new goes into the pages and the queries.

    index keys    LayerNorm, RoPE, Hadamard, FP8, into the index pages
    latent rows   RMSNorm of the latent, RoPE of the rest, into the KV pages
    queries       head weights in fp32; RoPE, Hadamard and FP8 with the scale times the weights; RoPE into a buffer

Each is a composition of steps that stand elsewhere, rounded where they round. They are steps of their own since one
token is little work: what costs are launches, and `dsa_kernels` makes one of each composition.

Source: SPEC section 2 steps 1 to 6, sections 6 and 10.
"""

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from .contracts import (
    Array,
    check_append_index,
    check_append_latents,
    check_finite,
    check_head_weights,
    check_index_queries,
    check_place_tokens,
    check_rms_norm,
    check_turn_into,
)
from .hadamard import hadamard
from .paged import write_index, write_kv
from .precision import exact
from .quantize import quantize
from .rope import rope


class Places(NamedTuple):
    """Where the N newest tokens of B sequences stand, as the steps of a decode step take it."""

    page_table: Tensor  # int32 [B, P]
    lengths: Tensor  # int32 [B], with the new tokens
    positions: Tensor  # int64 [B, N]
    slots: Tensor  # int64 [B · N]


def layer_norm_loops(x: Array, weight: Array, bias: Array, eps: float) -> Array:
    """(x - mean) / sqrt(variance + eps) · weight + bias for each row of x [rows, D], float64."""
    out = np.zeros(x.shape)
    for r, row in enumerate(np.asarray(x, dtype=np.float64)):
        mean = sum(row) / len(row)
        variance = sum((value - mean) ** 2 for value in row) / len(row)
        for d, value in enumerate(row):
            out[r, d] = (value - mean) / np.sqrt(variance + eps) * weight[d] + bias[d]
    return out


def rms_norm_loops(x: Array, weight: Array, eps: float) -> Array:
    """x / sqrt(mean of x² + eps) · weight for each row of x [rows, D], float64."""
    out = np.zeros(x.shape)
    for r, row in enumerate(np.asarray(x, dtype=np.float64)):
        mean = sum(value**2 for value in row) / len(row)
        for d, value in enumerate(row):
            out[r, d] = value / np.sqrt(mean + eps) * weight[d]
    return out


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) · weight over the last dim, in fp32, rounded to x.dtype once. Differentiable.

    x: float [T, dim]; weight: float [dim].

    Raises: ValueError for other shapes or devices or an eps that is not positive, TypeError for other dtypes.
    """
    check_rms_norm(x, weight, eps)
    return F.rms_norm(x.float(), weight.shape, weight.float(), eps).to(x.dtype)


@torch.no_grad()
def append_index(
    index_pages: Tensor,
    slots: Tensor,
    k: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    positions: Tensor,
    freqs: Tensor,
    layout: str = "half",
) -> None:
    """Store T tokens' index keys in place: LayerNorm, RoPE on the first R dims, Hadamard, FP8, at physical slots.

    index_pages: uint8 [pages, page · (Di + 4)]; slots: int64 [T], distinct; k: float [T, Di], projected, Di a power of
    two; weight, bias: float [Di], the norm's; positions: int [T]; freqs: fp32 [R/2]; layout: as for `rope`. The norm is
    in fp32 and rounded to k.dtype, as are RoPE and Hadamard after it.

    Raises: ValueError for other shapes, devices or layouts, slots outside of [0, pages · page) or twice, NaN or
    infinity; TypeError for other dtypes. Then nothing is stored.
    """
    check_append_index(index_pages, slots, k, weight, bias, eps, positions, freqs, layout)
    normed = F.layer_norm(k.float(), weight.shape, weight.float(), bias.float(), eps).to(k.dtype)
    rotated = hadamard(rope(normed, positions, freqs, layout))
    check_finite(k=rotated)
    write_index(index_pages, slots, *quantize(rotated))


@torch.no_grad()
def append_latents(
    kv_pages: Tensor, slots: Tensor, rows: Tensor, weight: Tensor, eps: float, positions: Tensor, freqs: Tensor
) -> None:
    """Store T tokens' latent rows in place: RMSNorm of the first v_dim columns, interleaved RoPE on the other R.

    kv_pages: uint8 [pages, page, row] for FP8 rows, or [pages, page, D] in rows' dtype; slots: int64 [T], distinct;
    rows: float [T, D], projected, D = v_dim + R; weight: float [v_dim]; positions: int [T]; freqs: fp32 [R/2]. The norm
    is in fp32; both are rounded to rows.dtype, and then as `pack_kv` does where rows are FP8.

    Raises: ValueError for other shapes or devices, slots outside of [0, pages · page) or twice, NaN or infinity that an
    FP8 row cannot hold; TypeError for other dtypes. Then nothing is stored.
    """
    check_append_latents(kv_pages, slots, rows, weight, eps, positions, freqs)
    latent, turning = rows.tensor_split((len(weight),), dim=1)
    latent = F.rms_norm(latent.float(), weight.shape, weight.float(), eps).to(rows.dtype)
    if kv_pages.dtype == torch.uint8:
        check_finite(rows=latent)
    turned = rope(turning, positions, freqs, "interleaved")
    write_kv(kv_pages, slots, torch.cat((latent, turned), dim=1), len(weight))


@torch.no_grad()
@exact
def head_weights(x: Tensor, weight: Tensor) -> Tensor:
    """The indexer's head weights x · weightᵀ, fp32 [T, Hi], with both sides widened to fp32 first.

    x: float [T, dim]; weight: float [Hi, dim].

    Raises: ValueError for other shapes or devices, TypeError for other dtypes.
    """
    check_head_weights(x, weight)
    return F.linear(x.float(), weight.float())


@torch.no_grad()
def index_queries(
    q: Tensor, w: Tensor, positions: Tensor, freqs: Tensor, layout: str = "half"
) -> tuple[Tensor, Tensor]:
    """The indexer's queries as they are scored: RoPE, Hadamard, FP8, and head weights with everything in them.

    q: float [T, Hi, Di], projected, Di a power of two; w: fp32 [T, Hi], projected; positions: int [T]; freqs: fp32
    [R/2]; layout: as for `rope`. Returns (q_idx float8_e4m3fn [T, Hi, Di], fp32 w · Hi^-0.5 · Di^-0.5 · q_scale).

    Raises: ValueError for other shapes, devices or layouts, NaN or infinity in q; TypeError for other dtypes.
    """
    check_index_queries(q, w, positions, freqs, layout)
    _, Hi, Di = q.shape
    rotated = hadamard(rope(q, positions, freqs, layout))
    check_finite(q=rotated)
    q_idx, q_scale = quantize(rotated)
    return q_idx, w * Hi**-0.5 * Di**-0.5 * q_scale


@torch.no_grad()
def turn_into(out: Tensor, x: Tensor, positions: Tensor, freqs: Tensor, layout: str) -> None:
    """`rope` of x [T, heads, R], all of it, written into out [T, heads, R], which may be a part of wider rows.

    out: a float tensor in which no place lies on another; positions: int [T]; freqs: fp32 [R/2]. Rounded to x.dtype and
    then to out's.

    Raises: ValueError for other shapes, devices or layouts; TypeError for other dtypes.
    """
    check_turn_into(out, x, positions, freqs, layout)
    out.copy_(rope(x, positions, freqs, layout))


def place_tokens_loops(table: Array, lengths: Array, sequences: Array, N: int, page_size: int) -> tuple[Array, ...]:
    """The four arrays of `Places`, token by token."""
    B = len(sequences)
    page_table, totals = np.zeros((B, table.shape[1]), dtype=np.int32), np.zeros(B, dtype=np.int32)
    positions, slots = np.zeros((B, N), dtype=np.int64), np.zeros(B * N, dtype=np.int64)
    for b, sequence in enumerate(sequences):
        page_table[b], totals[b] = table[sequence], lengths[sequence] + N
        for n in range(N):
            positions[b, n] = lengths[sequence] + n
            page, place = positions[b, n] // page_size, positions[b, n] % page_size
            slots[b * N + n] = int(table[sequence, page]) * page_size + place
    return page_table, totals, positions, slots


def place_tokens(table: Tensor, lengths: Tensor, sequences: Tensor, N: int, page_size: int) -> Places:
    """Where the next N tokens of some sequences go, from what the device knows alone: no host waits.

    table: int32 [rows, P], the pages of every sequence; lengths: int32 [rows], without the N tokens, for which pages
    must be in the table; sequences: int64 [B], rows of both; page_size: tokens a page.

    Raises: ValueError for other shapes or devices, sequences outside of the table or lengths past it; TypeError for
    other dtypes.
    """
    check_place_tokens(table, lengths, sequences, N, page_size)
    page_table, before = table[sequences], lengths[sequences]
    positions = before.long()[:, None] + torch.arange(N, device=table.device)
    pages = page_table.gather(1, (positions // page_size).clamp(max=table.shape[1] - 1)).long()
    slots = pages * page_size + positions % page_size
    return Places(page_table, before + N, positions, slots.flatten())
