"""What `compare` trains: DSA, the controls that select by something else, and DSA with one thing changed.

A regime changes one of four things: what the warm-up looks at, where the selection comes from (another
`lightning_select` among the layer's `ops`), the indexer's module, or a size. All else, the data and its order too, is
the same for every regime.

Source: DeepSeek-V3.2-Exp report, section 2.1.1, for DSA; SPEC section 5. The other regimes are ours.
"""

import dataclasses
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from ..nn.layer import STEPS, Ops
from ..nn.model import ModelConfig, SmallModel
from ..nn.parts import Indexer
from ..precision import exact
from ..testing import window_selection
from .loop import Losses
from .stages import is_indexers, stage_backward, stage_loss

ROWS_AT_ONCE = 2048  # of the oracle's and the random selection's scores, which stand as a whole for each sequence
ALSO_USED = ("dense_attention", "mha_attention", "indexer_loss", "hadamard", "quantize")  # where `ops` has them


@dataclasses.dataclass(frozen=True)
class Regime:
    """One way to train, from the dense model on.

    meaning: one line for a reader. warm_up: the keys that it looks at, "all keys" (equation 3) or "own selection", or
    None for no warm-up. attention: the last stage's. selection: whose, a key of `SELECTIONS`. indexer: its module.
    sizes: fields of the DSAConfig that differ.
    """

    meaning: str
    warm_up: str | None = "all keys"
    attention: str = "sparse"
    selection: str = "indexer"
    indexer: type[Indexer] = Indexer
    sizes: tuple[tuple[str, int], ...] = ()

    @property
    def scores(self) -> bool:
        """Whether the regime's indexer selects, and so has something to learn."""
        return self.attention == "sparse" and self.selection == "indexer"

    @property
    def backward(self) -> Callable[[SmallModel, Tensor, str, float], Losses]:
        """How the gradients of the last stage come about, as `stages.stage_backward`."""
        if not self.scores:
            return language_backward
        return joint_backward if self.indexer is AttachedIndexer else stage_backward


