"""Notebook 17."""

import heapq
import math

import numpy as np
import torch

from dsa_ref import merge_parts, select_topk, sparse_attention

from . import right


@right("zigzag")
def in_numpy(T, size, rank):
    cuts = np.arange(2 * size + 1) * T // (2 * size)
    other = 2 * size - 1 - rank
    return np.r_[cuts[rank] : cuts[rank + 1], cuts[other] : cuts[other + 1]]


@right("zigzag")
def by_asking_each_row(T, size, rank):
    starts = [c * T // (2 * size) for c in range(2 * size)]
    chunk = [max(c for c in range(2 * size) if starts[c] <= row) for row in range(T)]
    return [row for row in range(T) if min(chunk[row], 2 * size - 1 - chunk[row]) == rank]


@right("zigzag")
def a_tensor(T, size, rank):
    return torch.cat(
        [torch.arange(c * T // (2 * size), (c + 1) * T // (2 * size)) for c in (rank, 2 * size - 1 - rank)]
    )


@right("candidates")
def sorted_pairs(scores, places, k):
    pairs = sorted(zip((-scores).tolist(), places.tolist(), strict=True))[:k]
    return -torch.tensor([score for score, _ in pairs]), torch.tensor([p for _, p in pairs], dtype=torch.int64)


@right("zigzag")
def divided_in_floats_but_multiplied_first(T, size, rank):
    cuts = [int(c * T / (2 * size)) for c in range(2 * size + 1)]  # exact: one rounding, of a quotient far below 2^53
    other = 2 * size - 1 - rank
    return tuple(range(cuts[rank], cuts[rank + 1])) + tuple(range(cuts[other], cuts[other + 1]))


@right("candidates")
def two_lists(scores, places, k):
    pairs = heapq.nsmallest(k, zip((-scores).tolist(), places.tolist(), strict=True))
    return [-score for score, _ in pairs], [place for _, place in pairs]


@right("candidates")
def lists_of_numbers_of_torch(scores, places, k):
    rows = sorted(range(len(scores)), key=lambda row: (-scores[row], places[row]))[:k]
    return [[scores[row] for row in rows], [places[row] for row in rows]]


@right("candidates")
def above_the_threshold_and_then_ties(scores, places, k):
    m = min(k, len(scores))
    if m == 0:
        return scores, places
    threshold = scores.topk(m).values[-1]
    over, equal = (scores > threshold).nonzero()[:, 0], (scores == threshold).nonzero()[:, 0]
    rows = torch.cat((over, equal[: m - len(over)]))
    return scores[rows].double(), places[rows]


@right("candidates")
def with_lexsort(scores, places, k):
    order = np.lexsort((places.numpy(), -scores.numpy()))[:k]
    return scores.numpy()[order], places.numpy().astype(np.int32)[order]


@right("candidates")
def a_stable_sort(scores, places, k):
    rows = scores.argsort(descending=True, stable=True)[:k].sort().values
    return scores[rows], places[rows]


@right("winners")
def pairs_in_a_loop(scores, places, k):
    pairs = [(-s, p) for s, p in zip(scores.flatten().tolist(), places.flatten().tolist(), strict=True) if p >= 0]
    kept = sorted(p for _, p in sorted(pairs)[:k])
    return np.array(kept + [-1] * (k - len(kept)))


@right("winners")
def a_list(scores, places, k):
    return pairs_in_a_loop(scores, places, k).tolist()


@right("winners")
def a_list_of_numbers_of_torch(scores, places, k):
    return list(two_stable_sorts(scores, places, k))


@right("winners")
def a_short_row_for_the_contract(scores, places, k):
    there = places >= 0
    order = places[there].sort()
    row, end = scores[there][order.indices][None], torch.tensor([len(order.values)], dtype=torch.int32)
    found = select_topk(row, k, torch.zeros(1, dtype=torch.int32), end)[0].long()
    return torch.where(found < 0, -1, order.values[found.clamp(min=0)])


@right("winners")
def two_stable_sorts(scores, places, k):
    places, order = places.flatten().sort(stable=True)
    best = scores.flatten()[order].argsort(descending=True, stable=True)[:k]
    kept = places[best]
    last = torch.iinfo(torch.int64).max
    kept = kept.masked_fill(kept < 0, last).sort().values
    return kept.masked_fill(kept == last, -1).to(torch.int32)


@right("rank_attention")
def key_by_key(q, kv, places, indices, scale, v_dim):
    T, H, _ = q.shape
    out, lse = torch.zeros(T, H, v_dim), torch.full((T, H), -torch.inf)
    for t in range(T):
        for h in range(H):
            pairs = []
            for rows, own in zip(kv, places, strict=True):
                at = dict(zip(own.tolist(), rows, strict=True))
                found = [at[s] for s in indices[t].tolist() if s in at]
                pairs += [(float(q[t, h].double() @ row.double()) * scale, row[:v_dim].double()) for row in found]
            if pairs:
                top = max(logit for logit, _ in pairs)
                total = sum(math.exp(logit - top) for logit, _ in pairs)
                out[t, h] = sum(math.exp(logit - top) * value for logit, value in pairs) / total
                lse[t, h] = top + math.log(total)
    return out, lse


@right("rank_attention")
def merged_two_by_two(q, kv, places, indices, scale, v_dim):
    whole = None
    for rows, own in zip(kv, places, strict=True):
        local = torch.full_like(indices, -1)
        for row, place in enumerate(own.tolist()):
            local[indices == place] = row
        part = sparse_attention(q, rows, local, scale, v_dim)
        whole = part if whole is None else merge_parts(*map(torch.stack, zip(whole, part, strict=True)))
    return whole[0].numpy(), whole[1].numpy()


@right("rank_attention")
def every_row_brought_together(q, kv, places, indices, scale, v_dim):
    order = torch.cat(places).argsort()
    ordered, rows = torch.cat(places)[order], torch.cat(kv)[order]
    local = torch.searchsorted(ordered, indices.long()).masked_fill(indices < 0, -1)
    return sparse_attention(q, rows, local.to(torch.int32), scale, v_dim)


@right("rank_attention")
def ranks_without_a_winner_left_out(q, kv, places, indices, scale, v_dim):
    outs, lses = [torch.zeros(*q.shape[:2], v_dim)], [torch.full(q.shape[:2], -torch.inf)]
    for rows, own in zip(kv, places, strict=True):
        if torch.isin(indices, own).any():
            at = torch.full((int(max(own[-1], indices.max())) + 2,), -1, dtype=torch.int32)
            at[own] = torch.arange(len(own), dtype=torch.int32)  # its last entry, -1, is that of place -1
            out, lse = sparse_attention(q, rows, at[indices.long()], scale, v_dim)
            outs.append(out.double())
            lses.append(lse.double())
    whole = torch.logsumexp(torch.stack([lse.double() for lse in lses]), dim=0)
    weights = [torch.where(lse > -torch.inf, (lse - whole).exp(), 0.0) for lse in lses]
    return sum(weight[..., None] * out for weight, out in zip(weights, outs, strict=True)), whole


@right("group_gradient")
def in_fp32(gathered, x, rows):
    total = sum(gathered).float()
    return sum(total[own].T @ mine.float() for mine, own in zip(x, rows, strict=True)) / len(total)


@right("group_gradient")
def of_inputs_in_fp32(gathered, x, rows):
    total = sum(g.float() for g in gathered)
    found = torch.zeros(total.shape[1], x[0].shape[1])
    for mine, own in zip(x, rows, strict=True):
        for row, inputs in zip(own.tolist(), mine.float(), strict=True):
            found += torch.outer(total[row], inputs) / len(total)
    return found.numpy()


@right("group_gradient")
def by_autograd(gathered, x, rows):
    W = torch.zeros(gathered[0].shape[1], x[0].shape[1], dtype=torch.float64, requires_grad=True)
    total = sum(gathered) / len(gathered[0])
    sum(((mine @ W.T) * total[own]).sum() for mine, own in zip(x, rows, strict=True)).backward()
    return W.grad


@right("group_gradient")
def in_text_order(gathered, x, rows):
    order = torch.cat(rows).argsort()
    return sum(gathered).T @ torch.cat(x)[order] / len(order)


@right("group_gradient")
def rank_by_rank_in_numpy(gathered, x, rows):
    found = np.zeros((gathered[0].shape[1], x[0].shape[1]))
    for mine, own in zip(x, rows, strict=True):
        for g in gathered:
            found += np.einsum("nd,ni->di", g[own].numpy(), mine.numpy())
    return found / sum(map(len, rows))
