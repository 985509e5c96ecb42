"""Notebook 09: the gather and sparse attention as Triton kernels. `triton_online_softmax` has the other two."""

import ast
import math

import numpy as np
import torch

from dsa_ref.sparse_attention import sparse_attention
from dsa_ref.testing import Failed

from .. import interpreting, launching
from ..checking import Check, bits, expect, normal, whole
from ..launching import LONG, NARROW
from ..toy import toy

gather_kernel = Check("gather_kernel")  # (kv_ptr, indices_ptr, out_ptr, k, D, kv_row, BK, DP), grid (cdiv(k, BK),)
sparse_attention_kernel = Check("sparse_attention_kernel")  # see `_attend`, grid (T,)

SEEDS = (1, 2)
CLOSE = 2e-5  # fp32, and exp is approximate on a GPU
FAR = torch.tensor([0, *(2**n + i for n in (7, 8, 15, 16) for i in (-1, 0, 1)), 1, 2, LONG - 1], dtype=torch.int32)


def padded(n):
    """The power of two that a tile takes for n lanes; tl.dot wants at least 16."""
    return max(16, 1 << (n - 1).bit_length())


def _expect_wide(kernel, grid, *args, reached, cause, **constants):
    """Offsets that end at 2^31 elements are seen by the addresses that they give; compiled, by the source alone.

    reached: {tensor's name: (tensor, offsets in elements)}, what the kernel must load or store.
    """
    with interpreting.accesses(real=False) as found:
        if interpreting.interpreter() is not None and launching.device() == "cpu":
            launching.launch(kernel, grid, *args, **constants)
    seen = {int(address) for access in found if access.floats for address in access.addresses}
    for name, (x, offsets) in reached.items():
        missed = set((x.data_ptr() + x.element_size() * offsets).ravel().tolist()) - seen
        narrow = missed if seen else "int64" not in ast.unparse(ast.parse(launching.source(kernel)))
        expect(not narrow, f"offsets into {name} in int32, which ends at 2^31 elements", cause)


def _guarded_indices(indices):
    """Indices with row 1 on either side instead of the largest integer, which would send a stray gather to a crash."""
    inside = launching.guarded(indices)
    inside.untyped_storage().copy_(torch.ones_like(_buffer(inside)).untyped_storage())
    return inside.copy_(indices)


