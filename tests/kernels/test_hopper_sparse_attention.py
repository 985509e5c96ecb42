"""Sparse attention's Hopper kernel, compiled without a GPU: what the kernel book says of its memory and registers."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest
import rungs

ROOT = pathlib.Path(__file__).parents[2]
CHAPTER = ROOT / "kernels" / "book" / "sparse_attention.md"
BUFFERS = (  # in the order in which `allocate` makes them; barriers, which have a row of the map together, are left out
    *("q.left", "q.right", "q.rope", "q.number"),
    *("k0.left.columns", "k0.right.columns", "k0.rope", "k0.valid"),
    *("k1.left.columns", "k1.right.columns", "k1.rope", "k1.valid"),
    *("p1.operand", "left_max.buffer", "left_sum.buffer", "right_sum.buffer"),
)
COMPILE = """
import json, subprocess, sys
import triton  # before dsa_kernels, which would switch the interpreter on where there is no GPU
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon import language as gl
from triton.experimental.gluon._runtime import GluonASTSource
from dsa_kernels.hopper.sparse_attention import _sparse_attention as kernel

tile = lambda columns: f"tensordesc<bf16[64, {columns}],{gl.NVMMASharedLayout(128, 16, 2)!r}>"
types = dict(q256=tile(256), q64=tile(64), kv_ptr="*bf16", lists_ptr="*i32", lengths_ptr="*i32", counter_ptr="*i32")
types |= dict(out_ptr="*bf16", lse_ptr="*fp32", scale="fp32", k="i32", tiles="i32", all_rows="i32")
constants = dict(G=1, GH=128, TILES=2, GROUPED=False)
place = kernel.arg_names.index
aligned = {(place(name),): [["tt.divisibility", 16]] for name in types if name.endswith("_ptr")}
types = {name: types.get(name, "constexpr") for name in kernel.arg_names}
source = GluonASTSource(kernel, types, {(place(name),): value for name, value in constants.items()}, aligned)
made = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=dict(num_warps=4, maxnreg=168))
with open("kernel.ptx", "w") as file:
    file.write(made.asm["ptx"])
ptxas = [triton.knobs.nvidia.ptxas.path, "-v", "-arch=sm_90a", "kernel.ptx", "-o", "kernel.cubin"]
said = subprocess.run(ptxas, capture_output=True, text=True, check=True).stderr
print(json.dumps({"shared": made.metadata.shared, "ptx": made.asm["ptx"], "ptxas": said}))
"""


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    if not rungs.has_triton():
        pytest.skip("kernels need triton, which cannot be imported here")
    folder = tmp_path_factory.mktemp("compiled")
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = os.environ | {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": path}
    env["MLIR_ENABLE_DUMP"] = "_sparse_attention"  # Triton prints to stderr what each of its passes is given
    script = folder / "compile.py"
    script.write_text(COMPILE)
    done = subprocess.run([sys.executable, script], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"offsets": offsets_of_buffers(done.stderr)}


def offsets_of_buffers(dumps):
    """Where the compiler has put each buffer that is no barrier, in the order of the source."""
    placed = next(dump for dump in dumps.split("IR Dump") if "allocation.offset" in dump)
    found = re.findall(r"local_alloc \{allocation\.offset = (\d+) : i32\}.*!ttg\.memdesc<([0-9x]+x\w+)", placed)
    return [int(offset) for offset, shape in found if not shape.endswith("xi64")]


def number(text):
    return int(text.replace(",", "").replace("*", ""))


def test_memory_map_of_the_chapter_adds_up(compiled):
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (.*) \|$", CHAPTER.read_text(encoding="utf-8"), re.MULTILINE)
    offset = 0
    for at, size, _ in rows:
        assert number(at) == offset
        offset += number(size)
    assert len(rows) == 16 and f"**{offset:,}**" in CHAPTER.read_text(encoding="utf-8")
    assert compiled["shared"] == offset <= 232_448


def test_memory_map_names_each_buffer_where_the_compiler_has_put_it(compiled):
    rows = re.findall(r"^\| ([\d,]+) \| ([\d,]+) \| (.*) \|$", CHAPTER.read_text(encoding="utf-8"), re.MULTILINE)
    for name, offset in zip(BUFFERS, compiled["offsets"], strict=True):
        (row,) = (text for at, size, text in rows if number(at) <= offset < number(at) + number(size))
        assert f"`{name}`" in row, f"{name} lies at {offset}, and the chapter has there: {row}"
        assert sum(f"`{name}`" in text for _, _, text in rows) == 1, name


def test_no_register_is_spilled_and_no_product_waits_for_the_last(compiled):
    said = compiled["ptxas"]
    assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in said
    assert "C7512" not in said and "C7514" not in said
    registers = set(re.findall(r"setmaxnreg\.\w+\.sync\.aligned\.u32\s+(\d+);", compiled["ptx"]))
    assert {"216", "72"} <= registers
