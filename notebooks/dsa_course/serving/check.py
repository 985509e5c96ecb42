"""Notebook 12: a step's bytes, and the merge of all parts. `check_pages` has the exercises on pages."""

import torch

from dsa_ref.sparse_attention import masked_softmax

from ..checking import FORGOTTEN, Check, expect, expect_close, expect_int, expect_shape, normal, spread

step_bytes = Check("step_bytes")  # (lengths [B] ints, k, index_bytes, kv_bytes) -> (dsa, dense)
merge_splits = Check("merge_splits")  # (outs [n, H, V], lses [n, H]) -> (out [H, V], lse [H])


def _pair(got, names):
    forgotten = FORGOTTEN if got is None else f"return {names}"
    pair = isinstance(got, (tuple, list)) and len(got) == 2
    expect(pair, f"got {type(got).__name__}, expected the pair ({names})", forgotten)
    return got


# -------------------------------------------------------------------------------------------------------- step_bytes


def _dsa(lengths, k, index_bytes, kv_bytes):
    return sum(index_bytes * L + kv_bytes * min(k, L) for L in lengths)


def _expect_bytes(solution, place, lengths, k, index_bytes, kv_bytes, expected, suspects, cause):
    """Compare one of the two numbers, the first (dsa) or the second (dense)."""
    got = _pair(solution(list(lengths), k, index_bytes, kv_bytes), "dsa, dense")[place]
    name = ("dsa", "dense")[place]
    got = expect_int(got, name)
    for suspicion, answer in suspects.items():
        if got == answer != expected:
            cause = suspicion
    given = f"lengths {list(lengths)}" if len(lengths) < 9 else f"{len(lengths)} sequences"
    what = f"{name}, {given}, k={k}, {index_bytes} and {kv_bytes} bytes: got {got:,}, expected {expected:,}"
    expect(got == expected, what, cause)


@step_bytes.property("dense")
def step_bytes_dense(solution):
    for lengths, k, index_bytes, kv_bytes in (([5000], 2048, 132, 656), ([7, 301, 64], 10, 36, 112)):
        suspects = {
            "dense attention has no indexer: it reads no index cache": (index_bytes + kv_bytes) * sum(lengths),
            "every sequence was counted as long as the longest": kv_bytes * max(lengths) * len(lengths),
            "dense attention reads every row, not k of them": kv_bytes * sum(min(k, L) for L in lengths),
            "that is DSA's number: the order is (dsa, dense)": _dsa(lengths, k, index_bytes, kv_bytes),
        }
        cause = "dense attention reads each row of each sequence once: kv_bytes times all tokens"
        _expect_bytes(solution, 1, lengths, k, index_bytes, kv_bytes, kv_bytes * sum(lengths), suspects, cause)


@step_bytes.property("long context")
def step_bytes_long_context(solution):
    for L, k, index_bytes, kv_bytes in ((131_072, 2048, 132, 656), (301, 7, 36, 112)):
        suspects = {
            "the indexer is missing: to choose, it reads an entry of every token": kv_bytes * k,
            "the index cache was read for k tokens only: to choose k, all must be scored": (index_bytes + kv_bytes) * k,
            "the selected rows are missing": index_bytes * L,
            "every row was read, not k of them": (index_bytes + kv_bytes) * L,
        }
        cause = "index_bytes for every token, and kv_bytes for each of the k selected"
        _expect_bytes(solution, 0, [L], k, index_bytes, kv_bytes, index_bytes * L + kv_bytes * k, suspects, cause)


@step_bytes.property("short context")
def step_bytes_short_context(solution):
    for L, k, index_bytes, kv_bytes in ((100, 2048, 132, 656), (7, 8, 36, 112), (1, 64, 36, 112)):
        suspects = {
            "k rows were read, but there are fewer than k tokens": index_bytes * L + kv_bytes * k,
            "the indexer runs for short sequences too": kv_bytes * L,
        }
        cause = "a sequence of fewer than k tokens selects all of them: min(k, length)"
        _expect_bytes(solution, 0, [L], k, index_bytes, kv_bytes, (index_bytes + kv_bytes) * L, suspects, cause)


