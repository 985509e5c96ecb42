"""Notebook 11: reading a recorded profile, and predicting a table before it is seen."""

import math

import numpy as np

from ..checking import Check, expect
from .profile import PARTS, chunks, decode_profile, shares

read_profile = Check("read_profile")  # (kernels [(name, launches, us)], whole_us, parts {part: texts}) -> {part: share}
predict_table = Check("predict_table")  # (measured {pairs: ms}, two of them, pairs) -> [ms]


# ------------------------------------------------------------------------------------------------------ read_profile

TINY = [("_score", 1.0, 40.0), ("gemm_a", 2.0, 30.0), ("gemm_b", 1.0, 10.0), ("copy", 3.0, 5.0)]
NAMED = {"scores": ("_score",), "products": ("gemm",)}


def _expect_shares(solution, kernels, whole, parts, which, cause, suspects=None):
    got, expected = solution(list(kernels), whole, dict(parts)), shares(kernels, whole, parts)
    expect(isinstance(got, dict), f"got {type(got).__name__}, expected a dict", "return {part: share}")
    for part in which:
        expect(part in got, f"{part!r} is missing, got {sorted(map(str, got))}", f"every profile has {part!r}")
        share = got[part]
        number = isinstance(share, (int, float, np.number)) and not isinstance(share, bool)
        expect(number, f"{part!r}: got {share!r}, expected a number", "a share is a number from 0 to 1")
        if not math.isclose(share, expected[part], rel_tol=1e-6, abs_tol=1e-9):
            known = (why for why, wrong in (suspects or {}).items() if math.isclose(share, wrong[part], rel_tol=1e-6))
            what = f"{part!r} of {whole:g} us: got {float(share):.4g}, expected {expected[part]:.4g}"
            expect(False, what, next(known, cause))


def _times_launches(kernels):
    return [(name, 1, launches * us) for name, launches, us in kernels]


@read_profile.property("parts")
def read_profile_parts(solution):
    for whole in (100.0, 400.0):
        suspects = {
            "the us of a kernel are those of all its launches: do not multiply": shares(
                _times_launches(TINY), whole, NAMED
            ),
            "the share is of the whole call, also of the time when no kernel runs": shares(TINY, 85.0, NAMED),
            "that is in per cent": {part: 100 * share for part, share in shares(TINY, whole, NAMED).items()},
            "that is in us: divide by whole_us": {
                part: whole * share for part, share in shares(TINY, whole, NAMED).items()
            },
        }
        _expect_shares(solution, TINY, whole, NAMED, NAMED, "add up the us of a part's kernels", suspects)
    _expect_shares(solution, TINY[:1], 100.0, NAMED, NAMED, "no kernel is a product here: the part is there, and 0")


@read_profile.property("first part that fits")
def read_profile_first_part_that_fits(solution):
    kernels, parts = (
        [("_sparse_merge", 1.0, 8.0), ("_merge", 1.0, 2.0)],
        {"attention": ("_sparse",), "merge": ("_merge",)},
    )
    cause = "a kernel counts once, in the first part one of whose texts is in its name"
    _expect_shares(solution, kernels, 20.0, parts, parts, cause)
    kernels = [
        ("GEMM<float, 4>(int*)", 1.0, 1.0),
        ("void gemm<float, 4>(int*)", 2.0, 2.0),
        ("a.b", 1.0, 3.0),
        ("axb", 1.0, 4.0),
    ]
    parts = {"products": ("gemm<float, 4>",), "dotted": ("a.b",)}
    cause = "a text is in a name letter by letter: a capital is another letter, and no sign means any letter"
    _expect_shares(solution, kernels, 20.0, parts, parts, cause)


@read_profile.property("other")
def read_profile_other(solution):
    _expect_shares(solution, TINY, 100.0, NAMED, ["other"], "a kernel that no part names is 'other'")
    _expect_shares(solution, TINY[:2], 100.0, NAMED, ["other"], "no such kernel: 'other' is there, and 0")


@read_profile.property("idle")
def read_profile_idle(solution):
    for whole in (100.0, 1000.0, 85.0):
        _expect_shares(solution, TINY, whole, NAMED, ["idle"], "what all kernels together leave of whole_us")


@read_profile.property("a recorded step")
def read_profile_a_recorded_step(solution):
    for how in ("eager", "replayed"):
        whole, kernels = decode_profile(how)
        _expect_shares(
            solution, kernels, whole, PARTS, (*PARTS, "other", "idle"), "nothing rounded, no kernel left out"
        )


# ----------------------------------------------------------------------------------------------------- predict_table


def _line(measured, pairs):
    (first, low), (second, high) = sorted(measured.items())
    return [low + (high - low) / (second - first) * (n - first) for n in pairs]


def _expect_table(solution, measured, pairs, expected, tolerance, cause, suspects=None):
    got = solution(dict(measured), list(pairs))
    fits = isinstance(got, (list, tuple, np.ndarray)) and len(got) == len(pairs)
    expect(fits, f"got {got!r}, expected {len(pairs)} numbers", "one time for each entry of pairs, in their order")
    for i, (n, ms) in enumerate(zip(pairs, expected, strict=True)):
        number = isinstance(got[i], (int, float, np.number)) and not isinstance(got[i], bool)
        expect(number, f"{n:,} pairs: got {got[i]!r}, expected a number", "times in ms")
        if not abs(got[i] / ms - 1) <= tolerance:  # NaN too
            known = (why for why, wrong in (suspects or {}).items() if math.isclose(got[i], wrong[i], rel_tol=1e-6))
            what = f"measured {measured}: for {n:,} pairs got {float(got[i]):.4g} ms, expected {ms:.4g}"
            expect(False, what, next(known, cause))


LINES = (({100: 7.25, 300: 11.25}, (200, 400, 1000, 50)), ({10: 1.0, 50: 41.0}, (30, 100)), ({5: 2.0, 9: 2.0}, (7, 90)))


@predict_table.property("what was measured")
def predict_table_what_was_measured(solution):
    for measured, _ in LINES:
        cause = "at the two measured sizes the prediction is what was measured"
        _expect_table(solution, measured, list(measured), list(measured.values()), 1e-9, cause)


@predict_table.property("between and beyond")
def predict_table_between_and_beyond(solution):
    for measured, pairs in LINES:
        large, small = max(measured), min(measured)
        suspects = {
            "in proportion to the larger one: the part that does not grow would grow too": [
                measured[large] * n / large for n in pairs
            ],
            "in proportion to the smaller one: the part that does not grow would grow too": [
                measured[small] * n / small for n in pairs
            ],
        }
        cause = "a part that stays and a part that grows with the pairs: a straight line through the two"
        _expect_table(solution, measured, pairs, _line(measured, pairs), 1e-9, cause, suspects)


@predict_table.property("the table, within 10 %")
def predict_table_the_table_within_10_percent(solution):
    """The layer's chunks of the record, from those that end at 16K and at 128K."""
    for attention in ("DSA", "dense, heads kept"):
        found = chunks(attention)
        measured = dict(found[position] for position in (16_384, 131_072))
        pairs, ms = zip(*found.values(), strict=True)
        cause = "whole numbers of pairs are large: round nothing"
        _expect_table(solution, measured, pairs, ms, 0.1, cause)
