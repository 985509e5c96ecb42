"""Notebook 17: how the parts of ranks are merged, and what is summed how often. `ranks` has rows and candidates."""

import torch

from dsa_ref import merge_parts, sparse_attention

from . import wrong

# ---------------------------------------------------------------------------------------------------- rank_attention


def attended(q, kv, places, indices, scale, v_dim):
    """(outs, lses) of all ranks, done right; a rank without keys gives 0 and -inf."""
    outs, lses = [], []
    for rows, own in zip(kv, places, strict=True):
        at = {int(place): row for row, place in enumerate(own)}
        local = torch.tensor([[at.get(int(s), -1) for s in line] for line in indices], dtype=torch.int32)
        out, lse = sparse_attention(q, rows, local, scale, v_dim)
        outs.append(out)
        lses.append(lse)
    return torch.stack(outs), torch.stack(lses)


@wrong("rank_attention", "one rank")
def without_the_scale(q, kv, places, indices, scale, v_dim):
    return merge_parts(*attended(q, kv, places, indices, 1.0, v_dim))


@wrong("rank_attention", "one rank")
def every_key_not_only_the_selected(q, kv, places, indices, scale, v_dim):
    every = torch.cat(list(places)).to(torch.int32).expand(len(q), -1)
    return merge_parts(*attended(q, kv, places, every, scale, v_dim))


@wrong("rank_attention", "one rank")
def out_alone(q, kv, places, indices, scale, v_dim):
    return merge_parts(*attended(q, kv, places, indices, scale, v_dim))[0]


@wrong("rank_attention", "places are looked up")
def places_taken_for_rows(q, kv, places, indices, scale, v_dim):
    parts = [
        sparse_attention(q, rows, indices.masked_fill(indices >= len(rows), -1), scale, v_dim) for rows in kv
    ]  # fmt: skip
    return merge_parts(*(torch.stack(each) for each in zip(*parts, strict=True)))


@wrong("rank_attention", "places are looked up")
def the_first_place_subtracted(q, kv, places, indices, scale, v_dim):
    parts = []
    for rows, own in zip(kv, places, strict=True):
        first = int(own[0]) if len(own) else 0
        local = (indices - first).masked_fill((indices < first) | (indices >= first + len(rows)), -1)
        parts.append(sparse_attention(q, rows, local, scale, v_dim))
    return merge_parts(*(torch.stack(each) for each in zip(*parts, strict=True)))


