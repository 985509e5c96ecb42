"""Prefill and decode, timed as Python calls them, implementations in turn; memory that runs out is a result.

On a GPU a figure is the wall time of a call between two synchronisations, since `generate` waits for each token too; on
a CPU it is the processor's time of torch's one thread, which others on the machine do not lengthen. In a round every
implementation has its turn, in an order that rotates, behind a call that is not timed. Peak memory is what
torch's allocator held at most, all included, on a GPU; on a CPU what the process held (VmHWM, Linux). `held_bytes` was
held before the call: weights, on a CPU the process, and the cache that is decoded from.
"""

import copy
import gc
import statistics
import time
import traceback
import types
from collections.abc import Callable
from pathlib import Path

import torch

from ..measure import percentile
from .subject import DENSE, random_tokens, use

LONG = 1.0  # seconds from which on a call has fewer rounds, and none before it in a round
LONG_ROUNDS, VERY_LONG = 3, 10.0  # and two rounds from so many seconds on
ROUND_S = 0.1  # what a call is repeated for in a round
MOST_CALLS = 5
STEPS = 10  # decode steps that are timed
MEASURED, OUT_OF_MEMORY = "measured", "out of memory"
NO_MEMORY = (OUT_OF_MEMORY, "can't allocate memory", "ALLOC_FAILED")  # what the GPU, the CPU and cuBLAS say
STATUS = Path("/proc/self/status")


def measure_prefill(model, implementations, ops: types.ModuleType, T: int, rounds: int, gone: dict) -> dict:
    """{"batch", "tokens", "results"} of one sequence of T tokens, of which the last one's logits are wanted.

    gone: {implementation: what ended it}, which then is not tried; extended here.
    """
    tokens = random_tokens(model, 1, T)
    calls = {who: lambda: prefill(model, tokens) for who in implementations}
    return {"batch": 1, "tokens": T, "results": in_turns(model, calls, ops, rounds, gone, f"{T} tokens")}


def measure_decode(model, implementations, ops: types.ModuleType, B: int, T: int, prefilled: dict) -> dict:
    """{"batch", "tokens", "results"} of decode steps of B sequences behind T tokens.

    prefilled: the results of a prefill of these sequences; what did not get through it in a second has ours' cache.
    """
    tokens, filled, caches, gone = random_tokens(model, B, T), {}, {}, {}
    own = [who for who in implementations if who not in DENSE or prefilled.get(who, {}).get("seconds", LONG) < LONG]
    filled_by = {who: who if who in own else "ours" for who in implementations}
    for who in dict.fromkeys(filled_by.values()):
        use(model, who, ops)
        free(model)
        filled[who], why = attempt(lambda: prefill(model, tokens).past_key_values)
        gone |= {name: f"{why} in the prefill by {who}" for name in implementations if why and filled_by[name] == who}
    for who, source in filled_by.items():
        caches[who] = copy.deepcopy(filled[source])
    del filled
    step = tokens[:, -1:]
    calls = {who: lambda who=who: prefill(model, step, caches[who]) for who in implementations}
    results = in_turns(model, calls, ops, STEPS, gone, f"{T} tokens, batch {B}")
    sizes = {who: cache_bytes(cache) for who, cache in caches.items() if cache is not None}
    for who, result in results.items():
        if "seconds" in result:
            result |= {"cache_bytes": sizes[who], "cache_of": filled_by[who]}
            if model.device.type == "cuda":  # those of the others lie there too
                others = sum(sizes.values()) - sizes[who]
                result |= {key: result[key] - others for key in ("peak_bytes", "held_bytes")}
    return {"batch": B, "tokens": T, "results": results}


@torch.no_grad()
def prefill(model, tokens, cache=None):
    """The model's output for tokens [B, S] behind a cache, or with a new one; logits of the last position."""
    return model(input_ids=tokens, past_key_values=cache, use_cache=True, logits_to_keep=1)


