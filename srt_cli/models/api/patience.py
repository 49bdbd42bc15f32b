"""How long a server has admitted nothing: what is said of it meanwhile, and when to give up."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from srt_cli import console

SAY_AFTER_S: Final = 20.0
SAY_AGAIN_AFTER_S: Final = 60.0
PROBE_EVERY_S: Final = 2.0
LOADING: Final = ("loading", "warming", "starting", "not ready", "initializ")


@dataclass
class Patience:
    """Counts from the last reply of a server that now throttles everything, or is down.

    While it is down, sending pauses but for one request at a time, which finds out when it is back.
    """

    name: str
    give_up_after_s: float
    clock: Callable[[], float] = time.monotonic
    why: str = ""
    down: bool = False
    succeeded_at: float = float("-inf")
    """When the last request was served."""
    _since: float | None = None
    _say_at: float = 0.0
    _probe_at: float = 0.0
    _said: bool = False

    @property
    def never_up(self) -> bool:
        """Whether nobody has been there so far."""
        return self.down and self.succeeded_at == float("-inf")

    def admitted(self) -> None:
        """A request was answered, one way or another."""
        if self._said and self._since is not None:
            again = "" if self.never_up else " again"
            console.say(f"{self.name}: answers{again} after {self.clock() - self._since:.0f} s")
        self._since, self.down, self._said = None, False, False

    def succeeded(self) -> None:
        """A request was served."""
        self.admitted()
        self.succeeded_at = self.clock()

    def start_again(self) -> None:
        """Count from the next time that something is held up."""
        self._since = None

    def held_up(self, why: str, *, down: bool = False) -> None:
        """Nothing was admitted: throttled, or (`down`) nobody there who could."""
        now = self.clock()
        self.why = why
        if self._since is None:
            self._since, self._say_at = now, now + SAY_AFTER_S
        if down:
            if not self.down and not self._said:
                self._say_at = now  # at once, and only once until it lasts
            # Not in step with a server that starts again after each request of a certain row.
            self._probe_at = now + PROBE_EVERY_S * random.uniform(0.5, 1.5)
        self.down = down

    def wait_s(self, in_flight: int) -> float:
        """Seconds until something may be sent; inf while a request finds out whether it is back."""
        if not self.down:
            return 0.0
        return float("inf") if in_flight else max(0.0, self._probe_at - self.clock())

    def is_over(self) -> bool:
        """Whether to give up; says now and then how things stand."""
        if self._since is None:
            return False
        waited = self.clock() - self._since
        if waited >= self.give_up_after_s:
            return True
        if self.clock() >= self._say_at:
            self._say_at = self.clock() + SAY_AGAIN_AFTER_S
            self._said = True
            console.say(
                f"{self.name}: {self._state(waited)} ({self.why}); waiting, at most "
                f"{self.give_up_after_s:g} s (--give-up-after), Ctrl-C stops"
            )
        return False

    def _state(self, waited: float) -> str:
        if not self.never_up:
            return f"nothing admitted for {waited:.0f} s"
        return f"is not up after {waited:.0f} s" if waited >= 1 else "is not up yet"


def is_loading(status: int, said: str) -> bool:
    """Whether a server says that its model is not there yet."""
    return status == 503 and any(word in said.lower() for word in LOADING)
