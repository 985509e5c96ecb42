"""Notebooks 01 to 07: the right formulas, but rounded on the way, of another dtype, by loops or by dense work.

Small whole numbers and contiguous tensors of usual sizes do not show these faults.
"""

import itertools
import math

import numpy as np
import torch

import dsa_ref
from dsa_ref.dense_attention import mha_attention
from dsa_ref.testing import attention_recall, overlap

from . import wrong


def bf16(x):
    return x.bfloat16().float()


def viewed(x):
    """x, where its memory is in order; else torch refuses."""
    return x.view(-1).view(x.shape)


def causal_attention(q, k, v):
    return mha_attention(q, k, v, q.shape[2] ** -0.5, None)[0]


# ------------------------------------------------------------------------------------------- 01, dense attention

wrong("dense_attention", "shape")(lambda q, k, v: causal_attention(q.double(), k.double(), v.double()))
wrong("dense_attention", "shape")(lambda q, k, v: causal_attention(q, k, v).squeeze())
wrong("dense_attention", "shape")(lambda q, k, v: causal_attention(q, k, v).tolist())
wrong("dense_attention", "values")(lambda q, k, v: causal_attention(bf16(q), k, v))
wrong("dense_attention", "runs")(lambda q, k, v: causal_attention(viewed(q), k, v))


@wrong("dense_attention", "no loop over tokens")
def a_loop_in_a_comprehension(q, k, v):
    scale = q.shape[2] ** -0.5
    return torch.stack(
        [
            torch.einsum("hs,shd->hd", (torch.einsum("hd,shd->hs", q[t], k[: t + 1]) * scale).softmax(1), v[: t + 1])
            for t in range(len(q))
        ]
    )


@wrong("attention_flops", "growth with T")
def flops_as_text(T, H, D):
    return f"{2 * H * T * (T + 1) * D}"


wrong("attention_bytes", "two ints")(lambda T, H, D, n: (2.0 * T * H * D * n, 1.0 * H * T * T * n))
wrong("attention_bytes", "two ints")(lambda T, H, D, n: (2 * T * H * D * n, None))


@wrong("bill_growth", "whole text")
def growth_as_text(short, long):
    f = long / short
    return {"whole text": str(f * f), "next token": f, "cache": f, "score matrix": f * f}


# --------------------------------------------------------------------------------------------- 02, index scores


def all_scores(q_idx, k_idx, w):
    """Equation 1 in the dtypes that came in."""
    T, S = len(q_idx), len(k_idx)
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q_idx, k_idx).relu(), w)
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


wrong("index_scores", "shape")(lambda q, k, w: all_scores(q.double(), k.double(), w.double()))
wrong("index_scores", "fp32 throughout")(lambda q, k, w: all_scores(bf16(q), bf16(k), w))
wrong("index_scores", "fp32 throughout")(lambda q, k, w: all_scores(q.half().float(), k.half().float(), w))
wrong("index_scores", "fp32 throughout")(lambda q, k, w: all_scores(q.float(), k.float(), bf16(w)))
wrong("index_scores", "runs")(lambda q, k, w: all_scores(viewed(q).float(), k.float(), w))


@wrong("index_scores", "no loops")
def four_loops(q_idx, k_idx, w):
    T, Hi, Di = q_idx.shape
    scores = torch.full((T, len(k_idx)), -torch.inf)
    q, k, weights = (x.tolist() for x in (q_idx, k_idx, w))
    for t in range(T):
        for s in range(len(k) - T + t + 1):
            dots = [sum(q[t][h][d] * k[s][d] for d in range(Di)) for h in range(Hi)]
            scores[t, s] = sum(weights[t][h] * max(dot, 0.0) for h, dot in enumerate(dots))
    return scores


@wrong("index_scores", "no loops")
def a_loop_over_heads(q_idx, k_idx, w):
    q, k, (T, S) = q_idx.float(), k_idx.float(), (len(q_idx), len(k_idx))
    scores = sum(w[:, h, None] * (q[:, h] @ k.T).relu() for h in range(q.shape[1]))
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


@wrong("index_scores", "no loops")
def a_loop_inside_map(q_idx, k_idx, w):
    """No line of Python is repeated, but torch is called once a query."""
    keys = k_idx.float().T
    dots = torch.stack(list(map(torch.matmul, q_idx.float(), itertools.repeat(keys)))).relu()
    T, S = len(q_idx), len(k_idx)
    scores = torch.einsum("ths,th->ts", dots, w)
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


def weights_of(x, W_w, q_scale, Hi, Di):
    return x @ W_w * q_scale * (Hi * Di) ** -0.5


