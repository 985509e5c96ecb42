"""transformers' attention of DeepSeek-V3.2 and GLM-5, computed sparsely: no score matrix, no mask, no expanded keys.

    rows of the cache     kv_a_proj_with_mqa -> norm, RoPE: latent [B, T, C], turned [B, T, R]
    index keys            indexer.wk -> k_norm -> RoPE (-> Hadamard, FP8): [B, T, Di]
    selection             `ops.lightning_select`, some queries at a time: int32 [B, S, k]
    attention             q absorbs W_UK; `ops.sparse_attention` over selected rows; W_UV -> o_proj

Where there are at most index_topk keys nothing is left out: no scores, and for many queries torch's own dense attention
over expanded heads, as transformers' sdpa. The cache is transformers' own, so that beams, crops and offloading work.

Source: SPEC sections 2 and 3; transformers 5.23, models/deepseek_v32 and models/glm_moe_dsa.
"""

from typing import NoReturn

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.models.deepseek_v32.modeling_deepseek_v32 import DeepseekV32Attention, DeepseekV32Indexer
from transformers.models.glm_moe_dsa.modeling_glm_moe_dsa import GlmMoeDsaAttention, GlmMoeDsaIndexer

from ...nn.decode import product_into
from ...nn.wrapped import matrix
from .operators import attend, narrow, run, select, widened
from .visible import NAME, NOT_SPARSE, Visible, everything, from_mask, visible

NUMBERS_AT_ONCE = 1 << 30  # of queries, absorbed and not, and outputs: 2 GiB in bf16
MASKED = 4  # times index_topk keys, and times the queries, up to which the reference masks, see `_masked`
FEW_QUERIES = 64  # score FP8 numbers as floats, which spares reading all keys to narrow them again


