"""The judge is judged: right selections pass, and each kind of wrong one is rejected for its own property."""

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from dsa_ref import testing
from dsa_ref.select_topk import select_topk, select_topk_loops
from dsa_ref.testing import (
    attention_recall,
    compare_selection,
    overlap,
    random_selection,
    relative_error,
    window_selection,
)

K = 4


def case(seed=0, T=5, S=7):
    """Distinct scores [T, S]; row t sees S - T + t + 1 keys: 3, 4, 5, 6, 7. So row 0 is shorter than K."""
    rng = np.random.default_rng(seed)
    scores = torch.from_numpy(rng.permuted(np.arange(T * S, dtype=np.float32) - 10).reshape(T, S))
    return scores, select_topk(scores, K)


def int32(*rows):
    return torch.tensor(rows, dtype=torch.int32)


# ---------------------------------------------------------------------------------------------------------- accepted


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("T, S, k", [(5, 7, 1), (5, 7, 4), (5, 7, 9), (13, 13, 5), (1, 40, 16)])
def test_the_oracle_passes_in_any_order_and_as_arrays(seed, T, S, k):
    rng = np.random.default_rng(seed)
    scores = rng.integers(-2, 3, (T, S)).astype(np.float32)  # full of ties
    right = select_topk_loops(scores, k)
    compare_selection(right, scores, k)
    for t in range(T):
        n = min(k, S - T + t + 1)
        right[t, :n] = rng.permutation(right[t, :n])
    compare_selection(torch.from_numpy(right), torch.from_numpy(scores), k)


def test_all_ties_signed_zeros_and_infinities():
    zeros = torch.tensor([[-0.0, 0.0, -0.0, 0.0, 0.0]])
    compare_selection(int32([0, 1, 2]), zeros, 3)
    compare_selection(int32([1, 0]), torch.full((1, 4), -math.inf), 2)
    compare_selection(int32([2, 0]), torch.tensor([[1.0, 0.0, math.inf, -math.inf]]), 2)


def test_ranges_and_empty_rows():
    scores = torch.tensor([[9.0, 1.0, 2.0, 3.0]]).repeat(2, 1)
    start, end = torch.tensor([1, 2], dtype=torch.int32), torch.tensor([4, 2], dtype=torch.int32)
    compare_selection(int32([3, 2], [-1, -1]), scores, 2, start, end)
    with pytest.raises(AssertionError, match=r"^range: row t=0, .*s=0: got 0, expected s >= 1"):
        compare_selection(int32([0, 3], [-1, -1]), scores, 2, start, end)
    with pytest.raises(AssertionError, match=r"^padding: row t=1, .*got 0 2 times"):
        compare_selection(int32([3, 2], [0, 0]), scores, 2, start, end)


# ---------------------------------------------------------------------------------------------------------- rejected


def future(scores, right):
    everything = torch.full((len(right),), scores.shape[1], dtype=torch.int32)
    return select_topk(scores, K, torch.zeros_like(everything), everything)


def dropped_after_selecting(scores, right):
    leaky = future(scores, right)
    last = torch.arange(3, 8)[:, None]
    kept = [row[row < end].tolist() for row, end in zip(leaky, last, strict=True)]
    return int32(*(row + [-1] * (K - len(row)) for row in kept))


def edited(t, *places):
    def wrong(scores, right):
        right = right.clone()
        right[t] = torch.tensor(places, dtype=torch.int32)
        return right

    return wrong


def best_left_out(scores, right):
    right = right.clone()
    best = scores[4].argmax()
    right[4][right[4] == best] = next(s for s in range(7) if s not in right[4].tolist())
    return right


