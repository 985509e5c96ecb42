"""Train the small model and its indexer as the report trains V3.2: dense, then the indexer alone, then both, sparse.

    python -m dsa_ref.training.train --weights small_model.safetensors --log small_model.json

1. Dense: a plain language model, attention over everything. The indexer is not touched.
2. Warm-up (equation 3): everything frozen but the indexer, which learns the dense attention's distribution.
3. Sparse (equation 4): attention over the k selected keys. The model learns from the language loss, the indexer from
   the KL on the selected keys. One backward pass serves both, since no gradient passes from one side to the other.

The indexer trains unquantised and is used in FP8 afterwards. Settings are scaled to a model of 2.8 million weights; the
report's are in SPEC section 5. Minutes on a GPU; `--steps 3 3 3 --batch 1` shows the mechanics on a CPU.
"""

import argparse
import dataclasses
import importlib.util
import json
import math
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..indexer_loss import indexer_loss
from ..nn.model import ModelConfig, SmallModel, load_small_model, save_small_model
from ..records import output_file, positive, provenance, regular_file, replacing, write_log
from .corpus import check_length, held_out_windows, load_corpus
from .evaluate import held_out_loss

STAGES = ("dense", "warm-up", "sparse")
PEAK_RATES = {"dense": 2e-3, "warm-up": 2e-3, "sparse": 3e-4}


def indexer_parameters(model: nn.Module, inside: bool = True) -> list[nn.Parameter]:
    """The parameters of all indexers of a model or of one layer, or (inside=False) all others."""
    return [p for name, p in model.named_parameters() if (".indexer." in f".{name}") == inside]


def stage_loss(model: SmallModel, tokens: Tensor, stage: str) -> tuple[Tensor | None, Tensor | None]:
    """(language loss, indexer loss), in nats, of token windows int64 [n, L + 1]; None where the stage has none.

    stage: one of STAGES. The indexer loss is the mean over layers.
    """
    n, length = tokens.shape[0], tokens.shape[1] - 1
    record = []
    logits = model(
        tokens[:, :-1].flatten(),
        torch.arange(length, device=tokens.device).repeat(n),
        attention="sparse" if stage == "sparse" else "dense",
        record=record,
    )
    language = None if stage == "warm-up" else F.cross_entropy(logits, tokens[:, 1:].flatten())
    if stage == "dense":
        return language, None
    scale = model.config.attention.softmax_scale
    losses = [
        indexer_loss(s["q_idx"], s["k_idx"], s["w"], s["q"], s["kv"], scale, s.get("indices"), s["start"])
        for s in record
    ]
    return language, torch.stack(losses).mean()


