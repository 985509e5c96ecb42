"""Interpreted kernels: whoever imported triton before, from any thread, after a fork, and without harm to others.

Each runs in a process of its own that sees no GPU, and compares with the reference.
"""

import os
import subprocess
import sys

import pytest
import rungs
from conftest import NEEDS_TRITON

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

STEPS = """
import dsa_kernels, dsa_ref, torch

def inputs(seed):
    generator = torch.Generator().manual_seed(seed)
    T, S = 3 + seed % 5, 20 + 7 * (seed % 9)
    return [torch.randn(*shape, generator=generator) for shape in ((T, 2, 16), (S, 16), (T, 2))]

def steps(ops, seed):
    q, k, w = inputs(seed)
    indices = ops.lightning_select(q, k, w, 3 + seed % 4).sort().values
    return indices, *ops.sparse_attention(q, k, indices, 0.3, 12), ops.hadamard(q)

def check(got, want):
    assert torch.equal(got[0], want[0]) and torch.equal(got[3], want[3])
    torch.testing.assert_close(got[1:3], want[1:3], rtol=1e-5, atol=1e-5)
"""


def run(code, path=None, **environment):
    """What the code prints, in a process that sees no GPU and starts with STEPS unless it says where."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"} | environment
    given = [str(path)] if path else ["-c", code]
    ran = subprocess.run(
        [sys.executable, *given],
        env=environment | {"CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=300,  # a lock that a fork copied would never open
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    return ran.stdout


FIRST = {
    "nothing": "",
    "triton": "import triton",
    "its language": "import triton.language as tl; tl.sum",
    "an optimizer": "p = torch.nn.Parameter(torch.ones(3)); p.sum().backward(); torch.optim.AdamW([p]).step()",
    "torch.compile": "torch.compile(lambda x: x + 1, backend='eager')(torch.ones(3))",
    "the profiler": "import torch.profiler\nwith torch.profiler.profile(): torch.ones(3) + 1",
    "the FLOP counter": "from torch.utils.flop_counter import FlopCounterMode",
}


@pytest.mark.parametrize("first", FIRST)
def test_it_makes_no_difference_who_imported_triton(first):
    code = f"""
import os, sys, torch
{FIRST[first]}
assert ("triton" in sys.modules) == ({first!r} != "nothing")
before = dict(os.environ)
{STEPS}
assert dsa_kernels.mode() == "interpreter"
check(steps(dsa_kernels, 1), steps(dsa_ref, 1))
{FIRST[first]}  # and it still works, as the kernels do after it
check(steps(dsa_kernels, 2), steps(dsa_ref, 2))
assert dict(os.environ) == before
"""
    run(code)


def test_transformers_may_come_first():
    pytest.importorskip("transformers")
    first = "from transformers.models.deepseek_v32 import modeling_deepseek_v32"
    run(f"{first}\n{STEPS}\ncheck(steps(dsa_kernels, 1), steps(dsa_ref, 1))")


KERNEL = """
import triton
import triton.language as tl
import dsa_kernels
import torch

@triton.jit
def total(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    x = tl.load(x_ptr + i, i < n, 0.0)
    tl.store(out_ptr, x.sum() + tl.max(tl.cumsum(x), axis=0) + tl.cdiv(n, 2))

x, out = torch.arange(5.0), torch.zeros(1)
total[(1,)](x, out, 5, N=8)
print(out.item())
"""


def test_a_kernel_of_ones_own_is_interpreted_too_with_all_of_tritons_language(tmp_path):
    (tmp_path / "own.py").write_text(KERNEL)
    assert float(run("", path=tmp_path / "own.py")) == 10 + 10 + 3


def test_a_process_started_later_chooses_for_itself():
    code = "import dsa_kernels, os, subprocess, sys; print(os.environ.get('TRITON_INTERPRET'))"
    assert run(code).strip() == "None"
    assert run(code, TRITON_INTERPRET="1").strip() == "1"  # the user's own word stays


def test_a_process_without_triton_is_left_as_it_was():
    code = """
import os, sys
sys.modules["triton"] = None
try:
    import dsa_kernels
except ModuleNotFoundError:
    print(os.environ.get("TRITON_INTERPRET"))
"""
    assert run(code).strip() == "None"


def test_a_user_who_switched_the_interpreter_off_is_told_the_cause_and_the_cure():
    code = f"""
{STEPS}
assert dsa_kernels.mode() == "compiled"
try:
    dsa_kernels.hadamard(torch.ones(2, 16))
except ValueError as error:
    print(error)
"""
    said = run(code, TRITON_INTERPRET="0")
    assert "x must be on a CUDA device in compiled mode, got cpu, and TRITON_INTERPRET is '0'" in said
    assert "start Python with TRITON_INTERPRET=1" in said


THREADS = """
import concurrent.futures, sys
sys.setswitchinterval(1e-5)  # often in the middle of a kernel
want = [steps(dsa_kernels, seed) for seed in range(8)]
for seed in range(8):
    check(want[seed], steps(dsa_ref, seed))

def right(seed):
    got = steps(dsa_kernels, seed % 8)
    return all(torch.equal(a, b) for a, b in zip(got, want[seed % 8], strict=True))
"""


def test_kernels_are_right_from_any_thread():
    code = """
with concurrent.futures.ThreadPoolExecutor(4) as pool:
    results = list(pool.map(right, range(32)))
assert results == [True] * 32
"""
    run(STEPS + THREADS + code)


LEARNER = """
import triton, triton.language as tl
from dsa_course import launching

@triton.jit
def copy(x_ptr, out_ptr, n, N: tl.constexpr):
    i = tl.arange(0, N)
    tl.store(out_ptr + i, tl.load(x_ptr + i, i < n), i < n)  # no `other`: the course fills it with NaN

def learner(seed):
    x, out = launching.guarded(torch.full([5], float(seed))), launching.output(5)
    launching.expect_reads_inside(copy, (1,), x, out, 5, N=8)
    return bool((out == seed).all())

with concurrent.futures.ThreadPoolExecutor(4) as pool:
    ours = [pool.submit(right if i % 2 else learner, i) for i in range(40)]
    assert [future.result() for future in ours] == [True] * 40
"""


def test_a_learners_kernel_runs_beside_ours(tmp_path):
    (tmp_path / "beside.py").write_text(
        STEPS + THREADS + LEARNER
    )  # a file, which the course reads the kernel's text from
    run("", path=tmp_path / "beside.py")


@pytest.mark.skipif(not hasattr(os, "fork"), reason=NEEDS_TRITON)
def test_a_forked_process_interprets_while_its_parent_does():
    code = """
import os, threading
stop = threading.Event()

def busy():
    while not stop.is_set():
        right(3)

threads = [threading.Thread(target=busy) for _ in range(2)]
for thread in threads:
    thread.start()
codes = []
for seed in range(4):
    child = os.fork()
    if child == 0:
        os._exit(0 if right(seed) else 1)
    codes.append(os.waitpid(child, 0)[1])
stop.set()
assert codes == [0] * 4, codes
"""
    run(STEPS + THREADS + code)
