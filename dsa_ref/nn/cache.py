"""A contiguous cache of one sequence in one layer."""

import contextlib
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor

from ..config import DSAConfig
from ..contracts import E4M3, FLOATS, check_count, check_dtype, check_finite, check_shapes
from ..paged_cache import OF_NEW_TOKENS
from ..precision import widened


class LayerCache:
    """What one sequence leaves behind in one layer: latent rows, index keys and their scales, up to a capacity.

    config: the layer's DSAConfig; capacity: in tokens; dtype: the layer's weights' dtype.
    kv [capacity, D] in dtype, k_idx [capacity, Di] (float8_e4m3fn with `index_fp8`, else dtype), k_scale fp32
    [capacity]; `length` tokens are filled. indexer: False for a layer without one: k_idx and k_scale are None.
    FP8 keys and their scales lie in one page of uint8, `index_pages`, and kv is one page too, `kv_pages`, so that
    `append_index` and `append_latents` write here as they do into a PagedCache.

    Raises: TypeError for a capacity that is no int or a dtype that is no float, ValueError for a capacity below 1.
    """

    def __init__(
        self,
        config: DSAConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
        indexer: bool = True,
    ) -> None:
        check_count("capacity", capacity)
        if dtype not in FLOATS:
            raise TypeError(f"dtype must be one of {', '.join(map(str, FLOATS))}, got {dtype}")
        if not isinstance(indexer, bool):
            raise TypeError(f"indexer must be a bool, got {indexer!r}")
        self.capacity, self.length = capacity, 0
        with torch.inference_mode(False):  # a tensor made in inference mode could not be written to outside
            self.kv = torch.zeros(capacity, config.latent_dim, dtype=dtype, device=device)
            self.k_idx = self.k_scale = self.index_pages = None
            if indexer and config.index_fp8:
                page = -(-capacity // 16) * 16  # scales begin at a multiple of 16 bytes
                self.index_pages = torch.zeros(
                    1, page * (config.index_head_dim + 4), dtype=torch.uint8, device=self.kv.device
                )
                self._view_page(config.index_head_dim)
                self.k_scale.fill_(1.0)
            elif indexer:
                self.k_idx = torch.zeros(capacity, config.index_head_dim, dtype=dtype, device=device)
                self.k_scale = torch.ones(capacity, dtype=torch.float32, device=device)

    def _view_page(self, index_dim: int) -> None:
        """k_idx and k_scale as parts of the page: the keys of all its tokens, then their scales."""
        codes = self.index_pages.shape[1] // (index_dim + 4) * index_dim
        self.k_idx = self.index_pages[0, :codes].view(E4M3).view(-1, index_dim)[: self.capacity]
        self.k_scale = self.index_pages[0, codes:].view(torch.float32)[: self.capacity]

    @property
    def kv_pages(self) -> Tensor:
        """kv as one page [1, capacity, D]."""
        return self.kv[None]

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of latent rows."""
        return self.kv.dtype

    fp8 = False  # latent rows are never FP8 rows, as they may be in a PagedCache

    def append(
        self, kv: Tensor, k_idx: Tensor | None, k_scale: Tensor | None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Store the rows of T new tokens and return all rows so far, as views: (kv, k_idx, k_scale).

        kv [T, D], k_idx [T, Di], in the cache's dtypes, k_idx None in a layer without an indexer; k_scale fp32 [T]
        where k_idx is FP8, else None. Autocast gives rows in a narrower dtype than the weights': inside it they are
        widened to the cache's, which changes no value.

        Raises: ValueError for other shapes or devices, NaN or infinity (not in a CUDA graph or `unchecked_values`) and
        where the tokens would pass the capacity or bring gradients, TypeError for another dtype. Then nothing is
        stored.
        """
        check_shapes(kv=(kv, "T D"), k_idx=(k_idx, "T Di | None"), k_scale=(k_scale, "T | None"))
        if (k_idx is None) != (self.k_idx is None):
            wanted, indexer = ("given", True) if k_idx is None else ("None", False)
            raise ValueError(f"k_idx must be {wanted} in a cache made with indexer={indexer}")
        kv = widened(kv, self.kv.dtype)
        if k_idx is not None:
            k_idx = widened(k_idx, self.k_idx.dtype)
        for name, new, held in (("kv", kv, self.kv), ("k_idx", k_idx, self.k_idx), ("k_scale", k_scale, self.k_scale)):
            if new is None:
                continue
            check_dtype(name, new, (held.dtype,))
            if new.shape[1:] != held.shape[1:]:
                raise ValueError(f"{name} must have rows of {held.shape[1]}, got {new.shape[1]}")
            if new.device != held.device:
                raise ValueError(f"{name} must be on {held.device} like the cache, got {new.device}")
            if torch.is_grad_enabled() and new.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient, which a cache does not keep: use torch.no_grad()"
                )
        scaled = k_idx is not None and k_idx.dtype == E4M3
        if scaled != (k_scale is not None):
            raise ValueError(f"k_scale must be {'given for' if scaled else 'None without'} FP8 keys in k_idx")
        self.check_room(kv.shape[0])
        check_finite(OF_NEW_TOKENS, kv=kv, k_idx=k_idx, k_scale=k_scale)
        new = slice(self.length, self.length + kv.shape[0])
        for rows, held in ((kv, self.kv), (k_idx, self.k_idx), (k_scale, self.k_scale)):
            if rows is not None:
                held[new] = rows
        self.length = new.stop
        return self.rows()

    def rows(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """All rows so far, as views: (kv, k_idx, k_scale), k_scale None where keys are not FP8, as in `append`."""
        k_scale = None if self.index_pages is None else self.k_scale[: self.length]
        return self.kv[: self.length], None if self.k_idx is None else self.k_idx[: self.length], k_scale

    def check_room(self, count: int) -> None:
        """Raise ValueError unless `count` more tokens have room."""
        if self.length + count > self.capacity:
            raise ValueError(f"cache must hold {self.length + count} tokens, got a capacity of {self.capacity}")

    def truncate(self, length: int) -> None:
        """Forget the tokens from `length` on, as after rejected guesses: the next token takes their place.

        Views that `append` or a layer's `record` handed out change where new tokens overwrite forgotten ones.
        Raises: TypeError for a length that is no int, ValueError for one below 0 or above what is held.
        """
        _check_length(length, self.length)
        self.length = length

    def __getstate__(self) -> dict:
        """What is copied and pickled: of FP8 keys the page of bytes, since torch's tensors of FP8 cannot be unpickled.

        Where k_idx is None without an indexer, and where it is a tensor of its own, it is copied as it is.
        """
        if self.index_pages is None:
            return dict(vars(self))
        return vars(self) | {"k_idx": self.k_idx.shape[1], "k_scale": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.index_pages is not None:
            self._view_page(state["k_idx"])


def truncate_caches(caches: Iterable[LayerCache], length: int) -> None:
    """`truncate` every layer's cache of one sequence, or, where one cannot be, none. Raises as there."""
    caches = list(caches)  # a generator could be gone through only once
    for cache in caches:
        _check_length(length, cache.length)
    for cache in caches:
        cache.length = length


@contextlib.contextmanager
def all_or_nothing(caches: Sequence[LayerCache], record: list | None) -> Iterator[None]:
    """Where what is done inside fails or is interrupted, caches and record are as long afterwards as before."""
    lengths, entries = [cache.length for cache in caches], 0 if record is None else len(record)
    try:
        yield
    except BaseException:
        for cache, length in zip(caches, lengths, strict=True):
            cache.length = length
        if record is not None and len(record) > entries:
            del record[entries:]
        raise


def _check_length(length: int, held: int) -> None:
    if isinstance(length, bool) or not isinstance(length, int):
        raise TypeError(f"length must be an int, got {length!r}")
    if not 0 <= length <= held:
        raise ValueError(f"length must be in [0, {held}], the number of tokens held, got {length}")
