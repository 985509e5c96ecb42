"""The bench of a layer over several ranks: two processes on gloo at toy sizes, right ones and with faults planted."""

import dataclasses
import importlib
import json
import os
import pathlib
import subprocess
import sys

import pytest
import rungs
import torch
from conftest import NEEDS_TRITON

from dsa_ref import TINY, cost, records
from dsa_ref.parallel import Zigzag
from notebooks.maintain import tables

ROOT = pathlib.Path(__file__).parents[2]
pytestmark = [
    pytest.mark.skipif(not rungs.has_triton(), reason=NEEDS_TRITON),
    pytest.mark.skipif(torch.cuda.is_available(), reason="toy sizes on a CPU: on GPUs run the bench"),
]


@pytest.fixture
def bench():
    """`bench("judge")` is `dsa_bench.parallel.judge`, imported where triton is known to be there."""
    return lambda name: importlib.import_module(f"dsa_bench.parallel.{name}")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory):
    """(what two ranks found, by name, and the record of the right run)."""
    folder = tmp_path_factory.mktemp("parallel")
    paths = [ROOT, ROOT / "kernels", ROOT / "notebooks", ROOT / "tests", ROOT / "tests/parallel"]
    run = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
         str(ROOT / "tests/bench/parallel_ranks.py"), str(folder)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads((folder / "found.json").read_text()), json.loads((folder / "right.json").read_text())


def test_two_ranks_are_judged_right_and_leave_a_record(ranks, bench):
    found, record = ranks
    assert found["right"] == {"code": 0, "verdicts": ["right"] * 4}
    assert list(record["steps"]) == ["prefill", "training", "decode", "long"]
    for section, step in record["steps"].items():
        assert step["ranks"] == step["provenance"]["ranks"] == 2
        assert step["provenance"]["command"].startswith("torchrun --nproc-per-node 2 -m dsa_bench.parallel --tiny")
        for row in step["rows"]:
            assert row["one_ms"] > 0 and row["all_ms"] > 0 and len(row["notes"]) == 2
            assert row["efficiency"] == pytest.approx(row["one_ms"] / row["all_ms"] / 2)  # of one round
            assert row["exchange"]["share"] > 0 and len(row["exchange"]["wait_ms"]) == 2
            assert all(len(text) <= 120 for text in bench("lines").row(section, row, 2))


@pytest.mark.parametrize(
    "fault",
    ["local positions for global", "keys in the order of ranks", "places ignored", "merge by mean",
     "own candidates alone", "mean of gradients", "gradients not summed"],
)  # fmt: skip
def test_a_wrong_result_is_refused(ranks, fault):
    found = ranks[0][fault]
    assert found["code"] == 1 and set(found["verdicts"]) == {"WRONG"}


