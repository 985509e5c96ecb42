"""Notebook 04: sparse attention that gathers its rows, and the count that proves it."""

import math

import torch

from dsa_ref.cost import causal_pairs
from dsa_ref.dense_attention import dense_attention
from dsa_ref.select_topk import select_topk
from dsa_ref.sparse_attention import sparse_attention
from dsa_ref.testing import Failed, random_selection

from ..checking import (
    FORGOTTEN,
    Check,
    expect,
    expect_close,
    expect_int,
    expect_number,
    expect_shape,
    normal,
    strided,
    tensor,
    unequal,
)
from ..watching import Python, TorchMemory

gather_rows = Check("gather_rows")  # my_gather_rows(kv, indices) -> rows [T, k, D], there [T, k]
gathered_attention = Check("gathered_attention")  # my_gathered_attention(q, kv, indices, scale, v_dim) -> out, lse
attended_pairs = Check("attended_pairs")  # my_attended_pairs(T, S, k) -> int
pays_from = Check("pays_from")  # my_pays_from(index_flops, attention_flops, k) -> context

CASES = (  # seed, T, S, H, k: square, a tail with one head, one query and k > S, one place, one key
    (1, 37, 37, 3, 5),
    (2, 9, 14, 1, 4),
    (3, 1, 6, 2, 8),
    (4, 5, 7, 2, 1),
    (5, 1, 2, 1, 1),
)
D, V_DIM, SCALE = 6, 4, 0.4


def _selection(seed, T, S, k):
    """Indices as an indexer gives them: causal, ascending, -1 at the end of short rows."""
    return select_topk(normal(T, S, seed=seed + 50), k)


def _inputs(seed, T, S, H, k):
    q, kv = normal(T, H, D, seed=seed), normal(S, D, seed=seed + 20)
    kv[1] = 0  # a row like any other, with scores of 0
    return {"q": q, "kv": kv, "indices": _selection(seed, T, S, k), "scale": SCALE, "v_dim": V_DIM}


def _pair(got, names):
    """Two results, as tensors."""
    if not isinstance(got, (tuple, list)) or len(got) != 2:
        count = f" of {len(got)}" if isinstance(got, (tuple, list)) else ""
        cause = FORGOTTEN if got is None else f"return {names}"
        raise Failed(f"got {type(got).__name__}{count}, expected two tensors: {names}", cause)
    return tuple(tensor(x, name) for x, name in zip(got, names.split(", "), strict=True))


# ------------------------------------------------------------------------------------------------------- gather_rows


def _rows(solution, kv, indices):
    return _pair(solution(kv, indices), "rows, there")


@gather_rows.property("shapes")
def gather_rows_shapes(solution):
    for seed, T, S, _, k in CASES:
        for width in (D, 1):
            rows, there = _rows(solution, normal(S, width, seed=seed), _selection(seed, T, S, k))
            expect_shape(rows, [T, k, width], torch.float32, "rows")
            expect_shape(there, [T, k], torch.bool, "there")


@gather_rows.property("there")
def gather_rows_there(solution):
    for seed, T, S, _, k in CASES:
        kv, indices = normal(S, D, seed=seed), _selection(seed, T, S, k)
        kv[indices[-1, 0]] = 0  # a row of zeros may be selected
        _, there = _rows(solution, kv, indices)
        causes = {
            "a row of zeros may be selected: look at the index, not at the row": (indices >= 0)
            & (kv[indices.clamp(min=0).long()] != 0).any(dim=-1),
            "row 0 is a row like any other: the test is index >= 0": indices > 0,
            "upside down: there is True where a row was selected": indices < 0,
        }
        expect_close(there, indices >= 0, 0.0, "t place", "there marks the places that hold an index, not -1", causes)


