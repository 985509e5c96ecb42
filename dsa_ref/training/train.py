"""Train the small model and its indexer as the report trains V3.2: dense, then the indexer alone, then both, sparse.

    python -m dsa_ref.training.train --kernels --weights small_model.safetensors --log log.json --state run.state
    python -m dsa_ref.training.train --weights w.safetensors --log log.json --steps 2 2 2 --batch 2 --length 256 --k 32

The first trains the course's model through the kernels, in minutes on a GPU; the second shows the mechanics on a CPU.
`stages` has what is learned from what, `data` the windows and the needles in them, `optimizer` the fp32 weights.

With --state, the run keeps its state in a file every --save-every steps. The same command goes on from there, to the
same bits as a run that was never stopped. With --minutes it stops by itself, before so many are over, and ends with
the exit code 75 while anything is left to do: `until COMMAND; do [ $? = 75 ] || break; done` carries it to the end.

`torchrun --nproc-per-node N -m -- dsa_ref.training.train ...` trains on N GPUs, or in N processes on a CPU, which share
the tokens of a step; `team` says how. Files are the same, and N may be another one when the run goes on. The exit code
is torchrun's own: 1 where time was over, too.

The indexer trains unquantised and is used in FP8 afterwards. Settings are scaled to a model of 3.5 million weights; the
report's are in SPEC section 5.
"""

import argparse
import contextlib
import dataclasses
import importlib
import importlib.util
import json
import os
import sys
import time
import types
from collections.abc import Callable, Iterator

import torch

from ..nn.model import ModelConfig, SmallModel, load_small_model, save_small_model
from ..parallel.command import TIMEOUT, Parser, end, seconds, several, start
from ..records import output_file, positive, provenance, regular_file, write_log
from .corpus import fingerprint, held_out_windows, load_corpus
from .data import STARTS, Data
from .evaluate import held_out_loss
from .measures import needles_by_distance, position_edges
from .needle import LINE, needle_windows
from .optimizer import BETAS, LARGEST_NORM, PEAK_RATES, WEIGHT_DECAY
from .run import OutOfTime, Run
from .show import Show
from .stages import STAGES
from .state import check_space, replacing_safetensors
from .team import Alone, Group

PROGRAM = "dsa_ref.training.train"
NOT_FINISHED = 75  # EX_TEMPFAIL: the same command again goes on
STEPS = (2300, 150, 300)
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def course_config(k: int, length: int) -> ModelConfig:
    """The sizes of the course's model, 7.1 MB in bf16, unquantised: k keys selected, for contexts of `length`."""
    config = ModelConfig(hidden_dim=768)
    attention = dataclasses.replace(
        config.attention, index_topk=k, max_seq_len=max(8192, length), index_fp8=False, rope_factor=1.0
    )
    return dataclasses.replace(config, attention=attention)


