"""Notebook 07: FP8 with a power-of-two scale, and the rotation that comes before it."""

import numpy as np
import torch

from dsa_ref.hadamard import hadamard as rotate
from dsa_ref.quantize import AMAX_FLOOR, E4M3_MAX, power_of_two_at_least
from dsa_ref.quantize import quantize as reference
from dsa_ref.testing import Failed

from ..checking import (
    FORGOTTEN,
    Check,
    expect,
    expect_close,
    expect_shape,
    normal,
    strided,
    tensor,
    whole,
)

quantize = Check("quantize")  # quantize(x [..., D]) -> x8 float8_e4m3fn [..., D], scale fp32 [...]
hadamard = Check("hadamard")  # hadamard(x [..., D]) -> [..., D]

VECTORS, SCALES = {2: "t d", 3: "t h d"}, {1: "t", 2: "t h"}  # the axes of a result, by their number


# ---------------------------------------------------------------------------------------------------------- quantize


def _rows(seed, *shape, dtype=torch.float32):
    """Vectors whose sizes differ by factors of up to 2^20."""
    spread = np.random.default_rng(seed + 100).integers(-8, 12, shape[:-1])
    return (normal(*shape, seed=seed) * torch.as_tensor(2.0**spread)[..., None]).to(dtype)


def _quantized(solution, x):
    """(values as fp32, scale as fp32) once shapes and types are right."""
    result = solution(x)
    expect(
        isinstance(result, (tuple, list)) and len(result) == 2,
        f"got {type(result).__name__}, expected the pair (x8, scale)",
        FORGOTTEN if result is None else "the numbers mean nothing without their scale: return both",
    )
    x8, scale = result
    expect_shape(x8, x.shape, torch.float8_e4m3fn, "x8")
    expect_shape(scale, x.shape[:-1], torch.float32, "scale")
    return tensor(x8).float(), tensor(scale)


def _number(x):
    return f"{float(x.flatten()[0]) if x.numel() else float('nan'):.6g}"


@quantize.property("shapes and types")
def quantize_shapes_and_types(solution):
    for seed, shape, dtype in (
        (1, (5, 8), torch.float32),
        (2, (3, 2, 37), torch.bfloat16),
        (3, (7,), torch.float32),
        (4, (1, 1), torch.bfloat16),
        (5, (3, 1, 2, 1), torch.float32),
    ):
        x = _rows(seed, *shape, dtype=dtype)
        for given in (x, strided(x)):  # after a transpose no .view joins the leading axes: .reshape does
            _quantized(solution, given)


@quantize.property("zero row")
def quantize_zero_row(solution):
    for row in (0, 2):
        x = _rows(4, 3, 16)
        x[row] = 0.0
        values, scale = _quantized(solution, x)
        expect(
            values[row].eq(0).all() and scale[row].isfinite() and scale[row] > 0,
            f"row {row} holds only zeros: got x8 {_number(values[row, 0])} with scale {_number(scale[row])}, "
            "expected 0 with a positive scale",
            "0 / 0: the largest magnitude needs a floor before it becomes a scale",
        )


@quantize.property("power of two")
def quantize_power_of_two(solution):
    for seed, shape in ((5, (37, 16)), (6, (4, 3, 5))):
        _, scale = _quantized(solution, _rows(seed, *shape))
        mantissa, _ = torch.frexp(scale)
        bad = scale[mantissa != 0.5]
        cause = "amax / 448 itself became the scale: round it up to a power of two"
        expect(len(bad) == 0, f"got the scale {_number(bad)}, expected 2^n", cause)


@quantize.property("one scale a vector")
def quantize_one_scale_a_vector(solution):
    for seed, shape in ((7, (4, 16)), (8, (2, 3, 5))):
        x = _rows(seed, *shape).abs()
        rows = x.view(-1, shape[-1])
        rows[1] = 64.0 * rows[0]  # the same vector, larger
        first, second = _quantized(solution, x)[1].flatten()[:2]
        expect(
            first != second,
            f"vector 1 is 64 times vector 0: got the scale {_number(first)} for both",
            "the largest magnitude was taken over more than the last axis: each vector has its own scale",
        )


