"""What a step of the training sees: a pure function of the seed, the stage and the step, so that a run can go on."""

import dataclasses
import random
from typing import NamedTuple

import torch
from torch import Tensor

from .corpus import check_length
from .needle import plant


class Start(NamedTuple):
    """How the dense stage begins: up to step `until`, shorter windows, as many bytes a step, and needles in each."""

    until: int
    length: int
    pairs: int


STARTS = (Start(500, 512, 5), Start(900, 2048, 20))  # attention finds the one right key of few before that of many


@dataclasses.dataclass(frozen=True)
class Data:
    """Windows drawn from a text, with needles in them.

    corpus: uint8 [bytes], on the CPU; length: bytes of a window that are read, one more is predicted; batch: windows a
    step; pairs, asks: needles a window and queries of each (`needle.plant`), 0 pairs for plain text; device: where the
    windows go. starts: of the dense stage; those that are not shorter than length are left out.

    Raises: ValueError for a corpus shorter than a window.
    """

    corpus: Tensor
    length: int
    batch: int
    seed: int = 0
    pairs: int = 0
    device: str | torch.device = "cpu"
    asks: int = 2
    starts: tuple[Start, ...] = STARTS

    def __post_init__(self) -> None:
        check_length(self.corpus, self.length)

    def windows(self, stage: str, step: int) -> Tensor:
        """The windows of one step of a stage, int64 [n, L + 1]: the same for the same seed, stage and step.

        n and L are batch and length, but at the start of the dense stage.

        Raises: ValueError where the needles do not fit into a window.
        """
        length, pairs = self.length, self.pairs
        for start in reversed(self.starts if stage == "dense" else ()):
            if step < start.until and start.length < self.length:
                length, pairs = start.length, min(self.pairs, start.pairs)
        draw = random.Random(f"{self.seed} {stage} {step}")
        rows = []
        for _ in range(self.batch * self.length // length):
            first = draw.randrange(len(self.corpus) - length)
            text = self.corpus[first : first + length + 1].numpy().tobytes()
            planted = plant(text, draw, pairs, self.asks)[0] if pairs else text
            rows.append(torch.frombuffer(bytearray(planted), dtype=torch.uint8))
        return torch.stack(rows).to(self.device).long()
