"""FP8 quantisation, proved by exhaustion: every bf16 maximum for the scale, every bf16 value for the rounding."""

import numpy as np
import pytest
import torch
from inputs import E4M3, assert_close, assert_same_bits, normal, strided

import dsa_ref
from dsa_ref.quantize import POSITIVE_CODES

FLOOR = float(np.float32(1e-4))
FINITE_BF16 = torch.arange(0x7F80, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)  # 0 and up, ascending


def nearest_code(magnitudes):
    """The e4m3 code nearest to each float64 magnitude <= 448: half-way points go to the even code. All exact."""
    above = np.searchsorted(POSITIVE_CODES, magnitudes)
    below = np.maximum(above - 1, 0)
    to_below, to_above = magnitudes - POSITIVE_CODES[below], POSITIVE_CODES[above] - magnitudes
    take_above = (to_above < to_below) | ((to_above == to_below) & (above % 2 == 0))
    return np.where(take_above, above, below)


def codes(x8):
    return x8.cpu().contiguous().view(torch.uint8).numpy()


def check_scales(ops, maxima):
    """Each scale is the least power of two with 448 · scale >= max(amax, floor).

    In float64 this comparison is exact rational arithmetic: 448 times a power of two has three significant bits.
    """
    x = torch.stack((torch.zeros_like(maxima), -maxima), dim=1)
    _, scale = ops.quantize(x)
    assert scale.dtype == torch.float32
    scale, amax = scale.cpu().double().numpy(), np.maximum(maxima.cpu().double().numpy(), FLOOR)
    assert (np.frexp(scale)[0] == 0.5).all()
    assert (scale * 448 >= amax).all() and (scale / 2 * 448 < amax).all()


def test_table_of_codes():
    """The loop form's table is torch's own e4m3."""
    assert torch.arange(0x7F, dtype=torch.uint8).view(E4M3).double().tolist() == POSITIVE_CODES.tolist()


def test_scale_for_every_bf16_maximum(ops, device):
    check_scales(ops, FINITE_BF16.to(device))


def test_scale_beside_every_power_of_two(ops, device):
    """fp32 maxima one step below, at and above 448 · 2^n, where a rounded logarithm or division would slip."""
    edges = np.float32(448) * np.float32(2.0) ** np.arange(-21, 100, dtype=np.float32)
    around = (np.nextafter(edges, np.float32(0)), edges, np.nextafter(edges, np.float32(np.inf)))
    check_scales(ops, torch.tensor(np.concatenate(around), device=device))


def test_rounding_of_every_bf16_value(ops, device, poisoned):
    values = FINITE_BF16[FINITE_BF16 <= 448].to(device)
    for x in (values, -values):
        x8, scale = ops.quantize(torch.stack((x, torch.full_like(x, 448)), dim=1))
        assert (scale == 1).all()
        wanted = nearest_code(values.cpu().double().numpy()) | (
            codes(torch.tensor([-0.0]).to(E4M3)) * (x is not values)
        )
        assert (codes(x8)[:, 0] == wanted).all() and (codes(x8)[:, 1] == 0x7E).all()


def test_rounding_beside_every_midpoint(ops, device):
    """fp32 values one step around each half-way point: rounding to a narrower type first would lose the side."""
    middle = ((POSITIVE_CODES[1:] + POSITIVE_CODES[:-1]) / 2).astype(np.float32)
    values = np.concatenate((np.nextafter(middle, np.float32(0)), middle, np.nextafter(middle, np.float32(448))))
    x = torch.tensor(np.stack((values, np.full_like(values, 448)), axis=1), device=device)
    assert (codes(ops.quantize(x)[0])[:, 0] == nearest_code(values.astype(np.float64))).all()


@pytest.mark.parametrize("shape", [(1,), (24,), (1, 128), (37, 40), (5, 3, 32), (0, 16), (0, 2, 16)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_same_bytes_as_the_reference(ops, device, poisoned, shape, dtype):
    """Vectors of very different sizes side by side: no scale may leak into the next row."""
    x = normal(*shape, device=device) * torch.exp2(8 * normal(*shape[:-1], 1, seed=1, device=device).clamp(-1.5, 1.5))
    for got, wanted in zip(ops.quantize(x.to(dtype)), dsa_ref.quantize(x.to(dtype)), strict=True):
        assert_same_bits(got, wanted)


def test_error_is_e4m3s_alone(ops, device):
    """Half a step of three mantissa bits: 2^-4 of the value, or 2^-10 of the scale among the smallest."""
    x = normal(37, 128, device=device)
    x8, scale = ops.quantize(x)
    error = (dsa_ref.dequantize(x8, scale) - x).abs()
    assert (error <= torch.maximum(x.abs() * 2.0**-4, scale[:, None] * 2.0**-10)).all()
    assert (x8.float().abs().amax(dim=1) >= 224).all()  # the scale is no larger than it must be


def test_zeros(ops, device):
    x8, scale = ops.quantize(torch.zeros(2, 32, device=device))
    assert (codes(x8) == 0).all() and (scale == 2.0**-22).all()


def test_strided_input(ops, device):
    x = normal(5, 3, 32, device=device)
    for got, wanted in zip(ops.quantize(strided(x)), ops.quantize(x), strict=True):
        assert_same_bits(got, wanted)


@pytest.mark.rungs("reference", "kernels")
@pytest.mark.parametrize("bad", (torch.nan, torch.inf, -torch.inf))
def test_refuses_what_no_scale_can_hold(ops, device, bad):
    x = normal(3, 32, device=device)
    x[1, 7] = bad
    with pytest.raises(ValueError, match="x must be finite"):
        ops.quantize(x)


def test_dequantize():
    x8 = torch.tensor([[1.0, -448.0]]).to(E4M3)
    assert_close(dsa_ref.dequantize(x8, torch.tensor([0.25])), [[0.25, -112.0]], 0.0)
