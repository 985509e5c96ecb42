"""Notebook 13: which way the loss pushes the indexer, and whom it may push. `check` has target and loss."""

import functools

import torch

from dsa_ref.testing import Failed

from ..checking import Check, crashed, expect, expect_close, normal, strided, tensor
from .check import causal, loss_of
from .layer import OpenLayer, lesson_loss_of

kl_gradients = Check("kl_gradients")  # (q_idx [T, Hi, Di], k_idx [S, Di], w [T, Hi], p [T, S], visible [T, S])
lesson_loss = Check("lesson_loss")  # (an OpenLayer, stage, k) -> scalar tensor

# ------------------------------------------------------------------------------------------------------ kl_gradients

NAMES = ("I", "q_idx", "k_idx", "w")
AXES = ("t s", "t h d", "s d", "t h")


def _scores(q_idx, k_idx, w):
    return torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q_idx, k_idx).relu(), w)


def _given(seed, T=6, S=None, Hi=3, Di=4, empty=0, holes=False):
    """float64 inputs; the last `empty` rows see no key; with holes, rows do not see every key before them."""
    S = S or T
    q_idx, k_idx, w = (
        normal(*shape, seed=seed + i, dtype=torch.float64) for i, shape in enumerate(((T, Hi, Di), (S, Di), (T, Hi)))
    )
    visible = causal(T, S)
    visible[T - empty :] = False
    if holes:
        visible &= normal(T, S, seed=seed + 4) > -0.5
    p = normal(T, S, seed=seed + 3, dtype=torch.float64).masked_fill(~visible, -torch.inf).softmax(dim=1).nan_to_num()
    return q_idx, k_idx, w, p, visible


def _of_scores(q_idx, k_idx, w, p, visible):
    guess = _scores(q_idx, k_idx, w).masked_fill(~visible, -torch.inf).softmax(dim=1).nan_to_num()
    return (guess - p) / visible.any(dim=1).sum()


def _all(q_idx, k_idx, w, p, visible):
    """The right four gradients."""
    of_scores = _of_scores(q_idx, k_idx, w, p, visible)
    active = torch.einsum("thd,sd->ths", q_idx, k_idx).relu()
    of_dots = of_scores[:, None] * w[..., None] * (active > 0)
    return (
        of_scores,
        torch.einsum("ths,sd->thd", of_dots, k_idx),
        torch.einsum("ths,thd->sd", of_dots, q_idx),
        torch.einsum("ts,ths->th", of_scores, active),
    )


def _expect_gradient(solution, given, which, cause, suspects=None):
    """suspects: {cause: function of the inputs that gives this mistake's gradient}."""
    got = solution(*given)
    kind = type(got).__name__
    expect(
        isinstance(got, (tuple, list)) and len(got) == 4,
        f"got {kind}, expected four gradients: of {', '.join(NAMES)}",
        "did you forget the return? return of_scores, of_q, of_k, of_w",
    )
    answers = {why: wrong(*given) for why, wrong in (suspects or {}).items()}
    place = NAMES.index(which)
    tensor(got[place], f"the gradient of {which}")
    expect_close(got[place], _all(*given)[place], 1e-9, AXES[place], f"gradient of {which}: {cause}", answers)


@kl_gradients.property("scores")
def kl_gradients_scores(solution):
    def raw(*given):
        return _of_scores(*given) * given[4].any(dim=1).sum()

    suspects = {
        "the sign: p - softmax(I) points uphill, the gradient is softmax(I) - p": lambda *given: -_of_scores(*given),
        "the loss is a mean over rows: divide by how many they are": raw,
        "softmax over all keys: hidden ones have no part in it": lambda q, k, w, p, visible: (
            _scores(q, k, w).softmax(dim=1) - p
        )
        / len(p),
        "softmax(I) alone: the target is missing": lambda *given: _of_scores(*given) + given[3] / len(given[3]),
        "divided by the number of visible pairs: the mean is over rows": lambda *given: (
            raw(*given) / given[4].sum()
        ),
        "-p / softmax(I): that is the gradient with respect to softmax(I), not to I": lambda q, k, w, p, visible: (
            -p / _scores(q, k, w).masked_fill(~visible, -torch.inf).softmax(dim=1).clamp(min=1e-300) / len(p)
        ),
    }  # fmt: skip
    for seed, T, S in ((1, 6, 6), (2, 4, 9)):
        cause = "not (softmax(I) - p) / rows on the visible keys, and 0 on the others"
        _expect_gradient(solution, _given(seed, T, S), "I", cause, suspects)