@step_bytes.property("batch")
def step_bytes_batch(solution):
    for lengths, k, index_bytes, kv_bytes in (([100, 131_072, 3000], 2048, 132, 656), ([7, 301, 64, 7, 8], 8, 36, 112)):
        B, longest = len(lengths), max(lengths)
        suspects = {
            "every sequence was counted as long as the longest": B * _dsa([longest], k, index_bytes, kv_bytes),
            "k rows for the whole batch: each sequence selects its own": _dsa([sum(lengths)], k, index_bytes, kv_bytes),
            "the mean length was taken: min(k, length) is no straight line": B
            * _dsa([sum(lengths) / B], k, index_bytes, kv_bytes),
            "only the first sequence was counted": _dsa(lengths[:1], k, index_bytes, kv_bytes),
            "sequences of the same length were counted once": _dsa(set(lengths), k, index_bytes, kv_bytes),
        }
        expected = _dsa(lengths, k, index_bytes, kv_bytes)
        cause = "sum over the sequences, each with its own length and its own min(k, length)"
        _expect_bytes(solution, 0, lengths, k, index_bytes, kv_bytes, expected, suspects, cause)
    many = [131_071, 77_777] * 64  # 8.8 GB
    cause = "the bytes of a large batch fit neither 32 bits nor a float of 32 bits: Python's ints, or int64"
    _expect_bytes(solution, 1, many, 2048, 133, 657, 657 * sum(many), {}, cause)
    _expect_bytes(solution, 0, many, 2048, 133, 657, _dsa(many, 2048, 133, 657), {}, cause)


# ------------------------------------------------------------------------------------------------------ merge_splits

EXACT = 1e-9
BASE_2 = "this is right but for the base: exp2 and log2 where exp and log are asked for"
# seed, H, V, keys in each part
MERGES = ((1, 3, 4, (5, 9, 2)), (2, 1, 3, (1, 30)), (3, 2, 5, (4, 4, 4, 4, 4)), (4, 2, 3, (7,)), (5, 2, 3, (3,) * 40))


def _parts(seed, H, V, sizes, shift=0.0, empty=()):
    """(outs [n, H, V], lses [n, H]) of the parts, and (out, lse) of all keys. empty: (part, head) pairs without keys.

    shift: of the logits, a number, [H, 1], or a tuple of these, which the parts take from its beginning.
    The out of a part without keys is NaN: nobody wrote it.
    """
    f64 = {"dtype": torch.float64}
    shifts = shift if isinstance(shift, tuple) else [shift] * len(sizes)
    logits = [normal(H, n, seed=seed + i, **f64) + shifts[i] for i, n in enumerate(sizes)]
    values = [normal(n, V, seed=seed + 10 + i, **f64) for i, n in enumerate(sizes)]
    for part, head in empty:
        logits[part][head] = -torch.inf

    def attend(logits, values):
        weights, lse = masked_softmax(logits, logits > -torch.inf)
        return weights @ values, lse

    outs, lses = (torch.stack(x) for x in zip(*(attend(*p) for p in zip(logits, values, strict=True)), strict=True))
    outs[lses == -torch.inf] = torch.nan
    return outs, lses, *attend(torch.cat(logits, dim=1), torch.cat(values))


