"""Notebook 13."""

import numpy as np
import torch

from . import right

# --------------------------------------------------------------------------------------------------------- kl_target


@right("kl_target")
def target_in_numpy(q, kv, scale):
    q, kv = q.numpy(), kv.numpy()
    T, S = len(q), len(kv)
    logits = np.einsum("thd,sd->hts", q, kv) * scale
    logits = np.where(np.tri(T, S, S - T, dtype=bool), logits, -np.inf)
    exponentials = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return (exponentials / exponentials.sum(axis=-1, keepdims=True)).mean(axis=0)


@right("kl_target")
def target_in_loops(q, kv, scale):
    (T, H, _), S = q.shape, len(kv)
    p = torch.zeros(T, S, dtype=torch.float64)
    for t in range(T):
        end = S - T + t + 1
        for h in range(H):
            p[t, :end] += torch.softmax(scale * (kv[:end].double() @ q[t, h].double()), dim=0)
    return p / H


@right("kl_target")
def the_sum_made_to_one(q, kv, scale):
    logits = torch.tensordot(q, kv, ([2], [1])) * scale
    future = torch.arange(len(kv)) > torch.arange(len(q))[:, None] + len(kv) - len(q)
    total = logits.masked_fill(future[:, None], -torch.inf).softmax(-1).sum(1)
    return torch.nn.functional.normalize(total, p=1, dim=-1)


# ----------------------------------------------------------------------------------------------------------- kl_loss


@right("kl_loss")
def loss_in_numpy(scores, p, indices):
    scores, p, total, rows = scores.numpy(), p.numpy(), 0.0, 0
    for t, row in enumerate(indices.numpy()):
        keys = row[row >= 0]
        if len(keys) == 0:
            continue
        target, guess = p[t, keys] / p[t, keys].sum(), scores[t, keys]
        log_guess = guess - guess.max()
        log_guess = log_guess - np.log(np.exp(log_guess).sum())
        there = target > 0
        total += (target[there] * (np.log(target[there]) - log_guess[there])).sum()
        rows += 1
    return total / max(rows, 1)


@right("kl_loss")
def loss_by_gathering(scores, p, indices):
    there = indices >= 0
    places = indices.clamp(min=0).long()
    target = p.gather(1, places) * there
    target = target / target.sum(dim=1, keepdim=True).clamp(min=torch.finfo(p.dtype).tiny)
    log_guess = scores.gather(1, places).masked_fill(~there, -torch.inf).log_softmax(dim=1).masked_fill(~there, 0.0)
    alive = there.any(dim=1)
    terms = torch.xlogy(target, target) - target * log_guess
    return terms[alive].sum() / alive.sum().clamp(min=1)


@right("kl_loss")
def loss_by_torchs_own(scores, p, indices):
    losses = []
    for row, target, keys in zip(scores, p, indices.long(), strict=True):
        keys = keys[keys >= 0]
        if len(keys):
            guess = torch.log_softmax(row[keys], dim=0)
            losses.append(torch.nn.functional.kl_div(guess, target[keys] / target[keys].sum(), reduction="sum"))
    return torch.stack(losses).mean().item() if losses else 0.0


# ------------------------------------------------------------------------------------------------------ kl_gradients


@right("kl_gradients")
def gradients_by_autograd(q_idx, k_idx, w, p, visible):
    q, k, weights = (x.clone().requires_grad_() for x in (q_idx, k_idx, w))
    scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q, k).relu(), weights)
    rows = visible.any(dim=1)
    log_guess = scores[rows].masked_fill(~visible[rows], -torch.inf).log_softmax(dim=1)
    loss = -(p[rows] * log_guess.masked_fill(~visible[rows], 0.0)).sum() / rows.sum()
    return torch.autograd.grad(loss, (scores, q, k, weights))


@right("kl_gradients")
def gradients_in_numpy(q_idx, k_idx, w, p, visible):
    q, k, w, p, seen = (x.numpy() for x in (q_idx, k_idx, w, p, visible))
    dots = np.einsum("thd,sd->ths", q, k)
    scores = np.where(seen, (np.maximum(dots, 0) * w[:, :, None]).sum(axis=1), -np.inf)
    of_scores = np.zeros_like(p)
    for t in np.flatnonzero(seen.any(axis=1)):
        guess = np.exp(scores[t] - scores[t].max())
        of_scores[t] = (guess / guess.sum() - p[t]) / seen.any(axis=1).sum()
    gated = of_scores[:, None] * w[:, :, None] * (dots > 0)
    return of_scores, gated @ k, np.einsum("ths,thd->sd", gated, q), np.einsum("ts,ths->th", of_scores, dots.clip(0))


# ------------------------------------------------------------------------------------------------------- lesson_loss


@right("lesson_loss")
def without_gradients_first(layer, stage, k):
    with torch.no_grad():
        h = layer.normed(layer.x)
        latent = layer.latent(h)
        attention_side = layer.attention_side(h, latent)
    scores = layer.scores(h, latent)
    with torch.no_grad():
        indices = None if stage == "warm-up" else layer.select(scores, k)
        p = layer.target(*attention_side, indices)
    if stage == "warm-up":
        return layer.kl(p, scores)
    h = layer.normed(layer.x)
    language = layer.language(layer.x, *layer.attention_side(h, layer.latent(h)), indices)
    return layer.kl(p, scores, indices) + language


@right("lesson_loss")
def by_requires_grad(layer, stage, k):
    if stage == "warm-up":
        layer.x.requires_grad_(False)
        for parameter in layer.trunk.values():
            parameter.requires_grad_(False)
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    scores = layer.scores(h.detach(), latent.detach())
    indices = None if stage == "warm-up" else layer.select(scores, k)
    loss = layer.kl(layer.target(q.detach(), kv.detach(), indices), scores, indices)
    return loss if stage == "warm-up" else loss + layer.language(layer.x, q, kv, indices)


# ----------------------------------------------------------------------------------------------------------- verdict


@right("verdict")
def verdict_in_numpy(ratios, errors):
    distance = (np.array(ratios) - 1) / np.array(errors)
    if len(ratios) < 2:
        return 0
    return np.sign(distance[0]).astype(int) * int((np.abs(distance) > 2).all() and len(set(np.sign(distance))) == 1)


@right("verdict")
def verdict_as_a_float(ratios, errors):
    signs = {float(np.sign(r - 1)) if abs(r - 1) > 2 * e else 0.0 for r, e in zip(ratios, errors, strict=True)}
    return signs.pop() if len(signs) == 1 and len(ratios) > 1 else 0.0


@right("verdict")
def verdict_in_torch(ratios, errors):
    r, e = (torch.tensor(side, dtype=torch.float64) for side in (ratios, errors))
    above, below = (r - 2 * e).min() > 1, (r + 2 * e).max() < 1
    return (above.int() - below.int()) * int(len(r) >= 2)
