"""Gathered keys on 1 to 4 ranks against one rank: selections, outputs, log-sum-exps, gradients and losses."""

import parallel_cases as cases
import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_close, assert_same_bits

from dsa_ref.parallel import Zigzag, ranks
from dsa_ref.training import stages

NEEDS_KERNELS = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 0.02}  # of the largest wanted number; a bf16 is rounded by 2^-9
SHAPES = {
    "one sequence of an odd length": [37],
    "packed, one of a single token": [9, 1, 27],
    "a length that divides": [24],
    "ranks without rows": [3],
    "one token": [1],
}


def alone(lengths, seed, ops="reference", attention="sparse", grad=False, dtype=torch.float32, **fields):
    """`cases.layer_forward` by the layer itself."""
    layer, x = cases.layer_of(seed, ops, dtype, **fields), cases.tokens_of(lengths, seed, dtype).requires_grad_(grad)
    record = []
    with torch.set_grad_enabled(grad):
        y = layer(x, cases.packed(lengths), attention=attention, record=record)
    found = {"y": y.detach(), "indices": record[0].get("indices"), "lse": record[0]["lse"].detach()}
    if grad:
        (y * cases.weights_of(lengths, seed)).sum().backward()
        found |= {"dx": x.grad, "weights": [weight.grad for weight in layer.parameters()]}
    return found


def compare(parts, wanted, dtype=torch.float32):
    """Raise AssertionError unless the ranks' parts are one rank's result."""
    tolerance = TOLERANCE[dtype]
    rows = torch.cat([part["rows"] for part in parts])
    assert sorted(rows.tolist()) == list(range(len(wanted["y"])))
    for part in parts:
        own = part["rows"]
        if wanted["indices"] is not None:
            assert torch.equal(part["indices"].sort().values, wanted["indices"][own].sort().values)
        assert_close(part["y"], wanted["y"][own], tolerance)
        assert_close(part["lse"], wanted["lse"][own], tolerance)
        if "dx" in wanted:
            assert_close(part["dx"], wanted["dx"][own], tolerance)
            for got, right in zip(part["weights"], wanted["weights"], strict=True):
                assert (got is None) == (right is None)
                if right is not None:
                    assert_close(got, right, tolerance)