def _expect_merged(solution, parts, cause, only=None):
    outs, lses, whole_out, whole_lse = parts
    out, lse = _pair(solution(outs, lses), "out, lse")
    expect_shape(out, whole_out.shape, name="out")
    expect_shape(lse, whole_lse.shape, name="lse")
    base_2 = torch.log2(torch.exp2(lses).sum(dim=0))
    first_two = torch.logaddexp(lses[0], lses[min(1, len(lses) - 1)])
    pairs = (lses[:2] - first_two).exp()[..., None] * outs[:2]
    wrong_lse = {
        BASE_2: base_2,
        "the log-sum-exps were added: it is their exp that adds up": lses.sum(dim=0),
        "the largest lse was taken for the sum": lses.amax(dim=0),
        "the mean of the lse: denominators add, they are not averaged": lses.mean(dim=0),
        "only the first two parts were merged": first_two,
    }
    wrong_out = {
        "the plain mean of the parts: each counts by exp(lse), its share of the sum": outs.mean(dim=0),
        "the plain sum of the parts: their weights must add up to 1": outs.sum(dim=0),
        "weighted by lse itself, not by exp(lse)": (lses[..., None] * outs).sum(dim=0) / lses.sum(dim=0)[:, None],
        BASE_2: (torch.exp2(lses - base_2)[..., None] * outs).sum(dim=0),
        "only the part with the largest lse was kept": outs.gather(
            0, lses.argmax(dim=0)[None, :, None].expand(1, -1, outs.shape[2])
        )[0],
        "only the first two parts were merged": pairs.sum(dim=0),
    }
    if only != "out":
        expect_close(lse, whole_lse, EXACT, "h", cause, wrong_lse)
    if only != "lse":
        expect_close(out, whole_out, EXACT, "h v", cause, wrong_out)


@merge_splits.property("lse")
def merge_splits_lse(solution):
    for case in MERGES:
        cause = "the merged lse is the log of the sum of exp(lse) over the parts"
        _expect_merged(solution, _parts(*case), cause, only="lse")


@merge_splits.property("weights")
def merge_splits_weights(solution):
    for case in MERGES:
        cause = "a part's weight is exp(lse_part - lse), each head its own"
        _expect_merged(solution, _parts(*case), cause, only="out")
    cause = "a part of little weight still counts: float64 holds the difference"
    _expect_merged(solution, _parts(5, 3, 4, (5, 9, 2), (0.0, -13.0, -19.0)), cause, only="out")
    outs, lses, *right = _parts(6, 3, 4, (5, 9, 2))
    _expect_merged(solution, (spread(outs), spread(lses), *right), "strides: the parts may be views of larger tensors")


@merge_splits.property("large lse")
def merge_splits_large_lse(solution):
    heads = torch.tensor([[1000.0], [0.0], [-1000.0]], dtype=torch.float64)
    for shift in (1000.0, -1000.0, heads, (heads, 0.0, -heads)):  # the last one: another shift in each part
        for seed, sizes in ((6, (5, 9, 2)), (7, (1, 30))):
            cause = "exp(lse) overflows or vanishes: subtract each head's largest lse first"
            _expect_merged(solution, _parts(seed, 3, 4, sizes, shift), cause)


@merge_splits.property("empty part")
def merge_splits_empty_part(solution):
    for empty in ([(0, 0)], [(2, 1), (1, 1)], [(1, head) for head in range(3)]):
        outs, lses, *whole = _parts(8, 3, 4, (5, 9, 2), empty=empty)
        for garbage in (torch.nan, torch.inf):
            cause = (
                f"a part without keys has lse -inf and nobody wrote its out ({garbage} here): 0 · {garbage} is NaN, "
            )
            outs = torch.where((lses == -torch.inf)[..., None], garbage, outs)
            _expect_merged(solution, (outs, lses, *whole), cause + "so replace it, whatever it is")


@merge_splits.property("all empty")
def merge_splits_all_empty(solution):
    for heads, sizes in (((1,), (5, 9, 2)), ((0, 1, 2), (5, 9, 2)), ((0, 2), (7,))):
        empty = [(part, head) for part in range(len(sizes)) for head in heads]
        cause = "where no part saw a key the result is 0 and -inf: -inf minus -inf is NaN, so subtract 0 there"
        _expect_merged(solution, _parts(9, 3, 4, sizes, empty=empty), cause)
