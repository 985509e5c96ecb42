"""A notebook's own solution with a few words changed: a short way to write a kernel that is right but for one thing."""

import json
import linecache
import math
import pathlib
import re
import types

import numpy as np
import torch

import dsa_ref
from dsa_course.capstone.layer import attend, project

from ._triton import jit, tl

NOTEBOOKS = pathlib.Path(__file__).parents[2] / "notebooks" / "solutions"
SOLUTIONS = {  # exercise -> its cell
    cell["metadata"]["nbgrader"]["grade_id"]: "".join(cell["source"])
    for path in sorted(NOTEBOOKS.glob("*.ipynb"))
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]
    if cell["metadata"].get("nbgrader", {}).get("solution")
}


@jit
def product_in_tf32(a, b):
    return tl.dot(a, b)


@jit
def product_in_fp32(a, b):
    return tl.dot(a, b, input_precision="ieee")


def changed(exercise, name, *changes):
    """The solution of `exercise`, called `name`, after changes (old, new), each of which must find its text."""
    source = re.sub(r"def my_\w+\(", f"def {name}(", SOLUTIONS[exercise])
    for old, new in changes:
        if old not in source:
            raise ValueError(f"{exercise}, {name}: {old!r} must be in the solution, which is\n{source}")
        source = source.replace(old, new)
    file = f"<{exercise}, {name}>"
    linecache.cache[file] = len(source), None, source.splitlines(keepends=True), file  # where triton looks it up
    known = {
        "math": math,
        "np": np,
        "torch": torch,
        "dsa_ref": dsa_ref,
        "attend": attend,
        "project": project,
        "tl": tl,
        "triton": types.SimpleNamespace(jit=jit),
        "__name__": name,
    }
    known |= {"product_in_tf32": product_in_tf32, "product_in_fp32": product_in_fp32}
    exec(compile(source, file, "exec"), known)
    return known[name]
