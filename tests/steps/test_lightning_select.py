"""Score and select at once: the set is that of the exact scores, whatever the block size, and scales do not matter."""

import pytest
import torch
from inputs import E4M3, best, exact_scores, index_inputs, normal, packed, ragged, selected, small_integers, strided

import dsa_ref

SHAPES = [(1, 1, 1, 32, 1), (1, 37, 3, 32, 8), (37, 37, 3, 32, 8), (5, 70, 16, 32, 16), (4, 9, 3, 128, 20)]


def check(ops, inputs, k, *ranges):
    q_idx, k_idx, w, k_scale = inputs
    indices = ops.lightning_select(q_idx, k_idx, w, k, k_scale, *ranges)
    assert indices.shape == (len(q_idx), k) and not indices.requires_grad
    assert selected(indices) == best(exact_scores(*inputs, *ranges), k, *ranges)
    return indices


@pytest.mark.parametrize("T, S, Hi, Di, k", SHAPES)
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, E4M3))
def test_exact_on_whole_numbers(ops, device, poisoned, T, S, Hi, Di, k, dtype):
    """Whole numbers leave no rounding to hide behind and tie everywhere, above all at 0 with few heads."""
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, T, S, Hi, Di, dtype=dtype, device=device)
    check(ops, (q_idx, k_idx, w, k_scale), k)
    check(ops, (q_idx, k_idx, w, None), k)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("T, S", [(37, 37), (50, 9), (9, 200)])
def test_ranges(ops, device, poisoned, small_blocks, T, S, seed):
    inputs = index_inputs(small_integers, T, S, 3, 32, seed=seed, device=device)
    check(ops, inputs, 7, *ragged(T, S, seed=seed, device=device))


def test_packed(ops, device, small_blocks):
    start, end, _ = packed(5, 1, 13, 40, device=device)
    check(ops, index_inputs(small_integers, 59, 59, 3, 32, device=device), 8, start, end)


def test_random_numbers(ops, device):
    """16 heads in FP8: fp32 sums in another order may swap two near-equal keys, so each row may miss at most one."""
    q_idx, k_idx, w, k_scale = index_inputs(normal, 37, 90, 16, 32, dtype=E4M3, device=device)
    got = selected(ops.lightning_select(q_idx, k_idx, w, 16, k_scale))
    wanted = best(exact_scores(q_idx, k_idx, w, k_scale), 16)
    missed = [len(set(a) ^ set(b)) // 2 for a, b in zip(wanted, got, strict=True)]
    assert max(missed) <= 1 and sum(missed) <= 2


def test_scaling_a_row_of_weights(ops, device):
    """A positive factor on w[t, :] leaves row t's set alone, so the query's FP8 scale may sit there; -1 does not."""
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, 37, 37, 3, 32, device=device)
    wanted = selected(ops.lightning_select(q_idx, k_idx, w, 8, k_scale))
    factors = torch.tensor([0.25, 3.0, 7.0, 2.0**20], device=device).repeat(10)[:37, None]
    assert selected(ops.lightning_select(q_idx, k_idx, w * factors, 8, k_scale)) == wanted
    assert selected(ops.lightning_select(q_idx, k_idx, -w, 8, k_scale)) != wanted
    per_head = torch.tensor([1.0, 3.0, 7.0], device=device)
    assert selected(ops.lightning_select(q_idx, k_idx, w * per_head, 8, k_scale)) != wanted


def test_key_scales_do_matter(ops, device):
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, 37, 37, 3, 32, device=device)
    assert not torch.equal(ops.lightning_select(q_idx, k_idx, w, 8), ops.lightning_select(q_idx, k_idx, w, 8, k_scale))


def test_the_future_does_not_matter(ops, device):
    """The last row before the change is the one that a range too long by one would show, so it is tried often."""
    q_idx, k_idx, w, k_scale = index_inputs(normal, 30, 30, 4, 32, device=device)
    before = selected(ops.lightning_select(q_idx, k_idx, w, 5, k_scale))
    for first in (8, 14, 20, 26):
        for factor in (100, -100):
            changed = k_idx.clone()
            changed[first:] *= factor
            after = selected(ops.lightning_select(q_idx, changed, w, 5, k_scale))
            assert before[:first] == after[:first] and before[first:] != after[first:]


@pytest.mark.parametrize("dtype", (torch.float32, E4M3))
def test_strided_input(ops, device, dtype):
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, 9, 20, 3, 32, dtype=dtype, device=device)
    wanted = ops.lightning_select(q_idx, k_idx, w, 6, k_scale)
    got = ops.lightning_select(strided(q_idx), strided(k_idx), strided(w), 6, strided(k_scale))
    assert selected(got) == selected(wanted)


@pytest.mark.rungs("reference", "kernels")
def test_no_queries(ops, device):
    q_idx, k_idx, w, _ = index_inputs(normal, 0, 8, 2, 32, device=device)
    assert ops.lightning_select(q_idx, k_idx, w, 3).shape == (0, 3)


@pytest.mark.gpu
def test_at_v32s_sizes(device):
    import dsa_kernels

    q_idx, k_idx, w, k_scale = index_inputs(small_integers, 40, 20_000, 64, 128, dtype=E4M3, device=device)
    wanted = dsa_ref.lightning_select(q_idx, k_idx, w, 2048, k_scale)
    assert selected(dsa_kernels.lightning_select(q_idx, k_idx, w, 2048, k_scale)) == selected(wanted)
