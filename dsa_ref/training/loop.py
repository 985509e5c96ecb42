"""One stage of the training, step by step."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

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
    at_once: int | None = None,
    backward: Callable[[SmallModel, Tensor, str, float], Losses] = stage_backward,
    after: Callable[[MasterAdamW, Losses], None] = lambda *_: None,
) -> MasterAdamW:
    """Train the model in place up to `steps` optimizer steps; the optimizer, with the master weights.

    windows: the int64 windows [n, L + 1] of a step, as `Data.windows` of a stage; called in a thread, a step ahead.
    optimizer: where to go on, after its `done` steps; None for a new one at this stage's rate, with the model's weights
    as its masters. at_once: tokens of a micro-batch, to save memory; None for all of a step. backward: how gradients
    come about, as `stage_backward`. after: told of every step, with (language loss, indexer loss) in nats, scalars on
    the model's device or None.

    Raises: ValueError for a stage that is not known, an optimizer of another stage.
    """
    if optimizer is None:
        optimizer = MasterAdamW(model, master_weights(model), stage, steps)
    if (optimizer.stage, optimizer.steps) != (stage, steps):
        given = f"{optimizer.steps} steps of {optimizer.stage}"
        raise ValueError(f"optimizer must be made for {steps} steps of {stage}, got one for {given}")
    with ThreadPoolExecutor(1) as ahead:  # draws the next step's windows while this one is computed
        drawn = ahead.submit(windows, optimizer.done) if optimizer.done < steps else None
        while optimizer.done < steps:
            tokens = drawn.result()
            if optimizer.done + 1 < steps:
                drawn = ahead.submit(windows, optimizer.done + 1)
            sums = [None, None]
            for part in tokens.split(max(1, min(at_once or tokens.numel(), tokens.numel()) // (tokens.shape[1] - 1))):
                for i, loss in enumerate(backward(model, part, stage, len(part) / len(tokens))):
                    if loss is not None:
                        sums[i] = loss if sums[i] is None else sums[i] + loss
                optimizer.add_gradients()
            optimizer.step()
            after(optimizer, tuple(sums))
    return optimizer
