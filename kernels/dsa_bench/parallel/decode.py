"""Sharded keys: one new token behind S - 1 others, whose rows lie on all ranks, against one GPU that has all of them.

Both are timed as Python calls them, and both wait for the host, which costs more than the work: see `decode_h200.json`
for what one GPU needs from a CUDA graph. What sharding is for is memory.
"""

import torch

import dsa_ref
from dsa_ref.parallel import ShardedCache, ShardedLayer
from dsa_ref.testing import poisoned

from .. import checks
from ..bill.prefill import filled_cache
from . import group, judge
from .prefill import drawn

KEYS = "kv", "k_idx", "k_scale"  # that no rank has all of


class Decode:
    """The S-th token of a sequence, on all ranks and on rank 0 alone."""

    T = 1

    def __init__(self, layer, S, ranks, seed=5):
        self.layer, self.S, self.ranks, self.device = layer, S, ranks, layer.freqs.device
        self.x = drawn(1, layer.config.dim, self.device, seed)
        self.positions = torch.full((1,), S - 1, device=self.device)
        whole = filled_cache(layer.config, S, torch.Generator(self.device).manual_seed(seed + 1))
        places = torch.arange(ranks.rank, S - 1, ranks.size)
        self.own = ShardedCache(layer.config, len(places) + 1, torch.bfloat16, self.device)
        whole.length = S - 1
        rows = [None if part is None else judge.at(part, places.to(self.device)) for part in whole.rows()]
        self.own.append_own(places, S - 1, *rows)
        self.plan, self.cache = ShardedLayer(layer), whole if ranks.rank == 0 else None

    def together(self, record=None):
        """The output [1, dim], on every rank."""
        self.own.truncate(self.S - 1)
        with dsa_ref.unchecked_values():
            return self.plan(self.x, self.positions, self.own, record=record)

    def alone(self, record=None):
        self.cache.length = self.S - 1
        with dsa_ref.unchecked_values():
            return self.layer(self.x, self.positions, self.cache, record=record)

    def heaviest(self):
        """What of `alone` needs the most memory: all of it."""
        self.alone()

    def exchanges(self):
        """{name: call}: what is exchanged, one after another, and nothing else."""
        c, k = self.layer.config, min(self.layer.config.index_topk, self.S)
        candidates = torch.zeros(1, k, 2, device=self.device)  # place and score
        parts = torch.zeros(1, c.n_heads, c.kv_lora_rank + 1, device=self.device)

        def exchange():
            for part in (candidates, parts):
                self.ranks.all_gather(part)

        return {"all-gather": exchange}

    def judge(self):
        """The verdict of all ranks: the same bits everywhere, and rank 0's against one GPU and the reference."""
        record, ones = [], []
        with poisoned():
            y = self.together(record)
        one = self.alone(ones) if self.ranks.rank == 0 else None
        keeps = (self.S - 1) % self.ranks.size  # the rank that has the new row
        new = group.everyones(self.ranks, judge.digest(last_rows(self.own)) if self.ranks.rank == keeps else None)
        first = group.firsts(self.ranks, judge.digest([y, record[0]["indices"]]))

        def check():
            if judge.digest([y, record[0]["indices"]]) != first:
                raise checks.Wrong("the output or the selection has other bits than rank 0's")
            if one is None:
                return ""
            rows = torch.zeros(1, dtype=torch.int64, device=self.device)
            step = record[0] | {name: ones[0][name] for name in KEYS}
            error = judge.check_by_reference(self.layer, self.x, self.positions, step, y, rows)
            same = new[keeps] == judge.digest(last_rows(self.cache))
            got, want = judge.rows_of(step, y, rows), judge.rows_of(ones[0], one, rows)
            equal, count = judge.check_against_one(got, want, same)
            bits = "the same" if same else "not the same"
            return f"{equal} of {count} selections one GPU's, the new row's bits {bits}, output {error:.1e}"

        return group.judged(self.ranks, check)


def last_rows(cache):
    """The rows of the last token that a cache holds, as a list."""
    return [judge.at(part, slice(-1, None)) for part in cache.rows() if part is not None]