@kl_gradients.property("empty rows")
def kl_gradients_empty_rows(solution):
    suspects = {
        "divided by T: a row that sees no key has no part in the mean": lambda *given: (
            _of_scores(*given) * given[4].any(dim=1).sum() / len(given[3])
        )
    }
    for seed, T, empty in ((3, 6, 2), (4, 9, 5)):
        cause = "a row that sees nothing has gradient 0, not NaN, and is not counted"
        _expect_gradient(solution, _given(seed, T, empty=empty), "I", cause, suspects)


@kl_gradients.property("w")
def kl_gradients_w(solution):
    def dots(q, k):
        return torch.einsum("thd,sd->ths", q, k)

    suspects = {
        "the relu is missing: the weight multiplies relu(q · k)": lambda q, k, w, p, v: torch.einsum(
            "ts,ths->th", _of_scores(q, k, w, p, v), dots(q, k)
        ),
        "the gate (0 or 1) in place of relu(q · k)": lambda q, k, w, p, v: torch.einsum(
            "ts,ths->th", _of_scores(q, k, w, p, v), (dots(q, k) > 0).double()
        ),
        "w has no part in its own gradient": lambda *given: _all(*given)[3] * given[2],
    }
    for seed, T, S, Hi in ((5, 6, 6, 3), (6, 3, 8, 5)):
        _expect_gradient(solution, _given(seed, T, S, Hi), "w", "not Σ_s dI[t, s] · relu(q[t, h] · k[s])", suspects)


@kl_gradients.property("q_idx")
def kl_gradients_q_idx(solution):
    def ungated(q, k, w, p, v):
        return torch.einsum("ts,th,sd->thd", _of_scores(q, k, w, p, v), w, k)

    def unweighted(q, k, w, p, v):
        return _all(q, k, torch.ones_like(w), p, v)[1] if (w == 1).all() else torch.einsum(
            "ts,ths,sd->thd", _of_scores(q, k, w, p, v), (torch.einsum("thd,sd->ths", q, k) > 0).double(), k
        )  # fmt: skip

    suspects = {
        "the relu's gate is missing: where q · k is below 0, the score does not move": ungated,
        "w is missing: the score has w · relu(q · k)": unweighted,
        "multiplied by relu(q · k): its derivative is 0 or 1": lambda q, k, w, p, v: torch.einsum(
            "ts,th,ths,sd->thd", _of_scores(q, k, w, p, v), w, torch.einsum("thd,sd->ths", q, k).relu(), k
        ),
    }
    for seed, T, S, Hi in ((7, 6, 6, 3), (8, 3, 8, 5)):
        cause = "not Σ_s dI[t, s] · w[t, h] · [q · k > 0] · k[s]"
        _expect_gradient(solution, _given(seed, T, S, Hi), "q_idx", cause, suspects)


@kl_gradients.property("k_idx")
def kl_gradients_k_idx(solution):
    suspects = {
        "the relu's gate is missing: where q · k is below 0, the score does not move": lambda q, k, w, p, v: (
            torch.einsum("ts,th,thd->sd", _of_scores(q, k, w, p, v), w, q)
        ),
        "the mean over heads: each head's share is added": lambda *given: _all(*given)[2] / given[0].shape[1],
        "the mean over queries: a key gets a share from every query": lambda *given: _all(*given)[2] / len(given[0]),
        "one query's share: a key gets one from every query that sees it": lambda q, k, w, p, v: torch.einsum(
            "s,sh,sh,shd->sd",
            _of_scores(q, k, w, p, v).diagonal(), w, (torch.einsum("shd,sd->sh", q, k) > 0).double(), q,
        )
        if len(q) == len(k)
        else torch.zeros_like(k),
    }  # fmt: skip
    for seed, T, S, Hi in ((9, 6, 6, 3), (10, 3, 8, 5)):
        cause = "not Σ over t and h of dI[t, s] · w[t, h] · [q · k > 0] · q[t, h]"
        _expect_gradient(solution, _given(seed, T, S, Hi), "k_idx", cause, suspects)


