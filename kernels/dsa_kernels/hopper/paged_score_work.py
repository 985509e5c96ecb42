"""Which tiles a program of `paged_index_scores` scores: a stretch of the tiles of all sequences in one row."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .aggregate import aggregate

BK = gl.constexpr(64)  # keys of a tile, which is a page


@gluon.jit
def tiles_of(length):
    """How many tiles a sequence has."""
    return (gl.maximum(length, 0) + (BK - 1)) // BK


@aggregate
class Stretch:
    """`left` tiles of those of all sequences in one row: from tile `first` of sequence b on, then the next ones'.

    Of one sequence alone: its tiles first, first + programs, ..., and `left` does not count.
    """

    b: gl.tensor
    first: gl.tensor
    left: gl.tensor


@aggregate
class Work:
    """What there is to do."""

    len_ptr: gl.tensor
    B: gl.tensor
    P: gl.tensor
    scored: Stretch
    behind: Stretch  # of tiles that no query sees, where they become -inf

    @gluon.jit
    def length(self, b):
        """Of sequence b; 0 after the last one."""
        return gl.minimum(gl.load(self.len_ptr + b, b < self.B, 0), self.P * BK)

    @gluon.jit
    def of_one(self, tiles):
        """How many of a sequence's tiles the program has, where there is one sequence."""
        programs = gl.num_programs(0)
        return gl.maximum((tiles - self.scored.first + programs - 1) // programs, 0)


@gluon.jit
def _add(a, b):
    return a + b


@gluon.jit
def stretch(counts):
    """The program's equal share of sum(counts) tiles, of which sequence b has counts[b]."""
    total, ends = gl.sum(counts, 0).to(gl.int64), gl.associative_scan(counts, 0, _add)
    tile = (gl.program_id(0) * total // gl.num_programs(0)).to(gl.int32)
    last = ((gl.program_id(0) + 1) * total // gl.num_programs(0)).to(gl.int32)
    before = ends <= tile
    first = tile - gl.max(gl.where(before, ends, 0), 0)
    return Stretch(b=gl.sum(before.to(gl.int32), 0), first=first, left=last - tile)


@gluon.jit
def find_work(len_ptr, B, P, BP: gl.constexpr, ALONE: gl.constexpr, FILL: gl.constexpr):
    """What the program has to do, by a running sum of all lengths, which each of the four warps makes for itself."""
    # A size of 1 is a constant to Triton, and these fields take tensors.
    B, P, zero = gl.to_tensor(B), gl.to_tensor(P), gl.to_tensor(0)
    if ALONE:
        scored = Stretch(b=zero, first=gl.program_id(0), left=zero)
        behind = scored
    else:
        each = gl.arange(0, BP, layout=gl.BlockedLayout([BP // 32], [32], [4], [0]))  # the same in all four warps
        tiles = tiles_of(gl.minimum(gl.load(len_ptr + each, each < B, 0), P * BK))
        scored = stretch(tiles)
        behind = scored
        if FILL:
            behind = stretch(gl.where(each < B, P - tiles, 0))
    return Work(len_ptr=len_ptr, B=B, P=P, scored=scored, behind=behind)
