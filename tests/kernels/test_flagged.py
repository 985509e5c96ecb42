"""`dsa_kernels.flagged`: the rows that a fused kernel has flagged, and no others, get the reference's selection."""

import contextlib

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import normal, small_integers

import dsa_ref
from dsa_ref import unchecked_values

if rungs.has_triton():
    from dsa_kernels import flagged, runtime

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)
T, Hi, Di = 9, 8, 32
UNTOUCHED = -7


@pytest.fixture
def small(monkeypatch):
    """Tournaments of 64 scores, and some rows at a time."""
    monkeypatch.setattr(flagged, "CHUNK", 64)
    monkeypatch.setattr(runtime, "REDONE_AT_ONCE", 4 * 192)


def given(S, make=normal, dtype=torch.float32, device="cpu"):
    q_idx, k_idx = make(T, Hi, Di, device=device).to(dtype), make(S, Di, seed=1, device=device).to(dtype)
    return q_idx, k_idx, make(T, Hi, seed=2, device=device)


def select_again(inputs, k, redo, k_scale=None, start=None, end=None):
    """(selections, nan) of all rows; those that were left alone hold UNTOUCHED."""
    q_idx, k_idx, w = inputs
    S, device = len(k_idx), q_idx.device
    causal = torch.arange(S - T, S, dtype=torch.int32, device=device) + 1
    start, end = torch.zeros_like(causal) if start is None else start, causal if end is None else end
    out = torch.full((T, k), UNTOUCHED, dtype=torch.int32, device=device)
    nan = torch.zeros(T, dtype=torch.int32, device=device)
    flagged.select_again(q_idx, k_idx, w, k, k_scale, start, end, redo.to(device), out, nan)
    return out, nan


def rows(*numbers):
    redo = torch.zeros(T, dtype=torch.int32)
    redo[list(numbers)] = 1
    return redo


@pytest.mark.parametrize("readable", (True, False))
@pytest.mark.parametrize(
    "make, numbers", [(normal, ()), (normal, (4,)), (normal, (0, 3, 4, 7, 8)), (small_integers, tuple(range(T)))]
)
def test_flagged_rows_and_no_others(small, device, poisoned, make, numbers, readable):
    """Whether the host may count them or not, in one turn or three, with few ties or many."""
    inputs, k = given(150, make, device=device), 7
    wanted = dsa_ref.lightning_select(*inputs, k)
    with contextlib.nullcontext() if readable else unchecked_values():
        got, _ = select_again(inputs, k, rows(*numbers))
    for t in range(T):
        assert got[t].tolist() == (wanted[t].tolist() if t in numbers else [UNTOUCHED] * k), t


def test_ranges_and_scales(small, device):
    """Rows that see nothing, fewer than k keys, and keys from anywhere on."""
    inputs, k, every = given(150, device=device), 32, rows(*range(T))
    start = torch.arange(T, dtype=torch.int32, device=device) * 17
    end = start + torch.tensor([0, 1, 31, 32, 33, 64, 65, 90, 7], dtype=torch.int32, device=device)
    end = torch.minimum(end, torch.full_like(end, 150))
    scale = normal(150, seed=5, device=device).exp()
    wanted = dsa_ref.lightning_select(*inputs, k, scale, start, end)
    assert torch.equal(select_again(inputs, k, every, scale, start, end)[0], wanted)
    assert not torch.equal(select_again(inputs, k, every, None, start, end)[0], wanted)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float8_e4m3fn))
def test_rows_of_one_chunk_and_of_many_in_narrow_types(device, dtype):
    """Whole numbers, whose sums are exact in any type; a tournament of full size, of one chunk and of two."""
    for S in (40, 17_000):
        inputs = given(S, small_integers, dtype, device)
        widened = inputs[0].float(), inputs[1].float(), inputs[2]
        k = min(S, 2048)
        wanted = dsa_ref.lightning_select(*widened, k)
        assert torch.equal(select_again(inputs, k, rows(2, 8))[0][[2, 8]], wanted[[2, 8]])


def test_nan_is_reported_in_the_row_that_sees_it(small, device):
    q_idx, k_idx, w = given(150, device=device)
    k_idx[149] = torch.nan  # the last row's own key
    assert select_again((q_idx, k_idx, w), 7, rows(3, 8))[1].tolist() == rows(8).tolist()
    w[3, 0] = torch.nan
    assert select_again((q_idx, k_idx, w), 7, rows(3))[1].tolist() == rows(3).tolist()
