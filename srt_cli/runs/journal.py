"""The append-only journal: one line per finished model call, written before anything is parsed.

Every JSONL artifact is derived from it. A line is `{"key", "call", "model", ...reply}`, or
`{"key", "forgotten": true}` for a call that the user wants repeated. The key is a digest of the
canonical request, so a paid call is found again whatever becomes of its row: moved, repeated or
dropped. kill -9 loses at most the calls in flight: each append is one write, synced in groups.
"""

import fcntl
import glob
import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Final

import orjson

from srt_cli.errors import SrtError
from srt_cli.runs.jsonl import named, naming

SYNC_LINES: Final = 64
SYNC_SECONDS: Final = 0.5
ORPHAN_SECONDS: Final = 10.0
"""How long a process may take to notice that its parent was killed."""
FORGOTTEN: Final = "forgotten"


def request_key(canonical: dict[str, Any]) -> bytes:
    """A 16-byte digest of a request; equal requests have equal keys."""
    plain = orjson.dumps(canonical, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(plain, digest_size=16).digest()


class Journal:
    """A journal file, open for one writer.

    Memory holds one offset per line; replies are read from disk on demand. A line that does not
    parse, such as a torn last one, is skipped and its call is owed again; `unreadable` counts them.
    """

    def __init__(self, path: Path, *, beside: Path | None = None, before: int = 0) -> None:
        """Open for writing; `get` also finds replies in the journal `beside`, which is only read.

        The first `before` bytes of that one, or without it of this one, are from earlier runs.
        """
        self.path = path
        self.before = before
        self.unreadable = 0
        self.spent: dict[str, Counter[str]] = {}
        """Calls and tokens of all replies in the file, by model identity; `estimated` calls too."""
        self.told: dict[str, Counter[str]] = {}
        """The same, and the dollars, of those replies whose server told what they cost."""
        self.forgotten: Counter[bytes] = Counter()
        """How often a call was made owed again."""
        self._unsynced = 0
        self._synced_at = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  held until close()
        _lock(self._file, path)
        self._offsets: dict[bytes, int]
        self._end = self._read_index()
        self._beside_offsets: dict[bytes, int] = {}
        if beside is not None and beside.exists():
            self._beside = open(beside, "rb")  # noqa: SIM115  held until close()
            self._beside_offsets = _offsets_in(self._beside, lambda entry: None)
        self._main_offsets = self._offsets if beside is None else self._beside_offsets

    def __enter__(self) -> "Journal":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: bytes) -> bool:
        return key in self._offsets

    def __iter__(self) -> Iterator[bytes]:
        """The keys of all stored replies."""
        return iter(self._offsets)

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The reply stored under a key, the newest if a call was made twice; None if there is none."""
        offset = self._offsets.get(key)
        if offset is not None:
            self._file.seek(offset)
            entry: dict[str, Any] = orjson.loads(self._buffered_line())
            return entry
        if key in self._beside_offsets:
            self._beside.seek(self._beside_offsets[key])
            return _entry_in(self._beside.readline())
        return None

    def was_there(self, key: bytes) -> bool:
        """Whether a reply is from earlier runs, and not of this one, interrupted though it was."""
        return self._main_offsets.get(key, self.before) < self.before

    def part(self, name: str) -> Path:
        """Where another process of the run keeps its replies until they are absorbed."""
        return self.path.with_name(f"{self.path.name.removesuffix('.jsonl')}.part-{name}.jsonl")

    def absorb_parts(self) -> None:
        """Take over what processes of this run, or of one that was killed, have answered."""
        ours = glob.escape(self.path.name.removesuffix(".jsonl"))
        for part in sorted(self.path.parent.glob(f"{ours}.part-*.jsonl")):
            self._absorb(part)

    def _absorb(self, part: Path) -> None:
        """Move the replies of another process's journal into this one, and delete its file."""
        with open(part, "rb+") as lines:
            _lock(lines, part, wait_s=ORPHAN_SECONDS)
            for line in lines:
                entry = _entry_in(line)
                if entry is None or FORGOTTEN in entry:
                    continue
                key = bytes.fromhex(entry["key"])
                if key not in self:
                    self._append_line(entry)
            self.sync()
            part.unlink()

    def append(self, key: bytes, call: str, reply: dict[str, Any]) -> None:
        """Store a reply; `call` says what was asked, for people who read the file."""
        self._append_line({"key": key.hex(), "call": call, **reply})

    def forget(self, key: bytes) -> None:
        """Make a call owed again; its old reply stays in the file and still counts as paid."""
        if self._offsets.pop(key, None) is not None:
            self.forgotten[key] += 1
            self._append_line({"key": key.hex(), FORGOTTEN: True})

    def catch_up(self) -> None:
        """Note what was written last, where an interruption came before that was noted."""
        self._file.seek(self._end)
        for line in self._file.readlines():
            self._take_in(line, _entry_in(line))

    def _append_line(self, entry: Mapping[str, Any]) -> None:
        line = orjson.dumps(entry) + b"\n"
        self._write(line)
        self._take_in(line, entry)
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()

    def _take_in(self, line: bytes, entry: Mapping[str, Any] | None) -> None:
        """Note where a line that ends the file stands, and what it cost."""
        if entry is not None and FORGOTTEN not in entry:
            self._offsets[bytes.fromhex(entry["key"])] = self._end
            self._count(entry)
        self._end += len(line)

    def _count(self, entry: Mapping[str, Any]) -> None:
        spent = self.spent.setdefault(entry.get("model", ""), Counter(calls=0))
        spent["calls"] += 1
        spent.update(entry.get("usage", {}))
        spent["estimated"] += bool(entry.get("estimated"))
        if "cost" in entry:
            told = self.told.setdefault(entry.get("model", ""), Counter(calls=0))
            told.update({"calls": 1, "dollars": entry["cost"], **entry.get("usage", {})})

    def sync(self) -> None:
        """Sync what was appended to disk."""
        if self._unsynced:
            with naming(self.path):
                os.fsync(self._file.fileno())
            self._unsynced = 0
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync and release the lock."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write(self, line: bytes) -> None:
        """Write a whole line or none of it: a full disk must not tear the file."""
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError as error:
            self._file.truncate(self._end)
            raise named(error, self.path) from error

    def _buffered_line(self) -> bytes:
        chunks = []
        while chunk := self._file.read(16384):
            head, newline, _ = chunk.partition(b"\n")
            chunks.append(head)
            if newline:
                break
        return b"".join(chunks)

    def _read_index(self) -> int:
        """Index every whole line and return the offset of the next one."""
        with open(self.path, "rb") as lines:
            self._offsets = _offsets_in(lines, self._note)
            end = lines.tell()
            torn = end > 0 and os.pread(lines.fileno(), 1, end - 1) != b"\n"
        if torn:
            self._file.write(b"\n")
        return end + torn

    def _note(self, entry: Mapping[str, Any] | None) -> None:
        if entry is None:
            self.unreadable += 1
        elif FORGOTTEN in entry:
            self.forgotten[bytes.fromhex(entry["key"])] += 1
        else:
            self._count(entry)


