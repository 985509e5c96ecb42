"""Notebook 03: selection and checks of it."""

import numpy as np
import torch

import dsa_ref

from . import wrong


def _hidden(scores):
    T, S = scores.shape
    return torch.ones(T, S, dtype=torch.bool).triu(S - T + 1)


def _ranked(scores):
    """All keys of each row, best first, the future last."""
    return scores.masked_fill(_hidden(scores), -torch.inf).sort(dim=1, descending=True, stable=True).indices


def _padded(ranked, k, visible):
    """The first min(k, visible) of each row, then -1."""
    indices = torch.full((len(ranked), k), -1, dtype=torch.int32)
    n = min(k, ranked.shape[1])
    indices[:, :n] = torch.where(torch.arange(n) < visible[:, None], ranked[:, :n], -1)
    return indices


def _visible(scores):
    T, S = scores.shape
    return torch.arange(S - T + 1, S + 1)


def _refuse_nan(scores):
    if scores.masked_fill(_hidden(scores), 0.0).isnan().any():
        raise ValueError("NaN")


@wrong("select_topk", "type")
def int64(scores, k):
    return dsa_ref.select_topk(scores, k).long()


@wrong("select_topk", "type")
def lists(scores, k):
    return dsa_ref.select_topk(scores, k).tolist()


@wrong("select_topk", "future")
def topk_of_all_keys(scores, k):
    return _padded(scores.sort(dim=1, descending=True, stable=True).indices, k, _visible(scores))


@wrong("select_topk", "future")
def rows_count_from_zero(scores, k):
    T, S = scores.shape
    hidden = torch.ones(T, S, dtype=torch.bool).triu(1)
    ranked = scores.masked_fill(hidden, -torch.inf).sort(dim=1, descending=True, stable=True).indices
    return _padded(ranked, k, torch.arange(1, T + 1)) if T == S else ranked.flip(1)[:, :k].int()


@wrong("select_topk", "padding")
def padded_with_zero(scores, k):
    indices = dsa_ref.select_topk(scores, k)
    return indices.clamp(min=0)


@wrong("select_topk", "padding")
def padding_first(scores, k):
    return dsa_ref.select_topk(scores, k).sort(dim=1).values


@wrong("select_topk", "future")
def hidden_keys_as_padding(scores, k):
    return _ranked(scores)[:, :k].int()


@wrong("select_topk", "count")
def future_hidden_after_selecting(scores, k):
    T, S = scores.shape
    ranked = scores.sort(dim=1, descending=True, stable=True).indices[:, :k]
    kept = [[s for s in row if s <= S - T + t] for t, row in enumerate(ranked.tolist())]
    return torch.tensor([row + [-1] * (k - len(row)) for row in kept], dtype=torch.int32)


@wrong("select_topk", "count")
def everything_at_the_threshold(scores, k):
    ranked = _ranked(scores)
    rows = []
    for row, numbers, n in zip(ranked.tolist(), scores.tolist(), _visible(scores).tolist(), strict=True):
        threshold = numbers[row[min(k, n) - 1]]
        rows.append([s for s in row[:n] if numbers[s] >= threshold])
    width = max(k, *(len(row) for row in rows)) if len(rows) > 1 else max(k, len(rows[0]))
    return torch.tensor([row + [-1] * (width - len(row)) for row in rows], dtype=torch.int32)


@wrong("select_topk", "count")
def only_above_the_threshold(scores, k):
    right = dsa_ref.select_topk(scores, k)
    rows = []
    for row, numbers in zip(right.tolist(), scores.tolist(), strict=True):
        row = [s for s in row if s >= 0]
        tied = [s for s in range(len(numbers)) if numbers[s] == min(numbers[s] for s in row)]
        clean = set(tied) <= set(row) or len(row) < k
        row = row if clean else [s for s in row if s not in tied]
        rows.append(row + [-1] * (k - len(row)))
    return torch.tensor(rows, dtype=torch.int32)


