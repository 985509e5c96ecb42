"""What a crash in a learner's function says: their own line, the shapes that met in it, and the likely cause."""

import importlib.util
import linecache
import pathlib
import re
import sysconfig
import traceback

import numpy as np
import torch

# Code in these folders is nobody's exercise: Python, what pip installed, and our own packages.
FOREIGN = ("<frozen", "<__array_function__") + tuple(
    str(pathlib.Path(place).resolve())
    for place in (
        *(sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")),
        pathlib.Path(torch.__file__).parents[1],
        *(pathlib.Path(importlib.util.find_spec(name).origin).parent for name in ("dsa_ref", "dsa_kernels")),
        pathlib.Path(__file__).parent,
    )
)
CAUSES = (  # what an error's text holds: its usual cause in an exercise
    (r"BFloat16|Float8", "NumPy has no bf16 and no fp8, and not all of torch takes them: convert first, x.float()"),
    (r"view size is not", "view needs memory in order, and any tensor may come, a transposed one too: use reshape"),
    (
        r"'Tensor' object has no attr|numpy\(\) on Tensor|ndarray' object has no attr|to numpy|numpy\.ndarray",
        "NumPy's name on a torch tensor, or torch's on an array: x.numpy() and torch.as_tensor(x) convert",
    ),
    (r"name '\w+' is not defined", "a name that no cell above has defined; cells run in their order"),
    (
        r"dtype|scalar type|data type|overflow",
        "two dtypes met, or one that this operation does not take: x.float(), x.long() and x.to(dtype) convert",
    ),
    (
        r"must match the size|broadcast|cannot be multiplied|not aligned|mismatch|inconsistent tensor size",
        "these shapes do not fit: compare them with the card's, axis by axis from the right",
    ),
    (r"out of (?:range|bounds)", "an index past the end: the last of n is n - 1"),
)


def explain(error) -> tuple[str, str, str]:
    """(what, cause, shown): the error with the learner's line, its likely cause, and the lines that led to it.

    error: an exception that was caught, so that its traceback begins in the check.
    """
    found = list(traceback.walk_tb(error.__traceback__))
    own = [(frame, line) for frame, line in found if not frame.f_code.co_filename.startswith(FOREIGN)]
    text = str(error).strip().partition("\n")[0]
    what = f"{type(error).__name__}: {text}"
    if not own:  # it never got into the function
        cause = "keep the stub's parameters, by name and in order" if isinstance(error, TypeError) else "see above"
        return what, cause, ""
    frame, number = own[-1]
    line = linecache.getline(frame.f_code.co_filename, number).strip()
    values = _values(line, frame)
    what += f"; in `{line}`" + (f", where {values}" if values else "")
    return what, _einsum(found) or _usual(text), _shown(own)


def _shown(own):
    lines = [(linecache.getline(frame.f_code.co_filename, n).strip(), frame.f_code.co_name, n) for frame, n in own]
    return "".join(f"{name}, line {n}:    {line}\n" for line, name, n in lines)


def _values(line, frame):
    """The tensors and whole numbers that the line names: `q [8, 2, 4] float32, s 3`."""
    known = {**frame.f_globals, **frame.f_locals}
    names = dict.fromkeys(re.findall(r"(?<![\w.\"'])[A-Za-z_]\w*", line))
    shown = []
    for name in names:
        value = known.get(name)
        if isinstance(value, (torch.Tensor, np.ndarray)):
            shown.append(f"{name} {list(value.shape)} {str(value.dtype).removeprefix('torch.')}")
        elif isinstance(value, (int, np.integer)) and not isinstance(value, bool):
            shown.append(f"{name} {value}")
    return ", ".join(shown)


def _usual(text):
    for pattern, cause in CAUSES:
        if re.search(pattern, text):
            return cause
    return "read the line above; does it hold for every shape and dtype that the exercise allows?"


def _einsum(found):
    """What in an einsum's equation does not fit its operands, in words; None if no einsum crashed, or all fits."""
    for frame, _ in reversed(found):
        if frame.f_code.co_name == "einsum":
            given = next((frame.f_locals[n] for n in ("args", "operands") if n in frame.f_locals), ())
            if given and isinstance(given[0], str) and "." not in given[0]:
                return _misfit(given[0].replace(" ", ""), [tuple(np.shape(x)) for x in given[1:]])
    return None


def _misfit(equation, shapes):
    inputs, arrow, output = equation.partition("->")
    terms, sizes = inputs.split(","), {}
    if len(terms) != len(shapes):
        return f"the equation {equation!r} names {len(terms)} operands, and {len(shapes)} were given"
    for i, (term, shape) in enumerate(zip(terms, shapes, strict=True), 1):
        if len(term) != len(shape):
            return f"{term!r} has {len(term)} letters for operand {i}, whose shape {list(shape)} has {len(shape)} axes"
        for letter, size in zip(term, shape, strict=True):
            before = sizes.setdefault(letter, (size, i))
            if before[0] != size:
                return (
                    f"in {equation!r} the letter {letter} is {before[0]} long in operand {before[1]} and {size} long "
                    f"in operand {i}: one letter is one axis"
                )
    for letter in output if arrow else "":
        if letter not in sizes:
            return f"the letter {letter} of the result stands in no operand of {equation!r}"
    return None