class AttachedIndexer(Indexer):
    """The indexer without its detach: what its loss asks of the inputs reaches the main model."""

    def forward(self, x: Tensor, q_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Indexer.forward`, but differentiable in x and q_latent."""
        return self.project(x, q_latent)


class LinearIndexer(Indexer):
    """The indexer without its relu: I[t, s] = (sum over heads of w[t, h] q[t, h]) · k[s].

    With u for that sum, relu(u · k) - relu(-u · k) is u · k: two heads, u and -u, of weights 1 and -1. So the steps
    that know a relu score it as it is.
    """

    def forward(self, x: Tensor, q_latent: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """As `Indexer.forward`, with two heads: q [T, 2, Di], w fp32 [T, 2]."""
        q, k, w = super().forward(x, q_latent)
        u = torch.einsum("th,thd->td", w, q.float()).to(q.dtype)
        return torch.stack((u, -u), dim=1), k, torch.tensor((1.0, -1.0), device=w.device).expand(len(w), 2)


def language_backward(model: SmallModel, tokens: Tensor, stage: str, share: float = 1.0) -> Losses:
    """`stage_backward` of the language loss alone, for a selection that has nothing to learn."""
    n, length = tokens.shape[0], tokens.shape[1] - 1
    positions = torch.arange(length, device=tokens.device).repeat(n)
    logits = model(tokens[:, :-1].flatten(), positions, attention="dense" if stage == "dense" else "sparse")
    loss = share * F.cross_entropy(logits, tokens[:, 1:].flatten())
    loss.backward()
    return loss.detach(), None


def joint_backward(model: SmallModel, tokens: Tensor, stage: str, share: float = 1.0) -> Losses:
    """`stage_backward` as one pass over the sum of both losses: where the indexer is attached, they share a graph."""
    language, indexer = stage_loss(model, tokens, stage)
    (share * (language + indexer)).backward()
    return share * language.detach(), share * indexer.detach()


def steps(ops: Ops, **changed: Callable) -> types.SimpleNamespace:
    """The steps of `ops` that a layer trains with, some of them changed.

    Without the small steps of decoding: so every pass, those that keep no gradient too, is `DSALayer`'s own.
    """
    there = {name: getattr(ops, name) for name in (*STEPS, *ALSO_USED) if hasattr(ops, name)}
    return types.SimpleNamespace(**there | changed)


def window_ops(ops: Ops, seed: int) -> types.SimpleNamespace:
    """`ops` with the last k keys as the selection; seed is not used."""

    def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
        ends = torch.arange(1, len(q_idx) + 1, dtype=torch.int32, device=q_idx.device) if end is None else end
        return window_selection(k, start, ends)

    return steps(ops, lightning_select=lightning_select)


def random_ops(ops: Ops, seed: int) -> types.SimpleNamespace:
    """`ops` with k random keys as the selection, drawn anew by each row of each call, in an order that seed fixes."""
    generators = {}

    def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
        device = q_idx.device
        if device not in generators:
            generators[device] = torch.Generator(device).manual_seed(seed)

        def scores(rows, keys):
            shape = rows.stop - rows.start, keys.stop - keys.start
            return torch.rand(shape, generator=generators[device], dtype=torch.float32, device=device)

        return select_by(scores, k, start, ops.select_topk)

    return steps(ops, lightning_select=lightning_select)


def oracle_ops(ops: Ops, seed: int) -> types.SimpleNamespace:
    """`ops` with the k keys that dense attention would weigh most, over all heads, as the selection; seed is not used.

    What attention looks at is known where its queries are, in `sparse_attention`. So `lightning_select` gives lists of
    nothing, and `sparse_attention` fills them in before it attends; a layer's record has them filled.
    """
    starts = []

    def lightning_select(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
        starts[:] = [start]
        return torch.full((len(q_idx), k), -1, dtype=torch.int32, device=q_idx.device)

    def sparse_attention(q, kv, indices, scale, v_dim, *rest, **named):
        indices.copy_(
            select_by(mean_weights(q.detach(), kv.detach(), scale), indices.shape[1], starts.pop(), ops.select_topk)
        )
        return ops.sparse_attention(q, kv, indices, scale, v_dim, *rest, **named)

    return steps(ops, lightning_select=lightning_select, sparse_attention=sparse_attention)


def without_hadamard(ops: Ops) -> types.SimpleNamespace:
    """`ops` that turn and quantise the indexer's vectors, but do not rotate them in between."""

    def rotate_quantize(x, positions, freqs):
        return ops.quantize(ops.rope(x, positions, freqs, "half"))

    return steps(ops, rotate_quantize=rotate_quantize)


def mean_weights(q: Tensor, kv: Tensor, scale: float) -> Callable[[slice, slice], Tensor]:
    """A function of (rows, keys) of one sequence, the rows its last: the mean over heads of their dense attention
    probabilities, fp32 [rows, keys]. q [T, H, D], kv [S, D]."""

    @exact
    def weights(rows, keys):
        logits = torch.einsum("thd,sd->ths", q[rows].float(), kv[keys].float()) * scale
        seen = torch.ones(logits.shape[0], logits.shape[2], dtype=torch.bool, device=q.device)
        later = seen.triu(1 + logits.shape[2] - logits.shape[0])
        return logits.masked_fill_(later[:, None], -torch.inf).softmax(dim=-1).mean(dim=1)

    return weights


@torch.no_grad()
def select_by(scores: Callable[[slice, slice], Tensor], k: int, start: Tensor, select_topk: Callable) -> Tensor:
    """`lightning_select` by any scores: of packed sequences, int32 [T, k] of the k keys that score highest.

    scores: a function of (rows, keys), slices of the packed tokens, that gives float [rows, keys]; keys begin where the
    rows' sequence does and end with the last row. start: int32 [T], where each row's sequence begins.
    """
    T = len(start)
    indices = torch.full((T, k), -1, dtype=torch.int32, device=start.device)
    begins = start.unique().tolist()
    for first, last in zip(begins, [*begins[1:], T], strict=True):
        for row in range(first, last, ROWS_AT_ONCE):
            rows, keys = slice(row, min(row + ROWS_AT_ONCE, last)), slice(first, min(row + ROWS_AT_ONCE, last))
            chosen = select_topk(scores(rows, keys), k)  # causal: the rows are the last of the keys
            indices[rows] = torch.where(chosen < 0, -1, chosen + first)
    return indices


SELECTIONS = {
    "indexer": lambda ops, seed: steps(ops),
    "window": window_ops,
    "random": random_ops,
    "oracle": oracle_ops,
}

REGIMES = {
    "dense": Regime("dense attention, trained on as it was: the control", warm_up=None, attention="dense"),
    "DSA": Regime("warm-up on all keys, then sparse"),
    "window": Regime("the last k keys", warm_up=None, selection="window"),
    "random": Regime("k random keys of those a row sees, drawn anew each time", warm_up=None, selection="random"),
    "oracle": Regime("the k keys of the largest dense attention weight", warm_up=None, selection="oracle"),
    "no warm-up": Regime("DSA from an indexer of random weights on", warm_up=None),
    "own warm-up": Regime("DSA, the warm-up on the indexer's own selection alone", warm_up="own selection"),
    "attached": Regime(
        "DSA, the KL's gradient reaching the main model through the indexer's inputs", indexer=AttachedIndexer
    ),
    "one head": Regime("DSA with one index head", sizes=(("index_n_heads", 1),)),
    "no relu": Regime("DSA whose index scores have no relu", indexer=LinearIndexer),
}


def make_model(regime: Regime, config: ModelConfig, ops: Ops, weights: dict[str, Tensor], seed: int) -> SmallModel:
    """The model that a regime begins with, fp32: the dense model's weights, and its indexers where they fit.

    weights: a state dict of `config`'s model. What has other sizes in the regime's indexers is drawn by seed.

    Raises: RuntimeError for the weights of a model of other sizes.
    """
    attention = dataclasses.replace(config.attention, index_fp8=False, **dict(regime.sizes))
    torch.manual_seed(seed)
    model = SmallModel(dataclasses.replace(config, attention=attention), SELECTIONS[regime.selection](ops, seed))
    for block in model.layers:
        fresh = regime.indexer(attention)
        fresh.load_state_dict(block.self_attn.indexer.state_dict())
        block.self_attn.indexer = fresh
    own = model.state_dict()
    fresh = {name for name in own if is_indexers(name) and weights[name].shape != own[name].shape}
    model.load_state_dict({name: own[name] if name in fresh else weight for name, weight in weights.items()})
    return model