REJECTED = {
    "future leak": (future, r"^future: row t=\d.* s=\d.*expected s < \d.*saw the future"),
    "future leak, row not full": (edited(0, 0, 1, 2, 3), r"^future: row t=0, .* s=3: got 3, expected s < 3"),
    "hidden after selecting": (dropped_after_selecting, r"^count: row t=\d.*hide the future before"),
    "duplicate": (edited(2, 0, 1, 1, 2), r"^duplicates: row t=2, .* s=1: got it 2 times"),
    "padded with 0": (edited(0, 0, 1, 2, 0), r"^padding: row t=0, .*padded with 0 instead of -1"),
    "padded with S": (lambda s, r: torch.where(torch.arange(5)[:, None] < 1, int32([0, 7, 7, 7]), r), "^padding.* 7 "),
    "padding in front": (edited(0, -1, 0, 1, 2), r"^padding: row t=0, .*got -1 in place 0"),
    "too few": (edited(3, 0, 1, 2, -1), r"^count: row t=3, .*got 3 keys, expected min\(k, visible\) = 4"),
    "nothing": (lambda s, r: torch.full_like(r, -1), r"^count: row t=0, .*got 0 keys"),
    "too many": (lambda s, r: torch.nn.functional.pad(r, (0, 1), value=-1), r"^count: got 5 .*too many"),
    "not padded to k": (lambda s, r: r[:, :3], r"^count: got 3 places.*pad it with -1"),
    "a row short": (lambda s, r: r[1:], r"^count: got shape \[4, 4\]"),
    "outside": (edited(4, 0, 1, 2, 7), r"^range: row t=4.*got 7, expected -1 or 0 <= s < S = 7"),
    "negative": (edited(4, 0, 1, 2, -2), r"^range: row t=4.*got -2"),
    "best left out": (best_left_out, r"^scores: row t=4, s=\d: got a key with score"),
    "int64": (lambda s, r: r.long(), r"^type: got Tensor torch.int64, expected an int32 tensor"),
    "int64 array": (lambda s, r: r.long().numpy(), r"^type: got ndarray int64"),
    "object array": (lambda s, r: r.numpy().astype(object), r"^type: got ndarray object"),
    "nothing returned": (lambda s, r: None, r"^type: got NoneType"),
}


@pytest.mark.parametrize("name", REJECTED)
@pytest.mark.parametrize("seed", [1, 3])
def test_wrong_selections_are_rejected_for_their_property(name, seed):
    scores, right = case(seed)
    compare_selection(right, scores, K)
    wrong, message = REJECTED[name]
    with pytest.raises(AssertionError, match=message):
        compare_selection(wrong(scores, right), scores, K)


@pytest.mark.parametrize(
    "key, cause",
    [
        (torch.neg, "the smallest scores were kept"),
        (torch.abs, "magnitudes were ranked"),
        (torch.zeros_like, "the first keys were kept"),
        (lambda scores: torch.arange(60.0).expand(3, 60), "the last keys were kept"),
        (lambda scores: torch.where(torch.arange(60) % 2 == 1, -1e9, scores), "never looked at"),
    ],
)
@pytest.mark.parametrize("seed", [1, 3])
def test_a_selection_by_another_key_is_recognised(key, cause, seed):
    scores = torch.from_numpy(np.random.default_rng(seed).standard_normal((3, 60)))
    with pytest.raises(AssertionError, match=f"^scores: row t=.*{cause}"):
        compare_selection(select_topk(key(scores), 9), scores, 9)


@pytest.mark.parametrize(
    "rows",
    [
        ([[2.0, 2.0, 3.0]], [[0, 1]]),  # by itself it could also be "the smallest", or "the first keys"
        ([[1.0, 3.0, 1.0, 2.0, 2.0], [1.0, 2.0, 1.0, 1.0, 3.0]], [[1, 3, 4], [0, 1, 2]]),
    ],
)
def test_the_first_keys_that_reach_the_threshold_are_recognised(rows):
    scores, wrong = torch.tensor(rows[0]), int32(*rows[1])
    everything = {"start": torch.zeros(len(scores)).int(), "end": torch.full((len(scores),), scores.shape[1]).int()}
    with pytest.raises(AssertionError, match=r"^scores: row t=\d.*the first keys that reach the threshold"):
        compare_selection(wrong, scores, wrong.shape[1], **everything)


def test_a_cause_explains_every_wrong_row():
    scores = torch.tensor([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0]])  # row 0 alone: the smallest were kept
    with pytest.raises(AssertionError, match=r"^scores: row t=0, .*Likely cause: the first keys were kept"):
        compare_selection(int32([0], [0]), scores, 1, start=int32([0, 0])[0], end=int32([3, 3])[0])
    scores = torch.tensor([[2.0, 1.0, 3.0, 4.0], [4.0, -5.0, 2.0, 3.0]])
    with pytest.raises(AssertionError, match=r"^scores: row t=0, .*a part of the keys was never looked at"):
        compare_selection(int32([1], [2]), scores, 1, start=int32([0, 0])[0], end=int32([4, 4])[0])


