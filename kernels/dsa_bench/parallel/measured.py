"""One row of the record: a case is judged, weighed and timed, on all ranks and on one, and their times are related."""

from . import group

ONE, ALL = "one GPU", "all GPUs"


def row_of(case, name, rounds):
    """{"case", "tokens", "keys", "verdict", "note", ...} of a Prefill, Decode or Training; on all ranks the same.

    one_ms, all_ms and *_10, *_90: a call on one GPU and on all; efficiency: one_ms / (ranks · all_ms), of the same
    rounds; exchanges_ms: {what: ms} alone. exchange: in a call in which ranks meet before each exchange, bytes that
    rank 0 receives at least, ms in exchanges and in messages (the slowest rank's), and ms that ranks wait for the
    last to come (each rank's), share: of ms in exchanges and messages in the call's all_ms. memory_bytes: each rank's
    beyond what it held before a call; one_memory_bytes: one GPU's.
    """
    ranks, device = case.ranks, case.device
    row = {"case": name, "tokens": case.T, "keys": case.S} | case.judge()
    calls = {ONE: case.alone, ALL: case.together} | case.exchanges()
    if hasattr(case, "one"):
        calls["without the weights' sum"] = lambda: case.together(summed=False)
    timings = group.time_in_turn(ranks, device, calls, {ONE}, rounds)
    for who, key in ((ONE, "one_ms"), (ALL, "all_ms")):
        row[key] = timings[who].ms
        row[f"{key}_10"], row[f"{key}_90"] = timings[who].spread()
    row["efficiency"], row["efficiency_10"], row["efficiency_90"] = (
        times / ranks.size for times in timings[ALL].speed_over(timings[ONE])
    )
    row["exchanges_ms"] = {who: timing.ms for who, timing in timings.items() if who not in (ONE, ALL)}
    group.meet(ranks)
    with group.weighed(device) as found:
        memory = group.memory_beyond(case.together, device)
    row["exchange"] = weighed(group.everyones(ranks, found)) | {"calls": found if ranks.rank == 0 else None}
    row["exchange"]["share"] = (row["exchange"]["ms"] + row["exchange"]["messages_ms"]) / row["all_ms"]
    row["memory_bytes"] = group.everyones(ranks, memory)
    row["one_memory_bytes"] = group.memory_beyond(case.heaviest, device) if ranks.rank == 0 else None
    group.meet(ranks)
    if hasattr(case, "selection"):
        row["selection"] = case.selection()
        for plan in row["selection"].values():
            plan |= {f"{what}_imbalance": imbalance(plan[what]) for what in ("pairs", "ms")}
    return row


def weighed(everyone):
    """The sums over a call's exchanges, of each rank's list."""
    messages = [[each for each in own if each["what"] == "agree"] for own in everyone]
    tensors = [[each for each in own if each["what"] != "agree"] for own in everyone]
    return {
        "bytes": sum(each["bytes"] for each in tensors[0]),
        "ms": max(sum(each["ms"] for each in own) for own in tensors),
        "messages_ms": min(sum(each["ms"] for each in own) for own in messages),
        "wait_ms": [sum(each["wait_ms"] for each in own) for own in tensors],
    }


def imbalance(work):
    """How much more than the mean of the ranks the one with the most work has."""
    return max(work) * len(work) / sum(work) - 1
