"""Notebook 12."""

import math

import numpy as np
import torch

from . import wrong

E4M3 = torch.float8_e4m3fn


def each(lengths, k, index_bytes, kv_bytes):
    """DSA's bytes, one number a sequence."""
    return [index_bytes * L + kv_bytes * min(k, L) for L in lengths]


def dense(lengths, kv_bytes):
    return kv_bytes * sum(lengths)


@wrong("step_bytes", "dense")
def dense_reads_the_index_too(lengths, k, index_bytes, kv_bytes):
    return sum(each(lengths, k, index_bytes, kv_bytes)), (index_bytes + kv_bytes) * sum(lengths)


@wrong("step_bytes", "dense")
def the_other_way_round(lengths, k, index_bytes, kv_bytes):
    return dense(lengths, kv_bytes), sum(each(lengths, k, index_bytes, kv_bytes))


@wrong("step_bytes", "dense")
def padded_to_the_longest(lengths, k, index_bytes, kv_bytes):
    B, longest = len(lengths), max(lengths)
    return B * each([longest], k, index_bytes, kv_bytes)[0], B * kv_bytes * longest


@wrong("step_bytes", "dense")
def a_number_a_sequence(lengths, k, index_bytes, kv_bytes):
    return np.array(each(lengths, k, index_bytes, kv_bytes)), np.array([kv_bytes * L for L in lengths])


@wrong("step_bytes", "dense")
def one_number(lengths, k, index_bytes, kv_bytes):
    return sum(each(lengths, k, index_bytes, kv_bytes))


@wrong("step_bytes", "long context")
def no_indexer(lengths, k, index_bytes, kv_bytes):
    return sum(kv_bytes * min(k, L) for L in lengths), dense(lengths, kv_bytes)


@wrong("step_bytes", "long context")
def index_of_the_selected_only(lengths, k, index_bytes, kv_bytes):
    return sum((index_bytes + kv_bytes) * min(k, L) for L in lengths), dense(lengths, kv_bytes)


@wrong("step_bytes", "long context")
def every_row(lengths, k, index_bytes, kv_bytes):
    return (index_bytes + kv_bytes) * sum(lengths), dense(lengths, kv_bytes)


@wrong("step_bytes", "long context")
def sizes_of_v32_always(lengths, k, index_bytes, kv_bytes):
    return sum(each(lengths, 2048, 132, 656)), dense(lengths, kv_bytes)


@wrong("step_bytes", "batch")
def equal_lengths_once(lengths, k, index_bytes, kv_bytes):
    return sum(each(set(lengths), k, index_bytes, kv_bytes)), dense(lengths, kv_bytes)


@wrong("step_bytes", "batch")
def no_indexer_where_all_are_selected(lengths, k, index_bytes, kv_bytes):
    """A sequence of k tokens exactly; shorter ones are right."""
    dsa = sum((0 if L == k else index_bytes * L) + kv_bytes * min(k, L) for L in lengths)
    return dsa, dense(lengths, kv_bytes)


@wrong("step_bytes", "short context")
def k_rows_always(lengths, k, index_bytes, kv_bytes):
    return sum(index_bytes * L + kv_bytes * k for L in lengths), dense(lengths, kv_bytes)


@wrong("step_bytes", "short context")
def dense_below_k(lengths, k, index_bytes, kv_bytes):
    rows = (kv_bytes * L if L <= k else index_bytes * L + kv_bytes * k for L in lengths)
    return sum(rows), dense(lengths, kv_bytes)


@wrong("step_bytes", "batch")
def k_rows_for_the_whole_batch(lengths, k, index_bytes, kv_bytes):
    return each([sum(lengths)], k, index_bytes, kv_bytes)[0], dense(lengths, kv_bytes)


@wrong("step_bytes", "batch")
def the_mean_length(lengths, k, index_bytes, kv_bytes):
    B = len(lengths)
    return int(B * each([sum(lengths) / B], k, index_bytes, kv_bytes)[0]), dense(lengths, kv_bytes)


