"""Activation checkpointing around a layer: whether torch runs a step a second time, and what must not run twice.

A selection must not: it costs more than the rest of the indexer, and the repeated pass, whose sums may come in another
order, could choose other keys than those whose output the loss has seen. Between a pass and its repetition torch's
checkpoint keeps an object, alive as long as the graph; the selections of the pass are kept there.
"""

import inspect
import sys
import types
from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils import checkpoint as torchs
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


def will_be_repeated_with_gradients() -> bool:
    """Whether torch's reentrant checkpoint makes this pass, without gradients, and will repeat it for them."""
    if torch.is_grad_enabled() or torch.is_inference_mode_enabled():
        return False
    pass_ = _caller(CheckpointFunction.forward)
    return pass_ is not None and any(pass_.f_locals["ctx"].needs_input_grad)


def will_be_repeated(y: Tensor) -> bool:
    """Whether torch's checkpoint, in either mode, runs the layer that gave y, and will run it again for gradients."""
    if torch.is_grad_enabled():
        return y.requires_grad and _caller(checkpoint) is not None
    return will_be_repeated_with_gradients()


def _equal(a: Tensor, b: Tensor) -> bool:
    return (a.device, a.dtype) == (b.device, b.dtype) and torch.equal(a, b)  # layers may be on several devices


def recorded_before(record: list[dict], step: dict) -> bool:
    """Whether the step is in the record already, since checkpointing repeats it inside a backward pass.

    Raises: ValueError where that entry, unlike the step, has no gradient: another library's reentrant checkpointing.
    """
    if torch._C._current_graph_task_id() == -1:  # no backward pass
        return False
    names = step.keys() - {"probe"}  # which only a pass with gradients has
    same = [old for old in record if old.keys() - {"probe"} == names and _equal(old["kv"], step["kv"])]
    if same and "w" in step and step["w"].requires_grad and not any(old["w"].requires_grad for old in same):
        raise ValueError(NEEDS_NON_REENTRANT)
    return bool(same)


def selected_once(select: Callable[[], Tensor]) -> Tensor:
    """select(), or, where torch's checkpoint repeats a pass, what the same call of that pass selected.

    Calls are told apart by their order, in which a repeated pass must make the same ones. Under other libraries'
    checkpointing a repeated pass selects again.
    """
    passes, repeated = ([], []) if torch.compiler.is_compiling() else _passes_around()
    found = None
    for kept, again in repeated:
        place = kept.taken[again] = kept.taken.get(again, -1) + 1
        if place < len(kept.selections):
            found = kept.selections[place]
    indices = select() if found is None else found
    for kept in passes:
        kept.selections.append(indices)
    return indices


class _Kept:
    """What a checkpoint's pass has selected, in its order, and how many of these each of its repetitions has taken."""

    def __init__(self) -> None:
        self.selections: list[Tensor] = []
        self.taken: dict[object, int] = {}


def _passes_around() -> tuple[list[_Kept], list[tuple[_Kept, object]]]:
    """Of the torch checkpoints that this call is inside of: those that make their pass, and those that repeat it, each
    with the backward pass for which it does."""
    passes, repeated, frame = [], [], sys._getframe()
    while frame is not None:
        code = frame.f_code
        if code is _FIRST_REENTRANT:
            passes.append(_kept(frame.f_locals["ctx"]))
        elif code is _AGAIN_REENTRANT:
            repeated.append((_kept(frame.f_locals["ctx"]), torch._C._current_graph_task_id()))
        elif code is _FIRST and "gen" in frame.f_locals:  # not reentrant; the generator made the object
            passes.append(_kept(frame.f_locals["gen"].gi_frame.f_locals["new_frame"]))
        elif code.co_name == _AGAIN and code.co_filename == torchs.__file__ and "frame" in frame.f_locals:
            repeated.append((_kept(frame.f_locals["frame"]), frame.f_locals["gid"]))
        frame = frame.f_back
    return passes, repeated


def _kept(owner: object) -> _Kept:
    if not hasattr(owner, "dsa_kept"):
        owner.dsa_kept = _Kept()
    return owner.dsa_kept


_FIRST, _FIRST_REENTRANT, _AGAIN_REENTRANT = (
    inspect.unwrap(function).__code__
    for function in (checkpoint, CheckpointFunction.forward, CheckpointFunction.backward)
)
_AGAIN = "unpack_hook"  # a function inside of a method, which has no other handle
