"""What the scout of notebook 13 learns from, how it forgets, and what it knows at a step."""

import contextlib
import pathlib

import numpy as np
import torch
from torch import nn

from dsa_ref.index_scores import index_scores
from dsa_ref.select_topk import select_topk
from dsa_ref.testing import attention_recall
from dsa_ref.training.corpus import is_held_out, library_files
from dsa_ref.training.evaluate import attention_weights

FILES = ("argparse.py", "ast.py", "inspect.py", "subprocess.py", "tarfile.py", "threading.py", "typing.py")
TEXT = pathlib.Path(contextlib.__file__).read_bytes()[:448]  # held out: neither the model nor the scout learns from it


def windows(count, length, seed=0) -> torch.Tensor:
    """`count` pieces of `length` bytes each of FILES, at random places: int64 [count, length]."""
    root, _ = library_files()
    text = b"".join((root / name).read_bytes() for name in FILES if not is_held_out(name))
    starts = np.random.default_rng(seed).integers(0, len(text) - length, count)
    return torch.tensor([list(text[start : start + length]) for start in starts])


def forget(model, seed=0) -> None:
    """Give every indexer of the model the weights of one that has never learnt, in place; nothing else changes."""
    generator = torch.Generator().manual_seed(seed)
    for block in model.layers:
        for module in block.self_attn.indexer.children():
            if isinstance(module, nn.LayerNorm):
                module.reset_parameters()
            else:
                nn.init.normal_(module.weight, std=0.02, generator=generator)


@torch.no_grad()
def look(model, step, byte, k, text=TEXT) -> dict:
    """What the indexers know after a step, on a text that they do not learn from.

    Returns step; kl and recall (shares of attention's mass on the k selected keys, over the rows that see more than k),
    one number a layer; and of the one query `byte`, a list of one tensor a layer each: selected [k], guess
    (softmax(I), [byte + 1]) and attention (the target, [byte + 1]).
    """
    scale, record = model.config.attention.softmax_scale, []
    model(torch.tensor(list(text)), attention="dense", record=record)
    seen = {"step": step, "kl": [], "recall": [], "selected": [], "guess": [], "attention": []}
    for layer in record:
        weights, scores = attention_weights(layer, scale), index_scores(layer["q_idx"], layer["k_idx"], layer["w"])
        selected, log_guess = select_topk(scores, k), scores.log_softmax(dim=1).masked_fill(weights == 0, 0.0)
        seen["kl"].append(float((torch.xlogy(weights, weights) - weights * log_guess).sum(dim=1).mean()))
        seen["recall"].append(attention_recall(weights[k:], selected[k:]))
        seen["selected"].append(selected[byte])
        seen["guess"].append(scores[byte, : byte + 1].softmax(dim=0))
        seen["attention"].append(weights[byte, : byte + 1])
    return seen
