"""Feedback rows from any number of files, in groups that a strategy must see together.

Rows are grouped on disk, so memory does not grow with them. Groups, and the rows in a group, come
in an order that does not depend on the order of the input.
"""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, Final, NamedTuple, Self

import orjson

from srt_cli import console
from srt_cli.pairs.external_sort import ExternalSort
from srt_cli.records import FeedbackRecord, Message, Status
from srt_cli.runs.jsonl import read_records
from srt_cli.stats.hygiene import is_same_text

POSITION_BYTES: Final = 8
PROGRESS_EVERY: Final = 2000


class FeedbackRow(NamedTuple):
    """The part of a feedback record that pairing looks at; `score` is that of its feedback."""

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
    response_cut: bool
    response_passes: float | None
    refinement_passes: float | None

    @classmethod
    def of_line(cls, line: bytes) -> Self:
        """Read the line of a record that is known to be valid: validating again would cost most."""
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
            bool(row.get("response_cut")),
            _number(row.get("response_passes")),
            _number(row.get("refinement_passes")),
        )


@dataclass(frozen=True, slots=True)
class InputRow:
    """A row of the input, its line, and its position among all rows."""

    record: FeedbackRow
    line: bytes
    position: int


@dataclass(frozen=True, slots=True)
class RowGroup:
    """The different rows of a group, and the positions of rows that repeat one of them."""

    rows: list[InputRow]
    repeated: list[tuple[InputRow, int]]
    """A row, and the position of an equal one."""


class GroupedRows:
    """All rows of the input: read once, given out in groups as often as needed."""

    def __init__(self, folder: Path, key_of: Callable[[FeedbackRecord], bytes]) -> None:
        """Records with the same `key_of` come in one group."""
        self._sort = ExternalSort(folder)
        self._key_of = key_of
        self.count = 0
        self.scores: Counter[float] = Counter()
        """How often the critic gave each score, to drafts and refinements."""
        self.refined = 0
        self.copies = 0
        """Refinements that repeat their draft."""

    def __enter__(self) -> "GroupedRows":
        return self

    def __exit__(self, *error: object) -> None:
        self._sort.__exit__(*error)

    def read(self, paths: Sequence[Path], limit: int | None, total: int | None) -> None:
        """Read the first `limit` rows of the files together; `total` is for the progress bar."""
        with console.progress("reading", total) as progress:
            for path in paths:
                left = None if limit is None else limit - self.count
                for record, line in read_records(path, _with_line, limit=left):
                    position = self.count.to_bytes(POSITION_BYTES)
                    self._sort.add(self._key_of(record), line + position)
                    self.count += 1
                    self._look_at(record)
                    if self.count % PROGRESS_EVERY == 0:
                        progress.advance(PROGRESS_EVERY)
            progress.advance(self.count % PROGRESS_EVERY)

    def _look_at(self, record: FeedbackRecord) -> None:
        if record.feedback is None or record.refinement_score is None:
            return
        self.scores[record.feedback.score] += 1
        self.scores[record.refinement_score] += 1
        self.refined += 1
        self.copies += is_same_text(record.refinement or "", record.response or "")

    def groups(self, label: str) -> Iterator[RowGroup]:
        """The groups, in the order of their keys; `label` names the work on the progress bar."""
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
                yield RowGroup(rows, repeated)
                if done - shown >= PROGRESS_EVERY:
                    progress.advance(done - shown)
                    shown = done
            progress.advance(done - shown)


def _with_line(row: Any) -> tuple[FeedbackRecord, bytes]:
    """A record, and its line with fields in a fixed order and spacing."""
    record = FeedbackRecord.model_validate(row)
    return record, orjson.dumps(row, option=orjson.OPT_SORT_KEYS)


def _number(value: float | str | None) -> float | None:
    """A number, read as the record's validation reads it: `7` and `"7"` are the same."""
    return None if value is None else float(value)
