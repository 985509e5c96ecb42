"""One case of training from its inputs to its figures: judge, repeat, weigh, time, relate.

A call is judged by its own check first. Then it is repeated, its results compared bit by bit; weighed: what torch's
allocator held at most beyond inputs and outputs; and timed with the others of its case, in turn, round by round. What
is wrong is timed, too, and says so; what fails costs itself alone.
"""

import dataclasses
import time
import traceback
from collections.abc import Callable

import torch

from .. import measure
from ..run import free, judge

REPEATS = 60
PEERS_REPEATS = 10
REPEAT_SECONDS = 1.2  # no further repeat is begun after
TIMED = ("right", "WRONG")


@dataclasses.dataclass
class Call:
    """Something that is measured.

    run(): a tensor or several. check(result): a note, or raises `checks.Wrong`. work: its FLOPs, 0 where none are
    counted. ours: whether a wrong result is a fault of this project. eager: why it is timed as Python calls it, or None
    for the replay of a CUDA graph. whole(): what is run to weigh it, where `run` leaves out what made its inputs.
    """

    run: Callable
    check: Callable
    work: float = 0.0
    ours: bool = True
    eager: str | None = None
    whole: Callable | None = None


@dataclasses.dataclass
class Case:
    """calls: {who: Call} on the same inputs. against: the one whose time the others' are multiples of."""

    calls: dict
    against: str
    facts: dict = dataclasses.field(default_factory=dict)


def tensors(result):
    """The tensors of a call's result."""
    return [part for part in (result if isinstance(result, (tuple, list)) else [result]) if part is not None]


def same_bits(call, repeats):
    """{"repeats": how often it was called again, "equal": how often each bit of each result was the first call's}."""
    first = [part.detach().clone() for part in tensors(call())]
    made = equal = 0
    began = time.perf_counter()
    while made < repeats and time.perf_counter() - began < REPEAT_SECONDS:
        again = tensors(call())
        equal += all(torch.equal(_bits(a), _bits(b)) for a, b in zip(first, again, strict=True))
        made += 1
    return {"repeats": made, "equal": equal}


def _bits(tensor):
    return tensor.detach().contiguous().flatten().view(torch.uint8)


def memory_beyond(call) -> int:
    """Bytes that torch's allocator held at most during a call, less what it held before and what the results are."""
    free()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    result = call()
    torch.cuda.synchronize()
    kept = {part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in tensors(result)}
    return torch.cuda.max_memory_allocated() - before - sum(kept.values())


def measure_case(make, name, ceilings, rounds, only_ours=False, watch=memory_beyond):
    """The record of one case: {"case", "against", "facts", "results": {who: record}}, whatever fails in it.

    A result has verdict, note and ours; where it ran, repeats and equal, memory_bytes, ms, ms_10, ms_90, timed; with
    work, also rate (TFLOP/s) and of_ceiling (of bf16); and times, times_10, times_90: how many times as long it takes
    as the call that it is set against, in the same rounds.
    """
    row = {"case": name, "against": "", "facts": {}, "results": {}}
    case = None
    try:
        case = make()
        row |= {"against": case.against, "facts": case.facts}
        calls = {who: call for who, call in case.calls.items() if call.ours or not only_ours}
        for who, call in calls.items():
            result = judge(call.run, lambda found, who, call=call: call.check(found), who)
            row["results"][who] = result | {"ours": call.ours}
            free()
            if result["verdict"] in TIMED:
                row["results"][who] |= same_bits(call.run, REPEATS if call.ours else PEERS_REPEATS)
                row["results"][who]["memory_bytes"] = watch(call.whole or call.run)
        running = {who: call for who, call in calls.items() if row["results"][who]["verdict"] in TIMED}
        eager = {who: call.eager for who, call in running.items() if call.eager}
        timings = measure.time_together({who: call.run for who, call in running.items()}, rounds, as_they_are=eager)
        for who, timing in timings.items():
            row["results"][who] |= _timed(timing, running[who].work, ceilings)
            if case.against in timings:
                times, low, high = timings[who].ratio_to(timings[case.against])
                row["results"][who] |= {"times": times, "times_10": low, "times_90": high}
    except Exception as error:  # the other cases are still to be measured
        traceback.print_exc()
        row["results"]["the case"] = {
            "verdict": "failed",
            "note": f"{type(error).__name__}: {error}"[:300],
            "ours": True,
        }
    del case
    free()
    return row


def _timed(timing, work, ceilings):
    low, high = timing.spread()
    made = {"ms": timing.ms, "ms_10": low, "ms_90": high, "timed": timing.how}
    if work:
        rate = work / timing.ms / 1e9
        made |= {"rate": rate, "of_ceiling": rate / ceilings["bf16"]}
    return made
