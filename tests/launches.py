"""What a step launches: Triton's kernels, noted in the interpreter, and torch's operations that a GPU would launch."""

import contextlib

import torch
from torch.utils._python_dispatch import TorchDispatchMode

NO_LAUNCH = (
    "empty",
    "empty_strided",
    "new_empty",
    "detach",
    "_local_scalar_dense",
    "is_pinned",
    "lift_fresh",
    "_unsafe_view",
)


class Operations(TorchDispatchMode):
    """Names of torch's operations, but for views and memory that is only asked for. An `out=` counts once."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        schema, name = function._schema, function._opname
        aliases = [value.alias_info for value in schema.returns if value.alias_info]
        is_view = bool(aliases) and not any(info.is_write for info in aliases)
        if not is_view and name not in NO_LAUNCH:
            self.names.append(name)
        if name == "_local_scalar_dense":
            self.names.append("WAIT")
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def noted():
    """Inside, launches are noted: yields (kernels, operations), lists of names. Kernels are (name, specialisation)."""
    from triton.runtime.interpreter import GridExecutor

    kernels, call, operations = [], GridExecutor.__call__, Operations()

    def launch(self, *args, **kwargs):
        kinds = [arg.dtype if isinstance(arg, torch.Tensor) else type(arg).__name__ for arg in args]
        options = {name: value for name, value in kwargs.items() if name.isupper()}
        kernels.append((self.fn.__name__, str(kinds), str(sorted(options.items(), key=str))))
        with torch.utils._python_dispatch._disable_current_modes():  # how the interpreter moves bytes is its own affair
            return call(self, *args, **kwargs)

    GridExecutor.__call__ = launch
    try:
        with operations:
            yield kernels, operations.names
    finally:
        GridExecutor.__call__ = call
