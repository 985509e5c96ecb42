"""The training script under torchrun: the same losses and files as alone, and going on with another number of ranks."""

import json
import os
import signal
import subprocess
import sys
import time
from unittest import mock

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dsa_ref.parallel.ranks import MESSAGE
from dsa_ref.training import train
from dsa_ref.training.run import Run
from dsa_ref.training.team import Alone

SMALL = "--steps 3 3 3 --batch 2 --micro 1 --length 64 --k 8 --pairs 1 --asks 1".split()
SMALL += "--windows 1 --save-every 2 --log-every 1 --timeout 30 --device cpu --dtype fp32".split()


def command(folder, *more):
    files = {name: str(folder / name) for name in ("weights", "log", "state")}
    return [*(part for name, path in files.items() for part in (f"--{name}", path)), *SMALL, *more]


def over(ranks, folder, *more):
    """The program that torchrun is, as a list."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    return [*launcher, "-m", "--", "dsa_ref.training.train", *command(folder, *more)]


def result(folder):
    """(losses by step, what was measured, how many ranks each session had)."""
    log = json.loads((folder / "log").read_text())
    rows = [[row[name] for name in ("language_loss", "indexer_loss")] for row in log["history"]]
    return rows, log["after"], [session.get("ranks", 1) for session in log["sessions"]]


def close(losses, others):
    return all(
        a == b is None or a == pytest.approx(b, abs=2e-3)
        for row, other in zip(losses, others, strict=True)
        for a, b in zip(row, other, strict=True)
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    folder = tmp_path_factory.mktemp("alone")
    train.main(command(folder))
    return folder


def test_two_ranks_killed_then_one(alone, tmp_path):
    """Two ranks train until they are killed; one goes on, from their state, to what one alone comes to."""
    with subprocess.Popen(over(2, tmp_path), stderr=subprocess.PIPE, text=True, start_new_session=True) as process:
        for line in process.stderr:
            if line.startswith("after dense"):
                break
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            with safe_open(tmp_path / "state", framework="pt") as file:
                if json.loads(file.metadata()["about"])["stage"] != "dense":
                    break
            time.sleep(0.01)
        os.killpg(process.pid, signal.SIGKILL)
    assert not (tmp_path / "log").exists()
    train.main(command(tmp_path))
    losses, after, ranks = result(tmp_path)
    wanted, measured, _ = result(alone)
    assert ranks == [2, 1] and close(losses, wanted) and not close(losses, wanted[::-1])
    assert after["saved"]["held_out_loss"] == pytest.approx(measured["saved"]["held_out_loss"], abs=2e-3)
    weights, others = (load_file(folder / "weights") for folder in (tmp_path, alone))
    assert {name: weight.shape for name, weight in weights.items()} == {n: w.shape for n, w in others.items()}


def test_one_then_three_ranks(alone, tmp_path):
    """A state of one rank, stopped in time, goes on over three; they end it, and only one of them writes and speaks."""
    with pytest.raises(SystemExit):
        train.main(command(tmp_path, "--minutes", "0.001"))
    done = subprocess.run(over(3, tmp_path), capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    losses, _, ranks = result(tmp_path)
    assert ranks == [1, 3] and close(losses, result(alone)[0])
    assert done.stderr.count("after sparse") == 1 and done.stdout.count('"saved"') == 1


def test_other_weights_on_a_rank_are_noticed(tmp_path):
    """A rank that goes on from another state than the others ends the run on all of them."""
    train.main(command(tmp_path, "--minutes", "1"))
    (tmp_path / "other").mkdir()
    train.main(command(tmp_path / "other"))
    program = (
        "import os, sys; from dsa_ref.training import train; rank = int(os.environ['RANK']); "
        "train.main(sys.argv[1].split() if rank else sys.argv[2].split())"
    )
    (tmp_path / "program.py").write_text(program)
    state = (tmp_path / "state").read_bytes()
    given = [" ".join(command(folder, "--seed", "0")) for folder in (tmp_path, tmp_path / "other")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    (tmp_path / "other" / "state").unlink()
    done = subprocess.run(
        [*launcher, str(tmp_path / "program.py"), *given], capture_output=True, text=True, timeout=120
    )
    assert (
        done.returncode != 0
        and "stage must be the same on all ranks, got dense on rank 0, finished on 1" in done.stderr
    )
    assert (tmp_path / "state").read_bytes() == state


def test_a_device_has_its_number(monkeypatch):
    """Windows are drawn in a thread, for which "cuda" would be the first GPU and not the rank's."""
    options = train._make_parser().parse_args("--weights w --log l --length 64 --k 8 --device cuda".split())
    place = mock.Mock(device=torch.device("cuda:1"))
    monkeypatch.setattr(torch, "empty", lambda *_, **__: place)
    train.resolve_options(None, options)
    assert options.device == "cuda:1"


def test_only_the_first_rank_removes_what_was_left(tmp_path):
    """Two ranks that remove one folder would meet: the second would fail."""
    left = tmp_path / ".writing-x"
    left.mkdir()
    (left / "state").touch()
    (tmp_path / "state").write_bytes(b"no state")
    for rank, there in ((1, True), (0, False)):
        half = mock.Mock(state=tmp_path / "state", options={})
        half.team.rank = rank
        with pytest.raises(ValueError, match="whole state"):
            Run._resume(half)
        assert left.exists() == there


def test_other_options_are_told_by_name(monkeypatch, tmp_path):
    """What ranks compare before the first step are the options themselves; they fit into one message."""
    facts = {}
    monkeypatch.setattr(Alone, "check_same", lambda self, what, tensors, **same: facts.setdefault(what, same))
    train.main(command(tmp_path, "--steps", "1", "1", "1"))
    assert facts["options"]["--steps"] == [1, 1, 1] and facts["options"]["--batch"] == 2
    assert len(json.dumps({"same": {"call": "options", **facts["options"], "options": 0}, "own": {}})) < MESSAGE
