"""The training script's stages, the held-out split, and the small model that came out of it."""

import contextlib
import json
import pathlib

import pytest
import torch

from dsa_ref import TINY
from dsa_ref.nn import ModelConfig, SmallModel, load_small_model
from dsa_ref.nn.model import SMALL_MODEL
from dsa_ref.testing import overlap
from dsa_ref.training.corpus import is_held_out, library_files, load_corpus
from dsa_ref.training.evaluate import (
    attention_weights,
    held_out_loss,
    held_out_windows,
    main,
    recall_by_method,
    selected_weights,
)
from dsa_ref.training.train import STAGES, indexer_parameters, stage_loss, train_stage

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 48


def tiny_model(seed=0):
    torch.manual_seed(seed)
    fields = TINY.__dict__ | {"index_fp8": False}
    return SmallModel(ModelConfig(n_layers=2, hidden_dim=64, attention=type(TINY)(**fields)))


def tiny_corpus(bytes_=4000):
    source = pathlib.Path(contextlib.__file__).read_bytes()[:bytes_]
    return torch.frombuffer(bytearray(source), dtype=torch.uint8)


@pytest.mark.parametrize(
    "stage, moves", [("dense", (True, False)), ("warm-up", (False, True)), ("sparse", (True, True))]
)
def test_each_stage_moves_its_own_weights(stage, moves):
    """(main model, indexer); and only the losses that the stage has are logged."""
    model, rows = tiny_model(), []
    before = [[p.clone() for p in indexer_parameters(model, inside)] for inside in (False, True)]
    generator = torch.Generator().manual_seed(0)
    train_stage(model, stage, tiny_corpus(), 2, 2, LENGTH, generator, lambda *row, rows=rows: rows.append(row))
    for inside, old, moved in zip((False, True), before, moves, strict=True):
        changed = [not torch.equal(a, b) for a, b in zip(old, indexer_parameters(model, inside), strict=True)]
        assert all(changed) if moved else not any(changed)
    assert [(row[2] is not None, row[3] is not None) for row in rows] == [(stage != "warm-up", stage != "dense")] * 2


def test_both_sides_are_all_parameters():
    model = tiny_model()
    both = {id(p) for inside in (False, True) for p in indexer_parameters(model, inside)}
    assert both == {id(p) for p in model.parameters()} and len(indexer_parameters(model)) == 2 * 5
    layer = model.layers[0].self_attn
    assert {id(p) for p in indexer_parameters(layer)} == {id(p) for p in layer.indexer.parameters()}


def test_warm_up_lowers_the_indexers_loss():
    """On a model whose attention has a pattern to learn: few steps already take off a quarter."""
    model = tiny_model()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".indexer." not in name:
            parameter.data.normal_(std=0.2)
    tokens = tiny_corpus()[: 4 * (LENGTH + 1)].reshape(4, -1).long()
    before = stage_loss(model, tokens, "warm-up")[1].item()
    train_stage(model, "warm-up", tiny_corpus(), 60, 4, LENGTH, torch.Generator().manual_seed(0), lambda *row: None)
    assert stage_loss(model, tokens, "warm-up")[1].item() < 0.75 * before


def test_windows_of_a_batch_do_not_see_each_other():
    model, tokens = tiny_model(), tiny_corpus()[: 3 * (LENGTH + 1)].reshape(3, -1).long()
    for stage in STAGES:
        together = stage_loss(model, tokens, stage)
        alone = [stage_loss(model, row[None], stage) for row in tokens]
        for i in (0, 1):
            if together[i] is not None:
                assert together[i].item() == pytest.approx(sum(loss[i].item() for loss in alone) / 3, rel=1e-4)


def test_split():
    """By file name, so that every Python version holds out the same files; contextlib among them, for notebook 00."""
    root, files = library_files()
    names = [path.relative_to(root).as_posix() for path in files]
    held_out = [name for name in names if is_held_out(name)]
    assert "contextlib.py" in held_out and "heapq.py" in names and "heapq.py" not in held_out
    assert 0.03 < len(held_out) / len(names) < 0.12
    assert not any("test" in pathlib.PurePosixPath(name).parts for name in names)
    training, rest = load_corpus()
    assert len(rest) == sum((root / name).stat().st_size for name in held_out)
    assert len(training) + len(rest) == sum(path.stat().st_size for path in files)


