"""Both byte layouts against bytes built by hand, and the way there and back to the bit."""

import struct

import pytest
import torch
from inputs import E4M3, assert_same_bits, normal, strided

import dsa_ref

ONE, TWO, LEAST, LOWEST, LARGEST, MINUS_ZERO, NAN = 0x38, 0x40, 0x01, 0xFE, 0x7E, 0x80, 0x7F  # e4m3
NUMBERS = {ONE: 1.0, TWO: 2.0, LEAST: 2.0**-9, LOWEST: -448.0, LARGEST: 448.0, MINUS_ZERO: -0.0, 0: 0.0}


def as_bytes(*parts):
    return torch.tensor(list(b"".join(parts)), dtype=torch.uint8)


def random_bytes(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=torch.Generator().manual_seed(seed), dtype=torch.uint8)


def loops(function, *args):
    """A loop form on tensors: float64 arrays in, tensors out."""
    arrays = (x.double().numpy() if isinstance(x, torch.Tensor) and x.dtype != torch.uint8 else x for x in args)
    out = function(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in arrays))
    return tuple(torch.tensor(x) for x in out) if isinstance(out, tuple) else torch.tensor(out)


def index_rows(S, Di, seed=0):
    """k_idx e4m3 [S, Di] of all finite bytes, and scales that are no powers of two."""
    values = random_bytes(S, Di, seed=seed)
    return values.masked_fill(values & 0x7F == 0x7F, 0).view(E4M3), normal(S, seed=seed + 1)


def test_an_index_page_holds_all_values_and_then_all_scales():
    k_idx = torch.tensor([[ONE, LOWEST], [LEAST, TWO], [MINUS_ZERO, LARGEST]], dtype=torch.uint8).view(E4M3)
    k_scale = torch.tensor([0.25, 3.0, -1e-40])
    wanted = torch.stack(
        (
            as_bytes(bytes([ONE, LOWEST, LEAST, TWO]), struct.pack("<2f", 0.25, 3.0)),
            as_bytes(bytes([MINUS_ZERO, LARGEST, 0, 0]), struct.pack("<2f", -1e-40, 0.0)),
        )
    )
    assert torch.equal(dsa_ref.pack_index(k_idx, k_scale, 2), wanted)
    assert torch.equal(loops(dsa_ref.pack_index_loops, k_idx, k_scale, 2), wanted)
    for unpack in (dsa_ref.unpack_index, lambda *args: loops(dsa_ref.unpack_index_loops, *args)):
        values, scales = unpack(wanted, 2)
        assert values.double().tolist() == [[1.0, -448.0], [2.0**-9, 2.0], [-0.0, 448.0], [0.0, 0.0]]
        assert scales.tolist() == [0.25, 3.0, float(k_scale[2]), 0.0]


def test_an_fp8_row_holds_values_scales_and_bf16():
    """Two tiles, the larger 128 times the smaller; ties of bf16 go to the even one."""
    kv = torch.zeros(1, 256 + 4)
    kv[0, :3], kv[0, 128:131] = torch.tensor([448.0, -2.0, 1.0]), torch.tensor([3.5, -0.015625, 0.0078125])
    kv[0, 256:] = torch.tensor([1 + 2.0**-8, 1 + 3 * 2.0**-8, -2.5, torch.inf])
    values = [LARGEST, TWO | 0x80, ONE, *[0] * 125, LARGEST, TWO | 0x80, ONE, *[0] * 125]
    rest = struct.pack("<4H", 0x3F80, 0x3F82, 0xC020, 0x7F80)
    wanted = as_bytes(bytes(values), struct.pack("<2f", 1.0, 2.0**-7), rest)[None]
    assert torch.equal(dsa_ref.pack_kv(kv, 256), wanted)
    assert torch.equal(loops(dsa_ref.pack_kv_loops, kv, 256), wanted)
    rounded = kv.clone()
    rounded[0, 256:258] = torch.tensor([1.0, 1 + 2.0**-6])
    assert torch.equal(dsa_ref.unpack_kv(wanted, 256), rounded)
    assert torch.equal(loops(dsa_ref.unpack_kv_loops, wanted, 256), rounded.double())


def test_v32s_sizes():
    k_idx, k_scale = index_rows(65, 128)
    assert dsa_ref.pack_index(k_idx, k_scale).shape == (2, 64 * 132)
    assert dsa_ref.pack_kv(normal(3, 576), 512).shape == (3, 656)


