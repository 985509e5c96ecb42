"""AdamW on fp32 master weights, of which the model holds copies in its own dtype.

A step moves a weight by some 1e-4 of its size, and bf16 keeps 8 bits: added to a bf16 weight, most steps would be
rounded away. So the sum is kept in fp32, the model computes with its rounded copy, and gradients are added up in fp32.
"""

import math

import torch
from torch import Tensor, nn

from ..nn.model import SmallModel
from .stages import TRAINED, is_indexers

PEAK_RATES = {"dense": 2e-3, "warm-up": 2e-3, "sparse": 3e-4}
BETAS, WEIGHT_DECAY, LARGEST_NORM = (0.9, 0.95), 0.1, 1.0
MOMENTS = ("exp_avg", "exp_avg_sq")


def master_weights(model: nn.Module) -> dict[str, nn.Parameter]:
    """A fp32 copy of each of the model's parameters, by name."""
    return {name: nn.Parameter(p.detach().float().clone()) for name, p in model.named_parameters()}


def copy_to_model(masters: dict[str, nn.Parameter], model: nn.Module) -> None:
    """Round the master weights into the model's parameters."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(masters[name])


def learning_rate(step: int, steps: int, peak: float) -> float:
    """A linear rise over a twentieth of the steps to `peak`, times half a cosine down to a tenth of it."""
    return peak * min(1.0, (step + 1) / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * step / max(1, steps)))


class MasterAdamW:
    """The optimizer of one stage, for what the stage trains; it freezes everything else in the model.

    masters: `master_weights` of the model, or of the run so far; the model gets their rounded values. The norms of the
    gradients of the indexers and of everything else are bounded apart, since their losses have nothing in common.
    """

    def __init__(
        self, model: SmallModel, masters: dict[str, nn.Parameter], stage: str, steps: int, peak: float | None = None
    ) -> None:
        self.model, self.masters, self.stage, self.steps = model, masters, stage, steps
        self.peak = PEAK_RATES[stage] if peak is None else peak
        self.done = 0  # steps
        copy_to_model(masters, model)
        self.groups = []
        for inside in TRAINED[stage]:
            self.groups.append([name for name in masters if is_indexers(name) == inside])
        trained = {name for group in self.groups for name in group}
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in trained)
            parameter.grad = masters[name].grad = None
        groups = [{"params": [masters[name] for name in group]} for group in self.groups]
        self.adam = torch.optim.AdamW(groups, lr=self.peak, betas=BETAS, weight_decay=WEIGHT_DECAY)

    def add_gradients(self) -> None:
        """Move the gradients of the model's parameters to the masters', which add up in fp32."""
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                master = self.masters[name]
                gradient = parameter.grad.float()
                master.grad = gradient if master.grad is None else master.grad + gradient
                parameter.grad = None

    def step(self) -> None:
        """One step with the gradients added so far, and the copies in the model."""
        for group in self.adam.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], LARGEST_NORM)
            group["lr"] = learning_rate(self.done, self.steps, self.peak)
        with torch.device("cpu"):  # AdamW counts its steps there; older ones ask the default device
            self.adam.step()
        self.adam.zero_grad()
        copy_to_model(self.masters, self.model)
        self.done += 1

    def moments(self) -> dict[str, Tensor]:
        """AdamW's two means of each trained weight, by `name/exp_avg` and `name/exp_avg_sq`; empty before a step."""
        return {
            f"{name}/{kind}": self.adam.state[self.masters[name]][kind]
            for group in self.groups
            for name in group
            if self.masters[name] in self.adam.state
            for kind in MOMENTS
        }

    def restore(self, done: int, moments: dict[str, Tensor]) -> None:
        """Go on after `done` steps with the `moments` of that time."""
        self.done = done
        for group in self.groups if done else ():
            for name in group:
                master = self.masters[name]
                kept = {kind: moments[f"{name}/{kind}"].to(master.device, copy=True) for kind in MOMENTS}
                self.adam.state[master] = {"step": torch.tensor(float(done), device="cpu"), **kept}