def test_recorded_weights_are_probabilities():
    model, tokens, steps = tiny_model(), tiny_corpus(40).long(), {"dense": [], "sparse": []}
    with torch.no_grad():
        for attention, record in steps.items():
            model(tokens, attention=attention, record=record)
    weights = attention_weights(steps["dense"][0], TINY.softmax_scale)
    assert torch.allclose(weights.sum(dim=1), torch.ones(40), atol=1e-5)
    assert (weights.triu(1) == 0).all()
    for t in (3, 30):
        kept = steps["sparse"][0]["indices"][t]
        chosen = selected_weights(steps["sparse"][0], t, TINY.softmax_scale)
        assert chosen.sum().item() == pytest.approx(1, abs=1e-5) and (chosen[kept < 0] == 0).all()
    row = weights[7][steps["sparse"][0]["indices"][7].long()]  # 8 visible, 8 kept: sparse is dense there
    assert torch.allclose(row, selected_weights(steps["sparse"][0], 7, TINY.softmax_scale), atol=1e-5)


def test_shipped_model_fits_and_says_where_it_comes_from():
    assert SMALL_MODEL.stat().st_size <= 6_000_000
    record = json.loads((ROOT / "figures" / "small_model.json").read_text())
    assert {"command", "date", "torch", "device", "options"} <= record["provenance"].keys()
    assert record["provenance"]["parameters"] == sum(p.numel() for p in load_small_model().parameters())
    losses = record["held_out_loss"]
    assert abs(losses["as saved, sparse attention"] - losses["as saved, dense attention"]) < 0.02


def test_shipped_model_on_text_it_has_not_seen():
    """A held-out file of this Python: far better than guessing (ln 256 = 5.5), and the indexer beats its controls."""
    model, windows = load_small_model(), held_out_windows(tiny_corpus(8000), 1, 512)
    dense, sparse = (held_out_loss(model, windows, attention) for attention in ("dense", "sparse"))
    assert dense < 2.5 and sparse < dense + 0.1
    recall = {name: values[0] for name, values in recall_by_method(model, windows, [32]).items()}
    assert recall["random"] + 0.2 < recall["window"] + 0.03 < recall["indexer"] < recall["attention itself"]
    assert recall["indexer"] > 0.9 * recall["attention itself"]


def test_a_random_indexer_is_no_better_than_chance():
    """The recall figure can fail: with its indexers' weights drawn anew, the same model falls back to random."""
    model, windows = load_small_model(), held_out_windows(tiny_corpus(8000), 1, 512)
    generator = torch.Generator().manual_seed(0)
    for parameter in indexer_parameters(model):
        parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    recall = {name: values[0] for name, values in recall_by_method(model, windows, [32]).items()}
    assert recall["indexer"] < 0.6 * recall["attention itself"] and recall["indexer"] < recall["window"]


def test_fp8_changes_few_of_the_trained_selections():
    tokens, indices = tiny_corpus(512).long(), []
    for fp8 in (True, False):
        record = []
        load_small_model(index_fp8=fp8)(tokens, record=record)
        indices.append(record[0]["indices"][64:])  # layer 0: the same input on both sides
    assert 0.9 < overlap(*indices) < 1.0


def test_evaluate_writes_its_provenance(tmp_path):
    log = tmp_path / "recall.json"
    main(["--log", str(log), "--windows", "1", "--length", "100", "--k", "4", "16"])
    result = json.loads(log.read_text())
    assert result["k"] == [4, 16] and all(len(values) == 2 for values in result["recall"].values())
    assert result["provenance"]["command"].startswith("python -m dsa_ref.training.evaluate --log")


@pytest.mark.parametrize("stage", STAGES)
def test_a_default_device_is_for_other_things(stage):
    """Windows, training and measures stay where the corpus and the model are."""
    corpus = tiny_corpus()

    def work(device):
        model, rows, generator = tiny_model(), [], torch.Generator().manual_seed(3)
        with torch.device(device):
            train_stage(model, stage, corpus, 2, 2, 16, generator, lambda *row: rows.append(row))
            windows = held_out_windows(corpus, 2, 16)
            assert windows.device.type == "cpu"
            loss = held_out_loss(model, windows, "sparse")
            return rows, windows.tolist(), loss, recall_by_method(model, windows, [2, 4])

    assert work("meta") == work("cpu")
