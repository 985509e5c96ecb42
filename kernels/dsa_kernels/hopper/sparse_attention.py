"""Attention over gathered rows on Hopper's tensor cores, V3.2's sizes: rows of 576 columns, of which 512 are the value.

A tile is 64 rows of q: 64 heads of one query, or with fewer heads the G = 64 / H neighbouring queries that share the
union of their lists (`unions`). A program stays on its multiprocessor and takes the next tile from a counter when it
has done one. Three warpgroups work on a tile in steps of 128 keys, called key blocks 0 and 1:

- `gather` fetches q by TMA and the selected rows by 16-byte asynchronous copies, in quarters: 64 keys, half of their
  columns. It waits until a quarter is free, refills it, and is at the next tile's keys while the other two still finish
  this one.
- `left` multiplies q by block 0 and owns output columns 0 to 255; `right` takes block 1 and columns 256 to 511. Each
  needs the probabilities P of both blocks for its half of the values V: its own come from registers, the other's
  through shared memory. So no logit is computed twice, and one's softmax hides behind the other's products.

    left   | q·k0 | softmax 0 | P0·V0 left | P1·V1 left | q·k0 of the next step
    right         | q·k1 | softmax 1 | P1·V1 right | P0·V0 right | q·k1 of the next step

The running maximum passes from left to right and back. It moves only when a logit exceeds it by more than 8 in base 2:
probabilities up to 2^8 instead of 1 cost no precision, and hardly ever are the accumulators rescaled, which one branch
then skips. `left` hands P0 over before its own product is done, and products begin when half of their columns have
come.

A step must move 128 · 1152 bytes, from L2 where it can, and takes 2 · 64 · 128 · (576 + 512) FLOPs, 4352 clocks of the
tensor cores. `python -m dsa_bench sparse_attention --peers` measures it; figures/ keeps the record.

Read `sparse_shared` first: what the warpgroups share, and how they wait for each other. `sparse_products` holds the
steps, `sparse_tiles` what they are made of, in registers. The chapter kernels/book/sparse_attention.md draws the
clocks, the memory and the barriers.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from ..cards import on_hopper
from ..runtime import aligned, cdiv, multiprocessors
from .sparse_products import left_steps, right_steps, store_lse, sum_of_both
from .sparse_shared import BK, SWIZZLED, allocate, copy_columns, next_turn
from .sparse_tiles import (
    COPY,
    LOG2_E,
    OUTPUT,
    ROWS,
    bit_of_query,
    selected,
    store_output,
    tile_at,
)
from .unions import unions

D, V = 576, 512
LIST_ENTRIES = 1 << 25  # of unions in memory at a time: 256 MB


@gluon.jit
def gather(
    shared, q256, q64, kv_ptr, lists_ptr, lengths_ptr, counter_ptr, k, tiles,
    GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """Fills the quarters, in the order in which they are used and come free."""
    q, k0, k1 = shared.q, shared.k0, shared.k1
    places = gl.arange(0, 64, layout=gl.SliceLayout(1, COPY))
    columns = gl.arange(0, 64, layout=gl.SliceLayout(0, COPY))
    turn = 0
    q_turn = 0
    number = gl.program_id(0)
    while number < tiles:
        tile = tile_at(number, lengths_ptr, k, GH, TILES, GROUPED)
        q.acquire_free(q_turn)
        q.fill(q256, q64, tile.row0, number)
        q_turn = next_turn(q_turn)
        list_ptr = lists_ptr + tile.group.to(gl.int64) * k
        for step in range(tile.steps):
            j = step * 2 * BK + places
            rows0 = selected(kv_ptr, list_ptr, j, tile.length, columns, GROUPED)
            rows1 = selected(kv_ptr, list_ptr, j + BK, tile.length, columns, GROUPED)

            k0.left.acquire_free(turn)
            k0.left.send_valid(k0.valid, rows0.valid)
            k0.left.copy(rows0.source, rows0.there)
            k0.left.release_full()

            k1.right.acquire_free(turn)
            k1.right.send_valid(k1.valid, rows1.valid)
            k1.right.copy(rows1.source + 256, rows1.there)
            copy_columns(k1.rope.index(0), rows1.source + 512, rows1.there)
            k1.right.release_full()

            k0.right.acquire_free(turn)
            k0.right.copy(rows0.source + 256, rows0.there)
            copy_columns(k0.rope.index(0), rows0.source + 512, rows0.there)
            k0.right.release_full()

            k1.left.acquire_free(turn)
            k1.left.copy(rows1.source, rows1.there)
            k1.left.release_full()
            turn = next_turn(turn)
        number = gl.atomic_add(counter_ptr, 1, sem="relaxed") + gl.num_programs(0)  # the first ones go by program_id
    q.acquire_free(q_turn)
    q.no_more(tiles)


@gluon.jit
def left(
    shared, out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale,
    G: gl.constexpr, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """All tiles: the first step's logits, the steps, the sums; columns 0 to 255 of out, and lse."""
    q = shared.q
    r = gl.arange(0, 64, layout=ROWS)
    bit = bit_of_query(r, G, GH)
    turn = 0
    tile_turn = 0
    number = q.acquire_full(tile_turn)
    while number < tiles:
        tile = tile_at(number, lengths_ptr, k, GH, TILES, GROUPED)
        n_rows = gl.minimum(GH - number % TILES * 64, all_rows - tile.row0)
        state, turn = left_steps(shared, bit, number, tile.steps, turn, scale, GROUPED, OUTPUT)
        total = sum_of_both(state, shared.left_sum, shared.right_sum, tile_turn)
        store_lse(state, total, lse_ptr, tile.row0, n_rows, r)
        store_output(state.acc, total, out_ptr, tile.row0, n_rows, 0)
        tile_turn = next_turn(tile_turn)
        number = q.acquire_full(tile_turn)


