"""A variant that is asked for holds in every step inside a step, and a fault in Hopper's code is not "cannot serve".

No GPU is needed: stand-ins for `dsa_kernels.hopper`'s modules say that they can serve everything, write down that they
were asked, and let the portable kernels do the work.
"""

import ast
import functools
import importlib
import os
import pathlib
import subprocess
import sys
import time
import types
from concurrent.futures import ThreadPoolExecutor

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import best, exact_scores, index_inputs, normal, selected, small_integers

if rungs.has_triton():
    import dsa_kernels
    from dsa_kernels import runtime
    from dsa_kernels.index_scores import launch_portable
    from dsa_kernels.paged_index_scores import launch as launch_paged_scores
    from dsa_kernels.select_topk import PORTABLE
    from dsa_kernels.topk import radix

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

T, S, K = 7, 20, 3


def fake_index_scores(q_idx, k_idx, w, k_scale, start, end, out):
    out.copy_(launch_portable(q_idx, k_idx, w, k_scale, start, end))


def fake_select_topk(scores, k, start, end, out, nan, redo):
    radix.launch(scores, k, start, end, out, nan)
    redo.zero_()


def fake_lightning_select(q_idx, k_idx, w, k, k_scale, start, end, out):
    """Right but for every third row, which it flags."""
    nan = torch.zeros(len(out), dtype=torch.int32, device=out.device)
    radix.launch(launch_portable(q_idx, k_idx, w, k_scale, start, end), k, start, end, out, nan)
    redo = (torch.arange(len(out), device=out.device) % 3 == 0).int()
    out[redo != 0] = 99
    return nan, redo


def fake_sparse_attention(q, kv, indices, scale, out, lse):
    out.zero_(), lse.zero_()


FAKES = {
    "index_scores": fake_index_scores,
    "select_topk": fake_select_topk,
    "lightning_select": fake_lightning_select,
    "sparse_attention": fake_sparse_attention,
}


@pytest.fixture
def hopper(monkeypatch):
    """Stand-ins for Hopper's modules, for four queries and more.

    `asked`: what was run; `looked`: who was asked whether it can serve; `refuse`: why it cannot.
    """
    state = types.SimpleNamespace(asked=[], looked=[], refuse={})

    def module(step):
        def cannot_serve(*inputs):
            state.looked.append(step)
            return state.refuse.get(step)

        def run(*arguments):
            state.asked.append(step)
            return FAKES[step](*arguments)

        return types.SimpleNamespace(cannot_serve=cannot_serve, **{step: run})

    for step in FAKES:
        monkeypatch.setitem(sys.modules, f"dsa_kernels.hopper.{step}", module(step))
    monkeypatch.setattr(runtime, "gluon_compiles", lambda: True)
    monkeypatch.setattr(runtime, "FEWEST_FOR_HOPPER", 4)
    monkeypatch.setattr(runtime, "multiprocessors", lambda tensor: 1)
    return state


def run(step, variant, device):
    """The step on inputs of its own; where it selects, the sets must be those of the oracle."""
    given = index_inputs(small_integers, T, S, 2, 32, device=device)
    q_idx, k_idx, w, k_scale = given
    ranges = torch.zeros(T, dtype=torch.int32, device=device), torch.full((T,), S, dtype=torch.int32, device=device)
    scores = exact_scores(*given, *ranges)
    if step == "index_scores":
        dsa_kernels.index_scores(q_idx, k_idx, w, k_scale, *ranges, variant=variant)
    elif step == "select_topk":
        x = torch.as_tensor(scores).float().to(device)
        assert selected(dsa_kernels.select_topk(x, K, *ranges, variant=variant)) == best(scores, K, *ranges)
    elif step == "lightning_select":
        got = dsa_kernels.lightning_select(q_idx, k_idx, w, K, k_scale, *ranges, variant=variant)
        assert selected(got) == best(scores, K, *ranges)
    else:
        q, kv = normal(4, 2, 32, device=device), normal(S, 32, device=device)
        indices = torch.arange(K, dtype=torch.int32, device=device).repeat(4, 1)
        dsa_kernels.sparse_attention(q, kv, indices, 0.3, 16, variant=variant)


@pytest.mark.parametrize("step", FAKES)
def test_portable_asks_nothing_of_hopper(step, hopper, device):
    run(step, "portable", device)
    assert hopper.asked == hopper.looked == []


