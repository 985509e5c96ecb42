"""Notebooks 08, 10 to 12 and 15: right functions in NumPy, or of another style than the notebooks' solutions."""

import math

import numpy as np
import torch

from . import right


@right("tile_cost")
def numpy_ints(BQ, BK, Hi, Di, value_bytes):
    BQ, BK = np.int64(BQ), np.int64(BK)
    return [2 * BK * Di * BQ * Hi, BK * (Di * value_bytes + 4 * BQ)]


@right("lower_bound")
def maxima_in_numpy(scores, k, group):
    maxima = np.maximum.reduceat(np.asarray(scores), np.arange(0, len(scores), group))
    return np.sort(maxima)[-k] if k <= len(maxima) else -np.inf


@right("ordered_bits")
def numpy_uint32(x):
    bits = (np.asarray(x) + np.float32(0.0)).view(np.uint32)
    return np.where(bits >> 31 != 0, ~bits, bits | np.uint32(0x80000000))


@right("ordered_bits")
def sign_and_magnitude(x):
    magnitude = x.abs().view(torch.int32)
    return torch.where(x < 0, -magnitude, magnitude)


@right("threshold_select")
def by_bisection(scores, k):
    keys, wanted, low, high = sign_and_magnitude(scores).long(), min(k, len(scores)), -(2**31), 2**31
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if int((keys >= middle).sum()) >= wanted else (low, middle)
    equal, ties = keys == low, wanted - int((keys > low).sum())
    chosen = ((keys > low) | (equal & (equal.cumsum(0) <= ties))).nonzero().flatten().numpy()
    return np.pad(chosen, (0, k - len(chosen)), constant_values=-1).astype(np.int32)


@right("roofline")
def larger_pair(flops, bytes, flops_per_second, bytes_per_second):
    return max((1e3 * flops / flops_per_second, "computing"), (1e3 * bytes / bytes_per_second, "memory"))


@right("programs_that_fit")
def one_more_as_long_as_it_fits(threads, registers, shared_bytes):
    taken, n = threads * math.ceil(registers / 8) * 8, 0
    while n < 32 and (n + 1) * max(taken / 65_536, threads / 2048, (shared_bytes + 1024) / 233_472) <= 1:
        n += 1
    return n


@right("ring_waits")
def parities_as_truth_values(i, places):
    return i % places, i // places % 2 == 0, i // places % 2 == 1


@right("time_after")
def a_copy_of_the_parts(parts, faster, side_by_side):
    new = dict(parts)
    for name, factor in faster.items():
        new[name] = new[name] / factor
    after, before = (np.array(list(times.values())) for times in (new, parts))
    after, before = (after.max(), before.max()) if side_by_side else (after.sum(), before.sum())
    return after, (before - after) / before


@right("measure")
def median_in_torch(card):
    times = []
    for _ in range(75):  # the first, which compiles, is one of many to a median
        card.overwrite_cache()
        card.wait()
        begin = card.now()
        card.launch()
        card.wait()
        times.append(card.now() - begin)
    return torch.tensor(times).median()


@right("step_bytes")
def tokens_in_torch(lengths, k, index_bytes, kv_bytes):
    tokens = torch.tensor(lengths)
    return [(index_bytes * tokens + kv_bytes * tokens.clamp(max=k)).sum(), (kv_bytes * tokens).sum()]


@right("pack_page")
def page_in_numpy(k_idx, k_scale, page_size):
    values, scales = np.zeros((page_size, k_idx.shape[1]), np.uint8), np.zeros(page_size, np.float32)
    values[: len(k_idx)], scales[: len(k_idx)] = k_idx.view(torch.uint8), k_scale
    return np.concatenate([values.ravel(), scales.view(np.uint8)])


@right("slots_of")
def slots_in_numpy(positions, page_table, page_size):
    positions, table = np.asarray(positions), np.asarray(page_table)
    there = np.maximum(positions, 0)
    slots = np.take_along_axis(table, there // page_size, 1) * page_size + there % page_size
    return np.where(positions < 0, -1, slots)  # int32


@right("paged_scores")
def key_by_key_in_numpy(q_idx, w, index_pages, table, length, page_size):
    scores, q, Di = np.full(len(table) * page_size, -np.inf, np.float32), q_idx.float().numpy(), q_idx.shape[1]
    for s in range(length):
        page, i = index_pages[int(table[s // page_size])].clone(), s % page_size
        key = page[i * Di : i * Di + Di].view(torch.float8_e4m3fn).float().numpy()
        scale = np.frombuffer(page[page_size * Di + 4 * i :][:4].numpy().tobytes(), np.float32)[0]
        scores[s] = scale * (w.numpy() @ np.maximum(q @ key, 0.0))
    return scores


@right("merge_splits")
def two_parts_at_a_time(outs, lses):
    out, lse = torch.zeros_like(outs[0]), torch.full_like(lses[0], -torch.inf)
    for part, part_lse in zip(outs, lses, strict=True):
        both = torch.logaddexp(lse, part_lse)
        old, new = (torch.where(x == -torch.inf, 0.0, (x - both).exp())[:, None] for x in (lse, part_lse))
        out, lse = old * out + torch.where(new == 0, 0.0, new * part), both
    return out, lse


@right("rope_probe")
def probe_in_numpy():
    return [np.arange(1, 9, dtype=np.float32).reshape(1, 1, 8) / 2, np.array([5]), np.array([0.5, 0.1], np.float32)]
