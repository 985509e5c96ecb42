"""RoPE turns pairs by position · frequency: checked against complex multiplication, and by what it is for."""

import math

import pytest
import torch
from inputs import assert_close, assert_same_bits, normal, strided

import dsa_ref
from dsa_ref import TINY, V32, DSAConfig, rope_frequencies

LAYOUTS = ("interleaved", "half")
FREQS = rope_frequencies(TINY)  # R = 8


def pairs_first(layout, R):
    """Order of the R dims that puts the partners side by side."""
    return list(range(R)) if layout == "interleaved" else [i + j * R // 2 for i in range(R // 2) for j in (0, 1)]


def by_complex_numbers(x, positions, freqs, layout):
    """x [T, heads, D] with each pair as one complex number, times e^(i · position · frequency), in float64."""
    x, R = x.cpu().double().clone(), 2 * len(freqs)
    order = pairs_first(layout, R)
    pairs = torch.view_as_complex(x[..., order].unflatten(-1, (-1, 2)).contiguous())
    angles = positions.cpu().double()[:, None, None] * freqs.cpu().double()
    x[..., order] = torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)
    return x


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("T, heads, D", [(1, 1, 8), (37, 3, 8), (5, 2, 32), (37, 1, 40)])
def test_turns_pairs(ops, device, poisoned, T, heads, D, layout):
    x, freqs = normal(T, heads, D, device=device), FREQS.to(device)
    positions = torch.arange(T, device=device) * 3 % 50
    assert_close(ops.rope(x, positions, freqs, layout), by_complex_numbers(x, positions, freqs, layout), 5e-6)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_far_positions(ops, device, layout):
    """The angle is rounded to fp32, so at position 4000 it is off by up to 1.2e-4 radians, and not by more."""
    x, positions = normal(9, 1, 64, device=device), torch.arange(9, device=device) * 500
    freqs = rope_frequencies(V32, device=device)
    assert_close(ops.rope(x, positions, freqs, layout), by_complex_numbers(x, positions, freqs, layout), 2e-4)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_only_the_distance_matters(ops, device, layout):
    """q·k is the same wherever the pair stands, and differs where the distance does; mixed layouts break it."""
    q, k = (normal(1, 1, 16, seed=seed, device=device).expand(20, 1, 16) for seed in (0, 1))
    positions, freqs = torch.arange(20, device=device), FREQS.to(device)

    def dots(distance, k_layout):
        keys = ops.rope(k, positions, freqs, k_layout)
        return (ops.rope(q, positions + distance, freqs, layout) * keys).sum(dim=(1, 2))

    for distance in (0, 1, 7):
        there = dots(distance, layout)
        assert_close(there, there[:1].expand(20), 1e-5)
    assert (dots(0, layout) - dots(1, layout)).abs().min() > 0.1
    mixed = dots(3, LAYOUTS[1 - LAYOUTS.index(layout)])
    assert mixed.max() - mixed.min() > 0.1


@pytest.mark.parametrize("layout", LAYOUTS)
def test_norm_kept_and_rest_untouched(ops, device, layout):
    x, freqs = normal(37, 2, 20, device=device), FREQS.to(device)
    y = ops.rope(x, torch.arange(37, device=device), freqs, layout)
    assert_close(y.norm(dim=-1), x.norm(dim=-1), 1e-6)
    assert_same_bits(y[..., 8:], x[..., 8:])
    assert_same_bits(y[0], x[0])  # position 0 turns nothing
    assert (y[1:, :, :8] != x[1:, :, :8]).all()


def test_layouts_are_one_rotation_in_two_orders(ops, device):
    x, freqs, positions = normal(37, 2, 8, device=device), FREQS.to(device), torch.arange(37, device=device)
    order = pairs_first("half", 8)
    half = ops.rope(x, positions, freqs, "half")
    assert_same_bits(half[..., order], ops.rope(x[..., order], positions, freqs, "interleaved"))
    assert (half - ops.rope(x, positions, freqs, "interleaved")).abs().max() > 0.5


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16))
def test_rounds_once(ops, device, dtype):
    x, freqs, positions = normal(37, 2, 16, device=device).to(dtype), FREQS.to(device), torch.arange(37, device=device)
    for layout in LAYOUTS:
        y = ops.rope(x, positions, freqs, layout)
        assert_same_bits(y, ops.rope(x.float(), positions, freqs, layout).to(dtype))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_forms_of_input(ops, device, layout):
    """[T, D] is one head, positions may be int32 or int64, memory may be strided, T may be 0."""
    x, freqs = normal(37, 1, 24, device=device), FREQS.to(device)
    positions = torch.arange(37, device=device)
    wanted = ops.rope(x, positions, freqs, layout)
    assert_same_bits(ops.rope(x[:, 0], positions, freqs, layout), wanted[:, 0])
    assert_same_bits(ops.rope(x, positions.int(), freqs, layout), wanted)
    assert_same_bits(ops.rope(strided(x), strided(positions), strided(freqs), layout), wanted)
    assert ops.rope(x[:0], positions[:0], freqs, layout).shape == (0, 1, 24)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_gradient(layout):
    x = normal(4, 2, 12).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: dsa_ref.rope(x, torch.arange(4), FREQS, layout), x)


def test_frequencies_without_yarn():
    freqs = rope_frequencies(DSAConfig(qk_rope_head_dim=64, max_seq_len=4096))
    assert_close(freqs, [10000.0 ** (-2 * i / 64) for i in range(32)], 1e-7)


def test_frequencies_with_yarn():
    """Pairs that turn 32 times in the original context stay as they are, those that turn once are slowed 40-fold."""
    plain = [10000.0 ** (-2 * i / 64) for i in range(32)]
    turns = [4096 * f / (2 * math.pi) for f in plain]
    kept = max(i for i in range(32) if turns[i] >= 32)
    stretched = min(i for i in range(32) if turns[i] <= 1)
    assert (kept, stretched) == (10, 23)
    for i, freq in enumerate(rope_frequencies(V32).tolist()):
        share = min(max((i - kept) / (stretched - kept), 0.0), 1.0)
        assert freq == pytest.approx(plain[i] * (1 - share) + plain[i] / 40 * share, rel=1e-5)
