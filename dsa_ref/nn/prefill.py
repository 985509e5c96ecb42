"""A layer's chunk of tokens without gradients, in few launches: every small step is one of `ops`, as in `decode`.

    rows of the cache     kv_a_proj -> norm, RoPE, stored; wk -> norm, RoPE, Hadamard, FP8, stored      2 products
    queries               q_a_proj -> norm -> q_b_proj -> W_UK and RoPE, into one buffer                3 products
    the indexer's queries wq_b -> RoPE, Hadamard, FP8; weights_proj in fp32                             1 product
    selection, attention  `lightning_select`, `sparse_attention`; `mha_attention` for rows that see few keys
    output                W_UV -> o_proj                                                                2 products

`DSALayer._attend` is the same step written out, with gradients. Inside `unchecked_values` rows are written straight
into a LayerCache, behind its length, and no host waits; elsewhere beside it, and the cache looks at them first.

Source: SPEC sections 2 and 3.
"""

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..contracts import check_finite, unchecked_values, values_readable
from ..precision import autocast_on
from .cache import LayerCache
from .checkpointing import will_be_repeated_with_gradients
from .decode import SMALL_STEPS, absorbed, append_latents, index_step, product_into, query_latent, small_step


def serves(layer, x: Tensor, attention: str) -> bool:
    """Whether `prefill_step` gives what `_attend` does: a selection of its own, `ops` with all small steps, no
    derivative of any kind to keep or to come, and no autocast, whose products have another dtype than the weights."""
    return (
        attention == "sparse"
        and all(hasattr(layer.ops, name) for name in SMALL_STEPS)
        and not (torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, *layer.parameters())))
        and torch._C._functorch.peek_interpreter_stack() is None
        and forward_ad._current_level < 0
        and not autocast_on(x.device)
        and not will_be_repeated_with_gradients()
    )


def prefill_step(
    layer, x: Tensor, positions: Tensor, cache, indices: Tensor | None, recording: bool
) -> tuple[Tensor, dict]:
    """`DSALayer.forward` in sparse mode on checked arguments: the output [T, dim], and the step as `record` gets it.

    The first rows may see so few keys that MHA mode is cheaper, see `first_rows`. recording: whether the step is
    complete, or without what no row of the output needs.
    """
    T, ranges = len(x), layer._ranges(positions, cache)
    whole, few = first_rows(layer, T, cache)
    scored = 0 if recording else whole  # the first row that is
    rows, first = rows_beside(layer, x, cache)
    slots = torch.arange(first, first + T, device=x.device)
    with unchecked_values():
        append_latents(layer, layer.kv_a_proj_with_mqa(x), rows, slots, positions)
        q_latent = query_latent(layer, x)
        q_idx = w = None
        if layer.indexer is not None:
            q_idx, w = index_rows(layer, x, q_latent, rows, slots, positions, scored)
    rows.length += T
    keys = rows.rows()
    if layer.indexer is not None:  # here, since rows that see few keys are not scored, and scores would show it
        check_finite(" in the rows of new tokens", k_idx=keys[1], k_scale=keys[2], q_idx=w, q_latent=q_latent)
    if rows is not cache:
        keys = layer._all_rows(cache, *keys)
    first = whole, few, cache is not None  # a cache holds one sequence
    return attend_step(layer, (q_latent, q_idx, w), keys, positions, ranges, indices, first, recording)