@pytest.mark.parametrize("lengths", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_layer_and_its_gradients_are_one_ranks(worlds, size, lengths):
    for seed, fp8 in ((0, False), (1, True)):
        arguments = {"lengths": lengths, "seed": seed, "grad": True, "index_fp8": fp8}
        compare(worlds(size).run("layer_forward", **arguments), alone(**arguments))


@pytest.mark.parametrize("changes", [
    {"attention": "mha"},
    {"attention": "dense"},
    {"attention": "mha", "grad": True},
    {"attention": "dense", "grad": True},
    {"index_topk": 64},  # above all keys, let alone a rank's
    {"index_topk": 20},  # above a rank's share
    {"index_rope": "interleaved"},
    {"dtype": torch.bfloat16},
], ids=str)  # fmt: skip
def test_other_settings_are_one_ranks_too(worlds, changes):
    arguments = {"lengths": [20, 17], "seed": 2} | changes
    compare(worlds(3).run("layer_forward", **arguments), alone(**arguments), changes.get("dtype", torch.float32))


def test_a_pass_that_checkpointing_repeats_is_one_ranks(worlds):
    arguments = {"lengths": [20, 17], "seed": 2, "grad": True, "index_fp8": False}
    compare(worlds(3).run("layer_forward", repeated=True, **arguments), alone(**arguments))


def test_a_layer_without_an_indexer_takes_the_selection_of_another(worlds):
    """By either plan: of the first layer's record."""
    first, second = cases.two_layers(seed=4)
    x, positions, record = cases.tokens_of([23], 4), cases.packed([23]), []
    y = first(x, positions, record=record)
    wanted = second(y, positions, indices=record[0]["indices"])
    for rows, gathered, sharded in worlds(3).run("shared_selection", lengths=[23], seed=4):
        assert_close(gathered, wanted[rows], TOLERANCE[torch.float32])
        assert_close(sharded, wanted, TOLERANCE[torch.float32])


@pytest.mark.parametrize("T", [1, 2, 9, 13])
@pytest.mark.parametrize("indexer", [True, False])
def test_all_ranks_use_each_module_equally_often(worlds, T, indexer):
    """Whatever their shares: modules may be sharded over the ranks, which then meet at each use."""
    first, *others = worlds(2).run("uses_of_modules", T=T, indexer=indexer)
    assert first["o_proj"] == first["q_b_proj"] == -(-Zigzag(T, 2).longest // 2)
    assert all(other == first for other in others)


@pytest.mark.parametrize("fault, changes", [
    ("local positions for global", {}),
    ("padding seen", {}),
    ("keys in the order of ranks", {}),
    ("gradient of own rows alone", {"grad": True}),
    ("mean of gradients", {"grad": True}),
    ("gradient counted twice", {"grad": True}),
    ("gradients not summed", {"grad": True}),
])  # fmt: skip
def test_a_wrong_variant_of_the_layer_is_found(worlds, fault, changes):
    arguments = {"lengths": [37], "seed": 0, "index_fp8": False} | changes
    world, wanted = worlds(3), alone(**arguments)
    compare(world.run("layer_forward", **arguments), wanted)
    with pytest.raises(AssertionError):
        compare(world.run("layer_forward", fault=fault, **arguments), wanted)


def one_ranks_training(n, length, stage, seed, times=1, **fields):
    model = cases.model_of(seed, **fields)
    for _ in range(times):
        losses = stages.stage_backward(model, cases.windows_of(n, length, seed), stage)
    return losses, {name: parameter.grad for name, parameter in model.named_parameters()}


def compare_training(parts, wanted):
    for losses, grads in parts:
        for got, right in zip(losses, wanted[0], strict=True):
            assert (got is None) == (right is None)
            if right is not None:
                torch.testing.assert_close(got, right, rtol=1e-5, atol=0.0)
        assert grads.keys() == wanted[1].keys()
        for name, right in wanted[1].items():
            assert (grads[name] is None) == (right is None), name
            if right is not None:  # by each parameter's own largest gradient: the indexer's are small
                largest = float(right.abs().max())
                assert float((grads[name] - right).abs().max()) <= 1e-4 * largest, name


@pytest.mark.parametrize("stage", ["dense", "warm-up", "sparse"])
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_training_step_is_one_ranks(worlds, size, stage):
    for n, length, seed in ((2, 19, 0), (3, 5, 1), (1, 3, 2)):  # the last leaves ranks without rows
        arguments = {"n": n, "length": length, "stage": stage, "seed": seed}
        compare_training(worlds(size).run("train", **arguments), one_ranks_training(**arguments))


def test_gradients_of_several_passes_add_up(worlds):
    arguments = {"n": 2, "length": 11, "stage": "sparse", "seed": 3, "times": 2}
    compare_training(worlds(2).run("train", **arguments), one_ranks_training(**arguments))


@pytest.mark.parametrize("fault", [
    "gradient counted twice", "gradients not summed", "mean over own rows", "local positions for global",
    "mean of gradients", "padding seen",
])  # fmt: skip
def test_a_wrong_variant_of_training_is_found(worlds, fault):
    arguments = {"n": 1, "length": 37, "stage": "sparse", "seed": 0}
    world, wanted = worlds(2), one_ranks_training(**arguments)
    compare_training(world.run("train", **arguments), wanted)
    with pytest.raises(AssertionError):
        compare_training(world.run("train", fault=fault, **arguments), wanted)


def test_one_size_of_a_group_gives_the_same_bits_each_time(worlds):
    arguments = {"lengths": [37], "seed": 0, "grad": True, "index_fp8": False}
    first, second = (worlds(4).run("layer_forward", **arguments) for _ in range(2))
    for one, other in zip(first, second, strict=True):
        for name in ("y", "indices", "lse", "dx"):
            assert_same_bits(one[name], other[name])
        for grad, again in zip(one["weights"], other["weights"], strict=True):
            assert grad is None and again is None or torch.equal(grad, again)


def test_all_ranks_have_the_same_gradients_of_weights(worlds):
    parts = worlds(4).run("train", n=2, length=11, stage="sparse", seed=0)
    for losses, grads in parts[1:]:
        assert losses == parts[0][0]
        assert all(torch.equal(grad, parts[0][1][name]) for name, grad in grads.items())


def test_a_model_over_a_group_is_the_model_itself(worlds):
    for same, names, kinds, dtypes in worlds(2).run("twins"):
        assert same and names and kinds == ["DSALayer"] * 2 + ["GatheredLayer"] * 2 and dtypes == {torch.float64}


def test_a_token_takes_the_bytes_that_are_said():
    kv, k_idx, k_scale = torch.randn(2, 576).bfloat16(), torch.randn(2, 128).bfloat16(), torch.randn(2)
    assert ranks.pack([kv, k_idx], 3).shape == (3, 1408)
    packed = ranks.pack([kv, k_idx.to(torch.float8_e4m3fn), k_scale], 3)
    assert packed.shape == (3, 1284) and not packed[2].any()  # padding
    assert torch.equal(packed[:2, :1152].contiguous().view(torch.bfloat16), kv)
    assert torch.equal(packed[:2, 1280:].contiguous().view(torch.float32)[:, 0], k_scale)


@NEEDS_KERNELS
def test_kernels_give_the_same(worlds):
    for changes in ({}, {"index_fp8": False, "grad": True}):
        arguments = {"lengths": [7, 4], "seed": 0} | changes
        compare(worlds(2).run("layer_forward", ops="kernels", **arguments), alone(**arguments))
    arguments = {"n": 1, "length": 5, "stage": "sparse", "seed": 0}
    compare_training(worlds(2).run("train", ops="kernels", **arguments), one_ranks_training(**arguments))


@pytest.mark.parametrize("T", [1, 2, 7, 16, 37, 1000])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_zigzag_shares_out_all_rows_evenly(T, size):
    shares = Zigzag(T, size)
    rows = [shares.rows(rank) for rank in range(size)]
    assert sorted(torch.cat(rows).tolist()) == list(range(T))
    counts = [len(own) for own in rows]
    assert counts == [shares.count(rank) for rank in range(size)] and max(counts) == shares.longest
    assert max(counts) - min(counts) <= 2
    pairs = [int((own + 1).sum()) for own in rows]  # what each rank's rows see
    assert max(pairs) - min(pairs) <= 2 * T + 2  # of T (T + 1) / 2
    everyone = torch.full((size, shares.longest), -1)
    for rank, own in enumerate(rows):
        everyone[rank, : len(own)] = own
    assert torch.equal(shares.in_order(everyone), torch.arange(T))
    assert torch.equal(shares.by_rank(torch.arange(T) + 1), everyone + 1)
