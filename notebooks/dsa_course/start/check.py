"""Notebook 00: the three lines of DSA."""

import torch

from dsa_ref.dense_attention import dense_attention
from dsa_ref.index_scores import index_scores
from dsa_ref.select_topk import select_topk
from dsa_ref.sparse_attention import sparse_attention
from dsa_ref.testing import Failed, compare_selection

from ..checking import Check, expect, expect_close, expect_shape, normal, strided, tensor, whole

three_lines = Check("three_lines")  # dsa(q_idx, k_idx, w, q, kv, k, scale, v_dim) -> indices, out

CASES = (  # seed, T, S, k, index heads, their size, heads, scale, v_dim
    (1, 37, 37, 5, 16, 1.0, 2, 0.4, 4),  # square
    (2, 3, 9, 16, 16, 1.0, 2, 0.4, 4),  # fewer keys than k for the last queries of nine
    (3, 1, 6, 2, 70, 1e5, 1, 1.3, 3),  # one query, one head, scores beyond fp16, other numbers
)


def _inputs(seed, T, S, k, Hi, size, H, scale, v_dim, *, positive, draw=normal):
    w = draw(T, Hi, seed=seed)
    return {
        "q_idx": draw(T, Hi, 8, seed=seed + 10) * size,
        "k_idx": draw(S, 8, seed=seed + 20),
        "w": w.abs() if positive else w,
        "q": normal(T, H, 6, seed=seed + 30),
        "kv": normal(S, 6, seed=seed + 40),
        "k": k,
        "scale": scale,
        "v_dim": v_dim,
    }


def _two(solution, given):
    """(indices, out), once it is certain that two tensors came back, in this order."""
    got = solution(**given)
    expect(
        isinstance(got, (tuple, list)) and len(got) == 2,
        f"got {type(got).__name__}, expected two tensors",
        "the last line is: return indices, out",
    )
    for name, value in zip(("indices", "out"), got, strict=True):
        cause = "a step that gives two results: sparse_attention returns (out, lse), and only out is asked for"
        expect(not isinstance(value, (tuple, list)), f"{name}: got {type(value).__name__}, expected a tensor", cause)
    indices, out = (tensor(x, name) for x, name in zip(got, ("indices", "out"), strict=True))
    swapped = indices.is_floating_point() and not out.is_floating_point()
    expect(not swapped, "got (out, indices), expected (indices, out)", "the two results are in the wrong order")
    return indices, out


def _select(solution, positive, suspects):
    """Compare the selection; where it is that of other weights (suspects: {cause: weights from weights}), say so."""
    for case in CASES:
        given = _inputs(*case, positive=positive)
        k, w = given["k"], given["w"]
        indices, _ = _two(solution, given)
        try:
            compare_selection(indices, index_scores(given["q_idx"], given["k_idx"], w), k)
        except Failed as failure:
            for cause, change in suspects.items():
                other = select_topk(index_scores(given["q_idx"], given["k_idx"], change(w)), k)
                if torch.equal(other.sort().values, torch.as_tensor(indices).sort().values):
                    failure.cause = cause
                    break
            raise


@three_lines.property("selection")
def three_lines_selection(solution):
    suspects = {
        "the weights w are not used": torch.ones_like,
        "a softmax over the weights: w is used as it is": lambda w: w.softmax(dim=-1),
    }
    _select(solution, positive=True, suspects=suspects)


@three_lines.property("negative weights")
def three_lines_negative_weights(solution):
    suspects = {
        "w.abs(): a head of negative weight speaks against a key, and its sign was lost": torch.abs,
        "negative weights became 0: such a head speaks against a key": torch.relu,
    }
    try:
        _select(solution, positive=False, suspects=suspects)
    except Failed as failure:
        if failure.cause not in suspects:
            failure.cause = "right where all weights are positive, wrong where some are negative"
        raise


@three_lines.property("ties")
def three_lines_ties(solution):
    for case in CASES:
        given = _inputs(*case, positive=False, draw=whole)
        given["w"][:, 1:] = 0.0  # one head, whole numbers: many equal scores
        indices, _ = _two(solution, given)
        compare_selection(indices, index_scores(given["q_idx"], given["k_idx"], given["w"]), given["k"])


@three_lines.property("value")
def three_lines_value(solution):
    for case in CASES:
        given = _inputs(*case, positive=False)
        q, kv, k, scale, v_dim = (given[name] for name in ("q", "kv", "k", "scale", "v_dim"))
        chosen = select_topk(index_scores(given["q_idx"], given["k_idx"], given["w"]), k)
        expected, _ = sparse_attention(q, kv, chosen, scale, v_dim)
        suspects = {
            "the scale is missing: the softmax is of scale · q·k": sparse_attention(q, kv, chosen, 1.0, v_dim)[0],
            "the width of q is not the scale: use the argument": sparse_attention(
                q, kv, chosen, q.shape[-1] ** -0.5, v_dim
            )[0],
            "all visible keys were attended to, not the selected ones": dense_attention(q, kv, scale, v_dim)[0],
        }
        _, out = _two(solution, given)
        whole_row = out.dim() == 3 and out.shape[-1] == kv.shape[1]
        expect(
            not whole_row,
            f"out: got shape {list(out.shape)}, expected {list(expected.shape)}",
            "the whole row was taken for the value: only its first v_dim numbers are",
        )
        expect_shape(out, expected.shape, torch.float32, name="out")
        cause = "the indices are right, and out is not the attention over just those keys"
        expect_close(out, expected, 1e-5, "t h v", cause, suspects)
        given = {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in given.items()}
        cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
        expect_close(_two(solution, given)[1], expected, 1e-5, "t h v", cause)
