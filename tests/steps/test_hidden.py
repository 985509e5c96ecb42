"""What a row cannot see or did not select may hold NaN or infinities: no result and no gradient of the row changes."""

import pytest
import torch
from inputs import assert_close, assert_same_bits, in_range, index_inputs, normal, packed

import dsa_ref

POISON = (torch.nan, torch.inf, -torch.inf)
T = S = 24
START, END, _ = packed(7, 17)  # the sequences that a NaN must not leave
FIRST = slice(0, 7)
SECOND = slice(7, 24)
SELECTED = dsa_ref.select_topk(normal(T, S), 5, START, END)
ATTENTION = (normal(T, 3, 8, seed=7), normal(S, 8, seed=8))


def first(x):
    return x[0] if isinstance(x, tuple) else x


# name: (function of the tensors that follow -> a result a row, those tensors: each has T or S rows)
STEPS = {
    "index_scores": (lambda *x: dsa_ref.index_scores(*x, START, END), *index_inputs(normal, T, S, 3, 8)),
    "dense_attention": (lambda q, kv: dsa_ref.dense_attention(q, kv, 0.3, 6, START, END), *ATTENTION),
    "sparse_attention": (lambda q, kv: dsa_ref.sparse_attention(q, kv, SELECTED, 0.3, 6), *ATTENTION),
    "mha_attention": (
        lambda q, k, v: dsa_ref.mha_attention(q, k, v, 0.3, None, START, END),
        normal(T, 3, 8),
        normal(S, 3, 8, seed=1),
        normal(S, 3, 6, seed=2),
    ),
    "mha_attention, selected": (
        lambda q, k, v: dsa_ref.mha_attention(q, k, v, 0.3, SELECTED, START, END),
        normal(T, 3, 8),
        normal(S, 3, 8, seed=1),
        normal(S, 3, 6, seed=2),
    ),
}


def run(function, tensors, rows):
    """The results of these rows, then the gradients of their weighted sum."""
    leaves = [x.clone().requires_grad_() for x in tensors]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    pieces = [x[rows] for x in outs]
    total = sum((x.masked_fill(x == -torch.inf, 0.0) * normal(*x.shape, seed=5)).sum() for x in pieces)
    return [x.detach() for x in pieces], torch.autograd.grad(total, leaves)


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("healthy, sick", [(SECOND, FIRST), (FIRST, SECOND)], ids=("first is sick", "second is sick"))
@pytest.mark.parametrize("step", STEPS)
def test_packed_sequences_do_not_infect_each_other(step, healthy, sick, poison):
    """Everything that belongs to one sequence is poisoned, queries too; the other's results and gradients stay."""
    function, *tensors = STEPS[step]
    wanted, wanted_grads = run(function, tensors, healthy)
    sickly = [x.clone() for x in tensors]
    for x in sickly:
        x[sick] = poison
    got, grads = run(function, sickly, healthy)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-6)
    for a, b in zip(grads, wanted_grads, strict=True):
        assert_close(a[healthy], b[healthy], 1e-6)


@pytest.mark.parametrize("step", STEPS)
def test_a_gradient_that_is_nan_stays_in_its_sequence(step):
    """NaN that comes from behind, as from a loss of the other sequence."""
    function, *tensors = STEPS[step]
    leaves = [x.clone().requires_grad_() for x in tensors]
    out = first(function(*leaves))
    upstream = normal(*out.shape, seed=5)
    wanted = torch.autograd.grad(out, leaves, upstream, retain_graph=True)
    upstream[FIRST] = torch.nan
    for a, b in zip(torch.autograd.grad(out, leaves, upstream), wanted, strict=True):
        assert_close(a[SECOND], b[SECOND], 1e-6)
        assert a[FIRST].isnan().any()


