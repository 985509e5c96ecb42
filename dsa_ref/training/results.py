"""Read what `compare` has recorded: its runs, one a seed, and what each regime comes to.

    from dsa_ref.training.results import read_runs, rows

A run's "regimes" hold raw figures: "loss", by window and by part of the window (its "edges"), "needles", found and
asked by distance, and "recall", by layer, at times of the training. What is beyond k is computed here.
"""

import dataclasses
import itertools
import operator
import os
import statistics

from .. import records
from .measures import paired_ratio

RECORDS = ("training_h200.json", "training_h100.json")  # in `figures/`, one for each card that trained
CONTROL = "dense"  # the regime that losses are compared with
PRECISIONS = ("FP8", "FP8 without Hadamard")  # of the DSA model, whose own entry is in bf16


@dataclasses.dataclass(frozen=True)
class Row:
    """What one regime of one run comes to, beyond k bytes of context.

    loss: nats a byte; needles: the share that is found. ratio, error: the loss over the control's, and its standard
    error over windows, paired; worst: the largest ratio of a part of the window; None for the control itself. recall:
    the attention mass that the selection keeps, over the most that k keys could, mean over layers, after training; None
    where nothing is selected or it was not looked at.
    """

    loss: float
    needles: float
    ratio: float | None = None
    error: float | None = None
    worst: float | None = None
    recall: float | None = None


def merged(logs: list[dict]) -> dict:
    """One record of several logs, by seed.

    Raises: ValueError for what is no log, where no run is there, a seed comes twice or the plans differ.
    """
    if not all(isinstance(log, dict) and isinstance(log.get("runs"), list) for log in logs):
        raise ValueError(f"every log must be an object with a list of runs, got {[type(log).__name__ for log in logs]}")
    runs = sorted((run for log in logs for run in log["runs"]), key=lambda run: run["seed"])
    seeds = [run["seed"] for run in runs]
    if not seeds or len(set(seeds)) < len(seeds):
        raise ValueError(f"every seed must come once, and one at least, got {seeds}")
    plans = [{name: value for name, value in run["plan"].items() if name != "seed"} for run in runs]
    if any(plan != plans[0] for plan in plans):
        raise ValueError(f"all runs must have one plan, got {plans}")
    return {"runs": runs}


def recorded() -> list[str]:
    """Which of `RECORDS` are there."""
    return [name for name in RECORDS if (records.figures_folder() / name).is_file()]


def read_runs(name: str | os.PathLike | None = None) -> list[dict]:
    """The runs of a record, by seed. name: as for `records.read`; None for the first of `RECORDS` that is there.

    Raises: FileNotFoundError where there is none.
    """
    name = next(iter(recorded()), RECORDS[0]) if name is None else name
    return records.read(name)["runs"]


def beyond(run: dict, losses: list[list[float]]) -> list[list[float]]:
    """The mean loss of each window beyond k, [n][1], of losses by part."""
    widths = [last - first for first, last in itertools.pairwise(run["edges"])][1:]
    return [[sum(map(operator.mul, widths, window[1:])) / sum(widths)] for window in losses]


def row(run: dict, name: str) -> Row:
    """What a regime, or one of `PRECISIONS`, comes to. Raises: KeyError where the run has not got that far."""
    regimes = run["regimes"]
    entry = regimes["DSA"]["precision"][name] if name in PRECISIONS else regimes[name]
    loss = statistics.fmean(window for (window,) in beyond(run, entry["loss"]))
    found = Row(loss, sum(entry["needles"]["found"]) / sum(entry["needles"]["asked"]))
    if name == CONTROL:
        return found
    control, recall = regimes[CONTROL]["loss"], entry.get("recall", {}).get("after")
    ((ratio, error),) = paired_ratio(beyond(run, entry["loss"]), beyond(run, control))
    worst = max(ratio for ratio, _ in paired_ratio(entry["loss"], control)[1:])
    return dataclasses.replace(found, ratio=ratio, error=error, worst=worst, recall=recall and share(recall))


def share(recall: dict[str, list[float]]) -> float:
    """The mass that a selection keeps over the most that k keys could, mean over layers."""
    return statistics.fmean(map(operator.truediv, recall["kept"], recall["most"]))


def rows(runs: list[dict]) -> dict[str, list[Row]]:
    """{regime: its row in each run}, of those regimes that every run has, `PRECISIONS` behind the others."""
    names = [name for name in runs[0]["regimes"] if all(name in run["regimes"] for run in runs)]
    if CONTROL not in names:
        return {}
    names += PRECISIONS if "DSA" in names else ()
    return {name: [row(run, name) for run in runs] for name in names}


def spread(values: list[float | None], digits: int = 4) -> str:
    """Mean and range of a figure over the runs, as text; the figure alone where there is one run, "" where none."""
    there = [value for value in values if value is not None]
    if not there:
        return ""
    mean = f"{statistics.fmean(there):.{digits}f}"
    return mean if len(there) == 1 else f"{mean} ({min(there):.{digits}f} to {max(there):.{digits}f})"


def report(runs: list[dict]) -> str:
    """All regimes as lines of text, for a terminal."""
    lines = [f"beyond k, seeds {', '.join(str(run['seed']) for run in runs)}"]
    columns = {"loss": 4, "ratio": 4, "error": 4, "worst": 4, "needles": 3, "recall": 3}  # digits
    lines.append(f"{'':22}" + "".join(f"{name:28}" for name in columns))
    for name, found in rows(runs).items():
        cells = [spread([getattr(one, column) for one in found], digits) for column, digits in columns.items()]
        lines.append(f"{name:22}" + "".join(f"{cell:28}" for cell in cells))
    for run, name in itertools.product(runs, runs[0]["regimes"]):
        entry = run["regimes"].get(name, {})
        kept = {when: round(share(recall), 3) for when, recall in entry.get("recall", {}).items()}
        speeds = [f"{stage['stage']} {stage['step_ms']} ms" for stage in entry.get("stages", [])]
        lines.append(f"seed {run['seed']}, {name}: recall {kept}, steps {', '.join(speeds)}, {entry.get('seconds')} s")
    return "\n".join(lines)
