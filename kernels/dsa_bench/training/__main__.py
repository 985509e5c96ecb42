"""Measure training's kernels on a GPU: `python -m dsa_bench.training [step ...] [--peers] [--log FILE]`.

Exit code 0: all of ours is right; 1: something of ours is wrong or failed; 2: no GPU, or arguments that make no sense.
"""

import argparse
import sys

import torch

from dsa_ref.records import output_file, positive

from .. import measure, records
from ..__main__ import NO_GPU, announced, check_log
from . import gradients, losses, peers, step
from .run import measure_case

ROUNDS = 5
WIDTH = 120
KI = 1 << 10
CASES = {  # {step: {case: what makes it}}
    "backward": {
        f"4096 x {S}K, {H} heads": lambda S=S, H=H: gradients.gradient_case(4 * KI, S * KI, H)
        for S in (8, 32)
        for H in (128, 64)
    },
    "warm-up": {f"{T}K x {T}K": lambda T=T: losses.warm_up_case(T * KI) for T in (8, 16)},
    "layer": {"4096 tokens": lambda: step.step_case(4 * KI)},
}


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dsa_bench.training", description="Measure training's kernels.")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"some of {', '.join(CASES)}; default all")
    parser.add_argument("--peers", action="store_true", help="also measure TileLang's kernels, torch's and cuDNN's")
    parser.add_argument("--only", default="", help="only cases whose name holds this text; no file without --log")
    parser.add_argument("--log", type=output_file, help="JSON to write; default figures/training_kernels_h200.json")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="how often each is measured (%(default)s)")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.steps if name not in CASES]:
        parser.error(f"step must be one of {', '.join(CASES)}, got {', '.join(unknown)}")
    options.steps = options.steps or list(CASES)
    return parser, options


@torch.no_grad()
def main(arguments=None) -> int:
    parser, options = parse(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    provenance = measure.environment(arguments, "dsa_bench.training") | {"peers": peers.versions()}
    log = options.log or records.training_log(provenance["device"])
    if log is None:
        parser.error(f"no file for figures of a {provenance['device']}: pass --log")
    if options.only and not options.log:
        log = None  # part of a step must not replace the whole
    if log:
        check_log(parser, log, "steps")
    ceilings = announced(provenance, options.rounds)
    return int(measured(options, log, provenance, ceilings))


def measured(options, log, provenance, ceilings, cases=CASES, **more) -> bool:
    """Measure, print, and write what stands after every case; whether something of ours was wrong or failed."""
    wrong = False
    for name in options.steps:
        rows = []
        for case, make in cases[name].items():
            if options.only not in case:
                continue
            rows.append(measure_case(make, case, ceilings, options.rounds, not options.peers, **more))
            print(*lines(name, rows[-1]), sep="\n", flush=True)
            wrong |= records.any_of_ours_wrong(rows[-1])
            if log:
                records.merge(log, {name: {"provenance": provenance, "rows": rows}}, ceilings)
    return wrong


def lines(name, row):
    """One case as text: ms, its 10th and 90th percentile, times the call that it is set against, rate, memory, bits."""
    texts = [f"{name}: {row['case']}, times {row['against']}"]
    for who, found in row["results"].items():
        if "ms" not in found:
            texts.append(f"    {who:<24}{found['verdict']}: {found['note']}"[:WIDTH])
            continue
        ends = " ".join(f"{100 * (found[end] / found['ms'] - 1):+.0f}" for end in ("ms_10", "ms_90"))
        times = f"{found['times']:.2f}x" if "times" in found else ""
        rate = f"{found['rate']:.0f} TFLOP/s" if "rate" in found else ""
        memory = f"{found['memory_bytes'] / 2**30:.2f} GiB"
        bits = f"{found['equal']}/{found['repeats']} same"
        text = f"    {who:<24}{found['ms']:9.3f} ms {ends:>7} % {times:>7} {rate:>13} {memory:>10} {bits:>10}"
        texts.append(text[:WIDTH])
        remark = found["note"] if found["verdict"] == "right" else f"{found['verdict']}: {found['note']}"
        timed = "" if found["timed"] == "graph" else found["timed"]
        texts += [f"        {part}"[:WIDTH] for part in (remark, timed) if part]
    return texts


if __name__ == "__main__":
    sys.exit(main())
