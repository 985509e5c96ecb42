"""Attention over selected rows against a softmax written out in float64, and what -1, order and size may not change."""

import importlib

import pytest
import torch
from inputs import assert_close, assert_same_bits, normal, random_indices, strided

import dsa_ref

# T, S, H, D, v_dim, k: no power of two, v_dim = D, one head, more places than keys, more than one tile of keys
SHAPES = [
    (1, 1, 1, 16, 16, 1),
    (37, 37, 3, 40, 24, 9),
    (5, 64, 4, 40, 40, 70),
    (3, 50, 17, 72, 64, 33),
    (2, 700, 1, 48, 32, 600),
]


def inputs(T, S, H, D, k, seed=0, dtype=torch.float32, device="cpu"):
    q, kv = (
        normal(T, H, D, seed=seed, dtype=dtype, device=device),
        normal(S, D, seed=seed + 1, dtype=dtype, device=device),
    )
    return q, kv, random_indices(T, S, k, seed=seed, device=device)


def written_out(q, kv, indices, scale, v_dim):
    """(out, lse) in float64, one row at a time, from the definition."""
    q, kv = q.detach().cpu().double(), kv.detach().cpu().double()
    out = torch.zeros(*q.shape[:2], v_dim, dtype=torch.float64)
    lse = torch.full(q.shape[:2], -torch.inf, dtype=torch.float64)
    for t, row in enumerate(indices.tolist()):
        rows = kv[[s for s in row if s >= 0]]
        if len(rows):
            logits = scale * q[t] @ rows.T
            out[t], lse[t] = logits.softmax(dim=-1) @ rows[:, :v_dim], logits.logsumexp(dim=-1)
    return out, lse


def check(ops, q, kv, indices, scale, v_dim, tolerance):
    out, lse = ops.sparse_attention(q, kv, indices, scale, v_dim)
    assert out.dtype == q.dtype and lse.dtype == torch.float32
    wanted_out, wanted_lse = written_out(q, kv, indices, scale, v_dim)
    assert_close(out, wanted_out, tolerance)
    assert_close(lse, wanted_lse, min(tolerance, 1e-5))
    return out, lse


@pytest.mark.parametrize("T, S, H, D, v_dim, k", SHAPES)
@pytest.mark.parametrize("seed", (0, 1))
def test_against_the_definition(ops, device, poisoned, small_blocks, T, S, H, D, v_dim, k, seed):
    check(ops, *inputs(T, S, H, D, k, seed, device=device), D**-0.5, v_dim, 5e-6)


@pytest.mark.parametrize("dtype, tolerance", [(torch.bfloat16, 8e-3), (torch.float16, 1e-3)])
def test_narrow_inputs(ops, device, poisoned, dtype, tolerance):
    """Inputs and output round to the narrow type, sums and the log-sum-exp do not."""
    check(ops, *inputs(9, 64, 4, 72, 33, dtype=dtype, device=device), 72**-0.5, 64, tolerance)


def test_nothing_selected(ops, device, poisoned):
    q, kv, indices = inputs(3, 9, 2, 40, 5, device=device)
    out, lse = ops.sparse_attention(q, kv, torch.full_like(indices, -1), 0.2, 24)
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_one_selected(ops, device):
    """The softmax over one key is 1: its value row comes back as it is, and its logit is the log-sum-exp."""
    q, kv, _ = inputs(3, 9, 2, 40, 5, device=device)
    indices = torch.full((3, 5), -1, dtype=torch.int32, device=device)
    indices[:, 3] = torch.tensor([8, 0, 4])
    out, lse = ops.sparse_attention(q, kv, indices, 0.2, 24)
    assert torch.equal(out, kv[[8, 0, 4], None, :24].expand(3, 2, 24))
    assert_close(lse, 0.2 * (q * kv[[8, 0, 4], None]).sum(dim=-1), 1e-6)


def test_unselected_rows_are_never_read(ops, device):
    """NaN in every row that is not selected, row 0 among them, which -1 must not stand for."""
    q, kv, _ = inputs(3, 9, 2, 40, 5, device=device)
    indices = torch.tensor([[3, -1, 5, -1, -1], [5, 6, 3, -1, -1], [-1] * 5], dtype=torch.int32, device=device)
    wanted = ops.sparse_attention(q, kv, indices, 0.2, 24)
    kv[[0, 1, 2, 4, 7, 8]] = torch.nan
    for got, value in zip(ops.sparse_attention(q, kv, indices, 0.2, 24), wanted, strict=True):
        assert_same_bits(got, value)


def test_order_within_a_row_does_not_matter(ops, device):
    q, kv, indices = inputs(9, 64, 2, 40, 33, device=device)
    wanted = ops.sparse_attention(q, kv, indices, 0.2, 24)
    for got, value in zip(ops.sparse_attention(q, kv, indices.flip(1), 0.2, 24), wanted, strict=True):
        assert_close(got, value, 1e-6)


