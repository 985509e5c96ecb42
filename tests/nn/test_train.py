"""The training script's stages, the held-out split, and the small model that came out of it."""

import contextlib
import functools
import json
import pathlib
import types

import pytest
import torch

import dsa_ref
from dsa_ref import TINY
from dsa_ref.indexer_loss import indexer_loss_loops
from dsa_ref.nn import ModelConfig, SmallModel, load_small_model
from dsa_ref.nn.model import SMALL_MODEL
from dsa_ref.testing import overlap
from dsa_ref.training.corpus import held_out_windows, is_held_out, library_files, load_corpus
from dsa_ref.training.data import Data
from dsa_ref.training.evaluate import (
    attention_weights,
    held_out_loss,
    main,
    recall_by_method,
    selected_weights,
)
from dsa_ref.training.loop import train_stage
from dsa_ref.training.needle import needle_windows, needles_found
from dsa_ref.training.optimizer import LARGEST_NORM, MasterAdamW, learning_rate, master_weights
from dsa_ref.training.regimes import window_ops
from dsa_ref.training.stages import STAGES, indexer_parameters, stage_backward, stage_loss

ROOT = pathlib.Path(__file__).parents[2]
LENGTH = 48


def tiny_model(seed=0, ops=dsa_ref):
    torch.manual_seed(seed)
    fields = TINY.__dict__ | {"index_fp8": False}
    return SmallModel(ModelConfig(n_layers=2, hidden_dim=64, attention=type(TINY)(**fields)), ops)


def looking_model(seed=0, ops=dsa_ref):
    """Its attention has a pattern: weights so large that some keys matter more than others."""
    model = tiny_model(seed, ops)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".indexer." not in name:
            parameter.data.normal_(std=0.2)
    return model


def tiny_corpus(bytes_=4000):
    source = pathlib.Path(contextlib.__file__).read_bytes()[:bytes_]
    return torch.frombuffer(bytearray(source), dtype=torch.uint8)


def windows(stage, batch=2, length=LENGTH):
    return functools.partial(Data(tiny_corpus(), length, batch).windows, stage)


def gradients(model, inside):
    """Of the indexers' parameters or of all others, in fp32."""
    return [None if p.grad is None else p.grad.clone() for p in indexer_parameters(model, inside)]


@pytest.mark.parametrize(
    "stage, moves", [("dense", (True, False)), ("warm-up", (False, True)), ("sparse", (True, True))]
)
def test_each_stage_moves_its_own_weights(stage, moves):
    """(main model, indexer); and only the losses that the stage has are logged."""
    model, rows = tiny_model(), []
    before = [[p.clone() for p in indexer_parameters(model, inside)] for inside in (False, True)]
    train_stage(model, stage, windows(stage), 2, after=lambda _, losses: rows.append(losses))
    for inside, old, moved in zip((False, True), before, moves, strict=True):
        changed = [not torch.equal(a, b) for a, b in zip(old, indexer_parameters(model, inside), strict=True)]
        assert all(changed) if moved else not any(changed)
        assert all(parameter.requires_grad == moved for parameter in indexer_parameters(model, inside))
    assert [(row[0] is not None, row[1] is not None) for row in rows] == [(stage != "warm-up", stage != "dense")] * 2


def test_both_sides_are_all_parameters():
    model = tiny_model()
    both = {id(p) for inside in (False, True) for p in indexer_parameters(model, inside)}
    assert both == {id(p) for p in model.parameters()} and len(indexer_parameters(model)) == 2 * 5
    layer = model.layers[0].self_attn
    assert {id(p) for p in indexer_parameters(layer)} == {id(p) for p in layer.indexer.parameters()}


def test_warm_up_lowers_the_indexers_loss():
    """On a model whose attention has a pattern to learn: few steps already take off a quarter."""
    model, tokens = looking_model(), windows("seen", 4)(0)
    before = stage_loss(model, tokens, "warm-up")[1].item()
    train_stage(model, "warm-up", windows("warm-up", 4), 60)
    assert stage_loss(model, tokens, "warm-up")[1].item() < 0.75 * before


@pytest.mark.parametrize("stage, own", [("warm-up", False), ("warm-up", True), ("sparse", False)])
def test_the_indexers_loss_is_that_of_the_report(stage, own):
    """Against the loops, layer by layer: the direction of the KL, its keys, what a row sees, the mean over layers."""
    model, tokens, record = looking_model(), windows("seen", 1)(0), []
    with torch.no_grad():
        loss = stage_loss(model, tokens, stage, own_selection=own)[1].item()
        model(tokens[0, :-1], attention="sparse" if stage == "sparse" else "dense", record=record)
        wanted = {}
        for keys in ("all", "selected"):
            losses = []
            for step in record:
                scored, indices = [step[name] for name in ("q_idx", "k_idx", "w")], None
                if keys == "selected":
                    indices = dsa_ref.lightning_select(*scored, TINY.index_topk).numpy()
                arrays = [tensor.double().numpy() for tensor in (*scored, step["q"], step["kv"])]
                losses.append(indexer_loss_loops(*arrays, TINY.softmax_scale, indices))
            wanted[keys] = sum(losses) / len(losses)
    right, other = ("selected", "all") if own or stage == "sparse" else ("all", "selected")
    assert loss == pytest.approx(wanted[right], rel=1e-4) and loss != pytest.approx(wanted[other], rel=0.05)