@kl_gradients.property("large scores")
def kl_gradients_large_scores(solution):
    for seed in (15, 16):
        q_idx, k_idx, w, p, visible = _given(seed)
        for times in (1e3, -1e3):
            cause = "scores in the thousands: take the softmax with each row's largest subtracted, and clamp no guess"
            _expect_gradient(solution, (q_idx, k_idx, times * w, p, visible), "I", cause)


@kl_gradients.property("closed at 0")
def kl_gradients_closed_at_0(solution):
    cause = "where q · k is exactly 0 the gate is closed, [0 > 0] = 0"
    for seed in (17, 18):
        q_idx, k_idx, w, p, visible = _given(seed)
        k_idx[1] = 0.0
        q_idx[-1, 0] = 0.0
        for which in ("q_idx", "k_idx"):
            _expect_gradient(solution, (q_idx, k_idx, w, p, visible), which, cause)


@kl_gradients.property("finite differences")
def kl_gradients_finite_differences(solution):
    """The loss itself is moved a little, along a random direction: no formula of ours is in between."""
    for seed, T, S, Hi, Di, empty in ((11, 7, 7, 2, 3, 1), (12, 2, 30, 1, 1, 0), (13, 1, 1, 4, 8, 0)):
        given = _given(seed, T, S, Hi, Di, empty, holes=S > 1)
        given = *given[:3], given[3].roll(1, 0), given[4].roll(1, 0)  # the empty row comes first
        for laid in (given, tuple(map(strided, given))):
            got = solution(*laid)
            *inputs, p, visible = given
            for place, name in enumerate(NAMES):
                at = _scores(*inputs) if name == "I" else inputs[place - 1]
                gradient = tensor(got[place], name)
                sizes = f"{name}: got shape {list(gradient.shape)}, expected {list(at.shape)}"
                expect(gradient.shape == at.shape, sizes, "axes of size 1 stay: squeeze() drops them")
                step = 1e-6 * normal(*at.shape, seed=seed + 20, dtype=torch.float64)
                moved = []
                for there in (at + step, at - step):
                    scores = there if name == "I" else _scores(*inputs[: place - 1], there, *inputs[place:])
                    moved.append(float(loss_of(scores, p, visible)))
                wanted = (moved[0] - moved[1]) / 2e-6
                promised = float((gradient.double() * step).sum() / 1e-6)
                expect(
                    abs(promised - wanted) <= 1e-5 * max(1.0, abs(wanted)),
                    f"{name} moved along a random direction: the gradient promises {promised:.6g} a step, the loss "
                    f"changes by {wanted:.6g}",
                    f"wrong for T = {T}, S = {S}, Hi = {Hi}, where `visible` is not causal and has holes, or for "
                    "tensors that are not contiguous",
                )


# ------------------------------------------------------------------------------------------------------- lesson_loss

K = {0: 8, 1: 5}  # by seed
INDEXER = "indexer."


@functools.cache
def _right(stage, seed):
    """{name: gradient} after the right loss's backward pass."""
    return _gradients_after(lesson_loss_of(layer := OpenLayer(seed), stage, K[seed]), layer)


def _gradients_after(loss, layer):
    loss.backward()
    return layer.gradients()


