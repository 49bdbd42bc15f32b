"""What calls cost, and hard caps on it: what is in flight is reserved, so no cap is overshot."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from importlib.metadata import version
from typing import Final

from srt_cli.errors import BudgetReached, UsageError
from srt_cli.models import Reply, Request, Spec
from srt_cli.models.api.providers import PLAIN, provider_at, providers
from srt_cli.records import Usage

MILLION: Final = 1_000_000
# What a chat template adds to a turn's own text, generously.
TOKENS_A_TURN: Final = 16
TOKEN_LIMITS: Final = ("max_tokens", "max_completion_tokens", "max_output_tokens")
"""What the limit of a reply is called in a request's body."""
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
    """For tokens that the server had in its cache."""
    cache_write: float | None = None
    """For tokens that it put there."""
    tiers: tuple[tuple[int, "Price"], ...] = ()
    """Prices of calls with more prompt tokens than so many; the least first."""

    def of_call(self, usage: Usage, cache_written: int = 0) -> float:
        """Dollars for one call: by the tier of its prompt, with what it wrote into the cache."""
        price = self
        for start, dearer in self.tiers:
            price = dearer if usage.prompt_tokens > start else price
        written = 0.0 if price.cache_write is None else price.cache_write - price.input
        return price.cost(usage) + cache_written * written / MILLION

    def cost(self, usage: Usage) -> float:
        """Dollars for a usage, of one call or many; reasoning tokens are part of the completion."""
        cached = self.input if self.cached is None else self.cached
        fresh = max(0, usage.prompt_tokens - usage.cached_tokens)
        read = fresh * self.input + usage.cached_tokens * cached
        return (read + usage.completion_tokens * self.output) / MILLION

    def of_batch(self) -> "Price":
        """The price of the same tokens through the Batch API."""

        def half(price: float | None) -> float | None:
            return None if price is None else price * BATCH_SHARE

        return Price(
            self.input * BATCH_SHARE,
            self.output * BATCH_SHARE,
            half(self.cached),
            half(self.cache_write),
            tuple((start, price.of_batch()) for start, price in self.tiers),
        )


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
        if not equals or not name or len(numbers) not in (2, 3) or not _are_prices(numbers):
            raise UsageError(
                f"--price {text!r}: write NAME=INPUT/OUTPUT or NAME=INPUT/OUTPUT/CACHED, "
                "in dollars per million tokens, e.g. gpt-4=30/60."
            )
        prices[name] = Price(numbers[0], numbers[1], numbers[2] if len(numbers) > 2 else None)
    return prices


def _are_prices(numbers: Sequence[float]) -> bool:
    return all(0 <= number < float("inf") for number in numbers)


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
    from genai_prices.types import TieredPrices

    def dollars(**tokens: int) -> float:
        return float(calc_price(ListedUsage(**tokens), name, provider_id=provider).total_price)

    def price_at(prompt: int) -> Price:
        """What a million tokens cost in calls with so many prompt tokens."""
        whole = dollars(input_tokens=prompt)
        read, written, cached, kept = (
            dollars_of / count * MILLION
            for dollars_of, count in (
                (whole, prompt),
                (dollars(input_tokens=prompt, output_tokens=PRICED) - whole, PRICED),
                (dollars(input_tokens=prompt, cache_read_tokens=prompt), prompt),
                (dollars(input_tokens=prompt, cache_write_tokens=prompt), prompt),
            )
        )
        figures = [round(figure, 9) for figure in (read, written, cached, kept)]
        others = [None if figure == figures[0] else figure for figure in figures[2:]]
        return Price(figures[0], figures[1], others[0], others[1])

    try:
        told = calc_price(ListedUsage(input_tokens=PRICED), name, provider_id=provider)
        tiered = [
            each for each in vars(told.model_price).values() if isinstance(each, TieredPrices)
        ]
        starts = sorted({tier.start for each in tiered for tier in each.tiers})
        return replace(price_at(PRICED), tiers=tuple((n, price_at(n + 1)) for n in starts))
    except LookupError:
        return None


def priced(reply: Reply, price: Price | None) -> Reply:
    """A reply with its cost, where its tokens alone would not tell it: a dear tier, a cache filled."""
    if price is None or reply.cost is not None:
        return reply
    dollars = price.of_call(reply.usage, reply.cache_written)
    return reply if dollars == price.cost(reply.usage) else replace(reply, cost=dollars)


def most_tokens(request: Request, body: Mapping[str, object] | None = None) -> Usage:
    """An upper bound of what a request can use: a token is at least one byte.

    Its `body` may allow the reply more: a least budget of thoughts, or a field of the user's own.
    """
    read = sum(len(turn.content.encode()) + TOKENS_A_TURN for turn in request.messages)
    allowed = [limit for name in TOKEN_LIMITS if type(limit := (body or {}).get(name)) is int]
    written = max(request.max_tokens, *allowed, 0)
    return Usage(prompt_tokens=read + TOKENS_A_TURN, completion_tokens=written)


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
        cost = price.of_call(most) if price is not None else 0.0
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
                self._reserved_cost -= price.of_call(most)
                self.cost += price.of_call(used) if cost is None else 0.0
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
        dollars = f", ${price.of_call(most):.4f}" if price is not None else ""
        return BudgetReached(
            f"the budget does not allow another request: {', '.join(caps)}; the next may take up to "
            f"{tokens} tokens{dollars}. What is answered is kept; run the same line with a higher "
            "cap to go on."
        )


def _passes(amount: float, cap: float | None) -> bool:
    return cap is not None and amount > cap
