"""The machinery under the exercises' checks: what it catches on its own, and what it says."""

import contextlib
import importlib.util
import linecache
import re
import subprocess
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import numpy as np
import pytest
import rungs
import torch

from dsa_course import checking, environment, launching, toy, watching
from dsa_course.checking import Check, expect, expect_close, expect_shape
from dsa_ref.testing import Failed, poisoned


def double_check():
    """A check of `double(x)`, with two properties."""
    check = Check("double")

    @check.property("shape")
    def double_shape(solution):
        expect_shape(solution(torch.ones(2, 3)), (2, 3), torch.float32)

    @check.property("value")
    def double_value(solution):
        x = checking.whole(5, 3, seed=1)
        squares = {"that is the square": x * x}
        expect_close(solution(x), 2 * x, 0.0, "t d", "every entry counts twice", squares)

    return check


def reported(solution, check=None):
    with pytest.raises(Failed) as failure:
        (check or double_check())(solution)
    return failure.value


def never_written(x):
    return torch.empty_like(x)


def in_place(x):
    return x.mul_(2)


@pytest.mark.parametrize(
    ("solution", "property", "words"),
    [
        (lambda x: 2 * x[0], "shape", r"got shape \[3\], expected \[2, 3\]"),
        (lambda x: None, "shape", "got None, expected a tensor.*forget the return"),
        (lambda x: (2 * x).double(), "shape", "got float64, expected float32"),
        (lambda x: 2 * x + (len(x) == 5), "value", r"t=0, d=0: got -?\d, expected -?\d .*every entry counts twice"),
        (lambda x: x * x, "value", "that is the square"),
        (lambda x: 2 * x if len(x) == 2 else never_written(x), "value", "a place was never written"),
        (in_place, "inputs", "x was changed by the call"),
        (lambda x: x.to(torch.float8_e4m3fn).relu(), "runs", "NotImplementedError: .*Float8"),
        (lambda x: x @ x, "runs", r"RuntimeError: .*\(called with \[2, 3\]\)"),
    ],
)
def test_what_is_wrong_is_said(solution, property, words):
    failure = reported(solution)
    assert failure.property == property
    assert re.search(words, str(failure)), str(failure)


def test_what_holds_is_printed(capsys):
    double_check()(lambda x: x + x)
    assert capsys.readouterr().out == "✓ double: shape · value\n"


def test_a_crash_shows_the_learners_own_line_and_a_failure_does_not_show_ours():
    def my_double(x):
        return x.no_such_thing()

    lines = reported(my_double)._render_traceback_()
    assert "x.no_such_thing()" in lines[0] and lines[1].startswith("✗ runs: AttributeError")
    assert reported(lambda x: x)._render_traceback_()[0].startswith("✗ value: ")


def test_a_stub_is_no_failure_and_a_number_no_solution():
    def stub(x):
        raise NotImplementedError()

    with pytest.raises(NotImplementedError):
        double_check()(stub)
    with pytest.raises(TypeError, match="solution must be your function, got float"):
        double_check()(2.0)


def test_a_word_of_compare_selection_stays_beside_the_checks_own():
    check = Check("nested")

    @check.property("own")
    def nested_own(solution):
        raise Failed("row 3 is bad", "a reason", "future")

    failure = reported(lambda: None, check)
    assert (failure.property, failure.what) == ("own", "future, row 3 is bad")


def test_a_property_has_one_name():
    check = double_check()
    with pytest.raises(ValueError, match="name must be new in check 'double', got 'value' again"):
        check.property("value")(lambda solution: None)


def test_a_suspect_that_is_right_here_is_not_suspected():
    """Where the mistake makes no difference on these inputs it cannot be the cause."""
    expected = torch.tensor([1.0, 2.0])
    with pytest.raises(Failed, match="plain cause"):
        expect_close(torch.tensor([1.0, 3.0]), expected, 0.0, "i", "plain cause", {"suspect": expected})


