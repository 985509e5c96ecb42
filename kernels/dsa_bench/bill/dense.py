"""A dense MLA layer out of a DSALayer's weights, without its indexer: what the bill measures DSA beside.

Prefill is in MHA mode: cuDNN attends to the keys before the chunk without a mask and to the chunk itself causally, and
the parts are merged by their log-sum-exps. cuDNN's "causal", as torch passes it on, aligns the first query with the
first key, so one call cannot do both. Decode is in MQA mode over all rows of the pages. The small steps are our
kernels', the same as DSA's.
"""

import torch

import dsa_kernels
import dsa_ref

BLOCK = 64 << 10  # keys whose heads are made at once, where they are not kept: 5.4 GB


def up_projections(layer):
    """(W_UK [H, nope, latent], W_UV [H, v, latent]), views of the layer's kv_b_proj."""
    c = layer.config
    both = layer.kv_b_proj.weight.unflatten(0, (c.n_heads, -1))
    return both.split((c.qk_nope_head_dim, c.v_head_dim), dim=1)


def store(layer, x, pages, slots, positions):
    """The latent rows of x [T, dim], normed and turned, into pages."""
    norm = layer.kv_a_layernorm
    rows = layer.kv_a_proj_with_mqa(x)
    with dsa_ref.unchecked_values():  # as in DSA's layer: the slots are right by construction
        dsa_kernels.append_latents(pages, slots, rows, norm.weight, norm.eps, positions, layer.freqs)


def queries(layer, x):
    """q [T, H, nope | not yet turned] of x [T, dim]."""
    norm = layer.q_a_layernorm
    latent = dsa_kernels.rms_norm(layer.q_a_proj(x), norm.weight, norm.eps)
    return layer.q_b_proj(latent).unflatten(-1, (layer.config.n_heads, -1))


def new_heads(config, count, like):
    """Memory for the keys [count, H, nope + rope] and values [count, H, v] of so many tokens."""
    H, width = config.n_heads, config.qk_nope_head_dim + config.qk_rope_head_dim
    return like.new_empty(count, H, width), like.new_empty(count, H, config.v_head_dim)


def make_heads(layer, kv, keys, values):
    """Write the keys and values of latent rows kv [S, D]: two products, and the shared RoPE part to every head."""
    c = layer.config
    latent, turned = kv.split((c.kv_lora_rank, c.qk_rope_head_dim), dim=1)
    rows = latent.expand(c.n_heads, -1, -1)
    nope = keys[..., : c.qk_nope_head_dim]
    for part, W in zip((nope, values), up_projections(layer), strict=True):
        torch.bmm(rows, W.transpose(1, 2), out=part.transpose(0, 1))
    keys[..., c.qk_nope_head_dim :] = turned[:, None]


def cudnn(q, k, v, scale, causal):
    """(out [T, H, v], lse fp32 [T, H]) of q [T, H, width] over k and v [S, H, width]; causal: T = S."""
    heads_first = (part[None].transpose(1, 2) for part in (q, k, v))
    out, lse, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
        *heads_first, None, True, is_causal=causal, scale=scale
    )
    return out[0].transpose(0, 1), lse.reshape(q.shape[1], len(q)).T


def merge(first, second):
    """(out, lse) of two (out, lse) over different keys."""
    (out, lse), (other, other_lse) = first, second
    share = torch.sigmoid(other_lse - lse)[..., None].to(out.dtype)
    return torch.lerp(out, other, share), torch.logaddexp(lse, other_lse)


