"""Notebook 16: the ablation, the interval of a paired difference, and the claim that rests on both."""

import math
import re

import numpy as np
import torch

from ..checking import Check, Failed, expect, expect_number, normal, tensor, unequal
from .ablate import METHODS
from .ablate import paired as reference_paired

ablate = Check("ablate")  # (losses, corpus, methods, ks, count, length) -> {(method, k): numbers [count]}


ASKED = ("dense", *METHODS)


class _Losses:
    """Stands for the model: made-up losses of each byte, and a list of all that was asked."""

    def __init__(self, length, seed):
        self.length, self.seed, self.asked = length, seed, []

    def __call__(self, window, method, k):
        window = tensor(window, "the window")
        expect(window.dim() == 1, f"a window of shape {list(window.shape)}, expected [length + 1]", "one window a call")
        if window.dtype != torch.uint8:
            what = f"a window of {window.dtype}, expected uint8".replace("torch.", "")
            raise Failed(what, "hand on the bytes as they stand in the text", "windows")
        numbers = torch.arange(1, len(window)) * 0.1 + window[:-1] * 0.01 + 5 * ASKED.index(method) + 1 / k
        numbers = (numbers + self.seed).sin().float().abs() + 1
        self.asked.append((tuple(window.tolist()), method, k, numbers))
        return numbers


def _asked(solution, seed=0):
    """(result, what was asked, corpus, methods, ks, count, length) of one run on made-up losses."""
    count, length, ks = ((4, 50, [3, 9]), (3, 37, [16, 2, 5]))[seed]
    methods = METHODS if seed == 0 else ASKED[::-1]
    generator = torch.Generator().manual_seed(seed)
    corpus = {  # ASCII was trained on, the rest was not
        "training": torch.randint(0, 128, (3000,), generator=generator, dtype=torch.uint8),
        "held out": torch.randint(128, 256, (2500,), generator=generator, dtype=torch.uint8),
    }
    losses = _Losses(length, seed)
    got = solution(losses, corpus, methods, ks, count, length)
    expect(isinstance(got, dict), f"got {type(got).__name__}, expected a dict", "{(method, k): numbers}")
    expect(losses.asked, "losses was never called", "losses(window, method, k) gives the loss of each byte")
    return got, losses.asked, corpus, methods, ks, count, length


def _numbers(got, method, k, count):
    numbers = got[method, k]
    if isinstance(numbers, (list, tuple)):
        numbers = torch.tensor([expect_number(number, f"{method}, k={k}") for number in numbers])
    numbers = tensor(numbers, f"{method}, k={k}").double().flatten()
    cause = "one number a window, so that methods can be compared window by window"
    expect(len(numbers) == count, f"{method}, k={k}: got {len(numbers)} numbers, expected {count}", cause)
    return numbers


@ablate.property("table")
def ablate_table(solution):
    for seed in (0, 1):
        got, _, _, methods, ks, count, _ = _asked(solution, seed)
        for method in methods:
            for k in ks:
                expect((method, k) in got, f"no entry for {(method, k)!r}", "an entry for each method and each k")
                _numbers(got, method, k, count)


@ablate.property("held out")
def ablate_held_out(solution):
    for seed in (0, 1):
        _, asked, *_ = _asked(solution, seed)
        for window, method, k, _ in asked:
            what = f"{method}, k={k}: a window with bytes of the training text"
            expect(min(window) >= 128, what, 'a model may know that text by heart: take corpus["held out"]')


@ablate.property("windows")
def ablate_windows(solution):
    for seed in (0, 1):
        _, asked, corpus, _, _, count, length = _asked(solution, seed)
        text, starts = bytes(corpus["held out"].tolist()), set()
        for window, *_ in asked:
            cause = "losses needs length + 1 bytes: the last one is only predicted"
            expect(len(window) == length + 1, f"a window of {len(window)} bytes, expected {length + 1}", cause)
            start = text.find(bytes(window))
            expect(start >= 0, "a window that is nowhere in the text", "consecutive bytes, unchanged")
            starts.add(start)
        cause = "count windows, each another one, and the same ones for all methods and ks"
        expect(len(starts) == count, f"{len(starts)} different windows, expected {count}", cause)
        reach = max(starts) - min(starts)
        cause = "neighbouring windows are of one file: spread them over the whole text"
        what = f"all windows begin within {reach} bytes of a text of {len(text):,}"
        expect(reach >= len(text) / 2, what, cause)