@pytest.mark.parametrize("S, Di, page", [(1, 16, 64), (64, 16, 64), (65, 8, 64), (7, 4, 3), (6, 4, 3), (5, 3, 1)])
def test_index_pages_there_and_back(S, Di, page):
    k_idx, k_scale = index_rows(S, Di)
    pages = dsa_ref.pack_index(k_idx, k_scale, page)
    assert torch.equal(pages, loops(dsa_ref.pack_index_loops, k_idx, k_scale, page))
    values, scales = dsa_ref.unpack_index(pages, Di)
    assert_same_bits(values[:S], k_idx)
    assert_same_bits(scales[:S], k_scale)
    assert (values[S:].view(torch.uint8) == 0).all() and (scales[S:] == 0).all()
    assert_same_bits(dsa_ref.pack_index(strided(k_idx), strided(k_scale), page), pages)
    assert_same_bits(dsa_ref.unpack_index(strided(pages), Di)[1], scales)


@pytest.mark.parametrize("seed", range(5))
def test_index_bytes_back_and_there(seed):
    """Any bytes at all, NaN of every kind among them."""
    pages = random_bytes(3, 4 * 20, seed=seed)
    assert_same_bits(dsa_ref.pack_index(*dsa_ref.unpack_index(pages, 16), 4), pages)


