"""Notebook 00: what the small model guesses, with every byte in view or with k chosen ones. Nothing here draws."""

import functools
import types

import torch

import dsa_ref
from dsa_ref.nn.model import load_small_model
from dsa_ref.testing import random_selection, window_selection
from dsa_ref.training.evaluate import selected_weights

SHOWN = 4  # guesses for a byte
LAYER = 2  # of 0 to 3, the one that is shown: it looks for what came after the same letters before


def write_on(model, prompt, count, attention="sparse") -> bytes:
    """`prompt`, bytes, and `count` more, each the model's first guess. attention: "sparse" or "dense"."""
    caches = model.new_caches(len(prompt) + count)
    text, unread = prompt, prompt
    device = next(model.parameters()).device
    for _ in range(count):
        tokens = torch.tensor(list(unread), device=device)
        unread = bytes([int(model(tokens, caches=caches, attention=attention)[-1].argmax())])
        text += unread
    return text


def top_bytes(logits) -> list:
    """The likeliest next bytes of a row of logits [256]: [(byte, probability)], SHOWN of them, likeliest first."""
    best = logits.softmax(dim=-1).topk(SHOWN)
    return list(zip(best.indices.tolist(), best.values.tolist(), strict=True))


def reader(tokens):
    """A function of (byte, k): what the model sees and guesses there, a dict.

    tokens: int64 [T]. The dict: byte, k, next (the byte that follows in the text, or None), chosen and weights ([k], of
    layer LAYER), dense and sparse (`top_bytes`).
    """

    @functools.cache
    def read(k):
        """(logits [T, 256], the step of layer LAYER) with k keys, or with all for None."""
        model, steps = load_small_model(**({} if k is None else {"index_topk": k})).to(tokens.device), []
        logits = model(tokens, attention="dense" if k is None else "sparse", record=steps)
        return logits, steps[LAYER], model.config.attention.softmax_scale

    def look(byte, k):
        logits, step, scale = read(k)
        return {
            "byte": byte,
            "k": k,
            "next": int(tokens[byte + 1]) if byte + 1 < len(tokens) else None,
            "chosen": step["indices"][byte].cpu(),
            "weights": selected_weights(step, byte, scale).cpu(),
            "dense": top_bytes(read(None)[0][byte]),
            "sparse": top_bytes(logits[byte]),
        }

    return look


@torch.no_grad()
def right_guesses(tokens, k, way) -> int:
    """For how many bytes of `tokens` the model's first guess is right, given k bytes chosen in this way.

    tokens: int64 [T]. Bytes that see no more than k, all of which they keep, do not count: T - 1 - k do. way: "indexer"
    (what the model was trained with), "last" (the last k bytes), "random", or "all" (dense attention, k only counts).
    Raises: ValueError for another way.
    """
    others = {"last": window_selection, "random": functools.partial(random_selection, seed=0)}
    if way not in ("all", "indexer", *others):
        raise ValueError(f"way must be all, indexer, last or random, got {way!r}")
    ops = dsa_ref
    if way in others:
        start = torch.zeros(len(tokens), dtype=torch.int32, device=tokens.device)
        end = torch.arange(1, len(tokens) + 1, dtype=torch.int32, device=tokens.device)
        chosen = others[way](k, start, end)
        steps = {name: getattr(dsa_ref, name) for name in ("rope", "rotate_quantize", "sparse_attention")}
        ops = types.SimpleNamespace(**steps, lightning_select=lambda *_, **__: chosen)
    model = load_small_model(ops=ops, index_topk=k).to(tokens.device)
    logits = model(tokens, attention="dense" if way == "all" else "sparse")
    return int((logits[k:-1].argmax(dim=-1) == tokens[k + 1 :]).sum())
