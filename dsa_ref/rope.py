"""Rotary position embedding: YaRN's frequencies and the two layouts that one V3.2 layer uses side by side.

MLA turns *interleaved* pairs (x0, x1), (x2, x3), ...; the indexer turns *half-split* pairs (x0, x_R/2), (x1, x_R/2+1),
... Either is a rotation by position · frequency, so q·k depends on the distance alone, as long as q and k share a
layout. The wrong one on both sides leaves norms, shapes and that property right, and the selection wrong, since the
weights were trained with the other: DeepSeek's code turned the indexer's pairs interleaved until 2025-11-17.

Source: SPEC section 2 step 3, SPEC section 3; DeepSeek-V3.2-Exp inference/model.py (corrected); arXiv 2309.00071.
"""

import math

import numpy as np
import torch
from torch import Tensor

from .config import DSAConfig
from .contracts import Array, check_rope


def rope_frequencies(config: DSAConfig, device: torch.device | str | None = None) -> Tensor:
    """Radians per token of each of the R/2 pairs, fp32 [R/2]: theta^(-2i/R), stretched by YaRN where it is on.

    YaRN divides the slow pairs (fewer than beta_slow turns in the original context) by rope_factor, leaves the fast
    ones (more than beta_fast turns) alone and blends linearly in between.
    """
    R = config.qk_rope_head_dim
    freqs = 1.0 / config.rope_theta ** (torch.arange(0, R, 2, dtype=torch.float32, device=device) / R)
    if not config.yarn:
        return freqs

    def pair_with(turns):  # the (fractional) pair that makes this many turns in the original context
        return R * math.log(config.original_seq_len / (turns * 2 * math.pi)) / (2 * math.log(config.rope_theta))

    low = max(math.floor(pair_with(config.beta_fast)), 0)
    high = min(math.ceil(pair_with(config.beta_slow)), R - 1)
    pairs = torch.arange(R // 2, dtype=torch.float32, device=device)
    kept = 1 - ((pairs - low) / max(high - low, 0.001)).clamp(0, 1)  # in V3.2's order of operations, to the bit
    return freqs / config.rope_factor * (1 - kept) + freqs * kept


def rope_loops(x: Array, positions: Array, freqs: Array, layout: str) -> Array:
    """RoPE as loops, in float64. x [T, heads, D] array, positions [T], freqs [R/2] -> array like x.

    Pair i of the first R dims is turned by positions[t] · freqs[i]; dims from R on pass through.
    """
    x, out = np.asarray(x, dtype=np.float64), np.array(x, dtype=np.float64)
    half = len(freqs)
    for t in range(x.shape[0]):
        for h in range(x.shape[1]):
            for i in range(half):
                a, b = (2 * i, 2 * i + 1) if layout == "interleaved" else (i, i + half)
                angle = float(positions[t]) * float(freqs[i])
                out[t, h, a] = x[t, h, a] * math.cos(angle) - x[t, h, b] * math.sin(angle)
                out[t, h, b] = x[t, h, b] * math.cos(angle) + x[t, h, a] * math.sin(angle)
    return out


def rope(x: Tensor, positions: Tensor, freqs: Tensor, layout: str) -> Tensor:
    """Turn the first R = 2 · len(freqs) dims of x by its position. Differentiable.

    x: [T, D] or [T, heads, D], any float dtype; positions: int32 or int64 [T]; freqs: fp32 [R/2], radians per token;
    layout: "interleaved" or "half". Returns a tensor like x; angles in fp32, products too (fp64 for fp64), rounded to
    x.dtype once.

    Raises: ValueError for wrong shapes, devices or layout, TypeError for wrong dtypes.
    """
    check_rope(x, positions, freqs, layout)
    R = 2 * freqs.shape[0]
    angles = positions.to(torch.float32)[:, None] * freqs  # rounded to fp32, as V3.2 does
    cos, sin = angles.cos(), angles.sin()
    if x.dim() == 3:
        cos, sin = cos[:, None], sin[:, None]
    turning = x[..., :R].to(torch.promote_types(x.dtype, torch.float32))
    if layout == "interleaved":
        a, b = turning[..., 0::2], turning[..., 1::2]
    else:
        a, b = turning.chunk(2, dim=-1)
    a, b = a * cos - b * sin, b * cos + a * sin
    turned = torch.stack((a, b), dim=-1).flatten(-2) if layout == "interleaved" else torch.cat((a, b), dim=-1)
    return torch.cat((turned.to(x.dtype), x[..., R:]), dim=-1)
