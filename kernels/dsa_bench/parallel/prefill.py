"""Gathered keys: a prompt's tokens on all ranks, against one GPU that reads as many tokens at a time.

A whole prompt goes through `GatheredLayer` at once. Where that would take too long, the last part of a prompt is read,
one block of each rank: the ranks hold the rows of all earlier tokens in their shares of the cache, and gather them in
that call. One GPU has those rows in its cache, and gathers nothing.
"""

import types

import torch

import dsa_ref
from dsa_ref import cost
from dsa_ref.parallel import GatheredLayer, ShardedCache, Zigzag, gather_held, gather_rows
from dsa_ref.testing import poisoned

from .. import checks
from ..bill.prefill import filled_cache
from . import group, judge

BLOCK = 1 << 14  # rows of x that are drawn at once


class Kept:
    """The layer's steps, which keep what they select for some of the rows of one call, as a record would for all.

    plan: the layer, whose `ops` and `_all_rows` are wrapped; rows: which, of the call's, ascending. step(): {"q_idx",
    "w", "indices"} of those rows, and {"kv", "k_idx", "k_scale"}, all keys.
    """

    def __init__(self, plan, rows):
        self.plan, self.real, self.gather = plan, plan.ops, plan._all_rows
        self.rows, self.first, self.parts, self.keys = rows, 0, [], {}

    def __enter__(self):
        self.plan.ops = types.SimpleNamespace(**vars(self.real) | {"lightning_select": self.lightning_select})
        self.plan._all_rows = self._all_rows
        return self

    def __exit__(self, *_):
        self.plan.ops = self.real
        del self.plan._all_rows  # the class has its own

    def _all_rows(self, *given):
        everyone = self.gather(*given)
        self.keys = dict(zip(("kv", "k_idx", "k_scale"), everyone, strict=True))
        return everyone

    def lightning_select(self, q_idx, k_idx, w, k, k_scale=None, **seen):
        lists = self.real.lightning_select(q_idx, k_idx, w, k, k_scale=k_scale, **seen)
        here = self.rows[(self.rows >= self.first) & (self.rows < self.first + len(q_idx))] - self.first
        self.parts.append((judge.at(q_idx, here.to(w.device)), w[here.to(w.device)], lists[here.to(w.device)]))
        self.first += len(q_idx)
        self.last = q_idx, w
        return lists

    def step(self):
        q_idx, w, lists = zip(*self.parts, strict=True)
        widest = max(part.shape[1] for part in lists)  # a call has no more places than it has keys
        lists = [torch.nn.functional.pad(part, (0, widest - part.shape[1]), value=-1) for part in lists]
        joined_q = torch.cat([part.view(torch.uint8) for part in q_idx]).view(q_idx[0].dtype)
        return self.keys | {"q_idx": joined_q, "w": torch.cat(w), "indices": torch.cat(lists)}


