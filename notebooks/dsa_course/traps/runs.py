"""What is run while a fault is planted: the trained small model in several ways, and the project's own tests."""

import contextlib
import functools
import io
import os
import pathlib
import sys
import types
from unittest import mock

import torch
from torch.nn import functional as F

import dsa_ref
from dsa_ref.indexer_loss import indexer_loss
from dsa_ref.nn.decode import SMALL_STEPS
from dsa_ref.nn.model import load_small_model

ROOT = pathlib.Path(__file__).parents[3]
CHUNK = 64  # tokens that a pass with caches takes at once
PADDED = 32  # rows of padding, all zeros, in the way of that name


def merged_halves(q, kv, indices, scale, v_dim):
    """Attention over each half of the selected keys, merged by the halves' natural log-sum-exp, as serving does."""
    half = indices.shape[1] // 2
    parts = [dsa_ref.sparse_attention(q, kv, part, scale, v_dim) for part in (indices[:, :half], indices[:, half:])]
    lse = torch.stack([lse for _, lse in parts])
    shares = lse.softmax(dim=0)[..., None]  # of each half in the whole row; the first half is never empty
    return (torch.stack([out for out, _ in parts]) * shares).sum(dim=0), lse.logsumexp(dim=0)


def select_from_bf16(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
    """Scores rounded to bf16 before the selection, as kernels do that store them: equal scores become common."""
    scores = dsa_ref.index_scores(q_idx, k_idx, w, k_scale, start, end)
    return dsa_ref.select_topk(scores.bfloat16(), k, start, end)


WAYS = {  # name -> (steps that replace the reference's own, fields of DSAConfig)
    "one pass": ({}, {}),
    "chunks": ({}, {}),
    "merge": ({"sparse_attention": merged_halves}, {}),
    "bf16 scores": ({"lightning_select": select_from_bf16}, {}),
    "padding": ({}, {}),
    "indexer loss": ({}, {"index_fp8": False}),
}


class Ops(types.SimpleNamespace):
    """Some steps of its own, all others those of the reference, looked up when they are called.

    It has none of the steps that do several at once, so that a layer calls those that traps replace.
    """

    def __getattr__(self, name):
        if name in SMALL_STEPS:
            raise AttributeError(name)
        return getattr(dsa_ref, name)


@functools.cache
def _model(way):
    steps, fields = WAYS[way]
    model = load_small_model(ops=Ops(**steps), **fields)
    if way == "padding":
        model.embed.weight[0] = 0.0  # byte 0, which no text holds
    return model


@torch.no_grad()
def read(tokens, way="one pass"):
    """Run the trained small model over tokens int64 [n + 1], each predicting the next.

    Returns (one selection int32 [n, k] a layer, the loss in nats a byte; the indexer's KL in nats for "indexer loss").
    Ways: "one pass"; "chunks", 64 tokens at a time with caches; "merge", attention over two halves of the selection;
    "bf16 scores", rounded before the selection; "padding", 32 zero rows at the end, not counted.
    """
    model, n = _model(way), len(tokens) - 1
    inputs = tokens[:-1] if way != "padding" else F.pad(tokens[:-1], (0, PADDED))
    size, caches = (CHUNK, model.new_caches(n)) if way == "chunks" else (len(inputs), None)
    logits, steps = [], []
    for chunk in inputs.split(size):
        record = []
        logits.append(model(chunk, caches=caches, record=record))
        steps.append(record)
    selections = [torch.cat([step["indices"] for step in layer])[:n] for layer in zip(*steps, strict=True)]
    if way == "indexer loss":
        scale = model.config.attention.softmax_scale
        losses = [indexer_loss(s["q_idx"], s["k_idx"], s["w"], s["q"], s["kv"], scale, s["indices"]) for s in steps[0]]
        return selections, float(torch.stack(losses).mean())
    return selections, float(F.cross_entropy(torch.cat(logits)[:n], tokens[1:]))


def run_tests(nodes) -> dict:
    """Run tests of this project here and now: {node id: "passed", or the failure's first line}. Needs pytest.

    Raises: RuntimeError for a node id that is not one test that runs.
    """
    import pytest

    ran = {}

    class Listener:
        def pytest_runtest_logreport(self, report):
            if report.failed:
                ran[report.nodeid] = report.longrepr.reprcrash.message.splitlines()[0]
            elif report.when == "call" and report.passed:
                ran.setdefault(report.nodeid, "passed")

    nodes = list(dict.fromkeys(nodes))
    arguments = ["-q", "-p", "no:cacheprovider", "--capture=sys", f"--rootdir={ROOT}"]
    alone = {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_ADDOPTS": ""}
    output = io.StringIO()
    known = _forget_tests()  # a test module keeps the names that it imported: it must import them as they are now
    with mock.patch.dict(os.environ, alone), contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        pytest.main([*(str(ROOT / node) for node in nodes), *arguments], plugins=[Listener()])
    _forget_tests()
    sys.modules.update(known)  # whoever calls this may be a test itself
    if sorted(ran) != sorted(nodes):
        raise RuntimeError(f"caught_by must name one test that runs, got {nodes}:\n{output.getvalue()}")
    return ran


def _forget_tests() -> dict:
    """Take the modules of tests out of sys.modules: {name: module}."""
    tests = str(ROOT / "tests")
    names = [
        name for name, module in sys.modules.items() if (getattr(module, "__file__", None) or "").startswith(tests)
    ]
    return {name: sys.modules.pop(name) for name in names}
