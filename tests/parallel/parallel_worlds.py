"""Real processes on gloo, started once for each size of a group, that run the cases of `parallel_cases` on all ranks.

Processes are forked from one server that has torch loaded, so that a world starts in a fraction of a second. A case
that does not end is a failure of its test, and the end of its world's processes.
"""

import datetime
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import tempfile
import time
import traceback
import warnings
from unittest import mock

import pytest
import torch
import torch.distributed as dist

PATIENCE = 120  # seconds until a case is taken for hanging; all take well under ten, also with other processes beside


class Raised(Exception):
    """What a rank raised: kind, the exception's class by name, and message."""

    def __init__(self, rank, kind, message, trace):
        super().__init__(f"rank {rank}: {kind}: {message}\n{trace}")
        self.kind, self.message = kind, message


def forkserver():
    """The context of processes that are forked from the server."""
    context = multiprocessing.get_context("forkserver")
    # the last one is imported by torch.use_deterministic_algorithms, and takes seconds
    context.set_forkserver_preload(["parallel_cases", "dsa_ref.training.train", "torch._inductor.config"])
    path = os.pathsep.join(folder for folder in sys.path if folder)  # before Python 3.12 the server has no other
    with mock.patch.dict(os.environ, PYTHONPATH=path, CUDA_VISIBLE_DEVICES=""):  # and no GPU
        multiprocessing.forkserver.ensure_running()
    return context


class World:
    """`size` processes in one group. timeout: the group's, in seconds."""

    def __init__(self, size, timeout=60.0):
        context = forkserver()
        self.size, self.folder = size, tempfile.TemporaryDirectory()
        self.pipes, self.processes = [], []
        self.broken = False  # a case has failed, and left ranks at different places
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=serve, args=(theirs, self.folder.name, rank, size, timeout), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, case, **arguments):
        """What the case returned on each rank. Raises the Raised of the first rank that failed."""
        outcomes = self.outcomes(case, **arguments)
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                self.broken = True
                raise outcome
        return outcomes

    def outcomes(self, case, ranks=None, **arguments):
        """What the case returned, or the Raised, or None for a rank whose process has ended."""
        ranks = range(self.size) if ranks is None else ranks
        for rank in ranks:
            self.pipes[rank].send((case, arguments))
        deadline, found = time.monotonic() + PATIENCE, []
        for rank in ranks:
            if not self.pipes[rank].poll(max(0.0, deadline - time.monotonic())):
                self.broken = True
                pytest.fail(f"rank {rank} of {self.size} hangs in {case}")
            try:
                kind, value = self.pipes[rank].recv()
            except EOFError:
                found.append(None)
                continue
            found.append(value if kind == "returned" else Raised(rank, kind, *value))
        return found

    def close(self):
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        self.folder.cleanup()


class Worlds:
    """Worlds by their size, each started when a test first asks for it; one in which a case has failed starts anew."""

    def __init__(self):
        self.started = {}

    def __call__(self, size):
        if size in self.started and self.started[size].broken:
            self.started.pop(size).close()
        if size not in self.started:
            self.started[size] = World(size)
        return self.started[size]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for world in self.started.values():
            world.close()


def serve(pipe, folder, rank, size, timeout):
    """Join the group, then run what the pipe names until it is closed."""
    import parallel_cases

    torch.set_num_threads(1)
    warnings.simplefilter("error")
    patience = datetime.timedelta(seconds=timeout)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=size, timeout=patience
    )
    while True:
        try:
            case, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(("returned", getattr(parallel_cases, case)(**arguments)))
        except Exception as error:
            pipe.send((type(error).__name__, (str(error), traceback.format_exc())))
