"""The bill without a GPU: chunks and steps judged at small sizes, times made into a record, and its arithmetic."""

import importlib
import json
import types

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

from dsa_ref import DSAConfig, cost
from dsa_ref.config import V32
from dsa_ref.records import figures_folder

pytestmark = pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON)

SMALL = DSAConfig(
    dim=64, n_heads=4, q_lora_rank=32, kv_lora_rank=128, qk_nope_head_dim=16, qk_rope_head_dim=8, v_head_dim=16,
    index_n_heads=4, index_head_dim=16, index_topk=24,
)  # fmt: skip
TOKENS, POSITION = 8, 40


@pytest.fixture
def bench():
    """`bench("bill.dense")` is `dsa_bench.bill.dense`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.{name}")


def attend(q, k, v, scale, causal):
    """What cuDNN does, in fp32."""
    logits = torch.einsum("thd,shd->hts", q.float(), k.float()) * scale
    if causal:
        logits.masked_fill_(torch.ones(len(q), len(k), dtype=torch.bool, device=q.device).triu_(1), -torch.inf)
    return torch.einsum("hts,shd->thd", logits.softmax(-1), v.float()).to(q.dtype), logits.logsumexp(-1).T


@pytest.fixture
def chunk(bench, device):
    """The chunk of 8 tokens that ends at 40, over random rows, with heads kept of all of them."""
    prefill, dense = bench("bill.prefill"), bench("bill.dense")
    with torch.no_grad():
        layer = bench("decode_layer").random_layer(SMALL, device)
        cache = prefill.filled_cache(SMALL, POSITION, torch.Generator(device).manual_seed(2))
        kept = dense.new_heads(SMALL, POSITION, cache.kv)
        dense.make_heads(layer, cache.kv, *kept)
        yield prefill.Chunk(layer, cache, POSITION, kept, TOKENS, attend)


@pytest.mark.parametrize("block", [8, 12])
def test_heads_made_in_blocks_are_the_heads_that_are_kept(bench, chunk, block):
    dense = bench("bill.dense")
    made = dense.prefill_step(chunk.layer, chunk.x, chunk.cache.kv, None, attend, block)
    assert bench("checks").row_errors(made.float(), chunk.with_kept().float()).max() < 1e-2


def test_a_wrong_dense_chunk_is_refused(bench, chunk, monkeypatch):
    prefill, dense, Wrong = bench("bill.prefill"), bench("bill.dense"), bench("checks").Wrong
    wrong = {
        "looks ahead": lambda q, k, v, scale, causal: attend(q, k, v, scale, False),
        "another scale": lambda q, k, v, scale, causal: attend(q, k, v, 0.5 * scale, causal),
    }
    for attention in wrong.values():
        chunk.attend = attention
        with pytest.raises(Wrong, match="an output row is off"):
            chunk.check(chunk.made(), prefill.MADE)
    chunk.attend = attend
    with monkeypatch.context() as patched:  # the part that is causal alone
        patched.setattr(dense, "merge", lambda first, second: first)
        with pytest.raises(Wrong, match="an output row is off"):
            chunk.check(chunk.with_kept(), prefill.KEPT)
    chunk.kept[1][0] += 1.0  # a value that is not the latent row's
    with pytest.raises(Wrong, match="an output row is off"):
        chunk.check(chunk.with_kept(), prefill.KEPT)
    out = chunk.made()
    chunk.cache.kv[-1] *= 1.1
    with pytest.raises(Wrong, match="a latent row of the cache"):
        chunk.check(out, prefill.MADE)
    out[3, 0] = torch.nan
    chunk.made()
    with pytest.raises(Wrong):
        chunk.check(out, prefill.MADE)


def test_a_wrong_chunk_of_ours_is_refused(bench, chunk, monkeypatch):
    prefill, kernels, Wrong = bench("bill.prefill"), rungs.dsa_kernels, bench("checks").Wrong
    select, scores = kernels.lightning_select, kernels.sparse_attention

    def refused(name, function, reason):
        monkeypatch.setattr(kernels, name, function)
        with pytest.raises(Wrong, match=reason):
            chunk.check(chunk.dsa(), prefill.DSA)
        monkeypatch.undo()

    refused("sparse_attention", lambda *args: [1.1 * part for part in scores(*args)], "an output row is off")
    refused("lightning_select", lambda *args, **more: select(*args, **more).flip(0), "row")
    index, append = kernels.index_queries, kernels.append_index
    refused("index_queries", lambda q, *rest: index(q.flip(1), *rest), "indexer's query")
    refused("append_index", lambda pages, slots, k, *rest: append(pages, slots, k.flip(0), *rest), "index key")
    heads = kernels.head_weights
    refused("head_weights", lambda x, weight: heads(x, weight).flip(1), "heads' weights")
    with pytest.raises(Wrong, match="other bits"):
        chunk.check(1.1 * chunk.dsa(), prefill.DSA)


@pytest.fixture
def timed(bench, monkeypatch):
    """Times of these ms instead of a GPU's, and two kernels a call."""

    def set_to(ms):
        measure = bench("measure")
        timings = {who: measure.Timing([t, t, 1.1 * t], "eager") for who, t in ms.items()}
        monkeypatch.setattr(measure, "time_calls", lambda calls, rounds: {who: timings[who] for who in calls})
        kernels = [
            {"name": "_sparse_attention", "launches": 1.0, "us": 2e3},
            {"name": "x" * 99, "launches": 2.0, "us": 1.0},
        ]
        monkeypatch.setattr(bench("decode_layer"), "kernels_of", lambda call, count: kernels)
        monkeypatch.setattr(bench("bill.prefill"), "peak_gib", lambda *_: 3.0)

    return set_to


