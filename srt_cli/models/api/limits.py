"""How fast requests may go: found by trying, cut by the server's own word, or told by the user."""

import re
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from typing import Final

FIRST_LIMIT: Final = 16.0
HIGHEST_LIMIT: Final = 512
CUT: Final = 0.7
GROWTH: Final = 0.05
USED_ENOUGH: Final = 0.8
DEFAULT_PAUSE_S: Final = 2.0
LEAST_PAUSE_S: Final = 0.05
LONGEST_PAUSE_S: Final = 120.0

LEAST_REPLIES: Final = 8
LEAST_ROUND_S: Final = 0.25
MORE_IN_FLIGHT: Final = 1.3
GAIN: Final = 1.1
CEILING_HOLDS: Final = 10
TIMEOUT_CUT: Final = 0.5
LEAST_TO_TELL: Final = 3
LATEST: Final = 32
SLOW_SHARE: Final = 0.25

Clock = Callable[[], float]


@dataclass
class _Throughput:
    """Replies while all slots were used: how many, of how many tokens, in what time."""

    begun: float
    limit: float
    replies: int = 0
    tokens: int = 0
    seconds: float = 1.0

    def gains_on(self, other: "_Throughput") -> bool:
        """Whether more came a second, replies or tokens, than in a round with fewer in flight."""
        return (
            self.replies / self.seconds > GAIN * other.replies / other.seconds
            or self.tokens / self.seconds > GAIN * other.tokens / other.seconds
        )


