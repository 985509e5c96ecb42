"""Each regime of `dsa_ref.training.compare` is what it says, none runs another's code, and its figures are right."""

import contextlib
import copy
import dataclasses
import functools
import itertools
import json
import pathlib
import types

import pytest
import torch

import dsa_ref
from dsa_ref import TINY
from dsa_ref.nn import ModelConfig, SmallModel
from dsa_ref.nn.model import load_small_model
from dsa_ref.testing import overlap
from dsa_ref.training import compare, measures, regimes, results
from dsa_ref.training.compare import Comparison, Plan
from dsa_ref.training.needle import Pair
from dsa_ref.training.regimes import REGIMES, SELECTIONS, joint_backward, make_model, steps
from dsa_ref.training.stages import indexer_parameters, stage_backward, stage_loss
from notebooks.maintain import tables

SOURCE = pathlib.Path(contextlib.__file__).read_bytes()[:12_000] + pathlib.Path(json.__file__).read_bytes()[:6000]
TEXT = torch.frombuffer(bytearray(SOURCE), dtype=torch.uint8)
K, LENGTH = 8, 72
CONFIG = ModelConfig(n_layers=2, hidden_dim=32, attention=dataclasses.replace(TINY, index_fp8=False, index_topk=K))
PLAN = Plan(k=K, length=LENGTH, batch=2, steps=(2, 2, 2), pairs=1, windows=3, asked=1, recall=(2, 16))
SHORT = dataclasses.replace(PLAN, steps=(1, 1, 1))


def lively_weights():
    """Of a model whose attention has a pattern, so that selections matter."""
    torch.manual_seed(0)
    model = SmallModel(CONFIG)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2 and ".indexer." not in name:
            parameter.data.normal_(std=0.2)
    return model.state_dict()


WEIGHTS = lively_weights()


def tokens(windows=2):
    return TEXT[: windows * (LENGTH + 1)].reshape(windows, -1).long()


def recorded(model, attention="sparse", windows=2):
    """The record of packed windows, without gradients."""
    record = []
    positions = torch.arange(LENGTH).repeat(windows)
    with torch.no_grad():
        model(tokens(windows)[:, :-1].flatten(), positions, attention=attention, record=record)
    return record


def made(name, ops=dsa_ref, seed=0):
    return make_model(REGIMES[name], CONFIG, ops, WEIGHTS, seed)


# What is selected


def ranges(windows=2):
    start = torch.arange(windows, dtype=torch.int32).repeat_interleave(LENGTH) * LENGTH
    return start, torch.arange(1, windows * LENGTH + 1, dtype=torch.int32)


def check_lists(indices):
    """As the contract says: min(k, visible) distinct keys of the row's own window, up to itself, then -1."""
    for row, first, last in zip(indices.tolist(), *(bound.tolist() for bound in ranges()), strict=True):
        chosen = [s for s in row if s >= 0]
        assert len(chosen) == len(set(chosen)) == min(K, last - first)
        assert all(first <= s < last for s in chosen)


@pytest.mark.parametrize("name", ("window", "random", "oracle"))
def test_a_selection_stays_in_its_window(name):
    for step in recorded(made(name)):
        check_lists(step["indices"])


def test_the_window_is_the_last_keys():
    for step in recorded(made("window")):
        for t in (3, 40, LENGTH + 30):
            first = max(t - K + 1, 0 if t < LENGTH else LENGTH)
            assert sorted(set(step["indices"][t].tolist()) - {-1}) == list(range(first, t + 1))


def test_random_lists_differ_by_row_layer_and_call_and_follow_the_seed():
    model, again, other = made("random"), made("random"), made("random", seed=1)
    first, second = recorded(model), recorded(model)
    assert overlap(first[0]["indices"], recorded(again)[0]["indices"]) == 1.0
    late = torch.tensor([t for t in range(2 * LENGTH) if t % LENGTH >= 5 * K])
    pairs = [(first[0], second[0]), (first[0], first[1]), (first[0], recorded(other)[0])]
    for a, b in pairs:
        assert overlap(a["indices"][late], b["indices"][late]) < 0.4
    rows = first[0]["indices"][late]
    assert overlap(rows[1:], rows[:-1]) < 0.4