@pytest.mark.parametrize(
    ("got", "expected", "close"),
    [
        ([1.0, np.inf], [1.0, np.inf], True),
        ([1.0, -np.inf], [1.0, np.inf], False),
        ([1.0, np.nan], [1.0, 2.0], False),
        ([1.0, np.nan], [1.0, np.nan], False),
        ([1.0, 2.0 + 1e-3], [1.0, 2.0], True),
        ([1.0, 2.0 + 3e-3], [1.0, 2.0], False),
        ([0.001, 0.0], [0.0, 0.0], True),
        ([np.inf, 0.0], [0.0, 0.0], False),
    ],
)
def test_expect_close(got, expected, close):
    if close:
        return expect_close(np.array(got), torch.tensor(expected), 1.2e-3, "i", "far off")
    with pytest.raises(Failed):
        expect_close(np.array(got), torch.tensor(expected), 1.2e-3, "i", "far off")


@pytest.mark.parametrize("number", [2, 2.0, np.float64(2), np.float32(2)])
def test_a_single_number_may_come_as_it_is(number):
    expect_close(number, torch.tensor(2.0), 0.0, "", "far off")
    with pytest.raises(Failed, match=r"got shape \[\], expected \[1\]"):
        expect_close(number, torch.tensor([2.0]), 0.0, "i", "far off")


def test_expect():
    expect(True, "this", "that")
    with pytest.raises(Failed, match="this. Likely cause: that"):
        expect(False, "this", "that")


@pytest.mark.parametrize("digits", [6, 9, 15])
def test_two_numbers_that_differ_are_shown_to_differ(digits):
    got = 3.760461504 * (1 + 10.0**-digits)
    first, second = re.fullmatch(r"got (.*), expected (.*)", checking.unequal(got, 3.760461504)).groups()
    assert first != second and abs(float(first) - 3.76046) < 1e-4
    assert checking.unequal(2.0, 3.0) == "got 2, expected 3"


@pytest.mark.parametrize(
    "array", [np.ones((2, 3), np.float32), np.arange(6.0)[::-1].reshape(2, 3).T, torch.ones(2, requires_grad=True)]
)
def test_an_array_counts_as_a_tensor(array):
    got = checking.tensor(array)
    assert isinstance(got, torch.Tensor) and not got.requires_grad
    assert got.tolist() == array.tolist()


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (None, "got None, expected a tensor.*forget the return"),
        ([1.0], "got list, expected a tensor.*no list"),
        (np.array(["a"]), "got ndarray of <U1, expected a tensor of numbers"),
        (torch.ones(2) * 1j, "got Tensor of torch.complex64"),
    ],
)
def test_what_is_no_tensor_is_said(value, words):
    with pytest.raises(Failed, match=words):
        checking.tensor(value)


def test_numpys_dtypes_are_torchs():
    expect_shape(np.zeros(3, np.int32), (3,), torch.int32)
    with pytest.raises(Failed, match=r"got float64, expected float32.*astype\(np.float32\)"):
        expect_shape(np.zeros(3), (3,), torch.float32)
    with pytest.raises(Failed, match="NumPy has no bfloat16"):
        expect_shape(np.zeros(3), (3,), torch.bfloat16)


@pytest.mark.parametrize("number", [3, 3.0, np.int64(3), torch.tensor([3]), np.array([[3.0]]), Fraction(3)])
def test_a_number_of_any_kind(number):
    assert checking.expect_number(number) == 3.0
    if isinstance(number, (int, np.integer)):
        assert checking.expect_int(number) == 3


@pytest.mark.parametrize("value", [None, "3", [3], (3,), {}, 3j, torch.ones(2), np.array("3"), object()])
def test_no_number(value):
    for expected in (checking.expect_number, checking.expect_int):
        with pytest.raises(Failed, match="expected a number"):
            expected(value)
    with pytest.raises(Failed, match="got float 3.0, expected an int"):
        checking.expect_int(3.0)


