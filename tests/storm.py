"""A storm of kills over all six commands: each is stopped at random moments, over and over, and the
same line then has to come to what an uninterrupted run comes to.

    make storm                                  550 kills, as many workers as there are cores
    make storm ONLY='sft eval' KILLS=40 SEED=7  40 kills of these two
    make storm JOBS=1                           one after another

A chain is up to five kills of one line in one folder, and the run that ends it. Every command gets as
many kills as any other, and every way of killing meets every moment. Most runs are forked
from a process that has their libraries loaded (`nursery.py`), so that a kill costs a second; every kill
of the first 300 ms, and one in 25 of the others, hits a process that was started from nothing. A worker
is a thread with a folder, a server and such processes of its own.
"""

import argparse
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections import Counter, deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, Final

from conftest import read_jsonl, write_jsonl
from killing import command, environment, lines_in, sha256, wait_until_gone
from loopback_server import CRITIQUE, Answer, LoopbackServer, as_policy_and_critic
from nursery import Nursery

from srt_cli.templates import CRITIQUE_REQUEST

IN_FLIGHT: Final = 4
"""What a kill may cost of each model: the calls that are under way, under `--concurrency 4`."""
LONGEST_S: Final = 240
FIRST_S: Final = 0.3
LAST_S: Final = 0.3
STOPPED: Final = (130, -signal.SIGTERM, -signal.SIGINT, -signal.SIGHUP)
"""How a run ends that was asked to; by the signal itself only while Python is starting."""
HELD: Final = "another srt run"
NO_ROOM: Final = ("disk is full", "no space left", "file too large", "no larger file")
LEAST_ROOM: Final = 600
"""Bytes: what a run says goes to a file too, and has to fit."""
NO_USABLE_ROW: Final = 3
TORCH: Final = ("self-critique", "self-critique-2", "sft", "dpo")


# --- What is paid ------------------------------------------------------------------------------


class Till:
    """A server that answers a request always alike, and knows which answers were paid for."""

    def __init__(self) -> None:
        self._server = LoopbackServer(self._answer, models=("policy", "critic", "judge"))
        self.paid: list[str] = []

    def spec(self, model: str) -> str:
        return f"{self._server.url}#{model}"

    def close(self) -> None:
        self._server.close()

    def _answer(self, body: dict[str, Any], number: int) -> Answer:
        asked = json.dumps([body["model"], body["messages"], body.get("stop")])
        mark = "z" + hashlib.sha256(asked.encode()).hexdigest()[:12]
        self.paid.append(mark)
        content = body["messages"][-1]["content"]
        if "### Answer M" in content:
            answer = Answer(text=f"For {mark}.\nVerdict: [[{'M' if mark < 'z8' else 'm'}]]")
        else:
            answer = as_policy_and_critic(body, number)
            answer.text = answer.text.replace("It is dull.", f"It is dull: {mark}.", 1)
            if content == CRITIQUE_REQUEST:
                score = 9 if "grand" in str(body["messages"]) else 4
                answer.text = CRITIQUE.format(score=score).replace("It is dull.", f"Dull: {mark}.")
            elif "### Requirements" not in content:
                answer.text = f"An answer, {mark}."
        answer.delay_s = 0.005 + int(mark[1:3], 16) / 10_000
        return answer


def marks_in(journal: Path) -> set[str]:
    """Which answers a journal holds."""
    if not journal.exists():
        return set()
    marks = set()
    for line in journal.read_text().splitlines():
        with suppress(ValueError):
            text = json.loads(line)["text"]
            marks.add("z" + text.partition(" z")[2][:12] if " z" in text else text)
    return marks


# --- The six commands --------------------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """A command on its inputs."""

    name: str
    line: tuple[object, ...]
    inputs: dict[str, list[dict[str, Any]]]
    journal: str | None
    code: int = 0
    trains: str | None = None
    """Its model directory."""
    processes: int = 1
    models: int = 1
    """How many are asked at the same time."""
    other: tuple[object, ...] = ()
    """Options with which another run starts at the same time."""