def test_random_keys_are_drawn_evenly():
    generous = [recorded(made("random", seed=seed), windows=1)[0]["indices"][-1] for seed in range(150)]
    counts = torch.stack(generous).flatten().bincount(minlength=LENGTH).double()
    assert counts.sum() == 150 * K and len(counts) == LENGTH
    thirds = counts.reshape(3, -1).sum(dim=1) / counts.sum()
    assert (thirds - 1 / 3).abs().max() < 0.05


def dense_mass(step, scale):
    """By loops over heads, in fp64: the mean over heads of dense attention's probabilities, [T, S]."""
    q, kv, start = step["q"].double(), step["kv"].double(), step["start"]
    mass = torch.zeros(len(q), len(kv), dtype=torch.float64)
    for t in range(len(q)):
        seen = slice(int(start[t]), t + 1)
        for h in range(q.shape[1]):
            mass[t, seen] += torch.softmax(scale * (kv[seen] @ q[t, h]), dim=0) / q.shape[1]
    return mass


@pytest.mark.parametrize("rows", (5, 2048))
def test_the_oracle_selects_by_attention_s_mass(rows, monkeypatch):
    monkeypatch.setattr(regimes, "ROWS_AT_ONCE", rows)
    for step in recorded(made("oracle")):
        mass = dense_mass(step, CONFIG.attention.softmax_scale)
        kept = mass.gather(1, step["indices"].clamp(min=0).long()).masked_fill(step["indices"] < 0, 0.0).sum(dim=1)
        best = mass.topk(K).values.sum(dim=1)
        assert torch.allclose(kept, best, atol=1e-6)
        newest = mass.gather(1, dsa_ref.testing.window_selection(K, *ranges()).clamp(min=0).long()).sum(dim=1)
        assert (newest < best - 1e-3).any()  # so that another selection would be told from it


def test_the_oracle_attends_to_what_it_selects():
    """Its output is that of the reference's attention over its own lists."""
    model = made("oracle")
    step, layer = recorded(model)[0], model.layers[0].self_attn
    out, lse = dsa_ref.sparse_attention(
        step["q"], step["kv"], step["indices"], 1.0 * CONFIG.attention.softmax_scale, 32
    )
    assert torch.allclose(lse, step["lse"], atol=1e-5)
    assert layer.ops.sparse_attention is not dsa_ref.sparse_attention


# What is learned from what


def test_an_attached_indexer_moves_the_model_and_a_detached_one_does_not():
    for name, moves in (("DSA", False), ("attached", True)):
        model = made(name)
        _, indexer = stage_loss(model, tokens(), "sparse")
        indexer.backward()
        outside = [p.grad for p in indexer_parameters(model, inside=False)]
        assert any(gradient is not None and gradient.abs().max() > 0 for gradient in outside) == moves
        assert all(p.grad is not None for p in indexer_parameters(model))


def test_attached_or_not_the_losses_are_the_same():
    both = [stage_loss(made(name), tokens(), "sparse") for name in ("DSA", "attached")]
    assert [loss.item() for loss in both[0]] == [loss.item() for loss in both[1]]


def test_one_pass_over_both_losses_gives_the_gradients_of_two():
    """Where nothing is attached; where it is, the model's gradients are others."""
    gradients = []
    for name, backward in (("DSA", stage_backward), ("DSA", joint_backward), ("attached", joint_backward)):
        model = made(name)
        losses = backward(model, tokens(), "sparse", 0.5)
        gradients.append([p.grad.clone() for side in (True, False) for p in indexer_parameters(model, side)])
        assert losses[0] > 0 and losses[1] > 0
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[0], gradients[1], strict=True))
    same = [torch.allclose(a, b, atol=1e-6) for a, b in zip(gradients[1], gradients[2], strict=True)]
    inside = len(indexer_parameters(made("DSA")))
    assert all(same[:inside]) and not all(same[inside:])