@pytest.mark.parametrize("step", STEPS)
def test_a_nan_shows_in_the_rows_that_look_at_it_and_in_no_other(step):
    function, *tensors = STEPS[step]
    seen = (SELECTED == 15).any(dim=1) if "sparse" in step or "selected" in step else in_range(T, S, START, END)[:, 15]
    assert seen.any() and not seen[SECOND].all()
    wanted, _ = run(function, tensors, ~seen)
    sickly = [x.clone() for x in tensors]
    for i in (1, 3) if step == "index_scores" else range(1, len(tensors)):  # the third of a score's is the query's w
        sickly[i][15] = torch.nan
    got, _ = run(function, sickly, ~seen)
    for a, b in zip(got, wanted, strict=True):
        assert_close(a, b, 1e-6)
    assert first(function(*sickly))[seen].flatten(1).isnan().any(dim=1).all()


def test_the_smallest_case():
    q, kv = torch.ones(2, 1, 1, requires_grad=True), torch.tensor([[1.0], [torch.nan]], requires_grad=True)
    out, lse = dsa_ref.dense_attention(q, kv, 1.0, 1)
    assert out[0].item() == 1.0 and lse[0].item() == 1.0 and out[1].isnan().all()
    out, _ = dsa_ref.dense_attention(q[:1], kv, 1.0, 1, end=torch.tensor([1], dtype=torch.int32))
    out.sum().backward()
    assert q.grad[0].item() == 0.0 and kv.grad.tolist() == [[1.0], [0.0]]


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("mode", ("dense", "mha", "sparse"))
def test_a_key_that_nobody_selected_has_no_gradient(mode, poison):
    q, kv, end = normal(4, 2, 6), normal(9, 6, seed=1), torch.tensor([3, 0, 7, 5], dtype=torch.int32)
    indices = torch.tensor([[2, 0, -1], [-1] * 3, [6, -1, 2], [3, 4, -1]], dtype=torch.int32)
    hidden = [7, 8] if mode == "dense" else [1, 5, 7, 8]
    kv[hidden] = poison
    q.requires_grad_(), kv.requires_grad_()
    if mode == "dense":
        out, lse = dsa_ref.dense_attention(q, kv, 0.3, 4, torch.zeros_like(end), end)
    elif mode == "sparse":
        out, lse = dsa_ref.sparse_attention(q, kv, indices, 0.3, 4)
    else:
        heads = kv[:, None].expand(9, 2, 6)
        out, lse = dsa_ref.mha_attention(q, heads, heads[..., :4], 0.3, indices, torch.zeros_like(end), end)
    (out.sum() + lse[[0, 2, 3]].sum()).backward()
    assert out.isfinite().all() and q.grad.isfinite().all() and kv.grad.isfinite().all()
    assert (kv.grad[hidden] == 0).all() and (q.grad[1] == 0).all()
    assert (kv.grad[[0, 2, 3, 4, 6]].abs().sum(dim=1) > 0).all()


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("sparse", (False, True))
def test_indexer_loss(sparse, poison, small_blocks):
    """Keys outside the range, selected or not, and the rows that see nothing: loss and gradients as without poison."""
    end = torch.tensor([0, 3, 7, 5], dtype=torch.int32)
    indices = torch.tensor([[8, 2, -1], [2, 8, 0], [6, -1, 2], [3, 4, -1]], dtype=torch.int32) if sparse else None
    q_idx, k_idx, w, _ = index_inputs(normal, 4, 9, 3, 8)
    q, kv = normal(4, 2, 6, seed=1), normal(9, 6, seed=2)

    def both(*tensors):
        leaves = [x.clone().requires_grad_() for x in tensors[:3]]
        loss = dsa_ref.indexer_loss(*leaves, *tensors[3:], 0.3, indices, torch.zeros_like(end), end)
        return loss, *torch.autograd.grad(loss, leaves)

    wanted = both(q_idx, k_idx, w, q, kv)
    for x in (q_idx, w, q):
        x[0] = poison  # a row with nothing to see
    for x in (k_idx, kv):
        x[[1, 7, 8] if sparse else [7, 8]] = poison
    for a, b in zip(both(q_idx, k_idx, w, q, kv), wanted, strict=True):
        assert a.isfinite().all()
        assert_close(a, b, 1e-6)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # of the interpreter
