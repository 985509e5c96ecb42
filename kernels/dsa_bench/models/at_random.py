"""The steps of `dsa_ref` but for a selection that looks at nothing: a wrong answer, which `judge` must refuse."""

import torch

from dsa_ref import hadamard, quantize, sparse_attention

__all__ = ["hadamard", "lightning_select", "quantize", "sparse_attention"]


def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    """k of the keys that each query sees, any of them: int32 [T, k], -1 behind the last."""
    generator = torch.Generator(q_idx.device).manual_seed(0)
    lists, s = [], torch.arange(len(k_idx), device=q_idx.device)
    for first, last in zip(start.split(256), end.split(256), strict=True):
        seen = (s >= first[:, None]) & (s < last[:, None])
        drawn = torch.rand(seen.shape, device=q_idx.device, generator=generator).masked_fill(~seen, -1.0)
        found = drawn.topk(min(k, len(k_idx)), dim=-1)
        lists.append(torch.where(found.values < 0, -1, found.indices).int())
    return torch.cat(lists)