def test_a_position_becomes_a_record_and_what_is_wrong_is_not_timed(bench, chunk, timed, monkeypatch):
    prefill, lines = bench("bill.prefill"), bench("bill.lines")
    timed({prefill.DSA: 2.5, prefill.MADE: 6.0, prefill.KEPT: 5.0})
    row = prefill.row_of(chunk, 3, {}, repeats=1)
    results = row["results"]
    assert (row["position"], row["tokens"], chunk.cache.length) == (POSITION, TOKENS, POSITION)
    assert list(results) == [prefill.DSA, prefill.MADE, prefill.KEPT]
    assert all(r["verdict"] == "right" and "relative error" in r["note"] for r in results.values()), results
    ours = results[prefill.DSA]
    assert ours["ratio"] == pytest.approx(1.25) and ours["launches"] == 3 and ours["repeats"] == 1
    assert results[prefill.KEPT]["speed"] == pytest.approx(2.0)
    flops = bench("bill.account").dense_flops(SMALL, TOKENS, POSITION, False)
    assert results[prefill.MADE]["rate"] == pytest.approx(flops / 6e9)
    text = lines.prefill({"rows": [row]})
    assert all(len(line) <= 120 for line in text) and "DSA 2.00x" in "\n".join(text)
    json.dumps(row)

    chunk.attend = lambda q, k, v, scale, causal: attend(q, k, v, scale, False)
    monkeypatch.setattr(bench("decode"), "repeated", lambda call, count: {"verdict": "WRONG", "note": "other bits"})
    row = prefill.row_of(chunk, 3, {prefill.KEPT: 1.01 * prefill.LONGEST_MS})
    assert row["results"][prefill.DSA]["verdict"] == "WRONG" and "ms" not in row["results"][prefill.DSA]
    assert row["results"][prefill.MADE]["verdict"] == "WRONG" and "ms" not in row["results"][prefill.MADE]
    assert prefill.KEPT not in row["results"]


