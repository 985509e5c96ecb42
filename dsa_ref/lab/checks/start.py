"""Notebook 00: the three lines of DSA."""

from ...index_scores import index_scores
from ...select_topk import select_topk
from ...sparse_attention import sparse_attention
from ..compare import Failed, compare_selection
from .core import Check, expect_close, expect_shape, normal

three_lines = Check("three_lines")  # dsa(q_idx, k_idx, w, q, kv, k, scale, v_dim) -> indices, out

CASES = ((1, 37, 37, 5), (2, 3, 9, 16))  # seed, T, S, k: square, and fewer keys than k for the last queries of nine


def _inputs(seed, T, S, k, positive):
    w = normal(T, 16, seed=seed)
    return {
        "q_idx": normal(T, 16, 8, seed=seed + 10),
        "k_idx": normal(S, 8, seed=seed + 20),
        "w": w.abs() if positive else w,
        "q": normal(T, 2, 6, seed=seed + 30),
        "kv": normal(S, 6, seed=seed + 40),
        "k": k,
        "scale": 0.4,
        "v_dim": 4,
    }


def _select(solution, positive):
    for case in CASES:
        given = _inputs(*case, positive)
        scores = index_scores(given["q_idx"], given["k_idx"], given["w"])
        indices, _ = solution(**given)
        compare_selection(indices, scores, given["k"])


@three_lines.property("selection")
def _(solution):
    _select(solution, positive=True)


@three_lines.property("negative weights")
def _(solution):
    try:
        _select(solution, positive=False)
    except Failed as failure:
        failure.cause = "right where all weights are positive, wrong where some are negative: did the sign get lost?"
        raise


@three_lines.property("value")
def _(solution):
    for case in CASES:
        given = _inputs(*case, positive=False)
        chosen = select_topk(index_scores(given["q_idx"], given["k_idx"], given["w"]), given["k"])
        expected, _ = sparse_attention(given["q"], given["kv"], chosen, given["scale"], given["v_dim"])
        _, out = solution(**given)
        expect_shape(out, expected.shape, name="out")
        expect_close(out, expected, 1e-5, "t h v", "not the softmax over the selected keys of the right scale")