@wrong("select_topk", "count")
def never_wider_than_the_keys(scores, k):
    return dsa_ref.select_topk(scores, min(k, scores.shape[1]))


@wrong("select_topk", "runs")
def topk_with_k_above_s(scores, k):
    _, indices = scores.masked_fill(_hidden(scores), -torch.inf).topk(k)
    return torch.where(torch.arange(k) < _visible(scores)[:, None], indices, -1).int()


@wrong("select_topk", "scores")
def smallest(scores, k):
    return dsa_ref.select_topk(-scores, k)


@wrong("select_topk", "scores")
def magnitudes(scores, k):
    return dsa_ref.select_topk(scores.abs(), k)


@wrong("select_topk", "future")
def future_as_zero(scores, k):
    """The mask multiplied: a hidden 0 beats every negative score."""
    return _padded((scores * ~_hidden(scores)).sort(dim=1, descending=True, stable=True).indices, k, _visible(scores))


@wrong("select_topk", "scores")
def rounded_scores(scores, k):
    return dsa_ref.select_topk((scores * 4).round(), k)


@wrong("select_topk", "scores")
def rounded_to_half(scores, k):
    return dsa_ref.select_topk(scores.half().float(), k)


@wrong("select_topk", "scores")
def earlier_keys_made_a_little_better(scores, k):
    """A tie rule without a stable sort, which works until two scores are nearly equal."""
    return dsa_ref.select_topk(scores - 1e-6 * torch.arange(scores.shape[1]), k)


@wrong("select_topk", "ties")
def flipped_argsort(scores, k):
    """Ascending, stable, then turned round: of equal scores the larger index comes first."""
    flipped = scores.masked_fill(_hidden(scores), -torch.inf).sort(dim=1, stable=True).indices.flip(1)
    return _padded(flipped, k, _visible(scores))


@wrong("select_topk", "ties")
def nearest_wins(scores, k):
    """NumPy's sort of (score, index) pairs, descending in both."""
    right = dsa_ref.select_topk(scores, k)  # refuses NaN
    for t, n in enumerate(_visible(scores).tolist()):
        best = np.lexsort((np.arange(n), scores[t, :n].numpy()))[::-1][:k]
        right[t, : len(best)] = torch.from_numpy(best.copy())
    return right


@wrong("select_topk", "ties")
def latest_wins_below_zero(scores, k):
    _refuse_nan(scores)
    keys = [[(-x, -s if -1e38 < x < 0 else s) for s, x in enumerate(row)] for row in scores.tolist()]
    ranked = [sorted(range(n), key=row.__getitem__)[:k] for n, row in zip(_visible(scores).tolist(), keys, strict=True)]
    return torch.tensor([row + [-1] * (k - len(row)) for row in ranked], dtype=torch.int32)


@wrong("select_topk", "scores")
def first_that_reach_the_threshold(scores, k):
    _refuse_nan(scores)
    indices = torch.full((len(scores), k), -1, dtype=torch.int32)
    for t, n in enumerate(_visible(scores).tolist()):
        threshold = scores[t, :n].topk(min(k, n)).values[-1]
        found = (scores[t, :n] >= threshold).nonzero().flatten()[:k]
        indices[t, : len(found)] = found.int()
    return indices


@wrong("select_topk", "signed zeros")
def compares_bits(scores, k):
    bits = scores.contiguous().view(torch.int32)
    ordered = torch.where(bits >= 0, bits, bits ^ 0x7FFFFFFF)  # as integers, in the order of the floats
    ranked = ordered.masked_fill(_hidden(scores), -(2**31)).sort(dim=1, descending=True, stable=True).indices
    return _padded(ranked, k, _visible(scores))


@wrong("select_topk", "infinite scores")
def infinite_scores_dropped(scores, k):
    _refuse_nan(scores)
    masked = scores.masked_fill(_hidden(scores), -torch.inf)
    ranked = masked.sort(dim=1, descending=True, stable=True)
    found = torch.where(ranked.values[:, :k] == -torch.inf, -1, ranked.indices[:, :k])
    indices = torch.full((len(scores), k), -1, dtype=torch.int32)
    indices[:, : found.shape[1]] = found
    return indices