@dataclass
class AdaptiveLimit:
    """Additive increase, multiplicative decrease over the requests in flight.

    Doubles each round trip until a first burst of refusals, then grows by a twentieth (at least by
    one) a round trip, and only while its slots are used. A burst is cut once. `fixed` holds it
    where the user wants it. A server that queues refuses nothing: no more are in flight than its
    latest replies show that it answers within half of the timeout; where a third more in flight
    brings no more replies, the limit goes back for some rounds; and timeouts halve it.
    """

    fixed: int | None = None
    clock: Clock = time.monotonic
    timeout_s: float = float("inf")
    in_flight: int = 0
    cuts: int = 0
    peak: int = 0
    _limit: float = field(init=False)
    _slow_start: bool = True
    _succeeded: bool = False
    _paused_until: float = 0.0
    _cut_at: float = float("-inf")
    _ceiling: float = HIGHEST_LIMIT
    _ceiling_holds: int = 0
    """Rounds until growing is tried again."""
    _round: _Throughput | None = None
    _best: _Throughput | None = None
    _latency: float = 0.0
    """Seconds that replies took lately."""
    _replied: deque[float] = field(default_factory=lambda: deque(maxlen=LATEST))
    """When the latest replies came while all slots were used, since the last cut."""

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

    def succeeded(self, started: float | None = None, tokens: int = 0) -> None:
        """A reply came: give the slot back, and grow if the slots were used."""
        self._succeeded = True
        used = self.in_flight >= USED_ENOUGH * self._limit
        self.in_flight -= 1
        if self.fixed is not None:
            return
        near_timeout = False
        if started is not None:
            took = self.clock() - started
            self._latency = took if not self._latency else 0.8 * self._latency + 0.2 * took
            near_timeout = took > self.timeout_s / 2
        if not used:
            self._round = None
            self._replied.clear()
            return
        self._replied.append(self.clock())
        bearable = self._served_in_time()
        if bearable < self._limit:
            self._limit, self._slow_start = max(1.0, bearable), False
        elif not near_timeout:
            step = 1.0 if self._slow_start else max(GROWTH, 1.0 / self._limit)
            most = min(self._ceiling, bearable, self._limit + step)
            self._limit = max(self._limit, most)
        self._measure(tokens)

    def _measure(self, tokens: int) -> None:
        """Hold a round against one with fewer in flight: where nothing is gained, they queue."""
        now, this = self.clock(), self._round
        if this is None:
            self._round = _Throughput(now, self._limit)
            return
        this.replies, this.tokens = this.replies + 1, this.tokens + tokens
        if this.replies < max(LEAST_REPLIES, this.limit):
            return
        self._round = None
        this.seconds = now - this.begun
        if this.seconds < LEAST_ROUND_S:
            return
        this.limit = (this.limit + self._limit) / 2
        best = self._best
        if self._ceiling_holds:
            self._ceiling_holds -= 1
            if not self._ceiling_holds:
                self._ceiling, best = HIGHEST_LIMIT, None
        if best is None or this.limit < best.limit or this.gains_on(best):
            self._best = this
        elif this.limit >= MORE_IN_FLIGHT * best.limit:
            self._hold_at(best.limit)

    def _hold_at(self, limit: float) -> None:
        self._ceiling, self._ceiling_holds = max(1.0, limit), CEILING_HOLDS
        self._limit = min(self._limit, self._ceiling)
        self._slow_start = False

    def timed_out(self, started: float) -> bool:
        """No reply in time: give the slot back; true when the request only stood in a queue.

        It did where others were served slowly too, or none since it was sent; then the limit is cut,
        once for all that were sent before.
        """
        others = self.in_flight > 1
        self.in_flight -= 1
        self._slow_start = False
        if self.fixed is not None or not self._succeeded:
            return False
        if started <= self._cut_at:
            return True
        if not others or self.limit == 1 or self._latency < SLOW_SHARE * self.timeout_s:
            return False
        self._cut_at = self.clock()
        self.cuts += 1
        self._round = self._best = None
        self._hold_at(min(self._limit * TIMEOUT_CUT, self._served_in_time()))
        self._replied.clear()
        return True

    def _served_in_time(self) -> float:
        """How many in flight are answered within half of the timeout, as fast as replies came.

        Little's law: those in flight are the replies a second, times the seconds that each waits.
        """
        if len(self._replied) < LEAST_TO_TELL:
            return float("inf")
        seconds = self._replied[-1] - self._replied[0]
        return (len(self._replied) - 1) / max(seconds, 1e-9) * self.timeout_s / 2

    def refused(self, started: float, retry_after_s: float | None) -> None:
        """The server said too many: give the slot back, and cut once for the whole burst.

        When requests sent after a cut are soon refused again, slowing down was not enough, and
        everything waits.
        """
        self.in_flight -= 1
        # Requests sent before the last cut tell nothing new.
        if started <= self._cut_at:
            return
        wait = retry_after_s if retry_after_s is not None else DEFAULT_PAUSE_S
        now = self.clock()
        if now - self._cut_at < wait:
            self._paused_until = now + min(wait, LONGEST_PAUSE_S)
        self._cut_at = now
        # Before the first replies, a refusal tells of the burst at the start, not of the level.
        self._slow_start = self._slow_start and not self._succeeded
        self.cuts += 1
        if self.fixed is None:
            self._limit = max(1.0, self._limit * CUT)

    def released(self) -> None:
        """A request was refused for itself alone: give the slot back."""
        self.in_flight -= 1

    def troubled(self) -> None:
        """A timeout, a 5xx or a broken connection: give the slot back, and stop growing fast."""
        self.in_flight -= 1
        self._slow_start = False


@dataclass
class Bucket:
    """So many units a minute, smoothed: servers enforce their limits over short windows too.

    What is taken may exceed what is there; the debt is waited for. `per_minute` None means no limit.
    """

    per_minute: float | None
    clock: Clock = time.monotonic
    burst_s: float = 1.0
    _level: float = 0.0
    _filled_at: float | None = None

    def wait_s(self) -> float:
        """Seconds until something may be taken."""
        if self.per_minute is None:
            return 0.0
        self._fill(self.per_minute / 60)
        return 0.0 if self._level > 0 else (1e-6 - self._level) * 60 / self.per_minute

    def take(self, amount: float) -> None:
        """Take units; a negative amount gives them back."""
        if self.per_minute is not None:
            self._level -= amount

    def _fill(self, per_second: float) -> None:
        now = self.clock()
        most = max(1.0, per_second * self.burst_s)
        if self._filled_at is None:
            self._level, self._filled_at = most, now
        self._level = min(most, self._level + (now - self._filled_at) * per_second)
        self._filled_at = now