@gluon.jit
def right(
    shared, out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale,
    G: gl.constexpr, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """All tiles: the steps, the sums, columns 256 to 511 of out."""
    q = shared.q
    bit = bit_of_query(gl.arange(0, 64, layout=ROWS), G, GH)
    turn = 0
    tile_turn = 0
    number = q.acquire_full(tile_turn)
    while number < tiles:
        tile = tile_at(number, lengths_ptr, k, GH, TILES, GROUPED)
        n_rows = gl.minimum(GH - number % TILES * 64, all_rows - tile.row0)
        state, turn = right_steps(shared, bit, tile.steps, turn, scale, GROUPED, OUTPUT)
        total = sum_of_both(state, shared.right_sum, shared.left_sum, tile_turn)
        store_output(state.acc, total, out_ptr, tile.row0, n_rows, 256)
        tile_turn = next_turn(tile_turn)
        number = q.acquire_full(tile_turn)


@gluon.jit
def _sparse_attention(
    q256, q64, kv_ptr, lists_ptr, lengths_ptr, counter_ptr, out_ptr, lse_ptr, scale, k, tiles, all_rows,
    G: gl.constexpr, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr,
):  # fmt: skip
    """G: queries that share a list; if GROUPED, more than one, and the lists are unions. GH: their rows of q, G · H.
    TILES: of 64 rows in GH. tiles: of all queries."""
    shared = allocate(GROUPED)
    gl.warp_specialize(
        [
            (left, (shared, out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale, G, GH, TILES, GROUPED)),
            (right, (shared, out_ptr, lse_ptr, lengths_ptr, k, tiles, all_rows, scale, G, GH, TILES, GROUPED)),
            (gather, (shared, q256, q64, kv_ptr, lists_ptr, lengths_ptr, counter_ptr, k, tiles, GH, TILES, GROUPED)),
        ],
        [4, 4],  # warps of right and gather; left is what the launch's num_warps are for
        [216, 72],  # and their registers a thread; left gets what is left of 3 · maxnreg
    )


def _worth_sharing(queries, k, S, multiprocessors):
    """Whether a tile's queries should share the union of their lists. Decided by sizes alone: the host does not wait to
    learn how much the lists have in common.

    Building the unions takes time in proportion to S, at S = 128 · k a quarter of what attention over separate lists
    takes; lists with nothing in common lose that much. A few queries are better spread over the card.
    """
    return queries > 2 * multiprocessors and S <= 128 * k


def cannot_serve(q, v_dim):
    """Why this variant cannot attend with these queries, or None."""
    if not on_hopper(q):
        return "needs a GPU of compute capability 9.0"
    if q.dtype != torch.bfloat16:
        return f"needs bfloat16, got {str(q.dtype).removeprefix('torch.')}"
    if (q.shape[-1], v_dim) != (D, V):
        return f"needs D = {D} and v_dim = {V}, got {q.shape[-1]} and {v_dim}"
    return None


def sparse_attention(q, kv, indices, scale, out, lse, share=None):
    """Write attention over the selected rows to out and lse. `dsa_kernels.sparse_attention` has checked the arguments.

    share: whether the queries of a tile share the union of their lists (fewer than 33 heads); None decides by size.
    Where they do, a key that a row holds twice counts once, and NaN or infinity in a row of kv reaches every query of
    the tile.
    """
    T, H, _ = q.shape
    S, k = kv.shape[0], indices.shape[1]
    if share is None:
        share = _worth_sharing(T, k, S, multiprocessors(q))
    G = min(32, max(1, 64 // H)) if share else 1  # 32: one bit each in an int32
    q, kv, indices = (aligned(x) for x in (q, kv, indices))
    chunk = T if G == 1 else max(1, LIST_ENTRIES // min(G * k, S)) * G
    for first in range(0, T, chunk):
        rows = slice(first, first + chunk)
        lists, lengths = (indices, indices) if G == 1 else unions(indices[rows], S, G)  # G = 1 reads no lengths
        _launch(q[rows], kv, lists, lengths, scale, out[rows], lse[rows], G)


def _launch(q, kv, lists, lengths, scale, out, lse, G):
    T, H, _ = q.shape
    all_rows, tiles_of_group = T * H, cdiv(H, 64)
    tiles = cdiv(T, G) * tiles_of_group
    q256, q64 = (TensorDescriptor(q, [all_rows, D], [D, 1], [64, columns], SWIZZLED.value) for columns in (256, 64))
    counter = torch.zeros(1, dtype=torch.int32, device=q.device)
    _sparse_attention[(min(tiles, multiprocessors(q)),)](
        q256, q64, kv, lists, lengths, counter, out, lse, scale * LOG2_E.value, lists.shape[1], tiles, all_rows,
        G=G, GH=G * H, TILES=tiles_of_group, GROUPED=G > 1,
        num_warps=4, maxnreg=168,
    )  # fmt: skip
