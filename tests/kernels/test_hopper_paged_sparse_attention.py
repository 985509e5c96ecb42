"""Paged sparse attention's Hopper kernels against fp64: holes, scales of every size, every e4m3 code, parts, NaN."""

import pytest
import rungs
import torch

if rungs.has_triton():
    import dsa_kernels
    from dsa_kernels import runtime

pytestmark = pytest.mark.hopper
V = 512


def launch(q, rows, slots, scale, splits=1):
    """(out, lse), or of the parts, on memory that was NaN."""
    from dsa_kernels.hopper import paged_sparse_attention as hopper

    assert runtime.gluon_compiles() and hopper.cannot_serve(q, rows, slots, V, splits) is None
    T, H, _ = q.shape
    nan = {"fill_value": float("nan"), "device": q.device}
    out, lse = torch.full((T, H, V), dtype=torch.bfloat16, **nan), torch.full((T, H), **nan)
    parts, part_lse = torch.full((T, splits, H, V), **nan), torch.full((T, splits, H), **nan)
    hopper.launch(q, rows, slots, scale, V, splits, out, lse, parts, part_lse)
    return (out, lse) if splits == 1 else (parts, part_lse)


def merged(parts, part_lse):
    lse = torch.logsumexp(part_lse.double(), dim=1)
    weight = torch.exp(part_lse.double() - torch.where(lse.isinf(), 0.0, lse)[:, None])
    return (parts.double() * weight[..., None]).sum(dim=1), lse


def packed_rows(codes, scales, rope):
    """Bytes [n, 656], and the values that they say, fp64 [n, 576]."""
    n = len(codes)
    parts = (
        codes.view(torch.uint8).view(n, V),
        scales.view(torch.uint8).view(n, 16),
        rope.view(torch.uint8).view(n, 128),
    )
    values = (codes.view(torch.float8_e4m3fn).double() * scales.double()[..., None]).view(n, V)
    return torch.cat(parts, dim=1), torch.cat((values, rope.double()), dim=1)


def random_rows(n, kind="powers"):
    latent = torch.randn(n, 4, 128, device="cuda")
    scales = torch.exp2(torch.ceil(torch.log2(latent.abs().amax(dim=-1).clamp(min=1e-4) / 448)))
    codes = (latent / scales[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8)
    if kind == "any":
        scales = scales * (1 + torch.rand_like(scales)) * torch.where(torch.rand_like(scales) < 0.3, -1.0, 1.0)
    if kind == "codes":
        codes = torch.randint(0, 256, codes.shape, dtype=torch.uint8, device="cuda")
        codes[(codes & 0x7F) == 0x7F] = 0
        scales = scales * torch.exp2(torch.randint_like(scales, -20, 1)) * (0.5 + torch.rand_like(scales))
    return packed_rows(codes, scales, torch.randn(n, 64, device="cuda").bfloat16())


def lists(T, k, n, holes=True):
    """int32 [T, k] of distinct slots from 1 on, and holes of nine kinds: at the end, in the middle, everywhere."""
    slots = torch.argsort(torch.rand(T, n - 1, device="cuda"), dim=1)[:, :k].int() + 1
    if holes:
        for t, cut in enumerate(range(T)):
            places = torch.arange(k, device="cuda")
            gone = (
                places >= k - k // 50,
                places >= 100,
                places >= 0,
                places >= 1,
                (places >= 64) & (places < 1024),
                places % 2 == 0,
                places < k - 1,
                places < 0,
                places % 128 < 64,
            )[cut % 9]
            slots[t, gone] = -1
    return slots


def reference(q, values, slots, scale):
    out = torch.zeros(*q.shape[:2], V, dtype=torch.float64, device="cuda")
    lse = torch.full(q.shape[:2], float("-inf"), dtype=torch.float64, device="cuda")
    for t in range(len(q)):
        rows = values[slots[t][slots[t] >= 0].long()]
        if len(rows):
            logits = q[t].double() @ rows.T * scale
            out[t], lse[t] = torch.softmax(logits, dim=1) @ rows[:, :V], torch.logsumexp(logits, dim=1)
    return out, lse


CASES = [  # T, H, k, splits, rows
    *((1, 16, 2048, splits, "powers") for splits in (1, 2, 16)),
    *((9, heads, 2048, splits, "powers") for heads in (1, 8, 16, 17, 32, 64, 100, 128) for splits in (1, 16)),
    (300, 8, 512, 1, "powers"),
    *((9, 16, k, splits, "powers") for k, splits in ((1, 1), (64, 1), (77, 1), (129, 2), (640, 16), (1000, 3))),
    *((9, 128, 2048, splits, kind) for kind in ("any", "codes") for splits in (1, 2, 16)),
]


@pytest.mark.parametrize(("T", "H", "k", "splits", "kind"), CASES)
def test_agrees_with_the_definition(T, H, k, splits, kind):
    """Rows that nobody selects, slot 0 among them, are NaN in every byte."""
    torch.manual_seed(T + H + k)
    rows, values = random_rows(4096, kind)
    q, slots, scale = torch.randn(T, H, 576, device="cuda").bfloat16(), lists(T, k, len(rows)), 0.02
    selected = torch.zeros(len(rows), dtype=torch.bool, device="cuda")
    selected[slots[slots >= 0].long()] = True
    rows[~selected] = 0xFF
    want, want_lse = reference(q, values, slots, scale)
    first = launch(q, rows, slots, scale, splits)
    again = launch(q, rows, slots, scale, splits)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))  # NaN, too, would differ
    out, lse = first if splits == 1 else merged(*first)
    empty = want_lse == float("-inf")
    assert torch.equal(lse == float("-inf"), empty)
    assert (out[empty] == 0).all()
    torch.testing.assert_close(lse[~empty].double(), want_lse[~empty], rtol=0, atol=2e-2)
    for t in range(T):
        assert (out[t].double() - want[t]).norm() <= 6e-3 * want[t].norm()