MEASURED_OVER_S: Final = 3.0
LEAST_MEASURED_S: Final = 0.5
OUTCOMES_KEPT: Final = 100
LEAST_REFUSALS: Final = 6
REFUSED_SHARE_TO_CUT: Final = 0.15
REFUSED_SHARE_TO_SHRINK: Final = 0.025
QUIET_TO_GROW_S: Final = 0.4
BELOW_MEASURED: Final = 0.95
LEAST_OF_MEASURED: Final = 0.8
FIRST_GROWTH_A_SECOND: Final = 1.0
LEAST_GROWTH_A_SECOND: Final = 0.01
SHRINKAGE_A_SECOND: Final = 0.05
LEAST_PER_S: Final = 0.2


@dataclass
class Pace:
    """Requests a second that the server has shown to admit; unknown until it refuses in earnest.

    A single refusal is that request's own affair. When more than 15 % of the last requests are
    refused, the pace is set a little under what was admitted lately; from there it grows while
    nothing is refused, shrinks gently while a few are, and the growth halves at each turn. So a
    server that limits by the minute is neither stormed nor left idle, without sending a header.
    """

    clock: Clock = time.monotonic
    per_second: float | None = None
    _begun: float | None = None
    _starts: deque[float] = field(default_factory=deque)
    _refusals: deque[float] = field(default_factory=deque)
    _outcomes: deque[bool] = field(default_factory=lambda: deque(maxlen=OUTCOMES_KEPT))
    _bucket: Bucket = field(init=False)
    _cut_at: float = float("-inf")
    _changed_at: float = 0.0
    _growth: float = FIRST_GROWTH_A_SECOND
    _growing: bool = True
    _least: float = LEAST_PER_S

    def __post_init__(self) -> None:
        self._bucket = Bucket(None, self.clock, burst_s=0.02)

    def wait_s(self) -> float:
        """Seconds until the next request is due."""
        if self.per_second is None:
            return 0.0
        now = self.clock()
        passed, self._changed_at = now - self._changed_at, now
        quiet_since = max(self._cut_at, self._refusals[-1] if self._refusals else self._cut_at)
        if self._refused_share() > REFUSED_SHARE_TO_SHRINK:
            if self._growing:
                self._turn()
            shrunk = self.per_second * (1 - SHRINKAGE_A_SECOND) ** passed
            self.per_second = max(min(self.per_second, self._least), shrunk)
        elif now - quiet_since > QUIET_TO_GROW_S:
            self._growing = True
            self.per_second *= (1 + self._growth) ** passed
        self._bucket.per_minute = 60 * self.per_second
        return self._bucket.wait_s()

    def start(self) -> None:
        """A request goes out."""
        now = self.clock()
        if self._begun is None:
            self._begun = now
        self._starts.append(now)
        for times in (self._starts, self._refusals):
            while times and times[0] < now - MEASURED_OVER_S:
                times.popleft()
        self._bucket.take(1)

    def succeeded(self) -> None:
        """A reply came."""
        self._outcomes.append(True)

    def refused(self, started: float) -> bool:
        """A request was refused; true when that makes too many, and the pace was cut."""
        now = self.clock()
        self._refusals.append(now)
        # Requests sent before the last cut tell nothing new.
        if started <= self._cut_at:
            return False
        self._outcomes.append(False)
        refusals = self._outcomes.count(False)
        if refusals < LEAST_REFUSALS or self._refused_share() <= REFUSED_SHARE_TO_CUT:
            return False
        measured_over = min(MEASURED_OVER_S, now - (self._begun or 0.0))
        if measured_over >= LEAST_MEASURED_S:
            admitted = max(0, len(self._starts) - len(self._refusals)) / measured_over
            known = self.per_second if self.per_second is not None else float("inf")
            self.per_second = max(LEAST_PER_S, BELOW_MEASURED * min(admitted, known))
            self._least = LEAST_OF_MEASURED * self.per_second
            if self._growing and known != float("inf"):
                self._turn()
        self._cut_at = self._changed_at = now
        # The next cut wants new evidence.
        self._outcomes.clear()
        return True

    def _turn(self) -> None:
        self._growing = False
        self._growth = max(LEAST_GROWTH_A_SECOND, self._growth / 2)

    def _refused_share(self) -> float:
        return self._outcomes.count(False) / max(20, len(self._outcomes))


