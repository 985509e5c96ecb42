"""`dsa_kernels.paged_select`, and below it `topk.decode`: exact with luck and without it, in ascending order."""

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import assert_same_bits, best, normal, small_integers
from test_paged_index_scores import cache, oracle, queries

if rungs.has_triton():
    import dsa_kernels
    from dsa_kernels.topk import decode

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

PAGE = 8


def check(scores, lengths, k, N=1, width=None, calls=1):
    """`decode.launch` on rows of scores on any device, against the stable sort: positions, slots, -1, counters."""
    T, S = scores.shape
    device = scores.device
    generator = torch.Generator().manual_seed(S)
    P = -(-S // PAGE)
    table = torch.randperm(T // N * P, generator=generator).to(torch.int32).view(T // N, P)
    ends = [max(0, length - N + 1 + n) for length in lengths for n in range(N)]
    wanted = best(scores.cpu().numpy(), k, torch.zeros(T, dtype=torch.int32), torch.tensor(ends))
    width = width or k
    zeros = torch.zeros(decode.counters(T, S), dtype=torch.int32, device=device)
    for _ in range(calls):
        rows = torch.full((T, decode.row_stride(S)), torch.nan, device=device)
        for t, end in enumerate(ends):
            rows[t, :end] = scores[t, :end]
        positions, slots = (torch.full((T, width), -7, dtype=torch.int32, device=device) for _ in range(2))
        lengths_ = torch.tensor(lengths, dtype=torch.int32, device=device)
        decode.launch(rows, table.to(device), lengths_, N, S, PAGE, min(k, S), positions, slots, zeros)
        assert (zeros == 0).all()
        for t in range(T):
            chosen = positions[t].tolist()
            assert chosen == wanted[t] + [-1] * (width - len(wanted[t])), t
            there = torch.tensor(wanted[t], dtype=torch.long)
            translated = (table[t // N][there // PAGE] * PAGE + there % PAGE).tolist()
            assert slots[t].tolist() == translated + [-1] * (width - len(translated)), t


ROWS = {
    "normal": lambda T, S: normal(T, S, seed=S),
    "many ties": lambda T, S: small_integers(T, S),
    "constant": lambda T, S: torch.full((T, S), -1.5),
    "zeros of both signs": lambda T, S: torch.where(normal(T, S) > 0, 0.0, -0.0),
    "infinities": lambda T, S: (
        normal(T, S)
        .masked_fill(normal(T, S, seed=1) > -2, -torch.inf)
        .masked_fill(normal(T, S, seed=2) > 2.5, torch.inf)
    ),
    "rising": lambda T, S: torch.arange(T * S, dtype=torch.float32).reshape(T, S),
    "falling": lambda T, S: -torch.arange(T * S, dtype=torch.float32).reshape(T, S),
    "clustered": lambda T, S: normal(T, S) + 20.0 * ((torch.arange(S) > S // 3) & (torch.arange(S) < S // 2)),
    "wide": lambda T, S: normal(T, S).sign() * torch.exp2(normal(T, S, seed=3) * 30),
}


@pytest.fixture
def small(monkeypatch):
    """Lists, chunks and tournaments of a few scores, and three programs a row."""

    def shrink(list_=64, flagged=128, chunk=64, programs=3):
        monkeypatch.setattr(decode, "LIST", list_)
        monkeypatch.setattr(decode, "FLAGGED", flagged)
        monkeypatch.setattr(decode, "shape_of", lambda T, S, multiprocessors: (chunk, 4, programs))
        monkeypatch.setattr(decode, "multiprocessors", lambda tensor: programs)

    return shrink


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("k", (1, 7, 50))
def test_rows_of_one_chunk(kind, k, device, poisoned):
    check(ROWS[kind](4, 60).to(device), [60, 0, 1, 37], k)


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("k", (3, 16))
def test_rows_of_many_chunks(kind, k, small, device, poisoned):
    """Some rows fit a list, some flag themselves: ties and clusters overflow it."""
    small()
    check(ROWS[kind](4, 400).to(device), [400, 64, 65, 290], k, calls=2)


@pytest.mark.parametrize("k, flagged", [(1, 32), (16, 32), (16, 128), (20, 64)])
@pytest.mark.parametrize("kind", ("normal", "many ties"))
def test_every_row_is_flagged(kind, k, flagged, small, device, poisoned):
    """Lists of eight entries hold no selection: all rows go to the tournament, of two lists at a time or more."""
    small(list_=8, flagged=flagged)
    check(ROWS[kind](3, 330).to(device), [330, 17, 161], k, calls=2)


@pytest.mark.parametrize("misled", ("bound too high", "bound too low"))
def test_a_row_that_defeats_the_sample_is_redone(misled, small, device, poisoned, monkeypatch):
    """All large scores lie where the sample looks, or all where it does not."""
    small(list_=512, flagged=512, chunk=256)
    n, k = 20_000, 100
    place = decode_sample(n)
    scores = normal(1, n)
    scores[0, place[:: 20 if misled == "bound too high" else 1]] += 100.0 if misled == "bound too high" else -100.0
    flags = []
    empty_like, empty = torch.zeros, torch.empty
    monkeypatch.setattr(decode.torch, "empty", lambda *a, **b: flags.append(empty(*a, **b)) or flags[-1])
    check(scores.to(device), [n], k)
    assert empty_like is torch.zeros and any(f.shape == (1,) and int(f[0]) == 1 for f in flags)


def decode_sample(n):
    """Where `_select` looks: `bound.sampled_place` in whole groups of four."""
    M = decode.sample_of(n)
    j = torch.arange(M)
    stretch = j // 4
    shift = (stretch * 2654435761 % 65536) * (n // (M // 4)) // 65536
    return ((stretch * n // (M // 4) + shift) // 4 * 4 + j % 4).clamp(max=n - 1).unique()


@pytest.mark.parametrize("k", (2049, 5000, 8193))
def test_large_k(k, device, poisoned):
    """Above LARGEST_LISTED_K a tournament of all rows, above LARGEST_K `radix`."""
    check(small_integers(2, 20_000).to(device), [20_000, 3000], k)


@pytest.mark.parametrize("N", (2, 3, 4))
def test_query_tokens_see_one_more_each(N, small, device, poisoned):
    small()
    check(normal(2 * N, 300).to(device), [300, 2], 16, N=N, width=20)


def test_real_sizes(device, poisoned):
    """With no constant changed: lists of 8192, chunks of thousands, k = 2048."""
    scores = torch.cat((normal(1, 40_000), small_integers(1, 40_000)))
    check(scores.to(device), [40_000, 39_999], 2048)


CASES = {  # lengths, N, Hi, Di, page, k
    "T = 37": ([37, 0, 130], 2, 16, 32, 64, 20),
    "k above every length": ([37, 5], 4, 16, 32, 4, 500),
    "pages of one token": ([30, 11], 1, 16, 16, 1, 7),
    "odd sizes": ([200, 129, 77], 3, 3, 24, 5, 33),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", (0, 1))
def test_selection(case, seed, device, poisoned):
    lengths, N, Hi, Di, page, k = CASES[case]
    index_pages, table, lengths, keys, scales = cache(small_integers, lengths, page, Di, seed)
    q_idx, w = queries(small_integers, len(lengths), N, Hi, Di, seed)
    inputs = [x.to(device) for x in (q_idx, index_pages, w)], [x.to(device) for x in (table, lengths)]
    positions, slots = (x.cpu() for x in dsa_kernels.paged_select(*inputs[0], k, *inputs[1]))
    scores = oracle(q_idx, w, lengths, keys, scales, table.shape[1] * page).numpy()
    for b, length in enumerate(lengths.tolist()):
        ends = torch.tensor([max(0, length - N + 1 + n) for n in range(N)])
        for n, chosen in enumerate(best(scores[b], k, torch.zeros(N, dtype=torch.int32), ends)):
            assert positions[b, n].tolist() == chosen + [-1] * (k - len(chosen))
            there = torch.tensor(chosen, dtype=torch.long)
            want = (table[b][there // page] * page + there % page).tolist()
            assert slots[b, n].tolist() == want + [-1] * (k - len(chosen))


def test_alone_or_in_a_batch_and_in_parts(device, poisoned, small, monkeypatch):
    small()
    index_pages, table, lengths, _, _ = cache(normal, [300, 0, 5, 64, 229], 16, 32)
    q_idx, w = queries(normal, 5, 2, 16, 32)
    q_idx, index_pages, w, table, lengths = (x.to(device) for x in (q_idx, index_pages, w, table, lengths))
    got = dsa_kernels.paged_select(q_idx, index_pages, w, 16, table, lengths)
    again = dsa_kernels.paged_select(q_idx, index_pages, w, 16, table, lengths, variant="portable")
    monkeypatch.setattr("dsa_kernels.runtime.SCORES_AT_ONCE", 2000)
    in_parts = dsa_kernels.paged_select(q_idx, index_pages, w, 16, table, lengths)
    for one, two, three in zip(got, again, in_parts, strict=True):
        assert_same_bits(one, two)
        assert_same_bits(one, three)
    for b in range(5):
        row = slice(b, b + 1)
        alone = dsa_kernels.paged_select(q_idx[row], index_pages, w[row], 16, table[row], lengths[row])
        for one, two in zip(got, alone, strict=True):
            assert_same_bits(one[row], two)


def test_nan_counts_as_an_extreme(device):
    scores = normal(2, 60)
    scores[0, 5], scores[1, 5] = torch.nan, -torch.tensor(torch.nan)
    rows = torch.zeros(2, decode.row_stride(60))
    rows[:, :60] = scores
    rows.view(torch.int32)[1, 5] = -1  # NaN with its sign bit set
    rows = rows.to(device)
    table, lengths = torch.arange(16, dtype=torch.int32).view(2, 8).to(device), torch.tensor([60, 60]).int().to(device)
    positions, slots = (torch.zeros(2, 59, dtype=torch.int32, device=device) for _ in range(2))
    zeros = torch.zeros(decode.counters(2, 60), dtype=torch.int32, device=device)
    decode.launch(rows, table, lengths, 1, 60, PAGE, 59, positions, slots, zeros)
    assert 5 in positions[0].tolist() and 5 not in positions[1].tolist()


def test_a_variant_that_is_unknown(device):
    index_pages, table, lengths, _, _ = cache(normal, [20], 64, 32)
    q_idx, w = queries(normal, 1, 1, 16, 32)
    inputs = [x.to(device) for x in (q_idx, index_pages, w, table, lengths)]
    with pytest.raises(ValueError, match="variant must be"):
        dsa_kernels.paged_select(*inputs[:3], 3, *inputs[3:], variant="listed")