@pytest.mark.parametrize("step", FAKES)
@pytest.mark.parametrize("variant", ("hopper", None))
def test_hopper_runs_where_it_can_serve(step, variant, hopper, device):
    """Rows that the fused kernel flags are redone by `flagged`, so nobody else is asked."""
    run(step, variant, device)
    assert hopper.asked == hopper.looked == [step]


@pytest.mark.parametrize("step", FAKES)
def test_what_cannot_serve_says_why(step, hopper, device):
    hopper.refuse[step] = "needs another day"
    with pytest.raises(ValueError, match='variant "hopper" needs another day'):
        run(step, "hopper", device)
    assert hopper.asked == []


def test_each_step_inside_chooses_by_itself(hopper, device):
    """Without the fused kernel the two steps are asked, each with the variant that was given: None."""
    hopper.refuse["lightning_select"] = "needs longer rows"
    run("lightning_select", None, device)
    assert hopper.asked == ["index_scores", "select_topk"]


def test_few_rows_are_not_for_hopper(hopper, device):
    given = index_inputs(small_integers, 1, 20, 1, 32, device=device)
    dsa_kernels.index_scores(*given)
    dsa_kernels.lightning_select(*given[:3], K)
    dsa_kernels.select_topk(small_integers(1, 9).to(device), K)
    assert hopper.asked == []


@pytest.mark.parametrize("step", ("paged_index_scores", "paged_select"))
def test_both_steps_on_paged_caches_choose_the_same(step, device, monkeypatch):
    asked, refuse = [], []

    def launch(q_idx, index_pages, w, page_table, lengths, out, zeros=None, fill=False):
        asked.append(step)
        launch_paged_scores(q_idx, index_pages, w, page_table, lengths, out, zeros, fill)

    module = types.SimpleNamespace(cannot_serve=lambda *inputs: refuse[0] if refuse else None, launch=launch)
    monkeypatch.setitem(sys.modules, "dsa_kernels.hopper.paged_index_scores", module)
    monkeypatch.setattr(runtime, "gluon_compiles", lambda: True)
    monkeypatch.setattr(sys.modules["dsa_kernels.paged_index_scores"], "FEWEST_FOR_HOPPER", 4)
    q_idx, w = small_integers(2, 1, 4, 8).to(torch.float8_e4m3fn), small_integers(2, 1, 4)
    pages, table = torch.zeros(3, 16 * 12, dtype=torch.uint8), torch.tensor([[2, 0], [1, -1]], dtype=torch.int32)
    given = [x.to(device) for x in (q_idx, pages, w, table, torch.tensor([20, 9], dtype=torch.int32))]
    if step == "paged_select":
        given.insert(3, K)
    results = [getattr(dsa_kernels, step)(*given, variant=variant) for variant in ("portable", "hopper", None)]
    few = [x[:1] if x.shape[0] == 2 else x for x in given if isinstance(x, torch.Tensor)]
    if step == "paged_select":
        few.insert(3, K)
    getattr(dsa_kernels, step)(*few)
    assert asked == [step, step]
    for got in results:
        assert all(map(torch.equal, got, results[0]))
    refuse.append("needs another day")
    getattr(dsa_kernels, step)(*given)
    with pytest.raises(ValueError, match='variant "hopper" needs another day'):
        getattr(dsa_kernels, step)(*given, variant="hopper")
    assert asked == [step, step]


@pytest.mark.parametrize("variant", ("listed", "sampled", "radix"))
def test_an_algorithm_by_name_is_what_runs(variant, hopper, device, monkeypatch):
    """And "radix" after the others, for the rows they flag; nobody asks Hopper."""
    ran = noted(monkeypatch)
    run("select_topk", variant, device)
    assert ran == ([variant] if variant == "radix" else [variant, "radix"])
    assert hopper.asked == hopper.looked == []


def test_lightning_select_takes_some_rows_at_a_time(hopper, device, monkeypatch):
    """Seven rows, two at once: sizes are read when the step is called."""
    monkeypatch.setattr(runtime, "SCORES_AT_ONCE", 2 * S)
    ran = noted(monkeypatch)
    run("lightning_select", "portable", device)
    assert ran.count("radix") == 4


