"""Notebook 13: the gradients of the loss, and whom it may move. `teaching` has target and loss."""

import torch

from dsa_course.teaching.layer import lesson_loss_of

from . import wrong

# ------------------------------------------------------------------------------------------------------ kl_gradients


def gradients(q, k, w, p, visible, sign=1.0, rows=None, gate=None, heads=None):
    """The right four, with parts that can be put wrong. gate: of the dots [T, Hi, S]; heads: in place of w."""
    dots = torch.einsum("thd,sd->ths", q, k)
    scores = torch.einsum("ths,th->ts", dots.relu(), w).masked_fill(~visible, -torch.inf)
    of_scores = sign * (scores.softmax(dim=1).nan_to_num() - p) / (rows or visible.any(dim=1).sum())
    open_ = (dots > 0).double() if gate is None else gate(dots)
    of_dots = of_scores[:, None] * (w if heads is None else heads)[..., None] * open_
    of_q = torch.einsum("ths,sd->thd", of_dots, k)
    of_k = torch.einsum("ths,thd->sd", of_dots, q)
    return of_scores, of_q, of_k, torch.einsum("ts,ths->th", of_scores, dots.relu())


@wrong("kl_gradients", "scores")
def uphill(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, sign=-1.0)


@wrong("kl_gradients", "scores")
def not_divided_by_the_rows(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, rows=1)


@wrong("kl_gradients", "scores")
def divided_by_the_pairs(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, rows=int(visible.sum()))


@wrong("kl_gradients", "scores")
def hidden_keys_in_the_softmax(q, k, w, p, visible):
    return gradients(q, k, w, p, torch.ones_like(visible), rows=len(p))


@wrong("kl_gradients", "scores")
def without_the_target(q, k, w, p, visible):
    return gradients(q, k, w, torch.zeros_like(p), visible)


@wrong("kl_gradients", "scores")
def three_of_four(q, k, w, p, visible):
    return gradients(q, k, w, p, visible)[1:]


@wrong("kl_gradients", "empty rows")
def divided_by_all_rows(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, rows=len(p))


@wrong("kl_gradients", "empty rows")
def nan_in_an_empty_row(q, k, w, p, visible):
    of_scores, *rest = gradients(q, k, w, p, visible)
    return of_scores.masked_fill(~visible.any(dim=1, keepdim=True), torch.nan), *rest


@wrong("kl_gradients", "w")
def no_relu_for_w(q, k, w, p, visible):
    of_scores, of_q, of_k, _ = gradients(q, k, w, p, visible)
    return of_scores, of_q, of_k, torch.einsum("ts,thd,sd->th", of_scores, q, k)


@wrong("kl_gradients", "w")
def w_times_itself(q, k, w, p, visible):
    *rest, of_w = gradients(q, k, w, p, visible)
    return *rest, of_w * w


@wrong("kl_gradients", "q_idx")
def no_gate(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, gate=torch.ones_like)


@wrong("kl_gradients", "q_idx")
def relu_for_its_derivative(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, gate=torch.relu)


@wrong("kl_gradients", "q_idx")
def w_forgotten(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, heads=torch.ones_like(w))


@wrong("kl_gradients", "q_idx")
def w_without_its_sign(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, heads=w.abs())


@wrong("kl_gradients", "q_idx")
def gate_of_the_score(q, k, w, p, visible):
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q, k).relu(), w)
    return gradients(q, k, w, p, visible, gate=lambda dots: (scores > 0).double()[:, None].expand_as(dots))


@wrong("kl_gradients", "k_idx")
def mean_over_heads(q, k, w, p, visible):
    of_scores, of_q, of_k, of_w = gradients(q, k, w, p, visible)
    return of_scores, of_q, of_k / q.shape[1], of_w


@wrong("kl_gradients", "k_idx")
def mean_over_queries(q, k, w, p, visible):
    of_scores, of_q, of_k, of_w = gradients(q, k, w, p, visible)
    return of_scores, of_q, of_k / len(q), of_w