def _buffer(tensor):
    return torch.as_strided(tensor, (tensor.untyped_storage().nbytes() // tensor.element_size(),), (1,), 0)


def _pick(S, *shape, seed):
    """int32 [*shape], distinct in a row, of rows 1 to S - 2, but for one 0: neither end is a key by accident."""
    rng = np.random.default_rng(seed)
    *rows, k = shape
    picked = np.stack([1 + rng.permutation(S - 2)[:k] for _ in range(math.prod(rows))])
    picked[:, k // 2] = 0
    return torch.from_numpy(picked.astype(np.int32).reshape(shape))


# ----------------------------------------------------------------------------------------------------------- gather


def _gather(kernel, kv, indices, gap=0, launch=launching.launch, BK=16, programs=None):
    k, D = len(indices), kv.shape[1]
    kv, out = launching.guarded(kv, gap), launching.output(k, D)
    launch(
        kernel, (programs or math.ceil(k / BK),), kv, _guarded_indices(indices), out, k, D, kv.stride(0),
        BK=BK, DP=padded(D),
    )  # fmt: skip
    return out


def _rows(kv, indices):
    return torch.where(indices[:, None] < 0, 0.0, kv[indices.clamp(min=0)])


def _expect_rows(kernel, kv, indices, cause, gap=0):
    got = _gather(kernel, kv, indices, gap)
    suspects = {
        "those are the first rows of kv: the indices were not looked up": kv[torch.arange(len(indices)) % len(kv)],
        "-1 was taken for row 0: a clamped index is inside the tensor, but it is a key": kv[indices.clamp(min=0)],
        "-1 was taken for the last row of kv": kv[indices],
    }
    launching.expect_result(got, _rows(kv, indices), 0.0, "j d", cause, suspects)


@gather_kernel.property("rows")
def gather_kernel_rows(kernel):
    for seed in SEEDS:
        kv = whole(29, 16, seed=seed, largest=99)
        _expect_rows(kernel, kv, _pick(29, 16, seed=seed), "row j of the output is kv[indices[j]]")
        cause = "a row is copied as it is: its numbers are fp32, not rounded and not cut"
        _expect_rows(kernel, 3e4 * normal(29, 16, seed=seed), _pick(29, 16, seed=seed), cause)
    kv = torch.tensor([-0.0, 0.0, math.inf, -math.inf, math.nan, 1e-45, -1e38, 1 / 3]).repeat(17, 2)
    got = _gather(kernel, kv, torch.arange(1, 17, dtype=torch.int32)).cpu()
    wrong = (bits(got) != bits(kv[1:17])).nonzero().tolist()
    if wrong:
        j, d = wrong[0]
        what = f"j={j}, d={d}: got {float(got[j, d])!r}, expected {float(kv[j + 1, d])!r}, with the same bits"
        raise Failed(what, "a copy changes nothing: nothing is added to a number, NaN or not")
    kv = whole(LONG, 3, seed=4, largest=99)
    _expect_rows(kernel, kv, FAR, f"right for short caches alone: {NARROW}")


@gather_kernel.property("every tile")
def gather_kernel_every_tile(kernel):
    for seed in SEEDS:
        kv = whole(50, 16, seed=seed, largest=99)
        _expect_rows(kernel, kv, _pick(50, 48, seed=seed), "program p owns the places j from p · BK on")
        others = _gather(kernel, kv, _pick(50, 48, seed=seed), programs=1)[16:]
        cause = "a program copies its own BK places: if each copies all, many programs are no faster than one"
        expect(launching.unwritten(others).all(), "program 0 wrote places from j=16 on, which are not its own", cause)

    def launch(kernel, grid, kv, indices, out, *args, **constants):
        def own(p, *_):
            return out[16 * p : 16 * p + 16]

        cause = "program p copies the places j from p · BK to p · BK + BK - 1"
        launching.expect_own_places(kernel, grid, kv, indices, out, *args, own=own, cause=cause, **constants)

    _gather(kernel, kv, _pick(50, 37, seed=3), launch=launch)


@gather_kernel.property("padding")
def gather_kernel_padding(kernel):
    for seed in SEEDS:
        kv, indices = whole(29, 16, seed=seed, largest=99), _pick(29, 16, seed=seed)
        indices[[0, 5, 15]] = -1
        cause = "-1 has no row: mask the load (else it reads what lies before kv, here NaN), with other=0.0"
        _expect_rows(kernel, kv, indices, cause)


@gather_kernel.property("row stride")
def gather_kernel_row_stride(kernel):
    for seed in SEEDS:
        kv = whole(29, 16, seed=seed, largest=99)
        cause = "rows of kv are kv_row apart, which need not be D: here 5 elements of NaN lie between two rows"
        _expect_rows(kernel, kv, _pick(29, 16, seed=seed), cause, gap=5)


@gather_kernel.property("narrow rows")
def gather_kernel_narrow_rows(kernel):
    for seed, D in zip((*SEEDS, 3), (12, 3, 21), strict=True):
        kv = whole(29, D, seed=seed, largest=99)
        cause = "D is smaller than the tile's DP lanes: mask them, and let the output's rows be D apart"
        _expect_rows(kernel, kv, _pick(29, 16, seed=seed), cause)


@gather_kernel.property("tail")
def gather_kernel_tail(kernel):
    for seed, k in zip(SEEDS, (21, 1), strict=True):
        kv = whole(29, 16, seed=seed, largest=99)
        _expect_rows(kernel, kv, _pick(29, k, seed=seed), "k is no multiple of BK: the last tile is partly filled")
    x = toy()
    _expect_rows(kernel, x.kv, torch.tensor([0, 2, 5, -1], dtype=torch.int32), "the toy's row {0, 2, 5}")
    indices = _pick(29, 21, seed=3)
    indices[[0, 7]] = -1
    _gather(kernel, whole(29, 12, seed=3), indices, 5, launching.expect_reads_inside)


@gather_kernel.property("wide offsets")
def gather_kernel_wide_offsets(kernel):
    kv, out, indices = launching.guarded(whole(29, 16, seed=1)), launching.output(3, 16), _pick(29, 3, seed=1)
    far = 2**30
    _expect_wide(
        kernel, (1,), kv, _guarded_indices(indices), out, 3, 16, far, BK=16, DP=16,
        reached={"kv": (kv, indices.numpy().astype(np.int64)[:, None] * far + np.arange(16))},
        cause="indices are int32, and index · kv_row passes 2^31 in a large cache: widen the index with .to(tl.int64) "
        "before the product, not the product",
    )  # fmt: skip


# ------------------------------------------------------------------------------------------------- sparse attention


def _attend(kernel, q, kv, indices, v_dim, scale=0.4, gap=0, BK=16, launch=launching.launch):
    (T, H, D), k = q.shape, indices.shape[1]
    out, lse = launching.output(T, H, v_dim), launching.output(T, H)
    kv = launching.guarded(kv, gap)
    launch(
        kernel, (T,), launching.guarded(q), kv, _guarded_indices(indices), out, lse, scale, H, D, v_dim, k,
        kv.stride(0), BH=padded(H), BK=BK, DP=padded(D),
    )  # fmt: skip
    return out, lse


def _expect_attention(
    kernel, q, kv, indices, v_dim, cause, suspects=None, which="out lse", scale=0.4, tolerance=CLOSE, **options
):
    out, lse = sparse_attention(q, kv, indices, scale, v_dim)
    got = _attend(kernel, q, kv, indices, v_dim, scale, **options)
    if "out" in which:
        launching.expect_result(got[0], out, tolerance, "t h v", cause, suspects)
    if "lse" in which:
        base_2 = {"that is the lse in base 2": lse / math.log(2)}
        launching.expect_result(got[1], lse, tolerance, "t h", cause, base_2)


def _inputs(seed, T, H, S, D, k):
    """Small whole numbers: their products are exact in any precision, which has a property of its own."""
    return whole(T, H, D, seed=seed, largest=2), whole(S, D, seed=seed + 10, largest=2), _pick(S, T, k, seed=seed + 20)


@sparse_attention_kernel.property("one tile")
def sparse_attention_kernel_one_tile(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 3, 16, 29, 16, 16)
        suspects = {
            "the logits were not scaled": sparse_attention(q, kv, indices, 1.0, 16)[0],
            "every program took query 0": sparse_attention(q[:1].expand_as(q), kv, indices, 0.4, 16)[0],
            "every program took the indices of query 0": sparse_attention(q, kv, indices[:1].repeat(3, 1), 0.4, 16)[0],
        }  # fmt: skip
        cause = "program t: softmax over its selected rows of scale · q[t] · rows, times the rows"
        _expect_attention(kernel, q, kv, indices, 16, cause, suspects, "out")


@sparse_attention_kernel.property("natural lse")
def sparse_attention_kernel_natural_lse(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 3, 16, 29, 16, 16)
        _expect_attention(kernel, q, kv, indices, 16, "lse is m + log(l), in natural logarithms", which="lse")


@sparse_attention_kernel.property("value columns")
def sparse_attention_kernel_value_columns(kernel):
    for seed, V in zip(SEEDS, (8, 5), strict=True):
        q, kv, indices = _inputs(seed, 3, 16, 29, 16, 16)
        cause = "the value is the first V columns of a row, and the output's rows are V long"
        _expect_attention(kernel, q, kv, indices, V, cause)


@sparse_attention_kernel.property("several tiles")
def sparse_attention_kernel_several_tiles(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 2, 16, 160, 16, 128)
        order = (q[:, :1] @ kv.T)[:, 0].gather(1, indices.long()).argsort(1)  # head 0's logits rise, others are mixed
        indices = indices.gather(1, order)
        for BK in (16, 32, 64):
            cause = f"128 keys in tiles of {BK}: m, l and acc go on, and l and acc are rescaled when m rises"
            suspects = {
                "only the last tile counts": sparse_attention(q, kv, indices[:, -BK:].contiguous(), 0.4, 16)[0],
                "only the first tile counts": sparse_attention(q, kv, indices[:, :BK].contiguous(), 0.4, 16)[0],
            }
            _expect_attention(kernel, q, kv, indices, 16, cause, suspects, BK=BK)
    q, kv, indices = _inputs(3, 1, 1, 600, 16, 560)
    _expect_attention(kernel, q, kv, indices, 16, "560 keys in 35 tiles of 16: right for a few tiles alone")


def _for_nothing(row, kv, indices):
    """(kv, indices) where each -1 leads to a copy of `row`: one for each place, since a list names a row once."""
    S, k = len(kv), indices.shape[1]
    places = torch.arange(S, S + k, dtype=torch.int32)
    return torch.cat([kv, row.expand(k, -1)]), torch.where(indices < 0, places, indices)


@sparse_attention_kernel.property("tail")
def sparse_attention_kernel_tail(kernel):
    for seed, k in zip(SEEDS, (33, 3), strict=True):
        q, kv, indices = _inputs(seed, 3, 16, 80, 16, k)
        lanes = torch.nn.functional.pad(indices, (0, -k % 16), value=-1)
        suspects = {
            "lanes past k got a logit of 0 and a share of the sum: their logit is -inf":
            sparse_attention(q, *_for_nothing(torch.zeros(16), kv, lanes), 0.4, 16)[0],
        }  # fmt: skip
        cause = "k is no multiple of BK: lanes from k on get index -1, a row of zeros (both by `other`), logit -inf"
        _expect_attention(kernel, q, kv, indices, 16, cause, suspects)


@sparse_attention_kernel.property("padding")
def sparse_attention_kernel_padding(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 3, 16, 80, 16, 32)
        indices[0, 20:] = indices[1, 3:12] = indices[2, :3] = indices[2, 16] = -1  # a tile may begin with it
        suspects = {
            "-1 got a logit of 0 and a share of the sum: its logit is -inf":
            sparse_attention(q, *_for_nothing(torch.zeros(16), kv, indices), 0.4, 16)[0],
            "-1 was taken for row 0": sparse_attention(q, *_for_nothing(kv[0], kv, indices), 0.4, 16)[0],
        }  # fmt: skip
        cause = "-1 has no row: mask the gather (without, it reads what lies before kv, here NaN) and the logit"
        _expect_attention(kernel, q, kv, indices, 16, cause, suspects)


@sparse_attention_kernel.property("empty row")
def sparse_attention_kernel_empty_row(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 3, 16, 80, 16, 32)
        indices[0] = -1
        indices[1, :16] = -1
        cause = (
            "no key so far: m stays -inf, and -inf minus -inf is NaN; no key at all: out is 0, lse -inf and no number"
        )
        _expect_attention(kernel, q, kv, indices, 16, cause)


@sparse_attention_kernel.property("empty tile")
def sparse_attention_kernel_empty_tile(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 3, 16, 80, 16, 48)
        indices[0, 16:] = indices[1, 16:32] = indices[2, :16] = indices[2, 32:] = -1
        cause = (
            "a tile that is all -1, as a short row's last ones are, changes nothing: m, l and acc stay, and keys may "
            "still follow it"
        )
        _expect_attention(kernel, q, kv, indices, 16, cause)


@sparse_attention_kernel.property("few heads, odd sizes")
def sparse_attention_kernel_few_heads_odd_sizes(kernel):
    for seed, H, D, V in zip(SEEDS, (3, 1), (12, 21), (7, 21), strict=True):
        q, kv, indices = _inputs(seed, 2, H, 80, D, 21)
        cause = "H and D are smaller than the tile: lanes past them load 0 and are not stored"
        _expect_attention(kernel, q, kv, indices, V, cause, scale=0.7)
        cause = "rows of kv are kv_row apart, which need not be D: here NaN lies between two rows"
        _expect_attention(kernel, q, kv, indices, V, cause, gap=5)
    q, kv, _ = _inputs(3, 1, 1, LONG, 3, 1)
    _expect_attention(kernel, q, kv, FAR[None], 3, f"right for short caches alone: {NARROW}")
    x = toy()
    indices = torch.tensor([[0, 2, 5]] * 8, dtype=torch.int32)
    _expect_attention(kernel, x.q, x.kv, indices, 2, "the toy with {0, 2, 5} for all: 2 heads of 4 numbers, value 2")


@sparse_attention_kernel.property("large logits")
def sparse_attention_kernel_large_logits(kernel):
    for seed in SEEDS:
        q, kv, indices = _inputs(seed, 2, 16, 80, 16, 48)
        cause = (
            "fp32's exp overflows at 88 and vanishes below -104: before exp subtract m, to every head its own, the "
            "largest logit of all tiles so far, not of this one"
        )
        _expect_large(kernel, 100 * q, kv, indices, cause)
        cause = "every logit lies far below 0 here: m starts at -inf, so that the first tile sets it"
        _expect_large(kernel, -8192 * q.abs().clamp(min=1), kv.abs().clamp(min=1), indices, cause)


def _expect_large(kernel, q, kv, indices, cause):
    """A logit of size x is known to x · 2^-24 and a few roundings more, and so is exp of it."""
    tolerance = CLOSE + 0.4 * float((q.abs() @ kv.abs().T).max()) * 2.0**-21
    _expect_attention(kernel, q, kv, indices, 16, cause, tolerance=tolerance)


@sparse_attention_kernel.property("full precision")
def sparse_attention_kernel_full_precision(kernel):
    q, kv, indices = normal(2, 3, 12, seed=3), normal(80, 12, seed=4), _pick(80, 2, 21, seed=5)
    _attend(kernel, q, kv, indices, 7, launch=launching.expect_full_precision)
    _expect_attention(kernel, q, kv, indices, 7, "q, rows, p, a product or a sum in less than fp32")
    indices[:, ::4] = -1
    _attend(kernel, q, kv, indices, 7, gap=5, launch=launching.expect_reads_inside)


@sparse_attention_kernel.property("wide offsets")
def sparse_attention_kernel_wide_offsets(kernel):
    q, kv = launching.guarded(whole(3, 1, 16, seed=1)), launching.guarded(whole(29, 16, seed=2))
    out, lse, indices, far = launching.output(3, 1, 16), launching.output(3, 1), _pick(29, 3, 3, seed=1), 2**30
    row, columns = np.arange(3)[:, None] * far, np.arange(16)
    _expect_wide(
        kernel, (3,), q, kv, _guarded_indices(indices), out, lse, 0.4, 1, far, far, 3, far, BH=16, BK=16, DP=16,
        reached={
            "kv": (kv, indices.numpy().astype(np.int64).reshape(-1, 1) * far + columns),
            "q": (q, row + columns),
            "out": (out, row + columns),
        },
        cause="widen before the product, as in one_head_kernel: the program id and the index are int32",
    )  # fmt: skip
