"""Sharded keys on 1 to 4 ranks against one rank: selections to the last tie, merged outputs, and whole generations."""

import parallel_cases as cases
import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_close, assert_same_bits

import dsa_ref
from dsa_ref.parallel import Zigzag

NEEDS_KERNELS = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
TOLERANCE = 1e-5  # of the largest wanted number
SELECTIONS = {
    "random scores": {"T": 6, "S": 41, "k": 8},
    "many equal scores": {"T": 9, "S": 41, "k": 8, "ties": True},
    "k above every rank's share": {"T": 5, "S": 21, "k": 12, "ties": True},
    "k above all keys": {"T": 5, "S": 9, "k": 30},
    "ranks without keys": {"T": 5, "S": 21, "k": 6, "ties": True, "empty": (0, 2)},
    "fewer keys than ranks": {"T": 3, "S": 2, "k": 2},
    "a row that sees nothing": {"T": 1, "S": 9, "k": 3},
}


def alone(T, S, k, seed, ties=False, **_):
    """`cases.select` by the oracles in float64: a stable sort of each row, and attention over the whole selection."""
    q_idx, k_idx, w, start, end = cases.selection_inputs(T, S, seed, ties)
    q, kv = cases.attention_inputs(T, S, seed)
    arrays = [x.double().numpy() for x in (q_idx, k_idx, w)]
    indices = dsa_ref.lightning_select_loops(*arrays, k, None, start.numpy(), end.numpy())
    out, lse = dsa_ref.sparse_attention_loops(q.double().numpy(), kv.double().numpy(), indices, 0.3, 8)
    return torch.tensor(indices), torch.tensor(out), torch.tensor(lse)


def compare(parts, wanted):
    for indices, out, lse in parts:
        assert torch.equal(indices, wanted[0])
        assert_close(out, wanted[1], TOLERANCE)
        assert_close(lse, wanted[2], TOLERANCE)
        for mine, first in zip((indices, out, lse), parts[0], strict=True):
            assert_same_bits(mine, first)  # all ranks have the same


@pytest.mark.parametrize("arguments", SELECTIONS.values(), ids=SELECTIONS)
@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_selection_and_attention_are_one_ranks(worlds, size, arguments):
    if size < 3:
        arguments = arguments | {"empty": arguments.get("empty", ())[: size - 1]}
    for seed in range(4):
        compare(worlds(size).run("select", seed=seed, **arguments), alone(seed=seed, **arguments))


@NEEDS_KERNELS
def test_kernels_select_the_same(worlds):
    arguments = {"T": 3, "S": 41, "k": 8, "seed": 0, "ties": True, "empty": (1,)}
    parts, wanted = worlds(3).run("select", ops="kernels", **arguments), alone(**arguments)
    compare(parts, wanted)


TWICE = "indices must be distinct within a row"  # some wrong variants bring a place twice, which attention refuses


def found_out(world, compared, case, message=None, **arguments):
    """The outcomes of a wrong variant that is refused with this message, or gives another result."""
    outcomes = world.outcomes(case, **arguments)
    if message:
        world.broken = True
        assert all(outcome.kind == "ValueError" and message in outcome.message for outcome in outcomes)
    else:
        with pytest.raises(AssertionError):
            compared(outcomes)
    return outcomes


@pytest.mark.parametrize("fault, message", [
    ("local places", TWICE), ("merge by mean", None), ("ties by rank", None), ("own candidates alone", None),
])  # fmt: skip
def test_a_wrong_variant_is_found(worlds, fault, message):
    arguments = {"T": 9, "S": 41, "k": 8, "seed": 0, "ties": True}
    world, wanted = worlds(3), alone(**arguments)
    compare(world.run("select", **arguments), wanted)
    parts = found_out(world, lambda parts: compare(parts, wanted), "select", message, fault=fault, **arguments)
    if fault == "merge by mean":
        assert torch.equal(parts[0][0], wanted[0])  # what is found is the merge


def alone_generating(prompt, more, seed, prefill=True, ops="reference", **fields):
    """Logits of all tokens, one call of the model."""
    model = cases.model_of(seed, ops, **fields).requires_grad_(False)
    return model(cases.windows_of(1, prompt + more, seed)[0, : prompt + more])


def compare_generation(parts, wanted, rows):
    for found, _ in parts:
        for places, logits in found:
            assert_close(logits, wanted[places], TOLERANCE)
    held = [cached for _, cached in parts]
    for layer in range(len(held[0])):
        assert sum(cached[layer] for cached in held) == rows  # each row on one rank
    first = torch.cat([logits for places, logits in parts[0][0][-2:]])
    assert all(torch.equal(first, torch.cat([x for _, x in found[-2:]])) for found, _ in parts)


