"""`python -m dsa_ref.nn.generate`: what goes to stdout and to stderr, bad input, and an end before the end."""

import os
import pathlib
import signal
import subprocess
import sys

import pytest

from dsa_ref.nn import load_small_model
from dsa_ref.nn.generate import complete
from dsa_ref.nn.generate_command import main

ROOT = pathlib.Path(__file__).parents[2]
CODE = b"def read_lines(path):\n    with open(path) as file:\n"


def command(*arguments, **options):
    paths = [ROOT, ROOT / "kernels"]
    return [sys.executable, "-m", "dsa_ref.nn.generate", *arguments], {
        "cwd": ROOT, "env": os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths)), "OMP_NUM_THREADS": "1"},
        **options,
    }  # fmt: skip


def run(*arguments, **options):
    line, options = command(*arguments, **options)
    return subprocess.run(line, capture_output=True, **options)


def test_the_command_writes_text_to_stdout_and_speeds_to_stderr(device):
    done = run(CODE.decode(), "--tokens", "30")
    text = complete(load_small_model().to(device), [CODE], 30)[0]
    assert (done.returncode, done.stdout) == (0, text + b"\n")
    assert done.stderr.count(b"tokens/s") == 2 and b"prefill: 51 tokens in" in done.stderr
    assert b"decode: 29 tokens in" in done.stderr and b"\r" not in done.stderr


def test_several_prompts_one_from_standard_input():
    options = ("--tokens", "8", "--samples", "2", "--seed", "1", "--temperature", "0.9", "--echo", "--chunk", "40")
    done = run("import os\n", "-", *options, "--progress", "--stop", "\n\n", input=CODE)
    texts = complete(
        load_small_model(), [b"import os\n", CODE], 8, samples=2, seed=1, temperature=0.9, stop="\n\n", chunk=40
    )
    wanted = b""
    for i, prompt in enumerate((b"import os\n", CODE)):
        for j in range(2):
            wanted += f"==> prompt {i + 1}, sample {j + 1} <==\n".encode() + prompt + texts[2 * i + j] + b"\n"
    assert done.returncode == 0 and done.stdout.decode() == wanted.decode(errors="replace")
    assert b"\rprompt: 50 of 61 bytes read\rprompt: 61 of 61 bytes read\n" in done.stderr


@pytest.mark.parametrize(
    "given, reason",
    [
        (["x", "--tokens", "0"], "tokens must be at least 1, got 0"),
        (["x", "--tokens", "many"], "argument --tokens: invalid int value: 'many'"),
        ([""], "prompts must have from 1 to max_seq_len = 8192 bytes, got 0 in prompts[0]"),
        (["x", "--temperature", "-1"], "temperature must be at least 0 and finite, got -1.0"),
        (["x", "--stop", ""], "stop must hold texts of at least one byte, got an empty one"),
        (["x", "--top-k-tokens", "0"], "top_k must be at least 1, got 0"),
        (["x", "--weights", "absent.safetensors"], "--weights must be a file that save_small_model wrote, got absent."),
        (["x", "--weights", __file__], "--weights must be a file that save_small_model wrote, got "),
        (["x", "--device", "nonsense"], "--device must be one that torch can use here, got nonsense"),
    ],
)
def test_bad_input_ends_the_command_with_one_sentence(given, reason, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(given)
    said = capsys.readouterr()
    assert stopped.value.code == 2 and said.out == "" and reason in said.err.splitlines()[-1]


def test_kernels_that_are_not_there(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "dsa_kernels", None)
    with pytest.raises(SystemExit):
        main(["x", "--kernels"])
    assert "--kernels needs a package that can be imported" in capsys.readouterr().err


@pytest.mark.skipif(os.name == "nt", reason="Windows sends no SIGINT to one process")
def test_an_interrupted_command_is_quiet():
    def listen():  # a job in the background ignores SIGINT, and what it starts does, too
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    line, options = command("x", "--tokens", "4000", "--temperature", "1", preexec_fn=listen)
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout.read(1)
        process.send_signal(signal.SIGINT)
        process.stdout.read()
        assert process.wait() == 130 and process.stderr.read() == b"\n"


def test_a_reader_who_has_enough():
    line, options = command("x", "--tokens", "4000", "--temperature", "1")
    with subprocess.Popen(line, stdout=subprocess.PIPE, stderr=subprocess.PIPE, **options) as process:
        assert process.stdout.read(1)
        process.stdout.close()
        assert process.wait() == 1 and process.stderr.read() == b""


def test_the_end_of_what_the_model_can_read_is_told(monkeypatch, capsys):
    monkeypatch.setattr(
        "dsa_ref.nn.generate_command.load_small_model", lambda path, ops: load_small_model(ops=ops, max_seq_len=48)
    )
    main([CODE[:45].decode(), "--tokens", "9"])
    said = capsys.readouterr()
    assert "prompt 1, sample 1: ended where the model can read no more, max_seq_len = 48 bytes\n" in said.err
    assert len(said.out) == 4 + 1
