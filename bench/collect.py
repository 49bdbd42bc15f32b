"""What `srt collect-feedback` does with an API, measured: `make bench`.

Every figure is of whole `srt` processes against a chat server in a process of its own; every count
is the server's, from its log of requests. Each measurement is a function of its size, which the
tests call at a small one. Medians of several runs; ratios come from the same run.
"""

import argparse
import contextlib
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from srt_cli.runs.journal import Journal

HERE: Final = Path(__file__).parent
PEERS: Final = HERE.parent / "build/peers/bin/python"
"""Where `make bench-peers` installs what others would use; it is measured where it is there."""
FEEDBACK: Final = "feedback.jsonl"
JOURNAL: Final = "feedback.journal.jsonl"


# --- the two processes -----------------------------------------------------------------------


class ChatServer:
    """`chat_server.py` running on the first core, for as long as the `with` block."""

    def __init__(self, *flags: object) -> None:
        line = [sys.executable, HERE / "chat_server.py", *map(str, flags)]
        self.process = subprocess.Popen(
            list(map(str, line)), stdout=subprocess.PIPE, text=True, preexec_fn=on_core(0)
        )
        assert self.process.stdout is not None
        self.url = f"http://127.0.0.1:{int(self.process.stdout.readline())}/v1"

    def __enter__(self) -> "ChatServer":
        return self

    def __exit__(self, *error: object) -> None:
        self.process.kill()
        self.process.wait()

    def stats(self) -> dict[str, float]:
        """Counts so far; a status or a fault that never came counts 0."""
        with urllib.request.urlopen(f"{self.url}/stats") as reply:
            counts: dict[str, float] = json.load(reply)
        return dict.fromkeys(("requests", "200", "429", "repeated"), 0) | counts


def on_core(number: int) -> Callable[[], None]:
    """Client and server on a core each, where there are two."""
    cores = sorted(os.sched_getaffinity(0))
    core = cores[number % len(cores)]
    return lambda: os.sched_setaffinity(0, {core})


def srt_line(server: ChatServer, *flags: object) -> list[str]:
    critic = f"{server.url}#bench"
    line = [sys.executable, "-m", "srt_cli", "collect-feedback", "--critic", critic, *flags]
    return list(map(str, line))


