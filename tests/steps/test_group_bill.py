"""The bill of a group of ranks: on one it is the bill, the rest is bytes over links; figures by hand."""

import math
import statistics

import pytest

from dsa_ref import TINY, V32, bill, cost, group_bill, records
from dsa_ref.group_bill import ETHERNET, FABRICS, INFINIBAND, NVLINK, Fabric, exchange_seconds

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
    """NCCL's ring: a start, a step for each other rank, the bytes; three protocols, two kinds of links."""
    attained = group_bill.ATTAINED[4]  # of more than four cards, too
    links = Fabric("NCCL's", 360e9 / attained, 360e9)
    for received, size, fabric, wanted in (
        (1e9, 8, links, 8.4e-6 + 7 * 3.4e-6 + 1e9 / 360e9),  # Simple
        (1e6, 8, links, 6.6e-6 + 7 * 0.6e-6 + 1e6 / 141e9),  # LL, as fast as it gets on a Hopper
        (
            1e3,
            8,
            Fabric("slow", 1e9 / attained, 1e9),
            6.6e-6 + 7 * 0.6e-6 + 1e3 / 0.5e9,
        ),  # half of LL's bytes are flags
        (8e6, 8, links, 14e-6 + 7 * 1.9e-6 + 8e6 / (0.92 * 360e9)),  # LL128
        (1e9, 64, links, 8.4e-6 + 56 * 3.4e-6 + 7 * 14e-6 + 1e9 / 360e9),
        (2e5, 16, links, 6.6e-6 + 14 * 1e-6 + 2.7e-6 + 2e5 / 39e9),  # each step at least a post to the network
        (2e5, 24, links, 6.6e-6 + 21 * 1e-6 + 2 * 2.7e-6 + 2e5 / 20.4e9),
        (4e6, 16, links, 14e-6 + 14 * 1.9e-6 + 4e-6 + 4e6 / (8 * 36.7e9)),
        (1e9, 16, ETHERNET, 8.4e-6 + 14 * 3.4e-6 + 14e-6 + 1e9 / 12e9),
    ):
        assert exchange_seconds(received, size, fabric) == pytest.approx(wanted), (received, size)
    assert exchange_seconds(1e9, 8, ETHERNET) == exchange_seconds(1e9, 8, INFINIBAND)  # nothing leaves the host
    assert exchange_seconds(1e9, 1, ETHERNET) == 0
    assert exchange_seconds(1e9, 16, Fabric("slow inside", 1e9, 2e9)) > 1
    for size, of in ((2, 2), (3, 2), (4, 4), (5, 4)):
        taken = exchange_seconds(1e12, size, INFINIBAND)
        assert 1e12 / taken == pytest.approx(group_bill.ATTAINED[of] * group_bill.RING, rel=1e-4), size
    pairs = Fabric("hosts of two", 1e9, 1e12, host=2)  # of their links two cards attain what two cards do
    assert exchange_seconds(1e9, 4, pairs) == pytest.approx(1 / group_bill.ATTAINED[2], rel=1e-3)


