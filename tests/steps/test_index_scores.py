"""Equation 1 against one float64 einsum, exactly on whole numbers; and what the score must and must not depend on."""

import importlib

import pytest
import torch
from inputs import (
    E4M3,
    assert_close,
    causal,
    exact_scores,
    index_inputs,
    normal,
    packed,
    ragged,
    small_integers,
    strided,
)

import dsa_ref

DTYPES = (torch.float32, torch.bfloat16, torch.float16, E4M3)
SHAPES = [(1, 1, 1, 32), (1, 37, 3, 32), (37, 37, 3, 32), (5, 70, 16, 32), (4, 9, 3, 128), (7, 20, 2, 40)]


@pytest.mark.parametrize("T, S, Hi, Di", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_exact_on_whole_numbers(ops, device, poisoned, T, S, Hi, Di, dtype):
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, T, S, Hi, Di, dtype=dtype, device=device)
    for scale in (None, k_scale):
        scores = ops.index_scores(q_idx, k_idx, w, scale)
        assert scores.dtype == torch.float32
        assert_close(scores, exact_scores(q_idx, k_idx, w, scale), 0.0)


@pytest.mark.parametrize("S", (511, 513, 1030))
def test_tails_of_long_rows(ops, device, poisoned, S):
    """Rows that end just before and after a tile of keys; no rung may read or write beyond them."""
    inputs = index_inputs(small_integers, 3, S, 2, 32, device=device)
    assert_close(ops.index_scores(*inputs), exact_scores(*inputs), 0.0)


@pytest.mark.parametrize("T, S", [(37, 37), (50, 9), (9, 600)])
def test_ranges(ops, device, poisoned, small_blocks, T, S):
    """Empty rows, rows in no order, more queries than keys: -inf exactly outside each row's range."""
    inputs = index_inputs(small_integers, T, S, 3, 32, device=device)
    start, end = ragged(T, S, device=device)
    scores = ops.index_scores(*inputs, start, end)
    assert_close(scores, exact_scores(*inputs, start, end), 0.0)
    assert torch.equal(ops.index_scores(*inputs, strided(start), strided(end)), scores)


def test_packed_sequences_do_not_meet(ops, device, small_blocks):
    start, end, _ = packed(5, 1, 13, 40, device=device)
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, 59, 59, 3, 32, device=device)
    scores = ops.index_scores(q_idx, k_idx, w, k_scale, start, end)
    assert_close(scores, exact_scores(q_idx, k_idx, w, k_scale, start, end), 0.0)
    third = slice(6, 19)
    assert torch.equal(scores[third, third], ops.index_scores(q_idx[third], k_idx[third], w[third], k_scale[third]))


def test_default_is_causal_at_the_end(ops, device):
    inputs = index_inputs(small_integers, 5, 12, 2, 32, device=device)
    assert torch.equal(ops.index_scores(*inputs), ops.index_scores(*inputs, *causal(5, 12, device)))
    assert (ops.index_scores(*inputs) > -torch.inf).sum(dim=1).tolist() == [8, 9, 10, 11, 12]


@pytest.mark.parametrize("dtype", DTYPES)
def test_close_on_random_numbers(ops, device, dtype):
    """Products are exact or fp32 and sums fp32, so only the order of summation differs."""
    inputs = index_inputs(normal, 9, 60, 16, 128, dtype=dtype, device=device)
    tolerance = 2e-3 if device == "cuda" and dtype == E4M3 else 1e-6  # FP8 tensor cores keep fewer bits of a sum
    assert_close(ops.index_scores(*inputs), exact_scores(*inputs), tolerance)


def test_narrow_weights(ops, device):
    q_idx, k_idx, w, k_scale = index_inputs(small_integers, 9, 20, 3, 32, device=device)
    scores = ops.index_scores(q_idx, k_idx, w.bfloat16(), k_scale.half())
    assert_close(scores, exact_scores(q_idx, k_idx, w, k_scale), 0.0)


def test_relu_before_the_sum_and_weights_as_they_are(ops, device):
    """Two heads see +1 and -1: relu gives 1 and 0, so the score is the first weight, negative or not."""
    q_idx = torch.zeros(3, 2, 32, device=device)
    q_idx[:, 0, 0], q_idx[:, 1, 0] = 1.0, -1.0
    k_idx = torch.zeros(3, 32, device=device)
    k_idx[:, 0] = 1.0
    w = torch.tensor([[2.0, 5.0], [-3.0, 5.0], [0.5, -5.0]], device=device)
    assert ops.index_scores(q_idx, k_idx, w)[:, 0].tolist() == [2.0, -3.0, 0.5]


@pytest.mark.parametrize("seed", (0, 1))
def test_rotating_both_sides_changes_nothing(ops, device, seed):
    q_idx, k_idx, w, _ = index_inputs(normal, 9, 30, 3, 32, seed=seed, device=device)
    plain = ops.index_scores(q_idx, k_idx, w)
    assert_close(ops.index_scores(ops.hadamard(q_idx), ops.hadamard(k_idx), w), plain, 1e-6)
    one_side = ops.index_scores(ops.hadamard(q_idx), k_idx, w)
    assert (one_side - plain)[plain > -torch.inf].abs().max() > 1


@pytest.mark.parametrize("Hi", (1, 2, 3))
def test_share_of_zeros(ops, device, Hi):
    """A score is 0 where all Hi products are negative: 2^-Hi of random pairs, the giant ties of small configs."""
    q_idx, k_idx, w, _ = index_inputs(normal, 64, 64, Hi, 32, device=device)
    ends = torch.full((64,), 64, dtype=torch.int32, device=device)
    zeros = (ops.index_scores(q_idx, k_idx, w, end=ends) == 0).float().mean().item()
    assert zeros == pytest.approx(2.0**-Hi, abs=0.03)


