"""Attention of up to 32 heads over one short part of a list, up to 128 FP8 rows of a paged cache, for a decode step.

There the card waits rather than works, and a program is a chain: slots, rows, products, softmax, products, stores. So
nothing is handed from warpgroup to warpgroup as in `paged_sparse_attention`, for which this kernel takes over where a
part is a single one of its steps. A program takes one part of one query; each of its 256 threads asks at once for all
that it will need of two rows, 64 words, and widens them as they come.

The products are transposed: keys on the rows of the logits, [128, heads], and the value's columns on those of the
output, [512, heads]. A product of the tensor cores has 64 rows, but 8 columns or more: so 16 heads cost a quarter of
64, and as many registers. The keys' buffer is an operand of both: as it lies for the logits, transposed for the output.

*Programmatic dependent launch.* Launched so, a kernel need not wait until the one before it in the stream has ended: it
sets up its barriers, and then `gdc_wait` waits for all that the others wrote. By `gdc_launch_dependents` it says that
the next one, the merge, may do likewise.

Measured 2026-11-26 on one H200, k = 2048 in 16 parts, microseconds a call in a CUDA graph with the merge: triton 3.7.1
and 3.6.0 / `paged_sparse_attention` in its place / FlashMLA, padded to 64 heads. 16 heads: 1 query 9.3, 9.6 / 14.3 /
17.0, 8 queries 10.8, 11.2 / 15.2 / 19.3, 64 queries 78.2, 81.1 / 79.2 / 65.2; 32 heads, 4 queries 11.5, 11.8 / 14.7 /
17.0. Of the 9.3 the merge alone takes 2.2, all but the merge 7.3, and slots, rows and softmax, without conversion and
products, 4.4.
Tried: products that begin while later columns are still widened, 0.2 slower; 64 heads at once, for 128 heads 14.6 /
15.7 with one query, 38.3 / 37.7 with 8, 303 / 266 with 64; 64 columns a program of the merge, 9.0 with one query, 11.2
with 8; 256 columns, 11.5 and 13.2.
"""

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    async_copy,
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..runtime import aligned
from .fp8_rows import ROW, copy_rope, load_piece, load_scale, piece_layout, rope_layout, store_piece
from .sparse_shared import SWIZZLED, barrier
from .sparse_tiles import LN_2, LOG2_E, NEVER, exp2, raised

D = 576
MOST_HEADS = 32  # `paged_sparse_attention` takes tiles of 64; here one query gained 7 % so, and 64 queries lost 14 %
KEYS = gl.constexpr(128)  # of a part, at most
WARPS = gl.constexpr(8)  # two warpgroups, each with 64 keys of the logits and every other 64 columns of the output
PIECE = gl.constexpr(piece_layout(8))  # of 128 rows
ROPE = gl.constexpr(rope_layout(8))


