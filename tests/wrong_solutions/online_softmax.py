"""Notebook 05."""

import numpy as np

from . import wrong


@wrong("log_sum_exp", "value")
def base_2(x):
    m = np.maximum(x.max(axis=-1), -1e30)
    return m + np.log2(np.exp2(x - m[..., None]).sum(axis=-1))


@wrong("log_sum_exp", "value")
def over_the_first_axis(x):
    return np.log(np.exp(x).sum(axis=0))


def _shifted(x, m, empty=None):
    """The log-sum-exp of x with m for the shift, and `empty` where the sum is 0."""
    with np.errstate(all="ignore"):
        total = np.exp(x - m[..., None]).sum(axis=-1)
        return m + np.log(total) if empty is None else np.where(total > 0, m + np.log(total), empty)


def _largest(x):
    return np.maximum(x.max(axis=-1, initial=-np.inf), -1e300)


@wrong("log_sum_exp", "value")
def the_shift_not_added_again(x):
    return _shifted(x, x.max(axis=-1)) - x.max(axis=-1)


@wrong("log_sum_exp", "large logits")
def no_shift(x):
    return _shifted(x, np.zeros(x.shape[:-1]))


@wrong("log_sum_exp", "large logits")
def shifted_by_the_largest_magnitude(x):
    return _shifted(x, np.abs(x).max(axis=-1))


@wrong("log_sum_exp", "large logits")
def shifted_by_the_mean(x):
    return _shifted(x, x.mean(axis=-1))


@wrong("log_sum_exp", "each row's own largest")
def one_shift_for_all(x):
    return _shifted(x, np.full(x.shape[:-1], x.max()))


@wrong("log_sum_exp", "empty rows")
def nan_of_an_empty_row(x):
    return _shifted(x, x.max(axis=-1))


@wrong("log_sum_exp", "empty rows")
def zero_for_an_empty_row(x):
    return _shifted(x, _largest(x), 0.0)


@wrong("log_sum_exp", "empty rows")
def a_huge_number_for_minus_infinity(x):
    return _shifted(x, _largest(x), -1e300)


@wrong("log_sum_exp", "runs")
def no_length_0(x):
    return _shifted(x, np.maximum(x.max(axis=-1), -1e300), -np.inf)


def _parts(m, logits):
    new_m = np.maximum(m, logits.max(axis=1))
    finite_m = np.where(new_m == -np.inf, 0.0, new_m)
    return new_m, np.exp(m - finite_m), np.exp(logits - finite_m[:, None])


@wrong("online_update", "one block")
def base_2_update(m, l, acc, logits, values):  # noqa: E741
    new_m = np.maximum(m, logits.max(axis=1))
    p, rescale = np.exp2(logits - new_m[:, None]), np.exp2(m - new_m)
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "one block")
def divides_at_once(m, l, acc, logits, values):  # noqa: E741
    new_m, rescale, p = _parts(m, logits)
    new_l = l * rescale + p.sum(axis=1)
    safe = np.where(new_l > 0, new_l, 1.0)[:, None]
    return new_m, new_l, (acc * (l * rescale)[:, None] + p @ values) / safe


@np.errstate(all="ignore")
def _measured_against(new_m, m, l, acc, logits, values):  # noqa: E741
    p, rescale = np.exp(logits - new_m[:, None]), np.exp(m - new_m)
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "one block")
def one_maximum_for_all_heads(m, l, acc, logits, values):  # noqa: E741
    return _measured_against(np.full_like(m, max(m.max(), logits.max())), m, l, acc, logits, values)


@wrong("online_update", "running m")
def maximum_of_the_block_alone(m, l, acc, logits, values):  # noqa: E741
    return _measured_against(logits.max(axis=1), m, l, acc, logits, values)


@wrong("online_update", "l rescaled")
def l_not_rescaled(m, l, acc, logits, values):  # noqa: E741
    new_m, rescale, p = _parts(m, logits)
    return new_m, l + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "l rescaled")
def rescaled_the_wrong_way(m, l, acc, logits, values):  # noqa: E741
    new_m, _, p = _parts(m, logits)
    rescale = np.where(m == -np.inf, 0.0, np.exp(new_m - np.where(m == -np.inf, new_m, m)))
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "acc rescaled")
def acc_not_rescaled(m, l, acc, logits, values):  # noqa: E741
    new_m, rescale, p = _parts(m, logits)
    return new_m, l * rescale + p.sum(axis=1), acc + p @ values


