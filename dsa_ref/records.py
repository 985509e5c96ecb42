"""What a recorded measurement says about itself, and where records lie.

A record is a JSON file in `figures/`, at the root of a checkout. Its "provenance" names the command, the commit, the
date, the versions and the machine. Records are made and read in a checkout; an installed wheel finds the one that the
program runs in.

A program that measures for hours must not fail when it saves: `output_file`, `regular_file` and `positive` are types
for argparse that refuse at the start what could not be written or run, and a file is replaced only by a whole one.
"""

import argparse
import contextlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import torch

PACKAGE = pathlib.Path(__file__).resolve().parent  # behind a link: the checkout is where the files are
COMMIT_VARIABLE = "DSA_COMMIT"


def provenance(program: str, arguments: list[str] | None = None, device: str | torch.device = "cpu") -> dict:
    """What the record of a run of `python -m {program} {arguments}` has to carry, as a dict for JSON.

    arguments: the command line's, default sys.argv's; device: what was measured, "cpu" or a CUDA device.

    Keys: command, commit (see `commit`), date (ISO), python, torch, numpy, triton (None where it is not installed),
    device (the GPU as torch names it, or "CPU, " and its architecture) and, for a GPU, driver (None where nvidia-smi
    does not say).
    """
    arguments = sys.argv[1:] if arguments is None else arguments
    device = torch.device(device)
    found = {
        "command": shlex.join(["python", "-m", program, *(_without_folders(str(argument)) for argument in arguments)]),
        **commit(),
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": _version("numpy"),
        "triton": _version("triton"),
    }
    if device.type == "cuda":
        return found | {"device": torch.cuda.get_device_name(device), "driver": _driver()}
    return found | {"device": f"CPU, {platform.machine()}"}


def _without_folders(argument: str) -> str:
    """An absolute path by its name alone: the folders of one machine say nothing on another."""
    option, equals, value = argument.rpartition("=") if argument.startswith("-") else ("", "", argument)
    path = pathlib.Path(value)
    return option + equals + (path.name if path.is_absolute() else value)


def commit(folder: pathlib.Path = PACKAGE) -> dict:
    """{"commit": the short hash of the checkout that the code in `folder` belongs to}.

    The hash ends in "-dirty" where a file outside of figures/ differs from the commit or is new. Outside of a checkout
    the environment variable DSA_COMMIT may name the commit (for a copy of the files that has no history); without it,
    "commit" is None and "commit_missing" says why.
    """
    try:
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")  # a package may be installed inside a checkout
        root = _git(folder, "rev-parse", "--show-toplevel")
        changed = _git(root, "status", "--porcelain", "--", ".", ":(exclude)figures")
        return {"commit": _git(root, "rev-parse", "--short=10", "HEAD") + ("-dirty" if changed else "")}
    except (OSError, subprocess.CalledProcessError) as error:
        if os.environ.get(COMMIT_VARIABLE):
            return {"commit": f"{os.environ[COMMIT_VARIABLE]} (named by {COMMIT_VARIABLE})"}
        said = error if isinstance(error, OSError) else error.stderr.strip().splitlines()[0]
        return {"commit": None, "commit_missing": f"the code is in no git checkout that can be asked: {said}"}


def figures_folder() -> pathlib.Path:
    """`figures/` of the checkout that this package lies in, else of the one that the current folder lies in.

    Raises: FileNotFoundError where neither lies in a checkout of this project.
    """
    try:
        current = pathlib.Path.cwd()
    except FileNotFoundError:
        current = None
    for start in filter(None, (PACKAGE, current)):
        for folder in (start, *start.parents):
            if (folder / "figures").is_dir() and _is_checkout(folder):
                return folder / "figures"
    raise FileNotFoundError(
        f"figures/ must lie above the current folder, {current or 'which is gone'}, or above {PACKAGE}: records "
        "are kept in a checkout of dsa-reference, not in the installed package. Change into a checkout"
    )


def read(name: str | os.PathLike) -> dict:
    """The record `name`: a path relative to `figures_folder()`, unlike `write`'s, or an absolute one.

    Raises: FileNotFoundError, as `figures_folder` and where there is no such file.
    """
    path = pathlib.Path(name)
    return json.loads((path if path.is_absolute() else figures_folder() / path).read_text(encoding="utf-8"))