def attend_step(
    layer, queries: tuple, keys: tuple, positions: Tensor, ranges: dict[str, Tensor], indices: Tensor | None,
    first: tuple[int, int, bool] = (0, 0, False), recording: bool = False,
) -> tuple[Tensor, dict]:  # fmt: skip
    """What `prefill_step` does once rows and queries are made, for rows that see `ranges` of keys; returns the same.

    queries: (q_latent [T, q_lora_rank], q_idx, w), the last two of the rows that are scored, None in a layer without an
    indexer; keys: (kv, k_idx, k_scale), up to the last one that a row sees at least; first: what `first_rows` says of
    these rows, and whether all that they see begins with the first key.
    """
    (q_latent, q_idx, w), (kv, k_idx, k_scale), (whole, few, causal) = queries, keys, first
    c, T = layer.config, len(q_latent)
    scored, absorbing = (0, 0) if recording else (whole, few)  # the first row that is
    step = {"kv": kv, "indices": indices} | ranges
    if layer.indexer is not None:
        step |= {"q_idx": q_idx, "k_idx": k_idx, "w": w, "k_scale": k_scale}
        if scored < T or T == 0:
            k = min(c.index_topk, len(k_idx))  # a list has no more places than there are keys
            seen = {name: bound[scored:] for name, bound in ranges.items()}
            step["indices"] = layer.ops.lightning_select(q_idx, k_idx, w, k, k_scale=k_scale, **seen)

    q = layer.q_b_proj(q_latent).unflatten(-1, (c.n_heads, -1))
    W_UK, W_UV = layer._up_projections(kv)
    with unchecked_values():
        step["q"] = absorbed(layer, q[absorbing:], W_UK, positions[absorbing:], kv.dtype)  # before q itself is turned
    heads, lses = [], []  # of the rows in MHA mode, then of the others
    with unchecked_values() if indices is None else contextlib.nullcontext():  # nobody has looked at shared ones yet
        if few:
            turn_queries(layer, q[:few], positions[:few])
            start = None if causal else ranges["start"][:few]
            lists = None if whole == few else step["indices"][whole - scored : few - scored]
            seen = kv[: len(kv) - T + few]
            for out, lse in in_mha_mode(layer, q[:few].to(kv.dtype), seen, (W_UK, W_UV), whole, lists, start):
                heads.append(out)
                lses.append(lse)
        if few < T or T == 0:
            lists = step["indices"][few - scored :]
            rest = step["q"][few - absorbing :], kv, lists, c.softmax_scale, c.kv_lora_rank
            u, lse = layer.ops.sparse_attention(*rest)
            lses.append(lse)
            heads = [all_heads(heads, u, W_UV)]
    step["lse"] = lses[0] if len(lses) == 1 else torch.cat(lses)
    heads = heads[0] if len(heads) == 1 else torch.cat(heads)
    return layer.o_proj(heads.flatten(1)), step


def all_heads(before: list[Tensor], u: Tensor, W_UV: Tensor) -> Tensor:
    """Heads [T, H, v] of the rows before, and of attention over latent rows, u [rows, H, latent], in one buffer."""
    first = sum(map(len, before))
    heads = u.new_empty(first + len(u), len(W_UV), W_UV.shape[1])
    if before:
        torch.cat(before, out=heads[:first])
    product_into(heads[first:], u, W_UV.transpose(1, 2))
    return heads


def first_rows(layer, T: int, cache) -> tuple[int, int]:
    """(whole, few): how many of T rows select every key that they may see, and how many attend in MHA mode.

    A row sees at most the cache's keys and the call's up to itself, so both follow from lengths alone. `few` rows see
    at most `DSAConfig.most_mha_keys`; the first `whole` of them also no more than index_topk, so that nothing has to be
    scored for them. Lists that another layer has made are not taken for whole. Both are 0 where the heads' keys and
    values of all tokens so far, which are made for these rows alone, cost more FLOPs than the rows save.
    """
    c, before = layer.config, 0 if cache is None else cache.length
    whole, few = (max(0, min(T, keys - before)) for keys in (min(c.index_topk, c.most_mha_keys), c.most_mha_keys))
    if layer.indexer is None:
        whole = 0
    if not few or not layer.rows_are_last:
        return 0, 0

    def pairs(count, most):
        """Of the first `count` rows with the keys that each may see, at most `most`."""
        growing = max(0, min(count, most - before))
        return growing * before + growing * (growing + 1) // 2 + (count - growing) * most

    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    saved = 2 * c.n_heads * (c.latent_dim + c.kv_lora_rank) * pairs(few, c.index_topk)
    saved += 2 * c.index_n_heads * c.index_head_dim * pairs(whole, before + whole)
    spent = 2 * c.n_heads * (head + c.v_head_dim) * pairs(few, before + few)
    spent += 2 * c.n_heads * c.kv_lora_rank * (c.qk_nope_head_dim + c.v_head_dim) * (before + few)
    return (whole, few) if saved > spent else (0, 0)


