"""Sorting more than fits in memory: sorted runs in unnamed files, merged when they are read."""

import contextlib
import heapq
import struct
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import IO, Final

from srt_cli.runs.jsonl import BUFFER_BYTES

MEMORY_BYTES: Final = 80 << 20
BYTES_BESIDES: Final = 48
"""Memory that an entry takes beyond its bytes."""
MOST_RUNS: Final = 64
_LENGTH: Final = struct.Struct("<I")


class ExternalSort:
    """Takes entries in any order; iterates over them sorted by their bytes, as often as needed.

    What exceeds `memory_bytes` goes to files in `folder` that have no name, so not even kill -9
    leaves one behind; they take as much space as the entries.
    """

    def __init__(self, folder: Path, memory_bytes: int = MEMORY_BYTES) -> None:
        self._folder = folder
        self._memory_bytes = memory_bytes
        self._entries: list[bytes] = []
        self._bytes = 0
        self._runs: list[_Run] = []

    def __enter__(self) -> "ExternalSort":
        return self

    def __exit__(self, *error: object) -> None:
        for run in self._runs:
            run.close()

    def add(self, *entries: bytes) -> None:
        """Add entries."""
        self._entries += entries
        self._bytes += sum(map(len, entries)) + BYTES_BESIDES * len(entries)
        if self._bytes >= self._memory_bytes:
            self._spill()

    def __iter__(self) -> Iterator[bytes]:
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

    def _write(self, entries: Iterable[bytes]) -> None:
        try:
            self._runs.append(_Run(self._folder, entries))
        except OSError as error:
            # The error of an unnamed file names none: say which folder is full.
            raise OSError(error.errno, error.strerror, str(self._folder)) from error


class _Run:
    """Sorted entries in a file."""

    def __init__(self, folder: Path, entries: Iterable[bytes]) -> None:
        self._file: IO[bytes] = tempfile.TemporaryFile(  # noqa: SIM115  held until close()
            dir=folder, buffering=BUFFER_BYTES
        )
        try:
            for entry in entries:
                self._file.write(_LENGTH.pack(len(entry)) + entry)
            self._file.flush()
        except OSError:
            self.close()
            raise

    def __iter__(self) -> Iterator[bytes]:
        self._file.seek(0)
        read = self._file.read
        while head := read(_LENGTH.size):
            yield read(_LENGTH.unpack(head)[0])

    def close(self) -> None:
        with contextlib.suppress(OSError):  # what it still holds is of no use
            self._file.close()
