"""Costs are the specification's numbers for V3.2, and counts equal loops for every other config."""

import dataclasses
import math

import pytest

from dsa_ref import cost
from dsa_ref.config import TINY, V32


def test_v32_flops_per_pair_are_the_specified_ones():
    assert cost.index_flops_per_pair(V32) == 16_384
    assert cost.mqa_flops_per_pair(V32) == 278_528
    assert cost.mha_flops_per_pair(V32) == 81_920


def test_v32_bytes_per_token_are_the_specified_ones():
    assert cost.index_bytes_per_token(V32) == 132
    assert cost.fp8_kv_bytes_per_token(V32) == 656
    assert cost.bf16_kv_bytes_per_token(V32) == 1152
    assert round(cost.decode_bytes_ceiling(V32), 2) == 4.97


def test_every_number_follows_the_config():
    assert cost.index_flops_per_pair(TINY) == 2 * 16 * 16
    assert cost.mqa_flops_per_pair(TINY) == 2 * 4 * (40 + 32)
    assert cost.mha_flops_per_pair(TINY) == 2 * 4 * (16 + 8 + 16)
    assert cost.index_bytes_per_token(TINY) == 16 + 4
    assert cost.index_bytes_per_token(dataclasses.replace(TINY, index_fp8=False)) == 32
    assert cost.fp8_kv_bytes_per_token(TINY) == 32 + 4 + 16
    assert cost.fp8_kv_bytes_per_token(dataclasses.replace(TINY, kv_lora_rank=129)) == 129 + 8 + 16  # a ragged block
    assert cost.bf16_kv_bytes_per_token(TINY) == 80


@pytest.mark.parametrize("T, S", [(1, 1), (1, 13), (5, 13), (12, 13), (13, 13), (7, 40)])
@pytest.mark.parametrize("k", [1, 3, 8, 9, 12, 13, 14, 99])
def test_prefill_counts_equal_loops_over_pairs(T, S, k):
    config = dataclasses.replace(TINY, index_topk=k)
    visible = selected = 0
    for t in range(T):
        seen = sum(1 for s in range(S) if s <= S - T + t)
        visible += seen
        selected += min(k, seen)
    assert cost.causal_pairs(T, S) == visible
    assert cost.causal_pairs(T, S, k) == selected
    bill = cost.prefill_cost(config, T, S)
    assert bill.indexer == visible * 2 * 16 * 16
    assert bill.sparse == selected * 2 * 4 * (40 + 32)
    assert bill.dense == visible * 2 * 4 * (16 + 8 + 16)
    assert bill.dense_mqa == visible * 2 * 4 * (40 + 32)
    assert bill.dsa == bill.indexer + bill.sparse


def test_decode_bytes_below_and_above_k():
    short, long = cost.decode_bytes(V32, 100), cost.decode_bytes(V32, 131_072)
    assert (short.index, short.selected, short.dense) == (13_200, 65_600, 65_600)
    assert (long.index, long.selected, long.dense) == (132 * 131_072, 656 * 2048, 656 * 131_072)
    assert long.dsa == long.index + long.selected
    endless = cost.decode_bytes(V32, 10**9)
    assert endless.dense / endless.dsa == pytest.approx(656 / 132, rel=1e-4)


def test_break_evens_of_v32():
    assert cost.break_even_prefill(V32) == 8704
    assert cost.break_even_decode(V32) == 2176
    assert round(cost.break_even_decode_bytes(V32)) == 2564


def test_break_evens_are_where_the_bills_cross():
    for S, cheaper in ((2175, False), (2177, True)):
        bill = cost.prefill_cost(V32, 1, S)
        assert (bill.dsa < bill.dense_mqa) == cheaper
    for S, cheaper in ((2563, False), (2565, True)):
        moved = cost.decode_bytes(V32, S)
        assert (moved.dsa < moved.dense) == cheaper
    T, S = 1001, 8704 + 500  # rows see S - 1000 ... S keys, on average S - 500
    for S_near, cheaper in ((S - 1, False), (S + 1, True)):
        bill = cost.prefill_cost(V32, T, S_near)
        assert (bill.dsa < bill.dense) == cheaper
    exact = cost.prefill_cost(V32, T, S)
    assert exact.dsa == exact.dense


def test_break_even_may_be_never_or_always():
    assert cost.break_even_decode(dataclasses.replace(V32, index_n_heads=2048)) == math.inf  # the scout costs more
    compact = dataclasses.replace(V32, kv_lora_rank=64)  # MQA mode plus indexer is cheaper than MHA mode
    assert cost.break_even_prefill(compact) == 0.0


def test_roofline_is_the_slower_side():
    assert cost.roofline_seconds(2e12, 1e9, 1e12, 1e9) == 2.0
    assert cost.roofline_seconds(1e12, 3e9, 1e12, 1e9) == 3.0


@pytest.mark.parametrize(
    "call, error, named",
    [
        (lambda: cost.causal_pairs(5, 4), ValueError, "T must be at most S = 4"),
        (lambda: cost.causal_pairs(0, 4), ValueError, "T must be at least 1"),
        (lambda: cost.causal_pairs(2, 4, 0), ValueError, "limit must be at least 1"),
        (lambda: cost.prefill_cost(V32, 1.5, 4), TypeError, "T must be an int"),
        (lambda: cost.decode_bytes(V32, 0), ValueError, "S must be at least 1"),
        (lambda: cost.roofline_seconds(-1, 1, 1, 1), ValueError, "flops must be at least 0"),
        (lambda: cost.roofline_seconds(1, math.nan, 1, 1), ValueError, "bytes must be at least 0"),
        (lambda: cost.roofline_seconds(1, 1, 0, 1), ValueError, "flops_per_second must be positive"),
    ],
)
def test_bad_arguments_are_named(call, error, named):
    with pytest.raises(error, match=named):
        call()
