"""Pieces of `sparse_attention`: the layouts of a tile of 64 rows, its softmax, the copies and products of its halves.

The constants are what Gluon's functions may read: `gl.constexpr`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, warpgroup_mma

BK = gl.constexpr(64)  # keys of a block; a step takes two
NEVER = gl.constexpr(-1e30)  # below every logit, and finite: a row that has seen nothing yields 0 and no NaN
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
WEIGHTS = gl.constexpr(gl.DotOperandLayout(0, OUTPUT.value, 2))
ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS.value))
KEYS = gl.constexpr(gl.SliceLayout(0, LOGITS.value))
SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# [64, 256] with 8 neighbouring columns in a thread, for 16-byte stores, and the layout half-way to it from OUTPUT:
# each of the two steps swaps one bit of the lane with one of the register, which is a shuffle and needs no memory.
HALF_WAY = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [8, 0], [0, 16], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 4], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)
WIDE = gl.constexpr(
    gl.DistributedLinearLayout(
        reg_bases=[[0, 1], [0, 2], [0, 4], [8, 0], [0, 32], [0, 64], [0, 128]],
        lane_bases=[[0, 8], [0, 16], [1, 0], [2, 0], [4, 0]],
        warp_bases=[[16, 0], [32, 0]],
        block_bases=[],
        shape=[64, 256],
    )
)


def _unless_all(neutral, op, n, looked_at):
    """PTX for x = op(x, y) on the n values a thread holds, and its constraints.

    One branch skips them all if the y looked at have the bits `neutral`. Written with `if`, Triton would take a branch
    for the whole warpgroup, and a barrier to agree on it.
    """
    test = " ".join(f"xor.b32 t, ${2 * n + i}, {neutral}; or.b32 any, any, t;" for i in looked_at)
    change = " ".join(f"{op}.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    skip = f".reg .pred p; .reg .b32 any, t; mov.b32 any, 0; {test} setp.eq.b32 p, any, 0; @p bra DONE;"
    return gl.constexpr(f"{{ {skip} {change} DONE: }}"), gl.constexpr(
        ",".join(["=f"] * n + [str(i) for i in range(n)] + ["f"] * n)
    )


# In LOGITS and OUTPUT a thread holds, in this order, two columns of a row, the same two of the row 8 below, and so on.
RESCALE, RESCALE_TYPES = _unless_all("0x3F800000", "mul", 128, (0, 2))  # by 1.0, a factor for each row


@gluon.jit
def exp2(x):
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


@gluon.jit
def rescale(acc, factor, THRESHOLD: gl.constexpr):
    """acc · factor, a factor for each row. With rare rescaling nearly always all are 1."""
    factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    if THRESHOLD > 0.0:
        acc, factor = gl.broadcast(acc, factor)
        return gl.inline_asm_elementwise(
            RESCALE, RESCALE_TYPES, [acc, factor], dtype=gl.float32, is_pure=True, pack=128
        )
    else:
        return acc * factor


@gluon.jit
def raised(m, top, THRESHOLD: gl.constexpr):
    """The running maximum after logits of at most `top`."""
    if THRESHOLD > 0.0:
        return gl.where(top > m + THRESHOLD, top, m)
    else:
        return gl.maximum(m, top)


@gluon.jit
def scaled(logits, scale, valid, bit, GROUPED: gl.constexpr):
    """Logits in base 2; -inf where the key is none (valid = -inf instead of 0), or is not one of this row's query."""
    valid = valid.load(KEYS)
    if GROUPED:
        return gl.where((valid[None, :] & bit[:, None]) != 0, logits * scale, float("-inf"))
    else:
        return logits * scale + valid[None, :]


@gluon.jit
def tile_at(tile, lengths_ptr, k, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr):
    """group (the list it reads), first row of q, length of the list, steps"""
    group = tile // TILES
    length = k
    if GROUPED:
        length = gl.load(lengths_ptr + group)
    return group, group * GH + tile % TILES * 64, length, gl.maximum(1, gl.cdiv(length, 2 * BK))


@gluon.jit
def entries(list_ptr, j, length, GROUPED: gl.constexpr):
    """Places j of a list: the rows (-1 behind the end), and what `scaled` wants to know of them."""
    if GROUPED:
        entry = gl.load(list_ptr + j, j < length, 0xFFFFFFFF)  # -1, and no query's
        return entry.to(gl.int32), (entry >> 32).to(gl.int32)
    else:
        s = gl.load(list_ptr + j, j < length, -1)
        return s, gl.where(s >= 0, 0.0, float("-inf"))


@gluon.jit
def copy_half(half, rope, source, there, ready, first, ROPE: gl.constexpr, EARLY: gl.constexpr):
    """Start the copies of 256 columns of 64 rows (zeros where there is no row), and of the 64 rope columns."""
    for j in gl.static_range(4):
        async_copy.async_copy_global_to_shared(half.slice(64 * j, 64, 1), source + 64 * j, mask=there)
        if EARLY and j == 1:
            async_copy.mbarrier_arrive(ready.index(first), increment_count=False)
    if ROPE:
        async_copy.async_copy_global_to_shared(rope, source + 256, mask=there)
    async_copy.mbarrier_arrive(ready.index(first + 1), increment_count=False)


@gluon.jit
def multiply(acc, q, k, ready, first, parity, FIRST: gl.constexpr, EARLY: gl.constexpr):
    """acc + q · kᵀ over 256 columns, which come in two parts if EARLY. Asynchronous."""
    if EARLY:
        mbarrier.wait(ready.index(first), parity)
        fence_async_shared()
        k_part = k.slice(0, 128, 1).permute((1, 0))
        acc = warpgroup_mma(q.slice(0, 128, 1), k_part, acc, use_acc=not FIRST, is_async=True)
        mbarrier.wait(ready.index(first + 1), parity)
        fence_async_shared()
        return warpgroup_mma(q.slice(128, 128, 1), k.slice(128, 128, 1).permute((1, 0)), acc, is_async=True)
    else:
        mbarrier.wait(ready.index(first + 1), parity)
        fence_async_shared()
        return warpgroup_mma(q, k.permute((1, 0)), acc, use_acc=not FIRST, is_async=True)


@gluon.jit
def finish(acc, total, out_ptr, row0, n_rows, COLUMN: gl.constexpr):
    """Divide by the sums and store 256 columns of the rows there are."""
    inverse = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, OUTPUT))
    acc = (acc * inverse[:, None]).to(gl.bfloat16)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    c = COLUMN + gl.arange(0, 256, layout=gl.SliceLayout(0, WIDE))
    place = out_ptr + ((row0 + r).to(gl.int64) * 512)[:, None] + c[None, :]
    gl.store(place, gl.convert_layout(gl.convert_layout(acc, HALF_WAY), WIDE), mask=(r < n_rows)[:, None])
