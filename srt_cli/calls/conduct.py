"""Drive many rows at once: each row is a generator that yields calls and is sent their replies.

A stage writes what happens to one row, top to bottom, as the paper does; `conduct` runs hundreds
of such rows side by side, asks the journal before any model, and keeps every reply before a row
sees it.
"""

import heapq
import math
import queue
import signal
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, Generic, TypeVar

from srt_cli import console
from srt_cli.models import (
    Model,
    Reply,
    Request,
    as_asked_before,
    canonical_request,
    identity_before,
    reply_from_plain,
    reply_to_plain,
)
from srt_cli.runs.journal import Journal, request_key

QUICK_FINISH_S: Final = 1.0
LONG_FINISH_S: Final = 60.0
MOST_AT_ONCE: Final = 16
"""Replies that rows are sent, or rows that end without a call, before calls are handed over."""
_STOPPING: Final = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """A request that a row wants sent to a model; `name` is for people who read the journal."""

    model: Model
    request: Request
    name: str


def look_up_call(
    call: Call, look_up: Callable[[bytes], dict[str, Any] | None]
) -> tuple[bytes, dict[str, Any] | None]:
    """A call's key and what the journal holds for it, if only as an older srt asked."""
    asked = canonical_request(call.model, call.request)
    key = request_key(asked)
    if (kept := look_up(key)) is not None:
        return key, kept
    before = [canonical_request(call.model, each) for each in as_asked_before(call.request)]
    if (name := identity_before(call.model.identity)) != call.model.identity:
        before += [each | {"model": name} for each in (asked, *before)]
    for older in map(request_key, before):
        if (kept := look_up(older)) is not None:
            return older, kept
    return key, None


Script = Generator[Call, Reply, Result]


@dataclass
class Tally:
    """Running totals of a run's calls."""

    paid: int = 0
    from_journal: int = 0
    failed: int = 0
    completion_tokens: int = 0
    awaited: int = 0
    """Calls that models have, whose replies are not here yet."""
    models: dict[int, Model] = field(default_factory=dict)
    """Those that were asked."""
    started: float = field(default_factory=time.monotonic)
    owed: int = 0
    """Rows that wait for a reply which no model will give in this run."""
    elsewhere: int = 0
    """Calls that other processes made for this run; they too are found in the journal."""

    @property
    def known_before(self) -> int:
        """Calls answered by the journal, which nobody had to make."""
        return max(0, self.from_journal - self.elsewhere)

    def made_elsewhere(self, calls: int, tokens: int) -> None:
        """Count calls that other processes made for this run."""
        self.elsewhere += calls
        self.paid += calls
        self.completion_tokens += tokens

    @property
    def seconds(self) -> float:
        """The wall time since the run began."""
        return max(time.monotonic() - self.started, 1e-3)

    def pulse(self) -> str:
        """What goes on while rows are under way, in words; nothing before the first call."""
        if not self.paid + self.awaited:
            return ""
        waiting = min(self.awaited, sum(model.waiting for model in list(self.models.values())))
        queue = f", {waiting} waiting" if waiting else ""
        in_flight = f"{self.awaited - waiting} in flight{queue}"
        return f"{self.paid} calls done, {in_flight}, {self.completion_tokens} tokens"

    def speed(self) -> str:
        """Tokens written a second, in words; nothing where none were."""
        speed = self.completion_tokens / self.seconds
        return f"{speed:.0f} tokens/s" if self.completion_tokens else ""


@dataclass
class _Row(Generic[Result]):
    index: int
    script: Script[Result]
    calls_made: int = 0


@dataclass
class _Pending(Generic[Result]):
    """A call that waits for its model; rows nearest to their end go first."""

    row: _Row[Result]
    call: Call
    key: bytes
    known: Reply | None = None

    def __lt__(self, other: "_Pending[Result]") -> bool:
        return (-self.row.calls_made, self.row.index) < (-other.row.calls_made, other.row.index)


