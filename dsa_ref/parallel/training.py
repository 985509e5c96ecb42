"""One training step over a group: each rank has its rows of the windows, and all end with the gradient of the whole.

    losses       sums over own rows, divided by the rows of the group: shares, which add up to the mean over all rows
    gradients    of what lies in a rank's rows: its own; of gathered rows: summed by the layer's reduce-scatter
    weights      are replicated, so each rank has the gradient of its share of the loss: summed once, in
                 `sum_gradients`, after the last backward pass, in fp32

Source: SPEC sections 5 and 11; `dsa_ref.training.stages` is the same step on one rank.
"""

import math
import zlib
from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

import dsa_ref

from ..contracts import check_count, check_dtype, check_shapes
from ..nn.model import SmallModel
from .gathered import GatheredLayer
from .ranks import Ranks
from .zigzag import Zigzag

STAGES = ("dense", "warm-up", "sparse")


def stage_backward(
    model: SmallModel, tokens: Tensor, stage: str, share: float = 1.0
) -> tuple[Tensor | None, Tensor | None]:
    """Add the gradients of `share` times a stage's losses to the parameters', on every rank; the losses so, in nats.

    model: `over_group(model, GatheredLayer, group)` of a SmallModel. tokens: all windows, int64 [n, L + 1], the same on
    all ranks; each rank takes its rows. stage: "dense", "warm-up" or "sparse", and share: as for
    `dsa_ref.training.stages.stage_backward`. Returns (language loss, indexer loss) times share, of all windows on all
    ranks alike, detached fp32; None where the stage has none. Gradients that parameters had before must be the same on
    all ranks: they are kept, and counted once.

    Raises: TypeError for another model; on all ranks, ValueError for another stage or share, TypeError or ValueError
    for other tokens, and as GatheredLayer does.
    """
    layers = [block.self_attn for block in model.layers] if isinstance(model, SmallModel) else []
    if not layers or not all(isinstance(layer, GatheredLayer) for layer in layers):
        raise TypeError("model must be a SmallModel over a group: over_group(model, GatheredLayer, group)")
    ranks = layers[0].ranks
    with ranks.failing_together():
        if stage not in STAGES:
            raise ValueError(f"stage must be one of {STAGES}, got {stage!r}")
        if isinstance(share, bool) or not isinstance(share, (int, float)) or not math.isfinite(share):
            raise ValueError(f"share must be a finite number, got {share!r}")
        check_shapes(tokens=(tokens, "n L+1"))
        check_dtype("tokens", tokens, (torch.int64,))
        if tokens.shape[1] < 2:
            raise ValueError(f"tokens must have shape [n, L + 1] with n, L > 0, got {list(tokens.shape)}")
        model._check_tokens(tokens)  # all, as every rank must refuse what lies in one rank's rows
        values = zlib.crc32(tokens.cpu().numpy().tobytes())
        same = {"call": "training", "stage": stage, "share": share, "tokens": list(tokens.shape), "values": values}
        ranks.agree(same)
    parameters = list(model.parameters())
    before = [weight.grad for weight in parameters]
    for weight in parameters:
        weight.grad = None
    try:
        shares = _own_backward(model, layers, tokens, stage, share)
        sum_gradients(parameters, ranks.group)
        losses = tuple(None if own is None else ranks.all_reduce(own.detach().clone()) for own in shares)
        for weight, grad in zip(parameters, before, strict=True):
            if grad is not None:  # in place, where it may be a view into somebody's buffer
                weight.grad = grad if weight.grad is None else grad.add_(weight.grad)
    except BaseException:
        for weight, grad in zip(parameters, before, strict=True):
            weight.grad = grad
        raise
    return losses


