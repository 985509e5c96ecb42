"""Notebook 15: a probe for RoPE, a diagnosis of index_scores by probing, and symptoms matched to traps."""

import torch

from dsa_ref.index_scores import index_scores, index_scores_loops
from dsa_ref.rope import rope
from dsa_ref.testing import Failed

from ..checking import FORGOTTEN, Check, expect, expect_shape, tensor
from .table import planted, trap
from .variants import key_scale_left_out, no_relu, weight_inside_the_relu

# ---------------------------------------------------------------------------------------------- 15.1 rope_probe

rope_probe = Check("rope_probe")  # () -> x fp32 [T, 1, D], positions int64 [T], freqs fp32 [R/2]

ROPES = {  # near-identical variants of rope(x, positions, freqs, "half"): all of them keep every norm
    "interleaved": lambda x, positions, freqs: rope(x, positions, freqs, "interleaved"),
    "wrong end": lambda x, positions, freqs: _last_dims_first(x, positions, freqs),
    "restart": lambda x, positions, freqs: rope(x, positions - positions[:1], freqs, "half"),
    "reversed": lambda x, positions, freqs: rope(x, positions, freqs.flip(0), "half"),
}
BLIND = {
    "interleaved": "position 0 turns nothing, a single pair (R = 2) is the same in both layouts, nearly equal numbers "
    "in x are alike in both, and small angles (position · frequency) turn little",
    "wrong end": "with D = R both ends are the whole vector: leave dims that RoPE does not turn",
    "restart": "your first position is 0, so counting from 0 again changes nothing",
    "reversed": "all your frequencies are equal, or nothing turns far enough",
}
LIMITS = {"T": 4, "D": 16, "|x|": 4, "freqs": 1}


def _last_dims_first(x, positions, freqs):
    R = 2 * len(freqs)
    return rope(x.roll(R, dims=-1), positions, freqs, "half").roll(-R, dims=-1)


def _probe(solution):
    """What the learner returned, arrays as tensors."""
    got = solution()
    forgotten = FORGOTTEN if got is None else "return x, positions, freqs"
    expect(isinstance(got, (tuple, list)) and len(got) == 3, f"got {type(got).__name__}, expected three", forgotten)
    return [tensor(x, name) for x, name in zip(got, ("x", "positions", "freqs"), strict=True)]


@rope_probe.property("sizes")
def rope_probe_sizes(solution):
    x, positions, freqs = _probe(solution)
    for name, given in (("x", x), ("freqs", freqs)):
        expect_shape(given, getattr(given, "shape", ()), torch.float32, name)
    expect(x.dim() == 3 and x.shape[1] == 1, f"x: got shape {list(x.shape)}, expected [T, 1, D]", "one head")
    T, D = x.shape[0], x.shape[2]
    expect(x.numel() > 0, f"x: got shape {list(x.shape)}, which holds no number", "at least one position, T >= 1")
    expect_shape(positions, (T,), torch.int64, "positions")
    expect(
        freqs.dim() == 1 and 1 <= len(freqs) <= D // 2, f"freqs: got shape {list(freqs.shape)}", "R/2 of them, R <= D"
    )
    sizes = {"T": T, "D": D, "|x|": float(x.abs().max()), "freqs": float(freqs.abs().max())}
    for name, size in sizes.items():
        cause = "a large input hides what makes it a good one: keep it small enough to do by hand"
        expect(size <= LIMITS[name], f"{name}: got {size:g}, expected at most {LIMITS[name]}", cause)


def _told_apart(solution, name):
    x, positions, freqs = _probe(solution)
    right, wrong = rope(x, positions, freqs, "half"), ROPES[name](x, positions, freqs)
    largest = float((right - wrong).abs().max())
    expect(
        largest > 0.1,
        f"on your input the right RoPE and the one called {name!r} differ by at most {largest:.3g}, "
        "expected more than 0.1 somewhere",
        BLIND[name],
    )


@rope_probe.property("interleaved")
def rope_probe_interleaved(solution):
    _told_apart(solution, "interleaved")


@rope_probe.property("wrong end")
def rope_probe_wrong_end(solution):
    _told_apart(solution, "wrong end")


@rope_probe.property("restart")
def rope_probe_restart(solution):
    _told_apart(solution, "restart")


@rope_probe.property("reversed")
def rope_probe_reversed(solution):
    _told_apart(solution, "reversed")


# ------------------------------------------------------------------------------------------------ 15.2 diagnose

diagnose = Check("diagnose")  # (index_scores) -> one of FAULTS


