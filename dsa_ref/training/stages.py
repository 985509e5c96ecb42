"""The losses of the three stages, and how their gradients come about.

    dense     language loss, attention over everything; the indexer is not touched
    warm-up   equation 3: KL over all keys against the dense attention; everything but the indexer is frozen
    sparse    equation 4: language loss over the selection for the model, KL on the selected keys for the indexer

In the sparse stage the KL's target, the attention probabilities' mean over heads, comes out of the language loss's
backward pass, which computes them anyway: first the one, then the other. No gradient passes between the two sides.

Source: DeepSeek-V3.2-Exp report, section 2.1.1; SPEC section 5.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import dsa_ref

from ..nn.layer import DSALayer
from ..nn.model import SmallModel

STAGES = ("dense", "warm-up", "sparse")
TRAINED = {"dense": (False,), "warm-up": (True,), "sparse": (False, True)}  # inside the indexers, or outside


def indexer_parameters(model: nn.Module, inside: bool = True) -> list[nn.Parameter]:
    """The parameters of all indexers of a model or of one layer, or (inside=False) all others."""
    return [p for name, p in model.named_parameters() if is_indexers(name) == inside]


def is_indexers(name: str) -> bool:
    """Whether a parameter of this name, in a model or in a layer, belongs to an indexer."""
    return ".indexer." in f".{name}"


def stage_loss(
    model: SmallModel, tokens: Tensor, stage: str, own_selection: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """(language loss, indexer loss), in nats, of token windows int64 [n, L + 1]; None where the stage has none.

    stage: one of STAGES. The indexer loss is the mean over layers. own_selection: a warm-up on the keys that the
    indexer itself selects, not on all: what it never selects, it then never learns of.

    Raises: ValueError for another stage.
    """
    language, record = _forward(model, tokens, stage)
    if stage == "dense":
        return language, None
    layers = [block.self_attn for block in model.layers]
    losses = [_indexer_loss(*pair, own_selection=own_selection) for pair in zip(layers, record, strict=True)]
    return language, torch.stack(losses).mean()


def stage_backward(
    model: SmallModel, tokens: Tensor, stage: str, share: float = 1.0, own_selection: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """Add the gradients of `share` times `stage_loss` to the parameters'; `stage_loss` times share, detached.

    share: these windows' part of the step's, so that the parts add up to the whole. Every row sees a key, so a mean
    over rows of the parts is the mean over the rows of all.
    """
    language, record = _forward(model, tokens, stage)
    if language is not None:
        (share * language).backward()
        language = share * language.detach()
    if stage == "dense":
        return language, None
    total, part = torch.zeros((), device=tokens.device), share / len(record)
    for block, step in zip(model.layers, record, strict=True):
        target = step["probe"].grad if "probe" in step else None  # left there by the pass above, where ops can
        loss = part * _indexer_loss(block.self_attn, step, target, own_selection)
        loss.backward()
        total += loss.detach()
    return language, total


def _forward(model, tokens, stage) -> tuple[Tensor | None, list[dict] | None]:
    """The language loss, and what the layers recorded for the indexers; the windows do not see each other."""
    if stage not in STAGES:
        raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
    n, length = tokens.shape[0], tokens.shape[1] - 1
    record = None if stage == "dense" else []
    logits = model(
        tokens[:, :-1].flatten(),
        torch.arange(length, device=tokens.device).repeat(n),
        attention="sparse" if stage == "sparse" else "dense",
        record=record,
    )
    return None if stage == "warm-up" else F.cross_entropy(logits, tokens[:, 1:].flatten()), record


def _indexer_loss(layer: DSALayer, step: dict, target: Tensor | None = None, own_selection: bool = False) -> Tensor:
    """The KL of one layer's recorded step, over its keys: all, or those selected."""
    loss = getattr(layer.ops, "indexer_loss", dsa_ref.indexer_loss)
    side, start, indices = (step["q_idx"], step["k_idx"], step["w"]), step["start"], step.get("indices")
    if target is not None:
        return loss(*side, None, None, None, indices, start, target=target)
    lse = step["lse"]  # over the same keys, but where the selection is made here
    if own_selection:
        scored = (tensor.detach() for tensor in side)
        indices, lse = layer.ops.lightning_select(*scored, layer.config.index_topk, start=start), None
    return loss(*side, step["q"], step["kv"], layer.config.softmax_scale, indices, start, lse=lse)
