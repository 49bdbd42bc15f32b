"""The only module that prints: results to stdout, talk to stderr.

Model text may hold anything, so everything printed is plain text, never markup.
"""

import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import MappingProxyType
from typing import Final, Protocol

from rich.box import SIMPLE_HEAD
from rich.columns import Columns
from rich.console import Console, RenderableType
from rich.padding import Padding
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table as Grid
from rich.text import Text

from srt_cli.tables import Table

PLAIN_LINE_EVERY_S: Final = 15.0

_talk = Console(stderr=True, highlight=False)
_result = Console(highlight=False)


def hush() -> None:
    """Print nothing from here on: another process of this run speaks."""
    _talk.quiet = _result.quiet = True


def speak() -> None:
    """Print again."""
    _talk.quiet = _result.quiet = False


def say(message: str) -> None:
    """A line of talk."""
    _talk.print(Text(message), soft_wrap=True)


def warn(message: str) -> None:
    """Something the user should look at."""
    _talk.print(Text("warning: ", style="yellow") + Text(message), soft_wrap=True)


def fail(message: str) -> None:
    """Why the command stops."""
    _talk.print(Text("error: ", style="bold red") + Text(message), soft_wrap=True)


def result(message: str) -> None:
    """The command's result."""
    _result.print(Text(message), soft_wrap=True)


def finish(where: str, then: str | None = None) -> None:
    """The closing line of a command: where the result is, and the next command."""
    line = Text(where, style="bold")
    _result.print(line + Text(f"   next: {then}") if then else line, soft_wrap=True)


def table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], things: int = 0
) -> None:
    """A result as a table; what the columns mean is told in `tables.Table`."""
    _print_table(_result, Table(title, list(columns), [list(row) for row in rows], things))


def talk_table(title: str, columns: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table that is talk, not the command's result."""
    _print_table(_talk, Table(title, list(columns), [list(row) for row in rows]))


def marked(title: str, stretches: Sequence[tuple[str, str]]) -> None:
    """A result as running text: of each stretch, text and label; what has no label stands back.

    A labelled stretch is coloured and stands between brackets, so that it shows without colour too.
    """
    text = Text()
    for content, label in stretches:
        if label:
            text.append(f"⟦{label}: ", style="bold green")
            text.append(content, style="green")
            text.append("⟧", style="bold green")
        else:
            text.append(content, style="dim")
    _result.print(Text(title, style="bold"))
    _result.print(text, soft_wrap=True)
    _result.print()


def _print_table(console: Console, shown: Table) -> None:
    for part in shown.fitted(console.width):
        grid = Grid(
            title=Text(part.title), title_justify="left", title_style="bold", box=SIMPLE_HEAD,
            pad_edge=False,
        )  # fmt: skip
        for place, column in enumerate(part.columns):
            grid.add_column(Text(column), justify="left" if place < part.names else "right")
        for row in part.cells:
            grid.add_row(*(Text(cell) for cell in row))
        console.print(grid)


class ProgressLine(Protocol):
    """A running count of finished work."""

    def advance(
        self, steps: int = 1, note: str = "", figures: Mapping[str, str] | None = None
    ) -> None:
        """`steps` more are done; `note` is shown beside the count (failures, cost).

        `figures` (loss, tokens/s) stand below it on a terminal, each under its name; a figure keeps
        its last value until it has another.
        """
        ...

    def expect(self, total: int) -> None:
        """The whole is known only now."""
        ...


@contextmanager
def progress(label: str, total: int | None) -> Iterator[ProgressLine]:
    """Show progress: a bar with rate and time left on a terminal, plain lines elsewhere."""
    if not _talk.is_terminal:
        plain = _PlainProgress(label, total)
        yield plain
        plain.close()
        return
    bar = _ProgressWithFigures(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[note]}"),
        console=_talk,
        refresh_per_second=4,
    )
    with bar:
        yield _BarProgress(bar, label, total)


class _ProgressWithFigures(Progress):
    """A bar, and below it the latest figures, each under its name."""

    figures: Mapping[str, str] = MappingProxyType({})

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        if self.figures:
            # As many as fit side by side; the rest in further lines.
            cells = [
                Text.assemble((f"{name} ", "dim"), (value, "bold"), no_wrap=True)
                for name, value in self.figures.items()
            ]
            yield Padding(Columns(cells, padding=(0, 3)), (0, 0, 0, 2))


class _BarProgress:
    def __init__(self, bar: _ProgressWithFigures, label: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total, note="")

    def advance(
        self, steps: int = 1, note: str = "", figures: Mapping[str, str] | None = None
    ) -> None:
        if figures:
            self._bar.figures = {**self._bar.figures, **figures}
        self._bar.update(self._task, advance=steps, note=note)

    def expect(self, total: int) -> None:
        self._bar.update(self._task, total=total)


class _PlainProgress:
    def __init__(self, label: str, total: int | None) -> None:
        self._label, self._total = label, total
        self._done, self._note = 0, ""
        self._figures: dict[str, str] = {}
        self._started = self._printed = time.monotonic()

    def advance(
        self, steps: int = 1, note: str = "", figures: Mapping[str, str] | None = None
    ) -> None:
        self._done += steps
        self._note = note
        self._figures |= figures or {}
        if time.monotonic() - self._printed >= PLAIN_LINE_EVERY_S:
            self._print()

    def expect(self, total: int) -> None:
        self._total = total

    def close(self) -> None:
        self._print()

    def _print(self) -> None:
        self._printed = time.monotonic()
        elapsed = self._printed - self._started
        of_total = f"/{self._total}" if self._total is not None else ""
        figures = ", ".join(f"{name} {value}" for name, value in self._figures.items())
        parts = [f"{self._label}: {self._done}{of_total} in {elapsed:.0f} s", self._note, figures]
        say("  ".join(part for part in parts if part))


def quiet_libraries() -> None:
    """Take third-party progress bars and advice off the terminal; warnings stay."""
    import logging
    import os
    import warnings

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("TQDM_DISABLE", "1")
    # Training would otherwise report its start to the hub.
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    talkative = "httpx2 httpcore2 openai transformers trl datasets accelerate huggingface_hub"
    for name in talkative.split():
        logging.getLogger(name).setLevel(logging.ERROR)
    # It prints a traceback of what then reaches us, and is often mended.
    logging.getLogger("ContinuousBatchingLogger").setLevel(logging.CRITICAL)
    if not sys.warnoptions:
        warnings.simplefilter("ignore")
