"""The indexer's loss against float64, its gradient softmax(I) - p, what it must not touch, and known faults."""

import pytest
import torch
from inputs import assert_close, in_range, index_inputs, normal, packed, ragged, random_indices

from dsa_ref import indexer_loss, indexer_loss_loops, lightning_select

SCALE = 0.3
STAGES = pytest.mark.parametrize("sparse", (False, True))
DIFFERENTIABLE = pytest.mark.rungs("reference", "kernels")


def inputs(T, S, seed=0, device="cpu", sizes=(3, 8, 2, 12)):
    """q_idx, k_idx, w, q, kv. sizes: index heads and their dims, heads and their dims."""
    Hi, Di, H, D = sizes
    q_idx, k_idx, w, _ = index_inputs(normal, T, S, Hi, Di, seed=seed, device=device)
    q, kv = normal(T, H, D, seed=seed + 5, device=device), normal(S, D, seed=seed + 6, device=device)
    return q_idx, k_idx, w * 0.3, q, kv


def support(T, S, indices=None, start=None, end=None):
    mask = in_range(T, S, start, end)
    if indices is not None:
        picked = torch.zeros(T, S + 1, dtype=torch.bool).scatter_(1, indices.cpu().long() % (S + 1), True)
        mask &= picked[:, :S]
    return mask


def written_out(q_idx, k_idx, w, q, kv, indices=None, start=None, end=None, reduction="mean"):
    """The loss and its gradient with respect to I [T, S], float64, from masked softmaxes."""
    q_idx, k_idx, w, q, kv = (x.detach().cpu().double() for x in (q_idx, k_idx, w, q, kv))
    mask = support(len(q), len(kv), indices, start, end)
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q_idx, k_idx).relu(), w)
    logits = torch.einsum("thd,sd->ths", q, kv) * SCALE
    alive = mask.any(dim=1)
    p = logits.masked_fill(~mask[:, None], -torch.inf)[alive].softmax(dim=-1).sum(dim=1)
    p = p / p.sum(dim=1, keepdim=True)
    guess = scores.masked_fill(~mask, -torch.inf)[alive].softmax(dim=-1)
    terms = torch.where(p > 0, p * (p / guess).log(), 0.0)
    count = alive.sum().clamp(min=1) if reduction == "mean" else 1
    gradient = torch.zeros_like(scores)
    gradient[alive] = (guess - p) / count
    return terms.sum() / count, gradient


def wanted_gradients(q_idx, k_idx, w, q, kv, *others):
    """Those of `written_out` with respect to q_idx, k_idx and w, by the chain rule through equation 1, float64."""
    _, of_scores = written_out(q_idx, k_idx, w, q, kv, *others)
    leaves = [x.detach().cpu().double().requires_grad_() for x in (q_idx, k_idx, w)]
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", *leaves[:2]).relu(), leaves[2])
    return torch.autograd.grad(scores, leaves, of_scores)


def loss_and_gradients(loss, args, *others, **named):
    """What `loss` returns, and its gradients with respect to the first three of `args`."""
    leaves = [x.detach().clone().requires_grad_() for x in args[:3]]
    value = loss(*leaves, *args[3:], SCALE, *others, **named)
    return value.detach(), *torch.autograd.grad(value, leaves)


def assert_all_close(got, wanted, tolerance):
    for a, b in zip(got, wanted, strict=True):
        room = max(float(b.abs().max()), 1e-3)  # gradients are far below 1
        assert_close(a / room, b / room, tolerance)


@pytest.mark.parametrize("T, S", [(1, 1), (1, 20), (13, 13), (5, 30)])
@STAGES
def test_against_the_definition(ops, device, small_blocks, T, S, sparse):
    args = inputs(T, S, device=device)
    indices = random_indices(T, S, 6, device=device) if sparse else None  # future keys in them do not count
    assert_close(ops.indexer_loss(*args, SCALE, indices), written_out(*args, indices)[0], 1e-6)


@STAGES
@pytest.mark.parametrize("T, S", [(14, 14), (20, 9)])
def test_ranges(ops, device, small_blocks, T, S, sparse):
    """Rows without a key, by their range or by their selection, count neither above nor below the fraction line."""
    args, (start, end) = inputs(T, S, device=device), ragged(T, S, device=device)
    indices = random_indices(T, S, 6, device=device) if sparse else None
    loss = ops.indexer_loss(*args, SCALE, indices, start, end)
    assert_close(loss, written_out(*args, indices, start, end)[0], 1e-6)
    kept = support(T, S, indices, start, end).any(dim=1)
    rows = [x[kept] for x in (args[0], args[2], args[3])]
    picked = None if indices is None else indices[kept]
    assert_close(
        ops.indexer_loss(rows[0], args[1], *rows[1:], args[4], SCALE, picked, start[kept], end[kept]), loss, 1e-6
    )


