"""Continue texts with the small model, through paged caches: prompts in chunks, then all sequences as one batch.

    python -m dsa_ref.nn.generate "def read_lines(path):"

Every prompt is read once, in chunks, into pages of all layers; what prompts have in common, and what several samples of
one prompt continue, is stored once. Then each step runs the newest byte of all unfinished sequences together. A
finished sequence leaves the batch and gives its pages back.
"""

import argparse
import codecs
import collections
import contextlib
import importlib
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

import dsa_ref

from ..contracts import FLOATS, check_count, check_dtype, check_int, check_shapes
from ..page_table import Batch, PageTable
from ..paged_cache import PagedCache
from .captured import CapturedStep
from .decode import STEPS
from .model import SMALL_MODEL, SmallModel, load_small_model

__all__ = ["Generation", "Piece", "choose", "complete", "generate"]

Progress = Callable[[int, int], object]  # tokens read, tokens to read


class Piece(NamedTuple):
    """The next bytes of one sequence, and in its last piece why it ended.

    prompt, sample: which sequence, both counted from 0; data: mostly one byte, more where the beginning of a stop text
    turned out to be none, less where one may have begun. finish_reason: None, or "stop" (a stop text came; it is not
    part of data), "length" (all tokens asked for) or "max_seq_len" (the model can read no more).
    """

    prompt: int
    sample: int
    data: bytes
    finish_reason: str | None = None


class _Sequence:
    """One continuation: its text so far, how much of it was handed out, and its own random numbers."""

    def __init__(self, prompt: int, sample: int, generator: torch.Generator) -> None:
        self.prompt, self.sample, self.generator = prompt, sample, generator
        self.row = None  # of the page table
        self.written, self.shown = bytearray(), 0

    def add(self, byte: int, most: int, room: int, stop: Sequence[bytes]) -> Piece:
        """Append a byte. most: how many bytes are asked for; room: of how many the last could still be read."""
        self.written.append(byte)
        length = len(self.written)
        came = max((len(text) for text in stop if self.written.endswith(text)), default=0)
        begun = max((n for text in stop for n in range(len(text)) if self.written.endswith(text[:n])), default=0)
        end, reason = length, None
        if came:
            end, reason = length - came, "stop"
        elif length == most:
            reason = "length"
        elif length > room:
            reason = "max_seq_len"
        else:
            end = length - begun  # a stop text may have begun: hold it back
        data, self.shown = bytes(self.written[self.shown : end]), end
        return Piece(self.prompt, self.sample, data, reason)


class _Options(NamedTuple):
    """What `generate` was asked for, checked. sampling: what `choose` takes after the generator."""

    tokens: int
    sampling: tuple[float, int | None, float]
    stop: list[bytes]
    chunk: int
    page_size: int
    fp8: bool
    captured: bool
    progress: Progress | None


