"""One layer's paged cache, and one sequence of it in the shape of `LayerCache`.

The pools belong to the layer, the pages to a `PageTable` that all layers share. A step reads and writes the pools
through slots; `PagedCache.sequence` gives what a `LayerCache` gives, contiguous rows, for prefill and as decode's plain
form.

Source: SPEC section 10 (ours).
"""

import torch
from torch import Tensor

from .config import DSAConfig
from .contracts import (
    E4M3,
    FLOATS,
    check_count,
    check_dtype,
    check_finite,
    check_fp8_v_dim,
    check_int,
    check_shapes,
    fp8_row_bytes,
)
from .page_table import PageTable
from .paged import check_fp8_finite, check_write_index, check_write_kv, pack_kv, read_index, read_kv, store_index
from .precision import widened

OF_NEW_TOKENS = " in the rows of new tokens"  # every later token that saw one that is not finite would be NaN


class PagedCache:
    """What all sequences leave behind in one layer, in pages that `table` hands out.

    config: the layer's, with index_fp8; dtype: the layer's weights', in which rows are handed out; fp8: keep latents as
    FP8 rows; indexer: False for a layer without one. splits: into how many parts attention cuts a selection in every
    decode step, None for `default_splits(k)`: set once, so that a sequence has the same bits whatever else is in a
    batch. Many parts keep a GPU busy with few sequences; 1 is fastest for 64 and more with 128 heads.
    index_pages: uint8 [pages, page · (Di + 4)], None without an indexer; kv_pages: uint8 [pages, page, row] with fp8,
    else [pages, page, D] in dtype; filled: the tokens of each sequence that this layer has, as ints.

    Raises: ValueError for a config without index_fp8 or, with fp8, a kv_lora_rank that is no multiple of a tile, or a
    table that has sequences already; TypeError for other types.
    """

    def __init__(
        self,
        table: PageTable,
        config: DSAConfig,
        dtype: torch.dtype = torch.float32,
        fp8: bool = False,
        indexer: bool = True,
        splits: int | None = None,
    ) -> None:
        if splits is not None:
            check_count("splits", splits)
        for name, value, kind in (("table", table, PageTable), ("config", config, DSAConfig)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        for name, value in (("fp8", fp8), ("indexer", indexer)):
            if not isinstance(value, bool):
                raise TypeError(f"{name} must be a bool, got {value!r}")
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
        if indexer and not config.index_fp8:
            raise ValueError("config must have index_fp8 = True, as index pages hold FP8 keys, got False")
        if fp8:
            check_fp8_v_dim(config.kv_lora_rank, "kv_lora_rank")
        self.table, self.dtype, self.fp8, self.splits = table, dtype, fp8, splits
        self.v_dim, self.latent_dim, self.index_dim = config.kv_lora_rank, config.latent_dim, config.index_head_dim
        shape, kind = (table.pages, table.page_size), torch.uint8 if fp8 else dtype
        width = fp8_row_bytes(self.latent_dim, self.v_dim) if fp8 else self.latent_dim
        device, page_bytes = table.table.device, table.page_size * (self.index_dim + 4)
        self.filled = [0] * table.sequences
        with torch.inference_mode(False):
            self.kv_pages = torch.zeros(*shape, width, dtype=kind, device=device)
            self.index_pages = None
            if indexer:
                self.index_pages = torch.zeros(table.pages, page_bytes, dtype=torch.uint8, device=device)
        table.register(self)

    def write(self, slots: Tensor, kv: Tensor, k_idx: Tensor | None = None, k_scale: Tensor | None = None) -> None:
        """Store T tokens at their slots, int [T]: kv [T, D] in dtype, k_idx float8_e4m3fn [T, Di], k_scale fp32 [T],
        the last two None without an indexer.

        Raises: ValueError for other shapes, devices or slots, rows that bring gradients or that FP8 cannot hold,
        TypeError for other dtypes. Then nothing is stored.
        """
        self._check_rows(kv, k_idx, k_scale)
        check_write_kv(self.kv_pages, slots, kv, self.v_dim)
        if k_idx is not None:
            check_write_index(self.index_pages, slots, k_idx, k_scale)
        rows, page_size = pack_kv(kv, self.v_dim) if self.fp8 else kv, self.table.page_size
        self.kv_pages[slots // page_size, slots % page_size] = rows
        if k_idx is not None:
            store_index(self.index_pages, slots, k_idx, k_scale)

    def rows(self, sequence: int) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What this layer has of a sequence, as copies: (kv [S, D] in dtype, k_idx [S, Di], k_scale [S])."""
        self.table.length(sequence)  # raises for a sequence that is not in use
        length, page_size = self.filled[sequence], self.table.page_size
        pages = self.table.table[sequence, : -(-length // page_size)].long()
        kv = self.kv_pages[pages].flatten(0, 1)[:length]
        kv = read_kv(kv, self.v_dim, self.dtype) if self.fp8 else kv
        if self.index_pages is None:
            return kv, None, None
        return kv, *(x[:length] for x in read_index(self.index_pages[pages], self.index_dim))

    def sequence(self, sequence: int) -> "SequenceCache":
        """One sequence as a layer's `cache=`. Raises ValueError for one that is not in use, TypeError for no int."""
        return SequenceCache(self, sequence)

    def copy_page(self, source: int, target: int) -> None:
        """Copy a page's bytes, for `PageTable.reserve`."""
        for pool in (self.kv_pages, self.index_pages):
            if pool is not None:
                pool[target] = pool[source]

    def _check_rows(self, kv, k_idx, k_scale) -> None:
        """Whether these are rows of this layer, of values that it can hold."""
        check_shapes(kv=(kv, "T D"), k_idx=(k_idx, "T Di | None"), k_scale=(k_scale, "T | None"))
        with_indexer = self.index_pages is not None
        for name, new in (("k_idx", k_idx), ("k_scale", k_scale)):
            if (new is not None) != with_indexer:
                wanted = "given" if with_indexer else "None"
                raise ValueError(f"{name} must be {wanted} in a cache made with indexer={with_indexer}")
        held = (("kv", kv, self.dtype, self.latent_dim), ("k_idx", k_idx, E4M3, self.index_dim))
        for name, new, dtype, width in (*held, ("k_scale", k_scale, torch.float32, None)):
            if new is None:
                continue
            check_dtype(name, new, (dtype,))
            if width is not None and new.shape[1] != width:
                raise ValueError(f"{name} must have rows of {width}, got {new.shape[1]}")
            if new.device != self.kv_pages.device:
                raise ValueError(f"{name} must be on {self.kv_pages.device} like the cache, got {new.device}")
            if torch.is_grad_enabled() and new.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient, which a cache does not keep: use torch.no_grad()"
                )
        if self.fp8:
            check_fp8_finite(kv[:, : self.v_dim])


class SequenceCache:
    """One sequence of a `PagedCache`, with `LayerCache`'s interface; it keeps no rows of its own.

    `length` is what this layer has. The table's length follows when every layer has as much, so a model runs a chunk
    through all its layers and the table moves on with the last. Setting length takes a layer back alone, as after a
    failed step; it may not grow. kv [0, D] and k_idx [0, Di] (None without an indexer) show widths, dtypes and device.
    """

    def __init__(self, cache: PagedCache, sequence: int) -> None:
        cache.table.length(sequence)  # raises for a sequence that is not in use
        self.cache, self.sequence, self.capacity = cache, sequence, cache.table.max_length

    @property
    def kv(self) -> Tensor:
        """No rows [0, D], as `LayerCache.kv` would have them: their width, dtype and device."""
        return torch.empty(0, self.cache.latent_dim, dtype=self.cache.dtype, device=self.cache.kv_pages.device)

    @property
    def k_idx(self) -> Tensor | None:
        """No keys [0, Di], or None without an indexer. Made when asked for: torch cannot pickle tensors of FP8."""
        if self.cache.index_pages is None:
            return None
        return torch.empty(0, self.cache.index_dim, dtype=E4M3, device=self.cache.kv_pages.device)

    @property
    def length(self) -> int:
        """The tokens that this layer has of the sequence."""
        return self.cache.filled[self.sequence]

    @length.setter
    def length(self, length: int) -> None:
        self.cache.table.length(self.sequence)  # raises for a sequence that is not in use any more
        check_int("length", length, 0, self.length)
        self.cache.filled[self.sequence] = length
        self.cache.table.settle(self.sequence)

    def append(
        self, kv: Tensor, k_idx: Tensor | None, k_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Store the rows of T new tokens and return all rows so far, as copies: (kv, k_idx, k_scale).

        As `LayerCache.append`, but what comes back of an FP8 cache is what its rows hold. Raises as `PagedCache.write`
        and `check_room` do, and ValueError for NaN or infinity; then nothing is stored.
        """
        cache, table = self.cache, self.cache.table
        kv = widened(kv, cache.dtype)
        cache._check_rows(kv, k_idx, k_scale)
        self.check_room(len(kv))
        check_finite(OF_NEW_TOKENS, kv=kv, k_idx=k_idx, k_scale=k_scale)
        end = self.length + len(kv)
        table.reserve(self.sequence, end - table.length(self.sequence))
        cache.write(table.slots(self.sequence, self.length, end), kv, k_idx, k_scale)
        cache.filled[self.sequence] = end
        table.settle(self.sequence)
        return cache.rows(self.sequence)

    def check_room(self, count: int) -> None:
        """Raise ValueError unless `count` more tokens have room, in the table's row and in the pool."""
        table = self.cache.table
        try:
            table.check_room(self.sequence, self.length + count - table.length(self.sequence))
        except ValueError as error:
            raise ValueError(f"cache must have room for {count} more tokens: {error}") from None

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on in this layer; `PageTable.truncate` does so in all of them.

        Raises: TypeError for a length that is no int, ValueError for one below 0 or above what is held, or where the
        sequence has ended.
        """
        self.length = length