def test_packed_is_the_mean_over_rows(ops, device):
    args, (start, end, _) = inputs(12, 12, device=device), packed(4, 8, device=device)
    parts = [ops.indexer_loss(*(x[rows] for x in args), SCALE) for rows in (slice(0, 4), slice(4, 12))]
    assert_close(ops.indexer_loss(*args, SCALE, None, start, end), (4 * parts[0] + 8 * parts[1]) / 12, 1e-6)


def test_selecting_everything_is_the_warm_up(ops, device):
    args = inputs(9, 9, device=device)
    everything = torch.arange(9, dtype=torch.int32, device=device).expand(9, 9)
    assert_close(ops.indexer_loss(*args, SCALE, everything), ops.indexer_loss(*args, SCALE), 1e-6)


def test_only_the_support_matters(ops, device):
    """Keys of the future, and in the sparse stage keys not selected, may change without a trace."""
    q_idx, k_idx, w, q, kv = inputs(6, 10, device=device)
    indices = torch.tensor([[1, 3, -1]] * 6, dtype=torch.int32, device=device)
    end = torch.full((6,), 7, dtype=torch.int32, device=device)
    for picked, rows in ((None, [7, 8, 9]), (indices, [0, 2, 4, 5, 6, 7, 8, 9])):
        before = ops.indexer_loss(q_idx, k_idx, w, q, kv, SCALE, picked, end=end)
        other_k_idx, other_kv = k_idx.clone(), kv.clone()
        other_k_idx[rows] += 3.0
        other_kv[rows] += 3.0
        assert_close(ops.indexer_loss(q_idx, other_k_idx, w, q, other_kv, SCALE, picked, end=end), before, 1e-6)
        other_kv[3] += 3.0
        assert abs(ops.indexer_loss(q_idx, k_idx, w, q, other_kv, SCALE, picked, end=end) - before) > 1e-3


def direct_scores(scores, device="cpu"):
    """Indexer inputs whose score is `scores` (positive) itself: unit keys, one head, weight 1."""
    T, S = scores.shape
    return scores[:, None, :], torch.eye(S, device=device), torch.ones(T, 1, device=device)


def test_a_perfect_indexer_has_no_loss(ops, device):
    """I = ln p plus any constant a row; with one head p is the attention itself. The reversed KL would not tell."""
    q, kv = normal(6, 1, 12, device=device), normal(6, 12, seed=1, device=device)
    logits = torch.einsum("thd,sd->ts", q, kv) * SCALE
    shift = 20 + normal(6, 1, seed=2, device=device)
    assert_close(ops.indexer_loss(*direct_scores(logits + shift, device), q, kv, SCALE), 0.0, 1e-6)
    assert ops.indexer_loss(*direct_scores(1.3 * logits + shift, device), q, kv, SCALE) > 1e-3


@pytest.mark.parametrize(
    "T, S, sizes, k",
    [(1, 1, (1, 1, 1, 1), 1), (1, 70, (1, 5, 130, 7), 9), (6, 131, (5, 20, 3, 33), 40), (7, 5, (3, 8, 17, 40), 9)],
)
@pytest.mark.parametrize("seed", (0, 1))
@STAGES
@DIFFERENTIABLE
def test_gradients(ops, device, poisoned, T, S, sizes, k, seed, sparse):
    """Sizes that no tile divides, one key, k above S, empty rows, on memory full of NaN."""
    args = inputs(T, S, 10 * seed, device, sizes)
    ranges = ragged(T, S, seed, device) if T > 1 else (None, None)
    indices = random_indices(T, S, k, seed, device) if sparse else None
    got = loss_and_gradients(ops.indexer_loss, args, indices, *ranges)
    wanted = written_out(*args, indices, *ranges)[0], *wanted_gradients(*args, indices, *ranges)
    assert_all_close(got, wanted, 5e-5)  # with 130 heads p is nearly uniform, and so the loss near 0