@pytest.mark.parametrize("stage", STAGES)
def test_each_side_learns_from_its_own_loss(stage):
    """What the backward pass of a step leaves is the gradient of the one loss alone, in full, and of the other none."""
    model, tokens = looking_model(), windows("seen")(0)
    MasterAdamW(model, master_weights(model), stage, 1)  # freezes what the stage does not train
    given = stage_backward(model, tokens, stage, share=0.25)
    got = {inside: gradients(model, inside) for inside in (False, True)}
    losses = stage_loss(model, tokens, stage)
    for inside, loss, value in zip((False, True), losses, given, strict=True):
        if loss is None:
            assert value is None and got[inside] == [None] * len(got[inside])
            continue
        assert value.item() == pytest.approx(0.25 * loss.item(), rel=1e-5)
        wanted = torch.autograd.grad(loss, indexer_parameters(model, inside), retain_graph=True)
        for mine, alone in zip(got[inside], wanted, strict=True):
            assert alone.abs().max() > 0
            assert torch.allclose(mine, 0.25 * alone, rtol=1e-3, atol=1e-5 * alone.abs().max().item())


def test_the_target_comes_out_of_attentions_backward_pass():
    """With ops that hand it on, the indexer's loss gets it in place of q and kv; others give the same gradients."""
    given, tokens = [], windows("seen")(0)

    def watched(*arguments, **named):
        given.append([argument is None for argument in arguments[3:6]] + [named.get("target") is None])
        return dsa_ref.indexer_loss(*arguments, **named)

    def without_probe(q, kv, indices, scale, v_dim):
        return dsa_ref.sparse_attention(q, kv, indices, scale, v_dim)

    got = []
    for change in ({}, {"sparse_attention": without_probe}):
        model = looking_model(ops=types.SimpleNamespace(**vars(dsa_ref) | {"indexer_loss": watched} | change))
        stage_backward(model, tokens, "sparse")
        got.append([*gradients(model, False), *gradients(model, True)])
    assert given == [[True, True, True, False]] * 2 + [[False, False, False, True]] * 2
    for one, other in zip(*got, strict=True):
        assert torch.allclose(one, other, rtol=1e-3, atol=1e-5 * other.abs().max().item())


@pytest.mark.parametrize("stage", STAGES)
def test_micro_batches_change_nothing(stage):
    """Also where they are not of one size, so that their means must be weighed."""
    models, told = [looking_model(), looking_model()], [[], []]
    for model, at_once, rows in zip(models, (None, 2 * LENGTH), told, strict=True):
        train_stage(
            model, stage, windows(stage, 3), 3, at_once=at_once, after=lambda _, losses, rows=rows: rows.append(losses)
        )
    for one, other in zip(*told, strict=True):
        assert [x if x is None else pytest.approx(x.item(), rel=1e-5) for x in one] == list(other)
    for a, b in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.allclose(a, b, rtol=1e-3, atol=1e-5)


def test_micro_batches_are_whole_windows_of_at_most_so_many_tokens():
    for at_once, sizes in ((None, [3]), (10**20, [3]), (3 * LENGTH, [3]), (3 * LENGTH - 1, [2, 1]), (1, [1, 1, 1])):
        model, parts = tiny_model(), []

        def watched(model, part, stage, share, parts=parts):
            parts.append((len(part), share))
            return stage_backward(model, part, stage, share)

        train_stage(model, "dense", windows("dense", 3), 1, at_once=at_once, backward=watched)
        assert parts == [(size, size / 3) for size in sizes]


def test_a_bf16_model_learns_from_steps_that_bf16_cannot_hold():
    """Its weights are the fp32 masters, rounded: beside 1, bf16 loses a step of 2e-6, and 600 of them it must not."""
    model = tiny_model().bfloat16()
    optimizer = MasterAdamW(model, master_weights(model), "dense", 3, peak=2e-6)
    train_stage(model, "dense", windows("dense"), 3, optimizer)
    assert (model.norm.weight == 1).all() and (optimizer.masters["norm.weight"] != 1).all()
    with torch.no_grad():
        optimizer.masters["norm.weight"] += 2.0**-7
    optimizer = MasterAdamW(model, optimizer.masters, "dense", 3, peak=2e-6)
    assert (model.norm.weight == 1 + 2.0**-7).all()
    for name, parameter in model.named_parameters():
        master = optimizer.masters[name]
        assert master.dtype == torch.float32 and torch.equal(parameter, master.bfloat16())