def test_rings_fill_the_links():
    """RING and INFINIBAND.between are what is left of the links where channels have NCCL's speeds for Hopper."""
    links = NVLINK / 1e9
    assert links == pytest.approx(370.8)
    assert group_bill.RING / 1e9 == max(speed * (links // speed) for speed in (60, 50, 40, 30))
    assert INFINIBAND.between / 1e9 == max(speed * min(8, links // speed) for speed in (48, 45, 42, 40, 30))
    assert ETHERNET.between / 1e9 == max(speed for speed in (20, 17.5, 15, 12, 6) if speed <= 100 / 8)


SIZES = (2, 4)  # GPUs of the records


def recorded(size, *sections):
    """The rows of that many GPUs' record: of the sections that are named."""
    steps = records.read(f"parallel_{size}_h200.json")["steps"]
    return [row for section in sections for row in steps[section]["rows"]]


@pytest.mark.parametrize("size", SIZES)
def test_what_is_measured_is_in_the_record(size):
    """An all-gather within a quarter, with its rows' order within a fifth; the constants are the record's medians."""
    shares, links = [], Fabric("NCCL's", group_bill.RING / group_bill.ATTAINED[size], group_bill.RING)
    for row in recorded(size, "prefill", "long"):
        received, taken = row["exchange"]["bytes"], row["exchanges_ms"]
        parts = group_bill.gathering_seconds(V32, row["tokens"], row["keys"], size, INFINIBAND, bill.H200)
        places = group_bill.PLACE if row["tokens"] < row["keys"] else 0
        assert received == cost.gathered_bytes(V32, row["keys"], size) * (1284 + places) / 1284, row["case"]
        assert parts["exchange"] == exchange_seconds(received, size, INFINIBAND)
        assert 1e3 * parts["exchange"] == pytest.approx(taken["all-gather"], rel=0.25), row["case"]
        both = 1e3 * (parts["exchange"] + parts["order"])
        assert both == pytest.approx(taken["all-gather, in order"], rel=0.2), row["case"]
        shares.append(exchange_seconds(received, size, links) / (1e-3 * taken["all-gather"]))
    assert group_bill.ATTAINED[size] == pytest.approx(statistics.median(shares), rel=0.01)
    assert set(group_bill.ATTAINED) == set(group_bill.MESSAGE) == set(SIZES)
    each = []
    for sections, wanted in (
        (("prefill", "long"), group_bill.MESSAGES["gathered"]),
        (("decode",), group_bill.MESSAGES["sharded"]),
        (("training",), 3),  # a training step's sum of weights has one more
    ):
        for row in recorded(size, *sections):
            assert sum(call["what"] == "agree" for call in row["exchange"]["calls"]) == wanted, row["case"]
            each.append(row["exchange"]["messages_ms"] / wanted)
    assert 1e3 * group_bill.MESSAGE[size] == pytest.approx(statistics.median(each), rel=0.02)


def test_efficiency_is_predicted_as_it_was_measured():
    """Of each prompt and part within 0.05, and all of them together within 0.015: the bill leaves out waiting."""
    misses = {}
    for size in SIZES:
        for row in recorded(size, "prefill", "long"):
            T, S = row["tokens"], row["keys"]
            one, every = total(bill.prefill_seconds(V32, T, S)), total(group_bill.gathered_seconds(V32, T, S, size))
            misses[size, row["case"]] = one / size / every - row["efficiency"]
    assert len(misses) >= 13 and all(abs(miss) <= 0.05 for miss in misses.values()), misses
    assert abs(statistics.mean(misses.values())) <= 0.015, misses


def test_gathered_keys_by_hand():
    """A prompt of 1M on 8 ranks: an eighth of the bill, 1.18 GB received, 1.35 GB read and written."""
    S = 1024 * K
    parts, one = group_bill.gathered_seconds(V32, S, S, 8), bill.prefill_seconds(V32, S, S)
    for name, seconds in one.items():
        assert parts[name] == seconds / 8
    assert parts["order"] == pytest.approx((2 + 3 / 8) * 1284 * S / bill.H200.memory)
    assert parts["messages"] == 2 * group_bill.MESSAGE[4] and group_bill.messages_seconds("gathered", 1) == 0
    assert parts["exchange"] == exchange_seconds(7 / 8 * 1284 * S, 8, INFINIBAND)
    assert total(one) / 8 / total(parts) > 0.99
    assert group_bill.messages_seconds("gathered", 3) == 2 * group_bill.MESSAGE[2]
    few = group_bill.gathered_seconds(V32, 8, S, 8)  # their rows come with places, and are put in order one by one
    assert few["exchange"] == exchange_seconds(7 / 8 * 1288 * S, 8, INFINIBAND)
    assert few["order"] == pytest.approx(1288 * S * (3 / 8 / bill.H200.memory + 2 / bill.H200.small))
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
    assert parts["messages"] == group_bill.MESSAGE[4]
    token = group_bill.sharded_decode_seconds(V32, S, 8)
    share = bill.decode_seconds(V32, 1, S // 8)
    assert all(token[name] == seconds for name, seconds in share.items()) and token["merge"] > 4 * card.launch
    assert token["messages"] == group_bill.MESSAGE[4]


def test_where_gathering_pays():
    """It does from some hundred tokens at 1M on 8 ranks; one token fewer is better off with sharded keys."""
    S = 1024 * K
    least = group_bill.gathering_pays_from(V32, S, 8)
    sums = [[total(plan(V32, T, S, 8)) for plan in group_bill.PREFILL] for T in (least - 1, least)]
    assert sums[0][0] > sums[0][1] and sums[1][0] <= sums[1][1] and 100 < least < 1000
    slow = Fabric("slow", NVLINK / 100, 1e9)
    token = [total(plan(V32, S, 8)) for plan in group_bill.DECODE]
    assert token[0] < token[1] / 5  # one message and few bytes, against two and all rows
    assert total(group_bill.gathered_seconds(V32, S, S, 8, slow)) > total(group_bill.gathered_seconds(V32, S, S, 8))


def test_the_table():
    sizes, contexts = (8, 64), (128_000, 10_000_000)
    texts = group_bill.lines(sizes=sizes, contexts=contexts)
    assert all(len(text) <= 120 for text in texts)
    found = [text.replace(",", "").split("|") for text in texts if text[:5].strip().isdigit()]
    assert [tuple(map(int, row[0].split())) for row in found] == 2 * [(size, S) for size in sizes for S in contexts]
    prompts = [[float(cell.rstrip("%")) for cell in row[1].split()] for row in found]
    assert all(one >= every and 0 < efficiency <= 1 for one, every, efficiency, _ in prompts)
    assert prompts[0][2] > prompts[6][2]  # 8 ranks against 64 over Ethernet
    parts = group_bill.gathered_seconds(V32, *2 * contexts[:1], 64, ETHERNET)
    waiting = (parts["exchange"] + parts["messages"]) / total(parts)
    assert prompts[6][3] == pytest.approx(100 * waiting, abs=0.05)
    for _, sharded, links, _ in (map(float, row[3].split()) for row in found):
        assert sharded - links == pytest.approx(1e3 * group_bill.MESSAGE[4], abs=0.011)
    short = "\n".join(texts[texts.index("In short") :])
    assert f"fewer than {max(int(row[2]) for row in found):,} here" in short
    assert (
        "InfiniBand, 8 x 400 Gbit/s a host: a prompt of 10,000,000 keeps 90% of all GPUs busy up to 64 ranks." in short
    )


def test_what_the_table_says_in_short():
    """Of other rows it says something else: nothing well used, no place to gather, no win, wins."""
    row = {"fabric": "a", "size": 8, "S": 10, "efficiency": 0.89, "from": None}
    row |= {"token": 2.0, "sharded": 3.0, "links": 1.0, "gathered": 3.0}
    short = "\n".join(group_bill._in_short([row]))
    for words in ("as the table says", "not on 8 ranks for 10", "busy on no number of ranks here"):
        assert words in short
    assert "than on one: nowhere here" in short and "its message: on 8 ranks for 10" in short
    short = "\n".join(group_bill._in_short([row | {"gathered": 4.0, "sharded": 1.5, "efficiency": 0.9}]))
    assert "(not on" not in short and "than on one: on 8 ranks for 10." in short and "busy up to 8 ranks" in short


CALLS = {  # every public function by arguments' names; each is refused what is planted
    cost.gathered_bytes_per_token: {"config": TINY},
    cost.gathered_bytes: {"config": TINY, "S": 8, "size": 2},
    cost.sharded_bytes: {"config": TINY, "T": 4, "S": 8, "size": 2},
    exchange_seconds: {"received": 8, "size": 2, "fabric": ETHERNET},
    group_bill.messages_seconds: {"plan": "gathered", "size": 2},
    group_bill.gathered_seconds: {"config": TINY, "T": 4, "S": 8, "size": 2, "fabric": ETHERNET, "card": bill.H200},
    group_bill.sharded_seconds: {"config": TINY, "T": 4, "S": 8, "size": 2, "fabric": ETHERNET, "card": bill.H200},
    group_bill.gathered_decode_seconds: {"config": TINY, "S": 8, "size": 2, "fabric": ETHERNET, "card": bill.H200},
    group_bill.sharded_decode_seconds: {"config": TINY, "S": 8, "size": 2, "fabric": ETHERNET, "card": bill.H200},
    group_bill.gathering_seconds: {"config": TINY, "T": 4, "S": 8, "size": 2, "fabric": ETHERNET, "card": bill.H200},
    group_bill.weights_seconds: {"config": TINY, "card": bill.H200},
    group_bill.gathered_memory: {"config": TINY, "S": 8},
    group_bill.gathering_pays_from: {"config": TINY, "S": 8, "size": 2, "fabric": ETHERNET, "card": bill.H200},
    group_bill.lines: {"config": TINY, "sizes": (2,), "contexts": (8,)},
    Fabric: {"name": "a", "inside": 1.0, "between": 1.0, "host": 8},
}
COUNT = [
    (0, ValueError),
    (-1, ValueError),
    (1 << 63, ValueError),
    (True, TypeError),
    (2.0, TypeError),
    ("2", TypeError),
]
SPEED = [(math.nan, ValueError), (math.inf, ValueError), (-1, ValueError), (True, TypeError), ("1", TypeError)]
PLANTED = {
    **dict.fromkeys(("T", "S", "size", "host"), COUNT),
    **dict.fromkeys(("inside", "between"), [*SPEED, (0, ValueError), (None, TypeError)]),
    **dict.fromkeys(("sizes", "contexts"), [((), ValueError), (8, TypeError), ("8", TypeError), ((8, 0), ValueError)]),
    "received": SPEED,
    "config": [("V3.2", TypeError), (None, TypeError), ({"dim": 8}, TypeError)],
    "fabric": [("InfiniBand", TypeError), (FABRICS, TypeError), (None, TypeError)],
    "card": [("H200", TypeError), (ETHERNET, TypeError), (None, TypeError)],
    "plan": [("dense", ValueError), (None, ValueError), (["gathered"], ValueError)],
    "name": [(None, TypeError), (3, TypeError)],
}


@pytest.mark.parametrize("call", CALLS, ids=lambda call: call.__name__)
def test_bad_input_names_the_argument(call):
    good = CALLS[call]
    call(**good)
    for name in good:
        for value, error in PLANTED[name]:
            for more in ({}, {"size": 1} if "size" in good else {}):  # one rank exchanges nothing
                with pytest.raises(error, match=rf"^{name}(\[\d\])? must (be|hold) .*, got "):
                    call(**good | more | {name: value})
    if "T" in good:
        with pytest.raises(ValueError, match="^T must be at most S = 8.*, got 9"):
            call(**good | {"T": 9})


def test_every_public_function_is_called_with_bad_input():
    here = {value for name, value in vars(group_bill).items() if callable(value) and not name.startswith("_")}
    assert {value for value in here if value.__module__ == group_bill.__name__} <= set(CALLS)