def test_the_first_bad_row_and_both_keys_are_named():
    scores = torch.tensor([[5.0, 4.0, 3.0, 2.0], [2.0, 3.0, 4.0, 5.0]])
    everything = {"start": int32([0, 0])[0], "end": int32([4, 4])[0]}
    with pytest.raises(AssertionError, match=r"row t=1, s=0: got a key with score 2.0, expected s=2 with score 4.0"):
        compare_selection(int32([0, 1], [0, 3]), scores, 2, **everything)


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_the_larger_index_of_a_tie_is_rejected(zero):
    scores = torch.tensor([[1.0, 0.0, 3.0, zero, 0.0]])
    compare_selection(int32([0, 1, 2]), scores, 3)
    with pytest.raises(AssertionError, match=r"^ties: row t=0, s=1: got this key, expected s=0"):
        compare_selection(int32([1, 2]), torch.tensor([[zero, 0.0, 3.0]]), 2)
    for larger in (3, 4):
        with pytest.raises(AssertionError, match=rf"^ties: row t=0, s={larger}: got this key, expected s=1"):
            compare_selection(int32([0, larger, 2]), scores, 3)


def test_tolerance_forgives_the_threshold_and_nothing_else():
    scores = torch.tensor([[-100.0, 5.0, 4.0, 3.9, 1.0]])  # slack at 0.002: 0.2
    near, far, best_lost = int32([1, 3]), int32([1, 4]), int32([2, 3])
    compare_selection(near, scores, 2, tolerance=0.002)
    for wrong in (far, best_lost):
        with pytest.raises(AssertionError, match=r"^scores: row t=0"):
            compare_selection(wrong, scores, 2, tolerance=0.002)
    with pytest.raises(AssertionError, match=r"^scores: row t=0, s=3: .*expected s=2"):
        compare_selection(near, scores, 2, tolerance=0.0005)
    around = torch.tensor([[-100.0, 5.0, 4.05, 4.0, 3.95]])  # one just above the threshold is left for one just below
    compare_selection(int32([1, 3, 4]), around, 3, tolerance=0.002)
    with pytest.raises(AssertionError, match=r"^scores: row t=0, s=4: .*expected s=2"):
        compare_selection(int32([1, 3, 4]), around, 3, tolerance=0.0003)
    compare_selection(int32([1, 2]), torch.zeros(1, 3), 2, tolerance=1e-6)  # ties are not judged
    with pytest.raises(AssertionError, match="^duplicates"):
        compare_selection(int32([1, 1]), scores, 2, tolerance=0.5)


def test_bad_questions_are_no_verdict():
    scores, right = case()
    with pytest.raises(ValueError, match="scores must not be NaN in a visible place, got NaN in row t=2, s=1"):
        poisoned = scores.clone()
        poisoned[2, 1] = math.nan
        compare_selection(right, poisoned, K)
    hidden = scores.clone()
    hidden[0, 3:] = math.nan  # row 0 sees three keys
    compare_selection(right, hidden, K)
    with pytest.raises(ValueError, match="k must be at least 1"):
        compare_selection(right, scores, 0)
    with pytest.raises(ValueError, match="tolerance must be finite"):
        compare_selection(right, scores, K, tolerance=-0.1)
    with pytest.raises(TypeError, match="end must have dtype int32"):
        compare_selection(right, scores, K, end=torch.full((5,), 7))


# --------------------------------------------------------------------------------------------------------- distances


def test_overlap_is_a_share_of_the_first():
    a, b = int32([0, 1, 2, 3], [4, -1, -1, -1], [-1, -1, -1, -1]), int32([3, 2, 9], [5, -1, -1], [1, 2, 3])
    assert overlap(a, b) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert overlap(b.numpy(), a.numpy()) == pytest.approx((2 / 3 + 0.0 + 0.0) / 3)
    with pytest.raises(ValueError, match="b must have shape"):
        overlap(a, b[:2])
    with pytest.raises(ValueError, match="T must be at least 1"):
        overlap(a[:0], b[:0])
    with pytest.raises(TypeError, match="a must have dtype"):
        overlap(a.float(), b)