def keys_that_learn(own_selection):
    """(keys with a gradient in the warm-up, keys that the indexer selects), sets, of the first layer's last window."""
    kept = []

    def indexer_loss(q_idx, k_idx, *rest, **named):
        k_idx.retain_grad()
        kept.append(k_idx)
        return dsa_ref.indexer_loss(q_idx, k_idx, *rest, **named)

    model = SmallModel(CONFIG, steps(dsa_ref, indexer_loss=indexer_loss))
    model.load_state_dict(WEIGHTS)
    chosen = recorded(model)[0]["indices"]
    stage_backward(model, tokens(), "warm-up", own_selection=own_selection)
    return set(kept[0].grad.abs().sum(dim=1).nonzero().flatten().tolist()), set(chosen.flatten().tolist()) - {-1}


def test_a_warm_up_on_its_own_selection_ignores_all_other_keys():
    learned, selected = keys_that_learn(own_selection=True)
    assert learned <= selected < set(range(2 * LENGTH))
    learned, selected = keys_that_learn(own_selection=False)
    assert not learned <= selected


def test_one_head_is_one_head():
    model = made("one head")
    for step, other in zip(recorded(model), recorded(made("DSA")), strict=True):
        assert step["q_idx"].shape[1:] == (1, 16) and step["w"].shape[1] == 1 and other["q_idx"].shape[1] == 16
    unlike = [name for name, weight in model.state_dict().items() if not torch.equal(weight, WEIGHTS[name])
              if weight.shape == WEIGHTS[name].shape]  # fmt: skip
    assert unlike == []  # all but the heads themselves begins where the others begin
    other = SmallModel(dataclasses.replace(CONFIG, hidden_dim=16)).state_dict()
    with pytest.raises(RuntimeError, match="size mismatch for layers.0.gate_proj.weight"):
        make_model(REGIMES["one head"], CONFIG, dsa_ref, other, 0)


def test_without_relu_scores_are_linear():
    """The scores that the steps make of the two heads are those of the formula without a relu, and others with one."""
    model, x = made("no relu"), torch.randn(20, TINY.dim, generator=torch.Generator().manual_seed(0))
    layer, positions = model.layers[0].self_attn, torch.arange(20)
    with torch.no_grad():
        q_latent = layer.q_a_layernorm(layer.q_a_proj(x))
        q_idx, k_idx, w, _, _ = layer._index(x, q_latent, positions)
        got = dsa_ref.index_scores(q_idx, k_idx, w)
        q, k, w = layer.indexer.project(x, q_latent)
        q, k = (dsa_ref.rope(tensor, positions, layer.freqs, "half") for tensor in (q, k))
        dots = torch.einsum("thd,sd->ths", q, k)
        linear, usual = (torch.einsum("ths,th->ts", values, w) for values in (dots, dots.relu()))
    seen = torch.ones(20, 20, dtype=torch.bool).tril()
    assert torch.allclose(got[seen], linear[seen], atol=1e-5)
    assert not torch.allclose(got[seen], usual[seen], atol=1e-2 * usual[seen].abs().max().item())


def test_without_hadamard_is_rope_and_fp8_alone():
    x, positions, freqs = torch.randn(6, 16), torch.arange(6), dsa_ref.rope_frequencies(TINY)
    x[:, 3] = 100.0  # what a rotation spreads over all dims
    bare = regimes.without_hadamard(dsa_ref).rotate_quantize(x, positions, freqs)
    turned = dsa_ref.rope(x, positions, freqs, "half")
    assert torch.equal(dsa_ref.dequantize(*bare), dsa_ref.dequantize(*dsa_ref.quantize(turned)))
    assert not torch.equal(bare[1], dsa_ref.rotate_quantize(x, positions, freqs)[1])


# No regime runs another's code


