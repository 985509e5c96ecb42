"""A run's state in one file, from which a killed run goes on: written whole or not at all, and checked when read.

One safetensors file: master weights, AdamW's means, and beside them as JSON the options, the stage, the step and the
log. What the model computes with are the master weights, rounded, and the windows follow from seed, stage and step.
"""

import contextlib
import json
import os
import pathlib
import shutil
from collections.abc import Iterator

from torch import Tensor

from ..records import replacing

FORMAT = "dsa_ref.training 1"
SPARE = 1 << 24  # bytes, for the log and the file system's own


def save_state(path: pathlib.Path, tensors: dict[str, Tensor], about: dict) -> None:
    """Put the state in the place of what was at `path`, on the disk when this returns. about: anything for JSON.

    Raises: OSError where it cannot be written; what was at `path` is whole then.
    """
    from safetensors.torch import save_file

    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    with replacing_safetensors(path) as new:
        save_file(tensors, new, metadata={"format": FORMAT, "about": json.dumps(about)})
        with new.open("rb+") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def replacing_safetensors(path: pathlib.Path) -> Iterator[pathlib.Path]:
    """`records.replacing`, for a file that safetensors writes: where it cannot, as on a full disk, that is OSError."""
    from safetensors import SafetensorError

    try:
        with replacing(path) as new:
            yield new
    except SafetensorError as error:
        raise OSError(f"{path} could not be written: {error}") from error


def load_state(path: pathlib.Path, options: dict) -> tuple[dict[str, Tensor], dict]:
    """(tensors, about) of the run with these options whose state is at `path`; about["options"] must be the same.

    Raises: ValueError where the file is no such state, as one cut short, or of a run with other options, by name.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise ValueError(f"path must be that of a whole state of this program, got {path}: {error}") from error
    if metadata.get("format") != FORMAT:
        raise ValueError(f"path must be that of a state of this program, {FORMAT!r}, got another file, {path}")
    about = json.loads(metadata["about"])
    there, here = about["options"], json.loads(json.dumps(options))
    for name in [*here, *(there.keys() - here.keys())]:
        if there.get(name) != here.get(name):
            raise ValueError(
                f"path must be that of a run with the same options, got {path}, whose {name} is {there.get(name)}, "
                f"wanted {here.get(name)}"
            )
    return tensors, about


def clear_unfinished(path: pathlib.Path) -> None:
    """Remove what runs that were killed while they wrote the state at `path` have left beside it."""
    path = path.resolve()
    for folder in path.parent.glob(".writing-*"):
        if [file.name for file in folder.iterdir()] == [path.name]:
            shutil.rmtree(folder)


def check_space(needs: dict[pathlib.Path, int]) -> None:
    """Raise ValueError unless each file, of so many bytes, finds room twice: the old one lies beside the new one."""
    disks = {}
    for path, size in needs.items():
        folder = path.resolve().parent
        disks.setdefault(folder.stat().st_dev, (folder, []))[1].append(2 * size + SPARE)
    for folder, sizes in disks.values():
        free = shutil.disk_usage(folder).free
        if free < sum(sizes):
            raise ValueError(f"{folder} must have {sum(sizes):,} bytes free for what will be written, got {free:,}")
