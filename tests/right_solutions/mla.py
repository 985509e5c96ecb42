"""Notebook 06."""

import math

import numpy as np
import torch

from . import right


@right("cache_bytes")
def rounded_up_by_math(config):
    row = config.kv_lora_rank + config.qk_rope_head_dim
    key, value = config.qk_nope_head_dim + config.qk_rope_head_dim, config.v_head_dim
    return {
        "mla": 2 * row,
        "fp8": config.kv_lora_rank + 4 * math.ceil(config.kv_lora_rank / 128) + 2 * config.qk_rope_head_dim,
        "mha": sum(2 * key + 2 * value for _ in range(config.n_heads)),
    }


@right("cache_bytes")
def numpys_ints(config):
    return {name: np.int64(number) for name, number in rounded_up_by_math(config).items()}


right("absorb")(lambda q, kv_b: np.einsum("thn,hnc->thc", q.numpy(), kv_b.numpy()[:, : q.shape[2]]))
right("absorb")(lambda q, kv_b: torch.bmm(q.transpose(0, 1), kv_b[:, : q.shape[2]]).transpose(0, 1))
right("absorb")(lambda q, kv_b: torch.stack([q[:, h] @ kv_b[h, : q.shape[2]] for h in range(q.shape[1])], dim=1))


@right("rope")
def in_numpy(x, positions, freqs, layout):
    turned, R = x.float().numpy().copy(), 2 * len(freqs)
    angles = positions.numpy()[:, None, None] * freqs.numpy()
    first, second = (slice(0, R, 2), slice(1, R, 2)) if layout == "interleaved" else (slice(R // 2), slice(R // 2, R))
    a, b = turned[..., first].copy(), turned[..., second].copy()
    turned[..., first] = a * np.cos(angles) - b * np.sin(angles)
    turned[..., second] = b * np.cos(angles) + a * np.sin(angles)
    return turned


@right("rope")
def complex_numbers(x, positions, freqs, layout):
    R = 2 * len(freqs)
    first, rest = x[..., :R].float(), x[..., R:]
    half = layout == "half"
    pairs = (first[..., : R // 2], first[..., R // 2 :]) if half else (first[..., 0::2], first[..., 1::2])
    angles = positions.float()[:, None, None] * freqs
    z = torch.complex(*pairs) * torch.polar(torch.ones_like(angles), angles)
    turned = torch.cat((z.real, z.imag), dim=-1) if half else torch.stack((z.real, z.imag), dim=-1).flatten(-2)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@right("softmax_scale")
def in_two_roots(config):
    on = config.max_seq_len > config.original_seq_len
    m = 0.1 * config.mscale * np.log(config.rope_factor) + 1 if on else 1.0
    return m * m / np.sqrt(config.qk_nope_head_dim + config.qk_rope_head_dim)


right("softmax_scale")(lambda config: torch.tensor([config.softmax_scale], dtype=torch.float64))