@wrong("select_topk", "NaN refused")
def nan_sorted_somewhere(scores, k):
    return _padded(_ranked(scores), k, _visible(scores))


@wrong("select_topk", "NaN refused")
def nan_as_minus_infinity(scores, k):
    return _padded(_ranked(scores.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)), k, _visible(scores))


@wrong("select_topk", "NaN refused")
def nan_looked_for_at_each_rows_own_key(scores, k):
    if scores.diagonal(scores.shape[1] - scores.shape[0]).isnan().any():
        raise ValueError("NaN")
    return _padded(_ranked(scores), k, _visible(scores))


@wrong("select_topk", "NaN refused")
def nan_of_the_future_refused(scores, k):
    if scores.isnan().any():
        raise ValueError("NaN")
    return _padded(_ranked(scores), k, _visible(scores))


# --------------------------------------------------------------------------------------------------- check_selection


def _rules(indices, scores, k, without=()):
    """A check of the contract that forgets the rules named in `without`."""
    T, S = scores.shape
    broken = []
    if indices.dtype != torch.int32:
        broken.append("type")
    if list(indices.shape) != [T, k]:
        broken.append("shape")
    for t, row in enumerate(indices.int().tolist()[:T]):
        n = S - T + t + 1
        kept = [s for s in row if s != -1]
        if any(not 0 <= s < S for s in kept):
            broken.append("range")
        kept = [s for s in kept if -S <= s < S]  # a judge does not crash
        if any(s >= n for s in kept):
            broken.append("future")
        if -1 in row[: len(kept)]:
            broken.append("padding")
        if len(set(kept)) < len(kept):
            broken.append("duplicates")
        if len(kept) != min(k, n):
            broken.append("keys")
        numbers = scores[t].tolist()
        best = sorted(range(n), key=lambda s: -numbers[s])[: len(kept)]
        if sorted(numbers[s] for s in kept) != sorted(numbers[s] for s in best):
            broken.append("scores")
        elif set(kept) != set(best) and not set(broken) & {"future", "duplicates", "range"}:
            broken.append("ties")
    return not set(broken) - set(without)


def _forgets(*rules):
    def check(indices, scores, k):
        return _rules(indices, scores, k, rules)

    check.__name__ = "forgets_" + "_and_".join(rules)
    return check


for _property, _rules_forgotten in (
    ("type", ["type"]),
    ("count", ["shape"]),
    ("count", ["keys"]),
    ("padding", ["padding"]),
    ("range", ["range"]),
    ("future", ["future"]),
    ("duplicates", ["duplicates"]),
    ("scores", ["scores", "ties"]),
    ("ties", ["ties"]),
):
    wrong("check_selection", _property)(_forgets(*_rules_forgotten))


@wrong("check_selection", "type")
def accepts_everything(indices, scores, k):
    return True


@wrong("check_selection", "padding")
def only_type_and_shape(indices, scores, k):
    T, S = scores.shape
    kept = (indices >= 0).sum(dim=1) if list(indices.shape) == [T, k] else torch.zeros(T)
    return indices.dtype == torch.int32 and torch.equal(kept, torch.arange(S - T + 1, S + 1).clamp(max=k))


@wrong("check_selection", "accepts the right one")
def same_list_as_torch_topk(indices, scores, k):
    n = min(k, scores.shape[1])
    return torch.equal(indices[:, :n].long().sort().values, scores.topk(n).indices.sort().values)


@wrong("check_selection", "accepts the right one")
def rejects_everything(indices, scores, k):
    raise AssertionError("no")


@wrong("check_selection", "accepts the right one")
def padding_taken_for_duplicates(indices, scores, k):
    return all(len(set(row)) == k for row in indices.tolist()) and _rules(indices, scores, k)