@gluon.jit
def _paged_sparse_part(
    q256, q64, kv_ptr, slots_ptr, out_ptr, lse_ptr, scale, heads, k, places,
    HEADS: gl.constexpr, SPLITS: gl.constexpr,
):  # fmt: skip
    """HEADS: at least those of a query, 16 or 32. SPLITS: if not 1, out_ptr and lse_ptr are those of the parts."""
    PRODUCT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [WARPS, 1], [16, HEADS, 16])
    KEY: gl.constexpr = gl.SliceLayout(1, PRODUCT)
    HEAD: gl.constexpr = gl.SliceLayout(0, PRODUCT)
    q_left = gl.allocate_shared_memory(gl.bfloat16, [HEADS, 256], SWIZZLED)
    q_right = gl.allocate_shared_memory(gl.bfloat16, [HEADS, 256], SWIZZLED)
    q_rope = gl.allocate_shared_memory(gl.bfloat16, [HEADS, 64], SWIZZLED)
    keys = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 512], SWIZZLED)
    rope = gl.allocate_shared_memory(gl.bfloat16, [KEYS, 64], SWIZZLED)
    q_full = barrier(1)
    gdc_wait()
    gdc_launch_dependents()

    part, t = gl.program_id(0) % SPLITS, gl.program_id(0) // SPLITS
    row0 = t * heads
    list_ptr = slots_ptr + t.to(gl.int64) * k + part * places
    length = gl.minimum(places, k - part * places)  # may be negative, behind the list's end

    j = gl.arange(0, KEYS, layout=gl.SliceLayout(1, PIECE))
    s = gl.load(list_ptr + j, j < length, -1)
    j = gl.arange(0, KEYS, layout=KEY)
    valid = gl.where(gl.load(list_ptr + j, j < length, -1) >= 0, 0.0, float("-inf"))
    mbarrier.expect(q_full, HEADS * 576 * 2)
    tma.async_copy_global_to_shared(q256, [row0, 0], q_full, q_left)
    tma.async_copy_global_to_shared(q256, [row0, 256], q_full, q_right)
    tma.async_copy_global_to_shared(q64, [row0, 512], q_full, q_rope)
    row_ptr = kv_ptr + s.to(gl.int64) * ROW
    pieces, scales = (), ()
    for p in gl.static_range(8):
        if p % 2 == 0:
            scales = scales + (load_scale(row_ptr, s >= 0, p * 64),)
        pieces = pieces + (load_piece(row_ptr, s >= 0, p * 64, PIECE),)
    copy_rope(rope, kv_ptr, s, ROPE)
    async_copy.commit_group()

    for p in gl.static_range(8):
        store_piece(keys, p * 64, pieces[p], scales[p // 2])
    async_copy.wait_group(0)
    mbarrier.wait(q_full, 0)
    fence_async_shared()  # stores take another path than the tensor cores read

    # While a product runs, nothing may be asked of the compiler that takes shared memory, like a sum over warps: it
    # gives out again what no later line names, and does not know that the product still reads it.
    logits = gl.zeros([KEYS, HEADS], gl.float32, layout=PRODUCT)
    logits = warpgroup_mma(keys.slice(0, 256, 1), q_left.permute((1, 0)), logits, use_acc=False, is_async=True)
    logits = warpgroup_mma(keys.slice(256, 256, 1), q_right.permute((1, 0)), logits, is_async=True)
    logits = warpgroup_mma(rope, q_rope.permute((1, 0)), logits, is_async=True)
    logits = warpgroup_mma_wait(0, deps=(logits,)) * scale + valid[:, None]  # in base 2

    m = raised(gl.full([HEADS], NEVER, gl.float32, layout=HEAD), gl.max(logits, 0))
    p = exp2(logits - m[None, :])
    total = gl.sum(p, 0)
    probabilities = rope._reinterpret(gl.bfloat16, [KEYS, HEADS], gl.NVMMASharedLayout(2 * HEADS, 16, 2))
    probabilities.store(p.to(gl.bfloat16))  # both warpgroups have read the rope columns: `gl.max` made them meet
    fence_async_shared()
    out = gl.zeros([512, HEADS], gl.float32, layout=PRODUCT)
    out = warpgroup_mma(keys.permute((1, 0)), probabilities, out, use_acc=False, is_async=True)
    out = warpgroup_mma_wait(0, deps=(out,))

    divisor = gl.where(total == 0.0, 1.0, total)
    out = out * (1.0 / divisor)[None, :]
    lse = gl.where(total == 0.0, float("-inf"), (m + gl.log2(divisor)) * LN_2)
    if SPLITS == 1:
        out = out.to(gl.bfloat16)
    else:
        row0 = (t * SPLITS + part) * heads
    h = gl.arange(0, HEADS, layout=HEAD)
    gl.store(lse_ptr + row0 + h, lse, mask=h < heads)
    column = gl.arange(0, 512, layout=gl.SliceLayout(1, PRODUCT))
    gl.store(out_ptr + ((row0 + h).to(gl.int64) * 512)[None, :] + column[:, None], out, (h < heads)[None, :])


def launch(q, kv_pages, slots, scale, splits, places, out, lse):
    """As `paged_sparse_attention.launch`, where out and lse are those of the parts if there is more than one.

    H is up to MOST_HEADS; places: of a part, up to KEYS.
    """
    T, H, _ = q.shape
    heads = 16 if H <= 16 else MOST_HEADS
    q, slots = aligned(q), slots.contiguous()
    q256, q64 = (TensorDescriptor(q, [T * H, D], [D, 1], [heads, columns], SWIZZLED.value) for columns in (256, 64))
    _paged_sparse_part[(T * splits,)](
        q256, q64, kv_pages.view(torch.int32), slots, out, lse, scale * LOG2_E.value, H, slots.shape[1], places,
        HEADS=heads, SPLITS=splits,
        num_warps=WARPS.value, launch_pdl=True,
    )  # fmt: skip
