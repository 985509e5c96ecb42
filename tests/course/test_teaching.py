"""Notebook 13: the open layer is the model's own, the lesson teaches, and the pictures show what was selected."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from dsa_course.teaching.check_record import verdict_of
from dsa_course.teaching.layer import LAYER, START, OpenLayer, lesson_loss_of
from dsa_course.teaching.lesson import FILES, TEXT, Watch, forget, windows
from dsa_course.teaching.live import bumps, lesson_chart, live_directions, live_lesson, one_bump
from dsa_course.teaching.live_record import GROUPS, live_regimes
from dsa_ref.index_scores import index_scores
from dsa_ref.indexer_loss import indexer_loss
from dsa_ref.nn import load_small_model
from dsa_ref.testing import relative_error
from dsa_ref.training.corpus import is_held_out
from dsa_ref.training.results import read_runs

K = 16


def recorded(model, tokens, attention="dense"):
    record = []
    with torch.no_grad():
        logits = model(tokens, attention=attention, record=record)
    return record, logits


# ---------------------------------------------------------------------------------------------------------- the layer


@pytest.fixture(scope="module")
def opened():
    """(an OpenLayer, its h, latent, q and kv, and what the small model with the same indexers records of the bytes)."""
    layer, model = OpenLayer(seed=3), load_small_model(index_fp8=False)
    forget(model, seed=3)
    record, logits = recorded(model, torch.tensor(list(TEXT[START : START + 64])))
    h = layer.normed(layer.x)
    latent = layer.latent(h)
    return layer, h, latent, *layer.attention_side(h, latent), record[LAYER], logits


def test_the_open_layer_computes_what_the_model_does(opened):
    layer, h, latent, q, kv, step, logits = opened
    assert relative_error(q.detach(), step["q"]) < 1e-5 and relative_error(kv.detach(), step["kv"]) < 1e-5
    scores = layer.scores(h, latent)
    right = index_scores(step["q_idx"], step["k_idx"], step["w"])
    assert torch.equal(scores.isinf(), right.isinf())
    assert (scores - right).masked_fill(right.isinf(), 0.0).abs().max() < 1e-4 * right[right.isfinite()].abs().max()
    for indices in (None, layer.select(scores, 8)):
        got = layer.kl(layer.target(q, kv, indices), scores, indices)
        scale = load_small_model().config.attention.softmax_scale
        wanted = indexer_loss(step["q_idx"], step["k_idx"], step["w"], step["q"], step["kv"], scale, indices)
        assert abs(float(got.detach()) - float(wanted)) < 1e-5
    after = torch.tensor(list(TEXT[START + 1 : START + 65]))
    language = layer.language(layer.x, q, kv)
    assert abs(float(language.detach()) - float(F.cross_entropy(logits, after))) < 1e-4


def test_the_open_layer_detaches_nothing_and_its_right_loss_does(opened):
    layer, h, latent, q, kv, *_ = opened
    leaking = torch.autograd.grad(
        layer.kl(layer.target(q, kv), layer.scores(h, latent)), list(layer.trunk.values())[:5]
    )
    assert all(gradient.any() and gradient.isfinite().all() for gradient in leaking)
    fresh = OpenLayer()
    lesson_loss_of(fresh, "warm-up", 8).backward()
    moved = {name for name, gradient in fresh.gradients().items() if gradient.any()}
    assert moved == set(fresh.indexer)


# --------------------------------------------------------------------------------------------------------- the lesson


def test_it_learns_from_other_files_than_it_is_judged_on():
    assert len(windows(2, 40)) == 2 and windows(2, 40).shape == (2, 40)
    assert torch.equal(windows(3, 20, seed=1), windows(3, 20, seed=1))
    assert not torch.equal(windows(3, 20, seed=1), windows(3, 20, seed=2))
    assert is_held_out("contextlib.py") and not any(map(is_held_out, FILES))


def test_forget_touches_the_indexers_alone_and_all_of_them():
    model, old = load_small_model(), load_small_model().state_dict()
    forget(model, seed=1)
    changed = {name for name, weight in model.state_dict().items() if not torch.equal(weight, old[name])}
    assert changed == {name for name in old if ".indexer." in name} and len(changed) == 20
    again = load_small_model()
    forget(again, seed=1)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))


@pytest.fixture(scope="module")
def seen():
    """What a random scout knows, and the trained one, of byte 363."""
    scouts = load_small_model(index_fp8=False), load_small_model(index_fp8=False)
    forget(scouts[0])
    return [Watch(scout, 363, K)(step) for step, scout in enumerate(scouts)]


def test_what_is_known_at_a_step(seen):
    before, after = seen
    record, _ = recorded(load_small_model(index_fp8=False), torch.tensor(list(TEXT)))
    scale = load_small_model().config.attention.softmax_scale
    for layer, s in enumerate(record):
        loss = float(indexer_loss(s["q_idx"], s["k_idx"], s["w"], s["q"], s["kv"], scale))
        assert abs(after["kl"][layer] - loss) < 1e-4 < before["kl"][layer] - loss
        assert after["recall"][layer] > before["recall"][layer]
        assert torch.allclose(after["attention"][layer], before["attention"][layer])  # the model stays as it is
        for one in seen:
            assert one["selected"][layer].shape == (K,) and one["selected"][layer].max() <= 363
            assert abs(float(one["guess"][layer].sum()) - 1) < 1e-4


def test_a_watch_sees_what_has_been_learnt_meanwhile(seen):
    model = load_small_model(index_fp8=False)
    watch = Watch(model, 363, K)
    forget(model)
    assert watch(1)["recall"] == seen[0]["recall"] != seen[1]["recall"]
    assert not any(block.self_attn.indexer._forward_pre_hooks for block in model.layers)


# ------------------------------------------------------------------------------------------------------- the pictures


def test_the_picture_of_a_lesson_says_what_is_selected_and_what_is_missed(seen):
    figure = live_lesson(TEXT, 363, seen, layer=2)
    for step, one in enumerate(seen):
        figure.children[0].value = step
        data = figure.data
        assert data["selected"] == one["selected"][2].tolist()
        assert data["recall"] == pytest.approx(float(one["attention"][2][data["selected"]].sum()))
        assert data["found"] == [key in data["selected"] for key in data["looked"]]
        assert data["weights"] == sorted(data["weights"], reverse=True)
        assert f"hold {data['recall']:.0%} of the attention" in figure.alt
    old = figure.png
    figure.children[1].value = 3
    assert figure.png != old and figure.data["layer"] == 3


def test_the_chart_has_every_layer_and_their_mean(seen):
    figure = lesson_chart(seen, K, {"the 16 with the most": 0.6, "random keys": 0.1})
    left, right = figure.axes
    assert [line.get_label() for line in left.lines] == ["layer 0", "layer 1", "layer 2", "layer 3", "mean"]
    assert right.lines[4].get_ydata().tolist() == pytest.approx([np.mean(one["recall"]) for one in seen])


def test_the_reversed_kl_gives_up_a_peak_and_ours_does_not():
    for distance in range(17):
        assert bumps(distance).sum() == pytest.approx(1) and bumps(distance).argmax() <= 15
        assert all(guess.sum() == pytest.approx(1) for guess in one_bump(bumps(distance)).values())
    figure = live_directions(4)
    ours, reversed_ = figure.data["recall"].values()
    assert min(ours, reversed_) > 0.95
    figure.children[0].value = 8
    ours, reversed_ = figure.data["recall"].values()
    assert ours > 0.95 and reversed_ < 0.55
    assert "98%" in figure.alt and "51%" in figure.alt


# --------------------------------------------------------------------------------------------------------- the record


def a_run(seed, dsa=1.1):
    """Figures made by hand: two windows, parts of 8, 8 and 16 places, of the regimes that one picture needs."""
    losses = [[5.0, 1.0, 2.0], [5.0, 2.0, 4.0]]

    def entry(ratio, found, kept=None):
        above = [[first, second, ratio * third] for first, second, third in losses]
        entry = {"loss": above, "needles": {"asked": [4, 2], "found": found}, "stages": []}
        return entry | ({"recall": {"after": {"kept": [kept, kept], "most": [0.8, 0.4]}}} if kept else {})

    curve = [
        {"step": 1, "kept": [0.2], "most": [0.8]},
        {"step": 2},
        {"step": 3, "kept": [0.4 + 0.2 * seed], "most": [0.8]},
    ]
    regimes = {"dense": entry(1.0, [4, 2]), "DSA": entry(dsa, [3, 1], 0.4), "no relu": entry(1.0, [4, 1], 0.2)}
    regimes["DSA"]["stages"] = [{"stage": "warm-up", "curve": curve}, {"stage": "sparse", "curve": [{"step": 1}]}]
    regimes["one head"] = entry(1.5, [2, 1], 0.32)
    return {"seed": seed, "edges": [0, 8, 16, 32], "regimes": regimes}


def test_the_picture_of_the_record_has_what_is_recorded():
    figure = live_regimes([a_run(0), a_run(1, dsa=1.3)], group="other indexers")
    data = figure.data
    assert data["ends"] == [8, 16, 32]
    assert data["above"]["DSA"] == [pytest.approx([0, 0]), pytest.approx([0, 0]), pytest.approx([10, 30])]
    assert data["above"]["one head"][2] == pytest.approx([50, 50]) and "DSA" in data["kept"]
    assert data["found"] == {"DSA": [0.75, 0.5], "one head": [0.5, 0.5], "no relu": [1.0, 0.5], "dense": [1.0, 1.0]}
    assert data["kept"]["DSA"] == pytest.approx({1: 0.25, 3: 0.625, "end": 0.75})
    assert data["kept"]["one head"] == pytest.approx({"end": 0.6})
    assert "DSA +20.0 %" in figure.alt and "one head 50%" in figure.alt and "no relu 38%" in figure.alt


def test_the_record_of_this_repository_has_all_that_can_be_chosen():
    figure = live_regimes(read_runs())
    pictures = set()
    for group, names in GROUPS.items():
        figure.children[0].value = group
        assert list(figure.data["above"]) == ["DSA", *names] and list(figure.data["found"])[-1] == "dense"
        pictures.add(figure.png)
    assert len(pictures) == len(GROUPS)


def test_the_verdict_is_that_of_numbers_with_a_known_answer():
    assert verdict_of([1.02, 1.03], [0.001, 0.001]) == 1 and verdict_of([0.9, 0.95], [0.01, 0.02]) == -1
    assert verdict_of([1.02], [0.001]) == 0 == verdict_of([1.02, 1.001], [0.001, 0.001])