wrong("head_weights", "shape")(lambda x, W, q, Hi, Di: weights_of(x.double(), W.double(), q, Hi, Di))
wrong("head_weights", "fp32 throughout")(lambda x, W, q, Hi, Di: weights_of(bf16(x), W.float(), q, Hi, Di))
wrong("head_weights", "fp32 throughout")(lambda x, W, q, Hi, Di: weights_of(x.float(), bf16(W), q, Hi, Di))
wrong("head_weights", "fp32 throughout")(lambda x, W, q, Hi, Di: weights_of(x.float(), W.float(), bf16(q), Hi, Di))
wrong("head_weights", "fp32 throughout")(lambda x, W, q, Hi, Di: weights_of(x.to(W.dtype), W, 1, Hi, Di).float() * q)
wrong("zero_probability", "a probability")(lambda Hi: [0.5**Hi])
wrong("zero_probability", "exact")(lambda Hi: round(0.5**Hi, 12))


# ---------------------------------------------------------------------------------- 04, gathered attention


def attend(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)


@wrong("gathered_attention", "shapes")
def attends_in_fp64(q, kv, indices, scale, v_dim):
    return attend(q.double(), kv.double(), indices, scale, v_dim)


@wrong("gathered_attention", "values")
def attends_with_rounded_queries(q, kv, indices, scale, v_dim):
    return attend(bf16(q), kv, indices, scale, v_dim)


@wrong("gathered_attention", "log-sum-exp")
def lse_in_half_precision(q, kv, indices, scale, v_dim):
    out, lse = attend(q, kv, indices, scale, v_dim)
    return out, lse.half().float()


@wrong("gathered_attention", "values")
def scale_by_heart(q, kv, indices, scale, v_dim):
    return attend(q, kv, indices, 0.4, v_dim)


@wrong("gathered_attention", "runs")
def views_the_queries(q, kv, indices, scale, v_dim):
    return attend(viewed(q), kv, indices, scale, v_dim)


@wrong("gathered_attention", "sparse work")
def scores_all_rows_one_query_at_a_time(q, kv, indices, scale, v_dim):
    """In NumPy: no FLOP is torch's, and no array is ever as large as T · S."""
    q, kv, indices = q.numpy(), kv.numpy(), indices.numpy()
    out, lse = np.zeros((*q.shape[:2], v_dim), np.float32), np.full(q.shape[:2], -np.inf, np.float32)
    for t, row in enumerate(indices):
        chosen = np.isin(np.arange(len(kv)), row)
        if chosen.any():
            scores = np.where(chosen, q[t] @ kv.T * np.float32(scale), -np.inf)
            m = scores.max(axis=1, keepdims=True)
            p = np.exp(scores - m)
            out[t] = p / p.sum(axis=1, keepdims=True) @ np.where(chosen[:, None], kv, 0)[:, :v_dim]
            lse[t] = m[:, 0] + np.log(p.sum(axis=1))
    return out, lse


@wrong("gathered_attention", "sparse work")
def scores_the_union_of_all_rows(q, kv, indices, scale, v_dim):
    """Only rows that somebody selected, but every query scores them all."""
    union, places = (indices + 1).unique(return_inverse=True)
    rows = torch.cat((torch.zeros(1, kv.shape[1]), kv))[union.long()]
    chosen = torch.zeros(len(q), len(union), dtype=torch.bool).scatter_(1, places, union[places] > 0)
    scores = (torch.einsum("thd,ud->thu", q, rows) * scale).masked_fill(~chosen[:, None], -torch.inf)
    return scores.softmax(dim=2).nan_to_num() @ rows[:, :v_dim], scores.logsumexp(dim=2)


wrong("attended_pairs", "one query")(lambda T, S, k: float(sum(min(k, S - T + t + 1) for t in range(T))))
wrong("pays_from", "never")(lambda i, a, k: "inf" if i >= a else a * k / (a - i))


@wrong("gather_rows", "shapes")
def squeezed_where_k_is_one(kv, indices):
    there = indices >= 0
    rows = kv[indices.clamp(min=0).long()].masked_fill(~there[:, :, None], 0.0)
    return (rows[:, 0] if indices.shape[1] == 1 else rows), there


@wrong("gather_rows", "padding is zero")
def padding_at_the_end_only(kv, indices):
    there = torch.arange(indices.shape[1]) < (indices >= 0).sum(dim=1, keepdim=True)
    return kv[indices.clamp(min=0).long()].masked_fill(~there[:, :, None], 0.0), there


# ------------------------------------------------------------------------------------------------------ 06, MLA


def absorbed(q_nope, kv_b):
    return torch.einsum("thn,hnc->thc", q_nope, kv_b[:, : q_nope.shape[2]])


