"""Sharded keys: all ranks have the same queries, and each its own share of the keys, which never move.

    own keys       scored and selected by each rank: its k best are all that it can bring into the k best of all
    one all-gather k pairs (score, place in the sequence) of each row and rank
    selection      the k best of these candidates, by SPEC section 4, in the order of their places: of equal scores the
                   smallest place is kept, whichever rank brought it
    attention      over those winners that the rank holds itself: out and its log-sum-exp
    one all-gather [out | lse] in fp32, merged in the order of ranks; a rank without a winner has a
                   log-sum-exp of -inf and counts for nothing

For decode, and for contexts whose keys fit on no single rank. Bytes sent follow k and not the context. Every rank ends
up with the same output, to the bit. Without gradients.

Source: SPEC section 11.
"""

import zlib
from types import ModuleType

import torch
import torch.distributed as dist
from torch import Tensor

import dsa_ref

from ..contracts import check_finite, values_readable
from ..decode import merge_parts
from ..nn.cache import all_or_nothing
from ..nn.layer import DSALayer
from .layer import take_over
from .ranks import Ranks, pack, row_bytes, sum_of_bits
from .sharded_cache import ShardedCache

LAST = torch.iinfo(torch.int32).max  # behind every place


@torch.no_grad()
def sharded_select(
    q_idx: Tensor, k_idx: Tensor, w: Tensor, k: int, places: Tensor, start: Tensor, end: Tensor, ranks: Ranks,
    k_scale: Tensor | None = None, ops: ModuleType = dsa_ref,
) -> Tensor:  # fmt: skip
    """`lightning_select` over the keys of all ranks: int32 [T, k] places in the sequence, ascending, then -1.

    q_idx [T, Hi, Di], w [T, Hi], k, and start, end int32 [T], places that each row sees: the same on all ranks. k_idx
    [S, Di], k_scale [S]: the rank's own keys, as for `lightning_select`, S from 0 on; places: int32 [S], where in the
    sequence they are, ascending. Returns the same on all ranks. All ranks call it; that they do so with the same
    arguments, `ShardedLayer` checks before.

    Raises: as `ops.index_scores` and `ops.select_topk` do; RuntimeError where another rank does not come.
    """
    T = len(q_idx)
    scores = torch.full((T, k), -torch.inf, dtype=torch.promote_types(w.dtype, torch.float32), device=w.device)
    keys = torch.full((T, k), -1, dtype=torch.int32, device=w.device)
    if len(k_idx):
        first, last = (torch.searchsorted(places, bound, out_int32=True) for bound in (start, end))
        every = ops.index_scores(q_idx, k_idx, w, k_scale, first, last)
        best = ops.select_topk(every, min(k, len(k_idx)), first, last)
        there = best.clamp(min=0).long()
        keys[:, : best.shape[1]] = places[there].masked_fill(best < 0, -1)
        scores[:, : best.shape[1]] = every.gather(1, there)
    keys, scores = candidates(keys, scores, ranks)
    order = by_place(keys)
    keys, scores = keys.gather(1, order), scores.gather(1, order)
    count = (keys >= 0).sum(dim=1, dtype=torch.int32)
    best = ops.select_topk(scores, k, torch.zeros_like(count), count)
    winners = keys.gather(1, best.clamp(min=0).long()).masked_fill(best < 0, LAST).sort(dim=1).values
    return winners.masked_fill(winners == LAST, -1)


def candidates(keys: Tensor, scores: Tensor, ranks: Ranks) -> tuple[Tensor, Tensor]:
    """Every rank's keys and scores [T, k] side by side: two tensors [T, size · k]."""
    everyone = ranks.all_gather(pack((keys, scores), len(keys))).transpose(0, 1)
    parts = everyone.split((row_bytes(keys), row_bytes(scores)), dim=2)
    return tuple(part.contiguous().view(own.dtype).flatten(1) for part, own in zip(parts, (keys, scores), strict=True))


def by_place(keys: Tensor) -> Tensor:
    """The order of candidates [T, n] by their places, those that are none last: so ties go to the smallest place."""
    return keys.masked_fill(keys < 0, LAST).argsort(dim=1)