@STAGES
@DIFFERENTIABLE
def test_gradient_is_softmax_minus_target(ops, device, small_blocks, sparse):
    """By autograd, and by finite differences of the loop form."""
    T, S, step = 5, 8, 1e-4
    scores = (normal(T, S, device=device) + 9).requires_grad_()
    q, kv = normal(T, 2, 12, device=device, seed=1), normal(S, 12, device=device, seed=2)
    indices = random_indices(T, S, 4, device=device) if sparse else None
    ops.indexer_loss(*direct_scores(scores, device), q, kv, SCALE, indices).backward()
    _, wanted = written_out(*direct_scores(scores, device), q, kv, indices)
    assert_close(scores.grad, wanted, 1e-6)
    assert wanted.abs().max() > 0.01

    arrays = [x.detach().cpu().double().numpy() for x in (*direct_scores(scores, device), q, kv)]
    chosen = None if indices is None else indices.cpu().numpy()
    for t, s in ((0, 0), (4, 2), (4, 7), (2, 5)):
        values = []
        for sign in (1, -1):
            moved = arrays[0].copy()
            moved[t, 0, s] += sign * step
            values.append(indexer_loss_loops(moved, *arrays[1:], SCALE, chosen))
        assert (values[0] - values[1]) / (2 * step) == pytest.approx(float(wanted[t, s]), abs=1e-6)


def shares(q, kv, indices, start=None, end=None):
    """(lse [T, H] over the support, p [T, k] in the places of the indices), fp32, from float64."""
    mask = support(len(q), len(kv), indices, start, end)
    logits = torch.einsum("thd,sd->ths", q.cpu().double(), kv.cpu().double()) * SCALE
    lse = logits.masked_fill(~mask[:, None], -torch.inf).logsumexp(dim=-1)
    p = (logits - lse.masked_fill(lse.isinf(), 0.0)[..., None]).exp().mean(dim=1).masked_fill(~mask, 0.0)
    if indices is not None:
        p = p.gather(1, indices.cpu().long().clamp(min=0)).masked_fill(indices.cpu() < 0, 0.0)
    return lse.float().to(q.device), p.float().to(q.device)


@STAGES
def test_what_attention_knows_need_not_be_computed(ops, device, small_blocks, poisoned, sparse):
    """Its log-sum-exp, and p itself, the sparse stage's alone; what p has outside of a row's range does not count."""
    args, (start, end) = inputs(8, 11, device=device), ragged(8, 11, seed=1, device=device)
    indices = random_indices(8, 11, 13, device=device) if sparse else None
    lse, p = shares(*args[3:], indices, start, end)
    wanted, named = written_out(*args, indices, start, end)[0], {"indices": indices, "start": start, "end": end}
    assert_close(ops.indexer_loss(*args, SCALE, **named, lse=lse), wanted, 1e-6)
    assert abs(ops.indexer_loss(*args, SCALE, **named, lse=lse + 1.0) - wanted) > 1e-2  # it is used
    if sparse:
        seen = (indices >= start[:, None]) & (indices < end[:, None])
        p = torch.where(seen, p, 7.0)
        assert_close(ops.indexer_loss(*args[:3], None, None, None, **named, target=p), wanted, 1e-6)


@DIFFERENTIABLE
def test_gradients_with_a_target(ops, device, poisoned):
    """A target is taken as it stands: where it sums to c, the gradient is c · softmax(I) - p."""
    args, indices = inputs(6, 9, device=device), random_indices(6, 9, 5, device=device)
    _, p = shares(*args[3:], indices)
    wanted = wanted_gradients(*args, indices)
    for factor in (1.0, 0.5):

        def loss(q_idx, k_idx, w, _q, _kv, _scale, factor=factor):
            return ops.indexer_loss(q_idx, k_idx, w, None, None, None, indices, target=factor * p)

        assert_all_close(loss_and_gradients(loss, args)[1:], [factor * x for x in wanted], 1e-5)


@STAGES
@DIFFERENTIABLE
def test_micro_batches_are_one_batch(ops, device, sparse):
    """Sums over parts of the rows, divided by all rows with a key: the mean, in its gradients too."""
    args, (start, end) = inputs(9, 12, device=device), ragged(9, 12, device=device)
    indices = random_indices(9, 12, 5, device=device) if sparse else None
    alive = support(9, 12, indices, start, end).any(dim=1).sum()
    total = [0.0] * 4
    for rows in (slice(0, 1), slice(1, 6), slice(6, 9)):
        q_idx, k_idx, w, q, kv = args
        part = q_idx[rows], k_idx, w[rows], q[rows], kv
        lists = None if indices is None else indices[rows]
        out = loss_and_gradients(ops.indexer_loss, part, lists, start[rows], end[rows], reduction="sum")
        padded = [torch.zeros_like(x) for x in (q_idx, k_idx, w)]
        padded[0][rows], padded[2][rows] = out[1], out[3]
        padded[1] += out[2]
        total = [a + b / alive for a, b in zip(total, (out[0], *padded), strict=True)]
    assert_all_close(total, loss_and_gradients(ops.indexer_loss, args, indices, start, end), 1e-5)


