"""RoPE, rotation and FP8 in one step: the same bytes as the three steps, and a product that survives them."""

import pytest
import torch
from inputs import assert_same_bits, normal, strided

import dsa_ref
from dsa_ref import V32, rope_frequencies

SHAPES = [(1, 32), (37, 128), (1, 1, 128), (37, 3, 32), (5, 16, 128), (0, 2, 32)]


def inputs(shape, dtype, device, R=16):
    """Vectors with an outlier dim, as real keys have, and positions out of order."""
    x = normal(*shape, device=device)
    x[..., 5] *= 30
    positions = (torch.arange(shape[0], device=device) * 97 + 11) % 1000
    return x.to(dtype), positions, rope_frequencies(V32, device=device)[: R // 2]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.rungs("reference", "kernels")
def test_bit_for_bit_the_three_steps(ops, device, poisoned, shape, dtype):
    x, positions, freqs = inputs(shape, dtype, device)
    wanted = dsa_ref.quantize(dsa_ref.hadamard(dsa_ref.rope(x, positions, freqs, "half")))
    for got, bits in zip(ops.rotate_quantize(x, positions, freqs), wanted, strict=True):
        assert_same_bits(got, bits)


@pytest.mark.parametrize("shape", [(9, 128), (9, 3, 32)])
def test_value_is_the_rotated_vector(ops, device, shape):
    """Undo all three steps and x is back, up to e4m3's rounding. Fails for the other layout or a missing step."""
    x, positions, freqs = inputs(shape, torch.float32, device)
    x8, scale = ops.rotate_quantize(x, positions, freqs)
    back = dsa_ref.rope(dsa_ref.hadamard(dsa_ref.dequantize(x8, scale)), -positions, freqs, "half")
    assert (back - x).norm() < 0.04 * x.norm()
    wrong = dsa_ref.rope(dsa_ref.hadamard(dsa_ref.dequantize(x8, scale)), -positions, freqs, "interleaved")
    assert (wrong - x).norm() > 0.3 * x.norm()


def test_rope_may_cover_the_whole_vector(ops, device):
    x, positions, freqs = inputs((7, 2, 32), torch.float32, device, R=32)
    wanted = dsa_ref.rotate_quantize(x, positions, freqs)[0].float()
    assert (ops.rotate_quantize(x, positions, freqs)[0].float() - wanted).norm() < 0.01 * wanted.norm()


def test_strided_input(ops, device):
    x, positions, freqs = inputs((5, 3, 32), torch.float32, device)
    wanted = ops.rotate_quantize(x, positions, freqs)
    for got, bits in zip(ops.rotate_quantize(strided(x), strided(positions), strided(freqs)), wanted, strict=True):
        assert_same_bits(got, bits)
