"""The numbers behind notebook 11: the records as it reads them, its ring, its card, and its live figures."""

import pathlib

import nbformat
import numpy as np
import pytest

from dsa_course import checks
from dsa_course.ladder.card import Card
from dsa_course.ladder.check import chain, fitting
from dsa_course.ladder.live import live_ladder, live_ring, live_roofline
from dsa_course.ladder.profile import PARTS, chunks, decode_profile, shares, short
from dsa_course.ladder.record import STEPS, ceilings, least_work, row, versions
from dsa_course.ladder.ring import ORDERS, Fault, act_out, passes, timeline, waiting
from dsa_course.ladder.warpgroups import SCHEDULES, busy, live_warpgroups, schedule
from notebooks.maintain.learner import SOURCE

BOOK = pathlib.Path(__file__).parents[2] / "kernels"


def right(i, places):
    return i % places, (i // places + 1) % 2, i // places % 2


def test_every_version_of_the_record_is_there_in_milliseconds():
    every = [v for step in STEPS for v in versions(step)]
    assert len(every) == 17 and all(v["low"] <= v["ms"] <= v["high"] for v in every)
    radix = versions("select_topk")[0]
    assert radix["predicted"] == 4.5 and radix["miss"] == pytest.approx(radix["ms"] / 4.5)
    whole = versions("index_scores")[1]  # predicted as a rate
    work = row("index_scores", "4096 x 128K")["work"]
    assert whole["predicted"] == pytest.approx(work / 1050e12 * 1e3, rel=1e-3)
    with pytest.raises(ValueError, match="step must be one of"):
        versions("rope")
    with pytest.raises(ValueError, match="case must be one of"):
        row("index_scores", "1 x 1")


def test_the_work_of_the_model_is_the_works_of_the_record():
    for step, S, case in (("index_scores", 131_072, "4096 x 128K"), ("sparse_attention", 32_768, "4096 x 32K")):
        named = case if step == "index_scores" else f"{case}, 128 heads, random"
        assert least_work(step, 4096, S)[0] == row(step, named)["work"]
    assert set(ceilings()) == {"bf16", "fp8", "copy"} and ceilings()["fp8"] > 1e15 > ceilings()["bf16"]
    with pytest.raises(ValueError, match="step must be"):
        least_work("select_topk", 1, 1)


def test_the_texts_claims_about_the_roofline():
    """Which queries memory bounds, as the text below the figure says."""
    for step, last in (("index_scores", 2), ("sparse_attention", 4)):
        assert [live_roofline(step, i).data["bound"] for i in (last, last + 1)] == ["memory", "computing"], step
    data = live_roofline("sparse_attention").data
    assert data["points"][0][0] == "portable"
    assert data["points"][0][2] / data["peak"] == pytest.approx(1 / 3, abs=0.02)
    assert ceilings()["copy"] > ceilings("h100")["copy"]


def test_the_kernels_needs_are_the_books():
    (cell,) = (c for c in nbformat.read(SOURCE / "11_ladder.ipynb", 4).cells if "KERNELS = {" in c.source)
    named = {}
    exec(cell.source.split("for name, need")[0], named)
    front = (BOOK / "README.md").read_text(encoding="utf-8")
    scores, attend, topk = (
        (BOOK / "book" / page).read_text(encoding="utf-8")
        for page in ("index_scores.md", "sparse_attention.md", "select_topk.md")
    )
    assert "*Registers*: 55\na thread; 8 KiB of shared memory" in front
    assert "128 threads · 128 registers · 4 bytes" in topk and "**Shared memory.** 16 bytes" in topk
    assert "12 · 32 · 168 = 64,512 registers" in scores and "**103,496**" in scores
    assert "starts 384 threads with 168 each" in attend and "**231,556**" in attend
    assert list(named["KERNELS"].values()) == [
        (128, 55, 8192), (128, 128, 16), (384, 168, 103_496), (384, 168, 231_556),
    ]  # fmt: skip
    assert [fitting(*need)[0] for need in named["KERNELS"].values()] == [9, 4, 1, 1]
    for text in ("**1024 clocks**", "**765 of the 1024 clocks**", "98,304 bytes", "some 2800 clocks"):
        assert text in scores


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("places", (1, 2, 3, 4, 5))
def test_a_right_ring_reads_every_tile_once(order, places):
    assert act_out(right, 5 * places + 1, places, order) == list(range(5 * places + 1))


@pytest.mark.parametrize(
    ("waits", "kinds"),
    [
        (lambda i, N: (i % N, i // N % 2, i // N % 2), {"filler waits"}),
        (lambda i, N: (i % N, (i // N + 1) % 2, 1), {"early", "reader waits"}),
        (lambda i, N: (i % N, 1, 0), {"twice", "early", "overwritten"}),
    ],
    ids=["filler not inverted", "reader inverted", "never changes"],
)
def test_a_wrong_ring_fails_in_every_order(waits, kinds):
    for order in ORDERS:
        with pytest.raises(Fault) as fault:
            act_out(waits, 12, 3, order)
        assert fault.value.kind in kinds


def test_the_rule_of_parities():
    assert [passes(phase, parity) for phase in (0, 1) for parity in (0, 1)] == [False, True, True, False]


@pytest.mark.parametrize("latency", (200, 1024, 2800, 4000))
@pytest.mark.parametrize("use", (256, 1024, 2048))
def test_littles_law(latency, use):
    enough = -(-latency // use) + 1
    assert waiting(timeline(enough, latency, use, 50)) == 0
    assert enough == 1 or waiting(timeline(enough - 1, latency, use, 50)) > 0
    with pytest.raises(ValueError, match="places must be at least 1"):
        timeline(0, 1, 1)


def test_a_card_costs_what_it_says():
    card = Card(2.0, warm_ms=0.5, compile_ms=100.0)
    times = []
    for cold in (False, False, True):
        if cold:
            card.overwrite_cache()
            card.wait()
        begin = card.now()
        card.launch()
        assert card.now() - begin < 100.1  # a launch does not wait for the card
        card.wait()
        times.append(round(card.now() - begin, 3))
    assert times == [102.004, 0.504, 2.004] and card.launches == 3


def test_no_two_products_overlap_and_weighing_follows_its_product():
    for groups, pieces in SCHEDULES.values():
        for weigh in (0, 192, 512):
            spans = schedule(groups, pieces, weigh)
            tensor = sorted(spans["tensor"])
            assert all(a[1] <= b[0] for a, b in zip(tensor, tensor[1:], strict=False))
            assert len(tensor) == len(spans["weigh"]) == 4 * groups * pieces
            for product, weighed in zip(spans["tensor"], spans["weigh"], strict=True):
                assert weighed[0] >= product[1] and weighed[2:] == product[2:]
    assert [round(busy(schedule(*kind, 320, 40)), 2) for kind in SCHEDULES.values()] == [0.45, 0.89, 1.0]
    assert busy(schedule(2, 1, 256, 40)) == busy(schedule(2, 2, 384, 40)) == 1
    with pytest.raises(ValueError, match="weigh must be at least 0"):
        schedule(1, 1, -1)


def test_the_figures_say_what_they_show():
    assert "radix: predicted 4.50 ms, measured 17.52" in live_ladder("select_topk").alt
    assert "measured 17.52" not in live_ladder("select_topk", measured=False).alt
    assert live_ring(4).data["idle"] == 0 and live_ring(3).data["idle"] > 0
    assert live_warpgroups().data["busy"] < 0.7 and live_warpgroups("two, in halves").data["busy"] == 1


def test_the_chain_is_the_sum_of_its_steps():
    for size in ("32K", "128K"):
        parts, faster, ms = chain(size)
        assert sum(parts[name] / faster[name] for name in parts) == pytest.approx(ms, rel=0.02)


def test_what_the_text_says_of_the_recorded_step():
    (eager_us, eager), (replayed_us, replayed) = map(decode_profile, ("eager", "replayed"))
    shared = [shares(kernels, us, PARTS) for kernels, us in ((eager, eager_us), (replayed, replayed_us))]
    assert all(sum(found.values()) == pytest.approx(1) for found in shared)
    assert shared[0]["idle"] > 0.85 and shared[1]["idle"] < 0.1 and shared[1]["products"] > 0.5
    assert 0.004 < 0.5 * eager[0][2] / eager_us < 0.01  # the slowest kernel, twice as fast
    assert eager_us > 10 * replayed_us and shared[1]["other"] == 0
    assert short("void at::native::(anonymous namespace)::CatArrayBatchedCopy<float>(int)") == "CatArrayBatchedCopy"
    with pytest.raises(ValueError, match="how must be"):
        decode_profile("compiled")


def test_chunks_are_those_of_the_record():
    for attention in ("DSA", "dense, heads kept"):
        found = chunks(attention)
        assert list(found)[0] == 12_288 and list(found)[-1] == 1 << 20
        assert found[1 << 20][0] == 4_286_580_736 and found[1 << 20][1] > found[131_072][1]


def profile_in_numpy(kernels, whole_us, parts):
    which = [next((p for p, texts in parts.items() if any(t in name for t in texts)), "other") for name, *_ in kernels]
    us = np.array([time for *_, time in kernels])
    found = {part: us[[w == part for w in which]].sum() / whole_us for part in (*parts, "other")}
    return found | {"idle": (whole_us - us.sum()) / whole_us}


def table_by_a_fit(measured, pairs):
    slope, start = np.polyfit(list(measured), list(measured.values()), 1)
    return slope * np.array(pairs) + start


def table_with_a_start(measured, pairs):
    (a, x), (b, y) = measured.items()
    start = (b * x - a * y) / (b - a)
    return tuple(start + (x - start) / a * n for n in pairs)


@pytest.mark.parametrize("solution", [profile_in_numpy, table_by_a_fit, table_with_a_start])
def test_right_answers_of_other_styles_are_accepted(solution, capsys):
    name = "read_profile" if solution is profile_in_numpy else "predict_table"
    checks.ALL[name](solution)
    assert capsys.readouterr().out.startswith(f"✓ {name}")
