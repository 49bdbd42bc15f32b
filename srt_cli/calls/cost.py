"""What calls will cost and have cost: tokens, dollars, and time at the known limits."""

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from srt_cli import console
from srt_cli.calls.options import ApiOptions
from srt_cli.models import Model, parse_spec
from srt_cli.models.budget import (
    BYTES_A_TOKEN,
    FREE,
    Budget,
    Price,
    parse_prices,
    price_of,
    prices_published,
)
from srt_cli.records import Usage
from srt_cli.runs.journal import Journal

# Lengths of replies before any has been seen, in tokens; the run's own limits cap them.
EXPECTED_TOKENS: Final = {
    "respond": 250, "critique": 450, "refine": 300, "score": 180, "contrast": 250, "judge": 150,
}  # fmt: skip
LOW_SHARE: Final = 0.5


@dataclass
class Cost:
    """Tokens and dollars of an output's calls, over all its runs."""

    journal: Journal
    options: ApiOptions
    budget: Budget
    prices: dict[str, tuple[str, Price | None]] = field(default_factory=dict)
    """Model identity -> (spec, price)."""
    paid_before: dict[str, Counter[str]] = field(default_factory=dict)
    told_before: dict[str, Counter[str]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.paid_before = {name: Counter(spent) for name, spent in self.journal.spent.items()}
        self.told_before = {name: Counter(told) for name, told in self.journal.told.items()}

    def watch(self, model: Model) -> None:
        """Count a model's calls; what earlier runs of this output spent counts against the caps."""
        if model.identity in self.prices:
            return
        self.prices |= prices_of([model], self.options)
        _, price = self.prices[model.identity]
        spent = self.journal.spent.get(model.identity, Counter())
        dollars = self._dollars_of(model.identity, price) or 0.0
        self.budget.spent_before(dollars, usage_of(spent), spent["calls"])

    def usage(self, identity: str) -> Usage:
        """Tokens of one model, every run counted."""
        return usage_of(self.journal.spent.get(identity, Counter()))

    def dollars(self, *, this_run: bool = False) -> float | None:
        """Dollars spent; None when a model's price is not known although it was asked."""
        total = 0.0
        for identity, (_, price) in self.prices.items():
            dollars = self._dollars_of(identity, price, this_run=this_run)
            if dollars is None:
                return None
            total += dollars
        return total

    def _dollars_of(
        self, identity: str, price: Price | None, *, this_run: bool = False
    ) -> float | None:
        """What a model's calls cost: by its server's word where that was given, else by its price."""
        spent = Counter(self.journal.spent.get(identity, {}))
        told = Counter(self.journal.told.get(identity, {}))
        if this_run:
            spent.subtract(self.paid_before.get(identity, {}))
            told.subtract(self.told_before.get(identity, {}))
        dollars = float(told["dollars"])
        spent.subtract(told)
        if price is None:
            return None if spent["calls"] else dollars
        return dollars + price.cost(usage_of(spent))

    @property
    def _all_free(self) -> bool:
        return all(price == FREE for _, price in self.prices.values())

    def note(self) -> str:
        """The short form for the progress line."""
        dollars = self.dollars()
        return "" if self._all_free or dollars is None else f"${dollars:.2f}"

    def sentence(self) -> str:
        """Tokens and dollars for the end of a run."""
        usages = [self.usage(identity) for identity in self.prices]
        total = sum(usages, Usage())
        cached = total.cached_tokens / total.prompt_tokens if total.prompt_tokens else 0.0
        spent = [self.journal.spent.get(identity, Counter()) for identity in self.prices]
        about = "about " if any(each["estimated"] for each in spent) else ""
        text = f"tokens: {about}{total.prompt_tokens} read"
        text += f" ({cached:.0%} from the server's cache)" if total.cached_tokens else ""
        text += f", {total.completion_tokens} written"
        if total.reasoning_tokens:
            text += f" ({total.reasoning_tokens} of them reasoning)"
        if self._all_free:
            return text
        dollars, now = self.dollars(), self.dollars(this_run=True)
        if dollars is None or now is None:
            unknown = [spec for spec, price in self.prices.values() if price is None]
            return f"{text}; cost: unknown (no price for {', '.join(unknown)}; give --price)"
        return f"{text}; cost: ${dollars:.4f}, of which ${now:.4f} in this run"

    def describe(self) -> dict[str, Any]:
        """The manifest's form."""
        models = {}
        for identity, (spec, price) in self.prices.items():
            usage = self.usage(identity)
            models[spec if spec not in models else identity] = {
                "calls": self.journal.spent.get(identity, Counter())["calls"],
                "usage": usage.model_dump(),
                "dollars": self._dollars_of(identity, price),
            }
        return {
            "dollars": self.dollars(),
            "dollars_this_run": self.dollars(this_run=True),
            "prices": prices_published(),
            "models": models,
        }


def usage_of(spent: Counter[str]) -> Usage:
    """Counted tokens as a usage."""
    return Usage(**{name: spent[name] for name in Usage.model_fields})


def prices_of(models: Sequence[Model], options: ApiOptions) -> dict[str, tuple[str, Price | None]]:
    """The price of each model, by its identity in the journal."""
    given = parse_prices(options.price)
    prices = {}
    for model in models:
        price = price_of(parse_spec(model.spec), given)
        batched = options.batch and price is not None and price != FREE
        prices[model.identity] = (model.spec, price.of_batch() if batched and price else price)
    return prices


@dataclass
class Owed:
    """Calls that one model still owes, and the tokens they may take."""

    calls: int = 0
    read: float = 0.0
    low: float = 0.0
    expected: float = 0.0
    high: float = 0.0

    def add(self, kind: str, read: float, most: int) -> None:
        """One more call: its prompt's tokens, and the most it may write."""
        expected = min(most, EXPECTED_TOKENS.get(kind, most))
        self.calls += 1
        self.read += read
        self.low += LOW_SHARE * expected
        self.expected += expected
        self.high += most

    def dollars(self, price: Price | None, written: float) -> str:
        """The cost in words; `unknown` without a price, never $0."""
        if price is None:
            return "unknown"
        if price == FREE:
            return "free"
        usage = Usage(prompt_tokens=round(self.read), completion_tokens=round(written))
        return f"${price.cost(usage):.2f}"


def _short(tokens: float) -> str:
    """A number of tokens in few characters."""
    for size, unit in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if tokens >= size:
            return f"{tokens / size:.3g}{unit}"
    return f"{tokens:.0f}"


@contextmanager
def open_replies(journal_path: Path) -> Iterator[Callable[[bytes], dict[str, Any] | None]]:
    """Look up replies in a journal for a plan, without creating one that is missing."""
    if not journal_path.exists():
        yield lambda key: None
        return
    with Journal(journal_path) as journal:
        yield journal.get


def show_estimates(
    estimates: Mapping[str, Owed],
    prices: Mapping[str, tuple[str, Price | None]],
    options: ApiOptions,
) -> None:
    """Print what is owed, model by model, and the time it takes at the limits that are known."""
    rows = []
    for identity, estimate in estimates.items():
        spec, price = prices[identity]
        if not estimate.calls:
            continue
        batch = price if options.batch or price in (None, FREE) else price and price.of_batch()
        rows.append(
            [
                Path(parse_spec(spec).name).name,
                str(estimate.calls),
                _short(estimate.read),
                "/".join(map(_short, (estimate.low, estimate.expected, estimate.high))),
                estimate.dollars(price, estimate.low),
                estimate.dollars(price, estimate.expected),
                estimate.dollars(price, estimate.high),
                estimate.dollars(batch, estimate.expected),
            ]
        )
    if not rows:
        console.result("nothing is owed")
        return
    columns = ("", "calls", "read", "written", "low", "expected", "high", "batch")
    console.table("owed: calls, tokens (written: low/expected/high), dollars", columns, rows)
    calls = sum(estimate.calls for estimate in estimates.values())
    tokens = sum(estimate.read + estimate.expected for estimate in estimates.values())
    times = []
    if options.rpm:
        times.append((calls / options.rpm, f"--rpm {options.rpm:g}"))
    if options.tpm:
        times.append((tokens / options.tpm, f"--tpm {options.tpm:g}"))
    if times:
        minutes, limit = max(times)
        console.result(f"time: at least {minutes:.0f} min ({limit})")
    else:
        console.result("time: not known without --rpm or --tpm")
    console.result(
        f"Tokens are guessed at {BYTES_A_TOKEN:g} bytes each, replies from usual lengths. "
        f"Prices: {prices_published()}. Nothing was sent or written."
    )
