"""Arithmetic as the contract says it, whatever the program around a step has switched on.

Autocast turns fp32 products into bf16 ones, and TF32 (or "medium" precision on a CPU) shortens their factors. For a
weight product that is the user's choice. Scores that differ by less than the rounding would be selected otherwise, so
steps decorated with `exact` run without either.
"""

import contextlib
import functools
import os
import threading
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # device types whose autocast is looked at


class _Products:
    """The precision of one backend's fp32 products, as torch 2.9 and newer keep it."""

    def __init__(self, backend: str) -> None:
        self._read = functools.partial(torch._C._get_fp32_precision_getter, backend)
        self._write = functools.partial(torch._C._set_fp32_precision_setter, backend)

    @property
    def own(self) -> str:
        """What is set for these products themselves: "none" where they inherit, which means fp32 if nothing is set.

        torch tells only what holds, so that for a moment nothing is set that could be inherited.
        """
        if (held := self._read("matmul")) == "none":
            return held
        everywhere = torch.backends.fp32_precision
        try:
            torch.backends.fp32_precision = "none"
            backends = self._read("all")
            try:
                self._write("all", "none")
                return self._read("matmul")
            finally:
                self._write("all", backends)
        finally:
            torch.backends.fp32_precision = everywhere

    @own.setter
    def own(self, value: str) -> None:
        self._write("matmul", value)


class _AllProducts:
    """The older setting, for all backends, that `allow_tf32` is a part of.

    torch refuses to read either where the newer settings say something else, so that they change together.
    """

    @property
    def precision(self) -> str:
        """One of "highest", which means fp32, "high" and "medium"."""
        return torch.get_float32_matmul_precision()

    @precision.setter
    def precision(self, value: str) -> None:
        kept = [(products, products.own) for products in _products]  # torch would set them as well
        torch.set_float32_matmul_precision(value)
        for products, own in kept:
            products.own = own


_newer = hasattr(torch._C, "_get_fp32_precision_getter")
_products = (_Products("cuda"), _Products("mkldnn")) if _newer else ()
# An owner, its setting, and the value that means fp32. The older one is last: it can be read where the others say fp32.
SWITCHES = (*((products, "own", "ieee") for products in _products), (_AllProducts(), "precision", "highest"))
_lock, _inside, _changed = threading.Lock(), set(), []  # a token for each call inside, the settings to come back to


def _start_over() -> None:
    """In a forked process: the other threads, with the lock and the calls they were in, are not there."""
    global _lock
    _lock = threading.Lock()
    _inside.clear()
    while _changed:
        setattr(*_changed.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_start_over)


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
