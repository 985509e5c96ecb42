"""Whole programs on several ranks, as torchrun would start them, each with its own arguments and its own mishap."""

import contextlib
import errno
import importlib
import os
import socket
import time

import torch
from parallel_worlds import PATIENCE, forkserver


@contextlib.contextmanager
def launched(module, arguments, folder, faults=()):
    """The processes of the program `module`, one a rank with its own arguments, as torchrun would start them.

    faults: {rank: the name of a mishap below, which befalls it}. What they print goes to files in folder.
    """
    with socket.socket() as found:
        found.bind(("localhost", 0))
        port, context = found.getsockname()[1], forkserver()
    size, processes = len(arguments), []
    for rank, given in enumerate(arguments):
        names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
        names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}
        sent = module, given, {name: str(value) for name, value in names.items()}, folder, dict(faults).get(rank)
        processes.append(context.Process(target=run_command, args=sent, daemon=True))
        processes[-1].start()
    try:
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.join()


def ended(module, arguments, folder, faults=()):
    """[(exit code, stdout, stderr) of each rank], and how many seconds it took until all had ended."""
    begun = time.monotonic()
    with launched(module, arguments, folder, faults) as processes:
        for process in processes:
            process.join(max(0.0, begun + PATIENCE - time.monotonic()))
        codes = [process.exitcode for process in processes]
    said = [[(folder / f"{name}{rank}").read_text() for name in ("out", "err")] for rank in range(len(codes))]
    return [(code, *texts) for code, texts in zip(codes, said, strict=True)], time.monotonic() - begun


def run_command(module, arguments, variables, folder, fault):
    """One rank of a program, in a process of its own."""
    os.environ.update(variables)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(folder / f"{name}{variables['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
    torch.set_num_threads(1)
    if fault:
        globals()[fault]()
    importlib.import_module(module).main(arguments)


# What befalls one rank of a program -----------------------------------------------------------------------------------


def no_corpus():
    from dsa_ref.training import train

    train.load_corpus = lambda: [][0]


def disk_fills_up():
    """There is room for the first state, not for the second."""
    from dsa_ref.training import run

    save, saved = run.save_state, []

    def saving(*given):
        if saved:
            raise OSError(errno.ENOSPC, "No space left on device")
        saved.append(save(*given))

    run.save_state = saving


def no_room_for_weights():
    from safetensors import SafetensorError

    from dsa_ref.training import train

    def full(*_):
        raise SafetensorError("No space left on device")

    train.save_small_model = full


def disk_is_slow():
    from dsa_ref.training import run

    save = run.save_state
    run.save_state = lambda *given: (time.sleep(2.0), save(*given))


def output_is_full():
    os.dup2(os.open("/dev/full", os.O_WRONLY), 1)