def codes_of(k_idx):
    return k_idx.contiguous().view(torch.uint8)


def page_from(values, scales, page_size, Di, behind=None):
    """A page out of value bytes and scale bytes; behind: where the scales begin."""
    page = torch.zeros(page_size * (Di + 4), dtype=torch.uint8)
    begin = page_size * Di if behind is None else behind
    page[: values.numel()] = values.flatten()
    page[begin : begin + scales.numel()] = scales.flatten()
    return page


@wrong("pack_page", "values first")
def interleaved_per_token(k_idx, k_scale, page_size):
    n, Di = k_idx.shape
    page = torch.zeros(page_size, Di + 4, dtype=torch.uint8)
    page[:n] = torch.cat((codes_of(k_idx), k_scale.view(torch.uint8).view(n, 4)), dim=1)
    return page.flatten()


@wrong("pack_page", "values first")
def scales_first(k_idx, k_scale, page_size):
    page = torch.zeros(page_size * (k_idx.shape[1] + 4), dtype=torch.uint8)
    page[: 4 * len(k_scale)] = k_scale.view(torch.uint8)
    page[4 * page_size : 4 * page_size + k_idx.numel()] = codes_of(k_idx).flatten()
    return page


@wrong("pack_page", "values first")
def values_converted(k_idx, k_scale, page_size):
    values = k_idx.float().to(torch.int32).to(torch.uint8)
    return page_from(values, k_scale.view(torch.uint8), page_size, k_idx.shape[1])


@wrong("pack_page", "values first")
def dim_by_dim(k_idx, k_scale, page_size):
    return page_from(codes_of(k_idx).T.contiguous(), k_scale.view(torch.uint8), page_size, k_idx.shape[1])


@wrong("pack_page", "shape and type")
def as_numbers(k_idx, k_scale, page_size):
    return page_from(codes_of(k_idx), k_scale.view(torch.uint8), page_size, k_idx.shape[1]).float()


@wrong("pack_page", "shape and type")
def no_room_for_absent_tokens(k_idx, k_scale, page_size):
    return torch.cat((codes_of(k_idx).flatten(), k_scale.view(torch.uint8)))


@wrong("pack_page", "shape and type")
def a_byte_a_scale(k_idx, k_scale, page_size):
    page = torch.zeros(page_size * (k_idx.shape[1] + 1), dtype=torch.uint8)
    page[: k_idx.numel()] = codes_of(k_idx).flatten()
    exponents = (k_scale.view(torch.int32) >> 23).to(torch.uint8)
    page[page_size * k_idx.shape[1] :][: len(exponents)] = exponents
    return page


@wrong("pack_page", "scales behind")
def the_exponent_four_times(k_idx, k_scale, page_size):
    exponents = (k_scale.view(torch.int32) >> 23).to(torch.uint8).repeat_interleave(4)
    return page_from(codes_of(k_idx), exponents, page_size, k_idx.shape[1])


@wrong("pack_page", "scales behind")
def big_endian(k_idx, k_scale, page_size):
    four = k_scale.view(torch.uint8).view(-1, 4).flip(1)
    return page_from(codes_of(k_idx), four, page_size, k_idx.shape[1])


@wrong("pack_page", "scales behind")
def one_over_the_scale(k_idx, k_scale, page_size):
    return page_from(codes_of(k_idx), (1 / k_scale).view(torch.uint8), page_size, k_idx.shape[1])


@wrong("pack_page", "scales behind")
def rounded_to_bf16(k_idx, k_scale, page_size):
    """Right for every power of two."""
    scales = k_scale.bfloat16().float()
    return page_from(codes_of(k_idx), scales.view(torch.uint8), page_size, k_idx.shape[1])


@wrong("pack_page", "short page")
def scales_right_behind_the_last_value(k_idx, k_scale, page_size):
    return page_from(codes_of(k_idx), k_scale.view(torch.uint8), page_size, k_idx.shape[1], behind=k_idx.numel())