@quantize.property("scale")
def quantize_scale(solution):
    edges = torch.tensor([448.0, -448.0, 450.0, 1.75]) * 2.0**12  # 448 · 2^n needs 2^n, 450 · 2^n more
    for seed, shape, dtype in (
        (8, (37, 16), torch.float32),
        (9, (2, 3, 5), torch.float32),
        (9, (6, 8), torch.bfloat16),
    ):
        x = _rows(seed, *shape, dtype=dtype)
        x.view(-1, shape[-1])[:4, 0] = edges.to(dtype)
        _, scale = _quantized(solution, x)
        amax, expected = x.float().abs().amax(dim=-1), reference(x)[1]
        exponent = (amax / E4M3_MAX).log2()
        suspects = {
            "the exponent was rounded down: amax / scale passes 448 and is clipped": 2.0 ** exponent.floor(),
            "the exponent was rounded to the nearest: amax / scale passes 448 in some rows": 2.0 ** exponent.round(),
            "the scale is upside down: x is divided by it, so that x is about x8 · scale": 1.0 / expected,
            "the sign got lost: the largest magnitude counts, not the largest number": reference(x.clamp(min=0.0))[1],
            "divided by 127, int8's largest value: e4m3's is 448": power_of_two_at_least(amax / 127.0),
            "the exponent is one too high: half of the range stays empty": expected * 2,
            "one too high where amax / 448 is a power of two already": 2.0 ** (exponent.floor() + 1),
        }
        cause = "is the scale the smallest power of two that keeps |x / scale| <= 448?"
        if dtype == torch.bfloat16:
            cause = "right for fp32, wrong for bf16: its logarithm is too coarse, so convert with .float() first"
        expect_close(scale, expected, 0.0, SCALES[scale.dim()], cause, suspects)


@quantize.property("amax floor")
def quantize_amax_floor(solution):
    x = normal(5, 16, seed=10) * torch.tensor([1e-3, 1e-5, 1e-7, 0.0, 1e-30])[:, None]
    _, scale = _quantized(solution, x)
    cause = f"amax is at least {AMAX_FLOOR}, for a vector of small numbers as for one of zeros"
    expect_close(scale, reference(x)[1], 0.0, "t", cause)
    for dtype in (torch.float32, torch.bfloat16):
        x = (normal(3, 16, seed=11) * torch.tensor([1e8, 1e20, 1e37])[:, None]).to(dtype)
        _, scale = _quantized(solution, x)
        expect_close(scale / reference(x)[1], torch.ones(3), 0.0, "t", "right for usual sizes, wrong for huge numbers")


@quantize.property("nearest value")
def quantize_nearest_value(solution):
    for seed, shape, dtype in ((11, (37, 16), torch.float32), (12, (3, 2, 5), torch.bfloat16)):
        x = _rows(seed, *shape, dtype=dtype)
        values, scale = _quantized(solution, x)
        y = x.float() / reference(x)[1][..., None]
        _, exponent = torch.frexp(y)
        step = 2.0 ** (exponent - 4).clamp(min=-9)
        suspects = {
            "digits were cut off instead of rounded to the nearest": (y / step).trunc() * step,
            "only whole numbers came out: e4m3 has fractions too": y.round().to(torch.float8_e4m3fn).float(),
            "large ones wrapped around, as 8-bit integers do beyond 127": ((y.round() + 128) % 256 - 128)
            .to(torch.float8_e4m3fn)
            .float(),
        }
        cause = "x8 is not x / scale: clamp to +-448, then cast to torch.float8_e4m3fn, which rounds to the nearest"
        expect_close(values, reference(x)[0].float(), 0.0, VECTORS[x.dim()], cause, suspects)


@quantize.property("small values")
def quantize_small_values(solution):
    x = torch.tensor([448.0, *(m * 2.0**-9 for m in (1, 2, 3, 5, 7, -1, -6, 0.4, 0.6))])[None].repeat(3, 1)
    x = x * torch.tensor([1.0, 2.0**-8, 2.0**5])[:, None]  # a scale of its own for each row
    values, _ = _quantized(solution, x)
    cause = "numbers below 2^-6 became zero: e4m3 goes on in steps of 2^-9 (subnormals)"
    expect_close(values * 512, reference(x)[0].float() * 512, 0.0, "t d", cause)


