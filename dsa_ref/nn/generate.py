"""Continue texts with the small model, through paged caches: prompts in chunks, then all sequences as one batch.

    python -m dsa_ref.nn.generate "def read_lines(path):"

Every prompt is read once, in chunks, into pages of all layers; what prompts have in common, and what several samples of
one prompt continue, is stored once. Then each step runs the newest byte of all unfinished sequences together. A
finished sequence leaves the batch and gives its pages back. `generate_command` has the command line.
"""

import collections
import sys
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
from .model import SmallModel

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


if __name__ == "__main__":
    from .generate_command import main  # it imports this file

    main()