def counted():
    """`dsa_ref` that counts the calls that training makes, by what tells regimes apart."""
    calls = dict.fromkeys(("dense", "selects", "attends", "KL on all keys", "KL on a selection"), 0)

    def counting(name, step):
        def call(*args, **named):
            calls[name(args, named) if callable(name) else name] += torch.is_grad_enabled() or name == "selects"
            return step(*args, **named)

        return functools.wraps(step)(call)

    def which(args, named):
        indices = args[6] if len(args) > 6 else named.get("indices")
        return "KL on all keys" if indices is None else "KL on a selection"

    ops = types.SimpleNamespace(**vars(dsa_ref))
    ops.lightning_select = counting("selects", dsa_ref.lightning_select)
    ops.sparse_attention = counting("attends", dsa_ref.sparse_attention)
    ops.indexer_loss = counting(which, dsa_ref.indexer_loss)
    return ops, calls


# (KL on all keys, KL on a selection in either stage, selects by scores, attends to a selection)
CODE = {
    "dense": (0, 0, False, False),
    "DSA": (4, 4, True, True),
    "window": (0, 0, False, True),
    "random": (0, 0, False, True),
    "oracle": (0, 0, False, True),
    "no warm-up": (0, 4, True, True),
    "own warm-up": (0, 8, True, True),
    "attached": (4, 4, True, True),
    "one head": (4, 4, True, True),
    "no relu": (4, 4, True, True),
}


def compared(ops=dsa_ref, plan=PLAN):
    return Comparison(plan, CONFIG, ops, TEXT[:14_000], TEXT[14_000:])


@pytest.fixture(scope="module")
def entries():
    """{regime: (its entry, the calls it made)} of one tiny comparison."""
    found = {}
    for name in REGIMES:
        ops, calls = counted()
        found[name] = (compared(ops).regime(name, WEIGHTS)[1], dict(calls))
    return found


@pytest.mark.parametrize("name", REGIMES)
def test_each_regime_runs_its_own_code(name, entries):
    _, calls = entries[name]
    found = calls["KL on all keys"], calls["KL on a selection"], calls["selects"] > 0, calls["attends"] > 0
    assert found == CODE[name]  # two layers, two steps a stage


def test_no_two_regimes_give_the_same_figures(entries):
    """Losses of single windows, to five digits: what ran twice under two names would agree in all of them."""
    for (a, (first, _)), (b, (second, _)) in itertools.combinations(entries.items(), 2):
        assert first["loss"] != second["loss"], f"{a} and {b}"


def test_a_regime_that_runs_another_s_code_is_found(monkeypatch):
    """The two tests above fail for it: the random selection as a window, a warm-up that looks at its own selection."""
    ops, calls = counted()
    monkeypatch.setitem(SELECTIONS, "random", SELECTIONS["window"])
    window, random = (compared(ops).regime(name, WEIGHTS)[1] for name in ("window", "random"))
    assert window["loss"] == random["loss"]
    monkeypatch.setitem(REGIMES, "DSA", dataclasses.replace(REGIMES["DSA"], warm_up="own selection"))
    compared(ops).regime("DSA", WEIGHTS)
    assert (calls["KL on all keys"], calls["KL on a selection"]) != CODE["DSA"][:2]


def test_the_last_stage_has_the_same_windows_and_rate_in_every_regime(monkeypatch):
    """The control's too, which is a dense stage; the warm-ups and the dense model's training have others."""
    seen, train = [], compare.train_stage

    def spy(model, stage, windows, steps, optimizer, *rest):
        seen.append((windows(0).tolist(), windows(1).tolist(), optimizer.peak))
        return train(model, stage, windows, steps, optimizer, *rest)

    monkeypatch.setattr(compare, "train_stage", spy)
    comparison = compared(plan=SHORT)
    comparison.dense_stage()
    for name in ("dense", "window", "DSA", "own warm-up"):
        comparison.regime(name, WEIGHTS)
    before, control, window, warm_up, sparse, own, own_sparse = seen
    assert control == window == sparse == own_sparse and warm_up == own
    for i, j in itertools.combinations((before, control, warm_up), 2):
        assert i[0] != j[0] and i[0] != i[1]


