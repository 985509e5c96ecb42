"""Notebook 11: a profile, and a table."""

import math

from . import wrong


def part_of(name, parts):
    return next((part for part, texts in parts.items() if any(text in name for text in texts)), "other")


def summed(kernels, parts, us_of=lambda launches, us: us, part_of=part_of):
    found = dict.fromkeys((*parts, "other"), 0.0)
    for name, launches, us in kernels:
        found[part_of(name, parts)] += us_of(launches, us)
    return found


def with_idle(found, whole):
    return found | {"idle": 1 - sum(found.values())}


@wrong("read_profile", "parts")
def times_the_launches(kernels, whole_us, parts):
    found = summed(kernels, parts, lambda launches, us: launches * us)
    return with_idle({part: us / whole_us for part, us in found.items()}, whole_us)


@wrong("read_profile", "parts")
def launches_counted(kernels, whole_us, parts):
    found = summed(kernels, parts, lambda launches, us: launches)
    return with_idle({part: n / sum(found.values()) for part, n in found.items()}, whole_us)


@wrong("read_profile", "parts")
def shares_of_the_busy_time(kernels, whole_us, parts):
    found = summed(kernels, parts)
    return {part: us / sum(found.values()) for part, us in found.items()} | {"idle": 0.0}


@wrong("read_profile", "parts")
def microseconds(kernels, whole_us, parts):
    found = summed(kernels, parts)
    return found | {"idle": whole_us - sum(found.values())}


@wrong("read_profile", "parts")
def the_longest_kernel_of_each(kernels, whole_us, parts):
    found = dict.fromkeys((*parts, "other"), 0.0)
    for name, _, us in kernels:
        part = part_of(name, parts)
        found[part] = max(found[part], us / whole_us)
    return with_idle(found, whole_us)


@wrong("read_profile", "first part that fits")
def the_last_part_that_fits(kernels, whole_us, parts):
    backwards = dict(reversed(parts.items()))
    return with_idle({part: us / whole_us for part, us in summed(kernels, backwards).items()}, whole_us)


@wrong("read_profile", "first part that fits")
def every_part_that_fits(kernels, whole_us, parts):
    found = {
        part: sum(us for name, _, us in kernels if any(text in name for text in texts)) / whole_us
        for part, texts in parts.items()
    }
    rest = sum(us for name, _, us in kernels if part_of(name, parts) == "other") / whole_us
    return with_idle(found | {"other": rest}, whole_us)


@wrong("read_profile", "other")
def others_left_out(kernels, whole_us, parts):
    found = {part: us / whole_us for part, us in summed(kernels, parts).items() if part != "other"}
    return with_idle(found, whole_us)


@wrong("read_profile", "other")
def other_only_where_there_is_some(kernels, whole_us, parts):
    found = {part: us / whole_us for part, us in summed(kernels, parts).items() if us or part != "other"}
    return with_idle(found, whole_us)


@wrong("read_profile", "idle")
def never_idle(kernels, whole_us, parts):
    return {part: us / whole_us for part, us in summed(kernels, parts).items()} | {"idle": 0.0}


@wrong("read_profile", "a recorded step")
def the_first_ten_kernels(kernels, whole_us, parts):
    return with_idle({part: us / whole_us for part, us in summed(kernels[:10], parts).items()}, whole_us)


def line(measured, n):
    (first, low), (second, high) = sorted(measured.items())
    return low + (high - low) / (second - first) * (n - first)


@wrong("predict_table", "what was measured")
def in_proportion_to_the_larger(measured, pairs):
    large = max(measured)
    return [measured[large] * n / large for n in pairs]


@wrong("predict_table", "what was measured")
def in_proportion_to_the_smaller(measured, pairs):
    small = min(measured)
    return [measured[small] * n / small for n in pairs]


@wrong("predict_table", "what was measured")
def only_what_grows(measured, pairs):
    (first, low), (second, high) = sorted(measured.items())
    return [(high - low) / (second - first) * n for n in pairs]


@wrong("predict_table", "what was measured")
def one_number(measured, pairs):
    return line(measured, pairs[0])


@wrong("predict_table", "what was measured")
def whole_milliseconds(measured, pairs):
    return [round(line(measured, n)) for n in pairs]


@wrong("predict_table", "what was measured")
def never_written(measured, pairs):
    return [math.nan] * len(pairs)


@wrong("predict_table", "between and beyond")
def a_power_of_the_pairs(measured, pairs):
    (first, low), (second, high) = sorted(measured.items())
    power = math.log(high / low) / math.log(second / first)
    return [low * (n / first) ** power for n in pairs]


@wrong("predict_table", "between and beyond")
def the_nearest_measured(measured, pairs):
    return [measured[min(measured, key=lambda known: abs(known - n))] for n in pairs]


@wrong("predict_table", "between and beyond")
def not_beyond(measured, pairs):
    return [line(measured, min(max(n, min(measured)), max(measured))) for n in pairs]


@wrong("predict_table", "the table, within 10 %")
def tens_where_there_are_many(measured, pairs):
    return [round(line(measured, n), -1) if n > 10**6 else line(measured, n) for n in pairs]
