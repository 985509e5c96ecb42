"""Both programs on two ranks: what goes wrong on one of them ends all, soon, and is said once."""

import json
import time

import pytest
from parallel_programs import ended, launched
from safetensors import safe_open

from dsa_ref.parallel import command as command_module
from dsa_ref.parallel.command import Parser, seconds, start

SMALL = "--steps 3 3 3 --batch 2 --micro 1 --length 64 --k 8 --pairs 1 --asks 1".split()
SMALL += "--windows 1 --save-every 2 --log-every 1 --timeout 30 --device cpu --dtype fp32".split()
TRAIN, GENERATE = "dsa_ref.training.train", "dsa_ref.parallel.generate"


def training(folder, *more, files=("weights", "log", "state")):
    return [*(part for name in files for part in (f"--{name}", str(folder / name))), *SMALL, *more]


def generation(*more, prompt="def"):
    return [prompt, "--tokens", "4", "--device", "cpu", "--timeout", "30", *more]


def check_said_once(ranks, code, message):
    """All ranks ended with the code; one line says why; usage is the first rank's, for argparse's code."""
    said = "".join(err for _, _, err in ranks)
    assert [got for got, _, _ in ranks] == [code] * len(ranks), said
    assert said.count("error: ") == 1 and message in said and "Traceback" not in said, said
    assert ranks[0][2].count("usage: ") == said.count("usage: ") == (code == 2), said


