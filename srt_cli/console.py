"""The only module that prints: results to stdout, talk to stderr.

Models, servers and files may send anything, so what they say is printed as plain text, never as
markup, and characters that steer a terminal are shown instead of obeyed (`visible`).
"""

import errno
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from types import MappingProxyType
from typing import IO, Any, Final, Literal, Protocol, cast

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
from rich.table import Column
from rich.table import Table as Grid
from rich.text import Text

from srt_cli.tables import Table, tell_apart

PLAIN_LINE_EVERY_S: Final = 15.0
LONGEST_WORD: Final = 26
"""Characters of one word in the label of a progress line: a path shows where it ends."""
_STEERS: Final = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f"  # C0 but tab and newline, delete, C1
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069"  # direction of writing
    "\u2028\u2029\ufff9-\ufffb\ufeff\U000e0000-\U000e007f"  # other line ends, hidden text
    "\ud800-\udfff]"  # halves of a character, which cannot be printed at all
)


class _Standard:
    """Standard output or error, whatever it is at the moment, that may lose what nobody can read.

    A run whose terminal was closed ends as well as any other.
    """

    def __init__(self, name: str, *lost: int) -> None:
        self._name = name
        self._lost = lost

    @property
    def rich_proxied_file(self) -> "_Standard":
        """What rich is to write to while its progress bars stand in for it."""
        return self

    def __getattr__(self, name: str) -> Any:
        stream = getattr(sys, self._name)
        return getattr(getattr(stream, "rich_proxied_file", stream), name)

    def write(self, text: str) -> int:
        """Write, or lose, a text."""
        with self._losing():
            self.__getattr__("write")(text)
        return len(text)

    def flush(self) -> None:
        """Flush what was written."""
        with self._losing():
            self.__getattr__("flush")()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            if self._lost and error.errno not in self._lost:
                raise
            with suppress(OSError, ValueError):  # what is buffered must not fail at the very end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.__getattr__("fileno")())
                os.close(nowhere)


_talk = Console(file=cast(IO[str], _Standard("stderr")), highlight=False)
_result = Console(file=cast(IO[str], _Standard("stdout", errno.EIO, errno.EPIPE)), highlight=False)


def hush() -> None:
    """Print nothing from here on: another process of this run speaks."""
    _talk.quiet = _result.quiet = True


def speak() -> None:
    """Print again."""
    _talk.quiet = _result.quiet = False


def visible(text: str) -> str:
    """Text as it can be printed: what would steer the terminal becomes `\\x1b`, `\\u202e` and so on."""
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode("ascii"), text)


def _plain(text: str, style: str = "") -> Text:
    """Text of any origin, in a style of ours."""
    return Text(visible(text), style=style)


def say(message: str) -> None:
    """A line of talk."""
    _talk.print(_plain(message), soft_wrap=True)


def warn(message: str) -> None:
    """Something the user should look at."""
    _talk.print(Text.assemble(("warning: ", "yellow"), visible(message)), soft_wrap=True)


def fail(message: str) -> None:
    """Why the command stops."""
    _talk.print(Text.assemble(("error: ", "bold red"), visible(message)), soft_wrap=True)


def result(message: str) -> None:
    """The command's result."""
    _result.print(_plain(message), soft_wrap=True)


def finish(where: str, then: str | None = None) -> None:
    """The closing line of a command: where the result is, and the next command."""
    following = f"   next: {then}" if then else ""
    line = Text.assemble((visible(where), "bold"), visible(following))
    _result.print(line, soft_wrap=True)


def table(
    title: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[str]],
    things: int = 0,
    *,
    prose: bool = False,
) -> None:
    """A result as a table; what the columns mean is told in `tables.Table`."""
    _print_table(_result, Table(title, list(columns), [list(row) for row in rows], things, prose))


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
            text.append(visible(f"⟦{label}: "), style="bold green")
            text.append(visible(content), style="green")
            text.append("⟧", style="bold green")
        else:
            text.append(visible(content), style="dim")
    _result.print(_plain(title, "bold"))
    _result.print(text, soft_wrap=True)
    _result.print()


