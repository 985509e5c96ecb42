"""Notebook 16: the trained model with other selections than its indexer's, and what each costs. Nothing here draws."""

import functools
import types

import torch
from torch.nn import functional as F

import dsa_ref
from dsa_ref.nn.model import load_small_model
from dsa_ref.testing import random_selection, window_selection
from dsa_ref.training.evaluate import held_out_windows

METHODS = ("indexer", "attention itself", "window", "random")  # of selecting k keys
SEED = 0  # of the random selection, one more for each layer


def selection(method, q, kv, indices, scale, layer):
    """The keys that each of the last T of S rows keeps, int32 [T, k], by one of METHODS.

    q [T, H, D], kv [S, D], indices [T, k] (the indexer's) and scale: what `sparse_attention` is given. "attention
    itself" keeps the keys with most weight, mean over heads: an oracle, since it computes all that DSA leaves out.
    Raises: ValueError for another method.
    """
    (T, S), k = (len(q), len(kv)), indices.shape[1]
    end = torch.arange(S - T + 1, S + 1, dtype=torch.int32)
    start = torch.zeros_like(end)
    if method == "indexer":
        return indices
    if method == "attention itself":
        logits = torch.einsum("thd,sd->ths", q, kv) * scale
        hidden = torch.arange(S) >= end[:, None]
        weights = logits.masked_fill(hidden[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)
        return dsa_ref.select_topk(weights, k, start, end)
    if method == "window":
        return window_selection(k, start, end)
    if method == "random":
        return random_selection(k, start, end, SEED + layer)
    raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")


@functools.cache
def selecting(method, k):
    """(the trained model, list): it attends to the k keys of `method` and adds those of each layer to the list."""
    chosen = []

    def attend(q, kv, indices, scale, v_dim):
        chosen.append(selection(method, q, kv, indices, scale, layer=len(chosen)))
        return dsa_ref.sparse_attention(q, kv, chosen[-1], scale, v_dim)

    def nothing(q_idx, k_idx, w, k, **_):  # in place of scores that nobody will look at
        return torch.full((len(q_idx), k), -1, dtype=torch.int32)

    ops = types.SimpleNamespace(
        rope=dsa_ref.rope,
        rotate_quantize=dsa_ref.rotate_quantize,
        lightning_select=dsa_ref.lightning_select if method == "indexer" else nothing,
        sparse_attention=attend,
    )
    return load_small_model(ops=ops, index_topk=k), chosen


whole = functools.cache(load_small_model)  # for "dense", which selects nothing


@torch.no_grad()
def read(tokens, method, k, caches=None):
    """(logits fp32 [T, 256], one dict a layer): the model reads with the k keys that `method` keeps for each byte.

    tokens: int64 [T]; method: one of METHODS, or "dense" for all keys, which looks at no k. caches: as the model takes
    them. The dicts are as `DSALayer` records them, "indices" the keys that were attended to.
    """
    record = []
    if method == "dense":
        return whole()(tokens, caches=caches, attention="dense", record=record), record
    model, chosen = selecting(method, k)
    chosen.clear()
    logits = model(tokens, caches=caches, record=record)
    return logits, [step | {"indices": indices} for step, indices in zip(record, chosen, strict=True)]


def write(prompt, count, method, k) -> bytes:
    """`count` bytes after `prompt`, bytes: each the model's first guess, with the k keys of `method`."""
    caches, text, new = whole().new_caches(len(prompt) + count), b"", prompt
    for _ in range(count):
        logits, _ = read(torch.tensor(list(new)), method, k, caches)
        new = bytes([int(logits[-1].argmax())])
        text += new
    return text


def byte_losses(window, method, k):
    """The loss of each next byte, in nats, fp32 [L]: entry t for byte t + 1 of the window, uint8 [L + 1].

    The model reads each window once with each method and k: the answers are kept.
    """
    return _byte_losses(bytes(window.tolist()), method, None if method == "dense" else k)


@functools.cache
def _byte_losses(text, method, k):
    tokens = torch.tensor(list(text))
    return F.cross_entropy(read(tokens[:-1], method, k)[0], tokens[1:], reduction="none")


def ablate(losses, corpus, methods, ks, count, length) -> dict:
    """{(method, k): fp64 [count]}: exercise 16.3, as its card says."""
    windows = held_out_windows(corpus["held out"], count, length)
    first = max(ks)  # row t sees t + 1 bytes
    return {
        (method, k): torch.stack([losses(window, method, k)[first:].double().mean() for window in windows])
        for method in methods
        for k in ks
    }


def paired(a, b) -> tuple:
    """(mean of a - b, its lower and upper end, two standard errors away): exercise 16.4. a, b: n >= 2 numbers each."""
    difference = torch.as_tensor(a).double() - torch.as_tensor(b).double()
    error = difference.std() / len(difference) ** 0.5
    return tuple(float(difference.mean() + step * error) for step in (0, -2, 2))
