"""What `sparse_attention` does in registers: the layouts of a tile of 64 rows, its softmax, its products, its output.

The constants are what Gluon's functions may read: `gl.constexpr`.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma

from .aggregate import aggregate
from .sparse_shared import BK

LOG2_E, LN_2 = gl.constexpr(1.4426950408889634), gl.constexpr(0.6931471805599453)
NEVER = gl.constexpr(-1e30)  # below every logit, and finite: a row that has seen nothing yields 0 and no NaN
THRESHOLD = gl.constexpr(8.0)  # in base 2: how far a logit may exceed the running maximum before that moves
# The tensor cores' own layouts of [64, 64] and [64, 256] in a warpgroup: 32 and 128 registers a thread. A row lies in
# four neighbouring lanes of one warp.
LOGITS = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
OUTPUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 256, 16]))
ROWS = gl.constexpr(gl.SliceLayout(1, LOGITS.value))  # a number for each row of the logits
KEYS = gl.constexpr(gl.SliceLayout(0, LOGITS.value))  # a number for each column
COPY = gl.constexpr(gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0]))  # [64, 64] with 16 bytes a copy
# [64, 256] with 8 neighbouring columns in a thread, for 16-byte stores, and the layout half-way to it from OUTPUT. The
# lists say how far each bit of the number of a register, a lane (a thread of a warp) and a warp moves an element.
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


@aggregate
class Tile:
    """Which rows and keys a tile of 64 rows is about."""

    group: gl.tensor  # the list of keys it reads
    row0: gl.tensor  # its first row of q
    length: gl.tensor  # of the list
    steps: gl.tensor  # of 128 keys; at least one, so that out and lse are written where there is no key


@gluon.jit
def tile_at(number, lengths_ptr, k, GH: gl.constexpr, TILES: gl.constexpr, GROUPED: gl.constexpr):
    """The tile of this number. Groups of G queries have GH rows of q and TILES tiles each."""
    group = number // TILES
    length = gl.to_tensor(k)  # where k is 1, the launch has made it a constant
    if GROUPED:
        length = gl.load(lengths_ptr + group)
    return Tile(
        group=group,
        row0=group * GH + number % TILES * 64,
        length=length,
        steps=gl.maximum(1, gl.cdiv(length, 2 * BK)),
    )


@aggregate
class SelectedRows:
    """Where 64 keys of a list lie, as `gather` copies them."""

    source: gl.tensor  # pointers [64, 64] to their first columns
    there: gl.tensor  # bool [64, 1]: is there a key?
    valid: gl.tensor  # [64], for `masked`: 0 or -inf; in unions, the bits of the queries that selected the key


@gluon.jit
def selected(kv_ptr, list_ptr, j, length, columns, GROUPED: gl.constexpr):
    """Places j of a list: -1 and what lies behind the end is no key."""
    if GROUPED:
        entry = gl.load(list_ptr + j, j < length, 0xFFFFFFFF)  # -1, and no query's
        s = entry.to(gl.int32)
        valid = (entry >> 32).to(gl.int32)
    else:
        s = gl.load(list_ptr + j, j < length, -1)
        valid = gl.where(s >= 0, 0.0, float("-inf"))
    source = kv_ptr + (s.to(gl.int64) * 576)[:, None] + columns[None, :]
    return SelectedRows(source=source, there=(s >= 0)[:, None], valid=valid)


@aggregate
class Softmax:
    """The online softmax of 64 rows: m and total as anybody's, in base 2, and half of the output's columns."""

    m: gl.tensor  # fp32 [64], running maximum, but see `raised`
    total: gl.tensor  # fp32 [64], sum of the probabilities of this warpgroup's blocks
    acc: gl.tensor  # fp32 [64, 256], sum of P · V over all blocks


@gluon.jit
def nothing_yet(OUTPUT: gl.constexpr):
    """The state before the first key."""
    m = gl.full([64], NEVER, gl.float32, layout=ROWS)
    total = gl.full([64], 0.0, gl.float32, layout=ROWS)
    return Softmax(m=m, total=total, acc=gl.zeros([64, 256], gl.float32, layout=OUTPUT))


@gluon.jit
def bit_of_query(r, G: gl.constexpr, GH: gl.constexpr):
    """Which of a union's bits is that of row r's query. The last one also stands for rows that no query has."""
    return 1 << gl.minimum(r // (GH // G), 31)


@gluon.jit
def masked(logits, scale, valid, bit, GROUPED: gl.constexpr):
    """Logits in base 2, -inf where there is no key, or in a union where this row's query did not select it."""
    valid = valid.load(KEYS)
    if GROUPED:
        return gl.where((valid[None, :] & bit[:, None]) != 0, logits * scale, float("-inf"))
    else:
        return logits * scale + valid[None, :]


@gluon.jit
def raised(m, largest):
    """The running maximum after logits of at most `largest`. It stays where it is exceeded by no more than THRESHOLD:
    then `rescale` has nothing to do, and probabilities of up to 2^8 instead of 1 cost no precision."""
    return gl.where(largest > m + THRESHOLD, largest, m)


