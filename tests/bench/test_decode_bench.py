"""The bench of a decode step without a GPU: what it makes, judges, counts, writes and says."""

import dataclasses
import importlib
import types

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

import dsa_ref
from dsa_ref import DSAConfig, cost
from dsa_ref.config import V32

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

SMALL = DSAConfig(
    dim=64, n_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    index_n_heads=4, index_head_dim=16, index_topk=24,
)  # fmt: skip
SMALL_FP8 = dataclasses.replace(SMALL, kv_lora_rank=128)  # FP8 caches want whole tiles
CEILINGS = {"copy": 4.0, "bf16": 700.0, "fp8": 1300.0}


@pytest.fixture
def bench():
    """`bench("inputs")` is `dsa_bench.inputs`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.{name}")


@pytest.fixture
def reference(bench, monkeypatch):
    """The reference in the place of the kernels."""

    def attention(*args, variant=None, **kwargs):
        return dsa_ref.paged_sparse_attention(*args, **kwargs)

    steps = types.SimpleNamespace(**vars(dsa_ref) | {"paged_sparse_attention": attention})
    for name in ("decode_cases", "decode_bytes", "checks", "inputs"):
        monkeypatch.setattr(bench(name), "dsa_kernels", steps)

    def topk(scores, k, table, lengths):
        positions = dsa_ref.select_topk(scores, k, torch.zeros_like(lengths), lengths)
        pages = table.gather(1, positions.clamp(min=0).long() // 64)
        return positions, (pages * 64 + positions % 64).masked_fill(positions < 0, -1)

    monkeypatch.setattr(bench("decode_cases"), "decode_topk", topk)


def small_cases(bench):
    cases, small = bench("decode_cases"), {"device": "cpu", "config": SMALL}
    return {
        "scores": lambda: cases.scores_case(5, 2, 200, **small),
        "topk": lambda: cases.topk_case(3, 200, **small),
        "FP8": lambda: cases.attention_case(2, 3, 4, "FP8", pool=200, **small),
        "bf16": lambda: cases.attention_case(2, 1, 4, "bf16", pool=200, **small),
        "chain": lambda: cases.chain_case(2, 2, 200, 4, **small),
        "bytes": lambda: bench("decode_bytes").case(200, splits=(2, 5), **small),
    }


NAMES = ("scores", "topk", "FP8", "bf16", "chain", "bytes")


@pytest.mark.parametrize("name", NAMES)
def test_the_reference_is_right_in_every_case(bench, reference, name):
    case = small_cases(bench)[name]()
    for who, call in case.ours.items():
        assert case.check(call(), True) == "", who
    assert case.work > 0 and all(callable(peer) for peer in case.peers.values())


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_is_found(bench, reference, name):
    """Each tensor of a result in turn: one value off, and what poisoned memory holds where nothing was written."""
    case, Wrong = small_cases(bench)[name](), bench("checks").Wrong
    right = bench("decode").parts(next(iter(case.ours.values()))())
    for i, part in enumerate(right):
        for value in (part.flatten()[0] + 1, torch.nan if part.is_floating_point() else torch.iinfo(part.dtype).max):
            broken = [x.clone() for x in right]
            broken[i].view(-1)[0] = value
            with pytest.raises(Wrong):
                case.check(broken[0] if len(broken) == 1 else broken, True)


@pytest.mark.parametrize("name", ["scores", "FP8", "bf16"])
def test_the_kernels_are_right_in_small_cases(bench, name):
    case = small_cases(bench)[name]()
    for who, call in case.ours.items():
        assert case.check(call(), True) == "", who


def test_an_unclean_score_is_wrong_for_ours_alone(bench, reference):
    case = small_cases(bench)["scores"]()
    scores = case.ours["ours"]()
    scores[0, 0, 199] = 3.0  # the first of two queries does not see the last position
    assert case.check(scores.flatten(0, 1), False) == ""
    with pytest.raises(bench("checks").Wrong, match="invisible key"):
        case.check(scores, True)


def test_a_peers_selection_is_judged_by_its_slots(bench, reference):
    case = small_cases(bench)["chain"]()
    positions, slots, out, lse = case.ours["ours"]()
    assert case.check((None, slots, out, lse), False) == ""
    assert case.check((None, slots, out, lse * 1.4426950408889634), False) == "lse in base 2"
    with pytest.raises(bench("checks").Wrong, match="range"):
        case.check((None, slots.flip(0), out.flip(0), lse.flip(0)), False)  # each the other sequence's
    with pytest.raises(bench("checks").Wrong, match="0 % of slots|% of slots are those of the positions"):
        case.check((positions.flip(2), slots, out, lse), True)


def test_positions_at_slots(bench):
    table = torch.tensor([[5, 2], [0, 3]], dtype=torch.int32)
    slots = torch.tensor(
        [[[20, 11, -1]], [[3, 20, 99]]], dtype=torch.int32
    )  # pages of 4: 5·4, 2·4+3; 0·4+3, not its own
    assert bench("checks").positions_at(slots, table, 6, 4).tolist() == [[[0, 7, -1]], [[3, 8, 8]]]


def test_pages_hold_what_the_reference_reads(bench, device):
    inputs = bench("inputs")
    table, lengths, free = inputs.page_table(3, 150, device=device)
    assert table.shape == (3, 3) and lengths.tolist() == [150] * 3
    assert sorted([*table.flatten().tolist(), *free.tolist()]) == list(range(3 * 3 + inputs.SPARE))
    assert torch.equal(table, inputs.page_table(3, 150, device=device)[0])
    values, scales = dsa_ref.unpack_index(inputs.index_pages(table, free, config=SMALL), SMALL.index_head_dim)
    values, scales = values.float().unflatten(0, (-1, 64)), scales.unflatten(0, (-1, 64))
    assert values[free].isnan().all() and scales[free].isnan().all()
    assert values[table.long()].isfinite().all() and (scales[table.long()] > 0).all()
    assert 0.5 < (values * scales[..., None])[table.long()].std() < 1.5
    for fp8 in (True, False):
        pages = inputs.kv_pages(table, free, fp8, config=SMALL)
        rows = dsa_ref.unpack_kv(pages, SMALL.kv_lora_rank) if fp8 else pages.float()
        assert rows.shape[1:] == (64, SMALL.latent_dim) and pages.dtype == (torch.uint8 if fp8 else torch.bfloat16)
        assert rows[free].isnan().all() and 0.9 < rows[table.long()].std() < 1.1


def test_pages_are_made_some_at_a_time(bench, monkeypatch):
    inputs = bench("inputs")
    table, _, free = inputs.page_table(2, 500, device="cpu")
    monkeypatch.setattr(inputs, "AT_ONCE", 3 * 64 * SMALL.index_head_dim)
    assert (inputs.index_pages(table, free, config=SMALL)[table.long()] != 0xFF).any(dim=-1).all()
    assert inputs.kv_pages(table, free, False, config=SMALL).shape == (2 * 8 + inputs.SPARE, 64, SMALL.latent_dim)


def test_random_slots_are_distinct_and_in_the_table(bench, device):
    inputs = bench("inputs")
    table, _, free = inputs.page_table(1, 640, device=device)
    slots = inputs.random_slots(3, 2, 100, table)
    assert slots.dtype == torch.int32 and slots.shape == (3, 2, 100)
    assert (slots.flatten(0, 1).sort(dim=1).values.diff(dim=1) > 0).all()
    assert not torch.isin(slots // 64, free).any() and torch.isin(slots // 64, table).all()


def test_the_shapes_are_those_that_are_asked_for(bench):
    cases = bench("decode_cases").DECODE_CASES
    assert {"1 x 1, 4K", "1 x 1, 1M", "8 x 1, 128K", "64 x 1, 128K", "64 x 2, 32K", "64 x 4, 32K"} <= set(
        cases["paged_index_scores"]
    )
    assert {"1 x 4K", "1 x 1M", "8 x 128K", "8 x 1M", "64 x 32K", "64 x 128K", "128 x 32K"} <= set(cases["decode_topk"])
    for rows in ("FP8", "bf16"):
        assert f"128 x 2, 128 heads, {rows}" in cases["paged_sparse_attention"]
    assert {"1 x 1, 1M, 128 heads", "8 x 1, 128K, 16 heads"} <= set(cases["decode_chain"])
    for step in cases.values():  # what a case is set against was measured before it
        names = list(step)
        for i, make in enumerate(step.values()):
            assert all(part in names[:i] for part in make.args if isinstance(part, str) and " x " in part)


def test_work_is_that_of_the_cost_model(bench, reference):
    made = {name: make() for name, make in small_cases(bench).items()}
    read = cost.decode_bytes(SMALL, 200)
    assert made["scores"].work == 5 * read.index + 4 * 5 * (199 + 200)
    assert made["topk"].work == 4 * 3 * 200
    assert made["FP8"].work == cost.mqa_flops_per_pair(SMALL) * 6 * 24
    assert made["chain"].work == 2 * (cost.index_flops_per_pair(SMALL) * 399 + cost.mqa_flops_per_pair(SMALL) * 48)
    wide = dataclasses.replace(V32, n_heads=16)
    assert bench("decode_cases").attention_flops(V32, 16) == cost.mqa_flops_per_pair(wide)


def test_three_queries_are_also_asked_one_by_one(bench):
    cases = bench("decode_cases")
    given, _ = cases.indexer(2, 3, 200, "cpu", SMALL)
    found = cases.score_peers(given)
    assert list(found) == ["DeepGEMM", "DeepGEMM, queries apart"]
    one = found["DeepGEMM, queries apart"]
    assert one.q_idx.shape == (6, 1, 4, 16) and one.w.shape == (6, 4) and one.page_table.shape == (6, 4)
    assert one.seen.tolist() == [[198], [199], [200]] * 2 and torch.equal(one.page_table[4], given[3][1])
    assert list(cases.score_peers(cases.indexer(2, 2, 200, "cpu", SMALL)[0])) == ["DeepGEMM"]


def test_sglangs_table_has_an_entry_a_token(bench):
    table = torch.tensor([[5, 2], [0, 3]], dtype=torch.int32)
    made = bench("peers").SlotSelection(table, torch.full((2, 3), 7, dtype=torch.int32), 4)
    assert made.tokens.tolist() == [[20, 21, 22, 23, 8, 9, 10, 11], [0, 1, 2, 3, 12, 13, 14, 15]]
    assert made.starts.tolist() == [0, 3, 6] and made.lengths.tolist() == [7] * 6


def test_flashmla_gets_its_plan_back(bench, monkeypatch):
    """The first call makes it; its heads are padded; its lse [B, H, N] becomes [B, N, H]."""
    peers, seen = bench("peers"), []

    class Op:
        @staticmethod
        def default(*arguments):
            seen.append(arguments)
            return torch.zeros(2, 3, 64, 5), torch.zeros(2, 64, 3), "plan", "splits"

    monkeypatch.setattr(peers, "_sgl_kernel", lambda library, op: Op)
    q, kv = torch.randn(2, 3, 16, 40), torch.zeros(4, 64, 56, dtype=torch.uint8)
    decode = peers.FlashMLADecode(q, kv, 0.5)
    for _ in range(2):
        out, lse = decode("slots")
        assert lse.shape == (2, 3, 64)
    assert seen[0][0].shape == (2, 3, 64, 40) and seen[0][1].shape == (4, 64, 1, 56)
    assert seen[0][2:] == ("slots", None, None, None, None, None, None, None, 512, 0.5)
    assert seen[1][5:7] == ("plan", "splits")


def test_missing_peers_say_so_when_they_are_called(bench, monkeypatch, reference):
    peers = bench("peers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for load in (peers._deep_gemm, peers._sgl_kernel):
        load.cache_clear()
    for name, make in small_cases(bench).items():
        for who, call in (pair for pair in make().peers.items() if pair[0] != "torch"):
            with pytest.raises(peers.Missing, match="needs a CUDA GPU|takes k = 2048 only"):
                call()
            assert who and name


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
    steps = importlib.import_module("json").loads(log.read_text())["steps"]
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
    cache, batch = bench("decode_layer").filled_cache(SMALL_FP8, 2, 130, device)
    assert batch.lengths.tolist() == [130, 130] and batch.positions.tolist() == [[129], [129]]
    assert cache.table.free_pages == 0 and cache.filled == [129, 129]
    for sequence in (0, 1):
        kv, k_idx, k_scale = cache.rows(sequence)
        assert kv.shape == (129, SMALL_FP8.latent_dim) and 0.9 < kv.float().std() < 1.1
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
