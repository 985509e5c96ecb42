"""Notebook 04."""

import math

import numpy as np
import torch

import dsa_ref

from . import wrong


def safe_rows(kv, indices):
    there = indices >= 0
    return kv[indices.clamp(min=0).long()].masked_fill(~there[..., None], 0.0), there


@wrong("gather_rows", "shapes")
def only_the_rows(kv, indices):
    return safe_rows(kv, indices)[0]


@wrong("gather_rows", "shapes")
def padding_cut_off(kv, indices):
    there = indices >= 0
    return kv[indices[there].long()], there


@wrong("gather_rows", "there")
def row_0_taken_for_padding(kv, indices):
    there = indices > 0
    return kv[indices.clamp(min=0).long()].masked_fill(~there[..., None], 0.0), there


@wrong("gather_rows", "there")
def missing_instead_of_there(kv, indices):
    return safe_rows(kv, indices)[0], indices < 0


@wrong("gather_rows", "there")
def there_from_the_rows(kv, indices):
    rows = kv[indices.long()]
    return rows, (rows != 0).any(dim=-1)


@wrong("gather_rows", "there")
def row_of_zeros_taken_for_padding(kv, indices):
    rows, _ = safe_rows(kv, indices)
    return rows, (rows != 0).any(dim=-1)


@wrong("gather_rows", "rows")
def nan_cleaned_away(kv, indices):
    rows, there = safe_rows(kv, indices)
    return torch.where(rows.isnan(), 0.0, rows), there


@wrong("gather_rows", "rows")
def shifted_table_off_by_one(kv, indices):
    table = torch.cat((torch.zeros_like(kv[:1]), kv))
    return table[indices.clamp(min=0).long()], indices >= 0


@wrong("gather_rows", "rows")
def nan_and_inf_cleaned_away(kv, indices):
    there = indices >= 0
    return torch.nan_to_num(kv, posinf=0.0)[indices.clamp(min=0).long()] * there[..., None], there


@wrong("gather_rows", "padding is zero")
def wraps_to_the_last_row(kv, indices):
    return kv[indices.long()], indices >= 0


@wrong("gather_rows", "padding is zero")
def clamped_to_row_0(kv, indices):
    return kv[indices.clamp(min=0).long()], indices >= 0


@wrong("gather_rows", "padding is zero")
def minus_infinity_rows(kv, indices):
    there = indices >= 0
    return kv[indices.clamp(min=0).long()].masked_fill(~there[..., None], -torch.inf), there


@wrong("gather_rows", "NaN stays out")
def multiplied_by_the_mask(kv, indices):
    there = indices >= 0
    rows = kv[indices.clamp(min=0).long()]
    return torch.where(rows.isinf(), rows, rows * there[..., None]), there


@wrong("gather_rows", "inputs")
def last_row_overwritten(kv, indices):
    kv[-1] = 0
    return kv[indices.long()], indices >= 0


def finish(logits, rows, v_dim):
    """Right from here on: logits with -inf where there is nothing."""
    lse = logits.logsumexp(dim=-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("thk,tkv->thv", weights, rows[..., :v_dim]), lse


def logits_of(q, rows, there, scale):
    return (torch.einsum("thd,tkd->thk", q, rows) * scale).masked_fill(~there[:, None], -torch.inf)


@wrong("gathered_attention", "shapes")
def only_out(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)[0]


@wrong("gathered_attention", "shapes")
def whole_row_as_value(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, scale, kv.shape[1])


@wrong("gathered_attention", "shapes")
def heads_in_front(q, kv, indices, scale, v_dim):
    out, lse = dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)
    return out.transpose(0, 1), lse.T


@wrong("gathered_attention", "values")
def unscaled(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, 1.0, v_dim)


