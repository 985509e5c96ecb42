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
    last = tl.load(x_ptr + n - 1)
    x = tl.load(x_ptr + i, (i < n) & (last > 3.5), 0.0)  # a scalar in the mask
    tl.store(out_ptr, x.sum() + tl.max(tl.cumsum(x), axis=0) + tl.cdiv(n, 2))

x, out = torch.arange(5.0), torch.zeros(1)
total[(1,)](x, out, 5, N=8)
print(out.item())
"""


def test_a_kernel_of_ones_own_is_interpreted_too_with_all_of_tritons_language(tmp_path):
    (tmp_path / "own.py").write_text(KERNEL)
    assert float(run("", path=tmp_path / "own.py")) == 10 + 10 + 3


COUNTS = """
import triton
import triton.language as tl
import triton.runtime.interpreter as interpreter
if {older}:  # as triton before 3.7 has it; int() of an array [1] is an error since NumPy 2.4, here with every NumPy
    patch = interpreter._patch_lang_tensor
    def patch_as_before(tensor, *scope):
        def index(self):
            if self.handle.data.ndim:
                raise TypeError("only 0-dimensional arrays can be converted to Python scalars")
            return int(self.handle.data)
        patch(tensor, *scope)
        tensor.__index__ = index
    interpreter._patch_lang_tensor = patch_as_before
import dsa_kernels
import torch

@triton.jit
def count(out_ptr, given, N: tl.constexpr):
    total = 0
    for i in range(given):
        total += i
    for i in tl.range(0, tl.load(out_ptr + 1).to(tl.int32), 2):
        total += i
    tl.store(out_ptr, total)

out = torch.tensor([0.0, 5.0])
count[(1,)](out, 4, N=1)
assert out.tolist() == [6 + 6, 5]
assert not hasattr(tl.tensor, "__index__")  # triton has its language back
"""


@pytest.mark.parametrize("older", (True, False))
def test_a_scalar_of_a_kernel_may_be_a_loops_bound(tmp_path, older):
    (tmp_path / "count.py").write_text(COUNTS.format(older=older))
    run("", path=tmp_path / "count.py")


COMPILED = """
import warnings; warnings.simplefilter("ignore")  # torch.compile says that it looks through a cache

q, k, w = inputs(3)
indices = dsa_ref.lightning_select(q, k, w, 4)
x, positions, freqs = torch.randn(5, 2, 16), torch.arange(5), torch.ones(4)
row, weight, slots, two = x[:, 0], torch.ones(16), torch.tensor([3, 0, 6, 2, 5]), freqs[:2]
q8, pages = dsa_ref.quantize(x[None, :4])[0], dsa_ref.pack_index(*dsa_ref.quantize(torch.randn(8, 16)), page_size=4)
paged = q8, pages, torch.ones(1, 4, 2), torch.tensor([[1, 0]]).int(), torch.tensor([7]).int()
kv_pages = dsa_ref.pack_kv(torch.randn(8, 16), 12).view(2, 4, -1)
places = torch.tensor([7, -1, 0]).int().expand(1, 4, 3).contiguous()

def stored(step, pages, *arguments):
    pages = pages.clone()
    step(pages, *arguments)
    return pages + 1