def test_the_warm_up_leaves_the_model_alone_and_the_control_its_indexer():
    plan = dataclasses.replace(PLAN, steps=(1, 2, 1))
    for name, stages in (("dense", ["dense"]), ("DSA", ["warm-up", "sparse"]), ("no warm-up", ["sparse"])):
        model, entry = compared(plan=plan).regime(name, WEIGHTS)
        assert [stage["stage"] for stage in entry["stages"]] == stages
        moved = {n for n, weight in model.state_dict().items() if not torch.equal(weight, WEIGHTS[n])}
        assert any(".indexer." in n for n in moved) == (name != "dense")
        assert any(".indexer." not in n for n in moved)


# What is measured


def test_edges_double_from_k_on():
    assert measures.position_edges(8192, 256) == [0, 256, 512, 1024, 2048, 4096, 8192]
    assert measures.position_edges(100, 8) == [0, 8, 16, 32, 64, 100]


def test_losses_by_position_are_the_model_s(monkeypatch):
    monkeypatch.setattr(measures, "WINDOWS_AT_ONCE", 2)
    model, windows, edges = made("DSA"), tokens(3).to(torch.uint8), measures.position_edges(LENGTH, K)
    got = measures.losses_by_position(model, windows, "sparse", edges)
    for window, row in zip(windows.long(), got, strict=True):
        with torch.no_grad():
            logits = model(window[:-1])
        each = -logits.log_softmax(dim=1)[torch.arange(LENGTH), window[1:]]
        assert row == pytest.approx([each[a:b].mean().item() for a, b in itertools.pairwise(edges)], abs=2e-5)


def test_needles_are_counted_by_distance(monkeypatch):
    places = [[Pair(0, 20), Pair(3, 40)], [Pair(0, 39)]]
    monkeypatch.setattr(measures, "needles_found", lambda *_: [[True, False], [True]])
    got = measures.needles_by_distance(None, None, places, "dense", [16, 32, 64])
    assert got == {"asked": [1, 2], "found": [1, 1]}


def test_recall_of_the_oracle_is_all_and_of_others_less():
    windows = tokens(2).to(torch.uint8)
    found = {
        name: measures.recall_by_layer(made(name), windows, K, 20, "sparse") for name in ("oracle", "window", "random")
    }
    assert found["oracle"]["kept"] == pytest.approx(found["oracle"]["most"], abs=1e-5)
    for name in ("window", "random"):
        assert all(kept < most - 0.01 for kept, most in zip(*found[name].values(), strict=True))
    step = recorded(made("window"), windows=1)[0]
    rows = measures.sampled_rows(LENGTH, K, 20)
    mass = dense_mass(step, CONFIG.attention.softmax_scale)[rows]
    kept = [mass[i, step["indices"][t].long()].sum().item() for i, t in enumerate(rows)]
    one = measures.recall_by_layer(made("window"), windows[:1], K, 20, "sparse")
    assert one["kept"][0] == pytest.approx(sum(kept) / len(kept), abs=1e-4)


def test_recall_of_a_dense_step_is_that_of_the_indexer():
    """Of layer 0, which gets the same input in either mode."""
    windows = tokens(2).to(torch.uint8)
    dense, sparse = (measures.recall_by_layer(made("DSA"), windows, K, 20, mode) for mode in ("dense", "sparse"))
    assert dense["kept"][0] == pytest.approx(sparse["kept"][0], abs=1e-5)
    assert dense["kept"][1] != pytest.approx(sparse["kept"][1], abs=1e-5)


def test_rows_are_those_that_have_a_choice():
    assert measures.sampled_rows(100, 90, 64).tolist() == list(range(90, 100))
    assert measures.sampled_rows(100, 8, 2).tolist() == [8, 99]
    with pytest.raises(ValueError, match="length must be above k = 100"):
        measures.sampled_rows(100, 100, 2)


