"""Notebook 14: how many keys hold most of a trained model's attention, as the text before them grows."""

import contextlib
import functools
import pathlib

import torch

from dsa_ref.nn import load_small_model
from dsa_ref.training.evaluate import attention_weights

ROWS = 32  # rows before a position, over which its number is the mean


@functools.cache
def attention_of(count) -> list:
    """The trained model's dense attention to the first `count` bytes of contextlib.py, [count, count] fp32 for each
    layer, the mean over heads. Rows sum to 1."""
    model, record = load_small_model(), []
    text = pathlib.Path(contextlib.__file__).read_bytes()[:count]
    with torch.no_grad():
        model(torch.tensor(list(text)), attention="dense", record=record)
    return [attention_weights(step, model.config.attention.softmax_scale) for step in record]


def needed(weights, share) -> int:
    """The least number of keys whose weights, a tensor of any length, add up to at least `share`."""
    largest = weights.double().sort(descending=True).values.cumsum(0)
    return int((largest < share).sum()) + 1


def needed_at(layer, position, share, count=1024) -> float:
    """The mean of `needed` over the 32 rows before a position, of `count` bytes that the trained model reads."""
    rows = attention_of(count)[layer][position - ROWS : position]
    return sum(needed(row, share) for row in rows) / ROWS
