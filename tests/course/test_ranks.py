"""Notebook 17: processes that run a function, the numbers behind its pictures, and the causes that its checks name."""

import time

import pytest
import torch
from wrong_solutions import ranks, ranks_sums

from dsa_course import checks
from dsa_course.ranks.lesson import TEXT, read_alone, select_among
from dsa_course.ranks.live import K, live_walk
from dsa_course.ranks.live_plans import (
    LENGTHS,
    LINKS,
    live_plans,
    plans_at,
    received,
)
from dsa_course.ranks.live_shares import TOKENS, chunks_of, live_shares, shares_at
from dsa_course.ranks.processes import run_ranks
from dsa_ref import V32
from dsa_ref.testing import Failed

# ---------------------------------------------------------------------------------------------------------- processes


def says_who_it_is():
    import os

    print(os.environ["RANK"], "of", os.environ["WORLD_SIZE"], "at", os.environ["MASTER_ADDR"])


def one_fails():
    import os

    print("began")
    if os.environ["RANK"] == "1":
        raise ValueError("of rank 1")


def one_hangs():
    import os
    import time

    time.sleep(600 * int(os.environ["RANK"]))


def test_each_rank_knows_who_it_is():
    ended = run_ranks(3, says_who_it_is)
    assert [each.printed for each in ended] == [f"{rank} of 3 at 127.0.0.1\n" for rank in range(3)]
    assert [(each.code, each.error) for each in ended] == [(0, "")] * 3


def test_an_error_is_reported_with_what_was_printed_before():
    whole, failed = run_ranks(2, one_fails)
    assert (whole.code, whole.error, whole.printed) == (0, "", "began\n")
    assert (failed.code, failed.error, failed.printed) == (1, "ValueError: of rank 1", "began\n")


def test_a_rank_that_hangs_is_named_and_ended():
    began = time.monotonic()
    with pytest.raises(TimeoutError, match="still at work after 2 seconds: ranks 1$"):
        run_ranks(2, one_hangs, seconds=2)
    assert time.monotonic() - began < 30


# ------------------------------------------------------------------------------------------------------------ pictures


def test_zigzag_is_balanced_and_contiguous_shares_are_not():
    for size in range(2, 9):
        assert shares_at("contiguous", size)["imbalance"] == pytest.approx(1 - 1 / size, abs=1e-4)
        assert shares_at("zigzag", size)["imbalance"] < 1e-3
        for plan in ("contiguous", "zigzag"):
            rows = [row for rank in range(size) for chunk in chunks_of(plan, 1000, size, rank) for row in chunk]
            assert sorted(rows) == list(range(1000))
    figure = live_shares(8, "contiguous")
    assert len(figure.data["chunks"]) == 8 and "87.5%" in figure.alt and TOKENS == 131_072


def test_the_walk_shows_what_one_process_selects():
    figure = live_walk()
    controls = {name: figure._controls[name] for name in ("plan", "step")}
    query = len(TEXT) - 1
    right = set(read_alone()[2]["indices"][query].tolist())

    def marked(word):
        return [{s for s, state in zip(one["order"], one["state"], strict=True) if state == word} for one in ranks_of()]

    def ranks_of():
        return figure.data["ranks"]

    first, second = marked("own")
    assert not first & second and first | second == set(range(len(TEXT))) and query in first
    controls["step"].value = 2
    assert ranks_of()[0]["order"] == ranks_of()[1]["order"] != sorted(ranks_of()[0]["order"])
    controls["step"].value = 4
    assert marked("kept")[0] == right and all(s <= 191 for s in marked("kept")[1])
    controls["plan"].value = "sharded keys"
    assert marked("kept") == [right, right]
    controls["step"].value = 2
    brought = marked("candidate")
    assert [len(each) for each in brought] == [K, K] and right <= brought[0] | brought[1]
    controls["step"].value = 5
    assert marked("kept")[0] | marked("kept")[1] == right and not marked("kept")[0] & marked("kept")[1]
    shares = [int(one["words"].split()[-4].rstrip("%")) for one in ranks_of()]
    assert abs(sum(shares) - 100) <= 1 and figure.data["told"] in figure.alt.lower()


def test_an_equal_share_of_k_misses_keys():
    """What notebook 17 begins with, and that candidates mend it."""
    layer, query = read_alone()[1], len(TEXT) - 1
    right = set(layer["indices"][query].tolist())
    for k, all_there in ((K // 2, False), (K, True)):
        brought = [set(select_among(layer, query, own, k)[0].tolist()) for own in torch.arange(len(TEXT)).split(128)]
        assert (right <= brought[0] | brought[1]) == all_there


def test_bytes_are_those_of_the_plans():
    assert received(V32, 4000, 10, 4) == {"gathered": 1284 * 3000, "sharded": (8 * 2048 + 4 * 128 * 513) * 30}


def test_what_the_text_says_of_plans():
    figure = live_plans()
    assert figure.data == plans_at("read a prompt", 8, "InfiniBand, 400 Gbit/s")
    assert "sharded keys beat one GPU at 1 of 12 lengths" in figure.alt
    ethernet, infiniband, nvlink = LINKS
    for link in LINKS:
        data = plans_at("read a prompt", 8, link)
        assert data["pays"]["gathered"] == LENGTHS
        assert all(a < b for a, b in zip(data["gathered"], data["computing"], strict=True))
        assert plans_at("write a token", 8, link)["pays"]["gathered"] == []
    data = plans_at("read a prompt", 64, ethernet)
    each = zip(LENGTHS, data["gathered"], data["computing"], strict=True)
    assert min(L for L, a, b in each if a < b) == 2**20
    reading = {link: min(plans_at("read a prompt", 8, link)["pays"]["sharded"]) for link in (infiniband, nvlink)}
    assert reading == {infiniband: 2**23, nvlink: 2**19}
    writing = {link: min(plans_at("write a token", 8, link)["pays"]["sharded"]) for link in LINKS}
    assert writing == {ethernet: 2**23, infiniband: 2**21, nvlink: 2**18}
    assert min(plans_at("write a token", 64, nvlink)["pays"]["sharded"]) > 2**18


# ------------------------------------------------------------------------------------------------------------- causes


@pytest.mark.parametrize(
    ("exercise", "solution", "cause"),
    [
        ("zigzag", ranks.contiguous, "contiguous shares"),
        ("zigzag", ranks.the_later_chunk_first, "the earlier chunk first"),
        ("candidates", ranks.local_positions_for_global, "numbers of rows on this rank"),
        ("candidates", ranks.everything_sent, "no rank can bring more than k"),
        ("winners", ranks.ties_by_rank, "the one that came first was kept"),
        ("winners", ranks.numbers_of_candidates, "numbers of candidates"),
        ("winners", ranks.best_first, "in another order"),
        ("rank_attention", ranks_sums.places_taken_for_rows, "look up which row"),
        ("rank_attention", ranks_sums.merged_by_mean, "the mean of the ranks' outputs"),
        ("rank_attention", ranks_sums.weighed_by_the_number_of_keys, "how many keys a rank holds"),
        ("group_gradient", ranks_sums.own_part_counted_twice, "counted twice"),
        ("group_gradient", ranks_sums.summed_once_more_by_every_rank, "counted 2 times"),
        ("group_gradient", ranks_sums.the_mean_over_ranks, "the mean over ranks"),
        ("group_gradient", ranks_sums.of_the_sum, "the gradient of the sum"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_the_common_mistakes_are_named(exercise, solution, cause):
    with pytest.raises(Failed) as failure:
        checks.ALL[exercise](solution)
    assert cause in failure.value.cause