def test_weights_change_the_ranking_from_two_heads_on(ops, device):
    for Hi, changes in ((1, False), (2, True)):
        q_idx, k_idx, w, _ = index_inputs(normal, 1, 40, Hi, 32, device=device)
        orders = [
            ops.index_scores(q_idx, k_idx, v).argsort(stable=True).tolist() for v in (w.abs(), torch.ones_like(w))
        ]
        assert (orders[0] != orders[1]) == changes


@pytest.mark.parametrize("dtype", (torch.float32, E4M3))
def test_strided_input(ops, device, dtype):
    inputs = index_inputs(small_integers, 9, 20, 3, 32, dtype=dtype, device=device)
    assert torch.equal(ops.index_scores(*(strided(x) for x in inputs)), ops.index_scores(*inputs))


@pytest.mark.rungs("reference", "kernels")
def test_no_queries(ops, device):
    q_idx, k_idx, w, _ = index_inputs(normal, 0, 8, 2, 32, device=device)
    assert ops.index_scores(q_idx, k_idx, w).shape == (0, 8)


def test_gradient(small_blocks):
    inputs = [x.double().requires_grad_() for x in index_inputs(normal, 3, 5, 2, 4)]

    def visible_scores(*inputs):
        scores = dsa_ref.index_scores(*inputs)
        return scores[scores > -torch.inf]

    assert torch.autograd.gradcheck(visible_scores, inputs)


@pytest.mark.gpu
def test_at_v32s_sizes(device):
    """64 heads of 128 in FP8, 64 queries at the end of 70,000 keys; sums stay below 2^24, so exact."""
    import dsa_kernels

    inputs = index_inputs(small_integers, 64, 70_000, 64, 128, dtype=E4M3, device=device)
    assert_close(dsa_kernels.index_scores(*inputs), dsa_ref.index_scores(*inputs), 0.0)


@pytest.mark.hopper
@pytest.mark.parametrize("T, S", [(1, 70), (37, 37), (37, 5000), (300, 129), (9, 70_000)])
def test_hopper_variant(device, poisoned, T, S):
    """Ranges of all lengths, tiles that some rows see in part, T and S that are no multiple of a tile."""
    import dsa_kernels

    inputs = index_inputs(small_integers, T, S, 64, 128, dtype=E4M3, device=device)
    for ranges in (ragged(T, S, device=device), ragged(T, S, seed=1, device=device), causal(T, S, device))[
        : 2 + (T <= S)
    ]:
        for k_scale in (None, inputs[3]):
            wanted = dsa_kernels.index_scores(*inputs[:3], k_scale, *ranges, variant="portable")
            assert_close(wanted, dsa_ref.index_scores(*inputs[:3], k_scale, *ranges), 0.0)
            for _ in range(3):
                assert torch.equal(dsa_kernels.index_scores(*inputs[:3], k_scale, *ranges, variant="hopper"), wanted)


@pytest.mark.hopper
@pytest.mark.parametrize("version", ("whole", "turns", "maximum", "saturate", "halves"))
def test_each_version_gives_the_same_bits(version, device, poisoned):
    """Those of the ladder, which are copies, and production, "halves"."""
    inputs = index_inputs(normal, 300, 700, 64, 128, device=device)
    inputs = inputs[0].to(E4M3), inputs[1].to(E4M3), *inputs[2:]
    ranges = ragged(300, 700, device=device)
    run = importlib.import_module("dsa_bench.ladder").function_of("index_scores", version)
    wanted = importlib.import_module("dsa_kernels").index_scores(*inputs, *ranges, variant="portable")
    assert torch.equal(run(*inputs, *ranges), wanted)


@pytest.mark.hopper
@pytest.mark.parametrize("argument", (0, 1, 2))
def test_nan_in_fp8(device, argument):
    import dsa_kernels

    inputs = list(index_inputs(small_integers, 40, 90, 64, 128, dtype=E4M3, device=device))
    where = (30, 5, 7)[: inputs[argument].dim()]
    inputs[argument] = (
        inputs[argument]
        .float()
        .index_put([torch.tensor(i, device=device) for i in where], torch.tensor(torch.nan, device=device))
    )
    inputs[argument] = inputs[argument].to(device=device, dtype=torch.float32 if argument == 2 else E4M3)
    for scaled in (inputs, inputs[:3]):
        scores = dsa_kernels.index_scores(*scaled, variant="hopper")
        s, t = torch.arange(90, device=device), torch.arange(40, device=device)[:, None]
        assert torch.equal(scores.isnan(), (s <= t + 50) & ((s == 30) if argument == 1 else (t == 30)))


@pytest.mark.parametrize("variant", ("fast", "hopper"))
@pytest.mark.rungs("kernels")
def test_a_variant_that_cannot_serve(ops, device, variant):
    with pytest.raises(ValueError, match="variant"):
        ops.index_scores(*index_inputs(normal, 2, 5, 3, 32, device=device), variant=variant)


@pytest.mark.rungs("reference", "kernels")
@pytest.mark.parametrize("argument", (0, 1, 2))
def test_nan_is_not_taken_for_zero(ops, device, argument):
    inputs = index_inputs(normal, 40, 40, 4, 32, device=device)
    inputs[argument][30] = torch.nan
    scores = ops.index_scores(*inputs)
    s, t = torch.arange(40, device=device), torch.arange(40, device=device)[:, None]
    assert torch.equal(scores.isnan(), (s <= t) & ((s == 30) if argument == 1 else (t == 30)))
