"""Shared memory of `sparse_attention`: each buffer, each barrier, and which warpgroup may touch what when.

Three warpgroups share these buffers: `gather` fills q and the keys, `left` and `right` read them, and hand each other
probabilities, maxima and sums. A buffer has its barriers beside it, and is used through their methods:

    acquire_free(turn)       who fills waits here until those who read the last contents are done
    fill, copy, write        it fills: by TMA, by asynchronous copies, by stores
    send_valid               ... and says of a block's keys which are none; it travels with a quarter
    release_full()           it has filled; for copies in flight: the barrier will know when they have landed
    acquire_first(turn)      who reads waits here for the first half of a quarter's columns
    acquire_full(turn)       ... and here for all of the new contents
    release_free()           it has read what it wanted
    send(x), receive(turn)   a number for each row, from `left` to `right` or back, once a step or once a tile

Turns. An mbarrier counts arrivals; with the last one that it waits for, a phase ends and the next begins. Whoever waits
names a phase, but only by its parity: `mbarrier.wait(b, 0)` returns when phase 0 is over (or 2, 4, ...: nobody is ever
two phases ahead). A buffer's n-th contents end phase n of its `full`, and when they are used up, phase n of its
`free`. So a reader waits for parity n mod 2, its `turn`. The filler waits for phase n - 1 of `free`, the other
parity; for n = 0 there is nothing to wait for, and a wait for parity 1 of a barrier in phase 0 returns at once.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import async_copy, fence_async_shared, mbarrier, tma

from .aggregate import aggregate

BK = gl.constexpr(64)  # keys of a block; a step takes two blocks
Q_BYTES = gl.constexpr(64 * 576 * 2)
SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))  # what TMA writes and the tensor cores read
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
SCALAR = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))
# Tiles for the tensor cores are allocated with a first axis of one place, [1, 64, 256]. A product takes `.index(zero)`
# of them, where `zero` is a 0 that the compiler cannot see through: `sparse_tiles.opaque_zero` says why.
Buffer = Barrier = gl.shared_memory_descriptor  # one type in Triton; the name says which is meant


@gluon.jit
def next_turn(turn):
    """0 after 1, 1 after 0."""
    return turn ^ 1


@gluon.jit
def barrier(COUNT: gl.constexpr):
    """A new barrier whose phases end with COUNT arrivals."""
    made = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(made, count=COUNT)
    return made


@gluon.jit
def load_scalar(buffer):
    """The one number in `buffer`, as a scalar. Shared memory is read as tensors, and a reduction is the way from a
    tensor to a scalar; over one element it costs nothing."""
    return gl.max(buffer.load(SCALAR), 0)


@aggregate
class Queries:
    """64 rows of q, and which tile they are."""

    left: Buffer  # bf16 [1, 64, 256], columns 0 to 255
    right: Buffer  # bf16 [1, 64, 256], columns 256 to 511
    rope: Buffer  # bf16 [1, 64, 64], columns 512 to 575
    number: Buffer  # int32 [1], the tile's
    full: Barrier  # left and right wait for gather's 73,728 bytes
    free: Barrier  # gather waits for left's and right's last q · kᵀ of the tile

    @gluon.jit
    def acquire_free(self, turn):
        mbarrier.wait(self.free, turn ^ 1)

    @gluon.jit
    def fill(self, q256, q64, row0, number):
        """`expect`, `gather`'s one arrival, says how many bytes must land before the phase ends. TMA brings them."""
        self.number.store(gl.full([1], number, gl.int32, layout=SCALAR))
        mbarrier.expect(self.full, Q_BYTES)
        tma.async_copy_global_to_shared(q256, [row0, 0], self.full, self.left.index(0))
        tma.async_copy_global_to_shared(q256, [row0, 256], self.full, self.right.index(0))
        tma.async_copy_global_to_shared(q64, [row0, 512], self.full, self.rope.index(0))

    @gluon.jit
    def no_more(self, tiles):
        """A number that no tile has, and no q."""
        self.number.store(gl.full([1], tiles, gl.int32, layout=SCALAR))
        mbarrier.arrive(self.full, count=1)

    @gluon.jit
    def acquire_full(self, turn):
        """Waits for the next tile's rows and returns its number."""
        mbarrier.wait(self.full, turn)
        return load_scalar(self.number)

    @gluon.jit
    def release_free(self, pred=True):
        mbarrier.arrive(self.free, count=1, pred=pred)  # it arrives only if pred is true