HIGHEST_PER_MINUTE: Final = 1e9
RATE_HEADERS: Final = (
    ("requests", "x-ratelimit-{}-requests"),
    ("tokens", "x-ratelimit-{}-tokens"),
    ("requests", "anthropic-ratelimit-requests-{}"),
    ("tokens", "anthropic-ratelimit-tokens-{}"),
    ("input", "anthropic-ratelimit-input-tokens-{}"),
    ("output", "anthropic-ratelimit-output-tokens-{}"),
)
"""What is limited, and the names of its headers: `limit`, `remaining`, `reset`."""
_WHOLE_NUMBER: Final = re.compile(r"[0-9]{1,12}(\.0*)?")


@dataclass
class RateLimit:
    """Requests and tokens a minute: the user's figures, else what the server's headers say."""

    requests: Bucket
    tokens: Bucket
    told_requests: bool
    told_tokens: bool
    clock: Clock = time.monotonic
    _paused_until: float = 0.0

    @classmethod
    def of(cls, rpm: float | None, tpm: float | None, clock: Clock = time.monotonic) -> "RateLimit":
        """Limits as the user gives them; None leaves them to the headers."""
        return cls(Bucket(rpm, clock), Bucket(tpm, clock), rpm is not None, tpm is not None, clock)

    def wait_s(self) -> float:
        """Seconds until a request may go."""
        pause = max(0.0, self._paused_until - self.clock())
        return max(pause, self.requests.wait_s(), self.tokens.wait_s())

    def start(self, tokens: float) -> None:
        """A request goes out that will take about so many tokens."""
        self.requests.take(1)
        self.tokens.take(tokens)

    def settle(self, expected_tokens: float, tokens: float) -> None:
        """A request took another number of tokens than was expected."""
        self.tokens.take(tokens - expected_tokens)

    def learn(self, headers: Mapping[str, str]) -> None:
        """Take over limits from headers, and wait when nothing remains.

        OpenAI's `x-ratelimit-limit-requests` and Anthropic's `anthropic-ratelimit-requests-limit`; what
        cannot be a limit is not believed.
        """
        for kind, names in RATE_HEADERS:
            limit = _number(headers.get(names.format("limit")))
            if limit is not None and 1 <= limit <= HIGHEST_PER_MINUTE:
                if kind == "requests" and not self.told_requests:
                    self.requests.per_minute = limit
                elif kind == "tokens" and not self.told_tokens:
                    self.tokens.per_minute = limit
            if _number(headers.get(names.format("remaining"))) == 0:
                told = headers.get(names.format("reset")) or ""
                reset = parse_duration_s(told)
                if (reset := until_date_s(told) if reset is None else reset) is not None:
                    until = self.clock() + min(reset, LONGEST_PAUSE_S)
                    self._paused_until = max(self._paused_until, until)

    def describe(self) -> dict[str, float | None]:
        """Limits a minute as they stood at the end."""
        return {"rpm": self.requests.per_minute, "tpm": self.tokens.per_minute}


def parse_duration_s(text: str) -> float | None:
    """Seconds of a reset header: `1s`, `6m0s`, `12ms`, or a bare number; None for anything else."""
    units = {"ms": 0.001, "s": 1.0, "m": 60.0, "h": 3600.0}
    parts = re.findall(r"([0-9]{1,12}(?:\.[0-9]{1,12})?)(ms|s|m|h)?", text)
    if not parts or "".join(number + unit for number, unit in parts) != text.strip():
        return None
    return sum(float(number) * units[unit or "s"] for number, unit in parts)


def until_date_s(text: str) -> float | None:
    """Seconds until a date, as HTTP or ISO 8601 writes it; 0 for one that is past, None for no date."""
    for read in (parsedate_to_datetime, datetime.fromisoformat):
        try:
            date = read(text)
            zoned = date if date.tzinfo is not None else date.replace(tzinfo=UTC)
            return max(0.0, (zoned - datetime.now(UTC)).total_seconds())
        except (ValueError, OverflowError):
            continue
    return None


def _number(text: str | None) -> float | None:
    """A whole number of something; None for anything else."""
    return float(text) if text is not None and _WHOLE_NUMBER.fullmatch(text.strip()) else None
