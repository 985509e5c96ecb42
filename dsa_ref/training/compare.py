"""Train every regime of `regimes` from one dense model, on the same data, for the same steps, and judge them.

    python -m dsa_ref.training.compare --seed 0 --kernels --log seed_0.json
    python -m dsa_ref.training.compare --merge seed_0.json seed_1.json --log figures/training_h100.json

The dense model is trained first, or given by --from. Then each regime in turn: the dense model's weights, a warm-up of
its indexers where it has one, and the last stage, dense or sparse. The log is written after each of them and the
models are kept in --state, so that a run that was cut, or stopped after --minutes, goes on with the next regime when
the same command is given again. `results` reads the log.
"""

import argparse
import dataclasses
import functools
import importlib
import importlib.util
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

import dsa_ref

from .. import records
from ..nn.layer import Ops
from ..nn.model import ModelConfig, SmallModel, load_small_model, save_small_model
from ..records import output_file, positive
from .corpus import held_out_windows, load_corpus
from .data import Data
from .loop import Losses, train_stage
from .measures import losses_by_position, needles_by_distance, position_edges, precision_overlaps, recall_by_layer
from .needle import needle_windows
from .optimizer import PEAK_RATES, MasterAdamW, master_weights
from .regimes import REGIMES, make_model, steps, without_hadamard
from .results import merged, report
from .stages import stage_backward

PROGRAM = "dsa_ref.training.compare"
CURVE = 50  # losses of each stage in the record
LOOKS = 20  # times that recall is looked at during a warm-up


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for all regimes of a run, and what a log must have been made with to be continued.

    steps: of the dense stage, the warm-up and the last stage; pairs: needles in a training window; windows: how many
    held-out ones a regime is judged by, needles: how many pairs in each of as many others; recall: (windows, rows of
    each) for recall; dtype: what the model computes in.
    """

    seed: int = 0
    k: int = 256
    length: int = 8192
    batch: int = 8
    steps: tuple[int, int, int] = (1500, 150, 250)
    pairs: int = 8
    windows: int = 64
    needles: int = 8
    recall: tuple[int, int] = (8, 128)
    dtype: str = "bfloat16"
    kernels: bool = False

    def fields(self) -> dict:
        """As they stand in a log."""
        return json.loads(json.dumps(dataclasses.asdict(self)))


class Comparison:
    """One run: its data, its judges, and what it trains.

    config: the model's sizes; its indexers select plan.k keys, unquantised. corpus, held_out: uint8 [bytes], on the
    CPU; micro: windows at a time, None for all of a step.
    """

    def __init__(
        self,
        plan: Plan,
        config: ModelConfig,
        ops: Ops,
        corpus: Tensor,
        held_out: Tensor,
        device: str | torch.device = "cpu",
        micro: int | None = None,
    ) -> None:
        attention = dataclasses.replace(config.attention, index_topk=plan.k, index_fp8=False)
        attention = dataclasses.replace(attention, max_seq_len=max(plan.length, attention.max_seq_len))
        self.plan, self.ops, self.device, self.micro = plan, ops, torch.device(device), micro
        self.config = dataclasses.replace(config, attention=attention)
        self.edges = position_edges(plan.length, plan.k)
        self.data = Data(corpus, plan.length, plan.batch, plan.seed, plan.pairs, device)
        self.windows = held_out_windows(held_out, plan.windows, plan.length).to(device)
        self.few = held_out_windows(held_out, plan.recall[0], plan.length).to(device)
        self.needles = needle_windows(held_out, plan.windows, plan.length, plan.needles, least=plan.k + 1)

    def dense_stage(self) -> tuple[SmallModel, dict]:
        """The model that every regime begins with, and the record of its training."""
        torch.manual_seed(self.plan.seed)
        model = self._placed(SmallModel(self.config, steps(self.ops)))
        stage = self._train(model, "dense", "dense", self.plan.steps[0], stage_backward)
        return model, {"stages": [stage], **self._judged(model, "dense")}

    def regime(self, name: str, weights: dict[str, Tensor]) -> tuple[SmallModel, dict]:
        """Train one of `REGIMES` from the dense model's weights: the model, and its entry in the record."""
        plan, regime = self.plan, REGIMES[name]
        model = self._placed(make_model(regime, self.config, self.ops, weights, plan.seed))
        entry = {"meaning": regime.meaning, "stages": [], "recall": {}}
        recall = functools.partial(recall_by_layer, model, self.few, plan.k, plan.recall[1])
        if regime.scores:
            entry["recall"]["before"] = recall("dense")
        if regime.warm_up is not None:
            backward = functools.partial(stage_backward, own_selection=regime.warm_up == "own selection")
            look = functools.partial(recall_by_layer, model, self.few[:2], plan.k, plan.recall[1], "dense")
            entry["stages"].append(self._train(model, "warm-up", "warm-up", plan.steps[1], backward, look))
            entry["recall"]["after warm-up"] = recall("dense")
            entry["loss after warm-up"] = losses_by_position(model, self.windows, "sparse", self.edges)
        entry["stages"].append(self._train(model, regime.attention, "sparse", plan.steps[2], regime.backward))
        if regime.attention == "sparse":
            entry["recall"]["after"] = recall("sparse")
        return model, entry | self._judged(model, regime.attention)

    def precision(self, model: SmallModel) -> dict:
        """The DSA model with its indexer in FP8, with and without Hadamard's rotation: losses, needles, overlaps."""
        found = {"overlap": precision_overlaps(model, self.few, self.plan.k, self.plan.recall[1])}
        attention = dataclasses.replace(model.config.attention, index_fp8=True)
        for name, ops in (("FP8", steps(self.ops)), ("FP8 without Hadamard", without_hadamard(self.ops))):
            narrow = self._placed(SmallModel(dataclasses.replace(model.config, attention=attention), ops))
            narrow.load_state_dict(model.state_dict())
            found[name] = self._judged(narrow, "sparse")
        return found

    def _placed(self, model) -> SmallModel:
        return model.to(self.device, getattr(torch, self.plan.dtype))

    def _judged(self, model, attention) -> dict:
        """Losses by window and position, and the needles found by distance."""
        windows, places = self.needles
        return {
            "loss": losses_by_position(model, self.windows, attention, self.edges),
            "needles": needles_by_distance(model, windows.to(self.device), places, attention, self.edges[1:]),
        }

    def _train(self, model, stage, like, count, backward, look=None) -> dict:
        """Train one stage: its curve, how long a step took and how much memory. look: recall, looked at on the way.

        like: the stage whose windows and learning rate it has: the last one's are "sparse" for the control as well.
        """
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        windows = functools.partial(self.data.windows, like)
        optimizer = MasterAdamW(model, master_weights(model), stage, count, PEAK_RATES[like])
        curve = Curve(count, look)
        train_stage(model, stage, windows, count, optimizer, self.micro, backward, curve)
        step = statistics.median(curve.seconds)
        return {
            "stage": stage,
            "steps": count,
            "curve": curve.points,
            "seconds": round(sum(curve.seconds), 2),
            "step_ms": round(1e3 * step, 2),
            "tokens_per_second": round(self.plan.batch * self.plan.length / step),
            "peak_bytes": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
        }