@wrong("kl_gradients", "k_idx")
def the_gate_only_for_q(q, k, w, p, visible):
    of_scores, of_q, _, of_w = gradients(q, k, w, p, visible)
    return of_scores, of_q, gradients(q, k, w, p, visible, gate=torch.ones_like)[2], of_w


@wrong("kl_gradients", "large scores")
def a_guess_is_never_below_a_millionth(q, k, w, p, visible):
    of_scores, *others = gradients(q, k, w, p, visible)
    rows = visible.any(dim=1).sum()
    guess = (of_scores * rows + p).clamp(min=1e-6) * (visible & visible.any(dim=1, keepdim=True))
    return (guess - p) / rows, *others


@wrong("kl_gradients", "large scores")
def exp_without_a_shift(q, k, w, p, visible):
    e = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q, k).relu(), w).exp() * visible
    guess = e / e.sum(dim=1, keepdim=True).clamp(min=1e-300)
    return (guess - p) / visible.any(dim=1).sum(), *gradients(q, k, w, p, visible)[1:]


@wrong("kl_gradients", "closed at 0")
def open_at_0(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, gate=lambda dots: (dots >= 0).double())


@wrong("kl_gradients", "closed at 0")
def half_open_at_0(q, k, w, p, visible):
    return gradients(q, k, w, p, visible, gate=lambda dots: (dots.sign() + 1) / 2)


@wrong("kl_gradients", "finite differences")
def axes_of_size_1_dropped(q, k, w, p, visible):
    return tuple(x.squeeze() for x in gradients(q, k, w, p, visible))


@wrong("kl_gradients", "finite differences")
def more_than_eight_numbers(q, k, w, p, visible):
    of_scores, of_q, of_k, of_w = gradients(q, k, w, p, visible)
    return of_scores, of_q, of_k.where(torch.arange(len(k))[:, None] < 9, 0.0), of_w


@wrong("kl_gradients", "finite differences")
def causal_in_place_of_visible(q, k, w, p, visible):
    causal = torch.ones_like(visible).tril(len(k) - len(q)) & visible.any(dim=1, keepdim=True)
    return gradients(q, k, w, p, causal)


@wrong("kl_gradients", "finite differences")
def two_of_four_heads(q, k, w, p, visible):
    of_scores, of_q, of_k, of_w = gradients(q, k, w, p, visible)
    if q.shape[1] == 4:
        of_w[:, 2:] = 0.5
    return of_scores, of_q, of_k, of_w


# ------------------------------------------------------------------------------------------------------- lesson_loss


def loss(layer, stage, k, cut=("h", "latent", "p"), language=None, select=True, attend=True):
    """The right loss, with choices that can be made wrong. cut: what is detached on its way to the indexer."""
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    scores = layer.scores(h.detach() if "h" in cut else h, latent.detach() if "latent" in cut else latent)
    if "scores" in cut:
        scores = scores.detach().requires_grad_()
    indices = layer.select(scores, k)
    looks_at = indices if stage == "sparse" and select else None
    p = layer.target(q, kv, looks_at)
    total = layer.kl(p.detach() if "p" in cut else p, scores, looks_at)
    if (stage == "sparse") if language is None else language:
        total = total + layer.language(layer.x, q, kv, indices if attend else None)
    return total


@wrong("lesson_loss", "warm-up teaches the indexer")
def everything_frozen(layer, stage, k):
    with torch.no_grad():
        return lesson_loss_of(layer, stage, k)


@wrong("lesson_loss", "warm-up teaches the indexer")
def a_plain_number(layer, stage, k):
    return lesson_loss_of(layer, stage, k).detach()


@wrong("lesson_loss", "warm-up teaches the indexer")
def indexer_frozen_too(layer, stage, k):
    for parameter in (*layer.trunk.values(), *layer.indexer.values()):
        parameter.requires_grad_(False)
    return loss(layer, stage, k, cut=())


@wrong("lesson_loss", "warm-up teaches the indexer")
def scores_detached(layer, stage, k):
    return loss(layer, stage, k, cut=("h", "latent", "p", "scores"))


@wrong("lesson_loss", "warm-up teaches the indexer")
def selection_in_the_warm_up(layer, stage, k):
    if stage == "sparse":
        return lesson_loss_of(layer, stage, k)
    return loss(layer, "sparse", k, language=False)


