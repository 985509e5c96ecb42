"""`dsa_kernels.paged_sparse_attention` and `merge_parts` against equation 2 in float64, on rows packed by hand."""

import sys

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import E4M3, assert_close, assert_same_bits, normal

if rungs.has_triton():
    import dsa_kernels

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
TOLERANCE = {BF16: 8e-3, FP16: 2e-3, FP32: 2e-6}


def fp8_rows(count, D, v_dim, seed=0):
    """(uint8 [count, row], the fp64 [count, D] they stand for), with scales that are no powers of two."""
    tiles, rest = -(-v_dim // 128), D - v_dim
    values = normal(count, v_dim, seed=seed).to(E4M3)
    scales = normal(count, tiles, seed=seed + 1).abs() + 0.3
    others = normal(count, rest, seed=seed + 2, dtype=BF16)
    parts = (values.view(torch.uint8), scales.view(torch.uint8), others.view(torch.uint8).view(count, 2 * rest))
    wide = scales.double().repeat_interleave(min(128, v_dim), dim=1)
    return torch.cat(parts, dim=1), torch.cat((values.double() * wide, others.double()), dim=1)


def float_rows(count, D, dtype, seed=0):
    rows = normal(count, D, seed=seed, dtype=dtype)
    return rows, rows.double()


def lists(B, N, k, count, seed=0):
    """int32 [B, N, k]: lists of any number of distinct slots with -1 anywhere; the first one is empty."""
    generator = torch.Generator().manual_seed(seed)
    slots = torch.full((B * N, k), -1, dtype=torch.int32)
    for row in range(B * N):
        chosen = (row * k // max(1, B * N - 1) if row % 2 == 0 else k) if row else 0
        chosen = min(chosen, count)
        places = torch.randperm(k, generator=generator)[:chosen]
        slots[row, places] = torch.randperm(count, generator=generator)[:chosen].to(torch.int32)
    return slots.view(B, N, k)


def oracle(q, rows, slots, scale, v_dim):
    B, N, H, _ = q.shape
    out, lse = torch.zeros(B, N, H, v_dim, dtype=torch.float64), torch.full((B, N, H), -torch.inf, dtype=torch.float64)
    for b in range(B):
        for n in range(N):
            kv = rows[slots[b, n][slots[b, n] >= 0].long()]
            if len(kv):
                logits = q[b, n].double() @ kv.T * scale
                out[b, n], lse[b, n] = logits.softmax(dim=1) @ kv[:, :v_dim], logits.logsumexp(dim=1)
    return out, lse


CASES = {  # B, N, H, D, v_dim, k, page, splits
    "V3.2's rows": (2, 2, 16, 576, 512, 150, 64, None),
    "the small model": (2, 1, 8, 80, 64, 37, 64, None),
    "one head, one place": (1, 1, 1, 80, 64, 1, 4, None),
    "one part": (2, 3, 3, 80, 64, 300, 64, 1),
    "more parts than places": (1, 2, 5, 80, 64, 100, 8, 7),
    "many parts": (1, 2, 4, 80, 64, 1300, 64, 20),
    "long parts": (1, 2, 4, 40, 32, 1300, 64, 2),
    "128 heads, four queries": (1, 4, 128, 80, 64, 70, 16, None),
    "nothing but the value": (3, 1, 7, 24, 24, 40, 1, None),
    "odd sizes": (3, 1, 7, 31, 22, 40, 3, None),
    "a value of 256": (2, 1, 4, 260, 256, 65, 64, None),
}


def inputs(case, kind, seed):
    B, N, H, D, v_dim, k, page, splits = CASES[case]
    count = -(-(k + 30) // page) * page
    dtype = BF16 if kind == "FP8" else kind
    rows, wide = fp8_rows(count, D, v_dim, seed) if kind == "FP8" else float_rows(count, D, dtype, seed)
    q, slots = normal(B, N, H, D, seed=seed + 3, dtype=dtype), lists(B, N, k, count, seed)
    return (q, rows.view(-1, page, rows.shape[1]), slots, 0.5 * D**-0.5, v_dim, splits), wide


def moved(arguments, device):
    return [x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments]


@pytest.mark.parametrize(
    "kind, variant",
    [("FP8", "portable"), ("FP8", "widened"), (BF16, "portable"), (FP16, "portable"), (FP32, "portable")],
)
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("seed", (0, 1))
def test_attention(case, kind, variant, seed, device, poisoned):
    arguments, wide = inputs(case, kind, seed)
    out, lse = dsa_kernels.paged_sparse_attention(*moved(arguments, device), variant=variant)
    want_out, want_lse = oracle(arguments[0], wide, *arguments[2:5])
    tolerance = TOLERANCE[arguments[0].dtype]
    assert out.dtype == arguments[0].dtype and lse.dtype == FP32
    assert_close(out, want_out, tolerance)
    assert_close(lse, want_lse, tolerance)
    assert (out[0, 0] == 0).all() and (lse[0, 0] == -torch.inf).all()


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ("portable", "widened"))
def test_who_widens(variant, monkeypatch):
    """The card, where it knows e4m3; the kernel from its bytes on an older one, and when asked to."""
    seen, kernel = [], sys.modules["dsa_kernels.paged_sparse_attention"]._paged_sparse_attention

    class Noting:
        def __getitem__(self, grid):
            return lambda *arguments, **options: (seen.append(options["NATIVE"]), kernel[grid](*arguments, **options))

    monkeypatch.setattr(sys.modules["dsa_kernels.paged_sparse_attention"], "_paged_sparse_attention", Noting())
    dsa_kernels.paged_sparse_attention(*moved(inputs("V3.2's rows", "FP8", 0)[0], "cuda"), variant=variant)
    assert seen == [variant == "portable" and torch.cuda.get_device_capability() >= (8, 9)]


@pytest.mark.parametrize("q_dtype", (FP16, FP32))
def test_fp8_rows_for_other_queries(q_dtype, device, poisoned):
    arguments, wide = inputs("V3.2's rows", "FP8", 2)
    arguments = arguments[0].to(q_dtype), *arguments[1:]
    got = dsa_kernels.paged_sparse_attention(*moved(arguments, device), variant="portable")
    for ours, theirs in zip(got, oracle(arguments[0], wide, *arguments[2:5]), strict=True):
        assert_close(ours, theirs, TOLERANCE[q_dtype])


@pytest.mark.parametrize("kind", ("FP8", BF16))
def test_a_row_has_its_bits_in_any_batch(kind, device, poisoned):
    arguments, _ = inputs("V3.2's rows", kind, 0)
    q, kv_pages, slots, *rest = moved(arguments, device)
    got = dsa_kernels.paged_sparse_attention(q, kv_pages, slots, *rest)
    again = dsa_kernels.paged_sparse_attention(q, kv_pages, slots, *rest)
    for b in range(2):
        for n in range(2):
            row = slice(b, b + 1), slice(n, n + 1)
            alone = dsa_kernels.paged_sparse_attention(q[row], kv_pages, slots[row], *rest)
            for one, two, three in zip(got, again, alone, strict=True):
                assert_same_bits(one, two)
                assert_same_bits(one[row], three)


def test_rows_that_nobody_selects_are_not_read(device, poisoned):
    arguments, wide = inputs("the small model", "FP8", 0)
    q, kv_pages, slots, *rest = arguments
    unread = torch.ones(kv_pages.shape[0] * kv_pages.shape[1], dtype=torch.bool)
    unread[slots[slots >= 0].long()] = False
    kv_pages.view(-1, kv_pages.shape[2])[unread] = 0xFF
    got = dsa_kernels.paged_sparse_attention(*moved((q, kv_pages, slots, *rest), device))
    assert_close(got[0], oracle(q, wide, slots, *rest[:2])[0], TOLERANCE[BF16])


def test_nan_reaches_those_that_select_it(device):
    arguments, _ = inputs("the small model", FP32, 0)
    q, kv_pages, slots, *rest = moved(arguments, device)
    kv_pages[:] = torch.nan
    out, lse = dsa_kernels.paged_sparse_attention(q, kv_pages, slots, *rest)
    assert out[1].isnan().all() and lse[1].isnan().all() and (out[0] == 0).all()


@pytest.mark.parametrize("splits, shape", [(1, (3, 5)), (4, (7, 24)), (19, (2, 3, 64))])
def test_merge_parts(splits, shape, device, poisoned):
    outs, lses = normal(splits, *shape), 3 * normal(splits, *shape[:-1], seed=1)
    lses[:, 0] = -torch.inf
    lses[0] = -torch.inf
    outs[lses == -torch.inf] = torch.nan
    out, lse = dsa_kernels.merge_parts(outs.to(device), lses.to(device))
    assert_close(lse, lses.double().logsumexp(dim=0), 1e-6)
    weights = (lses.double() - lses.double().logsumexp(dim=0)).exp().nan_to_num()
    assert_close(out, (weights[..., None] * outs.double().nan_to_num()).sum(dim=0), 1e-6)


def test_arguments(device):
    arguments, _ = inputs("the small model", BF16, 0)
    with pytest.raises(ValueError, match='variant "hopper"'):
        dsa_kernels.paged_sparse_attention(*moved(arguments, device), variant="hopper")
    with pytest.raises(ValueError, match='variant "widened" needs'):
        dsa_kernels.paged_sparse_attention(*moved(arguments, device), variant="widened")
    with pytest.raises(TypeError, match="float64"):
        dsa_kernels.merge_parts(*(torch.zeros(2, 3, 4)[..., :n].double().squeeze(-1) for n in (4, 1)))
    with pytest.raises(TypeError, match="q must have dtype"):
        dsa_kernels.paged_sparse_attention(*(x.double() if x is arguments[0] else x for x in arguments))


def test_empty_batch(device):
    arguments, _ = inputs("the small model", BF16, 0)
    q, kv_pages, slots, *rest = moved(arguments, device)
    try:
        out, lse = dsa_kernels.paged_sparse_attention(q[:0], kv_pages, slots[:0], *rest)
    except ValueError as error:  # the contract refuses a batch without sequences
        assert "B > 0" in str(error)
    else:
        assert out.shape == (0, 1, 8, 64) and lse.shape == (0, 1, 8)
