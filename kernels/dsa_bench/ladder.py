"""The versions of each step that were tried, slow ones and failures too, each with its prediction beside its figure.

`VERSIONS` is the source of what was predicted and why; the JSON adds what was measured. A version is a `variant` of the
step's public function, or a function of its own that takes the same arguments.
"""

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable

import torch

from . import measure, records
from .cases import CASES, public_function
from .run import figures, free

LADDER = records.FIGURES / "ladder.json"
LADDER_CASES = {  # the shape that a step's versions are compared on
    "index_scores": "4096 x 128K",
    "select_topk": "4096 x 128K independent",
    "lightning_select": "4096 x 128K",
    "sparse_attention": "4096 x 32K, 128 heads, random",
}


@dataclasses.dataclass(frozen=True)
class Version:
    """One rung. Its prediction was made before it was measured.

    what: what it does, in a sentence; predicted: (number, unit), the unit "ms" or the case's own ("TFLOP/s", "TB/s");
    because: what the prediction rests on; kept: whether it, or what it taught, is in the kernel that runs today;
    case: the shape it is measured on, default the step's in LADDER_CASES; call: the function, where it is no `variant`
    of the public one.
    """

    what: str
    predicted: tuple[float, str]
    because: str
    kept: bool = True
    case: str | None = None
    call: Callable | None = None


def _hopper_scores(name):
    def call(q_idx, k_idx, w, k_scale, start, end):
        out = torch.empty(len(q_idx), len(k_idx), device=q_idx.device)
        hopper = importlib.import_module("dsa_kernels.hopper.index_scores")
        hopper.index_scores(q_idx, k_idx, w, k_scale, start, end, out, name)
        return out

    return call


def _hopper_attention(name):
    def call(q, kv, indices, scale, v_dim):
        out = torch.empty(*q.shape[:2], v_dim, dtype=q.dtype, device=q.device)
        lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
        importlib.import_module("dsa_kernels.hopper.sparse_attention").sparse_attention(
            q, kv, indices, scale, out, lse, version=name
        )
        return out, lse

    return call


VERSIONS: dict[str, dict[str, Version]] = {
    "index_scores": {
        "portable": Version(
            "One program for four queries; every program fetches its own tiles of keys.",
            (1000.0, "TFLOP/s"),
            "the study of it in plain Triton, on an H200 (KERNELS.md)",
        ),
        "whole": Version(
            "Gluon: one warp brings tiles by TMA, two warpgroups multiply four queries at once; relu as x + |x|.",
            (1050.0, "TFLOP/s"),
            "the Gluon study, on an H200: 1034 to 1065 (KERNELS.md)",
            call=_hopper_scores("whole"),
        ),
        "turns": Version(
            "Products of two queries, weighed while the next two are multiplied; warpgroups strictly in turn.",
            (1150.0, "TFLOP/s"),
            "a kernel without ranges that did so, on an H100: 1121; and a fourth of the scores to mask and store: 2 %",
            kept=False,
            call=_hopper_scores("turns"),
        ),
        "maximum": Version(
            "As halves, but relus are maxima with 0, which run at half the rate of additions; NaN is lost.",
            (1000.0, "TFLOP/s"),
            "128 of 600 clocks more for a tile's relus and weights, half of them hidden",
            kept=False,
            call=_hopper_scores("maximum"),
        ),
        "saturate": Version(
            "As halves, but relus are products that saturate at 0 and 1; NaN is lost.",
            (1000.0, "TFLOP/s"),
            "it lost 13 % in the study in plain Triton (KERNELS.md)",
            kept=False,
            call=_hopper_scores("saturate"),
        ),
        "halves": Version(
            "As turns, without them: the tensor cores take whoever comes. What `hopper` runs.",
            (1150.0, "TFLOP/s"),
            "the prediction of turns, which it was tried beside: none of its own was made",
            call=_hopper_scores("halves"),
        ),
    },
    "select_topk": {
        "radix": Version(
            "Four passes with a histogram a byte, and one that writes.",
            (4.5, "ms"),
            "five reads of the scores at the copy ceiling of an H100, 2.37 TB/s, if histograms were free",
        ),
        "sampled": Version(
            "A bound from a sample, one read into a list, an exact choice from the list.",
            (1.2, "ms"),
            "one read and a sample at the copy ceiling, and as much again for list and choice",
        ),
        "listed": Version(
            "Three kernels: bound, scan into one list a thread, choice; the scan needs few registers.",
            (1.55, "ms"),
            "bound 0.13 and choice 0.46 ms, as measured in the fused kernel, and a scan at the copy ceiling",
        ),
        "hopper": Version(
            "Gluon: bound, scan and choice of a row in one program, four on a multiprocessor, so that reads go on.",
            (1.2, "ms"),
            "the scan of listed, 1.08 ms, and the sample's bytes, 0.1; the choice is hidden",
        ),
    },
    "lightning_select": {
        "portable": Version(
            "Scores of some rows to memory, then select_topk; two kernels that meet in 1 GiB.",
            (11.9, "ms"),
            "the sum of portable index_scores and select_topk, 9.9 and 2.0 ms on an H100",
        ),
        "hopper": Version(
            "A sampled bound; the scan appends what reaches it to 64 lists a row; no score matrix.",
            (9.0, "ms"),
            "index_scores in 8.2 ms, 1/32 of it for the sample, and half a millisecond for the choice",
        ),
    },
    "sparse_attention": {
        "portable": Version(
            "Plain Triton: one program for 64 heads of a query.",
            (287.0, "TFLOP/s"),
            "the study in plain Triton, on an H200: both warpgroups compute the same rows of QK^T (KERNELS.md)",
        ),
        "one tile a program": Version(
            "Gluon: one warpgroup gathers, two multiply, each with half of the output.",
            (548.0, "TFLOP/s"),
            "the Gluon study with the -1 mask, on an H200 (KERNELS.md)",
            call=_hopper_attention("one tile a program"),
        ),
        "persistent": Version(
            "A program walks over many tiles and gathers the next one's keys while it finishes this one.",
            (565.0, "TFLOP/s"),
            "62.1 waves of tiles become one: no half-empty last wave, no start-up between tiles; 3 %",
            call=_hopper_attention("persistent"),
        ),
        "rare rescaling": Version(
            "The output is rescaled only where the running maximum grew by more than a threshold.",
            (575.0, "TFLOP/s"),
            "a guess of 2 %: 256 multiplications a thread and block fewer, where most are hidden already",
            call=_hopper_attention("rare rescaling"),
        ),
        "early hand-over": Version(
            "Probabilities go to the other warpgroup before one's own product with the values is waited for.",
            (580.0, "TFLOP/s"),
            "a guess of 1 %: some of a wait of a barrier's length each block",
            call=_hopper_attention("early hand-over"),
        ),
    },
}


