"""What calls cost, and hard caps on it: what is in flight is reserved, so no cap is overshot."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib.metadata import version
from typing import Final

from srt_cli.errors import BudgetReached, UsageError
from srt_cli.models import Request, Spec
from srt_cli.models.api.providers import PLAIN, provider_at, providers
from srt_cli.records import Usage

MILLION: Final = 1_000_000
# What a chat template adds to a turn's own text, generously.
TOKENS_A_TURN: Final = 16
BYTES_A_TOKEN: Final = 4.0
BATCH_SHARE: Final = 0.5
"""Of the price, through the batches of OpenAI and Anthropic."""
PRICED: Final = 1000
# What a server says of its tokens is believed up to here: it may put words of its own before ours.
BELIEVED_TIMES: Final = 4
BELIEVED_BESIDES: Final = 100_000


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
        cached = None if self.cached is None else self.cached * BATCH_SHARE
        return Price(self.input * BATCH_SHARE, self.output * BATCH_SHARE, cached)


FREE: Final = Price(0.0, 0.0)


def prices_published() -> str:
    """Whose list of prices it is; its version says from when."""
    return f"genai-prices {version('genai-prices')}"


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
    if not spec.is_remote:
        return FREE
    if spec.provider is not None:
        provider = providers()[spec.provider]
    else:
        provider = provider_at(spec.endpoints[0]) or PLAIN
    if provider.free:
        return FREE
    return None if provider.prices is None else _listed_price(provider.prices, spec.name)


@lru_cache(maxsize=64)
def _listed_price(provider: str, name: str) -> Price | None:
    # Its data are a megabyte and a half of Python, which only calls that cost something need.
    from genai_prices import Usage as ListedUsage
    from genai_prices import calc_price

    def dollars_a_million(**tokens: int) -> float:
        # A thousand tokens are priced: some models cost more a token in longer prompts.
        price = calc_price(ListedUsage(**tokens), name, provider_id=provider).total_price
        return float(price * (MILLION // PRICED))

    try:
        read = dollars_a_million(input_tokens=PRICED)
        written = dollars_a_million(output_tokens=PRICED)
        cached = dollars_a_million(input_tokens=PRICED, cache_read_tokens=PRICED)
    except LookupError:
        return None
    return Price(read, written, None if cached == read else cached)


def most_tokens(request: Request) -> Usage:
    """An upper bound of what a request can use: a token is at least one byte."""
    written = sum(len(turn.content.encode()) + TOKENS_A_TURN for turn in request.messages)
    return Usage(prompt_tokens=written + TOKENS_A_TURN, completion_tokens=request.max_tokens)


def likely_prompt_tokens(request: Request) -> int:
    """A fair guess at a request's prompt tokens, where the model's tokenizer is not at hand."""
    written = sum(len(turn.content.encode()) for turn in request.messages)
    return round(written / BYTES_A_TOKEN) + 8 * len(request.messages)


def estimated_usage(request: Request, written: str) -> Usage:
    """What a reply likely used, where its server does not tell: four bytes a token."""
    completion = round(len(written.encode(errors="replace")) / BYTES_A_TOKEN)
    return Usage(prompt_tokens=likely_prompt_tokens(request), completion_tokens=completion)


def is_believable(usage: Usage, request: Request) -> bool:
    """Whether a server's count can be true: no less than nothing, and in proportion to the request."""
    most = most_tokens(request)
    counts = (usage.prompt_tokens, usage.completion_tokens)
    limits = (most.prompt_tokens, most.completion_tokens)
    details = (usage.cached_tokens, usage.reasoning_tokens)
    return usage.prompt_tokens > 0 and all(
        0 <= detail <= count <= BELIEVED_TIMES * limit + BELIEVED_BESIDES
        for count, limit, detail in zip(counts, limits, details, strict=True)
    )


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

    def spent_before(self, dollars: float, usage: Usage, calls: int) -> None:
        """Count what earlier runs of the same output have spent."""
        with self._lock:
            self.requests += calls
            self.tokens += usage.prompt_tokens + usage.completion_tokens
            self.cost += dollars

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

    def settle(
        self, price: Price | None, most: Usage, used: Usage, cost: float | None = None
    ) -> None:
        """Give a reservation back and count what was used; a `cost` that the server told counts."""
        if not self.capped:
            return
        with self._lock:
            self.in_flight -= 1
            self._reserved_tokens -= most.prompt_tokens + most.completion_tokens
            self.tokens += used.prompt_tokens + used.completion_tokens
            if price is not None:
                self._reserved_cost -= price.cost(most)
                self.cost += price.cost(used) if cost is None else 0.0
            self.cost += cost or 0.0
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
