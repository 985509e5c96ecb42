"""Notebook 11."""

import math
import statistics

from . import wrong

# ---------------------------------------------------------------------------------------------------------- roofline


def times(flops, size, flop_rate, byte_rate):
    return 1e3 * flops / flop_rate, 1e3 * size / byte_rate


def which(computing, moving):
    return "computing" if computing > moving else "memory"


@wrong("roofline", "computing")
def added(*work):
    return sum(times(*work)), which(*times(*work))


@wrong("roofline", "computing")
def in_seconds(*work):
    return max(times(*work)) / 1e3, which(*times(*work))


@wrong("roofline", "computing")
def the_shorter(*work):
    return min(times(*work)), which(*times(*work))


@wrong("roofline", "computing")
def rates_upside_down(flops, size, flop_rate, byte_rate):
    return 1e3 * max(flop_rate / flops, byte_rate / size) if flops else 0.0, "computing"


@wrong("roofline", "memory")
def computing_alone(*work):
    return times(*work)[0], which(*times(*work))


@wrong("roofline", "bound")
def flops_compared_with_bytes(flops, size, flop_rate, byte_rate):
    return max(times(flops, size, flop_rate, byte_rate)), "computing" if flops > size else "memory"


@wrong("roofline", "bound")
def the_faster_one_named(*work):
    return max(times(*work)), which(*reversed(times(*work)))


@wrong("roofline", "a step of the record")
def rounded_to_hundredths(*work):
    return round(max(times(*work)), 2), which(*times(*work))


# ------------------------------------------------------------------------------------------------- programs_that_fit


def fits(threads, registers, shared, *, rounded=True, extra=1024, at_most=32, places=2048):
    taken = -(-registers // 8) * 8 if rounded else registers
    return min(65_536 // (threads * taken), 233_472 // max(shared + extra, 1), places // threads, at_most)


@wrong("programs_that_fit", "registers")
def registers_of_one_thread(threads, registers, shared):
    return min(65_536 // registers, 233_472 // (shared + 1024), 2048 // threads, 32)


@wrong("programs_that_fit", "registers")
def four_bytes_a_register(threads, registers, shared):
    return min(65_536 // (4 * threads * registers), 233_472 // (shared + 1024), 2048 // threads, 32)


@wrong("programs_that_fit", "registers")
def a_fraction_of_a_program(threads, registers, shared):
    return min(65_536 / (threads * registers), 233_472 / (shared + 1024), 2048 / threads, 32)


@wrong("programs_that_fit", "registers")
def rounded_to_the_nearest(threads, registers, shared):
    return round(min(65_536 / (threads * registers), 233_472 / (shared + 1024), 2048 / threads, 32))


@wrong("programs_that_fit", "registers")
def the_largest_limit(threads, registers, shared):
    return max(65_536 // (threads * registers), 233_472 // (shared + 1024), 2048 // threads)


@wrong("programs_that_fit", "shared memory")
def no_shared_memory(threads, registers, shared):
    return fits(threads, registers, 0)


@wrong("programs_that_fit", "shared memory")
def nothing_reserved(threads, registers, shared):
    return fits(threads, registers, shared, extra=0)


@wrong("programs_that_fit", "too large")
def at_least_one(threads, registers, shared):
    return max(1, fits(threads, registers, shared))


@wrong("programs_that_fit", "threads")
def no_limit_of_threads(threads, registers, shared):
    return fits(threads, registers, shared, places=1 << 30)


@wrong("programs_that_fit", "threads")
def warps_for_threads(threads, registers, shared):
    return fits(threads, registers, shared, places=64 * threads)


@wrong("programs_that_fit", "32 programs")
def no_limit_of_programs(threads, registers, shared):
    return fits(threads, registers, shared, at_most=1 << 30)


@wrong("programs_that_fit", "rounded up")
def registers_as_they_are(threads, registers, shared):
    return fits(threads, registers, shared, rounded=False)


@wrong("programs_that_fit", "rounded up")
def registers_rounded_down(threads, registers, shared):
    return fits(threads, registers // 8 * 8, shared)


# -------------------------------------------------------------------------------------------------------- time_after


def after(parts, faster, total):
    new = total(ms / faster.get(name, 1) for name, ms in parts.items())
    return new, 1 - new / total(parts.values())


def right(parts, faster, side_by_side):
    return after(parts, faster, max if side_by_side else sum)


def by_a_factor(parts, side_by_side, factor):
    before = (max if side_by_side else sum)(parts.values())
    return before / factor, 1 - 1 / factor


@wrong("time_after", "one after another")
def factors_multiplied(parts, faster, side_by_side):
    return by_a_factor(parts, side_by_side, math.prod(faster.values()))


@wrong("time_after", "one after another")
def factors_averaged(parts, faster, side_by_side):
    return by_a_factor(parts, side_by_side, statistics.mean(faster.get(name, 1) for name in parts))


@wrong("time_after", "one after another")
def times_the_factor(parts, faster, side_by_side):
    return right(parts, {name: 1 / factor for name, factor in faster.items()}, side_by_side)


@wrong("time_after", "one after another")
def what_stays_left_out(parts, faster, side_by_side):
    return right({name: parts[name] for name in faster}, faster, side_by_side)


@wrong("time_after", "one after another")
def the_longest_whatever_they_do(parts, faster, side_by_side):
    return after(parts, faster, max)


@wrong("time_after", "side by side")
def added_whatever_they_do(parts, faster, side_by_side):
    return after(parts, faster, sum)


@wrong("time_after", "side by side")
def the_part_that_was_longest(parts, faster, side_by_side):
    """It need not be the longest afterwards."""
    if not side_by_side:
        return after(parts, faster, sum)
    longest = max(parts, key=parts.get)
    new = parts[longest] / faster.get(longest, 1)
    return new, 1 - new / parts[longest]


@wrong("time_after", "share saved")
def the_share_that_is_left(parts, faster, side_by_side):
    ms, saved = right(parts, faster, side_by_side)
    return ms, 1 - saved


@wrong("time_after", "share saved")
def saved_of_the_new_time(parts, faster, side_by_side):
    ms, saved = right(parts, faster, side_by_side)
    return ms, saved / (1 - saved)


@wrong("time_after", "share saved")
def saved_milliseconds(parts, faster, side_by_side):
    ms, saved = right(parts, faster, side_by_side)
    return ms, ms / (1 - saved) - ms


@wrong("time_after", "share saved")
def saved_of_the_sum(parts, faster, side_by_side):
    ms, _ = right(parts, faster, side_by_side)
    return ms, 1 - ms / sum(parts.values())


@wrong("time_after", "share saved")
def per_cent(parts, faster, side_by_side):
    ms, saved = right(parts, faster, side_by_side)
    return ms, 100 * saved


@wrong("time_after", "the recorded chain")
def factors_below_three_halves_are_noise(parts, faster, side_by_side):
    return right(parts, {name: factor for name, factor in faster.items() if not 1 < factor < 1.5}, side_by_side)