@gather_rows.property("rows")
def gather_rows_rows(solution):
    for seed, T, S, _, k in CASES:
        kv, indices = normal(S, D, seed=seed), _selection(seed, T, S, k)
        kv[indices[-1, 0]], kv[int(indices[-1].max())] = torch.nan, torch.inf  # selected rows go through as they are
        rows, _ = _rows(solution, kv, indices)
        chosen = indices >= 0
        got, expected = rows[chosen], kv[indices[chosen].long()]
        nan = expected.isnan()
        what = "got NaN in a row that holds none"
        expect(not got[~nan].isnan().any(), what, "another row was fetched, or its NaN got in by a product or a sum")
        cause = "rows[t, j] is kv[indices[t, j]], whatever it holds"
        expect_close(got.masked_fill(nan, 0.0), expected.masked_fill(nan, 0.0), 0.0, "selected d", cause)
        cause = "nan_to_num hides a fault that you want to see: put 0 only where the index is -1"
        expect(got[nan].isnan().all(), "a selected row holds NaN: got a number there, expected NaN", cause)
    kv, indices = normal(9, D, seed=6), torch.tensor([[8, 0, 3], [3, 3, 8]], dtype=torch.int32)
    cause = "a row may be selected by any query, and in any place"
    expect_close(_rows(solution, kv, indices)[0], kv[indices.long()], 0.0, "t place d", cause)
    cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
    expect_close(_rows(solution, strided(kv), strided(indices))[0], kv[indices.long()], 0.0, "t place d", cause)
    tiny = kv * 1e-40  # fp32 goes down to 1e-45
    cause = "rows[t, j] is kv[indices[t, j]], its smallest numbers too"
    expect_close(_rows(solution, tiny, indices)[0], tiny[indices.long()], 0.0, "t place d", cause)
    kv, indices = normal(33_000, 1, seed=7), torch.tensor([[32_999, 300], [200, 32_768]], dtype=torch.int32)
    cause = "right for short tables: did the indices go through 8 or 16 bits, or through a size of the toy?"
    expect_close(_rows(solution, kv, indices)[0], kv[indices.long()], 0.0, "t place d", cause)


@gather_rows.property("padding is zero")
def gather_rows_padding_is_zero(solution):
    scattered = torch.tensor([[-1, 3, 0], [2, -1, 5], [-1, -1, 4]], dtype=torch.int32)  # -1 in any place
    for seed, S, indices in ((1, 37, _selection(1, 37, 37, 5)), (3, 6, _selection(3, 1, 6, 8)), (7, 6, scattered)):
        kv = normal(S, D, seed=seed)
        rows, there = _rows(solution, kv, indices)
        padding = rows[indices < 0]
        causes = {
            "kv[-1] is the last row: an index of -1 wraps around": kv[-1].expand_as(padding),
            "-1 was clamped to 0, and row 0 was left standing": kv[0].expand_as(padding),
        }
        expect_close(padding, torch.zeros_like(padding), 0.0, "padding d", "where indices is -1 the row is 0", causes)
        cause = "there is True exactly where the index is not -1, in whatever place"
        expect_close(there, indices >= 0, 0.0, "t place", cause)


@gather_rows.property("NaN stays out")
def gather_rows_nan_stays_out(solution):
    kv = normal(12, D, seed=5)
    kv[0], kv[-1] = torch.nan, torch.nan
    indices = torch.tensor([[3, 5, -1], [-1, -1, -1], [7, -1, -1], [1, 2, 3]], dtype=torch.int32)
    rows, _ = _rows(solution, kv, indices)
    cause = "0 · NaN is NaN: a row must be replaced (masked_fill, torch.where), not multiplied by 0"
    expect(not rows.isnan().any(), "got NaN where only rows that nobody selected are NaN, expected 0", cause)


# ------------------------------------------------------------------------------------------------ gathered_attention


def _attend(q, rows, there):
    """Softmax over the rows [T, k, D] where there [T, k] holds: what the mistakes are made of."""
    logits = (torch.einsum("thd,tkd->thk", q, rows) * SCALE).masked_fill(~there[:, None], -torch.inf)
    return torch.einsum("thk,tkv->thv", logits.softmax(dim=-1), rows[..., :V_DIM]), logits.logsumexp(dim=-1)


def _answer(solution, given):
    return _pair(solution(*given.values()), "out, lse")  # by position: the names of the parameters are the learner's


def _full(case):
    """The inputs of a case and its reference, for those rows only that have no padding: the last ones."""
    given = _inputs(*case)
    keep = (given["indices"] >= 0).all(dim=1)
    given["q"], given["indices"] = given["q"][keep], given["indices"][keep]
    return given, *sparse_attention(**given)


@gathered_attention.property("shapes")
def gathered_attention_shapes(solution):
    for case in CASES:
        given = _inputs(*case)
        T, H, _ = given["q"].shape
        out, lse = _answer(solution, given)
        if out.shape == given["q"].shape != (T, H, V_DIM):
            what = f"out: got shape {list(out.shape)}, expected {[T, H, V_DIM]}"
            raise Failed(what, "the value is the first v_dim columns of a row, not the whole row")
        expect_shape(out, [T, H, V_DIM], torch.float32, "out")
        expect_shape(lse, [T, H], torch.float32, "lse")