def _learnt(solution, stage, seed):
    """{name: gradient} after the learner's loss's backward pass."""
    layer = OpenLayer(seed)
    weights = {"x": layer.x, **layer.trunk, **layer.indexer}
    before = {name: weight.detach().clone() for name, weight in weights.items()}
    loss = solution(layer, stage, K[seed])
    kind = "None" if loss is None else type(loss).__name__
    expect(
        isinstance(loss, torch.Tensor) and loss.numel() == 1 and loss.is_floating_point(),
        f"{stage}: got {kind}, expected a tensor with one number, the loss",
        "did you forget the return? return the loss itself, so that backward() can be called on it",
    )
    expect(
        loss.requires_grad,
        f"{stage}: the loss has no gradient, so nothing at all would learn",
        "everything is frozen or detached, or the loss left torch (no_grad, .item()): the scores must keep theirs",
    )
    for name, weight in weights.items():
        left = f"{stage}: the call left {name}"
        expect(weight.grad is None, f"{left} with a gradient", "return the loss: backward() is called afterwards, once")
        same = torch.equal(weight.detach(), before[name])
        expect(same, f"{left} with other numbers", "return the loss: the step is the optimizer's, afterwards")
    try:
        return _gradients_after(loss.sum(), layer)
    except RuntimeError as error:
        raise crashed(error) from error


def _expect_same(got, right, names, what, causes):
    """causes: [(function of (got, right), cause)]: the first one that holds is reported, else the last."""
    for name in names:
        scale = max(1e-6, float(right[name].abs().max()))
        if not (got[name] - right[name]).abs().max() <= 1e-3 * scale:
            cause = next(text for holds, text in causes if holds(got, right, name))
            shown = f"{float(got[name].norm()):.3g}, expected {float(right[name].norm()):.3g}"
            raise Failed(f"{what}: gradient of {name} has length {shown}", cause)


def _none(got, right, name):
    return not got[name].any()


def _always(got, right, name):
    return True


def _of_indexer(got):
    return [name for name in got if name.startswith(INDEXER)]


def _of_model(got):
    return [name for name in got if not name.startswith(INDEXER)]


@lesson_loss.property("warm-up teaches the indexer")
def lesson_loss_warm_up_teaches_the_indexer(solution):
    for seed in (0, 1):
        got, right = _learnt(solution, "warm-up", seed), _right("warm-up", seed)
        causes = [
            (_none, "the indexer gets no gradient: it is what the warm-up trains, so its scores are not detached"),
            (_always, "not the gradient of KL(p || softmax(I)) over every visible key: no selection in the warm-up"),
        ]
        _expect_same(got, right, _of_indexer(got), "warm-up", causes)


@lesson_loss.property("warm-up leaves the model alone")
def lesson_loss_warm_up_leaves_the_model_alone(solution):
    for seed in (0, 1):
        got, right = _learnt(solution, "warm-up", seed), _right("warm-up", seed)
        cause = (
            "the model moves in the warm-up. Three ways lead into it: the indexer's inputs h and latent, and the "
            "target p; detach all three. And the language loss has no part in the warm-up"
        )
        _expect_same(got, right, _of_model(got), "warm-up", [(_always, cause)])


@lesson_loss.property("sparse: the indexer learns from KL alone")
def lesson_loss_sparse_the_indexer(solution):
    for seed in (0, 1):
        got, right = _learnt(solution, "sparse", seed), _right("sparse", seed)
        causes = [
            (_none, "the indexer gets no gradient: nothing flows through the selection, so the KL has to teach it"),
            (
                _always,
                "not the gradient of the KL on the selected keys: it, or p, was taken on every key, or the language "
                "loss reaches the indexer too",
            ),
        ]
        _expect_same(got, right, _of_indexer(got), "sparse", causes)


@lesson_loss.property("sparse: the model learns from language alone")
def lesson_loss_sparse_the_model(solution):
    for seed in (0, 1):
        got, right = _learnt(solution, "sparse", seed), _right("sparse", seed)
        causes = [
            (_none, "the model gets no gradient: in the sparse stage it learns too, from the language loss"),
            (
                _always,
                "not the gradient of the language loss over the selected keys. Either the KL leaks into the model "
                "(h, latent and p are detached in this stage too), or attention saw keys that are not selected, or "
                "something is detached (x, h, latent, q, kv) through which the language loss has to go",
            ),
        ]
        _expect_same(got, right, _of_model(got), "sparse", causes)
