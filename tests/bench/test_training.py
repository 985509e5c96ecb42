"""The bench of training at toy sizes: right results pass, each kind of wrong one is refused, and what it writes."""

import dataclasses
import importlib
import json

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

import dsa_ref
from dsa_ref import cost
from dsa_ref.config import V32
from notebooks.maintain import tables

pytestmark = [
    pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON),
    pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes on a CPU, without peers: on a GPU run the bench"),
]

TINY = dataclasses.replace(
    V32, dim=64, n_heads=4, q_lora_rank=32, kv_lora_rank=32, qk_nope_head_dim=16, qk_rope_head_dim=16, v_head_dim=16,
    index_n_heads=16, index_head_dim=32, index_topk=16, index_fp8=False, max_seq_len=8192,
)  # fmt: skip
T, S, K = 6, 24, 16


@pytest.fixture
def bench():
    """`bench("run")` is `dsa_bench.training.run`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.training.{name}")


@pytest.fixture
def case(bench):
    return bench("gradients").gradient_case(T, S, TINY.n_heads, K, TINY, "cpu")


@pytest.fixture
def timed(monkeypatch):
    """Times without a GPU: each call takes as many ms as its name has letters."""
    measure = importlib.import_module("dsa_bench.measure")
    monkeypatch.setattr(
        measure, "time_together",
        lambda calls, rounds, as_they_are: {
            who: measure.Timing([float(len(who))] * rounds, as_they_are.get(who, "graph")) for who in calls
        },
    )  # fmt: skip
    monkeypatch.setattr(importlib.import_module("dsa_bench.training.run"), "free", lambda: None)
    for name in ("REPEATS", "PEERS_REPEATS"):
        monkeypatch.setattr(importlib.import_module("dsa_bench.training.run"), name, 1)


def test_work_is_that_of_five_products(bench):
    gradients = bench("gradients")
    selected = cost.causal_pairs(4096, 8192, V32.index_topk)
    assert gradients.backward_flops(128, selected) == 128 * 5504 * selected
    assert round(gradients.backward_flops(128, selected) / 14.11e-3 / 1e12) == 419  # KERNELS 5: 14.11 ms
    dense = bench("peers").DenseBackward("flash", 4096, 8192, 128, V32)
    assert dense.work == 128 * 2 * (3 * 192 + 2 * 128) * cost.causal_pairs(4096, 8192)


def test_a_case_of_the_backward_and_the_sparse_loss(bench, case, timed):
    """Ours is right, peers without a GPU are missing, autograd through a gather agrees, and the record says it all."""
    once = [case.calls.pop(who) for who in ("atomic", *bench("losses").SPARSE[1:])]
    assert all(call.ours and call.check(call.run()) for call in once)
    row = bench("run").measure_case(lambda: case, "6 x 24", {"bf16": 700.0}, 3, watch=lambda call: len(call()))
    results, given = row["results"], bench("losses").SPARSE[0]
    assert [who for who, found in results.items() if found["ours"]] == ["sorted", given]
    assert {results[who]["verdict"] for who in ("sorted", given, "torch, gather")} == {"right"}, results
    assert {results[who]["verdict"] for who in ("TileLang", "TileLang, miles", bench("peers").DENSE[0])} == {"missing"}
    assert results["sorted"]["equal"] == results["sorted"]["repeats"] == 1 and results["sorted"]["times"] == 1.0
    assert results["sorted"]["memory_bytes"] == 3 and results[given]["memory_bytes"] == 4
    assert results[given]["times"] == pytest.approx(len(given) / 6) and "rate" not in results[given]
    assert results["sorted"]["rate"] == pytest.approx(4 * 2 * (3 * 48 + 2 * 32) * T * K / 6e-3 / 1e12)
    assert results["torch, gather"]["timed"].startswith("eager")
    json.dumps(row)
    texts = bench("__main__").lines("backward", row)
    assert all(len(text) <= 120 for text in texts) and any("missing" in text for text in texts)


def test_a_wrong_gradient_is_refused(bench, case):
    call, Wrong = case.calls["sorted"], bench("checks").Wrong
    dq, dkv, target = call.run()
    assert call.check((dq, dkv, target)).startswith("errors: dq")
    turned, swapped, unwritten = dkv.clone(), target.clone(), dq.clone()
    turned[7] *= -1
    swapped[3] = target[3].flip(0)
    unwritten[0, 0, 0] = torch.nan
    spoilt = {
        "dq is off": (1.02 * dq, dkv, target), "dkv is off": (dq, turned, target), "target": (dq, dkv, swapped),
        "not finite": (unwritten, dkv, target), "shape": (dq, dkv[:-1], target),
    }  # fmt: skip
    for what, result in spoilt.items():
        with pytest.raises(Wrong, match=what):
            call.check(result)


def test_the_backward_is_not_blamed_for_the_bits_of_out(bench):
    """Where one key has nearly all the weight, a gradient from an exact forward pass is another one."""
    gradients, checks = bench("gradients"), bench("checks")
    q, kv, indices, scale, _, _, dout = gradients.attention_gradients(4 * T, 2 * S, TINY.n_heads, K, TINY, "cpu")
    q, v_dim = 4 * q, TINY.kv_lora_rank
    given = importlib.import_module("dsa_kernels").sparse_attention(q, kv, indices, scale, v_dim)
    exact = dsa_ref.sparse_attention(q.float(), kv.float(), indices, scale, v_dim)
    *found, _ = importlib.import_module("dsa_kernels").sparse_attention_backward(
        q, kv, indices, scale, v_dim, *given, dout
    )
    wanted = {out: gradients.wanted_gradients(q, kv, indices, scale, *out, dout)[0] for out in (given, exact)}
    checks.check_gradients(found, wanted[given])
    with pytest.raises(checks.Wrong, match="row"):
        checks.check_gradients(found, wanted[exact])
    no_delta = gradients.wanted_gradients(q, kv, indices, scale, torch.zeros_like(given[0]), given[1], dout)[0]
    with pytest.raises(checks.Wrong, match="dq is off"):
        checks.check_gradients(list(no_delta.values()), wanted[given])


def test_autograds_wider_bound_still_refuses(bench, case):
    call, Wrong = case.calls["torch, gather"], bench("checks").Wrong
    dq, dkv = call.run()
    assert call.check((dq, dkv))
    for spoilt in ((1.05 * dq, dkv), (dq, 1.05 * dkv)):
        with pytest.raises(Wrong, match="off by"):
            call.check(spoilt)


def test_one_wrong_row_of_many_is_refused_and_a_small_one_judged_by_the_usual(bench):
    checks = bench("checks")
    want = torch.randn(40_000, 8)
    want[0], want[1] = 0.0, want[1] * 1e-6
    got = want.clone()
    got[1] = 0.0
    checks.check_gradients([got], {"dq": want})
    for row, value in ((5, 0.5), (0, 1e-3)):  # its share of the whole norm is below the bound
        wrong = got.clone()
        wrong[row] += value
        assert (wrong - want).norm() / want.norm() < checks.GRADIENT_ERROR
        with pytest.raises(checks.Wrong, match=f"row {row} of 40000 of dq"):
            checks.check_gradients([wrong], {"dq": want})


def test_a_wrong_loss_is_refused(bench, case):
    """KL reversed, the target left out, a loss over all keys, and a stray factor: each is not the sparse stage's."""
    losses, Wrong = bench("losses"), bench("checks").Wrong
    call = case.calls[losses.SPARSE[0]]
    loss, *gradients = call.run()
    assert "loss" in call.check((loss, *gradients))
    with pytest.raises(Wrong, match="the loss is"):
        call.check((1.01 * loss, *gradients))
    with pytest.raises(Wrong, match="dk_idx"):
        call.check((loss, gradients[0], -gradients[1], gradients[2]))
    with pytest.raises(Wrong):
        call.check((loss, *(T * gradient for gradient in gradients)))  # summed, not averaged


