"""Hopper's index scores, the scan of the fused selection and the ladder's copies, compiled without a GPU.

What the kernel book says of their memory, registers and loops must be what the compiler makes.
"""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import rungs
from conftest import NEEDS_TRITON

ROOT = pathlib.Path(__file__).parents[2]
BOOK = ROOT / "kernels" / "book"
COPIES = ("whole", "turns", "maximum", "saturate")
# in the order in which `open_block` makes them
BUFFERS = ("queries", "ring.keys", "ring.scales", "queries_arrived", "ring.full", "ring.free")
COMPILE = """
import importlib, json, subprocess, sys
import triton  # before dsa_kernels, which would switch the interpreter on where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

def tile(kind, rows, layout):
    return f"tensordesc<{kind}[{', '.join(map(str, rows))}],{layout.value!r}>"

def compiled(module, kernel):
    types = dict(q_desc=tile("fp8e4nv", [module.COLUMNS.value, 128], module.TILE))
    types |= dict(k_desc=tile("fp8e4nv", [64, 128], module.TILE), scale_desc=tile("fp32", [64], module.SCALES))
    types |= {name: "*fp32" for name in kernel.arg_names if name.endswith("_ptr")} | dict(T="i32", S="i32", chunk="i32")
    types |= dict(start_ptr="*i32", end_ptr="*i32", count_ptr="*i32", entry_ptr="*i64")
    place = kernel.arg_names.index
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if "desc" not in name}
    source = GluonASTSource(kernel, {name: types[name] for name in kernel.arg_names}, {}, aligned)
    made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, maxnreg=168))
    with open("kernel.ptx", "w") as file:
        file.write(made.asm["ptx"])
    ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
    said = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
    return {"shared": made.metadata.shared, "ptx": made.asm["ptx"], "ptxas": said}

scores = importlib.import_module("dsa_kernels.hopper.index_scores")
fused = importlib.import_module("dsa_kernels.hopper.lightning_select")
found = {"production": compiled(scores, scores._index_scores), "scan": compiled(scores, fused._collect)}
for name in sys.argv[1:]:
    copy = importlib.import_module(f"dsa_bench.ladder.index_scores.{name}")
    found[name] = compiled(copy, copy._index_scores)
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if not rungs.has_triton():
        pytest.skip(NEEDS_TRITON)
    folder = tmp_path_factory.mktemp("compiled")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path}
    env["MLIR_ENABLE_DUMP"] = "_index_scores"  # Triton prints to stderr what each of its passes is given
    script = folder / "compile.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script, *COPIES], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    placed = next(dump for dump in done.stderr.split("IR Dump") if "allocation.offset" in dump)  # production's is first
    offsets = [int(x) for x in re.findall(r"local_alloc \{allocation\.offset = (\d+) : i32\}", placed)]
    found = json.loads(done.stdout.splitlines()[-1])
    found["production"]["offsets"] = offsets
    return found


def test_memory_map_of_the_chapter_adds_up(compiled):
    chapter = (BOOK / "index_scores.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (0x[0-9a-f]+) \| ([\d,]+) \| (.*) \|$", chapter, re.MULTILINE)
    offset = 0
    for at, size, _ in rows:
        assert int(at, 16) == offset
        offset += int(size.replace(",", ""))
    assert len(rows) == 8 and f"**{offset:,}**" in chapter
    assert compiled["production"]["shared"] == compiled["scan"]["shared"] == offset
    for name, offset_of_buffer in zip(BUFFERS, compiled["production"]["offsets"], strict=True):
        (row,) = (text for at, size, text in rows if 0 <= offset_of_buffer - int(at, 16) < int(size.replace(",", "")))
        assert f"`{name}`" in row, f"{name} lies at {offset_of_buffer:#x}, and the chapter has there: {row}"
    assert f"{offset:,} bytes to the byte" in (BOOK / "lightning_select.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("kernel", ("production", "scan", *COPIES))
def test_no_register_is_spilled_and_no_product_waits_for_the_last(compiled, kernel):
    said, ptx = compiled[kernel]["ptxas"], compiled[kernel]["ptx"]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "C7512" not in said and "C7514" not in said
    registers = re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+);", ptx)
    assert {"248", "232", "24"} <= set(registers)  # as the chapter's table of warps has them


def test_a_copy_differs_from_production_as_its_history_says(compiled):
    """Columns of a product, barriers, and how a relu is taken."""
    ptx = {name: made["ptx"] for name, made in compiled.items()}
    products = {name: set(re.findall(r"wgmma\.mma_async\S*\.m64n(\d+)k32", text)) for name, text in ptx.items()}
    assert products == {name: {"256"} if name == "whole" else {"128"} for name in ptx}
    barriers = {name: text.count("mbarrier.init") for name, text in ptx.items()}
    assert barriers == {name: 11 if name == "turns" else 9 for name in ptx}
    for name, text in ptx.items():
        assert ("mul.sat.f32" in text) == (name == "saturate")
        assert (text.count("max.f32") >= 128) == (name == "maximum")
