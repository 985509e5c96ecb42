"""The processes that train one model together: one alone, or those that torchrun started.

Every rank has all weights, draws the same windows, takes its rows of them and makes the same optimizer step, from
gradients that are summed over the group (`dsa_ref.parallel`). So the state and the weights are the same files whatever
the number of ranks was, and a run goes on with another number; sums over ranks round otherwise, so the bits are those
of a number of ranks. Only the first rank writes and speaks.
"""

import contextlib
import zlib
from collections.abc import Callable

import torch
from torch import Tensor

from .. import parallel
from ..nn.model import SmallModel
from ..parallel.ranks import sum_of_bits
from .loop import Losses
from .stages import stage_backward


class Alone:
    """One process. rank, size: its place among the processes, and how many there are."""

    rank, size = 0, 1

    def backward(self, model: SmallModel) -> Callable[[SmallModel, Tensor, str, float], Losses]:
        """How the gradients of the model come about, as `stages.stage_backward`."""
        return stage_backward

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks call it."""
        return flag

    def check_same(self, what: str, tensors: dict[str, Tensor], **facts: object) -> None:
        """Raise ValueError where another rank has other tensors, to the bit, or other facts; all ranks call it."""

    def failing_together(self) -> contextlib.AbstractContextManager:
        """Inside, an error of one rank before it meets the others is one of theirs, when they come to meet it."""
        return contextlib.nullcontext()

    def first_does(self, work: Callable[[], None]) -> None:
        """The first rank does it, and the others wait. Raises: on all ranks, what that raised. All ranks call it."""
        work()

    def leave(self) -> None:
        """What a rank does at its end."""


class Group(Alone):
    """The processes that torchrun started. ranks: their group."""

    def __init__(self, ranks: parallel.Ranks) -> None:
        self.ranks, self.rank, self.size = ranks, ranks.rank, ranks.size

    def backward(self, model: SmallModel) -> Callable[[SmallModel, Tensor, str, float], Losses]:
        """Each rank's rows, with the gradients summed over the group."""
        twin = parallel.over_group(model, parallel.GatheredLayer, self.ranks.group)
        return lambda _, tokens, stage, share: parallel.stage_backward(twin, tokens, stage, share)

    def any(self, flag: bool) -> bool:
        """Whether any rank says so; all ranks call it."""
        return any(own["flag"] for own in self.ranks.agree({"call": "any"}, {"flag": flag}))

    def check_same(self, what: str, tensors: dict[str, Tensor], **facts: object) -> None:
        """Raise ValueError where another rank has other tensors, to the bit, or other facts; all ranks call it."""
        bits = zlib.crc32(repr([(name, sum_of_bits(tensors[name])) for name in sorted(tensors)]).encode())
        self.ranks.agree({"call": what, **facts, what: bits})

    def failing_together(self) -> contextlib.AbstractContextManager:
        """Inside, an error of one rank before it meets the others is one of theirs, when they come to meet it."""
        return self.ranks.failing_together()

    def first_does(self, work: Callable[[], None]) -> None:
        """The first rank does it, and the others wait. Raises: on all ranks, what that raised. All ranks call it."""
        with self.ranks.failing_together():
            if self.rank == 0:
                work()
            self.ranks.agree({"call": "first_does"})

    def leave(self) -> None:
        """What a rank does at its end."""
        torch.distributed.destroy_process_group()