def write(path: str | os.PathLike, record: dict) -> None:
    """Write `record` as JSON to `path`, relative to the current folder, unlike `read`'s: programs get it as --log."""
    text = json.dumps(record, indent=1) + "\n"
    with replacing(path) as new:
        new.write_text(text, encoding="utf-8")


def write_log(program: str, path: str | os.PathLike, record: dict) -> None:
    """`write`, for the end of a command: where it fails, as on a full disk, the command ends with a line that says so.

    program: as in `python -m {program}`.
    Raises: SystemExit in place of OSError.
    """
    try:
        write(path, record)
    except OSError as error:
        sys.exit(f"python -m {program}: error: --log could not be written, got {error}")


@contextlib.contextmanager
def replacing(path: str | os.PathLike) -> Iterator[pathlib.Path]:
    """A file to be written, which takes the place of `path` when it is whole; what fails before leaves `path` alone.

    A `path` that is no ordinary file, such as /dev/null, gets the bytes of that file and stays what it is, though the
    writer may rename, as safetensors does.
    """
    path = pathlib.Path(path).resolve()  # behind a link
    if path.exists() and not path.is_file():
        with tempfile.TemporaryDirectory(prefix=".writing-") as folder:
            new = pathlib.Path(folder, path.name)
            yield new
            with new.open("rb") as whole, path.open("wb") as device:
                shutil.copyfileobj(whole, device)
        return
    with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:  # beside it: on the same disk
        new = pathlib.Path(folder, path.name)
        yield new
        new.replace(path)


def check_writable(path: str | os.PathLike, regular: bool = False) -> None:
    """Raise ValueError unless `path` can be written: its folder is there and allows it, and it is no folder itself.

    regular: refuse a device or a pipe as well, from which nobody can read again what was written.
    """
    try:
        path = pathlib.Path(path).resolve()
        if path.is_dir():
            raise ValueError(f"path must be a file's, got the folder {path}")
        if not path.parent.is_dir():
            raise ValueError(f"path must lie in a folder that is there, got {path}: make {path.parent} first")
        if path.exists() and not path.is_file():
            if regular:
                raise ValueError(f"path must be that of a regular file or of a new one, got the device or pipe {path}")
        else:
            with tempfile.TemporaryDirectory(prefix=".writing-", dir=path.parent) as folder:
                pathlib.Path(folder, path.name).touch()  # a name may be too long
    except (OSError, RuntimeError) as error:  # RuntimeError: a link to itself, before Python 3.13
        reason = getattr(error, "strerror", None) or error
        raise ValueError(f"path must lie in a folder that can be written, got {path}: {reason}") from error


def output_file(text: str) -> pathlib.Path:
    """For argparse: the path of a file that can be written, checked before anything is run."""
    return _path_from(text, regular=False)


def regular_file(text: str) -> pathlib.Path:
    """For argparse: an `output_file` that can be read again, so no device."""
    return _path_from(text, regular=True)


def positive(text: str) -> int:
    """For argparse: an int of at least 1."""
    with contextlib.suppress(ValueError):
        if int(text) >= 1:
            return int(text)
    raise argparse.ArgumentTypeError(f"must be a whole number of at least 1, got {text!r}")


def _path_from(text, regular):
    try:
        check_writable(text, regular)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return pathlib.Path(text)


def _is_checkout(folder):
    project = folder / "pyproject.toml"
    if not project.is_file():
        return False
    text = project.read_text(encoding="utf-8", errors="replace")  # another project's may be in any encoding
    table = re.search(r"^[ \t]*\[[ \t]*project[ \t]*\](.*?)(?=^[ \t]*\[|\Z)", text, re.M | re.S)
    return bool(table and re.search(r"""^[ \t]*name[ \t]*=[ \t]*["']dsa-reference["']""", table[1], re.M))


def _git(folder, *arguments):
    """What git prints, stripped. Raises: OSError without git, CalledProcessError where git refuses."""
    command = ["git", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def _version(distribution):
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _driver():
    """The GPU driver's version, None where nvidia-smi does not say."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[0]
    except (OSError, subprocess.CalledProcessError, IndexError):
        return None