def _own_backward(model, layers, tokens, stage, share) -> tuple[Tensor | None, Tensor | None]:
    """This rank's shares of the two losses, whose gradients are in the parameters'."""
    ranks, rows, length = layers[0].ranks, tokens[:, 1:].numel(), tokens.shape[1] - 1
    own = Zigzag(rows, ranks.size).rows(ranks.rank, tokens.device)
    record = None if stage == "dense" else []
    attention = "sparse" if stage == "sparse" else "dense"
    logits = model(tokens[:, :-1].flatten()[own], own % length, attention=attention, record=record)
    language, indexer = None, None
    if stage != "warm-up":
        language = F.cross_entropy(logits, tokens[:, 1:].flatten()[own], reduction="sum") * (share / rows)
        language.backward()
    if record is not None:
        indexer = torch.zeros((), device=tokens.device)
        for layer, step in zip(layers, record, strict=True):
            target = step["probe"].grad if "probe" in step else None  # left there by the pass above, where ops can
            loss = indexer_share(layer, step, rows, target) * (share / len(layers))
            loss.backward()
            indexer += loss.detach()
    return language, indexer


def indexer_share(layer: GatheredLayer, step: dict, rows: int, target: Tensor | None = None) -> Tensor:
    """This rank's share of a layer's indexer loss, of the KL over all keys or those selected: a scalar, fp32.

    step: what the layer recorded; rows: those of the whole group, each of which sees a key; target: the recorded
    probe's gradient after the language loss's backward pass, or None. The shares of all ranks add up to the loss.

    Raises, on this rank alone, as nothing is sent: TypeError for another layer or rows that are no int, ValueError for
    rows below 1 or a step of a layer that has no indexer or did not gather, and as the step `indexer_loss` does.
    """
    if not isinstance(layer, GatheredLayer):
        raise TypeError(f"layer must be a GatheredLayer, got {type(layer).__name__}")
    wanted = ["q_idx", "k_idx", "w", "start", "end", *(("q", "kv", "lse") if target is None else ())]
    if missing := [name for name in wanted if name not in step]:
        raise ValueError(f"step must be what a GatheredLayer with an indexer recorded, got none of {missing}")
    check_count("rows", rows)
    loss = getattr(layer.ops, "indexer_loss", dsa_ref.indexer_loss)
    seen = {"indices": step.get("indices"), "start": step["start"], "end": step["end"], "reduction": "sum"}
    side = step["q_idx"], step["k_idx"], step["w"]
    if target is not None:
        return loss(*side, None, None, None, target=target, **seen) / rows
    return loss(*side, step["q"], step["kv"], layer.config.softmax_scale, lse=step["lse"], **seen) / rows


def sum_gradients(parameters: Iterable[nn.Parameter], group: dist.ProcessGroup | None = None) -> None:
    """Replace each parameter's gradient by its sum over the ranks: one all-reduce in fp32 for each dtype (fp64 for it).

    parameters: of replicated weights, in the same order on all ranks. Those without a gradient stay so.

    Raises, on all ranks alike: TypeError for what is no list of parameters, ValueError for gradients that are not dense
    and real, or where other parameters have a gradient on another rank.
    """
    ranks = Ranks(group)
    with ranks.failing_together():
        parameters = [None] if isinstance(parameters, Tensor) else list(parameters)
        if not all(isinstance(weight, Tensor) for weight in parameters):
            raise TypeError("parameters must be those of a module, several torch.nn.Parameter, got something else")
        for grad in (weight.grad for weight in parameters if weight.grad is not None):
            if grad.layout != torch.strided or not grad.is_floating_point():
                kind = f"{grad.layout} of {grad.dtype}"
                raise ValueError(f"parameters must have dense gradients of real numbers, got {kind}")
        there = [[list(weight.shape), str(weight.dtype), weight.grad is not None] for weight in parameters]
        given = sum(weight.grad is not None for weight in parameters)
        ranks.agree({"call": "gradients", "given": given, "parameters": zlib.crc32(repr(there).encode())})
    for dtype in (torch.float32, torch.float64):
        grads = [weight.grad for weight in parameters if weight.grad is not None]
        grads = [grad for grad in grads if torch.promote_types(grad.dtype, torch.float32) == dtype]
        if not grads:
            continue
        total = ranks.all_reduce(torch.cat([grad.to(dtype).flatten() for grad in grads]))
        for grad, part in zip(grads, total.split([grad.numel() for grad in grads]), strict=True):
            grad.copy_(part.view_as(grad))