@STAGES
@DIFFERENTIABLE
def test_packed_sequences_are_separate_ones(ops, device, sparse):
    """In the gradients too, and whatever the other sequence holds."""
    args, (start, end, _) = inputs(12, 12, device=device), packed(4, 8, device=device)
    lists = [random_indices(n, n, 3, seed=n, device=device) for n in (4, 8)]
    both = torch.cat((lists[0], torch.where(lists[1] < 0, -1, lists[1] + 4))) if sparse else None
    got = loss_and_gradients(ops.indexer_loss, args, both, start, end, reduction="sum")
    parts = [
        loss_and_gradients(ops.indexer_loss, [x[rows] for x in args], one if sparse else None, reduction="sum")
        for rows, one in zip((slice(0, 4), slice(4, 12)), lists, strict=True)
    ]
    assert_all_close(
        got, [parts[0][0] + parts[1][0], *map(torch.cat, zip(parts[0][1:], parts[1][1:], strict=True))], 1e-5
    )


@STAGES
@DIFFERENTIABLE
def test_large_logits_and_scores(ops, device, sparse):
    """Attention that looks at one key alone, and scores of several hundred."""
    q_idx, k_idx, w, q, kv = inputs(6, 9, device=device)
    args = q_idx * 10, k_idx * 10, w, q * 200, kv
    indices = random_indices(6, 9, 5, device=device) if sparse else None
    got = loss_and_gradients(ops.indexer_loss, args, indices)
    assert got[0] > 5
    assert_all_close(got, (written_out(*args, indices)[0], *wanted_gradients(*args, indices)), 1e-5)


@STAGES
@DIFFERENTIABLE
def test_gradient_reaches_the_indexer_alone(ops, device, sparse):
    args = [x.requires_grad_() for x in inputs(7, 7, device=device)]
    indices = random_indices(7, 7, 3, device=device) if sparse else None
    (3 * ops.indexer_loss(*args, SCALE, indices)).backward()
    q_idx, k_idx, w, q, kv = args
    assert q.grad is None and kv.grad is None
    assert_all_close([x.grad / 3 for x in (q_idx, k_idx, w)], wanted_gradients(*args, indices), 1e-5)


@STAGES
def test_no_row_has_a_key(ops, device, sparse):
    args = [x.requires_grad_() for x in inputs(3, 4, device=device)]
    nothing = torch.zeros(3, dtype=torch.int32, device=device)
    indices = torch.tensor([[1, 2]] * 3, dtype=torch.int32, device=device) if sparse else None
    loss = ops.indexer_loss(*args, SCALE, indices, nothing, nothing)
    assert loss == 0
    if loss.requires_grad:
        loss.backward()
        assert all(x.grad is None or (x.grad == 0).all() for x in args)


@STAGES
@DIFFERENTIABLE
def test_no_row_at_all(ops, device, sparse):
    q_idx, k_idx, w, q, kv = inputs(3, 4, device=device)
    indices = random_indices(3, 4, 2, device=device)[:0] if sparse else None
    loss, *gradients = loss_and_gradients(ops.indexer_loss, (q_idx[:0], k_idx, w[:0], q[:0], kv), indices)
    assert loss == 0 and all((x == 0).all() for x in gradients)


# Faults that train an indexer to something else without a word --------------------------------------------------------


def distributions(q_idx, k_idx, w, q, kv, scale, mask):
    """(p, softmax(I)), each [T, S], in plain torch; rows that see nothing hold nothing of use."""
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q_idx, k_idx).relu(), w)
    logits = torch.einsum("thd,sd->ths", q, kv) * scale
    p = logits.masked_fill(~mask[:, None], -1e9).softmax(dim=-1).mean(dim=1)
    return p, scores.masked_fill(~mask, -1e9).softmax(dim=-1)


def divergence(p, guess, mask):
    """Mean over rows that see a key of KL(p || guess)."""
    alive = mask.any(dim=1)
    return (torch.xlogy(p, p) - p * (guess + 1e-30).log())[alive].sum() / alive.sum()


def right(*args):
    return indexer_loss(*args[:6], None, *args[6:])


def on_its_own_selection(q_idx, k_idx, w, q, kv, scale, start, end):
    chosen = lightning_select(q_idx, k_idx, w, 4, None, start, end)
    return indexer_loss(q_idx, k_idx, w, q, kv, scale, chosen, start, end)


def reversed_kl(*args):
    mask = support(len(args[0]), len(args[1]), None, *args[6:])
    return divergence(*distributions(*args[:6], mask)[::-1], mask)


