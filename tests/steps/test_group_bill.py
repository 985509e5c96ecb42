"""The bill of a group of ranks: on one it is the bill, the rest is bytes over links; figures by hand."""

import pytest

from dsa_ref import TINY, V32, bill, cost, group_bill
from dsa_ref.group_bill import ETHERNET, INFINIBAND, NVLINK, Fabric, exchange_seconds

K = 1 << 10


def total(parts):
    return sum(parts.values())


def test_one_rank_is_the_bill():
    for T, S in ((4 * K, 128 * K), (16 * K, 16 * K)):
        wanted = total(bill.prefill_seconds(V32, T, S))
        for plan in group_bill.PREFILL:
            parts = plan(V32, T, S, 1)
            assert total(parts) == pytest.approx(wanted) and parts["exchange"] == 0
    for S in (4 * K, 1024 * K):
        parts = group_bill.sharded_decode_seconds(V32, S, 1)
        assert total(parts) == total(bill.decode_seconds(V32, 1, S)) and parts["exchange"] == 0


def test_bytes_of_rows_candidates_and_parts():
    """1284 bytes a token; 16 KiB of candidates and 257 KiB of parts a token and rank. A run counts them: bench."""
    assert cost.gathered_bytes_per_token(V32) == 1284
    assert cost.gathered_bytes(V32, 1024 * K, 8) == 7 * 128 * K * 1284
    assert cost.gathered_bytes(TINY, 10, 4) == 3 * 3 * cost.gathered_bytes_per_token(TINY)  # shares are padded
    assert cost.sharded_bytes(V32, 2, 1024 * K, 5) == {"candidates": 4 * 2 * 16 * K, "parts": 4 * 2 * 128 * 513 * 4}
    assert cost.sharded_bytes(V32, 1, 100, 2)["candidates"] == 800
    assert cost.gathered_bytes(V32, 1024, 1) == total(cost.sharded_bytes(V32, 1, 1024, 1)) == 0


def test_an_exchange_by_hand():
    """NCCL's ring: a start, a step for each other rank, the bytes; two protocols, two kinds of links."""
    assert exchange_seconds(1e9, 8, INFINIBAND) == pytest.approx(8.4e-6 + 7 * 3.4e-6 + 1e9 / 370.8e9)
    assert exchange_seconds(1e3, 8, INFINIBAND) == pytest.approx(3.6e-6 + 7 * 0.47e-6 + 3e3 / 370.8e9)
    assert exchange_seconds(1e9, 64, INFINIBAND) == pytest.approx(8.4e-6 + 56 * 3.4e-6 + 7 * 9.6e-6 + 1e9 / 370.8e9)
    assert exchange_seconds(1e9, 16, ETHERNET) == pytest.approx(8.4e-6 + 14 * 3.4e-6 + 9.6e-6 + 1e9 / 12.5e9)
    assert exchange_seconds(1e3, 16, ETHERNET) == pytest.approx(3.6e-6 + 14 * 0.47e-6 + 2.7e-6 + 4e3 / 12.5e9)
    assert exchange_seconds(1e9, 8, ETHERNET) == exchange_seconds(1e9, 8, INFINIBAND)  # nothing leaves the host
    assert exchange_seconds(1e9, 1, ETHERNET) == 0
    assert Fabric("slow inside", 1e9, 2e9).inside == 1e9
    assert exchange_seconds(1e9, 16, Fabric("slow inside", 1e9, 2e9)) > 1


def test_gathered_keys_by_hand():
    """A prompt of 1M on 8 ranks: an eighth of the bill, 1.18 GB received, 1.35 GB read and written."""
    S = 1024 * K
    parts, one = group_bill.gathered_seconds(V32, S, S, 8), bill.prefill_seconds(V32, S, S)
    for name, seconds in one.items():
        assert parts[name] == seconds / 8
    assert parts["order"] == 2 * 1284 * S / bill.H200.memory
    assert parts["exchange"] == exchange_seconds(7 / 8 * 1284 * S, 8, INFINIBAND)
    assert total(one) / 8 / total(parts) > 0.99
    few = group_bill.gathered_seconds(V32, 8, S, 8)
    assert few["products"] == pytest.approx(2 * total(cost.matrices(V32)) / bill.H200.memory)
    assert group_bill.gathered_memory(V32, S) == 2 * 1284 * S


def test_sharded_keys_by_hand():
    T, S, card = 512, 1024 * K, bill.H200
    parts, one = group_bill.sharded_seconds(V32, T, S, 8), bill.prefill_seconds(V32, T, S)
    scanned = cost.index_flops_per_pair(V32) * cost.causal_pairs(T, S) / 8 / card.scores
    assert parts["scores and selection"] == pytest.approx(scanned + card.choose * T)
    assert all(parts[name] == one[name] for name in ("products", "attention", "small"))
    received = cost.sharded_bytes(V32, T, S, 8)
    assert parts["exchange"] == sum(exchange_seconds(each, 8, INFINIBAND) for each in received.values())
    token = group_bill.sharded_decode_seconds(V32, S, 8)
    share = bill.decode_seconds(V32, 1, S // 8)
    assert all(token[name] == seconds for name, seconds in share.items()) and token["merge"] > 4 * card.launch


def test_where_gathering_pays():
    """It does from some hundred tokens at 1M on 8 ranks; one token fewer is better off with sharded keys."""
    S = 1024 * K
    least = group_bill.gathering_pays_from(V32, S, 8)
    sums = [[total(plan(V32, T, S, 8)) for plan in group_bill.PREFILL] for T in (least - 1, least)]
    assert sums[0][0] > sums[0][1] and sums[1][0] <= sums[1][1] and 100 < least < 1000
    slow = Fabric("slow", NVLINK / 100, 1e9)
    token = [total(plan(V32, S, 8)) for plan in group_bill.DECODE]
    assert token[0] < token[1] / 10
    assert total(group_bill.gathered_seconds(V32, S, S, 8, slow)) > total(group_bill.gathered_seconds(V32, S, S, 8))


def test_the_table(capsys):
    texts = group_bill.lines(sizes=(8, 64), contexts=(128_000, 10_000_000))
    assert len(texts) == 2 + 2 * (1 + 4) and all(len(text) <= 120 for text in texts)
    found = [text.split("|")[1].split() for text in texts if text[:5].strip().isdigit()]
    assert all(float(one) >= float(every) and 0 < float(efficiency) <= 1 for one, every, efficiency, _ in found)
    assert float(found[0][2]) > float(found[6][2])  # 8 ranks against 64 over Ethernet


def test_bad_input():
    for call, match in (
        (lambda: Fabric("none", 0, 1.0), "inside"),
        (lambda: Fabric("none", 1.0, -1.0), "between"),
        (lambda: Fabric("none", 1.0, 1.0, 0), "host"),
        (lambda: exchange_seconds(-1, 2, ETHERNET), "received"),
        (lambda: exchange_seconds(1, 0, ETHERNET), "size"),
        (lambda: cost.gathered_bytes(V32, 0, 2), "S"),
        (lambda: cost.sharded_bytes(V32, 1, 1, 0), "size"),
        (lambda: group_bill.gathered_seconds(V32, 5, 4, 2), "T must be"),
    ):
        with pytest.raises(ValueError, match=match):
            call()