def test_a_strided_copy_holds_the_same_and_reaches_the_solution_strided():
    x = checking.strided(checking.whole(2, 3, seed=1))
    assert not x.is_contiguous() and x.equal(checking.whole(2, 3, seed=1))
    assert not checking._guarded(lambda x: x)(x).is_contiguous()
    assert not checking._guarded(lambda x: x)(checking.strided(np.ones((2, 3)))).flags.c_contiguous


@pytest.mark.parametrize("pack", [lambda x: {"w": x, "k": 3}, lambda x: [x, 3], lambda x: {"of": [x]}])
def test_a_change_inside_a_dict_or_list_is_noticed_and_stays_there(pack):
    given = pack(torch.ones(2, 2))

    def in_place(weights):
        inside = weights if isinstance(weights, list) else next(iter(weights.values()))
        (inside[0] if isinstance(inside, list) else inside).mul_(2)

    def exchanged(weights):
        weights["new" if isinstance(weights, dict) else 0] = torch.zeros(3)

    for solution in (in_place, exchanged):
        with pytest.raises(Failed, match="weights was changed by the call"):
            checking._guarded(solution)(given)
    assert checking._same(given, pack(torch.ones(2, 2)))  # the caller's own
    assert checking._guarded(lambda weights: len(weights))(given) == len(given)


def test_a_crash_names_a_large_argument_by_its_kind_alone():
    with pytest.raises(Failed, match=r"called with a dict of 2, \[3\], 'text', list\)"):
        checking._guarded(lambda *given: 1 / 0)({"a": torch.ones(99), "b": 1}, torch.ones(3), "text", ["long"] * 99)


def test_lines_bytes_and_peak_of_a_solution_are_counted():
    def loop(n):
        total = 0
        for _ in range(n):
            total += np.zeros(1000).sum()
        return total

    def at_once(n):
        return np.zeros((n, 1000)).sum()

    seen = {}
    for solution in (loop, at_once):
        with watching.Python() as seen[solution]:
            checking._guarded(solution)(10)
    assert seen[loop].lines >= 20 > seen[at_once].lines
    assert all(80_000 <= counts.bytes < 160_000 for counts in seen.values())
    assert seen[loop].peak < 30_000 < 80_000 <= seen[at_once].peak


def test_poisoned_memory_that_a_solution_asks_for_is_counted():
    def in_a_buffer():
        return np.ones(10_000).sum() + np.add(1.0, 1.0, out=np.empty((100, 1000))).sum()

    with watching.Python() as seen:
        checking._guarded(in_a_buffer)()
    assert 880_000 <= seen.bytes < 1_000_000 and 800_000 <= seen.peak < 900_000


def test_work_in_another_thread_is_refused():
    with pytest.raises(Failed, match="a thread was started"), watching.Python(), ThreadPoolExecutor(1) as pool:
        pool.submit(sum, (1, 2)).result()
    with pytest.raises(ZeroDivisionError), watching.Python():  # an error of the solution's own stays
        raise ZeroDivisionError
    assert threading.gettrace() is None


def test_torchs_memory_is_counted_without_its_views():
    with watching.TorchMemory() as made:
        (torch.ones(4, 5).T[1:] + 1).sum()
    assert (made.elements, made.largest) == (20 + 16 + 1, torch.Size([4, 5]))


def rows_doubled(x: torch.Tensor) -> torch.Tensor:
    rows: list[torch.Tensor] = []
    for t in range(x.shape[0]):
        rows.append(x[t] * 2)
    return torch.stack(rows)


with warnings.catch_warnings(action="ignore"):  # deprecated, and still used
    scripted = torch.jit.script(rows_doubled)


