"""What a command will need at its end is checked at its start, and a file is replaced by a whole one or not at all."""

import argparse
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import threading

import pytest
import torch

from dsa_course.traps import __main__ as traps
from dsa_ref import TINY, records
from dsa_ref.long_context import __main__ as long_context
from dsa_ref.long_context import run as long_context_run
from dsa_ref.nn import ModelConfig, SmallModel
from dsa_ref.nn.model import save_small_model
from dsa_ref.training import compare, evaluate, train
from dsa_ref.training.corpus import held_out_windows


def bench(module):
    return importlib.import_module(f"dsa_bench.{module}")


def commands():
    """{name: (main, the arguments before what is tested, the option that names a file)}."""
    found = {
        "train weights": (train.main, ["--log", "log.json"], "--weights"),
        "train log": (train.main, ["--weights", "w.safetensors"], "--log"),
        "train state": (train.main, ["--weights", "w.safetensors", "--log", "log.json"], "--state"),
        "compare": (compare.main, [], "--log"),
        "evaluate": (evaluate.main, [], "--log"),
        "traps": (traps.main, [], "--log"),
        "long context": (long_context.main, [], "--log"),
    }
    for name in ("__main__", "exact", "layer_cpu", "bill.__main__", "models.__main__", "training.__main__", "parallel"):
        if importlib.util.find_spec("triton"):
            found[f"dsa_bench {name}"] = (lambda arguments, name=name: bench(name).main(arguments), [], "--log")
    return found


COMMANDS = commands()


@pytest.fixture
def refused(monkeypatch, tmp_path, capsys):
    """A function: run a command, which must stop before any work, and give what it says."""
    monkeypatch.chdir(tmp_path)

    def nothing(*_, **__):
        raise AssertionError("work began")

    for module, name in (
        (train, "load_corpus"),
        (compare, "load_corpus"),
        (evaluate, "load_small_model"),
        (traps, "load_corpus"),
    ):
        monkeypatch.setattr(module, name, nothing)
    monkeypatch.setattr(long_context_run, "make_subject", nothing)
    monkeypatch.setattr(traps, "run_tests", nothing)
    monkeypatch.setattr(subprocess, "run", nothing)

    def run(main, arguments):
        with pytest.raises(SystemExit) as stopped:
            main(arguments)
        assert stopped.value.code == 2
        return capsys.readouterr().err

    return run


@pytest.mark.parametrize("command", COMMANDS)
def test_a_file_that_cannot_be_written_stops_a_command_at_its_start(command, refused, tmp_path):
    main, arguments, option = COMMANDS[command]
    missing = tmp_path / "missing" / "file.json"
    assert f"{option}: path must lie in a folder that is there, got {missing}" in refused(
        main, [*arguments, option, str(missing)]
    )
    assert f"{option}: path must be a file's, got the folder" in refused(main, [*arguments, option, str(tmp_path)])
    assert list(tmp_path.iterdir()) == []  # checking leaves nothing behind


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(records.tempfile, "TemporaryDirectory", refuse)  # an administrator may write everywhere
    with pytest.raises(ValueError, match="folder that can be written, got .*: Permission denied"):
        records.check_writable(tmp_path / "file.json")


COUNTS = [
    ("train log", ["--steps", "3", "0", "3"], "--steps"),
    ("train log", ["--batch", "0"], "--batch"),
    ("train log", ["--length", "-1"], "--length"),
    ("train log", ["--save-every", "0"], "--save-every"),
    ("train log", ["--micro", "0.5"], "--micro"),
    ("compare", ["--asked", "0"], "--asked"),
    ("evaluate", ["--windows", "0"], "--windows"),
    ("evaluate", ["--k", "4", "0"], "--k"),
    ("traps", ["--windows", "none"], "--windows"),
    ("long context", ["--tokens", "0"], "--tokens"),
    ("long context", ["--chunk", "-1"], "--chunk"),
]


@pytest.mark.parametrize("command, given, option", COUNTS)
def test_counts_are_positive(command, given, option, refused):
    main, arguments, file = COMMANDS[command]
    said = refused(main, [*arguments, file, "new.json", *given])
    assert f"argument {option}: must be a whole number of at least 1" in said