@dataclass
class _Conductor(Generic[Result]):
    journal: Journal
    window: int
    tally: Tally
    waiting: dict[int, list[_Pending[Result]]] = field(default_factory=lambda: defaultdict(list))
    """Calls not yet handed over, per model."""
    in_flight: dict[int, int] = field(default_factory=lambda: defaultdict(int))
    models: dict[int, Model] = field(default_factory=dict)
    active: int = 0
    batching: bool = False
    """A batched model is at work: rows then go in whole windows, so that batches repeat exactly.

    Replies of earlier runs have no part in that: no batch of this run is theirs.
    """
    under_way: dict[int, tuple[_Pending[Result], Future[Reply]]] = field(default_factory=dict)
    """Calls whose replies are not kept yet."""
    finished: "queue.SimpleQueue[int]" = field(default_factory=queue.SimpleQueue)
    asked: dict[bytes, list[_Row[Result]]] = field(default_factory=dict)
    """By key, each call that has no reply yet: further rows that wait for the same one."""

    def advance(self, row: _Row[Result], reply: Reply | None) -> list[tuple[int, Result]]:
        """Advance a row until it must wait for a model; returns its result once it has one."""
        while True:
            try:
                call = next(row.script) if reply is None else row.script.send(reply)
            except StopIteration as stop:
                self.active -= 1
                return [(row.index, stop.value)]
            row.calls_made += 1
            key, kept = look_up_call(call, self.journal.get)
            known = reply_from_plain(kept) if kept is not None else None
            if known is not None:
                self.tally.from_journal += 1
            if known is not None and (not call.model.batched or self.journal.was_there(key)):
                reply = known
                continue
            if again := self.journal.forgotten[key]:
                call = replace(call, request=replace(call.request, again=again))
            self.models[id(call.model)] = self.tally.models[id(call.model)] = call.model
            self.batching |= call.model.batched
            pending = _Pending(row, call, key, known)
            if call.model.batched:
                self.waiting[id(call.model)].append(pending)
            elif key in self.asked:  # paid for once, as if they had come one after the other
                self.asked[key].append(row)
            else:
                self.asked[key] = []
                heapq.heappush(self.waiting[id(call.model)], pending)
            return []

    def dispatch(self) -> list[_Pending[Result]]:
        """Hand waiting calls to models that want them; returns those the journal has answered."""
        for identity, waiting in self.waiting.items():
            model = self.models[identity]
            room = model.in_flight - self.in_flight[identity]
            if model.batched or room <= 0:
                continue
            ready = [heapq.heappop(waiting) for _ in range(min(room, len(waiting)))]
            self._submit(model, ready)
        if any(self.in_flight.values()):
            return []
        # Every row now stands before a batched model: the whole wave goes, answered calls included.
        answered = []
        for identity, waiting in self.waiting.items():
            wave = sorted(waiting, key=lambda pending: pending.row.index)
            waiting.clear()
            self._submit(self.models[identity], wave)
            answered += [pending for pending in wave if pending.known is not None]
        return answered

    def _submit(self, model: Model, ready: list[_Pending[Result]]) -> None:
        if not ready:
            return
        with _signals_wait():
            futures = model.submit(
                [pending.call.request for pending in ready],
                [pending.known is not None for pending in ready],
            )
            new = {
                id(pending): (pending, future)
                for pending, future in zip(ready, futures, strict=True)
                if pending.known is None
            }
            self.under_way |= new
            self.in_flight[id(model)] += len(new)
            self.tally.awaited += len(new)
        for name, (_, future) in new.items():
            future.add_done_callback(partial(self._finish, name))

    def _finish(self, name: int, future: Future[Reply]) -> None:
        self.finished.put(name)

    def receive(self) -> list[tuple[int, Result]]:
        """Wait for the next reply, keep it and advance its rows; a model's fatal error is raised here.

        A call that its model cancels is not made in this run: its rows stay owed.
        """
        name = self.finished.get()
        pending, future = self.under_way[name]
        rows = [pending.row, *self.asked.pop(pending.key, [])]
        if not future.cancelled():
            reply = self._keep(name)
            if reply.status != "failed":
                self.tally.from_journal += len(rows) - 1
            return [ended for row in rows for ended in self.advance(row, reply)]
        self._forget(name)
        for row in rows:
            row.script.close()
            self.active -= 1
            self.tally.owed += 1
        return []

    def finish(self) -> None:
        """Wait a while for replies under way, which are paid for; a second Ctrl-C ends the wait."""
        under_way = [self.models[name] for name, count in self.in_flight.items() if count]
        # All are told to stop before any is waited for.
        slow = [model for model in under_way if not model.finish(QUICK_FINISH_S)]
        if slow:
            console.say("waiting for the calls under way; Ctrl-C again leaves them")
        for model in slow:
            model.finish(LONG_FINISH_S)

    def keep_finished(self) -> None:
        """Journal replies that came in but were not looked at: an ending run has paid for them."""
        self.journal.catch_up()
        for name, (_, future) in list(self.under_way.items()):
            if future.done() and not future.cancelled() and future.exception() is None:
                self._keep(name)

    def _keep(self, name: int) -> Reply:
        """Journal a reply; until that is done, its call counts as under way."""
        pending, future = self.under_way[name]
        reply = future.result()
        if reply.status == "failed":
            self.tally.failed += 1
        else:
            model = pending.call.model.identity
            plain = {"model": model, **reply_to_plain(reply)}
            if pending.key not in self.journal:  # else an interruption came right behind that
                self.journal.append(pending.key, pending.call.name, plain)
            self.tally.paid += 1
            self.tally.completion_tokens += reply.usage.completion_tokens
        self._forget(name)
        return reply

    def _forget(self, name: int) -> None:
        pending, _ = self.under_way.pop(name)
        self.in_flight[id(pending.call.model)] -= 1
        self.tally.awaited -= 1


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Put Ctrl-C, SIGTERM and a closed terminal off to the end of the block, so that every call that is
    handed over is noted."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    heard: list[int] = []
    before = {number: signal.getsignal(number) for number in _STOPPING}
    for number, handler in before.items():
        if callable(handler):
            signal.signal(number, lambda number, _: heard.append(number))
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if heard:
        raise KeyboardInterrupt


