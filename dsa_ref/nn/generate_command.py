"""Continue texts with the small model, through paged caches: prompts in chunks, then all sequences as one batch.

    python -m dsa_ref.nn.generate "def read_lines(path):"

The command line of `generate`: continuations go to stdout as they come, speeds to stderr.
"""

import argparse
import codecs
import contextlib
import importlib
import os
import pathlib
import sys
import time

import torch

from .generate import Generation, generate
from .model import SMALL_MODEL, load_small_model


def main(arguments: list[str] | None = None) -> None:
    """Write continuations to stdout as they come, and speeds to stderr; arguments as on the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", nargs="+", metavar="PROMPT", help="what to continue; -: what standard input holds")
    parser.add_argument("--tokens", type=int, default=200, help="bytes to write, at most (default %(default)s)")
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest byte (default)")
    parser.add_argument("--top-k-tokens", type=int, metavar="K", help="draw from the K likeliest bytes")
    parser.add_argument("--top-p", type=float, default=1.0, metavar="P", help="draw from the likeliest that reach P")
    parser.add_argument("--seed", type=int, help="draw the same bytes again (default: others in every run)")
    parser.add_argument("--samples", type=int, default=1, help="continuations of each prompt")
    parser.add_argument("--stop", action="append", default=[], metavar="TEXT", help="end where this text comes")
    parser.add_argument("--echo", action="store_true", help="write the prompt before what continues it")
    parser.add_argument("--weights", type=pathlib.Path, default=SMALL_MODEL, help="the trained model")
    parser.add_argument("--kernels", action="store_const", dest="ops", const="dsa_kernels", default="dsa_ref",
                        help="run the steps of dsa_kernels, not of dsa_ref")  # fmt: skip
    parser.add_argument("--fp8", action="store_true", help="keep latents in the caches as FP8 rows")
    parser.add_argument("--captured", action="store_true", help="with --kernels on a GPU: replay CUDA graphs")
    parser.add_argument("--chunk", type=int, default=256, help="prompt bytes a pass (default %(default)s)")
    parser.add_argument("--progress", action="store_true", help="show progress though stderr is no terminal")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where the model runs, as torch names it (default %(default)s)")  # fmt: skip
    options = parser.parse_args(arguments)
    if sys.stdout is None or sys.stdin is None and "-" in options.prompts:
        parser.error(f"standard {'output' if sys.stdout is None else 'input'} must be open, got a closed one")
    if sys.stderr is None:  # closed: the text comes all the same
        sys.stderr = pathlib.Path(os.devnull).open("w")  # noqa: SIM115 (open until the process ends)
    try:
        _write(parser, options)
    except KeyboardInterrupt:
        print(file=sys.stderr)
        sys.exit(130)
    except OSError as error:  # a full disk; or whoever read the text has enough, which needs no words
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # nothing is left to be flushed at the exit
        with contextlib.suppress(OSError):
            if not isinstance(error, BrokenPipeError):
                print(f"{parser.prog}: error: standard output must be writable, got {error}", file=sys.stderr)
        sys.exit(1)


def _write(parser: argparse.ArgumentParser, options: argparse.Namespace) -> None:
    prompts = [sys.stdin.buffer.read() if text == "-" else os.fsencode(text) for text in options.prompts]
    try:
        torch.empty(0, device=options.device).cpu()  # "meta" has no numbers
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        parser.error(f"--device must be one that torch can use here, got {options.device}: {error}")
    try:
        ops = importlib.import_module(options.ops)
    except ImportError as error:
        parser.error(f"--kernels needs a package that can be imported: {error}")
    shows = options.progress or sys.stderr.isatty()

    def progress(done: int, total: int) -> None:
        nonlocal prefilled
        prefilled = time.perf_counter()
        if shows and total > options.chunk:
            end = "\n" if done == total else ""
            print(f"\rprompt: {done} of {total} bytes read", end=end, file=sys.stderr, flush=True)

    try:
        model = load_small_model(options.weights, ops).to(options.device)
    except Exception as error:  # whatever a file of another kind leads to
        parser.error(f"--weights must be a file that save_small_model wrote, got {options.weights}: {error}")
    try:
        generation = generate(
            model, prompts, options.tokens, temperature=options.temperature, top_k=options.top_k_tokens,
            top_p=options.top_p, seed=options.seed, stop=[os.fsencode(text) for text in options.stop],
            samples=options.samples, chunk=options.chunk, fp8=options.fp8, captured=options.captured,
            progress=progress,
        )  # fmt: skip
        began = prefilled = time.perf_counter()
        texts = [(i, j, text) for i, text in enumerate(prompts) for j in range(options.samples)]
        reasons = _print_in_order(generation, texts, options.echo)
    except (ValueError, TypeError) as error:  # before any work, or from weights that give NaN
        parser.error(str(error))
    ended = time.perf_counter()
    for (prompt, sample), reason in sorted(reasons.items()):
        if reason == "max_seq_len":
            longest = model.config.attention.max_seq_len
            name = _name(prompt, sample)
            print(f"{name}: ended where the model can read no more, max_seq_len = {longest} bytes", file=sys.stderr)
    stepped = generation.written - len(texts)  # the first byte of each comes from its prompt's last row
    print(
        f"prefill: {_speed(generation.read, prefilled - began)}; decode: {_speed(stepped, ended - prefilled)}",
        file=sys.stderr,
    )


def _print_in_order(generation: Generation, texts: list[tuple[int, int, bytes]], echo: bool) -> dict:
    """Write the first text as it comes, what the others have meanwhile as soon as it is their turn. {(prompt, sample):
    finish_reason}."""
    utf8 = codecs.getincrementaldecoder("utf-8")
    decoders = {(prompt, sample): utf8("replace") for prompt, sample, _ in texts}
    waiting = {(prompt, sample): "" for prompt, sample, _ in texts}
    if echo:
        waiting = {(prompt, sample): decoders[prompt, sample].decode(text) for prompt, sample, text in texts}
    reasons, turns = {}, list(waiting)
    sys.stdout.reconfigure(errors="replace")  # a terminal may know fewer characters than the text has
    begun = None
    for piece in generation:
        key = piece.prompt, piece.sample
        waiting[key] += decoders[key].decode(piece.data, final=piece.finish_reason is not None)
        if piece.finish_reason:
            reasons[key] = piece.finish_reason
        while turns and (turns[0] == key or turns[0] in reasons):
            first = turns[0]
            if begun != first and len(waiting) > 1:
                print(f"==> {_name(*first)} <==")
            begun = first
            print(waiting[first], end="", flush=True)
            waiting[first] = ""
            if first not in reasons:
                break
            print(flush=True)
            turns.pop(0)
    return reasons


def _name(prompt: int, sample: int) -> str:
    return f"prompt {prompt + 1}, sample {sample + 1}"


def _speed(tokens: int, seconds: float) -> str:
    return f"{tokens} tokens in {seconds:.2f} s ({tokens / max(seconds, 1e-9):.1f} tokens/s)"
