"""The training command from its start to its end: killed, stopped and continued runs, and what it refuses."""

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from test_train import looking_model, tiny_corpus

from dsa_ref.training import run as run_module
from dsa_ref.training import state as state_module
from dsa_ref.training import train
from dsa_ref.training.data import Data
from dsa_ref.training.run import FINISHED, OutOfTime, Run
from dsa_ref.training.show import Show
from dsa_ref.training.stages import STAGES
from dsa_ref.training.state import check_space, clear_unfinished, load_state, save_state

SMALL = "--steps 3 3 3 --batch 2 --micro 1 --length 64 --k 8 --pairs 1 --asks 1".split()
SMALL += "--windows 1 --save-every 2 --log-every 1".split()


def command(folder, *more):
    files = {name: str(folder / name) for name in ("weights", "log", "state")}
    return [*(part for name, path in files.items() for part in (f"--{name}", path)), *SMALL, *more]


def result(folder):
    """What must be the same in every run: the weights' bytes, the losses of each step, the figures after a stage."""
    log = json.loads((folder / "log").read_text())
    rows = [[row[name] for name in ("stage", "step", "language_loss", "indexer_loss")] for row in log["history"]]
    return (folder / "weights").read_bytes(), rows, log["after"]


def where(path):
    """(stage, step) of the state at path."""
    with safe_open(path, framework="pt") as file:
        about = json.loads(file.metadata()["about"])
    return about["stage"], about["step"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The folder of a run that nothing stopped."""
    folder = tmp_path_factory.mktemp("whole")
    train.main(command(folder))
    return folder


def test_the_log_of_a_run(whole):
    log = json.loads((whole / "log").read_text())
    assert [(row["stage"], row["step"]) for row in log["history"]] == [(s, i) for s in STAGES for i in (1, 2, 3)]
    for row in log["history"]:
        assert [row["language_loss"] is None, row["indexer_loss"] is None] == [
            row["stage"] == "warm-up",
            row["stage"] == "dense",
        ]
        assert row["tokens_per_second"] == pytest.approx(2 * 64 / row["seconds_a_step"], rel=0.01)
        assert (row["peak_bytes"] is None) == (not torch.cuda.is_available())
    assert set(log["after"]) == {*STAGES, "saved"} and set(log["after"]["saved"]["held_out_loss"]) == {
        "dense",
        "sparse",
    }
    assert log["provenance"]["options"]["k"] == "8" and log["sessions"][0]["step"] == 0
    assert where(whole / "state") == (FINISHED, 0)
    with safe_open(whole / "weights", framework="pt") as file:
        attention = json.loads(file.metadata()["config"])["attention"]
    assert attention["index_fp8"] and attention["index_topk"] == 8 and attention["max_seq_len"] == 8192


def test_a_killed_run_goes_on_to_the_same_bits(whole, tmp_path):
    """SIGKILL while it trains: what was saved is at most one interval old, and the end is that of the whole run."""
    program = [sys.executable, "-m", "dsa_ref.training.train", *command(tmp_path)]
    process = subprocess.Popen(program, stderr=subprocess.PIPE, text=True, env=os.environ)
    for line in process.stderr:
        if line.startswith("after dense"):
            break
    while where(tmp_path / "state")[0] == "dense":  # measured, and about to be saved
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    process.stderr.close()
    stage, step = where(tmp_path / "state")
    assert stage != FINISHED and not (tmp_path / "log").exists() and (step % 2 == 0 or step == 3)
    train.main(command(tmp_path))
    assert result(tmp_path) == result(whole)
    sessions = json.loads((tmp_path / "log").read_text())["sessions"]
    assert [(s["stage"], s["step"]) for s in sessions] == [("dense", 0), (stage, step)]


def test_a_run_that_stops_in_time_goes_on_to_the_same_bits(whole, tmp_path, capsys):
    """After its first step, since no time is left; then to the end."""
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path, "--minutes", "0.001"))
    assert stopped.value.code == train.NOT_FINISHED
    assert "--minutes 0.001 are over at step 1 of dense" in capsys.readouterr().err
    assert where(tmp_path / "state") == ("dense", 1) and not (tmp_path / "weights").exists()
    train.main(command(tmp_path))
    assert result(tmp_path) == result(whole)


def test_a_run_that_was_killed_at_its_end_writes_the_same_again(whole, tmp_path):
    shutil.copy(whole / "state", tmp_path / "state")
    train.main(command(tmp_path))
    assert result(tmp_path) == result(whole)


@pytest.mark.parametrize(
    "option, there, here",
    [("--seed", "0", "1"), ("--k", "8", "9"), ("--micro", "1", "2"), ("--steps", "[3, 3, 3]", "3 3 4")],
)
def test_a_state_of_other_options_is_refused_by_name(option, there, here, whole, tmp_path, capsys):
    shutil.copy(whole / "state", tmp_path / "state")
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path, option, *here.split()))
    assert stopped.value.code == 2
    wanted = [3, 3, 4] if option == "--steps" else here
    assert f"whose {option} is {there}, wanted {wanted}" in capsys.readouterr().err
    assert (tmp_path / "state").read_bytes() == (whole / "state").read_bytes()


def test_a_run_with_other_windows_at_first_is_another_run(whole, tmp_path, capsys):
    shutil.copy(whole / "state", tmp_path / "state")
    with pytest.raises(SystemExit):
        train.main(command(tmp_path, "--no-starts"))
    assert "whose starts is [[0.22, 512, 5], [0.39, 2048, 20]], wanted []" in capsys.readouterr().err


def test_a_state_of_another_text_is_refused(whole, tmp_path, monkeypatch, capsys):
    shutil.copy(whole / "state", tmp_path / "state")
    corpus, held_out = train.load_corpus()
    monkeypatch.setattr(train, "load_corpus", lambda: (corpus[1:], held_out))
    with pytest.raises(SystemExit):
        train.main(command(tmp_path))
    assert "whose text is" in capsys.readouterr().err


@pytest.mark.parametrize("size", (0, 7, 1000, -1))
def test_a_state_cut_short_is_refused(size, whole, tmp_path, capsys):
    (tmp_path / "state").write_bytes((whole / "state").read_bytes()[:size])
    with pytest.raises(SystemExit):
        train.main(command(tmp_path))
    assert "path must be that of a whole state of this program" in capsys.readouterr().err


def test_another_programs_file_is_refused(tmp_path, capsys):
    save_file({"x": torch.zeros(1)}, tmp_path / "state")
    with pytest.raises(SystemExit):
        train.main(command(tmp_path))
    assert "got another file" in capsys.readouterr().err
    assert set(load_file(tmp_path / "state")) == {"x"}


def test_a_state_comes_back_as_it_was(tmp_path):
    tensors, about = {"a": torch.randn(3, 2).T}, {"options": {"--k": 4}, "log": [1.5]}
    save_state(tmp_path / "s", tensors, about)
    got, said = load_state(tmp_path / "s", {"--k": 4})
    assert torch.equal(got["a"], tensors["a"]) and said == about
    for options in ({"--k": 5}, {}, {"--k": 4, "new": 1}):
        with pytest.raises(ValueError, match="a run with the same options"):
            load_state(tmp_path / "s", options)


def test_a_full_disk_leaves_the_old_state(tmp_path, monkeypatch):
    save_state(tmp_path / "s", {"a": torch.zeros(2)}, {"options": {}})

    def full(_, path, **__):
        path.write_bytes(b"half of it")
        raise SafetensorError("Error while serializing: No space left on device (os error 28)")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        save_state(tmp_path / "s", {"a": torch.ones(2)}, {"options": {}})
    assert (load_state(tmp_path / "s", {})[0]["a"] == 0).all() and len(list(tmp_path.iterdir())) == 1


def test_what_a_killed_writer_left_is_cleared_and_nothing_else(tmp_path):
    for name, file in (("a", "state"), ("b", "other"), ("c", None)):
        (tmp_path / f".writing-{name}").mkdir()
        if file:
            (tmp_path / f".writing-{name}" / file).touch()
    clear_unfinished(tmp_path / "state")
    assert sorted(path.name for path in tmp_path.iterdir()) == [".writing-b", ".writing-c"]


def test_a_disk_that_is_too_full_is_refused_before_the_hours_are_spent(tmp_path, monkeypatch, capsys):
    usage = shutil.disk_usage(tmp_path)
    free = [2 * (12 + 2) * 3_500_000]
    monkeypatch.setattr(state_module.shutil, "disk_usage", lambda _: usage._replace(free=free[0]))
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path))
    assert stopped.value.code == 2 and "bytes free for what will be written, got 98,000,000" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
    files = {tmp_path / "a": 10**7, tmp_path / "b": 10**6}
    free[0] = 2 * (10**7 + 10**6) + 2 * state_module.SPARE
    check_space(files)
    free[0] -= 1
    with pytest.raises(ValueError, match="bytes free"):
        check_space(files)


def test_a_text_shorter_than_a_window_is_refused(tmp_path, monkeypatch, capsys):
    text = torch.zeros(1000, dtype=torch.uint8)
    for sides, longest in (((text[:64], text), 63), ((text, text[:60]), 59)):
        monkeypatch.setattr(train, "load_corpus", lambda sides=sides: sides)
        with pytest.raises(SystemExit):
            train.main(command(tmp_path))
        assert (
            f"length must be from 1 to {longest}, the corpus less the byte after it, got 64" in capsys.readouterr().err
        )


def test_all_that_a_run_computes_is_deterministic(tmp_path, monkeypatch):
    """And only that: a notebook that calls it is left as it was."""
    inside = []

    def load():
        inside.append((torch.are_deterministic_algorithms_enabled(), os.environ["CUBLAS_WORKSPACE_CONFIG"]))
        raise ValueError

    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    monkeypatch.setattr(train, "load_corpus", load)
    with pytest.raises(SystemExit):
        train.main(command(tmp_path))
    assert inside == [(True, ":16:8")] and not torch.are_deterministic_algorithms_enabled()
    assert torch.utils.deterministic.fill_uninitialized_memory
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    with train.deterministic():
        assert os.environ.pop("CUBLAS_WORKSPACE_CONFIG") == ":4096:8"


def small_run(path, model=None, **more):
    data = Data(tiny_corpus(), 48, 2)
    steps = dict.fromkeys(STAGES, 2)
    return Run(model or looking_model(), data, steps, {}, lambda *_: {}, Show(False), path, save_every=1, **more)


def test_a_loss_that_is_not_finite_ends_the_run_before_it_is_saved(tmp_path):
    path = tmp_path / "state"
    run = small_run(path, ends=time.monotonic())
    with pytest.raises(OutOfTime):
        run.run()
    saved = path.read_bytes()
    run = small_run(path)
    with torch.no_grad():
        run.masters["norm.weight"][0] = torch.nan
    with pytest.raises(FloatingPointError, match="language loss must be finite, got nan in step 2 of the stage dense"):
        run.run()
    assert path.read_bytes() == saved


@pytest.mark.parametrize(
    "error, said",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "at step 2 of dense: [Errno 28] No space left on device"),
        (torch.OutOfMemoryError("no more"), "memory ran out in the stage dense; --micro 1 needs less: no more"),
    ],
)
def test_what_fails_later_ends_the_command_in_one_line(error, said, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise error

    monkeypatch.setattr(run_module, "save_state", fail)
    with pytest.raises(SystemExit) as stopped:
        train.main(command(tmp_path))
    assert stopped.value.code == 1
    assert capsys.readouterr().err.splitlines()[-1] == f"python -m dsa_ref.training.train: error: {said}"


def test_progress_is_one_line_on_a_terminal_and_few_lines_elsewhere(capsys, monkeypatch):
    row = {"stage": "dense", "step": 5, "language_loss": 1.5, "indexer_loss": None, "tokens_per_second": 12345}
    row |= {"seconds_a_step": 2.0, "peak_bytes": None}
    for terminal in (True, False):
        show = Show(terminal)
        for step in (5, 6, 20):
            show.row(row | {"step": step}, 20)
        said = capsys.readouterr().err
        if terminal:
            assert "\n" not in said and said.count("\r") == 3 and f"\r[{'#' * 5}{' ' * 15}] dense" in said
        else:
            assert said.splitlines() == [  # the second within ten seconds of the first
                "dense        5 of 20  language 1.5000  12,345 tokens/s, 0:30 left",
                "dense       20 of 20  language 1.5000  12,345 tokens/s, 0:00 left",
            ]
