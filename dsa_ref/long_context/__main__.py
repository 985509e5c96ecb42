"""Prefill a long context chunk by chunk, decode from it, and check some rows of it against the reference.

    python -m dsa_ref.long_context                            # the small model, 64K bytes of source, on a CPU
    python -m dsa_ref.long_context --sizes v32 --kernels      # V3.2's sizes, one layer, a million tokens, on a GPU

The command line of `read_long_context`: the table goes to stdout as it comes, progress to stderr.
"""

import argparse
import importlib
import sys
import time

import torch

from ..config import DSAConfig
from ..records import output_file, positive, provenance, write
from ..testing import Failed
from .memory import GIB
from .run import read_long_context

PROGRAM = "dsa_ref.long_context"
HEADS = ("position", "ms a chunk", "µs a token", "peak GiB")


def main(arguments: list[str] | None = None) -> None:
    """Run, print the table, and write the record; arguments as on the command line."""
    parser = argparse.ArgumentParser(prog=f"python -m {PROGRAM}", description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", choices=("small", "v32"), default="small",
                        help="the trained small model, or one layer of V3.2's sizes (default %(default)s)")  # fmt: skip
    parser.add_argument("--config", metavar="FILE", help="one layer of the sizes in a model's config.json instead")
    parser.add_argument("--tokens", type=positive, help="tokens to prefill (default 65536; one layer: 1048576)")
    parser.add_argument("--chunk", type=positive, help="tokens a call (default 1024; one layer: 4096)")
    parser.add_argument("--decode", type=int, default=32, metavar="N", help="tokens to decode (default %(default)s)")
    parser.add_argument("--check", type=int, default=2, metavar="ROWS",
                        help="rows to check at each power of two; 0: none (default %(default)s)")  # fmt: skip
    parser.add_argument("--kernels", action="store_const", dest="ops", const="dsa_kernels", default="dsa_ref",
                        help="run the steps of dsa_kernels, not of dsa_ref: for a GPU")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of weights, numbers and rows (default %(default)s)")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu",
                        help="where it runs, as torch names it (default %(default)s)")  # fmt: skip
    parser.add_argument("--log", type=output_file, help="where the record goes, as JSON")
    parser.add_argument("--progress", action="store_true", help="show progress though stderr is no terminal")
    options = parser.parse_args(arguments)
    try:
        torch.empty(0, device=options.device).cpu()  # "meta" has no numbers
    except (AssertionError, RuntimeError) as error:  # torch without CUDA asserts
        parser.error(f"--device must be one that torch can use here, got {options.device}: {error}")
    try:
        ops = importlib.import_module(options.ops)
    except ImportError as error:
        parser.error(f"--kernels needs a package that can be imported: {error}")
    sizes = options.sizes
    if options.config is not None:
        try:
            sizes = DSAConfig.from_hf(options.config)
        except (OSError, TypeError, ValueError) as error:
            parser.error(f"--config must be a config.json of DeepSeek-V3.2's or GLM-5's family: {error}")
    origin = provenance(PROGRAM, arguments, options.device)
    show = Show(options.progress or sys.stderr.isatty())
    try:
        result = read_long_context(
            sizes, options.tokens, options.chunk, ops, options.device,
            decode=options.decode, check=options.check, seed=options.seed, progress=show,
        )  # fmt: skip
    except (ValueError, TypeError) as error:
        show.clear()
        parser.error(str(error))
    except KeyboardInterrupt:
        show.clear()
        sys.exit(130)
    except Failed as failure:
        show.clear()
        sys.exit(f"{parser.prog}: wrong: {failure}")
    except (torch.OutOfMemoryError, MemoryError) as error:
        show.clear()
        sys.exit(f"{parser.prog}: error: memory ran out though enough was free at the start: {error}")
    show.end(result)
    if options.log:
        write(options.log, result | {"provenance": origin})


class Show:
    """What `read_long_context` tells, as it comes: a line of progress on stderr, the table on stdout.

    shows: whether there is a line of progress.
    """

    def __init__(self, shows: bool) -> None:
        self.shows, self.began, self.tokens, self.last = shows, time.perf_counter(), 0, None
        self.due = 1  # the position from which on the next chunk has a row

    def __call__(self, event: str, what: dict) -> None:
        if event == "needs":
            self.tokens = what["tokens"]
            free = "nobody says how many" if what["free"] is None else f"{what['free'] / GIB:.2f} GiB"
            parts = ", ".join(f"{name} {what[name] / GIB:.2f}" for name in ("weights", "cache", "pages", "working"))
            print(f"needs {what['total'] / GIB:.2f} GiB ({parts}); free: {free}", flush=True)
        elif event == "warming":
            self.bar("compiling all kernels that can be needed")
        elif event == "warm":
            self.clear()
            print(f"compiled in {what['seconds']:.1f} s", flush=True)
        elif event == "chunk":
            self.chunk(what)
        elif event == "decoding":
            self.bar("decoding")

    def chunk(self, what: dict) -> None:
        """A row of the table for the first chunk that reaches a power of two, and for the last."""
        if self.last is None:
            print("".join(f"{head:>12}" for head in HEADS), flush=True)
        self.last = what
        if what["end"] >= self.due or what["end"] == self.tokens:
            self.due = 1 << what["end"].bit_length()
            peak = "" if what["peak_bytes"] is None else f"{what['peak_bytes'] / GIB:.2f}"
            self.clear()
            each = 1e3 * what["ms"] / (what["end"] - what["first"])
            print(f"{what['end']:12,}{what['ms']:12.1f}{each:12.1f}{peak:>12}", flush=True)
        done = what["end"] / self.tokens
        passed = time.perf_counter() - self.began
        self.bar(f"[{'#' * int(30 * done):30}] {what['end']:,} of {self.tokens:,} tokens, {passed:.0f} s")

    def bar(self, text: str) -> None:
        """Overwrite the line of progress."""
        if self.shows:
            print(f"\r{text:78}", end="", file=sys.stderr, flush=True)

    def clear(self) -> None:
        """Make room for a line on stdout."""
        self.bar("")
        if self.shows:
            print("\r", end="", file=sys.stderr, flush=True)

    def end(self, result: dict) -> None:
        """What is known at the end."""
        self.clear()
        each = f"{result['tokens'] / result['prefill_seconds']:,.0f} tokens/s"
        print(f"prefill: {result['tokens']:,} tokens in {result['prefill_seconds']:.1f} s, {each}")
        print(f"cache: {result['cache_bytes']} bytes a token and layer, {result['layers']} layer(s)")
        if result["decode"] is not None:
            decode, how = result["decode"], "replayed from a CUDA graph" if result["decode"]["captured"] else "eager"
            print(f"decode: {decode['us_per_token']:,.0f} µs a token (median of {decode['tokens']}, {how}), "
                  f"{result['page_bytes']} bytes a token and layer in pages")  # fmt: skip
        checked = result["checked"]
        if checked is None:
            print("checked: nothing")
            return
        rows, (scores, output) = checked["positions"], (checked[f"{name}_error"] for name in ("scores", "output"))
        print(f"checked against the reference: {len(rows)} rows of each layer, from {rows[0]} to {rows[-1]:,}: selections "
              f"follow the contract, scores differ by {scores:.0e}, outputs by {output:.0e}")  # fmt: skip


if __name__ == "__main__":
    main()
