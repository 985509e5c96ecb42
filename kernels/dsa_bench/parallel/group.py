"""Ranks that are measured together: they meet, time a call, hand figures on, and weigh what they send each other.

A call of all ranks takes as long as the slowest rank from the meeting until its device is done. Where one rank works
alone, the others wait in an exchange between hosts, and their devices idle.
"""

import contextlib
import time

import torch
import torch.distributed as dist

from dsa_ref.parallel import Ranks

from .. import checks, measure

ROUND_MS = 60.0  # of calls in a row in a round, at least one; its figure is their mean
LONG_MS = 1000.0  # of one call of each: then the first round counts, and there are two
MOST_CALLS = 50
RECEIVED = {  # bytes that a rank receives at least, of `size` ranks, where it brings `bytes`
    "all_gather": lambda size, bytes: (size - 1) * bytes,
    "reduce_scatter": lambda size, bytes: (size - 1) * bytes // size,
    "all_reduce": lambda size, bytes: 2 * (size - 1) * bytes // size,
}
OWN = {name: getattr(Ranks, name) for name in (*RECEIVED, "agree")}  # as they are while nobody weighs them


def meet(ranks):
    """Wait for all ranks, without their devices."""
    OWN["all_gather"](ranks, torch.zeros(1, 1))


def slowest(ranks, own):
    """The largest of the ranks' numbers, on all of them."""
    return OWN["all_gather"](ranks, torch.tensor([[own]], dtype=torch.float64)).max().item()


def everyones(ranks, own):
    """Every rank's `own`, by rank, on all of them: anything that can be pickled."""
    found = [None] * ranks.size
    dist.all_gather_object(found, own, group=ranks.group)
    return found


def firsts(ranks, own):
    """Rank 0's `own`, on all ranks."""
    found = [own if ranks.rank == 0 else None]
    dist.broadcast_object_list(found, src=dist.get_global_rank(ranks.group, 0), group=ranks.group)
    return found[0]


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def own_ms(call, device, count=1):
    """Mean ms of `count` calls in a row on this rank, by the host's clock, until the device is done."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(count):
        call()
    synchronize(device)
    return 1e3 * (time.perf_counter() - began) / count


def time_in_turn(ranks, device, calls, alone, rounds):
    """{name: measure.Timing} of the dict `calls` on all ranks, in turn in every round; alone: names for rank 0."""
    names = list(calls)

    def a_round(i, counts):
        times, turn = {}, i % len(names)
        for name in names[turn:] + names[:turn]:
            meet(ranks)
            takes_part = ranks.rank == 0 or name not in alone
            times[name] = slowest(ranks, own_ms(calls[name], device, counts[name]) if takes_part else 0.0)
        return times

    first = a_round(0, dict.fromkeys(calls, 1))
    counts = {name: max(1, min(MOST_CALLS, int(ROUND_MS / max(ms, 1e-3)))) for name, ms in first.items()}
    kept, more = ([first], 1) if sum(first.values()) > LONG_MS else ([], rounds)
    kept += [a_round(i, counts) for i in range(1, more + 1)]
    return {name: measure.Timing([times[name] for times in kept], "eager: as Python calls it") for name in names}


@contextlib.contextmanager
def weighed(device):
    """Inside, ranks meet before each exchange. Yields the list of all exchanges: {"what", "bytes", "wait_ms", "ms"}.

    bytes: what a rank receives at least; wait_ms: from its own device being ready to the last rank's. The messages in
    which ranks agree are one exchange each, of 0 bytes, and their time is both.
    """
    found, talking = [], []

    def exchange(name):
        def call(ranks, tensor):
            if talking:
                return OWN[name](ranks, tensor)
            wait = own_ms(lambda: meet(ranks), device)
            results = []
            ms = own_ms(lambda: results.append(OWN[name](ranks, tensor)), device)
            size = RECEIVED[name](ranks.size, tensor.numel() * tensor.element_size())
            found.append({"what": name, "bytes": size, "wait_ms": wait, "ms": ms})
            return results[0]

        return call

    def agree(ranks, same, own=None):
        talking.append(True)
        results = []
        try:
            ms = own_ms(lambda: results.append(OWN["agree"](ranks, same, own)), device)
        finally:
            talking.pop()
        found.append({"what": "agree", "bytes": 0, "wait_ms": 0.0, "ms": ms})
        return results[0]

    try:
        for name in RECEIVED:
            setattr(Ranks, name, exchange(name))
        Ranks.agree = agree
        yield found
    finally:
        for name, own in OWN.items():
            setattr(Ranks, name, own)


def memory_beyond(call, device):
    """Bytes that torch's allocator held at most during a call, beyond what it held before; None on a CPU."""
    if device.type != "cuda":
        call()
        return None
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    call()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) - before


def judged(ranks, check):
    """{"verdict", "note", "notes"}: check() of every rank gives a note or raises `checks.Wrong`, without an exchange.

    note: the first rank's that is wrong, else rank 0's; notes: all of them.
    """
    try:
        found = "right", check()
    except checks.Wrong as reason:
        found = "WRONG", str(reason)
    everyone = everyones(ranks, found)
    wrong = [f"rank {rank}: {note}" for rank, (verdict, note) in enumerate(everyone) if verdict != "right"]
    notes = [note for _, note in everyone]
    return {"verdict": "WRONG" if wrong else "right", "note": (wrong or notes)[0], "notes": notes}
