"""What each trap does to the trained model, and which test catches it.

python -m dsa_course.traps --log figures/traps.json     # measure them all on held-out text
python -m dsa_course.traps --tests                      # run the test that catches each, without and with it
"""

import argparse
import importlib.util
import json
import math
import statistics

from dsa_ref.nn import ModelConfig
from dsa_ref.records import output_file, positive, provenance, write_log
from dsa_ref.testing import overlap
from dsa_ref.training.corpus import load_corpus
from dsa_ref.training.evaluate import held_out_windows

from .runs import read, run_tests
from .table import TRAPS, planted


def measure(trap, windows, right=None):
    """What the trap does on windows int64 [count, n + 1]: {way: {"overlap": ..., "loss": ..., "error": ...}}.

    Overlap: share of the right selection that is still there, mean over windows, layers and rows that see more than k.
    Loss: its change in nats, and that mean's standard error over windows. In "one pass" and in the way in which the
    trap shows; {"raises": message} where it cannot run.
    right: a dict that keeps the right model's results from one call to the next.
    """
    right = {} if right is None else right
    measured = {}
    for way in dict.fromkeys(("one pass", trap.shows_in)):
        if way not in right:
            right[way] = [read(window, way) for window in windows]
        try:
            with planted(trap):
                wrong = [read(window, way) for window in windows]
        except ValueError as error:
            measured[way] = {"raises": str(error).split(",")[0]}
            continue
        k = right[way][0][0][0].shape[1]
        shares, changes = [], []
        for (layers, loss), (other_layers, other_loss) in zip(right[way], wrong, strict=True):
            shares += [overlap(a[k:], b[k:]) for a, b in zip(layers, other_layers, strict=True)]
            changes.append(other_loss - loss)
        error = statistics.stdev(changes) / len(changes) ** 0.5 if len(changes) > 1 else math.inf
        mean = {"overlap": statistics.fmean(shares), "loss": statistics.fmean(changes), "error": error}
        measured[way] = {name: round(value, 4) + 0.0 for name, value in mean.items()}
    return measured


def verdicts():
    """{name: (what its test says without the trap, and with it)}."""
    without = run_tests(trap.caught_by for trap in TRAPS)
    found = {}
    for trap in TRAPS:
        with planted(trap):
            found[trap.name] = (without[trap.caught_by], run_tests([trap.caught_by])[trap.caught_by])
    return found


def main(arguments=None):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=output_file, help="where the measurements go, as JSON")
    parser.add_argument("--tests", action="store_true", help="print as JSON what each trap's test says")
    parser.add_argument("--windows", type=positive, default=8, help="how many held-out windows")
    parser.add_argument("--length", type=positive, default=512, help="bytes a window")
    options = parser.parse_args(arguments)
    k = ModelConfig().attention.index_topk
    if not options.log and not options.tests:
        parser.error("one of --log and --tests must say what to do")
    if options.length <= k:
        parser.error(f"--length must be above k = {k}, else no row has a choice, got {options.length}")
    if options.tests and importlib.util.find_spec("pytest") is None:
        parser.error("pytest must be installed to run the tests: pip install pytest")
    origin = provenance("dsa_course.traps", arguments)
    if options.tests:
        print(json.dumps(verdicts(), indent=1))
    if options.log:
        windows = held_out_windows(load_corpus()[1], options.windows, options.length).long()
        right, traps = {}, {}
        for trap in TRAPS:
            traps[trap.name] = measure(trap, windows, right)
            print(trap.name, traps[trap.name], flush=True)
        result = {
            "windows": options.windows,
            "length": options.length,
            "right": {way: round(sum(loss for _, loss in runs) / len(runs), 4) for way, runs in right.items()},
            "traps": traps,
            "provenance": origin,
        }
        write_log("dsa_course.traps", options.log, result)


if __name__ == "__main__":
    main()