@pytest.mark.parametrize("scale", (30.0, 1e-6))
def test_extreme_logits(ops, device, scale):
    """Logits in the hundreds neither overflow nor vanish; with a tiny scale the output is the plain mean."""
    q, kv, indices = inputs(9, 64, 2, 40, 33, device=device)
    out, lse = check(ops, q, kv, indices, scale, 24, 3e-5)
    assert out.isfinite().all() and lse[1:].isfinite().all()


@pytest.mark.parametrize("descending", (False, True))
def test_running_maximum(ops, device, descending):
    """More keys than any tile holds, sorted by their logit: the maximum moves with every tile, or never again."""
    q, kv, _ = inputs(1, 1100, 1, 40, 1, device=device)
    order = (kv @ q[0, 0]).argsort(descending=descending).to(torch.int32)
    check(ops, q, kv, order[None], 0.5, 24, 1e-5)


def test_value_is_a_prefix_of_the_key(ops, device):
    q, kv, indices = inputs(9, 64, 2, 40, 33, device=device)
    whole, lse = ops.sparse_attention(q, kv, indices, 0.2, 40)
    part, same_lse = ops.sparse_attention(q, kv, indices, 0.2, 24)
    assert_close(part, whole[..., :24], 1e-6)
    assert_close(same_lse, lse, 1e-6)


def test_all_keys_is_dense_attention(ops, device):
    q, kv, _ = inputs(20, 30, 3, 40, 1, device=device)
    s = torch.arange(30, dtype=torch.int32, device=device)
    indices = torch.where(s[None] <= s[10:, None], s[None], -1)
    for got, value in zip(
        ops.sparse_attention(q, kv, indices, 0.2, 24), dsa_ref.dense_attention(q, kv, 0.2, 24), strict=True
    ):
        assert_close(got, value, 2e-6)


def test_strided_input(ops, device):
    q, kv, indices = inputs(9, 64, 2, 40, 33, device=device)
    wanted = ops.sparse_attention(q, kv, indices, 0.2, 24)
    for got, value in zip(
        ops.sparse_attention(strided(q), strided(kv), strided(indices), 0.2, 24), wanted, strict=True
    ):
        assert_close(got, value, 1e-6)


@pytest.mark.rungs("reference", "kernels")
def test_no_queries(ops, device):
    q, kv, indices = inputs(0, 9, 2, 40, 5, device=device)
    out, lse = ops.sparse_attention(q, kv, indices, 0.2, 24)
    assert out.shape == (0, 2, 24) and lse.shape == (0, 2)


def test_gradient(small_blocks):
    """Through both outputs, with -1 and an empty row, whose gradient is 0 and not NaN."""
    q, kv, indices = inputs(3, 7, 2, 6, 4)
    q, kv = q.double().requires_grad_(), kv.double().requires_grad_()

    def run(q, kv):
        out, lse = dsa_ref.sparse_attention(q, kv, indices, 0.4, 4)
        return out, lse[1:]

    assert torch.autograd.gradcheck(run, (q, kv))
    dsa_ref.sparse_attention(q, kv, indices, 0.4, 4)[0].sum().backward()
    assert (q.grad[0] == 0).all() and q.grad.isfinite().all() and kv.grad.isfinite().all()


@pytest.mark.gpu
@pytest.mark.parametrize("H", (128, 16))
def test_at_v32s_sizes(device, H):
    import dsa_kernels

    args = inputs(64, 20_000, H, 576, 2048, dtype=torch.bfloat16, device=device)
    check(dsa_kernels, *args, 192**-0.5, 512, 8e-3)


@pytest.mark.hopper
@pytest.mark.parametrize("share", (False, True))
@pytest.mark.parametrize(
    "T, H, k", [(37, 128, 100), (37, 96, 1), (70, 64, 2048), (37, 24, 129), (37, 16, 2048), (37, 8, 100), (70, 1, 7)]
)
def test_every_count_of_heads_on_hopper(device, poisoned, T, H, k, share):
    """Tiles of one query and of several, steps not full, the last group short; to the bit the same each time."""
    hopper = load_hopper()
    for seed in (0, 1):
        q, kv, indices = inputs(T, 3000, H, 576, k, seed, dtype=torch.bfloat16, device=device)
        wanted_out, wanted_lse = written_out(q, kv, indices, 192**-0.5, 512)
        first = None
        for _ in range(20):
            out, lse = q.new_full((T, H, 512), torch.nan), q.new_full((T, H), torch.nan, dtype=torch.float32)
            hopper.sparse_attention(q, kv, indices, 192**-0.5, out, lse, share=share)
            first = first or (out, lse)
            assert_same_bits(out, first[0])
            assert_same_bits(lse, first[1])
        assert_close(out, wanted_out, 8e-3)
        assert_close(lse, wanted_lse, 1e-5)


