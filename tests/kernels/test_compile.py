"""Every kernel compiles for the cards that are promised, within their memory, without a GPU. See `compiling.py`."""

import ast
import json
import os
import pathlib
import subprocess
import sys

import pytest
import rungs
from conftest import NEEDS_TRITON

if rungs.has_triton():
    from compiling import complaints

    from dsa_kernels import cards

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "kernels" / "dsa_kernels"
NUMBERS = ((80, 86, 89), (90,), (100,), (120,))  # those of one program together: see `compiling.SAME_CODE`
SPILLED = 128  # bytes a thread: some numbers that a loop needs once in a round
# None where tensor cores wait for nobody; more where it is known why: one program chooses among a row's candidates, all
# of them in registers.
SPILLED_BY = {
    **dict.fromkeys(
        ("dsa_kernels.hopper.index_scores._index_scores", "dsa_kernels.hopper.lightning_select._collect"), 0
    ),
    "dsa_kernels.hopper.sparse_attention._sparse_attention": 0,
    "dsa_kernels.hopper.backward_query._query_pass": 0,
    "dsa_kernels.hopper.backward_keys._key_pass": 0,
    # Its four warpgroups share 128 registers a thread; measured faster than versions that spill less.
    "dsa_kernels.hopper.paged_sparse_attention._paged_sparse_attention": 160,
    "dsa_kernels.hopper.paged_sparse_part._paged_sparse_part": 0,
    "dsa_kernels.hopper.paged_index_scores._paged_index_scores": 0,
    "dsa_kernels.topk.listed.choose": 1200,  # few rows: 1024 threads share a row, and have 64 registers each
    "dsa_kernels.topk.sampled._select_sampled": 800,  # lists of 16,384 scores, 32 a thread twice over
    "dsa_kernels.hopper.select_topk._select_topk": 3000,  # above 256K keys: lists of 128 a thread in 128 registers
    "dsa_kernels.hopper.lightning_select._choose": 256,
    "dsa_kernels.topk.decode._tournament": 640,  # 32 entries of 64 bits a thread, and 128 registers
    "dsa_kernels.paged_index_scores._paged_index_scores": 448,  # four queries, with half of the registers
    "dsa_kernels.paged_sparse_attention._paged_sparse_attention": 192,  # FP8: bytes and their bf16 form side by side
    "dsa_kernels.teach.attention._log_sum_exp": 256,  # Blackwell, and only where attention does not hand it over
    "dsa_kernels.teach.listed._gradients": 192,  # cards whose tensor cores take operands from registers, three products
    "dsa_kernels.teach.kl._keys": 256,  # fp32, as in the next line
    "dsa_kernels.index_scores._index_scores": 320,  # fp32 without tensor cores: 128 dims of two operands at once
}


def jitted(tree):
    """The names of the functions of a module that `triton.jit` or `gluon.jit` decorates."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.FunctionDef)
        for decorator in node.decorator_list
        if ast.unparse(getattr(decorator, "func", decorator)) in ("triton.jit", "gluon.jit")  # with options or without
    }


def launched(package):
    """All kernels that code in `package` launches, `kernel[grid](...)`, as module.name."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in package.rglob("*.py")}
    kernels = {name for tree in trees.values() for name in jitted(tree)}
    found = set()
    for path, tree in trees.items():
        module = ".".join((package.name, *path.relative_to(package).with_suffix("").parts))
        own = jitted(tree)
        for node in ast.walk(tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Subscript):
                name = ast.unparse(node.func.value).split(".")[-1]
                if name in kernels:
                    assert name in own, f"{module} launches {name}, which another module defines: launch it there"
                    found.add(f"{module}.{name}")
    return found


