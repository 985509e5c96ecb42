"""How the bench of a decode step runs without a GPU: repeats, records, tables, a layer's parts, arguments."""

import importlib
import json

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

from dsa_ref import DSAConfig, cost
from dsa_ref.config import V32

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

SMALL = DSAConfig(
    dim=64, n_heads=4, q_lora_rank=32, kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    index_n_heads=4, index_head_dim=16, index_topk=24,
)  # fmt: skip
CEILINGS = {"copy": 4.0, "bf16": 700.0, "fp8": 1300.0}


@pytest.fixture
def bench():
    """`bench("inputs")` is `dsa_bench.inputs`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.{name}")


def test_repeats_must_have_the_same_bits(bench):
    repeated, x, restored = bench("decode").repeated, torch.tensor([[1.0, torch.nan, 3.0]]), []
    assert repeated(lambda: x.clone(), lambda: restored.append(1), 2) == {} and len(restored) == 3
    results = iter([x, x, x.flip(1)])
    assert repeated(lambda: next(results), None, 2) == {"verdict": "WRONG", "note": "other bits in repeat 2 of 2"}
    results = iter([(x, x), (x, x + 1)])
    assert repeated(lambda: next(results), None, 1)["verdict"] == "WRONG"
    results = iter([torch.tensor([0.0]), torch.tensor([-0.0])])
    assert repeated(lambda: next(results), None, 1)["verdict"] == "WRONG"
    kept = torch.zeros(2)
    assert repeated(lambda: kept.add_(1), None, 1)["verdict"] == "WRONG"  # the same memory each time


def fake_timings(bench, us):
    Timing = bench("measure").Timing
    return {
        who: {
            kind: Timing([t / 1e3, t / 1e3, 1.1 * t / 1e3], "graph")
            for kind, t in zip(("warm", "cold"), both, strict=True)
        }
        for who, both in us.items()
    }


@pytest.fixture
def timed(bench, monkeypatch):
    """`time_decode` that gives these microseconds without measuring."""

    def set_to(us):
        made = fake_timings(bench, us)
        time = lambda calls, rounds, as_they_are: {who: made[who] for who in calls}  # noqa: E731
        monkeypatch.setattr(bench("measure"), "time_decode", time)
        monkeypatch.setattr(bench("measure"), "floor", lambda rounds: {"warm_us": 1.5, "cold_us": 3.0})

    return set_to


def made_case(bench, calls, peers, **more):
    def check(result, own):
        if result.isnan().any():
            raise bench("checks").Wrong("NaN")
        return "" if own else "theirs"

    return bench("decode_case").DecodeCase(8e6, "TB/s", "copy", calls, check, peers, **more)


def test_a_case_becomes_a_record_and_a_table_that_fits(bench, timed):
    decode, records, Missing = bench("decode"), bench("records"), bench("peers").Missing
    timed({"ours": (10.0, 12.0), "ours, 1 split": (20.0, 20.0), "DeepGEMM + SGLang + FlashMLA": (15.0, 24.0)})

    def gone():
        raise Missing("no package sgl_kernel " * 9)

    def make():
        ours = {"ours": lambda: torch.ones(3), "ours, 1 split": lambda: torch.empty(3)}
        theirs = {"DeepGEMM + SGLang + FlashMLA": lambda: torch.ones(2), "SGLang": gone}
        return made_case(bench, ours, theirs, facts={"peer_heads": 64}, against="64 x 1, 32K")

    row = decode.measure_case(make, "128 x 2, 128 heads, bf16", CEILINGS, True)
    results = row["results"]
    assert {who: r["verdict"] for who, r in results.items()} == {
        "ours": "right", "ours, 1 split": "WRONG", "DeepGEMM + SGLang + FlashMLA": "right", "SGLang": "missing"
    }  # fmt: skip
    assert results["ours"]["warm_us"] == 10.0 and results["ours"]["rate"] == pytest.approx(0.8)
    assert results["ours"]["of_ceiling"] == pytest.approx(0.2)
    theirs = results["DeepGEMM + SGLang + FlashMLA"]
    assert theirs["speed_warm"] == pytest.approx(1.5) and theirs["speed_cold"] == pytest.approx(2.0)
    base = {"case": "64 x 1, 32K", "results": {"ours": {"warm_us": 4.0}}}
    decode.set_against(row, [base, row])
    lines = [records.decode_header(), *records.decode_lines(row)]
    assert all(len(line) <= 120 for line in lines)
    assert sum(width + 1 for _, width in records.DECODE_COLUMNS) - 1 <= 120
    text = "\n".join(lines)
    for part in (
        "1.50x 2.00x",
        "SGLang: missing",
        "ours, 1 split: WRONG: NaN",
        "ours, times 64 x 1, 32K: 2.5",
        "theirs",
    ):
        assert part in text
    assert records.any_of_ours_wrong(row)
    del results["ours, 1 split"]
    assert not records.any_of_ours_wrong(row)


def test_one_case_that_fails_leaves_the_others(bench, timed, monkeypatch, tmp_path, capsys):
    decode = bench("decode")
    timed({"ours": (1.0, 2.0)})

    def broken():
        raise RuntimeError("out of memory")

    def failing():
        return made_case(bench, {"ours": broken}, {})

    good = lambda: made_case(bench, {"ours": lambda: torch.ones(2)}, {})  # noqa: E731
    monkeypatch.setattr(
        decode, "DECODE_CASES", {"a": {"one": broken, "two": failing, "three": good}, "b": {"four": good}}
    )
    options = bench("__main__").parse(["--decode", "--rounds", "2"])[1]
    options.steps = ["a", "b"]
    log = tmp_path / "log.json"
    assert decode.measure_steps(options, log, {"device": "x"}, CEILINGS, {}) == 1
    out, err = capsys.readouterr()
    assert "RuntimeError: out of memory" in out and "Traceback" in err
    steps = json.loads(log.read_text())["steps"]
    verdicts = {row["case"]: row["results"]["ours"]["verdict"] for step in "ab" for row in steps[step]["rows"]}
    assert verdicts == {"one": "failed", "two": "failed", "three": "right", "four": "right"}
    assert steps["a"]["ceilings"] == CEILINGS and steps["a"]["provenance"] == {"device": "x"}


def test_all_are_timed_in_every_round_in_an_order_that_rotates(bench):
    ran = []
    prepared = {name: (lambda name=name: ran.append(name), "graph") for name in "abc"}

    def time(run, count):
        run()
        return {"a": 1.0, "b": 2.0, "c": 1e9}[ran[-1]]

    found = bench("measure")._in_turns(prepared, time, rounds=2, lead_ms=2.0, round_ms=4.0)
    assert "".join(ran) == "abc" + "aaa" + "bb" + "cc" + "bb" + "cc" + "aaa"  # estimates; lead runs, then one measured
    assert found["b"].rounds == [2.0, 2.0] and found["a"].how == "graph"


def test_a_layers_cache_is_full_but_for_the_next_token(bench, device):
    cache, batch = bench("decode_layer").filled_cache(SMALL, 2, 130, device)
    assert batch.lengths.tolist() == [130, 130] and batch.positions.tolist() == [[129], [129]]
    assert cache.table.free_pages == 0 and cache.filled == [129, 129]
    for sequence in (0, 1):
        kv, k_idx, k_scale = cache.rows(sequence)
        assert kv.shape == (129, SMALL.latent_dim) and 0.9 < kv.float().std() < 1.1
        assert (k_scale > 0).all() and k_idx.float().isfinite().all()


def test_a_random_layer_keeps_sizes(bench, device):
    layer = bench("decode_layer").random_layer(SMALL, device)
    assert all(weight.dtype == torch.bfloat16 for weight in layer.parameters())
    assert (layer.q_a_layernorm.weight == 1).all()
    x = torch.randn(50, SMALL.dim, device=device).to(torch.bfloat16)
    assert 0.8 < layer.kv_a_proj_with_mqa(x).float().std() < 1.2
    other = bench("decode_layer").random_layer(SMALL, device)
    assert all(torch.equal(a, b) for a, b in zip(layer.parameters(), other.parameters(), strict=True))


def test_kernels_are_summed_by_part(bench):
    made = [
        ("_paged_sparse_attention", 1, 9.0),
        ("_merge", 1, 2.0),
        ("nvjet_tst_64x8", 5, 80.0),
        ("elementwise", 3, 6.0),
    ]
    kernels = [{"name": name, "launches": n, "us": us} for name, n, us in made]
    assert bench("decode_layer").parts_of(kernels) == {
        "attention": "11.0 us in 2 launches",
        "products": "80.0 us in 5 launches",
        "other": "6.0 us in 3 launches",
        "all kernels": "97.0 us in 10 launches",
    }
    assert bench("decode_layer").parts_of([]) == {"all kernels": "0.0 us in 0 launches"}


@pytest.mark.gpu
def test_a_replayed_step_launches_what_the_eager_one_does_beside_its_checks(bench):
    layers = bench("decode_layer")
    step = layers.layer_case(1, 70, "cuda", SMALL).profiled
    eager, replayed = (layers.kernels_of(call, count=3) for call in (step, layers.replay_of(step)))
    eager, replayed = ({kernel["name"]: kernel["launches"] for kernel in made} for made in (eager, replayed))
    assert "_paged_index_scores" in replayed
    assert replayed == {name: launches for name, launches in eager.items() if name in replayed}
    assert any("Memcpy DtoH" in name for name in eager.keys() - replayed.keys())  # checks read values, a graph cannot


def test_bytes_beside_the_models_prediction(bench):
    module = bench("decode_bytes")
    at = {name: module.predicted(V32, S, CEILINGS) for name, S in bench("cases").SIZES.items()}
    flops = cost.mqa_flops_per_pair(V32)
    read = cost.decode_bytes(V32, 1 << 20)
    assert at["1M"]["dense_us"] == pytest.approx(1e6 * flops * (1 << 20) / 7e14)  # 128 heads: bound by FLOPs
    assert at["1M"]["dsa_us"] == pytest.approx(read.index / 4e6 + 1e6 * flops * 2048 / 7e14)
    assert at["4K"]["dense_us"] < at["8K"]["dense_us"]
    assert module.predicted(V32, 4096, {"copy": 2.0, "bf16": 300.0, "fp8": None}) is None

    def result(warm, verdict="right"):
        return {"verdict": verdict, "note": "", "warm_us": warm, "cold_us": 2 * warm, "ours": True}

    made = {"case": "1M", "results": {"DSA": result(100.0), "dense, ours, 16 splits": result(900.0)}}
    made["results"] |= {"dense, ours, 64 splits": result(500.0), "dense, FlashMLA, bf16": result(9.0, "WRONG")}
    row = module.row_of("1M", made, CEILINGS)
    assert row["saved"]["warm"] == {"dense": "dense, ours, 64 splits", "dense_us": 500.0, "times": 5.0}
    assert row["bytes"]["times"] == pytest.approx(4.925, abs=0.01) and row["bytes"]["dense"] == 656 << 20
    assert all(len(line) <= 120 for line in module.lines(row))
    text = "\n".join(module.lines(row))
    assert "139.76 /  687.87 MB" in text and "dense 500.0 (dense, ours, 64 splits) = 5.00x" in text
    failed = {"case": "1M", "results": {"ours": {"verdict": "failed", "note": "no memory", "ours": True}}}
    assert "no memory" in "\n".join(module.lines(module.row_of("1M", failed, CEILINGS | {"fp8": None})))


def test_figures_of_decode_have_a_file_of_their_own(bench):
    records, main = bench("records"), bench("__main__")
    assert records.decode_log("NVIDIA H200").name == "decode_h200.json"
    assert records.decode_log("NVIDIA A100-SXM4-40GB") is None
    for arguments, name in ((["--decode"], "decode_h200.json"), ([], "h200.json"), (["--ladder"], "ladder.json")):
        assert main.default_log(main.parse(arguments)[1], "NVIDIA H200").name == name


def test_arguments_of_decode(bench, capsys):
    parse = bench("__main__").parse
    steps = [*bench("decode_cases").DECODE_CASES, "ceilings"]
    assert parse(["--decode"])[1].steps == steps
    assert parse(["--decode", "--quick"])[1].rounds == bench("decode").QUICK_ROUNDS
    assert parse(["--decode", "--bytes"])[1].steps == []
    assert parse(["decode_chain", "--decode", "--bytes"])[1].steps == ["decode_chain"]
    for arguments, reason in (
        (["--decode", "chain"], "step must be one of paged_index_scores"),
        (["--decode", "--ladder"], "--ladder has no decode steps"),
        (["--bytes"], "pass --decode too"),
    ):
        with pytest.raises(SystemExit) as stopped:
            parse(arguments)
        assert stopped.value.code == 2 and reason in capsys.readouterr().err


def test_a_layers_step_is_judged_by_the_references(bench, device, monkeypatch):
    """The selection by its scores, and the output by the reference's steps with the same selection."""
    layers, kernels = bench("decode_layer"), rungs.dsa_kernels
    case = layers.layer_case(2, 70, device, SMALL)
    assert list(case.ours) == ["ours", "ours, eager"] and case.as_they_are == {"ours, eager": "eager"}
    assert case.check(case.ours["ours"](), True).startswith("relative error")
    assert case.work > 2 * cost.decode_bytes(SMALL, 70).dsa

    attend, select = kernels.paged_sparse_attention, kernels.paged_select
    monkeypatch.setattr(kernels, "paged_sparse_attention", lambda *args: [x * 1.1 for x in attend(*args)])
    with pytest.raises(bench("checks").Wrong, match="of the reference's step"):
        case.check(case.profiled(), True)
    monkeypatch.undo()
    monkeypatch.setattr(kernels, "paged_select", lambda *args: [x.flip(0) for x in select(*args)])
    with pytest.raises(bench("checks").Wrong):
        case.check(case.profiled(), True)


def test_a_warm_call_is_a_part_of_its_graph(bench, monkeypatch):
    """20 calls a graph: lead and measured runs are counted by the graph's time, the figure is a call's."""
    measure, ran = bench("measure"), []
    monkeypatch.setattr(measure, "_scratch", lambda: "scratch")
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: "pool")
    monkeypatch.setattr(measure, "_prepare", lambda call, pool, count=1: (measure._repeated(call, count), "graph"))

    def call_ms(run, scratch, count):
        before = len(ran)
        for _ in range(count):
            run()
        return (len(ran) - before) / count * (0.5 if scratch else 0.25)

    monkeypatch.setattr(measure, "_call_ms", call_ms)
    found = measure.time_decode({"a": lambda: ran.append("a")}, 3, lead_ms=10.0, round_ms=10.0)
    assert found["a"]["cold"].rounds == [0.5] * 3 and found["a"]["warm"].rounds == [0.25] * 3
    assert len(ran) == 3 + 3 * 40 + 20 * (3 + 3 * 4)
    eager = measure.time_decode({"a": lambda: None}, 1, 1.0, 1.0, as_they_are={"a": "eager"})
    assert eager["a"]["warm"].how == "eager"
