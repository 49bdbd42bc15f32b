"""Tables of figures, as the terminal and the page both show them."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srt_cli.stats.rates import Estimate


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the report."""

    title: str
    columns: list[str]
    cells: list[list[str]]


def shorten(name: str, longest: int = 22) -> str:
    """A name cut in its middle, where the least is told."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return name[: kept - kept // 3] + "…" + name[-(kept // 3) :]


def share(estimate: "Estimate | None") -> str:
    """A share in whole per cent; a dash where there is none."""
    return "-" if estimate is None else f"{estimate.value:.0%}"


def share_with_interval(estimate: "Estimate | None") -> str:
    """A share in whole per cent with its 95 % interval: 71% [59, 80]."""
    if estimate is None:
        return "-"
    return f"{share(estimate)} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"