def _print_table(console: Console, shown: Table) -> None:
    if not (console.is_terminal or shown.prose):  # a file takes any width
        width = max(console.width, shown.widest)
        console = Console(file=console.file, highlight=False, quiet=console.quiet, width=width)
    for part in shown.fitted(console.width):
        grid = Grid(box=SIMPLE_HEAD, pad_edge=False)
        for place, column in enumerate(part.columns):
            is_text = place < part.names or (part.prose and place == len(part.columns) - 1)
            justify: Literal["left", "right"] = "left" if is_text else "right"
            grid.add_column(_plain(column), justify=justify, overflow="fold")
        for row in part.cells:
            grid.add_row(*(_plain(cell) for cell in row))
        # Not the grid's own title, which is folded to the width of its columns.
        console.print(_plain(part.title, "bold"), soft_wrap=True)
        console.print(grid)


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Show on a terminal, while it lasts, what takes a moment before anything can be counted."""
    if _talk.is_terminal and not _talk.is_dumb_terminal:
        with _talk.status(_plain(what)):
            yield
    else:
        yield


class ProgressLine(Protocol):
    """A running count of finished work."""

    def advance(
        self, steps: int = 1, note: str = "", figures: Mapping[str, str] | None = None
    ) -> None:
        """`steps` more are done; `note` says what else counts (failures, cost).

        On a terminal both stand below it, `figures` (loss, tokens/s) each under its name; a figure
        keeps its last value until it has another.
        """
        ...

    def expect(self, total: int) -> None:
        """The whole is known only now."""
        ...


@contextmanager
def progress(
    label: str, total: int | None, pulse: Callable[[], str] | None = None
) -> Iterator[ProgressLine]:
    """Show progress: a bar with time taken and left on a terminal, plain lines elsewhere.

    `pulse` tells what goes on though nothing has finished; it is asked from another thread. With
    one, a line comes at least every 15 seconds without a terminal too.
    """
    label = " ".join(tell_apart([word], LONGEST_WORD)[0] for word in visible(label).split())
    if not _talk.is_terminal or _talk.is_dumb_terminal:
        plain = _PlainProgress(label, total, pulse or str)
        over = threading.Event()
        if pulse is not None:
            threading.Thread(target=plain.live, args=(over,), name="progress", daemon=True).start()
        try:
            yield plain
        finally:
            over.set()
        plain.close()
        return
    bar = _ProgressWithFigures(
        SpinnerColumn(),
        TextColumn("{task.description}", markup=False),
        BarColumn(bar_width=30),  # where there is less room, it alone gives way
        MofNCompleteColumn(table_column=Column(no_wrap=True)),
        TimeElapsedColumn(table_column=Column(no_wrap=True)),
        TimeRemainingColumn(table_column=Column(no_wrap=True)),
        console=_talk,
        refresh_per_second=4,
    )
    bar.pulse = pulse or str
    with bar:
        yield _BarProgress(bar, label, total)


class _ProgressWithFigures(Progress):
    """A bar, and below it the note and the latest figures, each under its name."""

    note = ""
    pulse: Callable[[], str] = str
    figures: Mapping[str, str] = MappingProxyType({})

    def get_renderables(self) -> Iterable[RenderableType]:
        yield from super().get_renderables()
        # As many as fit side by side; the rest in further lines.
        cells = [
            Text.assemble((f"{visible(name)} ", "dim"), (visible(value), "bold"), no_wrap=True)
            for name, value in self.figures.items()
        ]
        for said in (self.pulse(), self.note):
            if said:
                cells.insert(0, _plain(said))
        if cells:
            yield Padding(Columns(cells, padding=(0, 3)), (0, 0, 0, 2))


class _BarProgress:
    def __init__(self, bar: _ProgressWithFigures, label: str, total: int | None) -> None:
        self._bar = bar
        self._task = bar.add_task(label, total=total)

    def advance(
        self, steps: int = 1, note: str = "", figures: Mapping[str, str] | None = None
    ) -> None:
        if figures:
            self._bar.figures = {**self._bar.figures, **figures}
        self._bar.note = note
        self._bar.update(self._task, advance=steps)

    def expect(self, total: int) -> None:
        self._bar.update(self._task, total=total)


class _PlainProgress:
    def __init__(self, label: str, total: int | None, pulse: Callable[[], str]) -> None:
        self._label, self._total, self._pulse = label, total, pulse
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

    def live(self, over: threading.Event) -> None:
        """Print a line whenever none came for a while, until it is over."""
        while not over.wait(max(0.0, self._printed + PLAIN_LINE_EVERY_S - time.monotonic())):
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
        done = f"{self._label}: {self._done}{of_total} in {elapsed:.0f} s"
        parts = [done, self._pulse(), self._note, figures]
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
