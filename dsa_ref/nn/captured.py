"""A decode step as a CUDA graph: captured once, replayed while the sequences grow.

At V3.2's sizes a step is some twenty launches of a few microseconds, which Python needs milliseconds to make. A graph
holds them with all their addresses: so the tokens come in one tensor, the result in another, and where the tokens stand
is computed inside, from the page table and the lengths on the device. Only pages are handed out by the host, between
replays.
"""

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

import dsa_ref

from ..contracts import unchecked_values
from ..page_table import Batch, PageTable
from .layer import Ops


class CapturedStep:
    """A step of the next N tokens of some sequences, again and again; each call is one replay.

    step: step(x, batch) -> Tensor on paged caches of `table`, such as `lambda x, batch: layer.decode(x, cache, batch)`
    or `lambda tokens, batch: model.decode_batch(tokens, caches, batch)`; what it does besides on the host, such as
    filling a record, happens once. sequences: their numbers; x: an example of what a call gets, [B, N, ...], on the
    GPU; ops: the package whose steps run, `dsa_kernels`: the reference reads values, for which a capture cannot wait.

    Making one runs the step a few times on a stream of its own, on tokens that are not kept, so the pages for N more
    tokens must be free. Results have the same bits as those of the step itself.

    Raises: ValueError for tensors on a CPU, the reference's steps, and as `PageTable.batch` does; TypeError.
    """

    def __init__(
        self, step: Callable[[Tensor, Batch], Tensor], table: PageTable, sequences: Sequence[int], x: Tensor, ops: Ops
    ) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"x must be a torch.Tensor, got {type(x).__name__}")
        if not isinstance(sequences, Sequence):
            raise TypeError(f"sequences must be a list of ints, got {type(sequences).__name__}")
        if not x.is_cuda or not table.table.is_cuda:
            got = table.table.device if x.is_cuda else x.device
            raise ValueError(f"x and table must be on a CUDA device, where graphs are captured, got {got}")
        if ops is dsa_ref:
            raise ValueError("ops must be dsa_kernels to be captured: the reference waits for values, got dsa_ref")
        if x.dim() < 2 or x.shape[0] != len(sequences):
            raise ValueError(f"x must have shape [B, N, ...] with B = {len(sequences)} sequences, got {list(x.shape)}")
        self.table, self.sequences, self.tokens = table, tuple(sequences), x.shape[1]
        batch = table.batch(self.sequences, self.tokens)
        self._x = x.detach().clone()
        self._rows = torch.tensor(self.sequences, device=x.device)

        def run() -> Tensor:
            places = ops.place_tokens(table.table, table.lengths, self._rows, self.tokens, table.page_size)
            where = dict(zip(("page_table", "lengths", "positions", "slots"), places, strict=True))
            return step(self._x, dataclasses.replace(batch, **where))

        with torch.no_grad():
            aside = torch.cuda.Stream(x.device)
            aside.wait_stream(torch.cuda.current_stream(x.device))
            with torch.cuda.stream(aside):
                run()
                with unchecked_values():  # once more as it will be captured: kernels compiled, libraries set up
                    run()
            torch.cuda.current_stream(x.device).wait_stream(aside)
            self._graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(self._graph):
                self._out = run()

    def __call__(self, x: Tensor) -> Tensor:
        """Run the step on the sequences' next tokens and commit them. The result is overwritten by the next call.

        Raises: ValueError for another shape or device than the example's and as `PageTable.reserve_all` does, TypeError
        for another dtype. Then nothing has changed.
        """
        if not isinstance(x, Tensor) or x.dtype != self._x.dtype:
            got = x.dtype if isinstance(x, Tensor) else type(x).__name__
            raise TypeError(f"x must be a tensor of {self._x.dtype} as in the example, got {got}")
        if x.shape != self._x.shape or x.device != self._x.device:
            wanted = f"{list(self._x.shape)} on {self._x.device}"
            raise ValueError(f"x must have shape {wanted} as in the example, got {list(x.shape)} on {x.device}")
        self.table.reserve_all(self.sequences, self.tokens)
        self._x.copy_(x)
        self._graph.replay()
        self.table.advance(self.sequences, self.tokens)
        return self._out