def test_too_long_a_chunk_is_extrapolated_and_says_so(bench, chunk, timed, monkeypatch):
    prefill, account = bench("bill.prefill"), bench("bill.account")
    timed({prefill.DSA: 2.5, prefill.MADE: 6.0, prefill.KEPT: 5.0})
    monkeypatch.setattr(prefill, "kept_heads", lambda *_: chunk.kept)
    monkeypatch.setattr(bench("decode"), "repeated", lambda call, count: {})
    monkeypatch.setattr(prefill, "CHUNK", TOKENS)
    make = prefill.Chunk
    monkeypatch.setattr(prefill, "Chunk", lambda *args: make(*args, TOKENS, attend))
    monkeypatch.setattr(prefill, "LONGEST_MS", 7.0)
    counts = []
    rows = prefill.measure_rows(chunk.layer, chunk.cache, (24, 40), 3, lambda rows: counts.append(len(rows)))
    assert counts == [1, 2]
    first, last = (row["results"][prefill.MADE] for row in rows)
    assert not first["extrapolated"] and last["extrapolated"] and "rate of position 24" in last["note"]
    flops = [account.dense_flops(SMALL, TOKENS, position, False) for position in (24, 40)]
    assert last["ms"] == pytest.approx(6.0 * flops[1] / flops[0]) and last["speed"] == pytest.approx(last["ms"] / 2.5)
    assert account.extrapolated(rows, SMALL, TOKENS, 128, prefill.MADE, False)["note"].endswith("position 24")


def test_dense_decode_is_judged_by_the_reference(bench, device):
    decode, layers, Wrong = bench("bill.decode"), bench("decode_layer"), bench("checks").Wrong
    with torch.no_grad():
        step = layers.LayerStep(2, 130, device, SMALL)
        calls, pages = decode.dense_calls(step, 130, False, (2,))
        ((who, call),) = calls.items()
        out = call()
        assert who == "dense, 2 splits" and "relative error" in decode.check_dense(step, pages[who], out)
        wide = decode.unpacked(step.cache.kv_pages, SMALL)  # as FlashMLA reads them
        assert "relative error" in decode.check_dense(step, wide, out)
        for bad in (1.1 * out, out.flip(0)):
            with pytest.raises(Wrong, match="of sequence 0"):
                decode.check_dense(step, pages[who], bad)
        wide[step.cache.table.table[1, 2].long(), 1] *= 2  # the last token's row
        with pytest.raises(Wrong, match="latent row"):
            decode.check_dense(step, wide, out)


def counted_flops(c, T, S, kept):
    """FLOPs of a dense chunk, product by product."""
    head = c.qk_nope_head_dim + c.qk_rope_head_dim
    pairs = sum(S - T + t + 1 for t in range(T))
    weights = c.dim * c.q_lora_rank + c.q_lora_rank * c.n_heads * head
    weights += c.dim * (c.kv_lora_rank + c.qk_rope_head_dim) + c.n_heads * c.v_head_dim * c.dim
    made = (T if kept else S) * c.kv_lora_rank * c.n_heads * (c.qk_nope_head_dim + c.v_head_dim)
    return 2 * (pairs * c.n_heads * (head + c.v_head_dim) + T * weights + made)


def test_dense_flops(bench):
    dense_flops = bench("bill.account").dense_flops
    for T, S, kept in ((16, 64, True), (16, 64, False), (5, 5, False)):
        assert dense_flops(SMALL, T, S, kept) == counted_flops(SMALL, T, S, kept)
    assert dense_flops(V32, 4096, 1 << 20, True) > cost.prefill_cost(V32, 4096, 1 << 20).dense


def test_parts_and_what_a_layer_takes_beside_them(bench):
    account = bench("bill.account")
    us = {
        "_lightning_select_sampled": 40.0, "_merge": 1.0, "cudnn_sdpa_cutlass": 30.0, "nvjet_hsh": 20.0,
        "_head_weights_of_many": 5.0, "_append_latents": 2.0, "lerp_tensor_kernel": 1.5, "direct_copy": 0.5,
    }  # fmt: skip
    found = account.parts([{"name": name, "launches": 2.0, "us": value} for name, value in us.items()])
    assert {part: made["us"] for part, made in found["parts"].items()} == {
        "scores and selection": 40.0, "attention": 31.0, "products": 25.0, "small": 2.0, "merge": 1.5, "other": 0.5
    }  # fmt: skip
    assert found["launches"] == 16 and found["parts"]["attention"]["launches"] == 4
    long = (
        "void at::native::elementwise_kernel<128, 4, at::native::gpu_kernel_impl_nocast<at::native::lerp_tensor_kernel("
    )
    named = account.parts([{"name": long, "launches": 1.0, "us": 1.0}])
    assert named["kernels"][0]["name"].startswith("lerp_tensor_kernel") and "merge" in named["parts"]
    ratio = account.ratio(0.12, found["parts"])
    assert ratio["essential_ms"] == pytest.approx(0.096) and ratio["ratio"] == pytest.approx(1.25)
    assert account.ratio(1.0, {})["ratio"] is None


