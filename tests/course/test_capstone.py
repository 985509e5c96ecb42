"""Notebook 16: selections obey the contract, the plain layer is the layer, and its pictures show what was measured."""

import numpy as np
import pytest
import torch

from dsa_course.capstone.ablate import METHODS, ablate, byte_losses, paired, read, selection, trained, write
from dsa_course.capstone.check_claim import VERDICTS, made_up
from dsa_course.capstone.layer import layer, layer_inputs, unseen_text
from dsa_course.capstone.live import live_losses, live_methods, per_byte
from dsa_course.capstone.page import GAP, half_page
from dsa_ref.nn.model import load_small_model
from dsa_ref.testing import attention_recall, relative_error
from dsa_ref.training.evaluate import attention_weights

TEXT = unseen_text(0, 96)
K = 8


@pytest.mark.parametrize("method", METHODS)
def test_a_selection_keeps_k_visible_keys_each_once(method):
    _, steps = read(TEXT, method, K)
    assert len(steps) == 4
    for step in steps:
        for t, row in enumerate(step["indices"].tolist()):
            kept = [s for s in row if s >= 0]
            assert len(row) == K and len(kept) == len(set(kept)) == min(K, t + 1) and max(kept) <= t


def test_the_indexer_and_dense_are_the_models_own():
    model = load_small_model(index_topk=K)
    with torch.no_grad():
        assert torch.equal(read(TEXT, "indexer", K)[0], model(TEXT))
        assert torch.equal(read(TEXT, "dense", None)[0], model(TEXT, attention="dense"))


def test_the_oracle_has_the_largest_recall_that_any_selection_can_have():
    """In the first layer, whose input is the same for all."""
    _, dense = read(TEXT, "dense", None)
    weights = attention_weights(dense[0], trained()[0].config.attention.softmax_scale)
    recall = {method: attention_recall(weights, read(TEXT, method, K)[1][0]["indices"]) for method in METHODS}
    best = weights.topk(K).values.sum(dim=1).mean().item()
    assert recall["attention itself"] == pytest.approx(best, abs=1e-5) == max(recall.values())
    assert recall["random"] == min(recall.values())


@pytest.mark.parametrize("method", ("dense", *METHODS))
def test_a_byte_at_a_time_is_the_same_as_at_once(method):
    """But for random keys, which are drawn anew; and a near-tie may fall otherwise where sums have another order."""
    caches = trained()[0].new_caches(len(TEXT))
    rows = [read(part, method, K, caches)[0] for part in (TEXT[:60], *TEXT[60:].split(1))]
    off = ((torch.cat(rows) - read(TEXT, method, K)[0]).abs().amax(dim=1) > 1e-3)[60:].sum()
    assert off <= 3 if method != "random" else off > 20


def test_an_unknown_method_is_refused():
    steps = torch.zeros(1, 2, 4), torch.zeros(1, 4), torch.zeros(1, 1, dtype=torch.int32)
    with pytest.raises(ValueError, match="method must be one of indexer, .*, got 'newest'"):
        selection("newest", *steps, 1.0, 0)


def test_the_plain_layer_is_the_layer():
    model = load_small_model()
    tokens = unseen_text(200, 130)
    for x, block in zip(layer_inputs(model, tokens), model.layers, strict=True):
        expected = block.self_attn(x, torch.arange(130))
        got = layer(x, torch.arange(130), block.self_attn.state_dict(), model.config.attention)
        assert sum(relative_error(a, b) > 1e-4 for a, b in zip(got, expected, strict=True)) <= 6
    assert not model.layers[0].self_attn._forward_pre_hooks


def test_the_reference_ablation_takes_the_same_windows_for_all():
    corpus = {"training": torch.zeros(400, dtype=torch.uint8), "held out": torch.arange(400).to(torch.uint8)}
    asked = []

    def losses(window, method, k):
        asked.append((tuple(window.tolist()), method, k))
        return torch.arange(20.0)

    table = ablate(losses, corpus, ("a", "b"), (2, 5), 3, 20)
    assert len({window for window, *_ in asked}) == 3 and len(asked) == 12
    assert all(numbers.tolist() == [12.0] * 3 for numbers in table.values())  # the mean of 5 to 19


def test_paired_takes_arrays_and_knows_its_numbers():
    difference, low, high = paired(np.array([2.0, 4.0, 3.0]), [1.0, 1.0, 1.0])
    assert difference == 2.0 and high - difference == pytest.approx(2 / 3**0.5) == pytest.approx(difference - low)


@pytest.mark.parametrize("verdict", VERDICTS)
def test_the_made_up_tables_are_far_from_another_verdict(verdict):
    for seed in (1, 2):
        table = made_up(verdict, seed)
        for k in (8, 16, 32):
            _, low, high = paired(table["window", k], table["indexer", k])
            assert {"better": low > 0.01, "worse": high < -0.01, "undecided": low < -0.005 and high > 0.005}[verdict]


def test_half_a_page_shows_what_is_missing():
    assert half_page({}).count(GAP) == 6
    full = half_page(
        {
            "k": 16, "control": "window", "losses": {"indexer": 1.5, "window": 1.75}, "difference": 0.25,
            "interval": (0.125, 0.375), "verdict": "better", "claim": "C.", "condition": "D.", "not shown": "N.",
        }
    )  # fmt: skip
    assert GAP not in full and "window loses +0.25 nats a byte against the indexer, +0.12 to +0.38" in full


def test_writing_goes_on_from_the_prompt():
    prompt = bytes(TEXT[:40].tolist())
    written = write(prompt, 3, "indexer", K)
    assert len(written) == 3
    first = read(TEXT[:40], "indexer", K)[0][-1].argmax()
    assert written[0] == first


def test_the_pictures_numbers():
    windows = torch.stack([unseen_text(first, 81) for first in (0, 300, 900)]).to(torch.uint8)
    measured = per_byte(byte_losses, windows, ("dense", *METHODS), (8, 16))
    figure = live_losses(measured, first=16)
    means = {key: losses[:, 48:].double().mean(dim=1) for key, losses in measured.items()}
    figure.children[0].value = 48
    assert figure.data["first"] == 48
    for i, k in enumerate((8, 16)):
        difference, _, high = paired(means["window", k], means["dense", k])
        assert figure.data["more"]["window"][i] == difference
        assert figure.data["errors"]["window"][i] == pytest.approx(high - difference)
        assert figure.data["losses"]["random"][i] == pytest.approx(float(means["random", k].mean()))
    methods = live_methods(TEXT, byte=60, k=16, method="indexer", shown=95)
    indexers = set(methods.data["chosen"].tolist())
    methods.children[0].value = "window"
    assert methods.data["chosen"].tolist() == list(range(45, 61)) and indexers != set(range(45, 61))
    assert methods.data["weights"].sum() == pytest.approx(1, abs=1e-4) and methods.alt.startswith("window: ")
