"""Triton's interpreter: chosen where no GPU is usable, also after another library imported triton, and for all threads.

`@triton.jit` decides where it stands whether a function is interpreted, by `triton.knobs.runtime.interpret`; the
functions that Triton's language itself is written in, such as `tl.sum`, were decided when triton was imported. torch
imports triton behind the user's back: for any optimizer, for `torch.compile` and for the profiler.
"""

import functools
import os
import sys
import threading
import types

import numpy as np
import torch

SWITCH = "TRITON_INTERPRET"  # the environment variable with which a user chooses
LOCK = threading.RLock()  # held by whoever interprets a kernel, or changes how kernels are interpreted


def chosen() -> bool:
    """Whether kernels are interpreted: as TRITON_INTERPRET says, and without it, where torch finds no usable GPU."""
    said = os.environ.get(SWITCH, "").lower()
    return said in ("1", "true", "on", "y", "yes") if said else not torch.cuda.is_available()  # as triton reads it


def turn_on() -> None:
    """Let `@triton.jit` interpret from now on, in this process alone, and let threads interpret one after another."""
    said = os.environ.get(SWITCH)
    os.environ[SWITCH] = "1"
    knobs = None
    try:
        import triton
        import triton.runtime.interpreter as interpreter

        if knobs := getattr(triton, "knobs", None):
            knobs.runtime.interpret = True
    finally:
        if said is None and (knobs or not sys.modules.get("triton")):  # a triton without knobs goes on reading it
            del os.environ[SWITCH]  # a process that this one starts may have a GPU
    _interpret_the_language(interpreter.InterpretedFunction)
    _let_scalars_be_counts(interpreter)
    _let_masks_mix_scalars(interpreter.InterpreterBuilder)
    _interpret_one_at_a_time(interpreter.InterpretedFunction)


def _interpret_the_language(interpreted):
    """What importing triton with the interpreter on would have made of the functions of `triton.language`."""
    import triton.language as tl
    from triton.runtime.jit import JITFunction

    made = {}
    modules = [module for name, module in sorted(sys.modules.items()) if name.startswith("triton.language")]
    for module in modules:
        for name, value in list(vars(module).items()):
            if isinstance(value, JITFunction):
                setattr(module, name, made.setdefault(id(value), interpreted(value.fn)))
    for name, value in list(vars(tl.tensor).items()):
        if isinstance(value, JITFunction):  # x.sum(): only a plain function is a method
            setattr(tl.tensor, name, functools.partialmethod(made[id(value)]))


def _let_scalars_be_counts(interpreter):
    """A scalar is an array of shape [1]. As the bound of a loop, triton before 3.7 calls int() on it, an error since
    NumPy 2.4."""
    patch = interpreter._patch_lang_tensor
    scalar = types.SimpleNamespace(handle=types.SimpleNamespace(data=np.zeros(1, np.int32)))

    @functools.wraps(patch)
    def patched(tensor, *scope):  # for the time of a kernel: what its scope takes away again, it takes away from us too
        patch(tensor, *scope)
        try:
            tensor.__index__(scalar)
        except TypeError:
            tensor.__index__ = lambda self: int(self.handle.data.squeeze())

    interpreter._patch_lang_tensor = patched


def _let_masks_mix_scalars(builder):
    """`(i < n) & (x > 0)` with a scalar x: the interpreter spreads the scalar's truth value in the dtype of x, and `&`
    of truth values and floats is an error. Truth values stay truth values, as they do compiled."""
    splat = builder.create_splat

    @functools.wraps(splat)
    def patched(self, ret_ty, arg):
        spread = splat(self, ret_ty, arg)
        if arg.data.dtype == bool:
            spread.data = spread.data.astype(bool)
        return spread

    builder.create_splat = patched


def _interpret_one_at_a_time(interpreted):
    """The interpreter keeps the program's id, and its changes to `triton.language`, for the whole process."""
    run = interpreted.run

    def locked(*args, **kwargs):
        with LOCK:
            return run(*args, **kwargs)

    @functools.wraps(run)
    def alone(*args, **kwargs):
        if "torch._dynamo" in sys.modules:  # looked for here, since importing it takes seconds
            return torch.compiler.disable(locked)(*args, **kwargs)  # torch.compile would trace the interpreter itself
        return locked(*args, **kwargs)

    interpreted.run = alone
    if hasattr(os, "register_at_fork"):  # a child must not start in the middle of another thread's kernel
        os.register_at_fork(before=LOCK.acquire, after_in_parent=LOCK.release, after_in_child=LOCK.release)
