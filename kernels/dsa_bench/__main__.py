"""Measure every step on a GPU: `python -m dsa_bench [step ...] [--decode] [--peers] [--log FILE] [--ladder]`.

Exit code 0: all of ours is right; 1: something of ours is wrong or failed; 2: no GPU, or arguments that make no sense.
"""

import argparse
import json
import sys

import torch

from dsa_ref.records import check_writable, output_file, positive

from . import decode, decode_bytes, ladder, measure, peers, records, run
from .cases import CASES
from .decode_cases import DECODE_CASES

NO_GPU = "dsa_bench measures on a CUDA GPU, and torch finds none here."


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dsa_bench", description="Measure every step on a GPU.")
    parser.add_argument(
        "steps",
        nargs="*",
        metavar="step",
        help=f"some of {', '.join(CASES)}, ceilings; with --decode of {', '.join(DECODE_CASES)}, ceilings; default all",
    )
    parser.add_argument("--decode", action="store_true", help="measure the steps of one decode step, on paged caches")
    parser.add_argument("--bytes", action="store_true", help="with --decode: what it saves against dense decode")
    parser.add_argument("--quick", action="store_true", help=f"{decode.QUICK_ROUNDS} rounds, and no file without --log")
    parser.add_argument("--peers", action="store_true", help="also measure the public kernels that are installed")
    parser.add_argument("--ladder", action="store_true", help="measure the versions that were tried on the way")
    parser.add_argument("--only", default="", help="only cases (of the ladder: versions) whose name holds this text")
    parser.add_argument("--log", type=output_file, help="JSON to write; default figures/h200.json, by the card's name")
    parser.add_argument(
        "--rounds", type=positive, default=measure.ROUNDS, help="how often each is measured (%(default)s)"
    )
    options = parser.parse_args(arguments)
    if options.decode and options.ladder:
        parser.error("--ladder has no decode steps: pass it or --decode")
    if options.bytes and not options.decode:
        parser.error("--bytes compares decode steps: pass --decode too")
    if options.quick:
        options.rounds = min(options.rounds, decode.QUICK_ROUNDS)
    steps = (*(DECODE_CASES if options.decode else CASES), "ceilings")
    unknown = [step for step in options.steps if step not in steps]
    if unknown:
        parser.error(f"step must be one of {', '.join(steps)}, got {', '.join(unknown)}")
    options.steps = options.steps or ([] if options.bytes else list(steps))
    return parser, options


@torch.no_grad()
def main(arguments=None) -> int:
    parser, options = parse(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    provenance = measure.environment(arguments)
    log = options.log or default_log(options, provenance["device"])
    if log is None:
        parser.error(f"no file for figures of a {provenance['device']}: pass --log")
    if (options.only and not options.ladder or options.quick) and not options.log:
        log = None  # part of a step must not replace the whole
    if log:
        check_log(parser, log, "entries" if options.ladder else "steps")
    ceilings = announced(provenance, options.rounds)
    if options.decode:
        return measure_decode(options, log, provenance, ceilings)
    measured = measure_ladder if options.ladder else measure_steps
    return measured(options, log, provenance, ceilings)


def default_log(options, card):
    """The file in figures/ that these measurements belong to, None for a card that has none."""
    if options.ladder:
        return records.ladder_log()
    return (records.decode_log if options.decode else records.default_log)(card)


def check_log(parser, log, holds):
    """Refuse, before anything is measured, a file that cannot be written, or to which these figures cannot be added."""
    try:
        check_writable(log)
        if log.is_file() and holds not in json.loads(log.read_text()):
            raise ValueError(f"it has no {holds!r}")
    except (ValueError, TypeError) as error:
        parser.error(f"--log {log} cannot take these figures: {error}")


def announced(provenance, rounds) -> dict:
    """The card's ceilings, measured and printed below where and how this run measures."""
    for name, value in provenance.items():
        print(f"{name}: {value}")
    ceilings = measure.ceilings(rounds)
    print(*records.ceiling_lines(ceilings), sep="\n", flush=True)
    return ceilings


def measure_steps(options, log, provenance, ceilings) -> int:
    """Measure, print, and write what stands after every step, so that an interrupted run keeps what it has."""
    missing = missing_peers(options)
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


def missing_peers(options):
    """{peer: why it cannot be used here} of those that are asked for, printed."""
    missing = {}
    if options.peers:
        missing = {name: reason for name, reason in peers.available().items() if reason}
    for name, reason in missing.items():
        print(f"peer {name} is missing: {reason}")
    return missing


def measure_decode(options, log, provenance, ceilings) -> int:
    """The steps of a decode step, and on request its bytes beside dense decode's."""
    missing = missing_peers(options)
    wrong = decode.measure_steps(options, log, provenance, ceilings, missing) if options.steps else 0
    if options.bytes:
        wrong |= decode_bytes.measure(options, log, provenance, ceilings, missing)
    return wrong


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