@contextlib.contextmanager
def deterministic() -> Iterator[None]:
    """The same bits in every run: torch refuses what has none, cuBLAS gets a workspace of a fixed size.

    cuBLAS reads the variable when CUDA starts, so this must come before.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    before = torch.are_deterministic_algorithms_enabled(), torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # the kernels write all that they allocate
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.utils.deterministic.fill_uninitialized_memory = before[1]


def main(arguments: list[str] | None = None) -> None:
    """Train all stages, write the weights and the figures; arguments as on the command line."""
    began = time.monotonic()
    parser, team = _make_parser(), Alone()
    with deterministic():
        try:
            if several():  # first: a rank's GPU is the current one from here on
                options, ranks = start(parser, arguments)
                team = Group(ranks)
            else:
                options = parser.parse_args(arguments)
            with team.failing_together():
                run, finish = _set_up(parser, options, arguments, team, began)
        except ValueError as error:
            end(parser, error, 2)
        except KeyboardInterrupt:
            sys.exit(130)
        except (OSError, RuntimeError) as error:
            if not several():
                raise
            end(parser, error)
        show = run.show
        try:
            result = run.run()
            if team.rank == 0:
                finish(result)
            team.leave()
        except OutOfTime:
            show.say(f"--minutes {options.minutes:g} are over at step {run.done} of {run.stage}: run it again to go on")
            with contextlib.suppress(RuntimeError):
                team.any(True)  # it is said: torchrun ends all ranks when one has ended
            sys.exit(NOT_FINISHED)
        except KeyboardInterrupt:
            show.say(f"interrupted at step {run.done} of {run.stage}")
            sys.exit(130)
        except (torch.OutOfMemoryError, MemoryError) as error:
            show.say("")
            end(parser, error, where=f"memory ran out in the stage {run.stage}; --micro 1 needs less")
        except (OSError, FloatingPointError, RuntimeError, ValueError) as error:
            if team.size == 1 and isinstance(error, (RuntimeError, ValueError)):
                raise
            show.say("")
            end(parser, error, where=f"at step {run.done} of {run.stage}")  # the last state that was saved is whole


def _set_up(
    parser: argparse.ArgumentParser, options: argparse.Namespace, arguments: list[str] | None, team: Alone, began: float
) -> tuple[Run, Callable[[dict], None]]:
    """The run that the options ask for, from its state, and what is to be done with its result.

    Raises: ValueError for what it cannot do.
    """
    ops = resolve_options(parser, options)
    session = provenance(PROGRAM, arguments, options.device) | ({"ranks": team.size} if team.size > 1 else {})
    show = Show(sys.stderr.isatty(), team.rank == 0)
    corpus, held_out = load_corpus()
    data = Data(
        corpus, options.length, options.batch, options.seed, options.pairs, options.device, options.asks,
        options.steps[0], STARTS if options.starts else (),
    )  # fmt: skip
    measure = _make_measure(held_out.to(options.device), options)
    torch.manual_seed(options.seed)
    with torch.device("cpu"):  # the same weights for every device
        model = SmallModel(course_config(options.k, options.length), ops).float()
    size = sum(p.numel() for p in model.parameters())
    if team.rank == 0:
        check_space({options.weights: 2 * size} | ({options.state: 12 * size} if options.state else {}))
    run = Run(
        model.to(options.device), data, dict(zip(STAGES, options.steps, strict=True)),
        _fixed_options(options, model.config, data), measure, show, options.state, options.save_every,
        options.log_every, options.micro, DTYPES[options.dtype], session,
        began + 60 * options.minutes if options.minutes else float("inf"), team,
    )  # fmt: skip
    return run, lambda result: _finish(run, options, ops, result, measure, session)


def _make_parser() -> Parser:
    """The command line."""
    parser = Parser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--weights", type=regular_file, required=True, help="where the safetensors file goes")
    add("--log", type=output_file, required=True, help="where the figures go, as JSON")
    add("--state", type=regular_file, help="where the run keeps its state; where there is one, it goes on from it")
    add("--save-every", type=positive, default=100, metavar="STEPS", help="(default %(default)s)")
    add("--log-every", type=positive, default=10, metavar="STEPS", help="(default %(default)s)")
    add("--minutes", type=float, help="stop before so many are over, with exit code 75; needs --state")
    add("--steps", type=positive, nargs=3, default=STEPS, metavar=("DENSE", "WARM", "SPARSE"),
        help=f"optimizer steps of each stage (default {' '.join(map(str, STEPS))})")  # fmt: skip
    add("--batch", type=positive, default=8, help="windows a step (default %(default)s)")
    add("--micro", type=positive, help="windows at a time, to save memory (default: all of a step)")
    add("--length", type=positive, default=8192, help="bytes a window (default %(default)s)")
    add("--k", type=positive, default=256, help="keys selected (default %(default)s)")
    add("--pairs", type=int, default=32, help="needles a window (default %(default)s)")
    add("--asks", type=positive, default=Data.asks, help="queries of each needle (default %(default)s)")
    add("--starts", action=argparse.BooleanOptionalAction, default=True,
        help="whether the dense stage begins with shorter windows (default: it does)")  # fmt: skip
    add("--seed", type=int, default=0, help="of weights, windows and needles (default %(default)s)")
    add("--windows", type=positive, default=16, help="held-out windows to measure on (default %(default)s)")
    add("--kernels", action="store_const", dest="ops", const="dsa_kernels", default="dsa_ref",
        help="run the steps of dsa_kernels, not of dsa_ref: for a GPU")  # fmt: skip
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="(default %(default)s)")
    add("--timeout", type=seconds, default=TIMEOUT, metavar="SECONDS",
        help="how long ranks of torchrun wait for each other (default %(default)s)")  # fmt: skip
    add("--dtype", choices=DTYPES, help="of what the model computes with (default bf16 on a GPU, fp32 on a CPU)")
    return parser


def resolve_options(parser: argparse.ArgumentParser, options: argparse.Namespace) -> types.ModuleType:
    """End with what is wrong, before any work; fill in --dtype, --device's number; the package of `options.ops`."""
    files = {"--weights": options.weights, "--log": options.log, "--state": options.state}
    named = [(option, path.resolve()) for option, path in files.items() if path is not None]
    for i, (option, path) in enumerate(named):
        for other, same in named[i + 1 :]:
            if path == same:
                parser.error(f"{option} and {other} must be two files, got {path} for both")
    if options.minutes is not None and not (options.minutes > 0 and options.state):
        parser.error(f"--minutes must be above 0, with --state to go on from, got {options.minutes:g}")
    if options.k >= options.length:
        parser.error(f"--k must be below --length {options.length}, else nothing is left out, got {options.k}")
    if options.pairs < 0:
        parser.error(f"--pairs must be at least 0, got {options.pairs}")
    if not -(2**63) <= options.seed < 2**64:
        parser.error(f"--seed must be a number of 64 bits, got {options.seed}")
    if importlib.util.find_spec("safetensors") is None:
        parser.error("safetensors must be installed to save the weights: pip install safetensors")
    try:
        place = torch.empty(0, device=options.device)
        place.cpu()  # "meta" has no numbers
        options.device = str(place.device)  # with its number: windows are drawn in a thread, on whose GPU 0 they'd land
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        parser.error(f"--device must be one that torch can use here, got {options.device}: {error}")
    on_gpu = torch.device(options.device).type == "cuda"
    if options.ops == "dsa_kernels" and not on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        parser.error(
            f"--kernels needs a GPU, got --device {options.device}: interpreted on a CPU they take a thousand times as "
            "long. TRITON_INTERPRET=1 in the environment asks for that"
        )
    options.dtype = options.dtype or ("bf16" if on_gpu else "fp32")
    try:
        return importlib.import_module(options.ops)
    except ImportError as error:
        parser.error(f"--kernels needs a package that can be imported: {error}")


