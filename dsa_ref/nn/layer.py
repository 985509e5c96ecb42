"""One whole attention layer of V3.2: MLA, its lightning indexer and the selection.

Submodules carry the names of the Hugging Face checkpoint (`model.layers.{i}.self_attn.*`). The steps come from the
package passed as `ops`: `DSALayer(config)` runs the reference, `DSALayer(config, ops=dsa_kernels)` the Triton kernels.

Source: DeepSeek-V3.2-Exp report, section 2 and appendix A; SPEC sections 2, 3 and 7.
"""

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsa_ref  # the default of `ops`: its steps are loaded before this module

from ..config import DSAConfig
from ..contracts import check_dtype, check_shapes, values_readable
from ..dense_attention import dense_attention, mha_attention
from ..rope import rope_frequencies
from .cache import LayerCache

ATTENTION = ("sparse", "mha", "dense")


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dim, in fp32, rounded to x.dtype once."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., dim], any float dtype -> the same shape and dtype."""
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer's own weights: queries from the shared latent, one key, one weight for each head."""

    def __init__(self, config: DSAConfig) -> None:
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.dim, config.index_n_heads, bias=False)

    def forward(self, x: Tensor, q_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x [T, dim], q_latent [T, q_lora_rank] (normed) -> q [T, Hi, Di], k [T, Di], both before RoPE, w fp32 [T, Hi].

        The inputs are detached: no gradient of the indexer ever reaches the main model.
        """
        x, q_latent = x.detach(), q_latent.detach()
        c = self.config
        q = self.wq_b(q_latent).unflatten(-1, (c.index_n_heads, c.index_head_dim))
        norm = self.k_norm
        k = F.layer_norm(self.wk(x).float(), norm.normalized_shape, norm.weight.float(), norm.bias.float(), norm.eps)
        w = F.linear(x.float(), self.weights_proj.weight.float())
        return q, k.to(x.dtype), w * c.index_n_heads**-0.5 * c.index_head_dim**-0.5


class Ops(Protocol):
    """What a layer runs: a package, or any namespace, that has these steps with `dsa_ref`'s contracts."""

    rope: Callable
    rotate_quantize: Callable
    lightning_select: Callable
    sparse_attention: Callable


class DSALayer(nn.Module):
    """V3.2's attention layer on packed tokens [T, dim].

    ops: the package whose `rope`, `rotate_quantize`, `lightning_select` and `sparse_attention` run (`dsa_ref` or
    `dsa_kernels`); what has no kernel always runs in the reference.
    """

    def __init__(self, config: DSAConfig, ops: Ops = dsa_ref) -> None:
        super().__init__()
        self.config, self.ops = config, ops
        c, head = config, config.qk_nope_head_dim + config.qk_rope_head_dim
        self.q_a_proj = nn.Linear(c.dim, c.q_lora_rank, bias=False)
        self.q_a_layernorm = RMSNorm(c.q_lora_rank, c.norm_eps)
        self.q_b_proj = nn.Linear(c.q_lora_rank, c.n_heads * head, bias=False)
        self.kv_a_proj_with_mqa = nn.Linear(c.dim, c.latent_dim, bias=False)
        self.kv_a_layernorm = RMSNorm(c.kv_lora_rank, c.norm_eps)
        self.kv_b_proj = nn.Linear(c.kv_lora_rank, c.n_heads * (c.qk_nope_head_dim + c.v_head_dim), bias=False)
        self.o_proj = nn.Linear(c.n_heads * c.v_head_dim, c.dim, bias=False)
        self.indexer = Indexer(c)
        self.register_buffer("freqs", rope_frequencies(c), persistent=False)

    def forward(
        self,
        x: Tensor,
        positions: Tensor,
        cache: LayerCache | None = None,
        attention: str = "sparse",
        record: list[dict] | None = None,
    ) -> Tensor:
        """Attend and return [T, dim] in x.dtype.

        x: [T, dim] in the weights' dtype. positions: int [T], each token's place in its own sequence; packed sequences
        are runs that start at 0, and a token sees its own run up to itself. cache: a LayerCache of one sequence, whose
        next tokens x holds. attention: "sparse" (selected keys, MQA mode), "mha" (the same selection as a mask over
        decompressed heads) or "dense" (every visible key, no selection).

        record: a list that receives one dict of the steps' inputs and outputs: "q_idx", "k_idx", "w" (with the query's
        scale), "k_scale" (or None), "kv" and "start" as `lightning_select` and `sparse_attention` take them; "indices"
        but for "dense"; "q", the absorbed query [T, H, D], or for "mha" in its place "q_heads" [T, H, nope + rope];
        "lse" [T, H].

        Raises: ValueError for wrong shapes, positions, a full cache or an unknown attention, TypeError for dtypes.
        """
        c = self.config
        self._check(x, positions, cache, attention)
        start = self._row_starts(positions, cache).to(torch.int32)
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q_heads, kv = self._queries(q_latent, positions), self._latents(x, positions)
        q_idx, k_idx, w, q_scale, k_scale = self._index(x, q_latent, positions)
        if cache is not None:
            kv, k_idx, k_scale = cache.append(kv, k_idx, k_scale)
        weights = w if q_scale is None else w * q_scale  # a positive scale may cross the relu
        step = {"q_idx": q_idx, "k_idx": k_idx, "w": weights, "k_scale": k_scale, "kv": kv, "start": start}
        if attention != "dense":
            scored = (tensor.detach() for tensor in (q_idx, k_idx, weights))
            step["indices"] = self.ops.lightning_select(*scored, c.index_topk, k_scale=k_scale, start=start)
        if attention == "mha":
            step["q_heads"] = q_heads
            out, step["lse"] = self._decompressed(q_heads, kv, step["indices"], start)
        else:
            W_UK, W_UV = self._up_projections()
            scale, v_dim = c.softmax_scale, c.kv_lora_rank
            nope, turned = q_heads.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
            step["q"] = torch.cat((torch.einsum("thn,hnc->thc", nope, W_UK), turned), dim=-1)
            if attention == "dense":
                u, step["lse"] = dense_attention(step["q"], kv, scale, v_dim, start)
            else:
                u, step["lse"] = self.ops.sparse_attention(step["q"], kv, step["indices"], scale, v_dim)
            out = torch.einsum("thc,hvc->thv", u, W_UV)
        if record is not None:
            record.append(step)
        return self.o_proj(out.flatten(1))

    def _apply(self, fn, recurse=True):
        """Move or cast the weights; RoPE's frequencies follow to the device but stay fp32, whatever the weights are."""
        super()._apply(fn, recurse)
        self.freqs = rope_frequencies(self.config).to(self.o_proj.weight.device)  # the CPU's bits everywhere
        return self

    def _queries(self, q_latent: Tensor, positions: Tensor) -> Tensor:
        """[T, H, nope | rope], the rope part turned, interleaved."""
        c = self.config
        q = self.q_b_proj(q_latent).unflatten(-1, (c.n_heads, -1))
        nope, turning = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return torch.cat((nope, self.ops.rope(turning, positions, self.freqs, "interleaved")), dim=-1)

    def _latents(self, x: Tensor, positions: Tensor) -> Tensor:
        """The cached row of each token, [T, D]: normed latent | turned rope key."""
        c = self.config
        latent, turning = self.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        turned = self.ops.rope(turning, positions, self.freqs, "interleaved")
        return torch.cat((self.kv_a_layernorm(latent), turned), dim=-1)

    def _index(self, x, q_latent, positions):
        """The indexer's q, k, w as they are scored: FP8 with scales, or turned floats with None for both scales."""
        q, k, w = self.indexer(x, q_latent)
        if not self.config.index_fp8:
            q, k = (self.ops.rope(tensor, positions, self.freqs, "half") for tensor in (q, k))
            return q, k, w, None, None
        q_idx, q_scale = self.ops.rotate_quantize(q.detach(), positions, self.freqs)
        k_idx, k_scale = self.ops.rotate_quantize(k.detach(), positions, self.freqs)
        return q_idx, k_idx, w, q_scale, k_scale

    def _up_projections(self) -> tuple[Tensor, Tensor]:
        """W_UK [H, nope, latent] and W_UV [H, v, latent], the two halves of kv_b_proj."""
        c = self.config
        both = self.kv_b_proj.weight.view(c.n_heads, c.qk_nope_head_dim + c.v_head_dim, c.kv_lora_rank)
        return both.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)

    def _decompressed(self, q, kv, indices, start):
        """MHA mode: a key and a value for every head from each latent row, and the selection as a mask."""
        c = self.config
        latent, turned = kv.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
        both = self.kv_b_proj(latent).unflatten(-1, (c.n_heads, -1))
        k_nope, v = both.split((c.qk_nope_head_dim, c.v_head_dim), dim=-1)
        k = torch.cat((k_nope, turned[:, None].expand(-1, c.n_heads, -1)), dim=-1)
        return mha_attention(q, k, v, c.softmax_scale, indices, start)

    @staticmethod
    def _row_starts(positions: Tensor, cache: LayerCache | None) -> Tensor:
        """Each row's first visible key, int64 [T]: where its sequence begins among the cached and the new tokens."""
        before = 0 if cache is None else cache.length
        return torch.arange(before, before + len(positions), device=positions.device) - positions

    def _check(self, x, positions, cache, attention) -> None:
        check_shapes(x=(x, "T dim"), positions=(positions, "T"))
        weight = self.q_a_proj.weight
        check_dtype("x", x, (weight.dtype,))
        check_dtype("positions", positions, (torch.int32, torch.int64))
        if x.device != weight.device:
            raise ValueError(f"x must be on {weight.device} like the layer's weights, got {x.device}")
        if x.shape[1] != self.config.dim:
            raise ValueError(f"x must have shape [T, dim] with dim = {self.config.dim}, got {list(x.shape)}")
        if attention not in ATTENTION:
            raise ValueError(f"attention must be one of {ATTENTION}, got {attention!r}")
        T, before = x.shape[0], 0 if cache is None else cache.length
        if T + before == 0:
            raise ValueError(f"x must hold at least one token where no earlier one is cached, got {list(x.shape)}")
        if T and values_readable(positions):
            # A run of consecutive positions has one start; a new run may only begin at position 0.
            start = self._row_starts(positions, cache)
            known = torch.cat((start.new_zeros(1), start[:-1]))
            bad = (start != known) & ((positions != 0) | (cache is not None))
            if bad.any():
                t = int(bad.nonzero()[0])
                wanted = "continue the cache" if cache is not None else "count up from 0 in each packed sequence"
                raise ValueError(f"positions must {wanted}, got {int(positions[t])} for token {before + t}")
