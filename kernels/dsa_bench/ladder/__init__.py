"""The versions of each step that were tried, slow ones and failures too, each with its prediction beside its figure.

A folder a step. Its `VERSIONS` is the source of what was predicted and why; figures/ladder.json adds what was measured.
A version is a `variant` of the step's public function, or a whole copy of a kernel that lost, in a file of its own.
"""

import functools
import json

from dsa_ref.records import write

from .. import measure, records
from ..cases import CASES, public_function
from ..run import figures, free
from . import index_scores, lightning_select, select_topk, sparse_attention
from .version import Version as Version

STEPS = {
    "index_scores": index_scores,
    "select_topk": select_topk,
    "lightning_select": lightning_select,
    "sparse_attention": sparse_attention,
}
VERSIONS = {step: module.VERSIONS for step, module in STEPS.items()}
LADDER_CASES = {step: module.CASE for step, module in STEPS.items()}
LADDER = records.FIGURES / "ladder.json"


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
    write(path, {"entries": kept})


def entry_lines(made):
    """One version as lines of at most 120 columns: predicted, measured, against the peer, and what became of it."""
    measured, predicted = made["measured"], made["predicted"]
    got = f"{measured['value']:.4g}" if measured else "-"
    against = f"{made['peer_ratio']:.2f} of {made['peer']}" if made["peer_ratio"] else ""
    fate = "kept" if made["kept"] else "dropped"
    line = f"{made['step']:<17} {made['version']:<22} predicted {predicted['value']:.4g}, measured {got} "
    lines = [(line + f"{predicted['unit']}, {fate}  {against}").rstrip()[:120]]
    return lines + ([f"    {made['failed']}"[:120]] if made["failed"] else [])