OTHERS = [
    ("train log", ["--log", "w.safetensors"], "--weights and --log must be two files"),
    ("train log", ["--log", "s", "--state", "s"], "--log and --state must be two files"),
    ("train log", ["--log", "x.json", "--device", "nonsense"], "--device must be one that torch can use here"),
    ("train log", ["--log", "x.json", "--device", "meta"], "--device must be one that torch can use here, got meta"),
    ("train log", ["--log", "x.json", "--minutes", "9"], "--minutes must be above 0, with --state to go on from"),
    ("train log", ["--log", "x.json", "--state", "s", "--minutes", "0"], "--minutes must be above 0"),
    ("train log", ["--log", "x.json", "--state", "s", "--minutes", "nan"], "--minutes must be above 0"),
    ("train log", ["--log", "x.json", "--length", "64", "--k", "64"], "--k must be below --length 64"),
    ("train log", ["--log", "x.json", "--pairs", "-1"], "--pairs must be at least 0, got -1"),
    ("compare", ["--log", "x.json", "--length", "64", "--k", "64"], "--k must be below --length 64"),
    ("compare", ["--log", "x.json", "--merge", "missing.json"], "--merge must name logs of this program"),
    ("compare", ["--log", "x.json", "--regimes", "dense", "sparse"], "--regimes: invalid choice: 'sparse'"),
    ("evaluate", ["--log", "x.json", "--length", "100", "--k", "4", "100"], "--k must be below --length 100"),
    ("long context", ["--decode", "-1"], "decode must be at least 0, got -1"),
    ("long context", ["--device", "meta"], "--device must be one that torch can use here, got meta"),
    (
        "long context",
        ["--config", "missing.json"],
        "--config must be a config.json of DeepSeek-V3.2's or GLM-5's family",
    ),
    ("traps", [], "one of --log and --tests must say what to do"),
    ("traps", ["--log", "x.json", "--length", "64"], "--length must be above k = 64"),
]


@pytest.mark.parametrize("command, given, reason", OTHERS)
def test_what_makes_no_sense_is_refused_at_the_start(command, given, reason, refused):
    main, arguments, _ = COMMANDS[command]
    assert reason in refused(main, [*arguments, *given])


def test_a_gpu_that_is_not_there(refused):
    said = refused(train.main, ["--weights", "w", "--log", "x.json", "--device", "cuda:99"])
    assert "--device must be one that torch can use here, got cuda:99" in said