def compiled(numbers, folder):
    """What each launch compiles to for these cards: a list of dicts (`compiling.compile_case`). In a process of its
    own: this one interprets."""
    path = os.pathsep.join((str(ROOT), str(ROOT / "kernels")))
    environment = os.environ | {"PYTHONPATH": path, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(folder)}
    workers = "1" if "PYTEST_XDIST_WORKER" in os.environ else "2"  # pytest -n has a process for each core already
    command = [sys.executable, pathlib.Path(__file__).with_name("compiling.py"), folder / "out.json", workers]
    run = subprocess.run([*command, *map(str, numbers)], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-4000:]
    return json.loads((folder / "out.json").read_text())


def test_the_cards_are_those_promised():
    assert tuple(cards.KNOWN) == tuple(number for numbers in NUMBERS for number in numbers)


@pytest.mark.parametrize("numbers", NUMBERS, ids=lambda numbers: "-".join(map(str, numbers)))
def test_every_kernel_compiles(numbers, tmp_path):
    """Whoever adds a kernel adds a case of it to `compiling.CASES`. Hopper's kernels are for 9.0 alone."""
    launches = compiled(numbers, tmp_path)
    assert [f"{one['card']}, {one['case']}: {one['error'][-500:]}" for one in launches if "error" in one] == []
    for number in numbers:
        check([one for one in launches if one["card"] == number], number)


def check(launches, number):
    hoppers = (".hopper.", ".flagged.", ".topk.sample.")  # the last two serve its fused selection alone
    wanted = {kernel for kernel in launched(PACKAGE) if number == 90 or not any(part in kernel for part in hoppers)}
    assert {one["kernel"] for one in launches} == wanted

    cases = {one["case"] for one in launches}
    for size in ("V3.2", "the small model"):
        assert f"index_scores {size} torch.float8_e4m3fn portable" in cases
        for dtype in ("bfloat16", "float16", "float32"):
            steps = ("index_scores", "sparse_attention", "sparse_attention_backward")
            assert {f"{step} {size} torch.{dtype} portable" for step in steps} <= cases

    if number == 90:  # the kernel book's last line of the memory map
        chapter = (ROOT / "kernels" / "book" / "sparse_attention_backward.md").read_text(encoding="utf-8")
        for name in ("backward_query._query_pass", "backward_keys._key_pass"):
            most = max(one["shared"] for one in launches if one["kernel"].endswith(name))
            assert f"**{most:,}**" in chapter, (name, most)

    def too_many(key, limit):
        return [(one["kernel"], one["case"], one[key]) for one in launches if one[key] > limit(one)]

    assert too_many("shared", lambda one: cards.KNOWN[number].shared_memory) == []
    assert too_many("spilled", lambda one: SPILLED_BY.get(one["kernel"], SPILLED)) == []
    assert [(one["kernel"], one["case"]) for one in launches if one["registers"] < 10] == []  # nothing but a trap
    # Products that wait for each other (C7512, C7514), a setmaxnreg that is ignored (C7508), and whatever else it says.
    assert [(one["kernel"], one["complaints"]) for one in launches if one["complaints"]] == []


def test_a_kernel_without_a_case_would_be_seen(tmp_path):
    (tmp_path / "planted").mkdir()
    (tmp_path / "planted" / "step.py").write_text(
        "@triton.jit\ndef _helper(x):\n    return x\n\n\n@triton.jit\ndef _new(x):\n    _helper(x)\n\n\n"
        "def launch(x):\n    _new[(1,)](x, num_warps=4)\n    table[0](x)\n"
    )
    assert launched(tmp_path / "planted") == {"planted.step._new"}
    assert len(launched(PACKAGE)) >= 15


def test_what_the_assembler_complains_of_is_found():
    said = """ptxas info    : 0 bytes gmem
ptxas info    : (C7512) Potential Performance Loss: wgmma.mma_async instructions are serialized due to ...
ptxas warning : (C7508) setmaxnreg ignored to maintain minimum register requirements
ptxas info    : Compiling entry function '_kernel' for 'sm_90a'
ptxas info    : Used 168 registers, used 16 barriers"""
    assert [line.split("(")[1][:5] for line in complaints(said)] == ["C7512", "C7508"]