@ablate.property("paired")
def ablate_paired(solution):
    for seed in (0, 1):
        _, asked, _, methods, ks, _, _ = _asked(solution, seed)
        orders = {
            (method, k): list(dict.fromkeys(w for w, m, n, _ in asked if (m, n) == (method, k)))
            for method in methods
            for k in ks
        }
        (who, at), first = next((key, order) for key, order in orders.items() if order)
        for (method, k), order in orders.items():
            what = f"{method}, k={k} did not read the windows that {who}, k={at} read, in that order"
            cause = "texts differ more than methods do: choose the windows once, for all"
            expect(not order or order == first, what, cause)


@ablate.property("equal k")
def ablate_equal_k(solution):
    for seed in (0, 1):
        _, asked, _, methods, ks, count, _ = _asked(solution, seed)
        for method in methods:
            for k in ks:
                times = len({window for window, m, n, _ in asked if (m, n) == (method, k)})
                what = f"{method} was asked with k={k} for {times} windows, expected {count}"
                expect(times == count, what, "each method gets the very k that its entry names")


@ablate.property("bytes that count")
def ablate_bytes_that_count(solution):
    for seed in (0, 1):
        got, asked, _, methods, ks, count, _ = _asked(solution, seed)
        first = max(ks)
        for method in methods:
            for k in ks:
                answers = {window: numbers for window, m, n, numbers in asked if (m, n) == (method, k)}
                means = {
                    from_: torch.stack([numbers[from_:].double().mean() for numbers in answers.values()])
                    for from_ in (first, 0, k, first - 1, first + 1)
                }
                causes = {
                    0: "the first bytes are in the mean: there every method keeps all, so they hide the difference",
                    k: f"from k on, other bytes for each k: count from max(ks) = {first} on, the same for all",
                    first - 1: f"entry {first - 1} sees {first} bytes, which the largest k keeps all: begin one later",
                    first + 1: f"entry {first} sees {first + 1} bytes, one more than the largest k: it counts",
                }
                numbers, expected = _numbers(got, method, k, count), means[first]
                if torch.allclose(numbers, expected, atol=1e-5):
                    continue
                cause = "the mean of losses(...)[max(ks):], one number a window, in the windows' order"
                for from_, why in causes.items():
                    if torch.allclose(numbers, means[from_], atol=1e-5):
                        cause = why
                bad = int((~torch.isclose(numbers, expected, atol=1e-5)).nonzero()[0])
                expect(False, f"{method}, k={k}, window {bad}: {unequal(numbers[bad], expected[bad])}", cause)


# ------------------------------------------------------------------------------------------------------------ paired

paired = Check("paired")  # (a [n], b [n]) -> (difference, low, high)


def _three(solution, a, b):
    got = solution(a, b)
    if isinstance(got, (torch.Tensor, np.ndarray)) and list(got.shape) == [3]:
        got = tuple(got.tolist())
    three = isinstance(got, (tuple, list)) and len(got) == 3
    expect(three, f"got {type(got).__name__}, expected three numbers", "return difference, low, high")
    return [expect_number(x, name) for x, name in zip(got, ("difference", "low", "high"), strict=True)]


CASES = ((1, 6, 0.05), (2, 9, 0.05), (3, 6, -0.05), (4, 6, 0.0), (5, 2, 0.05))  # seed, n, how much more a loses


def _windows(seed, n, gap):
    """Losses of two methods: texts differ by 0.5, the methods by `gap`. The level, 300, leaves fp32 too few digits."""
    text = 300 + 0.5 * normal(n, seed=seed).double()
    return text + gap + 0.02 * normal(n, seed=seed + 50).double(), text


def _expect_number(name, got, expected, cause, suspects=None):
    near = lambda other: abs(got - other) <= 1e-6 * max(1, abs(other))  # noqa: E731
    for suspicion, answer in (suspects or {}).items():
        if near(answer) and not near(expected):
            cause = suspicion
    expect(near(expected), f"{name}: {unequal(got, expected)}", cause)


@paired.property("difference")
def paired_difference(solution):
    for seed, n, gap in CASES:
        a, b = _windows(seed, n, gap)
        expected, *_ = reference_paired(a, b)
        suspects = {
            "the sign: how much more a loses than b is a - b": -expected,
            "a loses less than b here: the difference is negative": abs(expected),
            "rounded through fp32: a and b are fp64": float((a.float() - b.float()).mean()),
            "means rounded through fp32: a and b are fp64": float(a.float().mean() - b.float().mean()),
        }
        _expect_number("difference", _three(solution, a, b)[0], expected, "the mean of a - b over windows", suspects)


@paired.property("paired")
def paired_paired(solution):
    for seed, n, gap in CASES:
        a, b = _windows(seed, n, gap)
        _, _, expected = reference_paired(a, b)
        difference, _, high = _three(solution, a, b)
        apart = float(2 * ((a.var() + b.var()) / n) ** 0.5)
        cause = "that is as wide as the texts differ: subtract window by window first, then take the deviation"
        wide = high - difference
        expect(wide < 0.5 * apart, f"high - difference: {unequal(wide, expected - difference)}", cause)