def start(folder: Path, line: list[str]) -> "subprocess.Popen[str]":
    environment = os.environ | {"OPENAI_API_KEY": "none", "COLUMNS": "120", "HF_HUB_OFFLINE": "1"}
    return subprocess.Popen(
        line, cwd=folder, env=environment, preexec_fn=on_core(1), text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip


@dataclass(frozen=True)
class Finished:
    """A process that ended: its times, and the most memory, files and threads that it had."""

    code: int
    wall_s: float
    core_s: float
    peak_mb: float
    output: str
    handles: int
    threads: int

    @property
    def figures(self) -> dict[str, float]:
        """What it took."""
        return {"wall_s": self.wall_s, "core_s": self.core_s, "peak_mb": self.peak_mb}


def finish(folder: Path, line: list[str], expected: int = 0) -> Finished:
    """Run a process to its end; anything but the expected status stops the benchmark."""
    began = time.monotonic()
    process = start(folder, line)
    most = {"fd": 0, "task": 0}
    threading.Thread(target=_watch, args=(process.pid, most), daemon=True).start()
    assert process.stdout is not None
    output = process.stdout.read()
    _, status, used = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    assert process.returncode == expected, output
    core_s = used.ru_utime + used.ru_stime
    wall_s, peak_mb = time.monotonic() - began, used.ru_maxrss / 1024
    handles, threads = most["fd"], most["task"]
    return Finished(process.returncode, wall_s, core_s, peak_mb, output, handles, threads)


def _watch(pid: int, most: dict[str, int]) -> None:
    """Note the most open files and threads of a process until it ends."""
    with contextlib.suppress(OSError):
        while True:
            for name in most:
                most[name] = max(most[name], len(os.listdir(f"/proc/{pid}/{name}")))
            time.sleep(0.05)


@contextmanager
def folder_of(rows: int) -> Iterator[Path]:
    """A fresh folder with so many answered prompts; the critic is asked twice for each."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_prompts(folder, rows)
        yield folder


def write_prompts(folder: Path, rows: int) -> None:
    with open(folder / "prompts.jsonl", "w") as lines:
        for number in range(rows):
            prompt = f"Prompt {number}: " + "say something grand. " * 40
            row = {"id": number, "prompt": prompt, "response": f"It is thing {number}." * 10}
            lines.write(json.dumps(row) + "\n")


def count_lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# --- the measurements ------------------------------------------------------------------------


def throughput(calls: int, in_flight: int, *faults: object) -> dict[str, float]:
    """Requests a second once the first has come, and seconds of the whole process."""
    with folder_of(calls // 2) as folder, ChatServer("--latency", 0.05, *faults) as server:
        done = finish(folder, srt_line(server, "--concurrency", in_flight))
        stats = server.stats()
        assert stats["200"] == calls
    return {"requests/s": calls / stats["seconds"], **done.figures}


def plain_throughput(kind: str, calls: int, in_flight: int, *faults: object) -> dict[str, float]:
    """The same figures of a loop written by hand."""
    with tempfile.TemporaryDirectory() as name, ChatServer("--latency", 0.05, *faults) as server:
        python = PEERS if kind in PACKAGES else sys.executable
        line = [python, HERE / "plain_clients.py", kind, server.url,
                "--calls", calls, "--in-flight", in_flight]  # fmt: skip
        done = finish(Path(name), list(map(str, line)))
        stats = server.stats()
        assert stats["200"] >= calls  # some ask once more, to learn of limits
    return {"requests/s": calls / stats["seconds"], **done.figures}


def side_by_side(calls: int, in_flight: int, *faults: object) -> dict[str, dict[str, float]]:
    """One round: `srt`, then each of its peers; the figures of `throughput` by name."""
    found = {"srt": throughput(calls, in_flight, *faults)}
    for kind in (*LOOPS, *(package for package in PACKAGES if PEERS.exists())):
        found[kind] = plain_throughput(kind, calls, in_flight, *faults)
    return found


def share_of_ideal(calls: int, in_flight: int, latency_s: float) -> dict[str, float]:
    """calls x latency / in-flight, over the seconds from the first request to the last reply."""
    with folder_of(calls // 2) as folder, ChatServer("--latency", latency_s) as server:
        finish(folder, srt_line(server, "--concurrency", in_flight))
        stats = server.stats()
    return {"share": calls * latency_s / in_flight / stats["seconds"]}


def under_a_limit(calls: int, admitted_per_s: float, *flags: object) -> dict[str, float]:
    """Answers a second over those admitted, and the share of requests that were refused."""
    with (
        folder_of(calls // 2) as folder,
        ChatServer("--latency", 0.3, "--jitter", 0.5, "--admit", admitted_per_s, *flags) as server,
    ):
        finish(folder, srt_line(server))
        stats = server.stats()
        assert stats["200"] == calls
    return {
        "goodput": calls / stats["seconds"] / admitted_per_s,
        "wasted": stats["429"] / stats["requests"],
    }


def killed(rows: int, in_flight: int, answered: int) -> dict[str, float]:
    """kill -9 after so many journaled calls, then the same line: what is missing, what is repeated."""
    with folder_of(rows) as folder, ChatServer("--latency", 0.05, "--jitter", 0.9) as server:
        line = srt_line(server, "--concurrency", in_flight)
        process = start(folder, line)
        while count_lines(folder / JOURNAL) < answered:
            assert process.poll() is None, "it ended before it could be killed"
            time.sleep(0.001)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        kept = journaled_keys(folder)
        finish(folder, line)
        after = journaled_keys(folder)
        stats = server.stats()
        ids = [row["id"] for row in rows_in(folder / FEEDBACK)]
    return {
        "rows missing": rows - len(set(ids)),
        "journaled calls made twice": len(after) - len(set(after)),
        "calls repeated": stats["repeated"],
        "kept at the kill": len(kept),
    }


def rows_in(path: Path) -> Iterator[dict[str, Any]]:
    """The whole lines of a JSONL file; a torn one is left out."""
    with open(path, "rb") as lines:
        yield from (json.loads(line) for line in lines if line.endswith(b"\n"))


def journaled_keys(folder: Path) -> list[str]:
    return [line["key"] for line in rows_in(folder / JOURNAL)]


def many_rows(rows: int) -> dict[str, float]:
    """A run of many rows, then the same line over its full journal."""
    with folder_of(rows) as folder, ChatServer("--latency", 0.02) as server:
        first = finish(folder, srt_line(server, "--concurrency", 256))
        asked = server.stats()["requests"]
        written = (folder / FEEDBACK).read_bytes()
        again = finish(folder, srt_line(server))
        (folder / FEEDBACK).unlink()
        (folder / "feedback.run.json").unlink()
        rebuilt = finish(folder, srt_line(server))
        assert (folder / FEEDBACK).read_bytes() == written
        return {
            "peak_mb": max(first.peak_mb, rebuilt.peak_mb),
            "handles": first.handles,
            "threads": first.threads,
            "first_s": first.wall_s,
            "again_s": again.wall_s,
            "rebuilt_s": rebuilt.wall_s,
            "calls again": server.stats()["requests"] - asked,
            "journal bytes a row": (folder / JOURNAL).stat().st_size / rows,
            "feedback bytes a row": len(written) / rows,
        }


def quota_stop(rows: int, in_flight: int, quota: int) -> dict[str, float]:
    """Requests that came after the account was empty."""
    with folder_of(rows) as folder, ChatServer("--latency", 0.05, "--quota", quota) as server:
        finish(folder, srt_line(server, "--concurrency", in_flight), expected=5)
        stats = server.stats()
        journaled = count_lines(folder / JOURNAL)
    return {
        "answered": stats["200"],
        "answers lost": stats["200"] - journaled,
        "further calls": stats["requests"] - stats["200"],
    }


def spent_under_a_cap(rows: int, in_flight: int, dollars: float) -> dict[str, float]:
    """What replies of very different length cost under `--max-cost`, at a dollar per 1,000 tokens."""
    flags = ("--max-cost", dollars, "--price", "bench=0/1000", "--critic-max-tokens", 2000)
    with (
        folder_of(rows) as folder,
        ChatServer("--latency", 0.05, "--completion-tokens", "5-2000") as server,
    ):
        finish(folder, srt_line(server, "--concurrency", in_flight, *flags), expected=4)
        tokens = sum(line["usage"]["completion_tokens"] for line in rows_in(folder / JOURNAL))
        calls = server.stats()["requests"]
    return {"spent": tokens / 1000, "cap": dollars, "calls": calls}


LOOPS: Final = ("aiohttp", "openai-aiohttp", "openai")
PACKAGES: Final = ("curator",)
AHEAD_OF: Final = {"openai-aiohttp": 1.7, "openai": 3.0, "curator": 3.0}
"""How many times as long others take at least."""
MOST_MB: Final = 80


class UnsyncedJournal(Journal):
    """A journal that leaves it to the system when lines reach the disk."""

    def sync(self) -> None:
        self._unsynced = 0


def cost_of_syncing(lines: int) -> dict[str, float]:
    """Lines a second that a journal takes, synced and not."""
    reply = {"model": "bench", "text": "It is grand. " * 60, "usage": {"completion_tokens": 180}}
    figures = {}
    for name, kind in (("synced", Journal), ("unsynced", UnsyncedJournal)):
        with tempfile.TemporaryDirectory(dir=Path.home()) as folder:
            began = time.monotonic()
            with kind(Path(folder) / "j.jsonl") as journal:
                for number in range(lines):
                    journal.append(number.to_bytes(16), "bench", reply)
            figures[f"{name} lines/s"] = lines / (time.monotonic() - began)
    return figures


# --- the table -------------------------------------------------------------------------------


def median_of(
    repeats: int, measure: Callable[..., dict[str, float]], *size: object
) -> dict[str, float]:
    """The median of each figure over several runs of one measurement."""
    runs = [measure(*size) for _ in range(repeats)]
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def worst_of(runs: list[dict[str, float]]) -> dict[str, float]:
    """The greatest of each figure: for what must never happen."""
    return {name: max(run[name] for run in runs) for name in runs[0]}


@dataclass
class Table:
    """Lines as they are measured; `failed` when a bar was missed."""

    failed: bool = False

    def line(self, name: str, figures: str, bar: str, met: bool) -> None:
        self.failed |= not met
        print(f"{name:<36} {figures:<70} {bar:<30} {'yes' if met else 'NO'}", flush=True)


def bench_throughput(table: Table, repeats: int) -> None:
    rates = {}
    for in_flight in (128, 512):
        ours = median_of(repeats, throughput, 6000, in_flight)["requests/s"]
        plain = median_of(repeats, plain_throughput, "openai", 2000, in_flight)["requests/s"]
        rates[in_flight] = ours
        table.line(
            f"1 throughput, {in_flight} in flight",
            f"{ours:,.0f} requests/s; AsyncOpenAI {plain:,.0f}; {ours / plain:.1f}x",
            "600 requests/s and 2x", ours >= 600 and ours >= 2 * plain,
        )  # fmt: skip
    drop = rates[512] / rates[128]
    table.line("1 from 128 to 512 in flight", f"x {drop:.2f}", "no drop (0.95)", drop >= 0.95)
    for name, faults, bars in (
        ("1 2,000 calls, whole process", (), AHEAD_OF),
        ("1 the same, 5 % first-sight 429", ("--fault", "429:0.05"), {"openai": 1.0}),
    ):
        rounds = [side_by_side(2000, 128, *faults) for _ in range(repeats)]
        wall_s, core_s, peak_mb = (
            statistics.median(each["srt"][figure] for each in rounds)
            for figure in ("wall_s", "core_s", "peak_mb")
        )
        met = peak_mb < MOST_MB
        told = [f"{wall_s:.1f} s, {core_s:.1f} of a core, {peak_mb:.0f} MB"]
        for kind in sorted(rounds[0].keys() - {"srt"}):
            wall, core = (
                [each[kind][figure] / each["srt"][figure] for each in rounds]
                for figure in ("wall_s", "core_s")
            )
            ratio = statistics.median(wall)
            span = f"{min(wall):.1f} to {max(wall):.1f}; of a core {statistics.median(core):.1f}"
            told.append(f"{kind} {ratio:.1f}x ({span})")
            met &= ratio >= bars.get(kind, 0.0)
        bar = ", ".join(f"{kind} {least:g}x" for kind, least in bars.items())
        table.line(name, "; ".join(told), bar, met)


def bench_latency(table: Table, repeats: int) -> None:
    share = median_of(repeats, share_of_ideal, 2560, 128, 0.5)["share"]
    table.line("2 of the ideal at 0.5 s", f"{share:.1%}", "95 %", share >= 0.95)


def bench_limit(table: Table, repeats: int) -> None:
    for name, flags in (("Retry-After 1", ()), ("no header", ("--retry-after", -1))):
        found = median_of(repeats, under_a_limit, 6000, 200, *flags)
        table.line(
            f"3 server admits 200/s, {name}",
            f"goodput {found['goodput']:.1%}, wasted {found['wasted']:.1%}", "90 %, at most 5 %",
            found["goodput"] >= 0.9 and found["wasted"] <= 0.05,
        )  # fmt: skip


def bench_kill(table: Table, repeats: int) -> None:
    points = [100 + 80 * number for number in range(10)]
    runs = [killed(500, 64, answered) for answered in points]
    found = worst_of(runs)
    missing, twice = found["rows missing"], found["journaled calls made twice"]
    repeated = ", ".join(f"{run['calls repeated']:.0f}" for run in runs)
    table.line(
        "4 kill -9, 64 in flight, 10 points",
        f"missing {missing:.0f}, twice {twice:.0f}, repeated {repeated}", "0, 0, at most 64",
        missing == 0 and twice == 0 and found["calls repeated"] <= 64,
    )  # fmt: skip


def bench_rows(table: Table, repeats: int) -> None:
    found = many_rows(100_000)
    table.line(
        "5 100,000 rows",
        f"peak {found['peak_mb']:.0f} MB, {found['first_s']:.0f} s; again {found['again_s']:.1f} s, "
        f"rebuilt {found['rebuilt_s']:.1f} s, {found['calls again']:.0f} calls, "
        f"{found['handles']:.0f} files, {found['threads']:.0f} threads",
        "500 MB, again 10 s, 0 calls",
        found["peak_mb"] < 500 and found["again_s"] < 10 and found["calls again"] == 0,
    )  # fmt: skip
    journal, feedback = found["journal bytes a row"], found["feedback bytes a row"]
    table.line("8 bytes a row", f"journal {journal:,.0f}, feedback {feedback:,.0f}", "-", True)


def bench_quota(table: Table, repeats: int) -> None:
    found = worst_of([quota_stop(1000, 64, 300) for _ in range(repeats)])
    table.line(
        "6 quota stop, 64 in flight",
        f"{found['further calls']:.0f} further calls, {found['answers lost']:.0f} answers lost",
        "at most 64, 0", found["further calls"] <= 64 and found["answers lost"] == 0,
    )  # fmt: skip


def bench_cap(table: Table, repeats: int) -> None:
    found = worst_of([spent_under_a_cap(1000, 64, 300.0) for _ in range(repeats)])
    table.line(
        "7 --max-cost, 64 in flight",
        f"spent {found['spent']:.1f} of {found['cap']:.0f} dollars in {found['calls']:.0f} calls",
        "never more", found["spent"] <= found["cap"],
    )  # fmt: skip


def bench_sync(table: Table, repeats: int) -> None:
    found = median_of(repeats, cost_of_syncing, 20_000)
    slower = found["unsynced lines/s"] / found["synced lines/s"]
    table.line(
        "8 journal, synced against not",
        f"{found['synced lines/s']:,.0f} and {found['unsynced lines/s']:,.0f} lines/s; {slower:.1f}x",
        "-", True,
    )  # fmt: skip


BENCHES: Final[dict[str, Callable[[Table, int], None]]] = {
    "throughput": bench_throughput,
    "latency": bench_latency,
    "limit": bench_limit,
    "kill": bench_kill,
    "rows": bench_rows,
    "quota": bench_quota,
    "cap": bench_cap,
    "sync": bench_sync,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("only", nargs="*", help=f"some of: {', '.join(BENCHES)}")
    parser.add_argument("--repeats", type=int, default=5)
    asked: Any = parser.parse_args()
    unknown = set(asked.only) - set(BENCHES)
    if unknown:
        parser.error(f"no such benchmark: {', '.join(sorted(unknown))}")
    table = Table()
    print(f"{'measured':<36} {'figures':<70} {'bar':<30} met")
    for name, bench in BENCHES.items():
        if not asked.only or name in asked.only:
            bench(table, asked.repeats)
    sys.exit(table.failed)


if __name__ == "__main__":
    main()
