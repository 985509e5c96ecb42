"""Timing on a GPU: several callables side by side, the card's ceilings, and what a record must say about the run.

Clocks and power drift by some per cent within seconds. So callables that are to be compared are measured in rounds,
each round all of them, in an order that rotates; their ratio is taken round by round. A card at its power limit needs
tens of milliseconds to settle on a clock, and until then runs at the clock that suited the callable before. So each one
first runs for LEAD_MS that are not timed.

Each call is replayed from a CUDA graph where it can be captured: neither launch costs on the host nor checks that make
the host wait are in the figures, of ours as of the others. The L2 cache is overwritten before every call; only a decode
step, of microseconds, is also timed *warm*, many calls in one graph, the cache as each leaves it for the next.
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
WARM_CALLS = 20  # in the graph that times a decode step warm
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

    def ratio_to(self, other):
        """How many times as long this one takes as `other`, measured in the same rounds: (median, 10th, 90th)."""
        return other.speed_over(self)


def percentile(values, percent) -> float:
    """The value below which `percent` per cent of `values` lie, interpolated."""
    ordered = sorted(values)
    place = (len(ordered) - 1) * percent / 100
    below = int(place)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (place - below)


def time_together(calls, rounds=ROUNDS, round_ms=ROUND_MS, as_they_are=()):
    """{name: Timing} of the callables in the dict `calls`, measured in turn in every round. Each must run without fail.

    Their results are dropped. The graphs live, with the memory they allocate in, until this returns.
    as_they_are: {name: how} of callables that are not captured.
    """
    scratch = _scratch()
    pool = torch.cuda.graph_pool_handle()  # one for all: they never run at the same time
    prepared = {
        name: (call, as_they_are[name]) if name in as_they_are else _prepare(call, pool) for name, call in calls.items()
    }
    return _in_turns(prepared, lambda run, count: _call_ms(run, scratch, count), rounds, LEAD_MS, round_ms)


def time_decode(calls, rounds=ROUNDS, lead_ms=ROUND_MS, round_ms=ROUND_MS, as_they_are=()):
    """{name: {"warm": Timing, "cold": Timing}} of decode steps, each measured in turn in every round.

    cold: the L2 cache is overwritten before each call. warm: WARM_CALLS calls in one graph, one after another, of which
    each finds in the cache what the one before left there; the time between events is divided by their number.
    as_they_are: {name: how} of callables that are not captured, since they replay a graph or are to be timed eager.
    """
    scratch = _scratch()
    pool = torch.cuda.graph_pool_handle()

    def prepared(count):
        return {
            name: (_repeated(call, count), as_they_are[name]) if name in as_they_are else _prepare(call, pool, count)
            for name, call in calls.items()
        }

    cold, warm = prepared(1), prepared(WARM_CALLS)
    colds = _in_turns(cold, lambda run, count: _call_ms(run, scratch, count), rounds, lead_ms, round_ms)
    warms = _in_turns(warm, lambda run, count: _call_ms(run, None, count), rounds, lead_ms, round_ms)
    for timing in warms.values():
        timing.rounds = [ms / WARM_CALLS for ms in timing.rounds]
    return {name: {"warm": warms[name], "cold": colds[name]} for name in calls}


def time_calls(calls, rounds=ROUNDS, round_ms=ROUND_MS):
    """{name: Timing} as `time_together`, of calls as Python makes them: not captured, the cache as they leave it.

    For calls of milliseconds, which do not fit the L2 cache, and whose host time is to count.
    """
    prepared = {name: (call, "eager") for name, call in calls.items()}
    return _in_turns(prepared, lambda run, count: _call_ms(run, None, count), rounds, LEAD_MS, round_ms)


def floor(rounds=ROUNDS):
    """{"warm_us", "cold_us"}: what a kernel that does next to nothing takes when it is timed like a decode step."""
    one = torch.zeros(1, device="cuda")
    timing = time_decode({"floor": lambda: one.add_(1)}, rounds)["floor"]
    return {f"{kind}_us": 1e3 * timing[kind].ms for kind in ("warm", "cold")}


def _scratch():
    """Memory of twice the L2 cache's size: who writes it has overwritten the cache."""
    return torch.empty(2 * torch.cuda.get_device_properties().L2_cache_size, dtype=torch.int8, device="cuda")


def _in_turns(prepared, time, rounds, lead_ms, round_ms):
    """{name: Timing} of {name: (run, how)}: in every round each of them runs for lead_ms, then is timed.

    time(run, count): median ms of `count` runs.
    """
    estimates = {name: time(run, 3) for name, (run, _) in prepared.items()}
    found = {name: [] for name in prepared}
    names = list(prepared)
    for i in range(rounds):
        turn = i % max(1, len(names))
        for name in names[turn:] + names[:turn]:
            run = prepared[name][0]
            lead, count = (max(1, min(MOST_CALLS, int(ms / max(estimates[name], 1e-3)))) for ms in (lead_ms, round_ms))
            for _ in range(lead):
                run()
            found[name].append(time(run, count))
    return {name: Timing(found[name], prepared[name][1]) for name in names}


def _repeated(call, count):
    """A function that calls `call` so many times."""

    def run():
        for _ in range(count):
            call()

    return run


def _prepare(call, pool, count=1):
    """(a function that runs `call` so many times on the GPU, how): the replay of a CUDA graph, or the calls."""
    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph, pool=pool):
            _repeated(call, count - 1)()
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
        return _repeated(
            call, count
        ), f"eager: capture failed, {type(error).__name__}: {' '.join(str(error).split())[:100]}"
    return graph.replay, "graph"


def _tensors(result):
    """The tensors of a call's result, which is one, several or none."""
    parts = result if isinstance(result, (tuple, list)) else [result]
    return [part for part in parts if isinstance(part, torch.Tensor)]


def _call_ms(run, scratch, count) -> float:
    """Median ms of `count` calls between events, the cache overwritten before each if there is a `scratch`."""
    pairs = []
    for _ in range(count):
        if scratch is not None:
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

    Copy: 1 GiB to 1 GiB, negated on the way, since torch's plain copy is slower than a kernel. Matmuls: 8192³, fp8 with
    fast accumulation; None where the card has no fp8.
    """
    source = torch.ones(COPY_BYTES // 4, device="cuda")
    target = torch.empty_like(source)
    generator = torch.Generator("cuda").manual_seed(0)
    a, b = (torch.randn(MATMUL, MATMUL, device="cuda", generator=generator).bfloat16() for _ in range(2))
    calls = {"copy": lambda: torch.neg(source, out=target), "bf16": lambda: a @ b.t()}
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
