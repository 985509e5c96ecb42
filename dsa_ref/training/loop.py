"""One stage of the training, step by step."""

from collections.abc import Callable

from torch import Tensor

from ..nn.model import SmallModel
from .optimizer import MasterAdamW, master_weights
from .stages import stage_backward

Losses = tuple[Tensor | None, Tensor | None]


def train_stage(
    model: SmallModel,
    stage: str,
    windows: Callable[[int], Tensor],
    steps: int,
    optimizer: MasterAdamW | None = None,
    micro: int | None = None,
    backward: Callable[[SmallModel, Tensor, str, float], Losses] = stage_backward,
    after: Callable[[MasterAdamW, Losses], None] = lambda *_: None,
) -> MasterAdamW:
    """Train the model in place up to `steps` optimizer steps; the optimizer, with the master weights.

    windows: the int64 windows [n, L + 1] of a step, as `Data.windows` of a stage. optimizer: where to go on, after its
    `done` steps; None for a new one at this stage's rate, with the model's weights as its masters. micro: windows at a
    time, to save memory; None for all of a step. backward: how gradients come about, as `stage_backward`. after: told
    of every step, with (language loss, indexer loss) in nats, scalars on the model's device or None.

    Raises: ValueError for a stage that is not known, an optimizer of another stage.
    """
    if optimizer is None:
        optimizer = MasterAdamW(model, master_weights(model), stage, steps)
    if (optimizer.stage, optimizer.steps) != (stage, steps):
        given = f"{optimizer.steps} steps of {optimizer.stage}"
        raise ValueError(f"optimizer must be made for {steps} steps of {stage}, got one for {given}")
    while optimizer.done < steps:
        tokens = windows(optimizer.done)
        sums = [None, None]
        for part in tokens.split(micro or len(tokens)):
            for i, loss in enumerate(backward(model, part, stage, len(part) / len(tokens))):
                if loss is not None:
                    sums[i] = loss if sums[i] is None else sums[i] + loss
            optimizer.add_gradients()
        optimizer.step()
        after(optimizer, tuple(sums))
    return optimizer
