"""Feedback rows of any number of files, grouped by what a strategy must see together.

The grouping is done on disk, so memory does not grow with the rows; and the groups, and the rows in
each, come in an order of their own, so that nothing depends on the order of the input.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from types import TracebackType
from typing import Any, Final, NamedTuple, Self

import orjson

from srt_cli import console
from srt_cli.pairs.external_sort import ExternalSort
from srt_cli.records import FeedbackRecord, Message, Status
from srt_cli.runs.jsonl import read_records

POSITION_BYTES: Final = 8
PROGRESS_EVERY: Final = 2000


class FeedbackRow(NamedTuple):
    """A feedback record, cut to what pairing looks at; the scores are those of its feedback."""

    id: str
    prompt: str | list[Message]
    response: str | None
    score: float | None
    score_mean: float | None
    refinement: str | None
    refinement_score: float | None
    refinement_score_mean: float | None
    status: Status
    critic: str
    sample: int
    round: int

    @classmethod
    def of_line(cls, line: bytes) -> Self:
        """Read the line of a record that was found valid before: to do so again costs most of a row."""
        row: dict[str, Any] = orjson.loads(line)
        prompt, feedback = row["prompt"], row["feedback"] or {}
        if not isinstance(prompt, str):
            prompt = [Message.model_construct(**turn) for turn in prompt]
        return cls(
            row["id"],
            prompt,
            row["response"],
            _number(feedback.get("score")),
            _number(feedback.get("score_mean")),
            row["refinement"],
            _number(row["refinement_score"]),
            _number(row.get("refinement_score_mean")),
            row["status"],
            row["critic"],
            int(row["sample"]),
            int(row["round"]),
        )


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row of the input, its line, and where it stood."""

    record: FeedbackRow
    line: bytes
    position: int


@dataclass(frozen=True, slots=True)
class Group:
    """Rows that belong together, each different one once, and the places where others repeat them."""

    rows: list[InputRow]
    repeated: list[tuple[InputRow, int]]
    """A row, and the position of one that equals it."""


class GroupedRows:
    """All rows of the input, read once, and given out in groups as often as asked for."""

    def __init__(self, folder: Path, key_of: Callable[[FeedbackRecord], bytes]) -> None:
        """Records with the same `key_of` come in one group."""
        self._sort = ExternalSort(folder)
        self._key_of = key_of
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
                    self._sort.add(self._key_of(record), line + position)
                    self.count += 1
                    if self.count % PROGRESS_EVERY == 0:
                        progress.advance(PROGRESS_EVERY)
            progress.advance(self.count % PROGRESS_EVERY)

    def groups(self, label: str) -> Iterator[Group]:
        """The groups, in the order of their keys; `label` says what they are wanted for."""
        with console.progress(label, self.count) as progress:
            done = shown = 0
            for _, entries in groupby(self._sort, key=itemgetter(0)):
                rows: list[InputRow] = []
                repeated: list[tuple[InputRow, int]] = []
                for _, value in entries:
                    line = value[:-POSITION_BYTES]
                    position = int.from_bytes(value[-POSITION_BYTES:])
                    if rows and rows[-1].line == line:
                        repeated.append((rows[-1], position))
                    else:
                        rows.append(InputRow(FeedbackRow.of_line(line), line, position))
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


def _number(value: float | str | None) -> float | None:
    """A number as the record's validation takes it, which lets `7` and `"7"` pass."""
    return None if value is None else float(value)