@gathered_attention.property("values")
def gathered_attention_values(solution):
    for case in CASES[:2]:
        given, expected, _ = _full(case)
        q, rows = given["q"], given["kv"][given["indices"].long()]
        there = torch.ones(rows.shape[:2], dtype=torch.bool)
        logits = torch.einsum("thd,tkd->thk", q, rows) * SCALE
        every, _ = dense_attention(q, given["kv"], SCALE, V_DIM)
        causes = {
            "every visible key was attended, not only the selected ones": every,
            "the scores were not scaled": _attend(q / SCALE, rows, there)[0],
            "scale is an argument, and not always 1/√D": _attend(q / SCALE / math.sqrt(D), rows, there)[0],
            "a score of 0 was taken for padding: look at the index": _attend(q, rows, (rows != 0).any(dim=-1))[0],
            "the softmax ran over the heads, not over the places": torch.einsum(
                "thk,tkv->thv", logits.softmax(dim=1), rows[..., :V_DIM]
            ),
            "the last v_dim columns were taken as the value, not the first": torch.einsum(
                "thk,tkv->thv", logits.softmax(dim=-1), rows[..., -V_DIM:]
            ),
            "the scores used the value's columns only: all D columns are the key": _attend(
                torch.cat((q[..., :V_DIM], torch.zeros_like(q[..., V_DIM:])), dim=-1), rows, there
            )[0],
        }
        out, _ = _answer(solution, given)
        cause = "not softmax(scale · q·row) times the row's first v_dim columns, over the selected rows"
        expect_close(out, expected, 1e-5, "t h v", cause, causes)
    cause = "right for one scale and v_dim, wrong for others: both are arguments"
    for scale, v_dim in ((1.0, 1), (0.1, D)):
        given["scale"], given["v_dim"] = scale, v_dim
        expect_close(_answer(solution, given)[0], sparse_attention(**given)[0], 1e-5, "t h v", cause)
    given = {name: strided(x) if isinstance(x, torch.Tensor) else x for name, x in _inputs(8, 9, 14, 3, 4).items()}
    cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
    expect_close(_answer(solution, given)[0], sparse_attention(**given)[0], 1e-5, "t h v", cause)


@gathered_attention.property("log-sum-exp")
def gathered_attention_log_sum_exp(solution):
    for case in CASES[:2]:
        given, _, expected = _full(case)
        logits = torch.einsum("thd,tkd->thk", given["q"], given["kv"][given["indices"].long()]) * SCALE
        causes = {
            "base 2: lse is the natural logarithm": expected / math.log(2),
            "the largest score alone: add log of the sum": logits.amax(dim=-1),
            "the largest score was subtracted and not added back": expected - logits.amax(dim=-1),
            "the sum, without its logarithm": expected.exp(),
            "log of the mean: do not divide by k": expected - math.log(logits.shape[-1]),
        }
        _, lse = _answer(solution, given)
        expect_close(lse, expected, 1e-5, "t h", "lse = log(sum of exp(score)), scores with scale", causes)


@gathered_attention.property("padding")
def gathered_attention_padding(solution):
    for case in CASES:
        given = _inputs(*case)
        q, kv, indices = given["q"], given["kv"], given["indices"].long()
        there, everywhere = indices >= 0, torch.ones_like(indices, dtype=torch.bool)
        zeros = kv[indices.clamp(min=0)].masked_fill(~there[..., None], 0.0)
        causes = {
            "-1 wraps around to the last row, which is the future": _attend(q, kv[indices], everywhere),
            "padding was clamped to row 0, which is now counted more than once": _attend(
                q, kv[indices.clamp(min=0)], everywhere
            ),
            "the softmax also ran over the padding: a score of 0 is not a weight of 0": _attend(q, zeros, everywhere),
        }
        got, expected = _answer(solution, given), sparse_attention(**given)
        cause = "right for full rows, wrong where -1 fills a row: hide those places with -inf before the softmax"
        for i, axes in enumerate(("t h v", "t h")):
            suspects = {suspicion: answer[i] for suspicion, answer in causes.items()}
            expect_close(got[i], expected[i], 1e-5, axes, cause, suspects)


