"""The small steps of a decode step: each is what it is made of, and writes where it should and nowhere else."""

import numpy as np
import pytest
import torch
from inputs import assert_close, assert_same_bits, from_byte, normal, strided
from torch.nn import functional as F

import dsa_ref
from dsa_ref import V32, rope_frequencies
from dsa_ref.append import layer_norm_loops, place_tokens_loops, rms_norm_loops
from dsa_ref.contracts import fp8_row_bytes

pytestmark = pytest.mark.rungs("reference", "kernels")
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EPS = 1e-6
SENTINEL = 0xA5


def places(T, device):
    """Slots in three pages of 5 or more, in no order, and positions without a pattern; position 0 among them."""
    slots = (torch.arange(T, device=device) * 7 + 3) % 15
    return slots, (torch.arange(T, device=device) * 97) % 1000


def freqs(R, device):
    return rope_frequencies(V32, device=device)[: R // 2].contiguous()


def index_inputs(T, Di, dtype, device):
    k = normal(T, Di, device=device)
    k[:, 5] *= 30
    return (k.to(dtype), *(normal(Di, seed=seed, device=device) for seed in (1, 2)))


def pages_like(shape, dtype, device):
    return torch.full(shape, SENTINEL, dtype=torch.uint8, device=device).view(dtype)


def one_rounding(got, wanted):
    """e4m3 codes that differ are neighbours, and hardly any does: sums in fp32 have another order."""
    got, wanted = (x.view(torch.uint8).to(torch.int16).flatten() for x in (got, wanted))
    assert (got - wanted).abs().max() <= 1 and (got != wanted).float().mean() < 0.01


@pytest.mark.parametrize("layout", ("half", "interleaved"))
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("Di", (16, 128))
def test_an_index_key_is_what_the_steps_make_of_it(ops, device, dtype, Di, layout):
    T, page, R = 6, 5, Di // 2
    k, weight, bias = index_inputs(T, Di, dtype, device)
    slots, positions = places(T, device)
    pages = pages_like((3, page * (Di + 4)), torch.uint8, device)
    ops.append_index(pages, slots, k, weight, bias, EPS, positions, freqs(R, device), layout)

    normed = F.layer_norm(k.float(), (Di,), weight, bias, EPS).to(dtype)
    turned = dsa_ref.rope(normed, positions, freqs(R, device), layout)
    wanted, scales = dsa_ref.quantize(dsa_ref.hadamard(turned))
    k_idx, k_scale = dsa_ref.unpack_index(pages, Di)
    assert_same_bits(k_scale[slots], scales)
    one_rounding(k_idx[slots], wanted)
    assert_close(dsa_ref.dequantize(k_idx[slots], k_scale[slots]).norm(), normed.float().norm(), 0.01)
    others = [slot for slot in range(15) if slot not in slots.tolist()]
    assert (k_idx.view(torch.uint8)[others] == SENTINEL).all()
    assert (k_scale[others].view(torch.int32) == torch.tensor(SENTINEL, dtype=torch.uint8).repeat(4).view(torch.int32)
            .to(device)).all()  # fmt: skip


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("v_dim, R", [(512, 64), (384, 16), (64, 16), (6, 2)])
@pytest.mark.parametrize("fp8", (True, False))
def test_a_latent_row_is_what_the_steps_make_of_it(ops, device, dtype, v_dim, R, fp8):
    T, page, D = 6, 5, v_dim + R
    rows, weight = (normal(T, D, device=device) * 3).to(dtype), normal(v_dim, seed=1, device=device)
    slots, positions = places(T, device)
    width = fp8_row_bytes(D, v_dim) if fp8 else D
    pages = pages_like((3, page, width * (1 if fp8 else rows.element_size())), torch.uint8 if fp8 else dtype, device)
    before = pages.clone()
    ops.append_latents(pages, slots, rows, weight, EPS, positions, freqs(R, device))

    latent = F.rms_norm(rows[:, :v_dim].float(), (v_dim,), weight, EPS).to(dtype)
    turned = dsa_ref.rope(rows[:, v_dim:], positions, freqs(R, device), "interleaved")
    wanted = torch.cat((latent, turned), dim=1)
    stored, untouched = pages.flatten(0, 1)[slots], [slot for slot in range(15) if slot not in slots.tolist()]
    assert_same_bits(pages.flatten(0, 1)[untouched], before.flatten(0, 1)[untouched])
    if fp8:
        wanted = dsa_ref.pack_kv(wanted, v_dim)
        tiles = 4 * -(-v_dim // 128)
        one_rounding(stored[:, :v_dim], wanted[:, :v_dim])
        assert_same_bits(stored[:, v_dim : v_dim + tiles], wanted[:, v_dim : v_dim + tiles])
        stored, wanted = (x[:, v_dim + tiles :].contiguous().view(torch.bfloat16) for x in (stored, wanted))
    assert_close(stored, wanted, {torch.float32: 1e-6}.get(wanted.dtype, 8e-3))
    assert_same_bits(stored[0, -R:], wanted[0, -R:])  # position 0: nothing is turned


def test_norms_are_the_loops(ops, device):
    x, weight, bias = normal(4, 24, device=device), normal(24, seed=1, device=device), normal(24, seed=2, device=device)
    assert_close(ops.rms_norm(x, weight, EPS), rms_norm_loops(x.cpu().numpy(), weight.cpu().numpy(), EPS), 1e-6)
    got = ops.rms_norm(x.bfloat16(), weight, EPS)
    assert got.dtype == torch.bfloat16 and ops.rms_norm(x[:0], weight, EPS).shape == (0, 24)
    wanted = F.layer_norm(x, (24,), weight, bias, EPS)
    assert_close(wanted, layer_norm_loops(*(tensor.cpu().numpy() for tensor in (x, weight, bias)), EPS), 1e-6)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("layout", ("half", "interleaved"))
def test_queries_carry_their_scale_in_the_weights(ops, device, dtype, layout):
    T, Hi, Di, R = 5, 16, 32, 16
    q, w = normal(T, Hi, Di, device=device).to(dtype), normal(T, Hi, seed=1, device=device)
    positions = places(T, device)[1]
    q_idx, weights = ops.index_queries(q, w, positions, freqs(R, device), layout)
    turned = dsa_ref.rope(q, positions, freqs(R, device), layout)
    wanted, scale = dsa_ref.quantize(dsa_ref.hadamard(turned))
    assert_same_bits(weights, w * Hi**-0.5 * Di**-0.5 * scale)
    one_rounding(q_idx, wanted)
    assert_same_bits(q_idx[0], wanted[0])


def test_head_weights_are_products_in_fp32(ops, device):
    x, weight = normal(3, 200, dtype=torch.bfloat16, device=device), normal(16, 200, seed=1, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        got = ops.head_weights(x, weight.to(dtype))
        assert got.dtype == torch.float32
        assert_close(got, x.double() @ weight.to(dtype).double().T, 1e-6)


@pytest.mark.parametrize("T", (16, 1024, 1030))
@pytest.mark.rungs("kernels")
def test_head_weights_of_many_tokens(ops, device, T):
    """One product of all, and a token's bits do not depend on how many others there are, on either side of 1024."""
    x, weight = normal(T, 200, dtype=torch.bfloat16, device=device), normal(10, 200, seed=1, device=device)
    for dtype in (torch.float32, torch.bfloat16):
        if T == 16:
            got = ops.head_weights(x, weight.to(dtype))
            assert_same_bits(got[7:9], ops.head_weights(x[7:9], weight.to(dtype)))
        else:
            got = ops.head_weights(x, weight.to(dtype))
            assert_same_bits(got[:1024], ops.head_weights(x[:1024], weight.to(dtype)))
        wanted = x[: len(got)].double() @ weight.to(dtype).double().T
        assert got.dtype == torch.float32
        assert_close(got, wanted, 2e-6)


@pytest.mark.parametrize("layout", ("half", "interleaved"))
@pytest.mark.parametrize("T, heads", [(3, 5), (1, 130), (9, 128)])
def test_turning_in_place(ops, device, layout, T, heads):
    """A query's own last columns: no pair may be read after it was written."""
    q, positions = normal(T, heads, 24, device=device), places(T, device)[1]
    wanted, before = q[..., 8:].clone(), q[..., :8].clone()
    ops.turn_into(wanted, q[..., 8:], positions, freqs(16, device), layout)
    ops.turn_into(q[..., 8:], q[..., 8:], positions, freqs(16, device), layout)
    assert_same_bits(q[..., 8:], wanted)
    assert_same_bits(q[..., :8], before)
    assert_close(wanted, dsa_ref.rope(wanted * 0 + normal(T, heads, 24, device=device)[..., 8:], positions,
                                      freqs(16, device), layout), 1e-6)  # fmt: skip


@pytest.mark.parametrize("layout", ("half", "interleaved"))
def test_turning_into_the_columns_of_a_buffer(ops, device, layout):
    heads = normal(3, 5, 40, dtype=torch.bfloat16, device=device)
    buffer = torch.full((3, 5, 80), 7.0, dtype=torch.bfloat16, device=device)
    positions = places(3, device)[1]
    ops.turn_into(buffer[..., 64:], heads[..., 24:], positions, freqs(16, device), layout)
    assert_close(buffer[..., 64:], dsa_ref.rope(heads[..., 24:], positions, freqs(16, device), layout), 8e-3)
    assert (buffer[..., :64] == 7).all()
    assert_same_bits(buffer[0, :, 64:], heads[0, :, 24:])


@pytest.mark.parametrize("N", (1, 3, 4))
def test_places_of_the_next_tokens(ops, device, N):
    table = torch.tensor([[4, 7, -1, -1], [0, -1, -1, -1], [3, 1, 2, 9]], dtype=torch.int32, device=device)
    lengths = torch.tensor([3, 0, 11], dtype=torch.int32, device=device)  # pages of 4
    sequences = torch.tensor([2, 0, 1], device=device)
    got = ops.place_tokens(table, lengths, sequences, N, 4)
    wanted = place_tokens_loops(*(x.cpu().numpy() for x in (table, lengths, sequences)), N, 4)
    for one, other in zip(got, wanted, strict=True):
        assert_same_bits(one, torch.from_numpy(np.ascontiguousarray(other)))


def test_strided_input(ops, device):
    k, weight, bias = index_inputs(6, 16, torch.float32, device)
    slots, positions = places(6, device)
    rows = normal(6, 22, device=device)
    found = []
    for way in (torch.clone, strided):
        pages, kv = (pages_like(shape, torch.uint8, device) for shape in ((3, 100), (3, 5, fp8_row_bytes(22, 14))))
        ops.append_index(pages, way(slots), *(way(x) for x in (k, weight, bias)), EPS, way(positions), freqs(8, device))
        ops.append_latents(kv, way(slots), way(rows), way(normal(14)).to(device), EPS, way(positions), freqs(8, device))
        found.append((pages, kv))
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


@pytest.mark.parametrize("offset", (1, 2, 3))
def test_pools_may_begin_at_any_byte(ops, device, offset):
    k, weight, bias = index_inputs(6, 16, torch.float32, device)
    (slots, positions), rows, found = places(6, device), normal(6, 22, device=device), []
    for first in (0, offset):
        pages, kv = (pages_like(shape, torch.uint8, device) for shape in ((3, 100), (3, 5, fp8_row_bytes(22, 14))))
        pages, kv = from_byte(first, pages), from_byte(first, kv)
        assert pages.data_ptr() % 4 == kv.data_ptr() % 4 == first
        ops.append_index(pages, slots, k, weight, bias, EPS, positions, freqs(8, device))
        ops.append_latents(kv, slots, rows, weight[:14], EPS, positions, freqs(8, device))
        found.append((pages, kv))
    for one, other in zip(*found, strict=True):
        assert_same_bits(one, other)


def test_no_token_writes_nothing(ops, device):
    k, weight, bias = index_inputs(0, 16, torch.float32, device)
    slots, positions = places(0, device)
    pages, kv = (pages_like(shape, torch.uint8, device) for shape in ((3, 100), (3, 5, fp8_row_bytes(22, 14))))
    ops.append_index(pages, slots, k, weight, bias, EPS, positions, freqs(8, device))
    ops.append_latents(kv, slots, k.new_zeros(0, 22), weight[:14], EPS, positions, freqs(8, device))
    assert (pages == SENTINEL).all() and (kv == SENTINEL).all()


INDEX = {"index_pages": None, "slots": None, "k": None, "weight": None, "bias": None, "eps": EPS, "positions": None,
         "freqs": None, "layout": "half"}  # fmt: skip
WRONG_INDEX = [
    ("slots", lambda x: x.clamp(max=3), "slots must be distinct to be written to, got 3 twice"),
    ("slots", lambda x: x - 15, "slots must lie in \\[0, 15\\)"),
    ("slots", lambda x: x + 15, "slots must lie in \\[0, 15\\)"),
    ("slots", lambda x: x[1:], "slots must have shape \\[T\\] with T = 6"),
    ("index_pages", lambda x: x[:, 1:], "index_pages must have"),
    ("index_pages", lambda x: x[0], "index_pages must have shape"),
    ("k", lambda x: x.masked_fill(x == x[2, 2], torch.nan), "^k must be finite, got NaN or infinity"),
    ("index_pages", lambda x: x[:1].expand(3, -1), "index_pages must (have memory of its own|be contiguous)"),
    ("k", lambda x: x[:, :12], "with Di = 12"),
    ("weight", lambda x: x[1:], "weight must have shape \\[Di\\] with Di = 16"),
    ("eps", lambda x: 0.0, "eps must be positive and finite"),
    ("eps", lambda x: 10**400, "eps must be positive and finite"),  # larger than any float
    ("layout", lambda x: "both", "layout must be one of"),
    ("freqs", lambda x: x.repeat(3), "freqs must have at most D/2"),
]
WRONG_TYPES = [
    ("index_pages", lambda x: x.to(torch.int8), "index_pages must have dtype uint8"),
    ("slots", lambda x: x.float(), "slots must have dtype int32, int64"),
    ("k", lambda x: x.long(), "k must have dtype|x must have dtype"),
    ("bias", lambda x: x.long(), "bias must have dtype"),
    ("eps", lambda x: "small", "eps must be a float"),
]


@pytest.mark.parametrize("name, change, message", WRONG_INDEX + WRONG_TYPES)
def test_bad_index_keys_are_refused_and_nothing_is_written(ops, device, name, change, message):
    k, weight, bias = index_inputs(6, 16, torch.float32, device)
    slots, positions = places(6, device)
    pages = pages_like((3, 100), torch.uint8, device)
    given = INDEX | {"index_pages": pages, "slots": slots, "k": k, "weight": weight, "bias": bias}
    given |= {"positions": positions, "freqs": freqs(8, device)}
    error = TypeError if (name, change, message) in WRONG_TYPES else ValueError
    with pytest.raises(error, match=message):
        ops.append_index(**given | {name: change(given[name])})
    assert (pages == SENTINEL).all()


@pytest.mark.parametrize(
    "name, change, message",
    [
        ("slots", lambda x: x * 0, "slots must be distinct"),
        ("slots", lambda x: x - 15, "slots must lie in"),
        ("rows", lambda x: x.masked_fill(x == x[2, 2], torch.inf), "^rows must be finite"),
        ("kv_pages", lambda x: x[:1].expand(3, -1, -1), "kv_pages must (have memory of its own|be contiguous)"),
        ("rows", lambda x: x[:, 1:], "rows must have D = v_dim \\+ R = 14 \\+ 8 columns, got 21"),
        ("kv_pages", lambda x: x[..., 1:], "kv_pages must have rows of"),
        ("weight", lambda x: x[1:], "rows must have D"),
        ("eps", lambda x: -1.0, "eps must be positive"),
    ],
)
def test_bad_latents_are_refused_and_nothing_is_written(ops, device, name, change, message):
    slots, positions = places(6, device)
    pages = pages_like((3, 5, fp8_row_bytes(22, 14)), torch.uint8, device)
    given = {"kv_pages": pages, "slots": slots, "rows": normal(6, 22, device=device), "weight": normal(14).to(device)}
    given |= {"eps": EPS, "positions": positions, "freqs": freqs(8, device)}
    with pytest.raises(ValueError, match=message):
        ops.append_latents(**given | {name: change(given[name])})
    assert (pages == SENTINEL).all()
    with pytest.raises(TypeError, match="kv_pages must have dtype"):
        ops.append_latents(**given | {"kv_pages": pages.view(torch.int8)})


def test_bad_queries_and_places_are_refused(ops, device):
    q, w, positions = normal(3, 2, 16, device=device), normal(3, 2, device=device), places(3, device)[1]
    with pytest.raises(ValueError, match="^q must be finite"):
        ops.index_queries(q / 0, w, positions, freqs(8, device))
    with pytest.raises(ValueError, match="w must have shape"):
        ops.index_queries(q, w[:, 1:], positions, freqs(8, device))
    with pytest.raises(TypeError, match="w must have dtype float32"):
        ops.index_queries(q, w.bfloat16(), positions, freqs(8, device))
    with pytest.raises(ValueError, match="freqs must have R/2 = 8 entries, got 4"):
        ops.turn_into(q.clone(), q, positions, freqs(8, device), "half")
    with pytest.raises(ValueError, match="out must have memory of its own for each place"):
        ops.turn_into(q[:, :1].expand(3, 2, 16), q, positions, freqs(16, device), "half")
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.head_weights(q[:, 0], w)
    with pytest.raises(ValueError, match="weight must have shape"):
        ops.rms_norm(q[:, 0], w[0], EPS)
    table = torch.tensor([[4, -1], [0, 1]], dtype=torch.int32, device=device)
    lengths, sequences = torch.tensor([3, 7], dtype=torch.int32, device=device), torch.tensor([0, 1], device=device)
    for change, message in (
        ({"N": 2}, "lengths must lie in|table must have pages"),
        ({"N": 0}, r"N must be in \[1, 8\], got 0"),
        ({"N": 9}, r"N must be in \[1, 8\], got 9"),
        ({"page_size": 10**30}, "page_size must be an int64, got 1000"),
        ({"sequences": sequences + 1}, "sequences must lie in \\[0, 2\\)"),
        ({"lengths": lengths + 1}, "lengths must lie in \\[0, 7\\] for N = 1 more, got 8"),
        ({"table": table - 5}, "table must have pages for the next N tokens"),
    ):
        given = {"table": table, "lengths": lengths, "sequences": sequences, "N": 1, "page_size": 4}
        with pytest.raises(ValueError, match=message):
            ops.place_tokens(**given | change)
