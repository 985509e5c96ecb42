"""Every record says where it comes from: by a program of today, or by one whose new name figures/README.md gives."""

import json
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[1]
FIGURES = ROOT / "figures"
README = (FIGURES / "README.md").read_text(encoding="utf-8")
RENAMED = dict(re.findall(r"^\| `python -m ([\w.]+)` \| `python -m ([\w.]+)` \|$", README, re.M))
# Records made before version 0.2, which wrote no commit: these files, of these days, and no others.
OLD_RECORDS = {
    ("exact_h100.json", "2026-11-25"),
    ("h100.json", "2026-11-25"),
    ("layer_cpu.json", "2026-11-24"),
}
FOLDERS = {"dsa_ref": ROOT, "dsa_bench": ROOT / "kernels", "dsa_course": ROOT / "notebooks"}
KEYS = {"command", "date", "python", "torch"}


def provenances(part):
    """Every value under the key "provenance", at any depth."""
    if isinstance(part, list):
        part = dict(enumerate(part))
    if isinstance(part, dict):
        for key, value in part.items():
            if key == "provenance":
                yield value
            else:
                yield from provenances(value)


def faults(provenance, file):
    """What is wrong with one provenance in figures/`file`, a line each."""
    found = [f"no {key}" for key in KEYS - provenance.keys()]
    new = "commit" in provenance or (file, provenance.get("date")) not in OLD_RECORDS
    if new:
        found += [f"no {key}" for key in ("device", "numpy", "triton") if key not in provenance]
        found += [] if provenance.get("commit") else ["commit unknown"]
    elif not {"device", "gpu"} & provenance.keys():
        found.append("no device")
    program = re.match(r"(?:python|torchrun --nproc-per-node \d+) -m (?:-- )?([\w.]+)", provenance.get("command", ""))
    if not program:
        return [*found, "no program"]
    today = program[1] if new else RENAMED.get(program[1], program[1])
    path = FOLDERS.get(today.partition(".")[0], ROOT).joinpath(*today.split("."))
    if not path.with_suffix(".py").is_file() and not (path / "__main__.py").is_file():
        found.append(f"no program {today}")
    return found


@pytest.mark.parametrize("path", sorted(FIGURES.glob("*.json")), ids=lambda path: path.name)
def test_records_name_their_program_and_where_it_ran(path):
    records = list(provenances(json.loads(path.read_text(encoding="utf-8"))))
    assert records and [faults(made, path.name) for made in records] == [[]] * len(records)
    assert f"`{path.name}`" in README


def test_every_old_record_is_still_there():
    """A row that no record needs would let a new one in without its commit."""
    there = {
        (path.name, made["date"])
        for path in FIGURES.glob("*.json")
        for made in provenances(json.loads(path.read_text(encoding="utf-8")))
        if "commit" not in made
    }
    assert there == OLD_RECORDS


OLD = {
    "command": "python -m kernels.bench --peers",
    "date": "2026-11-25",
    "python": "3.12",
    "torch": "2.11",
    "gpu": "H100",
}
NEW = OLD | {"command": "python -m dsa_bench", "commit": "abc", "device": "H100", "numpy": "2.4", "triton": "3.6"}


@pytest.mark.parametrize(
    "provenance, wrong",
    [
        (OLD, []),
        (NEW, []),
        (NEW | {"command": "torchrun --nproc-per-node 2 -m dsa_bench.parallel --record x"}, []),
        (NEW | {"command": "torchrun --nproc-per-node 2 -m dsa_bench.other"}, ["no program dsa_bench.other"]),
        (NEW | {"command": "python -m kernels.bench"}, ["no program kernels.bench"]),  # an old name in a new record
        (OLD | {"command": "python -m dsa_ref.lab.other"}, ["no program dsa_ref.lab.other"]),
        (OLD | {"command": "make bench"}, ["no program"]),
        (NEW | {"commit": None}, ["commit unknown"]),
        (NEW | {"commit": ""}, ["commit unknown"]),
        (
            OLD | {"date": "2026-11-26", "device": "H100", "numpy": "2", "triton": "3"},
            ["commit unknown", "no program kernels.bench"],
        ),
        ({key: value for key, value in OLD.items() if key != "gpu"}, ["no device"]),
        ({key: value for key, value in NEW.items() if key != "triton"}, ["no triton"]),
        ({key: value for key, value in NEW.items() if key != "date"}, ["no date"]),
    ],
)
def test_a_provenance_that_lacks_something_is_refused(provenance, wrong):
    assert faults(provenance, "h100.json") == wrong


def test_a_new_file_needs_a_commit():
    lacks = {key: value for key, value in NEW.items() if key != "commit"} | {"date": "2026-11-25"}
    assert faults(lacks, "b200.json") == ["commit unknown"]