def acts(till: Till, model: Path) -> dict[str, Act]:
    from test_dpo import pair_rows
    from test_sft import feedback_rows

    prompts = [{"id": f"q{n}", "prompt": f"Say {n} in words."} for n in range(12)]
    asks = ("--concurrency", IN_FLIGHT)
    itself = ("self-critique", "--model", model, "--batch-size", 2, "--max-new-tokens", 8,
              "--critic-max-tokens", 8)  # fmt: skip
    train = ("--model", model, "--global-batch", 4, "--save-every", 2, "--samples", 1)
    every = [
        Act(
            "collect-feedback",
            ("collect-feedback", "--model", till.spec("policy"), "--critic", till.spec("critic"), *asks),
            {"prompts.jsonl": prompts},
            "feedback.journal.jsonl",
            models=2,
        ),
        Act(
            "build-prefs",
            ("build-prefs", "--audit", 8, "--audit-judge", till.spec("judge"), "--export", "kto",
             "--report", "prefs.html", "--max-length-ratio", 99, *asks),
            {"self-feedback.jsonl": feedback_rows(30) + feedback_rows(2, status="failed", sample=1)},
            "prefs.journal.jsonl",
            other=("--min-gain", 2, "--audit", 12),
        ),
        Act(
            "eval",
            ("eval", "--model", till.spec("policy"), "--reference", till.spec("critic"),
             "--judge", till.spec("judge"), "--verdicts", "reasoned", "--use", "response", "--use",
             "refinement", "--markdown", "eval.md", "--export", "alpaca_eval", *asks),
            {"prompts.jsonl": prompts[:4]},
            "eval.journal.jsonl",
        ),
        Act(
            "self-critique", itself, {"prompts.jsonl": prompts[:8]}, "self-feedback.journal.jsonl",
            code=NO_USABLE_ROW,
        ),
        Act(
            "self-critique-2", (*itself, "--num-processes", 2), {"prompts.jsonl": prompts[:8]},
            "self-feedback.journal.jsonl", code=NO_USABLE_ROW, processes=2,
        ),
        Act(
            "sft", ("sft", *train, "--epochs", 4, "--critic-check", 0),
            {"feedback.jsonl": feedback_rows(8)}, None,
            trains="models/sft",
        ),
        Act(
            "dpo", ("dpo", *train, "--epochs", 3), {"prefs.jsonl": pair_rows(8)}, None,
            trains="models/dpo",
        ),
    ]  # fmt: skip
    return {act.name: act for act in every}


# --- Processes ---------------------------------------------------------------------------------


@dataclass
class Running:
    """A command under way, in a session of its own."""

    pid: int
    session: int
    started: float
    talk: Path
    stopping: threading.Event
    """Set when the whole storm is to end."""
    code: int | None = None

    def poll(self) -> int | None:
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
            elif self.stopping.is_set():
                self.send(signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise Stopped
        return self.code

    def wait(self) -> int:
        """Its exit code; it is killed when it hangs."""
        while self.poll() is None:
            if time.monotonic() - self.started > LONGEST_S:
                os.killpg(self.session, signal.SIGKILL)
                raise Broken(UNEQUAL, "it hangs")
            time.sleep(0.002)
        assert self.code is not None
        return self.code

    def send(self, number: int, *, everybody: bool = True) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self.session, number) if everybody else os.kill(self.pid, number)


UNEQUAL: Final = "not equal"
PAID: Final = "paid twice"
LEFT: Final = "left over"
ORPHANS: Final = "orphans"


class Broken(Exception):
    """A promise that was not kept: one of the four above, and what was seen."""

    def __init__(self, kind: str, seen: str) -> None:
        super().__init__(f"{kind}: {seen}")
        self.kind = kind