def test_the_chunk_that_waits_is_named(bench):
    worst = bench("bill.account").worst
    assert worst([9.0, 2.0, 2.0, 6.0, 4.0, 4.0]) == {"chunk": 3, "times": pytest.approx(2.0)}
    assert worst([1.0, 2.0]) is None


def test_what_is_compiled_meanwhile_is_named(bench):
    import triton

    names, kept = [], triton.knobs.compilation.listener
    with pytest.raises(KeyError), bench("bill.prefill").compilations(names):
        triton.knobs.compilation.listener(src=types.SimpleNamespace(name="_fused"), metadata={}, cache_hit=False)
        raise KeyError
    assert names == ["_fused"] and triton.knobs.compilation.listener is kept
    made = {
        "chunk": 4096,
        "chunks_ms": [5.0] * 4,
        "total_ms": 20.0,
        "worst": {"chunk": 1, "times": 1.0},
        "peak_gib": 3.0,
    }
    text = bench("bill.lines").prompt(made | {"warm_s": 1.0, "compiled": [{"chunk": 2, "kernel": "_fused"}] * 9})
    assert "prompt of 16K: 0.02 s in 4 chunks" in text[1] and "compiled meanwhile: _fused in chunk 2" in text[-1]
    assert all(len(line) <= 120 for line in text)


def test_a_prompt_is_the_sum_of_its_chunks(bench):
    prompt_ms = bench("bill.account").prompt_ms
    points = {4: 1.0, 8: 2.0, 16: 6.0}
    assert prompt_ms(points, 4, 4) == 1.0
    assert prompt_ms(points, 16, 4) == pytest.approx(1 + 2 + 4 + 6)
    assert prompt_ms({2: 0.5, 4: 1.0}, 2, 2) == 0.5


def made_rows(times, extrapolated=False):
    """Prefill's rows of {position: (DSA's ms, dense ms)}."""
    return [
        {"position": p, "tokens": 4096, "results": {
            "DSA": {"verdict": "right", "ms": dsa},
            "dense, heads made": {"verdict": "right", "ms": dense, "extrapolated": extrapolated},
            "dense, heads kept": {"verdict": "WRONG", "ms": 0.1, "extrapolated": False},
        }}
        for p, (dsa, dense) in times.items()
    ]  # fmt: skip


def test_where_dsa_costs_half(bench):
    account = bench("bill.account")
    rows = made_rows({4096: (4.0, 2.0), 8192: (4.0, 4.0), 16384: (4.0, 12.0)})
    bill = account.made_up(rows, [])
    assert bill["half"]["prefill"] == {"position": 11585, "between": [8192, 16384]}  # 8192 · 2^(1/2)
    assert bill["half"]["prefill, dense, heads made"] == bill["half"]["prefill"]
    assert "prefill, dense, heads kept" not in bill["half"] and bill["prefill"][1]["all"] == {"dense, heads made": 1.0}
    assert bill["half"]["prompt"] == {"position": None, "between": None}  # (2 + 4 + 8 + 12) / 16
    last = bill["prefill"][-1]
    assert last["dense"] == "dense, heads made" and last["dsa_ms"] == pytest.approx(4.0 / 4.096)
    assert last["prompt_dense_ms"] == pytest.approx(26 / 16.384) and last["prompt_times"] == pytest.approx(26 / 16)
    prompt = {"chunk": 4096, "chunks_ms": [4.0, 4.2, 4.3, 4.1], "total_ms": 16.6}
    beside = account.made_up(rows, [], prompt)["prompt"]
    assert beside == {"tokens": 16384, "measured_ms": 16.6, "summed_ms": pytest.approx(16.0)}
    early = account.made_up(made_rows({4096: (1.0, 3.0)}), [])["half"]["prefill"]
    assert early == {"position": 4096, "between": [None, 4096]}
    falling = account.halved([{"position": p, "t": t} for p, t in ((1, 3.0), (2, 1.0), (4, 2.0))], "t")
    assert falling == {"position": 4, "between": [2, 4]}

    steps = [
        {"batch": B, "position": p, "results": {"DSA": {"verdict": "right", "us": 80.0}, "dense": made}}
        for B in (1, 8)
        for p, made in ((4096, {"verdict": "right", "us": 100.0}), (8192, {"verdict": "failed", "note": ""}))
    ]
    lines = account.made_up([], steps)["decode"]
    assert [line["batch"] for line in lines] == [1, 8]
    assert lines[1]["dsa_ms"] == 10.0 and lines[1]["dense_ms"] == 12.5 and lines[1]["times"] == 1.25