def _lock(file: IO[bytes], path: Path, wait_s: float = 0.0) -> None:
    """Become the only writer of a file; `SrtError` if another still holds it after `wait_s`."""
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= deadline:
                file.close()
                raise SrtError(
                    f"{path}: another srt run is writing here. Wait for it, or choose another --out."
                ) from None
            time.sleep(0.1)


def _offsets_in(
    lines: IO[bytes], note: Callable[[Mapping[str, Any] | None], None]
) -> dict[bytes, int]:
    """The offset of each stored reply of a journal; `note` is told every entry, None for torn ones."""
    offsets: dict[bytes, int] = {}
    start = 0
    for line in lines:
        entry = _entry_in(line)
        note(entry)
        if entry is not None:
            key = bytes.fromhex(entry["key"])
            if FORGOTTEN in entry:
                offsets.pop(key, None)
            else:
                offsets[key] = start
        start += len(line)
    return offsets


def _entry_in(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = orjson.loads(line)
        bytes.fromhex(entry["key"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError, AttributeError):
        return None
    return entry if FORGOTTEN in entry or _counts(entry) else None


def _counts(entry: Mapping[str, Any]) -> bool:
    """Whether an entry has a text, and a model, tokens and cost that can be added up."""
    usage, cost = entry.get("usage", {}), entry.get("cost", 0.0)
    return (
        isinstance(entry.get("text"), str)
        and isinstance(entry.get("model", ""), str)
        and isinstance(usage, dict)
        and all(type(count) is int for count in usage.values())
        and type(cost) in (int, float)
    )
