"""One V3.2 layer over the GPUs of a host: `torchrun --nproc-per-node N -m dsa_bench.parallel [--record FILE]`.

Prefill by gathered keys, a training step, decode by sharded keys, each against one of the GPUs in the same rounds and
against its exchange alone; "long" has the prompts that take the longest. N is a power of two. `--tiny` is a rehearsal
at toy sizes on a CPU, by the reference's steps.

Exit code 0: all is right; 1: something is wrong; 2: no GPU, or arguments that make no sense.
"""

import argparse
import dataclasses
import os
import sys

import torch
import torch.distributed as dist

import dsa_kernels
import dsa_ref
from dsa_ref import TINY, V32
from dsa_ref.parallel import Ranks, join
from dsa_ref.records import output_file, positive, provenance

from .. import measure, records
from ..__main__ import NO_GPU, announced, check_log
from ..bill.lines import size
from ..decode_layer import random_layer
from ..run import free
from ..training.step import training_layer
from . import lines
from .decode import Decode
from .measured import row_of
from .prefill import Prefill
from .step import Training

PROGRAM = "dsa_bench.parallel"
SECTIONS = ("prefill", "training", "decode", "long")
ROUNDS = 5
TIMEOUT = 150.0  # seconds that ranks wait for one that works alone, or compiles
NO_RANKS = "dsa_bench.parallel measures several ranks: start it with torchrun --nproc-per-node N, N a power of two"
K = 1 << 10


@dataclasses.dataclass(frozen=True)
class Sizes:
    """prefill, long: prompts, of which one GPU and each rank take `chunk` tokens at once; behind: (tokens that each
    rank reads, context at whose end they stand); training: tokens of a step; decode: contexts."""

    prefill: tuple = (128 * K, 256 * K)
    long: tuple = (512 * K, 1024 * K)
    behind: tuple = ((4 * K, 512 * K), (4 * K, 1024 * K), (16 * K, 1024 * K))
    chunk: int = 4 * K
    training: tuple = (16 * K, 32 * K, 64 * K)
    decode: tuple = (128 * K, 1024 * K)


TOY = Sizes(prefill=(48,), long=(), behind=((8, 64),), chunk=8, training=(24,), decode=(40,))


def parse(arguments):
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default all")
    parser.add_argument("--tiny", action="store_true", help="toy sizes on a CPU: a rehearsal, no measurement")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="how often each is measured (%(default)s)")
    parser.add_argument(
        "--record", "--log", dest="log", type=output_file, help="JSON to write; default figures/parallel_N_h200.json"
    )  # torchrun of Python 3.11 takes --log for a short form of options of its own
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"section must be one of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    options.sections = options.sections or list(SECTIONS)
    return parser, options


@torch.no_grad()
def main(arguments=None) -> int:
    parser, options = parse(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    if not dist.is_initialized():
        if "LOCAL_RANK" not in os.environ:
            print(NO_RANKS, file=sys.stderr)
            return 2
        join(TIMEOUT)
    ranks = Ranks()
    if ranks.size & (ranks.size - 1) or ranks.size == 1:
        parser.error(f"{NO_RANKS}, got {ranks.size}")
    device = torch.device("cpu" if options.tiny else f"cuda:{torch.cuda.current_device()}")
    log = options.log or (
        None if options.tiny else records.parallel_log(torch.cuda.get_device_name(device), ranks.size)
    )
    if log is None and not options.tiny:
        parser.error(f"no file for figures of a {torch.cuda.get_device_name(device)}: pass --record")
    log = log if ranks.rank == 0 else None
    if log:
        check_log(parser, log, "steps")
    return int(measured(options, ranks, device, log, arguments))


def measured(options, ranks, device, log, arguments) -> bool:
    """Measure, print and write what stands after each row, by rank 0; whether anything was wrong, on all ranks."""
    run, ceilings, wrong = {}, None, False
    if ranks.rank == 0:
        run = provenance_of(arguments, ranks, device)
        if options.tiny:
            print(*(f"{name}: {value}" for name, value in run.items()), sep="\n")
        else:
            ceilings = announced(run, options.rounds)
    if not options.tiny and options.sections != ["training"]:
        dsa_kernels.warm(V32, Sizes.behind[-1][1], Sizes.chunk, batches=(), device=device)
    for section in options.sections:
        rows = []
        for name, make in cases(section, TOY if options.tiny else Sizes(), ranks, device, options.tiny):
            free()
            rows.append(row_of(make(), name, options.rounds))
            free()
            wrong |= rows[-1]["verdict"] != "right"
            if ranks.rank == 0:
                print(*lines.row(section, rows[-1], ranks.size), sep="\n", flush=True)
            if log:
                made = {"provenance": run, "ranks": ranks.size, "rows": rows}
                records.merge(log, {section: made}, ceilings)
    return wrong


def provenance_of(arguments, ranks, device):
    found = measure.environment(arguments, PROGRAM) if device.type == "cuda" else provenance(PROGRAM, arguments)
    found["command"] = found["command"].replace("python", f"torchrun --nproc-per-node {ranks.size}", 1)
    nccl = ".".join(map(str, torch.cuda.nccl.version())) if device.type == "cuda" else None
    return found | {"ranks": ranks.size, "nccl": nccl, "nvls": os.environ.get("NCCL_NVLS_ENABLE")}


def cases(section, sizes, ranks, device, tiny):
    """[(name, what makes it)] of a section, for this many ranks."""
    chunk = sizes.chunk
    if section == "training":
        config = dataclasses.replace(TINY if tiny else V32, index_fp8=False)
        layer = training_layer(config, dsa_ref if tiny else dsa_kernels, device)
        return [(f"a step of {size(T)}", lambda T=T: Training(layer, T, ranks)) for T in sizes.training]
    config = dataclasses.replace(TINY if tiny else V32, max_seq_len=sizes.behind[-1][1])
    layer = random_layer(config, device)
    if tiny:
        layer.ops = dsa_ref
    if section == "decode":
        return [(f"a token behind {size(S)}", lambda S=S: Decode(layer, S, ranks)) for S in sizes.decode]

    def prefill(T, S):
        name = f"a prompt of {size(S)}" if T == S else f"{size(T)} at the end of {size(S)}"
        return name, lambda: Prefill(layer, T, S, ranks, chunk)

    behind = [prefill(ranks.size * T, S) for T, S in sizes.behind if section == "long"]
    return behind + [prefill(S, S) for S in getattr(sizes, section)]


if __name__ == "__main__":
    sys.exit(main())
