"""One case from its inputs to its figures: check, time, relate."""

import functools
import gc

import torch

from dsa_ref.testing import poisoned

from . import measure
from .cases import CASES, public_function
from .checks import Wrong
from .peers import Missing

OURS = "ours"


def judge(call, check, who):
    """{"verdict": "right", "WRONG", "missing" or "failed", "note"} of one callable's result.

    Memory that the callable asks torch for in Python holds NaN, or the largest integer, until it is written.
    """
    try:
        with poisoned():
            result = call()
        return {"verdict": "right", "note": check(result, who)}
    except Wrong as reason:
        return {"verdict": "WRONG", "note": str(reason)}
    except Missing as reason:
        return {"verdict": "missing", "note": str(reason)}
    except Exception as error:  # a peer may fail in any way, and the others are still to be measured
        lines = str(error).splitlines() or [""]
        return {"verdict": "failed", "note": f"{type(error).__name__}: {lines[0][:200]}"}


def figures(case, calls, ceilings, rounds=measure.ROUNDS):
    """{who: record} of the callables in the dict `calls`: judged, then those that run timed together.

    A record has verdict and note and, where it was timed: ms, ms_10 and ms_90 (percentiles of the rounds), rate in
    case.unit, of_ceiling (a share) and how it was timed.
    """
    records = {who: judge(call, case.check, OURS if who not in case.peers else who) for who, call in calls.items()}
    running = {who: calls[who] for who, record in records.items() if record["verdict"] in ("right", "WRONG")}
    timings = measure.time_together(running, rounds)
    ceiling = ceilings.get(case.ceiling)
    for who, timing in timings.items():
        rate = case.work / timing.ms / 1e9
        low, high = timing.spread()
        records[who] |= {
            "ms": timing.ms,
            "ms_10": low,
            "ms_90": high,
            "rate": rate,
            "of_ceiling": rate / ceiling if ceiling else None,
            "timed": timing.how,
        }
    return records, timings


def measure_case(step, name, ceilings, with_peers, rounds=measure.ROUNDS):
    """The table's row group of one case, as a record: {"case", "unit", "work", "facts", "results": {who: record}}.

    A peer's record also has `speed` (and its percentiles): how many times faster ours is, in the same rounds.
    """
    case = CASES[step][name]()
    calls = {}
    if case.apply:
        calls[OURS] = functools.partial(case.apply, public_function(step))
    if with_peers:
        calls |= case.peers
    results, timings = figures(case, calls, ceilings, rounds)
    for who in timings:
        if who != OURS and OURS in timings:
            speed, low, high = timings[OURS].speed_over(timings[who])
            results[who] |= {"speed": speed, "speed_10": low, "speed_90": high}
    record = {"case": name, "unit": case.unit, "work": case.work, "facts": case.facts, "results": results}
    del case, calls
    free()
    return record


def free():
    """Give the memory of a finished case back."""
    gc.collect()
    torch.cuda.empty_cache()
