"""The bench of transformers' models at toy sizes: its judge, memory that runs out, what is printed and tabled."""

import importlib
import importlib.util
import json

import pytest
import rungs
import torch
from conftest import NEEDS_PYTHON_311, NEEDS_TRITON, OLD_PYTHON

import dsa_ref
from notebooks.maintain import tables

pytestmark = [
    pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON),
    pytest.mark.skipif(OLD_PYTHON, reason=NEEDS_PYTHON_311),
]
ALL = ["eager", "sdpa", "ours", "ours_fp8"]


@pytest.fixture
def bench():
    """`bench("judge")` is `dsa_bench.models.judge`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.models.{name}")


@pytest.fixture
def model(bench):
    return random_model(bench)


def random_model(bench):
    sizes = bench("subject").SMALL | {
        "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32,
        "qk_nope_head_dim": 16, "v_head_dim": 16, "index_n_heads": 16, "index_topk": 32, "intermediate_size": 64,
        "moe_intermediate_size": 32, "vocab_size": 64, "num_hidden_layers": 2,
    }  # fmt: skip
    return bench("subject").random_model(sizes, "cpu", torch.float32)


@pytest.fixture
def tokens(bench, model):
    return bench("subject").random_tokens(model, 1, 80)


def test_the_model_has_v3_2_s_layers(bench, model):
    assert [type(layer.mlp).__name__ for layer in model.model.layers] == ["DeepseekV32MLP", "DeepseekV32MoE"]
    assert 0.9 < model.model.layers[0].self_attn.o_proj.weight.std() * 64**0.5 < 1.1
    assert model.model.rotary_emb.rope_type == "yarn"
    assert torch.equal(random_model(bench).lm_head.weight, model.lm_head.weight)


def test_the_judge_lets_ours_pass_and_refuses_what_is_wrong(bench, model, tokens, monkeypatch):
    judge = bench("judge")
    record = judge.judged(model, ALL, dsa_ref, tokens)
    verdicts = {who: made["verdict"] for who, made in record["results"].items()}
    assert verdicts == {"eager": "right", "ours": "right", "ours_fp8": "right", "at random": "WRONG"}
    assert not judge.wrong(record) and all(len(line) <= 120 for line in bench("__main__").judge_lines(record))

    at_random = bench("at_random")
    found = judge.judged(model, ["ours"], at_random, tokens)  # ours is wrong
    assert found["results"]["ours"]["verdict"] == "WRONG" and judge.wrong(found)
    monkeypatch.setattr(at_random, "lightning_select", dsa_ref.lightning_select)  # the control is none
    found = judge.judged(model, ["ours"], dsa_ref, tokens)
    assert found["results"]["ours"]["verdict"] == "right" and judge.wrong(found)


def test_the_judge_sees_one_wrong_layer_and_a_wrong_decode_step(bench, model):
    compared = bench("judge").compared
    wanted = [torch.randn(100, 8) for _ in range(2)]
    assert compared(wanted, wanted, 0.99, 0.05)["verdict"] == "right"
    assert compared([wanted[0], wanted[0]], wanted, 0.99, 0.05)["verdict"] == "WRONG"
    last = [part.clone() for part in wanted]
    last[1][-1] *= 1.1  # a position of 200, but one of the 16 that were decoded
    made = compared(last, wanted, 0.99, 0.05)
    assert made["verdict"] == "WRONG" and made["share"] == pytest.approx(0.995)
    last[1][-1] = torch.nan
    assert compared(last, wanted, 0.99, 0.05)["verdict"] == "WRONG"


def test_a_random_selection_is_one(bench):
    start, end = torch.tensor([0, 0, 3], dtype=torch.int32), torch.tensor([0, 2, 8], dtype=torch.int32)
    chosen = bench("at_random").lightning_select(torch.zeros(3, 1, 4), torch.zeros(8, 4), None, 4, None, start, end)
    assert chosen[0].tolist() == [-1] * 4 and sorted(chosen[1].tolist()) == [-1, -1, 0, 1]
    assert len(set(chosen[2].tolist())) == 4 and chosen[2].min() >= 3 and chosen.dtype == torch.int32


@pytest.fixture
def options(bench, monkeypatch):
    for name, value in (("STEPS", 2), ("ROUND_S", 0.0), ("free", lambda model: None)):  # which take most of the time
        monkeypatch.setattr(bench("timing"), name, value)
    _, options = bench("__main__").parse(["--lengths", "80", "16", "--rounds", "2", "--implementations", *ALL])
    return options


def test_all_of_it_at_toy_sizes(bench, model, options):
    kept = []
    record = bench("__main__").measured(
        model, dsa_ref, options, 80, [(2, 48)], lambda now: kept.append(len(now["decode"]))
    )
    assert not record["wrong"] and kept == [0, 1, 1, 2, 3]
    assert [(row["batch"], row["tokens"]) for row in record["decode"]] == [(1, 16), (1, 80), (2, 48)]
    for row in (*record["prefill"], *record["decode"]):
        for result in row["results"].values():
            assert result["verdict"] == "measured" and 0 < result["held_bytes"] <= result["peak_bytes"]
            assert result["seconds_10"] <= result["seconds"] <= result["seconds_90"]
    assert record["decode"][2]["results"]["sdpa"]["cache_of"] == "ours"
    assert record["decode"][1]["results"]["sdpa"]["cache_of"] == "sdpa"
    assert [len(result["rounds"]) for result in record["prefill"][0]["results"].values()] == [2] * 4
    # a token in each of 2 layers: latent 32, RoPE 16, index key 32, in fp32
    sizes = [result["cache_bytes"] for result in record["decode"][2]["results"].values()]
    assert min(sizes) > 2 * 48 * 2 * (32 + 16 + 32) * 4 and len(set(sizes)) == 1

    provenance = {"device": "CPU, x", "torch": "2", "triton": "3", "transformers": "5", "command": "python -m x"}
    record |= {"provenance": provenance, "sizes": {"num_hidden_layers": 2}, "dtype": "torch.float32"}
    text = tables.model("models_cpu.json", json.loads(json.dumps(record)))
    rows = [line for line in text.splitlines() if line.startswith("| ")]
    assert [row.split(" | ")[0] for row in rows[2:]] == ["| 16", "| 80", "| 2 of 48"]
    assert {row.count("|") for row in rows} == {rows[0].count("|")} and "no memory" not in text


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("cuBLAS: CUBLAS_STATUS_ALLOC_FAILED")]
)
def test_memory_that_runs_out_is_a_result(bench, model, options, monkeypatch, error):
    """sdpa from 80 tokens on, in prefill; ours and eager go on, and sdpa decodes from ours' cache."""
    timing, prefill = bench("timing"), bench("timing").prefill

    def greedy(model, tokens, cache=None):
        if model.config._attn_implementation == "sdpa" and tokens.shape[1] >= 80:
            raise error
        return prefill(model, tokens, cache)

    monkeypatch.setattr(timing, "prefill", greedy)
    options.lengths, options.no_judge, options.implementations = [16, 80, 96], True, ["eager", "sdpa", "ours"]
    record = bench("__main__").measured(model, dsa_ref, options, 80, [], lambda now: None)
    found = [row["results"]["sdpa"] for row in record["prefill"]]
    assert [result["verdict"] for result in found] == ["measured", "out of memory", "not tried"]
    assert found[2]["note"] == "out of memory at 80 tokens" and not record["wrong"]
    assert all(row["results"][who]["verdict"] == "measured" for row in record["prefill"] for who in ("eager", "ours"))
    assert [row["results"]["sdpa"]["cache_of"] for row in record["decode"]] == ["sdpa", "ours", "ours"]
    assert tables.cell(found[2], "seconds") == tables.cell(found[1], "GiB") == "no memory"
    assert any("sdpa     not tried" in line for line in bench("__main__").row_lines("prefill", record["prefill"][2]))


