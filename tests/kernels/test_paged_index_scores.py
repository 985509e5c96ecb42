"""`dsa_kernels.paged_index_scores` against equation 1 in float64, on pages laid out by hand."""

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import E4M3, FP8_SUMS, assert_same_bits, assert_scores_close, normal, small_integers

if rungs.has_triton():
    import dsa_kernels
    from dsa_kernels import paged_index_scores as public

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

EXACT = {"small integers": (small_integers, 0.0), "normal": (normal, FP8_SUMS)}


def cache(make, lengths, page, Di, seed=0, spare=2, width=None):
    """Pages in any order: (index_pages, page_table, lengths, keys, scales), the last two a list for each sequence.

    Places that no sequence uses hold 0xff, which is NaN in e4m3 and in fp32. width: pages a sequence in the table.
    """
    generator = torch.Generator().manual_seed(seed)
    P = width or max(1, max(-(-length // page) for length in lengths))
    pages = len(lengths) * P + spare
    order = torch.randperm(pages, generator=generator).tolist()
    index_pages = torch.full((pages, page * (Di + 4)), 0xFF, dtype=torch.uint8)
    table = torch.full((len(lengths), P), -1, dtype=torch.int32)
    keys, scales = [], []
    for b, length in enumerate(lengths):
        keys.append(make(length, Di, seed=seed + 10 * b + 1).to(E4M3))
        scales.append(torch.exp2(small_integers(length, seed=seed + 10 * b + 2)))
        for s in range(length):
            if s % page == 0:
                table[b, s // page] = order.pop()
            number, row = table[b, s // page], s % page
            index_pages[number, row * Di : (row + 1) * Di] = keys[b][s].view(torch.uint8)
            at = page * Di + 4 * row
            index_pages[number, at : at + 4] = scales[b][s : s + 1].view(torch.uint8)
    return index_pages, table, torch.tensor(lengths, dtype=torch.int32), keys, scales


def queries(make, B, N, Hi, Di, seed=0):
    return make(B, N, Hi, Di, seed=seed + 5).to(E4M3), make(B, N, Hi, seed=seed + 6)


def oracle(q_idx, w, lengths, keys, scales, places):
    """fp64 [B, N, places], -inf where query n of a sequence does not see."""
    B, N = q_idx.shape[:2]
    out = torch.full((B, N, places), -torch.inf, dtype=torch.float64)
    for b, length in enumerate(lengths.int().tolist()):
        for n in range(N):
            end = max(0, length - N + 1 + n)
            dots = (q_idx[b, n].double() @ keys[b][:end].double().T).relu()
            out[b, n, :end] = (dots * w[b, n, :, None].double()).sum(0) * scales[b][:end].double()
    return out


def magnitudes(x):
    return [magnitudes(y) for y in x] if isinstance(x, list) else x.double().abs()


CASES = {  # lengths, N, Hi, Di, page
    "one key": ([1], 1, 16, 32, 64),
    "V3.2's sizes": ([37, 0, 130], 2, 64, 128, 64),
    "shorter than N": ([2, 0, 1, 5], 4, 4, 32, 4),
    "three queries, odd sizes": ([37, 64, 3], 3, 3, 24, 5),
    "one head": ([9, 40], 1, 1, 8, 16),
    "pages of one token": ([3, 11], 2, 5, 16, 1),
    "scales at odd bytes": ([7, 12], 1, 2, 5, 3),
    "large pages": ([200, 129], 1, 16, 32, 128),
}


@pytest.mark.parametrize("kind", EXACT)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", (0, 1))
def test_scores(case, kind, seed, device, poisoned):
    (lengths, N, Hi, Di, page), (make, tolerance) = CASES[case], EXACT[kind]
    index_pages, table, lengths, keys, scales = cache(make, lengths, page, Di, seed)
    q_idx, w = queries(make, len(lengths), N, Hi, Di, seed)
    got = dsa_kernels.paged_index_scores(*(x.to(device) for x in (q_idx, index_pages, w, table, lengths)))
    given, places = (q_idx, w, lengths, keys, scales), table.shape[1] * page
    assert_scores_close(got, oracle(*given, places), oracle(*map(magnitudes, given), places), tolerance)


def test_widened(device, poisoned):
    index_pages, table, lengths, keys, scales = cache(small_integers, [37, 70], 64, 32)
    q_idx, w = queries(small_integers, 2, 2, 16, 32)
    inputs = [x.to(device) for x in (q_idx, index_pages, w, table, lengths)]
    got = dsa_kernels.paged_index_scores(*inputs, variant="widened")
    assert_same_bits(got, dsa_kernels.paged_index_scores(*inputs))
    with pytest.raises(ValueError, match='variant must be "portable", "hopper", "widened" or None, got \'fast\''):
        dsa_kernels.paged_index_scores(*inputs, variant="fast")


@pytest.mark.parametrize("page", (16, 64))  # TMA brings keys from the larger ones
@pytest.mark.parametrize("programs", (1, 3, 50))
def test_however_many_programs_share_the_pages(programs, page, device, poisoned, monkeypatch):
    """The same bits, alone in the batch or not; and launch writes what is seen and nothing else."""
    module = __import__("sys").modules[public.__module__]
    monkeypatch.setattr(module, "multiprocessors", lambda tensor: programs)
    index_pages, table, lengths, keys, scales = cache(normal, [300, 0, 5, 64, 129], page, 32)
    q_idx, w = queries(normal, 5, 2, 16, 32)
    inputs = [x.to(device) for x in (q_idx, index_pages, w, table, lengths)]
    got = dsa_kernels.paged_index_scores(*inputs)
    assert_same_bits(got, dsa_kernels.paged_index_scores(*inputs))
    for b in range(5):
        q_b, _, w_b, table_b, lengths_b = (x[b : b + 1] for x in inputs)
        assert_same_bits(dsa_kernels.paged_index_scores(q_b, inputs[1], w_b, table_b, lengths_b), got[b : b + 1])
    out = torch.full_like(got, 7.0)
    module.launch(*inputs, out)
    assert_same_bits(out, torch.where(got == -torch.inf, 7.0, got))


@pytest.mark.parametrize("first_byte", (1, 4))
def test_pages_begin_at_any_byte(first_byte, device):
    """Neither TMA nor, from an odd byte, loads of whole scales can read these."""
    index_pages, table, lengths, _, _ = cache(normal, [200, 64], 64, 32)
    q_idx, w = queries(normal, 2, 2, 16, 32)
    q_idx, pages, w, table, lengths = (x.to(device) for x in (q_idx, index_pages, w, table, lengths))
    shifted = torch.empty(pages.numel() + first_byte, dtype=torch.uint8, device=device)[first_byte:].view_as(pages)
    got = dsa_kernels.paged_index_scores(q_idx, shifted.copy_(pages), w, table, lengths)
    assert_same_bits(got, dsa_kernels.paged_index_scores(q_idx, pages, w, table, lengths))


def test_nan_reaches_the_scores(device):
    index_pages, table, lengths, _, _ = cache(normal, [20], 64, 32)
    q_idx, w = queries(normal, 1, 1, 16, 32)
    w[0, 0, 3] = torch.nan
    got = dsa_kernels.paged_index_scores(*(x.to(device) for x in (q_idx, index_pages, w, table, lengths)))
    assert got[0, 0, :20].isnan().all() and (got[0, 0, 20:] == -torch.inf).all()
