"""Notebook 16: the attention layer as plain functions on plain weights, in two halves, and real inputs for it."""

import contextlib
import pathlib

import torch
from torch.nn import functional as F

import dsa_ref
from dsa_ref import rope_frequencies


def project(x, positions, weights, config, rotate_quantize=dsa_ref.rotate_quantize) -> dict:
    """What each token asks and leaves behind: "q" [T, H, D], "q_idx" [T, Hi, Di], "w" [T, Hi], and its rows of the
    caches, "kv" [T, D], "k_idx" [T, Di], "k_scale" [T].

    x: fp32 [T, dim]; positions: int64 [T]; weights: {name: tensor}, the layer's state_dict; config: its DSAConfig.
    rotate_quantize: the step of that name, or one to try in its place.
    """
    c, W, freqs = config, weights, rope_frequencies(config)
    q_latent = F.rms_norm(x @ W["q_a_proj.weight"].T, (c.q_lora_rank,), W["q_a_layernorm.weight"], c.norm_eps)
    latent, turning = (x @ W["kv_a_proj_with_mqa.weight"].T).split((c.kv_lora_rank, c.qk_rope_head_dim), dim=-1)
    latent = F.rms_norm(latent, (c.kv_lora_rank,), W["kv_a_layernorm.weight"], c.norm_eps)
    kv = torch.cat((latent, dsa_ref.rope(turning, positions, freqs, "interleaved")), dim=-1)

    heads = (q_latent @ W["q_b_proj.weight"].T).unflatten(-1, (c.n_heads, -1))
    nope, turning = heads.split((c.qk_nope_head_dim, c.qk_rope_head_dim), dim=-1)
    W_UK, _ = up_projections(weights, config)
    absorbed = torch.einsum("thn,hnc->thc", nope, W_UK)
    q = torch.cat((absorbed, dsa_ref.rope(turning, positions, freqs, "interleaved")), dim=-1)

    q_idx = (q_latent @ W["indexer.wq_b.weight"].T).unflatten(-1, (c.index_n_heads, -1))
    norm = W["indexer.k_norm.weight"], W["indexer.k_norm.bias"]
    k_idx = F.layer_norm(x @ W["indexer.wk.weight"].T, (c.index_head_dim,), *norm, eps=1e-6)
    w = x @ W["indexer.weights_proj.weight"].T * (c.index_n_heads * c.index_head_dim) ** -0.5
    q_idx, q_scale = rotate_quantize(q_idx, positions, freqs)
    k_idx, k_scale = rotate_quantize(k_idx, positions, freqs)
    return {"q": q, "kv": kv, "q_idx": q_idx, "k_idx": k_idx, "k_scale": k_scale, "w": w * q_scale}


def attend(q, kv, indices, weights, config):
    """The layer's output y [T, dim], from absorbed queries [T, H, D], all rows [S, D] and the keys kept [T, k]."""
    u, _ = dsa_ref.sparse_attention(q, kv, indices, config.softmax_scale, config.kv_lora_rank)
    _, W_UV = up_projections(weights, config)
    return torch.einsum("thc,hvc->thv", u, W_UV).flatten(1) @ weights["o_proj.weight"].T


def layer(x, positions, weights, config, rotate_quantize=dsa_ref.rotate_quantize):
    """y [T, dim] of one sequence from its start: exercise 16.1. Arguments as for `project`."""
    step = project(x, positions, weights, config, rotate_quantize)
    scores = dsa_ref.index_scores(step["q_idx"], step["k_idx"], step["w"], step["k_scale"])
    return attend(step["q"], step["kv"], dsa_ref.select_topk(scores, config.index_topk), weights, config)


def up_projections(weights, config):
    """W_UK [H, nope, latent] and W_UV [H, v, latent], the two parts of each head's rows of kv_b_proj."""
    both = weights["kv_b_proj.weight"].unflatten(0, (config.n_heads, -1))
    return both.split((config.qk_nope_head_dim, config.v_head_dim), dim=1)


def unseen_text(first, count):
    """int64 [count]: bytes of contextlib.py, which training left out, from byte `first` on."""
    source = pathlib.Path(contextlib.__file__).read_bytes()
    return torch.tensor(list(source[first : first + count]))


@torch.no_grad()
def layer_inputs(model, tokens) -> list:
    """What each layer's attention gets to see of these tokens, int64 [T]: one fp32 [T, dim] a layer."""
    inputs = []
    hooks = [
        block.self_attn.register_forward_pre_hook(lambda _, given: inputs.append(given[0])) for block in model.layers
    ]
    try:
        model(tokens)
    finally:
        for hook in hooks:
            hook.remove()
    return inputs
