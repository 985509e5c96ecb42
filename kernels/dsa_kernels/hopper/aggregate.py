"""Structs inside Gluon kernels: `@aggregate` makes a class of annotated fields, and of methods under `@gluon.jit`, a
value that kernels build, pass to functions, return, and carry through loops. Nothing of it is left in the machine code.
"""

from triton.experimental.gluon import constexpr_function

# Neither triton 3.6 nor 3.7 gives it a public name. Both keep it here, and Gluon's own modules import it from here.
from triton.language.core import _aggregate


def aggregate(cls):
    """Triton's aggregate, and the constructor, which takes each field by its name."""

    @constexpr_function
    def __init__(self, **fields):
        for name, value in fields.items():
            setattr(self, name, value)

    cls.__init__ = __init__
    return _aggregate(cls)
