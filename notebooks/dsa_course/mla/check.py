"""Notebook 06: cache bytes, the absorbed query, RoPE in two layouts, the softmax scale."""

import dataclasses
import math

import torch

from dsa_ref.config import TINY, V32, DSAConfig
from dsa_ref.cost import bf16_kv_bytes_per_token, fp8_kv_bytes_per_token
from dsa_ref.rope import rope as reference_rope

from ..checking import (
    FORGOTTEN,
    Check,
    expect,
    expect_close,
    expect_int,
    expect_number,
    expect_shape,
    normal,
    strided,
    tensor,
    unequal,
    whole,
)

# ------------------------------------------------------------------------------------------------------- cache_bytes

cache_bytes = Check("cache_bytes")  # (config) -> {"mha": int, "mla": int, "fp8": int}, bytes a token

ODD = DSAConfig(  # every size another number, and a latent that is no multiple of 128: no field can stand for another
    dim=100,
    n_heads=6,
    q_lora_rank=70,
    kv_lora_rank=320,
    qk_nope_head_dim=48,
    qk_rope_head_dim=24,
    v_head_dim=40,
    index_n_heads=5,
    index_head_dim=32,
    rope_factor=40.0,  # YaRN, as in V3.2
)


def _compare_bytes(solution, key, config, expected, suspects, cause):
    got = solution(config)
    names = FORGOTTEN if got is None else "return a dict of all three numbers, by name"
    expect(isinstance(got, dict), f"got {type(got).__name__}, expected a dict", names)
    expect(key in got, f"got the keys {sorted(map(str, got))}, expected {key!r}", "the three names are fixed")
    sizes = f"{key!r} (H={config.n_heads}, latent={config.kv_lora_rank}, rope={config.qk_rope_head_dim})"
    number = expect_number(got[key], sizes)
    for suspicion, answer in suspects.items():
        if number == answer != expected:
            cause = suspicion
    expect(number == expected, f"{sizes}: got {got[key]!r}, expected {expected} bytes a token", cause)


@cache_bytes.property("mha")
def cache_bytes_mha(solution):
    wide = dataclasses.replace(ODD, v_head_dim=48)
    for c in (ODD, wide, TINY, V32):  # in V3.2 nope is as wide as v, and H is 128 too: there some mistakes look alike
        H, nope, rope, v = c.n_heads, c.qk_nope_head_dim, c.qk_rope_head_dim, c.v_head_dim
        suspects = {
            "the values are missing": 2 * H * (nope + rope),
            "the rope part of each key is missing": 2 * H * (nope + v),
            "in MHA mode each head has a key of its own, rope part included": 2 * (H * (nope + v) + rope),
            "a bf16 number has 2 bytes": H * (nope + rope + v),
            "that is one head: there are H of them": 2 * (nope + rope + v),
            "the value is v wide and has no rope part": 4 * H * (nope + rope),
            "these are bits, asked were bytes": 16 * H * (nope + rope + v),
        }
        cause = "2 bytes for each number of H keys (nope + rope) and H values (v)"
        _compare_bytes(solution, "mha", c, 2 * H * (nope + rope + v), suspects, cause)


@cache_bytes.property("mla")
def cache_bytes_mla(solution):
    for c in (ODD, TINY, V32):
        H, latent, rope = c.n_heads, c.kv_lora_rank, c.qk_rope_head_dim
        suspects = {
            "one row serves all heads: do not multiply by H": 2 * H * (latent + rope),
            "the rope key is shared by all heads too": 2 * (latent + H * rope),
            "the latent is key and value at once: store it once": 2 * (2 * latent + rope),
            "the rope key is missing": 2 * latent,
        }
        cause = "2 bytes for each number of one row: latent + rope"
        _compare_bytes(solution, "mla", c, bf16_kv_bytes_per_token(c), suspects, cause)


