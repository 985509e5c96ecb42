"""Which tensors a model makes on its way, counted while its own code runs: real ones, or of shapes alone ("meta")."""

from collections.abc import Callable

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Made(TorchDispatchMode):
    """Notes the result of every operation that has memory of its own, and is no view of an argument."""

    def __init__(self):
        super().__init__()
        self.found = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)}
        for t in tree_leaves(result):
            if isinstance(t, torch.Tensor) and t.untyped_storage()._cdata not in given:
                self.found.add((t.untyped_storage().nbytes(), tuple(t.shape), t.dtype))
        return result


def tensors_made(call: Callable[[], object]) -> list[tuple[int, tuple[int, ...], torch.dtype]]:
    """(bytes, shape, dtype) of the tensors that `call()` makes, the largest first, each kind once.

    What an operation needs inside itself is not seen.
    """
    with torch.no_grad(), _Made() as made:
        call()
    return sorted(made.found, key=lambda kind: (-kind[0], kind[1], str(kind[2])))
