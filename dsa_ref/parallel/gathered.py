"""Gathered keys: each rank has its share of the queries, and for one layer at a time the keys of all.

    own rows          kv [n, D], k_idx [n, Di], k_scale [n] of the rank's tokens, which `Zigzag` gave to it
    agree             sizes, dtypes and settings, before anything large is sent
    one all-gather    [latent | rope | index key], in bytes: 1408 a token in V3.2's bf16, 1284 with FP8 index keys
    in order          the gathered chunks as rows of the sequence, once; padding is left behind here
    select, attend    each own row with its range [start, end) of rows of the sequence: the layer's steps as ever
    backward          one reduce-scatter in fp32 of the gradient of the gathered rows, dkv or dk_idx

Without gradients, all keys are made and gathered first, and then the queries come in blocks of `rows_at_once`, so that
a share of any length needs memory for the keys of a layer and the queries of one block.

What a row sees, and in which order, is what one rank alone would give it: there are no partial softmaxes to merge and
no choice to repeat.

dkv and dk_idx come in two backward passes, the language loss's and then the indexer's, whose target the first one
yields (SPEC section 5): so each has its own reduce-scatter, of D and of Di numbers a token. Each rank's gradient is
rounded to the dtype of the rows before it is widened and summed, as the steps return it so.

Source: SPEC section 11.
"""

import zlib

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..contracts import check_finite, unchecked_values, values_readable
from ..nn.cache import LayerCache
from ..nn.decode import append_latents, query_latent
from ..nn.layer import DSALayer
from ..nn.prefill import index_rows, prefill_step, serves
from .layer import take_over
from .ranks import Ranks, pack, row_bytes
from .sharded_cache import ShardedCache
from .zigzag import Zigzag


class GatheredLayer(DSALayer):
    """A `DSALayer` of the same weights, each rank with its rows of x, all ranks with the keys of all.

    layer: the DSALayer whose weights, names and ops it has; weights must be the same on all ranks. group: a process
    group, or None for all processes.

    `forward(x, positions, cache, attention, record, indices)` is DSALayer's, for x [n, dim] and positions int [n] of
    this rank's rows, `Zigzag(T, size).rows(rank)` of T packed tokens; n may be 0. All ranks must call it. Indices in
    the record are rows of the sequence, and "end" is there beside "start". cache: an empty ShardedCache, which keeps
    the rank's own rows for `ShardedLayer`, or None. Without gradients and a record, queries come in blocks of
    `rows_at_once`, which may be set.

    Selections are one rank's, where the projections of fewer rows at a time round alike. Outputs and gradients are one
    rank's up to rounding, and the same bits each time for one size of the group.

    Raises: as DSALayer, and for shares that are not Zigzag's, on all ranks alike; ValueError for what ranks brought
    otherwise; RuntimeError where another rank has ended or does not come.
    """

    rows_are_last = False
    rows_at_once = 4096  # queries of a call without gradients and without a record

    def __init__(self, layer: DSALayer, group: dist.ProcessGroup | None = None) -> None:
        take_over(self, layer, group)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: ShardedCache | None = None,
        attention: str = "sparse",
        record: list[dict] | None = None,
        indices: Tensor | None = None,
    ) -> Tensor:
        """Attend from this rank's rows and return them, [n, dim]; all ranks call it."""
        with self.ranks.failing_together():
            self._check(x, positions, None, attention, record)
            if cache is not None:
                self._check_cache(cache, x)
                if not isinstance(cache, ShardedCache) or cache.length:
                    raise ValueError("cache must be an empty ShardedCache, or None")
                cache.check_own_room(len(x))
        same = {
            "call": "gathered keys", "attention": attention, "cache": cache is not None, "record": record is not None,
            "dtype": str(x.dtype), "index_topk": self.config.index_topk, "gradients": torch.is_grad_enabled(),
            "config": zlib.crc32(repr(self.config).encode()), "checked": values_readable(positions),
        }  # fmt: skip
        counts = [own["rows"] for own in self.ranks.agree(same, {"rows": len(x)})]
        self.shares = Zigzag(sum(counts), self.ranks.size)
        wanted = [self.shares.count(rank) for rank in range(self.ranks.size)]
        if counts != wanted or not sum(counts):  # on all ranks alike
            raise ValueError(f"x must hold {wanted} rows on the ranks, those of a Zigzag of at least 1, got {counts}")
        self.block, self.everyone = slice(None), None
        try:
            with self.ranks.failing_together():
                if record is None and serves(self, x, attention):
                    self._check_shared(indices, positions, None, attention)
                    return self._prefill(x, positions, cache, indices)
                return super().forward(x, positions, cache, attention, record, indices)
        finally:
            self.everyone = None  # the memory of all keys

    def _prefill(self, x, positions, cache, indices) -> Tensor:
        """All keys, and then the queries block by block, each of which finds them in `_all_rows`."""
        n, rows = len(x), LayerCache(self.config, max(1, len(x)), x.dtype, x.device, self.indexer is not None)
        blocks = [slice(first, min(first + self.rows_at_once, n)) for first in range(0, max(1, n), self.rows_at_once)]
        self._ranges(positions, None)  # which looks at all positions
        for block in blocks:
            slots = torch.arange(block.start, block.stop, device=x.device)
            with unchecked_values():
                append_latents(self, self.kv_a_proj_with_mqa(x[block]), rows, slots, positions[block])
                if self.indexer is not None:  # its keys alone: queries from the block's end on
                    q_latent = query_latent(self, x[block])
                    index_rows(self, x[block], q_latent, rows, slots, positions[block], len(slots))
            rows.length = block.stop
        self.everyone = self._gathered(cache, *rows.rows())
        outs = []
        for self.block in blocks:
            shared = None if indices is None else indices[self.block]
            outs.append(prefill_step(self, x[self.block], positions[self.block], None, shared, False)[0])
        return torch.cat(outs)

    def _check_positions(self, positions, cache) -> None:
        """They are checked together with the other ranks', in `_all_rows`."""

    def _row_starts(self, positions, cache) -> Tensor:
        return self.shares.rows(self.ranks.rank, positions.device)[self.block] - positions

    def _ranges(self, positions, cache) -> dict[str, Tensor]:
        start = self._row_starts(positions, cache)
        if self.everyone is None:  # the whole share
            self.runs = self._runs(start, positions) if values_readable(positions) else []
        return {"start": start.to(torch.int32), "end": (start + positions + 1).to(torch.int32)}

    def _all_rows(self, cache, kv, k_idx, k_scale):
        return self._gathered(cache, kv, k_idx, k_scale) if self.everyone is None else self.everyone

    def _gathered(self, cache, kv, k_idx, k_scale) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All ranks' rows, in the sequence's order; this rank's go into its cache too, if there is one."""
        check_finite(" in the rows of new tokens", k_idx=k_idx, k_scale=k_scale)
        rows = [tensor for tensor in (kv, k_idx, k_scale) if tensor is not None]
        kinds = [[str(tensor.dtype), list(tensor.shape[1:]), tensor.requires_grad] for tensor in rows]
        runs = [own["runs"] for own in self.ranks.agree({"rows": kinds}, {"runs": self.runs})]
        check_runs(runs, self.ranks.size)
        if cache is not None:
            places = self.shares.rows(self.ranks.rank)
            cache.append_own(places, self.shares.T, *(None if x is None else x.detach() for x in (kv, k_idx, k_scale)))
        everyone = iter(gather_rows(rows, self.shares, self.ranks))
        return tuple(None if tensor is None else next(everyone) for tensor in (kv, k_idx, k_scale))

    def _runs(self, start: Tensor, positions: Tensor) -> list[list[int]]:
        """[start of the first row, whether that is a sequence's first, start of the last row] of each chunk that has
        rows. Raises: ValueError for positions that do not count up, or a start before the first row."""
        found, first = [], 0
        for chunk in self.shares.chunks(self.ranks.rank):
            starts, places = start[first : first + len(chunk)], positions[first : first + len(chunk)]
            bad = (starts < 0) | (places < 0)
            bad[1:] |= (starts[1:] != starts[:-1]) & (places[1:] != 0)
            if bad.any():
                t = int(bad.nonzero()[0])
                raise ValueError(
                    f"positions must count up from 0 in each packed sequence, got {int(places[t])} in row {first + t}"
                )
            if len(chunk):
                found.append([int(starts[0]), int(places[0] == 0), int(starts[-1])])
            first += len(chunk)
        return found