@wrong("pack_page", "short page")
def rest_left_as_it_was(k_idx, k_scale, page_size):
    n, Di = k_idx.shape
    page = torch.empty(page_size * (Di + 4), dtype=torch.uint8)
    page[: n * Di] = codes_of(k_idx).flatten()
    page[page_size * Di : page_size * Di + 4 * n] = k_scale.view(torch.uint8)
    return page


@wrong("pack_page", "short page")
def absent_tokens_have_scale_1(k_idx, k_scale, page_size):
    scales = torch.ones(page_size)
    scales[: len(k_scale)] = k_scale
    return page_from(codes_of(k_idx), scales.view(torch.uint8), page_size, k_idx.shape[1])


@wrong("slots_of", "page and place")
def table_ignored(positions, page_table, page_size):
    return positions.long()


def looked_up(positions, page_table, page_size):
    """The right page of each position, and its place; position 0 for -1."""
    there = positions.clamp(min=0).long()
    return page_table.long().gather(1, there // page_size), there % page_size


@wrong("slots_of", "page and place")
def page_not_multiplied(positions, page_table, page_size):
    page, place = looked_up(positions, page_table, page_size)
    return (page + place).masked_fill(positions < 0, -1)


@wrong("slots_of", "page and place")
def position_added(positions, page_table, page_size):
    page, _ = looked_up(positions, page_table, page_size)
    return (page * page_size + positions).masked_fill(positions < 0, -1)


@wrong("slots_of", "page and place")
def divided_with_a_fraction(positions, page_table, page_size):
    page, place = looked_up(positions, page_table, page_size)
    return (page * page_size + place / page_size * page_size).masked_fill(positions < 0, -1)


@wrong("slots_of", "page and place")
def sixteen_bits(positions, page_table, page_size):
    """Right in a pool of up to 512 pages of 64."""
    page, place = looked_up(positions, page_table, page_size)
    return (page * page_size + place).masked_fill(positions < 0, -1).to(torch.int16)


@wrong("slots_of", "page and place")
def through_fp32(positions, page_table, page_size):
    """Right up to slot 2^24."""
    page, place = looked_up(positions, page_table, page_size)
    return (page.float() * page_size + place).long().masked_fill(positions < 0, -1)


@wrong("slots_of", "page and place")
def positions_taken_for_sorted(positions, page_table, page_size):
    """One walk through the table, which never turns back."""
    slots = torch.full(positions.shape, -1, dtype=torch.int64)
    for b, row in enumerate(positions.tolist()):
        page = 0
        for i, position in enumerate(row):
            while position >= (page + 1) * page_size:
                page += 1
            if position >= 0:
                slots[b, i] = int(page_table[b, page]) * page_size + position - page * page_size
    return slots


@wrong("slots_of", "own table")
def the_first_ones_table(positions, page_table, page_size):
    page, place = looked_up(positions, page_table[:1].repeat(len(positions), 1), page_size)
    return (page * page_size + place).masked_fill(positions < 0, -1)


@wrong("slots_of", "own table")
def tables_end_to_end(positions, page_table, page_size):
    """One long table, read from its beginning for everybody."""
    there = positions.clamp(min=0).long()
    slots = page_table.flatten().long()[there // page_size] * page_size + there % page_size
    return slots.masked_fill(positions < 0, -1)


@wrong("slots_of", "any page size")
def pages_of_64_only(positions, page_table, page_size):
    page, place = looked_up(positions, page_table, 64)
    return (page * 64 + place).masked_fill(positions < 0, -1)


@wrong("slots_of", "any page size")
def by_bits(positions, page_table, page_size):
    """Shift and mask: right where the page size is a power of two."""
    there, bits = positions.clamp(min=0).long(), page_size.bit_length() - 1
    page = page_table.long().gather(1, (there >> bits).clamp(max=page_table.shape[1] - 1))
    return ((page << bits) + (there & page_size - 1)).masked_fill(positions < 0, -1)


@wrong("slots_of", "-1 stays -1")
def minus_1_looked_up(positions, page_table, page_size):
    """-1 // page_size is -1: the last entry. Right by luck where that is -1."""
    p, table = positions.numpy().astype(np.int64), page_table.numpy().astype(np.int64)
    return table[np.arange(len(p))[:, None], p // page_size] * page_size + p % page_size


@wrong("slots_of", "-1 stays -1")
def minus_1_as_position_0(positions, page_table, page_size):
    page, place = looked_up(positions, page_table, page_size)
    return page * page_size + place


@wrong("slots_of", "-1 stays -1")
def minus_1_as_slot_0(positions, page_table, page_size):
    page, place = looked_up(positions, page_table, page_size)
    return (page * page_size + place).masked_fill(positions < 0, 0)


@wrong("slots_of", "-1 stays -1")
def padding_at_the_end_only(positions, page_table, page_size):
    page, place = looked_up(positions, page_table, page_size)
    slots = page * page_size + place
    for row, n in zip(slots, (positions >= 0).sum(dim=1), strict=True):
        row[n:] = -1
    return slots


def unpacked(index_pages, pages, page_size, Di):
    """(keys fp32 [tokens, Di], scales [tokens]) of these pages, in this order."""
    taken = index_pages[pages]
    keys = taken[:, : page_size * Di].contiguous().view(E4M3).reshape(-1, Di)
    return keys.float(), taken[:, page_size * Di :].contiguous().view(torch.float32).flatten()


def scored(q_idx, w, keys, scales):
    return w @ torch.einsum("hd,sd->hs", q_idx.float(), keys).relu() * scales


def placed(scores, table, page_size, length=None):
    """The scores in a row of P · page places, -1 pages and what is not below length hidden."""
    out = torch.full((len(table) * page_size,), -torch.inf)
    length = len(scores) if length is None else length
    out[:length] = scores[:length]
    return out


def used(table):
    return table[table >= 0].long()


@wrong("paged_scores", "one page")
def read_token_by_token(q_idx, w, index_pages, table, length, page_size):
    Di = q_idx.shape[1]
    rows = index_pages[used(table)].reshape(-1, Di + 4)
    keys, scales = rows[:, :Di].contiguous().view(E4M3).float(), rows[:, Di:].contiguous().view(torch.float32)[:, 0]
    return placed(scored(q_idx, w, keys, scales), table, page_size, length)


@wrong("paged_scores", "one page")
def no_scale(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    return placed(scored(q_idx, w, keys, torch.ones_like(scales)), table, page_size, length)


@wrong("paged_scores", "one page")
def no_relu(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    return placed(w @ (q_idx.float() @ keys.T) * scales, table, page_size, length)


@wrong("paged_scores", "one page")
def the_scales_exponent_alone(q_idx, w, index_pages, table, length, page_size):
    """Right for powers of two."""
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    return placed(scored(q_idx, w, keys, scales.log2().floor().exp2()), table, page_size, length)


@wrong("paged_scores", "one page")
def only_the_sequences_places(q_idx, w, index_pages, table, length, page_size):
    """Right numbers, and the table's own order; but the keys are taken for bytes."""
    taken = index_pages[used(table)][:, : page_size * q_idx.shape[1]].reshape(-1, q_idx.shape[1]).float()
    _, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    return placed(scored(q_idx, w, taken, scales), table, page_size, length)


@wrong("paged_scores", "the sequence's order")
def pools_order(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, used(table).sort().values, page_size, q_idx.shape[1])
    return placed(scored(q_idx, w, keys, scales), table, page_size, length)


@wrong("paged_scores", "the sequence's order")
def the_pools_first_pages(q_idx, w, index_pages, table, length, page_size):
    one = len(table) == 1
    pages = used(table) if one else torch.arange(len(used(table)))
    keys, scales = unpacked(index_pages, pages, page_size, q_idx.shape[1])
    return placed(scored(q_idx, w, keys, scales), table, page_size, length)


@wrong("paged_scores", "last page")
def garbage_of_the_last_page_scored(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    return placed(scored(q_idx, w, keys, scales), table, page_size)


@wrong("paged_scores", "last page")
def zero_behind_the_end(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    out = torch.zeros(len(table) * page_size)
    out[:length] = scored(q_idx, w, keys, scales)[:length]
    return out


@wrong("paged_scores", "last page")
def minus_infinity_added(q_idx, w, index_pages, table, length, page_size):
    """NaN - inf is NaN."""
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    out, scores = torch.full((len(table) * page_size,), -torch.inf), scored(q_idx, w, keys, scales)
    out[: len(scores)] = scores + torch.where(torch.arange(len(scores)) < length, 0.0, -torch.inf)
    return out


@wrong("paged_scores", "end of the table")
def read_past_the_end_of_the_table(q_idx, w, index_pages, table, length, page_size):
    """-1 leads to the pool's last page; only the sequence's own last page is cut at its length."""
    keys, scales = unpacked(index_pages, table.long() % len(index_pages), page_size, q_idx.shape[1])
    scores = scored(q_idx, w, keys, scales)
    scores[length : -(-length // page_size) * page_size] = -torch.inf
    return scores


@wrong("paged_scores", "end of the table")
def absent_pages_as_page_0(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, table.clamp(min=0).long(), page_size, q_idx.shape[1])
    scores = scored(q_idx, w, keys, scales)
    if length % page_size:
        scores[length : -(-length // page_size) * page_size] = -torch.inf
    return scores


@wrong("paged_scores", "last page")
def garbage_known_by_its_nan(q_idx, w, index_pages, table, length, page_size):
    """A rejected draft's keys are finite."""
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    scores = scored(q_idx, w, keys, scales)
    return placed(torch.where(scores.isnan(), -torch.inf, scores), table, page_size)


@wrong("paged_scores", "one page")
def summed_in_half_precision(q_idx, w, index_pages, table, length, page_size):
    """Exact for small whole numbers; products of 448 and 448 pass fp16's largest number."""
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    dots = torch.einsum("hd,sd->hs", q_idx.half(), keys.half()).relu()
    return placed((w.half() @ dots * scales.half()).float(), table, page_size, length)


@wrong("paged_scores", "decode equals prefill (trained model)")
def values_cut_to_whole_numbers(q_idx, w, index_pages, table, length, page_size):
    keys, scales = unpacked(index_pages, used(table), page_size, q_idx.shape[1])
    return placed(scored(q_idx.float().int(), w, keys.int().float(), scales), table, page_size, length)


def shares(lses):
    """exp(lse - largest) of each part, and the largest, safe where nothing is."""
    largest = lses.amax(dim=0).clamp(min=-1e300)
    return (lses - largest).exp(), largest


def written(outs, lses):
    return outs.masked_fill((lses == -torch.inf)[..., None], 0.0)


def weighted(outs, weights):
    return (weights[..., None] * outs).sum(dim=0)


def right_lse(lses):
    share, largest = shares(lses)
    return largest + share.sum(dim=0).log()


@wrong("merge_splits", "lse")
def merged_in_base_2(outs, lses):
    lse = torch.log2(torch.exp2(lses).sum(dim=0))
    return weighted(outs, torch.exp2(lses - lse)), lse


@wrong("merge_splits", "lse")
def the_largest_lse(outs, lses):
    return weighted(outs, lses.softmax(dim=0)), lses.amax(dim=0)


@wrong("merge_splits", "lse")
def lse_averaged(outs, lses):
    return weighted(outs, lses.softmax(dim=0)), lses.mean(dim=0)


@wrong("merge_splits", "lse")
def the_first_two_alone(outs, lses):
    return weighted(outs[:2], lses[:2].softmax(dim=0)), torch.logsumexp(lses[:2], dim=0)


@wrong("merge_splits", "lse")
def softmax_over_the_heads(outs, lses):
    return weighted(outs, lses.softmax(dim=1)), torch.logsumexp(lses, dim=1)[: lses.shape[1]]


@wrong("merge_splits", "weights")
def plain_mean(outs, lses):
    return outs.mean(dim=0), torch.logsumexp(lses, dim=0)


@wrong("merge_splits", "weights")
def plain_sum(outs, lses):
    return outs.sum(dim=0), torch.logsumexp(lses, dim=0)


@wrong("merge_splits", "weights")
def weighted_by_lse(outs, lses):
    return weighted(outs, lses / lses.sum(dim=0)), torch.logsumexp(lses, dim=0)


@wrong("merge_splits", "weights")
def lse_not_handed_on(outs, lses):
    """Two at a time; the merged pair keeps its first part's lse."""
    out, lse = outs[0], lses[0]
    for part, part_lse in zip(outs[1:], lses[1:], strict=True):
        both = torch.stack((lse, part_lse)).softmax(dim=0)
        out = both[0][:, None] * out + both[1][:, None] * part
    return out, torch.logsumexp(lses, dim=0)


@wrong("merge_splits", "large lse")
def exp_of_the_lse_itself(outs, lses):
    total = lses.exp().sum(dim=0)
    return weighted(outs, lses.exp() / total), total.log()


@wrong("merge_splits", "large lse")
def one_shift_for_all_heads(outs, lses):
    share = (lses - lses.max()).exp()
    return weighted(outs, share / share.sum(dim=0)), lses.max() + share.sum(dim=0).log()


def merged(outs, lses, shift):
    """Right in exact arithmetic, whatever finite number the shift is."""
    share = (lses - shift).exp()
    total = share.sum(dim=0)
    lse = torch.where(total > 0, shift + total.log(), -torch.inf)
    return weighted(written(outs, lses), share / torch.where(total > 0, total, 1.0)), lse


@wrong("merge_splits", "large lse")
def shifted_by_the_first_parts_lse(outs, lses):
    return merged(outs, lses, lses[0].masked_fill(lses[0] == -torch.inf, 0.0))


@wrong("merge_splits", "large lse")
def shifted_by_the_mean_lse(outs, lses):
    there = lses > -torch.inf
    return merged(outs, lses, lses.masked_fill(~there, 0.0).sum(dim=0) / there.sum(dim=0).clamp(min=1))


@wrong("merge_splits", "large lse")
def shifted_by_the_smallest_lse(outs, lses):
    smallest = lses.masked_fill(lses == -torch.inf, torch.inf).amin(dim=0)
    return merged(outs, lses, smallest.masked_fill(smallest == torch.inf, 0.0))


@wrong("merge_splits", "empty part")
def nan_times_zero(outs, lses):
    share, largest = shares(lses)
    total = share.sum(dim=0)
    lse = torch.where(total > 0, largest + total.clamp(min=1e-300).log(), -torch.inf)
    return weighted(outs, share / total.clamp(min=1e-300)), lse


@wrong("merge_splits", "empty part")
def mean_where_a_part_is_empty(outs, lses):
    """Right without empty parts; else the parts that are there count alike."""
    there = lses > -torch.inf
    weights = torch.where(there.all(dim=0), lses.softmax(dim=0), there / there.sum(dim=0))
    return weighted(written(outs, lses), weights), torch.logsumexp(lses, dim=0)


@wrong("merge_splits", "all empty")
def nan_where_all_are_empty(outs, lses):
    return weighted(written(outs, lses), lses.softmax(dim=0)), torch.logsumexp(lses, dim=0)


@wrong("merge_splits", "all empty")
def one_part_handed_on(outs, lses):
    """Nothing to merge, but its out may never have been written."""
    if len(outs) == 1:
        return outs[0], lses[0]
    return merged(outs, lses, lses.amax(dim=0).masked_fill(lses.amax(dim=0) == -torch.inf, 0.0))


@wrong("merge_splits", "all empty")
def finite_lse_of_nothing(outs, lses):
    share, largest = shares(lses)
    total = share.sum(dim=0).clamp(min=1e-300)
    return weighted(written(outs, lses), share / total), largest + total.log()


@wrong("merge_splits", "inputs")
def in_place(outs, lses):
    outs[lses == -math.inf] = 0.0
    outs *= lses.softmax(dim=0)[..., None]
    return outs.sum(dim=0), torch.logsumexp(lses, dim=0)