def test_an_optimizer_goes_on_where_another_stopped():
    models, moments = [tiny_model(), tiny_model(), tiny_model()], {}
    for model, until in zip(models, (5, 3), strict=False):
        optimizer = MasterAdamW(model, master_weights(model), "dense", 5)
        data = windows("dense")
        while optimizer.done < until:
            stage_backward(model, data(optimizer.done), "dense")
            optimizer.add_gradients()
            optimizer.step()
        moments = optimizer.moments()
    later = MasterAdamW(models[2], optimizer.masters, "dense", 5)
    later.restore(3, moments)
    train_stage(models[2], "dense", windows("dense"), 5, later)
    assert all(torch.equal(a, b) for a, b in zip(models[0].parameters(), models[2].parameters(), strict=True))


def test_gradients_add_up_in_fp32():
    model = tiny_model().bfloat16()
    optimizer = MasterAdamW(model, master_weights(model), "dense", 1)
    for value in (1.0, 2.0**-9):
        model.norm.weight.grad = torch.full_like(model.norm.weight, value)
        optimizer.add_gradients()
    assert (optimizer.masters["norm.weight"].grad == 1 + 2.0**-9).all()  # bf16 would round it to 1


def test_gradients_of_each_side_are_bounded(monkeypatch):
    model, norms = tiny_model(), []
    optimizer = MasterAdamW(model, master_weights(model), "sparse", 1)
    for i, inside in enumerate((False, True)):
        for parameter in indexer_parameters(model, inside):
            parameter.grad = torch.full_like(parameter, 10.0 ** (2 * i))
    optimizer.add_gradients()
    monkeypatch.setattr(optimizer.adam, "step", lambda: norms.extend(
        torch.stack([m.grad.norm() for m in group["params"]]).norm().item() for group in optimizer.adam.param_groups
    ))  # fmt: skip
    optimizer.step()
    assert norms == [pytest.approx(LARGEST_NORM, rel=1e-3)] * 2


def test_the_rate_rises_and_falls():
    rates = [learning_rate(step, 100, 2.0) for step in range(101)]
    assert rates[0] == pytest.approx(0.4) and max(rates) == rates[4] < 2 and rates[100] == pytest.approx(0.2)
    assert rates[4:] == sorted(rates[4:], reverse=True) and learning_rate(0, 1, 2.0) == 2


def test_another_selection_can_take_the_indexers_place():
    """What a comparison does: only `lightning_select` is another one."""
    calls = []

    def first_keys(q_idx, k_idx, w, k, k_scale=None, start=None, end=None):
        calls.append(k)
        places = torch.arange(k, dtype=torch.int32) + start[:, None]
        rows = torch.arange(len(q_idx), dtype=torch.int32)
        return torch.where(places <= rows[:, None], places, -1)

    ops = types.SimpleNamespace(**vars(dsa_ref))
    ops.lightning_select = first_keys
    losses = []
    for given in (dsa_ref, ops):
        model = looking_model(ops=given)
        train_stage(model, "sparse", windows("sparse"), 2, after=lambda _, pair: losses.append(pair[0].item()))
    assert calls == [TINY.index_topk] * 4 and losses[0] != losses[2]


def test_an_optimizer_of_another_stage_is_refused():
    model = tiny_model()
    optimizer = MasterAdamW(model, master_weights(model), "dense", 2)
    for stage, steps in (("sparse", 2), ("dense", 3)):
        with pytest.raises(ValueError, match=f"made for {steps} steps of {stage}, got one for 2 steps of dense"):
            train_stage(model, stage, windows(stage), steps, optimizer)
    with pytest.raises(ValueError, match="stage must be one of"):
        stage_loss(model, windows("dense")(0), "thaw")


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
    assert SMALL_MODEL.stat().st_size <= 8_000_000
    record = json.loads((ROOT / "figures" / "small_model.json").read_text())
    assert {"command", "date", "torch", "device", "options"} <= record["provenance"].keys()
    assert record["provenance"]["parameters"] == sum(p.numel() for p in load_small_model().parameters())
    losses = record["after"]["saved"]["held_out_loss"]
    assert losses["sparse"] / losses["dense"] < 1.005


def test_shipped_model_finds_what_a_window_has_lost():
    """Values that were said more than k = 64 bytes before they are asked for: the indexer selects them."""
    windows, places = needle_windows(tiny_corpus(8000), 2, 1024, 5, least=65)
    found = sum(needles_found(load_small_model(), windows, places, "sparse"), [])
    assert len(found) == 10 and sum(found) >= 9
    lost = sum(needles_found(load_small_model(ops=window_ops(dsa_ref, 0)), windows, places, "sparse"), [])
    assert sum(lost) == 0


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

    def work(device):
        model, rows = tiny_model(), []
        with torch.device(device):
            train_stage(model, stage, windows(stage, 2, 16), 2, after=lambda _, losses: rows.append(losses))
            held_out = held_out_windows(tiny_corpus(), 2, 16)
            assert held_out.device.type == "cpu"
            loss = held_out_loss(model, held_out, "sparse")
            return rows, held_out.tolist(), loss, recall_by_method(model, held_out, [2, 4])

    assert work("meta") == work("cpu")
