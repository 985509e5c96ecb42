"""Shared memory of the kernels of `sparse_attention_backward`: each buffer, its barriers, and who may touch it when.

`sparse_shared` says what acquiring and releasing mean, and how waits name phases by turns.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .aggregate import aggregate
from .sparse_shared import BK, SWIZZLED, Barrier, Buffer, Probabilities, arrive_when_copied, barrier, copy_columns

SWIZZLED_32 = gl.constexpr(gl.NVMMASharedLayout(64, 16, 2))  # for tiles of 32 columns, 64 bytes a row


def descriptor(x, rows, columns):
    """What TMA must know of x, a matrix of all its rows, to copy tiles [rows, columns]."""
    x = x.view(-1, x.shape[-1])
    layout = SWIZZLED if columns >= 64 else SWIZZLED_32
    return TensorDescriptor(x, list(x.shape), [x.stride(0), 1], [rows, columns], layout.value)


@aggregate
class Rows:
    """64 heads of a query: q and dout. Filled once."""

    q_left: Buffer  # bf16 [1, 64, 256], columns 0 to 255
    q_right: Buffer  # bf16 [1, 64, 256], columns 256 to 511
    q_rope: Buffer  # bf16 [2, 64, 32], columns 512 to 543 and 544 to 575
    dout_left: Buffer  # bf16 [1, 64, 256]
    dout_right: Buffer  # bf16 [1, 64, 256]
    full: Barrier

    @gluon.jit
    def fill(self, q256, q32, dout256, row0):
        mbarrier.expect(self.full, 64 * (576 + 512) * 2)
        tma.async_copy_global_to_shared(q32, [row0, 512], self.full, self.q_rope.index(0))
        tma.async_copy_global_to_shared(q32, [row0, 544], self.full, self.q_rope.index(1))
        tma.async_copy_global_to_shared(q256, [row0, 0], self.full, self.q_left.index(0))
        tma.async_copy_global_to_shared(dout256, [row0, 0], self.full, self.dout_left.index(0))
        tma.async_copy_global_to_shared(q256, [row0, 256], self.full, self.q_right.index(0))
        tma.async_copy_global_to_shared(dout256, [row0, 256], self.full, self.dout_right.index(0))

    @gluon.jit
    def acquire_full(self):
        mbarrier.wait(self.full, 0)


@aggregate
class KeyPart:
    """Some columns of the key tile's 64 rows."""

    columns: Buffer  # bf16 [1, 64, 128]; of the rope columns [2, 64, 32]
    full: Barrier  # first and second wait for gather's copies
    free: Barrier  # gather waits for those who read it last in a tile, for dq

    @gluon.jit
    def acquire_free(self, turn):
        mbarrier.wait(self.free, turn ^ 1)

    @gluon.jit
    def fill(self, source, there):
        """Start the copies of 128 columns from the pointers `source` [64, 64] on, zeros where there is no row."""
        copy_columns(self.columns.index(0).slice(0, 64, 1), source, there)
        copy_columns(self.columns.index(0).slice(64, 64, 1), source + 64, there)
        arrive_when_copied(self.full)

    @gluon.jit
    def fill_rope(self, source, there):
        """Likewise 64 columns, from the pointers [64, 32] on."""
        copy_columns(self.columns.index(0), source, there)
        copy_columns(self.columns.index(1), source + 32, there)
        arrive_when_copied(self.full)

    @gluon.jit
    def acquire_full(self, turn):
        mbarrier.wait(self.full, turn)
        fence_async_shared()  # copies write through another path than the tensor cores read

    @gluon.jit
    def release_free(self):
        mbarrier.arrive(self.free, count=1)


@aggregate
class QueryShared:
    """All that the warpgroups of the query pass share."""

    rows: Rows
    left0: KeyPart  # columns 0 to 127
    left1: KeyPart  # columns 128 to 255
    right0: KeyPart  # columns 256 to 383
    right1: KeyPart  # columns 384 to 511
    rope: KeyPart  # columns 512 to 575
    p: Probabilities  # P, from first to second
    ds: Probabilities  # dS, from second to first


@gluon.jit
def key_part():
    """128 columns, for one of the two computing warpgroups' share of dq."""
    return KeyPart(
        columns=gl.allocate_shared_memory(gl.bfloat16, [1, BK, 128], SWIZZLED), full=barrier(128), free=barrier(1)
    )