@pytest.mark.parametrize("size", [1, 2, 3, 4])
def test_a_prompt_by_gathered_keys_and_its_continuation_by_sharded_ones(worlds, size):
    for prompt, more, chunk, fields in ((21, 6, 2, {}), (2, 9, 4, {"index_fp8": True}), (37, 3, 1, {"index_topk": 30})):
        arguments = {"prompt": prompt, "more": more, "seed": 5, **fields}
        parts = worlds(size).run("generate", chunk=chunk, **arguments)
        compare_generation(parts, alone_generating(**arguments), prompt + more)
        assert [len(found[0][0]) for found, _ in parts] == [Zigzag(prompt, size).count(rank) for rank in range(size)]


def test_blocks_of_queries_change_nothing(worlds):
    """The same up to rounding: a product over fewer rows may round otherwise."""
    arguments = {"prompt": 37, "more": 0, "chunk": 1, "seed": 5}
    wanted = alone_generating(37, 0, 5)
    for rows_at_once in (1, 5, 64):
        for found, held in worlds(3).run("generate", rows_at_once=rows_at_once, **arguments):
            ((rows, logits),) = found
            assert_close(logits, wanted[rows], TOLERANCE)
            assert held == [len(rows)] * 2


@pytest.mark.parametrize("size", [1, 2, 3, 4])
@pytest.mark.parametrize("recording", [False, True])
def test_a_prompt_in_parts_is_the_whole_prompt(worlds, size, recording):
    """Each part sees the rows of all earlier ones, which lie on all ranks; decoding goes on behind the last."""
    for parts, fields in (([12, 1, 8], {"index_fp8": True}), ([1, 2, 18], {}), ([16, 5], {"index_topk": 30})):
        arguments = {"prompt": 21, "more": 4, "seed": 5, **fields}
        found = worlds(size).run("generate", chunk=2, parts=parts, recording=recording, **arguments)
        compare_generation(found, alone_generating(**arguments), 25)


def test_rows_that_are_not_in_the_order_of_their_places_are_found(worlds):
    arguments = {"prompt": 21, "more": 4, "seed": 5}
    world, wanted = worlds(3), alone_generating(**arguments)
    with pytest.raises(AssertionError):
        compare_generation(
            world.run("generate", chunk=2, parts=[12, 9], fault="places ignored", **arguments), wanted, 25
        )


@pytest.mark.parametrize("size", [2, 3])
def test_a_context_that_only_all_ranks_together_hold(worlds, size):
    arguments = {"prompt": 0, "more": 30, "seed": 6, "prefill": False}
    for chunk in (1, 7, 30):  # chunk 1: at first, most ranks have no key
        parts = worlds(size).run("generate", chunk=chunk, **arguments)
        compare_generation(parts, alone_generating(**arguments), 30)
        assert max(cached[0] for _, cached in parts) <= -(-30 // size) < 30


@pytest.mark.parametrize("fault, message", [
    ("merge by mean", None), ("every rank keeps all", TWICE), ("local positions for global", None),
])  # fmt: skip
def test_a_wrong_variant_of_a_generation_is_found(worlds, fault, message):
    arguments = {"prompt": 21, "more": 6, "seed": 5}
    if fault == "every rank keeps all":
        arguments |= {"prompt": 0, "prefill": False}
    world, wanted = worlds(2), alone_generating(**arguments)
    total = arguments["prompt"] + arguments["more"]
    compare_generation(world.run("generate", chunk=2, **arguments), wanted, total)

    def compared(parts):
        compare_generation(parts, wanted, total)

    found_out(world, compared, "generate", message, chunk=2, fault=fault, **arguments)


@NEEDS_KERNELS
def test_kernels_generate_the_same(worlds):
    arguments = {"prompt": 9, "more": 2, "seed": 5, "index_fp8": True}
    compare_generation(
        worlds(2).run("generate", ops="kernels", chunk=1, **arguments), alone_generating(**arguments), 11
    )


def test_one_size_of_a_group_gives_the_same_bits_each_time(worlds):
    arguments = {"prompt": 21, "more": 4, "chunk": 2, "seed": 5}
    one, other = (worlds(4).run("generate", **arguments) for _ in range(2))
    for (found, _), (again, _) in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(found, again, strict=True))
