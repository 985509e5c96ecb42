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

AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # device types whose autocast is looked at
_lock, _inside, _before = threading.Lock(), 0, ()  # how many threads are inside, and the settings to come back to


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
    global _inside, _before
    with contextlib.ExitStack() as stack:
        for kind in AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        with _lock:
            if _inside == 0:
                _before = [(owner, name, getattr(owner, name)) for owner, name, _ in _settings()]
                for owner, name, full in _settings():
                    if getattr(owner, name) != full:
                        setattr(owner, name, full)
            _inside += 1
        try:
            yield
        finally:
            with _lock:
                _inside -= 1
                if _inside == 0:
                    for owner, name, value in _before:
                        if getattr(owner, name) != value:
                            setattr(owner, name, value)


def _settings():
    """(object, attribute, the value that means fp32) of each switch for matrix products."""
    backends = torch.backends
    if hasattr(backends.cuda.matmul, "fp32_precision"):  # torch 2.9 and newer
        return [(backend.matmul, "fp32_precision", "ieee") for backend in (backends.cuda, backends.mkldnn)]
    return [(backends.cuda.matmul, "allow_tf32", False)]


def autocast_on(device: torch.device) -> bool:
    """Whether autocast is on for tensors of this device."""
    return torch.amp.is_autocast_available(device.type) and torch.is_autocast_enabled(device.type)