@pytest.mark.parametrize(
    "loop",
    [
        lambda x: torch.stack([row * 2 for row in x]),
        lambda x: torch.stack(list(map(torch.neg, x))),
        lambda x: np.stack([row * 2 for row in x.numpy()]),
        scripted,
    ],
)
def test_a_loop_is_seen_and_a_product_is_none(loop):
    small, larger = (torch.ones(5, 2),), {"45 rows": (torch.ones(45, 2),)}
    assert "mul" in " ".join(watching.expect_no_loop(lambda x: x * 2, small, larger, "a loop"))
    with pytest.raises(Failed, match=r"\d+ (lines of Python|operations of torch).*with 45 rows.*a loop"):
        watching.expect_no_loop(loop, small, larger, "a loop")


def test_memory_is_poisoned_inside_only():
    with poisoned():
        assert torch.empty(3).isnan().all() and torch.empty_like(torch.ones(2)).isnan().all()
        assert np.isnan(np.empty(3)).all() and torch.ones(2).new_empty(4).isnan().all()
        assert (torch.empty(3, dtype=torch.int32) == 2**31 - 1).all()
        assert (np.empty(3, dtype=np.int64) == 2**63 - 1).all()
    assert torch.empty is not None and "made" not in torch.empty.__name__


def test_the_checks_do_not_import_triton():
    """Else `import dsa_kernels` would come too late to choose the interpreter."""
    code = "import sys, dsa_course.checks; sys.exit('triton' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_the_toy_is_what_its_text_says():
    import dsa_ref

    given = toy.toy()
    scores = dsa_ref.index_scores(given.q_idx, given.k_idx, given.w)
    assert scores[7].tolist() == [7, 0, 1, -3, 0, 8, 0, 1]
    assert dsa_ref.select_topk(scores, given.k)[7].tolist() == [0, 2, 5]
    assert given.scale == given.kv.shape[1] ** -0.5


def without(monkeypatch, *names):
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name in names else found(name))


def test_the_card_says_what_is_missing_and_where_it_comes_from(monkeypatch, capsys):
    environment.check_env()
    assert "Python 3." in capsys.readouterr().out
    without(monkeypatch, "triton")
    environment.check_env()
    assert "No Triton here" in capsys.readouterr().out
    with pytest.raises(RuntimeError, match="use WSL on Windows"):
        environment.check_env(triton=True)
    without(monkeypatch, "matplotlib")
    with pytest.raises(RuntimeError, match=r"draw with matplotlib, .* `pip install -e '.\[course\]'`"):
        environment.check_env()


def test_guarded_memory():
    values = checking.normal(4, 5, seed=0)
    x = launching.guarded(values, row_gap=3)
    assert x.shape == (4, 5) and x.stride() == (8, 1) and x.cpu().equal(values)
    whole = torch.as_strided(x, (4 * 8 + 2 * launching.GUARD,), (1,), 0)
    assert int(whole.isnan().sum()) == len(whole) - 20
    assert launching.output(3, 4).isnan().all()


