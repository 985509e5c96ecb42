"""Notebook 15."""

import torch

from dsa_ref.index_scores import index_scores as right_scores

from . import wrong

X = torch.tensor([[[1.0, -2.0, 3.0, 1.0, 2.0, -1.0]], [[2.0, 1.0, -1.0, 3.0, 1.0, 2.0]]])  # T = 2, D = 6
POSITIONS = torch.tensor([5, 6])
FREQS = torch.tensor([1.0, 0.3])

# ---------------------------------------------------------------------------------------------------- rope_probe


@wrong("rope_probe", "sizes")
def more_is_better():
    return torch.ones(100, 1, 64), torch.arange(100), torch.ones(16)


@wrong("rope_probe", "sizes")
def huge_numbers():
    return X * 1e6, POSITIONS, FREQS * 1e-6


@wrong("rope_probe", "sizes")
def positions_as_floats():
    return X, POSITIONS.float(), FREQS


@wrong("rope_probe", "sizes")
def x_alone():
    return X


@wrong("rope_probe", "sizes")
def no_position_at_all():
    return X[:0], POSITIONS[:0], FREQS


@wrong("rope_probe", "interleaved")
def all_ones():
    return torch.ones(1, 1, 6), torch.tensor([3]), torch.tensor([1.0, 0.5])


@wrong("rope_probe", "interleaved")
def hardly_turned():
    return X, POSITIONS, FREQS / 1000


@wrong("rope_probe", "interleaved")
def position_0_only():
    return X[:1], torch.tensor([0]), FREQS


@wrong("rope_probe", "interleaved")
def a_single_pair():
    return X, POSITIONS, FREQS[:1]


@wrong("rope_probe", "interleaved")
def nothing_to_turn():
    return torch.zeros(2, 1, 6), POSITIONS, FREQS


@wrong("rope_probe", "wrong end")
def every_dim_turns():
    return X[..., :4], POSITIONS, FREQS


@wrong("rope_probe", "restart")
def counted_from_0():
    return X, torch.tensor([0, 1]), FREQS


@wrong("rope_probe", "reversed")
def one_frequency_twice():
    return X, POSITIONS, torch.tensor([0.5, 0.5])


# ------------------------------------------------------------------------------------------------------ diagnose

Q = torch.tensor([[[1.0, 0.0], [0.0, 1.0]]])  # one query, two heads
K = torch.tensor([[1.0, -1.0], [-1.0, 1.0], [1.0, 1.0]])
W = torch.tensor([[2.0, -3.0]])
SCALE = torch.tensor([1.0, 2.0, 4.0])
ANSWERS = {
    (2.0, -6.0, -4.0): "right",
    (5.0, -10.0, -4.0): "no relu",
    (5.0, 0.0, 8.0): "weight inside the relu",
    (2.0, -3.0, -1.0): "key scale left out",
}


def table(index_scores, answers=ANSWERS, w=W, scale=SCALE, other="softmaxed weights"):
    return answers.get(tuple(index_scores(Q, K, w, scale)[0].tolist()), other)


@wrong("diagnose", "names")
def a_yes_or_no(index_scores):
    return table(index_scores) == "right"


@wrong("diagnose", "names")
def another_name(index_scores):
    return {"right": "no fault"}.get(table(index_scores), table(index_scores))


@wrong("diagnose", "right")
def always_the_same(index_scores):
    return "no relu"


@wrong("diagnose", "right")
def a_negative_score_means_no_relu(index_scores):
    return "no relu" if (index_scores(Q, K, W) < 0).any() else table(index_scores)


@wrong("diagnose", "right")
def random_numbers_compared_to_the_bit(index_scores):
    draw = torch.Generator().manual_seed(0)
    q, k, w = (torch.randn(*shape, generator=draw) for shape in ((9, 16, 8), (9, 8), (9, 16)))
    if torch.equal(index_scores(q, k, w), right_scores(q, k, w)) and table(index_scores) == "right":
        return "right"
    return "no relu" if table(index_scores) == "right" else table(index_scores)


@wrong("diagnose", "no relu")
def always_right(index_scores):
    return "right"


@wrong("diagnose", "no relu")
def judged_by_the_norm(index_scores):
    """Of these vectors the norm is the same with and without the relu."""
    k = torch.tensor([[1.0, 1.0]])
    norm = float(index_scores(Q, k, W, torch.tensor([2.0])).norm())
    return {2.0: "right", 4.0: "weight inside the relu", 1.0: "key scale left out"}.get(norm, "softmaxed weights")


@wrong("diagnose", "weight inside the relu")
def positive_weights_only(index_scores):
    w = torch.tensor([[2.0, 3.0]])
    answers = {(2.0, 6.0, 20.0): "right", (-1.0, 2.0, 20.0): "no relu", (2.0, 3.0, 5.0): "key scale left out"}
    return table(index_scores, answers, w)


@wrong("diagnose", "key scale left out")
def no_key_scale(index_scores):
    answers = {(2.0, -3.0, -1.0): "right", (5.0, -5.0, -1.0): "no relu", (5.0, 0.0, 2.0): "weight inside the relu"}
    return table(index_scores, answers, scale=None)


@wrong("diagnose", "softmaxed weights")
def three_faults_known(index_scores):
    return table(index_scores, other="right")


@wrong("diagnose", "softmaxed weights")
def one_head_of_weight_1(index_scores):
    """A softmax over one head is 1: with that weight it hides."""
    rest = table(index_scores)
    one = index_scores(Q[:, :1], K, torch.ones(1, 1))
    return "right" if rest == "softmaxed weights" and one.tolist() == [[1.0, 0.0, 1.0]] else rest


# ------------------------------------------------------------------------------------------------ match_symptoms

RIGHT = {
    "A": "positions restart",
    "B": "weights without their constant",
    "C": "future key visible",
    "D": "base-2 log-sum-exp",
    "E": "own key hidden",
    "F": "zero padding",
    "G": "threshold with >=",
}


@wrong("match_symptoms", "patients")
def one_missing():
    return {letter: name for letter, name in RIGHT.items() if letter != "D"}


@wrong("match_symptoms", "patients")
def small_letters():
    return {letter.lower(): name for letter, name in RIGHT.items()}


@wrong("match_symptoms", "patients")
def a_list():
    return list(RIGHT.values())


@wrong("match_symptoms", "known names")
def an_unknown_name():
    return RIGHT | {"F": "pads with 0"}


@wrong("match_symptoms", "known names")
def not_among_the_suspects():
    return RIGHT | {"G": "no relu"}


@wrong("match_symptoms", "each once")
def one_fault_for_both_cache_patients():
    return RIGHT | {"A": "own key hidden"}


@wrong("match_symptoms", "evidence")
def cache_patients_swapped():
    return RIGHT | {"A": RIGHT["E"], "E": RIGHT["A"]}


@wrong("match_symptoms", "evidence")
def the_other_tie_fault():
    return RIGHT | {"G": "last key wins ties"}


@wrong("match_symptoms", "evidence")
def row_2_read_as_the_future():
    return RIGHT | {"C": RIGHT["F"], "F": RIGHT["C"]}


@wrong("match_symptoms", "evidence")
def nan_suspected():
    return RIGHT | {"D": "no amax floor"}
