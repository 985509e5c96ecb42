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
import json
import math
import pathlib
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from .. import records
from ..nn.layer import Ops
from ..nn.model import ModelConfig, SmallModel, load_small_model, save_small_model
from ..records import positive, regular_file
from .corpus import fingerprint, held_out_windows, load_corpus
from .data import Data
from .loop import Losses, train_stage
from .measures import (
    DIGITS,
    losses_by_position,
    needles_by_distance,
    position_edges,
    precision_overlaps,
    recall_by_layer,
)
from .needle import LINE, needle_windows
from .optimizer import BETAS, LARGEST_NORM, PEAK_RATES, WEIGHT_DECAY, MasterAdamW, master_weights
from .regimes import REGIMES, make_model, steps, without_hadamard
from .results import merged, report
from .stages import stage_backward
from .train import DTYPES, NOT_FINISHED, course_config, deterministic, resolve_options

PROGRAM = "dsa_ref.training.compare"
CURVE = 50  # losses of each stage in the record
LOOKS = 20  # times that recall is looked at during a warm-up


@dataclasses.dataclass(frozen=True)
class Plan:
    """What is the same for all regimes of a run, and what a log must have been made with to be continued.

    steps: of the dense stage, the warm-up and the last stage; pairs: needles in a training window; windows: how many
    held-out ones a regime is judged by, and how many others with `asked` needles each; recall: (windows, rows of each)
    for recall; ops: the package that trains; dtype: a key of `train.DTYPES`.
    """

    seed: int = 0
    k: int = 256
    length: int = 8192
    batch: int = 8
    steps: tuple[int, int, int] = (1500, 150, 250)
    pairs: int = 32
    windows: int = 64
    asked: int = 8
    recall: tuple[int, int] = (8, 128)
    ops: str = "dsa_ref"
    dtype: str = "fp32"


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
        self.plan, self.ops, self.device, self.micro = plan, ops, torch.device(device), micro and micro * plan.length
        self.config = dataclasses.replace(config, attention=attention)
        self.edges = position_edges(plan.length, plan.k)
        self.data = Data(corpus, plan.length, plan.batch, plan.seed, plan.pairs, device, dense_steps=plan.steps[0])
        self.windows = held_out_windows(held_out, plan.windows, plan.length).to(device)
        self.few = held_out_windows(held_out, plan.recall[0], plan.length).to(device)
        self.needles = needle_windows(held_out, plan.windows, plan.length, plan.asked, least=max(LINE, plan.k + 1))
        about = {**dataclasses.asdict(plan), "sizes": dataclasses.asdict(self.config), "text": fingerprint(corpus)}
        about |= {"asks": self.data.asks, "starts": self.data.starts, "rates": PEAK_RATES}
        about["AdamW"] = BETAS, WEIGHT_DECAY, LARGEST_NORM
        self.about = json.loads(json.dumps(about))  # as it stands in a log

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
            losses = losses_by_position(model, self.windows, "sparse", self.edges)
            entry["loss after warm-up"] = [round(statistics.fmean(part), DIGITS) for part in zip(*losses, strict=True)]
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
        return model.to(self.device, DTYPES[self.plan.dtype])

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
    given: SmallModel | None = None,
    say: Callable[[str], None] = print,
) -> bool:
    """Do what the log lacks, regime by regime; whether all of `names` are done now.

    origin: the provenance; ends: no regime begins that would not be over by then, on time.monotonic()'s clock; given:
    the dense model, in place of training one. state: a folder, which keeps the dense model and that of DSA.

    Raises: as `unfinished`, and ValueError where the state has lost the dense model.
    """
    about = {"seed": comparison.plan.seed, "plan": comparison.about, "edges": comparison.edges, "provenance": origin}
    entry = unfinished(log, comparison, origin) or {**about, "regimes": {}}
    dense = state / "dense.safetensors"
    if "start" not in entry:
        if given is None:
            model, entry["start"] = comparison.dense_stage()
        else:
            model, entry["start"] = given, {"stages": []}
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


def unfinished(log: pathlib.Path, comparison: Comparison, origin: dict) -> dict | None:
    """The run that a log holds, None without a log.

    Raises: ValueError where it is no log of this program, has another plan or was made by other code.
    """
    if not log.exists():
        return None
    try:
        (entry,) = json.loads(log.read_text(encoding="utf-8"))["runs"]
        made = {"commit": entry["provenance"]["commit"], **entry["plan"]}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"log must be that of one run of this program, or a new one, got {log}: {error!r}") from error
    now = {"commit": origin["commit"], **comparison.about}
    if other := [f"{name} {made.get(name)}, not {now[name]}" for name in now if made.get(name) != now[name]]:
        raise ValueError(f"log must be that of the same options and code to go on, got {log} with {', '.join(other)}")
    return entry