def test_fp8_keeps_most_of_a_selection_and_a_rotation_more_where_one_dim_is_large():
    model, windows = made("DSA"), tokens(2).to(torch.uint8)
    plain = measures.precision_overlaps(model, windows, K, 30)
    assert all(0.8 < share < 1.0 for shares in plain.values() for share in shares)
    for block in model.layers:
        block.self_attn.indexer.k_norm.weight.data[9] = 300.0
    large = measures.precision_overlaps(model, windows, K, 30)
    assert all(a != b for a, b in zip(large["FP8"], large["FP8 without Hadamard"], strict=True))
    with pytest.raises(ValueError, match="model must have index_fp8 = False"):
        measures.precision_overlaps(load_small_model(), windows, K, 30)


def test_the_error_of_a_ratio_is_that_of_paired_differences():
    control = [[1.0], [2.0], [3.0]]
    assert measures.paired_ratio([[1.1], [2.2], [3.3]], control)[0] == pytest.approx((1.1, 0.0))
    ratio, error = measures.paired_ratio([[1.2], [2.2], [3.2]], control)[0]
    assert ratio == pytest.approx(1.1) and error == pytest.approx(0.1 / 2 / 3**0.5)
    for wrong in ([[1.0], [2.0]], [[1.0, 1.0]] * 3, [[1.0]]):
        with pytest.raises(ValueError, match="losses must have the shape"):
            measures.paired_ratio(wrong, control if len(wrong) != 1 else [[1.0]])


# The log, and what it comes to


ORIGIN = {"commit": "abc", "command": "python -m dsa_ref.training.compare"}
NAMES = ["dense", "window", "DSA"]


def timeless(run):
    """A run without what a clock has measured."""
    if isinstance(run, dict):
        return {
            name: timeless(part) for name, part in run.items() if not name.startswith(("seconds", "step_ms", "tokens"))
        }
    return [timeless(part) for part in run] if isinstance(run, list) else run


def do(folder, names=NAMES, plan=SHORT, **named):
    folder.mkdir(exist_ok=True)
    done = compare.run(compared(plan=plan), folder / "log.json", folder, ORIGIN, names, say=lambda text: None, **named)
    return done, json.loads((folder / "log.json").read_text())["runs"][0]


def test_a_run_that_was_cut_goes_on_to_the_same_figures(tmp_path, monkeypatch):
    done, whole = do(tmp_path / "whole")
    assert done and list(whole["regimes"]) == NAMES and whole["edges"] == [0, 8, 16, 32, 64, 72]
    regime = Comparison.regime

    def cut(self, name, weights):
        if name == "DSA":
            raise KeyboardInterrupt
        return regime(self, name, weights)

    monkeypatch.setattr(Comparison, "regime", cut)
    with pytest.raises(KeyboardInterrupt):
        do(tmp_path / "cut")
    ran = []
    monkeypatch.setattr(
        Comparison, "regime", lambda self, name, weights: ran.append(name) or regime(self, name, weights)
    )
    done, rest = do(tmp_path / "cut")
    assert done and ran == ["DSA"] and timeless(rest) == timeless(whole)
    assert load_small_model(tmp_path / "cut" / "DSA.safetensors").config.attention.index_fp8


def test_no_regime_begins_that_would_end_too_late(tmp_path):
    done, run = do(tmp_path, ends=0.0)
    assert not done and run["regimes"] == {} and run["start"]["stages"][0]["stage"] == "dense"


def test_a_log_of_another_plan_or_code_is_not_continued(tmp_path, monkeypatch):
    do(tmp_path, ["dense"])
    with pytest.raises(ValueError, match="same options and code to go on, got .* with seed 0, not 1$"):
        do(tmp_path, plan=dataclasses.replace(SHORT, seed=1))
    with monkeypatch.context() as other:
        other.setitem(compare.PEAK_RATES, "sparse", 1e-5)  # no option, and yet another comparison
        with pytest.raises(ValueError, match="rates"):
            do(tmp_path)
    log = json.loads((tmp_path / "log.json").read_text())
    log["runs"][0]["provenance"]["commit"] = "def"
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(ValueError, match="with commit def, not abc"):
        do(tmp_path)
    (tmp_path / "log.json").write_text("[]")
    with pytest.raises(ValueError, match="log must be that of one run"):
        do(tmp_path)


