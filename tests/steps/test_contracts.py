"""Ground rules of the reference: a check returns nothing, ranges have one default, public functions have hints."""

import ast
import concurrent.futures
import contextvars
import inspect
import pathlib

import pytest
import torch
from inputs import causal, index_inputs, normal

import dsa_ref
from dsa_ref import contracts, cost, nn, testing
from dsa_ref.contracts import row_ranges
from dsa_ref.training import corpus, evaluate, train

SOURCES = sorted(pathlib.Path(dsa_ref.__file__).parent.rglob("*.py"))


def checks_that_return(source):
    """Names of the functions check* and _check* that return a value."""
    functions = (node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.FunctionDef))
    checks = [function for function in functions if function.name.lstrip("_").startswith("check")]
    return [
        check.name
        for check in checks
        for node in ast.walk(check)
        if isinstance(node, ast.Return) and node.value is not None
    ]


def test_checks_return_nothing():
    assert {path.name: checks_that_return(path.read_text(encoding="utf-8")) for path in SOURCES} == {
        path.name: [] for path in SOURCES
    }
    assert checks_that_return("def _check_k(k):\n    return k") == ["_check_k"]


@pytest.mark.parametrize("T, S", ((3, 3), (2, 5), (0, 4)))
def test_default_range_is_causal(T, S):
    for got, wanted in zip(row_ranges(T, S, "cpu"), causal(T, S), strict=True):
        assert got.dtype == torch.int32 and torch.equal(got, wanted)


BAD_LISTS = ([[0, 6]], [[-2, 1]], [[2, 2]], [[3, 1, 3]])  # for 6 keys


@pytest.mark.parametrize("lists", BAD_LISTS)
def test_values_are_looked_at_unless_one_asks_not_to(lists):
    """In this thread alone, and in an asynchronous task alone; also after an error inside."""
    indices, q, kv = torch.tensor(lists, dtype=torch.int32), normal(1, 2, 8), normal(6, 8)

    def check():
        contracts.check_sparse_attention(q, kv, indices, 1.0, 8)

    def refused():
        with pytest.raises(ValueError, match="indices must"):
            check()
        return True

    with dsa_ref.unchecked_values():
        check()
        with dsa_ref.unchecked_values():
            check()
        check()
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            assert pool.submit(contextvars.Context().run, refused).result()
        with pytest.raises(TypeError, match="indices must have dtype int32"):
            contracts.check_sparse_attention(q, kv, indices.long(), 1.0, 8)
    refused()
    with pytest.raises(KeyError), dsa_ref.unchecked_values():
        raise KeyError
    refused()


def test_ranges_are_not_looked_at_on_request():
    start, end = torch.tensor([0, 3], dtype=torch.int32), torch.tensor([9, 1], dtype=torch.int32)
    with dsa_ref.unchecked_values():
        contracts.check_ranges(2, 5, "cpu", start, end)
    with pytest.raises(ValueError, match="end must keep"):
        contracts.check_ranges(2, 5, "cpu", start, end)


def without_hints(function):
    """The parameters of a function, or "return", that have no annotation."""
    signature = inspect.signature(function)
    names = [n for n, p in signature.parameters.items() if n != "self" and p.annotation is inspect.Parameter.empty]
    return names + (["return"] if signature.return_annotation is inspect.Signature.empty else [])


def public_functions():
    """Every public function and method of the reference by its dotted name, without the checks, which take anything."""
    named = {f"dsa_ref.{name}": getattr(dsa_ref, name) for name in dsa_ref.__all__}
    for module in (cost, nn, testing, corpus, evaluate, train):
        for name, value in vars(module).items():
            if getattr(value, "__module__", "").startswith("dsa_ref") and not name.startswith("_"):
                named[f"{module.__name__}.{name}"] = value
    for name, value in named.items():
        if inspect.isfunction(value) and value.__module__ not in ("dsa_ref.contracts", "dsa_ref.arguments"):
            yield name, value
        elif inspect.isclass(value) and value.__module__.startswith("dsa_ref"):
            methods = {"__init__", *(method for method in vars(value) if not method.startswith("_"))}
            for method in methods & set(vars(value)):
                if inspect.isfunction(vars(value)[method]):
                    yield f"{name}.{method}", vars(value)[method]


def test_public_functions_have_hints():
    functions = dict(public_functions())
    assert len(functions) > 60
    assert {name: without_hints(function) for name, function in functions.items() if without_hints(function)} == {}
    assert without_hints(lambda x: x) == ["x", "return"]


def test_lightning_select_checks_and_cuts_once(monkeypatch):
    """It shares the steps' unchecked pieces; calling the public steps would check and cut each block again."""
    calls = []
    for module in ("index_scores", "select_topk"):
        for name in (f"check_{module}", "row_blocks"):
            monkeypatch.setitem(
                vars(inspect.getmodule(getattr(dsa_ref, module))), name, lambda *a, **k: calls.append(1)
            )
    q_idx, k_idx, w, k_scale = index_inputs(normal, 4, 6, 2, 8)
    assert dsa_ref.lightning_select(q_idx, k_idx, w, 3, k_scale).shape == (4, 3)
    assert not calls
    with pytest.raises(TypeError):
        dsa_ref.select_topk(normal(4, 6), 3)  # the patch bites: no blocks come back
    assert calls