def function_of(step, name):
    """What runs version `name` of `step`, to be called as the public function is."""
    version = VERSIONS[step][name]
    return version.call or functools.partial(public_function(step), variant=name)


def measure_step(step, ceilings, provenance, rounds=measure.ROUNDS, only=""):
    """Entries of a step's versions whose name holds `only`; those on one shape are timed with the shape's peers."""
    by_case = {}
    for name, version in VERSIONS[step].items():
        if only in name:
            by_case.setdefault(version.case or LADDER_CASES[step], []).append(name)
    entries = []
    for case_name, names in by_case.items():
        case = CASES[step][case_name]()
        calls = {name: functools.partial(case.apply, function_of(step, name)) for name in names} | case.peers
        found, timings = figures(case, calls, ceilings, rounds)
        peer = next((who for who in case.peers if who in timings), None)
        for name in names:
            speed = timings[name].speed_over(timings[peer])[0] if peer and name in timings else None
            made = entry(step, name, case_name, found[name], case.unit, peer, speed)
            entries.append(made | {"provenance": provenance})
        del case, calls
        free()
    return entries


def entry(step, name, case_name, record, unit, peer, speed):
    """The JSON of one version: prediction, figure in the prediction's unit, and what became of it."""
    version = VERSIONS[step][name]
    value, predicted_unit = version.predicted
    measured = None
    if "ms" in record:
        in_unit = {"ms": record["ms"], unit: record["rate"]}
        if predicted_unit not in in_unit:
            raise ValueError(f"the prediction of {step}, {name} must be in ms or {unit}, got {predicted_unit}")
        measured = {"value": in_unit[predicted_unit], "unit": predicted_unit} | {
            key: record[key] for key in ("ms", "ms_10", "ms_90")
        }
    return {
        "step": step,
        "version": name,
        "case": case_name,
        "what": version.what,
        "predicted": {"value": value, "unit": predicted_unit},
        "predicted_because": version.because,
        "measured": measured,
        "peer": peer,
        "peer_ratio": speed,
        "kept": version.kept,
        "failed": None if record["verdict"] == "right" else f"{record['verdict']}: {record['note']}",
    }


def update(path, entries):
    """Write entries into the JSON at `path`. Other versions' stay, as long as they are registered."""
    found = json.loads(path.read_text())["entries"] if path.exists() else []
    by_version = {(made["step"], made["version"]): made for made in found + entries}
    registered = [(step, name) for step, versions in VERSIONS.items() for name in versions]
    kept = [by_version[key] for key in registered if key in by_version]
    path.write_text(json.dumps({"entries": kept}, indent=1) + "\n")


def entry_lines(made):
    """One version as lines of at most 120 columns: predicted, measured, against the peer, and what became of it."""
    measured, predicted = made["measured"], made["predicted"]
    got = f"{measured['value']:.4g}" if measured else "-"
    against = f"{made['peer_ratio']:.2f} of {made['peer']}" if made["peer_ratio"] else ""
    fate = "kept" if made["kept"] else "dropped"
    line = f"{made['step']:<17} {made['version']:<22} predicted {predicted['value']:.4g}, measured {got} "
    lines = [(line + f"{predicted['unit']}, {fate}  {against}").rstrip()[:120]]
    return lines + ([f"    {made['failed']}"[:120]] if made["failed"] else [])
