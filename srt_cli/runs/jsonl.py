"""Reading and writing JSONL: plain or gzip, with dropped rows beside it, each file whole or absent."""

import codecs
import contextlib
import fcntl
import gzip
import hashlib
import io
import json
import math
import os
import shlex
import sys
import tempfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import islice
from pathlib import Path
from typing import IO, Any, BinaryIO, Final, Protocol, TypeVar, cast

import orjson
from pydantic import ValidationError

from srt_cli.errors import SrtError
from srt_cli.records import Dropped, FeedbackRecord, Record

Parsed = TypeVar("Parsed")

MOST_LEVELS: Final = 100
TOO_DEEP: Final = f"is nested more than {MOST_LEVELS} levels deep. Leave the deep field out."
BUFFER_BYTES: Final = 1 << 18
"""Of a file that is read from end to end."""
WAITING_BYTES: Final = 1 << 24
"""Of rows that wait in memory for those before them."""
MOST_BYTES: Final = 2**28
"""In one line: a compressed file of a few megabytes may hold one that fills any memory."""
UTF_16: Final = (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
PACKED: Final = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
DATA_SUFFIXES: Final = (".jsonl", ".json", ".jsonl.gz")


def read_rows(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) from a JSONL file, plain or `.gz`, or from stdin (`-`).

    Raises `SrtError`, naming file and line, for text that is not UTF-8, not JSON, or not an object.
    """
    yield from parse_lines(path, read_lines(path))


def read_lines(path: Path) -> Iterator[bytes]:
    """The lines of such a file as they are; raises `SrtError` for one that cannot be read."""
    if path.is_dir():
        raise SrtError(f"{path}: is a directory, where a JSONL file is expected.")
    try:
        with open_bytes(path) as file:
            yield from lines_of(file)
    except FileNotFoundError:
        raise SrtError(f"{path}: no such file.{_hint_for_missing(path)}") from None
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise SrtError(f"{path}: not a readable gzip file ({error}).") from error
    except OSError as error:
        if path.suffix != ".zst":
            raise
        raise SrtError(f"{path}: not a readable zst file ({error}).") from error


def open_bytes(path: Path) -> contextlib.AbstractContextManager[BinaryIO]:
    """A file's bytes, decompressed where its name ends in `.gz` or `.zst`; `-` is stdin.

    UTF-16 that says so by its first two bytes becomes UTF-8.
    """
    if str(path) == "-":
        return contextlib.nullcontext(sys.stdin.buffer)
    file: io.BufferedReader | gzip.GzipFile
    if path.suffix == ".zst":
        import pyarrow  # which reads it, as Python itself does only from 3.14 on

        file = io.BufferedReader(pyarrow.input_stream(str(path), compression="zstd"))
    elif path.suffix == ".gz" and not _is_plain(path):
        file = gzip.open(path, "rb")  # noqa: SIM115  closed by the caller
    else:
        file = open(path, "rb")  # noqa: SIM115  closed by the caller
    if not file.peek(2).startswith(UTF_16):
        return cast(BinaryIO, file)
    return cast(BinaryIO, io.BufferedReader(_Recoded(path, cast(BinaryIO, file)), BUFFER_BYTES))


class _Recoded(io.RawIOBase):
    """UTF-16 as UTF-8, a stretch at a time."""

    def __init__(self, path: Path, file: IO[bytes]) -> None:
        self._path, self._file = path, file
        self._decoder = codecs.getincrementaldecoder("utf-16")()
        self._left = b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        try:
            while not self._left and (read := self._file.read(len(buffer))):
                self._left = self._decoder.decode(read).encode()
            self._left = self._left or self._decoder.decode(b"", final=True).encode()
        except UnicodeDecodeError as error:
            raise SrtError(
                f"{self._path}: begins as UTF-16, and is not ({error.reason})."
            ) from None
        given, self._left = self._left[: len(buffer)], self._left[len(buffer) :]
        buffer[: len(given)] = given
        return len(given)

    def close(self) -> None:
        self._file.close()
        super().close()


def _is_plain(path: Path) -> bool:
    """Whether a file holds JSONL under a name in `.gz`, as version 0.1.0 wrote it."""
    if is_stream(path):
        return False
    with open(path, "rb") as file:
        return file.read(1) in (b"{", b"[")


def lines_of(file: IO[bytes]) -> Iterator[bytes]:
    """The lines of a file; one that is too long for a record is cut, and refused when it is parsed."""
    return iter(partial(file.readline, MOST_BYTES + 1), b"")


def parse_lines(path: Path, lines: Iterable[bytes]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Yield (line number, object) from the lines of a file, as `read_rows` does."""
    empty = True
    for number, line in enumerate(lines, start=1):
        if len(line) > MOST_BYTES:
            raise SrtError(
                f"{path}:{number}: is longer than {MOST_BYTES >> 20} MiB. Split it, or leave it out."
            )
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        if not line.strip():
            continue
        empty = False
        try:
            row = orjson.loads(line)
        except orjson.JSONDecodeError as error:
            told = _not_jsonl(path, line) if number == 1 else None
            raise SrtError(f"{path}:{number}: {told or _why_not_json(line, error)}") from None
        if not isinstance(row, dict):
            hint = " This is a JSON array: write one record a line (jq -c '.[]' FILE)."
            raise SrtError(
                f"{path}:{number}: not a JSON object.{hint if isinstance(row, list) else ''}"
            )
        if line.count(b"[") + line.count(b"{") > MOST_LEVELS:
            refuse_deep(row, f"{path}:{number}")
        yield number, row
    if empty:
        raise SrtError(f"{path}: the file is empty. It needs one JSON record a line.")


def refuse_deep(row: Mapping[str, Any], place: str) -> None:
    """Raise `SrtError` for a row of more levels than every tool on its way can write again."""
    level: list[Any] = [row]
    for _ in range(MOST_LEVELS):
        inner = (each.values() if isinstance(each, dict) else each for each in level)
        level = [item for each in inner for item in each if isinstance(item, dict | list)]
        if not level:
            return
    raise SrtError(f"{place}: {TOO_DEEP}")


def _not_jsonl(path: Path, line: bytes) -> str | None:
    """Why the first line shows that this is another format; None where it shows no such thing."""
    if line.startswith(UTF_16):
        return "is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8."
    for begins, ending in PACKED.items():
        if line.startswith(begins):
            return f"is compressed. Give its name the ending {ending}."
    if line.lstrip().startswith((b"{", b"[")) or {".jsonl", ".json", ".ndjson"} & {*path.suffixes}:
        return None
    what = "what comes through a pipe" if is_stream(path) else "a file of this name"
    return (
        f"not JSON, and {what} is read as JSONL, one record a line. Other formats are known by the end "
        "of a file's name, such as .csv and .parquet."
    )


def not_utf8(error: UnicodeDecodeError) -> str:
    """What is wrong with a line, and what helps."""
    return f"not UTF-8 (byte {error.start + 1}). Convert it: iconv -f WINDOWS-1252 -t UTF-8."


def _why_not_json(line: bytes, error: orjson.JSONDecodeError) -> str:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as decoding:
        return not_utf8(decoding)
    if text.strip() in ("[", "{"):
        each = ".[]" if text.strip() == "[" else "."
        return f"not one JSON record a line. Convert it: jq -c '{each}' FILE > FILE.jsonl."
    if "depth limit" in error.msg:
        return TOO_DEEP
    if unwritable := _no_number(text):
        return (
            f"{unwritable}, which is no JSON (pandas and json.dumps write it). Write null instead, or "
            "leave the field out."
        )
    return f"not valid JSON ({error.msg}, column {error.colno}). Fix or delete this line."


def _no_number(text: str) -> str | None:
    """The first field of a record that is NaN or infinite, as "rating is NaN"; None without one."""
    try:
        left = list(json.loads(text).items())
    except (ValueError, AttributeError, RecursionError):
        return None
    for name, value in left:
        if isinstance(value, float) and not math.isfinite(value):
            shown = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
            return f"{name} is {shown}"
        if isinstance(value, dict | list):
            inner = value.items() if isinstance(value, dict) else enumerate(value)
            left += [(f"{name}.{key}", within) for key, within in inner]
    return None


def _hint_for_missing(path: Path) -> str:
    makers = {
        "prompts.jsonl": "Make one: a JSON record a line, with a field prompt. Or pass --prompts.",
        "feedback.jsonl": "Make it first: srt collect-feedback.",
        "self-feedback.jsonl": "Make it first: srt self-critique.",
        "prefs.jsonl": "Make it first: srt build-prefs.",
    }
    return f" {makers[path.name]}" if path.name in makers else " Check the path."


def read_records(
    path: Path, parse: Callable[[Mapping[str, Any]], Parsed], *, limit: int | None = None
) -> Iterator[Parsed]:
    """Read one of our artifacts; `SrtError` names file and line of a record that `parse` refuses."""
    for number, row in islice(read_rows(path), limit):
        try:
            yield parse(row)
        except ValidationError as error:
            raise SrtError(f"{path}:{number}: {describe_invalid(error, path)}") from None


@contextlib.contextmanager
def naming_row(name: Path | str, number: int) -> Iterator[None]:
    """Raise what is wrong with a row's content (`ValueError`) as `SrtError`, with file and line."""
    try:
        yield
    except ValidationError as error:
        raise SrtError(f"{name}:{number}: {describe_invalid(error, name)}") from None
    except ValueError as error:
        raise SrtError(f"{name}:{number}: {error}.") from None


def describe_invalid(error: ValidationError, file: Path | str | None = None) -> str:
    """Say what is wrong with a record, naming the field; `file` is where it stands."""
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "the record"
    if first["type"] == "too_short":
        return f"{where} is empty and needs at least one turn. Fill it in, or take the row out."
    row = first["input"]
    by_others = isinstance(row, dict) and "response" in row and "raw" not in row
    if error.title == FeedbackRecord.__name__ and first["type"] == "missing" and by_others and file:
        lacks = [str(each["loc"][0]) for each in error.errors() if each["type"] == "missing"]
        return (
            f"no record of feedback (it lacks {', '.join(lacks[:3])}). Critiques that others wrote "
            f"become such records: srt collect-feedback --critic {shlex.quote(f'file:{file}')}."
        )
    return f"{where}: {first['msg'].lower()}. Was this file written by another version or tool?"


class NewFile:
    """A file that is written beside its place and renamed into it: whole, or not there at all.

    A path that is a link is written through. `.X.srt.tmp` is a name of our own, which a killed run may
    leave behind; whatever stands there is deleted and never followed, unless a living run holds it.
    Raises `SrtError` when a keeper (`kept_by`) objects to the file that stands there.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        for keeper in _keepers:
            keeper.claim(path)
        with naming(path):
            self._place = Path(os.path.realpath(path))
            self._place.parent.mkdir(parents=True, exist_ok=True)
            self._temporary = self._place.with_name(f".{self._place.name}.srt.tmp")
            self._raw = _create_anew(self._temporary, path)
        self._placed = False
        self._file: IO[bytes] | gzip.GzipFile = self._raw
        if path.suffix == ".gz":  # the same bytes whenever it is written
            self._file = gzip.GzipFile("", "wb", compresslevel=6, fileobj=self._raw, mtime=0)

    def write(self, content: bytes) -> None:
        """Append to the file."""
        try:
            self._file.write(content)
        except OSError as error:
            raise named(error, self.path) from error

    def commit(self) -> None:
        """Sync, and rename the file into place."""
        self.place().close()

    def place(self) -> IO[bytes]:
        """The same; the file stays open, and as long as it is, `is_held` says so everywhere."""
        with naming(self.path):
            if self._file is not self._raw:
                self._file.close()
            self._raw.flush()
            os.fsync(self._raw.fileno())
            for keeper in _keepers:
                keeper.placing(self.path, self._temporary)
            os.replace(self._temporary, self._place)
            self._placed = True
            return self._raw

    def discard(self) -> None:
        """Delete what was written, unless it is in place."""
        if not self._placed:
            self._placed = True
            self._temporary.unlink(missing_ok=True)
            with contextlib.suppress(OSError):
                self._file.close()
            with contextlib.suppress(OSError):
                self._raw.close()


def _create_anew(temporary: Path, path: Path) -> IO[bytes]:
    """Create a file for this process alone; raises `SrtError` while another process writes it."""
    while True:
        try:
            left = os.open(temporary, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            break
        except OSError:  # a link, say
            temporary.unlink(missing_ok=True)
            break
        with open(left, "rb"):
            _hold(left, path)
            if _is_at(left, temporary):
                temporary.unlink()
    try:
        descriptor = os.open(temporary, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    except FileExistsError:
        raise _busy(path) from None
    file = open(descriptor, "wb")  # noqa: SIM115  held by its caller
    try:
        _hold(descriptor, path)
        if not _is_at(descriptor, temporary):
            raise _busy(path)
    except SrtError:
        file.close()
        raise
    return file


def _hold(descriptor: int, path: Path) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise _busy(path) from None


def _busy(path: Path) -> SrtError:
    return SrtError(f"{path}: another srt run is writing it. Wait for it, or choose another path.")


def _is_at(descriptor: int, path: Path) -> bool:
    """Whether an open file is the one that stands at a path."""
    with contextlib.suppress(OSError):
        return os.path.samestat(os.fstat(descriptor), os.lstat(path))
    return False


def is_held(path: Path) -> bool:
    """Whether a living process keeps a file open that it has placed."""
    while True:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        except OSError:
            return False
        with open(descriptor, "rb"):
            try:
                fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
            if _is_at(descriptor, path.resolve()):
                return False  # and not one that has been replaced meanwhile


class Keeper(Protocol):
    """Who minds the files that are written."""

    def claim(self, path: Path) -> None:
        """Raises `SrtError` for a file that must not be replaced."""
        ...

    def placing(self, path: Path, content: Path) -> None:
        """`content` is about to be renamed to `path`."""
        ...


_keepers: list[Keeper] = []


@contextlib.contextmanager
def kept_by(keeper: Keeper) -> Iterator[None]:
    """Ask a keeper about every file that this process writes in the block."""
    _keepers.append(keeper)
    try:
        yield
    finally:
        _keepers.remove(keeper)


@contextlib.contextmanager
def naming(path: Path) -> Iterator[None]:
    """Name a file in the errors of the block, as the user knows it."""
    try:
        yield
    except OSError as error:
        raise named(error, path) from error


def named(error: OSError, path: Path) -> OSError:
    """The same error, of a file that is named: what fails at writing does not say where."""
    return type(error)(error.errno, error.strerror, str(path))


class OrderedWriter:
    """Writes rows in index order, whatever order they finish in; renamed into place at the end.

    A row waits, as bytes, only until the rows before it have come.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = NewFile(path)
        self._waiting = _WaitingRows(path)
        self._next = 0
        self.rows = 0

    def add(self, index: int, records: Iterable[Record]) -> None:
        """Take the records that came of input row `index`; there may be none."""
        self._add(index, [to_line(record) for record in records])

    def add_plain(self, index: int, rows: Iterable[Mapping[str, Any]]) -> None:
        """Take rows in the format of another tool."""
        option = orjson.OPT_APPEND_NEWLINE
        self._add(index, [orjson.dumps(dict(row), option=option) for row in rows])

    def _add(self, index: int, lines: list[bytes]) -> None:
        self.rows += len(lines)
        self._waiting.add(index, b"".join(lines))
        while self._next in self._waiting:
            self._file.write(self._waiting.take(self._next))
            self._next += 1

    def append(self, lines: bytes) -> None:
        """Write lines: the fast path for rows that come in order, which are not counted."""
        self._file.write(lines)

    def commit(self) -> None:
        """Write the rows that still wait behind a gap, sync, and rename the file into place."""
        for index in sorted(self._waiting):
            self._file.write(self._waiting.take(index))
        self._file.commit()

    def discard(self) -> None:
        """Delete what was written, unless it is in place."""
        self._file.discard()
        self._waiting.close()


class _WaitingRows:
    """Rows by their index: in memory as far as there is room, the others in a file without a name."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: dict[int, bytes | tuple[int, int]] = {}
        self._bytes = 0
        self._file: IO[bytes] | None = None

    def __contains__(self, index: int) -> bool:
        return index in self._rows

    def __iter__(self) -> Iterator[int]:
        return iter(self._rows)

    def add(self, index: int, row: bytes) -> None:
        """Keep a row until it is taken."""
        if self._bytes + len(row) <= WAITING_BYTES:
            self._rows[index] = row
            self._bytes += len(row)
            return
        with naming(self._path):
            self._file = self._file or tempfile.TemporaryFile(  # noqa: SIM115  held until close()
                dir=os.path.dirname(os.path.realpath(self._path))
            )
            self._rows[index] = self._file.seek(0, os.SEEK_END), len(row)
            self._file.write(row)

    def take(self, index: int) -> bytes:
        """A row that is kept no longer."""
        row = self._rows.pop(index)
        if isinstance(row, bytes):
            self._bytes -= len(row)
            return row
        assert self._file is not None
        start, length = row
        with naming(self._path):
            self._file.seek(start)
            content = self._file.read(length)
            if not self._rows:
                self._file.truncate(0)
            return content

    def close(self) -> None:
        """Forget all rows."""
        if self._file is not None:
            with contextlib.suppress(OSError):  # what it still holds is of no use
                self._file.close()


def to_line(record: Record) -> bytes:
    """A record as its JSONL line."""
    return orjson.dumps(record.model_dump(mode="json"), option=orjson.OPT_APPEND_NEWLINE)


def write_json(path: Path, value: Any) -> None:
    """Write an indented JSON file atomically."""
    write_atomically(path, as_json(value))


def as_json(value: Any) -> bytes:
    """A value as an indented JSON file."""
    return orjson.dumps(value, option=orjson.OPT_INDENT_2) + b"\n"


def write_atomically(path: Path, content: bytes) -> None:
    """Write a file whole or not at all."""
    file = NewFile(path)
    try:
        file.write(content)
        file.commit()
    finally:
        file.discard()


def sha256_of(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def is_stream(path: Path) -> bool:
    """Whether a path can be read only once: `-` for stdin, or a pipe, as `<(...)` gives one."""
    return str(path) == "-" or (path.exists() and not path.is_file() and not path.is_dir())


def is_data_file(path: Path) -> bool:
    """Whether a path is a data file; anything else, `models/v1.0` too, is a model directory."""
    return not path.is_dir() and (path.is_file() or path.name.endswith(DATA_SUFFIXES))


def dropped_path(artifact: Path) -> Path:
    """Path of the rows that were dropped from an artifact."""
    return artifact.with_name(artifact.name.removesuffix(".jsonl") + ".dropped.jsonl")


class DroppedRows:
    """Counts the rows dropped from an artifact by reason, and writes them to `X.dropped.jsonl`."""

    def __init__(self, artifact: Path) -> None:
        self.path = dropped_path(artifact)
        self.reasons: Counter[str] = Counter()
        self._writer = OrderedWriter(self.path)

    def add(self, identifier: str, reason: str, row: Record) -> None:
        """Drop one row, for a reason."""
        dropped = Dropped(id=identifier, reason=reason, row=row.model_dump(mode="json"))
        self.append(to_line(dropped))
        self.reasons[reason] += 1

    def append(self, lines: bytes) -> None:
        """Drop rows, given as the lines of their `Dropped` records; their reasons are not counted."""
        self._writer.append(lines)

    def commit(self) -> None:
        """Rename the file into place; when nothing was dropped, delete an old one instead."""
        if self.reasons:
            self._writer.commit()
        else:
            self._writer.discard()
            self.path.unlink(missing_ok=True)

    def discard(self) -> None:
        """Delete the temporary file; does nothing after `commit`."""
        self._writer.discard()
