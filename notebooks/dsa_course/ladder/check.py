"""Notebook 11: the roofline, what fits, a profile. `check_machine` has the ring and the benchmark."""

import math

import numpy as np

from dsa_ref.cost import roofline_seconds

from ..checking import FORGOTTEN, Check, expect, expect_int, expect_number
from .record import ceilings, row

roofline = Check("roofline")  # (flops, bytes, flops_per_second, bytes_per_second) -> (ms, "computing" or "memory")
programs_that_fit = Check("programs_that_fit")  # (threads, registers, shared_bytes) -> int
time_after = Check("time_after")  # (parts {name: ms}, faster {name: factor}, side_by_side) -> (ms, share saved)


def _pair(got, names):
    forgotten = FORGOTTEN if got is None else f"return {names}"
    expect(isinstance(got, (tuple, list)) and len(got) == 2, f"got {got!r}, expected the pair ({names})", forgotten)
    return got


def _expect_number(got, expected, what, suspects, cause, tolerance=1e-9):
    """Compare one number. suspects: {cause: the number that this mistake gives}."""
    got = expect_number(got, what)
    close = [name for name, wrong in suspects.items() if math.isclose(got, wrong, rel_tol=1e-9, abs_tol=1e-12)]
    expect(
        math.isclose(got, expected, rel_tol=tolerance, abs_tol=1e-12),
        f"{what}: got {got:.9g}, expected {expected:.9g}",
        close[0] if close else cause,
    )


# ---------------------------------------------------------------------------------------------------------- roofline

# FLOPs, bytes, FLOPs a second, bytes a second: first those that compute, then those that wait for memory
COMPUTING = ((8e12, 2e9, 1e15, 4e12), (3e9, 1e6, 2e12, 1e9), (1e11, 1e9, 1e14, 2e12), (5e12, 0, 1e15, 2e12))
MEMORY = (
    (1e9, 2e9, 1e15, 4e12),
    (0.0, 5e8, 1e15, 2e12),
    (16_384 * 5_000_000, 132 * 5_000_000, 1e15, 2e12),
    (1e12, 1e9, 2e15, 1e12),  # 1,000 FLOPs a byte, and still too few for this card
)


def _expect_time(solution, work, cause):
    flops, size, flop_rate, byte_rate = work
    computing, moving = 1e3 * flops / flop_rate, 1e3 * size / byte_rate
    suspects = {
        "the two were added: a card computes and moves at the same time": computing + moving,
        "that is in seconds": max(computing, moving) / 1e3,
        "that is the shorter of the two times: nothing is done before the longer is": min(computing, moving),
    }
    what = f"{flops:.3g} FLOPs and {size:.3g} bytes at {flop_rate:.3g} and {byte_rate:.3g} a second, ms"
    got = _pair(solution(*work), "ms, bound")[0]
    _expect_number(got, 1e3 * roofline_seconds(*work), what, suspects, cause)


@roofline.property("computing")
def roofline_computing(solution):
    for work in COMPUTING:
        _expect_time(solution, work, "here computing is the longer part: 1000 · flops / flops_per_second")


@roofline.property("memory")
def roofline_memory(solution):
    for work in MEMORY:
        _expect_time(solution, work, "here moving is the longer part: 1000 · bytes / bytes_per_second")


@roofline.property("bound")
def roofline_bound(solution):
    for cases, expected in ((COMPUTING, "computing"), (MEMORY, "memory")):
        for work in cases:
            got = _pair(solution(*work), "ms, bound")[1]
            expect(
                got == expected,
                f"{work[0]:.3g} FLOPs and {work[1]:.3g} bytes at {work[2]:.3g} and {work[3]:.3g} a second: got "
                f"{got!r}, expected {expected!r}",
                "compare the two times, not FLOPs with bytes: 'computing' or 'memory', whichever takes longer",
            )


