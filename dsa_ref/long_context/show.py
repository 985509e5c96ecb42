"""A long context's figures as they come: a line of progress on stderr, the table on stdout."""

import sys
import time

from .memory import GIB, as_text

HEADS = ("position", "ms a chunk", "µs a token", "peak GiB")


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
            print(f"needs {as_text(what)}; free: {free}", flush=True)
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
        if result["peak_bytes"]:
            parts = ", ".join(f"{most / GIB:.2f} ({phase})" for phase, most in result["peak_bytes"].items())
            print(f"peak memory in GiB: {parts}")
        print(f"cache: {result['cache_bytes']} bytes a token and layer, {result['layers']} layer(s)")
        if result["decode"] is not None:
            decode, how = result["decode"], "replayed from a CUDA graph" if result["decode"]["captured"] else "eager"
            print(f"decode: {decode['us_per_token']:,.0f} µs a token (median of {decode['tokens']}, {how}), "
                  f"{result['page_bytes']} bytes a token and layer in pages")  # fmt: skip
        checked = result["checked"]
        if checked is None:
            print("checked: nothing")
            return
        rows = checked["positions"]
        print(f"checked against the reference: {len(rows)} rows of each layer, from {rows[0]} to {rows[-1]:,}; "
              "selections follow their contract, and relative errors are at most "
              + ", ".join(f"{most:.0e} ({name})" for name, most in checked["errors"].items()))  # fmt: skip
