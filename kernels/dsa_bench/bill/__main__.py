"""What a whole layer costs with DSA and with dense attention: `python -m dsa_bench.bill [--peers] [--log FILE]`.

V3.2's sizes in bf16, 4K to 1M tokens, prefill and decode; `--price` turns milliseconds into money. Exit code 0: all of
ours is right; 1: something of ours is wrong or failed; 2: no GPU, or arguments that make no sense.
"""

import argparse
import dataclasses
import functools
import json
import math
import sys

import torch

from dsa_ref import V32
from dsa_ref.records import output_file, positive

from .. import measure, records
from ..__main__ import NO_GPU, announced, check_log, missing_peers
from ..decode import QUICK_ROUNDS
from ..decode_layer import random_layer
from ..run import free
from . import account, decode, lines, prefill

K = 1 << 10
POSITIONS = tuple(n * K for n in (2, 4, 8, 12, 16, 32, 64, 128, 256, 512, 1024))
MOST_TOKENS = 8 << 20  # of all sequences of a decode step together
SHAPES = tuple(
    (B, n * K) for B in decode.SPLITS for n in (4, 8, 16, 32, 64, 128, 256, 512, 1024) if B * n * K <= MOST_TOKENS
)
QUICK_MOST = 32 * K
ROUNDS = 7
SECTIONS = ("prefill", "prompt", "decode")


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dsa_bench.bill", description=__doc__.splitlines()[0])
    parser.add_argument("sections", nargs="*", metavar="section", help=f"of {', '.join(SECTIONS)}; default all")
    parser.add_argument("--quick", action="store_true", help=f"up to {QUICK_MOST // K}K, no file without --log")
    parser.add_argument("--peers", action="store_true", help="also FlashMLA's dense decode, where it is installed")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="how often each is measured (%(default)s)")
    parser.add_argument("--price", type=float, default=2.0, help="dollars per GPU-hour (%(default)s)")
    parser.add_argument("--most", type=positive, default=POSITIONS[-1], help="tokens of context (%(default)s)")
    parser.add_argument("--log", type=output_file, help="JSON to write; default figures/layer_h200.json")
    options = parser.parse_args(arguments)
    if unknown := [name for name in options.sections if name not in SECTIONS]:
        parser.error(f"section must be one of {', '.join(SECTIONS)}, got {', '.join(unknown)}")
    if not 0 <= options.price < math.inf:
        parser.error(f"--price must be at least 0 and finite, got {options.price}")
    options.sections = options.sections or list(SECTIONS)
    if options.quick:
        options.rounds, options.most = min(options.rounds, QUICK_ROUNDS), min(options.most, QUICK_MOST)
    if options.most < prefill.CHUNK:
        parser.error(f"--most must be at least {prefill.CHUNK}, got {options.most}")
    return parser, options


@torch.no_grad()
def main(arguments=None) -> int:
    parser, options = parse(arguments)
    if not torch.cuda.is_available():
        print(NO_GPU, file=sys.stderr)
        return 2
    provenance = measure.environment(arguments, "dsa_bench.bill")
    part = options.most < POSITIONS[-1]  # which must not replace the whole
    log = options.log or (None if part else records.layer_log(provenance["device"]))
    if log is None and not part:
        parser.error(f"no file for figures of a {provenance['device']}: pass --log")
    if log:
        check_log(parser, log, "steps")
    ceilings = announced(provenance, options.rounds)
    steps, missing = {}, missing_peers(options)

    def keep(section, made):
        """What stands so far, printed and written, so that an interrupted run keeps what it has."""
        steps[section] = {"provenance": provenance, "missing": missing} | made
        print(*lines.LAST[section](made), sep="\n", flush=True)
        if log:
            records.merge(log, {section: steps[section]}, ceilings)

    for section in options.sections:
        free()
        MEASURES[section](options, functools.partial(keep, section))
    if log:
        steps = json.loads(log.read_text())["steps"]
    if {"prefill", "decode"} <= set(steps):
        bill = account.made_up(steps["prefill"]["rows"], steps["decode"]["rows"], steps.get("prompt"))
        print(*lines.bill(bill, options.price), sep="\n")
        if log:
            records.merge(log, {"bill": {"provenance": provenance} | bill}, ceilings)
    return int(any(wrong(row) for section in options.sections for row in steps[section].get("rows", ())))


def measure_prefill(options, keep):
    """Each position's chunk."""
    positions = [position for position in POSITIONS if position <= options.most]
    config = dataclasses.replace(V32, max_seq_len=max(positions))
    cache = prefill.filled_cache(config, max(positions), torch.Generator("cuda").manual_seed(2))
    layer = random_layer(config)
    held = sum(weight.numel() * weight.element_size() for weight in layer.parameters())
    facts = {"chunk": prefill.CHUNK, "weights_bytes": held, "launch_us": prefill.launch_us(options.rounds)}
    prefill.measure_rows(layer, cache, positions, options.rounds, lambda rows: keep(facts | {"rows": rows}))


def measure_prompt(options, keep):
    """A whole prompt by DSA."""
    config = dataclasses.replace(V32, max_seq_len=options.most)
    keep(prefill.whole_prompt(random_layer(config), options.most))


def measure_decode(options, keep):
    """Each batch's and position's step."""
    shapes = [(B, position) for B, position in SHAPES if position <= options.most]
    decode.measure_rows(shapes, options.peers, options.rounds, lambda rows: keep({"rows": rows}))


MEASURES = {"prefill": measure_prefill, "prompt": measure_prompt, "decode": measure_decode}


def wrong(row):
    """Whether anything in a row but a peer is wrong or failed."""
    return any(result["verdict"] != "right" for who, result in row["results"].items() if who != decode.FLASHMLA)


if __name__ == "__main__":
    sys.exit(main())
