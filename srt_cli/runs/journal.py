"""The append-only journal: one line per finished model call, kept before anything is parsed.

It is the truth that every JSONL artifact is derived from. A line is `{"key", "call", "model",
...reply}`, or `{"key", "forgotten": true}` for a call that the user wants made again. The key is a
digest of the canonical request, so a call that was paid for once is found again whatever the order,
the number or the later fate of its row. kill -9 loses at most the calls in flight: each append is
one write, synced to disk in groups.
"""

import fcntl
import hashlib
import os
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final

import orjson

from srt_cli.errors import SrtError

SYNC_LINES: Final = 64
SYNC_SECONDS: Final = 0.5
ORPHAN_SECONDS: Final = 10.0
"""How long a process whose parent was killed may take to notice."""
FORGOTTEN: Final = "forgotten"


def request_key(canonical: dict[str, Any]) -> bytes:
    """16 bytes that stand for a request; equal requests, equal keys."""
    plain = orjson.dumps(canonical, option=orjson.OPT_SORT_KEYS)
    return hashlib.blake2b(plain, digest_size=16).digest()


class Journal:
    """A journal file open for one writer.

    Memory holds one offset a line; replies are read back from disk when asked for. A line that
    does not parse (a torn tail) is skipped and its call is owed again; `unreadable` counts them.
    """

    def __init__(self, path: Path, *, beside: Path | None = None) -> None:
        """Open for writing; replies of the journal `beside` are found too, and never changed."""
        self.path = path
        self.unreadable = 0
        self.spent: dict[str, Counter[str]] = {}
        """Calls and tokens of every reply in the file, per model identity."""
        self._offsets: dict[bytes, int] = {}
        self._unsynced = 0
        self._synced_at = time.monotonic()
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = open(path, "ab+", buffering=0)  # noqa: SIM115  held until close()
        _lock(self._file, path)
        self._end = self._read_index()
        self._beside_offsets: dict[bytes, int] = {}
        if beside is not None and beside.exists():
            self._beside = open(beside, "rb")  # noqa: SIM115  held until close()
            self._beside_offsets = _offsets_in(self._beside)

    def __enter__(self) -> "Journal":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._offsets)

    def __contains__(self, key: bytes) -> bool:
        return key in self._offsets

    def __iter__(self) -> Iterator[bytes]:
        """The keys of all replies that are kept."""
        return iter(self._offsets)

    def get(self, key: bytes) -> dict[str, Any] | None:
        """The reply kept under a key; the newest, if a call was made twice."""
        offset = self._offsets.get(key)
        if offset is not None:
            self._file.seek(offset)
            entry: dict[str, Any] = orjson.loads(self._buffered_line())
            return entry
        if key in self._beside_offsets:
            self._beside.seek(self._beside_offsets[key])
            return _entry_in(self._beside.readline())
        return None

    def absorb(self, part: Path) -> None:
        """Take over the replies of another process's journal, and delete that file."""
        with open(part, "rb+") as lines:
            _lock(lines, part, wait_s=ORPHAN_SECONDS)
            for line in lines:
                entry = _entry_in(line)
                if entry is None or FORGOTTEN in entry:
                    continue
                key = bytes.fromhex(entry["key"])
                if key not in self:
                    self._offsets[key] = self._append_line(entry)
                    self._count(entry)
            self.sync()
            part.unlink()

    def append(self, key: bytes, call: str, reply: dict[str, Any]) -> None:
        """Keep a reply; `call` says in words what was asked, for people who read the file."""
        self._offsets[key] = self._append_line({"key": key.hex(), "call": call, **reply})
        self._count(reply)

    def forget(self, key: bytes) -> None:
        """Have a call made again; its old reply stays in the file, and stays counted as paid."""
        if self._offsets.pop(key, None) is not None:
            self._append_line({"key": key.hex(), FORGOTTEN: True})

    def _append_line(self, entry: dict[str, Any]) -> int:
        """Write one line; returns where it stands."""
        line = orjson.dumps(entry) + b"\n"
        offset = self._end
        self._write(line)
        self._end += len(line)
        self._unsynced += 1
        if self._unsynced >= SYNC_LINES or time.monotonic() - self._synced_at > SYNC_SECONDS:
            self.sync()
        return offset

    def _count(self, entry: Mapping[str, Any]) -> None:
        spent = self.spent.setdefault(entry.get("model", ""), Counter(calls=0))
        spent["calls"] += 1
        spent.update(entry.get("usage", {}))

    def sync(self) -> None:
        """Bring what was appended to the disk itself."""
        if self._unsynced:
            os.fsync(self._file.fileno())
            self._unsynced = 0
        self._synced_at = time.monotonic()

    def close(self) -> None:
        """Sync, and let the next writer in."""
        if not self._file.closed:
            self.sync()
            self._file.close()

    def _write(self, line: bytes) -> None:
        """Write a whole line, or leave none of it behind: a full disk must not tear the file."""
        written = 0
        try:
            while written < len(line):
                written += self._file.write(line[written:])
        except OSError:
            self._file.truncate(self._end)
            raise

    def _buffered_line(self) -> bytes:
        chunks = []
        while chunk := self._file.read(16384):
            head, newline, _ = chunk.partition(b"\n")
            chunks.append(head)
            if newline:
                break
        return b"".join(chunks)

    def _read_index(self) -> int:
        """Index every whole line; returns where the next one goes."""
        offset = 0
        with open(self.path, "rb") as lines:
            for line in lines:
                entry = _entry_in(line)
                if entry is None:
                    self.unreadable += 1
                elif FORGOTTEN in entry:
                    self._offsets.pop(bytes.fromhex(entry["key"]), None)
                else:
                    self._offsets[bytes.fromhex(entry["key"])] = offset
                    self._count(entry)
                offset += len(line)
                torn = not line.endswith(b"\n")
        if offset and torn:
            self._file.write(b"\n")
            offset += 1
        return offset


def _lock(file: IO[bytes], path: Path, wait_s: float = 0.0) -> None:
    """Become the one writer of a file, waiting so long for another; else `SrtError`."""
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


def _offsets_in(lines: IO[bytes]) -> dict[bytes, int]:
    """Where each kept reply of a journal begins."""
    offsets: dict[bytes, int] = {}
    start = 0
    for line in lines:
        entry = _entry_in(line)
        if entry is not None and FORGOTTEN in entry:
            offsets.pop(bytes.fromhex(entry["key"]), None)
        elif entry is not None:
            offsets[bytes.fromhex(entry["key"])] = start
        start += len(line)
    return offsets


def _entry_in(line: bytes) -> dict[str, Any] | None:
    if not line.endswith(b"\n"):
        return None
    try:
        entry: dict[str, Any] = orjson.loads(line)
        bytes.fromhex(entry["key"])
    except (orjson.JSONDecodeError, KeyError, TypeError, ValueError):
        return None
    return entry
