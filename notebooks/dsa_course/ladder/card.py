"""Notebook 11's card: a GPU that exists as a clock only, so that a benchmark's faults show on a laptop, every time."""

import numpy as np

CALL_MS = 0.004  # what a launch costs the host
OVERWRITE_MS = 0.3  # what overwriting the cache takes on the card


class Card:
    """A kernel on a simulated card. `launch()` and `overwrite_cache()` only queue work and return; `wait()` waits.

    true_ms: a call's time when its inputs are not in the cache; warm_ms: when they are, because the call before left
    them there. compile_ms: the host's, at the first launch. odd: the share of calls that somebody disturbs (six times
    as long) and, as large again, of those that a lucky clock helps (half as long). `launches`: how many there were.
    """

    def __init__(self, true_ms, warm_ms=None, compile_ms=0.0, odd=0.0, seed=0):
        self._true, self._warm, self._compile = true_ms, true_ms if warm_ms is None else warm_ms, compile_ms
        self._odd, self._rng = odd, np.random.default_rng(seed)
        self._host = self._busy_until = 0.0
        self._cached = False
        self.launches = 0

    def __repr__(self):
        return "Card"

    def now(self) -> float:
        """The host's clock, ms."""
        return self._host

    def launch(self) -> None:
        """Queue the kernel. The first launch compiles it, and the host waits for that."""
        self._host += CALL_MS + (0.0 if self.launches else self._compile)
        self.launches += 1
        ms, chance = self._warm if self._cached else self._true, self._rng.random()
        self._queue(ms * (6.0 if chance < self._odd else 0.5 if chance < 2 * self._odd else 1.0))
        self._cached = True

    def overwrite_cache(self) -> None:
        """Queue a kernel that fills the cache with other bytes."""
        self._host += CALL_MS
        self._queue(OVERWRITE_MS)
        self._cached = False

    def wait(self) -> None:
        """Return when the card has done all that was queued."""
        self._host = max(self._host, self._busy_until)

    def _queue(self, ms):
        self._busy_until = max(self._host, self._busy_until) + ms
