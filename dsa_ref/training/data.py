"""What a step of the training sees: a pure function of the seed, the stage and the step, so that a run can go on."""

import dataclasses
import random

import torch
from torch import Tensor

from .corpus import check_length
from .needle import plant


@dataclasses.dataclass(frozen=True)
class Data:
    """Windows drawn from a text, with needles in them.

    corpus: uint8 [bytes], on the CPU; length: bytes of a window that are read, one more is predicted; batch: windows a
    step; pairs: needles a window (`needle.plant`), 0 for plain text; device: where the windows go.

    Raises: ValueError for a corpus shorter than a window.
    """

    corpus: Tensor
    length: int
    batch: int
    seed: int = 0
    pairs: int = 0
    device: str | torch.device = "cpu"

    def __post_init__(self) -> None:
        check_length(self.corpus, self.length)

    def windows(self, stage: str, step: int) -> Tensor:
        """The windows of one step of a stage, int64 [batch, length + 1]: the same for the same seed, stage and step.

        Raises: ValueError where the needles do not fit into a window.
        """
        draw = random.Random(f"{self.seed} {stage} {step}")
        rows = []
        for _ in range(self.batch):
            first = draw.randrange(len(self.corpus) - self.length)
            text = self.corpus[first : first + self.length + 1].numpy().tobytes()
            planted = plant(text, draw, self.pairs)[0] if self.pairs else text
            rows.append(torch.frombuffer(bytearray(planted), dtype=torch.uint8))
        return torch.stack(rows).to(self.device).long()
