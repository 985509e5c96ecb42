"""Every line of Python in PEERS.md runs and holds, and every other package's convention there has a source."""

import importlib
import pathlib
import re

import pytest
import rungs
import torch

PAGE = (pathlib.Path(__file__).parents[1] / "PEERS.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


def test_the_pages_code_holds():
    torch.manual_seed(0)
    names = {}
    for block in BLOCKS:
        exec(compile(block, "PEERS.md", "exec"), names)
    assert len(BLOCKS) > 20


@pytest.mark.parametrize("block", BLOCKS[1:])
def test_each_block_asserts_something(block):
    assert "assert " in block


def test_every_source_is_used_and_listed():
    body, _, listed = PAGE.partition("## Where this was read")
    body = re.sub(r"```python.*?```", "", body, flags=re.DOTALL)
    used = {int(n) for group in re.findall(r"\[(\d(?:, \d)*)\]", body) for n in group.split(", ")}
    assert used == {int(n) for n in re.findall(r"^(\d)\. \[", listed, re.M)}


REFUSED = {
    "an index of S": lambda ops, q, kv: ops.sparse_attention(q, kv, torch.tensor([[0, 3]], dtype=torch.int32), 1.0, 4),
    "an index of -2": lambda ops, q, kv: ops.sparse_attention(
        q, kv, torch.tensor([[0, -2]], dtype=torch.int32), 1.0, 4
    ),
    "a key twice": lambda ops, q, kv: ops.sparse_attention(q, kv, torch.tensor([[1, 1]], dtype=torch.int32), 1.0, 4),
    "int64": lambda ops, q, kv: ops.sparse_attention(q, kv, torch.tensor([[0, 1]]), 1.0, 4),
    "a range past S": lambda ops, q, kv: ops.select_topk(
        torch.ones(1, 3), 1, torch.tensor([0], dtype=torch.int32), torch.tensor([4], dtype=torch.int32)
    ),
    "NaN": lambda ops, q, kv: ops.select_topk(torch.full((1, 3), torch.nan), 1),
    "k = 0": lambda ops, q, kv: ops.select_topk(torch.ones(1, 3), 0),
    "S = 0": lambda ops, q, kv: ops.sparse_attention(q, kv[:0], torch.tensor([[-1]], dtype=torch.int32), 1.0, 4),
    "five queries a sequence": lambda ops, q, kv: ops.paged_sparse_attention(
        q.expand(1, 5, 2, 8), kv[None], torch.full((1, 5, 1), -1, dtype=torch.int32), 1.0, 4
    ),
    "a batch": lambda ops, q, kv: ops.sparse_attention(q[None], kv[None], torch.zeros(1, 1, 1).int(), 1.0, 4),
}


@pytest.mark.parametrize("what", REFUSED)
@pytest.mark.parametrize("package", ("dsa_ref", "dsa_kernels") if rungs.has_triton() else ("dsa_ref",))
def test_what_the_page_calls_refused_is(what, package, device):
    ops = importlib.import_module(package)
    q, kv = torch.randn(1, 2, 8, device=device), torch.randn(3, 8, device=device)
    with torch.device(device), pytest.raises((ValueError, TypeError)):
        REFUSED[what](ops, q, kv)
