"""Makers of test inputs, and the plain float64 oracles that more than one file needs.

`small_integers` is the useful trick: sums of small whole numbers are exact in fp32 in any order, and even in FP8, so
every rung has to agree to the bit, and ties are everywhere.
"""

import numpy as np
import torch

E4M3 = torch.float8_e4m3fn


def normal(*shape, seed=0, dtype=torch.float32, device="cpu"):
    values = torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float32)
    return values.to(device=device, dtype=dtype)


def small_integers(*shape, seed=0, dtype=torch.float32, device="cpu", largest=3):
    values = torch.randint(-largest, largest + 1, shape, generator=torch.Generator().manual_seed(seed))
    return values.to(torch.float32).to(device=device, dtype=dtype)


def index_inputs(make, T, S, Hi, Di, seed=0, dtype=torch.float32, device="cpu"):
    """q_idx, k_idx, w, k_scale from `normal` or `small_integers`; scales are powers of two."""
    q_idx = make(T, Hi, Di, seed=seed, dtype=dtype, device=device)
    k_idx = make(S, Di, seed=seed + 1, dtype=dtype, device=device)
    w = make(T, Hi, seed=seed + 2, device=device)
    return q_idx, k_idx, w, torch.exp2(small_integers(S, seed=seed + 3, device=device))


def causal(T, S, device="cpu"):
    """What the default range means, written out."""
    end = [S - T + t + 1 for t in range(T)]
    return torch.zeros(T, dtype=torch.int32, device=device), torch.tensor(end, dtype=torch.int32, device=device)


def packed(*lengths, device="cpu"):
    """Ranges and positions of packed sequences, each causal in itself: start, end, positions."""
    first = np.cumsum((0, *lengths))[:-1]
    start = torch.tensor(np.repeat(first, lengths), dtype=torch.int32, device=device)
    end = torch.arange(1, sum(lengths) + 1, dtype=torch.int32, device=device)
    return start, end, end - 1 - start


def ragged(T, S, seed=0, device="cpu"):
    """Random ranges of all lengths, every third empty, and not in any order; T and S are free of each other."""
    rng = np.random.default_rng(seed)
    bounds = np.sort(rng.integers(0, S + 1, (T, 2)), axis=1)
    bounds[::3, 1] = bounds[::3, 0]
    return tuple(torch.tensor(bounds[:, i], dtype=torch.int32, device=device) for i in (0, 1))


def strided(x):
    """The same values, every other element of a tensor whose rest is 0xff bytes: NaN, or -1."""
    values = x.unsqueeze(-1).contiguous().view(torch.uint8)
    wide = torch.cat((values, torch.full_like(values, 0xFF)), dim=-1)
    return wide.view(x.dtype)[..., 0]


def exact_scores(q_idx, k_idx, w, k_scale=None, start=None, end=None):
    """Equation 1 in float64 at once, -inf outside the ranges; a float64 array [T, S]."""
    q_idx, k_idx, w = (x.detach().cpu().double() for x in (q_idx, k_idx, w))
    scores = (torch.einsum("thd,sd->ths", q_idx, k_idx).relu() * w[..., None]).sum(dim=1)
    if k_scale is not None:
        scores = scores * k_scale.cpu().double()
    return scores.masked_fill(~in_range(*scores.shape, start, end), -torch.inf).numpy()


FP8_SUMS = 2**-11  # what FP8 tensor cores lose of the magnitudes that go into a score


def assert_scores_close(got, wanted, room, tolerance):
    """|got - wanted| <= tolerance · room. room: the same scores of magnitudes, [T, S], `exact_scores` of |q|, |k|, |w|.

    An error is in proportion to what goes into a score, and not to the score, which may cancel.
    """
    got, wanted, room = (torch.as_tensor(x).detach().cpu().double() for x in (got, wanted, room))
    assert got.shape == wanted.shape and torch.equal(got == -torch.inf, wanted == -torch.inf)
    seen = wanted > -torch.inf
    error = ((got - wanted).abs() / room.clamp(min=1e-300))[seen]
    assert error.numel() == 0 or float(error.max()) <= tolerance, f"off by {float(error.max()):.2g} of the magnitudes"


def in_range(T, S, start=None, end=None):
    """Boolean [T, S] on the CPU: may query t look at key s?"""
    default_start, default_end = causal(T, S)
    start = default_start if start is None else start.cpu()
    end = default_end if end is None else end.cpu()
    s = torch.arange(S)
    return (s >= start[:, None]) & (s < end[:, None])


