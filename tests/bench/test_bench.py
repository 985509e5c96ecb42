"""The bench without a GPU: what it counts, makes, judges, writes and says. What it measures, only a GPU can show."""

import importlib
import inspect
import json
import sys

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON
from inputs import index_inputs, normal

import dsa_ref
from dsa_ref import cost
from dsa_ref.config import V32

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)


@pytest.fixture
def bench():
    """`bench("inputs")` is `dsa_bench.inputs`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.{name}")


@pytest.fixture
def no_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def result(ms=2.0, verdict="right", note="", **more):
    return {"verdict": verdict, "note": note} | (
        {"ms": ms, "ms_10": 0.99 * ms, "ms_90": 1.02 * ms, "rate": 990.4, "of_ceiling": 0.745, "timed": "graph"} | more
        if ms
        else {}
    )


def row(**results):
    return {"case": "4096 x 128K", "unit": "TFLOP/s", "work": 1.0, "facts": {}, "results": results}


def test_work_is_that_of_the_cost_model(bench):
    cases = bench("cases")
    T, S = 4096, 131072
    wanted = cost.prefill_cost(V32, T, S)
    assert cases.index_flops(T, S) == wanted.indexer
    assert cases.attention_flops(128, cost.causal_pairs(T, S, cases.K)) == wanted.sparse
    assert 8 * cases.attention_flops(16, 1000) == cases.attention_flops(128, 1000)
    assert round(cases.index_flops(T, S) / 8.70e-3 / 1e12) == 995  # a recorded figure: 8.70 ms are 995 TFLOP/s


def test_every_ladder_compares_on_a_case_that_exists(bench):
    cases, ladder = bench("cases"), bench("ladder")
    assert set(ladder.VERSIONS) == set(ladder.LADDER_CASES)
    for step, name in ladder.LADDER_CASES.items():
        assert name in cases.CASES[step]
        assert callable(cases.public_function(step))


def test_indexer_inputs_score_like_the_real_thing(bench, device):
    inputs = bench("inputs")
    given = inputs.indexer_inputs(4, 64, device=device)
    again = inputs.indexer_inputs(4, 64, device=device)
    assert all(torch.equal(a.float(), b.float()) for a, b in zip(given, again, strict=True))
    scores = dsa_ref.index_scores(*given)
    visible = scores[scores > -torch.inf]
    # Each head gives relu of about N(0, 1) once its scales are applied: second moment 1/2; w spreads the signs.
    assert 0.5 < visible.std() < 1.0 and (visible < 0).any()


@pytest.mark.parametrize("name", ["independent", "bursty", "recency", "heavy-tailed"])
def test_score_distributions_are_what_they_promise(bench, name, monkeypatch):
    inputs = bench("inputs")
    T, S, k = 24, 8192, 256
    monkeypatch.setattr(inputs, "AT_ONCE", 5 * S)  # blocks of five rows
    scores = inputs.score_matrix(name, T, S, device="cpu")
    keys, place = torch.arange(S), S - T + torch.arange(T)
    assert torch.equal(scores == -torch.inf, keys > place[:, None])
    assert torch.equal(scores, inputs.score_matrix(name, T, S, device="cpu"))
    best = scores.topk(k).indices.sort(dim=1).values
    neighbours = (best.diff(dim=1) <= 4).float().mean()  # winners next to winners
    recent = (best >= S - T - 2048).float().mean()
    sinks = (best < 4).sum(dim=1).float().mean()
    tail = scores.masked_fill(scores == -torch.inf, 0).amax(dim=1).mean()
    assert (neighbours > 0.3) == (name in ("bursty", "recency"))
    assert (recent > 0.9) == (name == "recency")
    assert (sinks == 4) == (name == "recency")
    assert (tail > 12) == (name == "heavy-tailed")


@pytest.mark.parametrize("keep", [0.9, 0.95])
def test_correlated_indices_are_distinct_causal_and_shared_as_asked(bench, keep):
    inputs = bench("inputs")
    T, S, k = 256, 2048, 128
    indices = inputs.correlated_indices(T, S, k, keep, device="cpu")
    assert indices.dtype == torch.int32 and indices.shape == (T, k)
    assert (indices.diff(dim=1) > 0).all() and (indices >= 0).all()
    assert (indices[:, -1] <= S - T + torch.arange(T)).all()
    shared = sum(len(set(a) & set(b)) for a, b in zip(indices[1:].tolist(), indices[:-1].tolist(), strict=True))
    # kept, or dropped and drawn again: the latter at most (1 - keep) · k of S - T keys
    assert keep - 0.01 < shared / (T - 1) / k < keep + 0.02
    assert 1 + 2.5 * (1 - keep) < inputs.mean_union(indices) < 1 + 3 * (1 - keep) + 0.02
    assert inputs.mean_union(inputs.random_indices(T, S, k, device="cpu")) > 3.5


def test_random_and_shortened_indices(bench):
    inputs = bench("inputs")
    T, S, k = 64, 512, 128
    indices = inputs.random_indices(T, S, k, device="cpu")
    assert (indices.diff(dim=1) > 0).all() and (indices >= 0).all()
    assert (indices[:, -1] <= S - T + torch.arange(T)).all()
    short = inputs.shortened(indices)
    lengths = (short >= 0).sum(dim=1)
    assert lengths.min() >= k // 2 and lengths.max() <= k and lengths.float().std() > k / 16
    assert torch.equal(short, torch.where(torch.arange(k) < lengths[:, None], indices, -1))
    for make in (inputs.random_indices, inputs.correlated_indices):
        with pytest.raises(ValueError, match="must see k = 128 keys, it sees 127"):
            make(2, 128, 128, device="cpu")


def test_a_wrong_selection_is_found(bench):
    checks = bench("checks")
    scores = normal(5, 300)
    scores[1, 40:80] = 9.0  # more equal scores than the 32 wanted
    right = dsa_ref.select_topk(scores, 32)
    checks.check_selection(right.flip(1), scores, right)
    other_tie = right.clone()
    other_tie[1, 0] = 79
    checks.check_selection(other_tie, scores, right, ties=False)
    with pytest.raises(checks.Wrong, match="80 % of rows right, 99.38 % of keys"):
        checks.check_selection(other_tie, scores, right)
    for bad in (-1, 2**31 - 1, int(right[3, 1])):  # nothing, never written, twice the same
        broken = right.clone()
        broken[3, 0] = bad
        for ties in (True, False):
            with pytest.raises(checks.Wrong):
                checks.check_selection(broken, scores, right, ties=ties)


def test_wrong_scores_are_found(bench):
    checks, inputs = bench("checks"), bench("inputs")
    given = index_inputs(normal, 6, 50, 4, 8)
    start, end = inputs.causal_ranges(6, 50, "cpu")
    right = dsa_ref.index_scores(*given)
    assert checks.check_scores(right, given, start, end, cleaned=True) == ""
    checks.check_scores(right.nan_to_num(neginf=3.0), given, start, end, cleaned=False)
    for place, value in (((2, 7), right[2, 7] + 0.1 * right[2, :40].abs().max()), ((0, 49), 3.0), ((1, 1), torch.nan)):
        broken = right.clone()
        broken[place] = value
        with pytest.raises(checks.Wrong):
            checks.check_scores(broken, given, start, end, cleaned=True)


def test_wrong_attention_is_found_and_base_two_is_named(bench):
    checks = bench("checks")
    q, kv = normal(5, 2, 24), normal(40, 24, seed=1)
    indices = bench("inputs").random_indices(5, 40, 8, device="cpu")
    out, lse = dsa_ref.sparse_attention(q, kv, indices, 0.2, 16)
    assert checks.check_attention((out, lse), q, kv, indices, 0.2, 16) == ""
    assert checks.check_attention((out, lse * checks.LOG2_E), q, kv, indices, 0.2, 16) == "lse in base 2"
    padded = torch.nn.functional.pad(out, (0, 0, 0, 3)), torch.nn.functional.pad(lse, (0, 3))
    assert checks.check_attention(padded, q, kv, indices, 0.2, 16) == ""
    for bad in ((out * 1.01, lse), (out, lse + 0.01), (out * torch.nan, lse)):
        with pytest.raises(checks.Wrong):
            checks.check_attention(bad, q, kv, indices, 0.2, 16)


def test_results_are_judged_on_poisoned_memory(bench):
    run, checks, peers = bench("run"), bench("checks"), bench("peers")

    def check(made, who):
        if made.isnan().any():
            raise checks.Wrong("never written")
        return f"for {who}"

    def missing():
        raise peers.Missing("no such package")

    assert run.judge(lambda: torch.ones(3), check, "ours") == {"verdict": "right", "note": "for ours"}
    assert run.judge(lambda: torch.empty(3), check, "ours") == {"verdict": "WRONG", "note": "never written"}
    assert run.judge(missing, check, "p") == {"verdict": "missing", "note": "no such package"}
    failed = run.judge(lambda: torch.ones(2) @ torch.ones(3), check, "p")
    assert failed["verdict"] == "failed" and failed["note"].startswith("RuntimeError: ")


def test_percentiles_and_ratios_of_rounds(bench):
    Timing = bench("measure").Timing
    ours, theirs = Timing([1.0, 2.0, 4.0], "graph"), Timing([2.0, 4.4, 8.0], "graph")
    assert ours.ms == 2.0 and ours.spread() == pytest.approx((1.2, 3.6))
    assert ours.speed_over(theirs) == pytest.approx((2.0, 2.0, 2.16))  # of 2, 2.2 and 2: round by round


def test_table_fits_and_shows_what_is_wrong(bench):
    records = bench("records")
    made = row(
        ours=result(8.4),
        DeepGEMM=result(8.7, speed=1.0357),
        SGLang=result(0.51, "WRONG", "0.2 % of rows right, 94 % of keys " * 9, timed="eager: capture failed"),
        FlashMLA=result(None, "missing", "no package sgl_kernel"),
    )
    made["facts"] = {"union_of_4": 1.15}
    lines = [records.header(), *records.case_lines(made)]
    assert all(len(line) <= 120 for line in lines)
    assert sum(width + 1 for _, width in records.COLUMNS) - 1 <= 120
    text = "\n".join(lines)
    assert lines[1].split() == "4096 x 128K ours 8.400 -1.0 +2.0 990 TFLOP/s 74%".split()
    assert lines[2].split() == "DeepGEMM 8.700 -1.0 +2.0 990 TFLOP/s 74% 1.04x".split()
    for part in ("SGLang: WRONG: 0.2 %", "SGLang: timed eager", "FlashMLA: missing: no package", "union_of_4 1.15"):
        assert part in text
    assert not records.ours_wrong(made)
    assert records.ours_wrong(row(ours=result(1.0, "WRONG", "NaN")))
    assert records.ours_wrong(row(ours=result(None, "failed", "out of memory")))
    assert not records.ours_wrong(row(cuDNN=result()))


def test_merging_keeps_the_steps_that_were_not_measured(bench, tmp_path):
    records = bench("records")
    log = tmp_path / "card.json"
    records.merge(log, {"chain": {"rows": [1], "provenance": {"date": "then"}}}, {"copy": 4.2})
    records.merge(log, {"select_topk": {"rows": [2], "provenance": {"date": "then"}}}, {"copy": 4.1})
    records.merge(log, {"select_topk": {"rows": [3], "provenance": {"date": "now"}}}, {"copy": 4.0})
    steps = json.loads(log.read_text())["steps"]
    assert steps["chain"] == {"rows": [1], "provenance": {"date": "then"}, "ceilings": {"copy": 4.2}}
    assert steps["select_topk"] == {"rows": [3], "provenance": {"date": "now"}, "ceilings": {"copy": 4.0}}
    assert records.default_log("NVIDIA H200").name == "h200.json"
    assert records.default_log("NVIDIA H100 80GB HBM3").name == "h100.json"
    assert records.default_log("NVIDIA A100-SXM4-40GB") is None


def test_ladder_keeps_predictions_beside_figures(bench, tmp_path, monkeypatch):
    ladder = bench("ladder")
    versions = {
        "first": ladder.Version("One tile.", (400.0, "TFLOP/s"), "half of the tensor cores wait"),
        "second": ladder.Version("Two tiles.", (8.0, "ms"), "they overlap", kept=False),
    }
    monkeypatch.setitem(ladder.VERSIONS, "index_scores", versions)
    log = tmp_path / "ladder.json"

    def entry(name, record):
        return ladder.entry("index_scores", name, "4096 x 128K", record, "TFLOP/s", "DeepGEMM", 0.9)

    ladder.update(log, [entry("second", result(9.0)), entry("first", result(9.5))])
    ladder.update(log, [entry("first", result(None, "failed", "out of registers"))])
    first, second = json.loads(log.read_text())["entries"]
    assert first["predicted"] == {"value": 400.0, "unit": "TFLOP/s"} and first["measured"] is None
    assert first["failed"] == "failed: out of registers" and first["kept"] and not second["kept"]
    assert second["measured"]["value"] == 9.0 and second["measured"]["unit"] == "ms" and second["failed"] is None
    assert all(len(line) <= 120 for made in (first, second) for line in ladder.entry_lines(made))
    monkeypatch.setitem(versions, "first", ladder.Version("One tile.", (4.0, "TB/s"), "a guess"))
    with pytest.raises(ValueError, match="must be in ms or TFLOP/s, got TB/s"):
        entry("first", result())


def test_ladder_runs_a_variant_or_a_function_of_its_own(bench, monkeypatch):
    ladder = bench("ladder")
    monkeypatch.setattr(rungs.dsa_kernels, "index_scores", lambda x, variant=None: (x, variant))
    own = ladder.Version("", (1.0, "ms"), "", call=lambda x: (x, "own"))
    monkeypatch.setitem(ladder.VERSIONS, "index_scores", {"a": ladder.Version("", (1.0, "ms"), ""), "b": own})
    assert [ladder.function_of("index_scores", name)(7) for name in "ab"] == [(7, "a"), (7, "own")]


def test_copies_of_sparse_attention_take_what_the_public_function_takes(bench):
    """On a GPU without Gluon, or none at all, a version is never called: a copy that is not there must show here."""
    versions = bench("ladder").VERSIONS["sparse_attention"].values()
    copies = [version.call.args[0] for version in versions if getattr(version.call, "args", ())]
    assert len(copies) == len(set(copies)) == 3
    wanted = list(inspect.signature(rungs.dsa_kernels.sparse_attention).parameters)[:5]
    for name in copies:
        copy = bench(f"ladder.sparse_attention.{name}")
        assert list(inspect.signature(copy.sparse_attention).parameters)[:5] == wanted


def test_missing_peers_say_why(bench, no_gpu):
    peers = bench("peers")
    for load in (peers._deep_gemm, peers._sgl_kernel):
        load.cache_clear()
    assert peers.available() == dict.fromkeys(peers.LOADERS, "needs a CUDA GPU")
    with pytest.raises(peers.Missing, match="needs a CUDA GPU"):
        peers.sglang_topk(torch.zeros(1, 4096), torch.tensor([4096], dtype=torch.int32))
    with pytest.raises(peers.Missing, match="takes k = 2048 only, got 64"):
        peers.sglang_topk(torch.zeros(1, 4096), torch.tensor([4096], dtype=torch.int32), k=64)


def test_packages_that_are_not_installed_say_so(bench, monkeypatch):
    peers = bench("peers")
    for load in (peers._deep_gemm, peers._sgl_kernel):
        load.cache_clear()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    monkeypatch.setitem(sys.modules, "deep_gemm", None)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    reasons = peers.available()
    assert reasons["DeepGEMM"].startswith("import deep_gemm: ModuleNotFoundError")
    assert reasons["SGLang"] == reasons["FlashMLA"] == "no package sgl_kernel (on PyPI: sglang-kernel)"
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (8, 0))
    assert peers.available()["FlashMLA"] == "its library is compiled for compute capability 9.0"


def test_padded_heads_are_zero(bench):
    peers = bench("peers")
    q = normal(3, 16, 8)
    padded = peers.padded_heads(q)
    assert padded.shape == (3, 64, 8) and torch.equal(padded[:, :16], q) and not padded[:, 16:].any()
    assert peers.padded_heads(normal(1, 128, 8)).shape == (1, 128, 8)


def test_without_a_gpu_one_sentence_and_exit_code_2(bench, no_gpu, capsys):
    assert bench("__main__").main([]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err == "dsa_bench measures on a CUDA GPU, and torch finds none here.\n"


def test_exactness_without_a_gpu(bench, no_gpu, capsys):
    assert bench("exact").main([]) == 2
    assert capsys.readouterr().err == "dsa_bench.exact compares on a CUDA GPU, and torch finds none here.\n"


def test_differing_rows_are_counted(bench):
    """As sets: the order does not matter, one other key does, and so does one key twice."""
    differing = bench("exact").differing
    want = torch.tensor([[1, 2, 3], [4, 5, -1], [7, 8, 9]])
    assert differing(want.flip(1), want) == 0
    assert differing(torch.tensor([[1, 2, 4], [4, 5, -1], [7, 8, 8]]), want) == 2


def test_a_selection_that_differs_is_found(bench, monkeypatch):
    """Rows are compared some at a time; two of seven get a key that does not belong there."""
    exact = bench("exact")
    monkeypatch.setattr(exact, "PAIRS_AT_ONCE", 3 * 40)
    monkeypatch.setattr(exact, "K", 5)
    scores = torch.arange(7 * 40, dtype=torch.float32).reshape(7, 40)
    ranges = torch.zeros(7, dtype=torch.int32), torch.full((7,), 40, dtype=torch.int32)
    right = exact.dsa_ref.select_topk(scores, 5, *ranges)
    for wrong_rows in ([], [2, 6]):
        got = right.clone()
        got[wrong_rows, 1] = 0
        monkeypatch.setattr(exact.dsa_kernels, "select_topk", lambda *_, got=got: got)
        assert exact.selected_wrong(scores, ranges) == len(wrong_rows)


def test_the_ladders_file_holds_the_registered_predictions(bench):
    """What was measured stays; what was expected is not to drift from `VERSIONS`."""
    ladder = bench("ladder")
    entries = json.loads(bench("records").ladder_log().read_text())["entries"]
    assert [(made["step"], made["version"]) for made in entries] == [
        (step, name) for step, versions in ladder.VERSIONS.items() for name in versions
    ]
    for made in entries:
        version = ladder.VERSIONS[made["step"]][made["version"]]
        assert (made["predicted"]["value"], made["predicted"]["unit"]) == version.predicted
        assert (made["what"], made["predicted_because"]) == (version.what, version.because)
        assert made["measured"] and "bench --ladder" in made["provenance"]["command"]


def test_a_record_names_its_program_its_card_and_the_peers(bench, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    made = bench("measure").environment(["--log", "x"], "dsa_bench.exact")
    assert made["command"] == "python -m dsa_bench.exact --log x" and "commit" in made
    assert bench("records").default_log(made["device"]).name == "h100.json"
    assert made["peers"] == bench("peers").versions()


@pytest.mark.parametrize("arguments, reason", [(["index"], "step must be one of"), (["--rounds", "0"], "at least 1")])
def test_senseless_arguments_exit_with_2(bench, capsys, arguments, reason):
    with pytest.raises(SystemExit) as stopped:
        bench("__main__").main(arguments)
    assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_every_version_of_the_ladder_is_complete(bench):
    """Each rung has a prediction in a unit that its case can answer, and runs the step by name or by a function."""
    ladder = bench("ladder")
    names = [(step, name) for step, versions in ladder.VERSIONS.items() for name in versions]
    assert all(len(versions) >= 2 for versions in ladder.VERSIONS.values())
    for step, name in names:
        version = ladder.VERSIONS[step][name]
        assert callable(ladder.function_of(step, name)) and version.what.endswith(".") and version.because
        assert version.predicted[0] > 0 and version.predicted[1] in ("ms", "TFLOP/s", "TB/s")


def test_a_tie_broken_the_wrong_way_is_no_selection_of_ours(bench, device):
    """All keys are alike, so any k of them have the right scores; the contract wants the first ones."""
    checks = bench("checks")
    inputs = [torch.ones(*shape, device=device) for shape in ((4, 2, 32), (40, 32), (4, 2), (40,))]
    start, end = (torch.full((4,), at, dtype=torch.int32, device=device) for at in (0, 40))
    first = torch.arange(5, dtype=torch.int32, device=device).repeat(4, 1)
    assert checks.check_lightning(first, inputs, start, end, own=True) == ""
    assert checks.check_lightning(first + 9, inputs, start, end, own=False) == ""
    with pytest.raises(checks.Wrong, match="0 % of rows as from index_scores"):
        checks.check_lightning(first + 9, inputs, start, end, own=True)
