"""Bytes that a sparse model takes, and that transformers' own attention would take, counted before anything is loaded.

B sequences of N tokens each; C, R: widths of the latent and of its RoPE part; Hi, Di: the indexer's heads and their
width; an item: a number of the model's dtype.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ...config import DSAConfig
from ...cost import BF16_BYTES, bf16_kv_bytes_per_token, index_bytes_per_token
from .attention import NUMBERS_AT_ONCE

KERNEL_SCORES = 1 << 28  # that `dsa_kernels.lightning_select` keeps at once
REFERENCE_PAIRS = {True: 1 << 28, False: 1 << 24}  # of a block of `dsa_ref`, on a GPU and on a CPU
REFERENCE_BLOCKS = 2  # temporaries of the reference's size that live at once
FP32, INT32 = 4, 4  # bytes


class Sizes(NamedTuple):
    """What the counts below need of a model."""

    config: DSAConfig
    layers: int
    shares: bool  # whether layers hand their selection on: GLM-5
    item: int  # bytes of a number
    experts: int  # a token goes to
    expert_width: int
    dense_width: int  # of the layers without experts


class Prefill(NamedTuple):
    """Bytes besides weights and cache, see `prefill`."""

    hidden: int
    attention: int
    mlp: int

    @property
    def most(self) -> int:
        """A layer's attention and its MLP do not run at once."""
        return self.hidden + max(self.attention, self.mlp)


def cache_bytes_per_token(sizes: Sizes) -> int:
    """All layers: (C + R) items, and Di items more in a layer with its own indexer."""
    plain = dataclasses.replace(sizes.config, index_fp8=False)
    indexers = sum(plain.has_indexer(i) for i in range(sizes.layers))
    bf16 = sizes.layers * bf16_kv_bytes_per_token(plain) + indexers * index_bytes_per_token(plain)
    return bf16 * sizes.item // BF16_BYTES


def numbers_a_query(config: DSAConfig) -> int:
    """Numbers of one query between q_b_proj and the heads' outputs: `SparseAttention` cuts its blocks by them."""
    c, qk = config, config.qk_nope_head_dim + config.qk_rope_head_dim
    return c.n_heads * (2 * qk + 2 * c.kv_lora_rank + c.qk_rope_head_dim + c.v_head_dim)


def prefill(sizes: Sizes, tokens: int, queries: int, batch: int, kernels: bool, cuda: bool) -> Prefill:
    """What one pass of `queries` tokens of each sequence takes besides, the last of `tokens`, all keys cached.

    hidden: embeddings, the residual stream before and after, and what is normed of it, B · queries · 4 dim items; where
    layers share, two lists of k int32.
    attention: of a block of queries, as many as NUMBERS_AT_ONCE allows, `numbers_a_query` items and their index queries
    twice; latents of q, B · queries · q_lora_rank items; outputs, in parts and joined, 2 B · queries · dim items; lists
    of k int32, of a block, or where layers share of all queries, in parts and joined; latents and RoPE keys side by
    side, and the layer's cache while it is lengthened, B · N · (2 (C + R) + Di) items; scores of one sequence, at most
    KERNEL_SCORES in fp32 with kernels, else REFERENCE_BLOCKS of the reference's blocks. Up to k keys there are no
    scores, and queries, keys and values of all heads may stand in place of the block; on a CPU, with logits
    twice, and copies, in fp32.
    mlp: transformers' "grouped_mm" experts, B · queries · experts times the more of 2 dim items and 2 dim in fp32, and
    of dim + 4 expert_width items; or a dense layer's B · queries · 3 dense_width items.

    kernels: whether the steps are dsa_kernels'; cuda: whether a GPU runs them.
    """
    c, item = sizes.config, sizes.item
    rows, keys = batch * min(queries, tokens), batch * tokens
    block = max(1, min(rows, NUMBERS_AT_ONCE // numbers_a_query(c)))
    one = min(block, queries)  # of them are scored at once: those of one sequence
    listed = min(c.index_topk, tokens) * INT32 * (2 * rows if sizes.shares else block)
    hidden = rows * 4 * c.dim * item + (listed if sizes.shares else 0)
    numbers = block * (numbers_a_query(c) + 2 * c.index_n_heads * c.index_head_dim)
    numbers += rows * (c.q_lora_rank + 2 * c.dim) + keys * (2 * c.latent_dim + c.index_head_dim)
    if tokens <= c.index_topk:
        scores, qk = 0, c.qk_nope_head_dim + c.qk_rope_head_dim
        if not cuda:  # a CPU's sdpa makes all logits where values are narrower than keys, in fp32
            copied = rows * qk + keys * (qk + c.v_head_dim) if item < FP32 else 0
            scores = c.n_heads * (2 * rows * tokens + copied) * FP32
        heads = c.n_heads * (rows * (2 * qk + c.v_head_dim) + keys * (c.qk_nope_head_dim + qk + c.v_head_dim))
        numbers += max(0, heads - block * numbers_a_query(c))
    elif kernels:
        scores = min(KERNEL_SCORES, one * tokens) * FP32
    else:
        scores = min(REFERENCE_PAIRS[cuda], one * tokens * c.index_n_heads) * REFERENCE_BLOCKS * FP32
    experts = sizes.experts * max(2 * c.dim * (item + FP32), (c.dim + 4 * sizes.expert_width) * item)
    mlp = rows * max(experts, 3 * sizes.dense_width * item)
    return Prefill(hidden, numbers * item + listed + scores, mlp)


def dense_attention(sizes: Sizes, tokens: int, queries: int, batch: int) -> int:
    """What a layer of transformers' own takes at least for its selection, as sdpa and eager alike make it.

    Scores of every index head, before and after the rectifier, in fp32: 2 · 4 Hi bytes a pair; two masks, 2 bytes a
    pair; keys and values of all heads, and what they were cut from, B · N · H · (2 nope + R + v) items.
    """
    c = sizes.config
    pairs = batch * min(queries, tokens) * tokens
    heads = c.n_heads * (2 * c.qk_nope_head_dim + c.qk_rope_head_dim + c.v_head_dim)
    return pairs * (2 * FP32 * c.index_n_heads + 2) + batch * tokens * heads * sizes.item


def longest(needed: Callable[[int], int], free: int, most: int) -> int:
    """The largest number of tokens up to `most` for which needed(tokens), which grows with it, is at most free; 0: none
    is."""
    low, high = 0, most
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if needed(middle) <= free else (low, middle - 1)
    return low