def in_mha_mode(
    layer,
    q: Tensor,
    kv: Tensor,
    matrices: tuple[Tensor, Tensor],
    whole: int,
    lists: Tensor | None,
    start: Tensor | None,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Heads [rows, H, v] and log-sum-exps [rows, H] of q [few, H, nope | rope], turned, in the parts that there are.

    The first `whole` rows see all their keys, the others what their lists name. kv: [S, D], up to the last row's own
    key; matrices: W_UK and W_UV; start: int32 [few], or None for 0.
    """
    few, attend = len(q), small_step(layer, "mha_attention")
    keys, values = decompressed(layer, kv, *matrices)
    for first, last, indices in ((0, whole, None), (whole, few, lists)):
        if first < last:
            seen = len(kv) - few + last
            ranges = None if start is None else start[first:last]
            yield attend(q[first:last], keys[:seen], values[:seen], layer.config.softmax_scale, indices, ranges)


def turn_queries(layer, q: Tensor, positions: Tensor) -> None:
    """RoPE of q [T, H, nope | rope] where it stands: MHA mode's queries."""
    turning = q[..., layer.config.qk_nope_head_dim :]
    small_step(layer, "turn_into")(turning, turning, positions, layer.freqs, "interleaved")


def decompressed(layer, kv: Tensor, W_UK: Tensor, W_UV: Tensor) -> tuple[Tensor, Tensor]:
    """MHA mode's keys [S, H, nope | rope] and values [S, H, v], each part written where it stays."""
    c = layer.config
    latent, turned = kv.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=1)
    latent = latent[:, None].expand(-1, c.n_heads, -1)
    keys = kv.new_empty(len(kv), c.n_heads, c.qk_nope_head_dim + c.qk_rope_head_dim)
    values = kv.new_empty(len(kv), c.n_heads, c.v_head_dim)
    product_into(keys[..., : c.qk_nope_head_dim], latent, W_UK.transpose(1, 2))
    for_every_head(keys[..., c.qk_nope_head_dim :], turned)
    product_into(values, latent, W_UV.transpose(1, 2))
    return keys, values


def for_every_head(out: Tensor, x: Tensor) -> None:
    """x [S, R] into out [S, H, R]; as numbers of eight bytes where they lie so, which a GPU copies faster than bf16."""
    if all(n * x.element_size() % 8 == 0 for n in (x.shape[1], out.storage_offset(), *out.stride()[:2])):
        out, x = out.view(torch.int64), x.clone(memory_format=torch.contiguous_format).view(torch.int64)
    out.copy_(x[:, None])


def row_starts(positions: Tensor, cache) -> Tensor:
    """Each row's first visible key, int32 [T]: the cache's first, or where a packed sequence begins."""
    if cache is not None:
        return torch.zeros(len(positions), dtype=torch.int32, device=positions.device)
    return torch.arange(len(positions), dtype=torch.int32, device=positions.device) - positions.int()


def rows_beside(layer, x: Tensor, cache) -> tuple[LayerCache, int]:
    """Where the rows of x are written, and from which row on: into the cache where nobody looks at them, else beside.

    A step that fails afterwards leaves the cache's length, behind which it has written.
    """
    if type(cache) is LayerCache and cache.dtype == x.dtype and not values_readable(x):
        return cache, cache.length
    return LayerCache(layer.config, max(1, len(x)), x.dtype, x.device, layer.indexer is not None), 0


def index_rows(
    layer, x: Tensor, q_latent: Tensor, rows: LayerCache | None, slots: Tensor | None, positions: Tensor, first: int
) -> tuple[Tensor, Tensor]:
    """The tokens' index keys into rows; of those from `first` on, q_idx [T - first, Hi, Di] and w fp32 [T - first, Hi]
    as they are scored. rows: None where the keys are there already."""
    if layer.config.index_fp8:
        return index_step(layer, x, q_latent, rows, slots, positions, first)
    q_idx, k_idx, w, _, _ = layer._index(x, q_latent, positions)
    if rows is not None:
        rows.k_idx[rows.length : rows.length + len(x)] = k_idx
    return q_idx[first:], w[first:]