def check_runs(runs: list[list[list[int]]], size: int) -> None:
    """Each chunk must go on where the one before it ended, or begin a sequence. runs: each rank's, or nothing."""
    if not any(runs):
        return
    ahead = [own[0] for own in runs if own]  # in the order of chunks: the ranks' first ones, then back
    behind = [own[1] for own in reversed(runs) if len(own) > 1]
    before = 0
    for first, begins, last in ahead + behind:
        if first != before and not begins:
            raise ValueError("positions must count on from one rank's rows to the next one's, got another sequence's")
        before = last


def gather_rows(rows: list[Tensor], shares: Zigzag, ranks: Ranks) -> list[Tensor]:
    """Every rank's rows in the sequence's order: [T, ...] for each of rows [n, ...], differentiable where that is.

    One all-gather, of bytes. Backward, each of them is one reduce-scatter in fp32 (fp64 for fp64).
    """
    everyone = ranks.all_gather(pack(rows, shares.longest))
    found, first = [], 0
    for own in rows:
        width = row_bytes(own)
        values = shares.in_order(everyone[:, :, first : first + width]).view(own.dtype)
        whole = values.reshape(shares.T, *own.shape[1:])
        found.append(_Gathered.apply(own, whole, shares, ranks) if own.requires_grad else whole)
        first += width
    return found


class _Gathered(torch.autograd.Function):
    """The rows of all as a function of this rank's: every rank's loss may depend on them, so gradients are summed."""

    @staticmethod
    def forward(ctx, own, everyone, shares, ranks):
        ctx.shares, ctx.ranks, ctx.dtype = shares, ranks, own.dtype
        return everyone.view_as(everyone)

    @staticmethod
    @once_differentiable
    def backward(ctx, gradient):
        wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
        summed = ctx.ranks.reduce_scatter(ctx.shares.by_rank(wide))
        return summed[: ctx.shares.count(ctx.ranks.rank)].to(ctx.dtype), None, None, None
