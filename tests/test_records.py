"""Provenance names the commit, wherever the code runs from, and records are found from a checkout and an install."""

import json
import os
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
    paths = ["--log", "/somebody/out/x.json", "--weights=/somebody/w.bin", "a/b.json", "--flag"]
    assert records.provenance("program", paths)["command"] == (
        "python -m program --log x.json --weights=w.bin a/b.json --flag"
    )


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


@pytest.mark.parametrize(
    "text, ours",
    [
        (PROJECT, True),
        ('[build-system]\nrequires = []\n[project] # ours\nversion="1"\nname="dsa-reference"\n', True),
        ("[ project ]\n  name  =  'dsa-reference' # a comment\n[tool.x]\n", True),
        ('[project]\nname = "another" # not name = "dsa-reference"\n', False),
        ('[project]\n# name = "dsa-reference"\nname = "another"\n', False),
        ('[project]\nname = "another"\n[tool.x]\nname = "dsa-reference"\n', False),
        ('[project]\nname = "dsa-reference-of-another"\n', False),
        ('[project]\nauthors = "J\xf6rg"\nname = "another"\n', False),
        ("", False),
    ],
)
def test_a_checkout_of_this_project_is_known_by_its_name(text, ours, tmp_path, monkeypatch):
    (tmp_path / "figures").mkdir()
    (tmp_path / "pyproject.toml").write_text(text, encoding="latin-1")
    monkeypatch.setattr(records, "PACKAGE", tmp_path / "dsa_ref")
    monkeypatch.chdir(tmp_path / "figures")
    if ours:
        assert records.figures_folder() == tmp_path / "figures"
    else:
        with pytest.raises(FileNotFoundError, match="Change into a checkout"):
            records.figures_folder()


@pytest.mark.skipif(os.name == "nt", reason="a folder in use cannot be removed")
def test_a_current_folder_that_is_gone_is_named(checkout, tmp_path, monkeypatch):
    gone = tmp_path / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    monkeypatch.setattr(records, "PACKAGE", checkout)
    assert records.figures_folder() == checkout.parent / "figures"
    monkeypatch.setattr(records, "PACKAGE", tmp_path / "site-packages" / "dsa_ref")
    with pytest.raises(FileNotFoundError, match="current folder, which is gone, or above"):
        records.figures_folder()


def test_a_linked_package_has_the_commit_and_the_records_of_its_checkout(checkout, tmp_path):
    shutil.copy(records.__file__, checkout / "records.py")
    (tmp_path / "linked").mkdir()
    (tmp_path / "linked" / "dsa_ref").symlink_to(checkout)
    code = "from dsa_ref import records; print(records.figures_folder(), records.commit()['commit'])"
    ran = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path / "linked",
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(tmp_path / "linked")},
    )
    commit = git(checkout, "rev-parse", "--short=10", "HEAD")
    assert ran.stdout.split() == [str(checkout.parent / "figures"), f"{commit}-dirty"], ran.stderr


def test_a_written_record_is_read_again(tmp_path):
    path = tmp_path / "record.json"
    records.write(path, {"ms": 1.5, "unit": "µs"})
    assert records.read(path) == {"ms": 1.5, "unit": "µs"} and path.read_text().endswith("}\n")


def test_this_checkouts_records_are_found(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert records.figures_folder() == pathlib.Path(__file__).parents[1] / "figures"
    assert records.read("traps.json")["provenance"]["command"]
