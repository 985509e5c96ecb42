"""Notebooks 00 to 04: right for usual sizes and values, wrong beyond them; and work that hides from a count.

What two attacks found that the checks once let through.
"""

import math
import warnings
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch.nn import functional as F

import dsa_ref
from dsa_ref import cost, testing

from . import wrong
from .gather import finish, logits_of, mask_of, safe_rows
from .nearly_right import all_scores
from .select_topk import _rules


def script(function):
    """torch's own compiler of a function with its loops: deprecated, and still used."""
    with warnings.catch_warnings(action="ignore"):
        return torch.jit.script(function)


# ------------------------------------------------------------------------------------------------------- 00, the last k


def last_k(t, k):
    return list(range(max(0, t - k + 1), t + 1))


wrong("keep_last", "right bytes")(lambda t, k: last_k(t, min(k, 64)))
wrong("keep_last", "right bytes")(lambda t, k, seen={}: seen.setdefault(t, last_k(t, k)))  # noqa: B006 (the fault)

# -------------------------------------------------------------------------------------------------------- 01, dense


def dense(q, k, v, hide):
    """Causal attention, the scores [H, T, T] hidden by `hide`."""
    scores = hide(torch.einsum("thd,shd->hts", q, k) / math.sqrt(q.shape[2]))
    return torch.einsum("hts,shd->thd", scores.softmax(2), v)


def future(scores, T=None):
    return torch.ones(T or scores.shape[1], T or scores.shape[1], dtype=torch.bool).triu(1)


def by_value(scores):
    return scores.tril().masked_fill(scores.tril() == 0, -torch.inf)


