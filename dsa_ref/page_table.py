"""Which pages belong to which sequence: one table for all layers of a model.

A sequence's tokens lie in pages of fixed size, anywhere in the pool. Sequences may share pages (`fork`): a page counts
how many hold it, and a shared one is copied before anything is written to it. The device has what steps read, `table`
and `lengths`, always at the same addresses; the host has the free pages, the counts and the same lengths as ints, so
that no call waits for the device.

Source: SPEC section 10 (ours).
"""

import dataclasses
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor

from .contracts import check_count, check_int, check_slots_fit

INT32_MAX = torch.iinfo(torch.int32).max


@dataclasses.dataclass(frozen=True)
class Batch:
    """The next `tokens` tokens of each of some sequences: what every layer's decode step takes, made once for all.

    page_table: int32 [B, P]; lengths: int32 [B], with the new tokens; positions: int64 [B, tokens]; slots: int64
    [B · tokens], where their rows go. sequences: their numbers in `table`; held: their tokens before, as ints; lost:
    how often each had lost pages by then, as `PageTable.check_batch` compares it.
    """

    table: "PageTable"
    sequences: tuple[int, ...]
    held: tuple[int, ...]
    lost: tuple[int, ...]
    tokens: int
    page_table: Tensor
    lengths: Tensor
    positions: Tensor
    slots: Tensor


class Pools(Protocol):
    """A layer's cache in the pages of a table, as the table knows it: `PagedCache` is one."""

    filled: list[int]  # tokens of each sequence that the layer has

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's bytes in every pool."""


