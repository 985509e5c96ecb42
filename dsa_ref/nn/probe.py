"""What a recorded sparse step takes along to receive the indexer's target from the backward pass."""

import functools
import inspect
from collections.abc import Callable

import torch
from torch import Tensor


@functools.lru_cache(maxsize=16)  # reading a signature takes longer than launching a kernel
def takes_probe(attention: Callable) -> bool:
    """Whether a package's `sparse_attention` has the argument."""
    return "probe" in inspect.signature(attention).parameters


def probe_of(attention: Callable, q: Tensor, kv: Tensor, indices: Tensor) -> dict[str, Tensor]:
    """{"probe": fp32 [T, k]} where a backward pass can come and `attention` takes one, else {}."""
    if not (torch.is_grad_enabled() and (q.requires_grad or kv.requires_grad) and takes_probe(attention)):
        return {}
    return {"probe": torch.zeros(indices.shape, device=indices.device, requires_grad=True)}
