"""How many requests may be under way: found by trying, cut by the server's own word."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

FIRST_LIMIT: Final = 16.0
HIGHEST_LIMIT: Final = 512
CUT: Final = 0.7
USED_ENOUGH: Final = 0.8
DEFAULT_PAUSE_S: Final = 2.0
LONGEST_PAUSE_S: Final = 120.0


@dataclass
class AdaptiveLimit:
    """Additive increase, multiplicative decrease over the requests in flight.

    Doubles each round trip until the first refusal, then grows by one a round trip, and only while
    its slots are used. A burst of refusals is cut once. `fixed` holds it where the user wants it.
    """

    fixed: int | None = None
    clock: Callable[[], float] = time.monotonic
    in_flight: int = 0
    cuts: int = 0
    peak: int = 0
    _limit: float = field(init=False)
    _slow_start: bool = True
    _paused_until: float = 0.0
    _cut_at: float = -1.0

    def __post_init__(self) -> None:
        self._limit = float(self.fixed) if self.fixed else FIRST_LIMIT

    @property
    def limit(self) -> int:
        """Requests allowed in flight now."""
        return max(1, int(self._limit))

    def wait_s(self) -> float:
        """Seconds until a request may start: 0 now, else the rest of a pause; inf without a slot."""
        if self.in_flight >= self.limit:
            return float("inf")
        return max(0.0, self._paused_until - self.clock())

    def start(self) -> float:
        """Take a slot; returns the time, which `refused` wants back."""
        self.in_flight += 1
        self.peak = max(self.peak, self.in_flight)
        return self.clock()

    def succeeded(self) -> None:
        """A reply came: give the slot back, and grow if the slots were used."""
        used = self.in_flight >= USED_ENOUGH * self._limit
        self.in_flight -= 1
        if self.fixed is None and used:
            step = 1.0 if self._slow_start else 1.0 / self._limit
            self._limit = min(HIGHEST_LIMIT, self._limit + step)

    def refused(self, started: float, retry_after_s: float | None) -> None:
        """The server said too many: give the slot back, pause, and cut once for the whole burst."""
        self.in_flight -= 1
        self._pause(retry_after_s if retry_after_s is not None else DEFAULT_PAUSE_S)
        # Requests sent before the last cut tell nothing new.
        if self.fixed is None and started > self._cut_at:
            self._limit = max(1.0, self._limit * CUT)
            self._slow_start = False
            self._cut_at = self.clock()
            self.cuts += 1

    def troubled(self) -> None:
        """A timeout, a 5xx or a broken connection: give the slot back, and stop growing fast."""
        self.in_flight -= 1
        self._slow_start = False

    def _pause(self, seconds: float) -> None:
        until = self.clock() + min(seconds, LONGEST_PAUSE_S)
        self._paused_until = max(self._paused_until, until)