def _fixed_options(options: argparse.Namespace, config: ModelConfig, data: Data) -> dict:
    """What decides about the bits that come out, and must be equal to go on from a state."""
    names = "steps batch micro length k pairs asks seed windows log_every ops dtype".split()
    return {
        **{f"--{name.replace('_', '-')}".replace("--ops", "--kernels"): getattr(options, name) for name in names},
        "starts": data.starts,
        "rates": PEAK_RATES,
        "AdamW": [BETAS, WEIGHT_DECAY, LARGEST_NORM],
        "sizes": dataclasses.asdict(config),
        "text": fingerprint(data.corpus),
    }


def _make_measure(held_out: torch.Tensor, options: argparse.Namespace):
    """measure(model, stage): held-out loss, and how many needles are found, of those more than k bytes back."""
    windows = held_out_windows(held_out, options.windows, options.length)
    least = max(LINE, options.k + 1)
    needles = needle_windows(held_out, options.windows, options.length, options.pairs, least) if options.pairs else None
    edges = position_edges(options.length, options.k)[1:]

    def measure(model: SmallModel, stage: str) -> dict:
        figures = {"held_out_loss": {}, "distances": edges, "needles": {}}
        for attention in ("dense",) if stage == "dense" else ("dense", "sparse"):
            figures["held_out_loss"][attention] = round(held_out_loss(model, windows, attention), 4)
            if needles:
                figures["needles"][attention] = needles_by_distance(model, *needles, attention, edges)
        return figures

    return measure


def _finish(run: Run, options: argparse.Namespace, ops: types.ModuleType, result: dict, measure, session: dict) -> None:
    """Write the weights, measure what a reader gets, and write the log."""
    config = run.model.config
    run.model.config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, index_fp8=True))
    with replacing_safetensors(options.weights) as new:
        save_small_model(run.model, new)
    final = load_small_model(options.weights, ops).to(options.device, DTYPES[options.dtype])  # bf16, FP8 indexer
    result["after"]["saved"] = measure(final, "saved")
    result["provenance"] = {
        **session,
        "options": {name: str(value) for name, value in vars(options).items()},
        "seconds": round(result.pop("seconds")),
        "training_bytes": len(run.data.corpus),
        "parameters": sum(p.numel() for p in final.parameters()),
    }
    write_log(PROGRAM, options.log, result)
    print(json.dumps(result["after"], indent=1))


if __name__ == "__main__":
    main()
