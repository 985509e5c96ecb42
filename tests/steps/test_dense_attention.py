"""The dense oracle and MHA mode against a masked softmax in float64."""

import pytest
import torch
from inputs import assert_close, in_range, normal, packed, ragged, random_indices, strided

from dsa_ref import dense_attention, mha_attention, sparse_attention

pytestmark = pytest.mark.rungs("loops", "reference")


def inputs(T, S, H=3, D=40, device="cpu"):
    return normal(T, H, D, device=device), normal(S, D, seed=1, device=device)


def written_out(q, kv, scale, v_dim, *ranges):
    q, kv = q.cpu().double(), kv.cpu().double()
    mask = in_range(len(q), len(kv), *ranges)[:, None]
    logits = (torch.einsum("thd,sd->ths", q, kv) * scale).masked_fill(~mask, -torch.inf)
    return logits.softmax(dim=-1).nan_to_num() @ kv[:, :v_dim], logits.logsumexp(dim=-1)


def check(got, wanted, tolerance=2e-6):
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, tolerance)


@pytest.mark.parametrize("T, S, v_dim", [(1, 1, 40), (1, 37, 24), (37, 37, 24), (5, 60, 24)])
def test_causal(ops, device, small_blocks, T, S, v_dim):
    q, kv = inputs(T, S, device=device)
    check(ops.dense_attention(q, kv, 0.2, v_dim), written_out(q, kv, 0.2, v_dim))


@pytest.mark.parametrize("T, S", [(37, 37), (50, 9)])
def test_ranges(ops, device, small_blocks, T, S):
    """Empty rows give 0 and -inf."""
    (q, kv), ranges = inputs(T, S, device=device), ragged(T, S, device=device)
    out, lse = ops.dense_attention(q, kv, 0.2, 24, *ranges)
    check((out, lse), written_out(q, kv, 0.2, 24, *ranges))
    assert (out[0] == 0).all() and (lse[0] == -torch.inf).all()


def test_packed_equals_separate(ops, device, small_blocks):
    (q, kv), (start, end, _) = inputs(59, 59, device=device), packed(5, 1, 13, 40, device=device)
    whole = ops.dense_attention(q, kv, 0.2, 24, start, end)
    for first, last in ((0, 5), (5, 6), (6, 19), (19, 59)):
        part = ops.dense_attention(q[first:last], kv[first:last], 0.2, 24)
        check([x[first:last] for x in whole], part, 1e-6)


def test_bf16_and_strides(device):
    q, kv = inputs(20, 30, device=device)
    out, lse = dense_attention(q.bfloat16(), kv.bfloat16(), 0.2, 24)
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    check((out, lse), written_out(q.bfloat16(), kv.bfloat16(), 0.2, 24), 8e-3)
    check(dense_attention(strided(q), strided(kv), 0.2, 24), dense_attention(q, kv, 0.2, 24), 1e-6)


@pytest.mark.parametrize("T, S", [(1, 1), (20, 30)])
def test_mha_mode_with_a_mask_is_sparse_mqa(device, small_blocks, T, S):
    """With every head given the same keys and values, the mask must stand for the gather, -1 and empty rows too."""
    q, kv = inputs(T, S, device=device)
    indices = random_indices(T, S, 7, device=device)
    indices = torch.where(indices <= torch.arange(S - T, S, device=device)[:, None], indices, -1)
    k, v = kv[:, None].expand(S, 3, 40), kv[:, None, :24].expand(S, 3, 24)
    check(mha_attention(q, k, v, 0.2, indices), sparse_attention(q, kv, indices, 0.2, 24))
    check(mha_attention(q, k, v, 0.2, None), dense_attention(q, kv, 0.2, 24))


def test_mha_mode_keeps_heads_apart(device):
    q, k, v = normal(5, 3, 8), normal(9, 3, 8, seed=1), normal(9, 3, 6, seed=2)
    out, _ = mha_attention(q, k, v, 0.3, None)
    for h in range(3):
        check(mha_attention(q[:, h : h + 1], k[:, h : h + 1], v[:, h : h + 1], 0.3, None)[:1], [out[:, h : h + 1]])


def test_no_queries(device):
    q, kv = inputs(0, 9, device=device)
    out, lse = dense_attention(q, kv, 0.2, 24)
    assert out.shape == (0, 3, 24) and lse.shape == (0, 3)
    out, lse = mha_attention(q, kv[:, None].expand(9, 3, 40), kv[:, None, :24].expand(9, 3, 24), 0.2, None)
    assert out.shape == (0, 3, 24) and lse.shape == (0, 3)


def test_gradient(small_blocks):
    q, kv = (x[..., :6].double().requires_grad_() for x in inputs(3, 5))
    ranges = [torch.tensor(x, dtype=torch.int32) for x in ([0, 2, 1], [2, 2, 5])]

    def run(q, kv):
        out, lse = dense_attention(q, kv, 0.4, 4, *ranges)
        return out, lse[::2]

    assert torch.autograd.gradcheck(run, (q, kv))