class Generation(Iterator[Piece]):
    """What `generate` returns: an iterator over pieces, which says on the way what it holds.

    table: the PageTable; caches: one PagedCache a layer; to_read: how many tokens the prompts take, what they share
    counted once; read, written: tokens read from prompts and chosen so far.
    """

    table: PageTable
    caches: list[PagedCache]
    to_read: int
    read: int
    written: int

    def __init__(self, model: SmallModel, prompts: list[bytes], sequences: list[_Sequence], options: _Options) -> None:
        self._model, self._prompts, self._sequences, self._options = model, prompts, sequences, options
        self._graph, page_size = None, options.page_size
        self._plan = _shared_prefixes(prompts, page_size)
        self.read = self.written = 0
        self.to_read = sum(len(text) - shared for text, (_, shared) in self._plan.items())
        longest = model.config.attention.max_seq_len
        ends = {text: min(len(text) + options.tokens - 1, longest) for text in self._plan}  # the last byte is not read
        samples, pages = collections.Counter(prompts[one.prompt] for one in sequences), 0
        for text, (_, shared) in self._plan.items():
            last = -(-ends[text] // page_size)
            pages += last - shared // page_size + (samples[text] - 1) * (last - len(text) // page_size)
        sizes = pages, len(sequences), max(ends.values()), page_size, options.fp8
        self.table, self.caches = model.new_paged_caches(*sizes)
        self._pieces = self._run()

    def __next__(self) -> Piece:
        return next(self._pieces)

    def _run(self) -> Iterator[Piece]:
        """No context of torch's may be open at a yield: it would hold for the caller, too."""
        options, alive, logits = self._options, self._sequences, self._read_prompts()
        longest = self._model.config.attention.max_seq_len
        while alive:
            pieces, going = [], []
            for sequence, row in zip(alive, logits, strict=True):
                byte = choose(row, sequence.generator, *options.sampling)
                room = longest - len(self._prompts[sequence.prompt])
                pieces.append(sequence.add(byte, options.tokens, room, options.stop))
                if pieces[-1].finish_reason:
                    self.table.free(sequence.row)
                else:
                    going.append(sequence)
            self.written += len(alive)
            yield from (piece for piece in pieces if piece.data or piece.finish_reason)
            alive = going
            if alive:
                logits = self._step(alive)

    @torch.no_grad()
    def _read_prompts(self) -> list[Tensor]:
        """Fill the caches with all prompts, and return for each sequence the logits of its first byte, on the CPU."""
        rows, logits, chunk, progress = {}, {}, self._options.chunk, self._options.progress
        for text, (source, shared) in self._plan.items():
            rows[text] = row = self.table.new() if source is None else self.table.fork(rows[source])
            self.table.truncate(row, shared)
            for first in range(shared, len(text), chunk):
                part = torch.tensor(list(text[first : first + chunk]), device=self.table.table.device)
                logits[text] = self._model(part, caches=[cache.sequence(row) for cache in self.caches])[-1].cpu()
                self.read += len(part)
                if progress is not None:
                    progress(self.read, self.to_read)
        owned = set()
        for sequence in self._sequences:  # the first continuation of a text takes its row, the others fork it
            text = self._prompts[sequence.prompt]
            sequence.row = self.table.fork(rows[text]) if text in owned else rows[text]
            owned.add(text)
        return [logits[self._prompts[sequence.prompt]] for sequence in self._sequences]

    @torch.no_grad()
    def _step(self, alive: list[_Sequence]) -> Tensor:
        """Run the newest byte of each sequence: the logits of the next, fp32 [B, vocab_size], on the CPU."""
        newest = torch.tensor([[sequence.written[-1]] for sequence in alive], device=self.table.table.device)
        rows = [sequence.row for sequence in alive]
        if not self._options.captured:
            return self._model.decode(newest, self.table, self.caches, rows)[:, -1].cpu()
        if self._graph is None or self._graph.sequences != tuple(rows):
            self._graph = None  # its memory is free before another takes some
            ops = self._model.layers[0].self_attn.ops
            self._graph = CapturedStep(self._decode, self.table, rows, newest, ops)
        return self._graph(newest)[:, -1].cpu()

    def _decode(self, tokens: Tensor, batch: Batch) -> Tensor:
        return self._model.decode_batch(tokens, self.caches, batch)


def generate(
    model: SmallModel,
    prompts: Sequence[bytes],
    tokens: int,
    *,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    seed: int | None = None,
    stop: bytes | str | Sequence[bytes | str] = (),
    samples: int = 1,
    chunk: int = 256,
    page_size: int = 64,
    fp8: bool = False,
    captured: bool = False,
    progress: Progress | None = None,
) -> Generation:
    """Continue every prompt by up to `tokens` bytes, and return an iterator over the pieces as they come.

    A round gives each unfinished sequence a byte, in the order of prompts and their samples. temperature: 0 takes the
    likeliest byte, else bytes are drawn, from the top_k likeliest and from the fewest that together reach top_p. seed:
    sample i of a prompt draws what (seed, i) says, whatever other prompts there are; None: anew in every call. stop:
    texts, str as UTF-8, that end a sequence where they come; they are left out. samples: continuations of each prompt.
    chunk: prompt tokens a pass; page_size: tokens a page; fp8: keep latents as FP8 rows, else in the weights' dtype.
    captured: replay each step from a CUDA graph, captured anew when a sequence ends: the same bits in less time.
    progress: called as progress(tokens read, tokens to read) after each chunk.

    Raises, before any work: ValueError or TypeError for what it cannot do, such as an empty prompt or one longer than
    max_seq_len; on the way ValueError for logits that are not finite.
    """
    if not isinstance(model, SmallModel):
        raise TypeError(f"model must be a SmallModel, got {type(model).__name__}")
    if model.config.vocab_size != 256:
        raise ValueError(f"model must have a vocab_size of 256, as a token is a byte, got {model.config.vocab_size}")
    _check_prompts(prompts, model.config.attention.max_seq_len)
    for name, value in (("tokens", tokens), ("samples", samples), ("chunk", chunk), ("page_size", page_size)):
        check_count(name, value)
    _check_sampling(temperature, top_k, top_p)
    if seed is not None:
        check_int("seed", seed, 0, 2**63 - 1)
    if not isinstance(captured, bool):
        raise TypeError(f"captured must be a bool, got {captured!r}")
    device, ops = next(model.parameters()).device, model.layers[0].self_attn.ops
    if lacking := [name for name in STEPS if not hasattr(ops, name)]:
        raise TypeError(f"model must have ops with {', '.join(STEPS)} to decode, got none of {lacking}")
    if captured and (device.type != "cuda" or ops is dsa_ref):
        name = getattr(ops, "__name__", type(ops).__name__)
        raise ValueError(f"captured must be False but for dsa_kernels on a CUDA device, got {name} on {device}")
    if progress is not None and not callable(progress):
        raise TypeError(f"progress must be a function of two ints or None, got {type(progress).__name__}")
    sampling = float(temperature), top_k, float(top_p)
    options = _Options(tokens, sampling, _stop_texts(stop), chunk, page_size, fp8, captured, progress)
    seeds = _seeds(seed, len(prompts), samples)
    sequences = [
        _Sequence(prompt, sample, torch.Generator().manual_seed(seeds[prompt][sample]))
        for prompt in range(len(prompts))
        for sample in range(samples)
    ]
    return Generation(model, list(prompts), sequences, options)


def complete(model: SmallModel, prompts: Sequence[bytes], tokens: int, **options) -> list[bytes]:
    """The finished continuations, prompt by prompt, the samples of each one after the other. As `generate`."""
    texts = {}
    for piece in generate(model, prompts, tokens, **options):
        texts[piece.prompt, piece.sample] = texts.get((piece.prompt, piece.sample), b"") + piece.data
    return [texts[key] for key in sorted(texts)]


def choose(
    logits: Tensor,
    generator: torch.Generator | None = None,
    temperature: float = 0.0,
    top_k: int | None = None,
    top_p: float = 1.0,
) -> int:
    """The next token of one sequence: the likeliest, the smallest of equals, or one drawn. logits: float [V], on a CPU.

    One number of the generator decides a draw, in float64. temperature, top_k, top_p: as for `generate`.

    Raises: ValueError for logits that are not finite, another shape or another number; TypeError for other types.
    """
    check_shapes(logits=(logits, "V"))
    check_dtype("logits", logits, FLOATS)
    _check_sampling(temperature, top_k, top_p)
    if not logits.isfinite().all():
        raise ValueError("logits must be finite, got NaN or infinity: the model's weights may be broken")
    if temperature == 0:
        return int(logits.argmax())
    values, order = logits.double().sort(descending=True, stable=True)
    reached = ((values - values[0]) / temperature).exp()[:top_k].cumsum(0)
    reached = reached[: int((reached < top_p * reached[-1]).sum()) + 1]
    drawn = torch.rand((), generator=generator, dtype=torch.float64) * reached[-1]
    return int(order[torch.searchsorted(reached, drawn)])


def _shared_prefixes(prompts: Sequence[bytes], page_size: int) -> dict[bytes, tuple[bytes | None, int]]:
    """{text: (an earlier text or None, how many of its first tokens it has in common, in whole pages)}, each once."""
    plan = {}
    for text in dict.fromkeys(prompts):
        shared, source = 0, None
        for earlier in plan:
            same = 0
            while same + page_size < len(text) and text[: same + page_size] == earlier[: same + page_size]:
                same += page_size  # but for the last token, which gives the logits
            if same > shared:
                shared, source = same, earlier
        plan[text] = source, shared
    return plan


def _seeds(seed: int | None, prompts: int, samples: int) -> list[list[int]]:
    """A seed for each sample of each prompt: the same for all prompts where one is given."""
    if seed is None:
        fresh = torch.Generator()
        return [[fresh.seed() for _ in range(samples)] for _ in range(prompts)]
    numbers = torch.Generator().manual_seed(seed)
    drawn = [int(torch.randint(2**62, (), generator=numbers)) for _ in range(samples)]
    return [drawn] * prompts


def _stop_texts(stop) -> list[bytes]:
    texts = [stop] if isinstance(stop, (bytes, str)) else stop
    if not isinstance(texts, Sequence) or not all(isinstance(text, (bytes, str)) for text in texts):
        kinds = type(texts).__name__
        if isinstance(texts, Sequence):
            kinds += " of " + ", ".join(sorted({type(text).__name__ for text in texts}))
        raise TypeError(f"stop must be bytes, a str or a list of these, got {kinds}")
    if not all(texts):
        raise ValueError("stop must hold texts of at least one byte, got an empty one")
    try:
        return [text.encode() if isinstance(text, str) else text for text in texts]
    except UnicodeEncodeError as error:  # a lone surrogate, as Python has for a byte of the command line
        raise ValueError(f"stop must hold texts that UTF-8 can write, got {error.object!r}: pass bytes") from None


def _check_prompts(prompts, longest: int) -> None:
    if isinstance(prompts, (bytes, str)) or not isinstance(prompts, Sequence):
        raise TypeError(f"prompts must be a list of bytes, got {type(prompts).__name__}")
    if not prompts:
        raise ValueError("prompts must hold at least one, got none")
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, bytes):
            raise TypeError(f"prompts must be a list of bytes, got {type(prompt).__name__} in prompts[{i}]")
        if not 1 <= len(prompt) <= longest:
            raise ValueError(
                f"prompts must have from 1 to max_seq_len = {longest} bytes, got {len(prompt)} in prompts[{i}]"
            )


def _check_sampling(temperature, top_k, top_p) -> None:
    _check_number("temperature", temperature, "at least 0 and finite", lambda x: 0 <= x <= sys.float_info.max)
    _check_number("top_p", top_p, "above 0 and at most 1", lambda x: 0 < x <= 1)
    if top_k is not None:
        check_count("top_k", top_k)


def _check_number(name: str, value, wanted: str, fits: Callable[[float], bool]) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not fits(value):
        raise ValueError(f"{name} must be {wanted}, got {value}")


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


if __name__ == "__main__":
    main()