def within_64(scores):
    """Keys more than 48 places back are lost, where they stand in the query's own block of 64."""
    t = torch.arange(scores.shape[1])
    lost = (t[:, None] // 64 == t // 64) & (t[:, None] - t > 48)
    return scores.masked_fill(future(scores) | lost, -torch.inf)


wrong("dense_attention", "values")(lambda q, k, v: dense(q, k, v, by_value))
wrong("dense_attention", "values")(lambda q, k, v: dense(q, k, v, within_64))
wrong("dense_attention", "runs")(
    lambda q, k, v: dense(q, k, v, lambda s: s.masked_fill(future(s, 128)[: len(q), : len(q)], -torch.inf))
)
wrong("dense_attention", "large scores")(lambda q, k, v: dense(q, k, v, lambda s: s.masked_fill(future(s), -100.0)))
wrong("dense_attention", "large scores")(lambda q, k, v: dense(q, k, v, lambda s: s.masked_fill(future(s), -1000.0)))


@wrong("dense_attention", "no loop over tokens")
@script
def a_loop_in_a_script(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for t in range(q.shape[0]):
        scores = torch.einsum("hd,shd->sh", q[t], k[: t + 1]) / (q.shape[2] ** 0.5)
        rows.append(torch.einsum("sh,shd->hd", scores.softmax(0), v[: t + 1]))
    return torch.stack(rows)


@wrong("dense_attention", "no loop over tokens")
def torchs_function_below_its_name(q, k, v):
    heads = (x.transpose(0, 1)[None].contiguous() for x in (q, k, v))
    return torch.ops.aten._scaled_dot_product_attention_math(*heads, is_causal=True)[0][0].transpose(0, 1)


@wrong("dense_attention", "no loop over tokens")
def torchs_layer_without_weights(q, k, v):
    T, H, D = q.shape
    eye = torch.eye(H * D)
    out, _ = F.multi_head_attention_forward(
        *(x.reshape(T, 1, H * D) for x in (q, k, v)),
        *(H * D, H, torch.cat([eye] * 3), torch.zeros(3 * H * D), None, None, False, 0.0, eye, torch.zeros(H * D)),
        training=False,
        need_weights=False,
        attn_mask=future(q, T),
    )
    return out.reshape(T, H, D)


wrong("attention_flops", "growth with T")(lambda T, H, D: (2 * H * D * T * (T + 1) + 2**31) % 2**32 - 2**31)
wrong("attention_flops", "growth with T")(
    lambda T, H, D: 2.0 * H * D * T * (T + 1) if H * D * T * T < 3e4 else math.inf  # fp16
)


def bytes_in(dtype):
    def answer(T, H, D, n):
        sizes = np.array([T, H, D, n], dtype=dtype)
        return int(2 * np.prod(sizes, dtype=dtype)), int(np.prod(sizes[[0, 0, 1, 3]], dtype=dtype))

    return answer


wrong("attention_bytes", "cache")(bytes_in(np.float32))
wrong("attention_bytes", "score matrix")(bytes_in(np.float64))


@wrong("bill_growth", "whole text")
def growth_in_fp16(short, long):
    f = torch.tensor(long / short).half()
    return {"whole text": float(f * f), "next token": float(f), "cache": float(f), "score matrix": float(f * f)}


# ------------------------------------------------------------------------------------------------------- 02, scores


def scores_from(q_idx, k_idx, w, change=lambda dots: dots):
    dots = change(torch.einsum("thd,sd->ths", q_idx.float(), k_idx.float()))
    T, _, S = dots.shape
    scores = torch.einsum("ths,th->ts", dots.relu(), w)
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


wrong("index_scores", "fp32 throughout")(lambda q, k, w: scores_from(q, k, w, lambda dots: dots.clamp(max=65504)))
wrong("index_scores", "any size")(lambda q, k, w: scores_from(q[:, :64], k, w[:, :64]))
wrong("index_scores", "any size")(lambda q, k, w: all_scores(q.float()[..., :64], k.float()[..., :64], w))


wrong("index_scores", "any size")(lambda q, k, w: scores_from(q[..., :256], k[:, :256], w))


def weights_of(x, W_w, q_scale, Hi, Di, change=lambda product: product):
    return change(x.float() @ W_w.float() * q_scale * (Hi * Di) ** -0.5)


wrong("head_weights", "fp32 throughout")(lambda x, W, q, Hi, Di: weights_of(x[:, :512], W[:512], q, Hi, Di))
wrong("head_weights", "fp32 throughout")(lambda *given: weights_of(*given, lambda w: w.clamp(-65504, 65504)))
wrong("head_weights", "fp32 throughout")(
    lambda *given: weights_of(*given, lambda w: w.masked_fill(w.abs() < 1e-4, 0.0))
)
wrong("counterexample", "another winner")(
    lambda: (1e30 * torch.eye(2)[None], torch.eye(2), torch.tensor([[2e30, 1e30]]), torch.tensor([[1e30, 2e30]]))
)
wrong("zero_probability", "exact")(lambda Hi: 0.5**Hi if Hi <= 100 else 0.0)


@script
def a_loop_over_heads(q: torch.Tensor, k: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    scores = torch.zeros(q.shape[0], k.shape[0])
    for h in range(q.shape[1]):
        scores += (q[:, h] @ k.T).relu() * w[:, h, None]
    return scores


@wrong("index_scores", "no loops")
def heads_in_a_script(q_idx, k_idx, w):
    scores, (T, S) = a_loop_over_heads(q_idx.float(), k_idx.float(), w), (len(q_idx), len(k_idx))
    return scores.masked_fill(torch.ones(T, S, dtype=torch.bool).triu(S - T + 1), -torch.inf)


@wrong("index_scores", "dot product")
def a_mask_of_an_earlier_call(q_idx, k_idx, w, masks={}):  # noqa: B006 (the fault)
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q_idx.float(), k_idx.float()).relu(), w)
    T, S = scores.shape
    first = masks.setdefault(T, S - T)
    return scores.masked_fill(torch.arange(S) > first + torch.arange(T)[:, None], -torch.inf)


# ---------------------------------------------------------------------------------------------------- 03, selection

wrong("select_topk", "infinite scores")(lambda scores, k: dsa_ref.select_topk(scores.clamp(-3.4e38, 3.4e38), k))
wrong("select_topk", "infinite scores")(
    lambda scores, k: dsa_ref.select_topk(torch.nan_to_num(scores, nan=torch.nan), k)
)
wrong("select_topk", "scores")(lambda scores, k: dsa_ref.select_topk(scores, k).short().int())


@wrong("select_topk", "infinite scores")
def nan_looked_for_in_the_sum(scores, k):
    T, S = scores.shape
    if scores.tril(S - T).sum().isnan():
        raise ValueError("NaN")
    return dsa_ref.select_topk(scores, k)


@wrong("check_selection", "range")
def crashes_at_an_index_out_of_range(indices, scores, k):
    for row, numbers in zip(indices.int().tolist(), scores.tolist(), strict=False):
        [numbers[s] for s in row if s > 0]
    return _rules(indices, scores, k)


@wrong("check_selection", "type")
def a_value_error_for_a_no(indices, scores, k):
    if not _rules(indices, scores, k):
        raise ValueError("this selection is wrong")
    return True


judge = testing.compare_selection


@wrong("check_selection", "own rules")
def the_judge_by_another_name(indices, scores, k):
    try:
        judge(indices, scores, k)
    except AssertionError:
        return False
    return True


@wrong("recall", "one row")
def equal_weights_counted_once(weights, indices):
    rows = ({weights[t, s].item() for s in row if s >= 0} for t, row in enumerate(indices.tolist()))
    return sum(map(sum, rows)) / len(weights)


wrong("recall", "any shape")(
    lambda weights, indices: testing.attention_recall(weights, torch.where(indices < 0, indices, indices % 256))
)


def window_through(dtype):
    def answer(T, k):
        keys = torch.arange(T)[:, None] - torch.arange(k)
        return torch.where(keys >= 0, keys.to(dtype).int(), -1).int()

    return answer


for _dtype in (torch.int8, torch.uint8, torch.float16, torch.bfloat16):
    wrong("window_selection", "last keys")(window_through(_dtype))


# ------------------------------------------------------------------------------------------------------- 04, gather


def rows_of(kv, indices):
    return kv[indices.clamp(min=0).long()].masked_fill((indices < 0)[..., None], 0.0), indices >= 0


wrong("gather_rows", "rows")(lambda kv, indices: (rows_of(kv, indices.short())[0], indices >= 0))
wrong("gather_rows", "rows")(lambda kv, indices: (rows_of(kv, indices.clamp(max=255))[0], indices >= 0))
wrong("gather_rows", "rows")(lambda kv, indices: (rows_of(kv, indices.clamp(max=7))[0], indices >= 0))


@wrong("gather_rows", "rows")
def subnormals_flushed(kv, indices):
    rows, there = rows_of(kv, indices)
    return rows.masked_fill(rows.abs() < torch.finfo(torch.float32).tiny, 0.0), there


@wrong("gathered_attention", "sparse work")
def dense_scores_in_a_buffer(q, kv, indices, scale, v_dim):
    """np.empty and out=: nothing is made that NumPy returns."""
    (T, H, D), S = q.shape, len(kv)
    scores = np.empty((T * H, S), np.float32)
    np.matmul(q.numpy().reshape(T * H, D), kv.numpy().T, out=scores)
    rows, there = safe_rows(kv, indices)
    place = indices.clamp(min=0).long()[:, None].expand(-1, H, -1)
    chosen = torch.from_numpy(scores).reshape(T, H, S).gather(2, place) * scale
    return finish(chosen.masked_fill(~there[:, None], -torch.inf), rows, v_dim)


@wrong("gathered_attention", "sparse work")
def rows_found_in_a_mask(q, kv, indices, scale, v_dim):
    keys = torch.full_like(indices, -1)
    for t, chosen in enumerate(mask_of(indices, len(kv))):
        found = chosen.nonzero().flatten()
        keys[t, : len(found)] = found
    rows, there = safe_rows(kv, keys)
    return finish(logits_of(q, rows, there, scale), rows, v_dim)


@wrong("gathered_attention", "sparse work")
def masked_dense_in_a_thread(q, kv, indices, scale, v_dim):
    def work():
        mask = mask_of(indices, len(kv))
        rows = torch.where(mask.any(dim=0)[:, None], kv, 0.0)
        logits = (torch.einsum("thd,sd->ths", q, rows) * scale).masked_fill(~mask[:, None], -torch.inf)
        weights = logits.softmax(2).masked_fill(~mask[:, None], 0.0)
        return torch.einsum("ths,sv->thv", weights, rows[:, :v_dim]), logits.logsumexp(2)

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


@wrong("attended_pairs", "exact at a million")
def full_rows_in_fp32(T, S, k):
    return int(np.float32(T) * np.float32(k)) if k <= S - T else cost.causal_pairs(T, S, k)


def crossing(index_flops, attention_flops, k, product):
    return math.inf if index_flops >= attention_flops else product / (attention_flops - index_flops)


wrong("pays_from", "other sizes")(lambda a, b, k: crossing(a, b, k, (b * k + 2**31) % 2**32 - 2**31))
wrong("pays_from", "runs")(lambda a, b, k: math.inf if a >= b else k * (b / a) / (b / a - 1))


# ----------------------------------------------------------------------------------------------------- 04b, three lines


def three_lines(heads=None, view=lambda x: x, seen=lambda scores: scores, scaled=lambda scale: scale, width=None):
    def answer(q_idx, k_idx, w, q, kv, k, scale, v_dim):
        scores = dsa_ref.index_scores(view(q_idx)[:, :heads], view(k_idx), w[:, :heads])
        indices = dsa_ref.select_topk(seen(scores), k)
        return indices, dsa_ref.sparse_attention(view(q), view(kv), indices, scaled(scale), width or v_dim)[0]

    return answer


def changed_after(change):
    def answer(*given, **named):
        indices, out = three_lines()(*given, **named)
        return indices, change(out)

    return answer


wrong("three_lines", "selection")(three_lines(heads=16))
wrong("three_lines", "selection")(three_lines(seen=lambda scores: scores.clamp(-65504, 65504)))
wrong("three_lines", "runs")(three_lines(view=lambda x: x.view(-1).view(x.shape)))
wrong("three_lines", "value")(three_lines(scaled=lambda scale: 0.4))
wrong("three_lines", "value")(three_lines(width=4))
wrong("three_lines", "value")(changed_after(torch.squeeze))
wrong("three_lines", "value")(changed_after(torch.Tensor.double))