def test_memory_that_runs_out_in_a_later_round_or_a_cache(bench, model, options, monkeypatch):
    timing, calls = bench("timing"), []

    def third():
        calls.append(1)
        if len(calls) > 4:
            raise torch.OutOfMemoryError
        return torch.zeros(1)

    gone = {}
    both = {"sdpa": third, "ours": lambda: torch.zeros(1)}
    results = timing.in_turns(model, both, dsa_ref, 3, gone, "9 tokens")
    assert results["sdpa"] == {"verdict": "out of memory", "note": "out of memory"} and "sdpa" in gone
    assert len(results["ours"]["rounds"]) == 3
    monkeypatch.setattr(timing, "one_round", lambda *_: (1.0, 0, 0))
    for seconds, rounds in ((0.5, 9), (1.0, 3), (10.0, 2), (99.0, 1)):
        monkeypatch.setattr(timing, "seconds_of", lambda *_, seconds=seconds: seconds)
        assert len(timing.in_turns(model, {"ours": None}, dsa_ref, 9, {}, "")["ours"]["rounds"]) == rounds

    def never(*_):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(timing, "prefill", never)
    row = timing.measure_decode(model, ["sdpa", "ours"], dsa_ref, 1, 16, {})
    assert {result["note"] for result in row["results"].values()} == {"out of memory in the prefill by ours"}