def in_turns(model, calls: dict[str, Callable], ops, rounds: int, gone: dict, where: str) -> dict:
    """{implementation: {"verdict": "measured", "seconds", ...}, or {"verdict": why not, "note"}}, in the calls' order.

    seconds: the median round, `seconds_10` and `seconds_90` percentiles of the `rounds`; first_seconds: the very first
    call's, with what it compiles and loads.
    """
    results, estimates = {}, {}
    for who, call in calls.items():
        if who in gone:
            results[who] = {"verdict": "not tried", "note": gone[who]}
            continue
        use(model, who, ops)
        free(model)
        first, why = attempt(lambda call=call: seconds_of(model, call))
        estimates[who] = first
        if not why and (model.device.type == "cuda" or first < LONG):  # without what the first one compiled
            estimates[who], why = attempt(lambda call=call: seconds_of(model, call))
        results[who] = ended(who, why, gone, where) if why else {"verdict": MEASURED, "first_seconds": first}
    names = [who for who in calls if results[who]["verdict"] == MEASURED]
    longest = max((estimates[who] for who in names), default=0.0)
    rounds = min(rounds, 2 if longest >= VERY_LONG else LONG_ROUNDS if longest >= LONG else rounds)
    found = {who: [] for who in names}
    for i in range(rounds):
        turn = i % max(1, len(names))
        for who in names[turn:] + names[:turn]:
            if results[who]["verdict"] != MEASURED:
                continue
            use(model, who, ops)
            made, why = attempt(lambda who=who: one_round(model, calls[who], estimates[who]))
            if why:
                results[who] = ended(who, why, gone, where)
            else:
                found[who].append(made)
    for who in names:
        if results[who]["verdict"] == MEASURED:
            times, held, peaks = zip(*found[who], strict=True)
            ends = {f"seconds_{percent}": percentile(times, percent) for percent in (10, 90)}
            results[who] |= {"seconds": statistics.median(times), **ends, "rounds": times}
            results[who] |= {"peak_bytes": max(peaks), "held_bytes": held[peaks.index(max(peaks))]}
    return results


def one_round(model, call, estimate):
    """(median seconds of some calls, bytes held before them, bytes held at most)."""
    if estimate < LONG:
        call()
    held = reset_peak(model)
    times = [seconds_of(model, call) for _ in range(max(1, min(MOST_CALLS, int(ROUND_S / estimate))))]
    return statistics.median(times), held, peak(model)


def ended(who, why, gone, where):
    """The result of an implementation that did not get through, which is not tried again."""
    gone[who] = f"{why} at {where}"
    return {"verdict": OUT_OF_MEMORY if why == OUT_OF_MEMORY else "failed", "note": why}


def attempt(call):
    """(call(), None), or (None, why): "out of memory", or the error, which is printed."""
    why = None
    try:
        return call(), None
    except Exception as error:  # the others are still to be measured
        why = OUT_OF_MEMORY if no_memory(error) else f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]
        if why != OUT_OF_MEMORY:
            traceback.print_exc()
    gc.collect()  # the error held the frames, and they tensors
    return None, why


def no_memory(error: Exception) -> bool:
    """Whether it says that memory has run out."""
    out = isinstance(error, torch.OutOfMemoryError)
    return out or isinstance(error, RuntimeError) and any(words in str(error) for words in NO_MEMORY)


def seconds_of(model, call) -> float:
    """What a call takes, the GPU's work included; what it returns is dropped."""
    if model.device.type == "cpu":
        began = time.process_time()
        call()
        return time.process_time() - began
    torch.cuda.synchronize()
    began = time.perf_counter()
    call()
    torch.cuda.synchronize()
    return time.perf_counter() - began


def free(model):
    """Give unused memory back to the card."""
    gc.collect()
    if model.device.type == "cuda":
        torch.cuda.empty_cache()


def reset_peak(model) -> int:
    """Bytes that are held now, which from now on are the peak."""
    if model.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM becomes VmRSS
    return _status("VmRSS")


def peak(model) -> int:
    """Bytes that were held at most since `reset_peak`."""
    return torch.cuda.max_memory_allocated() if model.device.type == "cuda" else _status("VmHWM")


def _status(name):
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return int(line.split()[1]) << 10  # kB


def cache_bytes(cache) -> int:
    """Bytes of all tensors of a transformers cache."""
    tensors = [part for layer in cache.layers for part in vars(layer).values() if isinstance(part, torch.Tensor)]
    return sum(part.numel() * part.element_size() for part in tensors)