def test_kernels_without_a_gpu(refused, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    given = ["--weights", "w", "--log", "x.json", "--kernels", "--device", "cpu"]
    assert "--kernels needs a GPU, got --device cpu" in refused(train.main, given)
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setitem(sys.modules, "dsa_kernels", None)  # not installed
    assert "--kernels needs a package that can be imported" in refused(train.main, given)


@pytest.mark.parametrize(
    "module, missing, command, arguments",
    [("safetensors", "safetensors", "train log", ["--log", "x.json"]), ("pytest", "pytest", "traps", ["--tests"])],
)
def test_packages_that_are_needed_at_the_end(module, missing, command, arguments, refused, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == module else find(name))
    main, before, _ = COMMANDS[command]
    assert f"{missing} must be installed" in refused(main, [*before, *arguments])


@pytest.mark.parametrize("holds", ("not JSON", "[]", '{"other": 1}'))
def test_the_benchmark_refuses_a_file_that_it_cannot_add_to(holds, tmp_path, capsys):
    pytest.importorskip("triton")
    main = bench("__main__")
    log = tmp_path / "log.json"
    log.write_text(holds)
    parser, _ = main.parse([])
    with pytest.raises(SystemExit):
        main.check_log(parser, log, "steps")
    assert "cannot take these figures" in capsys.readouterr().err
    log.write_text('{"steps": {}}')
    main.check_log(parser, log, "steps")
    assert log.read_text() == '{"steps": {}}'


@pytest.mark.parametrize("size", (0, 5, 100))
def test_a_window_longer_than_the_text_is_refused(size):
    text = torch.zeros(size, dtype=torch.uint8)
    with pytest.raises(ValueError, match=f"length must be from 1 to {size - 1}, .*, got 100"):
        held_out_windows(text, 2, 100)


def test_the_longest_window_is_the_whole_text():
    text = torch.arange(101, dtype=torch.uint8)
    assert held_out_windows(text, 2, 100).tolist() == [text.tolist()] * 2


def test_a_record_that_fails_halfway_leaves_the_old_one(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, {"a": 1})
    with pytest.raises(TypeError):
        records.write(path, {"a": object()})
    with pytest.raises(KeyboardInterrupt), records.replacing(path) as new:
        new.write_text("half of it")
        raise KeyboardInterrupt
    assert json.loads(path.read_text()) == {"a": 1}
    assert [file.name for file in tmp_path.iterdir()] == ["record.json"]


def test_a_link_stays_a_link_and_a_device_is_written_itself(tmp_path):
    (tmp_path / "link.json").symlink_to(tmp_path / "record.json")
    records.write(tmp_path / "link.json", {"a": 1})
    assert (tmp_path / "link.json").is_symlink() and records.read(tmp_path / "record.json") == {"a": 1}
    records.check_writable(os.devnull)
    records.write(os.devnull, {"a": 1})
    assert not pathlib.Path(os.devnull).is_file()


def test_a_writer_that_renames_leaves_a_device_what_it_is(tmp_path):
    """A pipe stands for a device, which only an administrator can make. safetensors saves so."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    got = []
    reader = threading.Thread(target=lambda: got.append(pipe.read_bytes()), daemon=True)
    reader.start()
    with records.replacing(pipe) as new:
        new.with_suffix(".tmp").write_bytes(b"whole")
        new.with_suffix(".tmp").replace(new)
    reader.join(20)
    assert got == [b"whole"] and pipe.is_fifo()
    with pytest.raises(KeyboardInterrupt), records.replacing(pipe):
        raise KeyboardInterrupt
    assert [file.name for file in tmp_path.iterdir()] == ["pipe"]


def test_weights_must_go_into_a_regular_file(tmp_path):
    """They are read again, and safetensors would put a file in the place of a device."""
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", pathlib.Path(os.devnull)):
        with pytest.raises(argparse.ArgumentTypeError, match=f"must be that of a regular file .* {path}"):
            records.regular_file(str(path))
        assert records.output_file(str(path)) == path
        model = SmallModel(ModelConfig(1, 96, attention=TINY))
        with pytest.raises(ValueError, match=f"path must be that of a regular file .* {path}"):
            save_small_model(model, path)
        assert path.exists() and not path.is_file()
    assert records.regular_file(str(tmp_path / "new")) == tmp_path / "new"


@pytest.mark.parametrize("check", (records.output_file, records.regular_file))
def test_names_that_no_file_can_have(check, tmp_path):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    (tmp_path / "file").touch()
    for name in (300 * "a", "loop", f"{300 * 'a'}/b", "file/b"):
        with pytest.raises(ValueError, match="path must lie in a folder"):
            records.check_writable(tmp_path / name)
        with pytest.raises(argparse.ArgumentTypeError, match="path must lie in a folder"):
            check(str(tmp_path / name))
    assert sorted(file.name for file in tmp_path.iterdir()) == ["file", "loop"]


def test_an_interrupted_process_leaves_the_old_record(tmp_path):
    """Killed while it writes: what lies at the path is whole."""
    path = tmp_path / "record.json"
    records.write(path, {"a": 1})
    code = f"""
import os
from dsa_ref import records
with records.replacing({str(path)!r}) as new:
    new.write_text("half")
    os._exit(9)
"""
    assert subprocess.run([sys.executable, "-c", code], env=os.environ).returncode == 9
    assert records.read(path) == {"a": 1}


FULL = pathlib.Path("/dev/full")  # a device on which every write says that no space is left


@pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")
def test_a_full_disk_ends_a_long_context_in_one_line(capfd):
    """The record's disk, after all of the work; and that of the table, at its first line."""
    given = ["--tokens", "8", "--chunk", "8", "--decode", "0", "--check", "0", "--device", "cpu"]
    with pytest.raises(SystemExit) as end:
        long_context.main([*given, "--log", str(FULL)])
    assert end.value.code == (
        "python -m dsa_ref.long_context: error: --log could not be written, got [Errno 28] No space left on device"
    )
    assert "checked: nothing" in capfd.readouterr().out
    command = [sys.executable, "-m", "dsa_ref.long_context", *given]
    with FULL.open("w") as out:
        ran = subprocess.run(command, stdout=out, stderr=subprocess.PIPE, text=True)
    assert (ran.returncode, ran.stderr) == (
        1,
        "python -m dsa_ref.long_context: error: [Errno 28] No space left on device\n",
    )


def test_commands_write_their_records_by_write_log(tmp_path):
    """Every command with a --log of its own; those of dsa_bench that add to a file of several runs do not."""
    record = tmp_path / "log.json"
    records.write_log("p", record, {"a": 1})
    assert records.read(record) == {"a": 1}
    with pytest.raises(SystemExit, match="^python -m p: error: --log could not be written, got .*missing"):
        records.write_log("p", tmp_path / "missing" / "log.json", {})
    for module in (train, evaluate, traps, long_context):
        assert module.write_log is records.write_log and not hasattr(module, "write")