@pytest.mark.hopper
def test_every_version_on_hopper(device, poisoned):
    """More tiles than multiprocessors, and fewer; tiles and steps that are not full."""
    ladder = importlib.import_module("dsa_bench.ladder")
    for T, H, k in ((300, 128, 300), (5, 64, 1), (37, 96, 129)):
        q, kv, indices = inputs(T, 3000, H, 576, k, dtype=torch.bfloat16, device=device)
        wanted_out, wanted_lse = written_out(q, kv, indices, 192**-0.5, 512)
        for version in ladder.VERSIONS["sparse_attention"]:
            out, lse = ladder.function_of("sparse_attention", version)(q, kv, indices, 192**-0.5, 512)
            assert_close(out, wanted_out, 8e-3)
            assert_close(lse, wanted_lse, 1e-5)


@pytest.mark.hopper
def test_nan_and_growing_logits_on_hopper(device):
    """NaN in a selected row and in a query; logits that grow over the list, so that the maximum keeps moving."""
    hopper = load_hopper()
    q, kv, indices = inputs(3, 3000, 128, 576, 700, dtype=torch.bfloat16, device=device)
    order = (kv.float() @ q[2, 5].float()).argsort()[-700:].to(torch.int32)
    indices[2] = order
    kv[order[100]] = torch.nan
    q[1, 7, 3] = torch.nan
    indices[1][indices[1] == order[100]] = -1
    out, lse = q.new_full((3, 128, 512), 7.0), q.new_full((3, 128), 7.0, dtype=torch.float32)
    hopper.sparse_attention(q, kv, indices, 0.5, out, lse)
    assert out[2].isnan().all() and lse[2].isnan().all()
    assert out[1, 7].isnan().all() and lse[1, 7].isnan()
    assert int(out[1].isnan().any(dim=-1).sum()) == 1 and (out[0] == 0).all() and (lse[0] == -torch.inf).all()
    kv[order[100]] = 0
    hopper.sparse_attention(q, kv, indices, 0.5, out, lse)
    wanted_out, wanted_lse = written_out(q, kv, indices, 0.5, 512)
    assert_close(out[2], wanted_out[2], 8e-3)
    assert_close(lse[2], wanted_lse[2], 1e-5)


def load_hopper():
    return importlib.import_module("dsa_kernels.hopper.sparse_attention")


@pytest.mark.rungs("kernels")
def test_variants(ops, device):
    q, kv, indices = inputs(5, 30, 3, 40, 9, device=device)
    wanted = ops.sparse_attention(q, kv, indices, 0.2, 24)
    for got, value in zip(ops.sparse_attention(q, kv, indices, 0.2, 24, variant="portable"), wanted, strict=True):
        assert_same_bits(got, value)
    for variant in ("hopper", "fastest"):  # it wants bf16 and other sizes; there is no such thing
        with pytest.raises(ValueError, match="variant"):
            ops.sparse_attention(q, kv, indices, 0.2, 24, variant=variant)


@pytest.mark.rungs("reference", "kernels")
def test_nan_shows_in_its_own_head_and_nowhere_else(ops, device):
    q, kv, indices = normal(3, 2, 20, device=device), normal(9, 20, seed=1, device=device), random_indices(3, 9, 4)
    q[2, 1, 5] = torch.nan
    out, lse = ops.sparse_attention(q, kv, indices.to(device), 0.3, 16)
    assert out[2, 1].isnan().all() and lse[2, 1].isnan()
    assert int(out.isnan().any(dim=-1).sum()) == 1 and int(lse.isnan().sum()) == 1


@pytest.mark.rungs("reference", "kernels")
def test_largest_scale(ops, device):
    """Scales that the arithmetic could not hold are refused; the largest that is left gives no NaN."""
    q, kv, indices = torch.zeros(1, 1, 2, device=device), torch.ones(3, 2, device=device), torch.tensor([[0, 2]])
    indices = indices.to(device=device, dtype=torch.int32)
    too_large = (3.5e38, 1e300) if ops is dsa_ref else (2.36e38, 3.4e38, 3.5e38, 1e300)
    for scale in too_large:
        with pytest.raises(ValueError, match="scale must be"):
            ops.sparse_attention(q, kv, indices, scale, 2)
    out, lse = ops.sparse_attention(q, kv, indices, 3.4e38 if ops is dsa_ref else 2.358e38, 2)
    assert (out == 1).all() and lse.item() == pytest.approx(0.6931, abs=1e-4)
    if ops is dsa_ref:
        assert ops.sparse_attention(q.double(), kv.double(), indices, 1e300, 2)[0].isfinite().all()
