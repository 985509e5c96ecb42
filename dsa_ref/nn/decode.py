"""A layer's decode step on paged caches: the N newest tokens of each of B sequences, in few launches.

    rows of the KV pages    kv_a_proj -> norm, RoPE, FP8, stored                              1 product, 1 launch
    queries                 q_a_proj -> norm -> q_b_proj -> W_UK and RoPE, into one buffer    3 products, 2 launches
    rows of the index pages wk -> norm, RoPE, Hadamard, FP8, stored                           1 product, 1 launch
    the indexer's queries   wq_b -> RoPE, Hadamard, FP8; weights_proj in fp32                 1 product, 2 launches
    selection, attention    `paged_select`, `paged_sparse_attention`
    output                  W_UV -> o_proj                                                    2 products

What is new is written behind the sequences' lengths, where nobody looks, before it is used; `PageTable.advance` commits
it. So a step that fails has changed nothing.

Source: SPEC sections 2, 3, 6 and 10.
"""

import contextlib
from collections.abc import Callable

import torch
from torch import Tensor, nn

import dsa_ref

from ..contracts import MAX_QUERIES, check_dtype, check_shapes, unchecked_values, values_readable
from ..decode import slots_of
from ..page_table import Batch
from ..paged import read_index, read_kv, write_index, write_kv
from ..paged_cache import PagedCache
from ..precision import widened
from .parts import Indexer, RMSNorm
from .wrapped import is_plain

STEPS = ("paged_select", "paged_sparse_attention")  # of `ops`
SMALL_STEPS = ("append_index", "append_latents", "head_weights", "index_queries", "rms_norm", "turn_into")
RECORDED = ("q_idx", "w", "q", "indices", "slots", "lse")  # in this order


def decode_step(layer, x: Tensor, cache: PagedCache, batch: Batch, indices: Tensor | None) -> tuple[Tensor, dict]:
    """`DSALayer.decode` on checked arguments: the output, and the step as `record` gets it.

    Slots, lengths, page tables and the layer's own selection are right by construction, so no step checks their values.
    """
    c, readable = layer.config, values_readable(x)
    B, N, _ = x.shape
    x, positions = x.flatten(0, 1), batch.positions.flatten()
    with unchecked_values():
        append_latents(layer, layer.kv_a_proj_with_mqa(x), cache, batch.slots, positions)
        q_latent = query_latent(layer, x)
        q_idx = w = None
        if layer.indexer is not None:
            q_idx, w = index_step(layer, x, q_latent, cache, batch.slots, positions)
        if readable:
            check_finite(cache, batch.slots, w)
        if layer.indexer is None:
            step = {"indices": indices, "slots": slots_of(indices, batch.page_table, cache.table.page_size)}
        else:
            step = {"q_idx": q_idx.unflatten(0, (B, N)), "w": w.unflatten(0, (B, N))}
            scored = (step["q_idx"], cache.index_pages, step["w"], c.index_topk, batch.page_table, batch.lengths)
            step["indices"], step["slots"] = layer.ops.paged_select(*scored)

        q = layer.q_b_proj(q_latent).unflatten(-1, (c.n_heads, -1))
        W_UK, W_UV = layer._up_projections(q)
        query = absorbed(layer, q, W_UK, positions, q.dtype if cache.fp8 else cache.dtype)
        step["q"] = query.unflatten(0, (B, N))
    attended = (step["q"], cache.kv_pages, step["slots"], c.softmax_scale, c.kv_lora_rank, cache.splits)
    with unchecked_values() if indices is None else contextlib.nullcontext():  # nobody has looked at shared ones yet
        u, step["lse"] = layer.ops.paged_sparse_attention(*attended)
    return projected(layer, u.flatten(0, 1), W_UV).unflatten(0, (B, N)), step


def query_latent(layer, x: Tensor) -> Tensor:
    """The normed query latent [T, q_lora_rank] of x [T, dim]."""
    latent, norm = layer.q_a_proj(x), layer.q_a_layernorm
    if is_plain(norm, RMSNorm):
        return small_step(layer, "rms_norm")(latent, norm.weight, norm.eps)
    return norm(latent)