@wrong("online_update", "any order")
def new_block_shifted_by_its_own_maximum(m, l, acc, logits, values):  # noqa: E741
    new_m, rescale, _ = _parts(m, logits)
    own = logits.max(axis=1)
    p = np.exp(logits - np.where(own == -np.inf, 0.0, own)[:, None])
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "any order")
def rescaled_by_the_blocks_own_maximum(m, l, acc, logits, values):  # noqa: E741
    new_m, _, p = _parts(m, logits)
    own = logits.max(axis=1)
    rescale = np.exp(m - np.where(own == -np.inf, 0.0, own))
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "running m")
def maximum_of_the_first_block(m, l, acc, logits, values):  # noqa: E741
    m = np.where(m == -np.inf, np.maximum(logits.max(axis=1), -1e300), m)
    p = np.exp(logits - m[:, None])
    return m, l + p.sum(axis=1), acc + p @ values


@wrong("online_update", "large logits")
@np.errstate(all="ignore")
def through_the_bare_sums(m, l, acc, logits, values):  # noqa: E741
    """Undoes the old shift, adds, shifts again."""
    new_m = np.maximum(m, logits.max(axis=1))
    p, old, new = np.exp(logits), np.exp(m), np.exp(-np.maximum(new_m, -1e300))
    return new_m, (l * old + p.sum(axis=1)) * new, (acc * old[:, None] + p @ values) * new[:, None]


@wrong("online_update", "empty block")
def nan_of_an_empty_block(m, l, acc, logits, values):  # noqa: E741
    return _measured_against(np.maximum(m, logits.max(axis=1)), m, l, acc, logits, values)


@wrong("online_update", "empty block")
def infinities_made_zero(m, l, acc, logits, values):  # noqa: E741
    new_m = np.maximum(m, logits.max(axis=1))
    with np.errstate(all="ignore"):
        p = np.exp(np.nan_to_num(logits - new_m[:, None], nan=0.0))
        rescale = np.exp(np.nan_to_num(m - new_m, nan=0.0))
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


@wrong("online_update", "empty block")
def skipped_only_where_every_head_is_empty(m, l, acc, logits, values):  # noqa: E741
    if (logits == -np.inf).all():
        return m, l, acc
    return nan_of_an_empty_block(m, l, acc, logits, values)


@wrong("online_update", "inputs")
def in_place(m, l, acc, logits, values):  # noqa: E741
    new_m, rescale, p = _parts(m, logits)
    l *= rescale  # noqa: E741
    l += p.sum(axis=1)  # noqa: E741
    acc *= rescale[:, None]
    acc += p @ values
    return new_m, l, acc


def _right_update(m, l, acc, logits, values):  # noqa: E741
    new_m, rescale, p = _parts(m, logits)
    return new_m, l * rescale + p.sum(axis=1), acc * rescale[:, None] + p @ values


def _block_attention(q, kv, indices, scale, v_dim, block, update=_right_update, stop=None, padded=-np.inf):
    """The right loop, one thing of which each wrong answer exchanges."""
    H = len(q)
    m, l, acc = np.full(H, -np.inf), np.zeros(H), np.zeros((H, v_dim))  # noqa: E741
    for j0 in range(0, len(indices) if stop is None else stop, block):
        s = indices[j0 : j0 + block]
        there = s >= 0
        rows = np.where(there[:, None], kv[s], 0.0)
        logits = np.where(there, q @ rows.T * scale, padded)
        m, l, acc = update(m, l, acc, logits, rows[:, :v_dim])  # noqa: E741
    return m, l, acc


def _finish(m, l, acc):  # noqa: E741
    safe = np.where(l > 0, l, 1.0)
    return acc / safe[:, None], np.where(l > 0, m + np.log(safe), -np.inf)


@wrong("block_attention", "one block")
def unscaled(q, kv, indices, scale, v_dim, block):
    return _finish(*_block_attention(q, kv, indices, 1.0, v_dim, block))


@wrong("block_attention", "one block")
def whole_row_as_value(q, kv, indices, scale, v_dim, block):
    return _finish(*_block_attention(q, kv, indices, scale, kv.shape[1], block))