def future_in_target(*args):
    *args, start, end = args
    mask = support(len(args[0]), len(args[1]), None, start, end)
    everything = torch.ones_like(mask)
    return divergence(distributions(*args, everything)[0], distributions(*args, mask)[1], mask)


def of_padded_length(*args):
    return indexer_loss(*args[:6], None, *args[6:], reduction="sum") / len(args[0])


FAULTS = {
    "a warm-up on its own selection": on_its_own_selection,
    "a reversed KL": reversed_kl,
    "a coefficient of zero": lambda *args: 0.0 * right(*args),
    "a target with the future in it": future_in_target,
    "divided by the padded length": of_padded_length,
    "one head's target": lambda q_idx, k_idx, w, q, *rest: right(q_idx, k_idx, w, q[:, :1], *rest),
    "logits without the scale": lambda *args: right(*args[:5], 1.0, *args[6:]),
}


def judge(loss, device):
    """The loss of a padded batch, and its gradients, against the definition."""
    args, (start, end, _) = inputs(12, 12, device=device), packed(5, 7, device=device)
    end[[4, 11]] = start[[4, 11]]  # padding
    got = loss_and_gradients(loss, args, start, end)
    assert_all_close(got, (written_out(*args, None, start, end)[0], *wanted_gradients(*args, None, start, end)), 1e-5)


@DIFFERENTIABLE
def test_no_fault(ops, device):
    judge(lambda *args: ops.indexer_loss(*args[:6], None, *args[6:]), device)


def test_the_faults_are_near_the_truth():
    """`distributions` and `divergence`, of which some faults are made, give the loss where nothing is wrong."""

    def loss(*args):
        mask = support(len(args[0]), len(args[1]), None, *args[6:])
        return divergence(*distributions(*args[:6], mask), mask)

    judge(loss, "cpu")


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(fault):
    with pytest.raises(AssertionError, match="Tensor-likes are not close|Scalars are not close"):
        judge(FAULTS[fault], "cpu")


# What is refused ------------------------------------------------------------------------------------------------------


@STAGES
@DIFFERENTIABLE
def test_bad_input(ops, device, sparse):
    q_idx, k_idx, w, q, kv = inputs(4, 5, device=device)
    indices = random_indices(4, 5, 3, device=device) if sparse else None
    for error, name, args in (
        (ValueError, "scale must", (q_idx, k_idx, w, q, kv, float("nan"))),
        (ValueError, "scale must", (q_idx, k_idx, w, q, kv, -1.0)),
        (TypeError, "q must", (q_idx, k_idx, w, q.int(), kv, SCALE)),
        (TypeError, "kv must", (q_idx, k_idx, w, q, kv.half(), SCALE)),
        (TypeError, "q_idx must", (q_idx.to(torch.float8_e4m3fn), k_idx.to(torch.float8_e4m3fn), w, q, kv, SCALE)),
        (ValueError, "q must be given where target is not", (q_idx, k_idx, w, None, kv, SCALE)),
        (ValueError, "kv must be given", (q_idx, k_idx, w, q, None, SCALE)),
        (ValueError, "scale must be given", (q_idx, k_idx, w, q, kv, None)),
        (ValueError, "q must be given", (q_idx, k_idx, w, None, None, None)),
    ):
        with pytest.raises(error, match=f"^{name}"):
            ops.indexer_loss(*args, indices)
    fine, lse, p = (q_idx, k_idx, w, q, kv, SCALE), q.new_zeros(4, 2), q.new_zeros(4, 3)
    for error, name, args, named in (
        (ValueError, "reduction must be one of .*'mean', 'sum'.*, got 'none'", fine, {"reduction": "none"}),
        (ValueError, r"lse must have shape \[T, H\]", fine, {"lse": lse[:, :1]}),
        (TypeError, "lse must", fine, {"lse": lse.half()}),
        (ValueError, "target must be None without indices" if not sparse else "q must be None", fine, {"target": p}),
    ):
        with pytest.raises(error, match=f"^{name}"):
            ops.indexer_loss(*args, indices, **named)
    if sparse:
        for error, name, others, named in (
            (ValueError, "kv must be None with target", (None, kv, None), {"target": p}),
            (ValueError, "scale must be None with target", (None, None, SCALE), {"target": p}),
            (ValueError, "lse must be None with target", (None, None, None), {"target": p, "lse": lse}),
            (ValueError, r"target must have shape \[T, k\]", (None, None, None), {"target": p[:, :2]}),
            (TypeError, "target must", (None, None, None), {"target": p.bfloat16()}),
        ):
            with pytest.raises(error, match=f"^{name}"):
                ops.indexer_loss(q_idx, k_idx, w, *others, indices, **named)
