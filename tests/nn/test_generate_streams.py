"""The generate command with standard streams that are closed or full, devices without memory, weights that give NaN."""

import os
import pathlib
import subprocess
import sys

import pytest
import torch

from dsa_ref import TINY
from dsa_ref.nn import ModelConfig, SmallModel
from dsa_ref.nn.generate import complete, generate
from dsa_ref.nn.generate_command import main
from dsa_ref.nn.model import load_small_model, save_small_model

ROOT = pathlib.Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name == "nt", reason="Windows' shell closes no streams")
full = pytest.mark.skipif(not pathlib.Path("/dev/full").exists(), reason="only Linux has a device that is always full")


def shell(redirections, *arguments):
    """(exit status, stdout, stderr) of the command with these redirections of a POSIX shell."""
    line = ["sh", "-c", f'exec "$0" -m dsa_ref.nn.generate "$@" {redirections}', sys.executable, *arguments]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(line, capture_output=True, cwd=ROOT, env=environment)
    return done.returncode, done.stdout.decode(), done.stderr.decode()


@posix
def test_a_closed_stdout_is_refused():
    status, _, said = shell(">&-", "x", "--tokens", "2")
    assert status == 2 and said.splitlines()[-1].endswith("error: standard output must be open, got a closed one")


@posix
def test_a_closed_stdin_is_refused_where_it_is_asked_for():
    status, text, said = shell("<&-", "-", "--tokens", "2")
    assert (status, text) == (2, "") and "error: standard input must be open, got a closed one" in said


@posix
def test_without_stderr_stdout_has_the_text_alone():
    """stdin, which nobody asks for, may be closed, too."""
    text = complete(load_small_model(), [b"x"], 2)[0].decode()
    assert shell("2>&- <&-", "x", "--tokens", "2", "--progress", "--device", "cpu") == (0, f"{text}\n", "")


@posix
@full
def test_a_full_disk():
    status, text, said = shell(">/dev/full", "x", "--tokens", "2")
    assert (status, text, said.count("\n")) == (1, "", 1)
    assert "error: standard output must be writable, got [Errno 28]" in said


def test_bad_devices_and_weights_end_the_command_with_one_sentence(tmp_path, capsys):
    model = SmallModel(ModelConfig(1, 96, 256, TINY))
    model.norm.weight.data.fill_(torch.nan)
    save_small_model(model, tmp_path / "nan.safetensors")
    for given, reason in (
        (["--device", "meta"], "--device must be one that torch can use here, got meta"),
        (["--weights", str(tmp_path / "nan.safetensors")], "logits must be finite, got NaN or infinity"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main(["x", *given])
        said = capsys.readouterr()
        assert (stopped.value.code, said.out) == (2, "") and f"error: {reason}" in said.err


@pytest.mark.parametrize("name, value", [("temperature", 10**400), ("top_k", 10**30), ("seed", 10**30)])
def test_numbers_larger_than_any_float_or_int64(name, value):
    with pytest.raises(ValueError, match=f"^{name} must be "):
        generate(load_small_model(), [b"a"], 1, **{"temperature": 1.0, name: value})
