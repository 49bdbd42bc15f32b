"""Tables of figures, as the terminal and the page both show them."""

from dataclasses import dataclass


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
