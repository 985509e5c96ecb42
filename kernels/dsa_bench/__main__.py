"""Measure every step on a GPU: `python -m dsa_bench [step ...] [--peers] [--log FILE] [--ladder]`.

Exit code 0: all of ours is right; 1: something of ours is wrong or failed; 2: no GPU, or arguments that make no sense.
"""

import argparse
import json
import sys

import torch

from dsa_ref.records import check_writable, output_file, positive

from . import ladder, measure, peers, records, run
from .cases import CASES

NO_GPU = "dsa_bench measures on a CUDA GPU, and torch finds none here."


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dsa_bench", description="Measure every step on a GPU.")
    steps = (*CASES, "ceilings")
    parser.add_argument("steps", nargs="*", metavar="step", help=f"some of {', '.join(steps)}; default all")
    parser.add_argument("--peers", action="store_true", help="also measure the public kernels that are installed")
    parser.add_argument("--ladder", action="store_true", help="measure the versions that were tried on the way")
    parser.add_argument("--only", default="", help="only cases (of the ladder: versions) whose name holds this text")
    parser.add_argument("--log", type=output_file, help="JSON to write; default figures/h200.json, by the card's name")
    parser.add_argument(
        "--rounds", type=positive, default=measure.ROUNDS, help="how often each is measured (%(default)s)"
    )
    options = parser.parse_args(arguments)
    unknown = [step for step in options.steps if step not in steps]
    if unknown:
        parser.error(f"step must be one of {', '.join(steps)}, got {', '.join(unknown)}")
    options.steps = options.steps or list(steps)
    return parser, options


@torch.no_grad()
def main(arguments=None) -> int:
    parser, options = parse(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    provenance = measure.environment(arguments)
    log = options.log or (records.ladder_log() if options.ladder else records.default_log(provenance["device"]))
    if log is None:
        parser.error(f"no file for figures of a {provenance['device']}: pass --log")
    if options.only and not options.ladder and not options.log:
        log = None  # part of a step must not replace the whole
    if log:
        check_log(parser, log, "entries" if options.ladder else "steps")
    for name, value in provenance.items():
        print(f"{name}: {value}")
    ceilings = measure.ceilings(options.rounds)
    print(*records.ceiling_lines(ceilings), sep="\n", flush=True)
    measured = measure_ladder if options.ladder else measure_steps
    return measured(options, log, provenance, ceilings)


def check_log(parser, log, holds):
    """Refuse, before anything is measured, a file that cannot be written, or to which these figures cannot be added."""
    try:
        check_writable(log)
        if log.is_file() and holds not in json.loads(log.read_text()):
            raise ValueError(f"it has no {holds!r}")
    except (ValueError, TypeError) as error:
        parser.error(f"--log {log} cannot take these figures: {error}")


def measure_steps(options, log, provenance, ceilings) -> int:
    """Measure, print, and write what stands after every step, so that an interrupted run keeps what it has."""
    missing = {}
    if options.peers:
        missing = {name: reason for name, reason in peers.available().items() if reason}
    for name, reason in missing.items():
        print(f"peer {name} is missing: {reason}")
    wrong = False
    print(records.header())
    for step in options.steps:
        rows = []
        for name in CASES.get(step, ()):
            if options.only not in name:
                continue
            if not rows:
                print(step)
            rows.append(run.measure_case(step, name, ceilings, options.peers, options.rounds))
            print(*records.case_lines(rows[-1]), sep="\n", flush=True)
            wrong |= records.ours_wrong(rows[-1])
        if log and (rows or step == "ceilings"):
            records.merge(log, {step: {"provenance": provenance, "missing": missing, "rows": rows}}, ceilings)
    return int(wrong)


def measure_ladder(options, log, provenance, ceilings) -> int:
    """Measure the registered versions of the steps. A version that is wrong or fails is a finding: exit code 0."""
    for step in options.steps:
        if step not in ladder.VERSIONS:
            continue
        if not ladder.VERSIONS[step]:
            print(f"{step}: no version is registered")
            continue
        entries = ladder.measure_step(step, ceilings, provenance, options.rounds, options.only)
        for made in entries:
            print(*ladder.entry_lines(made), sep="\n", flush=True)
        if log:
            ladder.update(log, entries)
    return 0


if __name__ == "__main__":
    sys.exit(main())