if rungs.has_triton():
    import triton
    import triton.language as tl

    @triton.jit
    def masked(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i, i < n, 0.0), i < n)

    @triton.jit
    def unmasked(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(y_ptr + i, tl.load(x_ptr + i, i < n, 0.0))

    @triton.jit
    def untouched(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
        raise NotImplementedError()

    @triton.jit
    def product_in_tf32(a, b):
        return tl.dot(a, b)

    SQUARE = """
@triton.jit
def {name}(x_ptr, y_ptr):
    i = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    x = tl.load(x_ptr + i)
    tl.store(y_ptr + i, {product})
"""
    DOTS = {
        "plain": "tl.dot(x, x)",
        "ieee": 'tl.dot(x, x, input_precision="ieee")',
        "ieee_by_position": 'tl.dot(x, x, None, "ieee")',
        "tf32_not_allowed": "tl.dot(x, x, allow_tf32=False)",
        "helped": "product_in_tf32(x, x)",
        "split": 'tl.dot(x, x, input_precision="tf32x3")',
        "halves": "tl.dot(x.to(tl.float16), x.to(tl.float16))",
    }
    for name, product in DOTS.items():
        text = SQUARE.format(name=name, product=product)
        linecache.cache[f"<{name}>"] = len(text), None, text.splitlines(keepends=True), f"<{name}>"
        exec(compile(text, f"<{name}>", "exec"))
        DOTS[name] = locals()[name]


needs_triton = pytest.mark.skipif(not rungs.has_triton(), reason="kernels need triton, which cannot be imported here")


@needs_triton
def test_a_launch_sees_writes_outside():
    x, y = launching.guarded(checking.normal(10, seed=0)), launching.output(10)
    launching.launch(masked, (2,), x, y, 10, BLOCK=8)
    assert y.equal(x)
    with pytest.raises(Failed, match=r"bounds: y_ptr: memory outside the tensor of shape \[10\] was written"):
        launching.launch(unmasked, (2,), x, y, 10, BLOCK=8)


@needs_triton
def test_a_launch_tells_a_stub_from_a_crash():
    x, y = launching.guarded(checking.normal(10, seed=0)), launching.output(10)
    with pytest.raises(NotImplementedError):
        launching.launch(untouched, (2,), x, y, 10, BLOCK=8)
    with pytest.raises(Failed, match="^runs: "):
        launching.launch(masked, (2,), x, y, 10, BLOCK=7)  # no power of two


@needs_triton
def test_an_input_that_a_kernel_changes_is_seen():
    x, y = launching.guarded(checking.normal(10, seed=0)), launching.guarded(checking.normal(10, seed=1))
    with pytest.raises(Failed, match="inputs: y_ptr was changed by the kernel"):
        launching.launch(masked, (2,), x, y, 10, BLOCK=8)


@needs_triton
def test_a_place_written_by_another_program_is_seen():
    x, y = launching.guarded(checking.normal(16, seed=0)), launching.output(16)
    given = {"BLOCK": 8, "cause": "why"}
    launching.expect_own_places(masked, (2,), x, y, 16, own=lambda p, *_: y[8 * p : 8 * p + 8], **given)
    seen = pytest.raises(Failed, match="program 0 of 2 wrote y_ptr [+] 0, which is another program's")
    with seen if launching.device() == "cpu" else contextlib.nullcontext():  # compiled, nobody can tell
        launching.expect_own_places(masked, (2,), x, y, 16, own=lambda p, *_: y[8 - 8 * p : 16 - 8 * p], **given)


@needs_triton
@pytest.mark.parametrize(
    ("kernel", "said"),
    [("plain", "TF32"), ("ieee", None), ("ieee_by_position", None), ("tf32_not_allowed", None), ("helped", "TF32"),
     ("split", "TF32X3"), ("halves", None)],
)  # fmt: skip
def test_the_precision_of_a_dot_is_seen_however_it_is_said(kernel, said):
    x, y = launching.guarded(checking.normal(16, 16, seed=0)), launching.output(16, 16)
    if said is None:
        return launching.expect_full_precision(DOTS[kernel], (1,), x, y)
    with pytest.raises(Failed, match=f"a tl.dot of fp32 numbers in {said}, expected IEEE"):
        launching.expect_full_precision(DOTS[kernel], (1,), x, y)


def test_a_result_says_what_was_never_written():
    got = launching.output(4)
    got[:2] = torch.tensor([1.0, float("nan")])
    with pytest.raises(
        Failed, match=r"i=1: got nan, expected 1 .* 2 of 4 places were never written. Likely cause: why"
    ):
        launching.expect_result(got, torch.ones(4), 0.0, "i", "why")


def test_inputs_arrive_with_their_strides_and_may_not_be_changed():
    x, seen = checking.spread(torch.arange(6.0).view(2, 3)), {}

    def look(tensor, numbers):
        seen.update(strides=tensor.stride(), values=tensor.tolist())
        numbers.append(1)

    with pytest.raises(Failed, match="inputs: numbers was changed by the call"):
        checking._guarded(look)(x, [3])
    assert seen == {"strides": (6, 2), "values": [[0, 1, 2], [3, 4, 5]]} and x.isfinite().all()
