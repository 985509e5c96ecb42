"""One training step of the layer, its tokens on all ranks by gathered keys, against all of them on one GPU.

Forward, the language loss's backward, the indexer's KL over the selected keys with the target out of that pass; then
the sum of the weights' gradients over ranks, as data parallel training has it too, which is therefore timed apart.
"""

import torch

from dsa_ref.parallel import GatheredLayer, Zigzag, indexer_share, sum_gradients

from .. import checks
from ..training.checks import check_gradients
from ..training.step import STEP_ERROR, Step
from . import group, judge
from .prefill import drawn, row_bytes


class Training:
    """A step of T tokens of one sequence, T a multiple of twice the ranks, on all ranks and on rank 0 alone."""

    def __init__(self, layer, T, ranks, seed=7):
        self.layer, self.T, self.S, self.ranks = layer, T, T, ranks
        self.device, self.shares = layer.freqs.device, Zigzag(T, ranks.size)
        self.positions = self.shares.rows(ranks.rank, self.device)
        dim = layer.config.dim
        self.x, self.dy = (drawn(T, dim, self.device, seed + i, self.positions) for i in range(2))
        self.x.requires_grad_()
        self.plan, self.one = GatheredLayer(layer), None
        if ranks.rank == 0:
            self.one = Step(layer, "sparse", T)
            self.one.x, self.one.dy = drawn(T, dim, self.device, seed), drawn(T, dim, self.device, seed + 1)
            self.one.x.requires_grad_()

    def together(self, summed=True):
        """{name: gradient} of the weights, and of this rank's rows of x. summed: the weights' over all ranks."""
        with torch.enable_grad():
            record = []
            y = self.plan(self.x, self.positions, record=record)
            y.backward(self.dy)
            step = record[0]
            indexer_share(self.plan, step, self.T, step["probe"].grad).backward()
        if summed:
            sum_gradients(self.layer.parameters())
        found = {name: weight.grad for name, weight in self.layer.named_parameters() if weight.grad is not None}
        found |= {"x": self.x.grad}
        self.layer.zero_grad(set_to_none=True)
        self.x.grad = None
        return found

    def alone(self):
        return self.one.gradients()

    def heaviest(self):
        """What of `alone` needs the most memory: all of it."""
        self.alone()

    def exchanges(self):
        """{name: call}: the rows' all-gather, the two reduce-scatters of their gradients, the weights' all-reduce."""
        c, n = self.layer.config, self.T // self.ranks.size
        rows = torch.zeros(n, row_bytes(c), dtype=torch.uint8, device=self.device)
        gradients = [
            torch.zeros(self.ranks.size, n, width, device=self.device) for width in (c.latent_dim, c.index_head_dim)
        ]
        weights = torch.zeros(sum(weight.numel() for weight in self.layer.parameters()), device=self.device)

        def exchange():
            self.ranks.all_gather(rows)
            for part in gradients:
                self.ranks.reduce_scatter(part)

        return {"all-gather": exchange, "weights' all-reduce": lambda: self.ranks.all_reduce(weights)}

    def judge(self):
        """The verdict of all ranks: every weight's gradient is one GPU's, on all ranks alike, and so is that of x."""
        wanted = {}
        if self.ranks.rank == 0:
            wanted = {name: gradient.float() for name, gradient in self.alone().items()}
        rows = [self.shares.rows(rank) for rank in range(self.ranks.size)]
        rows = [own[checks.sampled_rows(len(own), "cpu")] for own in rows]
        dx = wanted.pop("x")[torch.cat(rows).to(self.device)].cpu() if wanted else None
        dx = group.firsts(self.ranks, dx).split([len(own) for own in rows])[self.ranks.rank]
        got = self.together()
        own = got.pop("x")[checks.sampled_rows(len(self.x), self.device)].cpu()
        first = group.firsts(self.ranks, judge.digest(got.values()))

        def check():
            if judge.digest(got.values()) != first:
                raise checks.Wrong("the weights' gradients have other bits than rank 0's")
            note = check_gradients([own], {"x": dx}, STEP_ERROR, row_error=torch.inf)
            if not wanted:
                return note
            if got.keys() != wanted.keys():
                raise checks.Wrong(f"gradients of {list(got)}, not of {list(wanted)}")
            return f"{note}; weights: {check_gradients(got.values(), wanted, STEP_ERROR, row_error=torch.inf)[8:]}"

        return group.judged(self.ranks, check)