def absorbed(layer, q: Tensor, W_UK: Tensor, positions: Tensor, dtype: torch.dtype) -> Tensor:
    """MQA mode's queries [T, H, D] in dtype, of q [T, H, nope | not yet turned]: each part written where it stays."""
    c = layer.config
    nope, turning = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
    query = q.new_empty(len(q), c.n_heads, c.latent_dim, dtype=dtype)
    latent, turned = query.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    product_into(latent, nope, W_UK)
    small_step(layer, "turn_into")(turned, turning, positions, layer.freqs, "interleaved")
    return query


def projected(layer, u: Tensor, W_UV: Tensor) -> Tensor:
    """The layer's output [T, dim] of attention over latent rows, u [T, H, latent]."""
    heads = u.new_empty(len(u), len(W_UV), W_UV.shape[1])
    product_into(heads, u, W_UV.transpose(1, 2))
    return layer.o_proj(heads.flatten(1))


def append_latents(layer, rows: Tensor, cache: PagedCache, slots: Tensor, positions: Tensor) -> None:
    """Norm and RoPE of the projected rows [T, D], and into the pages."""
    c, norm = layer.config, layer.kv_a_layernorm
    if is_plain(norm, RMSNorm) and (cache.fp8 or rows.dtype == cache.dtype):
        step = small_step(layer, "append_latents")
        return step(cache.kv_pages, slots, rows, norm.weight, norm.eps, positions, layer.freqs)
    latent, turning = rows.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    turned = layer.ops.rope(turning, positions, layer.freqs, "interleaved")
    kv = torch.cat((norm(latent), turned), dim=-1)
    write_kv(cache.kv_pages, slots, widened(kv, cache.dtype), c.kv_lora_rank)


def index_step(
    layer, x: Tensor, q_latent: Tensor, cache, slots: Tensor | None, positions: Tensor, first: int = 0
) -> tuple[Tensor, Tensor]:
    """The tokens' index keys into the pages; of the tokens from `first` on, q_idx [T - first, Hi, Di] and w fp32
    [T - first, Hi], as they are scored. cache: None where the keys are there already."""
    indexer, c = layer.indexer, layer.config
    if not (is_plain(indexer, Indexer) and has_plain_parts(indexer)):
        q_idx, k_idx, w, q_scale, k_scale = layer._index(x, q_latent, positions)
        if cache is not None:
            write_index(cache.index_pages, slots, k_idx, k_scale)
        return q_idx[first:], (w * q_scale)[first:]
    norm, heads = indexer.k_norm, indexer.weights_proj
    if cache is not None:
        k, turning = indexer.wk(x), (positions, layer.freqs, c.index_rope)
        small_step(layer, "append_index")(cache.index_pages, slots, k, norm.weight, norm.bias, norm.eps, *turning)
    q = indexer.wq_b(q_latent[first:]).unflatten(-1, (c.index_n_heads, c.index_head_dim))
    w = small_step(layer, "head_weights")(x[first:], heads.weight)
    return small_step(layer, "index_queries")(q, w, positions[first:], layer.freqs, c.index_rope)