@aggregate
class KeyQuarter:
    """256 columns of a block of 64 keys, a quarter of a step's two blocks. Products begin when 128 have come."""

    columns: Buffer  # bf16 [1, 64, 256]
    first_full: Barrier  # the products of q wait for gather's copies of columns 0 to 127
    full: Barrier  # ... and for the others, and what travels with them (`KeyBlock`)
    free: Barrier  # gather waits for the last product that reads these columns

    @gluon.jit
    def acquire_free(self, turn):
        mbarrier.wait(self.free, turn ^ 1)

    @gluon.jit
    def copy(self, source, there):
        """Start the copies: 256 columns from the pointers `source` [64, 64] on, zeros where there is no row."""
        copy_columns(self.columns.index(0).slice(0, 64, 1), source, there)
        copy_columns(self.columns.index(0).slice(64, 64, 1), source + 64, there)
        arrive_when_copied(self.first_full)
        copy_columns(self.columns.index(0).slice(128, 64, 1), source + 128, there)
        copy_columns(self.columns.index(0).slice(192, 64, 1), source + 192, there)

    @gluon.jit
    def release_full(self):
        """Full when the copies that `gather` has started so far have landed."""
        arrive_when_copied(self.full)

    @gluon.jit
    def send_valid(self, valid, value):
        """What the softmax must know of the keys: one more arrival at `full`, before the copies', so that it is hidden
        behind them."""
        valid.store(value)
        mbarrier.arrive(self.full, count=1)

    @gluon.jit
    def acquire_first(self, turn):
        mbarrier.wait(self.first_full, turn)
        fence_async_shared()  # copies write through another path than the tensor cores read

    @gluon.jit
    def acquire_full(self, turn):
        mbarrier.wait(self.full, turn)
        fence_async_shared()

    @gluon.jit
    def release_free(self):
        mbarrier.arrive(self.free, count=1)


@gluon.jit
def copy_columns(target, source, there):
    """Start the copy of 64 columns of 64 rows, 16 bytes at a time: a panel, 128 bytes a row (see kernels/README.md)."""
    async_copy.async_copy_global_to_shared(target, source, mask=there)


@gluon.jit
def arrive_when_copied(barrier):
    """Each of the 128 threads of `gather` arrives when the copies that it has started so far have landed.

    increment_count=False: these are arrivals that the barrier was made for. With True each would first raise the number
    of arrivals that the phase waits for, by itself.
    """
    async_copy.mbarrier_arrive(barrier, increment_count=False)


@aggregate
class KeyBlock:
    """64 keys: a row's value is left and right together, and the key is the value and the rope columns."""

    left: KeyQuarter  # columns 0 to 255
    right: KeyQuarter  # columns 256 to 511
    rope: Buffer  # bf16 [1, 64, 64], columns 512 to 575; full and free together with `right`
    valid: Buffer  # [64], see `sparse_tiles.selected`; full and free together with `left` in k0, `right` in k1


@aggregate
class Message:
    """A number for each of 64 rows, from one computing warpgroup to the other.

    No barrier says that it has been read: `allocate` says what else makes sure of it.
    """

    buffer: Buffer  # fp32 [64]
    sent: Barrier  # the other waits for this one's value

    @gluon.jit
    def send(self, value):
        self.buffer.store(value)
        mbarrier.arrive(self.sent, count=1)

    @gluon.jit
    def receive(self, turn, LAYOUT: gl.constexpr):
        mbarrier.wait(self.sent, turn)
        return self.buffer.load(LAYOUT)