@wrong("rank_attention", "merged by log-sum-exp")
def merged_by_mean(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    return outs.mean(dim=0), torch.logsumexp(lses, dim=0)


@wrong("rank_attention", "merged by log-sum-exp")
def merged_by_sum(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    return outs.sum(dim=0), torch.logsumexp(lses, dim=0)


@wrong("rank_attention", "merged by log-sum-exp")
def weighed_by_the_number_of_keys(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    counts = torch.stack([torch.isin(indices, own).sum(dim=1) for own in places]).float()[..., None, None]
    return (counts * outs).sum(dim=0) / counts.sum(dim=0), torch.logsumexp(lses, dim=0)


@wrong("rank_attention", "merged by log-sum-exp")
def the_mean_of_lse(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    return merge_parts(outs, lses)[0], lses.mean(dim=0)


@wrong("rank_attention", "merged by log-sum-exp")
def the_first_rank_alone(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    return outs[0], lses[0]


@wrong("rank_attention", "a rank without a key")
def nothing_weighs_as_much_as_a_logit_of_0(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    return merge_parts(outs, lses.masked_fill(lses == -torch.inf, 0.0))


@wrong("rank_attention", "a rank without a key")
def nan_where_nothing_is_selected(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    largest = lses.amax(dim=0)
    weights = (lses - largest).exp()
    total = weights.sum(dim=0)
    return (weights[..., None] * outs).sum(dim=0) / total[..., None], largest + total.log()


@wrong("rank_attention", "large logits")
def exp_without_a_shift(q, kv, places, indices, scale, v_dim):
    outs, lses = attended(q, kv, places, indices, scale, v_dim)
    total = lses.exp().sum(dim=0)
    out = (lses.exp()[..., None] * outs).sum(dim=0) / total.clamp(min=1e-30)[..., None]
    return out, total.log()


@wrong("rank_attention", "trained model")
def two_heads_alone(q, kv, places, indices, scale, v_dim):
    out, lse = merge_parts(*attended(q, kv, places, indices, scale, v_dim))
    out[:, 2:], lse[:, 2:] = 0.0, -torch.inf
    return out, lse


# ---------------------------------------------------------------------------------------------------- group_gradient


def of_rows(total, x, rows):
    """The right answer's product, with the sum over ranks in it."""
    return sum(total[own].T @ mine for mine, own in zip(x, rows, strict=True))


@wrong("group_gradient", "others' losses")
def of_the_sum(gathered, x, rows):
    return of_rows(sum(gathered), x, rows)


@wrong("group_gradient", "others' losses")
def the_axes_swapped(gathered, x, rows):
    return of_rows(sum(gathered), x, rows).T / len(gathered[0])


@wrong("group_gradient", "others' losses")
def a_list_a_rank(gathered, x, rows):
    return [of_rows(sum(gathered), x, rows) / len(gathered[0]) for _ in rows]


@wrong("group_gradient", "others' losses")
def own_losses_alone(gathered, x, rows):
    return sum(g[own].T @ mine for g, mine, own in zip(gathered, x, rows, strict=True)) / len(gathered[0])


@wrong("group_gradient", "others' losses")
def the_mean_over_ranks(gathered, x, rows):
    return of_rows(sum(gathered), x, rows) / len(gathered[0]) / len(x)


@wrong("group_gradient", "others' losses")
def summed_once_more_by_every_rank(gathered, x, rows):
    return sum(of_rows(sum(gathered), x, rows) for _ in x) / len(gathered[0])


@wrong("group_gradient", "others' losses")
def rank_0s_gradient_alone(gathered, x, rows):
    return sum(gathered)[rows[0]].T @ x[0] / len(gathered[0])


@wrong("group_gradient", "counted once")
def own_part_counted_twice(gathered, x, rows):
    total = sum(gathered)
    each = zip(gathered, x, rows, strict=True)
    return sum((total[own] + g[own]).T @ mine for g, mine, own in each) / len(total)


@wrong("group_gradient", "counted once")
def own_part_left_out(gathered, x, rows):
    total = sum(gathered)
    each = zip(gathered, x, rows, strict=True)
    return sum((total[own] - g[own]).T @ mine for g, mine, own in each) / len(total)


@wrong("group_gradient", "mean over all rows")
def a_mean_of_each_ranks_rows(gathered, x, rows):
    means = [g / max(1, len(own)) for g, own in zip(gathered, rows, strict=True)]
    return of_rows(sum(means), x, rows) / len(x)


@wrong("group_gradient", "mean over all rows")
def every_rank_has_as_many_rows_as_rank_0(gathered, x, rows):
    return of_rows(sum(gathered), x, rows) / (len(x) * len(x[0]))


@wrong("group_gradient", "zigzag")
def rows_taken_for_contiguous(gathered, x, rows):
    parts = sum(gathered).split([len(own) for own in rows])
    return sum(part.T @ mine for part, mine in zip(parts, x, strict=True)) / len(gathered[0])


@wrong("group_gradient", "zigzag")
def from_the_first_row_on(gathered, x, rows):
    total = sum(gathered)
    firsts = [int(own[0]) if len(own) else 0 for own in rows]
    parts = [total[first : first + len(own)] for first, own in zip(firsts, rows, strict=True)]
    return sum(part.T @ mine for part, mine in zip(parts, x, strict=True)) / len(total)
