"""Processes that run the same function, each as one rank of a group on this machine: what `torchrun` does, in short."""

import dataclasses
import inspect
import os
import pathlib
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import time


@dataclasses.dataclass(frozen=True)
class Ended:
    """How one rank ended: what it printed, its exit code, and the last line of its error, "" without one."""

    printed: str
    code: int
    error: str


def run_ranks(size, program, seconds=100) -> list[Ended]:
    """Run `program()` in `size` new processes at once, as `torchrun --nproc-per-node size` would, and wait for all.

    program: a function without arguments that imports what it needs: its source alone goes to the processes. Each has
    RANK, WORLD_SIZE, LOCAL_RANK and an address to meet at in its environment, so that `dsa_ref.parallel.join` works,
    and one thread. Returns how each ended, by rank.

    Raises: TimeoutError where one is still at work after `seconds`; all are killed then.
    """
    source = f"{textwrap.dedent(inspect.getsource(program))}\n{program.__name__}()\n"
    with tempfile.TemporaryDirectory() as folder:
        script = pathlib.Path(folder, "program.py")
        script.write_text(source, encoding="utf-8")
        outputs = [
            [pathlib.Path(folder, f"{rank}.{kind}").open("w+", encoding="utf-8") for kind in ("out", "err")]
            for rank in range(size)
        ]
        shared = os.environ | {
            "WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "PYTHONIOENCODING": "utf-8",
        }  # fmt: skip
        started = []
        try:
            for rank, (out, err) in enumerate(outputs):
                own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
                started.append(subprocess.Popen([sys.executable, str(script)], stdout=out, stderr=err, env=own))
            codes = wait(started, seconds)
        finally:
            for process in started:
                process.kill()
                process.wait()
            texts = [[read_and_close(file) for file in pair] for pair in outputs]
    return [Ended(out, code, last_line(err) if code else "") for code, (out, err) in zip(codes, texts, strict=True)]


def wait(started, seconds) -> list[int]:
    """The processes' exit codes. Raises: TimeoutError after `seconds`, naming the ranks that are still at work."""
    deadline = time.monotonic() + seconds
    while late := [rank for rank, process in enumerate(started) if process.poll() is None]:
        if time.monotonic() > deadline:
            raise TimeoutError(f"still at work after {seconds} seconds: ranks {', '.join(map(str, late))}")
        time.sleep(0.05)
    return [process.returncode for process in started]


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as asking:
        asking.bind(("127.0.0.1", 0))
        return asking.getsockname()[1]


def read_and_close(file) -> str:
    with file:
        file.seek(0)
        return file.read()


def last_line(text) -> str:
    """The last line that an error printed, without the `[rank0]: ` that torch puts before it."""
    lines = text.strip().splitlines()
    return re.sub(r"^\[rank\d+\]: ", "", lines[-1]) if lines else ""
