"""One layer over N GPUs, by gathered keys, against one GPU: a prefill, and a training step.

    PYTHONPATH=.:kernels torchrun --nproc-per-node N -m dsa_bench.parallel [prefill] [training] [--log FILE]

    alone          rank 0: the layer itself, chunk by chunk with a LayerCache (prefill), or whole (training)
    over N         `GatheredLayer`, from a barrier to the last rank's end; efficiency is alone / (N · over N)
    exchange       the all-gather of the rows alone, in order; training: and the reduce-scatters
    indexer        the time in `lightning_select` on each rank; imbalance is the largest over their mean, less 1

Weights and tokens are random. Times are medians of `--rounds` calls, as Python makes them, after one that is not timed.
Each output row that a rank has of both is compared; an error above ROW_ERROR ends with exit code 1, no GPU with 2.
"""

import argparse
import dataclasses
import statistics
import sys
import time
import types

import torch
import torch.distributed as dist

import dsa_kernels
from dsa_ref import V32, LayerCache, unchecked_values
from dsa_ref.parallel import GatheredLayer, Ranks, Zigzag, gather_rows, indexer_share, join, sum_gradients
from dsa_ref.records import output_file, positive, provenance, write_log

from .training.step import training_layer

KI = 1 << 10
TOKENS = {"prefill": [128 * KI, 256 * KI, 512 * KI, 1024 * KI], "training": [8 * KI, 16 * KI, 32 * KI]}
TIMEOUT = 300.0  # seconds, for a rank that waits until rank 0 has done the whole alone
CHUNK = 4096
ROW_ERROR = 2e-2  # ||row - row|| / ||row||, a share of whose rows may be above it where bf16 flips a selected key
FLIPPED = 0.01


class TimedOps(types.SimpleNamespace):
    """The steps of `dsa_kernels`, with the time in its selection: ms in all, read once the device has finished."""

    def __init__(self, device):
        super().__init__(
            **{name: getattr(dsa_kernels, name) for name in dsa_kernels.__all__ if name != "lightning_select"}
        )
        self.device, self.calls = device, []

    def lightning_select(self, *arguments, **more):
        begun = Clock(self.device)
        chosen = dsa_kernels.lightning_select(*arguments, **more)
        self.calls.append((begun, Clock(self.device)))
        return chosen

    def taken(self):
        """ms since the last time, after a synchronization."""
        calls, self.calls = self.calls, []
        return sum(first.until(last) for first, last in calls)


class Clock:
    """A moment on the device, or on the host where there is none."""

    def __init__(self, device):
        self.event = torch.cuda.Event(enable_timing=True) if device.type == "cuda" else None
        if self.event:
            self.event.record()
        self.host = time.perf_counter()

    def until(self, other):
        return self.event.elapsed_time(other.event) if self.event else 1e3 * (other.host - self.host)