@gathered_attention.property("empty row")
def gathered_attention_empty_row(solution):
    for case in CASES[:2]:
        given = _inputs(*case)
        given["indices"][::3] = -1
        out, lse = _answer(solution, given)
        cause = "a query that selected nothing gives 0: softmax of nothing but -inf is 0 / 0, so treat it on its own"
        expect(not out.isnan().any(), "out: got NaN where a row of indices is all -1, expected 0", cause)
        expect_close(out, sparse_attention(**given)[0], 1e-5, "t h v", cause)
        cause = "log of an empty sum: a query that selected nothing has lse = -inf"
        expect_close(lse, sparse_attention(**given)[1], 1e-5, "t h", cause)


@gathered_attention.property("large scores")
def gathered_attention_large_scores(solution):
    for case in CASES[:2]:
        given, *_ = _full(case)
        given["q"] *= 500
        got, expected = _answer(solution, given), sparse_attention(**given)
        for i, axes in enumerate(("t h v", "t h")):
            cause = "exp overflows: subtract each row's largest score before exp, and add it to lse again"
            expect_close(got[i], expected[i], 1e-4, axes, cause)


@gathered_attention.property("low scores")
def gathered_attention_low_scores(solution):
    for case in CASES[::2]:  # those with padding
        given = _inputs(*case)
        given["q"], given["kv"] = -1e12 * given["q"].abs(), given["kv"].abs() + 1  # every score is far below -1e9
        got, expected = _answer(solution, given), sparse_attention(**given)
        cause = (
            "padding was the largest score of a row: hide it with -inf, no other number, before you take the largest"
        )
        for i, axes in enumerate(("t h v", "t h")):
            expect_close(got[i], expected[i], 1e-4, axes, cause)


@gathered_attention.property("sparse work")
def gathered_attention_sparse_work(solution):
    T, S, H, k = 96, 12_288, 4, 2  # so that one number for each of T · S is more than all that is needed
    given = _inputs(7, T, S, H, k)
    end = torch.arange(S - T + 1, S + 1, dtype=torch.int32)
    given["indices"] = random_selection(k, torch.zeros_like(end), end, seed=7)
    from torch.utils.flop_counter import FlopCounterMode  # here: it imports triton, which takes a second

    with FlopCounterMode(display=False) as products, TorchMemory() as made:
        _answer(solution, given)
    with Python() as python:  # a second run: the first may have imported things, which would be counted here
        _answer(solution, given)
    needed = 2 * T * k * H * (D + V_DIM)
    cause = "right, but dense work: gather the selected rows first, and let nothing of size T · S come into being"
    largest = f"the largest tensor has shape {list(made.largest)}"
    flops = products.get_total_flops()
    expect(flops <= 2 * needed, f"{flops:,} FLOPs counted, expected {needed:,}; {largest}", cause)
    limit = 4 * S * D + 40 * T * k * H * D  # some copies of the cache, some of the gathered rows, a head at a time
    expect(made.elements <= limit, f"{made.elements:,} numbers made, expected at most {limit:,}; {largest}", cause)
    outside = f"{python.bytes:,} bytes made outside torch, in NumPy or lists, expected at most {8 * limit:,}"
    expect(python.bytes <= 8 * limit, f"{outside}; all T · S · H scores are {4 * T * S * H:,}", cause)
    expect(python.lines <= limit, f"{python.lines:,} lines of Python ran, expected at most {limit:,}", cause)


@gathered_attention.property("unselected rows")
def gathered_attention_unselected_rows(solution):
    for case in CASES:
        given = _inputs(*case)
        chosen = torch.where(given["indices"] <= 0, len(given["kv"]), given["indices"]).sort(dim=1).values
        given["indices"] = torch.where(chosen == len(given["kv"]), -1, chosen)  # nobody selects row 0 any more
        expected = sparse_attention(**given)
        given["kv"][list({*range(len(given["kv"]))} - {*given["indices"].flatten().tolist()})] = torch.nan
        cause = "a row that nobody selected got in: 0 · NaN is NaN, so padding must be replaced by 0, not weighted by 0"
        for got, wanted, axes in zip(_answer(solution, given), expected, ("t h v", "t h"), strict=True):
            expect(not got.isnan().any(), "got NaN where only rows that nobody selected are NaN", cause)
            expect_close(got, wanted, 1e-5, axes, cause)


# -------------------------------------------------------------------------------------------------------- the counts