def check_finite(cache: PagedCache, slots: Tensor, w: Tensor | None) -> None:
    """No NaN or infinity in what was just stored, or in the queries' weights. On a GPU the host waits once for all."""
    kv = cache.kv_pages.flatten(0, 1)[slots]
    found = {"kv": read_kv(kv, cache.v_dim, torch.float32) if cache.fp8 else kv}
    if w is not None:
        page_size = cache.table.page_size
        scales = read_index(cache.index_pages[slots // page_size], cache.index_dim)[1].unflatten(0, (-1, page_size))
        found |= {"k_idx": scales.gather(1, (slots % page_size)[:, None]), "q_idx": w}
    finite = torch.stack([part.isfinite().all() for part in found.values()])
    if not finite.all():
        name = list(found)[finite.tolist().index(False)]
        raise ValueError(f"{name} must be finite, got NaN or infinity in the rows of new tokens")


def product_into(out: Tensor, x: Tensor, matrices: Tensor) -> None:
    """out [T, H, n] = x [T, H, m] times each head's matrix [H, m, n]; out may be a part of wider rows."""
    if out.dtype == x.dtype == matrices.dtype:
        torch.bmm(x.transpose(0, 1), matrices, out=out.transpose(0, 1))
    else:  # inside autocast, or a cache in a wider dtype
        out.copy_(torch.bmm(x.transpose(0, 1), matrices).transpose(0, 1))


def recorded(step: dict) -> dict:
    """What `record` gets of a step."""
    return {name: step[name] for name in RECORDED if name in step}


def small_step(layer, name: str) -> Callable:
    """A step of `ops`, or the reference's where it has none of that name."""
    return getattr(layer.ops, name, None) or getattr(dsa_ref, name)


def has_plain_parts(indexer: Indexer) -> bool:
    """Whether its norm is a plain LayerNorm with weight and bias, and its head weights a plain matrix."""
    norm, heads = indexer.k_norm, indexer.weights_proj
    affine = is_plain(norm) and type(norm) is nn.LayerNorm and norm.weight is not None and norm.bias is not None
    return affine and is_plain(heads) and heads.bias is None


def check_pools(layer, cache, x) -> None:
    """A paged cache of the layer's sizes, beside x."""
    c, with_indexer = layer.config, layer.indexer is not None
    if (cache.index_pages is not None) != with_indexer:
        raise ValueError(f"cache must be made with indexer={with_indexer}, got indexer={not with_indexer}")
    wanted, got = (c.kv_lora_rank, c.latent_dim, c.index_head_dim), (cache.v_dim, cache.latent_dim, cache.index_dim)
    if wanted != got:
        raise ValueError(f"cache must be made for kv_lora_rank, D and index_head_dim of {wanted}, got {got}")
    if cache.kv_pages.device != x.device:
        raise ValueError(f"cache must be on {x.device} like x, got {cache.kv_pages.device}")
    narrow = {torch.float32, torch.bfloat16, torch.float16}
    if cache.dtype != layer._weight().dtype and not {cache.dtype, layer._weight().dtype} <= narrow:
        raise TypeError(f"cache must have the weights' dtype, {layer._weight().dtype}, got {cache.dtype}")


def check_decode(layer, x, cache, batch, record, indices) -> None:
    """Arguments of `DSALayer.decode`."""
    if lacking := [name for name in STEPS if not hasattr(layer.ops, name)]:
        raise TypeError(f"ops must have {', '.join(STEPS)} to decode, got none of {lacking}")
    for name, value, kind in (("cache", cache, PagedCache), ("batch", batch, Batch)):
        if not isinstance(value, kind):
            raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
    if not layer.config.index_fp8:
        raise ValueError("config must have index_fp8 = True to decode from pages, which hold FP8 keys, got False")
    check_shapes(x=(x, "B N dim"))
    wanted = tuple(batch.positions.shape)
    if tuple(x.shape[:2]) != wanted:
        raise ValueError(f"x must have shape [B, N, dim] with B, N = {wanted} as in batch, got {list(x.shape)}")
    if x.shape[1] > MAX_QUERIES:
        raise ValueError(f"x must have N at most {MAX_QUERIES} tokens a sequence, got {x.shape[1]}")
    layer._check_input(x)
    if torch.is_grad_enabled() and (x.requires_grad or any(weight.requires_grad for weight in layer.parameters())):
        raise ValueError("x must not bring gradients, which a cache does not keep: use torch.no_grad()")
    check_pools(layer, cache, x)
    cache.table.check_batch(batch)
    for sequence in batch.sequences:
        if cache.filled[sequence] != batch.table.length(sequence):
            held, table = cache.filled[sequence], batch.table.length(sequence)
            raise ValueError(f"cache must hold the {table} tokens of sequence {sequence}, got {held} in this layer")
    if record is not None and not isinstance(record, list):
        raise TypeError(f"record must be a list, got {type(record).__name__}")
    if (indices is None) != (layer.indexer is not None):
        wanted = "None in a layer with an indexer" if indices is not None else "given to a layer without an indexer"
        raise ValueError(f"indices must be {wanted}, got {type(indices).__name__}")
    if indices is not None:
        check_shapes(x=(x, "B N dim"), indices=(indices, "B N k"))
        check_dtype("indices", indices, (torch.int32,))
        if values_readable(indices):
            hidden = (indices < -1) | (indices > batch.positions[..., None])
            if hidden.any():
                raise ValueError("indices must hold positions that each query may see, or -1, got others")
