"""Notebook 07."""

import math

import numpy as np
import torch

from . import right

E4M3 = torch.float8_e4m3fn


@right("quantize")
def the_exponent_from_frexp(x):
    x = x.float()
    mantissa, exponent = torch.frexp(x.abs().amax(dim=-1).clamp(min=1e-4) / 448)
    scale = torch.ldexp(torch.ones_like(mantissa), torch.where(mantissa == 0.5, exponent - 1, exponent))
    return (x / scale[..., None]).to(E4M3), scale


@right("quantize")
def scales_in_numpy(x):
    amax = np.maximum(np.abs(x.float().numpy()).max(axis=-1), np.float32(1e-4))
    scale = torch.as_tensor(np.exp2(np.ceil(np.log2(amax / np.float32(448)))))
    return [(x.float() / scale[..., None]).clamp(-448, 448).to(E4M3), scale]


@right("scores_from_fp8")
def in_numpy(q8, q_scale, k8, k_scale, w):
    dots = np.einsum("thd,sd->ths", q8.float().numpy(), k8.float().numpy())
    return (np.maximum(dots, 0) * (w * q_scale).numpy()[:, :, None]).sum(axis=1) * k_scale.numpy()


@right("scores_from_fp8")
def dequantised_first(q8, q_scale, k8, k_scale, w):
    q, k = q8.double() * q_scale[..., None], k8.double() * k_scale[:, None]
    return (torch.einsum("thd,sd->ths", q, k).relu() * w[..., None]).sum(dim=1)


@right("hadamard")
def by_its_matrix(x):
    H = torch.ones(1, 1)
    while len(H) < x.shape[-1]:
        H = torch.cat((torch.cat((H, H), dim=1), torch.cat((H, -H), dim=1)))
    return x @ (H / math.sqrt(x.shape[-1]))


@right("hadamard")
def recursive_in_numpy(x):
    x = np.asarray(x)
    if x.shape[-1] == 1:
        return x.copy()
    a, b = (recursive_in_numpy(half) for half in np.split(x, 2, axis=-1))
    return np.concatenate((a + b, a - b), axis=-1) / np.float32(math.sqrt(2))


@right("flips")
def flips_in_numpy(selected, reference):
    rows = zip(selected.numpy(), reference.numpy(), strict=True)
    return np.mean([len(np.setdiff1d(b[b >= 0], a)) / max(1, (b >= 0).sum()) for a, b in rows])


@right("flips")
def all_pairs_at_once(selected, reference):
    there = reference >= 0
    left = there & ~(reference[:, :, None] == selected[:, None]).any(dim=2)
    return (left.sum(dim=1) / there.sum(dim=1).clamp(min=1)).mean()
