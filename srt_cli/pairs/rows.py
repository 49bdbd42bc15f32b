"""Feedback rows from any number of files, in groups that a strategy must see together.

Lines stay where they are. What is sorted is a digest of each row and its place, so memory does not
grow with the rows; then the groups of several rows are read at their places, and all other rows in
one more pass. Both passes are cut into shares, which may be split over processes.
"""

import contextlib
import multiprocessing
import os
import signal
import tempfile
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import groupby, islice
from multiprocessing.connection import Connection
from multiprocessing.context import SpawnProcess
from operator import itemgetter
from pathlib import Path
from typing import IO, Annotated, Any, Final, NamedTuple, Self, TypeVar

import msgspec
import orjson

from srt_cli import console
from srt_cli.calls.asking import few_collections
from srt_cli.errors import SrtError
from srt_cli.pairs.answers import GIVEN, ScoredAnswers, read_scored
from srt_cli.pairs.external_sort import ExternalSort
from srt_cli.prompts import HUB_PREFIX, format_of, rows_at
from srt_cli.records import MAX_SCORE, MIN_SCORE, FeedbackRecord, Message, Status
from srt_cli.runs.jsonl import BUFFER_BYTES, lines_of, naming_row, parse_lines, read_lines
from srt_cli.stats.counting import Copied
from srt_cli.stats.hygiene import is_same_text

PLACE_BYTES: Final = 8
_KEY: Final = itemgetter(slice(None, -PLACE_BYTES))
STRETCH_BYTES: Final = 4 << 20
GROUPS_AT_ONCE: Final = 256
"""Few enough for their places to fit into a pipe, which may not be read at once."""
BYTES_FOR_PROCESSES: Final = 48 << 20
"""Input from which a second process saves more than its start costs."""
MOST_PROCESSES: Final = 2
ASKED_AT_ONCE: Final = 3
"""Items that a helper holds, so that it need not wait while the first process works itself."""
MOST_WAITING: Final = 8
"""Items at work or done that wait for the one before them; each takes a few megabytes."""
GONE: Final = "a process of this run is gone, perhaps for want of memory. Run the same line again."
_MARK: Final = b"\xef\xbb\xbf"

Score = Annotated[float, msgspec.Meta(ge=MIN_SCORE, le=MAX_SCORE)]
Passed = Annotated[float, msgspec.Meta(ge=0, le=1)]
Item = TypeVar("Item")
Result = TypeVar("Result")


