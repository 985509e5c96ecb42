"""A decode step as one CUDA graph: torch.compile of the whole forward pass, on a static cache.

`generate` does so with `cache_implementation="static"`. Compiling takes long, so that each implementation is measured
by itself, one after the other.
"""

import statistics

import torch
from transformers import StaticCache

from ..measure import percentile
from .subject import random_tokens, use
from .timing import MEASURED, attempt, ended, free, seconds_of

STEPS = 30  # that are timed
ROOM = 64  # tokens of the cache behind the context
SPAN = 2048  # tokens of the context that are read at once


def measure_compiled(model, implementations, ops, T: int, gone: dict) -> dict:
    """{"batch", "tokens", "results"} of decode steps of one sequence behind T tokens.

    The cache is filled by ours, whichever decodes: transformers' own attention cannot read long contexts. A result's
    error is the largest difference of its logits from those of the same steps without compilation, over their norm;
    gone: as in `timing.in_turns`.
    """
    results = {}
    for who in implementations:
        if who in gone:
            results[who] = {"verdict": "not tried", "note": gone[who]}
            continue
        free(model)
        torch._dynamo.reset()
        made, why = attempt(lambda who=who: steps(model, who, ops, T))
        results[who] = ended(who, why, gone, f"{T} tokens, compiled") if why else made
    torch._dynamo.reset()
    return {"batch": 1, "tokens": T, "results": results}


@torch.no_grad()
def steps(model, who: str, ops, T: int) -> dict:
    """One implementation's result."""
    tokens = random_tokens(model, 1, T + ROOM)
    use(model, "ours_fp8" if who == "ours_fp8" else "ours", ops)
    cache = StaticCache(config=model.config, max_cache_len=T + ROOM)
    for t in range(0, T, SPAN):
        model(tokens[:, t : min(t + SPAN, T)], past_key_values=cache, logits_to_keep=1)
    use(model, who, ops)
    wanted = [model(tokens[:, T + i : T + i + 1], past_key_values=cache).logits for i in range(3)]
    for length in lengths_of(cache):
        length.sub_(3)
    whole = torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)
    place = torch.tensor([[T]], device=model.device)

    def step():
        logits = whole(tokens.gather(1, place), past_key_values=cache, position_ids=place).logits.clone()
        place.add_(1)
        return logits

    got = []
    first = seconds_of(model, lambda: got.append(step()))
    got += [step() for _ in range(2)]
    errors = [((a - b).norm() / b.norm()).item() for a, b in zip(got, wanted, strict=True)]
    step()
    times = [seconds_of(model, step) for _ in range(STEPS)]
    ends = {f"seconds_{percent}": percentile(times, percent) for percent in (10, 90)}
    found = {"seconds": statistics.median(times), "first_seconds": first, "error": max(errors)}
    return {"verdict": MEASURED, **found, **ends}


def lengths_of(cache) -> list[torch.Tensor]:
    """How many tokens each layer of a static cache holds, and how many index keys."""
    names = ("cumulative_length", "indexer_cumulative_length")
    found = [getattr(layer, name, None) for layer in cache.layers for name in names]
    return [length for length in found if isinstance(length, torch.Tensor)]