@aggregate
class Probabilities:
    """The probabilities of one block in bf16, from the warpgroup that computed them to the other's tensor cores."""

    operand: Buffer  # bf16 [1, 64, 64]
    full: Barrier  # the other waits for this one's probabilities

    @gluon.jit
    def write(self, p):
        self.operand.index(0).store(p.to(gl.bfloat16))
        fence_async_shared()  # stores take another path than the tensor cores read

    @gluon.jit
    def release_full(self):
        mbarrier.arrive(self.full, count=1)

    @gluon.jit
    def acquire_full(self, turn):
        mbarrier.wait(self.full, turn)


@aggregate
class Shared:
    """All that the warpgroups share."""

    q: Queries
    k0: KeyBlock
    k1: KeyBlock
    p0: Probabilities  # from left
    p1: Probabilities  # from right
    left_max: Message  # the running maximum after block 0
    right_max: Message  # ... and after block 1
    left_sum: Message  # each one's sum of probabilities, when the tile is done
    right_sum: Message


@gluon.jit
def key_quarter(FULL_COUNT: gl.constexpr):
    """A quarter that is full with FULL_COUNT arrivals."""
    return KeyQuarter(
        columns=gl.allocate_shared_memory(gl.bfloat16, [1, BK, 256], SWIZZLED),
        first_full=barrier(128),
        full=barrier(FULL_COUNT),
        free=barrier(1),
    )


@gluon.jit
def message():
    """A message with a buffer of its own."""
    return Message(buffer=gl.allocate_shared_memory(gl.float32, [64], PLAIN), sent=barrier(1))


@gluon.jit
def allocate(GROUPED: gl.constexpr):
    """All buffers and barriers of a program."""
    q = Queries(
        left=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        right=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 256], SWIZZLED),
        rope=gl.allocate_shared_memory(gl.bfloat16, [1, 64, 64], SWIZZLED),
        number=gl.allocate_shared_memory(gl.int32, [1], PLAIN),
        full=barrier(1),
        free=barrier(2),
    )
    k0 = KeyBlock(
        left=key_quarter(128 + 1),  # 128 threads' copies, and one arrival for `valid`, which travels with k0.left
        right=key_quarter(128),
        rope=gl.allocate_shared_memory(gl.bfloat16, [1, BK, 64], SWIZZLED),
        valid=gl.allocate_shared_memory(gl.int32 if GROUPED else gl.float32, [BK], PLAIN),
    )
    k1 = KeyBlock(
        left=key_quarter(128),
        right=key_quarter(128 + 1),
        rope=gl.allocate_shared_memory(gl.bfloat16, [1, BK, 64], SWIZZLED),
        valid=gl.allocate_shared_memory(gl.int32 if GROUPED else gl.float32, [BK], PLAIN),
    )
    # P0 lives in the bytes of k0's rope columns: 8 KiB of its own would not fit. `left` writes it when its logits, the
    # only use of those columns, are done; `gather` refills them when k0.right is free, so after `right`'s P0 · V0.
    p0 = Probabilities(operand=k0.rope, full=barrier(1))
    # `right` overwrites P1 after it has received `left_max` of the next step, which `left` sends after its P1 · V1.
    p1 = Probabilities(operand=gl.allocate_shared_memory(gl.bfloat16, [1, 64, BK], SWIZZLED), full=barrier(1))
    # The maximum goes there and back in the same 64 numbers: each writes after it has received the other's.
    left_max = message()
    right_max = Message(buffer=left_max.buffer, sent=barrier(1))
    # A sum is overwritten a tile later, and by then its reader has sent messages of that tile.
    return Shared(
        q=q, k0=k0, k1=k1, p0=p0, p1=p1, left_max=left_max, right_max=right_max, left_sum=message(), right_sum=message()
    )