@gluon.jit
def allocate_query_pass():
    """All buffers and barriers of a program of the query pass."""
    rows = Rows(
        q_left=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        q_right=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        q_rope=gl.allocate_shared_memory(gl.bfloat16, [2, 64, 32], SWIZZLED_32),
        dout_left=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        dout_right=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        full=barrier(1),
    )
    rope = KeyPart(
        columns=gl.allocate_shared_memory(gl.bfloat16, [2, BK, 32], SWIZZLED_32), full=barrier(128), free=barrier(2)
    )
    # Nobody says that P and dS have been read. `second` reads P before it sends dS, for which `first` waits. `first`
    # multiplies by dS before it gives its key parts free, and `second` needs their next contents before its next dS.
    p = Probabilities(operand=gl.allocate_shared_memory(gl.bfloat16, [1, 64, BK], SWIZZLED), full=barrier(1))
    ds = Probabilities(operand=gl.allocate_shared_memory(gl.bfloat16, [1, 64, BK], SWIZZLED), full=barrier(1))
    return QueryShared(
        rows=rows, left0=key_part(), left1=key_part(), right0=key_part(), right1=key_part(), rope=rope, p=p, ds=ds
    )


@aggregate
class Heads:
    """All heads of a query: 256 + 32 of q's columns, the 256 of dout. Filled once."""

    q: Buffer  # bf16 [1, H, 256]
    rope: Buffer  # bf16 [1, H, 32]
    dout: Buffer  # bf16 [1, H, 256]
    full: Barrier

    @gluon.jit
    def fill(self, q256, q32, dout256, row0, half, H: gl.constexpr):
        mbarrier.expect(self.full, H * (256 + 32 + 256) * 2)
        tma.async_copy_global_to_shared(dout256, [row0, half * 256], self.full, self.dout.index(0))
        tma.async_copy_global_to_shared(q256, [row0, half * 256], self.full, self.q.index(0))
        tma.async_copy_global_to_shared(q32, [row0, 512 + half * 32], self.full, self.rope.index(0))

    @gluon.jit
    def acquire_full(self):
        mbarrier.wait(self.full, 0)


@aggregate
class Ring:
    """Tiles of P and dS in turn, [H, 64 keys]. Number n, P of key tile n / 2 or dS of (n - 1) / 2, takes place n mod
    PLACES."""

    tiles: Buffer  # bf16 [PLACES, H, 64]
    full: Barrier  # PLACES barriers: a consumer waits for TMA
    free: Barrier  # PLACES barriers: the loader waits for a consumer

    @gluon.jit
    def fill(self, n, desc, row, H: gl.constexpr, PLACES: gl.constexpr):
        """Wait until the place is free, and start TMA's copy."""
        mbarrier.wait(self.free.index(n % PLACES), ((n // PLACES) & 1) ^ 1)
        mbarrier.expect(self.full.index(n % PLACES), H * BK * 2)
        tma.async_copy_global_to_shared(desc, [row, 0], self.full.index(n % PLACES), self.tiles.index(n % PLACES))

    @gluon.jit
    def acquire_full(self, n, PLACES: gl.constexpr):
        """Number n, transposed, as a product takes it: [64 keys, H]."""
        mbarrier.wait(self.full.index(n % PLACES), (n // PLACES) & 1)
        return self.tiles.index(n % PLACES).permute((1, 0))

    @gluon.jit
    def release_free(self, n, PLACES: gl.constexpr):
        mbarrier.arrive(self.free.index(n % PLACES), count=1)


@aggregate
class KeyShared:
    """All that the warpgroups of the key pass share."""

    heads: Heads
    ring: Ring


@gluon.jit
def allocate_key_pass(H: gl.constexpr, PLACES: gl.constexpr):
    """All buffers and barriers of a program of the key pass.

    The consumers take key tiles in turn, two numbers each. With a multiple of four places each has places of its own: a
    place that both waited for would end phases that one of them does not see, and parities would let it pass too early.
    """
    gl.static_assert(PLACES % 4 == 0)
    heads = Heads(
        q=gl.allocate_shared_memory(gl.bfloat16, [1, H, 256], SWIZZLED),
        rope=gl.allocate_shared_memory(gl.bfloat16, [1, H, 32], SWIZZLED_32),
        dout=gl.allocate_shared_memory(gl.bfloat16, [1, H, 256], SWIZZLED),
        full=barrier(1),
    )
    full = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    free = gl.allocate_shared_memory(gl.int64, [PLACES, 1], mbarrier.MBarrierLayout())
    for place in gl.static_range(PLACES):
        mbarrier.init(full.index(place), count=1)
        mbarrier.init(free.index(place), count=1)
    tiles = gl.allocate_shared_memory(gl.bfloat16, [PLACES, H, BK], SWIZZLED)
    return KeyShared(heads=heads, ring=Ring(tiles=tiles, full=full, free=free))
