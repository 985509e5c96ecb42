"""A layer's chunk of tokens without gradients, in few launches: every small step is one of `ops`, as in `decode`.

    rows of the cache     kv_a_proj -> norm, RoPE, stored; wk -> norm, RoPE, Hadamard, FP8, stored      2 products
    queries               q_a_proj -> norm -> q_b_proj -> W_UK and RoPE, into one buffer                3 products
    the indexer's queries wq_b -> RoPE, Hadamard, FP8; weights_proj in fp32                             1 product
    selection, attention  `lightning_select`, `sparse_attention`
    output                W_UV -> o_proj                                                                2 products

`DSALayer._attend` is the same step written out, with gradients. Inside `unchecked_values` rows are written straight
into a LayerCache, behind its length, and no host waits; elsewhere beside it, and the cache looks at them first.

Source: SPEC sections 2 and 3.
"""

import contextlib

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..contracts import check_finite, unchecked_values, values_readable
from ..precision import autocast_on
from .cache import LayerCache
from .decode import SMALL_STEPS, absorbed, append_latents, index_step, projected, query_latent


def serves(layer, x: Tensor, attention: str) -> bool:
    """Whether `prefill_step` gives what `_attend` does: a selection of its own, `ops` with all small steps, no
    derivative of any kind to keep, and no autocast, whose products have another dtype than the weights."""
    return (
        attention == "sparse"
        and all(hasattr(layer.ops, name) for name in SMALL_STEPS)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *layer.parameters())))
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not autocast_on(x.device)
    )


def prefill_step(layer, x: Tensor, positions: Tensor, cache, indices: Tensor | None) -> tuple[Tensor, dict]:
    """`DSALayer.forward` in sparse mode on checked arguments: the output [T, dim], and the step as `record` gets it."""
    c, T, start = layer.config, len(x), row_starts(positions, cache)
    rows, first = rows_beside(layer, x, cache)
    slots = torch.arange(first, first + T, device=x.device)
    with unchecked_values():
        append_latents(layer, layer.kv_a_proj_with_mqa(x), rows, slots, positions)
        q_latent = query_latent(layer, x)
        q_idx = w = None
        if layer.indexer is not None:
            q_idx, w = index_rows(layer, x, q_latent, rows, slots, positions)
    rows.length += T
    kv, k_idx, k_scale = rows.rows()
    if w is not None and values_readable(w) and c.index_fp8:
        check_finite(" in the rows of new tokens", k_idx=k_scale, q_idx=w)
    if cache is not None and rows is not cache:
        kv, k_idx, k_scale = cache.append(kv, k_idx, k_scale)
    step = {"kv": kv, "start": start, "indices": indices}
    if layer.indexer is not None:
        step |= {"q_idx": q_idx, "k_idx": k_idx, "w": w, "k_scale": k_scale}
        k = min(c.index_topk, len(k_idx))  # a list has no more places than there are keys
        step["indices"] = layer.ops.lightning_select(q_idx, k_idx, w, k, k_scale=k_scale, start=start)

    q = layer.q_b_proj(q_latent).unflatten(-1, (c.n_heads, -1))
    W_UK, W_UV = layer._up_projections(kv)
    with unchecked_values():
        step["q"] = absorbed(layer, q, W_UK, positions, kv.dtype)
    with unchecked_values() if indices is None else contextlib.nullcontext():  # nobody has looked at shared ones yet
        attended = (step["q"], kv, step["indices"], c.softmax_scale, c.kv_lora_rank)
        u, step["lse"] = layer.ops.sparse_attention(*attended)
    return projected(layer, u, W_UV), step


def row_starts(positions: Tensor, cache) -> Tensor:
    """Each row's first visible key, int32 [T]: the cache's first, or where a packed sequence begins."""
    if cache is not None:
        return torch.zeros(len(positions), dtype=torch.int32, device=positions.device)
    return torch.arange(len(positions), dtype=torch.int32, device=positions.device) - positions.int()


def rows_beside(layer, x: Tensor, cache) -> tuple[LayerCache, int]:
    """Where the rows of x are written, and from which row on: into the cache where nobody looks at them, else beside.

    A step that fails afterwards leaves the cache's length, behind which it has written.
    """
    if isinstance(cache, LayerCache) and cache.dtype == x.dtype and not values_readable(x):
        return cache, cache.length
    return LayerCache(layer.config, max(1, len(x)), x.dtype, x.device, layer.indexer is not None), 0


def index_rows(
    layer, x: Tensor, q_latent: Tensor, rows: LayerCache, slots: Tensor, positions: Tensor
) -> tuple[Tensor, Tensor]:
    """The tokens' index keys into rows; q_idx [T, Hi, Di] and w fp32 [T, Hi] as they are scored."""
    if layer.config.index_fp8:
        return index_step(layer, x, q_latent, rows, slots, positions)
    q_idx, k_idx, w, _, _ = layer._index(x, q_latent, positions)
    rows.k_idx[rows.length : rows.length + len(x)] = k_idx
    return q_idx, w
