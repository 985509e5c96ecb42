"""`dsa_kernels.topk.sample`: one key of every stretch, and which of them a row sees."""

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import normal

if rungs.has_triton():
    from dsa_kernels.topk.sample import sampled_keys, size_of

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)


@pytest.mark.parametrize("S", (2048, 2049, 24_577, 140_000))
def test_one_key_of_every_stretch(S, device, poisoned):
    """Scales that number the keys show which were taken; counts are those of a search."""
    k_idx = normal(S, 16, device=device).to(torch.float8_e4m3fn)
    numbers = torch.arange(S, dtype=torch.float32, device=device)
    ends = torch.randint(0, S + 1, (200,), generator=torch.Generator().manual_seed(S)).int().to(device)
    ends[:4] = torch.tensor([0, S, 1, S - 1])
    keys, scales, first, last = sampled_keys(k_idx, numbers, ends.flip(0), ends)
    M, places = size_of(S), scales.long()
    edges = torch.arange(M + 1, device=device) * S // M
    assert len(places) == M and (places >= edges[:-1]).all() and (places < edges[1:]).all()
    assert torch.equal(keys.view(torch.uint8), k_idx.view(torch.uint8)[places])
    assert torch.equal(last, torch.searchsorted(places, ends.long()).int())
    assert torch.equal(first, torch.searchsorted(places, ends.flip(0).long()).int())
    without = sampled_keys(k_idx, None, ends.flip(0), ends)
    assert without[1] is None and torch.equal(without[3], last) and torch.equal(without[2], first)
    assert torch.equal(without[0].view(torch.uint8), keys.view(torch.uint8))


def test_places_have_no_period(device):
    """A sample every 64 keys would see 1 of 64 places alone; this one sees all of them."""
    S = 131_072
    numbers, nobody = torch.arange(S, device=device).float(), torch.zeros(1, dtype=torch.int32, device=device)
    keys = torch.zeros(S, 1, dtype=torch.float8_e4m3fn, device=device)
    places = sampled_keys(keys, numbers, nobody, nobody)[1].long()
    assert (torch.bincount(places % 64, minlength=64) > 0).all()