@pytest.mark.parametrize("scale", (2.0**-20, 1.0, 64.0, 128.0, 256.0, 2.0**100, 1.7e-3, 3.3, 127.9, 128.1, 1e6, -0.77))
@pytest.mark.parametrize("k", (1, 129))  # one step, and more
def test_values_of_every_code_and_scale(scale, k):
    """Attention to one key is its value: the product rounded to bf16, within half a place and 2^-16."""
    codes = torch.arange(512, device="cuda").to(torch.uint8).view(1, 4, 128)
    codes[(codes & 0x7F) == 0x7F] = 0
    scales = torch.full((1, 4), scale, device="cuda")
    rows, values = packed_rows(codes, scales, torch.zeros(1, 64, device="cuda").bfloat16())
    slots = torch.full((1, k), -1, dtype=torch.int32, device="cuda")
    slots[0, -1] = 0
    out, lse = launch(torch.zeros(1, 64, 576, dtype=torch.bfloat16, device="cuda"), rows, slots, 1.0)
    there = values[0, :V].bfloat16().isfinite()
    torch.testing.assert_close(
        out[0].double()[:, there], values[:, :V].expand(64, V)[:, there], rtol=2**-8 * 1.01, atol=0
    )
    assert (lse == 0).all()


@pytest.mark.parametrize("code", (0x7F, 0xFF))
@pytest.mark.parametrize("column", (0, 1, 2, 3, 130, 259, 511))
@pytest.mark.parametrize("k", (128, 256))  # one step, and two
def test_nan_stays_nan(code, column, k):
    torch.manual_seed(column)
    rows, _ = random_rows(300)
    q, slots = torch.randn(1, 64, 576, device="cuda").bfloat16(), lists(1, k, 300, holes=False)
    for place in (0, 37, 64, k - 1):
        row = slots[0, place].item()
        before = rows[row, column].item()
        rows[row, column] = code
        assert all(x.isnan().all() for x in launch(q, rows, slots, 0.02))
        without = slots.clone()
        without[0, place] = -1
        assert not any(x.isnan().any() for x in launch(q, rows, without, 0.02))
        rows[row, column] = before


@pytest.mark.parametrize("splits", (1, 2, 16))
def test_the_same_bits_at_full_size_alone_and_in_a_graph(splits):
    torch.manual_seed(splits)
    rows, _ = random_rows(32768)
    q, slots = torch.randn(256, 128, 576, device="cuda").bfloat16(), lists(256, 2048, len(rows))
    first = launch(q, rows, slots, 0.02, splits)
    for _ in range(20):
        assert all(torch.equal(a, b) for a, b in zip(first, launch(q, rows, slots, 0.02, splits), strict=True))
    alone = launch(q[7:8].contiguous(), rows, slots[7:8].contiguous(), 0.02, splits)
    assert all(torch.equal(a[7], b[0]) for a, b in zip(first, alone, strict=True))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = launch(q, rows, slots, 0.02, splits)
    slots.copy_(slots.flip(0))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, launch(q, rows, slots, 0.02, splits), strict=True))


@pytest.mark.parametrize(("T", "H"), ((1, 16), (8, 16), (3, 128)))
def test_calls_that_follow_each_other_closely(T, H):
    """Each kernel begins before the one in front of it has ended. Same memory again and again, different lists."""
    torch.manual_seed(T)
    rows, _ = random_rows(4096)
    pages, q = rows.view(-1, 64, 656), torch.randn(T, 1, H, 576, device="cuda").bfloat16()
    many = [lists(T, 2048, len(rows), holes=False)[:, None] for _ in range(20)]
    alone = []
    for slots in many:
        alone.append(dsa_kernels.paged_sparse_attention(q, pages, slots, 0.02, V, variant="hopper"))
        torch.cuda.synchronize()
    slots, kept = torch.empty_like(many[0]), []
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for each in many:
            slots.copy_(each)
            got = dsa_kernels.paged_sparse_attention(q, pages, slots, 0.02, V, variant="hopper")
            kept.append([x.clone() for x in got])
    for _ in range(10):
        graph.replay()
        for got, want in zip(kept, alone, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))
