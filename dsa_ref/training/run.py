"""A whole run: the three stages one after the other, checkpoints on the way, and measures after each stage."""

import collections
import functools
import math
import pathlib
import time
from collections.abc import Callable

import torch
from torch import Tensor

from ..nn.model import SmallModel
from .data import Data
from .loop import Losses, train_stage
from .optimizer import MasterAdamW, copy_to_model, master_weights
from .show import Show
from .stages import STAGES
from .state import clear_unfinished, load_state, save_state
from .team import Alone

FINISHED = "finished"  # the stage after the last
LOSSES = ("language", "indexer")


class OutOfTime(Exception):
    """The run has stopped before its time was over; its state is saved."""


class Run:
    """The training of one model, from wherever its state file says.

    steps: optimizer steps of each stage; options: what must be equal for a state to go on from; state: its file, None
    to keep none; save_every, log_every: in steps; measure: gives the figures of the model after a stage, for the log;
    session: what the log says about this process; ends: when to have stopped, by time.monotonic(). team: the processes
    that train together, of which the first writes the state.
    """

    def __init__(
        self,
        model: SmallModel,
        data: Data,
        steps: dict[str, int],
        options: dict,
        measure: Callable[[SmallModel, str], dict],
        show: Show,
        state: pathlib.Path | None = None,
        save_every: int = 100,
        log_every: int = 10,
        micro: int | None = None,
        dtype: torch.dtype = torch.float32,
        session: dict | None = None,
        ends: float = math.inf,
        team: Alone | None = None,
    ) -> None:
        self.team = team or Alone()
        self.model, self.data, self.steps, self.options, self.measure = model, data, steps, options, measure
        self.show, self.state, self.save_every, self.log_every = show, state, save_every, log_every
        self.micro, self.ends = micro, ends
        self.began, self.saving = time.monotonic(), 0.0
        self.masters = master_weights(model)
        self.stage, self.done, self.moments = STAGES[0], 0, {}
        self.log = {"history": [], "after": {}, "seconds": 0.0, "sessions": []}
        if state is not None and state.exists():
            self._resume()
        model.to(dtype)
        copy_to_model(self.masters, model)
        self.team.check_same("options", {}, **options)
        self.team.check_same("state", self.masters | self.moments, stage=self.stage, step=self.done)
        self.log["sessions"].append({"stage": self.stage, "step": self.done, **(session or {})})
        self.before = self.log["seconds"]

    def _resume(self) -> None:
        if self.team.rank == 0:  # alone: two that remove one folder would meet
            clear_unfinished(self.state)
        tensors, about = load_state(self.state, self.options)
        self.stage, self.done, self.log = about["stage"], about["step"], about["log"]
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors.pop(f"master/{name}"))
        self.moments = tensors
        self.show.say(f"goes on from {self.state}: {self.stage}, step {self.done}")

    def run(self) -> dict:
        """Train what is left, and give the log.

        Raises: OutOfTime; FloatingPointError where a loss is not finite; OSError where the state cannot be written.
        """
        while self.stage != FINISHED:
            stage = self.stage
            optimizer = MasterAdamW(self.model, self.masters, stage, self.steps[stage])
            optimizer.restore(self.done, self.moments)
            self._begin_stage()
            windows = functools.partial(self.data.windows, stage)
            at_once, backward = self.micro and self.micro * self.data.length, self.team.backward(self.model)
            train_stage(self.model, stage, windows, self.steps[stage], optimizer, at_once, backward, self._after)
            self.log["after"][stage] = self.measure(self.model, stage)
            self.show.say(f"after {stage}: {self.log['after'][stage]}")
            self.stage, self.done, self.moments = [*STAGES, FINISHED][STAGES.index(stage) + 1], 0, {}
            self._save({})
        return self.log

    def _begin_stage(self) -> None:
        if self._device().type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._device())
        self.last = self.row = time.monotonic(), self.done  # when and after which step: the last one, the last row
        self.durations = collections.deque(maxlen=self.log_every)

    def _after(self, optimizer: MasterAdamW, losses: Losses) -> None:
        """After each step: the log's row, the state, the time."""
        self.done = optimizer.done
        noted = self.done % self.log_every == 0 or self.done in (1, optimizer.steps)
        saved = self.done % self.save_every == 0 or self.done == optimizer.steps
        if noted or saved:
            self._check(losses)
        if noted:
            self._note(losses)
        now = time.monotonic()
        self.durations.append(now - self.last[0])
        self.last = now, self.done
        # A GPU's host runs ahead until a row waits for it: that step seems to take as long as all since the last row.
        late = now + 1.5 * max(self.durations) + 2 * self.saving + 1 > self.ends
        late = self.ends < math.inf and self.team.any(late)  # all ranks have the same limit, but not the same clock
        if late and not saved:
            self._check(losses)
        if late or saved:
            self._save(optimizer.moments())
        if late:
            raise OutOfTime

    def _check(self, losses: Losses) -> None:
        """Stop before a state is saved that is lost already."""
        for name, loss in zip(LOSSES, losses, strict=True):
            if loss is not None and not loss.isfinite():
                where = f"step {self.done} of the stage {self.stage}"
                raise FloatingPointError(f"the {name} loss must be finite, got {loss.item()} in {where}")

    def _note(self, losses: Losses) -> None:
        """A row of the log, and the line of progress."""
        (then, first), now, cuda = self.row, time.monotonic(), self._device().type == "cuda"
        seconds = (now - then) / (self.done - first)
        values = {
            f"{name}_loss": None if loss is None else round(loss.item(), 5)
            for name, loss in zip(LOSSES, losses, strict=True)
        }
        row = {
            "stage": self.stage,
            "step": self.done,
            **values,
            "tokens_per_second": round(self.data.batch * self.data.length / seconds),
            "seconds_a_step": round(seconds, 4),
            "peak_bytes": torch.cuda.max_memory_allocated(self._device()) if cuda else None,
        }
        self.log["history"].append(row)
        self.row = now, self.done
        self.show.row(row, self.steps[self.stage])

    def _save(self, moments: dict[str, Tensor]) -> None:
        began = time.monotonic()
        self.log["seconds"] = round(self.before + began - self.began, 1)
        if self.state is None:
            return
        self.team.check_same("weights", self.masters)
        tensors = {f"master/{name}": master for name, master in self.masters.items()} | moments
        about = {"options": self.options, "stage": self.stage, "step": self.done, "log": self.log}
        self.team.first_does(lambda: save_state(self.state, tensors, about))
        self.saving = time.monotonic() - began

    def _device(self) -> torch.device:
        return next(self.model.parameters()).device