def prefill_step(layer, x, kv, kept=None, attend=cudnn, block=BLOCK):
    """The output [T, dim] of the T tokens x that end the latent rows kv [S, D], whose last T rows are written here.

    kept: (keys, values) of all S tokens, the last T of which are written here; None: all are made from kv, `block`
    tokens at a time. attend: as `cudnn`.
    """
    T, S, scale = len(x), len(kv), layer.config.softmax_scale
    positions = torch.arange(S - T, S, device=x.device)
    store(layer, x, kv[None], positions, positions)
    q = queries(layer, x)
    turning = q[..., layer.config.qk_nope_head_dim :]
    dsa_kernels.turn_into(turning, turning, positions, layer.freqs, "interleaved")
    own = new_heads(layer.config, T, x) if kept is None else [part[S - T :] for part in kept]
    make_heads(layer, kv[S - T :], *own)
    found = attend(q, *own, scale, True)
    if kept is None:
        buffers = new_heads(layer.config, min(block, S - T), x)
        for first in range(0, S - T, block):
            rows = kv[first : min(first + block, S - T)]
            heads = [buffer[: len(rows)] for buffer in buffers]
            make_heads(layer, rows, *heads)
            found = merge(found, attend(q, *heads, scale, False))
    elif S > T:
        found = merge(found, attend(q, *(part[: S - T] for part in kept), scale, False))
    return layer.o_proj(found[0].flatten(1))


def decode_step(layer, x, pages, places, attend):
    """The output [B, 1, dim] of one new token a sequence, x [B, 1, dim], whose latent rows go into pages.

    places: (page_table, lengths, positions, slots) as `place_tokens` gives them; attend(q [B, 1, H, D]) -> (out
    [B, 1, H, latent], lse).
    """
    c, x = layer.config, x.flatten(0, 1)
    _, _, positions, slots = places
    positions = positions.flatten()
    store(layer, x, pages, slots, positions)
    nope, turning = queries(layer, x).split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
    W_UK, W_UV = up_projections(layer)
    q = x.new_empty(len(x), c.n_heads, c.latent_dim)
    torch.bmm(nope.transpose(0, 1), W_UK, out=q[..., : c.kv_lora_rank].transpose(0, 1))
    dsa_kernels.turn_into(q[..., c.kv_lora_rank :], turning, positions, layer.freqs, "interleaved")
    u, _ = attend(q[:, None])
    heads = x.new_empty(len(x), c.n_heads, c.v_head_dim)
    torch.bmm(u.flatten(0, 1).transpose(0, 1), W_UV.transpose(1, 2), out=heads.transpose(0, 1))
    return layer.o_proj(heads.flatten(1))[:, None]


def latent_rows(layer, x, positions):
    """The reference's latent rows fp32 [T, D] of x [T, dim]."""
    c = layer.config
    latent, turning = layer.kv_a_proj_with_mqa(x).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    turned = dsa_ref.rope(turning, positions, layer.freqs, "interleaved")
    return torch.cat((layer.kv_a_layernorm(latent), turned), dim=-1).float()


def reference(layer, x, positions, kv, indices=None):
    """The layer's output [T, dim] of tokens at positions [T] by the reference, in MQA mode and fp32 between products.

    kv: fp32 [S, D], of all tokens; indices: int32 [T, k], the keys that each attends to, None for all up to itself.
    """
    c, W_UK, W_UV = layer.config, *(W.float() for W in up_projections(layer))
    q = layer.q_b_proj(layer.q_a_layernorm(layer.q_a_proj(x))).unflatten(-1, (c.n_heads, -1))
    nope, turning = q.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
    turned = dsa_ref.rope(turning, positions, layer.freqs, "interleaved").float()
    q = torch.cat((torch.einsum("thn,hnc->thc", nope.float(), W_UK), turned), dim=-1)
    if indices is None:
        end = (positions + 1).int()
        u, _ = dsa_ref.dense_attention(q, kv, c.softmax_scale, c.kv_lora_rank, torch.zeros_like(end), end)
    else:
        u, _ = dsa_ref.sparse_attention(q, kv, indices, c.softmax_scale, c.kv_lora_rank)
    return layer.o_proj(torch.einsum("thc,hvc->thv", u, W_UV).to(x.dtype).flatten(1))