def main(arguments: list[str] | None = None) -> None:
    """Train and judge the regimes of one seed, or merge logs; arguments as on the command line."""
    began = time.monotonic()
    parser = make_parser()
    options = parser.parse_args(arguments)
    if options.merge:
        try:
            record = merged([json.loads(path.read_text(encoding="utf-8")) for path in options.merge])
            told = report(record["runs"])  # before anything is written: a run that lacks a field shows here
        except KeyError as error:
            parser.error(f"--merge must name logs of this program, got a run without {error}")
        except (OSError, ValueError, TypeError, AttributeError) as error:
            parser.error(f"--merge must name logs of this program, of one plan and several seeds: {error}")
        records.write_log(PROGRAM, options.log, record)
        print(told)
        return
    options.state = options.state or options.log.with_suffix(".state")
    ops = resolve_options(parser, options)
    origin = records.provenance(PROGRAM, arguments, options.device)
    names = {field.name for field in dataclasses.fields(Plan)} & vars(options).keys()
    with deterministic():
        try:
            plan = Plan(**{name: getattr(options, name) for name in names})
            config = course_config(plan.k, plan.length)
            comparison = Comparison(plan, config, ops, *load_corpus(), options.device, options.micro)
            comparison.data.windows("dense", 0)  # whether the needles fit
            unfinished(options.log, comparison, origin)
            options.state.mkdir(parents=True, exist_ok=True)
            given = options.given and load_small_model(options.given)
            if given is not None:
                make_model(REGIMES["DSA"], comparison.config, ops, given.state_dict(), plan.seed)  # whether it fits
        except (OSError, ValueError, RuntimeError) as error:
            parser.error(str(error))
        ends = began + 60 * options.minutes if options.minutes else math.inf
        say = functools.partial(print, file=sys.stderr, flush=True)
        try:
            done = run(comparison, options.log, options.state, origin, options.regimes, ends, given, say)
        except KeyboardInterrupt:
            say("interrupted: what is finished is in the log, and the same command goes on from there")
            sys.exit(130)
        except (OSError, FloatingPointError) as error:  # a full disk, for one: the log before is whole
            sys.exit(f"{parser.prog}: error: {error}")
    print(report(json.loads(options.log.read_text(encoding="utf-8"))["runs"]))
    if not done:
        say(f"--minutes {options.minutes:g} would be over before the next regime is: run it again to go on")
        sys.exit(NOT_FINISHED)


def make_parser() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--log", type=regular_file, required=True, help="where the figures go, as JSON; it goes on from there")
    add("--merge", type=pathlib.Path, nargs="+", metavar="LOG", help="put these logs, of other seeds, into --log")
    add("--state", type=pathlib.Path, help="a folder for the models (default: --log's name, with .state)")
    add("--from", dest="given", type=pathlib.Path, metavar="MODEL", help="the dense model, in place of training one")
    add("--minutes", type=float, help="begin no regime that would end later, and end with exit code 75")
    add("--regimes", nargs="+", choices=REGIMES, default=list(REGIMES), metavar="REGIME",
        help=f"which: {', '.join(REGIMES)} (default: all)")  # fmt: skip
    add("--steps", type=positive, nargs=3, default=Plan.steps, metavar=("DENSE", "WARM", "LAST"),
        help=f"optimizer steps of each stage (default {' '.join(map(str, Plan.steps))})")  # fmt: skip
    add("--length", type=positive, default=Plan.length, help="bytes a window (default %(default)s)")
    add("--k", type=positive, default=Plan.k, help="keys selected (default %(default)s)")
    add("--batch", type=positive, default=Plan.batch, help="windows a step (default %(default)s)")
    add("--micro", type=positive, help="windows at a time, to save memory (default: all of a step)")
    add("--pairs", type=int, default=Plan.pairs, help="needles a window (default %(default)s)")
    add("--windows", type=positive, default=Plan.windows, help="held-out windows to judge by (default %(default)s)")
    add("--asked", type=positive, default=Plan.asked, help="needles asked for in each (default %(default)s)")
    add("--seed", type=int, default=Plan.seed, help="of weights, windows and needles (default %(default)s)")
    add("--kernels", action="store_const", dest="ops", const="dsa_kernels", default=Plan.ops,
        help="run the steps of dsa_kernels, not of dsa_ref: for a GPU")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--dtype", choices=DTYPES, help="of what the models compute with (default bf16 on a GPU, fp32 on a CPU)")
    parser.set_defaults(weights=None)  # for `resolve_options`
    return parser


if __name__ == "__main__":
    main()
