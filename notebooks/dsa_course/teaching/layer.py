"""Exercise 13.4: a layer of the trained model in pieces that let every gradient through.

`DSALayer` detaches the indexer's inputs, and `indexer_loss` the target. Here nothing is detached, so that one sees what
that is good for.
"""

import functools

import torch
from torch.nn import functional as F

from dsa_ref.nn import load_small_model
from dsa_ref.rope import rope
from dsa_ref.select_topk import select_topk

from .lesson import TEXT, forget

LAYER = 2
START = 200  # of the bytes that are read


@functools.cache
def _inputs(length):
    """(what reaches the layer [length, dim], the bytes that come next [length]) of the text."""
    model, caught = load_small_model(), []
    hook = model.layers[LAYER].register_forward_pre_hook(lambda block, given: caught.append(given[0]))
    tokens = torch.tensor(list(TEXT[START : START + length + 1]))
    with torch.no_grad():
        model(tokens[:-1], attention="dense")
    hook.remove()
    return caught[0], tokens[1:]


class OpenLayer:
    """Layer 2 of the trained small model, its indexer new, on some bytes of a text. T = S, causal.

    x [T, dim] is what comes from the layers below, with a gradient. `trunk` and `indexer` are the layer's weights,
    {name: parameter}, all of which may learn.
    """

    def __init__(self, seed=0, length=64):
        model = load_small_model(index_fp8=False)
        forget(model, seed)
        model.requires_grad_(True)
        self._model, self._block = model, model.layers[LAYER]
        self._attention, self._config = self._block.self_attn, model.config.attention
        below, self._next = _inputs(length)
        self.x = below.clone().requires_grad_()
        self._positions = torch.arange(length)
        named = {"norm.weight": self._block.attention_norm.weight, **dict(self._attention.named_parameters())}
        self.indexer = {name: p for name, p in named.items() if name.startswith("indexer.")}
        self.trunk = {name: p for name, p in named.items() if name not in self.indexer}

    def normed(self, x):
        """The layer's norm: [T, dim] -> [T, dim]."""
        return self._block.attention_norm(x)

    def latent(self, h):
        """h [T, dim], normed -> the query latent [T, r], which attention and the indexer share."""
        return self._attention.q_a_layernorm(self._attention.q_a_proj(h))

    def attention_side(self, h, latent):
        """-> attention's q [T, H, D] and kv [S, D], as `sparse_attention` takes them."""
        heads, kv = self._attention._queries(latent, self._positions), self._attention._latents(h, self._positions)
        W_UK, _ = self._attention._up_projections(kv)
        nope, turned = heads.split((self._config.qk_nope_head_dim, self._config.qk_rope_head_dim), dim=-1)
        return torch.cat((torch.einsum("thn,hnc->thc", nope, W_UK), turned), dim=-1), kv

    def scores(self, h, latent):
        """The indexer: I [T, S], -inf in the future."""
        c, indexer = self._config, self._attention.indexer
        q = indexer.wq_b(latent).unflatten(-1, (c.index_n_heads, c.index_head_dim))
        q, k = (rope(y, self._positions, self._attention.freqs, "half") for y in (q, indexer.k_norm(indexer.wk(h))))
        w = indexer.weights_proj(h) * c.index_n_heads**-0.5 * c.index_head_dim**-0.5
        scores = torch.einsum("ths,th->ts", torch.einsum("thd,sd->ths", q, k).relu(), w)
        return scores.masked_fill(self._future(), -torch.inf)

    def select(self, scores, k):
        """The k best of each row, int32 [T, k], -1 where there are fewer."""
        return select_topk(scores.detach(), k)

    def target(self, q, kv, indices=None):
        """p [T, S]: attention's weights, the mean over heads, on every visible key or on the selected ones alone."""
        return self._weights(q, kv, self._seen(indices)).mean(dim=1)

    def kl(self, p, scores, indices=None):
        """The mean over rows of KL(p || softmax(scores)): on every visible key, or on the selected ones alone."""
        seen = self._seen(indices)
        p = p.masked_fill(~seen, 0.0)
        p = p / p.sum(dim=1, keepdim=True)
        log_guess = scores.masked_fill(~seen, -torch.inf).log_softmax(dim=1).masked_fill(~seen, 0.0)
        return (p * (p.clamp(min=1e-30).log() - log_guess)).sum(dim=1).mean()  # 0 where p is 0, and in its gradient

    def language(self, x, q, kv, indices=None):
        """Attention, over every visible key or over the selected ones, the rest of the model, and its language loss."""
        _, W_UV = self._attention._up_projections(kv)
        u = torch.einsum("ths,sc->thc", self._weights(q, kv, self._seen(indices)), kv[:, : self._config.kv_lora_rank])
        y = self._attention.o_proj(torch.einsum("thc,hvc->thv", u, W_UV).flatten(1))
        y = self._block._feed_forward(x + y)
        for block in self._model.layers[LAYER + 1 :]:
            y = block(y, self._positions, None, "dense", None)
        return F.cross_entropy(F.linear(self._model.norm(y), self._model.embed.weight), self._next)

    def gradients(self):
        """{name: the gradient that the last backward pass left, or zeros} of x, trunk and indexer."""
        named = {"x": self.x, **self.trunk, **self.indexer}
        return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in named.items()}

    def _future(self):
        T = len(self._positions)
        return torch.ones(T, T, dtype=torch.bool).triu(1)

    def _seen(self, indices):
        """bool [T, S]: the pairs that attention looks at."""
        if indices is None:
            return ~self._future()
        T = len(self._positions)
        chosen = torch.zeros(T, T + 1, dtype=torch.bool)
        return chosen.scatter(1, torch.where(indices < 0, T, indices).long(), True)[:, :T]

    def _weights(self, q, kv, seen):
        logits = torch.einsum("thd,sd->ths", q, kv) * self._config.softmax_scale
        return logits.masked_fill(~seen[:, None], -torch.inf).softmax(dim=-1)


def lesson_loss_of(layer, stage, k):
    """What exercise 13.4 asks for."""
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    q, kv = layer.attention_side(h, latent)
    scores = layer.scores(h.detach(), latent.detach())
    if stage == "warm-up":
        return layer.kl(layer.target(q, kv).detach(), scores)
    indices = layer.select(scores, k)
    kl = layer.kl(layer.target(q, kv, indices).detach(), scores, indices)
    return kl + layer.language(layer.x, q, kv, indices)