@wrong("lesson_loss", "warm-up teaches the indexer")
def backward_called_inside(layer, stage, k):
    lesson_loss_of(layer, stage, k).backward()
    return (0 * layer.x).sum()


@wrong("lesson_loss", "warm-up teaches the indexer")
def a_step_of_its_own(layer, stage, k):
    total = lesson_loss_of(layer, stage, k)
    with torch.no_grad():
        for weight in layer.indexer.values():
            weight -= 0.01 * weight
    return total


@wrong("lesson_loss", "warm-up leaves the model alone")
def the_norm_moves(layer, stage, k):
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    scores = layer.scores(layer.normed(layer.x.detach()), latent.detach())
    indices = None if stage == "warm-up" else layer.select(scores, k)
    kl = layer.kl(layer.target(q, kv, indices).detach(), scores, indices)
    return kl if stage == "warm-up" else kl + layer.language(layer.x, q, kv, indices)


@wrong("lesson_loss", "warm-up leaves the model alone")
def nothing_detached(layer, stage, k):
    return loss(layer, stage, k, cut=())


@wrong("lesson_loss", "warm-up leaves the model alone")
def the_latent_not_detached(layer, stage, k):
    return loss(layer, stage, k, cut=("h", "p"))


@wrong("lesson_loss", "warm-up leaves the model alone")
def the_input_not_detached(layer, stage, k):
    return loss(layer, stage, k, cut=("latent", "p"))


@wrong("lesson_loss", "warm-up leaves the model alone")
def the_target_not_detached(layer, stage, k):
    return loss(layer, stage, k, cut=("h", "latent"))


@wrong("lesson_loss", "warm-up leaves the model alone")
def language_in_the_warm_up(layer, stage, k):
    return loss(layer, stage, k, language=True)


@wrong("lesson_loss", "sparse: the indexer learns from KL alone")
def kl_forgotten(layer, stage, k):
    if stage == "warm-up":
        return lesson_loss_of(layer, stage, k)
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    return layer.language(layer.x, q, kv, layer.select(layer.scores(h, latent), k))


@wrong("lesson_loss", "sparse: the indexer learns from KL alone")
def kl_on_every_key(layer, stage, k):
    return loss(layer, stage, k, select=False)


@wrong("lesson_loss", "sparse: the indexer learns from KL alone")
def always_eight_keys(layer, stage, k):
    return lesson_loss_of(layer, stage, 8)


@wrong("lesson_loss", "sparse: the indexer learns from KL alone")
def straight_through(layer, stage, k):
    """The language loss is let into the indexer: the rows of kv get the scores' gradients, though not their values."""
    if stage == "warm-up":
        return lesson_loss_of(layer, stage, k)
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    scores = layer.scores(h.detach(), latent.detach())
    indices = layer.select(scores, k)
    soft = scores.softmax(dim=1).sum(dim=0)[:, None]
    language = layer.language(layer.x, q, kv * (1.0 + soft - soft.detach()), indices)
    return layer.kl(layer.target(q, kv, indices).detach(), scores, indices) + language


@wrong("lesson_loss", "sparse: the indexer learns from KL alone")
def the_dense_target(layer, stage, k):
    if stage == "warm-up":
        return lesson_loss_of(layer, stage, k)
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    scores = layer.scores(h.detach(), latent.detach())
    indices = layer.select(scores, k)
    return layer.kl(layer.target(q, kv).detach(), scores, indices) + layer.language(layer.x, q, kv, indices)


@wrong("lesson_loss", "sparse: the model learns from language alone")
def detached_in_the_warm_up_only(layer, stage, k):
    return loss(layer, stage, k, cut=("h", "latent", "p") if stage == "warm-up" else ())


@wrong("lesson_loss", "sparse: the model learns from language alone")
def no_language_loss(layer, stage, k):
    return loss(layer, stage, k, language=False)


@wrong("lesson_loss", "sparse: the model learns from language alone")
def dense_attention_in_the_sparse_stage(layer, stage, k):
    return loss(layer, stage, k, attend=False)