def test_nan_is_told_by_its_row(device, monkeypatch):
    """The row of the whole input, not of the rows that were scored at once."""
    monkeypatch.setattr(runtime, "SCORES_AT_ONCE", 2 * S)
    q_idx, k_idx, w, _ = index_inputs(normal, T, S, 2, 32, device=device)
    w[5] = torch.nan
    with pytest.raises(ValueError, match="scores must not be NaN, got NaN in row 5"):
        dsa_kernels.lightning_select(q_idx, k_idx, w, K, variant="portable")


def noted(monkeypatch):
    """The names of select_topk's portable algorithms, one for each time that it runs from now on."""
    ran = []
    for name, module in PORTABLE.items():

        def launch(*arguments, name=name, launch=module.launch):
            ran.append(name)
            launch(*arguments)

        monkeypatch.setattr(module, "launch", launch)
    return ran


@pytest.mark.parametrize(
    "fault, error",
    [("import no_such_module", ImportError), ("sys.no_such", AttributeError), ("1 / 0", ZeroDivisionError)],
)
@pytest.mark.parametrize("variant", ("hopper", None))
def test_a_fault_in_hopper_code_surfaces(fault, error, variant, device, monkeypatch, tmp_path):
    import dsa_kernels.hopper

    (tmp_path / "select_topk.py").write_text(f"import sys\n\n{fault}\n")
    monkeypatch.setattr(dsa_kernels.hopper, "__path__", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "dsa_kernels.hopper.select_topk", raising=False)
    monkeypatch.setattr(runtime, "gluon_compiles", lambda: True)
    monkeypatch.setattr("dsa_kernels.runtime.INTERPRETED", False)
    with pytest.raises(error, match="no_such|division by zero"):
        runtime.hopper_variant("select_topk", variant, "hopper", normal(4, 9), 2)


@pytest.mark.parametrize("missing", ({"no_such_module": ("jit",)}, {"triton.language": ("no_such_name",)}))
def test_a_triton_without_gluon(missing, device, monkeypatch):
    """Asked for, Hopper's variant is refused; not asked for, the portable one runs."""
    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "GLUON", runtime.GLUON | missing)
    monkeypatch.setattr(runtime, "gluon_compiles", runtime.gluon_compiles.__wrapped__)
    with pytest.raises(ValueError, match='variant "hopper" needs a triton with Gluon, and no interpreter'):
        runtime.hopper_variant("select_topk", "hopper", "portable", normal(4, 9), 2)
    assert runtime.hopper_variant("select_topk", None, "hopper", normal(4, 9), 2) is None


def test_threads_import_one_after_the_other(device, monkeypatch):
    """Gluon's modules import each other: threads that begin at the same time deadlock in Python's locks on modules."""
    inside, most, real = [], [], importlib.import_module

    def importing(*names):
        inside.append(names)
        time.sleep(0.01)
        most.append(len(inside))
        inside.pop()
        return real(*names)

    monkeypatch.setattr(runtime, "INTERPRETED", False)
    monkeypatch.setattr(runtime, "gluon_compiles", functools.cache(runtime.gluon_compiles.__wrapped__))
    monkeypatch.setattr(runtime.importlib, "import_module", importing)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda _: runtime.hopper_variant("select_topk", None, "hopper", normal(4, 9), 2), range(4)))
    assert len(most) >= len(runtime.GLUON) and max(most) == 1


@pytest.mark.parametrize("interpreted", (False, True))
def test_this_triton_has_gluon_and_the_interpreter_none(interpreted):
    """The pinned versions have it all; without this, the test above could pass for another reason.

    In a new process, where nothing has imported Gluon yet.
    """
    code = f"import triton; from dsa_kernels import runtime; assert runtime.gluon_compiles() is {not interpreted}"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "TRITON_INTERPRET": str(int(interpreted))}
    subprocess.run([sys.executable, "-c", code], check=True, env=environment)


def test_the_list_of_gluon_names_is_what_hopper_imports():
    """All that `dsa_kernels/hopper/*.py` take from triton's modules, read off the code."""
    imported = {}
    for path in pathlib.Path(runtime.__file__).with_name("hopper").glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.ImportFrom) and not node.level and node.module.startswith("triton"):
                imported.setdefault(node.module, set()).update(alias.name for alias in node.names)
    assert imported == {module: set(names) for module, names in runtime.GLUON.items()}
