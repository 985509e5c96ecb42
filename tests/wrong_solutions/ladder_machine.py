"""Notebook 11: parities, and benchmarks that are fooled."""

import statistics

from . import wrong

# -------------------------------------------------------------------------------------------------------- ring_waits


@wrong("ring_waits", "place")
def place_by_division(i, places):
    return i // places, (i // places + 1) % 2, i // places % 2


@wrong("ring_waits", "place")
def rounds_for_parities(i, places):
    return i % places, i // places - 1, i // places


@wrong("ring_waits", "place")
def two_numbers(i, places):
    return i % places, i // places % 2


@wrong("ring_waits", "first round")
def the_same_parity(i, places):
    return i % places, i // places % 2, i // places % 2


@wrong("ring_waits", "first round")
def both_inverted(i, places):
    return i % places, (i // places + 1) % 2, (i // places + 1) % 2


@wrong("ring_waits", "first round")
def the_wrong_one_inverted(i, places):
    return i % places, i // places % 2, (i // places + 1) % 2


@wrong("ring_waits", "first round")
def the_tiles_parity(i, places):
    """Tile 1 is of round 0 where there are two places or more."""
    return i % places, (i + 1) % 2, i % 2


@wrong("ring_waits", "second round")
def round_0_for_ever(i, places):
    return i % places, 1, 0


@wrong("ring_waits", "second round")
def the_filler_never_waits(i, places):
    """Its parity is always that of a phase which is over, or which is on."""
    return i % places, 1 if i < places else i // places % 2, i // places % 2


@wrong("ring_waits", "second round")
def the_reader_keeps_its_parity(i, places):
    return i % places, (i // places + 1) % 2, 0


@wrong("ring_waits", "many rounds")
def two_rounds_right(i, places):
    turn = min(i // places, 1)
    return i % places, (turn + 1) % 2, turn


# ----------------------------------------------------------------------------------------------------------- measure


def timed(card, cold=True, settle=True, wait=True):
    """One call; what is left out is the fault."""
    if cold:
        card.overwrite_cache()
    if settle:
        card.wait()
    begin = card.now()
    card.launch()
    if wait:
        card.wait()
    return card.now() - begin


def median(card, count=51, first=True, **faults):
    if first:
        timed(card)
    return statistics.median(timed(card, **faults) for _ in range(count))


@wrong("measure", "waits for the card")
def no_wait_at_the_end(card):
    return median(card, wait=False)


@wrong("measure", "waits for the card")
def overwriting_is_timed(card):
    return median(card, settle=False)


@wrong("measure", "waits for the card")
def all_calls_together(card):
    card.launch()
    card.wait()
    begin = card.now()
    for _ in range(20):
        card.launch()
    card.wait()
    return card.now() - begin


@wrong("measure", "waits for the card")
def waited_once_at_the_end_of_all(card):
    times = [timed(card, cold=False, settle=False, wait=False) for _ in range(21)]
    card.wait()
    return statistics.median(times)


@wrong("measure", "without compiling")
def the_first_call(card):
    return timed(card)


@wrong("measure", "without compiling")
def mean_with_the_first_call(card):
    return statistics.mean(timed(card) for _ in range(51))


@wrong("measure", "cold cache")
def never_overwritten(card):
    return median(card, cold=False)


@wrong("measure", "cold cache")
def overwritten_once(card):
    timed(card, cold=False)
    card.overwrite_cache()
    return median(card, first=False, cold=False)


@wrong("measure", "cold cache")
def in_one_queue(card):
    """One wait for many calls, divided: none but the first is cold."""
    card.launch()
    card.overwrite_cache()
    card.wait()
    begin = card.now()
    for _ in range(50):
        card.launch()
    card.wait()
    return (card.now() - begin) / 50


@wrong("measure", "odd calls")
def the_fastest(card):
    timed(card)
    return min(timed(card) for _ in range(51))


@wrong("measure", "odd calls")
def the_mean(card):
    timed(card)
    return statistics.mean(timed(card) for _ in range(51))


@wrong("measure", "odd calls")
def three_calls(card):
    return median(card, count=3)