@cache_bytes.property("fp8")
def cache_bytes_fp8(solution):
    for c in (dataclasses.replace(ODD, kv_lora_rank=1024, qk_rope_head_dim=28), V32):
        latent, rope, scales = c.kv_lora_rank, c.qk_rope_head_dim, 4 * (c.kv_lora_rank // 128)
        suspects = {
            "the scales are missing": latent + 2 * rope,
            "the rope part stays bf16: 2 bytes a number": latent + scales + rope,
            "one scale for each 128 numbers of the latent, not one a token": latent + 4 + 2 * rope,
            "a scale is an fp32 number: 4 bytes": latent + scales // 2 + 2 * rope,
            "each scale counts 4 bytes: it is an fp32 number": latent + scales // 4 + 2 * rope,
            f"one scale too many: {latent} numbers are {latent // 128} tiles, and the rope part, bf16, has none": scales
            + latent
            + 4 * -(-rope // 128)
            + 2 * rope,
        }
        cause = "1 byte for each number of the latent, 4 for each scale, 2 for each number of the rope part"
        _compare_bytes(solution, "fp8", c, fp8_kv_bytes_per_token(c), suspects, cause)


@cache_bytes.property("last scale")
def cache_bytes_last_scale(solution):
    for c in (ODD, dataclasses.replace(ODD, kv_lora_rank=129), dataclasses.replace(ODD, kv_lora_rank=1), TINY):
        latent, rope = c.kv_lora_rank, c.qk_rope_head_dim
        suspects = {
            "rounded down: a last tile of fewer than 128 numbers has a scale too": latent
            + 4 * (latent // 128)
            + 2 * rope,
            "half a scale does not exist: round the number of tiles up": latent + 4 * latent / 128 + 2 * rope,
            "rounded up one too far": latent + 4 * (latent // 128 + 2) + 2 * rope,
        }
        _compare_bytes(
            solution, "fp8", c, fp8_kv_bytes_per_token(c), suspects, "the number of scales is latent / 128, rounded up"
        )


@cache_bytes.property("ints")
def cache_bytes_ints(solution):
    for key, got in solution(ODD).items():
        if key in ("mha", "mla", "fp8"):
            expect_int(got, repr(key))


# ------------------------------------------------------------------------------------------------------------ absorb

absorb = Check("absorb")  # (q_nope [T, H, nope], kv_b [H, nope + v, latent]) -> [T, H, latent]


def _twice(W):
    """W_UK [H, nope, latent] as both halves of kv_b: then it does not matter which half is taken."""
    return torch.cat((W, W), dim=1)


@absorb.property("shape")
def absorb_shape(solution):
    for seed, T, H, size in ((1, 5, 3, 6), (2, 1, 4, 2), (3, 4, 1, 1), (4, 1, 1, 3)):  # square: a transpose still runs
        q, W = whole(T, H, size, seed=seed), whole(H, size, size, seed=seed + 10)
        expect_shape(solution(q, _twice(W)), (T, H, size))


@absorb.property("transpose")
def absorb_transpose(solution):
    for seed, T, size in ((3, 4, 6), (4, 1, 3)):
        q, W = whole(T, 1, size, seed=seed), whole(1, size, size, seed=seed + 10)
        wrong = torch.einsum("thn,hcn->thc", q, W)
        expected = torch.einsum("thn,hnc->thc", q, W)
        suspects = {
            "W_UK was used the other way round, and nope = latent hid it: sum over nope, W_UK's middle axis": wrong,
            "the softmax scale comes later, with the softmax": expected * size**-0.5,
        }
        expect_close(solution(q, _twice(W)), expected, 0.0, "t h c", "sum q_nope · W_UK over nope alone", suspects)


@absorb.property("own head")
def absorb_own_head(solution):
    for seed, T, H, nope, latent in ((5, 7, 3, 4, 9), (6, 37, 2, 5, 1)):
        q, W = whole(T, H, nope, seed=seed), whole(H, nope, latent, seed=seed + 10)
        suspects = {
            "every head used the matrices of all heads: h must stand in both factors": torch.einsum(
                "thn,gnc->thc", q, W
            ),
            "every head got the sum over heads": torch.einsum("thn,hnc->tc", q, W)[:, None].expand(-1, H, -1),
            "every head used the first head's matrix": torch.einsum("thn,nc->thc", q, W[0]),
            "the rows of kv_b were cut as if all heads' keys came first: each head has its keys, then its values": (
                torch.einsum("thn,hnc->thc", q, _twice(W).reshape(-1, latent)[: H * nope].view(H, nope, latent))
            ),
        }
        expected = torch.einsum("thn,hnc->thc", q, W)
        reshaped = expected.transpose(0, 1).reshape(T, H, latent)
        suspects["a reshape does not swap axes: [H, T, latent] becomes [T, H, latent] by transpose(0, 1)"] = reshaped
        expect_close(solution(q, _twice(W)), expected, 0.0, "t h c", "head h uses its own W_UK[h]", suspects)


@absorb.property("key half")
def absorb_key_half(solution):
    for seed, T, H, nope, v, latent in ((7, 5, 2, 4, 4, 9), (8, 3, 3, 4, 7, 6), (9, 3, 3, 5, 2, 8)):
        q, kv_b = whole(T, H, nope, seed=seed), whole(H, nope + v, latent, seed=seed + 10)
        suspects = {}
        if v >= nope:
            for rows in (kv_b[:, -nope:], kv_b[:, nope : 2 * nope]):
                if rows.shape[1] == nope:
                    suspects["that is W_UV, the value half: W_UK is the first nope rows of each head"] = torch.einsum(
                        "thn,hnc->thc", q, rows
                    )
                    break
        expected = torch.einsum("thn,hnc->thc", q, kv_b[:, :nope])
        cause = "W_UK is the first nope rows of each head, the rest is W_UV, and v need not be nope"
        expect_close(solution(q, kv_b), expected, 0.0, "t h c", cause, suspects)


@absorb.property("same score")
def absorb_same_score(solution):
    for seed, T, H, S, nope, v, latent in ((11, 37, 2, 11, 6, 5, 16), (12, 3, 5, 8, 32, 16, 64)):
        q, kv_b, c = (
            normal(T, H, nope, seed=seed),
            normal(H, nope + v, latent, seed=seed + 10),
            normal(S, latent, seed=13),
        )
        keys = torch.einsum("hnc,sc->shn", kv_b[:, :nope].double(), c.double())
        expected = torch.einsum("thn,shn->ths", q.double(), keys)
        cause = "right for small whole numbers, not for these: something was rounded, to bf16 or to integers"
        for given in ((q, kv_b), (strided(q), strided(kv_b))):
            got = solution(*given)
            expect_shape(got, (T, H, latent))
            got = torch.einsum("thc,sc->ths", tensor(got).double(), c.double())
            expect_close(got, expected, 1e-5, "t h s", cause)
            cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"


# -------------------------------------------------------------------------------------------------------------- rope

rope = Check("rope")  # (x [T, heads, D], positions int64 [T], freqs fp32 [R/2], layout) -> [T, heads, D]

LAYOUTS = ("interleaved", "half")
FREQS = torch.tensor([1.0, 0.31, 0.09, 0.02])  # R = 8


def _positions(T, seed):
    """Neither sorted nor 0, 1, 2, ...: a position is not a row's number."""
    return whole(T, seed=seed, largest=40, dtype=torch.int64).abs() + 1


@rope.property("rest unchanged")
def rope_rest_unchanged(solution):
    for seed, T, heads, D in ((1, 5, 2, 11), (2, 37, 1, 16)):
        x = normal(T, heads, D, seed=seed)
        for layout in LAYOUTS:
            got = solution(x, _positions(T, seed), FREQS, layout)
            expect_shape(got, x.shape)
            got = tensor(got)
            cause = "only the first 2 · len(freqs) dims turn, the rest of x passes through as it is"
            expect_close(got[..., 8:], x[..., 8:], 0.0, "t h d", cause)


@rope.property("norm")
def rope_norm(solution):
    for seed, T, heads in ((3, 37, 1), (4, 5, 3)):  # one pair: both layouts mean the same
        x = normal(T, heads, 2, seed=seed)
        got = solution(x, _positions(T, seed), FREQS[1:2], "half")
        expect_shape(got, x.shape)
        cause = (
            "no rotation: a becomes a cos - b sin, and b becomes b cos + a sin with the *old* a. "
            "Check the two signs, and that a was not overwritten before b was computed"
        )
        expect_close(tensor(got).float().norm(dim=-1), x.norm(dim=-1), 1e-5, "t h", cause)


@rope.property("one pair")
def rope_one_pair(solution):
    for seed, T, heads in ((5, 37, 1), (6, 4, 2)):
        x, at = normal(T, heads, 2, seed=seed), _positions(T, seed)
        freqs, one = FREQS[1:2], torch.ones(1)
        suspects = {
            "turned the wrong way round: the sign of the angle": reference_rope(x, -at, freqs, "half"),
            "the row's number was taken for its position: use positions": reference_rope(
                x, torch.arange(T), freqs, "half"
            ),
            "nothing was turned": x,
            "the frequency was not applied: the angle is position · frequency": reference_rope(x, at, one, "half"),
            "angles are in radians, not in degrees": reference_rope(x, at, freqs * math.pi / 180, "half"),
            "the angle was divided by the frequency": reference_rope(x, at, 1 / freqs, "half"),
        }
        for layout in LAYOUTS:
            got = solution(x, at, freqs, layout)
            cause = "the angle is positions[t] · freqs[i], in radians"
            expect_close(got, reference_rope(x, at, freqs, layout), 1e-5, "t h d", cause, suspects)


@rope.property("frequencies")
def rope_frequencies(solution):
    for seed, T, freqs in ((7, 9, FREQS), (8, 5, FREQS[[1, 3]])):
        at, last = _positions(T, seed), 2 * len(freqs) - 1
        for layout in LAYOUTS:
            for d in (0, last):  # dims 0 and R - 1 belong to the first and the last pair in either layout
                x = torch.zeros(T, 1, last + 2)
                x[..., d] = 1.0
                got = solution(x, at, freqs, layout)
                expect_shape(got, x.shape)
                got = tensor(got)[:, :, d]
                expected = reference_rope(x, at, freqs, layout)[:, :, d]
                cause = f"dim {d} turns by position · freqs[{0 if d == 0 else len(freqs) - 1}]: each pair has its own"
                expect_close(got, expected, 1e-5, "t h", cause)


@rope.property("relative position")
def rope_relative_position(solution):
    for seed, heads, D in ((9, 2, 12), (10, 1, 8)):
        q, k, at = normal(7, heads, D, seed=seed), normal(7, heads, D, seed=seed + 10), _positions(7, seed)
        for layout in LAYOUTS:

            def dots(shift):
                turned = (solution(x, at + shift + far, FREQS, layout) for x, far in ((q, 3), (k, 0)))  # noqa: B023
                a, b = (tensor(x) for x in turned)
                return (a * b).sum(dim=-1)

            for shift in (1, 17):
                cause = (
                    f"q·k at distance 3 changed when both moved by {shift}, layout {layout!r}: the two numbers of a "
                    "pair must turn by the same angle (pair up cos and sin in the layout in which you pair up x)"
                )
                expect_close(dots(shift), dots(0), 1e-4, "t h", cause)


@rope.property("layouts")
def rope_layouts(solution):
    for seed, T, heads, D in ((11, 37, 3, 12), (12, 2, 1, 8), (13, 1, 1, 9), (14, 8, 8, 8)):
        x, at = normal(T, heads, D, seed=seed), _positions(T, seed)
        for layout, other in (LAYOUTS, LAYOUTS[::-1]):
            expected = reference_rope(x, at, FREQS, layout)
            halves_first = torch.cat((expected[..., 0:8:2], expected[..., 1:8:2], expected[..., 8:]), dim=-1)
            alternating = torch.stack((expected[..., :4], expected[..., 4:8]), dim=-1).flatten(-2)
            order = halves_first if layout == "interleaved" else torch.cat((alternating, expected[..., 8:]), dim=-1)
            suspects = {
                f"{layout!r} was done as {other!r}: interleaved pairs 2i with 2i + 1, half pairs i with i + R/2": (
                    reference_rope(x, at, FREQS, other)
                ),
                "the right pairs, but the result was left in the other order: put each number back in its place": order,
            }
            cause = f"{layout!r} pairs the wrong numbers, or puts them back in the wrong places"
            expect_close(solution(x, at, FREQS, layout), expected, 1e-5, "t h d", cause, suspects)
    cause = "wrong for tensors that are not contiguous, as after a transpose: reshape, do not view"
    expect_close(solution(strided(x), at, FREQS, layout), expected, 1e-5, "t h d", cause)


@rope.property("angles in fp32")
def rope_angles_in_fp32(solution):
    for seed, T, step in ((13, 9, 100), (14, 37, 4000)):  # up to V3.2's 163,840 positions
        x, at = normal(T, 2, 12, seed=seed, dtype=torch.bfloat16), _positions(T, seed) * step + 7
        for layout in LAYOUTS:
            expected = reference_rope(x, at, FREQS, layout)
            cause = (
                "right near position 0, wrong far away: compute angles in fp32, even for x in bf16 (which keeps 8 bits)"
            )
            expect_close(solution(x, at, FREQS, layout), expected, 2e-2, "t h d", cause)
    x, at, slow = normal(2, 2, 5, seed=9), torch.tensor([100_000, 7]), torch.tensor([1e-3, 3e-6])
    cause = "a frequency of 3e-6, V3.2's slowest under YaRN: at position 100,000 its pair has turned by 0.3"
    for layout in LAYOUTS:
        expect_close(solution(x, at, slow, layout), reference_rope(x, at, slow, layout), 1e-4, "t h d", cause)


# ----------------------------------------------------------------------------------------------------- softmax_scale

softmax_scale = Check("softmax_scale")  # (config) -> float


def _compare_scale(solution, config, suspects, cause):
    got = solution(config)
    right, got = config.softmax_scale, expect_number(got)
    for suspicion, answer in suspects.items():
        if math.isclose(got, answer, rel_tol=1e-6) and not math.isclose(answer, right, rel_tol=1e-6):
            cause = suspicion
    expect(math.isclose(got, right, rel_tol=1e-6), unequal(got, right), cause)


@softmax_scale.property("key width")
def softmax_scale_key_width(solution):
    for c in (TINY, ODD, V32):
        c = dataclasses.replace(c, max_seq_len=c.original_seq_len, rope_factor=1.0)  # with factor 1, m is 1 anyway
        suspects = {
            "the width of the cached row: that is how the product is computed, not what it is": c.latent_dim**-0.5,
            "the rope part belongs to the key as well": c.qk_nope_head_dim**-0.5,
            "that is the width of the value": c.v_head_dim**-0.5,
            "one over the width: the root is missing": 1 / (c.qk_nope_head_dim + c.qk_rope_head_dim),
            "a root, but not one over it": (c.qk_nope_head_dim + c.qk_rope_head_dim) ** 0.5,
        }
        cause = "(nope + rope)^-0.5: the width of the key of one head, 192 in V3.2"
        _compare_scale(solution, c, suspects, cause)


@softmax_scale.property("yarn condition")
def softmax_scale_yarn_condition(solution):
    for c in (
        TINY,
        dataclasses.replace(V32, max_seq_len=4096),
        dataclasses.replace(ODD, max_seq_len=8192, original_seq_len=8192),
    ):
        cause = f"max_seq_len {c.max_seq_len} is not above original_seq_len {c.original_seq_len}: no YaRN, so no m"
        _compare_scale(solution, c, {}, cause)


@softmax_scale.property("m squared")
def softmax_scale_m_squared(solution):
    stretched = [dataclasses.replace(ODD, rope_factor=factor) for factor in (8.0, 2.0, 1.25)]
    for c in (V32, *stretched, dataclasses.replace(TINY, max_seq_len=4097)):
        plain, log = (c.qk_nope_head_dim + c.qk_rope_head_dim) ** -0.5, math.log(c.rope_factor)
        suspects = {
            "YaRN is on here, and m is missing": plain,
            "m once: it scales the query and the key, so the product has it squared": plain * (0.1 * log + 1),
            "the natural logarithm, not the one to base 2": plain * (0.1 * log / math.log(2) + 1) ** 2,
            "the natural logarithm, not the one to base 10": plain * (0.1 * log / math.log(10) + 1) ** 2,
            "the logarithm of the stretch, not the stretch itself": plain * (0.1 * c.rope_factor + 1) ** 2,
        }
        _compare_scale(solution, c, suspects, "times m², with m = 0.1 · mscale · ln(rope_factor) + 1")


@softmax_scale.property("mscale")
def softmax_scale_mscale(solution):
    for mscale in (0.707, 0, 2.0):
        c = dataclasses.replace(V32, mscale=mscale)
        cause = f"mscale is {mscale} here: m = 0.1 · mscale · ln(rope_factor) + 1"
        _compare_scale(solution, c, {}, cause)