def test_a_case_of_the_warm_up(bench, timed):
    case = bench("losses").warm_up_case(T, TINY.n_heads, TINY, "cpu")
    row = bench("run").measure_case(lambda: case, "6 x 6", {"bf16": 700.0}, 2, True, watch=lambda call: 0)
    assert list(row["results"]) == [who for who in case.calls if who.startswith("KL")]
    assert {found["verdict"] for found in row["results"].values()} == {"right"}
    loss, *gradients = next(iter(case.calls.values())).run()
    with pytest.raises(bench("checks").Wrong, match="dq_idx"):
        next(iter(case.calls.values())).check((loss, gradients[0].flip(0), *gradients[1:]))


def test_dense_backward_in_two_parts(bench, monkeypatch):
    """The keys before the queries and the causal square, put together, are one attention's backward."""
    peers = bench("peers")
    dense = peers.DenseBackward("flash", T, S, 4, TINY, "cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(dense, "_forward", lambda k, v, causal: attended(dense, k, v, causal))
    monkeypatch.setattr(dense, "_backward", lambda k, v, causal, made: gradients_of(dense, k, v, causal))
    assert "dv" in dense.check(dense())
    monkeypatch.setattr(dense, "_backward", lambda k, v, causal, made: gradients_of(dense, k, v, False))
    with pytest.raises(bench("checks").Wrong):
        dense.check(dense())


def probabilities(dense, k, causal, lse=None):
    logits = dense.q.float() @ k.float().mT * TINY.softmax_scale
    if causal:
        logits = logits.masked_fill(torch.ones(T, T, dtype=torch.bool).triu(1), -torch.inf)
    lse = logits.logsumexp(dim=-1, keepdim=True) if lse is None else lse.view(1, 4, T, 1)
    return (logits - lse).exp(), lse


def attended(dense, k, v, causal):
    p, lse = probabilities(dense, k, causal)
    return (p @ v.float()).bfloat16(), lse[..., 0]


def gradients_of(dense, k, v, causal):
    """A part's, with the log-sum-exp and the output of the whole, as the operators take them."""
    p, _ = probabilities(dense, k, causal, dense.lse)
    dout = dense.padded_dout.float()
    delta = (dout * dense.out.float()).sum(dim=-1, keepdim=True)
    ds = p * (dout @ v.float().mT - delta) * TINY.softmax_scale
    return tuple(part.bfloat16() for part in (ds @ k.float(), ds.mT @ dense.q.float(), p.mT @ dout))


def test_a_training_step_of_a_layer(bench):
    """Each weight's gradient is the reference's; a step that does not teach its indexer is refused."""
    case = bench("step").step_case(18, TINY, "cpu")
    dense, sparse = case.calls["dense"], case.calls["sparse"]
    assert "q_a_proj" in dense.check(dense.run())
    gradients = sparse.run.gradients()
    assert list(gradients)[-1] == "x" and "indexer.wk.weight" in sparse.check(tuple(gradients.values()))
    gradients["indexer.wk.weight"] = torch.zeros_like(gradients["indexer.wk.weight"])
    with pytest.raises(bench("checks").Wrong, match="indexer.wk"):
        sparse.check(tuple(gradients.values()))


def test_repeats_are_compared_bit_by_bit(bench, monkeypatch):
    run = bench("run")
    zeros = iter([0.0, 0.0, -0.0, 0.0])
    assert run.same_bits(lambda: torch.tensor([next(zeros)]), 3) == {"repeats": 3, "equal": 2}
    monkeypatch.setattr(run, "REPEAT_SECONDS", 0.0)
    assert run.same_bits(lambda: torch.ones(1), 9) == {"repeats": 0, "equal": 0}


def test_what_fails_costs_itself_alone(bench, timed):
    run, main = bench("run"), bench("__main__")

    def fails():
        raise RuntimeError("out of luck")

    call = run.Call(lambda: torch.ones(2), lambda found: "")
    case = run.Case({"one": call, "two": dataclasses.replace(call, run=fails)}, "one")
    row = run.measure_case(lambda: case, "c", {"bf16": 1.0}, 2, watch=lambda call: 0)
    assert [found["verdict"] for found in row["results"].values()] == ["right", "failed"]
    assert "out of luck" in main.lines("s", row)[-1]
    row = run.measure_case(fails, "c", {"bf16": 1.0}, 2)
    assert row["results"]["the case"]["verdict"] == "failed"


def test_tilelangs_files_are_looked_for_where_the_variable_says(bench, monkeypatch, tmp_path):
    peers = bench("peers")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    peers.tilelang_module.cache_clear()
    monkeypatch.setenv(peers.FOLDER_VARIABLE, str(tmp_path))
    with pytest.raises(peers.Missing, match="no sparse_mla_bwd.py in the folder that DSA_TILELANG_EXAMPLES names"):
        peers.tilelang_module(peers.EXAMPLE)
    (tmp_path / "utils_beside.py").write_text("NAME = 'beside'\n")
    example = tmp_path / peers.EXAMPLE
    example.write_text("from utils_beside import NAME\ns_i, S_kv, S = 1, 9, 4\nif True:\n    max_kv_i = s_i\n")
    module = peers._imported(example)
    assert (module.NAME, module.max_kv_i) == ("beside", 6)  # the last key that query 1 of 4 at the end of 9 sees
    assert len(peers.versions()[peers.EXAMPLE]) == 12
    example.write_text("pass\n")
    with pytest.raises(peers.Missing, match="another version"):
        peers._imported(example)


def test_the_record_grows_case_by_case_and_a_wrong_one_of_ours_counts(bench, timed, tmp_path, monkeypatch):
    main, run = bench("__main__"), bench("run")
    log = tmp_path / "log.json"
    call = run.Call(lambda: torch.ones(2), lambda found: "fine")
    wrong = dataclasses.replace(call, check=lambda found: bench("checks").check_loss(found[0], torch.tensor(2.0)))
    cases = {"backward": {"a": lambda: run.Case({"sorted": call}, "sorted")}}
    _, options = main.parse(["backward", "--log", str(log)])
    ceilings = {"copy": 1.0, "bf16": 2.0, "fp8": None}
    given = options, log, {"device": "x"}, ceilings
    assert not main.measured(*given, cases, watch=lambda call: 5)
    cases["backward"]["b"] = lambda: run.Case({"sorted": wrong, "theirs": dataclasses.replace(wrong, ours=False)}, "")
    assert main.measured(*given, cases, watch=lambda call: 5)
    rows = json.loads(log.read_text())["steps"]["backward"]["rows"]
    assert [found["results"]["sorted"]["verdict"] for found in rows] == ["right", "WRONG"]
    assert rows[0]["results"]["sorted"]["memory_bytes"] == 5
    cases["backward"]["b"] = lambda: run.Case({"sorted": call, "theirs": dataclasses.replace(wrong, ours=False)}, "")
    assert not main.measured(*given, cases, watch=lambda call: 5)  # a peer's fault is no fault of ours


def test_the_readme_s_tables_of_a_record():
    """The fastest right one counts; who is missing, wrong or failed says so; losses stand beside their backward."""
    run = {"verdict": "right", "note": "", "memory_bytes": 3 << 30, "rate": 400.0, "ours": True}
    results = {
        "sorted": run | {"ms": 10.0}, "atomic": run | {"ms": 9.0}, "TileLang": run | {"ms": 30.0},
        "TileLang, miles": run | {"ms": 20.0, "verdict": "WRONG"}, "torch, gather": {"verdict": "failed", "note": ""},
        "KL, target given": run | {"ms": 1.5},
    }  # fmt: skip
    warm_up = {"KL, dense": run | {"ms": 8.0}, "dense MHA, flash": run | {"ms": 4.0}}
    step = {"sparse": run | {"ms": 40.0}, "sparse, reference": {"verdict": "failed", "note": "no memory"}}
    made = {"device": "NVIDIA H100", "torch": "2", "triton": "3", "command": "python -m dsa_bench.training"}
    steps = {
        name: {"provenance": made, "rows": [{"case": case, "results": found}]}
        for name, case, found in (("backward", "4K", results), ("warm-up", "8K", warm_up), ("layer", "T", step))
    }
    text = tables.trained("training_kernels_h100.json", steps)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert rows[2] == ["4K", "10.00", "400", "3.0", "9.00", "30.00", "20.00, wrong", "failed", "3.00", ""]
    assert rows[5:] == [
        ["KL, target given, 4K", "1.50", "0.15", "sparse attention's backward", "3.0"],
        ["KL, dense, 8K", "8.00", "2.00", "dense MHA, flash, backward", "3.0"],
        ["a layer's step, sparse, T", "40.00", "1.00", "the sparse step", "3.0"],
        ["a layer's step, sparse, reference, T", "failed", "", "the sparse step", ""],
    ]


def test_arguments(bench, capsys, monkeypatch):
    main = bench("__main__")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert main.main([]) == 2 and "CUDA GPU" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main.parse(["sideways"])
    assert stopped.value.code == 2 and "step must be one of backward, warm-up, layer" in capsys.readouterr().err
    records = importlib.import_module("dsa_bench.records")
    assert records.training_log("NVIDIA H100 80GB HBM3").name == "training_kernels_h100.json"
    assert records.training_log("RTX") is None
    assert dsa_ref.records.figures_folder() == records.training_log("NVIDIA H200").parent