CALLS = {
    "index_scores": lambda ops: ops.index_scores(q, k, w).relu(),
    "indexer_loss": lambda ops: ops.indexer_loss(q, k, w, q, k, 0.3, indices) * 2,
    "select_topk": lambda ops: ops.select_topk(q[:, 0], 3, *(torch.full([len(q)], n).int() for n in (0, 9))) + 1,
    "lightning_select": lambda ops: ops.lightning_select(q, k, w, 4).sort().values,
    "sparse_attention": lambda ops: ops.sparse_attention(q, k, indices, 0.3, 12)[0] * 2,
    "sparse_attention_backward": lambda ops: (
        ops.sparse_attention_backward(q, k, indices, 0.3, 12, q[..., :12], q[..., 12], q[..., 4:])[1] + 1
    ),
    "rope": lambda ops: ops.rope(x, positions, freqs, "half") + 1,
    "hadamard": lambda ops: ops.hadamard(x) + 1,
    "quantize": lambda ops: ops.quantize(x)[0].float(),
    "rotate_quantize": lambda ops: ops.rotate_quantize(x, positions, freqs)[1] * 2,
    "append_index": lambda ops: stored(ops.append_index, pages, slots, row, weight, weight, 1e-6, positions, freqs),
    "append_latents": lambda ops: stored(ops.append_latents, kv_pages, slots, row, weight[:12], 1e-6, positions, two),
    "head_weights": lambda ops: ops.head_weights(row, torch.ones(3, 16)) + 1,
    "index_queries": lambda ops: ops.index_queries(x, torch.ones(5, 2), positions, freqs)[1] * 2,
    "merge_parts": lambda ops: ops.merge_parts(x, x[..., 0])[0] * 2,
    "mha_attention": lambda ops: ops.mha_attention(x, x, x[..., :12], 0.3, None)[0] * 2,
    "paged_index_scores": lambda ops: ops.paged_index_scores(*paged).relu(),
    "paged_select": lambda ops: ops.paged_select(*paged[:3], 3, *paged[3:])[1].sort().values,
    "paged_sparse_attention": lambda ops: ops.paged_sparse_attention(x[None, :4], kv_pages, places, 0.3, 12)[0] * 2,
    "place_tokens": lambda ops: ops.place_tokens(*paged[3:], torch.tensor([0]), 1, 4)[3] + 1,
    "rms_norm": lambda ops: ops.rms_norm(row, weight, 1e-6) + 1,
    "turn_into": lambda ops: stored(ops.turn_into, x[..., :8], x[..., 8:], positions, freqs, "half"),
}
assert CALLS.keys() == {*dsa_kernels.__all__} - {"mode", "warm"}
for name in names or CALLS:
    call = CALLS[name]
    compiled = torch.compile(call, backend="aot_eager")
    for _ in range(2):
        torch.testing.assert_close(compiled(dsa_kernels), call(dsa_ref), msg=name)
    torch.compiler.reset()
check(steps(dsa_kernels, 2), steps(dsa_ref, 2))
"""


@pytest.mark.parametrize(
    "first, names", [("", []), ("import torch._dynamo", ["index_scores", "rope"])], ids=["", "import torch._dynamo"]
)
def test_kernels_inside_torch_compile(first, names):
    """All of them, and some where torch.compile was there before the interpreter: a call asks at its time."""
    run(f"{first}\nnames = {names}\n{STEPS}{COMPILED}")


def test_importing_the_kernels_does_not_import_torch_compile():
    assert run("import sys, dsa_kernels; print('torch._dynamo' in sys.modules)").strip() == "False"


def test_a_process_started_later_chooses_for_itself():
    code = "import dsa_kernels, os, subprocess, sys; print(os.environ.get('TRITON_INTERPRET'))"
    assert run(code).strip() == "None"
    assert run(code, TRITON_INTERPRET="1").strip() == "1"  # the user's own word stays


WITHOUT = """
import os, sys
sys.modules["{module}"] = None
try:
    import dsa_kernels
except ModuleNotFoundError as error:
    print(os.environ.get("TRITON_INTERPRET"), error.name, error, sep="|")
"""


def test_something_that_is_no_module_in_the_place_of_triton_is_not_taken_for_it():
    code = "import sys, types; sys.modules['triton'] = types.ModuleType('triton')\n"
    code += "try: import dsa_kernels\nexcept ModuleNotFoundError as error: print(error)"
    assert "dsa_kernels needs Triton" in run(code)


@pytest.mark.parametrize("interpret", ({}, {"TRITON_INTERPRET": "0"}))
def test_a_process_without_triton_is_told_so_and_left_as_it_was(interpret):
    environment, name, said = run(WITHOUT.format(module="triton"), **interpret).strip().split("|")
    assert (environment, name) == (interpret.get("TRITON_INTERPRET", "None"), "triton")
    assert "dsa_kernels needs Triton" in said and "Linux only" in said and "dsa_ref" in said


def test_another_module_that_is_missing_is_not_taken_for_triton():
    _, name, said = run(WITHOUT.format(module="dsa_ref.contracts")).strip().split("|")
    assert name == "dsa_ref.contracts" and "Triton" not in said


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
