"""Needles: what is planted is what is asked for, far enough back; and what a step sees follows from its number."""

import dataclasses
import random

import pytest
import torch

from dsa_ref.training import needle
from dsa_ref.training.corpus import load_corpus
from dsa_ref.training.data import Data, Start
from dsa_ref.training.needle import ANSWER, DEFINITION, KEY, LINE, QUERY, VALUE, needle_windows, needles_found, plant

TEXT = bytes(range(32, 127)) * 40


def check(before, after, pairs, count, least, most, asks=1):
    """Every key is defined once, before all queries of it, at the distances that are said; all else is as it was."""
    assert len(pairs) == count * asks and len(after) == len(before)
    covered, said = set(), {}
    for begin in {place for pair in pairs for place in pair}:
        assert not covered & set(range(begin, begin + LINE))
        covered |= set(range(begin, begin + LINE))
    for pair in pairs:
        definition, query = (after[begin : begin + LINE] for begin in pair)
        key, value = query[len(QUERY) : len(QUERY) + KEY], after[pair.answer]
        assert definition == DEFINITION + key + b"=" + value + b"\n" and query == QUERY + key + b"=" + value + b"\n"
        assert after.count(DEFINITION + key + b"=") == 1 and after.count(QUERY + key + b"=") == asks
        assert least <= pair.distance == pair.query - pair.definition <= most
        said.setdefault(key, set()).add(pair.definition)
    assert len(said) == count and all(len(places) == 1 for places in said.values())
    assert all(after[i] == before[i] for i in set(range(len(before))) - covered)


@pytest.mark.parametrize(
    "count, asks, least, most",
    [(0, 1, LINE, None), (16, 1, LINE, None), (16, 3, LINE, None), (16, 1, 900, 1000), (1, 1, 3786, None)],
)
def test_what_is_planted(count, asks, least, most):
    for seed in range(5):
        after, pairs = plant(TEXT, random.Random(seed), count, asks, least, most)
        check(TEXT, after, pairs, count, least, most or len(TEXT) - LINE, asks)


def test_keys_are_distinct_though_there_are_few(monkeypatch):
    monkeypatch.setattr(needle, "ALPHABET", b"ab")
    after, pairs = plant(TEXT, random.Random(0), 16)
    check(TEXT, after, pairs, 16, LINE, len(TEXT))


def test_a_wrong_plant_is_found():
    after, pairs = plant(TEXT, random.Random(0), 8)
    first, second = pairs[:2]
    moved = [first._replace(query=first.query + 1), *pairs[1:]]
    other = bytearray(after)
    other[first.answer.start] ^= 1
    twice = bytearray(after)
    twice[second.definition : second.definition + LINE] = after[first.definition : first.definition + LINE]
    for bad, places in ((after, moved), (bytes(other), pairs), (bytes(twice), pairs)):
        with pytest.raises(AssertionError):
            check(TEXT, bad, places, 8, LINE, len(TEXT))


def test_distances_are_spread():
    """Their logarithms are: as many below the middle one as above."""
    draw = random.Random(0)
    distances = [pair.distance for _ in range(40) for pair in plant(TEXT, draw, 4, 1, 32, 2048)[1]]
    assert 0.35 < sum(distance < 256 for distance in distances) / len(distances) < 0.65


@pytest.mark.parametrize("least, most", [(LINE - 1, None), (100, 99), (LINE, len(TEXT)), (len(TEXT), None)])
def test_distances_that_no_window_has(least, most):
    with pytest.raises(ValueError, match="least and most must be from 14"):
        plant(TEXT, random.Random(0), 1, 1, least, most)


def test_too_many_pairs():
    with pytest.raises(ValueError, match="pairs must fit into a window of 60 bytes"):
        plant(TEXT[:60], random.Random(0), 3)


class Reader:
    """In a model's place: knows what follows in a query if its definition began at most `reach` bytes before it."""

    def __init__(self, reach, wrong_at=None):
        self.reach, self.wrong_at = reach, wrong_at

    def __call__(self, tokens, attention):
        text, logits = bytes(tokens.tolist()), torch.zeros(len(tokens), 256)
        for i in range(len(text)):
            begin = text.rfind(QUERY, 0, i + 1)
            if begin < 0 or not ANSWER <= i + 1 - begin < ANSWER + VALUE:
                continue
            found = text.find(DEFINITION + text[begin + len(QUERY) : begin + ANSWER])
            if 0 <= begin - found <= self.reach and i + 1 - begin != self.wrong_at:
                logits[i, text[found + i + 1 - begin]] = 1
        return logits