class FeedbackPart(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    """A `Feedback` as rows hold it."""

    weaknesses: str
    suggestions: str
    score: Score
    score_mean: Score | None = None


class UsagePart(msgspec.Struct, forbid_unknown_fields=True, frozen=True, gc=False):
    """A `Usage` as rows hold it."""

    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    reasoning_tokens: int = 0


class PairRow(msgspec.Struct, frozen=True, gc=False):
    """What pairs are made of: the fields of a `FeedbackRecord` that matter once it has been read."""

    id: str
    prompt: str | list[Message]
    response: str | None
    feedback: FeedbackPart | None
    refinement: str | None
    refinement_score: Score | None
    refinement_feedback: FeedbackPart | None
    status: Status
    critic: str
    sample: int
    round: int
    refinement_score_mean: Score | None = None
    response_cut: bool = False
    odds: dict[str, tuple[float, float]] = {}
    response_passes: Passed | None = None
    refinement_passes: Passed | None = None

    def mean_odds(self, against: str) -> float | None:
        """Mean odds of the comparisons whose name begins so; None without any."""
        found = [
            value for name, both in self.odds.items() if name.startswith(against) for value in both
        ]
        return sum(found) / len(found) if found else None


class FeedbackRow(PairRow, forbid_unknown_fields=True, frozen=True, gc=False, kw_only=True):
    """A `FeedbackRecord`, field by field, in the form that is read fastest.

    What msgspec accepts pydantic accepts, too; what else pydantic accepts (`"7"` for 7) comes by way of
    the record.
    """

    reason: str | None
    raw: dict[str, str]
    policy: str
    usage: UsagePart
    thoughts: dict[str, str] = {}


class ScoredRow(PairRow, frozen=True, gc=False, kw_only=True):
    """A row of answers that others scored, in place of a draft and its refinement."""

    answers: tuple[tuple[str, float], ...]

    @classmethod
    def of(cls, row: ScoredAnswers) -> Self:
        """Such a row as it was read."""
        return cls(
            row.id, row.prompt, response=None, feedback=None, refinement=None, refinement_score=None,
            refinement_feedback=None, status="ok", critic=GIVEN, sample=0, round=1,
            answers=row.answers,
        )  # fmt: skip


def _of_pydantic(kind: type, value: object) -> object:
    return kind.model_validate(value) if issubclass(kind, Message) else value


_decode: Final = msgspec.json.Decoder(FeedbackRow, dec_hook=_of_pydantic).decode
_decode_again: Final = msgspec.json.Decoder(PairRow, dec_hook=_of_pydantic).decode


def read_row(line: bytes) -> PairRow:
    """A row of feedback, or of scored answers; raises `ValueError` for any other."""
    try:
        return _decode(line)
    except ValueError:
        return _row_of(orjson.loads(line))


def read_again(line: bytes) -> PairRow:
    """A row that `read_row` has accepted, without what pairs have no use for."""
    try:
        return _decode_again(line)
    except ValueError:
        return _row_of(orjson.loads(line))


def _row_of(row: Any) -> PairRow:
    if not isinstance(row, dict):
        raise ValueError("not a JSON object")
    scored = None if "feedback" in row else read_scored(row)
    if scored:
        return ScoredRow.of(scored)
    record = FeedbackRecord.model_validate(row)
    return msgspec.convert(record.model_dump(), FeedbackRow, dec_hook=_of_pydantic)


KeyOf = Callable[[PairRow], bytes]


@dataclass
class Seen:
    """What the rows show of their critic."""

    scores: Counter[float] = field(default_factory=Counter)
    """How often it gave each score, to drafts and refinements."""
    copied: Copied = field(default_factory=Copied)
    """Refinements that repeat their draft."""

    def add(self, row: PairRow) -> None:
        """Count one row."""
        if row.feedback is None or row.refinement_score is None:
            return
        self.scores[row.feedback.score] += 1
        self.scores[row.refinement_score] += 1
        copies = is_same_text(row.refinement or "", row.response or "")
        self.copied.add(copies, row.response_passes)

    def merge(self, other: "Seen") -> None:
        """Add what others show."""
        self.scores.update(other.scores)
        self.copied.merge(other.copied)


class InputRow(msgspec.Struct, frozen=True, gc=False):
    """A row of the input, its line, and its place among all rows."""

    record: PairRow
    line: bytes
    place: int

    def plain_line(self) -> bytes:
        """Its line, with fields in a fixed order and spacing."""
        return orjson.dumps(orjson.loads(self.line), option=orjson.OPT_SORT_KEYS)


class RowGroup(msgspec.Struct, frozen=True, gc=False):
    """The different rows of a group, and the places of rows that repeat one of them."""

    rows: list[InputRow]
    repeated: list[tuple[InputRow, int]]
    """A row, and the place of an equal one."""


# --- Lines at their places ---------------------------------------------------------------------


@dataclass(frozen=True)
class Source:
    """A file of lines, and the place of its first byte among the bytes of all files."""

    path: Path
    start: int
    size: int
    held: IO[bytes] | None = None
    """A copy without a name, of what can be read only once or is compressed."""

    def open(self) -> contextlib.AbstractContextManager[IO[bytes]]:
        """The lines, to be read from anywhere."""
        if self.held is not None:
            return contextlib.nullcontext(self.held)
        return open(self.path, "rb", buffering=BUFFER_BYTES)

    def refuse(self) -> None:
        """Raise `SrtError` that names the first line which is no record."""
        with self.open() as lines:
            lines.seek(0)
            for number, row in parse_lines(self.path, lines_of(lines)):
                with naming_row(self.path, number):
                    _row_of(row)
        raise SrtError(f"{self.path}: was changed while srt read it. Run the same line again.")


class Stretch(NamedTuple):
    """The lines of a file that begin from one offset up to another."""

    source: Source
    begin: int
    end: int

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """Each line that is not blank, with its place."""
        source, at = self.source, self.begin
        with source.open() as file:
            file.seek(max(0, at - 1))
            if at:  # the line that began before belongs to the stretch before
                at += len(file.readline()) - 1
            for line in lines_of(file):
                if at >= self.end:
                    return
                if not line.isspace():
                    yield source.start + at, line if at else line.removeprefix(_MARK)
                at += len(line)


class Alone(NamedTuple):
    """A share of the rows: those of a stretch that are alone in their group."""

    stretch: Stretch
    without: frozenset[int]
    """Places of the rows that are not."""

    @property
    def place(self) -> int:
        """Where it begins."""
        return self.stretch.source.start + self.stretch.begin

    def groups(self) -> Iterator[RowGroup]:
        """The groups, in the order of the input."""
        for place, line in self.stretch.lines():
            if place not in self.without:
                yield RowGroup([_row_at(self.stretch.source, place, line)], [])


class Several(NamedTuple):
    """A share of the rows: groups, by the places of their rows."""

    sources: Sequence[Source]
    places: Sequence[tuple[int, ...]]

    def groups(self) -> Iterator[RowGroup]:
        """The groups as they are listed; the rows of each in an order that is not the input's."""
        with contextlib.ExitStack() as opened:
            files = [(source, opened.enter_context(source.open())) for source in self.sources]
            for places in self.places:
                read = []
                for place in places:
                    source, file = next(each for each in reversed(files) if each[0].start <= place)
                    file.seek(place - source.start)
                    line = file.readline()
                    read.append(_row_at(source, place, line.removeprefix(_MARK)))
                yield _without_repetition(read)


RowShare = Alone | Several


def _row_at(source: Source, place: int, line: bytes) -> InputRow:
    try:
        return InputRow(read_again(line), line, place)
    except (ValueError, TypeError):
        source.refuse()
        raise


def _without_repetition(read: list[InputRow]) -> RowGroup:
    if len(read) == 1:
        return RowGroup(read, [])
    rows: list[InputRow] = []
    repeated: list[tuple[InputRow, int]] = []
    before = None
    for line, _, row in sorted((row.plain_line(), row.place, row) for row in read):
        if line == before:
            repeated.append((rows[-1], row.place))
        else:
            rows.append(row)
            before = line
    return RowGroup(rows, repeated)


# --- Over processes ----------------------------------------------------------------------------


class Helpers:
    """Processes that share work with this one: started when they are first needed, kept until closed."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._pipes: list[Connection] = []
        self._processes: list[SpawnProcess] = []

    def map(
        self, work: Callable[[Item], Result], items: Iterable[Item]
    ) -> Generator[Result, None, None]:
        """The results of `work`, in the order of the items; this process works, too.

        Raises what `work` raises, and `SrtError` for a helper that is gone.
        """
        if not self._count:
            yield from map(work, items)
            return
        left = iter(items)
        waiting: deque[Connection | _Done] = deque()
        try:
            for pipe in self._started():
                _tell(pipe, _Work(work))
            while True:
                for pipe in self._pipes:
                    for item in islice(left, ASKED_AT_ONCE - waiting.count(pipe)):
                        _tell(pipe, item)
                        waiting.append(pipe)
                if not waiting:
                    return
                if not _is_ready(waiting[0]) and len(waiting) < MOST_WAITING:
                    for item in islice(left, 1):
                        waiting.append(_Done(work(item)))
                yield _answer_of(waiting.popleft())
        finally:
            if waiting:  # nobody will ask for these answers
                self.close()

    def _started(self) -> list[Connection]:
        if self._pipes:
            return self._pipes
        spawn = multiprocessing.get_context("spawn")
        # What is ignored here a helper ignores from its first moment: Ctrl-C ends the first process,
        # which ends the others.
        handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
        try:
            for _ in range(self._count):
                here, there = spawn.Pipe()
                self._pipes.append(here)
                helper = spawn.Process(target=_serve, args=(there,), daemon=True)
                helper.start()
                self._processes.append(helper)
                there.close()
        finally:
            signal.signal(signal.SIGINT, handler)
        return self._pipes

    def close(self) -> None:
        """End the helpers, whatever they do."""
        for pipe in self._pipes:
            pipe.close()
        for helper in self._processes:
            helper.terminate()
            helper.join()
        self._pipes, self._processes = [], []


class _Work(NamedTuple):
    """What is to be done with the items that follow."""

    act: Callable[[Any], Any]


class _Done(NamedTuple):
    """A result of this process, which waits for its turn."""

    answer: Any


def _tell(pipe: Connection, message: object) -> None:
    try:
        pipe.send(message)
    except BrokenPipeError:
        raise SrtError(GONE) from None


def _is_ready(waiting: Connection | _Done) -> bool:
    return isinstance(waiting, _Done) or waiting.poll()


def _answer_of(waiting: Connection | _Done) -> Any:
    if isinstance(waiting, _Done):
        return waiting.answer
    try:
        answer = waiting.recv()
    except (EOFError, ConnectionResetError):
        raise SrtError(GONE) from None
    if isinstance(answer, Exception):
        raise answer
    return answer


def _serve(pipe: Connection) -> None:
    """Work on what comes through a pipe until it is closed."""
    with (
        few_collections(),
        contextlib.suppress(EOFError, OSError),
        # An answer may have to wait until the first process reads it, which works meanwhile.
        ThreadPoolExecutor(max_workers=1) as sender,
    ):
        work = pipe.recv()
        while True:
            item = pipe.recv()
            if isinstance(item, _Work):
                work = item
                continue
            try:
                answer = work.act(item)
            except Exception as error:  # it is raised where it was asked for
                answer = error
            sender.submit(pipe.send, answer)


# --- All rows ----------------------------------------------------------------------------------


class GroupedRows:
    """All rows of the input: read once, given out in groups as often as needed."""

    def __init__(self, folder: Path, key_of: KeyOf) -> None:
        """Records with the same `key_of` come in one group."""
        self._folder = folder
        self._key_of = key_of
        self._cleanup = contextlib.ExitStack()
        self._keys = self._cleanup.enter_context(ExternalSort(folder))
        self._groups: ExternalSort | None = None
        """The groups of several rows: all places of each, the first one first."""
        self._placed: ExternalSort | None = None
        """The places of the rows in such groups."""
        self._sources: list[Source] = []
        self._end = 0
        """The place behind the last row that counts."""
        self.count = 0
        self.seen = Seen()

    def __enter__(self) -> "GroupedRows":
        self._cleanup.enter_context(few_collections())
        return self

    def __exit__(self, *error: object) -> None:
        self._cleanup.close()

    @cached_property
    def helpers(self) -> Helpers:
        """Processes that may share the work: none unless input and cores are many."""
        held = any(source.held is not None for source in self._sources)
        small = sum(source.size for source in self._sources) < BYTES_FOR_PROCESSES
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
        helpers = Helpers(0 if held or small else min(MOST_PROCESSES, cores) - 1)
        self._cleanup.callback(helpers.close)
        return helpers

    def read(self, paths: Sequence[Path], limit: int | None, total: int | None) -> None:
        """Read the first `limit` rows of the files together; `total` is for the progress bar."""
        for path in paths:
            self._sources.append(self._source(path, limit))
        self._end = sum(source.size for source in self._sources)
        rows_of = dict.fromkeys(range(len(self._sources)), 0)
        stretches = [
            (number, stretch)
            for number, source in enumerate(self._sources)
            for stretch in _stretches(source)
        ]
        found = self._keys_of_all([stretch for _, stretch in stretches], limit)
        with console.progress("reading", total) as progress, contextlib.closing(found):
            for (number, stretch), read in zip(stretches, found, strict=False):
                if read is None:
                    self._sources[number].refuse()
                    continue
                keys, seen = read
                self.seen.merge(seen)
                left = len(keys) if limit is None else limit - self.count
                if left < len(keys):
                    self._end = int.from_bytes(keys[left][-PLACE_BYTES:])
                    keys = keys[:left]
                elif self.count + len(keys) == limit:
                    self._end = stretch.source.start + stretch.end
                self._keys.add(*keys)
                self.count += len(keys)
                rows_of[number] += len(keys)
                progress.advance(len(keys))
                if self.count == limit:
                    return
        for number, rows in rows_of.items():
            if not rows:
                self._sources[number].refuse()

    def _keys_of_all(
        self, stretches: Sequence[Stretch], limit: int | None
    ) -> Generator[tuple[list[bytes], Seen] | None, None, None]:
        if limit is None:
            yield from self.helpers.map(partial(_keys_in, self._key_of), stretches)
            return
        for stretch in stretches:
            yield _keys_in(self._key_of, stretch, limit - self.count)

    def _source(self, path: Path, limit: int | None) -> Source:
        start = sum(source.size for source in self._sources)
        if path.is_file() and path.suffix == ".jsonl":
            return Source(path, start, path.stat().st_size)
        held: IO[bytes] = tempfile.TemporaryFile(dir=self._folder)  # noqa: SIM115  held until exit
        self._cleanup.callback(held.close)
        lines = _lines_at(path)
        for line in lines if limit is None else islice(lines, limit):
            held.write(line if line.endswith(b"\n") else line + b"\n")
        return Source(path, start, held.tell(), held)

    def shares(self, *, in_order_of_keys: bool = False) -> Iterator[RowShare]:
        """All groups: first those of several rows, by their first places, then the others.

        In the order of their keys, all of them are in shares of the first kind.
        """
        if in_order_of_keys:
            yield from self._in_shares(self._places_by_key())
            return
        groups, placed = self._apart()
        as_places = (_places_of(entry) for entry in groups)
        yield from self._in_shares(as_places)
        waiting = (int.from_bytes(entry) for entry in placed)
        place = next(waiting, None)
        for source in self._sources:
            for stretch in _stretches(source):
                end = min(self._end - source.start, stretch.end)
                without = set()
                while place is not None and place < source.start + end:
                    without.add(place)
                    place = next(waiting, None)
                if stretch.begin < end:
                    yield Alone(stretch._replace(end=end), frozenset(without))

    def _in_shares(self, groups: Iterable[tuple[int, ...]]) -> Iterator[Several]:
        left = iter(groups)
        while some := list(islice(left, GROUPS_AT_ONCE)):
            yield Several(self._sources, some)

    def _places_by_key(self, fewest: int = 1) -> Iterator[tuple[int, ...]]:
        """The places of each group that has so many rows, in the order of the keys."""
        for _, entries in groupby(self._keys, _KEY):
            same = list(entries)
            if len(same) >= fewest:
                yield tuple([int.from_bytes(entry[-PLACE_BYTES:]) for entry in same])

    def _apart(self) -> tuple[ExternalSort, ExternalSort]:
        """The groups of several rows by their first places, and the places of their rows."""
        if self._groups is None or self._placed is None:
            self._groups = self._cleanup.enter_context(ExternalSort(self._folder))
            self._placed = self._cleanup.enter_context(ExternalSort(self._folder))
            for places in self._places_by_key(fewest=2):
                entries = [place.to_bytes(PLACE_BYTES) for place in places]
                self._groups.add(b"".join(entries))
                self._placed.add(*entries)
        return self._groups, self._placed

    def groups(self, label: str, *, in_order_of_keys: bool = False) -> Iterator[RowGroup]:
        """All groups, one by one in this process; `label` names the work on the progress bar."""
        with console.progress(label, self.count) as progress:
            for share in self.shares(in_order_of_keys=in_order_of_keys):
                done = 0
                for group in share.groups():
                    done += len(group.rows) + len(group.repeated)
                    yield group
                progress.advance(done)


def _lines_at(path: Path) -> Iterator[bytes]:
    """The rows of a file in any format, a folder or a data set of the hub as lines."""
    hub = str(path).startswith(HUB_PREFIX)
    if hub or path.is_dir() or format_of(path) not in (None, "JSONL"):
        rows, _ = rows_at(str(path))
        return (orjson.dumps(row, default=str) for _, _, row in rows())
    return read_lines(path)


def _places_of(entry: bytes) -> tuple[int, ...]:
    starts = range(0, len(entry), PLACE_BYTES)
    return tuple(int.from_bytes(entry[at : at + PLACE_BYTES]) for at in starts)


def _stretches(source: Source) -> Iterator[Stretch]:
    for begin in range(0, source.size, STRETCH_BYTES):
        yield Stretch(source, begin, min(source.size, begin + STRETCH_BYTES))


def _keys_in(
    key_of: KeyOf, stretch: Stretch, most: int | None = None
) -> tuple[list[bytes], Seen] | None:
    """Key and place of each row of a stretch, and their scores; None where one is no record.

    Of more than `most` rows, the first one that is too many comes with its place and no more.
    """
    keys: list[bytes] = []
    seen = Seen()
    try:
        for place, line in stretch.lines():
            row = read_row(line)
            keys.append(key_of(row) + place.to_bytes(PLACE_BYTES))
            if most is not None and len(keys) > most:
                break
            seen.add(row)
    except (ValueError, TypeError):
        return None
    return keys, seen
