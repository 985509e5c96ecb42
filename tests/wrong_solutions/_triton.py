"""Triton for wrong kernels, in a form that can be imported where there is none.

There `jit` leaves a plain function with `needs_triton = True`, by which test_checks.py knows what to skip.
"""

import importlib.util
import types

if importlib.util.find_spec("triton"):
    import dsa_kernels  # noqa: F401 (first: it decides whether kernels are interpreted)

    # isort: split
    import triton
    import triton.language as tl

    jit = triton.jit
    INTERPRETED = dsa_kernels.mode() == "interpreter"
else:
    tl = types.SimpleNamespace(constexpr=None)  # signatures need no more
    INTERPRETED = False

    def jit(function):
        function.needs_triton = True
        return function
