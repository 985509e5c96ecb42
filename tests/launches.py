"""What a step launches: Triton's kernels, interpreted or compiled, and torch's operations that a GPU would launch."""

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


def kind_of(value):
    """What Triton compiles a kernel for: types, and of integers whether they are 1, a multiple of 16, or neither."""
    if isinstance(value, torch.Tensor):
        return f"{value.dtype}, {'aligned' if value.data_ptr() % 16 == 0 else 'anywhere'}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"i{32 if value < 1 << 31 else 64} {'1' if value == 1 else '16' if value % 16 == 0 else 'n'}"
    return type(value).__name__


@contextlib.contextmanager
def noted(run=True):
    """Inside, launches are noted: yields (kernels, operations). A kernel is its name and what it is compiled for; an
    operation is its name, "WAIT" for one that makes the host wait. run: whether kernels run, or leave what they would
    write as it is."""
    from triton.runtime.interpreter import GridExecutor
    from triton.runtime.jit import JITFunction

    from dsa_kernels.runtime import INTERPRETED

    owner, name = (GridExecutor, "__call__") if INTERPRETED else (JITFunction, "run")
    kernels, launch, operations = [], getattr(owner, name), Operations()

    def noting(self, *args, **kwargs):
        options = [(key, value) for key, value in kwargs.items() if key not in ("grid", "warmup")]
        kernels.append((self.fn.__name__, str([kind_of(arg) for arg in args]), str(sorted(options, key=str))))
        with torch.utils._python_dispatch._disable_current_modes():  # how the interpreter moves bytes is its own affair
            return launch(self, *args, **kwargs) if run else None

    setattr(owner, name, noting)
    try:
        with operations:
            yield kernels, operations.names
    finally:
        setattr(owner, name, launch)