class PageTable:
    """The pages of up to `sequences` sequences, each of up to max_length tokens, out of a pool of `pages`.

    table: int32 [sequences, ceil(max_length / page_size)], -1 where there is no page; lengths: int32 [sequences]. Both
    on device. Every method either does all it says or, where it raises, nothing.

    Raises: TypeError for a size that is no int, ValueError for one below 1 or that int32 cannot count.
    """

    def __init__(
        self,
        pages: int,
        sequences: int,
        max_length: int,
        page_size: int = 64,
        device: torch.device | str | None = None,
    ) -> None:
        sizes = {"pages": pages, "sequences": sequences, "max_length": max_length, "page_size": page_size}
        for name, value in sizes.items():
            check_count(name, value)
        check_slots_fit("pages", pages, page_size)
        check_int("sequences", sequences, 1, INT32_MAX)
        check_int("max_length", max_length, 1, INT32_MAX)
        self.pages, self.sequences, self.max_length, self.page_size = pages, sequences, max_length, page_size
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
            width = -(-max_length // page_size)
            self.table = torch.full((sequences, width), -1, dtype=torch.int32, device=device)
            self.lengths = torch.zeros(sequences, dtype=torch.int32, device=device)
        self._free = list(range(pages))[::-1]  # the last one is taken next
        self._holders = [0] * pages  # sequences that hold the page
        self._pages: list[list[int] | None] = [None] * sequences  # None: nobody's row
        self._lengths = [0] * sequences
        self._lost = [0] * sequences  # how often a page that the row held was taken out of it: old slots are others'
        self._caches = []  # those whose pools the pages are in

    @property
    def free_pages(self) -> int:
        """Pages that no sequence holds."""
        return len(self._free)

    def new(self) -> int:
        """Begin an empty sequence and return its number, its row of `table`. Raises ValueError where none is left."""
        if None not in self._pages:
            raise ValueError(f"sequences must leave one free for another sequence, got all {self.sequences} in use")
        sequence = self._pages.index(None)
        self._pages[sequence] = []
        self._set_length(sequence, 0)
        return sequence

    def length(self, sequence: int) -> int:
        """The tokens of a sequence. Raises ValueError for one that is not in use, TypeError for no int."""
        self._check_sequence(sequence)
        return self._lengths[sequence]

    def reserve(self, sequence: int, tokens: int) -> None:
        """Make the places of the sequence's next tokens its own: pages that lack, and copies of pages that others hold.

        Raises: ValueError where the tokens pass max_length or the pages that are free; TypeError for no int.
        """
        self.check_room(sequence, tokens)
        taken = self._taken(sequence, tokens)
        if not taken:
            return
        fresh, old = self._free[-len(taken) :][::-1], self._pages[sequence]
        pages = [*old, *[-1] * (taken[-1] + 1 - len(old))]
        for place, page in zip(taken, fresh, strict=True):
            if pages[place] >= 0:
                for cache in self._caches:
                    cache.copy_page(pages[place], page)
            pages[place] = page
        self._show(sequence, pages, taken[0])
        del self._free[-len(taken) :]
        for place, page in zip(taken, fresh, strict=True):
            self._holders[page] = 1
            if place < len(old):
                self._holders[old[place]] -= 1  # not to 0: others hold it
                self._lost[sequence] += 1
        self._pages[sequence] = pages

    def check_room(self, sequence: int, tokens: int) -> None:
        """Raise, as `reserve` would, unless it can serve these tokens."""
        self._check_sequence(sequence)
        check_int("tokens", tokens, 0)
        end = self._lengths[sequence] + tokens
        if end > self.max_length:
            raise ValueError(
                f"tokens must fit max_length = {self.max_length}, got {end - tokens} held and {tokens} more"
            )
        needed = len(self._taken(sequence, tokens))
        if needed > len(self._free):
            raise ValueError(
                f"tokens must fit the pages that are free, {len(self._free)} of {self.pages}, "
                f"got {tokens} in sequence {sequence}, which take {needed}"
            )

    def advance(self, sequences: Sequence[int], tokens: int) -> None:
        """The next `tokens` places of each sequence, reserved before, hold tokens now, in every layer's cache.

        Raises: ValueError for places that are not reserved, a sequence named twice or not in use; TypeError.
        """
        check_int("tokens", tokens, 0)
        self._check_sequences(sequences)
        self._check_reserved(sequences, tokens)
        for sequence in sequences:
            self._lengths[sequence] += tokens
            for cache in self._caches:
                cache.filled[sequence] = self._lengths[sequence]
        self.lengths.copy_(torch.tensor(self._lengths, dtype=torch.int32), non_blocking=True)  # all at once

    def reserve_all(self, sequences: Sequence[int], tokens: int) -> None:
        """`reserve` the next tokens of each sequence, or, where they do not all fit, of none.

        Raises: ValueError for no sequence, one named twice or not in use, no token and too many; TypeError.
        """
        self._check_sequences(sequences)
        check_count("tokens", tokens)
        if not sequences:
            raise ValueError("sequences must name at least one, got none")
        for sequence in sequences:
            self.check_room(sequence, tokens)
        needed = self._needed(sequences, tokens)
        if needed > len(self._free):
            raise ValueError(
                f"tokens must fit the pages that are free, {len(self._free)} of {self.pages}, "
                f"got {tokens} in each of {len(sequences)} sequences, which take {needed}"
            )
        for sequence in sequences:
            self.reserve(sequence, tokens)

    def batch(self, sequences: Sequence[int], tokens: int) -> Batch:
        """Reserve the next tokens of each sequence, and say where they go. `advance` with the same arguments commits.

        Raises: as `reserve_all`; then nothing is reserved.
        """
        self.reserve_all(sequences, tokens)
        before = [self._lengths[sequence] for sequence in sequences]
        positions = [[length + n for n in range(tokens)] for length in before]
        slots = [
            self._pages[sequence][position // self.page_size] * self.page_size + position % self.page_size
            for sequence, row in zip(sequences, positions, strict=True)
            for position in row
        ]
        lengths = torch.tensor([row[-1] + 1 for row in positions], dtype=torch.int32)
        places = (torch.tensor(list(sequences)), lengths, torch.tensor(positions), torch.tensor(slots))
        rows, *where = (part.to(self.table.device, non_blocking=True) for part in places)
        lost = tuple(self._lost[sequence] for sequence in sequences)
        return Batch(self, tuple(sequences), tuple(before), lost, tokens, self.table[rows], *where)

    def check_batch(self, batch: Batch) -> None:
        """Raise unless the batch is this table's and its tokens are still the next ones, on pages of their own."""
        if not isinstance(batch, Batch):
            raise TypeError(f"batch must be a Batch, got {type(batch).__name__}")
        if batch.table is not self:
            raise ValueError("batch must be made by the table of the cache, got another table's")
        self._check_sequences(batch.sequences)
        if (now := tuple(self._lengths[sequence] for sequence in batch.sequences)) != batch.held:
            raise ValueError(f"batch must continue sequences of {list(now)} tokens, got one made at {list(batch.held)}")
        self._check_reserved(batch.sequences, batch.tokens)
        for sequence, lost in zip(batch.sequences, batch.lost, strict=True):
            if self._lost[sequence] != lost:
                raise ValueError(f"batch must be made after sequence {sequence} gave pages back, got one made before")

    def truncate(self, sequence: int, length: int) -> None:
        """Forget the tokens from `length` on, in every layer, and give back the pages behind them, reserved ones too.

        Raises: ValueError for a length outside of [0, tokens held], TypeError for no int.
        """
        self._check_sequence(sequence)
        check_int("length", length, 0, self._lengths[sequence])
        for cache in self._caches:
            cache.filled[sequence] = min(cache.filled[sequence], length)
        self._trim(sequence, length)
        self._set_length(sequence, length)

    def fork(self, sequence: int) -> int:
        """Begin a sequence with the same tokens, on the same pages, and return its number. Raises as `new` does."""
        self._check_sequence(sequence)
        other = self.new()
        shared = self._pages[sequence][: self._count(self._lengths[sequence])]
        for page in shared:
            self._holders[page] += 1
        self._pages[other] = shared
        self._show(other, shared, 0)
        self._set_length(other, self._lengths[sequence])
        for cache in self._caches:
            cache.filled[other] = self._lengths[sequence]
        return other

    def free(self, sequence: int) -> None:
        """End a sequence. Pages that no other holds are free. Raises ValueError for one that is not in use."""
        self._check_sequence(sequence)
        self.truncate(sequence, 0)
        self._pages[sequence] = None

    def slots(self, sequence: int, first: int, last: int) -> Tensor:
        """The physical slots int64 [last - first] of a sequence's positions, reserved ones too: page · size + place.

        Raises: ValueError for positions without a page, TypeError for no int.
        """
        self._check_sequence(sequence)
        check_int("last", last, 0, len(self._pages[sequence]) * self.page_size)
        check_int("first", first, 0, last)
        positions = torch.arange(first, last, device=self.table.device)
        return self.table[sequence].long()[positions // self.page_size] * self.page_size + positions % self.page_size

    def register(self, cache: Pools) -> None:
        """Let a layer's cache, whose pools these pages are in, follow. Raises ValueError where sequences have begun."""
        if any(pages is not None for pages in self._pages):
            raise ValueError("table must have no sequences yet when a cache is made for it")
        self._caches.append(cache)

    def check_caches(self, caches: Sequence[Pools]) -> None:
        """Raise ValueError unless these are all caches in these pages, as they were made: `advance` counts for all."""
        if len(caches) != len(self._caches) or any(a is not b for a, b in zip(caches, self._caches, strict=True)):
            raise ValueError(
                f"caches must be all {len(self._caches)} in the pages of table, in the order in which they were made, "
                f"got {len(caches)}, or another order"
            )

    def settle(self, sequence: int) -> None:
        """Take over what layers have filled, each by itself: a sequence is as long as the layer with the fewest tokens.
        Where no layer has more than the sequence had, pages that no layer needs are given back."""
        filled = [cache.filled[sequence] for cache in self._caches]
        if max(filled) <= self._lengths[sequence]:
            self._trim(sequence, max(filled))
        self._set_length(sequence, min(filled))

    def _count(self, length: int) -> int:
        """Pages of so many tokens."""
        return -(-length // self.page_size)

    def _taken(self, sequence: int, tokens: int) -> list[int]:
        """The places in the sequence's list of pages that need a free page before the next tokens can be written."""
        pages, length = self._pages[sequence], self._lengths[sequence]
        touched = range(length // self.page_size, self._count(length + tokens)) if tokens else ()
        return [place for place in touched if place >= len(pages) or self._holders[pages[place]] > 1]

    def _needed(self, sequences: Sequence[int], tokens: int) -> int:
        """The free pages that it takes to reserve so many tokens in one sequence after the other."""
        needed, left = 0, {}  # holders that have gone to a copy of their own meanwhile
        for sequence in sequences:
            for place in self._taken(sequence, tokens):
                page = self._pages[sequence][place] if place < len(self._pages[sequence]) else None
                if page is None or self._holders[page] - left.get(page, 0) > 1:
                    needed += 1
                    left[page] = left.get(page, 0) + 1
        return needed

    def _trim(self, sequence: int, length: int) -> None:
        """Give back the pages behind so many tokens."""
        pages, kept = self._pages[sequence], self._count(length)
        self.table[sequence, kept : len(pages)] = -1
        self._lost[sequence] += len(pages) > kept
        for page in pages[kept:][::-1]:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
        del pages[kept:]

    def _show(self, sequence: int, pages: list[int], first: int) -> None:
        """Write a sequence's pages, from the first-th on, to the device."""
        row = torch.tensor(pages[first:], dtype=torch.int32)
        self.table[sequence, first : len(pages)] = row.to(self.table.device, non_blocking=True)

    def _set_length(self, sequence: int, length: int) -> None:
        if length != self._lengths[sequence]:
            self._lengths[sequence] = length
            self.lengths[sequence] = length

    def _check_reserved(self, sequences, tokens) -> None:
        for sequence in sequences:
            room = len(self._pages[sequence]) * self.page_size - self._lengths[sequence]
            if tokens > room or tokens and self._taken(sequence, tokens):
                raise ValueError(f"tokens must be reserved before, got {tokens} for sequence {sequence}")

    def _check_sequences(self, sequences) -> None:
        if isinstance(sequences, (str, Tensor)) or not isinstance(sequences, Sequence):
            raise TypeError(f"sequences must be a list of ints, got {type(sequences).__name__}")
        for sequence in sequences:
            self._check_sequence(sequence)
        if len(set(sequences)) < len(sequences):
            raise ValueError(f"sequences must be distinct, got {list(sequences)}")

    def _check_sequence(self, sequence) -> None:
        check_int("sequence", sequence, 0, self.sequences - 1)
        if self._pages[sequence] is None:
            raise ValueError(f"sequence must be one that new or fork gave and free did not end, got {sequence}")
