"""What `srt build-prefs` does with very many rows, measured: `make bench-prefs`.

Every figure is of a whole `srt` process, its own start included, on rows of about 1.5 KB. Each
measurement is a function of its size, which the tests call at a small one.
"""

import argparse
import hashlib
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Final

BAR_ROWS_PER_S: Final = 60_000
BAR_ON_ONE_CORE: Final = 40_000
BAR_MB: Final = 300
TEXT: Final = (
    "the of and to in a is that for it as was with be by on not he his but at are this have from or "
    "had an they which one you were all her she there would their we him been has when who will no "
    "more if out so up said what its about than into them can only other time new some could these "
    "two may first then do any like my now over such our man me even most made after also did many"
)


@dataclass(frozen=True)
class Measured:
    """A process that ended well: its speed and greatest resident memory."""

    rows_per_s: float
    rows_per_cpu_s: float
    """On a machine that does other things too, this one is the fairer."""
    peak_mb: float
    kept: int


def write_feedback(path: Path, rows: int, samples: int = 1) -> None:
    """Feedback of random words: every prompt is its own; other texts come from a stock."""
    chance = random.Random(0)
    vocabulary = TEXT.split()

    def text(words: int) -> str:
        return " ".join(chance.choices(vocabulary, k=words)).capitalize() + "."

    stock = {words: [text(words) for _ in range(997)] for words in (20, 70, 72, 55)}
    with open(path, "w") as lines:
        for number in range(rows):
            prompt, sample = divmod(number, samples)
            if sample == 0:
                asked = f"Question {prompt}: {text(30)}"
            weaknesses, response, refinement, reply = map(chance.choice, stock.values())
            row = {
                "id": str(prompt), "prompt": asked, "response": response,
                "feedback": {"weaknesses": weaknesses, "suggestions": weaknesses,
                             "score": float(chance.randint(1, 8))},
                "refinement": refinement, "refinement_score": float(chance.randint(4, 10)),
                "refinement_feedback": None, "status": "ok", "reason": None,
                "raw": {"critique": reply}, "policy": "p", "critic": "c", "sample": sample,
                "round": 1, "usage": {"prompt_tokens": 1, "completion_tokens": 2,
                                      "cached_tokens": 0, "reasoning_tokens": 0},
            }  # fmt: skip
            lines.write(json.dumps(row) + "\n")


def shuffle_lines(path: Path) -> None:
    """Put the lines of a file in another order.

    Only their places are held: what this process holds counts as held by those that it starts.
    """
    with open(path, "rb") as lines:
        starts = array("q", accumulate(map(len, lines), initial=0))
    order = array("l", range(len(starts) - 1))
    random.Random(1).shuffle(order)
    shuffled = path.with_suffix(".shuffled")
    with open(path, "rb") as lines, open(shuffled, "wb") as out:
        for number in order:
            lines.seek(starts[number])
            out.write(lines.read(starts[number + 1] - starts[number]))
    shuffled.replace(path)  # the old file is also another case's


def build(folder: Path, rows: int, *flags: object, expected: int = 0) -> Measured:
    """Run the command on `self-feedback.jsonl` of a folder."""
    line = [sys.executable, "-m", "srt_cli", "build-prefs", "--overwrite", *map(str, flags)]
    began = time.monotonic()
    process = subprocess.Popen(
        line, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True,
        env=os.environ | {"COLUMNS": "120"},
    )  # fmt: skip
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == expected, said
    seconds = time.monotonic() - began
    kept = json.loads((folder / "prefs.run.json").read_text())["tallies"]["kept"]
    cpu_s = used.ru_utime + used.ru_stime
    return Measured(rows / seconds, rows / cpu_s, used.ru_maxrss / 1024, kept)


def digest_of_lines(path: Path) -> int:
    """A number that a file has in common with every shuffling of its lines."""
    with open(path, "rb") as lines:
        return sum(int.from_bytes(hashlib.blake2b(line, digest_size=16).digest()) for line in lines)


STORE: Final = tempfile.TemporaryDirectory()


@contextmanager
def feedback(rows: int, samples: int = 1) -> Iterator[Path]:
    """A folder with so many rows of feedback, which are written once for all cases."""
    made = Path(STORE.name) / f"{rows}-{samples}.jsonl"
    if not made.exists():
        write_feedback(made, rows, samples)
    with tempfile.TemporaryDirectory() as name:
        os.link(made, Path(name) / "self-feedback.jsonl")
        yield Path(name)


def as_it_comes(rows: int) -> Measured:
    """Default settings."""
    with feedback(rows) as folder:
        return build(folder, rows)


def on_one_core(rows: int) -> Measured:
    """Default settings, and no second core to share the work with."""
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(cores)})
    try:
        return as_it_comes(rows)
    finally:
        os.sched_setaffinity(0, cores)


def all_dropped(rows: int) -> Measured:
    """Every row falls out, with its reason."""
    with feedback(rows) as folder:
        return build(folder, rows, "--min-gain", 11, expected=1)


def shuffled(rows: int) -> Measured:
    """The rows in another order, which must give the same pairs."""
    with feedback(rows) as folder:
        build(folder, rows)
        straight = digest_of_lines(folder / "prefs.jsonl")
        shuffle_lines(folder / "self-feedback.jsonl")
        measured = build(folder, rows)
        assert digest_of_lines(folder / "prefs.jsonl") == straight
        return measured


def tiers(rows: int) -> Measured:
    """A strategy over whole prompts, four samples each."""
    with feedback(rows, samples=4) as folder:
        return build(folder, rows, "--strategy", "tiers")


def length_balance(rows: int) -> Measured:
    """Two passes over the pairs."""
    with feedback(rows) as folder:
        return build(folder, rows, "--length-balance", "margin")


def near_duplicates(rows: int) -> Measured:
    """Prompts compared with one another; held to no bar, for its memory grows."""
    with feedback(rows) as folder:
        return build(folder, rows, "--near-duplicates", 0.8)


BENCHES: Final[dict[str, Callable[[int], Measured]]] = {
    bench.__name__: bench
    for bench in (
        as_it_comes,
        on_one_core,
        all_dropped,
        shuffled,
        tiers,
        length_balance,
        near_duplicates,
    )
}
HELD_TO_NO_BAR: Final = ("length_balance", "near_duplicates")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("only", nargs="*", help=f"some of: {', '.join(BENCHES)}")
    parser.add_argument("--rows", type=int, default=1_000_000)
    asked: Any = parser.parse_args()
    unknown = set(asked.only) - set(BENCHES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    failed = False
    print(
        f"{asked.rows:,} rows; the bar: {BAR_ROWS_PER_S:,} rows/s on two cores, {BAR_ON_ONE_CORE:,} on "
        f"one, {BAR_MB} MB"
    )
    cores = len(os.sched_getaffinity(0))
    for name in asked.only or BENCHES:
        found = BENCHES[name](asked.rows)
        alone = name == "on_one_core" or cores == 1
        bar = BAR_ON_ONE_CORE if alone else BAR_ROWS_PER_S
        met = found.rows_per_s >= bar and found.peak_mb < BAR_MB
        failed |= not met and name not in HELD_TO_NO_BAR
        print(
            f"{name:<16} {found.rows_per_s:>8,.0f} rows/s   {found.rows_per_cpu_s:>8,.0f} a second of "
            f"processor   peak {found.peak_mb:>5,.0f} MB   "
            f"{found.kept:>9,} pairs   {'yes' if met else 'NO'}",
            flush=True,
        )
    sys.exit(failed)


if __name__ == "__main__":
    main()