def test_needles_are_found_by_who_looks_back_far_enough():
    corpus = torch.frombuffer(bytearray(TEXT), dtype=torch.uint8)
    windows, places = needle_windows(corpus, 2, 1500, 5, 300)
    for reach, wanted in ((1500, True), (299, False)):
        assert needles_found(Reader(reach), windows, places, "dense") == [[wanted] * 5] * 2
    far = sorted(pair.distance for pair in places[0])
    assert sum(needles_found(Reader(far[2]), windows, places, "dense")[0]) == 3
    for byte in range(VALUE):  # all bytes must be right
        assert needles_found(Reader(1500, ANSWER + byte), windows, places, "dense") == [[False] * 5] * 2


def test_a_step_sees_what_its_number_says():
    """In any order of calls, and as no other seed, stage or step."""
    corpus = load_corpus()[0]
    data = Data(corpus, 200, 3, seed=5, pairs=2, asks=1)
    steps = [data.windows("dense", step) for step in range(3)]
    again = Data(corpus, 200, 3, seed=5, pairs=2, asks=1)
    assert all(torch.equal(again.windows("dense", step), steps[step]) for step in (2, 0, 1))
    others = [again.windows("sparse", 0), Data(corpus, 200, 3, seed=6, pairs=2, asks=1).windows("dense", 0), *steps[1:]]
    assert not any(torch.equal(steps[0], other) for other in others)
    assert steps[0].shape == (3, 201) and steps[0].dtype == torch.int64
    for row in steps[0]:
        text = bytes(row.tolist())
        assert text.count(DEFINITION) == text.count(QUERY) == 2


def test_the_dense_stage_starts_with_shorter_windows():
    """As many bytes a step, with their own needles; other stages do not, nor windows that are no longer."""
    starts = (Start(0.2, 100, 1), Start(0.35, 200, 3))
    data = Data(load_corpus()[0], 400, 2, pairs=4, dense_steps=10, starts=starts)
    got = [data.windows("dense", step) for step in (0, 1, 2, 3, 4)] + [data.windows("sparse", 0)]
    shapes = [(8, 101), (8, 101), (4, 201), (4, 201), (2, 401), (2, 401)]
    assert [tuple(windows.shape) for windows in got] == shapes
    for windows, pairs in zip(got, (1, 1, 3, 3, 4, 4), strict=True):
        for row in windows.tolist():
            assert bytes(row).count(DEFINITION) == pairs and bytes(row).count(QUERY) == 2 * pairs
    for other in ({"length": 100, "pairs": 1}, {"dense_steps": 0}):
        same = dataclasses.replace(data, **other)
        assert same.windows("dense", 0).shape == (2, same.length + 1)
    plain = dataclasses.replace(data, pairs=0).windows("dense", 0)
    assert plain.shape == (8, 101) and all(bytes(row).count(DEFINITION) == 0 for row in plain.tolist())


def test_needles_that_do_not_fit_into_some_window_are_refused_at_once():
    with pytest.raises(ValueError, match="pairs must fit into a window of 101 bytes"):
        Data(load_corpus()[0], 400, 2, pairs=4, dense_steps=10, starts=(Start(0.2, 100, 4),))
    with pytest.raises(ValueError, match="pairs must fit into a window of 401 bytes"):
        Data(load_corpus()[0], 400, 2, pairs=20)
    with pytest.raises(ValueError, match="pairs must fit into a window of 401 bytes"):  # at once, of any stage's length
        Data(load_corpus()[0], 400, 2, pairs=20, dense_steps=10**15, starts=(Start(0.2, 100, 1),))


def test_windows_are_runs_of_the_corpus_from_its_start_to_its_end():
    corpus = torch.arange(8, dtype=torch.uint8)
    rows = Data(corpus, 5, 64).windows("dense", 0)
    assert {tuple(row.tolist()) for row in rows} == {tuple(range(first, first + 6)) for first in range(3)}


@pytest.mark.parametrize("size", (0, 5, 100))
def test_a_corpus_shorter_than_a_window(size):
    with pytest.raises(ValueError, match=f"length must be from 1 to {size - 1}, .*, got 100"):
        Data(torch.zeros(size, dtype=torch.uint8), 100, 1)
