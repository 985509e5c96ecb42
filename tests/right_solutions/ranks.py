"""Notebook 17."""

import math

import numpy as np
import torch

from dsa_ref import merge_parts, sparse_attention

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