@wrong("block_attention", "one block")
def lse_in_base_2(q, kv, indices, scale, v_dim, block):
    out, lse = _finish(*_block_attention(q, kv, indices, scale, v_dim, block))
    return out, lse / np.log(2)


@wrong("block_attention", "one block")
def lse_without_m(q, kv, indices, scale, v_dim, block):
    m, l, acc = _block_attention(q, kv, indices, scale, v_dim, block)  # noqa: E741
    return _finish(m, l, acc)[0], np.where(l > 0, np.log(np.where(l > 0, l, 1.0)), -np.inf)


@wrong("block_attention", "one block")
def token_0_taken_for_padding(q, kv, indices, scale, v_dim, block):
    return _finish(*_block_attention(q, kv, np.where(indices > 0, indices, -1), scale, v_dim, block))


@wrong("block_attention", "any block size")
def last_short_block_dropped(q, kv, indices, scale, v_dim, block):
    stop = max(1, len(indices) - len(indices) % block)
    return _finish(*_block_attention(q, kv, indices, scale, v_dim, block, stop=stop))


@wrong("block_attention", "any block size")
def mean_of_the_blocks(q, kv, indices, scale, v_dim, block):
    rows = [indices[j0 : j0 + block] for j0 in range(0, len(indices), block)]
    parts = [_finish(*_block_attention(q, kv, row, scale, v_dim, block)) for row in rows]
    return np.mean([out for out, _ in parts], axis=0), np.logaddexp.reduce([lse for _, lse in parts])


@wrong("block_attention", "padding")
def minus_one_wraps_around(q, kv, indices, scale, v_dim, block):
    return _finish(*_block_attention(q, kv, indices % len(kv), scale, v_dim, block))


@wrong("block_attention", "padding")
def padding_as_token_0(q, kv, indices, scale, v_dim, block):
    return _finish(*_block_attention(q, kv, indices.clip(min=0), scale, v_dim, block))


@wrong("block_attention", "padding")
def padding_with_logit_0(q, kv, indices, scale, v_dim, block):
    return _finish(*_block_attention(q, kv, indices, scale, v_dim, block, padded=0.0))


@wrong("block_attention", "empty blocks")
def nan_where_nothing_is_selected(q, kv, indices, scale, v_dim, block):
    m, l, acc = _block_attention(q, kv, indices, scale, v_dim, block)  # noqa: E741
    with np.errstate(all="ignore"):
        return acc / l[:, None], m + np.log(l)


@wrong("block_attention", "empty blocks")
def stops_at_the_first_empty_block(q, kv, indices, scale, v_dim, block):
    empty = [j0 for j0 in range(0, len(indices), block) if (indices[j0 : j0 + block] < 0).all()]
    return _finish(*_block_attention(q, kv, indices[: min(empty, default=None)], scale, v_dim, block))


def _loop_of(update):
    def solution(q, kv, indices, scale, v_dim, block):
        with np.errstate(all="ignore"):
            return _finish(*_block_attention(q, kv, indices, scale, v_dim, block, update))

    solution.__name__ = f"loop_of_{update.__name__}"
    return solution


wrong("block_attention", "any block size")(_loop_of(acc_not_rescaled))
wrong("block_attention", "large logits")(_loop_of(through_the_bare_sums))
wrong("block_attention", "large logits")(_loop_of(maximum_of_the_first_block))
wrong("block_attention", "large logits")(_loop_of(one_maximum_for_all_heads))
wrong("block_attention", "empty blocks")(_loop_of(nan_of_an_empty_block))


@wrong("block_attention", "memory")
def all_rows_gathered_before_the_loop(q, kv, indices, scale, v_dim, block):
    rows = np.where((indices >= 0)[:, None], kv[indices], 0.0)
    places = np.where(indices >= 0, np.arange(len(indices)), -1)
    return _finish(*_block_attention(q, rows, places, scale, v_dim, block))


@wrong("block_attention", "memory")
def logits_of_all_blocks_kept(q, kv, indices, scale, v_dim, block):
    kept = [q @ kv[indices[j0 : j0 + block]].T for j0 in range(0, len(indices), block)]
    return _finish(*_block_attention(q, kv, indices, scale, v_dim, block)) if kept else None


