"""Notebook 16: the trained model with other selections than its indexer's, and what each costs. Nothing here draws."""

import functools

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


class Steps:
    """A layer's steps for the trained model, as `ops`: the reference's, but for the selection, which `method` makes.

    method, k: set them before a pass; chosen: the keys of each layer are added to it.
    """

    rope = staticmethod(dsa_ref.rope)

    def rotate_quantize(self, x, positions, freqs):
        if self.method == "indexer":
            return dsa_ref.rotate_quantize(x, positions, freqs)
        return torch.zeros(x.shape, dtype=torch.float8_e4m3fn), torch.ones(x.shape[:-1])  # nobody would look at it

    def lightning_select(self, q_idx, k_idx, w, k, k_scale=None, start=None):
        k = min(self.k, len(k_idx))
        if self.method == "indexer":
            return dsa_ref.lightning_select(q_idx, k_idx, w, k, k_scale=k_scale, start=start)
        return torch.full((len(q_idx), k), -1, dtype=torch.int32)  # nor at scores

    def sparse_attention(self, q, kv, indices, scale, v_dim):
        self.chosen.append(selection(self.method, q, kv, indices, scale, layer=len(self.chosen)))
        return dsa_ref.sparse_attention(q, kv, self.chosen[-1], scale, v_dim)


@functools.cache
def trained():
    """(the trained model, its Steps)."""
    steps = Steps()
    return load_small_model(ops=steps), steps


@torch.no_grad()
def read(tokens, method, k, caches=None):
    """(logits fp32 [T, 256], one dict a layer): the model reads with the k keys that `method` keeps for each byte.

    tokens: int64 [T]; method: one of METHODS, or "dense" for all keys, which looks at no k. caches: as the model takes
    them. The dicts are as `DSALayer` records them, "indices" the keys that were attended to. What the indexer makes
    is in them for "indexer" alone: for the others it does not run.
    """
    (model, steps), record = trained(), []
    steps.method, steps.k, steps.chosen = method, k, []
    logits = model(tokens, caches=caches, attention="dense" if method == "dense" else "sparse", record=record)
    if method == "dense":
        return logits, record
    return logits, [step | {"indices": indices} for step, indices in zip(record, steps.chosen, strict=True)]


def write(prompt, count, method, k) -> bytes:
    """`count` bytes after `prompt`, bytes: each the model's first guess, with the k keys of `method`."""
    caches, text, new = trained()[0].new_caches(len(prompt) + count), b"", prompt
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