def _count(solution, T, S, k, cause, suspects=None):
    got, expected = expect_int(solution(T, S, k), f"T={T}, S={S}, k={k}"), causal_pairs(T, S, k)
    for suspicion, answer in (suspects or {}).items():
        cause = suspicion if got == answer else cause
    expect(got == expected, f"T={T}, S={S}, k={k}: got {got}, expected {expected}", cause)


@attended_pairs.property("one query")
def attended_pairs_one_query(solution):
    for S, k in ((10, 4), (10, 10), (10, 30), (1, 1), (2048, 2048)):
        suspects = {
            "the query at position S - 1 sees S keys, itself included": min(k, S - 1),
            "the queries are the last T of S positions: row 0 sees S - T + 1 keys, not 1": min(k, 1),
            "all S keys were counted: at most k of them are attended": S,
            "a row that sees fewer than k keys attends to fewer": k,
        }
        _count(solution, 1, S, k, "one query at the end of S positions attends to min(k, S) keys", suspects)


@attended_pairs.property("full rows")
def attended_pairs_full_rows(solution):
    for T, S, k in ((5, 100, 20), (64, 4096, 8), (3, 12, 10)):
        suspects = {"every pair of the rectangle was counted": T * S, "all visible pairs counted": causal_pairs(T, S)}
        _count(solution, T, S, k, "every row sees at least k keys here: T · k", suspects)


@attended_pairs.property("short rows")
def attended_pairs_short_rows(solution):
    for T, S, k in ((8, 8, 3), (37, 37, 5), (6, 8, 4), (9, 9, 9), (9, 9, 50)):
        suspects = {
            "the first rows see fewer than k keys: they attend to fewer": T * min(k, S),
            "row t sees S - T + t + 1 keys: itself is one of them": sum(min(k, S - T + t) for t in range(T)),
        }
        _count(solution, T, S, k, "the sum over rows of min(k, S - T + t + 1)", suspects)


@attended_pairs.property("exact at a million")
def attended_pairs_exact_at_a_million(solution):
    million = 2**20
    cause = "right for small numbers only: fp32 and int32 cannot hold it, Python's own int can"
    for T, S, k in ((million, million, 2049), (million - 1, million, million), (million - 1, 2 * million, million - 3)):
        _count(solution, T, S, k, cause)


def _context(solution, index_flops, attention_flops, k, cause, suspects=None):
    expected = math.inf if index_flops >= attention_flops else attention_flops * k / (attention_flops - index_flops)
    got = solution(index_flops, attention_flops, k)
    what = f"{index_flops}, {attention_flops}, k={k}"
    if got is None and expected == math.inf:
        raise Failed(f"{what}: got None, expected inf", cause)
    got = expect_number(got, what)
    for suspicion, answer in (suspects or {}).items():
        cause = suspicion if got == answer else cause
    if expected < math.inf and got in (math.floor(expected), math.ceil(expected)):
        cause = "do not round: the context is a float"
    near = got == expected or abs(got - expected) <= 1e-6 * expected < math.inf
    expect(near, f"{what}: {unequal(got, expected)}", cause)


@pays_from.property("V3.2")
def pays_from_v3_2(solution):
    index_flops, attention_flops, k = 16_384, 278_528, 2048
    suspects = {
        "that is k: but the indexer has to be paid too": k,
        "the indexer looks at all c keys, not at the k that are kept": k + k * index_flops / attention_flops,
        "plus, where it must be minus: solve index · c + attention · k = attention · c": (
            attention_flops * k / (attention_flops + index_flops)
        ),
    }
    cause = "solve index_flops · c + attention_flops · k = attention_flops · c for c"
    _context(solution, index_flops, attention_flops, k, cause, suspects)


@pays_from.property("other sizes")
def pays_from_other_sizes(solution):
    for numbers in ((1024, 2304, 64), (1, 2, 5), (3, 1000, 7), (100, 101, 4)):
        _context(solution, *numbers, "right for V3.2 only: every number has to come from the arguments")
    _context(solution, 16_384, 278_528, 2**20, "attention_flops · k went round in 32 bits")
    _context(solution, 0, 2304, 64, "an indexer that costs nothing pays from the first key on that is left out: c = k")


@pays_from.property("never")
def pays_from_never(solution):
    for numbers in ((5, 5, 3), (7, 5, 3)):
        _context(solution, *numbers, "an indexer as costly as attention never pays: return math.inf")