def synchronize(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def timed(call, device, rounds, ranks=None, after=lambda: None):
    """([ms of each round], [what `after` gave]); with ranks, from a barrier to the end of the slowest, on all alike."""
    found, seen = [], []
    for round_ in range(rounds + 1):
        synchronize(device)
        if ranks:
            ranks.agree({"call": "barrier"})
        begun = time.perf_counter()
        call()
        synchronize(device)
        ms = 1e3 * (time.perf_counter() - begun)
        extra = after()
        if ranks:
            ms = max(own["ms"] for own in ranks.agree({"call": "time"}, {"ms": ms}))
        if round_:
            found.append(ms)
            seen.append(extra)
    return found, seen


def tokens(rows, dim, device, seed=0):
    """x bf16 [len(rows), dim] of rows int64, ascending: each row the same whoever makes it."""
    x = torch.empty(len(rows), dim, dtype=torch.bfloat16, device=device)
    for block in torch.unique(rows // CHUNK).tolist():
        generator = torch.Generator(device).manual_seed(seed + block)
        made = torch.randn(CHUNK, dim, generator=generator, device=device).to(torch.bfloat16)
        here = rows // CHUNK == block
        x[here] = made[rows[here] % CHUNK]
    return x


def error_of(got, wanted):
    """The share of rows that differ by more than ROW_ERROR."""
    return float(((got - wanted).float().norm(dim=1) > ROW_ERROR * wanted.float().norm(dim=1)).float().mean())


@torch.no_grad()
def prefill(layer, T, ranks, device, rounds):
    """A row of the record: T tokens through the layer."""
    own, dim = Zigzag(T, ranks.size).rows(ranks.rank, device), layer.config.dim
    ops = TimedOps(device)
    over = GatheredLayer(layer)
    over.ops = ops
    alone, wanted = [], None
    if ranks.rank == 0:
        x, outs = tokens(torch.arange(T, device=device), dim, device), []

        def whole():
            outs.clear()  # memory for one result
            cache = LayerCache(layer.config, T, torch.bfloat16, device)
            with unchecked_values():
                for first in range(0, T, CHUNK):
                    last = min(first + CHUNK, T)
                    outs.append(layer(x[first:last], torch.arange(first, last, device=device), cache))

        alone, _ = timed(whole, device, rounds)
        wanted = torch.cat(outs)[own]
        del x, outs[:]
    mine, result = tokens(own, dim, device), []

    def share():
        result.clear()
        with unchecked_values():
            result.append(over(mine, own))

    over_n, select = timed(share, device, rounds, ranks, ops.taken)
    differ = error_of(result[0], wanted) if ranks.rank == 0 else 0.0
    rows = [torch.zeros(len(own), layer.config.latent_dim, dtype=torch.bfloat16, device=device)]
    rows += [torch.zeros(len(own), layer.config.index_head_dim, dtype=torch.float8_e4m3fn, device=device)]
    rows += [torch.zeros(len(own), device=device)]
    exchange, _ = timed(lambda: gather_rows(rows, Zigzag(T, ranks.size), ranks), device, rounds, ranks)
    return account(T, ranks, alone, over_n, exchange, statistics.median(select), differ)


def training(layer, T, ranks, device, rounds):
    """A row of the record: forward and backward of T tokens, the sparse stage's, and the sum of weights' gradients."""
    own, dim = Zigzag(T, ranks.size).rows(ranks.rank, device), layer.config.dim
    ops = TimedOps(device)
    alone, wanted = [], None

    def step(run, x, dy, positions):
        record = []
        y = run(x, positions, record=record)
        y.backward(dy)
        indexer_share(run, {"end": None} | record[0], T, record[0]["probe"].grad).backward()

    def both(run, rows):
        x = tokens(rows, dim, device).requires_grad_()
        return run, x, tokens(rows, dim, device, seed=1 << 20), rows

    if ranks.rank == 0:
        arguments = both(layer, torch.arange(T, device=device))

        def whole():
            layer.zero_grad(set_to_none=True)
            arguments[1].grad = None
            step(*arguments)

        alone, _ = timed(whole, device, rounds)
        wanted = arguments[1].grad[own].clone()
        del arguments, whole
    over = GatheredLayer(layer)
    over.ops = ops
    arguments = both(over, own)

    def share():
        layer.zero_grad(set_to_none=True)
        arguments[1].grad = None
        step(*arguments)
        sum_gradients(layer.parameters())

    over_n, select = timed(share, device, rounds, ranks, ops.taken)
    differ = error_of(arguments[1].grad, wanted) if ranks.rank == 0 else 0.0
    widths = layer.config.latent_dim, layer.config.index_head_dim
    rows = [torch.zeros(len(own), n, dtype=torch.bfloat16, device=device, requires_grad=True) for n in widths]

    def exchanged():
        everyone = gather_rows(rows, Zigzag(T, ranks.size), ranks)
        torch.autograd.backward(everyone, [part.detach() for part in everyone])

    exchange, _ = timed(exchanged, device, rounds, ranks)
    return account(T, ranks, alone, over_n, exchange, statistics.median(select), differ)


def account(T, ranks, alone, over_n, exchange, select, differ):
    """The row, on all ranks alike."""
    everyone = ranks.agree({"T": T}, {"alone": alone, "select": select, "differ": differ})
    alone, selects = everyone[0]["alone"], [own["select"] for own in everyone]
    ms, ms_n, ms_exchange = (statistics.median(times) for times in (alone, over_n, exchange))
    return {
        "tokens": T, "ranks": ranks.size, "alone_ms": ms, "ms": ms_n, "exchange_ms": ms_exchange,
        "efficiency": ms / (ranks.size * ms_n), "exchange_share": ms_exchange / ms_n, "select_ms": selects,
        "imbalance": max(selects) / statistics.mean(selects) - 1, "rows_that_differ": everyone[0]["differ"],
        "rounds": {"alone": alone, "over": over_n, "exchange": exchange},
    }  # fmt: skip


def line(name, row):
    """A row as text."""
    share = 100 * row["exchange_share"]
    return (
        f"{name:<9}{row['tokens'] // KI:5}K  alone {row['alone_ms']:9.2f} ms  over {row['ranks']} {row['ms']:9.2f} ms  "
        f"efficiency {row['efficiency']:.3f}  exchange {row['exchange_ms']:.3f} ms, {share:.1f} %  "
        f"imbalance {100 * row['imbalance']:.1f} %  other rows {100 * row['rows_that_differ']:.2f} %"
    )


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dsa_bench.parallel", description=__doc__.splitlines()[0])
    parser.add_argument("what", nargs="*", metavar="what", help="prefill, training; default both")
    parser.add_argument("--tokens", type=positive, nargs="+", help="default 128K to 1M; training 8K to 32K")
    parser.add_argument("--rounds", type=positive, default=3, help="how often each is timed (%(default)s)")
    parser.add_argument("--log", type=output_file, help="JSON to write")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.what if name not in TOKENS]:
        parser.error(f"what must be of {', '.join(TOKENS)}, got {', '.join(unknown)}")
    options.what = options.what or list(TOKENS)
    return options


def main(arguments=None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("dsa_bench.parallel measures on CUDA GPUs, and torch finds none here.", file=sys.stderr)
        return 2
    ranks = Ranks(join(TIMEOUT))
    device = torch.device("cuda", torch.cuda.current_device())
    config = dataclasses.replace(V32, max_seq_len=1 << 21)
    record = {"provenance": provenance("dsa_bench.parallel", arguments, device), "gpus": ranks.size}
    wrong = False
    for what, measure in (("prefill", prefill), ("training", training)):
        if what not in options.what:
            continue
        fields = {"index_fp8": what == "prefill"}
        layer = training_layer(dataclasses.replace(config, **fields), dsa_kernels, device)
        layer.requires_grad_(what == "training")
        record[what] = []
        for T in options.tokens or TOKENS[what]:
            row = measure(layer, T, ranks, device, options.rounds)
            record[what].append(row)
            wrong |= row["rows_that_differ"] > FLIPPED
            torch.cuda.empty_cache()
            if ranks.rank == 0:
                print(line(what, row), flush=True)
                if options.log:
                    write_log("dsa_bench.parallel", options.log, record)
        del layer
    dist.destroy_process_group()
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
