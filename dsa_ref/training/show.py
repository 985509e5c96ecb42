"""How a run tells of its progress on stderr: one line that changes on a terminal, a line now and then elsewhere."""

import sys
import time

SECONDS = 10.0  # between two lines, where there is no terminal


class Show:
    """The line of progress. terminal: whether stderr shows it as one line that changes; speaks: False for silence."""

    def __init__(self, terminal: bool, speaks: bool = True) -> None:
        self.terminal, self.speaks, self.last = terminal, speaks, None

    def row(self, row: dict, steps: int) -> None:
        """What `run.Log` notes of a step: where the stage is, its losses, its speed, and how long it goes on."""
        if not self.speaks:
            return
        done = row["step"] / steps
        losses = [(name, row[f"{name}_loss"]) for name in ("language", "indexer") if row[f"{name}_loss"] is not None]
        left = (steps - row["step"]) * row["seconds_a_step"]
        text = f"{row['stage']:8}{row['step']:6} of {steps}  "
        text += "  ".join(f"{name} {loss:.4f}" for name, loss in losses)
        text += f"  {row['tokens_per_second']:,} tokens/s, {left // 60:.0f}:{left % 60:02.0f} left"
        if self.terminal:
            print(f"\r[{'#' * int(20 * done):20}] {text:90}", end="", file=sys.stderr, flush=True)
        elif self.last is None or done == 1 or time.monotonic() - self.last >= SECONDS:
            self.last = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.speaks:
            print(f"\r{text:113}" if self.terminal else text, file=sys.stderr, flush=True)
