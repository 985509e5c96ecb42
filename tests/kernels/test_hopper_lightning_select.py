"""The fused selection on Hopper: the portable kernels' set, on rows that a sample bounds and on rows that defeat it."""

import functools

import pytest
import rungs
import torch
from inputs import normal

if rungs.has_triton():
    import dsa_kernels

pytestmark = pytest.mark.hopper
T, S, K = 37, 50_000, 2048


def given(device, seed=0, T=T, S=S):
    q_idx, q_scale = dsa_kernels.quantize(normal(T, 64, 128, seed=seed, device=device).bfloat16())
    k_idx, k_scale = dsa_kernels.quantize(normal(S, 128, seed=seed + 1, device=device).bfloat16())
    return q_idx, k_idx, normal(T, 64, seed=seed + 2, device=device) * q_scale, k_scale


def both(inputs, k=K, *ranges):
    """The sets of the fused and of the portable selection, each row ascending."""
    q_idx, k_idx, w, k_scale = inputs
    select = functools.partial(dsa_kernels.lightning_select, q_idx, k_idx, w, k, k_scale, *ranges)
    return [select(variant=variant).sort(dim=1).values for variant in ("hopper", "portable")]


def flagged(inputs, k=K):
    """How many rows the fused kernel leaves to be redone."""
    from dsa_kernels.hopper.lightning_select import lightning_select

    q_idx, k_idx, w, k_scale = inputs
    start = torch.zeros(len(q_idx), dtype=torch.int32, device=q_idx.device)
    out = torch.empty(len(q_idx), k, dtype=torch.int32, device=q_idx.device)
    return int(lightning_select(q_idx, k_idx, w, k, k_scale, start, start + len(k_idx), out)[1].sum())


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("k", (1, 100, 2048))
def test_same_set(device, poisoned, seed, k):
    fused, portable = both(given(device, seed), k)
    assert torch.equal(fused, portable)
    assert not torch.equal(fused, both(given(device, seed + 9), k)[0])


def test_most_rows_need_no_second_try(device):
    assert flagged(given(device)) <= 1


def test_ragged_ranges(device, poisoned):
    """Rows that see nothing, fewer than k keys, a few more than go without a bound, and most."""
    start = torch.arange(T, dtype=torch.int32, device=device) * 31
    length = torch.tensor([0, 1, 64, 2047, 2048, 2049, 3583, 3584, 3585, 40_000], device=device).repeat(4)[:T]
    fused, portable = both(given(device), K, start, (start + length).int())
    assert torch.equal(fused, portable) and (fused[0] == -1).all()


def test_without_key_scales(device):
    q_idx, k_idx, w, _ = given(device)
    fused, portable = both((q_idx, k_idx, w, None))
    assert torch.equal(fused, portable)


@pytest.mark.parametrize("at_once", (5, T))
@pytest.mark.parametrize("case", ("equal", "one list", "beside the sample"))
def test_rows_that_defeat_it_are_redone(device, case, at_once, monkeypatch):
    """Some rows at a time, or all."""
    monkeypatch.setattr(dsa_kernels.runtime, "REDONE_AT_ONCE", at_once << 16)
    q_idx, k_idx, w, k_scale = given(device)
    from dsa_kernels.topk.sample import sampled_keys

    key = torch.arange(S, device=device)
    favoured = key % 64 == 5
    if case == "beside the sample":
        favoured = key % 8 == 0
        ends = torch.zeros(1, dtype=torch.int32, device=device)
        favoured[sampled_keys(k_idx, key.float(), ends, ends)[1].long()] = False  # scales number the keys here
    inputs = q_idx, k_idx, w.abs(), torch.where(favoured, 64 * k_scale, k_scale)
    if case == "equal":
        inputs = q_idx, k_idx, torch.zeros_like(w), k_scale
    assert flagged(inputs) > T // 2
    fused, portable = both(inputs)
    assert torch.equal(fused, portable)


def test_a_graph_redoes_rows_too(device):
    """While a graph is captured nobody reads the flags; the rows are redone all the same."""
    q_idx, k_idx, w, k_scale = given(device)
    w = torch.where(torch.arange(T, device=device)[:, None] % 2 == 0, w, 0.0)
    expected = both((q_idx, k_idx, w, k_scale))[1]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        indices = dsa_kernels.lightning_select(q_idx, k_idx, w, K, k_scale, variant="hopper")
    indices.fill_(-7)
    graph.replay()
    assert torch.equal(indices.sort(dim=1).values, expected)


@pytest.mark.parametrize("place", (0, 30_000, S - 1))
def test_nan_is_refused(device, place):
    q_idx, k_idx, w, k_scale = given(device)
    k_scale[place] = torch.nan
    start = torch.zeros(T, dtype=torch.int32, device=device)
    with pytest.raises(ValueError, match="scores must not be NaN, got NaN in row 0"):
        dsa_kernels.lightning_select(q_idx, k_idx, w, K, k_scale, start, start + S, variant="hopper")


def test_what_it_cannot_serve(device):
    q_idx, k_idx, w, k_scale = given(device)
    with pytest.raises(ValueError, match=r"needs min\(k, S\) <= 2048, got 2049"):
        dsa_kernels.lightning_select(q_idx, k_idx, w, 2049, k_scale, variant="hopper")
    with pytest.raises(ValueError, match="needs at least 24576 keys, got 24575"):
        dsa_kernels.lightning_select(q_idx, k_idx[:24575], w, K, k_scale[:24575], variant="hopper")
    with pytest.raises(ValueError, match="needs float8_e4m3fn, got bfloat16"):
        dsa_kernels.lightning_select(q_idx.float().bfloat16(), k_idx.float().bfloat16(), w, K, variant="hopper")


def test_a_nan_of_unknown_origin_is_for_the_portable_kernel(device):
    """A row with NaN in its lists is flagged, not refused: what scores it again knows better."""
    from dsa_kernels.hopper import lightning_select as fused

    k, rows, slots = 100, 2, fused.SLOTS.value
    entries = torch.zeros(rows, slots, fused.BK.value, dtype=torch.int64, device=device)
    key = torch.arange(4 * fused.BK.value, device=device).view(4, -1)
    bits = torch.ones(4, fused.BK.value, device=device).view(torch.int32).long() << 32
    entries[:, :4] = bits | key
    entries[1, 2, 8] = (0x7FFFFFFF << 32) | int(key[2, 8])
    counts = torch.full((rows, fused.BK.value), 4, dtype=torch.int32, device=device)
    start = torch.zeros(rows, dtype=torch.int32, device=device)
    out, nan, redo = (torch.full(shape, 7, dtype=torch.int32, device=device) for shape in ((rows, k), (rows,), (rows,)))
    ends = start + 4 * fused.BK.value
    halves = entries.view(torch.int32)
    fused._choose[(rows,)](entries, halves, counts, start, ends, out, nan, redo, k, num_warps=4, maxnreg=128)
    assert redo.tolist() == [0, 1] and nan.tolist() == [0, 0]
    assert out[0].sort().values.tolist() == list(range(k))
