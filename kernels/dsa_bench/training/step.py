"""One training step of a V3.2-shaped layer, forward and backward: sparse, dense, and sparse by the reference.

A sparse step makes the language loss's gradients, takes the indexer's target out of that pass, and teaches the indexer
by the KL over the selected keys; a dense one has the language loss alone. A step is timed as Python calls it.
"""

import dataclasses
import types

import torch

import dsa_kernels
import dsa_ref
from dsa_ref import V32

from .checks import check_gradients
from .run import Call, Case

STEP_ERROR = 5e-2  # ||gradient - reference|| / ||reference|| of a weight: bf16 throughout, the reference's too
CONFIG = dataclasses.replace(V32, index_fp8=False)  # the indexer is taught in bf16


def training_layer(config, ops: types.ModuleType, device, seed=0):
    """A layer in bf16 whose products keep the size of what they get; the same weights for the same seed."""
    with torch.device(device):
        layer = dsa_ref.DSALayer(config, ops=ops).to(torch.bfloat16)
    generator = torch.Generator(device).manual_seed(seed)
    with torch.no_grad():
        for weight in layer.parameters():
            if weight.dim() == 2:
                weight.copy_(torch.randn(weight.shape, generator=generator, device=device) * weight.shape[1] ** -0.5)
    return layer


class Step:
    """Forward and backward of T tokens through `layer`: the gradients of its weights, and of x, by name."""

    def __init__(self, layer, attention, T, seed=1):
        self.layer, self.attention = layer, attention
        device, dim = layer.freqs.device, layer.config.dim
        generator = torch.Generator(device).manual_seed(seed)
        x, self.dy = (torch.randn(T, dim, generator=generator, device=device).bfloat16() for _ in range(2))
        self.x, self.positions = x.requires_grad_(), torch.arange(T, device=device)

    def __call__(self):
        return tuple(self.gradients().values())

    @torch.enable_grad()
    def gradients(self):
        """{name: gradient}, of the weights that have one."""
        record = [] if self.attention == "sparse" else None
        y = self.layer(self.x, self.positions, attention=self.attention, record=record)
        y.backward(self.dy)
        if record:
            teach(self.layer, record[0])
        found = {name: weight.grad for name, weight in self.layer.named_parameters() if weight.grad is not None}
        found |= {"x": self.x.grad}
        self.layer.zero_grad(set_to_none=True)  # so that a caller alone keeps them
        self.x.grad = None
        return found


def teach(layer, step):
    """Backward of the sparse stage's KL, its target what the language loss's backward has left in the probe."""
    loss = layer.ops.indexer_loss(
        step["q_idx"], step["k_idx"], step["w"], None, None, None,
        indices=step["indices"], start=step["start"], target=step["probe"].grad,
    )  # fmt: skip
    loss.backward()


def step_case(T, config=CONFIG, device="cuda"):
    """Ours sparse and dense, and the reference's sparse step, whose gradients ours are checked against."""
    layers = {ops: training_layer(config, ops, device) for ops in (dsa_kernels, dsa_ref)}
    steps = {
        "sparse": Step(layers[dsa_kernels], "sparse", T),
        "dense": Step(layers[dsa_kernels], "dense", T),
        "sparse, reference": Step(layers[dsa_ref], "sparse", T),
    }
    wanted = {}

    def check(step):
        def judged(result):
            attention = "dense" if step.attention == "dense" else "sparse"
            if attention not in wanted:
                by_reference = Step(layers[dsa_ref], attention, T).gradients()
                wanted[attention] = {name: gradient.float() for name, gradient in by_reference.items()}
            return check_gradients(result, wanted[attention], STEP_ERROR, row_error=torch.inf)

        return judged

    why = "eager: as Python calls it"
    calls = {who: Call(step, check(step), ours="reference" not in who, eager=why) for who, step in steps.items()}
    return Case(calls, against="sparse", facts={"tokens": T})
