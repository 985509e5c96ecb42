"""A model decodes from pages what it reads at once, and a step that fails changes nothing in any layer."""

import pytest
import torch
from inputs import assert_close, paged_contents

from dsa_ref import TINY, PageTable
from dsa_ref.nn import ModelConfig, SmallModel

pytestmark = pytest.mark.rungs("reference", "kernels")
PAGE = 5


def make_model(ops, device, n_layers=3):
    torch.manual_seed(0)
    model = SmallModel(ModelConfig(n_layers, 96, attention=TINY), ops).requires_grad_(False)
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.normal_(std=0.2)
    return model.to(device)


def bytes_of(seed, count, device):
    return torch.randint(256, (count,), generator=torch.Generator().manual_seed(seed)).to(device)


def read(model, caches, sequence, text):
    return model(text, caches=[cache.sequence(sequence) for cache in caches])


@pytest.mark.parametrize("N", (1, 3))
def test_a_model_decodes_what_it_reads(ops, device, N):
    model = make_model(ops, device, n_layers=2)
    table, caches = model.new_paged_caches(30, 3, 40, PAGE)
    texts = [bytes_of(i, length + 2 * N, device) for i, length in enumerate((4, 11))]
    rows = [table.new() for _ in texts]
    for row, text in zip(rows, texts, strict=True):
        read(model, caches, row, text[: -2 * N])
    record, got = [], []
    for i in (2 * N, N):
        new = torch.stack([text[len(text) - i : len(text) - i + N] for text in texts])
        got.append(model.decode(new, table, caches, rows, record))
    assert len(record) == 4 and [table.length(row) for row in rows] == [4 + 2 * N, 11 + 2 * N]
    for b, text in enumerate(texts):
        assert_close(torch.cat([step[b] for step in got]), model(text)[-2 * N :], 1e-3)


def test_a_model_s_failed_step_changes_nothing(ops, device, monkeypatch):
    model = make_model(ops, device)
    table, caches = model.new_paged_caches(8, 3, 40, PAGE)
    text = bytes_of(0, 12, device)
    row, other, record = table.new(), table.new(), []
    read(model, caches, row, text[:9])
    wanted = model(text)[9:]
    before = [paged_contents(cache) for cache in caches]

    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(model.layers[1], "decode", interrupted)
    with pytest.raises(KeyboardInterrupt):
        model.decode(text[None, 9:], table, caches, [row], record)
    monkeypatch.undo()
    assert [paged_contents(cache) for cache in caches] == before and record == []
    for error, change, message in (
        (ValueError, {"sequences": [row, other]}, "tokens must be those of 2 sequences, got shape \\[1, 3\\]"),
        (ValueError, {"tokens": text[None, :5]}, "tokens must have at most N = 4"),
        (ValueError, {"tokens": text[9:]}, "tokens must have shape \\[B, N\\]"),
        (TypeError, {"tokens": text[None, 9:].int()}, "tokens must have dtype int64"),
        (ValueError, {"caches": caches[:2]}, "caches must be 3 distinct ones, one a layer, got 2"),
        (ValueError, {"caches": [caches[0]] * 3}, "caches must be 3 distinct ones, one a layer, got 1"),
        (TypeError, {"caches": model.new_caches(4)}, "caches must be a list of PagedCache"),
        (TypeError, {"table": table.table}, "table must be a PageTable, got Tensor"),
        (ValueError, {"table": PageTable(2, 2, 9, PAGE, device)}, "caches must be in the pages of table"),
        (ValueError, {"sequences": [2]}, "sequence must be one that new or fork gave"),
    ):
        given = {"tokens": text[None, 9:], "table": table, "caches": caches, "sequences": [row], "record": record}
        with pytest.raises(error, match=message):
            model.decode(**given | change)
        assert [paged_contents(cache) for cache in caches] == before and record == []
    assert_close(model.decode(text[None, 9:], table, caches, [row], record)[0], wanted, 1e-3)