def conduct(
    scripts: Iterable[Script[Result]],
    journal: Journal,
    models: Sequence[Model],
    tally: Tally | None = None,
) -> Generator[tuple[int, Result], None, None]:
    """Run the scripts with the models at work; yields (row index, result) as rows finish.

    Enough rows are under way for each model to have its fill while others wait elsewhere: all of
    them, where a model takes everything at once. Rows that the journal holds whole are not among
    them, and no model waits while they are read. Failed calls are not journalled, so a later run
    owes them again. Raises what a model raises for good (`QuotaError`, unknown model); rows yielded
    until then stay valid.
    """
    window = 2 * max((model.in_flight for model in models), default=1)
    conductor: _Conductor[Result] = _Conductor(journal, window, tally or Tally())
    try:
        yield from _run(conductor, enumerate(scripts), models)
    finally:
        try:
            conductor.finish()
        finally:
            conductor.keep_finished()


def _run(
    conductor: _Conductor[Result],
    source: Iterator[tuple[int, Script[Result]]],
    models: Sequence[Model],
) -> Iterator[tuple[int, Result]]:
    more = True
    while more or conductor.active:
        window_is_open = not (conductor.batching and conductor.active)
        # A wave is handed over whole; any other model is not kept waiting for rows that ask nothing.
        most_read = math.inf if any(model.batched for model in models) else MOST_AT_ONCE
        read = 0
        while more and window_is_open and conductor.active < conductor.window and read < most_read:
            index, script = next(source, (-1, None))
            if script is None:
                more = False
                break
            conductor.active += 1
            ended = conductor.advance(_Row(index, script), None)
            read += len(ended)
            yield from ended
        if not conductor.active:
            continue
        answered = conductor.dispatch()
        for pending in answered:
            yield from conductor.advance(pending.row, pending.known)
        # What has come in together goes on together: each handing over wakes the models' threads.
        for _ in range(MOST_AT_ONCE):
            if not any(conductor.in_flight.values()):
                break
            if read >= most_read and conductor.finished.empty():
                break
            yield from conductor.receive()
            if conductor.finished.empty():
                break


@dataclass(frozen=True)
class Replayed(Generic[Result]):
    """How far a row gets on the journal alone: its result, or the first call that is owed."""

    index: int
    result: Result | None
    owed: Call | None
    answered: tuple[tuple[Call, bytes], ...]
    """The calls that the journal answered, in order, with their keys."""


def replay(
    scripts: Iterable[Script[Result]], look_up: Callable[[bytes], dict[str, Any] | None]
) -> Iterator[Replayed[Result]]:
    """Run the scripts one by one on what the journal holds, without a single call."""
    for index, script in enumerate(scripts):
        answered: list[tuple[Call, bytes]] = []
        reply: Reply | None = None
        try:
            while True:
                call = next(script) if reply is None else script.send(reply)
                key, kept = look_up_call(call, look_up)
                reply = reply_from_plain(kept) if kept is not None else None
                if reply is None:
                    script.close()
                    yield Replayed(index, None, call, tuple(answered))
                    break
                answered.append((call, key))
        except StopIteration as stop:
            yield Replayed(index, stop.value, None, tuple(answered))