@wrong("block_attention", "gather")
def all_keys_masked(q, kv, indices, scale, v_dim, block):
    there = np.isin(np.arange(len(kv)), indices)
    m, rescale, p = _parts(np.full(len(q), -np.inf), np.where(there, q @ kv.T * scale, -np.inf))
    return _finish(m, p.sum(axis=1), p @ kv[:, :v_dim])


def _weights(lse_a, lse_b):
    m = np.maximum(lse_a, lse_b)
    finite_m = np.where(m == -np.inf, 0.0, m)
    a, b = np.exp(lse_a - finite_m), np.exp(lse_b - finite_m)
    total = np.where(a + b > 0, a + b, 1.0)
    return a / total, b / total, np.where(a + b > 0, finite_m + np.log(total), -np.inf)


@wrong("merge_parts", "lse")
def lse_not_merged(out_a, lse_a, out_b, lse_b):
    a, b, _ = _weights(lse_a, lse_b)
    return a[:, None] * out_a + b[:, None] * out_b, np.maximum(lse_a, lse_b)


@wrong("merge_parts", "lse")
def lse_added(out_a, lse_a, out_b, lse_b):
    a, b, _ = _weights(lse_a, lse_b)
    return a[:, None] * out_a + b[:, None] * out_b, lse_a + lse_b


@wrong("merge_parts", "lse")
def merged_in_base_2(out_a, lse_a, out_b, lse_b):
    a, b, lse = _weights(lse_a * np.log(2), lse_b * np.log(2))
    return a[:, None] * out_a + b[:, None] * out_b, lse / np.log(2)


@wrong("merge_parts", "weights")
def plain_mean(out_a, lse_a, out_b, lse_b):
    return (out_a + out_b) / 2, _weights(lse_a, lse_b)[2]


@wrong("merge_parts", "weights")
def weighted_by_lse(out_a, lse_a, out_b, lse_b):
    lse = _weights(lse_a, lse_b)[2]
    with np.errstate(all="ignore"):
        return (lse_a[:, None] * out_a + lse_b[:, None] * out_b) / (lse_a + lse_b)[:, None], lse


@wrong("merge_parts", "weights")
def weights_swapped(out_a, lse_a, out_b, lse_b):
    a, b, lse = _weights(lse_a, lse_b)
    return b[:, None] * out_a + a[:, None] * out_b, lse


@wrong("merge_parts", "large lse")
def exp_of_the_lse_itself(out_a, lse_a, out_b, lse_b):
    with np.errstate(all="ignore"):
        a, b = np.exp(lse_a), np.exp(lse_b)
        return (a[:, None] * out_a + b[:, None] * out_b) / (a + b)[:, None], np.log(a + b)


@wrong("merge_parts", "large lse")
def one_shift_for_all_heads(out_a, lse_a, out_b, lse_b):
    m = max(lse_a.max(), lse_b.max(), -1e300)
    a, b, lse = _weights(np.where(lse_a < m - 745, -np.inf, lse_a), np.where(lse_b < m - 745, -np.inf, lse_b))
    return a[:, None] * out_a + b[:, None] * out_b, lse


@wrong("merge_parts", "large lse")
def lse_moved_by_a_logarithm_of_a_ratio(out_a, lse_a, out_b, lse_b):
    with np.errstate(all="ignore"):  # lse_b - lse_a is inf where a saw nothing, and -inf + inf is NaN
        ratio = np.where(lse_b - lse_a < 700, np.exp(lse_b - lse_a), np.inf)
        a = 1 / (1 + ratio)
        return a[:, None] * out_a + (1 - a)[:, None] * out_b, lse_a + np.log1p(ratio)


@wrong("merge_parts", "both empty")
def nan_where_both_are_empty(out_a, lse_a, out_b, lse_b):
    with np.errstate(all="ignore"):
        lse = np.logaddexp(lse_a, lse_b)
        return np.exp(lse_a - lse)[:, None] * out_a + np.exp(lse_b - lse)[:, None] * out_b, lse


@wrong("merge_parts", "both empty")
def lse_zero_where_both_are_empty(out_a, lse_a, out_b, lse_b):
    a, b, lse = _weights(lse_a, lse_b)
    return a[:, None] * out_a + b[:, None] * out_b, np.where(np.isinf(lse), 0.0, lse)