@quantize.property("every bit")
def quantize_every_bit(solution):
    middle = torch.tensor([1.0625, 1.1875, 208.0, 232.0, 0.0205078125])  # halfway between two numbers of e4m3
    close = torch.cat([middle * (1 + step) for step in (0.0, 2.0**-12, -(2.0**-12), 2.0**-20, -(2.0**-20))])
    x = torch.cat((torch.tensor([448.0, -0.0, -1e-4, 0.0, 1e-4, 2.0**-10, 3 * 2.0**-10]), close, -close))
    for scaled in (x[None], torch.stack((x, x * 2.0**-9, x * 2.0**30))):
        for given in (scaled, strided(scaled)):
            _quantized(solution, given)
            got, expected = (tensor(f(given)[0]).view(torch.uint8) for f in (solution, reference))
            bad = (got != expected).nonzero()
            if len(bad):
                t, d = bad[0].tolist()
                codes = f"got the byte {int(got[t, d])}, expected {int(expected[t, d])} ({len(bad)} bytes are wrong)"
                cause = (
                    "it was rounded twice, or halves away from even: cast the fp32 quotient once, by .to()"
                    if got[t, d] % 128
                    else "the sign of a zero is a bit too: -0.0 and small negative numbers become the byte 128"
                )
                raise Failed(f"t={t}, d={d}, x / scale = {float(x[d])!r}: {codes}", cause)


# ---------------------------------------------------------------------------------------------------------- hadamard


@hadamard.property("shape")
def hadamard_shape(solution):
    for seed, shape in ((1, (5, 8)), (2, (3, 2, 16)), (3, (4,)), (4, (1, 1)), (5, (3, 1, 2, 1))):
        expect_shape(solution(whole(*shape, seed=seed)), shape, torch.float32)


@hadamard.property("last axis")
def hadamard_last_axis(solution):
    for seed, shape in ((4, (8, 8)), (5, (4, 4, 4))):
        x = torch.zeros(shape)
        x.view(-1, shape[-1])[0] = whole(shape[-1], seed=seed) + 0.5
        empty = x.eq(0).all(dim=-1)
        expect(
            tensor(solution(x))[empty].eq(0).all(),
            f"x {list(shape)} with a single vector that is not zero: got other vectors that are not zero",
            "vectors were mixed with each other: each is turned by itself, along the last axis",
        )


@hadamard.property("length kept")
def hadamard_length_kept(solution):
    for seed, shape in ((6, (7, 16)), (7, (2, 3, 4))):
        x, places = whole(*shape, seed=seed), range(shape[-1])
        lost = torch.tensor([[float(i & j == 0) for j in places] for i in places])  # a + b, then (a + b) - b
        suspects = {
            "a was overwritten with a + b before a - b was computed: a slice shares its tensor's memory, so copy it "
            "first": (x @ lost).norm(dim=-1) / shape[-1] ** 0.5
        }
        cause = "the lengths of the vectors are named. A rotation keeps them: divide by sqrt(D), once"
        length = tensor(solution(x)).float().norm(dim=-1)
        expect_close(length, x.norm(dim=-1), 1e-5, SCALES[length.dim()], cause, suspects)


@hadamard.property("Sylvester order")
def hadamard_sylvester_order(solution):
    for seed, shape in ((8, (9, 2)), (9, (5, 8)), (10, (2, 3, 64))):
        x = whole(*shape, seed=seed)
        expected = rotate(x)
        D = shape[-1]
        mirrored = [int(f"{i:0{D.bit_length() - 1}b}"[::-1], 2) for i in range(D)]
        suspects = {
            "the right numbers in the wrong order (bits of the index reversed): a butterfly joins i and i + width, and "
            "its results stay in those two places": expected[..., mirrored],
            "a - b came out as b - a": expected * torch.tensor([(-1.0) ** bin(i).count("1") for i in range(D)]),
        }
        cause = "H[i, j] is (-1)^popcount(i & j) / sqrt(D): other signs, or another order of the rows"
        expect_close(solution(x), expected, 1e-5, VECTORS[x.dim()], cause, suspects)


@hadamard.property("any power of two")
def hadamard_any_power_of_two(solution):
    for D in (1, 4, 32, 128, 256, 1024):
        x = whole(3, D, seed=11 + D)
        cause = "D = 1 is a rotation too, by nothing" if D == 1 else f"wrong for D = {D}, right for other sizes"
        expect_close(solution(x), rotate(x), 1e-5, "t d", cause)


@hadamard.property("fp32 throughout")
def hadamard_fp32_throughout(solution):
    for seed, shape in ((13, (9, 64)), (14, (2, 3, 128)), (15, (16, 16))):
        x = normal(*shape, seed=seed)
        cause = "right for small whole numbers only: in fp16 or bf16 digits are lost"
        for given in (x, strided(x)):
            expect_close(solution(given), rotate(x.double()), 3e-6, VECTORS[x.dim()], cause)
            cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
        small = solution(x * 2**-30)
        expect_shape(small, x.shape)
        cause = "right for numbers near 1: what is small is turned too, and nothing is cut to 0"
        expect_close(tensor(small) * 2**30, rotate(x.double()), 3e-6, VECTORS[x.dim()], cause)