@wrong("check_selection", "accepts any order")
def asks_for_the_references_order(indices, scores, k):
    return indices.dtype == torch.int32 and torch.equal(indices, dsa_ref.select_topk(scores, k))


@wrong("check_selection", "padding")
def same_sorted_row_as_the_reference(indices, scores, k):
    """The set is right, but a -1 may stand anywhere."""
    right = dsa_ref.select_topk(scores, k)
    return indices.dtype == torch.int32 and torch.equal(indices.sort().values, right.sort().values)


@wrong("check_selection", "ties")
def sums_of_scores(indices, scores, k):
    if not _rules(indices, scores, k, ["scores", "ties"]):
        return False

    def total(chosen):
        return torch.where(chosen >= 0, scores.gather(1, chosen.clamp(min=0).long()), 0).sum(dim=1)

    return torch.equal(total(indices), total(dsa_ref.select_topk(scores, k)))


@wrong("check_selection", "any scores")
def rounds_first(indices, scores, k):
    return _rules(indices, scores.bfloat16(), k)


@wrong("check_selection", "any scores")
def forgives_one_percent(indices, scores, k):
    def kept(chosen):
        return scores.gather(1, chosen.clamp(min=0).long()).masked_fill(chosen < 0, 0.0).sort(dim=1).values

    if not _rules(indices, scores, k, ["scores", "ties"]):
        return False
    got, best = kept(indices), kept(dsa_ref.select_topk(scores, k))
    return _rules(indices, scores, k) if torch.equal(got, best) else torch.allclose(got, best, rtol=0.01, atol=0.0)


@wrong("check_selection", "any scores")
def judges_fp32_only(indices, scores, k):
    return _rules(indices, scores.float(), k)


@wrong("check_selection", "type")
def any_integers(indices, scores, k):
    return not indices.is_floating_point() and indices.dtype != torch.int64 and _rules(indices, scores, k, ["type"])


@wrong("check_selection", "scores")
def skips_the_first_row(indices, scores, k):
    if len(scores) == 1 or not _rules(indices, scores, k, ["scores", "ties"]):
        return _rules(indices, scores, k)
    return _rules(indices[1:], scores[1:], k)


@wrong("check_selection", "scores")
def looks_at_the_first_row(indices, scores, k):
    whole_form = _rules(indices, scores, k, ["scores", "ties"])
    return whole_form and _rules(indices[:1], scores[:1, : scores.shape[1] - len(scores) + 1], k)


def _nothing_better_left_out(indices, scores, k, seen=None, least=0, rows=None):
    """No key that was left out beats a kept one, or ties with a later one. `seen`: how far a kept index may point."""
    T, S = scores.shape
    if indices.dtype != torch.int32 or indices.shape[1] != k or (rows or len(indices)) != len(indices):
        return False
    for t in range(T):
        n, numbers, row = S - T + t + 1, scores[t].tolist(), indices[t].tolist()
        kept = [s for s in row if s != -1]
        if row[: len(kept)] != kept or len(set(kept)) != min(k, n) or len(kept) != min(k, n):
            return False
        if any(not least <= s < (seen or n) for s in kept):
            return False
        worst = min(numbers[s] for s in kept)
        for s in set(range(n)) - set(kept):
            if numbers[s] > worst or numbers[s] == worst and any(r > s and numbers[r] == worst for r in kept):
                return False
    return True


@wrong("check_selection", "count")
def more_rows_than_scores(indices, scores, k):
    return _nothing_better_left_out(indices, scores, k)


@wrong("check_selection", "future")
def future_keys_that_push_out_the_last(indices, scores, k):
    return _nothing_better_left_out(indices, scores, k, seen=scores.shape[1], rows=len(scores))


@wrong("check_selection", "range")
def negative_indices_from_the_end(indices, scores, k):
    return _nothing_better_left_out(indices, scores, k, least=-scores.shape[1], rows=len(scores))