@paired.property("two standard errors")
def paired_two_standard_errors(solution):
    for seed, n, gap in CASES:
        a, b = _windows(seed, n, gap)
        difference, low, high = reference_paired(a, b)
        deviation = float((a - b).std())
        half = (n - 1) ** 0.5 / n**0.5
        suspects = {
            "the deviation of one window: that of a mean of n is the root of n smaller": 2 * deviation,
            "one standard error, expected two": deviation / n**0.5,
            "1.96 belongs to many windows: the card asks for 2": 1.96 * deviation / n**0.5,
            "n - 1 in the deviation: NumPy's std divides by n unless ddof=1": 2 * deviation * half / n**0.5,
            "divided by n, not by its root": 2 * deviation / n,
        }
        for name, got, end, sign in zip(("low", "high"), _three(solution, a, b)[1:], (low, high), (-1, 1), strict=True):
            answers = {why: difference + sign * width for why, width in suspects.items()}
            _expect_number(name, got, end, "difference ± 2 · deviation of the differences / √n", answers)


# ------------------------------------------------------------------------------------------------------------- claim

claim = Check("claim")  # (table) -> record

CONTROLS = ("window", "random")  # what knows nothing of the attention
FIELDS = ("k", "control", "losses", "difference", "interval", "verdict", "claim", "condition", "not shown")
VERDICTS = ("better", "worse", "undecided")
TOO_MUCH = ("always", "never", "proves", "proven", "any model", "all models", "every model", "any text", "guarantees")
HELD_OUT = (
    r"(?<!not )(?<!n't )(?<!never )(?:held[ -]?out|unseen|left out)"
    r"|(?:not|never) (?:been )?(?:seen|trained|read)|never saw|did not see"
)
NUMBERS = {6: "six", 7: "seven"}  # of windows in the tables below
ROUNDED = 0.00501  # two decimals are enough


def made_up(verdict, seed, ks=(8, 16, 32), n=6) -> dict:
    """A table like the notebook's, in which the indexer is better or worse than the window, or neither is sure."""
    text = 1.5 + 0.4 * normal(n, seed=seed).double()
    gap = {"better": 0.11, "worse": -0.09, "undecided": 0.004}[verdict]
    table = {}
    for i, k in enumerate(ks):
        more = {"dense": 0.0, "indexer": 0.2 / (i + 1), "attention itself": 0.19 / (i + 1), "random": 2.0}
        more["window"] = more["indexer"] + gap + 0.03 * (i - 1) * (-1) ** seed * (verdict != "undecided")
        for j, (method, extra) in enumerate(more.items()):
            noise = normal(n, seed=100 * seed + 10 * i + j).double()
            table[method, k] = text + extra + 0.03 * (noise - noise.mean()) * (method != "dense")
    return table


def _tables():
    """{verdict: tables}, each interval far from the edge of another verdict."""
    return {verdict: [made_up(verdict, 1), made_up(verdict, 2, n=7)] for verdict in VERDICTS}


def _record(solution, table):
    got = solution(dict(table))
    expect(isinstance(got, dict), f"got {type(got).__name__}, expected a dict", "return the record as a dict")
    missing = [name for name in FIELDS if name not in got]
    expect(not missing, f"no {', '.join(map(repr, missing))}", f"the fields are {', '.join(FIELDS)}")
    return got


def _each(solution):
    for verdict, tables in _tables().items():
        for table in tables:
            yield verdict, table, _record(solution, table)


def _number(got, name):
    number = expect_number(got, name)
    expect(math.isfinite(number), f"{name}: got {number}", "a number that was measured")
    return number


@claim.property("fields")
def claim_fields(solution):
    for _, table, got in _each(solution):
        ks = sorted({k for _, k in table})
        expect(got["k"] in ks, f"k: got {got['k']!r}, expected one of {ks}", "a k that was measured")
        for name in ("claim", "condition", "not shown"):
            what = f"{name}: got {type(got[name]).__name__}, expected a sentence"
            text = got[name]
            words = len(text.split()) if isinstance(text, str) else 0
            expect(words, what, "write it in words")
            expect(5 <= words <= 60, f"{name}: got {words} words, expected 5 to 60", "one or two plain sentences")


@claim.property("k beforehand")
def claim_k_beforehand(solution):
    ks = {got["k"] for _, _, got in _each(solution)}
    what = f"k: got {', '.join(map(str, sorted(ks)))}, another one for other losses"
    expect(
        len(ks) == 1, what, "who picks the k that came out best reports luck: choose k before you look at the losses"
    )