@roofline.property("a step of the record")
def roofline_a_step_of_the_record(solution):
    """Real sizes and the card's own ceilings: nothing was rounded on the way."""
    found = row("select_topk", "4096 x 128K independent")
    work = (0, found["work"], ceilings()["bf16"], ceilings()["copy"])
    _expect_time(solution, work, "top-k does no FLOPs at all; give the time as it is, not rounded")
    _expect_time(solution, (1e6, 1e3, 1e15, 4e12), "a nanosecond is 1e-6 ms: give the time as it is, however short")


# ------------------------------------------------------------------------------------------------- programs_that_fit

REGISTERS, THREADS, PROGRAMS, SHARED, RESERVED = 65_536, 2048, 32, 233_472, 1024


def fitting(threads, registers, shared_bytes):
    """How many programs a Hopper multiprocessor holds, and what each of its four limits alone allows."""
    limits = {
        "registers": REGISTERS // (threads * (-(-registers // 8) * 8)),
        "shared memory": SHARED // (shared_bytes + RESERVED),
        "threads": THREADS // threads,
        "programs": PROGRAMS,
    }
    return min(limits.values()), limits


def _expect_programs(solution, cases, cause):
    for threads, registers, shared in cases:
        expected, limits = fitting(threads, registers, shared)
        got = expect_int(solution(threads, registers, shared), "programs")
        others = ", ".join(f"{name} {limit}" for name, limit in limits.items())
        expect(
            got == expected,
            f"{threads} threads of {registers} registers, {shared:,} bytes of shared memory: got {got}, expected "
            f"{expected} (the limits one by one: {others})",
            cause,
        )


@programs_that_fit.property("registers")
def programs_that_fit_registers(solution):
    cases = ((128, 128, 16), (256, 128, 1024), (384, 168, 0), (128, 136, 0), (128, 255, 0), (32, 255, 0), (96, 255, 0))
    _expect_programs(solution, cases, "65,536 registers, shared by threads · registers of each program")


@programs_that_fit.property("shared memory")
def programs_that_fit_shared_memory(solution):
    cases = ((128, 32, 58_880), (256, 64, 103_496), (128, 32, 115_712), (128, 32, 115_713), (128, 32, 116_000))
    _expect_programs(solution, cases, "233,472 bytes, of which each program takes shared_bytes and 1,024 more")


@programs_that_fit.property("too large")
def programs_that_fit_too_large(solution):
    cases = ((384, 168, 233_000), (512, 168, 0))
    _expect_programs(solution, cases, "what is larger than the multiprocessor does not fit once: 0")


@programs_that_fit.property("threads")
def programs_that_fit_threads(solution):
    cases = ((1024, 24, 0), (512, 16, 2048))
    _expect_programs(solution, cases, "at most 2,048 threads at a time")


@programs_that_fit.property("32 programs")
def programs_that_fit_32_programs(solution):
    _expect_programs(solution, ((32, 32, 0), (64, 24, 1024)), "at most 32 programs, however small they are")


@programs_that_fit.property("rounded up")
def programs_that_fit_rounded_up(solution):
    cases = ((128, 55, 8192), (128, 73, 0), (256, 97, 0), (128, 100, 0))
    _expect_programs(solution, cases, "a thread gets registers eight at a time: 55 take the place of 56, 73 of 80")


# -------------------------------------------------------------------------------------------------------- time_after


def _after(parts, faster, side_by_side):
    new = [ms / faster.get(name, 1.0) for name, ms in parts.items()]
    total = max if side_by_side else sum
    return total(new), 1 - total(new) / total(parts.values())


def _suspects(parts, faster, side_by_side):
    """Times that mistakes give."""
    total = max if side_by_side else sum
    factors = [faster.get(name, 1.0) for name in parts]
    before = total(parts.values())
    everything = [ms * factor for ms, factor in zip(parts.values(), factors, strict=True)]
    return {
        "nothing was changed: divide a part's time by its factor": before,
        "a part that is 2 times faster takes half its time: divide by the factor": total(everything),
        "the whole was divided by the factors' product: each holds for its own part": before / math.prod(factors),
        "the whole was divided by the mean factor: each holds for its own part": before / np.mean(factors),
        "only the changed parts were counted: the others still take their time": total(
            [0.0, *(parts[name] / factor for name, factor in faster.items())]
        ),
        "parts side by side do not add up: the longest is what one waits for": _after(parts, faster, False)[0],
        "these parts run one after another: they add up": _after(parts, faster, True)[0],
    }


