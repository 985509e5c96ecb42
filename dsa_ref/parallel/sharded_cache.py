"""One rank's share of a sequence in one layer."""

from typing import NoReturn

import torch
from torch import Tensor

from ..config import DSAConfig
from ..nn.cache import LayerCache


class ShardedCache(LayerCache):
    """The rows that one rank keeps of a sequence in one layer, and which places of the sequence they are.

    config, dtype, device, indexer: as for LayerCache; capacity: rows that this rank may keep. length: tokens of the
    whole sequence, on all ranks alike, which `truncate` shortens; `held` of them are here. kv, k_idx and k_scale are
    the rank's rows, places int32 [capacity] theirs, ascending.

    Raises: as LayerCache.
    """

    def __init__(
        self,
        config: DSAConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        indexer: bool = True,
    ) -> None:
        self.own = LayerCache(config, capacity, dtype, device, indexer)
        self.kv, self.k_idx, self.k_scale = self.own.kv, self.own.k_idx, self.own.k_scale
        self.index_pages = self.own.index_pages
        self.capacity, self.length = capacity, 0
        with torch.inference_mode(False):  # as in LayerCache
            self.places = torch.zeros(capacity, dtype=torch.int32, device=self.kv.device)
            self._known = torch.zeros(capacity, dtype=torch.int32, device="cpu")  # places too, for the host to read
        self._stored = 0  # how many of them are of rows that were stored

    @property
    def held(self) -> int:
        """How many of the sequence's tokens have their rows here."""
        return int(torch.searchsorted(self._known[: self._stored], self.length))

    def rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """This rank's rows, as views: (kv, k_idx, k_scale) as LayerCache's."""
        self.own.length = self.held
        return self.own.rows()

    def append(self, kv, k_idx, k_scale) -> NoReturn:
        """Refused: rows come with their places, by `append_own`."""
        raise TypeError("cache must not be a ShardedCache in a layer that knows of no other rank")

    def append_own(self, places: Tensor, length: int, kv: Tensor, k_idx: Tensor | None, k_scale: Tensor | None) -> None:
        """Store this rank's rows of new tokens; the sequence has `length` tokens then.

        places: int64 [n] on the CPU, ascending, from the old length on; kv, k_idx, k_scale: n rows as for LayerCache.
        Raises: as LayerCache.append.
        """
        held = self.held
        self.own.length = held
        if len(places):
            self.own.append(kv, k_idx, k_scale)
        new = slice(held, held + len(places))
        self._stored = held  # should what follows be interrupted, the places that count are ascending
        self._known[new] = places
        self.places[new] = self._known[new].to(self.places.device)
        self._stored, self.length = new.stop, length

    def check_room(self, count: int) -> None:
        """Nothing: how many of `count` tokens come to this rank, its layer knows and asks of `check_own_room`."""

    def check_own_room(self, count: int) -> None:
        """Raise ValueError unless `count` more rows have room here."""
        wanted = self.held + count
        if wanted > self.capacity:
            raise ValueError(f"cache must hold {wanted} rows on this rank, got a capacity of {self.capacity}")