@claim.property("control")
def claim_control(solution):
    for _, table, got in _each(solution):
        control = got["control"]
        what = f"control: got {control!r}, expected one of {', '.join(CONTROLS)}"
        cause = (
            "without a control a loss says nothing of the selection. Dense attention selects nothing, and the oracle "
        )
        expect(control in CONTROLS, what, cause + "computes what DSA leaves out: neither is a control")
        strongest = min(CONTROLS, key=lambda name: float(torch.as_tensor(table[name, got["k"]]).double().mean()))
        what = f"control: got {control!r}, whose loss at k={got['k']} is above that of {strongest!r}"
        expect(control == strongest, what, "a control that is easily beaten is a straw man: take the strongest")


@claim.property("losses")
def claim_losses(solution):
    for _, table, got in _each(solution):
        k, losses = got["k"], got["losses"]
        wanted = ("dense", "indexer", got["control"])
        both = isinstance(losses, dict) and set(wanted) <= set(losses)
        expect(both, f"losses: got {losses!r:.60}", f"a dict of the mean losses of {', '.join(wanted)}")
        for name in wanted:
            number, expected = _number(losses[name], f"losses, {name}"), float(table[name, k].mean())
            cause = f"the mean of table[{name!r}, {k}], from the table that came in: type no number"
            for other in {n for _, n in table} - {k}:
                if abs(number - float(table[name, other].mean())) <= ROUNDED:
                    cause = f"that is the number for k = {other}, and the record says k = {k}"
            expect(abs(number - expected) <= ROUNDED, f"losses, {name}: {unequal(number, expected)}", cause)


@claim.property("interval")
def claim_interval(solution):
    for _, table, got in _each(solution):
        a, b = table[got["control"], got["k"]], table["indexer", got["k"]]
        expected, low, high = reference_paired(a, b)
        number = _number(got["difference"], "difference")
        cause = "how much more the control loses than the indexer: positive where the indexer is better"
        expect(abs(number - expected) <= ROUNDED, f"difference: {unequal(number, expected)}", cause)
        ends = got["interval"]
        two = isinstance(ends, (tuple, list)) and len(ends) == 2
        expect(
            two, f"interval: got {ends!r:.40}, expected (low, high)", "a number without its uncertainty is no result"
        )
        for name, end, wanted in zip(("low", "high"), ends, (low, high), strict=True):
            found = _number(end, f"interval, {name}")
            cause = "two standard errors of the paired difference, as in exercise 16.4"
            expect(abs(found - wanted) <= ROUNDED, f"interval, {name}: {unequal(found, wanted)}", cause)


@claim.property("verdict")
def claim_verdict(solution):
    for verdict, _, got in _each(solution):
        what = f"verdict: got {got['verdict']!r} for the interval {_shown(got['interval'])}, expected {verdict!r}"
        cause = "better where the whole interval is above 0, worse where it is below, undecided where it holds 0"
        expect(got["verdict"] == verdict, what, cause)


def _shown(interval):
    return "({:.3f}, {:.3f})".format(*interval)


@claim.property("words")
def claim_words(solution):
    sentences = {}
    for verdict, table, got in _each(solution):
        sentence, count = got["claim"], len(table["indexer", got["k"]])
        found = [word for word in TOO_MUCH if re.search(rf"\b{word}\b", sentence.lower())]
        cause = f"{count} windows of one kind of text, read by one model, show no such thing"
        expect(not found, f"claim: got {', '.join(map(repr, found))}", cause)
        needed = {
            f"k, {got['k']}": re.search(rf"(?<![\d.]){got['k']}(?![\d.]\d)", sentence),
            f"the control, {got['control']}": got["control"] in sentence.lower(),
            "the difference with two decimals": f"{abs(got['difference']):.2f}" in sentence,
        }
        missing = [name for name, there in needed.items() if not there]
        expect(
            not missing, f"claim: lacks {'; '.join(missing)}: {sentence!r:.80}", "who reads only this sentence needs it"
        )
        held_out = re.search(HELD_OUT, got["condition"].lower())
        expect(held_out, f"condition: {got['condition']!r:.80}", "say that the text was held out of training")
        counted = re.search(rf"\b({count}|{NUMBERS[count]})\b", got["condition"].lower())
        cause = f"say how many windows were read, {count} in this table: count them, type no number"
        expect(counted, f"condition: {got['condition']!r:.80}", cause)
        sentences.setdefault(re.sub(r"[\d.]+", "", sentence), set()).add(verdict)
    for sentence, verdicts in sentences.items():
        what = f"the same words for {' and '.join(sorted(verdicts))}: {sentence!r:.80}"
        expect(len(verdicts) == 1, what, "a sentence that no measurement can change claims nothing")