def _expect_after(solution, parts, faster, side_by_side, cause, tolerance=1e-9):
    ms = _pair(solution(dict(parts), dict(faster), side_by_side), "ms, saved")[0]
    how = "side by side" if side_by_side else "one after another"
    given = f"{parts} {how}, faster {faster}: ms"
    expected = _after(parts, faster, side_by_side)[0]
    _expect_number(ms, expected, given, _suspects(parts, faster, side_by_side), cause, tolerance)


AFTER = (  # parts, faster
    ({"a": 6.0, "b": 4.0}, {"a": 3.0}),
    ({"a": 1.0, "b": 3.0, "c": 4.0}, {"c": 4.0, "b": 1.5}),
    ({"a": 1.0, "b": 9.0}, {"a": 1000.0}),
    ({"a": 6.0, "b": 4.0}, {}),
    ({"a": 6.0, "b": 4.0, "c": 5.0}, {"a": 0.5, "b": 2.0}),  # a becomes slower, and less than nothing is saved
)


@time_after.property("one after another")
def time_after_one_after_another(solution):
    for parts, faster in AFTER:
        _expect_after(solution, parts, faster, False, "sum over the parts of ms / factor; no factor means 1")


@time_after.property("side by side")
def time_after_side_by_side(solution):
    for parts, faster in (*AFTER, ({"tensor": 1024.0, "instructions": 765.0}, {"instructions": 2.0})):
        _expect_after(solution, parts, faster, True, "the longest of the new times: the units work at the same time")


@time_after.property("share saved")
def time_after_share_saved(solution):
    for parts, faster in AFTER:
        for side_by_side in (False, True):
            ms, share = _after(parts, faster, side_by_side)
            before = (max if side_by_side else sum)(parts.values())
            suspects = {
                "that is the share that is left": 1 - share,
                "saved / time after: the share is of the time before": (before - ms) / ms,
                "that is in ms: divide by the time before": before - ms,
                "that is a speed-up: the share saved is 1 - after / before": before / ms,
                "that is in per cent": 100 * share,
                "the time before is that of these parts as they run, side by side or one after another": (
                    1 - ms / sum(parts.values())
                ),
            }
            got = _pair(solution(dict(parts), dict(faster), side_by_side), "ms, saved")[1]
            what = f"{parts}, faster {faster}, side_by_side={side_by_side}: saved"
            _expect_number(got, share, what, suspects, "1 - time after / time before")


PEERS, TOGETHER = ("DeepGEMM + SGLang", "FlashMLA"), "DeepGEMM + SGLang + FlashMLA"


def chain(size):
    """(parts {step: the peers' ms}, faster {step: how many times faster ours is}, our chain's ms) of a record's shape.

    size: "32K" or "128K", keys.
    """
    select = row("lightning_select", f"4096 x {size}")["ms"]
    attend = row("sparse_attention", f"4096 x {size}, 128 heads, random")["ms"]
    parts = {"score and select": select[PEERS[0]], "attend": attend[PEERS[1]]}
    faster = {
        "score and select": parts["score and select"] / select["ours"],
        "attend": parts["attend"] / attend["ours"],
    }
    return parts, faster, row("chain", f"4096 x {size}")["ms"]["ours"]


@time_after.property("the recorded chain")
def time_after_the_recorded_chain(solution):
    for size in ("32K", "128K"):
        parts, faster, ms = chain(size)
        got = _pair(solution(parts, faster, False), "ms, saved")[0]
        expect(
            abs(got / ms - 1) < 0.02,
            f"both steps at 4096 x {size}: got {got:.3f} ms, recorded {ms:.3f}, and 2 % are allowed",
            "do not round, and take the factors as they come: they are no whole numbers",
        )
