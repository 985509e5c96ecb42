"""transformers' DeepSeek-V3.2 and the same made sparse, prefill and decode: `python -m dsa_bench.models [--log FILE]`.

On a GPU 4 layers of V3.2's sizes in bf16, 1K to 128K tokens, by `dsa_kernels`; without one a small model in fp32 on one
thread, 256 to 8192 tokens, by `dsa_ref`. Exit code 0: all of ours is right; 1: something of ours is wrong or failed, or
the judge lets a selection at random pass; 2: arguments that make no sense.
"""

import argparse
import importlib.util
import os
import sys

import torch

import dsa_kernels
import dsa_ref
from dsa_ref.records import check_writable, figures_folder, output_file, positive, provenance, write

from .. import records

IMPLEMENTATIONS = ("eager", "sdpa", "ours", "ours_fp8")
LENGTHS = {"cuda": tuple(1024 << i for i in range(8)), "cpu": tuple(256 << i for i in range(6))}
JUDGED = {"cuda": 4096, "cpu": 1024}
COMPILED = {"cuda": (4096, 32768, 131072), "cpu": ()}  # contexts behind which a decode step is one CUDA graph
BATCHES = {"cuda": ((8, 8192),), "cpu": ((8, 1024),)}  # (sequences, tokens of each) of a decode step, besides 1
ROUNDS = 5
WIDTH = 120


def parse(arguments):
    parser = argparse.ArgumentParser(prog="python -m dsa_bench.models", description=__doc__.splitlines()[0])
    parser.add_argument("--lengths", type=positive, nargs="+", help="tokens; default 1K to 128K, on a CPU 256 to 8192")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, help="default all; no FP8 on a CPU")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="how often each is measured (%(default)s)")
    parser.add_argument("--no-judge", action="store_true", help="time only; without --log nothing is written")
    parser.add_argument("--no-decode", action="store_true", help="prefill only; without --log nothing is written")
    parser.add_argument("--log", type=output_file, help="JSON to write; default figures/models_h200.json or _cpu")
    options = parser.parse_args(arguments)
    if importlib.util.find_spec("transformers") is None:
        parser.error("transformers must be installed, which this measures: pip install transformers")
    return parser, options


def main(arguments=None) -> int:
    parser, options = parse(arguments)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    made = provenance("dsa_bench.models", arguments, device)
    part = options.lengths or options.implementations or options.no_judge or options.no_decode
    log = options.log or (None if part else default_log(device, made["device"]))
    if log is None and not part:
        parser.error(f"no file for figures of a {made['device']}: pass --log")
    if log:
        check_writable(log)
    import transformers  # which takes seconds: what is wrong with the arguments was to be said before

    from . import subject

    made["transformers"] = transformers.__version__
    for name, value in made.items():
        print(f"{name}: {value}")
    gpu = device == "cuda"
    if not gpu:
        torch.set_num_threads(1)  # whose time is measured
    sizes, ops = (subject.V32, dsa_kernels) if gpu else (subject.SMALL, dsa_ref)
    model = subject.random_model(sizes, device, torch.bfloat16 if gpu else torch.float32)
    options.implementations = options.implementations or (IMPLEMENTATIONS if gpu else IMPLEMENTATIONS[:3])
    options.lengths = options.lengths or LENGTHS[device]
    facts = {"provenance": made, "sizes": sizes, "ops": ops.__name__} | machine(model)
    batches = () if part and not options.log else BATCHES[device]
    compiled = () if part and not options.log else COMPILED[device]
    record = measured(
        model, ops, options, JUDGED[device], batches, lambda now: log and write(log, facts | now), compiled
    )
    return int(record["wrong"])


def default_log(device, card):
    """The file in figures/ that these measurements belong to, None for a card that has none."""
    if device == "cpu":
        return figures_folder() / "models_cpu.json"
    found = records.default_log(card)
    return found and found.with_name(f"models_{found.name}")


def machine(model):
    """What else the figures depend on."""
    weights = sum(weight.numel() * weight.element_size() for weight in model.parameters())
    found = {"dtype": str(model.dtype), "weights_bytes": weights, "experts": model.config._experts_implementation}
    if model.device.type == "cpu":
        found |= {"threads": torch.get_num_threads(), "load_before": os.getloadavg()[0]}
    return found


def measured(model, ops, options, judged_tokens, batches, keep, compiled_at=()) -> dict:
    """{"judge", "prefill": rows, "decode": rows, "compiled": rows, "wrong"}, printed and kept as it grows."""
    from . import compiled, judge, timing
    from .subject import random_tokens

    record = {"judge": None, "prefill": [], "decode": [], "compiled": [], "wrong": False}
    names, ours = options.implementations, [name for name in options.implementations if name.startswith("ours")]
    if not options.no_judge:
        record["judge"] = judge.judged(model, names, ops, random_tokens(model, 1, judged_tokens))
        record["wrong"] = judge.wrong(record["judge"])
        print(*judge_lines(record["judge"]), sep="\n", flush=True)
    gone = {}

    def done(section, row):
        record[section].append(row)
        record["wrong"] |= any(row["results"].get(name, {}).get("verdict") == "failed" for name in ours)
        print(*row_lines(section, row), sep="\n", flush=True)
        keep(record)

    for T in sorted(options.lengths):
        prefilled = timing.measure_prefill(model, names, ops, T, options.rounds, gone)
        done("prefill", prefilled)
        if not options.no_decode:
            done("decode", timing.measure_decode(model, names, ops, 1, T, prefilled["results"]))
    for B, T in () if options.no_decode else batches:
        done("decode", timing.measure_decode(model, names, ops, B, T, {}))
    gone = {}
    for T in () if options.no_decode else compiled_at:
        done("compiled", compiled.measure_compiled(model, [name for name in names if name != "eager"], ops, T, gone))
    return record


def judge_lines(record):
    """What the judge found, a line for each implementation."""
    lines = [f"judge: {record['tokens']} tokens, {record['decoded']} of them decoded, against sdpa"]
    for who, found in record["results"].items():
        text = f"{found['share']:.2%} of positions within {found['tolerance']}, {found['share_wanted']:.0%} wanted"
        text += f", decoded {found['share_decoded']:.0%}, median error {found['median_error']:.1e}"
        lines.append(f"    {who}: {found['verdict']}: {text}, same guess {found['same_guess']:.0%}"[:WIDTH])
    return lines


def memory_of(found):
    return f"peak {found['peak_bytes'] / 2**30:.2f} GiB of which {found['held_bytes'] / 2**30:.2f} before"


def row_lines(section, row):
    """One length: seconds, their 10th and 90th percentile, and peak memory of each implementation."""
    lines = [f"{section} of {row['tokens']} tokens" + (f", batch {row['batch']}" if row["batch"] > 1 else "")]
    for who, found in row["results"].items():
        if "seconds" not in found:
            lines.append(f"    {who:<9}{found['verdict']}: {found['note']}"[:WIDTH])
            continue
        ends = " ".join(f"{100 * (found[f'seconds_{end}'] / found['seconds'] - 1):+.0f}" for end in (10, 90))
        memory = f"differs by {found['error']:.1e}" if "error" in found else memory_of(found)
        first = f"first call {found['first_seconds']:.2f} s"
        lines.append(f"    {who:<9}{1e3 * found['seconds']:>10.2f} ms {ends:>7} %  {memory}, {first}"[:WIDTH])
    return lines


if __name__ == "__main__":
    sys.exit(main())
