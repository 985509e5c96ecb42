"""Notebook 17: the text that ranks share, and what one rank alone computes on it."""

import contextlib
import functools
import pathlib

import torch

from dsa_ref import index_scores, select_topk
from dsa_ref.nn import load_small_model

TEXT = pathlib.Path(contextlib.__file__).read_bytes()[:256]
NEXT = pathlib.Path(contextlib.__file__).read_bytes()[256:272]  # what follows


@functools.cache
def read_alone() -> tuple:
    """What each layer of the trained small model records while it reads TEXT, a dict a layer, k = 64; unquantised."""
    record = []
    with torch.no_grad():
        load_small_model(index_fp8=False)(torch.tensor(list(TEXT)), record=record)
    return tuple(record)


def select_among(layer, query, places, k) -> tuple[torch.Tensor, torch.Tensor]:
    """The k best keys of those at `places` for one query: (their places, their scores), both by ascending place.

    layer: what `read_alone` gives for one; query: int; places: int64 [n], ascending, none behind the query.
    """
    q_idx, w, k_idx = layer["q_idx"][query, None], layer["w"][query, None], layer["k_idx"][places]
    every = torch.zeros(1, dtype=torch.int32), torch.tensor([len(places)], dtype=torch.int32)
    scores = index_scores(q_idx, k_idx, w, None, *every)
    best = select_topk(scores, min(k, len(places)), *every)[0].long()
    return places[best], scores[0, best]
