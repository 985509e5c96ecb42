"""What a crash in a learner's function says: their line, the shapes in it, the cause; and what a stub says instead."""

import re

import numpy as np
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from traitlets.config import Config

from dsa_course import checking
from dsa_course.checking import Check
from dsa_ref.testing import Failed

scores = Check("scores")


@scores.property("value")
def scores_value(solution):
    q, k = checking.whole(5, 2, 4, seed=0), checking.whole(7, 4, seed=1)
    checking.expect_close(solution(q, k), torch.einsum("thd,sd->ths", q, k), 0.0, "t h s", "a wrong sum")


def renamed(q, **keys):
    return q


CRASHES = [  # a wrong answer, what the failure must name of it, and the cause
    (
        lambda q, k: torch.einsum("thd, sd -> ths", q, k[:, 1:]),
        r"q \[5, 2, 4\] float32, k \[7, 4\]",
        "letter d is 4 long",
    ),
    (lambda q, k: np.einsum("thd,sd->ths", q.numpy(), k[:, :3].numpy()), r"q \[5, 2, 4\]", "letter d is 4 long"),
    (lambda q, k: torch.einsum("td,sd->ts", q, k), "einsum", r"'td' has 2 letters for operand 1, .* has 3 axes"),
    (lambda q, k: torch.einsum("thd,sd->thx", q, k), "einsum", "letter x of the result stands in no operand"),
    (lambda q, k: torch.einsum("thd,sd,h->ths", q, k), "einsum", "names 3 operands, and 2 were given"),
    (lambda q, k: q @ k, r"q \[5, 2, 4\] float32, k \[7, 4\] float32", "these shapes do not fit"),
    (lambda q, k: q + k, "size of tensor", "these shapes do not fit"),
    (lambda q, k: q.double() @ k.T, "double != float", "two dtypes met"),
    (lambda q, k: q.astype("float32"), "astype", "NumPy's name on a torch tensor"),
    (lambda q, k: q.bfloat16().numpy(), "BFloat16", "NumPy has no bf16"),
    (lambda q, k: k.T.view(-1), "view size", "use reshape"),
    (lambda q, k: torch.matmul(q, k.numpy().T), "ndarray", "NumPy's name on a torch tensor, or torch's on an array"),
    (lambda q, k: q[len(k)], r"index 7 .*k \[7, 4\]", "an index past the end"),
    (lambda q, k: no_such_scores(q, k), "no_such_scores", "no cell above has defined"),  # noqa: F821
    (lambda q: q, "2 were given", "keep the stub's parameters"),
    (renamed, "takes 1 positional", "keep the stub's parameters"),
]


@pytest.mark.parametrize(("solution", "named", "cause"), CRASHES)
def test_a_crash_is_explained(solution, named, cause):
    with pytest.raises(Failed) as failure:
        scores(solution)
    assert failure.value.property == "runs"
    assert re.search(named, failure.value.what), failure.value.what
    assert re.search(cause, failure.value.cause), failure.value.cause


def test_the_lines_shown_are_the_learners_own():
    def my_helper(q, k):
        return torch.einsum("thd,sd->ths", q, k[1:, 1:])

    def my_scores(q, k):
        return my_helper(q, k)

    with pytest.raises(Failed) as failure:
        scores(my_scores)
    shown, said = failure.value._render_traceback_()
    assert [line.split(",")[0] for line in shown.splitlines()] == ["my_scores", "my_helper"]
    assert shown.count("torch.") == 1 and said.startswith("✗ runs: RuntimeError: einsum()")  # none of torch's own lines


def test_an_einsum_that_fits_is_not_blamed():
    def my_scores(q, k):
        return torch.einsum("thd,sd->ths", q, k.double())

    with pytest.raises(Failed, match="two dtypes met"):
        scores(my_scores)


def test_a_question_ends_as_one():
    def my_scores(q, k):
        raise RuntimeError("something else")

    with pytest.raises(Failed, match=r"that the exercise allows\?$"):
        scores(my_scores)


def test_a_stub_is_one_line_in_a_notebook(capsys):
    """It still is an error, which stops a grader's count of points, and a NotImplementedError."""
    shell = InteractiveShell(config=Config({"HistoryManager": {"enabled": False}}))
    shell.user_ns["scores"] = scores
    shell.run_cell("def my_scores(q, k):\n    # YOUR CODE HERE\n    raise NotImplementedError()")
    capsys.readouterr()
    ran = shell.run_cell("scores(my_scores)")
    assert isinstance(ran.error_in_exec, NotImplementedError)
    assert capsys.readouterr().out == "✗ not written yet\n"


def test_torchs_own_is_no_stub():
    def my_scores(q, k):
        return q.to(torch.float8_e4m3fn).relu()

    with pytest.raises(Failed, match="runs: NotImplementedError: "):
        scores(my_scores)