@wrong("gathered_attention", "values")
def last_columns_as_value(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    return finish(logits_of(q, rows, there, scale), rows[..., -v_dim:], v_dim)


@wrong("gathered_attention", "values")
def key_is_the_value(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q[..., :v_dim], kv[:, :v_dim], indices, scale, v_dim)


@wrong("gathered_attention", "values")
def every_visible_key(q, kv, indices, scale, v_dim):
    return dsa_ref.dense_attention(q, kv, scale, v_dim)


@wrong("gathered_attention", "values")
def one_softmax_over_all_heads(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    return finish(logits_of(q.mean(1, keepdim=True).expand_as(q), rows, there, scale), rows, v_dim)


@wrong("gathered_attention", "values")
def scale_of_its_own(q, kv, indices, scale, v_dim):
    return dsa_ref.sparse_attention(q, kv, indices, q.shape[2] ** -0.5, v_dim)


@wrong("gathered_attention", "values")
def softmax_over_heads(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = logits_of(q, rows, there, scale)
    weights = logits.softmax(1).nan_to_num(0.0)
    return torch.einsum("thk,tkv->thv", weights, rows[..., :v_dim]), logits.logsumexp(-1)


@wrong("gathered_attention", "values")
def score_0_taken_for_padding(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = logits_of(q, rows, there, scale)
    return finish(logits.masked_fill(logits == 0, -torch.inf), rows, v_dim)


@wrong("gathered_attention", "log-sum-exp")
def base_two(q, kv, indices, scale, v_dim):
    out, lse = dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)
    return out, lse / math.log(2)


@wrong("gathered_attention", "log-sum-exp")
def maximum_not_added_back(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = logits_of(q, rows, there, scale)
    out, _ = finish(logits, rows, v_dim)
    return out, (logits - logits.amax(-1, keepdim=True)).exp().sum(-1).log()


@wrong("gathered_attention", "log-sum-exp")
def the_sum_itself(q, kv, indices, scale, v_dim):
    out, lse = dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)
    return out, lse.exp()


@wrong("gathered_attention", "padding")
def attends_to_the_last_row(q, kv, indices, scale, v_dim):
    rows = kv[indices.long()]
    return finish(logits_of(q, rows, torch.ones_like(indices) > 0, scale), rows, v_dim)


@wrong("gathered_attention", "padding")
def attends_to_row_0(q, kv, indices, scale, v_dim):
    rows = kv[indices.clamp(min=0).long()]
    return finish(logits_of(q, rows, torch.ones_like(indices) > 0, scale), rows, v_dim)


@wrong("gathered_attention", "padding")
def normalises_over_padding(q, kv, indices, scale, v_dim):
    rows, _ = safe_rows(kv, indices)
    return finish(logits_of(q, rows, torch.ones_like(indices) > 0, scale), rows, v_dim)


@wrong("gathered_attention", "padding")
def masked_after_the_softmax(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = torch.einsum("thd,tkd->thk", q, rows) * scale
    weights = logits.softmax(-1) * there[:, None]
    return torch.einsum("thk,tkv->thv", weights, rows[..., :v_dim]), logits.logsumexp(-1)


@wrong("gathered_attention", "empty row")
def nan_on_an_empty_row(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = logits_of(q, rows, there, scale)
    return torch.einsum("thk,tkv->thv", logits.softmax(-1), rows[..., :v_dim]), logits.logsumexp(-1)


@wrong("gathered_attention", "empty row")
def a_very_negative_number(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = logits_of(q, rows, there, scale).clamp(min=-1e9)
    return torch.einsum("thk,tkv->thv", logits.softmax(-1), rows[..., :v_dim]), logits.logsumexp(-1)


@wrong("gathered_attention", "large scores")
def not_shifted(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    exponentials = logits_of(q, rows, there, scale).exp()
    total = exponentials.sum(-1)
    weights = exponentials / total.masked_fill(total == 0, 1.0)[..., None]
    return torch.einsum("thk,tkv->thv", weights, rows[..., :v_dim]), total.log()


def hidden_by(number):
    def answer(q, kv, indices, scale, v_dim):
        rows, there = safe_rows(kv, indices)
        logits = logits_of(q, rows, there, scale).masked_fill(~there[:, None], number)
        empty = ~there.any(dim=1)
        out, lse = finish(logits, rows, v_dim)
        return out.masked_fill(empty[:, None, None], 0.0), lse.masked_fill(empty[:, None], -torch.inf)

    return answer


wrong("gathered_attention", "low scores")(hidden_by(-1e4))
wrong("gathered_attention", "low scores")(hidden_by(-1e9))


@wrong("gathered_attention", "low scores")
def largest_score_from_the_padding(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    logits = torch.einsum("thd,tkd->thk", q, rows) * scale
    largest = logits.amax(dim=-1, keepdim=True)
    exponentials = (logits - largest).exp() * there[:, None]
    total = exponentials.sum(dim=-1, keepdim=True)
    weights = exponentials / total.masked_fill(total == 0, 1.0)
    return torch.einsum("thk,tkv->thv", weights, rows[..., :v_dim]), (largest + total.log()).squeeze(-1)


def mask_of(indices, S):
    mask = torch.zeros(indices.shape[0], S + 1, dtype=torch.bool)
    return mask.scatter_(1, torch.where(indices < 0, S, indices).long(), True)[:, :S]


@wrong("gathered_attention", "sparse work")
def masked_dense(q, kv, indices, scale, v_dim):
    logits = torch.einsum("thd,sd->ths", q, kv) * scale
    logits = logits.masked_fill(~mask_of(indices, len(kv))[:, None], -torch.inf)
    lse = logits.logsumexp(-1)
    weights = (logits - lse[..., None]).exp().nan_to_num(0.0)
    return torch.einsum("ths,sv->thv", weights, kv[:, :v_dim]), lse


@wrong("gathered_attention", "sparse work")
def masked_dense_row_by_row(q, kv, indices, scale, v_dim):
    parts = [masked_dense(q[t : t + 1], kv, indices[t : t + 1], scale, v_dim) for t in range(len(q))]
    return torch.cat([out for out, _ in parts]), torch.cat([lse for _, lse in parts])


@wrong("gathered_attention", "sparse work")
def scores_gathered_instead_of_rows(q, kv, indices, scale, v_dim):
    rows, there = safe_rows(kv, indices)
    everything = torch.einsum("thd,sd->ths", q, kv) * scale
    place = indices.clamp(min=0).long()[:, None].expand(-1, q.shape[1], -1)
    return finish(everything.gather(2, place).masked_fill(~there[:, None], -torch.inf), rows, v_dim)


@wrong("gathered_attention", "sparse work")
def masked_dense_in_numpy(q, kv, indices, scale, v_dim):
    mask = mask_of(indices, len(kv)).numpy()[:, None]
    logits = np.where(mask, np.einsum("thd,sd->ths", q.numpy(), kv.numpy()) * scale, -np.inf)
    largest = np.nan_to_num(logits.max(axis=2, keepdims=True), neginf=0.0)
    exponentials = np.exp(logits - largest)
    total = exponentials.sum(axis=2, keepdims=True)
    with np.errstate(divide="ignore"):
        lse = (largest + np.log(total))[:, :, 0]
    out = np.einsum("ths,sv->thv", exponentials / np.where(total == 0, 1, total), kv.numpy()[:, :v_dim])
    return torch.from_numpy(out), torch.from_numpy(lse)


@wrong("gathered_attention", "unselected rows")
def weights_of_zero(q, kv, indices, scale, v_dim):
    rows = kv[indices.clamp(min=0).long()]
    return finish(logits_of(q, rows, indices >= 0, scale), rows, v_dim)


@wrong("gathered_attention", "inputs")
def scales_q_in_place(q, kv, indices, scale, v_dim):
    q *= scale
    return dsa_ref.sparse_attention(q, kv, indices, 1.0, v_dim)


def rows(T, S, k, visible):
    return sum(min(k, visible(t)) for t in range(T))


wrong("attended_pairs", "one query")(lambda T, S, k: T * S)
wrong("attended_pairs", "one query")(lambda T, S, k: T * k)
wrong("attended_pairs", "one query")(lambda T, S, k: rows(T, S, k, lambda t: t + 1))
wrong("attended_pairs", "one query")(lambda T, S, k: rows(T, S, k, lambda t: S - T + t))
wrong("attended_pairs", "one query")(lambda T, S, k: None)
wrong("attended_pairs", "full rows")(lambda T, S, k: min(k, S) if T == 1 else rows(T, S, S, lambda t: S - T + t + 1))
wrong("attended_pairs", "full rows")(lambda T, S, k: min(k, S) * (T + 1) // 2)
wrong("attended_pairs", "short rows")(lambda T, S, k: T * min(k, S))
wrong("attended_pairs", "short rows")(lambda T, S, k: T * min(k, S) - (min(k, T) ** 2 // 2 if T == S and T > 1 else 0))
wrong("attended_pairs", "short rows")(lambda T, S, k: min(T * k, T * (2 * S - T + 1) // 2))
wrong("attended_pairs", "exact at a million")(
    lambda T, S, k: int(torch.arange(S - T + 1, S + 1).clamp(max=k).to(torch.float32).sum())
)
wrong("attended_pairs", "exact at a million")(
    lambda T, S, k: int(torch.arange(S - T + 1, S + 1, dtype=torch.int32).clamp(max=k).sum(dtype=torch.int32))
)


def crossing(a, b, k):
    """The right answer where the indexer (a FLOPs a pair) costs less than attention (b FLOPs a pair)."""
    return b * k / (b - a)


wrong("pays_from", "V3.2")(lambda a, b, k: k)
wrong("pays_from", "V3.2")(lambda a, b, k: k * (1 + a / b))
wrong("pays_from", "V3.2")(lambda a, b, k: b * k / (b + a))
wrong("pays_from", "V3.2")(lambda a, b, k: 8704)
wrong("pays_from", "V3.2")(lambda a, b, k: b / a * k)
wrong("pays_from", "other sizes")(lambda a, b, k: 2176)
wrong("pays_from", "other sizes")(lambda a, b, k: 17 * k / 16)
wrong("pays_from", "other sizes")(lambda a, b, k: round(crossing(a, b, k)))
wrong("pays_from", "never")(lambda a, b, k: crossing(a, b, k) if a != b else math.inf)
wrong("pays_from", "never")(lambda a, b, k: crossing(a, b, k) if a < b else 0)
wrong("pays_from", "never")(lambda a, b, k: crossing(a, max(b, a + 1), k))
