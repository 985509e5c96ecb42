"""Is a result right? Judged before anything is timed, by the reference on the same inputs.

A check returns a note for the table (often empty) and raises `Wrong`, with what is wrong, else. Scores and attention
are checked on rows spread evenly over the queries, against fp32; a selection from given scores on all rows, exactly.
"""

import torch

import dsa_kernels
import dsa_ref
from dsa_ref.testing import Failed, compare_selection

ROWS = 16  # checked by the slow reference
SEQUENCES = 4  # in a decode step, all their queries
SCORE_ERROR = 1e-3  # of the row's largest score; FP8 tensor cores add with fewer bits than fp32 has
OUT_ERROR = 5e-3  # ||out - fp32|| / ||fp32|| of a query: bf16 probabilities and bf16 output
LSE_ERROR = 1e-3
LOG2_E = 1.4426950408889634
PAIRS_AT_ONCE = 1 << 28


class Wrong(Exception):
    """A result that is not what the step promises; the text says in what."""


def sampled_rows(T, device, count=ROWS):
    """Indices of at most `count` rows, evenly spread, the first and the last among them."""
    return torch.linspace(0, T - 1, min(T, count), device=device).round().long()


def _at(x, rows):
    """x[rows], for e4m3 too, which not every torch indexes on a GPU."""
    return x.view(torch.uint8)[rows].view(x.dtype)


def check_scores(scores, inputs, start, end, cleaned):
    """Index scores [T, S] against `dsa_ref.index_scores` on sampled rows, to SCORE_ERROR of the row's largest.

    inputs: (q_idx, k_idx, w, k_scale). cleaned: whether the places outside of start and end must hold -inf.
    """
    q_idx, k_idx, w, k_scale = inputs
    T, S = q_idx.shape[0], k_idx.shape[0]
    rows = sampled_rows(T, q_idx.device)
    want = dsa_ref.index_scores(_at(q_idx, rows), k_idx, w[rows], k_scale, start[rows], end[rows])
    got = scores[rows]
    keys = torch.arange(S, device=got.device)
    visible = (keys >= start[rows, None]) & (keys < end[rows, None])
    return _check_score_rows(scores, got, want, visible, cleaned)