def _softmaxed(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    return index_scores(q_idx, k_idx, w.softmax(dim=-1), k_scale, start, end)


def _head_by_head(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    """Right, in another order of summation: the last head first, one at a time."""
    parts = [
        index_scores(q_idx[:, h : h + 1], k_idx, w[:, h : h + 1], k_scale, start, end) for h in range(q_idx.shape[1])
    ]
    return sum(reversed(parts[:-1]), parts[-1])


def _by_loops(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    """Right, in float64."""
    arrays = (None if x is None else x.detach().double().numpy() for x in (q_idx, k_idx, w, k_scale))
    ranges = (None if x is None else x.tolist() for x in (start, end))
    return torch.from_numpy(index_scores_loops(*arrays, *ranges)).float()


FAULTS = {  # answer -> implementations that deserve it
    "right": (index_scores, _head_by_head, _by_loops),
    "no relu": (no_relu,),
    "weight inside the relu": (weight_inside_the_relu,),
    "key scale left out": (key_scale_left_out,),
    "softmaxed weights": (_softmaxed,),
}
MISSED = {
    "right": "a right implementation in another order of summation: whole numbers leave nothing to round, and a score "
    "may be negative where a weight is",
    "no relu": "one of your dot products must be negative for this to show",
    "weight inside the relu": "it shows only where a weight is negative, and its dot product is not 0",
    "key scale left out": "it shows only where you pass a k_scale that is not 1 everywhere",
    "softmaxed weights": "it shows where the weights are not positive numbers that sum to 1",
}


@diagnose.property("names")
def diagnose_names(solution):
    got = solution(_anonymous(index_scores))
    expect(
        isinstance(got, str) and got in FAULTS,
        f"got {got!r}, expected one of {', '.join(FAULTS)}",
        "return the fault's name, a str",
    )


def _diagnosed(solution, name):
    for implementation in FAULTS[name]:
        probed = _anonymous(implementation)
        got = solution(probed)
        cause = MISSED[name] if probed.calls else "your function never called the implementation that it was given"
        expect(got == name, f"given an implementation that is {name!r}: got {got!r}", cause)


@diagnose.property("right")
def diagnose_right(solution):
    _diagnosed(solution, "right")


@diagnose.property("no relu")
def diagnose_no_relu(solution):
    _diagnosed(solution, "no relu")


@diagnose.property("weight inside the relu")
def diagnose_weight_inside_the_relu(solution):
    _diagnosed(solution, "weight inside the relu")


@diagnose.property("key scale left out")
def diagnose_key_scale_left_out(solution):
    _diagnosed(solution, "key scale left out")


@diagnose.property("softmaxed weights")
def diagnose_softmaxed_weights(solution):
    _diagnosed(solution, "softmaxed weights")


def _anonymous(implementation):
    """The implementation without its name, counting its calls."""

    def scores(q_idx, k_idx, w, k_scale=None, start=None, end=None):
        scores.calls += 1
        return implementation(q_idx, k_idx, w, k_scale, start, end)

    scores.calls = 0
    return scores


# ------------------------------------------------------------------------------------------ 15.3 match_symptoms

match_symptoms = Check("match_symptoms")  # () -> {letter: name of the trap}

_PATIENTS = {
    "A": "positions restart",
    "B": "weights without their constant",
    "C": "future key visible",
    "D": "base-2 log-sum-exp",
    "E": "own key hidden",
    "F": "zero padding",
    "G": "threshold with >=",
}
SUSPECTS = tuple(sorted([*_PATIENTS.values(), "last key wins ties", "one side rotated", "no amax floor"]))
EVIDENCE = {
    "A": "A is right in one pass and loses keys in chunks, but keeps its own: what else changes where a chunk starts",
    "B": "B selects what it should in every way, and only the size of its scores is off",
    "C": "C's earlier rows change with a later byte",
    "D": "D is right until two halves of a row are merged",
    "E": "E is right in one pass; in chunks a row lacks one particular key",
    "F": "look at F's row 2, which sees three keys",
    "G": "G is right until scores tie, and then loses more than the keys that tie",
}


def patient(letter):
    """A context manager: inside, the reference has the fault of patient `letter`."""
    if letter not in _PATIENTS:
        raise ValueError(f"letter must be one of {', '.join(_PATIENTS)}, got {letter!r}")
    return planted(trap(_PATIENTS[letter]))


@match_symptoms.property("patients")
def match_symptoms_patients(solution):
    got = solution()
    expect(isinstance(got, dict), f"got {type(got).__name__}, expected a dict", "{'A': 'name of the trap', ...}")
    missing, extra = sorted(set(_PATIENTS) - set(got)), sorted(set(map(str, got)) - set(_PATIENTS))
    expect(not missing, f"no answer for {', '.join(missing)}", "each patient has one trap")
    expect(not extra, f"got an answer for {', '.join(extra)}", f"the patients are {', '.join(_PATIENTS)}")


@match_symptoms.property("known names")
def match_symptoms_known_names(solution):
    for letter, name in sorted(solution().items()):
        expect(name in SUSPECTS, f"{letter}: got {name!r}, which is no suspect", f"choose among {', '.join(SUSPECTS)}")


@match_symptoms.property("each once")
def match_symptoms_each_once(solution):
    names = list(solution().values())
    twice = sorted({name for name in names if names.count(name) > 1})
    expect(not twice, f"got {', '.join(twice)} for more than one patient", "no two patients have the same fault")


@match_symptoms.property("evidence")
def match_symptoms_evidence(solution):
    got = solution()
    for letter, name in _PATIENTS.items():
        if got[letter] != name:
            raise Failed(f"{letter}: {got[letter]!r} does not fit the evidence", EVIDENCE[letter])
