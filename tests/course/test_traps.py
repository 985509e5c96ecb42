"""Every trap of the museum is real: its test fails with it and passes without; recorded effects are measured anew."""

import json
import os
import pathlib
import subprocess
import sys

import pytest
import torch

import dsa_ref
from dsa_course.traps import runs, table
from dsa_course.traps.__main__ import measure
from dsa_ref import records
from dsa_ref.testing import overlap
from dsa_ref.training.corpus import load_corpus
from dsa_ref.training.evaluate import held_out_windows

ROOT = pathlib.Path(__file__).parents[2]
RECORD = records.read("traps.json")


def test_the_table():
    names = [trap.name for trap in table.TRAPS]
    assert len(names) == len(set(names)) >= 15
    assert len({trap.variant for trap in table.TRAPS}) == len(names)
    for trap in table.TRAPS:
        assert trap.what.endswith(".") and trap.symptom.endswith(".") and trap.shows_in in runs.WAYS
        assert table.trap(trap.name) is trap
    with pytest.raises(ValueError, match="name must be one of unnormalised latent.*got 'no such'"):
        table.trap("no such")


def test_each_is_caught_by_the_test_that_it_names():
    """In a process of its own: these tests have to import the reference while it is wrong."""
    done = subprocess.run(
        [sys.executable, "-m", "dsa_course.traps", "--tests"],
        capture_output=True,
        text=True,
        encoding="utf-8",
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join(str(ROOT / folder) for folder in (".", "kernels", "notebooks")),
            "PYTHONIOENCODING": "utf-8",
            "OMP_NUM_THREADS": "1",
        },
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found) == [trap.name for trap in table.TRAPS]
    assert {name: without for name, (without, _) in found.items() if without != "passed"} == {}
    assert [name for name, (_, planted) in found.items() if planted == "passed"] == []


def test_the_record_has_every_trap_and_where_it_shows():
    assert list(RECORD["traps"]) == [trap.name for trap in table.TRAPS]
    for trap in table.TRAPS:
        assert list(RECORD["traps"][trap.name]) == list(dict.fromkeys(("one pass", trap.shows_in)))
        shown = RECORD["traps"][trap.name][trap.shows_in]
        assert "raises" in shown or shown["overlap"] < 1.0 or abs(shown["loss"]) > 4 * shown["error"], trap.name
        if trap.shows_in != "one pass":  # elsewhere it is harmless: that is why it needs a way of its own
            assert RECORD["traps"][trap.name]["one pass"] == {"overlap": 1.0, "loss": 0.0, "error": 0.0}


@pytest.mark.parametrize("name", ("interleaved indexer RoPE", "no amax floor"))
def test_the_record_can_be_reproduced(name):
    """The text is this Python's own library, so another version of Python reads other bytes: hence the tolerance."""
    windows = held_out_windows(load_corpus()[1], RECORD["windows"], RECORD["length"])[:3].long()
    got, recorded = measure(table.trap(name), windows), RECORD["traps"][name]
    assert got.keys() == recorded.keys()
    for way, values in recorded.items():
        if "raises" in values:
            assert got[way] == values
        else:
            assert got[way]["overlap"] == pytest.approx(values["overlap"], abs=0.06)
            assert got[way]["loss"] == pytest.approx(values["loss"], abs=0.12)


def names_of_the_reference():
    modules = {m.__name__: m for name, m in sys.modules.items() if f"{name}.".startswith("dsa_ref.")}
    found = {(name, key): value for name, module in modules.items() for key, value in vars(module).items()}
    for owner in table.CLASSES.values():
        found |= {(owner.__name__, key): value for key, value in vars(owner).items()}
    return found


@pytest.mark.parametrize("trap", table.TRAPS, ids=lambda trap: trap.name)
def test_planting_reaches_every_user_and_leaves_nothing_behind(trap):
    before = names_of_the_reference()
    with table.planted(trap):
        changed = {place for place, value in names_of_the_reference().items() if before[place] is not value}
    changed -= {("dsa_ref.contracts", "check_distinct"), ("dsa_ref.nn.layer", "serves")}  # with every trap
    assert changed and not any(module == "dsa_ref.testing" for module, _ in changed)
    if "." not in trap.step:
        steps = {trap.step, "lightning_select"} if trap.step in ("index_scores", "select_topk") else {trap.step}
        right = [getattr(dsa_ref, step) for step in steps]
        users = {place for place, value in before.items() if any(value is step for step in right)}
        assert changed == {place for place in users if place[0] != "dsa_ref.testing"}
    after = names_of_the_reference()
    assert after.keys() == before.keys() and all(after[place] is before[place] for place in before)


@pytest.fixture(scope="module")
def tokens():
    return held_out_windows(load_corpus()[1], 1, 200)[0].long()


@pytest.mark.parametrize("trap", table.TRAPS, ids=lambda trap: trap.name)
def test_planting_changes_what_the_model_does(trap, tokens):
    """A step that the model reaches by another way than its name would be planted in vain."""
    selections, loss = runs.read(tokens, trap.shows_in)
    with table.planted(trap):
        if trap.name == "no amax floor":
            with pytest.raises(ValueError, match="must not be NaN"):
                runs.read(tokens, trap.shows_in)
            return
        planted, planted_loss = runs.read(tokens, trap.shows_in)
    assert planted_loss != loss or not all(a.equal(b) for a, b in zip(selections, planted, strict=True))


def test_an_error_inside_does_not_leave_the_trap_planted():
    right = dsa_ref.index_scores
    with pytest.raises(RuntimeError, match="inside"), table.planted(table.trap("no relu")):
        assert dsa_ref.index_scores is not right
        raise RuntimeError("inside")
    assert dsa_ref.index_scores is right


@pytest.mark.parametrize("way", runs.WAYS)
def test_every_way_reads_the_text_alike(way, tokens):
    """Chunks, merged halves and padding change nothing for the right model; bf16 scores and unquantised ones little."""
    selections, loss = runs.read(tokens)
    other, other_loss = runs.read(tokens, way)
    assert len(selections) == len(other) == 4 and all(chosen.shape == (200, 64) for chosen in other)
    if way in ("one pass", "chunks", "merge", "padding"):
        assert other_loss == pytest.approx(loss, abs=1e-3)
        assert all(overlap(a, b) > 0.999 for a, b in zip(selections, other, strict=True))
    elif way == "bf16 scores":
        assert other_loss == pytest.approx(loss, abs=0.02) and not torch.equal(selections[0], other[0])


def test_a_test_that_does_not_exist_is_reported():
    code = "from dsa_course.traps.runs import run_tests; run_tests(['tests/steps/test_rope.py::test_no_such'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert "RuntimeError: caught_by must name one test that runs" in done.stderr
