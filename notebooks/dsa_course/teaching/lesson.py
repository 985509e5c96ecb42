"""What the scout of notebook 13 learns from, how it forgets, and what it knows at a step."""

import contextlib
import pathlib

import numpy as np
import torch
from torch import nn

from dsa_ref.index_scores import index_scores
from dsa_ref.select_topk import select_topk
from dsa_ref.testing import attention_recall
from dsa_ref.training.evaluate import attention_weights

FILES = ("argparse.py", "ast.py", "inspect.py", "subprocess.py", "tarfile.py", "threading.py", "typing.py")
TEXT = pathlib.Path(contextlib.__file__).read_bytes()[:448]  # held out: neither the model nor the scout learns from it


def windows(count, length, seed=0) -> torch.Tensor:
    """`count` pieces of `length` bytes each of FILES, at random places: int64 [count, length]."""
    library = pathlib.Path(contextlib.__file__).parent
    text = b"".join((library / name).read_bytes() for name in FILES)
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


class Watch:
    """Sees what the indexers of a model know, on a text that they do not learn from, as often as it is called.

    model: its attention must stay as it is, so it is looked at once. byte: a query of the text, of which more is told;
    k: how many keys are selected.
    """

    @torch.no_grad()
    def __init__(self, model, byte, k, text=TEXT):
        self.model, self.byte, self.k, record = model, byte, k, []
        self.given = []  # to each indexer
        hooks = [
            block.self_attn.indexer.register_forward_pre_hook(lambda module, given: self.given.append(given))
            for block in model.layers
        ]
        model(torch.tensor(list(text)), attention="dense", record=record)
        for hook in hooks:
            hook.remove()
        self.attention = [attention_weights(layer, model.config.attention.softmax_scale) for layer in record]
        self.positions = torch.arange(len(text))

    @torch.no_grad()
    def __call__(self, step) -> dict:
        """What the indexers know after a step.

        Returns step; kl and recall (shares of attention's mass on the k selected keys, over the rows that see more than
        k), one number a layer; and of the one query `byte`, a list of one tensor a layer each: selected [k], guess
        (softmax(I), [byte + 1]) and attention (the target, [byte + 1]).
        """
        byte, k = self.byte, self.k
        seen = {"step": step, "kl": [], "recall": [], "selected": [], "guess": [], "attention": []}
        for block, (x, latent), p in zip(self.model.layers, self.given, self.attention, strict=True):
            q_idx, k_idx, w, *_ = block.self_attn._index(x, latent, self.positions)
            scores = index_scores(q_idx, k_idx, w)
            selected, log_guess = select_topk(scores, k), scores.log_softmax(dim=1).masked_fill(p == 0, 0.0)
            seen["kl"].append(float((torch.xlogy(p, p) - p * log_guess).sum(dim=1).mean()))
            seen["recall"].append(attention_recall(p[k:], selected[k:]))
            seen["selected"].append(selected[byte])
            seen["guess"].append(scores[byte, : byte + 1].softmax(dim=0))
            seen["attention"].append(p[byte, : byte + 1])
        return seen
