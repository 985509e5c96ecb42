"""How a learner's function works, where an exercise asks for more than the right numbers: lines, calls, new memory."""

import collections
import contextlib
import math
import pathlib
import sys
import threading
import time
import tracemalloc
from unittest import mock

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from dsa_ref import testing
from dsa_ref.testing import Failed

# The checks themselves, and what they poison memory with: no work of a learner's.
OURS = (str(pathlib.Path(__file__).parent), testing.__file__, contextlib.__file__, mock.__file__)


class Python:
    """`with Python() as seen: solution(...)`; then

    seen.lines: how many lines of Python ran. A loop repeats its own, in torch, in NumPy and in a comprehension.
    seen.bytes: all that was allocated outside torch (NumPy, lists) in pieces of SMALL bytes or more, freed or not;
    np.empty's memory, which our own code hands over, too.
    seen.peak: the most that was held at one time, beyond what there was before the call.
    seen.seconds: what the processor computed for it, which other processes do not lengthen as they do the clock.
    """

    SMALL = 512  # a line's frame and numbers take less, those of this class too

    def __enter__(self):
        self.lines, self.bytes, self.peak, self.seconds, self.own = 0, 0, 0, 0.0, False
        self.running, self.outer, self.elsewhere = tracemalloc.is_tracing(), sys.gettrace(), False
        if not self.running:
            tracemalloc.start()
        self.before = self.held = self.left = tracemalloc.get_traced_memory()[0]
        threading.settrace(self._trace_thread)
        sys.settrace(self._trace)
        return self

    def __exit__(self, error, *trace):
        sys.settrace(self.outer)
        threading.settrace(None)
        if not self.running:
            tracemalloc.stop()
        if self.elsewhere and error is None:
            raise Failed("a thread was started, in which nothing is counted", "do all of the work in this one")

    def _trace_thread(self, frame, event, argument):
        self.elsewhere = True

    def _trace(self, frame, event, argument):
        self.seconds += time.thread_time() - self.since if self.own else 0.0
        now, peak = tracemalloc.get_traced_memory()
        if self.own:  # what ran up to here was none of our own code
            self.bytes += peak - self.held if peak - self.held >= self.SMALL else 0
            self.peak = max(self.peak, peak - self.before)
        tracemalloc.reset_peak()
        runs_next = frame.f_back if event == "return" else frame
        own = runs_next is not None and not runs_next.f_code.co_filename.startswith(OURS)
        if own and event == "call" and frame.f_back.f_code.co_filename.startswith(OURS):
            self.before = now  # here the learner's function begins
        elif own and not self.own and event == "return" and now - self.left >= self.SMALL:
            self.bytes += now - self.left  # what our code, poisoning it, made for the learner's
            self.peak = max(self.peak, now - self.before)
        if self.own and not own:
            self.left = now
        self.own, self.held = own, now
        self.lines += event == "line" and own
        self.since = time.thread_time()
        return self._trace


class TorchMemory(TorchDispatchMode):
    """What torch's operations inside it make: `elements`, all new memory together, and `largest`, one shape."""

    def __init__(self):
        super().__init__()
        self.elements, self.largest = 0, torch.Size()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        given, new = ([x for x in tree_leaves(y) if isinstance(x, torch.Tensor)] for y in ((args, kwargs), made))
        known = {x.untyped_storage().data_ptr() for x in given}  # a view is no work
        for x in new:
            if x.untyped_storage().data_ptr() not in known:
                self.elements += x.numel()
                self.largest = max(self.largest, x.shape, key=math.prod)
        return made


class TorchCalls(TorchFunctionMode):
    """`names`: those of torch's functions that were called inside it."""

    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_function__(self, function, types, args=(), kwargs=None):
        self.names.add(getattr(function, "__name__", ""))
        return function(*args, **(kwargs or {}))


class TorchOperations(TorchDispatchMode):
    """`by_name`: how often each of torch's operations ran inside it, those inside a scripted function too."""

    def __init__(self):
        super().__init__()
        self.by_name = collections.Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.by_name[function.__name__] += 1
        return function(*args, **(kwargs or {}))


def expect_no_loop(solution, small, larger, cause):
    """Fail if more lines run, or more of torch does, for larger inputs. larger: {what is larger: the arguments}.

    Returns the names of torch's functions that were called, and of the operations that they ran.
    """
    _count(solution, small)  # the first call may load or compile something: it is not compared
    lines, calls, names = _count(solution, small)
    for what, inputs in larger.items():
        solution(*map(torch.ones_like, inputs))  # a library may prepare for new shapes (np.einsum's optimize does)
        more_lines, more_calls, _ = _count(solution, inputs)
        for counted, before, after in (
            ("lines of Python ran", lines, more_lines),
            ("operations of torch ran", calls.total(), more_calls.total()),
        ):
            if after >= before + 20:
                raise Failed(f"{before} {counted}, and {after} with {what}, expected the same number", cause)
    return names | set(calls)


def _count(solution, inputs):
    with Python() as seen:
        solution(*inputs)
    with TorchOperations() as ran, TorchCalls() as called:
        solution(*inputs)
    return seen.lines, ran.by_name, called.names
