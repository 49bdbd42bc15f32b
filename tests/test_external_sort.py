"""Sorting that spills to disk gives what sorting in memory gives, and leaves nothing behind."""

import resource
import tempfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from srt_cli.pairs.external_sort import MOST_RUNS, ExternalSort

entries = st.lists(
    st.tuples(st.binary(max_size=3), st.binary(max_size=200)).map(b"".join), max_size=60
)


@given(entries, st.integers(1, 3000))
def test_any_entries_come_out_sorted_as_often_as_asked_for(given_entries, memory_bytes):
    with tempfile.TemporaryDirectory() as folder, ExternalSort(Path(folder), memory_bytes) as both:
        for entry in given_entries[: len(given_entries) // 2]:
            both.add(entry)
        both.add(*given_entries[len(given_entries) // 2 :])
        assert list(both) == sorted(given_entries)
        assert list(both) == sorted(given_entries)
        assert list(Path(folder).iterdir()) == []


def test_many_runs_are_merged_so_that_few_files_stay_open(tmp_path):
    with ExternalSort(tmp_path, memory_bytes=1) as runs:
        numbers = [n * 7919 % 1000 for n in range(5 * MOST_RUNS)]
        for number in numbers:
            runs.add(number.to_bytes(4) + b"v")
        assert [int.from_bytes(entry[:4]) for entry in runs] == sorted(numbers)
        assert len(runs._runs) < MOST_RUNS


def test_a_full_disk_is_told_with_the_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))
    try:
        rows = ExternalSort(tmp_path, memory_bytes=100_000)
        with pytest.raises(OSError, match="File too large") as found:
            add_many(rows)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert found.value.filename == str(tmp_path)


def add_many(rows):
    for number in range(2000):
        rows.add(number.to_bytes(4) + b"v" * 100)
