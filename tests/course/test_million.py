"""Notebook 14: what its text says of the record, the numbers behind its live figures, right answers to exercises."""

import math

import pytest

from dsa_course import checks
from dsa_course.million.check_limits import needed
from dsa_course.million.keys import attention_of, needed_at
from dsa_course.million.live import curves, live_decode, live_parts, live_prefill, per_1000, size
from dsa_course.million.live_keys import live_needed
from dsa_course.million.record import parts, points, step
from dsa_ref import V32, bill, cost

K, M = 1 << 10, 1 << 20


def controls(figure):
    return {control.description: control for control in figure.children[0].children or figure.children[:-1]}


def test_what_the_text_says_of_the_record():
    rows = {row["position"]: row for row in step("bill")["prefill"]}
    assert all(rows[S]["times"] < 1 for S in (4 * K, 8 * K)) and all(rows[S]["times"] > 1 for S in (16 * K, M))
    assert rows[M]["times"] > 5  # more than FLOPs alone would save
    at = {S: parts(S) for S in (32 * K, 64 * K, 128 * K, M)}
    share = {S: found["scores and selection"] / sum(found.values()) for S, found in at.items()}
    assert share[64 * K] < 0.5 < share[128 * K] and share[M] > 0.9
    half = {name: found["position"] for name, found in step("bill")["half"].items()}
    assert 25_000 < half["prefill"] < 35_000 and 45_000 < half["prompt"] < 60_000
    assert half["decode, batch 1"] > 4 * half["decode, batch 8"] > 300_000
    with pytest.raises(ValueError, match="position must be one of"):
        parts(5)
    with pytest.raises(ValueError, match="name must be one of"):
        step("train")


def test_points_say_what_the_file_says():
    (found,) = (p for p in points("decode") if (p["tokens"], p["position"], p["attention"]) == (8, M, "dense"))
    (row,) = (r for r in step("decode")["rows"] if (r["batch"], r["position"]) == (8, M))
    right = [r["us"] for name, r in row["results"].items() if name != "DSA" and r["verdict"] == "right"]
    assert found["ms"] == min(right) / 1e3
    assert found["predicted"] == pytest.approx(1e3 * sum(bill.decode_seconds(V32, 8, M, "dense").values()))


def test_the_parts_add_up_and_say_where_they_are():
    data = live_parts(20).data
    assert data["position"] == M and data["tokens"] == 4096 and set(data["recorded"]) == {"DSA", "dense"}
    assert sum(data["DSA"].values()) == pytest.approx(data["recorded"]["DSA"], rel=0.1)
    assert data["share"] > 0.9 > 0.5 > live_parts(16).data["share"]
    assert live_parts(11).data["tokens"] == 2048 and live_parts(21).data["recorded"] == {}


def test_curves_and_where_they_meet():
    prefill, whole = curves("prefill"), curves("prefill", whole=True)
    assert prefill["equal"] < prefill["half"] < whole["half"] and prefill["equal"] < whole["equal"]
    for data in (prefill, curves("decode", batch=8)):
        for name, times in (("equal", 1.0), ("half", 2.0)):
            here, before = (
                per_1000(data["phase"], "dense" if data["phase"] == "decode" else "dense, heads kept", n)
                / per_1000(data["phase"], "DSA", n)
                for n in (data[name], data[name] - 1)
            )
            assert here >= times > before
    batches = [curves("decode", batch=2**i)["half"] for i in range(7)]
    assert batches == sorted(batches, reverse=True)
    assert curves("prefill", whole=True)["points"] and not curves("decode", batch=4)["points"]


def test_price_and_layers_move_no_line_and_k_does():
    figure = live_prefill()
    before = figure.data["half"]
    found = {c.description: c for box in (figure, *figure.children) for c in getattr(box, "children", ())}
    found["$ a GPU-hour"].value, found["layers"].value = 4.0, 30
    assert figure.data["half"] == before and f"half from {before:,} tokens" in figure.alt
    assert found["k = 2^"].value == 11 and figure.data["points"]
    found["k = 2^"].value = 9
    assert figure.data["half"] < before and not figure.data["points"]
    found["the whole prompt up to there"].value = True
    assert figure.data["whole"] and "A whole prompt" in figure.alt


def test_decode_with_one_text_hardly_pays():
    figure = live_decode(batch=0)
    assert figure.data["half"] > 500_000 and "1 texts at once" not in figure.alt
    assert live_decode(batch=6).data["half"] < 64 * K
    assert [size(n) for n in (2048, 12_288, M, 2 * M)] == ["2K", "12K", "1M", "2M"]


def test_every_layer_needs_more_keys_but_none_in_proportion():
    for layer in range(4):
        assert 1.5 < needed_at(layer, 1024, 0.9) / needed_at(layer, 128, 0.9) < 6, layer
    assert needed_at(0, 1024, 0.9) < 32 and min(needed_at(layer, 1024, 0.9) for layer in (1, 2, 3)) > 80
    figure = live_needed()
    assert figure.data["needed"][1][-1] == pytest.approx(needed_at(1, 1024, 0.9))
    assert figure.data["positions"] == [64, 128, 256, 512, 1024]
    row = attention_of(1024)[3][500]
    assert needed(row, 0.5) <= needed(row, 0.9) <= 501


def in_numpy(weights, share):
    import numpy as np

    return np.searchsorted(np.cumsum(-np.sort(-weights.numpy())), share) + 1


def one_by_one(weights, share):
    held, count = 0.0, 0
    for weight in sorted(weights.tolist(), reverse=True):
        held, count = held + weight, count + 1
        if held >= share:
            break
    return count


def chunk_in_a_loop(T, S, speed, rest_ms):
    """Row by row where T is small, the mean row elsewhere."""
    keys = S - T / 2
    every = cost.matrices(V32)
    dsa = 2 * T * sum(every.values()) / speed["products"] + 2 * 64 * 128 * T * keys / speed["scores"]
    dsa += 2 * 128 * (576 + 512) * T * 2048 / speed["sparse"]
    main = sum(n for name, n in every.items() if "index" not in name)
    dense = 2 * T * main / speed["products"] + 2 * 128 * (128 + 64 + 128) * T * keys / speed["heads"]
    return [rest_ms + dsa * 1000, rest_ms + dense * 1000]


def half_with_sums(tokens, dsa, dense):
    found = []
    for a, b in ((lambda i: dsa[i], lambda i: dense[i]), (lambda i: sum(dsa[: i + 1]), lambda i: sum(dense[: i + 1]))):
        found.append(next((tokens[i] for i in range(len(tokens)) if a(i) / b(i) <= 0.5), None))
    return tuple(found)


RIGHT = [
    ("dollars", lambda ms, tokens, layers, price: price * layers * (ms / 3.6e6) * (1e6 / tokens)),
    ("dollars", lambda ms, tokens, layers, price: ms * layers * price / tokens / 3.6),
    ("needed_keys", in_numpy),
    ("needed_keys", one_by_one),
    ("chunk_ms", chunk_in_a_loop),
    ("half_from", half_with_sums),
    ("most_tokens", lambda free, layers, cache, work: free // (layers * cache + work) if free > 0 else 0),
    ("most_tokens", lambda free, layers, cache, work: max(0, math.floor(divmod(free, layers * cache + work)[0]))),
]


@pytest.mark.parametrize(("exercise", "solution"), RIGHT, ids=[f"{e}-{i}" for i, (e, _) in enumerate(RIGHT)])
def test_right_answers_of_other_styles_are_accepted(exercise, solution, capsys):
    checks.ALL[exercise](solution)
    assert capsys.readouterr().out.startswith(f"✓ {exercise}")