def best(scores, k, start=None, end=None):
    """The contract's answer as a list of sorted index lists: a stable sort of each row's range of an array [T, S]."""
    T, S = scores.shape
    default_start, default_end = causal(T, S)
    start = (default_start if start is None else start).tolist()
    end = (default_end if end is None else end).tolist()
    chosen = (
        a + np.argsort(-scores[t, a:b], kind="stable")[:k] for t, (a, b) in enumerate(zip(start, end, strict=True))
    )
    return [sorted(row.tolist()) for row in chosen]


def selected(indices):
    """The same form from what a selector returned, after checking the shape of each row: indices first, then -1."""
    assert indices.dtype == torch.int32
    rows = []
    for row in indices.tolist():
        count = sum(s != -1 for s in row)
        assert all(s >= 0 for s in row[:count]) and all(s == -1 for s in row[count:]), f"-1 must come last: {row}"
        rows.append(sorted(row[:count]))
    return rows


def random_indices(T, S, k, seed=0, device="cpu"):
    """int32 [T, k]: up to k distinct rows in any order, -1 anywhere between them, and row 0 with nothing if T > 1."""
    rng = np.random.default_rng(seed)
    indices = np.full((T, k), -1, dtype=np.int32)
    for t in range(1 if T > 1 else 0, T):
        count = int(rng.integers(1, min(k, S) + 1))
        indices[t, rng.permutation(k)[:count]] = rng.permutation(S)[:count]
    return torch.tensor(indices, device=device)


def assert_close(got, wanted, tolerance):
    """|got - wanted| <= tolerance · max(1, largest finite |wanted|) everywhere; infinities match, NaN never does."""
    got, wanted = (torch.as_tensor(x).detach().cpu().double() for x in (got, wanted))
    finite = wanted[wanted.isfinite()].abs()
    scale = max(1.0, float(finite.max())) if finite.numel() else 1.0
    torch.testing.assert_close(got, wanted, rtol=0.0, atol=tolerance * scale)


def from_byte(offset, pages):
    """The same bytes in a tensor that begins `offset` bytes behind a boundary."""
    pool = torch.empty(pages.numel() + offset, dtype=torch.uint8, device=pages.device)
    return pool[offset:].view(pages.shape).copy_(pages)


def assert_same_bits(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    got, wanted = (x.cpu().contiguous().reshape(-1) for x in (got, wanted))
    assert got.numel() == 0 or torch.equal(got.view(torch.uint8), wanted.view(torch.uint8))


def page_tables(lengths, page_size, spare=3, width=None, seed=0, device="cpu"):
    """Random pages for sequences of these lengths: (page_table int32 [B, P], lengths int32 [B], pages in the pool).

    P is one page more than the longest needs, or `width`; what a sequence does not use of its row is -1.
    """
    counts = [-(-length // page_size) for length in lengths]
    table = np.full((len(counts), width or max(counts) + 1), -1, dtype=np.int32)
    pages = sum(counts) + spare
    order = np.random.default_rng(seed).permutation(pages)
    for row, count in zip(table, counts, strict=True):
        row[:count], order = order[:count], order[count:]
    return torch.tensor(table, device=device), torch.tensor(lengths, dtype=torch.int32, device=device), pages


def slots_in(page_table, b, positions, page_size):
    """Physical slots of one sequence's positions, int64, -1 where the position is -1."""
    positions = positions.long()
    pages = page_table[b].long()[positions.clamp(min=0) // page_size]
    return (pages * page_size + positions.clamp(min=0) % page_size).masked_fill(positions < 0, -1)


def seen_by(lengths, N):
    """How many positions query n of sequence b sees, nested lists [B][N]."""
    return [[max(0, int(length) - N + 1 + n) for n in range(N)] for length in lengths]


def paged_contents(cache):
    """What all sequences of a PagedCache hold, and what the table says."""
    table = cache.table
    used = [sequence for sequence in range(table.sequences) if table._pages[sequence] is not None]
    rows = [part.view(torch.uint8).tolist() for sequence in used for part in cache.rows(sequence) if part is not None]
    return rows, table.lengths.tolist(), [table.length(sequence) for sequence in used], list(cache.filled)
