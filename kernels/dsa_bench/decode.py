"""A decode step, measured: `python -m dsa_bench --decode`. Each case is made, judged, repeated, timed warm and cold.

What fails in a case costs that case alone: it is printed with its traceback, recorded as failed, and the next follows.
"""

import traceback

import torch

from . import decode_layer, measure, records
from .decode_cases import DECODE_CASES
from .run import free, judge

REPEATS = 10
QUICK_ROUNDS = 3


def measure_steps(options, log, provenance, ceilings, missing) -> int:
    """Measure, print, and write what stands after every step. 1 if something of ours is wrong or failed."""
    wrong, floor = False, measure.floor(options.rounds)
    print(f"a kernel that does nothing: {floor['warm_us']:.1f} us warm, {floor['cold_us']:.1f} cold")
    print(records.decode_header())
    for step in options.steps:
        rows = []
        for name in DECODE_CASES.get(step, ()):
            if options.only not in name:
                continue
            if not rows:
                print(step)
            row = measure_case(DECODE_CASES[step][name], name, ceilings, options.peers, options.rounds)
            rows.append(row)
            set_against(row, rows)
            print(*records.decode_lines(row), sep="\n", flush=True)
            wrong |= records.any_of_ours_wrong(row)
        if log and (rows or step == "ceilings"):
            made = {"provenance": provenance, "missing": missing, "floor": floor, "rows": rows}
            records.merge(log, {step: made}, ceilings)
    return int(wrong)


def measure_case(make, name, ceilings, with_peers, rounds=measure.ROUNDS):
    """One case as a record: {"case", "unit", "work", "facts", "results": {who: record}}, whatever goes wrong in it."""
    row = {"case": name, "unit": "", "work": 0, "facts": {}, "results": {}}
    case = None
    try:
        case = make()
        row |= {"unit": case.unit, "work": case.work, "facts": case.facts, "against": case.against}
        figures(case, ceilings, with_peers, rounds, row["results"])
        if case.profiled and row["results"]["ours"]["verdict"] in ("right", "WRONG"):
            row["kernels"] = {}
            for how, call in (("eager", case.profiled), ("replayed", decode_layer.replay_of(case.profiled))):
                row["kernels"][how] = decode_layer.kernels_of(call)
                parts = decode_layer.parts_of(row["kernels"][how])
                row["facts"] |= {f"{part}, {how}": figures for part, figures in parts.items()}
    except Exception as error:  # the others are still to be measured
        traceback.print_exc()
        failed = {"verdict": "failed", "note": f"{type(error).__name__}: {error}"[:300], "ours": True}
        row["results"]["ours"] = row["results"].get("ours", {}) | failed
    del case
    free()
    return row


def figures(case, ceilings, with_peers, rounds, found):
    """Fill `found` with {who: record} of a DecodeCase: judged, ours repeated, then those that run timed together.

    A record has verdict, note, ours (whether it is ours) and, where it was timed: warm_us and cold_us, each with its
    10th and 90th percentile, rate (warm, in case.unit), of_ceiling, how it was timed. A peer's record also has
    speed_warm and speed_cold, how many times faster the first of ours is, and their percentiles.
    """
    calls = case.ours | (case.peers if with_peers else {})
    for who, call in calls.items():
        own = who in case.ours
        found[who] = judge(call, lambda result, _, own=own: case.check(result, own), who) | {"ours": own}
        if own and found[who]["verdict"] == "right":
            found[who] |= repeated(call, case.restore)
    running = {who: calls[who] for who, record in found.items() if record["verdict"] in ("right", "WRONG")}
    timings = measure.time_decode(running, rounds, as_they_are=case.as_they_are)
    first = next(iter(case.ours), None)
    for who, timing in timings.items():
        found[who] |= timed(timing, case, ceilings.get(case.ceiling))
        if who not in case.ours and first in timings:
            for kind in ("warm", "cold"):
                speed, low, high = timings[first][kind].speed_over(timing[kind])
                found[who] |= {f"speed_{kind}": speed, f"speed_{kind}_10": low, f"speed_{kind}_90": high}


def timed(timing, case, ceiling):
    """The figures of one callable's {"warm": Timing, "cold": Timing} in microseconds."""
    made = {}
    for kind in ("warm", "cold"):
        low, high = timing[kind].spread()
        made |= {f"{kind}_us": 1e3 * timing[kind].ms, f"{kind}_us_10": 1e3 * low, f"{kind}_us_90": 1e3 * high}
    rate = case.work / timing["warm"].ms / 1e9
    hows = dict.fromkeys(timing[kind].how for kind in ("warm", "cold"))
    return made | {"rate": rate, "of_ceiling": rate / ceiling if ceiling else None, "timed": "; ".join(hows)}


def repeated(call, restore=None, count=REPEATS):
    """What is wrong as {"verdict", "note"} where one of `count` more calls has other bits than the first, else {}.

    restore: called before each.
    """
    first = None
    for i in range(count + 1):
        if restore:
            restore()
        found = [bits(part).clone() for part in parts(call())]
        first = found if first is None else first
        if not all(torch.equal(a, b) for a, b in zip(first, found, strict=True)):
            return {"verdict": "WRONG", "note": f"other bits in repeat {i} of {count}"}
    return {}


def parts(result):
    """The tensors of a result, which is one or several."""
    return [result] if isinstance(result, torch.Tensor) else list(result)


def bits(x):
    """x as integers, so that NaN equals itself and -0.0 is not 0.0."""
    return x.contiguous().view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])


def set_against(row, rows):
    """Give the row facts["times ..."], its time over that of the case that it names, if both were timed."""
    other = next((made for made in rows if made["case"] == row.get("against")), None)
    if other is None:
        return
    for who, result in row["results"].items():
        base = other["results"].get(who, {})
        if "warm_us" in result and "warm_us" in base:
            row["facts"][f"{who}, times {other['case']}"] = round(result["warm_us"] / base["warm_us"], 2)
