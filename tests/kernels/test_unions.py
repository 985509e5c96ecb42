"""The union of a few queries' lists, and who selected each key, against Python's sets."""

import pytest
import rungs
import torch
from inputs import assert_same_bits, random_indices


@pytest.fixture
def unions():
    """The module, with tables and segments so small that every loop over them goes around more than once."""
    if not rungs.has_triton():
        pytest.skip("kernels need triton, which cannot be imported here")
    from dsa_kernels.hopper import unions

    return unions


@pytest.fixture
def small_chunks(unions, monkeypatch):
    monkeypatch.setattr(unions, "SEGMENT", 16)
    monkeypatch.setattr(unions, "TABLE_BYTES", 600)


def written_out(indices, G):
    """For each group a sorted list of (key, bits)."""
    groups = []
    for first in range(0, len(indices), G):
        bits = {}
        for g, row in enumerate(indices[first : first + G].tolist()):
            for s in row:
                if s >= 0:
                    bits[s] = bits.get(s, 0) | 1 << g
        groups.append(sorted(bits.items()))
    return groups


def check(unions, indices, S, G):
    entries, length = unions.unions(indices, S, G)
    assert entries.dtype == torch.int64 and entries.shape[0] == len(length) == -(-len(indices) // G)
    got = [
        [(entry & 0xFFFFFFFF, entry >> 32 & 0xFFFFFFFF) for entry in row[:n]]
        for row, n in zip(entries.tolist(), length.tolist(), strict=True)
    ]
    assert got == written_out(indices.cpu(), G)


@pytest.mark.parametrize(
    "T, S, k, G", [(1, 1, 1, 2), (7, 100, 9, 4), (5, 33, 40, 2), (37, 1000, 7, 32), (3, 5, 2, 8), (11, 257, 30, 5)]
)
@pytest.mark.parametrize("seed", (0, 1))
def test_against_sets(unions, small_chunks, device, poisoned, T, S, k, G, seed):
    """S no multiple of a word's keys, T no multiple of G, G no power of two, a row with nothing."""
    check(unions, random_indices(T, S, k, seed=seed, device=device), S, G)


def test_duplicates_count_once(unions, device, poisoned):
    indices = torch.tensor([[3, 3, -1, 0], [3, 1, 1, 1], [-1, -1, -1, -1]], dtype=torch.int32, device=device)
    check(unions, indices, 4, 2)


def test_nothing_selected(unions, device, poisoned):
    entries, length = unions.unions(torch.full((5, 3), -1, dtype=torch.int32, device=device), 40, 4)
    assert length.tolist() == [0, 0]


def test_every_key_of_every_query(unions, small_chunks, device, poisoned):
    indices = torch.arange(70, dtype=torch.int32, device=device).repeat(8, 1)
    check(unions, indices, 70, 8)


def test_the_same_each_time(unions, device, poisoned):
    indices = random_indices(9, 300, 50, device=device)
    entries, length = unions.unions(indices, 300, 4)
    for _ in range(3):
        again, same_length = unions.unions(indices.flip(1), 300, 4)
        assert_same_bits(same_length, length)
        for row, other, n in zip(again, entries, length.tolist(), strict=True):
            assert_same_bits(row[:n], other[:n])


@pytest.mark.gpu
def test_at_v32s_sizes(unions, device, poisoned):
    check(unions, random_indices(64, 131_073, 2048, device=device), 131_073, 4)
