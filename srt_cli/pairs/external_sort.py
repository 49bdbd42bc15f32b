"""Sorting more than fits in memory: sorted runs in unnamed files, merged when they are read."""

import contextlib
import heapq
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

KeyValue = tuple[bytes, bytes]
"""Key and value; entries are ordered by both."""

MEMORY_BYTES: Final = 80 << 20
BYTES_BESIDES: Final = 160
"""Memory that an entry takes beyond its bytes."""
MOST_RUNS: Final = 64
BUFFER_BYTES: Final = 1 << 18
_LENGTHS: Final = struct.Struct("<II")


class ExternalSort:
    """Takes entries in any order; iterates over them sorted by key and value, as often as needed.

    What exceeds `memory_bytes` goes to files in `folder` that have no name, so not even kill -9
    leaves one behind; they take as much space as the entries.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._entries: list[KeyValue] = []
        self._bytes = 0
        self._runs: list[_Run] = []

    def __enter__(self) -> "ExternalSort":
        return self

    def __exit__(self, *error: object) -> None:
        for run in self._runs:
            run.close()

    def add(self, key: bytes, value: bytes) -> None:
        """Add an entry."""
        self._entries.append((key, value))
        self._bytes += len(key) + len(value) + BYTES_BESIDES
        if self._bytes >= self._memory_bytes:
            self._spill()

    def __iter__(self) -> Iterator[KeyValue]:
        """All entries in order; none may be added meanwhile."""
        if self._runs and self._entries:
            self._spill()
        self._entries.sort()
        return heapq.merge(*self._runs) if self._runs else iter(self._entries)

    def _spill(self) -> None:
        self._entries.sort()
        self._write(self._entries)
        self._entries, self._bytes = [], 0
        if len(self._runs) >= MOST_RUNS:
            runs, self._runs = self._runs, []
            self._write(heapq.merge(*runs))
            for run in runs:
                run.close()

    def _write(self, entries: Iterable[KeyValue]) -> None:
        try:
            self._runs.append(_Run(self._folder, entries))
        except OSError as error:
            # The error of an unnamed file names none: say which folder is full.
            raise OSError(error.errno, error.strerror, str(self._folder)) from error


class _Run:
    """Sorted entries in a file."""

    def __init__(self, folder: Path, entries: Iterable[KeyValue]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115  held until close()
            dir=folder, buffering=BUFFER_BYTES
        )
        try:
            for key, value in entries:
                self._file.write(_LENGTHS.pack(len(key), len(value)) + key + value)
            self._file.flush()
        except OSError:
            self.close()
            raise

    def __iter__(self) -> Iterator[KeyValue]:
        self._file.seek(0)
        read = self._file.read
        while head := read(_LENGTHS.size):
            key_length, value_length = _LENGTHS.unpack(head)
            entry = read(key_length + value_length)
            yield entry[:key_length], entry[key_length:]

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it still holds is of no use
            self._file.close()
