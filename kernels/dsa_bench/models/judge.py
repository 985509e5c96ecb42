"""Whether a sparse layer computes what transformers' computes: each attention layer's output, at every position.

sdpa runs first, and what each layer got is kept. The others get the same: a model of random weights is chaotic, since
one key that changes its place for the last bit of a score changes what the next layer selects from. A position's error
in a layer is |y - y'| / |y'|, y' being sdpa's attention output. A selection at random, which must be refused, says what
the tolerance is worth. Left alone, how often do the models guess the same next token? That is told, and not judged:
transformers' own eager attention is the yardstick.
"""

import contextlib
import types

import torch

from . import at_random
from .subject import SPARSE, use

RANDOM = "at random"
DECODED = 8  # positions, the last ones, that are decoded one by one from the cache of the others
LIMITS = {  # {who: (share of layers and positions, error that so many must keep)}, by the model's dtype
    "ours": {torch.bfloat16: (0.99, 0.05), torch.float32: (0.99, 1e-3)},
    "ours_fp8": {torch.bfloat16: (0.9, 0.5), torch.float32: (0.9, 0.5)},
}
LIMITS["eager"] = LIMITS[RANDOM] = LIMITS["ours"]


@torch.no_grad()
def judged(model, implementations, ops: types.ModuleType, tokens) -> dict:
    """{"tokens", "decoded", "against", "results": {who: see `compared`}} of tokens [1, T]; sdpa is what is right."""
    given = {}
    wanted, alone = outputs(model, "sdpa", ops, tokens, given)
    results = {}
    for who in [name for name in implementations if name != "sdpa"] + [RANDOM]:
        way = ("ours", at_random) if who == RANDOM else (who, ops)
        found, _ = outputs(model, *way, tokens, given)
        results[who] = compared(found, wanted, *LIMITS[who][model.dtype])
        del found
        _, guesses = outputs(model, *way, tokens)
        results[who]["same_guess"] = (guesses == alone).float().mean().item()
    return {"tokens": tokens.shape[1], "decoded": DECODED, "against": "sdpa", "results": results}


def outputs(model, implementation, ops, tokens, given=None):
    """(attention outputs [layers, T, hidden], most likely next tokens [T]), the last DECODED positions decoded.

    given: {(layer, number of its call): its hidden states}, which is filled, or taken where it is there; None: neither.
    """
    use(model, implementation, ops)
    layers = [layer.self_attn for layer in model.model.layers]
    got, guesses = [[] for _ in layers], []

    def before(layer, args, kwargs):
        place = layer.layer_idx, len(got[layer.layer_idx])
        return args, kwargs | {"hidden_states": given.setdefault(place, kwargs["hidden_states"])}

    def after(layer, args, made):
        got[layer.layer_idx].append(made[0])

    with contextlib.ExitStack() as hooks:
        for layer in layers if given is not None else ():
            hooks.callback(layer.register_forward_pre_hook(before, with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(after).remove)
        cache = None
        for part in (tokens[:, :-DECODED], *tokens[:, -DECODED:].split(1, dim=1)):
            out = model(input_ids=part, past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            guesses.append(out.logits[0].argmax(-1))
    return [torch.cat(parts, dim=1)[0] for parts in got if parts], torch.cat(guesses)


def compared(found, wanted, share, tolerance) -> dict:
    """The record of one implementation's outputs against sdpa's: the share of positions, of all layers and of those
    that are decoded, whose error is at most `tolerance`; both must be at least `share_wanted`."""
    pairs = zip(found, wanted, strict=True)
    errors = torch.stack([(y.float() - z.float()).norm(dim=-1) / z.float().norm(dim=-1) for y, z in pairs])
    errors = torch.where(errors.isfinite(), errors, torch.inf)  # [layers, T]
    within = (errors <= tolerance).float()
    shares = within.mean().item(), within[:, -DECODED:].mean().item()
    return {
        "verdict": "right" if min(shares) >= share else "WRONG",
        "tolerance": tolerance,
        "share_wanted": share,
        "share": shares[0],
        "share_decoded": shares[1],
        "median_error": errors.median().item(),
        "largest_error": errors.max().item(),
    }


def wrong(record) -> bool:
    """Whether something of ours is wrong, or the control was not refused. transformers' own eager is no concern."""
    results = record["results"]
    return any(results[who]["verdict"] != "right" for who in SPARSE if who in results) or (
        results[RANDOM]["verdict"] != "WRONG"
    )
