"""Feedback rows of any number of files, grouped by what a strategy must see together.

The grouping is done on disk, so memory does not grow with the rows; and the groups, and the rows in
each, come in an order of their own, so that nothing depends on the order of the input.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final

import orjson

from srt_cli import console
from srt_cli.pairs.external_sort import ExternalSort
from srt_cli.pairs.feedback_row import FeedbackRow
from srt_cli.pairs.pairing import Strategy, group_key
from srt_cli.records import FeedbackRecord
from srt_cli.runs.jsonl import read_records

POSITION_BYTES: Final = 8
PROGRESS_EVERY: Final = 2000


@dataclass(frozen=True, slots=True)
class Row:
    """A row of the input, its line, and where it stood."""

    record: FeedbackRow
    line: bytes
    position: int


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that belong together, each different one once, and the places where others repeat them."""

    rows: list[Row]
    repeated: list[tuple[Row, int]]
    """A row, and the position of one that equals it."""


class GroupedRows:
    """All rows of the input, read once, and given out in groups as often as asked for."""

    def __init__(self, folder: Path, strategy: Strategy) -> None:
        self._sort = ExternalSort(folder)
        self._strategy = strategy
        self.count = 0

    def __enter__(self) -> "GroupedRows":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._sort.__exit__(kind, error, traceback)

    def read(self, paths: Sequence[Path], limit: int | None, total: int | None) -> None:
        """Take the rows of the files, the first `limit` of them all; `total` is for the progress."""
        with console.progress("reading", total) as progress:
            for path in paths:
                left = None if limit is None else limit - self.count
                for record, line in read_records(path, _with_line, limit=left):
                    position = self.count.to_bytes(POSITION_BYTES)
                    self._sort.add(group_key(record, self._strategy), line + position)
                    self.count += 1
                    if self.count % PROGRESS_EVERY == 0:
                        progress.advance(PROGRESS_EVERY)
            progress.advance(self.count % PROGRESS_EVERY)

    def groups(self, label: str) -> Iterator[Group]:
        """The groups, in the order of their keys; `label` says what they are wanted for."""
        with console.progress(label, self.count) as progress:
            done = shown = 0
            for _, entries in groupby(self._sort, key=itemgetter(0)):
                rows: list[Row] = []
                repeated: list[tuple[Row, int]] = []
                for _, value in entries:
                    line = value[:-POSITION_BYTES]
                    position = int.from_bytes(value[-POSITION_BYTES:])
                    if rows and rows[-1].line == line:
                        repeated.append((rows[-1], position))
                    else:
                        rows.append(Row(FeedbackRow.of_line(line), line, position))
                    done += 1
                yield Group(rows, repeated)
                if done - shown >= PROGRESS_EVERY:
                    progress.advance(done - shown)
                    shown = done
            progress.advance(done - shown)


def _with_line(row: Any) -> tuple[FeedbackRecord, bytes]:
    """A record, and a line that is the same however the file spaced or ordered its fields."""
    record = FeedbackRecord.model_validate(row)
    return record, orjson.dumps(row, option=orjson.OPT_SORT_KEYS)