@pytest.mark.parametrize("D, v_dim", [(24, 16), (16, 16), (128, 127), (130, 128), (576, 512)])
@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16, torch.float16))
def test_fp8_rows_are_quantize_tile_by_tile(D, v_dim, dtype):
    """Tiles of very different sizes side by side; the rest rounds to bf16 once."""
    kv = (normal(5, D) * torch.exp2(torch.arange(D) // 128 * 3.0 - 6)).to(dtype)
    rows = dsa_ref.pack_kv(kv, v_dim)
    got = dsa_ref.unpack_kv(rows, v_dim)
    for first in range(0, v_dim, 128):
        tile = slice(first, min(first + 128, v_dim))
        assert_same_bits(got[:, tile], dsa_ref.dequantize(*dsa_ref.quantize(kv[:, tile].contiguous())))
    assert_same_bits(got[:, v_dim:], kv[:, v_dim:].bfloat16().float())
    assert_same_bits(rows, loops(dsa_ref.pack_kv_loops, kv.float(), v_dim).to(torch.uint8))
    assert_same_bits(dsa_ref.unpack_kv(dsa_ref.pack_kv(got, v_dim), v_dim), got)  # what is rounded stays
    assert_same_bits(dsa_ref.pack_kv(strided(kv), v_dim), rows)


@pytest.mark.parametrize("dtype", (torch.float32, torch.float64, torch.bfloat16))
@pytest.mark.parametrize("v_dim", (16, 256))
def test_any_scale_is_honoured(v_dim, dtype):
    """No powers of two, negative, tiny and huge ones, a zero: what somebody else wrote. And rows in any shape."""
    values, scales = index_rows(6, v_dim)[0], normal(6, v_dim // 128 or 1) * 10.0 ** normal(6, 1, seed=3).mul(8).round()
    scales[2] = 0
    rest = normal(6, 8, seed=2).bfloat16()
    rows = torch.cat([part.view(torch.uint8) for part in (values, scales, rest)], dim=1)
    got = dsa_ref.unpack_kv(rows.view(2, 3, -1), v_dim, dtype)
    assert got.shape == (2, 3, v_dim + 8) and got.dtype == dtype
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    wanted = values.to(wide).unflatten(1, (-1, min(v_dim, 128))) * scales.to(wide)[..., None]
    assert_same_bits(got.flatten(0, 1), torch.cat((wanted.flatten(1), rest.to(wide)), dim=1).to(dtype))
    exact = loops(dsa_ref.unpack_kv_loops, rows, v_dim)
    assert torch.equal(dsa_ref.unpack_kv(rows, v_dim, torch.float64), exact)


@pytest.mark.parametrize("slot_dtype", (torch.int32, torch.int64))
def test_writing_is_packing_somewhere_else(slot_dtype):
    """Token by token at scattered slots; every other byte stays."""
    k_idx, k_scale = index_rows(5, 16)
    kv, page = normal(5, 24), 4
    slots = torch.tensor([9, 2, 15, 8, 0], dtype=slot_dtype)
    index_pages, before = random_bytes(4, page * 20), random_bytes(4, page * 20)
    dsa_ref.write_index(index_pages, slots, k_idx, k_scale)
    values, scales = dsa_ref.unpack_index(before, 16)
    values.view(torch.uint8)[slots.long()], scales[slots.long()] = k_idx.view(torch.uint8), k_scale
    assert_same_bits(index_pages, dsa_ref.pack_index(values, scales, page))
    for pages, rows in (
        (torch.full((4, page, 24), 7.0), kv),
        (random_bytes(4, page, 36), dsa_ref.pack_kv(kv, 16)),
    ):
        wanted = pages.clone().flatten(0, 1)
        wanted[slots.long()] = rows
        dsa_ref.write_kv(pages, slots, kv, 16)
        assert_same_bits(pages.flatten(0, 1), wanted)


def test_no_tokens():
    nothing = torch.zeros(0, 16).to(E4M3), torch.zeros(0)
    assert dsa_ref.pack_index(*nothing).shape == (0, 64 * 20)
    assert dsa_ref.unpack_index(torch.zeros(0, 80, dtype=torch.uint8), 16)[0].shape == (0, 16)
    rows = dsa_ref.pack_kv(torch.zeros(0, 24), 16)
    assert rows.shape == (0, 36) and dsa_ref.unpack_kv(rows, 16).shape == (0, 24)
    pages = random_bytes(2, 80)
    before = pages.clone()
    dsa_ref.write_index(pages, torch.zeros(0, dtype=torch.int64), *nothing)
    assert torch.equal(pages, before)


K_IDX, K_SCALE = index_rows(2, 16)
SLOTS, KV = torch.tensor([3, 5]), normal(2, 24)
INDEX_PAGES, FP8_PAGES = torch.zeros(2, 4 * 20, dtype=torch.uint8), torch.zeros(2, 4, 36, dtype=torch.uint8)
NOT_FINITE = KV.clone().index_fill(1, torch.tensor([15]), torch.nan)
BAD = [  # function, arguments, error, message
    ("pack_index", (K_IDX.float(), K_SCALE), TypeError, "k_idx must have dtype float8_e4m3fn, got float32"),
    ("pack_index", (K_IDX, K_SCALE.double()), TypeError, "k_scale must have dtype float32, got float64"),
    ("pack_index", (K_IDX, K_SCALE[:1]), ValueError, "k_scale must have shape"),
    ("pack_index", (K_IDX, K_SCALE, 0), ValueError, "page_size must be at least 1, got 0"),
    ("unpack_index", (INDEX_PAGES, 13), ValueError, "index_pages must have .* 17 bytes, got 80"),
    ("unpack_index", (INDEX_PAGES.float(), 16), TypeError, "index_pages must have dtype uint8"),
    ("pack_kv", (KV, 25), ValueError, "v_dim must be at most D = 24, got 25"),
    ("pack_kv", (normal(2, 300), 200), ValueError, "v_dim must be below 128 or a multiple of it in FP8 rows, got 200"),
    ("pack_kv", (NOT_FINITE, 16), ValueError, "kv must be finite in its first v_dim columns"),
    ("pack_kv", (KV.int(), 16), TypeError, "kv must have dtype"),
    ("unpack_kv", (FP8_PAGES, 36), ValueError, "rows must have 40 bytes"),
    ("unpack_kv", (FP8_PAGES, 15), ValueError, "rows must have 19 bytes .v_dim = 15. and two for .*, got 36"),
    ("unpack_kv", (FP8_PAGES, 16, torch.int32), TypeError, "dtype must be one of"),
    ("write_index", (INDEX_PAGES, SLOTS + 3, K_IDX, K_SCALE), ValueError, r"slots must lie in \[0, 8\).*, got 8"),
    ("write_index", (INDEX_PAGES, SLOTS - 4, K_IDX, K_SCALE), ValueError, "slots must lie in .* got -1"),
    ("write_index", (INDEX_PAGES, SLOTS * 0 + 5, K_IDX, K_SCALE), ValueError, "slots must be distinct .* got 5 twice"),
    ("write_index", (INDEX_PAGES, SLOTS.float(), K_IDX, K_SCALE), TypeError, "slots must have dtype int32, int64"),
    ("write_index", (INDEX_PAGES, SLOTS, K_IDX[:, :13], K_SCALE), ValueError, "index_pages must have pages"),
    ("write_kv", (FP8_PAGES, SLOTS + 3, KV, 16), ValueError, "slots must lie in"),
    ("write_kv", (FP8_PAGES, SLOTS, KV), TypeError, "v_dim must be an int, got NoneType"),
    ("write_kv", (FP8_PAGES, SLOTS, KV, 12), ValueError, "kv_pages must have rows of 40 bytes .*, got 36"),
    ("write_kv", (FP8_PAGES, SLOTS, NOT_FINITE, 16), ValueError, "kv must be finite"),
    ("write_kv", (torch.zeros(2, 4, 23), SLOTS, KV), ValueError, "kv_pages must have rows of D = 24 numbers, got 23"),
    ("write_kv", (torch.zeros(2, 4, 24).half(), SLOTS, KV), TypeError, "kv_pages must have dtype float32, uint8"),
]


@pytest.mark.parametrize("function, arguments, error, message", BAD)
def test_bad_arguments_are_named_and_nothing_is_written(function, arguments, error, message):
    before = [x.clone() if isinstance(x, torch.Tensor) else x for x in arguments]
    with pytest.raises(error, match=message):
        getattr(dsa_ref, function)(*arguments)
    for a, b in zip(arguments, before, strict=True):
        assert not isinstance(a, torch.Tensor) or torch.equal(a.view(torch.uint8), b.view(torch.uint8))
