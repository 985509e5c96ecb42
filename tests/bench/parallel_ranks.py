"""Run by torchrun on every rank: the bench at toy sizes, as it is and with a fault planted in what it measures.

Rank 0 writes a JSON of exit codes and verdicts, {what: {"code", "verdicts"}}, to the path given.
"""

import contextlib
import json
import pathlib
import sys
from unittest import mock

import torch.distributed as dist
from parallel_faults import planted

from dsa_bench.parallel import __main__ as bench
from dsa_bench.parallel import step

FAULTS = {
    "local positions for global": "prefill",
    "keys in the order of ranks": "prefill",
    "places ignored": "long",
    "merge by mean": "decode",
    "own candidates alone": "decode",
    "mean of gradients": "training",
}


def run(folder, name, sections, fault=None):
    log = folder / f"{name}.json"
    with contextlib.redirect_stdout(None), planted(fault):
        code = bench.main([*sections, "--tiny", "--rounds", "1", "--record", str(log)])
    steps = json.loads(log.read_text())["steps"] if log.exists() else {}  # rank 0's alone
    verdicts = [row["verdict"] for record in steps.values() for row in record["rows"]]
    return {"code": code, "verdicts": verdicts}


def main(folder):
    found = {"right": run(folder, "right", [])}
    found |= {fault: run(folder, fault, [section], fault) for fault, section in FAULTS.items()}
    with mock.patch.object(step, "sum_gradients", lambda parameters: None):
        found["gradients not summed"] = run(folder, "gradients not summed", ["training"])
    if dist.get_rank() == 0:
        (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