def train_stage(
    model: SmallModel,
    stage: str,
    corpus: Tensor,
    steps: int,
    batch: int,
    length: int,
    generator: torch.Generator,
    log: Callable[[str, int, float | None, float | None], None],
) -> None:
    """Run one stage in place: `steps` optimizer steps on `batch` random windows of length + 1 bytes of uint8 `corpus`.

    generator: draws the windows, on the CPU. log receives (stage, step, language loss, indexer loss), losses in nats,
    some 20 times.

    Raises: ValueError where the corpus is shorter than a window.
    """
    check_length(corpus, length)
    trained = {"dense": [False], "warm-up": [True], "sparse": [False, True]}[stage]
    for inside in (False, True):
        for parameter in indexer_parameters(model, inside):
            parameter.requires_grad_(inside in trained)
    groups = [{"params": indexer_parameters(model, inside)} for inside in trained]
    optimizer = torch.optim.AdamW(groups, lr=PEAK_RATES[stage], betas=(0.9, 0.95), weight_decay=0.01)

    def rate(step: int) -> float:  # a short linear rise, then half a cosine down to a tenth
        return min(1.0, (step + 1) / max(1, steps // 20)) * (0.55 + 0.45 * math.cos(math.pi * step / max(1, steps)))

    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
    for step in range(steps):
        first = torch.randint(0, max(1, len(corpus) - length - 1), (batch, 1), generator=generator, device="cpu")
        tokens = corpus[(first + torch.arange(length + 1, device="cpu")).to(corpus.device)].long()
        losses = stage_loss(model, tokens, stage)
        optimizer.zero_grad()
        sum(loss for loss in losses if loss is not None).backward()
        for group in optimizer.param_groups:
            torch.nn.utils.clip_grad_norm_(group["params"], 1.0)
        with torch.device("cpu"):  # AdamW counts its steps there; older ones ask the default device
            optimizer.step()
        scheduler.step()
        if step % max(1, steps // 20) == 0 or step == steps - 1:
            log(stage, step, *(None if loss is None else round(loss.item(), 4) for loss in losses))


def main(arguments: list[str] | None = None) -> None:
    """Train all stages, write the weights and the figures; arguments as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--weights", type=regular_file, required=True, help="where the safetensors file goes")
    parser.add_argument("--log", type=output_file, required=True, help="where the figures go, as JSON")
    parser.add_argument(
        "--steps", type=positive, nargs=3, default=(1300, 250, 300), metavar=("DENSE", "WARM", "SPARSE")
    )
    parser.add_argument("--batch", type=positive, default=8, help="windows a step")
    parser.add_argument("--length", type=positive, default=2048, help="bytes a window")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(arguments)
    if options.weights.resolve() == options.log.resolve():
        parser.error(f"--weights and --log must be two files, got {options.log} for both")
    if importlib.util.find_spec("safetensors") is None:
        parser.error("safetensors must be installed to save the weights: pip install safetensors")
    try:
        torch.empty(0, device=options.device)
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        parser.error(f"--device must be one that torch can use here, got {options.device}: {error}")
    origin = provenance("dsa_ref.training.train", arguments, options.device)

    began = time.time()
    torch.manual_seed(options.seed)
    torch.set_float32_matmul_precision("high")
    generator = torch.Generator().manual_seed(options.seed)
    corpus, held_out = (side.to(options.device) for side in load_corpus())
    windows = held_out_windows(held_out, 24, options.length)
    config = ModelConfig()
    config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, index_fp8=False))
    model = SmallModel(config).to(options.device)
    result = {"history": [], "held_out_loss": {}}

    def log(stage, step, language, indexer):
        result["history"].append({"stage": stage, "step": step, "language_loss": language, "indexer_loss": indexer})
        print(f"{time.time() - began:6.0f} s  {stage:8} {step:5}  language {language}  indexer {indexer}", flush=True)

    for stage, steps in zip(STAGES, options.steps, strict=True):
        train_stage(model, stage, corpus, steps, options.batch, options.length, generator, log)
        for attention in ("dense",) if stage == "dense" else ("dense", "sparse"):
            name = f"after {stage}, {attention} attention"
            result["held_out_loss"][name] = round(held_out_loss(model, windows, attention), 4)
            print(name, result["held_out_loss"][name], flush=True)
    trained_seconds = time.time() - began

    model.config = dataclasses.replace(config, attention=dataclasses.replace(config.attention, index_fp8=True))
    with replacing(options.weights) as new:
        save_small_model(model, new)
    final = load_small_model(options.weights).to(options.device)  # what a reader gets: bf16 weights, FP8 indexer
    for attention in ("dense", "sparse"):
        result["held_out_loss"][f"as saved, {attention} attention"] = round(held_out_loss(final, windows, attention), 4)
    result["provenance"] = {
        **origin,
        "options": {name: str(value) for name, value in vars(options).items()},
        "seconds": round(trained_seconds),
        "training_bytes": len(corpus),
        "held_out_bytes": len(held_out),
        "parameters": sum(p.numel() for p in model.parameters()),
    }
    write_log("dsa_ref.training.train", options.log, result)
    print(json.dumps(result["held_out_loss"], indent=1))


if __name__ == "__main__":
    main()