@torch.no_grad()
def sharded_attention(
    q: Tensor, kv: Tensor, indices: Tensor, scale: float, v_dim: int, places: Tensor, ranks: Ranks,
    ops: ModuleType = dsa_ref,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`sparse_attention` over the rows of all ranks: (out [T, H, v_dim] in q.dtype, lse fp32 [T, H]), on all alike.

    q [T, H, D], scale, v_dim, and indices int32 [T, k], places as `sharded_select` returned them: the same on all
    ranks. kv [S, D]: the rank's own rows, S from 0 on; places: int32 [S], ascending. A rank's part is rounded to
    q.dtype, as the step returns it, and merged in fp32 (fp64 for fp64).

    Raises: as `ops.sparse_attention` does; RuntimeError where another rank does not come.
    """
    wide = torch.promote_types(q.dtype, torch.float32)
    out = torch.zeros(*q.shape[:2], v_dim, dtype=wide, device=q.device)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=wide, device=q.device)
    if len(kv):
        at = torch.searchsorted(places, indices).clamp(max=len(places) - 1)
        own = at.to(torch.int32).masked_fill((indices < 0) | (places[at] != indices), -1)
        out, lse = ops.sparse_attention(q, kv, own, scale, v_dim)
    parts = ranks.all_gather(torch.cat((out.to(wide), lse[..., None]), dim=-1))
    out, lse = merge_parts(parts[..., :-1], parts[..., -1])
    return out.to(q.dtype), lse


class ShardedLayer(DSALayer):
    """A `DSALayer` of the same weights whose keys lie on all ranks of a group, each rank with its own.

    layer, group: as for `GatheredLayer`. `forward(x, positions, cache, record=...)` is DSALayer's for the next T tokens
    of one sequence, the same x [T, dim] and positions on all ranks, and a ShardedCache each; the tokens' own rows go to
    the rank `place % size`. Only attention="sparse", and no gradients. Returns the same [T, dim] on all ranks.

    Raises: as DSALayer, on all ranks alike; ValueError for what ranks brought otherwise, x and the cache's length too;
    RuntimeError where another rank has ended or does not come.
    """

    def __init__(self, layer: DSALayer, group: dist.ProcessGroup | None = None) -> None:
        take_over(self, layer, group)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: ShardedCache,
        attention: str = "sparse",
        record: list[dict] | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Attend from the next T tokens, the same on all ranks, which all call it."""
        with self.ranks.failing_together():
            self._check_call(x, positions, cache, attention, record, indices)
            with torch.no_grad(), all_or_nothing([cache], record):
                y, step = self._step(x, positions, cache, indices)
                if record is not None:
                    record.append(step)
        return y

    def _check_call(self, x, positions, cache, attention, record, indices) -> None:
        self._check(x, positions, cache, attention, record)
        self._check_shared(indices, positions, cache, attention)
        if not isinstance(cache, ShardedCache):
            raise TypeError(f"cache must be a ShardedCache, got {type(cache).__name__}")
        if attention != "sparse":
            raise ValueError(f"attention must be 'sparse' where keys are sharded, got {attention!r}")
        if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters())):
            raise ValueError("x and weights must not require gradients where keys are sharded: use torch.no_grad()")
        cache.check_own_room(len(self._own(cache.length, len(x))))

    def _own(self, before: int, T: int) -> Tensor:
        """Which of the T new tokens' places are this rank's: int64 on the CPU."""
        places = torch.arange(before, before + T, device="cpu")
        return places[places % self.ranks.size == self.ranks.rank]

    def _step(self, x, positions, cache, indices) -> tuple[Tensor, dict]:
        c, T, before = self.config, len(x), cache.length
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q_heads, rows = self._queries(q_latent, positions), [self._latents(x, positions), None, None]
        if self.indexer is not None:
            q_idx, rows[1], w, q_scale, rows[2] = self._index(x, q_latent, positions)
            w = w if q_scale is None else w * q_scale
        check_finite(" in the rows of new tokens", kv=rows[0], k_idx=rows[1], k_scale=rows[2])
        same = {
            "call": "sharded keys", "layer": self.number, "rows": T, "length": before, "dtype": str(x.dtype),
            "index_topk": c.index_topk, "config": zlib.crc32(repr(c).encode()),
            "x": sum_of_bits(x) if values_readable(x) else None,
        }  # fmt: skip
        places = self._own(before, T)  # stored before all agree: what the cache refuses must reach the other ranks
        cache.append_own(places, before + T, *(x if x is None else x[(places - before).to(x.device)] for x in rows))
        self.ranks.agree(same)
        kv, k_idx, k_scale = cache.rows()
        held = cache.places[: len(kv)]
        step = {"indices": indices}
        if self.indexer is not None:
            end = (torch.arange(before, before + T, device=x.device) + 1).to(torch.int32)
            k = min(c.index_topk, before + T)
            seen = torch.zeros_like(end), end
            step["indices"] = sharded_select(q_idx, k_idx, w, k, held, *seen, self.ranks, k_scale, self.ops)
            step |= {"q_idx": q_idx, "w": w}
        W_UK, W_UV = self._up_projections(rows[0])
        step["q"] = self._absorbed(q_heads, W_UK, kv.dtype)
        attending = step["q"], kv, step["indices"], c.softmax_scale, c.kv_lora_rank, held, self.ranks, self.ops
        u, step["lse"] = sharded_attention(*attending)
        return self.o_proj(torch.einsum("thc,hvc->thv", u, W_UV).flatten(1)), step