REFUSED = {  # options of rank 0, those that rank 1 has beside them, what is said
    "wrong on all": ("--k 64", "", "error: --k must be below --length 64"),
    "a seed of more than 64 bits": ("--seed 18446744073709551616", "", "error: --seed must be a number of 64 bits"),
    "unknown on one": ("", "--foo", "error: rank 1: unrecognized arguments: --foo"),
    "a word for a number": ("", "--batch x", "error: rank 1: argument --batch: must be a whole number"),
    "other windows": ("", "--windows 2", "--windows must be the same on all ranks, got 1 on rank 0, 2 on 1"),
    "other minutes": ("", "--minutes 5", "--minutes must be the same on all ranks, got None on rank 0, 5.0 on 1"),
    "other saves": ("", "--save-every 3", "--save-every must be the same on all ranks, got 2 on rank 0, 3 on 1"),
    "another timeout": ("", "--timeout 31", "--timeout must be the same on all ranks, got 30.0 on rank 0, 31.0 on 1"),
    "one GPU for all": ("--device cuda:0", "", "--device must be cuda: each rank has a GPU of its own, got cuda:0"),
    "an endless timeout": ("--timeout 1e300", "", "timeout must be from 0.001 to 1000000 seconds, got 1e+300"),
    "no timeout": ("", "--timeout nan", "error: rank 1: argument --timeout: timeout must be from"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_rank_refuses_is_said_once(name, tmp_path):
    first, more, message = REFUSED[name]
    given = training(tmp_path, *first.split())
    ranks, took = ended(TRAIN, [given, [*given, *more.split()]], tmp_path)
    check_said_once(ranks, 2, message)
    assert took < 25 and not (tmp_path / "state").exists()


def test_only_the_first_rank_is_refused(tmp_path):
    ranks, _ = ended(TRAIN, [training(tmp_path, "--foo"), training(tmp_path)], tmp_path)
    check_said_once(ranks, 2, "error: rank 0: unrecognized arguments: --foo")


def test_a_state_is_kept_by_all_ranks_or_none(tmp_path):
    """Else one would wait for the others to save."""
    given = [training(tmp_path), training(tmp_path, files=("weights", "log"))]
    check_said_once(ended(TRAIN, given, tmp_path)[0], 2, "--state must be the same on all ranks, got given on rank 0")


@pytest.mark.parametrize(
    "fault, state, code, message",
    [
        (None, "bad", 2, "error: rank 1: path must be that of a whole state of this program, got"),
        ("no_corpus", "state", 1, "error: rank 1: IndexError: list index out of range"),
    ],
)
def test_a_setup_that_fails_on_one_rank(fault, state, code, message, tmp_path):
    (tmp_path / "bad").write_bytes(b"no state")
    given = [training(tmp_path), training(tmp_path, "--state", str(tmp_path / state))]
    ranks, took = ended(TRAIN, given, tmp_path, {1: fault})
    check_said_once(ranks, code, message)
    assert took < 25


def test_help_comes_once(tmp_path):
    ranks, _ = ended(TRAIN, [["--help"]] * 2, tmp_path)
    assert [code for code, _, _ in ranks] == [0, 0] and "".join(out for _, out, _ in ranks).count("usage: ") == 1


def test_a_disk_that_fills_up_ends_all_ranks_and_leaves_the_state(tmp_path):
    ranks, took = ended(TRAIN, [training(tmp_path)] * 2, tmp_path, {0: "disk_fills_up"})
    check_said_once(ranks, 1, "error: at step 3 of dense: rank 0: [Errno 28] No space left on device")
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["step"] == 2 and len(list(file.keys())) > 2
    assert took < 25 and not list(tmp_path.glob(".writing-*"))


def test_a_disk_without_room_for_the_weights(tmp_path):
    ranks, _ = ended(TRAIN, [training(tmp_path, "--steps", "1", "1", "1")] * 2, tmp_path, {0: "no_room_for_weights"})
    assert [code for code, _, _ in ranks] == [1, 0]  # the others had nothing left to do
    assert f"{tmp_path}/weights could not be written: No space left" in ranks[0][2]
    assert "Traceback" not in ranks[0][2]
    ranks, _ = ended(TRAIN, [training(tmp_path, "--steps", "1", "1", "1")] * 2, tmp_path)
    assert [code for code, _, _ in ranks] == [0, 0] and (tmp_path / "weights").exists()


def test_no_rank_ends_before_the_state_is_saved(tmp_path):
    """torchrun kills the others as soon as one has ended: the one that writes, too."""
    given = training(tmp_path, "--minutes", "0.001")
    with launched(TRAIN, [given] * 2, tmp_path, {0: "disk_is_slow"}) as processes:
        processes[1].join(60)
        assert processes[1].exitcode == 75 and (tmp_path / "state").exists()
        assert "run it again to go on" in (tmp_path / "err0").read_text()


@pytest.mark.parametrize("killed", [0, 1])
def test_a_rank_that_is_killed_ends_the_other(killed, tmp_path):
    given = training(tmp_path, "--steps", "1000", "3", "3", "--save-every", "10")
    with launched(TRAIN, [given] * 2, tmp_path) as processes:
        deadline = time.monotonic() + 60
        while not (tmp_path / "state").exists() and time.monotonic() < deadline:
            time.sleep(0.05)
        processes[killed].kill()
        other, begun = processes[1 - killed], time.monotonic()
        other.join(60)
        assert other.exitcode == 1 and time.monotonic() - begun < 25
    said = (tmp_path / f"err{1 - killed}").read_text()
    assert f"rank {1 - killed} of 2: " in said and "another rank has ended" in said and "Traceback" not in said
    with safe_open(tmp_path / "state", framework="pt") as file:
        assert json.loads(file.metadata()["about"])["stage"] == "dense"


@pytest.mark.parametrize(
    "first, second, fault, code, message",
    [
        (generation(), generation(prompt="x" * 50), None, 2, "prompt must be the same on all ranks, got def on rank 0"),
        (generation(), generation("--weights", "/no"), None, 2, "error: rank 1: --weights must be a file that"),
        (generation("--device", "meta"), None, None, 2, "error: --device must be one that torch can use here"),
        (generation("--temperature", "nan"), None, None, 2, "error: temperature must be at least 0 and finite"),
        (generation(), None, "output_is_full", 1, "error: rank 0: standard output must be writable, got [Errno 28]"),
    ],
)
def test_generation_ends_alike(first, second, fault, code, message, tmp_path):
    ranks, took = ended(GENERATE, [first, second or first], tmp_path, {0: fault})
    check_said_once(ranks, code, message)
    assert took < 25 and all(out == "" for _, out, _ in ranks)


def test_what_is_right_is_written_once(tmp_path):
    ranks, _ = ended(GENERATE, [generation()] * 2, tmp_path)
    assert [code for code, _, _ in ranks] == [0, 0] and ranks[1][1:] == ("", "")
    assert len(ranks[0][1]) == 5 and ranks[0][1].endswith("\n")


def test_outside_of_torchrun(capsys, monkeypatch):
    """A wrong option is told before that there is no group."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    parser = Parser()
    parser.add_argument("--timeout", type=seconds, default=1.0)
    with pytest.raises(ValueError, match="invalid|could not convert"):
        start(parser, ["--timeout", "soon"])
    with pytest.raises(ValueError, match="torchrun started"):
        start(parser, [])


def test_a_gpu_has_no_number_on_several_ranks(monkeypatch):
    """One rank alone may choose its GPU."""
    parser = Parser()
    parser.add_argument("--timeout", type=seconds, default=1.0)
    parser.add_argument("--device")
    ranks = type("Faked", (command_module.Ranks,), {"__init__": lambda self, _: None, "agree": lambda *_: []})
    ranks.meetings, ranks.rank = 1, 0
    monkeypatch.setattr(command_module, "join", lambda _: None)
    monkeypatch.setattr(command_module, "Ranks", ranks)
    for size, device, refused in ((1, "cuda:1", False), (2, "cuda:1", True), (2, "cuda", False), (2, "cpu:0", False)):
        ranks.size = size
        if refused:
            with pytest.raises(ValueError, match="--device must be cuda: each rank has a GPU of its own, got cuda:1"):
                start(parser, ["--device", device])
        else:
            assert start(parser, ["--device", device])[0].device == device
