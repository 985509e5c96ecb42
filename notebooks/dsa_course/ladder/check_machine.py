"""Notebook 11: the parities of a ring of stages, and a benchmark on a card that hides what benchmarks get wrong."""

import numpy as np

from ..checking import Check, expect, expect_number
from .card import CALL_MS, OVERWRITE_MS, Card
from .ring import ORDERS, Fault, act_out

ring_waits = Check("ring_waits")  # (i, places) -> (place, parity to wait for at free, parity to wait for at full)
measure = Check("measure")  # (card) -> ms of one call that finds nothing in the cache

# -------------------------------------------------------------------------------------------------------- ring_waits

RINGS = (1, 2, 3, 4, 5, 13)  # places
WHY = {
    "filler waits": "round r waits for the end of phase r - 1 of `free`, which has parity (r - 1) mod 2",
    "reader waits": "the bytes of round r end phase r of `full`, which has parity r mod 2",
    "early": "the reader did not wait for the bytes: in round 0 `full` is in phase 0, and parity 1 returns at once",
    "overwritten": "the filler did not wait for the reader: its parity is that of the round before",
    "twice": "the filler did not wait for the reader: its parity is that of the round before",
}


def _act(solution, tiles, places, causes=None):
    """Send tiles through the ring in every order, and report the first fault."""
    waits = {i: solution(i, places) for i in range(tiles)}
    for order in ORDERS:
        try:
            act_out(lambda i, _: waits[i], tiles, places, order)
        except Fault as fault:
            who = order if isinstance(order, str) else f"random order {order}"
            expect(
                False,
                f"a ring of {places}, tiles 0 to {tiles - 1}, {who}: {fault}",
                {**WHY, **(causes or {})}[fault.kind],
            )


@ring_waits.property("place")
def ring_waits_place(solution):
    for places in RINGS:
        for i in range(12):
            got = solution(i, places)
            expect(
                isinstance(got, (tuple, list)) and len(got) == 3,
                f"tile {i}: got {got!r}, expected (place, parity at free, parity at full)",
                "return three numbers",
            )
            expect(
                all(isinstance(x, (int, np.integer)) for x in got) and {int(x) for x in got[1:]} <= {0, 1},
                f"tile {i} of a ring of {places}: got {tuple(got)}, expected whole numbers, the parities 0 or 1",
                "a parity is the number of a phase modulo 2",
            )
            cause = "tile i goes through place i mod N"
            expect(
                got[0] == i % places, f"tile {i}, a ring of {places}: got place {got[0]}, expected {i % places}", cause
            )


@ring_waits.property("first round")
def ring_waits_first_round(solution):
    free = "in round 0 all places are free: wait for phase -1, which a new barrier counts as over (parity 1)"
    for places in RINGS:
        _act(solution, places, places, {"filler waits": free})


@ring_waits.property("second round")
def ring_waits_second_round(solution):
    for places in RINGS:
        _act(solution, 2 * places, places)


@ring_waits.property("many rounds")
def ring_waits_many_rounds(solution):
    for places in RINGS:
        _act(solution, 20 * places + 1, places)


# ----------------------------------------------------------------------------------------------------------- measure

ALLOWED = 0.1  # of the true time


def _expect_time(solution, card, true_ms, suspects, cause):
    """The answer is within 10 % of the true time. suspects: {cause: the time that this mistake gives}."""
    got = expect_number(solution(card), "ms")
    expect(card.launches > 0, "the kernel was never launched", "call card.launch()")
    for suspicion, wrong in suspects.items():
        if abs(got / wrong - 1) < 0.05:
            cause = suspicion
            break
    expect(
        abs(got / true_ms - 1) <= ALLOWED,
        f"got {got:.4g} ms, the kernel takes {true_ms:.4g} (10 % are allowed)",
        cause,
    )


@measure.property("waits for the card")
def measure_waits_for_the_card(solution):
    for true_ms in (2.0, 0.4):
        suspects = {
            "that is what a launch costs the host: wait before you read the clock": CALL_MS,
            "overwriting the cache was timed too: wait before you start the clock": true_ms + OVERWRITE_MS,
        }
        cause = (
            "launches only queue work: wait before the first and before the second look at the clock; ms for one call"
        )
        _expect_time(solution, Card(true_ms), true_ms, suspects, cause)


@measure.property("without compiling")
def measure_without_compiling(solution):
    for true_ms, compile_ms in ((2.0, 900.0), (0.4, 3000.0)):
        cause = "the first launch compiles: launch once before you measure, and do not count that"
        suspects = {cause: compile_ms}
        _expect_time(solution, Card(true_ms, compile_ms=compile_ms), true_ms, suspects, cause)


@measure.property("cold cache")
def measure_cold_cache(solution):
    for true_ms, warm_ms in ((2.0, 0.7), (0.4, 0.3)):
        suspects = {
            "each call found the inputs that the one before had left in the cache: overwrite it before each": warm_ms,
            "overwriting the cache was timed too: wait before you start the clock": true_ms + OVERWRITE_MS,
        }
        cause = "overwrite the cache before every call that counts"
        _expect_time(solution, Card(true_ms, warm_ms), true_ms, suspects, cause)


@measure.property("odd calls")
def measure_odd_calls(solution):
    for seed in range(60):  # the median of three is right in nine of ten
        true_ms = (2.0, 0.4)[seed % 2]
        suspects = {
            "the fastest call was lucky (half the time): the median is what a user meets": 0.5 * true_ms,
            "the slowest call was disturbed: the median is what a user meets": 6 * true_ms,
        }
        cause = "some calls are disturbed, some lucky: take the median of many (21 or more), not the mean and not one"
        _expect_time(solution, Card(true_ms, odd=0.12, seed=seed), true_ms, suspects, cause)