@gluon.jit
def exp2(x):
    """2^x by the one instruction for it. Triton's own is also right below 2^-126, for three more."""
    return gl.inline_asm_elementwise("ex2.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=gl.float32, is_pure=True, pack=1)


def _unless_all_are_one(n):
    """PTX for x = x · y on the n values a thread holds, skipped where all y are 1, and its constraints.

    In OUTPUT a thread holds, in this order, two columns of a row, the same two of the row 8 below, and so on: values 0
    and 2 show the factors of both its rows. 0x3F800000 are the bits of 1.0.
    """
    differs = " ".join(f"xor.b32 t, ${2 * n + i}, 0x3F800000; or.b32 any, any, t;" for i in (0, 2))
    skip = f".reg .pred p; .reg .b32 any, t; mov.b32 any, 0; {differs} setp.eq.b32 p, any, 0; @p bra DONE;"
    multiply = " ".join(f"mul.f32 ${i}, ${i}, ${2 * n + i};" for i in range(n))
    types = ["=f"] * n + [str(i) for i in range(n)] + ["f"] * n  # results, x in the results' registers, y
    return gl.constexpr(f"{{ {skip} {multiply} DONE: }}"), gl.constexpr(",".join(types))


RESCALE, RESCALE_TYPES = _unless_all_are_one(128)


@gluon.jit
def rescale(acc, factor, OUTPUT: gl.constexpr):
    """acc · factor, a factor for each row; nearly always all are 1, and one branch a thread skips the products.

    PTX, because with Triton's `if` the whole warpgroup would take the branch, after a barrier to agree on it.
    """
    factor = gl.convert_layout(factor, gl.SliceLayout(1, OUTPUT))[:, None]
    acc, factor = gl.broadcast(acc, factor)
    return gl.inline_asm_elementwise(RESCALE, RESCALE_TYPES, [acc, factor], dtype=gl.float32, is_pure=True, pack=128)


@gluon.jit
def opaque_zero(counter):
    """0, for a counter below 2^28, which the compiler cannot know.

    It is the index into buffers of one place, where 0 would do. A product finds an operand in shared memory by a
    descriptor, a number of 64 bits. With addresses that it knows, the compiler computes every product's descriptors
    before the loop, and they fill the registers.
    """
    return counter >> 28


@gluon.jit
def as_operand(p, OUTPUT: gl.constexpr):
    """P for a product that takes it from registers: the layout of logits is the operand's, so that nothing moves."""
    return gl.convert_layout(p.to(gl.bfloat16), gl.DotOperandLayout(0, OUTPUT, 2))


@gluon.jit
def multiply_quarter(acc, q, k, turn, zero):
    """acc + q · kᵀ over a quarter's 256 columns; acc is None where the sum begins. Two products, each started when its
    columns have come. Asynchronous."""
    BEGINS: gl.constexpr = acc is None
    if BEGINS:
        acc = gl.zeros([64, BK], gl.float32, layout=LOGITS)
    q, columns = q.index(zero), k.columns.index(zero)
    k.acquire_first(turn)
    acc = warpgroup_mma(
        q.slice(0, 128, 1), columns.slice(0, 128, 1).permute((1, 0)), acc, use_acc=not BEGINS, is_async=True
    )
    k.acquire_full(turn)
    return warpgroup_mma(q.slice(128, 128, 1), columns.slice(128, 128, 1).permute((1, 0)), acc, is_async=True)


@gluon.jit
def multiply_rope(acc, q, k, zero):
    """acc + q · kᵀ over the rope columns, which have come with the block's right quarter. Asynchronous."""
    return warpgroup_mma(q.index(zero), k.index(zero).permute((1, 0)), acc, is_async=True)


@gluon.jit
def for_wide_stores(x):
    """[64, 256] from OUTPUT's pairs of columns to 8 neighbouring ones in a thread, for 16-byte stores.

    In two steps, each of which swaps one bit of the lane with one of the register: shuffles, while a direct conversion
    would go through shared memory, of which none is left.
    """
    return gl.convert_layout(gl.convert_layout(x, HALF_WAY), WIDE)


@gluon.jit
def store_output(acc, total, out_ptr, row0, n_rows, COLUMN: gl.constexpr):
    """Divide by the sums and store 256 columns of the rows there are."""
    inverse = gl.convert_layout(1.0 / gl.where(total == 0.0, 1.0, total), gl.SliceLayout(1, OUTPUT))
    acc = (acc * inverse[:, None]).to(gl.bfloat16)
    r = gl.arange(0, 64, layout=gl.SliceLayout(1, WIDE))
    c = COLUMN + gl.arange(0, 256, layout=gl.SliceLayout(0, WIDE))
    place = out_ptr + ((row0 + r).to(gl.int64) * 512)[:, None] + c[None, :]
    gl.store(place, for_wide_stores(acc), mask=(r < n_rows)[:, None])
