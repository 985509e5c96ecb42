"""Text that every reader has: the source of the running Python's own standard library, as bytes."""

import pathlib
import sysconfig
import zlib

import torch
from torch import Tensor

LEFT_OUT = {"test", "tests", "idle_test", "lib2to3", "encodings", "pydoc_data", "site-packages", "dist-packages"}
HELD_OUT_SHARE = 16  # one file in 16


def library_files() -> tuple[pathlib.Path, list[pathlib.Path]]:
    """The library's root and the paths of its .py files, sorted, without tests, tables and installed packages."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    files = sorted(path for path in root.rglob("*.py") if not LEFT_OUT & set(path.relative_to(root).parts))
    return root, files


def is_held_out(name: str) -> bool:
    """Whether training leaves out the file of this name (relative, with forward slashes): a fixed hash decides."""
    return zlib.crc32(name.encode()) % HELD_OUT_SHARE == 0


def load_corpus() -> tuple[Tensor, Tensor]:
    """(training bytes, held-out bytes), two uint8 tensors, each the files of its side one after the other."""
    root, files = library_files()
    sides = [], []
    for path in files:
        sides[is_held_out(path.relative_to(root).as_posix())].append(path.read_bytes())
    return tuple(torch.frombuffer(bytearray(b"".join(side)), dtype=torch.uint8) for side in sides)


def held_out_windows(corpus: Tensor, count: int, length: int) -> Tensor:
    """`count` windows of length + 1 bytes, evenly spread over `corpus`, uint8 [bytes]: uint8 [count, length + 1].

    Raises: ValueError where the corpus is shorter than a window.
    """
    check_length(corpus, length)
    starts = torch.linspace(0, len(corpus) - length - 1, count, dtype=torch.float32, device="cpu").long()
    return corpus[(starts[:, None] + torch.arange(length + 1, device="cpu")).to(corpus.device)]


def fingerprint(corpus: Tensor) -> str:
    """What tells a text from another one, uint8 [bytes]: another Python's library is another."""
    return f"{len(corpus)} bytes, CRC {zlib.crc32(corpus.cpu().numpy()):08x}"


def check_length(corpus: Tensor, length: int) -> None:
    """Raise ValueError unless a window of length + 1 bytes fits into `corpus`, uint8 [bytes]."""
    if length < 1 or length >= len(corpus):
        raise ValueError(f"length must be from 1 to {len(corpus) - 1}, the corpus less the byte after it, got {length}")
