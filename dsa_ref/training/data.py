"""What a step of the training sees: a pure function of the seed, the stage and the step, so that a run can go on."""

import dataclasses
import math
import random
from typing import NamedTuple

import torch
from torch import Tensor

from .corpus import check_length
from .needle import plant


class Start(NamedTuple):
    """How the dense stage begins: up to this share of its steps, shorter windows, with so many needles in each."""

    until: float
    length: int
    pairs: int


# Attention has to learn to find the one right key among few, before it can among many. With long windows alone, and all
# else equal, 2300 steps find no needle at any distance, and are worse on plain text, 1.056 nats a byte to 0.850:
# figures/small_model_long_windows.json, which --no-starts made.
STARTS = (Start(0.22, 512, 5), Start(0.39, 2048, 20))


@dataclasses.dataclass(frozen=True)
class Data:
    """Windows drawn from a text, with needles in them.

    corpus: uint8 [bytes], on the CPU; length: bytes of a window that are read, one more is predicted; batch: windows a
    step; pairs, asks: needles a window and queries of each (`needle.plant`), 0 pairs for plain text; device: where the
    windows go. dense_steps: of the whole dense stage, which begins with `starts`, those that are shorter than length;
    0 for a dense stage that does not.

    Raises: ValueError for a corpus shorter than a window, needles that do not fit into one.
    """

    corpus: Tensor
    length: int
    batch: int
    seed: int = 0
    pairs: int = 0
    device: str | torch.device = "cpu"
    asks: int = 2
    dense_steps: int = 0
    starts: tuple[Start, ...] = STARTS

    def __post_init__(self) -> None:
        check_length(self.corpus, self.length)
        changes = (min(math.ceil(start.until * self.dense_steps), self.dense_steps) for start in self.starts)
        for length, pairs in {self.shape("dense", step) for step in (0, *changes)}:
            self._window(length, pairs, random.Random(0))

    def shape(self, stage: str, step: int) -> tuple[int, int]:
        """The length of a step's windows, and the needles in each."""
        for start in self.starts if stage == "dense" else ():
            if step < start.until * self.dense_steps and start.length < self.length:
                return start.length, min(self.pairs, start.pairs)
        return self.length, self.pairs

    def windows(self, stage: str, step: int) -> Tensor:
        """The windows of one step of a stage, int64 [n, L + 1]: the same for the same seed, stage and step.

        n and L are batch and length; where windows are shorter, there are more of them, with as many bytes in all.
        """
        length, pairs = self.shape(stage, step)
        draw = random.Random(f"{self.seed} {stage} {step}")
        rows = [self._window(length, pairs, draw) for _ in range(self.batch * self.length // length)]
        return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(len(rows), -1).to(self.device).long()

    def _window(self, length: int, pairs: int, draw: random.Random) -> bytes:
        first = draw.randrange(len(self.corpus) - length)
        text = self.corpus[first : first + length + 1].numpy().tobytes()
        return plant(text, draw, pairs, self.asks)[0] if pairs else text