def test_relative_error():
    inf, nan = math.inf, math.nan
    assert relative_error([3.0, 4.5], [3.0, 4.0]) == pytest.approx(0.1)
    assert relative_error(torch.tensor([1.0, -inf]), np.array([1.0, -inf])) == 0.0
    assert relative_error([3.0, 4.5, -inf], [3.0, 4.0, -inf]) == pytest.approx(0.1)
    assert relative_error(torch.ones(2, dtype=torch.bfloat16), torch.ones(2)) == 0.0
    assert relative_error([0.0], [0.0]) == 0.0
    for got, expected in (([1e-9], [0.0]), ([nan], [1.0]), ([1.0], [nan]), ([inf], [-inf]), ([inf], [1.0])):
        assert relative_error(got, expected) == inf
    with pytest.raises(ValueError, match="got must have the shape"):
        relative_error([1.0], [[1.0]])


def test_attention_recall():
    weights = torch.tensor([[0.5, 0.25, 0.25, 0.0], [0.1, 0.2, 0.3, 0.4]])
    assert attention_recall(weights, int32([0, 2], [3, -1])) == pytest.approx((0.75 + 0.4) / 2)
    assert attention_recall(weights, int32([0, 0], [-1, -1])) == pytest.approx(0.25)
    with pytest.raises(ValueError, match="weights must sum to 1 in every row, got .* in row 1"):
        attention_recall(weights * torch.tensor([[1.0], [2.0]]), int32([0], [0]))
    with pytest.raises(ValueError, match=r"indices must lie in \[-1, S\)"):
        attention_recall(weights, int32([0], [4]))


def test_controls_select_visible_keys_once():
    start, end = torch.tensor([0, 3, 5, 0], dtype=torch.int32), torch.tensor([2, 9, 5, 9], dtype=torch.int32)
    assert window_selection(3, start, end).tolist() == [[0, 1, -1], [6, 7, 8], [-1, -1, -1], [6, 7, 8]]
    drawn = random_selection(3, start, end, seed=0)
    assert drawn.dtype == window_selection(3, start, end).dtype == torch.int32
    for row, first, last in zip(drawn.tolist(), start.tolist(), end.tolist(), strict=True):
        chosen = [s for s in row if s >= 0]
        assert len(set(chosen)) == len(chosen) == min(3, last - first)
        assert row == sorted(chosen) + [-1] * (3 - len(chosen))
        assert all(first <= s < last for s in chosen)
    assert drawn.equal(random_selection(3, start, end, seed=0))


def test_random_selection_is_even_and_seeded():
    rows = 4000
    start, end = torch.full((rows,), 2, dtype=torch.int32), torch.full((rows,), 7, dtype=torch.int32)
    drawn = random_selection(2, start, end, seed=1)
    share = torch.bincount(drawn.flatten(), minlength=7)[2:] / rows
    assert (share - 0.4).abs().max() < 0.03
    assert not drawn.equal(random_selection(2, start, end, seed=2))


def test_controls_refuse_bad_ranges():
    good, low = int32([3])[0], int32([1])[0]
    for control in (window_selection, lambda k, a, b: random_selection(k, a, b, seed=0)):
        with pytest.raises(ValueError, match="start must keep"):
            control(2, good, low)
        with pytest.raises(ValueError, match="k must be at least 1"):
            control(0, low, good)
        with pytest.raises(TypeError, match="end must have dtype int32"):
            control(2, low, good.long())


def test_poisoned_memory_leaves_the_default_device_to_work():
    """In a process of its own: torch notes once which functions make tensors."""
    said = subprocess.run([sys.executable, "-c", POISONED_FIRST], capture_output=True, text=True)
    assert (said.returncode, said.stdout.split()) == (0, ["meta", "meta"]), said.stderr


POISONED_FIRST = """
import torch
from dsa_ref import testing
with testing.poisoned(), torch.device("meta"):
    print(torch.empty(1).device)
with torch.device("meta"):
    print(torch.empty(1).device)
"""


def test_poisoned_memory_ends_with_the_last_of_those_that_asked_for_it():
    """Two threads that leave in the order in which they came, not the other way round."""
    empty, new_empty = torch.empty, torch.Tensor.new_empty
    first, second = testing.poisoned(), testing.poisoned()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert torch.empty(3).isnan().all()
    second.__exit__(None, None, None)
    assert torch.empty is empty and torch.Tensor.new_empty is new_empty
