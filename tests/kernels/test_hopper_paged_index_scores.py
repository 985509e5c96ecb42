"""Hopper's paged index scores against the portable kernel, bit for bit, and that against fp64 elsewhere."""

import pytest
import rungs
import torch
from inputs import assert_same_bits

if rungs.has_triton():
    import dsa_kernels
    from dsa_kernels.paged_index_scores import choose, launch

pytestmark = pytest.mark.hopper
LENGTHS = {  # the first of each is also scored alone
    "one": [129],
    "nothing": [0],
    "edges": [0, 1, 63, 64, 65, 127, 128, 129, 0, 0, 2],
    "one of many has keys": [0] * 20 + [65] + [0] * 43,
    "ragged": [2500, 7, 900, 0, 2560, 1, 1300, 64] * 8,
    "many sequences": [70, 0, 3] * 100,
}
P = 40


def case(lengths, N, P=P, seed=0, spoil=True):
    """q_idx, index_pages, w, page_table, lengths. spoil: bytes that no query sees are 0xff, which is NaN in both types,
    and page numbers behind a length are -1."""
    torch.manual_seed(seed)
    B = len(lengths)
    pages = torch.randn(B * P, 64, 128, device="cuda").to(torch.float8_e4m3fn).view(torch.uint8)
    scales = torch.rand(B * P, 64, 1, device="cuda") + 0.5
    table = torch.randperm(B * P, device="cuda").int().view(B, P)
    lengths = torch.tensor(lengths, dtype=torch.int32, device="cuda")
    if spoil:
        behind = (torch.arange(P * 64, device="cuda") >= lengths[:, None]).view(B * P, 64)
        at = table.flatten().long()
        pages[at] = pages[at].masked_fill(behind[:, :, None], 0xFF)
        scales[at] = scales[at].masked_fill(behind[:, :, None], float("nan"))
        table = table.masked_fill(behind.view(B, P, 64).all(dim=2), -1)
    cache = torch.cat((pages.view(B * P, -1), scales.view(B * P, 64).view(torch.uint8)), dim=1)
    q_idx = torch.randn(B, N, 64, 128, device="cuda").to(torch.float8_e4m3fn)
    return q_idx, cache, torch.randn(B, N, 64, device="cuda"), table, lengths


def one_of(given, b):
    q_idx, cache, w, table, lengths = given
    return q_idx[b : b + 1], cache, w[b : b + 1], table[b : b + 1], lengths[b : b + 1]


def launched(given, variant, stride):
    """What `launch` makes of scores that were 7, and of counters that were 7."""
    B, N = given[0].shape[:2]
    out, zeros = (
        torch.full((B, N, stride), 7.0, device="cuda"),
        torch.full((3001,), 7, dtype=torch.int32, device="cuda"),
    )
    launch(*given, out, zeros, hopper=choose(variant, given[0], given[1], given[3]))
    assert not zeros.any()
    return out


@pytest.mark.parametrize("N", (1, 2))
@pytest.mark.parametrize("kind", LENGTHS)
def test_bits_are_the_portable_kernels(kind, N, device):
    given = case(LENGTHS[kind], N)
    want = dsa_kernels.paged_index_scores(*given, variant="portable")
    got = dsa_kernels.paged_index_scores(*given, variant="hopper")
    assert_same_bits(got, want)
    assert not got.isnan().any()
    assert_same_bits(dsa_kernels.paged_index_scores(*one_of(given, 0), variant="hopper"), want[:1])
    stride = P * 64 + 64
    assert_same_bits(launched(given, "hopper", stride), launched(given, "portable", stride))


@pytest.mark.parametrize("N", (1, 2))
@pytest.mark.parametrize("B", (1, 3))
def test_what_is_not_finite_reaches_the_scores(B, N, device):
    given = case([1000] * B, N)
    given[2][:, :, 5] = float("inf")
    given[1][::3, 8192 + 40 : 8192 + 44] = torch.tensor([float("nan")]).view(torch.uint8).to(device)
    given[1][::5, 128 * 9] = 0x7F
    want = dsa_kernels.paged_index_scores(*given, variant="portable")
    got = dsa_kernels.paged_index_scores(*given, variant="hopper")
    assert want.isnan().any() and want.isinf().any()
    assert torch.equal(got.isnan(), want.isnan())
    assert_same_bits(got.nan_to_num(5.0), want.nan_to_num(5.0))


@pytest.mark.parametrize("B, N, pages", [(64, 2, 512), (64, 1, 512), (1, 1, 2048), (1, 2, 2048), (8, 2, 512)])
def test_the_same_bits_every_time(B, N, pages, device):
    """In a CUDA graph, back to back, at full size: the ring and its barriers go round many times."""
    given = case([pages * 64 - 37 * b for b in range(B)], N, pages)
    want = launched(given, "portable", pages * 64)
    outs = [torch.full_like(want, 7.0) for _ in range(20)]
    hopper = choose("hopper", given[0], given[1], given[3])
    launch(*given, outs[0], hopper=hopper)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for out in outs:
            launch(*given, out, hopper=hopper)
    graph.replay()
    assert all(torch.equal(out, want) for out in outs)


def test_other_sizes_are_left_to_the_portable_kernel(device):
    for heads, dim, page, N, why in (
        (32, 128, 64, 1, "64 heads"),
        (64, 128, 32, 1, "64 tokens"),
        (64, 128, 64, 3, "two"),
    ):
        q_idx = torch.zeros(2, N, heads, dim, device="cuda").to(torch.float8_e4m3fn)
        pages = torch.zeros(4, page * (dim + 4), dtype=torch.uint8, device="cuda")
        table, lengths = (
            torch.zeros(2, 2, dtype=torch.int32, device="cuda"),
            torch.ones(2, dtype=torch.int32, device="cuda"),
        )
        given = q_idx, pages, torch.zeros(2, N, heads, device="cuda"), table, lengths
        with pytest.raises(ValueError, match=f'variant "hopper" needs .*{why}'):
            dsa_kernels.paged_index_scores(*given, variant="hopper")
        dsa_kernels.paged_index_scores(*given)
