"""A contiguous cache of one sequence in one layer."""

import torch
from torch import Tensor

from ..config import DSAConfig
from ..contracts import E4M3, check_count, check_dtype


class LayerCache:
    """What one sequence leaves behind in one layer: latent rows, index keys and their scales, up to a capacity.

    config: the layer's DSAConfig; capacity: in tokens; dtype: the layer's weights' dtype.
    kv [capacity, D] in dtype, k_idx [capacity, Di] (float8_e4m3fn with `index_fp8`, else dtype), k_scale fp32
    [capacity]; `length` tokens are filled.

    Raises: TypeError for a capacity that is no int, ValueError for one below 1.
    """

    def __init__(
        self,
        config: DSAConfig,
        capacity: int,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str | None = None,
    ) -> None:
        check_count("capacity", capacity)
        self.capacity, self.length = capacity, 0
        index_dtype = E4M3 if config.index_fp8 else dtype
        self.kv = torch.zeros(capacity, config.latent_dim, dtype=dtype, device=device)
        self.k_idx = torch.zeros(capacity, config.index_head_dim, dtype=index_dtype, device=device)
        self.k_scale = torch.ones(capacity, dtype=torch.float32, device=device)

    def append(self, kv: Tensor, k_idx: Tensor, k_scale: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store the rows of T new tokens and return all rows so far, as views: (kv, k_idx, k_scale).

        kv [T, D], k_idx [T, Di], in the cache's dtypes; k_scale fp32 [T], or None where there are no scales.

        Raises: ValueError where the tokens would pass the capacity or bring gradients, TypeError for another dtype.
        Then nothing is stored.
        """
        for name, new, held in (("kv", kv, self.kv), ("k_idx", k_idx, self.k_idx)):
            check_dtype(name, new, (held.dtype,))
            if torch.is_grad_enabled() and new.requires_grad:
                raise ValueError(
                    f"{name} must not require a gradient, which a cache does not keep: use torch.no_grad()"
                )
        end = self.length + kv.shape[0]
        if end > self.capacity:
            raise ValueError(f"cache must hold {end} tokens, got a capacity of {self.capacity}")
        new = slice(self.length, end)
        self.kv[new], self.k_idx[new] = kv, k_idx
        if k_scale is not None:
            self.k_scale[new] = k_scale
        self.length = end
        return self.kv[:end], self.k_idx[:end], None if k_scale is None else self.k_scale[:end]