@pytest.mark.rungs("reference", "kernels")
@pytest.mark.parametrize("poison", POISON)
def test_selection(ops, poison, device):
    """A key that no row sees may hold anything, its scale too, and so may a query that sees nothing."""
    q_idx, k_idx, w, k_scale = index_inputs(normal, 6, 9, 3, 16, device=device)
    end = torch.tensor([0, 3, 7, 5, 1, 6], dtype=torch.int32, device=device)
    wanted = ops.lightning_select(q_idx, k_idx, w, 3, k_scale, torch.zeros_like(end), end)
    scores = ops.index_scores(q_idx, k_idx, w, k_scale, torch.zeros_like(end), end)
    for x in (k_idx, k_scale):
        x[7:] = poison
    for x in (q_idx, w):
        x[0] = poison
    assert torch.equal(ops.lightning_select(q_idx, k_idx, w, 3, k_scale, torch.zeros_like(end), end), wanted)
    assert_same_bits(ops.index_scores(q_idx, k_idx, w, k_scale, torch.zeros_like(end), end), scores)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_infinite_logits(ops, device):
    """-inf weighs nothing, and a row of nothing else is an empty one; +inf and NaN take their row and head."""
    q = torch.tensor([[[1.0, 1.0], [1.0, -1.0]]], device=device)
    kv = torch.tensor([[2.0, 0.0], [3.0, -torch.inf], [4.0, -torch.inf]], device=device)
    out, lse = ops.sparse_attention(q, kv, torch.tensor([[0, 1]], dtype=torch.int32, device=device), 1.0, 1)
    assert out[0, 0].item() == 2.0 and lse[0, 0].item() == 2.0  # the key of -inf is as if not selected
    assert out[0, 1].isnan().all() and lse[0, 1].isnan()
    out, lse = ops.sparse_attention(q, kv, torch.tensor([[1, 2]], dtype=torch.int32, device=device), 1.0, 1)
    assert out[0, 0].item() == 0.0 and lse[0, 0].item() == -torch.inf