class Stopped(Exception):
    """The storm ends before its time."""


# --- Moments and ways --------------------------------------------------------------------------


def _first(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    return _after(chance.uniform(0, FIRST_S))


def _uniform(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    return _after(chance.uniform(0, storm.straight.seconds[storm.fresh]))


def _last(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    took = storm.straight.seconds[storm.fresh]
    return _after(chance.uniform(max(0.0, took - LAST_S), took))


def _after(seconds: float) -> Callable[[Running], bool]:
    return lambda running: time.monotonic() - running.started >= seconds


def _at_line(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    """When the journal has so many lines, those of the processes included."""
    assert storm.act.journal
    journal = storm.folder / storm.act.journal
    parts = journal.name.removesuffix(".jsonl") + ".part-*.jsonl"
    wanted = chance.randint(lines_in(journal) + 1, max(storm.straight.calls, lines_in(journal) + 1))
    return lambda running: (
        lines_in(journal) + sum(map(lines_in, storm.folder.glob(parts))) >= wanted
    )


def _writing(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    """While an output is written: the one that chance picks."""
    names = [name for name in storm.straight.files if "journal" not in name]
    place = storm.folder / chance.choice(sorted(names))
    half = place.with_name(f".{place.name}.srt.tmp")
    return lambda running: half.exists()


def _checkpoint(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    """While a checkpoint is written, a moment after it was begun."""
    checkpoints = storm.folder / str(storm.act.trains) / "checkpoints"
    known = {path.name for path in checkpoints.glob("checkpoint-*")}
    late = chance.uniform(0, 0.03)

    def begun(running: Running) -> bool:
        for path in checkpoints.glob("checkpoint-*"):
            if path.name not in known and not (path / "whole").exists():
                time.sleep(late)
                return True
        return False

    return begun


def _saving(chance: random.Random, storm: "Chain") -> Callable[[Running], bool]:
    """While the model is saved, a moment after that was begun."""
    half = storm.folder / str(storm.act.trains) / "half-saved"
    late = chance.uniform(0, 0.03)

    def begun(running: Running) -> bool:
        if half.exists():
            time.sleep(late)
            return True
        return False

    return begun


MOMENTS: Final = {
    "first 300 ms": _first,
    "any time": _uniform,
    "journal line": _at_line,
    "writing": _writing,
    "checkpoint": _checkpoint,
    "final save": _saving,
    "last 300 ms": _last,
}


def moments_of(act: Act) -> list[str]:
    left_out = {"checkpoint", "final save"} if act.trains is None else {"writing"}
    left_out |= {"journal line"} if act.journal is None else set()
    return [name for name in MOMENTS if name not in left_out]


def _kill(running: Running, chance: random.Random) -> None:
    running.send(signal.SIGKILL)


def _kill_parent(running: Running, chance: random.Random) -> None:
    running.send(signal.SIGKILL, everybody=False)


def _term(running: Running, chance: random.Random) -> None:
    running.send(signal.SIGTERM, everybody=False)


def _hang_up(running: Running, chance: random.Random) -> None:
    running.send(signal.SIGHUP)


def _interrupt_twice(running: Running, chance: random.Random) -> None:
    running.send(signal.SIGINT)
    time.sleep(chance.uniform(0, 0.3))
    if running.poll() is None:
        running.send(signal.SIGINT)


WAYS: Final = {
    "kill -9": _kill,
    "kill -9 of the parent": _kill_parent,
    "TERM": _term,
    "INT twice": _interrupt_twice,
    "HUP": _hang_up,
}


# --- An uninterrupted run ----------------------------------------------------------------------


@dataclass
class Straight:
    """What an uninterrupted run came to."""

    files: dict[str, str]
    calls: int
    keys: set[str]
    tallies: dict[str, Any]
    largest: int
    """Bytes of its largest file."""
    seconds: dict[bool, float]
    """How long it takes: started from nothing (True), or forked."""


def files_of(folder: Path, act: Act) -> dict[str, str]:
    """Every file with what has to be equal in it."""
    return {
        str(path.relative_to(folder)): _content(path)
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name not in act.inputs
    }


def _content(path: Path) -> str:
    if path.name.endswith(("run.json", ".journal.jsonl", "training.html")):
        return "there"  # these tell times, or are compared otherwise
    if path.name == "metrics.jsonl":
        steps = [(row.get("step"), row.get("loss")) for row in read_jsonl(path)]
        return str(steps)
    return sha256(path)


def manifest_of(folder: Path, act: Act) -> dict[str, Any]:
    (path,) = [each for each in folder.rglob("*run.json") if "checkpoint" not in str(each)]
    manifest: dict[str, Any] = json.loads(path.read_text())
    return manifest


TIMED: Final = ("seconds", "speed", "per_second", "window", "generation", "training", "calls_")


def steady(tallies: dict[str, Any]) -> dict[str, Any]:
    """Tallies that do not depend on the clock."""
    return {
        name: value for name, value in tallies.items() if not any(word in name for word in TIMED)
    }


# --- A chain of kills --------------------------------------------------------------------------


@dataclass
class Chain:
    """One line in one folder: killed, killed again, and run to its end."""

    act: Act
    folder: Path
    straight: Straight
    worker: "Worker"
    fresh: bool = True
    lost: int = 0
    kept: set[str] = field(default_factory=set)
    told: list[str] = field(default_factory=list)
    """What happened to it, for whoever looks for a fault."""

    @property
    def journal(self) -> Path | None:
        return self.folder / self.act.journal if self.act.journal else None

    def start(self, *more: object, fresh: bool = False, room: int | None = None) -> Running:
        self.fresh = fresh
        return self.worker.start([*self.act.line, *more], self.folder, fresh=self.fresh, room=room)

    def kill(self, chance: random.Random, moment: str, way: str) -> bool:
        """Kill a run at a moment; whether it was still there."""
        paid = len(self.worker.till.paid)
        fresh = moment == "first 300 ms" or chance.random() < 0.04
        self.fresh = fresh
        is_time = MOMENTS[moment](chance, self)
        running = self.start(fresh=fresh)
        while running.poll() is None and not is_time(running):
            if time.monotonic() - running.started > LONGEST_S:
                break
            time.sleep(0.0005)
        hit = running.poll() is None
        if hit:
            WAYS[way](running, chance)
        code = running.wait()
        if not hit and not self.told:
            # The uninterrupted run had to warm up: the next kill shall not come too late again.
            seconds = self.straight.seconds
            seconds[fresh] = min(seconds[fresh], time.monotonic() - running.started)
        self.told.append(f"{way}, {moment}{', forked' * (not self.fresh)}: exit {code}")
        leave_nobody(running)
        talk = running.talk.read_text(errors="replace")
        killed = hit and way.startswith("kill")
        allowed = {self.act.code, *((-signal.SIGKILL,) if killed else STOPPED if hit else ())}
        # Ctrl-C while Python itself is starting.
        early = way == "INT twice" and moment == "first 300 ms" and "KeyboardInterrupt" in talk
        if (code not in allowed or "Traceback" in talk) and not early:
            raise Broken(UNEQUAL, f"it ended with {code}: {talk[-1500:]}")
        self.check_payment(paid)
        return hit

    def check_payment(self, paid: int) -> None:
        """No answer that the journal holds is paid for again; a kill loses what is in flight."""
        if self.journal is None or self.act.name in TORCH:
            return
        new = self.worker.till.paid[paid:]
        if again := self.kept & set(new):
            raise Broken(PAID, f"{sorted(again)}")
        now = marks_in(self.journal)
        if missing := self.kept - now:
            raise Broken(UNEQUAL, f"the journal lost {sorted(missing)}")
        self.kept |= now
        lost = set(new) - now
        if len(lost) > IN_FLIGHT * self.act.models:
            raise Broken(PAID, f"{len(lost)} answers were lost by one kill")
        self.lost += len(lost)

    def finish(self) -> None:
        """The same line again, to its end: all that an uninterrupted run leaves, and nothing else."""
        paid = len(self.worker.till.paid)
        running = self.start()
        code = running.wait()
        talk = running.talk.read_text(errors="replace")
        if code != self.act.code or "Traceback" in talk:
            raise Broken(UNEQUAL, f"the same line ended with {code}: {talk[-1500:]}")
        leave_nobody(running)
        self.check_payment(paid)
        self.compare(self.straight)

    def compare(self, straight: Straight) -> None:
        """Equal to an uninterrupted run."""
        files = files_of(self.folder, self.act)
        if left := files.keys() - straight.files.keys():
            raise Broken(LEFT, f"{sorted(left)}")
        if files != straight.files:
            raise Broken(UNEQUAL, f"{sorted(set(files.items()) ^ set(straight.files.items()))}")
        manifest = manifest_of(self.folder, self.act)
        if manifest["status"] != ("failed" if self.act.code else "complete"):
            raise Broken(UNEQUAL, f"the manifest says {manifest['status']}")
        tallies = steady(manifest["tallies"])
        if tallies != straight.tallies:
            raise Broken(UNEQUAL, f"tallies {tallies} for {straight.tallies}")
        if self.journal is not None:
            keys = _keys(self.journal)
            if len(keys) != len(set(keys)):
                raise Broken(PAID, f"{len(keys)} journal lines of {len(set(keys))} calls")
            if set(keys) != straight.keys:
                raise Broken(UNEQUAL, f"{len(keys)} journal lines, {len(straight.keys)} calls")

    def together(self, chance: random.Random, other: tuple[object, ...]) -> None:
        """Two runs on one output at once, one of them killed now and then; one may be refused."""
        first = self.start()
        time.sleep(chance.choice([0.0, chance.uniform(0, 0.4)]))
        second = self.worker.start(
            [*self.act.line, *other], self.folder, fresh=False, suffix=".second"
        )
        killed = chance.choice([None, None, first, second])
        if killed is not None:
            time.sleep(chance.uniform(0, self.straight.seconds[False]))
            killed.send(signal.SIGKILL)
        for running in (first, second):
            code = running.wait()
            leave_nobody(running)
            talk = running.talk.read_text(errors="replace")
            self.told.append(f"together: exit {code}")
            refused = code == 1 and (HELD in talk or (other and "other settings" in talk))
            if code != self.act.code and not refused and running is not killed:
                raise Broken(UNEQUAL, f"of two runs one ended with {code}: {talk[-800:]}")
        if self.journal is not None:
            self.kept = marks_in(self.journal)

    def fill_disk(self, chance: random.Random) -> None:
        """A run without room for its files."""
        room = chance.randint(LEAST_ROOM, max(LEAST_ROOM, self.straight.largest))
        running = self.start(room=room)
        code = running.wait()
        leave_nobody(running)
        talk = running.talk.read_text(errors="replace")
        self.told.append(f"no room: exit {code}")
        said = any(words in talk.lower() for words in NO_ROOM)
        if "Traceback" in talk or (code != self.act.code and not (code == 1 and said)):
            raise Broken(UNEQUAL, f"without room it ended with {code}: {talk[-1500:]}")
        if self.journal is not None:
            self.kept = marks_in(self.journal)


def leave_nobody(running: Running) -> None:
    """Every process of a run ends with it."""
    try:
        wait_until_gone(running.session)
    except AssertionError as orphans:
        raise Broken(ORPHANS, str(orphans)) from orphans


def _keys(journal: Path) -> list[str]:
    return [
        entry["key"]
        for line in journal.read_bytes().splitlines()
        if line.strip()
        for entry in [_parsed(line)]
        if entry is not None
    ]


def _parsed(line: bytes) -> dict[str, Any] | None:
    """A journal's line; None for one that a kill has torn."""
    try:
        entry: dict[str, Any] = json.loads(line)
        return entry
    except ValueError:
        return None


# --- The storm ---------------------------------------------------------------------------------

FULL_DISK: Final = "full disk"
TWO_AT_ONCE: Final = "two at once"
MOST_BROKEN: Final = 20
"""With so many faults there is enough to look at."""


@dataclass
class Case:
    """A command: what is still to be done to it, and what was found."""

    act: Act
    chance: random.Random
    kills: int
    todo: deque[list[tuple[str, str]]] = field(default_factory=deque)
    """Chains, each of kills: a moment and a way. Two runs at once and a full disk are of one alone."""
    begun: int = 0
    equal: int = 0
    ended: int = 0
    missed: int = 0
    lost: int = 0
    moments: Counter[str] = field(default_factory=Counter)
    ways: Counter[str] = field(default_factory=Counter)
    broken: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        every: list[tuple[str, str]] = []
        while len(every) < self.kills:
            deck = list(product(moments_of(self.act), WAYS))
            self.chance.shuffle(deck)
            every += deck
        every = every[: self.kills]
        while every:
            length = self.chance.randint(1, 5)
            self.todo.append(every[:length])
            every = every[length:]
        for _ in range(max(1, self.kills // 20)):
            self.todo += [[(moment, "")] for moment in self.possible if moment not in MOMENTS]
        self.chance.shuffle(self.todo)

    @property
    def possible(self) -> list[str]:
        """What can be done to it."""
        two = [TWO_AT_ONCE] if self.act.processes == 1 else []
        return [*moments_of(self.act), *two, FULL_DISK]

    def came_too_late(self, left: list[tuple[str, str]]) -> None:
        """The run had ended: these kills come again, but not for ever."""
        self.missed += 1
        if self.missed <= 6 * self.kills:
            self.todo.append(left)


class Storm:
    """All of it: what is to be done and who does it, what was done and what broke."""

    def __init__(self, folder: Path, only: list[str], kills: int, seed: str) -> None:
        from conftest import _make_tiny_model

        self.folder = folder
        self.seed = seed
        self.model = folder / "tiny-model"
        self.stopping = threading.Event()
        self.broken: list[str] = []
        self.straight: dict[str, Straight] = {}
        """Of commands that need no server: every worker's are alike."""
        till = Till()
        chosen = [act for act in acts(till, self.model).values() if not only or act.name in only]
        till.close()
        self.cases = []
        for number, act in enumerate(chosen):
            share = (number + 1) * kills // len(chosen) - number * kills // len(chosen)
            self.cases.append(Case(act, random.Random(f"{seed} {act.name}"), share))
        if any(act.name in TORCH for act in chosen) and not self.model.exists():
            _make_tiny_model(self.model)
        self._lock = threading.Lock()

    def blow(self, workers: int) -> None:
        """Do it all, with so many workers; Ctrl-C ends it where it is."""
        threads = [
            threading.Thread(target=self._work, args=(number, workers)) for number in range(workers)
        ]
        began = told = time.monotonic()
        try:
            for thread in threads:
                thread.start()
            while any(thread.is_alive() for thread in threads):
                time.sleep(0.1)
                if time.monotonic() - told > 30:
                    told = time.monotonic()
                    done = sum(case.ways.total() for case in self.cases)
                    asked = sum(case.kills for case in self.cases)
                    print(f"{(told - began) / 60:.1f} minutes: {done} of {asked} kills", flush=True)
        finally:
            self.stopping.set()
            for thread in threads:
                thread.join()

    def _work(self, number: int, workers: int) -> None:
        worker = Worker(self, self.folder / f"worker-{number}")
        try:
            while (found := self._next(number, workers)) is not None:
                worker.do(*found)
        except Stopped:
            pass
        except Exception:
            self.tell_of(traceback.format_exc())
        finally:
            worker.close()

    def _next(self, number: int, workers: int) -> tuple[Case, int, list[tuple[str, str]]] | None:
        """A chain: of the worker's own commands, and then of the others."""
        with self._lock:
            if len(self.broken) >= MOST_BROKEN:
                return None
            cases = [case for case in self.cases if case.todo]
            mine = [case for case in cases if self.cases.index(case) % workers == number]
            if not cases:
                return None
            case = max(mine or cases, key=lambda case: len(case.todo))
            case.begun += 1
            return case, case.begun, case.todo.popleft()

    def tell_of(self, broken: str) -> None:
        """Note a promise that was not kept."""
        self.broken.append(broken)
        print("BROKEN", broken, flush=True)

    def report(self) -> str:
        """What was done, as a table."""
        cases = [case for case in self.cases if case.begun]
        moments = [*MOMENTS, TWO_AT_ONCE, FULL_DISK]
        moments = [each for each in moments if any(case.moments[each] for case in cases)]
        faults = (PAID, LEFT, ORPHANS)
        rows = [["command", "kills", *moments, "same line equal", *faults]]
        for case in cases:
            row: list[object] = [case.act.name, case.ways.total()]
            row += [case.moments[each] if each in case.possible else "-" for each in moments]
            row += [f"{case.equal} of {case.ended}", *(case.broken[fault] for fault in faults)]
            rows.append(list(map(str, row)))
        lines = ["| " + " | ".join(row) + " |" for row in rows]
        lines.insert(1, "| --- " * len(rows[0]) + "|")
        ways = sum((case.ways for case in cases), Counter[str]())
        told = ", ".join(f"{count} by {way}" for way, count in ways.most_common())
        chains, missed, lost = (
            sum(getattr(case, each) for case in cases) for each in ("ended", "missed", "lost")
        )
        return "\n".join(
            [
                *lines,
                "",
                f"{ways.total()} kills in {chains} chains ({told}); {missed} came too late.",
                f"{lost} answers that were in flight were paid for again; {len(self.broken)} broken.",
            ]
        )


class Worker:
    """Does one chain after another, with a folder, a server and processes of its own."""

    def __init__(self, storm: Storm, folder: Path) -> None:
        self.storm = storm
        self.folder = folder
        self.till = Till()
        self.acts = acts(self.till, storm.model)
        self._nurseries: dict[str, Nursery] = {}
        self._straight: dict[str, Straight] = {}

    def close(self) -> None:
        self.till.close()
        for nursery in self._nurseries.values():
            nursery.close()

    def start(
        self,
        line: list[object],
        folder: Path,
        *,
        fresh: bool,
        room: int | None = None,
        suffix: str = ".talk",
    ) -> Running:
        """Start a command in a session of its own: from nothing, or forked where torch is loaded."""
        talk = folder.with_suffix(suffix)
        if not fresh:
            kind = "torch" if line[0] in TORCH else "calls"
            if kind not in self._nurseries:
                self._nurseries[kind] = Nursery(kind, environment())
            pid, session = self._nurseries[kind].fork(list(map(str, line)), talk, room)
            return Running(pid, session, time.monotonic(), talk, self.storm.stopping)
        limit = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (room, room)) if room else None
        with open(talk, "w") as stderr:
            process = subprocess.Popen(
                command(*line), cwd=folder, env=environment(), stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL, stderr=stderr, start_new_session=True, preexec_fn=limit,
            )  # fmt: skip
        process.returncode = 0  # it is waited for by its id
        return Running(process.pid, process.pid, time.monotonic(), talk, self.storm.stopping)

    def prepare(self, act: Act, name: str) -> Path:
        folder = self.folder / name
        folder.mkdir(parents=True)
        for file, rows in act.inputs.items():
            write_jsonl(folder / file, rows)
        return folder

    def straight(self, act: Act, *more: object) -> Straight:
        """An uninterrupted run of a command."""
        name = " ".join(map(str, (act.name, *more)))
        known = self.storm.straight if act.name in TORCH else self._straight
        if name in known:
            return known[name]
        found = None
        took = {}
        for fresh in (False, True):
            folder = self.prepare(act, f"{name.replace(' ', '_')}-straight-{fresh}")
            running = self.start([*act.line, *more], folder, fresh=fresh)
            code = running.wait()
            took[fresh] = time.monotonic() - running.started
            assert code == act.code, running.talk.read_text()
            keys = set(_keys(folder / act.journal)) if act.journal else set()
            made = Straight(
                files_of(folder, act), len(keys), keys, steady(manifest_of(folder, act)["tallies"]),
                max((path.stat().st_size for path in folder.rglob("*")), default=0), took,
            )  # fmt: skip
            assert found is None or (found.files, found.tallies) == (made.files, made.tallies)
            found = made
        assert found is not None
        known[name] = found
        return found

    def do(self, case: Case, number: int, kills: list[tuple[str, str]]) -> None:
        """A chain, and the same line to its end; the folder of one that breaks is kept."""
        act = self.acts[case.act.name]
        name = f"{act.name}-{number}"
        chance = random.Random(f"{self.storm.seed} {name}")
        chain = Chain(act, self.prepare(act, name), self.straight(act), self)
        try:
            if kills[0][0] == FULL_DISK:
                chain.fill_disk(chance)
                case.moments[FULL_DISK] += 1
            elif kills[0][0] == TWO_AT_ONCE:
                self._two_at_once(chain, chance, act.other if number % 2 else ())
                case.moments[TWO_AT_ONCE] += 1
            else:
                self._kill(case, chain, chance, kills)
            chain.finish()
        except (Broken, AssertionError, OSError, ValueError) as broken:
            case.broken[broken.kind if isinstance(broken, Broken) else UNEQUAL] += 1
            case.ended += 1
            self.storm.tell_of(f"{chain.folder} ({'; '.join(chain.told)}): {broken}")
            return
        case.ended += 1
        case.equal += 1
        case.lost += chain.lost
        shutil.rmtree(chain.folder)

    def _kill(
        self, case: Case, chain: Chain, chance: random.Random, kills: list[tuple[str, str]]
    ) -> None:
        for place, (moment, way) in enumerate(kills):
            if not chain.kill(chance, moment, way):
                case.came_too_late(kills[place:])
                return
            case.moments[moment] += 1
            case.ways[way] += 1

    def _two_at_once(self, chain: Chain, chance: random.Random, other: tuple[object, ...]) -> None:
        chain.together(chance, other)
        if other and manifest_of(chain.folder, chain.act)["settings"]["min_gain"] == other[1]:
            chain.act = replace(chain.act, line=(*chain.act.line, *other))
            chain.straight = self.straight(chain.act, *other)


def main() -> int:
    """`make storm`."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("only", nargs="*", help="these commands alone")
    parser.add_argument("--kills", type=int, default=550)
    parser.add_argument("--seed", default="1")
    parser.add_argument("--jobs", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--folder", type=Path, help="where broken chains stay to be looked at")
    asked = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    folder = asked.folder or Path(tempfile.mkdtemp(prefix="srt-storm-"))
    folder.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    storm = Storm(folder.resolve(), asked.only, asked.kills, asked.seed)
    try:
        storm.blow(asked.jobs)
    except KeyboardInterrupt:
        print("stopped")
    print(storm.report())
    print(
        f"Seed {asked.seed}, {asked.jobs} at a time, {(time.monotonic() - began) / 60:.0f} minutes."
    )
    print(*storm.broken, sep="\n")
    if not storm.broken and asked.folder is None:
        shutil.rmtree(folder)
    return int(bool(storm.broken))


if __name__ == "__main__":
    sys.exit(main())