def test_a_compiled_step(bench, model, monkeypatch):
    """On a CPU without its CUDA graph; the same logits as without compilation, or else the error says so."""
    compiled, own = bench("compiled"), torch.compile
    monkeypatch.setattr(torch, "compile", lambda call, mode, fullgraph: own(call, backend="eager", fullgraph=fullgraph))
    monkeypatch.setattr(compiled, "STEPS", 2)
    row = compiled.measure_compiled(model, ["sdpa", "ours"], dsa_ref, 80, gone := {})
    assert not gone and [result["verdict"] for result in row["results"].values()] == ["measured"] * 2
    assert all(result["error"] < 1e-5 for result in row["results"].values())
    one = row["results"]["ours"]["seconds"]
    text = tables.cell(row["results"]["ours"], "finer")
    assert abs(float(text) - 1e3 * one) <= 0.005

    monkeypatch.setattr(torch, "compile", lambda call, mode, fullgraph: lambda token, **given: call(token * 0, **given))
    row = compiled.measure_compiled(model, ["ours"], dsa_ref, 80, {})
    assert row["results"]["ours"]["error"] > 1e-3


def test_another_error_of_ours_is_a_failure(bench, model, options, monkeypatch, capsys):
    timing, prefill = bench("timing"), bench("timing").prefill

    def failing(model, tokens, cache=None):
        if model.config._attn_implementation == "dsa":
            raise ValueError("a bug")
        return prefill(model, tokens, cache)

    monkeypatch.setattr(timing, "prefill", failing)
    options.lengths, options.no_judge, options.no_decode = [16], True, True
    record = bench("__main__").measured(model, dsa_ref, options, 80, [], lambda now: None)
    assert record["wrong"] and record["prefill"][0]["results"]["ours"]["note"] == "ValueError: a bug"
    assert record["prefill"][0]["results"]["sdpa"]["verdict"] == "measured" and "a bug" in capsys.readouterr().err
    assert tables.cell(record["prefill"][0]["results"]["ours"], "ms") == "failed"


def test_arguments(bench, capsys, monkeypatch):
    main = bench("__main__")
    _, options = main.parse([])
    assert options.lengths is None and options.rounds == main.ROUNDS and not options.no_judge
    assert bench("subject").IMPLEMENTATIONS == main.IMPLEMENTATIONS
    assert main.default_log("cuda", "NVIDIA H200").name == "models_h200.json"
    assert main.default_log("cpu", "CPU, x86_64").name == "models_cpu.json" and main.default_log("cuda", "RTX") is None
    for arguments, reason in ((["--lengths", "0"], "at least 1"), (["--implementations", "flash"], "invalid choice")):
        with pytest.raises(SystemExit):
            main.parse(arguments)
        assert reason in capsys.readouterr().err
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "transformers" else find(name))
    with pytest.raises(SystemExit):
        main.parse([])
    assert "transformers must be installed" in capsys.readouterr().err
