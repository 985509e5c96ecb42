"""Read a long context chunk by chunk, each chunk timed, then decode from there; some rows are checked on the way.

What is timed runs as a server would run it, inside `unchecked_values` and without a record. A chunk that has rows to
check runs once more afterwards, from the same cache, with a record; its output must be that of the timed run.
"""

import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor

import dsa_ref

from ..config import DSAConfig
from ..contracts import check_count, check_int, unchecked_values
from ..nn import CapturedStep, LayerCache
from ..nn.layer import Ops
from ..page_table import PageTable
from ..paged_cache import PagedCache
from ..testing import Failed, relative_error
from .memory import PAGE_SIZE, PIECE, bytes_free, bytes_needed, check_memory, in_fp8, take_peak
from .spot_check import OUTPUT, Row, errors_of_row, inputs_and_outputs, rows_to_check, written_out
from .subject import DEFAULTS, make_subject, sizes_of

Progress = Callable[[str, dict], object]


@torch.no_grad()
def read_long_context(
    sizes: str | DSAConfig = "small",
    tokens: int | None = None,
    chunk: int | None = None,
    ops: Ops = dsa_ref,
    device: torch.device | str | None = None,
    *,
    decode: int = 32,
    check: int = 2,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict:
    """Prefill `tokens` tokens in chunks, decode `decode` more, and return what was measured, as a dict for JSON.

    sizes: "small", the trained small model, all its layers, on Python source; "v32", or a DSAConfig: one layer with
    random weights (bf16 on a GPU, fp32 on a CPU) on random normal numbers, new ones in each chunk. tokens, chunk: None
    for 1,048,576 and 4096 with "v32" and a config, for 65,536 and 1024 with "small". ops: whose steps run; device: None
    for a GPU where there is one. check: rows checked at each power of two, see `rows_to_check`; 0 for none. seed: of
    weights, numbers, and rows to check.

    On a CPU ops=dsa_ref is the one to take: interpreted kernels are a hundred times slower. There the reference cuts a
    chunk into blocks of its own, so a chunk's length hardly matters; 1024 tokens show how far it is.

    progress: called as progress(event, what): ("needs", the bytes with "free" and "tokens") before anything is made;
    ("warming", {}) and ("warm", {"seconds", "peak_bytes"}) where kernels are compiled first; ("chunk", one of
    "chunks"); ("decoding", {}).

    Returns "sizes", "layers", "dtype", "ops", "tokens", "chunk", "threads" (of torch on a CPU), "needs" and "free"
    (bytes; free may be None), "warm_seconds" (None without), "chunks": [{"first", "end": positions, "ms", "peak_bytes":
    of the chunk on a GPU, of the process so far on a CPU}], "prefill_seconds", "cache_bytes" and "page_bytes": of a
    token in a layer, "decode": {"tokens", "us_per_token": the median, "captured"} or None, "checked": {"positions",
    "errors": the largest, see `errors_of_row`} or None, "peak_bytes": {"warm", "chunks", "checks", "decode"}, as far as
    there is one.

    Raises: before any work ValueError or TypeError for what it cannot do, and ValueError where memory will not do;
    testing.Failed for a wrong row.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    defaults = DEFAULTS.get(sizes if isinstance(sizes, str) else "v32", DEFAULTS["v32"])
    tokens, chunk = (default if n is None else n for n, default in zip((tokens, chunk), defaults, strict=True))
    check_count("tokens", tokens)
    check_count("chunk", chunk)
    for name, value in (("decode", decode), ("check", check), ("seed", seed)):
        check_int(name, value, 0)
    chunk = min(chunk, tokens)
    told = progress or (lambda event, what: None)
    sizes = sizes_of(sizes, tokens + decode, device)
    free = bytes_free(device)
    needs = bytes_needed(sizes, tokens, chunk, decode, check, ops is dsa_ref, device.type == "cuda")
    told("needs", needs | {"free": free, "tokens": tokens})
    check_memory(needs, free, device)

    peaks = {}

    def peak(phase: str) -> int | None:
        taken = take_peak(device)
        if taken is not None:
            peaks[phase] = max(taken, peaks.get(phase, 0))
        return taken

    take_peak(device)  # what was before is nobody's
    subject = make_subject(sizes, tokens + decode, ops, device, seed)
    warm_seconds = None
    if device.type == "cuda" and hasattr(ops, "warm"):
        told("warming", {})
        began = now(device)
        ops.warm(sizes.config, tokens + decode, chunk, [(1, 1)] if decode else [], PAGE_SIZE, sizes.dtype,
                 in_fp8(sizes), device)  # fmt: skip
        warm_seconds = now(device) - began
        told("warm", {"seconds": warm_seconds, "peak_bytes": peak("warm")})

    layers = subject.layers
    checker = Checker(layers, rows_to_check(tokens, chunk, check, seed))
    caches = [LayerCache(layer.config, tokens, sizes.dtype, device) for layer in layers]
    chunks = []
    for first in range(0, tokens, chunk):
        given = subject.given(first, min(first + chunk, tokens))
        positions = torch.arange(first, first + len(given), device=device)
        began = now(device)
        with unchecked_values():
            out = subject.forward(given, positions, caches, None)
        seconds = now(device) - began
        figures = {"first": first, "end": first + len(given), "ms": round(seconds * 1e3, 3)}
        chunks.append(figures | {"peak_bytes": peak("chunks")})
        told("chunk", chunks[-1])
        checker.check_chunk(subject, given, positions, caches, out)
        peak("checks")
        del given, out

    result = {
        "sizes": sizes.name, "layers": sizes.layers, "dtype": str(sizes.dtype).removeprefix("torch."),
        "ops": getattr(ops, "__name__", type(ops).__name__), "tokens": tokens, "chunk": chunk,
        "threads": torch.get_num_threads(), "needs": needs,
        "free": free, "cache_bytes": sum(part.nbytes for part in (caches[0].kv, caches[0].index_pages)) // tokens,
        "warm_seconds": warm_seconds, "chunks": chunks, "prefill_seconds": sum(part["ms"] for part in chunks) / 1e3,
    }  # fmt: skip
    result |= {"page_bytes": None, "decode": None}
    if decode:
        told("decoding", {})
        result |= _decode(subject, sizes, caches, decode, ops, checker)
        peak("decode")
    return result | {"checked": checker.summary(), "peak_bytes": peaks}


def now(device: torch.device) -> float:
    """Seconds, once all work so far is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _decode(subject, sizes, caches, decode, ops, checker) -> dict:
    """Decode from pages, into which the caches' rows go first. The new tokens are the subject's next ones, so that a
    step costs what it costs and nothing is drawn."""
    held, device = caches[0].length, caches[0].kv.device
    longest = held + decode
    table = PageTable(-(-longest // PAGE_SIZE), 1, longest, PAGE_SIZE, device)
    paged = [PagedCache(table, layer.config, sizes.dtype, in_fp8(sizes)) for layer in subject.layers]
    sequence = table.new()
    table.reserve(sequence, held)
    for into, cache in zip(paged, caches, strict=True):
        for first in range(0, held, PIECE):
            last = min(first + PIECE, held)
            into.write(table.slots(sequence, first, last), *(rows[first:last] for rows in cache.rows()))
    table.advance([sequence], held)
    caches.clear()  # what they hold lies in pages now
    del cache
    inputs = [subject.given(place, place + 1)[None] for place in range(held, longest)]
    captured = device.type == "cuda" and ops is not dsa_ref and hasattr(ops, "place_tokens")

    def eager(given: Tensor, record: list | None = None) -> Tensor:
        batch = table.batch([sequence], 1)
        out = subject.decode(given, paged, batch, record)
        table.advance([sequence], 1)
        return out

    step = eager
    if captured:
        step = CapturedStep(lambda given, batch: subject.decode(given, paged, batch), table, [sequence], inputs[0], ops)
    seconds = []
    for given in inputs:
        began = now(device)
        with unchecked_values():
            out = step(given)
        seconds.append(now(device) - began)
    table.truncate(sequence, longest - 1)
    checker.check_decode(eager, inputs[-1], out.clone(), paged, sequence)
    page_bytes = sum(pool.nbytes for pool in (paged[0].kv_pages, paged[0].index_pages)) // (table.pages * PAGE_SIZE)
    median = statistics.median(seconds) * 1e6
    figures = {"tokens": decode, "us_per_token": median, "captured": captured}
    return {"page_bytes": page_bytes, "decode": figures}


class Checker:
    """The rows that are checked, and the largest errors so far."""

    def __init__(self, layers, positions: list[int]) -> None:
        self.layers, self.positions = layers, positions
        self.twins = [written_out(layer) for layer in layers] if positions else []
        self.checked, self.errors = [], {}

    def check_chunk(self, subject, given: Tensor, positions: Tensor, caches, out: Tensor) -> None:
        """Run the chunk once more with a record, if it has rows to check, and check them."""
        first = caches[0].length - len(given)
        rows = [place for place in self.positions if first <= place < caches[0].length]
        if not rows:
            return
        for cache in caches:
            cache.truncate(first)
        record = []
        with inputs_and_outputs(self.layers) as seen, unchecked_values():
            again = subject.forward(given, positions, caches, record)
        for place in rows:
            t, rows_of_layers = place - first, []
            for own, step in zip(seen, record, strict=True):
                keys = (step[name][: place + 1] for name in ("kv", "k_idx", "k_scale"))
                vectors = step["q_idx"][t], step["w"][t], step["indices"][t]
                rows_of_layers.append(Row(place, own["x"][t], own["y"][t], *vectors, *keys))
            self._check(rows_of_layers, out[t], again[t])

    def check_decode(self, eager, given: Tensor, out: Tensor, paged, sequence: int) -> None:
        """Run the last decode step once more with a record, and check it."""
        if not self.twins:
            return
        record = []
        with inputs_and_outputs(self.layers) as seen:
            again = eager(given, record)
        place, rows = paged[0].table.length(sequence) - 1, []
        for own, step, cache in zip(seen, record, paged, strict=True):
            vectors = (step[name][0, 0] for name in ("q_idx", "w", "indices"))
            rows.append(Row(place, own["x"][0], own["y"][0], *vectors, *cache.rows(sequence)))
        self._check(rows, out, again)

    def summary(self) -> dict | None:
        """{"positions", "errors"}, or None where nothing was checked."""
        if not self.twins:
            return None
        return {"positions": self.checked, "errors": self.errors}

    def _check(self, rows: list[Row], timed: Tensor, again: Tensor) -> None:
        """Check one token's row in each layer, and that the timed output is the one of the run that was recorded: not
        to the bit, since the order of a list, and with it of a sum, may differ."""
        place = rows[0].position
        for i, (twin, row) in enumerate(zip(self.twins, rows, strict=True)):
            for name, error in errors_of_row(twin, row, f"position {place}, layer {i}").items():
                self.errors[name] = max(self.errors.get(name, 0.0), error)
        most, error = OUTPUT[rows[0].kv.dtype], relative_error(timed, again)
        if not error <= most:
            what = f"position {place}: the timed output is {error:.1e} off the recorded one, expected at most {most}"
            raise Failed(what, "two launches race, or one reads memory that nobody wrote", "repeatable")
        self.checked.append(place)