class Prefill:
    """The last T of S tokens, T a multiple of twice the ranks, on all ranks and on rank 0 alone, `block` in a call."""

    def __init__(self, layer, T, S, ranks, block, seed=3):
        self.layer, self.T, self.S, self.ranks, self.block = layer, T, S, ranks, block
        self.device, self.shares = layer.freqs.device, Zigzag(T, ranks.size)
        rows = self.shares.rows(ranks.rank, self.device)
        self.x = drawn(T, layer.config.dim, self.device, seed, rows)
        self.positions = S - T + rows
        self.all_x = drawn(T, layer.config.dim, self.device, seed) if ranks.rank == 0 else None
        self.cache, self.own, self.plan = None, None, GatheredLayer(layer)
        if T < S or ranks.rank == 0:
            generator = torch.Generator(self.device).manual_seed(seed + 1)
            self.cache = filled_cache(layer.config, S, generator) if T < S else self._empty_cache()
        if T < S:
            places = Zigzag(S - T, ranks.size).rows(ranks.rank)
            self.cache.length = S - T
            self.own = ShardedCache(layer.config, len(places) + len(rows), torch.bfloat16, self.device)
            held = (None if part is None else judge.at(part, places.to(self.device)) for part in self.cache.rows())
            self.own.append_own(places, S - T, *held)
        self.plan.rows_at_once = block
        if ranks.rank:
            self.cache = None
        self.scored = None

    def _empty_cache(self):
        return dsa_ref.LayerCache(self.layer.config, self.S, torch.bfloat16, self.device)

    def together(self):
        """This rank's rows of the output."""
        if self.own is not None:
            self.own.truncate(self.S - self.T)
        with dsa_ref.unchecked_values():
            return self.plan(self.x, self.positions, self.own)

    def alone(self, keep=None, begin=0):
        """The tokens from `begin` on, `block` in a call. keep(first, step, y): what is done with each."""
        for first in range(begin, self.T, self.block):
            self.cache.length = self.S - self.T + first
            record, x = None if keep is None else [], self.all_x[first : first + self.block]
            positions = torch.arange(self.cache.length, self.cache.length + len(x), device=self.device)
            with dsa_ref.unchecked_values():
                y = self.layer(x, positions, self.cache, record=record)
            if keep is not None:
                keep(first, record[0], y)

    def heaviest(self):
        """What of `alone` needs the most memory: the last block."""
        self.alone(begin=(self.T - 1) // self.block * self.block)

    def exchanges(self):
        """{name: call}: the exchange of a call alone, and with what brings the rows into the sequence's order."""
        tokens, places = self.S // self.ranks.size, 0 if self.own is None else self.own.places.element_size()
        own = torch.zeros(tokens, row_bytes(self.layer.config) + places, dtype=torch.uint8, device=self.device)

        def in_order():
            if self.own is None:
                return gather_rows([own], Zigzag(self.S, self.ranks.size), self.ranks)
            rows = [part for part in self.own.rows() if part is not None]  # those of the last call, all of S
            return gather_held(rows, self.own.places, [tokens] * self.ranks.size, self.ranks)

        return {"all-gather": lambda: self.ranks.all_gather(own), "all-gather, in order": in_order}

    def judge(self):
        """The verdict of all ranks on what `together` gives; the last block's queries are kept for `selection`."""
        local = [checks.sampled_rows(self.shares.count(rank), "cpu") for rank in range(self.ranks.size)]
        places = [self.shares.rows(rank)[rows] for rank, rows in enumerate(local)]
        one = group.firsts(self.ranks, self._one_gpus(places) if self.ranks.rank == 0 else None)
        rank = self.ranks.rank
        with poisoned(), Kept(self.plan, local[rank]) as kept:
            y = self.together()
        step = kept.step()
        self.scored = *kept.last, step["k_idx"], step["k_scale"]
        keys = step["kv"], step["k_idx"], step["k_scale"]
        same, wrong = self._same_keys(step) if rank == 0 else (False, None)
        same, first = group.firsts(self.ranks, (same, judge.digest(keys) if rank == 0 else None))

        def check():
            if wrong:
                raise wrong
            if judge.digest(keys) != first:
                raise checks.Wrong("the gathered rows are others than rank 0's")
            if not y.isfinite().all():
                raise checks.Wrong("the output is not finite")
            rows = local[rank].to(self.device)
            some, every = (self.x[rows], self.positions[rows]), torch.arange(len(rows), device=self.device)
            error = judge.check_by_reference(self.layer, *some, step, y[rows], every)
            equal, count = judge.check_against_one(judge.rows_of(step, y[rows], every), one[rank], same)
            bits = "the same" if same else "not all the same"
            return f"{equal} of {count} selections one GPU's, keys' bits {bits}, output {error:.1e}"

        return group.judged(self.ranks, check)

    def _one_gpus(self, places):
        """For each rank what one GPU has in the rows that are sampled there."""
        found = [[] for _ in places]

        def keep(first, step, y):
            for rank, rows in enumerate(places):
                here = rows[(rows >= first) & (rows < first + len(y))] - first
                found[rank].append(judge.rows_of(step, y, here.to(self.device)))

        self.alone(keep)
        widest = max(part["lists"].shape[1] for part in found[0])
        for part in (part for parts in found for part in parts):  # a call has no more places than it has keys
            part["lists"] = torch.nn.functional.pad(part["lists"], (widest - part["lists"].shape[1], 0), value=-1)
        return [{name: torch.cat([part[name] for part in parts]) for name in parts[0]} for parts in found]

    def _same_keys(self, step):
        """(whether the gathered rows have one GPU's bits, what is wrong with them or None)."""
        self.cache.length = self.S
        try:
            return judge.check_keys(step, *self.cache.rows()), None
        except checks.Wrong as reason:
            return False, reason

    def selection(self):
        """{plan: {"pairs": by rank, "ms": by rank}}: the indexer's work, of rows in zigzag and of contiguous ones.

        pairs of queries and keys are counted; ms: `lightning_select` on all ranks at once, each with its rows' ranges,
        block by block, for the queries of the last block.
        """
        size, before, found = self.ranks.size, self.S - self.T, {}
        plans = {
            "zigzag": [self.shares.chunks(rank) for rank in range(size)],
            "contiguous": [(range(r * self.T // size, (r + 1) * self.T // size),) for r in range(size)],
        }
        for name, chunks in plans.items():
            rows = torch.cat([torch.arange(c.start, c.stop, device=self.device) for c in chunks[self.ranks.rank]])
            ends = (before + rows + 1).to(torch.int32).split(len(self.scored[0]))
            group.meet(self.ranks)
            times = [
                group.own_ms(lambda ends=ends: self._select(ends), self.device) for _ in range(1 + (len(ends) < 9))
            ]
            pairs = [sum(cost.causal_pairs(len(c), before + c.stop) for c in own if len(c)) for own in chunks]
            found[name] = {"pairs": pairs, "ms": group.everyones(self.ranks, times[-1])}
        return found

    def _select(self, ends):
        q_idx, w, k_idx, k_scale = self.scored
        for end in ends:
            seen = {"start": torch.zeros_like(end), "end": end}
            with dsa_ref.unchecked_values():
                self.layer.ops.lightning_select(
                    q_idx[: len(end)], k_idx, w[: len(end)], self.layer.config.index_topk, k_scale=k_scale, **seen
                )


def row_bytes(config):
    """Bytes of a token that are gathered: its latent row and its index key."""
    return cost.bf16_kv_bytes_per_token(config) + cost.index_bytes_per_token(config)


def drawn(T, dim, device, seed, rows=None):
    """Normal bf16 rows [T, dim], or those of them that are named, ascending, without the others in memory."""
    generator, found = torch.Generator(device).manual_seed(seed), []
    for first in range(0, T, BLOCK):
        last = min(T, first + BLOCK)
        block = torch.randn(last - first, dim, generator=generator, device=device).to(torch.bfloat16)
        found.append(block if rows is None else block[rows[(rows >= first) & (rows < last)] - first])
    return torch.cat(found)