def test_bytes_are_those_of_the_rows(ranks):
    """A run receives what `cost` says, in rows of keys, candidates and parts; and gradients, there and back."""
    steps = ranks[1]["steps"]
    received = {name: [each["exchange"]["bytes"] for each in steps[name]["rows"]] for name in steps}
    assert received["prefill"] == [cost.gathered_bytes(TINY, 48, 2)]
    assert received["long"] == [cost.gathered_bytes(TINY, 64, 2) + 4 * 64 // 2]  # with their places
    assert received["decode"] == [sum(cost.sharded_bytes(TINY, 1, 40, 2).values())]
    exchanges = steps["training"]["rows"][0]["exchange"]["calls"]
    whats = [each["what"] for each in exchanges if each["what"] != "agree"]
    assert whats == ["all_gather", "reduce_scatter", "reduce_scatter", "all_reduce"]
    taught = dataclasses.replace(TINY, index_fp8=False)
    sizes = [each["bytes"] for each in exchanges if each["bytes"]]
    assert sizes[0] == cost.gathered_bytes(taught, 24, 2)
    assert sizes[1:3] == [12 * width * 4 for width in (TINY.latent_dim, TINY.index_head_dim)]
    weights = sum(cost.matrices(taught).values())
    assert weights <= sizes[3] / 4 < 1.05 * weights  # besides the norms' weights


def test_pairs_are_counted_and_contiguous_shares_are_not_balanced(ranks):
    whole, behind = (ranks[1]["steps"][section]["rows"][0] for section in ("prefill", "long"))
    for row in (whole, behind):
        T, S = row["tokens"], row["keys"]
        seen = [S - T + t + 1 for t in range(T)]
        zigzag = [sum(seen[t] for t in Zigzag(T, 2).rows(rank).tolist()) for rank in range(2)]
        assert row["selection"]["zigzag"]["pairs"] == zigzag
        assert row["selection"]["contiguous"]["pairs"] == [sum(seen[: T // 2]), sum(seen[T // 2 :])]
        assert row["selection"]["zigzag"]["pairs_imbalance"] == 0
    assert whole["selection"]["contiguous"]["pairs_imbalance"] == pytest.approx(0.5, abs=0.02)


def test_the_readme_s_table_of_a_record(ranks):
    """A line a case, prompts with what is predicted of them; a wrong one says so."""
    steps = json.loads(json.dumps(ranks[1]["steps"]))
    steps["decode"]["rows"][0] |= {"verdict": "WRONG", "memory_bytes": [3 << 30, 1 << 30]}
    text = tables.over_ranks("parallel_2_h200.json", steps)
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in text.splitlines() if line.startswith("| ")]
    assert "2 x CPU" in text and [row[0] for row in rows[2:]] == [
        "a prompt of 48", "16 at the end of 64", "a step of 24", "a token behind 40, wrong"
    ]  # fmt: skip
    prompt = steps["prefill"]["rows"][0]
    assert rows[2][1:4] == [f"{prompt[key]:.{n}f}" for key, n in (("one_ms", 2), ("all_ms", 2), ("efficiency", 3))]
    assert rows[2][4:6] == tables.predicted(prompt, 2) and rows[4][4:6] == ["", ""]
    assert rows[2][9].endswith("%") and rows[5][10] == "3.0" and all(len(row) == 11 for row in rows)
    one = {"tokens": 4096, "keys": 1 << 20}
    assert [float(tables.predicted(one, size)[1]) for size in (1, 8)][0] == 1 > float(tables.predicted(one, 8)[1])


def test_the_same_bits_must_give_the_same_selection(bench):
    """Another key at the threshold is let pass where bits differ, and only a few."""
    judge, Wrong = bench("judge"), importlib.import_module("dsa_bench.checks").Wrong
    lists = torch.arange(100, dtype=torch.int32).expand(3, -1).clone()
    one = {"lists": lists, "queries": torch.ones(3, 2, 4), "y": torch.ones(3, 5)}
    other = one | {"lists": lists.clone(), "queries": one["queries"].clone()}
    assert judge.check_against_one(other, one, True) == (3, 3)
    other["lists"][1, 99] = 100
    with pytest.raises(Wrong, match="the selection is another"):
        judge.check_against_one(other, one, True)
    other["queries"][1] *= 1.001
    assert judge.check_against_one(other, one, True) == (2, 3)
    other["lists"][1, 90:] += 20
    with pytest.raises(Wrong, match="little in common"):
        judge.check_against_one(other, one, True)
    with pytest.raises(Wrong, match="query is off"):
        judge.check_against_one(one | {"queries": 1.1 * one["queries"]}, one, True)
    with pytest.raises(Wrong, match="output row"):
        judge.check_against_one(one | {"y": 1.1 * one["y"]}, one, True)


def test_a_digest_knows_bits_from_places(bench):
    judge = bench("judge")
    a, b = torch.tensor([1.0, 2.0]), torch.tensor([1, 2, 3], dtype=torch.uint8)
    assert judge.digest([a, None, b]) == judge.digest([a.clone(), b.clone()])
    assert len({judge.digest(each) for each in ([a, b], [b, a], [-a, b], [a, b + 1], [a])}) == 5


def test_imbalance_is_against_the_mean(bench):
    assert bench("measured").imbalance([1, 1, 1, 1]) == 0 and bench("measured").imbalance([1, 3]) == 0.5


def test_arguments(bench, capsys, monkeypatch):
    main = bench("__main__")
    assert main.main([]) == 2 and "CUDA GPU" in capsys.readouterr().err
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    assert main.main(["--tiny"]) == 2 and "torchrun" in capsys.readouterr().err
    with pytest.raises(SystemExit) as stopped:
        main.parse(["sideways"])
    assert stopped.value.code == 2
    assert "section must be one of prefill, training, decode, long" in capsys.readouterr().err
    log = importlib.import_module("dsa_bench.records").parallel_log
    assert log("NVIDIA H200", 4) == records.figures_folder() / "parallel_4_h200.json" and log("RTX", 4) is None
