"""Provenance names the commit, wherever the code runs from, and records are found from a checkout and an install."""

import json
import pathlib
import shutil
import subprocess
import sys

import pytest
import torch

from dsa_ref import records

PROJECT = '[project]\nname = "dsa-reference"\n'


def git(folder, *arguments):
    identity = ["-c", "user.name=A", "-c", "user.email=a@b.c", "-c", "init.defaultBranch=main"]
    ran = subprocess.run(["git", "-C", folder, *identity, *arguments], capture_output=True, text=True, check=True)
    return ran.stdout.strip()


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A small checkout with one commit; the path of its package."""
    monkeypatch.delenv(records.COMMIT_VARIABLE, raising=False)
    package = tmp_path / "checkout" / "dsa_ref"
    (package.parent / "figures").mkdir(parents=True)
    package.mkdir()
    (package / "__init__.py").touch()
    (package.parent / "pyproject.toml").write_text(PROJECT)
    (package.parent / ".gitignore").write_text("venv/\n")
    (package.parent / "figures" / "h100.json").write_text("{}\n")
    git(package.parent, "init", "--quiet")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "--quiet", "-m", "first")
    return package


def test_the_commit_is_that_of_the_code(checkout):
    wanted = git(checkout, "rev-parse", "HEAD")
    found = records.commit(checkout)["commit"]
    assert len(found) == 10 and wanted.startswith(found)


def test_changed_or_new_code_is_dirty_and_a_new_record_is_not(checkout):
    clean = records.commit(checkout)["commit"]
    (checkout.parent / "figures" / "h100.json").write_text("{1}\n")
    (checkout.parent / "figures" / "new.json").touch()
    assert records.commit(checkout) == {"commit": clean}
    (checkout / "new.py").touch()
    assert records.commit(checkout) == {"commit": f"{clean}-dirty"}
    (checkout / "new.py").unlink()
    (checkout / "__init__.py").write_text("x = 1\n")
    assert records.commit(checkout) == {"commit": f"{clean}-dirty"}


def test_an_installed_package_has_no_commit_even_inside_a_checkout(checkout, monkeypatch):
    installed = checkout.parent / "venv" / "dsa_ref"
    shutil.copytree(checkout, installed)
    found = records.commit(installed)
    assert found["commit"] is None and "no git checkout" in found["commit_missing"]
    monkeypatch.setenv(records.COMMIT_VARIABLE, "abc1234")
    assert records.commit(installed) == {"commit": "abc1234 (named by DSA_COMMIT)"}
    assert "abc1234" not in records.commit(checkout)["commit"]  # history is believed first


def test_without_git_the_record_says_so(checkout, monkeypatch):
    monkeypatch.setenv("PATH", str(checkout))
    found = records.commit(checkout)
    assert found["commit"] is None and "git" in found["commit_missing"]


def test_provenance_of_a_run_on_a_cpu(monkeypatch):
    found = records.provenance("dsa_bench", ["--only", "two words", 3])
    assert found["command"] == "python -m dsa_bench --only 'two words' 3"
    assert found["torch"] == torch.__version__ and found["python"] == sys.version.split()[0]
    assert found["device"].startswith("CPU, ") and "driver" not in found
    assert {"commit", "date", "numpy", "triton"} <= found.keys()
    assert json.loads(json.dumps(found)) == found
    monkeypatch.setattr(sys, "argv", ["program", "--log", "x.json"])
    assert records.provenance("program")["command"] == "python -m program --log x.json"


def test_provenance_of_a_run_on_a_gpu_names_card_and_driver(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "NVIDIA H100 80GB HBM3")
    found = records.provenance("dsa_bench", [], "cuda")
    assert found["device"] == "NVIDIA H100 80GB HBM3" and "driver" in found


def test_records_are_found_from_the_package_or_from_the_current_folder(checkout, tmp_path, monkeypatch):
    elsewhere = tmp_path / "site-packages" / "dsa_ref"
    elsewhere.mkdir(parents=True)
    inner = checkout.parent / "notebooks"
    inner.mkdir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(records, "PACKAGE", checkout)
    assert records.figures_folder() == checkout.parent / "figures"
    assert records.read("h100.json") == {}
    monkeypatch.setattr(records, "PACKAGE", elsewhere)
    (tmp_path / "figures").mkdir()  # of something else
    with pytest.raises(FileNotFoundError, match="Change into a checkout"):
        records.figures_folder()
    (tmp_path / "pyproject.toml").write_text('[project]\nname = "another"\n')
    with pytest.raises(FileNotFoundError, match="figures/ must lie above"):
        records.read("h100.json")
    monkeypatch.chdir(inner)
    assert records.figures_folder() == checkout.parent / "figures"


def test_a_written_record_is_read_again(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, {"ms": 1.5, "unit": "µs"})
    assert records.read(path) == {"ms": 1.5, "unit": "µs"} and path.read_text().endswith("}\n")


def test_this_checkouts_records_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert records.figures_folder() == pathlib.Path(__file__).parents[1] / "figures"
    assert records.read("traps.json")["provenance"]["command"]
