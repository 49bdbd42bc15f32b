"""Tables of figures, as the terminal and the page both show them."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from srt_cli.stats.rates import Estimate


@dataclass(frozen=True)
class Table:
    """A table for the terminal and the report."""

    title: str
    columns: list[str]
    cells: list[list[str]]


def figures_as_rows(
    title: str, names: Sequence[str], rows: Sequence[tuple[str, Sequence[str]]]
) -> Table:
    """A table of a few things with many figures: a column each, so that it fits a terminal."""
    short = short_names(names)
    columns = ["", *(shorten(short[name], 18) for name in names)]
    return Table(title, columns, [[label, *cells] for label, cells in rows])


def shorten(name: str, longest: int = 22) -> str:
    """A name cut in its middle, where the least is told."""
    if len(name) <= longest:
        return name
    kept = longest - 1
    return name[: kept - kept // 3] + "…" + name[-(kept // 3) :]


def short_names(specs: Sequence[str]) -> dict[str, str]:
    """A file's stem, a directory's last two parts, a server's model; whole where two would agree."""

    def short(contestant: str) -> str:
        if contestant.startswith(("http://", "https://")):
            return contestant.rpartition("#")[2]
        path = Path(contestant)
        if not path.exists():
            return contestant
        return path.stem if path.suffix else "/".join(path.parts[-2:])

    names = {contestant: short(contestant) for contestant in specs}
    often = Counter(names.values())
    return {full: name if often[name] == 1 else full for full, name in names.items()}


def share(estimate: "Estimate | None") -> str:
    """A share in whole per cent; a dash where there is none."""
    return "-" if estimate is None else f"{estimate.value:.0%}"


def share_with_interval(estimate: "Estimate | None") -> str:
    """A share in whole per cent with its 95 % interval: 71% [59, 80]."""
    if estimate is None:
        return "-"
    return f"{share(estimate)} [{100 * estimate.low:.0f}, {100 * estimate.high:.0f}]"


def share_with_error(estimate: "Estimate | None", sign: str = "") -> str:
    """A share in per cent with its standard error, where it has one: 62.1 ± 3.4."""
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" ± {100 * estimate.standard_error:.1f}"
    return f"{100 * estimate.value:{sign}.1f}{error}"


def score_with_error(estimate: "Estimate | None", sign: str = "") -> str:
    """A score, or a difference of scores, with its standard error: 7.21 ± 0.12."""
    if estimate is None:
        return "-"
    error = "" if estimate.standard_error is None else f" ± {estimate.standard_error:.2f}"
    return f"{estimate.value:{sign}.2f}{error}"


def figure_with_interval(estimate: "Estimate | None") -> str:
    """A figure between -1 and 1 with its 95 % interval: 0.71 [0.59, 0.80]."""
    if estimate is None:
        return "-"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def p_value(p: float) -> str:
    """A p value with three digits, as far as they tell something."""
    return f"{p:.3f}" if p >= 0.001 else "< 0.001"