@pytest.mark.rungs("loops", "reference")
def test_a_score_of_minus_infinity_in_the_loss(ops):
    """KL(p || softmax(I)) is infinite where I rules out a key that attention looks at, and only there."""
    q_idx, w = torch.ones(1, 1, 1), -torch.ones(1, 1)
    k_idx, end = torch.tensor([[1.0], [torch.inf]]), torch.tensor([2], dtype=torch.int32)
    q, kv = torch.ones(1, 1, 1), torch.tensor([[1.0], [2.0]])
    assert ops.indexer_loss(q_idx, k_idx, w, q, kv, 1.0, end=end) == torch.inf
    kv[1] = -2000.0  # attention's probability is 0 as well
    assert ops.indexer_loss(q_idx, k_idx, w, q, kv, 1.0, end=end) == 0.0


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("step", (*STEPS, "indexer_loss", "indexer_loss, selected"))
def test_no_query_at_all(step, poison):
    """Whatever the keys hold: empty results, and gradients of 0."""
    if "loss" in step:
        q_idx, k_idx, w, _ = index_inputs(normal, 0, S, 3, 8)
        lists, tensors = SELECTED[:0] if "selected" in step else None, (q_idx, k_idx, w)

        def function(*x):
            return dsa_ref.indexer_loss(*x, normal(0, 2, 6), torch.full((S, 6), poison), 0.3, lists)
    else:
        none = torch.zeros(0, dtype=torch.int32)
        tensors = tuple(
            x[:0] if i == 0 or step == "index_scores" and i == 2 else x for i, x in enumerate(STEPS[step][1:])
        )
        function = {
            "index_scores": dsa_ref.index_scores,
            "dense_attention": lambda q, kv: dsa_ref.dense_attention(q, kv, 0.3, 6, none, none),
            "sparse_attention": lambda q, kv: dsa_ref.sparse_attention(q, kv, SELECTED[:0], 0.3, 6),
            "mha_attention": lambda q, k, v: dsa_ref.mha_attention(q, k, v, 0.3, None, none, none),
            "mha_attention, selected": lambda q, k, v: dsa_ref.mha_attention(q, k, v, 0.3, SELECTED[:0]),
        }[step]
    leaves = [(torch.full_like(x, poison) if len(x) else x.clone()).requires_grad_() for x in tensors]
    outs = function(*leaves)
    outs = outs if isinstance(outs, tuple) else (outs,)
    assert all(x.sum() == 0 for x in outs)  # nothing in it, or the loss, 0
    for x in torch.autograd.grad(sum(x.sum() for x in outs), leaves):
        assert (x == 0).all()


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("rows", (1, 3))
@pytest.mark.parametrize("step", ("index_scores", "dense_attention", "mha_attention"))
def test_no_key_in_any_range(step, rows, poison):
    function, *tensors = {
        "index_scores": (dsa_ref.index_scores, *index_inputs(normal, rows, S, 3, 8)),
        "dense_attention": (
            lambda *x: dsa_ref.dense_attention(*x[:2], 0.3, 6, *x[2:])[0],
            normal(rows, 3, 8), normal(S, 8),
        ),
        "mha_attention": (
            lambda *x: dsa_ref.mha_attention(*x[:3], 0.3, None, *x[3:])[0],
            normal(rows, 3, 8), normal(S, 3, 8), normal(S, 3, 6),
        ),
    }[step]  # fmt: skip
    at = torch.zeros(rows, dtype=torch.int32)
    leaves = [torch.full_like(x, poison).requires_grad_() for x in tensors]
    out = function(*leaves, at, at)
    assert (out == (-torch.inf if step == "index_scores" else 0.0)).all()
    for x in torch.autograd.grad(out, leaves, torch.ones_like(out)):
        assert (x == 0).all()


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("poison", (-torch.inf, torch.inf))
def test_a_row_of_logits_of_minus_infinity_is_zero_whatever_its_values(ops, device, poison):
    """Keys that hold infinities in the value, too: 0 · inf does not reach a row that has no other weight."""
    q = torch.tensor([[[1.0, 0.5], [1.0, 1.0]], [[1.0, 0.5], [-1.0, 0.5]]], device=device)
    kv = torch.tensor([[poison, 1.0], [poison, 2.0], [1.0, 1.0]], device=device)
    q = q if poison < 0 else -q
    indices = torch.tensor([[0, 1], [1, -1]], dtype=torch.int32, device=device)
    out, lse = ops.sparse_attention(q, kv, indices, 1.0, 2)
    assert (out[:, 0] == 0).all() and (lse[:, 0] == -torch.inf).all() and (out[0, 1] == 0).all()
    assert out[1, 1].isnan().all() and lse[1, 1].isnan()  # a logit of +inf
    start, end = (torch.tensor(x, dtype=torch.int32, device=device) for x in ([0, 1], [2, 2]))
    if hasattr(ops, "dense_attention"):
        dense, dense_lse = ops.dense_attention(q, kv, 1.0, 2, start, end)
        assert torch.equal(dense.nan_to_num(7), out.nan_to_num(7))
        assert torch.equal(dense_lse.nan_to_num(7, neginf=-7), lse.nan_to_num(7, neginf=-7))
        if hasattr(ops, "mha_attention"):  # not the kernels': there infinities reach all rows, as its docstring says
            heads = kv[:, None].expand(3, 2, 2)
            mha, _ = ops.mha_attention(q, heads, heads, 1.0, None, start, end)
            assert torch.equal(mha.nan_to_num(7), out.nan_to_num(7))


@pytest.mark.rungs("loops", "reference")
def test_the_loss_of_a_row_that_looks_at_nothing(ops):
    """All its logits are -inf, so it gives no key a probability. The mean is over it as well."""
    q_idx, k_idx, w = torch.ones(2, 1, 1), torch.tensor([[1.0], [2.0]]), torch.ones(2, 1)
    q, kv, start = torch.ones(2, 2, 1), torch.tensor([[-torch.inf], [1.0]]), torch.tensor([0, 1], dtype=torch.int32)
    assert ops.indexer_loss(q_idx, k_idx, w, q, kv, 1.0, start=start) == 0.0