def _check_score_rows(scores, got, want, visible, cleaned):
    """`got`, some rows of all the scores, against `want`, where `visible` holds; cleaned: -inf elsewhere, no NaN."""
    if cleaned and not (got[~visible] == -torch.inf).all():
        raise Wrong("an invisible key has a score above -inf")
    if cleaned and any(bool(part.isnan().any()) for part in scores.split(max(1, PAIRS_AT_ONCE // scores.shape[1]))):
        raise Wrong("NaN: a score was never written")
    error = torch.where(visible, got - want, 0.0).abs().amax(dim=1) / want.masked_fill(~visible, 0.0).abs().amax(dim=1)
    if not (error <= SCORE_ERROR).all():
        raise Wrong(f"score error {error.nan_to_num(torch.inf).max():.1e} of the row's largest")
    return ""


def check_selection(indices, scores, expected, ties=True):
    """A selection [T, k] against `expected`, the reference's from the same scores [T, S], on all rows.

    ties: also the choice among equal scores must be the contract's; without it the selected scores alone are compared.
    """
    got = _ordered(indices, scores.shape[1])
    want = _ordered(expected, scores.shape[1])
    if ties:
        right = (got == want).all(dim=1)
    else:
        distinct = ((got[:, 1:] > got[:, :-1]) | (got[:, 1:] == scores.shape[1])).all(dim=1)
        right = distinct & (_selected(scores, got) == _selected(scores, want)).all(dim=1)
    if right.all():
        return ""
    rows = sampled_rows(len(got), got.device, 64)
    share = shared_keys(got[rows], want[rows], scores.shape[1])
    raise Wrong(f"{_percent(right.float().mean().item())} of rows right, {_percent(share)} of keys")


def _ordered(indices, S):
    """indices as int64, ascending, with S in the place of -1 and whatever else is no key."""
    wide = indices.long()
    return wide.masked_fill((wide < 0) | (wide >= S), S).sort(dim=1).values


def _selected(scores, ordered):
    """The scores at `ordered` indices, descending; -inf where there is no key."""
    S = scores.shape[1]
    return scores.gather(1, ordered.clamp(max=S - 1)).masked_fill(ordered == S, -torch.inf).sort(dim=1).values


def shared_keys(got, want, S):
    """The share of the keys in `want` [T, k] that `got` holds too, both as `_ordered` makes them."""
    held = torch.zeros(len(got), S + 1, dtype=torch.bool, device=got.device).scatter_(1, got, True)
    there = want < S
    return (held.gather(1, want) & there).sum().item() / there.sum().item()


def check_lightning(indices, inputs, start, end, own):
    """A selection made with the scores' own rounding: right to within SCORE_ERROR of each sampled row's largest score.

    own: all rows must also be the reference's selection from `dsa_kernels.index_scores`, whose kernels all round alike.
    """
    q_idx, k_idx, w, k_scale = inputs
    rows = sampled_rows(q_idx.shape[0], q_idx.device)
    want = dsa_ref.index_scores(_at(q_idx, rows), k_idx, w[rows], k_scale, start[rows], end[rows])
    try:
        compare_selection(indices[rows], want, indices.shape[1], start[rows], end[rows], tolerance=SCORE_ERROR)
    except Failed as failure:
        raise Wrong(str(failure)) from failure
    if not own:
        return ""
    same = 0
    for part in torch.arange(len(indices)).split(max(1, PAIRS_AT_ONCE // k_idx.shape[0])):
        part = slice(int(part[0]), int(part[-1]) + 1)
        scores = dsa_kernels.index_scores(q_idx[part], k_idx, w[part], k_scale, start[part], end[part])
        expected = dsa_ref.select_topk(scores, indices.shape[1], start[part], end[part])
        same += int((_ordered(indices[part], scores.shape[1]) == _ordered(expected, scores.shape[1])).all(dim=1).sum())
    if same < len(indices):
        raise Wrong(f"{_percent(same / len(indices))} of rows as from index_scores")
    return ""


def check_attention(result, q, kv, indices, scale, v_dim):
    """(out, lse) against `dsa_ref.sparse_attention` in fp32 on sampled queries; the note says if lse is in base 2."""
    out, lse = result
    H = q.shape[1]
    if not out[:, :H].isfinite().all():
        raise Wrong("out is not finite")
    rows = sampled_rows(len(q), q.device)
    want, want_lse = dsa_ref.sparse_attention(q[rows].float(), kv.float(), indices[rows], scale, v_dim)
    _check_error(out[rows, :H].float(), want)
    return _lse_note(lse[rows, :H], want_lse)


def _lse_note(got_lse, want_lse):
    """Nothing where the log-sum-exps agree, a note where they do in base 2."""
    if (got_lse - want_lse).abs().max() <= LSE_ERROR:
        return ""
    if (got_lse - want_lse * LOG2_E).abs().max() <= LSE_ERROR * LOG2_E:
        return "lse in base 2"
    raise Wrong(f"lse off by {(got_lse - want_lse).abs().max():.1e}")


def check_dense(out, q, k, v, scale):
    """Causal MHA-mode attention out [H, T, V] against fp32 torch on sampled queries of the first and last head."""
    rows = sampled_rows(q.shape[1], q.device)
    for head in (0, -1):
        logits = q[head, rows].float() @ k[head].float().t() * scale
        future = torch.arange(k.shape[1], device=q.device) > rows[:, None]
        want = logits.masked_fill(future, -torch.inf).softmax(dim=-1) @ v[head].float()
        _check_error(out[head, rows].float(), want)
    return ""


def _check_error(got, want):
    """Raise unless each query's error, in the norm over all else, is at most OUT_ERROR."""
    error = row_errors(got, want)
    if not (error <= OUT_ERROR).all():
        raise Wrong(f"relative error {error.nan_to_num(torch.inf).max():.1e}")


def row_errors(got, want):
    """||got - want|| / ||want|| of each row, over all other dims."""
    return (got - want).flatten(1).norm(dim=1) / want.flatten(1).norm(dim=1)


def _percent(share) -> str:
    """A share as per cent, rounded so that only 1 is 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.99):.4g} %"


def check_paged_scores(scores, given, cleaned):
    """A decode step's scores [B · N, at least S] as `check_scores`, on all queries of sampled sequences.

    given: (q_idx, index_pages, w, page_table, lengths), as `dsa_ref.paged_index_scores` takes them.
    """
    q_idx, index_pages, w, table, lengths = given
    B, N = q_idx.shape[:2]
    some = sampled_rows(B, q_idx.device, SEQUENCES)
    want = dsa_ref.paged_index_scores(_at(q_idx, some), index_pages, w[some], table[some], lengths[some]).flatten(0, 1)
    got = scores[:, : want.shape[1]].unflatten(0, (B, N))[some].flatten(0, 1)
    visible = torch.arange(want.shape[1], device=got.device) < seen(lengths, N)[some].flatten()[:, None]
    return _check_score_rows(scores, got, want, visible, cleaned)


def seen(lengths, N):
    """How many positions each query sees: int32 [B, N]."""
    return (lengths[:, None] + torch.arange(1 - N, 1, dtype=torch.int32, device=lengths.device)).clamp(min=0)


def check_paged_selection(positions, slots, given, page, own):
    """A decode step's selection, int32 [B, N, k], by positions, slots or both (one may be None), as `check_lightning`.

    own: all rows must also be the reference's selection from `dsa_kernels.paged_index_scores`.
    """
    q_idx, index_pages, w, table, lengths = given
    B, N = q_idx.shape[:2]
    if slots is not None:
        found = positions_at(slots, table, len(index_pages), page)
        if positions is not None and not torch.equal(found, positions.long()):
            raise Wrong(f"{_percent((found == positions).float().mean().item())} of slots are those of the positions")
        positions = found.to(torch.int32)
    k = positions.shape[2]
    some = sampled_rows(B, q_idx.device, SEQUENCES)
    want = dsa_ref.paged_index_scores(_at(q_idx, some), index_pages, w[some], table[some], lengths[some]).flatten(0, 1)
    end = seen(lengths, N)
    last = end[some].flatten()
    try:
        compare_selection(positions[some].flatten(0, 1), want, k, torch.zeros_like(last), last, tolerance=SCORE_ERROR)
    except Failed as failure:
        raise Wrong(str(failure)) from failure
    if not own:
        return ""
    same, last = 0, end.flatten()
    scores = dsa_kernels.paged_index_scores(*given).flatten(0, 1)
    for part in torch.arange(B * N).split(max(1, PAIRS_AT_ONCE // scores.shape[1])):
        part = slice(int(part[0]), int(part[-1]) + 1)
        expected = dsa_ref.select_topk(scores[part], k, torch.zeros_like(last[part]), last[part])
        got, want = (_ordered(x, scores.shape[1]) for x in (positions.flatten(0, 1)[part], expected))
        same += int((got == want).all(dim=1).sum())
    if same < B * N:
        raise Wrong(f"{_percent(same / (B * N))} of rows as from paged_index_scores")
    return ""


def positions_at(slots, table, pages, page):
    """The positions int64 [B, N, k] at slots of each sequence's own pages; -1 where there is no slot.

    A slot of another sequence, or of none, gives a position behind the last page.
    """
    B, P = table.shape
    place = torch.full((B, pages), P, dtype=torch.int64, device=table.device)
    place.scatter_(1, table.long(), torch.arange(P, device=table.device).expand(B, P))
    wide = slots.long()
    inside = (wide >= 0) & (wide < pages * page)
    held = torch.where(inside, wide, 0).flatten(1)
    found = (place.gather(1, held // page) * page + held % page).view_as(wide)
    return torch.where(inside, found, torch.where(wide == -1, -1, P * page))


def check_paged_attention(result, q, kv_pages, slots, scale, v_dim):
    """(out, lse) of a decode step as `check_attention`, against fp32 on the rows that the slots name."""
    out, lse = result
    B, N, H, _ = q.shape
    if not out[:, :, :H].isfinite().all():
        raise Wrong("out is not finite")
    flat_out, flat_lse, flat_q, flat_slots = (x.flatten(0, 1) for x in (out[:, :, :H], lse[:, :, :H], q, slots))
    rows = sampled_rows(B * N, q.device)
    wanted = [_attended(flat_q[row], kv_pages, flat_slots[row], scale, v_dim) for row in rows.tolist()]
    want, want_lse = (torch.stack(parts) for parts in zip(*wanted, strict=True))
    _check_error(flat_out[rows].float(), want)
    return _lse_note(flat_lse[rows], want_lse)


def _attended(q, kv_pages, slots, scale, v_dim):
    """(out [H, v_dim], lse [H]) of one query [H, D] in fp32, by the reference's attention without pages."""
    taken = kv_pages.flatten(0, 1)[slots[slots >= 0].long()]
    kv = dsa_ref.unpack_kv(taken, v_dim) if taken.dtype == torch.uint8 else taken.float()
    every = torch.arange(len(kv), dtype=torch.int32, device=q.device)[None]
    out, lse = dsa_ref.sparse_attention(q[None].float(), kv, every, scale, v_dim)
    return out[0], lse[0]