class SparseAttention:
    """What a sparse layer computes; see the two classes below. `dsa_ops` and `dsa_index_fp8` are set by `make_sparse`.

    With another attention implementation than "dsa" in the config, it is transformers' own again.
    """

    half_split = True  # the indexer's RoPE layout
    shares = False  # whether a later layer may ask for the selection

    def __setstate__(self, state: dict) -> None:
        """An unpickled layer needs "dsa" among transformers' implementations, maybe in another process."""
        super().__setstate__(state)
        register()

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor],
        attention_mask: Visible | Tensor | None,
        past_key_values=None,
        position_ids: Tensor | None = None,
        cache=None,  # what transformers 5.24 calls past_key_values
        **kwargs,
    ) -> tuple:
        """As in transformers, but for attention_mask, which is what `visible` returned, or a mask of rank 4."""
        cached = past_key_values if cache is None else cache
        check_cached_keys(self, cached)
        if self.config._attn_implementation != NAME:
            kwargs |= {"past_key_values": past_key_values} if cache is None else {"cache": cache}
            return super().forward(
                hidden_states=hidden_states,
                position_embeddings=position_embeddings,
                attention_mask=attention_mask,
                position_ids=position_ids,
                **kwargs,
            )
        attentions = kwargs.get("output_attentions", False) or self.config.output_attentions
        S = hidden_states.shape[1]
        T = S if cached is None else cached.get_mask_sizes(S, self.layer_idx)[0]
        shared = kwargs.get("prev_topk_indices")
        check_parts(self)
        check_sizes(self, hidden_states, position_embeddings, shared)
        seen = self._what_is_seen(hidden_states, attention_mask, position_ids, T, attentions)
        latent, turned = self._rows(hidden_states, position_embeddings)
        if cached is not None:
            latent, turned = cached.update(latent, turned, self.layer_idx)
        latent, turned = latent[:, 0], turned[:, 0]
        keys = self._index_keys(hidden_states, position_embeddings, cached)
        q_latent = self.q_a_layernorm(self.q_a_proj(hidden_states))
        k = (shared.shape[2] or T) if self.indexer is None else self.indexer.index_topk  # not the config's: as theirs
        if self._densely(S, T, k):
            expanded = self.expand_kv(latent[:, None], turned[:, None])
            y = self.o_proj(self._in_heads(q_latent, expanded, position_embeddings, seen))
            indices = y.new_empty((*y.shape[:2], 0), dtype=torch.int32)  # for layers that share: nothing was left out
        else:
            rows = latent, turned, keys
            y, indices = self._sparse(hidden_states, q_latent, rows, position_embeddings, seen, shared)
        return (y, None, indices) if self.shares else (y, None)

    def _rows(self, x, position_embeddings):
        """What is cached of each token: normed latent [B, 1, S, C] and turned RoPE key [B, 1, S, R]."""
        latent, turning = self.kv_a_proj_with_mqa(x).split((self.kv_lora_rank, self.qk_rope_head_dim), dim=-1)
        return self.kv_a_layernorm(latent)[:, None], turn(turning, *position_embeddings, half_split=False)[:, None]

    @torch.no_grad()
    def _index_keys(self, x, position_embeddings, cached):
        """The index keys of all tokens so far, [B, T, Di]; None in a layer that shares another's selection."""
        if self.indexer is None:
            return None
        keys = turn(self.indexer.k_norm(self.indexer.wk(x)), *position_embeddings, half_split=self.half_split)
        if self.dsa_index_fp8:
            keys = widened(*run(narrow, keys, True, self.dsa_ops), keys.dtype)
        return keys if cached is None else cached.update_indexer(keys, self.layer_idx)

    def _densely(self, S, T, k):
        """Whether all keys are attended to in expanded heads: nothing is left out, and it takes fewer FLOPs."""
        if T > k:
            return False
        expand = self.kv_lora_rank * (self.qk_nope_head_dim + self.v_head_dim)  # or absorb, a head and token
        dense = expand * T + S * T * (self.qk_head_dim + self.v_head_dim)
        absorbed = expand * S + S * T * (2 * self.kv_lora_rank + self.qk_rope_head_dim)
        return dense <= absorbed

    def _masked(self, S, T, k):
        """Whether the selection becomes a mask over expanded heads: many queries that see little more than they keep,
        and the reference, which gathers rows slower than torch multiplies them. Kernels gather as fast."""
        return self.dsa_ops == "dsa_ref" and MASKED * S >= T and T <= MASKED * k

    def _in_heads(self, q_latent, expanded, position_embeddings, seen, indices=None):
        """Heads [B, S, H · v] by torch's own attention over expanded keys and values: every visible key, or those that
        indices [B, S, k] name."""
        keys, values = expanded
        q = torch.cat(self._queries(q_latent, position_embeddings), dim=-1).transpose(1, 2)
        causal = seen.plain and indices is None and q.shape[2] == keys.shape[2]
        mask = None if causal else seen.mask(keys.shape[2]) if indices is None else named(indices, keys.shape[2])
        out = F.scaled_dot_product_attention(q, keys, values, attn_mask=mask, is_causal=causal, scale=self.scaling)
        if mask is not None:
            out = out.masked_fill(~seen.sees_any()[:, None, :, None], 0.0)
        return out.transpose(1, 2).flatten(2)

    def _queries(self, q_latent, position_embeddings):
        """[B, S, H, nope] and [B, S, H, rope], the latter turned."""
        q = self.q_b_proj(q_latent).unflatten(-1, (-1, self.qk_head_dim))
        nope, turning = q.split((self.qk_nope_head_dim, self.qk_rope_head_dim), dim=-1)
        cos, sin = (angle[:, :, None] for angle in position_embeddings)
        return nope, turn(turning, cos, sin, half_split=False)

    def _sparse(self, x, q_latent, rows, position_embeddings, seen, shared):
        """Selected keys alone: output [B, S, dim], and the selection int32 [B, S, k], -1 for none, if asked for."""
        latent, turned, keys = rows
        B, S = x.shape[:2]
        masked = self._masked(S, latent.shape[1], shared.shape[2] if self.indexer is None else self.indexer.index_topk)
        W_UK, W_UV = (None, None) if masked else self._up_projections(latent)
        expanded = self.expand_kv(latent[:, None], turned[:, None]) if masked else None
        outs, lists = [], []
        for b, t in blocks(B, S, NUMBERS_AT_ONCE // self._numbers_a_query()):
            angles = tuple(angle.expand(B, -1, -1)[b, t] for angle in position_embeddings)
            there = None if seen.seen is None else seen.seen[b]
            some = seen._replace(start=seen.start[b, t], end=seen.end[b, t], seen=there)
            if self.indexer is not None:
                indices = self._select(x[b, t], q_latent[b, t], keys[b], angles, some)
            else:
                indices = shared[b, t]
            if masked:
                heads = self._in_heads(q_latent[b, t], [part[b] for part in expanded], angles, some, indices)
            else:
                q = absorbed(*self._queries(q_latent[b, t], angles), W_UK, latent.dtype)
                u = run(attend, q, latent[b], turned[b], indices, self.scaling, self.dsa_ops)
                heads = projected(u, W_UV).flatten(2)
            outs.append(self.o_proj(heads))
            if self.shares:
                lists.append(indices)
        return joined(outs, B, S), joined(lists, B, S) if lists else None

    @torch.no_grad()
    def _select(self, x, q_latent, keys, position_embeddings, seen):
        """The index_topk best keys of each query, int32 [B, S, k]; all of them where there are no more."""
        indexer, T = self.indexer, keys.shape[1]
        if T <= indexer.index_topk:
            return everything(seen, T)
        q = indexer.wq_b(q_latent).unflatten(-1, (indexer.n_heads, indexer.head_dim))
        cos, sin = (angle[:, :, None] for angle in position_embeddings)
        q = turn(q, cos, sin, half_split=self.half_split)
        w = indexer.weights_proj(x.to(indexer.weights_proj.weight.dtype)).float()
        w = w * (indexer.n_heads**-0.5 * indexer.softmax_scale)  # a positive factor may cross the relu
        scale = None
        if self.dsa_index_fp8 and x.shape[1] >= FEW_QUERIES:
            q, q_scale = run(narrow, q, True, self.dsa_ops)
            keys, scale = run(narrow, keys, False, self.dsa_ops)  # cached rotated and rounded: the same numbers
            w = w * q_scale
        elif self.dsa_index_fp8:
            q = widened(*run(narrow, q, True, self.dsa_ops), q.dtype)
        return run(
            select,
            q.to(keys.dtype),
            keys,
            w,
            scale,
            seen.start,
            seen.end,
            seen.seen,
            indexer.index_topk,
            self.dsa_ops,
        )

    def _up_projections(self, latent):
        """W_UK [H, nope, C] and W_UV [H, v, C], the two halves of kv_b_proj, with adapters and what else wraps it."""
        both = matrix("kv_b_proj", self.kv_b_proj, self.kv_lora_rank, latent.dtype, latent.device)
        both = both.unflatten(0, (-1, self.qk_nope_head_dim + self.v_head_dim))
        return both.split((self.qk_nope_head_dim, self.v_head_dim), dim=1)

    def _numbers_a_query(self):
        """How many numbers a query comes to, from q_b_proj to the heads' outputs."""
        head = 2 * self.qk_head_dim + 2 * self.kv_lora_rank + self.qk_rope_head_dim + self.v_head_dim
        return self.num_heads * head

    def _what_is_seen(self, x, mask, position_ids, T, attentions) -> Visible:
        """What the queries may see, and errors for what a sparse layer does not compute."""
        if attentions:
            raise ValueError(
                "output_attentions must be False: a sparse layer has no weights of all pairs; "
                'set_attn_implementation("eager") has them'
            )
        if self.training and self.attention_dropout:
            raise ValueError(f"attention_dropout must be 0 in training, got {self.attention_dropout}")
        if mask is None:
            raise ValueError(
                "attention_mask must come from the model, got None: continuous batching, which makes none, and calls "
                "of a layer by itself are not served"
            )
        seen = mask if isinstance(mask, Visible) else from_mask(mask, *x.shape[:2], T)
        made_for, wanted = [*seen.start.shape, seen.keys], [*x.shape[:2], T]
        if made_for != wanted:  # a dict of masks from another call
            raise ValueError(f"attention_mask must be made for [batch, queries, keys] = {wanted}, got {made_for}")
        if seen.plain and self.layer_idx == 0 and x.shape[1] > 1 and not torch.compiler.is_compiling():
            if position_ids is not None and (position_ids.diff(dim=-1) < 0).any():
                raise ValueError(
                    "position_ids must count up: packed sequences need use_cache=False and no attention_mask, without "
                    "which transformers lets them see each other"
                )
        return seen


class SparseDeepseekV32Attention(SparseAttention, DeepseekV32Attention):
    """A layer of DeepSeek-V3.2."""


class SparseGlmMoeDsaAttention(SparseAttention, GlmMoeDsaAttention):
    """A layer of GLM-5, which may share the selection of an earlier one."""

    half_split, shares = False, True


SPARSE = {DeepseekV32Attention: SparseDeepseekV32Attention, GlmMoeDsaAttention: SparseGlmMoeDsaAttention}
INDEXERS = (DeepseekV32Indexer, GlmMoeDsaIndexer)


def turn(x: Tensor, cos: Tensor, sin: Tensor, half_split: bool) -> Tensor:
    """RoPE on the first dims of x [.., D], as many as cos and sin [.., R] have; each angle stands in them twice.

    Pairs are (i, i + R/2) where half_split, else (2i, 2i + 1), which come out as (i, i + R/2): transformers' way.
    """
    R = cos.shape[-1]
    turning, rest = x[..., :R], x[..., R:]
    first, second = turning.chunk(2, dim=-1) if half_split else (turning[..., 0::2], turning[..., 1::2])
    cos, sin = cos[..., : R // 2], sin[..., : R // 2]
    # Each product is rounded by itself, as there, so that bf16 has the same bits; fused ones would select other keys.
    return torch.cat((first * cos - second * sin, second * cos + first * sin, rest), dim=-1)


def absorbed(nope: Tensor, turned: Tensor, W_UK: Tensor, dtype: torch.dtype) -> Tensor:
    """MQA mode's queries [B, S, H, C | R] in dtype, of nope [B, S, H, n] and turned [B, S, H, R]; W_UK: [H, n, C]."""
    C = W_UK.shape[2]
    if traced(nope, turned, W_UK):
        return torch.cat((torch.einsum("bthn,hnc->bthc", nope, W_UK), turned), dim=-1).to(dtype)
    q = nope.new_empty(*nope.shape[:-1], C + turned.shape[-1], dtype=dtype)
    product_into(q[..., :C].flatten(0, 1), nope.flatten(0, 1), W_UK)  # where it stays: no copy
    q[..., C:] = turned
    return q


def projected(u: Tensor, W_UV: Tensor) -> Tensor:
    """Heads' outputs [B, S, H, v] of attention over latent rows u [B, S, H, C]; W_UV: [H, v, C]."""
    if traced(u, W_UV):
        return torch.einsum("bthc,hvc->bthv", u, W_UV)
    heads = u.new_empty(*u.shape[:-1], W_UV.shape[1])
    product_into(heads.flatten(0, 1), u.flatten(0, 1), W_UV.transpose(1, 2))
    return heads


def traced(*tensors: Tensor) -> bool:
    """Whether a gradient or torch.compile looks at what is done: then nothing is written into buffers."""
    return torch.compiler.is_compiling() or torch.is_grad_enabled() and any(x.requires_grad for x in tensors)


def named(indices: Tensor, T: int) -> Tensor:
    """The keys that indices [B, S, k] name, -1 for none, as a mask, bool [B, 1, S, T]."""
    mask = torch.zeros(*indices.shape[:2], T + 1, dtype=torch.bool, device=indices.device)
    return mask.scatter_(-1, torch.where(indices < 0, T, indices).long(), True)[:, None, :, :T]


def blocks(B: int, S: int, queries: int) -> list[tuple[slice, slice]]:
    """Slices of sequences and of queries, at most so many queries at once but one: whole sequences, or parts of one."""
    if S <= queries:
        some = max(1, queries // max(S, 1))
        return [(slice(b, b + some), slice(None)) for b in range(0, B, some)]
    rows = max(1, queries)
    return [(slice(b, b + 1), slice(t, t + rows)) for b in range(B) for t in range(0, S, rows)]


def joined(parts: list[Tensor], B: int, S: int) -> Tensor:
    """What the blocks of [B, S, ..] gave, in one tensor."""
    if len(parts) == 1:
        return parts[0]
    return torch.cat([part.flatten(0, 1) for part in parts]).unflatten(0, (B, S))


def register() -> None:
    """Make "dsa" an attention implementation of transformers."""
    AttentionInterface.register(NAME, not_sparse)
    AttentionMaskInterface.register(NAME, visible)


def not_sparse(module, *args, **kwargs) -> NoReturn:
    """Stands for the attention function, which a sparse layer does not call."""
    raise ValueError(NOT_SPARSE)


def check_parts(layer: nn.Module) -> None:
    """Refuse a layer with parts that are never called here, but that somebody wants called instead of transformers'."""
    if "expand_kv" in vars(layer):
        raise ValueError(f"expand_kv must be the layer's own, got {layer.expand_kv!r} in layer {layer.layer_idx}")
    indexer = layer.indexer
    if indexer is None:
        return
    wrong, hook = "", vars(indexer).get("_hf_hook")
    if type(indexer) not in INDEXERS:
        wrong = f"a {type(indexer).__name__}"
    elif indexer._forward_hooks or indexer._forward_pre_hooks:
        wrong = "one with forward hooks"
    elif "forward" in vars(indexer) and (hook is None or getattr(hook, "offload", False)):  # accelerate's others pass
        wrong = f"one whose forward was replaced by {vars(indexer)['forward']!r}"
    if wrong:
        raise ValueError(
            f"indexer must be transformers' own, got {wrong} in layer {layer.layer_idx}: a sparse layer calls its "
            "projections and its norm, not the indexer itself"
        )


def check_sizes(layer: nn.Module, x: Tensor, position_embeddings: tuple[Tensor, Tensor], shared: Tensor | None) -> None:
    """Refuse a call without tokens, with angles that are not those of its tokens, or without a selection to share."""
    (B, S), got = x.shape[:2], list(position_embeddings[0].shape[:-1])
    if B * S == 0:
        raise ValueError(f"input_ids must hold a token or more, got [{B}, {S}]")
    if got not in ([B, S], [1, S]):
        raise ValueError(f"position_ids must be [{B}, {S}] or [1, {S}], got {got}")
    if layer.indexer is None and shared is None:
        raise ValueError("prev_topk_indices must be given to a layer without an indexer, got None")


def check_cached_keys(layer, cached) -> None:
    """Refuse a cache whose index keys were rotated where this layer's are not, or the reverse; note which it holds."""
    if cached is None or layer.indexer is None or torch.compiler.is_compiling():
        return
    rows = cached.layers[layer.layer_idx] if layer.layer_idx < len(cached.layers) else None
    rotates = layer.dsa_index_fp8 and layer.config._attn_implementation == NAME
    filled = rows is not None and getattr(rows, "is_indexer_initialized", False)
    if filled and getattr(rows, "dsa_index_fp8", False) != rotates and rows.get_seq_length() > 0:  # 0: it was reset
        raise ValueError(
            f"the cache's index keys must be continued with index_fp8={not rotates} as they began, got "
            f"index_fp8={rotates} and {layer.config._attn_implementation!r}: start a new cache"
        )
    if rows is not None:
        rows.dsa_index_fp8 = rotates
