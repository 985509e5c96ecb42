"""Activation checkpointing around a layer: whether torch runs a step a second time, and what must not run twice."""

import inspect
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointFunction, checkpoint

NEEDS_NON_REENTRANT = (
    "record must carry gradients, which activation checkpointing takes away with use_reentrant=True: "
    "pass use_reentrant=False to torch.utils.checkpoint.checkpoint"
)
CACHE_REPEATED = (
    "cache must not be used under activation checkpointing, which repeats the step in the backward pass: pass "
    "cache=None, or call the layer outside of torch.utils.checkpoint.checkpoint"
)


def _caller(function: Callable) -> types.FrameType | None:
    """The call of `function` that this one is inside of, or None."""
    frame, code = sys._getframe(), inspect.unwrap(function).__code__
    while frame is not None and frame.f_code is not code:
        frame = frame.f_back
    return frame


def inside_reentrant_checkpoint() -> bool:
    """Whether torch's checkpoint, in its reentrant mode, makes this pass: gradients are off, but asked for later."""
    return _caller(CheckpointFunction.forward) is not None


def will_be_repeated(y: Tensor) -> bool:
    """Whether torch's checkpoint, in either mode, runs the layer that gave y, and will run it again for gradients."""
    if torch.is_grad_enabled():
        return y.requires_grad and _caller(checkpoint) is not None
    pass_ = _caller(CheckpointFunction.forward)
    return pass_ is not None and any(pass_.f_locals["ctx"].needs_input_grad)


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)  # layers may be on several devices


def recorded_before(record: list[dict], step: dict) -> bool:
    """Whether the step is in the record already, since checkpointing repeats it inside a backward pass.

    Raises: ValueError where that entry, unlike the step, has no gradient: another library's reentrant checkpointing.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass
        return False
    same = [old for old in record if old.keys() == step.keys() and _equal(old["kv"], step["kv"])]
    if same and "w" in step and step["w"].requires_grad and not any(old["w"].requires_grad for old in same):
        raise ValueError(NEEDS_NON_REENTRANT)
    return bool(same)
