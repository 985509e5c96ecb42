"""Is a rank's share right? Its sampled rows against the reference, and against one GPU's of the same tokens.

Selections are those that one GPU makes. Where a row's query, and all keys, have one GPU's bits, its list must be one
GPU's too. Where products of other shapes have rounded otherwise, a key at the threshold may be another: then the list
is judged by the reference's scores alone, to within their rounding.
"""

import torch

import dsa_ref
from dsa_ref.testing import Failed, compare_selection

from .. import checks
from ..bill import dense
from ..bill.prefill import INDEX_ERROR, ROW_ERROR

SAME_KEYS = 0.98  # of a list that differs from one GPU's, the share of keys that are one GPU's all the same


def at(x, rows):
    """x[rows], for e4m3 too, which not every torch indexes on a GPU."""
    return x.view(torch.uint8)[rows].view(x.dtype) if x.element_size() == 1 else x[rows]


def rows_of(step, y, rows):
    """What is compared of some rows, on the CPU: {"lists" ascending, "queries" of the indexer times weights, "y"}."""
    queries = at(step["q_idx"], rows).float() * step["w"][rows].float()[..., None]
    found = {"lists": step["indices"][rows].sort(dim=1).values, "queries": queries, "y": y[rows].float()}
    return {name: tensor.cpu() for name, tensor in found.items()}


def check_keys(step, kv, k_idx, k_scale):
    """The rows that a layer has gathered against one GPU's; whether all have the same bits."""
    wanted = {"kv": kv, "k_idx": k_idx, "k_scale": k_scale}
    same = True
    for name, want in wanted.items():
        got = step[name]
        if (got is None) != (want is None) or got is not None and got.shape != want.shape:
            raise checks.Wrong(f"the gathered {name} have another shape than one GPU's")
        same &= want is None or bool((got.view(torch.uint8) == want.view(torch.uint8)).all())
    if same:
        return True
    near("a gathered latent row", step["kv"].float(), kv.float(), ROW_ERROR)
    scales = (1.0, 1.0) if k_scale is None else (step["k_scale"][:, None], k_scale[:, None])
    near("a gathered index key", step["k_idx"].float() * scales[0], k_idx.float() * scales[1], INDEX_ERROR)
    return False


def check_against_one(got, one, same_keys):
    """Rows as `rows_of` gives them, against one GPU's: (how many lists are its, of how many)."""
    near("the indexer's query", got["queries"], one["queries"], INDEX_ERROR)
    if got["lists"].shape != one["lists"].shape:
        raise checks.Wrong(f"lists have {got['lists'].shape[1]} places, one GPU's {one['lists'].shape[1]}")
    same_list = (got["lists"] == one["lists"]).all(dim=1)
    same_query = (got["queries"] == one["queries"]).flatten(1).all(dim=1)
    if same_keys and (same_query & ~same_list).any():
        raise checks.Wrong("the bits are one GPU's, the selection is another")
    for mine, theirs in zip(got["lists"][~same_list], one["lists"][~same_list], strict=True):
        if torch.isin(mine, theirs).float().mean() < SAME_KEYS:
            raise checks.Wrong("a selection has little in common with one GPU's")
    near("an output row", got["y"][same_list], one["y"][same_list], ROW_ERROR)
    return int(same_list.sum()), len(same_list)


def check_by_reference(layer, x, positions, step, y, rows):
    """Some rows' selection by the reference's scores of the step's own vectors, and its output with that selection.

    x, positions, y: of the step's tokens; step: with the rows of all keys in order, of which a token sees those up to
    its position, in one sequence.
    """
    end = (positions[rows] + 1).to(torch.int32)
    seen = torch.zeros_like(end), end
    scored = at(step["q_idx"], rows), step["k_idx"], step["w"][rows], step["k_scale"]
    try:
        k = min(layer.config.index_topk, len(step["k_idx"]))
        compare_selection(
            step["indices"][rows], dsa_ref.index_scores(*scored, *seen), k, *seen, tolerance=checks.SCORE_ERROR
        )
    except Failed as failure:
        raise checks.Wrong(str(failure)) from failure
    want = dense.reference(layer, x[rows], positions[rows], step["kv"].float(), step["indices"][rows])
    return near("an output row", y[rows].float(), want.float(), ROW_ERROR)


def near(what, got, want, most):
    """The largest relative error of a row, 0 without rows, which must not be above `most`."""
    if not len(got):
        return 0.0
    error = checks.row_errors(got, want)
    if not (error <= most).all():
        raise checks.Wrong(f"{what} is off by {error.nan_to_num(torch.inf).max():.1e}, more than {most}")
    return error.max().item()


def digest(tensors):
    """A number that says whether two ranks hold the same bits."""
    total = 0
    for tensor in tensors:
        if tensor is not None:
            words = tensor.contiguous().view(torch.uint8).flatten()
            total = 31 * total + int(words[: len(words) // 4 * 4].view(torch.int32).sum(dtype=torch.int64))
            total += int(words[len(words) // 4 * 4 :].sum(dtype=torch.int64))
    return total