def test_a_log_without_its_dense_model_is_not_continued(tmp_path):
    do(tmp_path, ["dense"])
    (tmp_path / "dense.safetensors").unlink()
    with pytest.raises(ValueError, match="state must hold the dense model"):
        do(tmp_path)


def test_a_dense_model_may_be_given(tmp_path):
    model = SmallModel(CONFIG)
    model.load_state_dict(WEIGHTS)
    do(tmp_path, ["dense"], given=model)
    saved = load_small_model(tmp_path / "dense.safetensors").state_dict()
    assert all(torch.equal(saved[name], WEIGHTS[name].bfloat16().float()) for name in saved)


def a_run(seed=0, ratio=1.1):
    """Figures made by hand: two windows, parts of 8, 8 and 16 places."""
    entry = {"loss": [[5.0, 1.0, 2.0], [5.0, 2.0, 4.0]], "needles": {"asked": [3, 1], "found": [2, 1]}, "recall": {}}
    ours = copy.deepcopy(entry) | {"needles": {"asked": [3, 1], "found": [1, 0]}}
    ours["loss"] = [[9.0, first, ratio * second] for _, first, second in entry["loss"]]
    ours["recall"] = {
        "before": {"kept": [0.1, 0.2], "most": [0.5, 0.8]},
        "after": {"kept": [0.4, 0.8], "most": [0.5, 0.8]},
    }
    ours["precision"] = {name: copy.deepcopy(entry) for name in results.PRECISIONS}
    return {
        "seed": seed,
        "plan": {"seed": seed, "k": 8},
        "edges": [0, 8, 16, 32],
        "regimes": {"dense": entry, "DSA": ours},
    }


def test_what_a_regime_comes_to_counts_places_beyond_k_alone():
    found = results.rows([a_run()])
    dense, ours = found["dense"][0], found["DSA"][0]
    assert dense.loss == pytest.approx((1 + 2 + 2 + 2 + 4 + 4) / 6) and dense.needles == 0.75
    assert dense.ratio is None and dense.recall is None
    assert ours.ratio == pytest.approx((1 + 2.2 + 2.2 + 2 + 4.4 + 4.4) / 15) and ours.worst == pytest.approx(1.1)
    assert ours.needles == 0.25 and ours.recall == pytest.approx((0.8 + 1.0) / 2) and 0 <= ours.error < 1e-9
    assert found["FP8"][0].ratio == pytest.approx(1.0) and found["FP8"][0].needles == 0.75


def test_runs_merge_by_seed(tmp_path, capsys):
    for seed in (1, 0):
        (tmp_path / f"{seed}.json").write_text(json.dumps({"runs": [a_run(seed, 1.1 + seed / 10)]}))
    logs = [str(tmp_path / f"{seed}.json") for seed in (1, 0)]
    compare.main(["--merge", *logs, "--log", str(tmp_path / "all.json")])
    runs = results.read_runs(tmp_path / "all.json")
    assert [run["seed"] for run in runs] == [0, 1]
    ratios = [row.ratio for row in results.rows(runs)["DSA"]]
    assert f"{sum(ratios) / 2:.4f} ({ratios[0]:.4f} to {ratios[1]:.4f})" in capsys.readouterr().out
    with pytest.raises(ValueError, match=r"every seed must come once, and one at least, got \[0, 0\]"):
        results.merged([{"runs": [a_run()]}, {"runs": [a_run()]}])
    other = a_run(1)
    other["plan"]["k"] = 16
    with pytest.raises(ValueError, match="all runs must have one plan"):
        results.merged([{"runs": [a_run()]}, {"runs": [other]}])