@pytest.mark.parametrize("path", sorted(figures_folder().glob("layer_h*.json")), ids=lambda path: path.name)
def test_a_recorded_bill_is_that_of_its_measurements(bench, path):
    steps = json.loads(path.read_text(encoding="utf-8"))["steps"]
    made = bench("bill.account").made_up(steps["prefill"]["rows"], steps["decode"]["rows"], steps["prompt"])
    assert {name: steps["bill"][name] for name in made} == json.loads(json.dumps(made))
    for row in (*steps["prefill"]["rows"], *steps["decode"]["rows"]):
        assert all(result["verdict"] == "right" for result in row["results"].values())


def test_the_bill_as_text(bench):
    account, lines = bench("bill.account"), bench("bill.lines")
    rows = made_rows({4096: (4.0, 2.0), 1 << 20: (80.0, 600.0)}, extrapolated=True)
    steps = [{"batch": 8, "position": 1 << 20, "results": {
        "DSA": {"verdict": "right", "us": 100.0}, "dense, FlashMLA, bf16": {"verdict": "right", "us": 4500.0}
    }}]  # fmt: skip
    text = lines.bill(account.made_up(rows, steps, {"chunk": 4096, "chunks_ms": [1.0] * 256, "total_ms": 256.0}), 2.0)
    assert all(len(line) <= 120 for line in text)
    joined = "\n".join(text)
    assert "a prompt of 1M by DSA: 0.26 s measured, 10.75 s by its chunks" in joined
    assert "prefill    1M: DSA 19.53 ($0.662), dense 146.48 ($4.964)*= 7.50x" in joined
    assert "half the cost, decode, batch 8: already at 1M, the first position" in joined
    failed = {
        "rows": [{"batch": 1, "position": 4096, "results": {"DSA": {"verdict": "failed", "note": "no memory " * 20}}}]
    }
    assert all(len(line) <= 120 for line in lines.decode(failed)) and "no memory" in "\n".join(lines.decode(failed))


def test_arguments(bench, capsys, tmp_path):
    main = importlib.import_module("dsa_bench.bill.__main__")
    options = main.parse([])[1]
    assert options.sections == ["prefill", "prompt", "decode"] and options.most == 1 << 20
    quick = main.parse(["prefill", "--quick", "--price", "3.5"])[1]
    assert (quick.sections, quick.most, quick.price) == (
        ["prefill"],
        main.QUICK_MOST,
        3.5,
    ) and quick.rounds < main.ROUNDS
    for arguments, reason in (
        (["chain"], "section must be one of prefill, prompt, decode, got chain"),
        (["--price", "-1"], "--price must be at least 0 and finite, got -1.0"),
        (["--price", "inf"], "--price must be at least 0 and finite, got inf"),
        (["--most", "100"], "--most must be at least 4096, got 100"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main.parse(arguments)
        assert stopped.value.code == 2 and reason in capsys.readouterr().err
    if not torch.cuda.is_available():
        assert main.main(["--log", str(tmp_path / "x.json")]) == 2 and not list(tmp_path.iterdir())
    assert bench("records").layer_log("NVIDIA H200").name == "layer_h200.json"
    right = {"results": {"DSA": {"verdict": "right"}, "dense, FlashMLA, bf16": {"verdict": "missing"}}}
    assert not main.wrong(right)
    assert main.wrong({"results": {"DSA": {"verdict": "right"}, "dense, 4 splits": {"verdict": "WRONG"}}})