wrong("absorb", "same score")(lambda q, kv_b: absorbed(q.half(), kv_b.half()).float())
wrong("absorb", "runs")(lambda q, kv_b: absorbed(viewed(q), kv_b))
wrong("rope", "runs")(lambda x, at, freqs, layout: dsa_ref.rope(viewed(x), at, freqs, layout))
wrong("rope", "angles in fp32")(lambda x, at, freqs, layout: dsa_ref.rope(x, at % 8192, freqs, layout))
wrong("rope", "one pair")(lambda x, at, freqs, layout: dsa_ref.rope(x, at, freqs.half().float(), layout))
wrong("cache_bytes", "ints")(
    lambda c: {
        "mha": 2.0 * c.n_heads * (c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim),
        "mla": 2.0 * (c.kv_lora_rank + c.qk_rope_head_dim),
        "fp8": c.kv_lora_rank + 4.0 * math.ceil(c.kv_lora_rank / 128) + 2 * c.qk_rope_head_dim,
    }
)
wrong("softmax_scale", "key width")(lambda config: str(config.softmax_scale))
wrong("softmax_scale", "key width")(lambda config: [config.softmax_scale])
wrong("softmax_scale", "key width")(lambda config: round(config.softmax_scale, 4))


# --------------------------------------------------------------------------------------------------- 07, eight bits


def scores_in(dtype, q8, q_scale, k8, k_scale, w):
    dots = torch.einsum("thd,sd->ths", q8.to(dtype), k8.to(dtype)).float()
    return torch.einsum("ths,th->ts", dots.relu(), w * q_scale) * k_scale


wrong("scores_from_fp8", "fp32 throughout")(lambda *given: scores_in(torch.float16, *given))
wrong("scores_from_fp8", "fp32 throughout")(lambda *given: scores_in(torch.bfloat16, *given))
wrong("scores_from_fp8", "fp32 throughout")(
    lambda q8, q_scale, k8, k_scale, w: scores_in(torch.float32, q8, 1, k8, k_scale, bf16(w * q_scale))
)
wrong("scores_from_fp8", "fp32 throughout")(
    lambda q8, q_scale, k8, k_scale, w: scores_in(torch.float32, q8, q_scale, k8, bf16(k_scale), w)
)
wrong("hadamard", "fp32 throughout")(lambda x: dsa_ref.hadamard(bf16(x)))
wrong("hadamard", "any power of two")(lambda x: dsa_ref.hadamard(x) if x.shape[-1] <= 256 else x)
wrong("hadamard", "runs")(lambda x: dsa_ref.hadamard(viewed(x)))
wrong("quantize", "nearest value")(lambda x: dsa_ref.quantize(bf16(x)))
wrong("quantize", "runs")(lambda x: dsa_ref.quantize(viewed(x)))


@wrong("quantize", "every bit")
def zeros_lose_their_sign(x):
    x8, scale = dsa_ref.quantize(x)
    return (x8.float() + 0.0).to(x8.dtype), scale


@wrong("quantize", "amax floor")
def scales_up_to_a_limit(x):
    scale = dsa_ref.quantize(x)[1].clamp(max=2.0**14)
    return (x.float() / scale[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn), scale


@wrong("flips", "mean over rows")
def keys_up_to_a_limit(selected, reference):
    return 1 - overlap(reference.clamp(max=63), selected.clamp(max=63))


@wrong("flips", "share of the keys")
def looked_up_in_all_rows(selected, reference):
    there = reference >= 0
    lost = there & ~torch.isin(reference, selected)
    return (lost.sum(dim=1) / there.sum(dim=1).clamp(min=1)).mean()


wrong("flips", "nothing changed")(lambda selected, reference: "0.0")


# ------------------------------------------------------------------------------------------------------- 03, recall


def caught(weights, chosen):
    """The mean over rows of the weights at the keys of chosen, a list a row."""
    return sum(float(weights[t, s]) for t, row in enumerate(chosen) for s in row) / len(weights)


@wrong("recall", "duplicates")
def only_neighbours_are_compared(weights, indices):
    rows = [
        [s for s, before in zip(row, [-1, *row], strict=False) if s not in (-1, before)] for row in indices.tolist()
    ]
    return caught(weights, rows)


@wrong("recall", "padding")
def stops_at_the_first_padding(weights, indices):
    return caught(weights, [set(row[: row.index(-1)] if -1 in row else row) for row in indices.tolist()])


wrong("recall", "any shape")(lambda weights, indices: min(0.95, attention_recall(weights, indices)))
wrong("recall", "one row")(lambda weights, indices: f"{attention_recall(weights, indices)}")