@pytest.mark.parametrize(
    "log, message",
    [
        ([], "an object with a list of runs, got ['list']"),
        ({"history": []}, "an object with a list of runs, got ['dict']"),
        ({"runs": []}, "and one at least, got []"),
        ({"runs": [1]}, "not subscriptable"),
        ({"runs": [{"seed": 0, "plan": {}}]}, "got a run without 'regimes'"),
    ],
)
def test_what_is_no_log_is_not_merged(tmp_path, capsys, log, message):
    (tmp_path / "log.json").write_text(json.dumps(log))
    with pytest.raises(SystemExit):
        compare.main(["--merge", str(tmp_path / "log.json"), "--log", str(tmp_path / "all.json")])
    assert message in capsys.readouterr().err.replace("\n", " ") and not (tmp_path / "all.json").exists()


def two_seeds():
    """Runs with all that the README's table tells of them."""
    runs = [a_run(0, 1.1), a_run(1, 1.2)]
    for run in runs:
        run["plan"] |= {"steps": [1, 2, 3], "batch": 8, "length": 32, "windows": 2, "starts": [[0.22, 16, 5]]}
        run["provenance"] = {"device": "H", "torch": "2", "triton": "3", "command": "python -m x --seed 0"}
    return runs


def test_the_readme_s_table_is_of_all_seeds():
    runs = two_seeds()
    text = tables.regimes("training_x.json", runs)
    (line,) = [line for line in text.splitlines() if line.startswith("| DSA |")]
    ratios = [row.ratio for row in results.rows(runs)["DSA"]]
    assert f"| {sum(ratios) / 2:.4f} ({ratios[0]:.4f} to {ratios[1]:.4f}) |" in line
    assert f"| 0.250 (0.250 to 0.250) | {0.9:.3f} (0.900 to 0.900) |" in line
    assert "| dense | 2.5000 (2.5000 to 2.5000) |  |  |  |" in text and "seeds 0, 1" in text
    assert "| DSA, FP8 without Hadamard |" in text


@pytest.mark.parametrize("there", (False, True))
def test_the_readme_has_the_table_if_there_is_a_record(there, tmp_path, monkeypatch):
    """With one the README must have its place, which is filled; without one it must have none, which would be empty."""
    (tmp_path / "x.json").write_text(json.dumps({"runs": two_seeds()}))
    monkeypatch.setattr(results, "recorded", lambda: [tmp_path / "x.json"] if there else [])
    for other in ("training_records", "parallel_records"):
        monkeypatch.setattr(tables, other, lambda: ["another table's"])
    others = "".join(f"<!-- table: {n} -->\n<!-- end of table -->\n" for n in tables.TABLES if n != "training")
    monkeypatch.setattr(tables, "TABLES", {**dict.fromkeys(tables.TABLES, str), "training": tables.training})
    place = "<!-- table: training -->\n\n<!-- end of table -->\n"
    right, wrong = (others + place, others) if there else (others, others + place)
    assert ("| DSA |" in tables.written(right)) == there
    with pytest.raises(ValueError, match="README.md must have the tables"):
        tables.written(wrong)


def test_a_regime_that_a_run_lacks_has_no_row():
    less = a_run(1)
    del less["regimes"]["DSA"]
    assert set(results.rows([a_run(), less])) == {"dense"}


def test_the_command(tmp_path, capsys):
    """From nothing to a table, with a model a reader can load."""
    given = ["--steps", "1", "1", "1", "--batch", "1", "--length", "128", "--k", "16", "--windows", "2"]
    given += ["--pairs", "1", "--asked", "1", "--regimes", "dense", "window", "--log", str(tmp_path / "log.json")]
    compare.main([*given, "--device", "cpu"])
    assert "window" in capsys.readouterr().out
    (run,) = results.read_runs(tmp_path / "log.json")
    assert run["plan"]["k"] == 16 and run["provenance"]["command"].startswith("python -m dsa_ref.training.compare")
    assert load_small_model(tmp_path / "log.state" / "dense.safetensors").config.attention.index_topk == 16
    with pytest.raises(SystemExit) as stopped:
        compare.main([*given, "--device", "cpu", "--seed", "1"])
    assert stopped.value.code == 2 and "with seed 0, not 1" in capsys.readouterr().err
