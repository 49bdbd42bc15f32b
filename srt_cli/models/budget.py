"""What calls cost, and hard caps on it: what is in flight is reserved, so no cap is overshot."""

import re
import threading
import tomllib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from typing import Final

from srt_cli.errors import BudgetReached, UsageError
from srt_cli.models import Request, Spec
from srt_cli.records import Usage

MILLION: Final = 1_000_000
# What a chat template adds to a turn's own text, generously.
TOKENS_A_TURN: Final = 16
BYTES_A_TOKEN: Final = 4.0


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens."""

    input: float
    output: float
    cached: float | None = None

    def cost(self, usage: Usage) -> float:
        """Dollars for a usage; reasoning tokens are part of the completion."""
        cached = self.input if self.cached is None else self.cached
        fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
        read = fresh * self.input + usage.cached_tokens * cached
        return (read + usage.completion_tokens * self.output) / MILLION

    def of_batch(self) -> "Price":
        """The price of the same tokens through the Batch API."""
        share = float(_price_list()["batch_share"])  # type: ignore[arg-type]
        cached = None if self.cached is None else self.cached * share
        return Price(self.input * share, self.output * share, cached)


FREE: Final = Price(0.0, 0.0)


@lru_cache(maxsize=1)
def _price_list() -> Mapping[str, object]:
    return tomllib.loads(resources.files(__package__).joinpath("prices.toml").read_text())


def prices_published() -> str:
    """Whose prices the list holds, and from when."""
    return str(_price_list()["published"])


def parse_prices(given: Sequence[str]) -> dict[str, Price]:
    """`--price NAME=INPUT/OUTPUT[/CACHED]`, in dollars per million tokens; raises `UsageError`."""
    prices = {}
    for text in given:
        name, equals, figures = text.rpartition("=")
        try:
            numbers = [float(figure) for figure in figures.split("/")]
        except ValueError:
            numbers = []
        if not equals or not name or len(numbers) not in (2, 3) or min(numbers) < 0:
            raise UsageError(
                f"--price {text!r}: write NAME=INPUT/OUTPUT or NAME=INPUT/OUTPUT/CACHED, "
                "in dollars per million tokens, e.g. gpt-4=30/60."
            )
        prices[name] = Price(*numbers)
    return prices


def price_of(spec: Spec, given: Mapping[str, Price]) -> Price | None:
    """The price of a model: given, or from the list; what runs here is free; None when unknown."""
    if spec.name in given:
        return given[spec.name]
    if spec.kind in ("local", "program"):
        return FREE
    if spec.kind != "openai":
        return None
    listed = _price_list()["models"]
    assert isinstance(listed, dict)
    # A dated snapshot (gpt-4o-2024-08-06) costs what its model costs.
    undated = re.sub(r"-\d{4}-\d{2}-\d{2}$|-\d{4}$", "", spec.name)
    figures = listed.get(spec.name) or listed.get(undated)
    return None if figures is None else Price(**figures)


def most_tokens(request: Request) -> Usage:
    """An upper bound of what a request can use: a token is at least one byte."""
    written = sum(len(turn.content.encode()) + TOKENS_A_TURN for turn in request.messages)
    return Usage(prompt_tokens=written + TOKENS_A_TURN, completion_tokens=request.max_tokens)


def likely_prompt_tokens(request: Request) -> int:
    """A fair guess at a request's prompt tokens, where the model's tokenizer is not at hand."""
    written = sum(len(turn.content.encode()) for turn in request.messages)
    return round(written / BYTES_A_TOKEN) + 8 * len(request.messages)


@dataclass
class Budget:
    """Caps that all models of a run share; safe to use from their threads.

    A request reserves the most it can use before it goes out, and settles for what it used.
    """

    max_cost: float | None = None
    max_tokens: int | None = None
    max_requests: int | None = None
    in_flight: int = 0
    requests: int = 0
    tokens: int = 0
    cost: float = 0.0
    _reserved_tokens: int = 0
    _reserved_cost: float = 0.0
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _listeners: list[Callable[[], None]] = field(default_factory=list)

    @property
    def capped(self) -> bool:
        """Whether there is any cap."""
        return not (self.max_cost is self.max_tokens is self.max_requests is None)

    def listen(self, listener: Callable[[], None]) -> None:
        """Have a model told when a reservation is settled."""
        self._listeners.append(listener)

    def spent_before(self, price: Price | None, usage: Usage, calls: int) -> None:
        """Count what earlier runs of the same output have spent."""
        with self._lock:
            self.requests += calls
            self.tokens += usage.prompt_tokens + usage.completion_tokens
            self.cost += price.cost(usage) if price is not None else 0.0

    def reserve(self, price: Price | None, most: Usage) -> bool:
        """Set aside the most a request can use; false when a cap would be passed."""
        if not self.capped:
            return True
        tokens = most.prompt_tokens + most.completion_tokens
        cost = price.cost(most) if price is not None else 0.0
        with self._lock:
            if (
                (self.max_requests is not None and self.requests + 1 > self.max_requests)
                or _passes(self.tokens + self._reserved_tokens + tokens, self.max_tokens)
                or _passes(self.cost + self._reserved_cost + cost, self.max_cost)
            ):
                return False
            self.requests += 1
            self.in_flight += 1
            self._reserved_tokens += tokens
            self._reserved_cost += cost
            return True

    def settle(self, price: Price | None, most: Usage, used: Usage) -> None:
        """Give a reservation back and count what was used."""
        if not self.capped:
            return
        with self._lock:
            self.in_flight -= 1
            self._reserved_tokens -= most.prompt_tokens + most.completion_tokens
            self.tokens += used.prompt_tokens + used.completion_tokens
            if price is not None:
                self._reserved_cost -= price.cost(most)
                self.cost += price.cost(used)
        for listener in self._listeners:
            listener()

    def error(self, price: Price | None, most: Usage) -> BudgetReached:
        """Why a request that may use so much is not sent, and how to go on."""
        caps = []
        if self.max_cost is not None:
            caps.append(f"--max-cost {self.max_cost:g} (spent ${self.cost:.4f})")
        if self.max_tokens is not None:
            caps.append(f"--max-tokens-total {self.max_tokens} (used {self.tokens})")
        if self.max_requests is not None:
            caps.append(f"--max-requests {self.max_requests} (sent {self.requests})")
        tokens = most.prompt_tokens + most.completion_tokens
        dollars = f", ${price.cost(most):.4f}" if price is not None else ""
        return BudgetReached(
            f"the budget does not allow another request: {', '.join(caps)}; the next may take up to "
            f"{tokens} tokens{dollars}. What is answered is kept; run the same line with a higher "
            "cap to go on."
        )


def _passes(amount: float, cap: float | None) -> bool:
    return cap is not None and amount > cap
