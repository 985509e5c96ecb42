"""Gathered keys: each rank has its share of the queries, and for one layer at a time the keys of all.

    own rows          kv [n, D], k_idx [n, Di], k_scale [n] of the rank's tokens, which `Zigzag` gave to it
    agree             sizes, dtypes and settings, before anything large is sent
    one all-gather    [latent | rope | index key], in bytes: 1408 a token in V3.2's bf16, 1284 with FP8 index keys
    in order          the gathered chunks as rows of the sequence, once; padding is left behind here
    select, attend    each own row with its range [start, end) of rows of the sequence: the layer's steps as ever
    backward          one reduce-scatter in fp32 of the gradient of the gathered rows, dkv or dk_idx

Without gradients, all keys are made and gathered first, and then the queries come in blocks of `rows_at_once`, so that
a share of any length needs memory for the keys of a layer and the queries of one block. A prompt may come in parts:
each keeps its rows in a `ShardedCache`, and the next part's all-gather brings those of all earlier ones, with places.

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

from ..contracts import check_count, check_finite, unchecked_values, values_readable
from ..nn.cache import LayerCache, all_or_nothing
from ..nn.decode import append_latents, query_latent
from ..nn.layer import DSALayer
from ..nn.prefill import attend_step, index_rows, serves
from .layer import take_over
from .ranks import Ranks, columns, pack, row_bytes
from .sharded_cache import ShardedCache
from .zigzag import Zigzag


class GatheredLayer(DSALayer):
    """A `DSALayer` of the same weights, each rank with its rows of x, all ranks with the keys of all.

    layer: the DSALayer whose weights, names and ops it has; weights must be the same on all ranks. group: a process
    group, or None for all processes.

    `forward(x, positions, cache, attention, record, indices)` is DSALayer's, for x [n, dim] and positions int [n] of
    this rank's rows, `Zigzag(T, size).rows(rank)` of T packed tokens; n may be 0. All ranks must call it. Indices in
    the record are rows of the sequence, and "end" is there beside "start". cache: a ShardedCache, which keeps the
    rank's own rows, for the next part of a prompt or for `ShardedLayer`, or None. With one, x is the rank's share of
    the next T tokens of one sequence, positions their places in it, and there are no gradients. Without gradients and a
    record, queries come in blocks of `rows_at_once`, which may be set.

    Selections are one rank's, where the projections of fewer rows at a time round alike. Outputs and gradients are one
    rank's up to rounding, and the same bits each time for one size of the group.

    Raises: as DSALayer, and for shares that are not Zigzag's, on all ranks alike; ValueError for what ranks brought
    otherwise; RuntimeError where another rank has ended or does not come. Where one rank alone fails behind the
    exchange, its memory being full, the others' caches have grown: the next call is refused on all, until all have been
    truncated to one length.
    """

    rows_are_last = False
    rows_at_once = 4096  # queries of a call without gradients and without a record
    keys_at_once = 16384  # rows of keys there, which take little work each: a GPU would wait for the host's launches

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
            for name in ("rows_at_once", "keys_at_once"):
                check_count(name, getattr(self, name))
            if cache is not None:
                if not isinstance(cache, ShardedCache):
                    raise TypeError(f"cache must be a ShardedCache, got {type(cache).__name__}")
                self._check_cache(cache, x)
                if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *self.parameters())):
                    raise ValueError("x and weights must not require gradients, which a cache does not keep")
                cache.check_own_room(len(x))
        self.before = 0 if cache is None else cache.length
        same = {
            "call": "gathered keys", "layer": self.number, "attention": attention, "cache": cache is not None,
            "record": record is not None, "dtype": str(x.dtype),
            "index_topk": self.config.index_topk, "gradients": torch.is_grad_enabled(),
            "config": zlib.crc32(repr(self.config).encode()), "checked": values_readable(positions),
            "length": self.before, "blocks": [self.rows_at_once, self.keys_at_once],
        }  # fmt: skip
        counts = [own["rows"] for own in self.ranks.agree(same, {"rows": len(x)})]
        self.shares = Zigzag(sum(counts), self.ranks.size)
        wanted = [self.shares.count(rank) for rank in range(self.ranks.size)]
        if counts != wanted or not sum(counts):  # on all ranks alike
            raise ValueError(f"x must hold {wanted} rows on the ranks, those of a Zigzag of at least 1, got {counts}")
        with self.ranks.failing_together():
            if record is None and serves(self, x, attention):
                self._check_shared(indices, positions, None, attention)
                with all_or_nothing([] if cache is None else [cache], None):
                    return self._prefill(x, positions, cache, indices)
            return super().forward(x, positions, cache, attention, record, indices)

    def _prefill(self, x, positions, cache, indices) -> Tensor:
        """The keys of all tokens, and then the queries block by block, each with the keys up to its last row's own."""
        n, indexing, ranges = len(x), self.indexer is not None, self._ranges(positions, cache)
        rows = LayerCache(self.config, max(1, n), x.dtype, x.device, indexing)
        q_latent = x.new_empty(n, self.config.q_lora_rank)
        for block in blocks(n, self.keys_at_once, self.shares.longest):
            slots = torch.arange(block.start, block.stop, device=x.device)
            with unchecked_values():
                append_latents(self, self.kv_a_proj_with_mqa(x[block]), rows, slots, positions[block])
                q_latent[block] = query_latent(self, x[block])
                if indexing:  # its keys alone: queries from the block's end on
                    index_rows(self, x[block], q_latent[block], rows, slots, positions[block], len(slots))
            rows.length = block.stop
        own = rows.rows()
        check_finite(" in the rows of new tokens", k_idx=own[1], k_scale=own[2], q_latent=q_latent)
        everyone, places, y = self._all_rows(cache, *own), self._places(), torch.empty_like(x)
        for block in blocks(n, self.rows_at_once, self.shares.longest):
            here, turns = (x[block], q_latent[block]), positions[block]
            with unchecked_values():
                scored = index_rows(self, *here, None, None, turns, 0) if indexing else (None, None)
            seen = {name: bound[block] for name, bound in ranges.items()}
            last = int(places[block.stop - 1]) if n else 0
            keys = [None if part is None else part[: last + 1] for part in everyone]
            shared = None if indices is None else indices[block]
            y[block] = attend_step(self, (here[1], *scored), keys, turns, seen, shared)[0]
        return y

    def _check_positions(self, positions, cache) -> None:
        """They are checked together with the other ranks', in `_all_rows`."""

    def _places(self, device: torch.device | str = "cpu") -> Tensor:
        """Which of all rows this rank's are, those of its cache apart: int64 [n]."""
        return self.before + self.shares.rows(self.ranks.rank, device)

    def _row_starts(self, positions, cache) -> Tensor:
        return self._places(positions.device) - positions

    def _ranges(self, positions, cache) -> dict[str, Tensor]:
        start = self._row_starts(positions, cache)
        self.runs = self._runs(start, positions, cache) if values_readable(positions) else []
        return {"start": start.to(torch.int32), "end": (start + positions + 1).to(torch.int32)}

    def _all_rows(self, cache, kv, k_idx, k_scale) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All ranks' rows, in the sequence's order, those of earlier tokens too, where there is a cache."""
        check_finite(" in the rows of new tokens", k_idx=k_idx, k_scale=k_scale)
        new = kv, k_idx, k_scale
        if cache is not None:
            cache.append_own(self._places(), self.before + self.shares.T, *new)
        rows = [tensor for tensor in (new if cache is None else cache.rows()) if tensor is not None]
        kinds = [[str(tensor.dtype), list(tensor.shape[1:]), tensor.requires_grad] for tensor in rows]
        told = self.ranks.agree({"rows": kinds}, {"runs": self.runs, "held": len(rows[0])})
        check_runs([own["runs"] for own in told], self.ranks.size)
        if cache is None:
            everyone = gather_rows(rows, self.shares, self.ranks)
        else:
            held = [own["held"] for own in told]
            if sum(held) != cache.length:
                raise ValueError(f"caches must hold {cache.length} rows in all, one of each token, got {held}")
            everyone = gather_held(rows, cache.places[: len(rows[0])], held, self.ranks)
        everyone = iter(everyone)
        return tuple(None if tensor is None else next(everyone) for tensor in new)

    def _runs(self, start: Tensor, positions: Tensor, cache) -> list[list[int]]:
        """[start of the first row, whether that is a sequence's first, start of the last row] of each chunk that has
        rows. Raises: ValueError for positions that do not count up, or a start before the first row; behind a cache's
        tokens, for those that do not count on."""
        found, first = [], 0
        for chunk in self.shares.chunks(self.ranks.rank):
            starts, places = start[first : first + len(chunk)], positions[first : first + len(chunk)]
            bad = (starts < 0) | (places < 0)
            bad[1:] |= (starts[1:] != starts[:-1]) & (places[1:] != 0)
            if cache is not None:
                bad |= starts != 0
            if bad.any():
                t = int(bad.nonzero()[0])
                wanted = "count up from 0 in each packed sequence" if cache is None else "continue the cache"
                raise ValueError(f"positions must {wanted}, got {int(places[t])} in row {first + t}")
            if len(chunk):
                found.append([int(starts[0]), int(places[0] == 0), int(starts[-1])])
            first += len(chunk)
        return found


def blocks(n: int, at_once: int, longest: int) -> list[slice]:
    """n rows, so many at a time. As many blocks as the rank with the longest share has, the last perhaps empty: weights
    may be sharded over the ranks (FSDP), where every use of a module is a collective."""
    return [slice(min(first, n), min(first + at_once, n)) for first in range(0, longest, at_once)]


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

    Raises: ValueError for rows of another number than this rank's share, on this rank alone.
    """
    wanted = shares.count(ranks.rank)
    if not rows or any(own.dim() == 0 or len(own) != wanted for own in rows):
        raise ValueError(f"rows must be tensors of {wanted} rows, got shapes {[list(own.shape) for own in rows]}")
    everyone, found = ranks.all_gather(pack(rows, shares.longest)), []
    for own, part in zip(rows, columns(everyone.flatten(0, 1), [row_bytes(own) for own in rows]), strict=True):
        whole = shares.in_order(part.unflatten(0, everyone.shape[:2])).view(own.dtype).reshape(shares.T, *own.shape[1:])
        found.append(_Gathered.apply(own, whole, shares, ranks) if own.requires_grad else whole)
    return found


def gather_held(rows: list[Tensor], places: Tensor, counts: list[int], ranks: Ranks) -> list[Tensor]:
    """Every rank's rows in the order of their places, which are all of 0 to S - 1: [S, ...] for each of rows [n, ...].

    places: int32 [n], of this rank's rows; counts: the n of every rank. One all-gather, of bytes, the places' too.

    Raises: ValueError for places that ranks have twice, on all ranks alike (not inside `unchecked_values`).
    """
    parts = [*rows, places]
    longest, widths = max(counts), [row_bytes(part) for part in parts]
    *held, placed = columns(ranks.all_gather(pack(parts, longest)).flatten(0, 1), widths)
    firsts = [rank * longest for rank in range(ranks.size)]
    there = [torch.arange(first, first + n, device=places.device) for first, n in zip(firsts, counts, strict=True)]
    there = torch.cat(there)  # rows that are no padding
    order = torch.full_like(there, -1)
    order[placed[there].view(torch.int32)[:, 0].long()] = there
    if values_readable(order) and (order < 0).any():
        raise ValueError(f"caches must hold each token once, got none of token {int((order < 0).nonzero()[0])}")
    return [
        part[order].view(own.dtype).reshape(len(order), *own.shape[1:]) for part, own in zip(held, rows, strict=True)
    ]


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
