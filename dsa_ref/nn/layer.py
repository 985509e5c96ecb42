"""One whole attention layer of V3.2: MLA, its lightning indexer, the selection, and a contiguous cache.

Submodules carry the names of the Hugging Face checkpoint (`model.layers.{i}.self_attn.*`). The steps come from the
package passed as `ops`: `DSALayer(config)` runs the reference, `DSALayer(config, ops=dsa_kernels)` the Triton kernels.

Source: DeepSeek-V3.2-Exp report, section 2 and appendix A; SPEC sections 2, 3 and 7.
"""

import torch
from torch import nn
from torch.nn import functional as F

import dsa_ref

from ..contracts import check_count, check_dtype, check_shapes, values_readable
from ..dense_attention import dense_attention, mha_attention
from ..rope import rope_frequencies

ATTENTION = ("sparse", "mha", "dense")


class RMSNorm(nn.Module):
    """x / rms(x) · weight over the last dim, in fp32, rounded to x.dtype once."""

    def __init__(self, dim, eps):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x):
        return F.rms_norm(x.float(), self.weight.shape, self.weight.float(), self.eps).to(x.dtype)


class Indexer(nn.Module):
    """The lightning indexer's own weights: queries from the shared latent, one key, one weight for each head."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.wq_b = nn.Linear(config.q_lora_rank, config.index_n_heads * config.index_head_dim, bias=False)
        self.wk = nn.Linear(config.dim, config.index_head_dim, bias=False)
        self.k_norm = nn.LayerNorm(config.index_head_dim, eps=1e-6)
        self.weights_proj = nn.Linear(config.dim, config.index_n_heads, bias=False)

    def forward(self, x, q_latent):
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


class LayerCache:
    """What one sequence leaves behind in one layer: latent rows, index keys and their scales, up to a capacity.

    kv [capacity, D], k_idx [capacity, Di], k_scale fp32 [capacity]; `length` tokens are filled.
    Raises: ValueError when an append would pass the capacity or brings gradients, TypeError for another dtype.
    """

    def __init__(self, config, capacity, dtype=torch.float32, device=None):
        check_count("capacity", capacity)
        self.capacity, self.length = capacity, 0
        index_dtype = torch.float8_e4m3fn if config.index_fp8 else dtype
        self.kv = torch.zeros(capacity, config.latent_dim, dtype=dtype, device=device)
        self.k_idx = torch.zeros(capacity, config.index_head_dim, dtype=index_dtype, device=device)
        self.k_scale = torch.ones(capacity, dtype=torch.float32, device=device)

    def append(self, kv, k_idx, k_scale):
        """Store the new tokens' rows and return all rows so far as (kv, k_idx, k_scale); k_scale may be None."""
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


class DSALayer(nn.Module):
    """V3.2's attention layer on packed tokens [T, dim].

    config: DSAConfig; ops: the package whose `rope`, `rotate_quantize`, `lightning_select` and `sparse_attention` run
    (`dsa_ref` or `dsa_kernels`).
    """

    def __init__(self, config, ops=dsa_ref):
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

    def forward(self, x, positions, cache=None, attention="sparse", record=None):
        """Attend and return [T, dim] in x.dtype.

        x: [T, dim] in the weights' dtype. positions: int [T], each token's place in its own sequence; packed sequences
        are runs that start at 0, and a token sees its own run up to itself. cache: a LayerCache of one sequence, whose
        next tokens x holds. attention: "sparse" (selected keys, MQA mode), "mha" (the same selection as a mask over
        decompressed heads) or "dense" (every visible key, no selection). record: a list that receives one dict of the
        step inputs and outputs.

        Raises: ValueError for wrong shapes, positions, a full cache or an unknown attention, TypeError for dtypes.
        """
        c = self.config
        start = self._check(x, positions, cache, attention)
        q_latent = self.q_a_layernorm(self.q_a_proj(x))
        q, kv = self._queries(q_latent, positions), self._latents(x, positions)
        q_idx, k_idx, w, q_scale, k_scale = self._index(x, q_latent, positions)
        if cache is not None:
            kv, k_idx, k_scale = cache.append(kv, k_idx, k_scale)
        weights = w if q_scale is None else w * q_scale  # a positive scale may cross the relu
        step = {"q_idx": q_idx, "k_idx": k_idx, "w": weights, "k_scale": k_scale, "q": q, "kv": kv, "start": start}
        if attention != "dense":
            args = {"k_scale": k_scale, "start": start}
            step["indices"] = self.ops.lightning_select(
                *(tensor.detach() for tensor in (q_idx, k_idx, weights)), c.index_topk, **args
            )
        if attention == "mha":
            out, step["lse"] = self._decompressed(q, kv, step["indices"], start)
        else:
            W_UK, W_UV = self._up_projections()
            scale, v_dim = c.softmax_scale, c.kv_lora_rank
            absorbed = torch.einsum("thn,hnc->thc", q[..., : c.qk_nope_head_dim], W_UK)
            step["q"] = torch.cat((absorbed, q[..., c.qk_nope_head_dim :]), dim=-1)
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

    def _queries(self, q_latent, positions):
        """[T, H, nope | rope], the rope part turned, interleaved."""
        c = self.config
        q = self.q_b_proj(q_latent).unflatten(-1, (c.n_heads, -1))
        nope, turning = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
        return torch.cat((nope, self.ops.rope(turning, positions, self.freqs, "interleaved")), dim=-1)

    def _latents(self, x, positions):
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

    def _up_projections(self):
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

    def _check(self, x, positions, cache, attention):
        """Argument checks; returns each row's first visible key, int32 [T]."""
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
        start = torch.arange(before, before + T, device=x.device) - positions
        if T and values_readable(start):
            # A run of consecutive positions has one start; a new run may only begin at position 0.
            known = torch.cat((start.new_zeros(1), start[:-1]))
            bad = (start != known) & ((positions != 0) | (cache is not None))
            if bad.any():
                t = int(bad.nonzero()[0])
                wanted = "continue the cache" if cache is not None else "count up from 0 in each packed sequence"
                raise ValueError(f"positions must {wanted}, got {int(positions[t])} for token {before + t}")
        return start.to(torch.int32)
