"""Who has which rows of a sequence: 2N chunks, of which rank r has r and 2N - 1 - r.

A causal row sees all rows before it, so the last chunk costs the most and the first the least: each pair of chunks
costs the same. In contiguous shares the last of N ranks would have 2 - 1/N times the mean.

    N = 3    chunk   0  1  2  3  4  5
             rank    0  1  2  2  1  0
"""

import dataclasses

import torch
from torch import Tensor

from ..contracts import check_count, check_int


@dataclasses.dataclass(frozen=True)
class Zigzag:
    """The shares of T rows among `size` ranks. Chunks differ by at most one row, and may be empty: T < 2 · size.

    Raises: TypeError or ValueError for a T or a rank that is no int or below 0, a size below 1, a rank not below size.
    """

    T: int
    size: int

    def __post_init__(self) -> None:
        check_int("T", self.T, 0)
        check_count("size", self.size)

    def chunk(self, c: int) -> range:
        """The rows of chunk c, of 2 · size."""
        return range(c * self.T // (2 * self.size), (c + 1) * self.T // (2 * self.size))

    def chunks(self, rank: int) -> tuple[range, range]:
        """The rows of the rank's two chunks, the earlier first."""
        check_int("rank", rank, 0, self.size - 1)
        return self.chunk(rank), self.chunk(2 * self.size - 1 - rank)

    def count(self, rank: int) -> int:
        """How many rows the rank has."""
        return sum(map(len, self.chunks(rank)))

    @property
    def longest(self) -> int:
        """The most rows that a rank has."""
        return max(map(self.count, range(self.size)))

    def rows(self, rank: int, device: torch.device | str | None = None) -> Tensor:
        """The rank's rows, ascending: int64 [count]."""
        return torch.cat([torch.arange(c.start, c.stop, device=device) for c in self.chunks(rank)])

    def places(self) -> list[tuple[int, int, range]]:
        """(rank, first of its rows, rows of the sequence) of each chunk, in the sequence's order."""
        found = []
        for c in range(2 * self.size):
            rank = min(c, 2 * self.size - 1 - c)
            first = 0 if c == rank else len(self.chunk(rank))
            found.append((rank, first, self.chunk(c)))
        return found

    def in_order(self, everyone: Tensor) -> Tensor:
        """The rows of all ranks, [size, longest, ...] and padded behind, in the sequence's order: [T, ...].

        Raises: ValueError for another shape.
        """
        if everyone.shape[:2] != (self.size, self.longest):
            wanted = f"[{self.size}, {self.longest}, ...]"
            raise ValueError(f"everyone must have shape {wanted}, got {list(everyone.shape)}")
        return torch.cat([everyone[rank, first : first + len(chunk)] for rank, first, chunk in self.places()])

    def by_rank(self, rows: Tensor) -> Tensor:
        """The inverse of `in_order`, with zeros for padding: [T, ...] -> [size, longest, ...].

        Raises: ValueError for another number of rows.
        """
        if rows.dim() == 0 or len(rows) != self.T:
            raise ValueError(f"rows must have shape [{self.T}, ...], got {list(rows.shape)}")
        everyone = rows.new_zeros(self.size, self.longest, *rows.shape[1:])
        for rank, first, chunk in self.places():
            everyone[rank, first : first + len(chunk)] = rows[chunk.start : chunk.stop]
        return everyone
