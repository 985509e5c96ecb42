"""Notebook 05: what block_attention reads and holds, beyond the right numbers."""

import numpy as np

from ..checking import expect
from ..watching import Python
from .check import block_attention, query_row, results

SIGNALLING = np.uint64(0x7FF0_0000_0000_0001).view(np.float64)  # a NaN that NumPy reports when it is computed with


@block_attention.property("gather")
def block_attention_gather(solution):
    q, kv, indices = query_row(6)
    kv[~np.isin(np.arange(len(kv)), indices)] = np.nan
    for got in results(solution(q, kv, indices, 0.4, 4, 5), "out, lse"):
        cause = "rows that are not selected were read: gather the selected ones, do not mask the others"
        expect(np.isfinite(got).all(), "rows of kv that are not selected hold NaN here: got NaN, expected none", cause)
    kv[~np.isin(np.arange(len(kv)), indices)] = SIGNALLING
    with np.errstate(invalid="call", call=lambda *what: read.append(what)):
        read = []
        solution(q, kv, indices, 0.4, 4, 5)
    cause = "no result shows it, but numbers of rows that are not selected were computed with: gather, and compute then"
    expect(not read, "rows that are not selected hold a NaN here that tells when it is computed with: it was", cause)
    made = [_work(solution, S=S, k=16, block=4) for S in (64, 64, 16_384)]  # the first call may import something
    cause = "the work grows with kv, of which 16 rows are selected in both cases: score those, do not mask the others"
    for i, (unit, slack) in enumerate((("bytes were made", 64 * 1024), ("lines ran", 20))):
        few, many = made[1][i], made[2][i]
        what = f"{few:,} {unit} for 64 rows of kv and {many:,} for 16,384, expected the same"
        expect(many <= few + slack, what, cause)
    few, many = (min(_work(solution, S=S, k=16, block=4, D=4)[2] for _ in range(3)) for S in (64, 1 << 22))
    what = f"{1e3 * few:.2f} ms of computing for 64 rows of kv and {1e3 * many:.2f} for four million, expected the same"
    expect(many <= few + 2e-3, what, cause)  # a core reads these 128 MiB in twice that, at the least


def _work(solution, S, k, block, D=32, H=2):
    """(bytes made, lines run, seconds of computing) for k of S rows."""
    q, kv, _ = query_row(4, H=H, S=S, D=D)
    indices = (np.arange(k) * (S // k) if S >= k else np.arange(k) % S).astype(np.int32)
    with Python() as seen:
        solution(q, kv, indices, 0.4, D // 2, block)
    return seen.bytes, seen.lines, seen.seconds


class Gathered(np.ndarray):
    """An array that remembers how many of its S = 97 rows were copied out of it at one time."""

    S, most = 97, 0

    def __getitem__(self, key):
        got = super().__getitem__(key)
        if len(self) == self.S and np.ndim(got) == 2 and not np.may_share_memory(self, got):
            Gathered.most = max(Gathered.most, len(got))
        return got


@block_attention.property("memory")
def block_attention_memory(solution):
    q, kv, indices = query_row(4, S=Gathered.S, n=40, k=40)
    for block in (1, 7):
        Gathered.most = 0
        solution(q, kv.view(Gathered), indices, 0.4, 4, block)
        what = f"k={len(indices)}, block={block}: {Gathered.most} rows were gathered at once, expected at most {block}"
        expect(Gathered.most <= block, what, "a block is `block` rows, whatever its size, and never two at a time")
    H, D, S, k, block = 2, 256, 64, 1024, 4
    q, kv, _ = query_row(4, H=H, S=S, D=D)
    indices = np.arange(k, dtype=np.int32) % S
    with Python() as seen:
        solution(q, kv, indices, 0.4, 128, block)
    limit = 10 * block * D * 8  # ten blocks of rows; all rows would take 2 MiB
    expect(
        seen.peak <= limit,
        f"k={k}, D={D}, block={block}: got {seen.peak // 1024} KiB at once, expected at most {limit // 1024} KiB",
        "more than a block is held: gather one block's rows inside the loop, and keep no logits of earlier blocks",
    )
