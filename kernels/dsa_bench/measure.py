"""Timing on a GPU: several callables side by side, the card's ceilings, and what a record must say about the run.

Clocks and power drift by some per cent within seconds. So callables that are to be compared are measured in rounds,
each round all of them, in an order that rotates; their ratio is taken round by round. A card at its power limit needs
tens of milliseconds to settle on a clock, and until then runs at the clock that suited the callable before. So each one
first runs for LEAD_MS that are not timed.

Each call is replayed from a CUDA graph where it can be captured: neither launch costs on the host nor checks that make
the host wait are in the figures, of ours as of the others. The L2 cache is overwritten before every call.
"""

import dataclasses
import statistics

import torch

from dsa_ref.records import provenance

from . import peers

ROUNDS = 15
LEAD_MS = 60.0  # what each callable runs for in a round before it is timed, at least one call
ROUND_MS = 15.0  # and what it is timed for
MOST_CALLS = 50
UNWRITTEN = 77  # fits every dtype here, and no kernel writes it everywhere
COPY_BYTES = 1 << 30
MATMUL = 8192


@dataclasses.dataclass
class Timing:
    """`rounds` holds one figure a round, the median of its calls in ms; `how` is "graph", or "eager" and why."""

    rounds: list
    how: str

    @property
    def ms(self) -> float:
        """The median round."""
        return statistics.median(self.rounds)

    def spread(self):
        """The 10th and the 90th percentile of the rounds, ms."""
        return percentile(self.rounds, 10), percentile(self.rounds, 90)

    def speed_over(self, other):
        """How many times faster this one is than `other`, measured in the same rounds: (median, 10th, 90th)."""
        ratios = [theirs / own for own, theirs in zip(self.rounds, other.rounds, strict=True)]
        return statistics.median(ratios), percentile(ratios, 10), percentile(ratios, 90)


def percentile(values, percent) -> float:
    """The value below which `percent` per cent of `values` lie, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def time_together(calls, rounds=ROUNDS, round_ms=ROUND_MS):
    """{name: Timing} of the callables in the dict `calls`, measured in turn in every round. Each must run without fail.

    Their results are dropped. The graphs live, with the memory they allocate in, until this returns.
    """
    scratch = torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")
    pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
    prepared = {name: _prepare(call, pool) for name, call in calls.items()}
    estimates = {name: _call_ms(run, scratch, 3) for name, (run, _) in prepared.items()}
    found = {name: [] for name in calls}
    names = list(calls)
    for i in range(rounds):
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            run = prepared[name][0]
            lead, count = (max(1, min(MOST_CALLS, int(ms / max(estimates[name], 1e-3)))) for ms in (LEAD_MS, round_ms))
            for _ in range(lead):
                run()
            found[name].append(_call_ms(run, scratch, count))
    return {name: Timing(found[name], prepared[name][1]) for name in names}


def _prepare(call, pool):
    """(a function that runs `call` on the GPU, how): the replay of a CUDA graph, or the call itself."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            made = [part for part in _tensors(call()) if part.numel()]
        for part in made:
            part.fill_(UNWRITTEN)
        graph.replay()
        torch.cuda.synchronize()
        # A library that launches on a stream of its own leaves an empty graph.
        if any(bool((part == UNWRITTEN).all()) for part in made):
            raise RuntimeError("the graph does not write the result")
    except Exception as error:
        torch.cuda.synchronize()
        call()  # it must still run
        return call, f"eager: capture failed, {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return graph.replay, "graph"


def _tensors(result):
    """The tensors of a call's result, which is one, several or none."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _call_ms(run, scratch, count) -> float:
    """Median ms of `count` calls between events, the cache overwritten before each."""
    pairs = []
    for _ in range(count):
        scratch.zero_()
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        pairs.append((before, after))
    torch.cuda.synchronize()
    return statistics.median(before.elapsed_time(after) for before, after in pairs)


def ceilings(rounds=ROUNDS):
    """What this card does at best, measured: {"copy": TB/s read and written, "bf16": TFLOP/s, "fp8": TFLOP/s or None}.

    Copy: 1 GiB to 1 GiB. Matmuls: 8192³, fp8 with fast accumulation; None where the card has no fp8.
    """
    source = torch.ones(COPY_BYTES, dtype=torch.int8, device="cuda")
    target = torch.empty_like(source)
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", generator=generator).bfloat16() for _ in range(2))
    calls = {"copy": lambda: target.copy_(source), "bf16": lambda: a @ b.t()}
    if torch.cuda.get_device_capability() >= (8, 9):
        a8, b8 = a.to(torch.float8_e4m3fn), b.to(torch.float8_e4m3fn)
        calls["fp8"] = lambda: peers.fp8_matmul(a8, b8)
    timings = time_together(calls, rounds)
    found = {"copy": 2 * COPY_BYTES / timings["copy"].ms / 1e9, "bf16": None, "fp8": None}
    for name in ("bf16", "fp8"):
        if name in timings:
            found[name] = 2 * MATMUL**3 / timings[name].ms / 1e9
    return found


def environment(arguments=None, program="dsa_bench"):
    """The provenance of a record, with the versions of the peers' packages."""
    return provenance(program, arguments, "cuda") | {"peers": peers.versions()}