class Curve:
    """What `train_stage` tells after each step: some of the losses, recall where it is looked at, and the seconds."""

    def __init__(self, steps: int, look: Callable[[], dict] | None) -> None:
        self.steps, self.look = steps, look
        self.points, self.seconds, self.began = [], [], time.perf_counter()

    def __call__(self, optimizer: MasterAdamW, losses: Losses) -> None:
        language, indexer = (None if loss is None else round(loss.item(), 5) for loss in losses)  # waits for the GPU
        self.seconds.append(time.perf_counter() - self.began)
        done = optimizer.done
        if not all(loss is None or math.isfinite(loss) for loss in (language, indexer)):
            raise FloatingPointError(f"losses must be finite, got {language} and {indexer} in step {done}")
        looks = self.look is not None and (done == 1 or done % max(1, self.steps // LOOKS) == 0)
        if looks or done in (1, self.steps) or done % max(1, self.steps // CURVE) == 0:
            point = {"step": done, "language": language, "indexer": indexer}
            self.points.append(point | self.look() if looks else point)
        self.began = time.perf_counter()


def run(
    comparison: Comparison,
    log: pathlib.Path,
    state: pathlib.Path,
    origin: dict,
    names: list[str],
    ends: float = math.inf,
    given: pathlib.Path | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Do what the log lacks, regime by regime; whether all of `names` are done now.

    origin: the provenance; ends: no regime begins that would not be over by then, on time.monotonic()'s clock; given:
    the dense model's file, in place of training one. state: a folder, which keeps the dense model and that of DSA.

    Raises: ValueError where the log is one of another plan or commit, or the state has lost the dense model.
    """
    plan = comparison.plan
    entry = unfinished(log, plan, origin) or {
        "seed": plan.seed, "plan": plan.fields(), "edges": comparison.edges, "provenance": origin, "regimes": {}
    }  # fmt: skip
    dense = state / "dense.safetensors"
    if "before" not in entry:
        if given is None:
            model, entry["before"] = comparison.dense_stage()
        else:
            model = load_small_model(given)
            entry["before"] = {"from": given.name}
        keep(model, dense, index_fp8=False)
        records.write(log, {"runs": [entry]})
    elif not dense.exists():
        raise ValueError(f"state must hold the dense model that {log} began with, got no {dense}")
    weights = load_small_model(dense).state_dict()
    for name in names:
        if name in entry["regimes"]:
            continue
        began = time.monotonic()
        if began + max((found["seconds"] for found in entry["regimes"].values()), default=0.0) > ends:
            return False
        model, found = comparison.regime(name, weights)
        if name == "DSA":
            found["precision"] = comparison.precision(model)
            keep(model, state / "DSA.safetensors", index_fp8=True)  # as train leaves it
        entry["regimes"][name] = found | {"seconds": round(time.monotonic() - began, 1)}
        records.write(log, {"runs": [entry]})
        say(f"{entry['regimes'][name]['seconds']:6.1f} s  {name}")
    return True


def keep(model: SmallModel, path: pathlib.Path, index_fp8: bool) -> None:
    """Save a model whose reader gets an indexer in FP8, or not."""
    attention = dataclasses.replace(model.config.attention, index_fp8=index_fp8)
    model.config = dataclasses.replace(model.config, attention=attention)
    with records.replacing(path) as new:
        save_small_model(model, new)


def unfinished(log: pathlib.Path, plan: Plan, origin: dict) -> dict | None:
    """The run that a log holds, None without a log.

    Raises: ValueError where it has another plan or was made by other code.
    """
    if not log.exists():
        return None
    (entry,) = json.loads(log.read_text(encoding="utf-8"))["runs"]
    made, now = (
        {"commit": entry["provenance"]["commit"], **entry["plan"]},
        {"commit": origin["commit"], **plan.fields()},
    )
    if other := [name for name in now if made.get(name) != now[name]]:
        told = ", ".join(f"{name} {made.get(name)}, not {now[name]}" for name in other)
        raise ValueError(f"log must be that of a run with the same options to be continued, got {log} with {told}")
    return entry


def main(arguments: list[str] | None = None) -> None:
    """Train and judge the regimes of one seed, or merge logs; arguments as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--log", type=output_file, required=True, help="where the figures go, as JSON; continued")
    parser.add_argument("--merge", type=pathlib.Path, nargs="+", help="only put these logs, of other seeds, into --log")
    parser.add_argument("--state", type=pathlib.Path, help="folder for the models; default: --log's, with .state")
    parser.add_argument("--from", dest="given", type=pathlib.Path, help="the dense model, instead of training one")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin nothing that would end after so many")
    parser.add_argument("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), help="which; default: all")
    parser.add_argument("--steps", type=positive, nargs=3, default=Plan.steps, metavar=("DENSE", "WARM", "LAST"))
    for name in ("k", "length", "batch", "windows"):
        parser.add_argument(f"--{name}", type=positive, default=getattr(Plan, name))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--micro", type=positive, help="windows at a time, to save memory")
    parser.add_argument("--kernels", action="store_true", help="train through dsa_kernels")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.merge:
        try:
            record = merged([json.loads(path.read_text(encoding="utf-8")) for path in options.merge])
        except (OSError, ValueError, KeyError) as error:
            parser.error(f"--merge must name logs of this program, of one plan and several seeds: {error}")
        records.write_log(PROGRAM, options.log, record)
        print(report(record["runs"]))
        return
    if options.k >= options.length:
        parser.error(f"--k must be below --length {options.length}, else no row has a choice, got {options.k}")
    if importlib.util.find_spec("safetensors") is None:
        parser.error("safetensors must be installed to keep the models: pip install safetensors")
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        parser.error(f"--device must be one that torch can use here, got {options.device}: {error}")
    ends = time.monotonic() + 60 * options.minutes
    origin = records.provenance(PROGRAM, arguments, options.device)
    fields = {name: getattr(options, name) for name in ("seed", "k", "length", "batch", "windows", "kernels")}
    plan = Plan(steps=tuple(options.steps), **fields)
    state = options.state or options.log.with_suffix(".state")
    try:
        state.mkdir(parents=True, exist_ok=True)
        unfinished(options.log, plan, origin)
        if options.given is not None:
            load_small_model(options.given)
    except (OSError, ValueError) as error:
        parser.error(str(error))
    torch.set_float32_matmul_precision("high")
    ops = importlib.import_module("dsa_kernels") if options.kernels else dsa_ref
    comparison = Comparison(plan, ModelConfig(), ops, *load_corpus(), options.device, options.micro)
    say = functools.partial(print, file=sys.stderr, flush=True)
    done = run(comparison, options.log, state, origin, options.regimes, ends, options.given, say)
    print(report(json.loads(options.log.read_text(encoding="utf-8"))["runs"]))
    if not done:
        say("stopped by --minutes: give the same command again to go on")


if __name__ == "__main__":
    main()
