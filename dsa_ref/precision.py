"""Arithmetic as the contract says it, whatever the program around a step has switched on.

Autocast turns fp32 products into bf16 ones, and TF32 (or "medium" precision on a CPU) shortens their factors. For a
weight product that is the user's choice. Scores that differ by less than the rounding would be selected otherwise, so
steps decorated with `exact` run without either.
"""

import contextlib
import functools
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # device types whose autocast is looked at
_matmul = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
if hasattr(_matmul[0], "fp32_precision"):  # torch 2.9 and newer
    SWITCHES = tuple((owner, "fp32_precision", "ieee") for owner in _matmul)  # and the value that means fp32
else:
    SWITCHES = ((_matmul[0], "allow_tf32", False),)
_lock, _inside, _changed = threading.Lock(), set(), []  # a token for each call inside, the settings to come back to


def exact(function: Callable) -> Callable:
    """The same function, computed in the dtypes that its docstring names."""

    @functools.wraps(function)
    def guarded(*args, **kwargs):
        with exact_arithmetic():
            return function(*args, **kwargs)

    return guarded


@contextlib.contextmanager
def exact_arithmetic() -> Iterator[None]:
    """Inside, autocast is off and a product of fp32 matrices is one of fp32, on every device.

    The precision of products is a setting of the whole process: the first thread that comes in changes it, and the last
    that leaves restores it. Another thread's products may be more precise meanwhile, never less.
    """
    token = object()  # no count, which an interrupt could leave one too high or too low
    with contextlib.ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        try:
            with _lock:
                _inside.add(token)
                for owner, name, full in SWITCHES:
                    if (value := getattr(owner, name)) != full:
                        _changed.append((owner, name, value))
                        setattr(owner, name, full)
            yield
        finally:
            with _lock:
                _inside.discard(token)
                while _changed and not _inside:
                    setattr(*_changed.pop())


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)


def widened(new: Tensor, dtype: torch.dtype) -> Tensor:
    """`new` in a cache's dtype where autocast (fp32 and below) is on and that dtype holds its every value.

    What is no tensor comes back as it is, for a check to refuse.
    """
    floats = {torch.float32, torch.bfloat16, torch.float16}
    if not isinstance(new, Tensor) or not autocast_on(new.device) or not {new.dtype, dtype} <= floats:
        return new
    return new.to(dtype) if torch.promote_types(new.dtype, dtype) == dtype else new
