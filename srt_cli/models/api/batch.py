"""Batches: half the price for patience; and requests written to files, to be answered elsewhere.

What a batch holds is noted before it is handed in, so a client that was killed waits for its own batches
instead of paying for them twice, whatever else is owed by then.
"""

import asyncio
import hashlib
import os
import secrets
import threading
from collections.abc import Awaitable, Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any, Final, TypeVar

import orjson

from srt_cli import console
from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import (
    EVERYTHING,
    ModelOptions,
    Reply,
    Request,
    Spec,
    canonical_request,
    reply_to_plain,
)
from srt_cli.models.api.dialect import (
    Answer,
    Batch,
    Batches,
    BatchResult,
    Dialect,
    NoAnswer,
    NotedBatch,
    Refused,
    as_mapping,
)
from srt_cli.models.api.limits import LONGEST_PAUSE_S
from srt_cli.models.api.transport import Endpoint, Place, dialects, place_of
from srt_cli.models.budget import Budget, Price, most_tokens, price_of, priced
from srt_cli.records import Usage
from srt_cli.runs.journal import Journal, request_key
from srt_cli.runs.jsonl import naming, read_rows

MOST_ROUNDS: Final = 5
MOST_TRIES: Final = 5
FIRST_BACKOFF_S: Final = 0.5
PASSING: Final = (408, 409, 429, 500, 502, 503, 504, 529)
"""Statuses of trouble that passes."""

Found = TypeVar("Found")


@dataclass
class _Ask:
    """A request of a wave; equal ones are asked once."""

    line: bytes
    request: Request
    most: Usage
    futures: list[Future[Reply]] = field(default_factory=list)
    known: bool = True
    reserved: bool = False
    """Whether the budget has set aside what it may cost."""

    @property
    def owed(self) -> bool:
        """Whether somebody waits for its reply."""
        return not self.known and not all(future.done() for future in self.futures)


@dataclass
class _Sent:
    """A batch, and what of a wave is in it, by name."""

    noted: NotedBatch
    batch: Batch
    asks: dict[str, _Ask]


class BatchNotes:
    """Notes on batches, in a file that outlives the run, or in memory.

    A line each: what is handed in, before it is; the name that its server gives it; a batch that was
    taken for it, and is another; and that it came to nothing.
    """

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._noted: dict[str, NotedBatch] = {}
        self._read = False

    def of(self, model: str) -> list[NotedBatch]:
        """The batches that a model was handed and that may hold replies, the oldest first."""
        if not self._read and self._path is not None and self._path.exists():
            for line in self._path.read_bytes().splitlines():
                # A torn line, of a run that was killed, tells nothing.
                with suppress(orjson.JSONDecodeError, KeyError, TypeError):
                    self._take_in(orjson.loads(line))
        self._read = True
        return [noted for noted in self._noted.values() if noted.model == model]

    def add(self, model: str, requests: list[str], others: list[str]) -> NotedBatch:
        """Note what will be handed in."""
        label = secrets.token_hex(16)
        self._write({"label": label, "model": model, "others": others, "requests": requests})
        return self._noted[label]

    def name(self, noted: NotedBatch, name: str) -> None:
        """Note what a batch is called."""
        self._write({"label": noted.label, "name": name})

    def disown(self, noted: NotedBatch, name: str) -> None:
        """Note that a batch is not the one it was taken for."""
        self._write({"label": noted.label, "other": name})

    def drop(self, noted: NotedBatch) -> None:
        """Note that a batch never was, or cannot be asked any more."""
        self._write({"label": noted.label, "gone": True})

    def _write(self, entry: dict[str, Any]) -> None:
        if self._path is not None:
            with naming(self._path), open(self._path, "ab+") as file:
                end = file.seek(0, os.SEEK_END)
                torn = end > 0 and os.pread(file.fileno(), 1, end - 1) != b"\n"
                file.write(b"\n" * torn + orjson.dumps(entry) + b"\n")
                file.flush()
                os.fsync(file.fileno())
        self._take_in(entry)

    def _take_in(self, entry: Mapping[str, Any]) -> None:
        label = entry["label"]
        if "requests" in entry:
            self._noted[label] = NotedBatch(
                label, entry["model"], entry["requests"], list(entry["others"])
            )
        elif "gone" in entry:
            self._noted.pop(label, None)
        elif label in self._noted:
            noted = self._noted[label]
            noted.name = entry.get("name", "")
            for other in [noted] if "other" in entry else self._noted.values():
                if not other.name:
                    other.others.append(entry.get("other") or noted.name)


@dataclass
class BatchModel:
    """A server asked through its batches."""

    spec: str
    parsed: Spec
    options: ModelOptions
    # Whole waves, for as few batches as there can be: each may take a day.
    batched: bool = True
    is_program: bool = False
    continues: bool = False
    gives_logprobs: bool = field(init=False)
    in_flight: int = EVERYTHING
    waiting: int = 0
    identity: str = field(init=False)
    price: Price | None = field(init=False)
    _place: Place = field(init=False)
    _dialect: Dialect = field(init=False)
    _batches: Batches = field(init=False)
    _names: list[str] = field(default_factory=list)
    _resubmitted: int = 0
    _notes: BatchNotes = field(init=False)
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self._place = place_of(self.spec, self.parsed, self.options)
        self._dialect = self._place.open_dialect()
        self.identity, self.gives_logprobs = self._place.identity, self._dialect.gives_logprobs
        if self._dialect.batches is None:
            raise UsageError(f"--batch: srt knows no batches of {self.spec}. Leave it out.")
        self._batches = self._dialect.batches
        self._notes = BatchNotes(self.options.batch_notes)
        full = price_of(self.parsed, self.options.prices)
        self.price = full.of_batch() if full is not None else None
        if self.price is None and self._budget.max_cost is not None:
            raise UsageError(
                f"--max-cost: the price of {self.parsed.name} is not known. Give it with --price."
            )

    @property
    def _budget(self) -> Budget:
        return self.options.budget

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        answered = answered or [False] * len(requests)
        futures: list[Future[Reply]] = [Future() for _ in requests]
        asks: dict[str, _Ask] = {}
        for request, future, known in zip(requests, futures, answered, strict=True):
            body = self._dialect.body(request)
            # What is asked again has another name: its old batch is not to answer it.
            told = [body, request.sample, *([request.again] if request.again else [])]
            name = hashlib.blake2b(orjson.dumps(told), digest_size=16).hexdigest()
            line, most = self._batches.line(name, body), most_tokens(request, body)
            ask = asks.setdefault(name, _Ask(line, request, most))
            ask.known &= known
            ask.futures.append(future)
        threading.Thread(target=self._work, args=(asks,), name="batch", daemon=True).start()
        return futures

    @property
    def can_be_told(self) -> bool:
        return bool(self._place.manner.thinking)

    def finish(self, seconds: float) -> bool:
        return True  # Batches go on without us, and the next run finds them.

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "identity": self.identity,
            "batches": self._names,
            "requests_resubmitted": self._resubmitted,
        }

    def close(self) -> None:
        self._closing.set()

    def _work(self, asks: dict[str, _Ask]) -> None:
        try:
            asyncio.run(self._serve(asks))
        except Refused as refused:
            if refused.status in (401, 403):
                fatal: SrtError = QuotaError(
                    f"{self.spec}: the key is refused ({refused.message})."
                )
            else:
                fatal = SrtError(f"{self.spec}: its batches answer: {refused.message}.")
            _fail(asks, fatal)
        except NoAnswer as trouble:
            fatal = SrtError(
                f"{self.spec}: its batches cannot be reached ({trouble}). Run the same line again: a "
                "batch that was taken all the same is found."
            )
            _fail(asks, fatal)
        except BaseException as error:  # a thread has no caller: the futures carry it
            _fail(asks, error)

    async def _serve(self, asks: dict[str, _Ask]) -> None:
        wire = self._place.endpoints(self._dialect, self.options.timeout_s)[0]
        try:
            await self._run(wire, asks)
        finally:
            await wire.close()

    async def _run(self, wire: Endpoint, asks: dict[str, _Ask]) -> None:
        looked_at: set[str] = set()
        for round_number in range(1, MOST_ROUNDS + 1):
            under_way = await self._adopt(wire, asks, looked_at)
            held = {name for sent in under_way for name in sent.asks}
            new = {name: ask for name, ask in asks.items() if ask.owed and name not in held}
            self._reserve(new)
            allowed = {name: ask for name, ask in new.items() if ask.reserved}
            for part in _cut(allowed, self._batches):
                sent = await self._submit(wire, part)
                looked_at.add(sent.noted.label)
                under_way.append(sent)
            for sent in under_way:
                if not await self._collect(wire, sent):
                    looked_at.remove(sent.noted.label)  # ours may be another
            if self._closing.is_set():
                return
            again = [ask for ask in asks.values() if ask.owed and ask.reserved]
            if not again:
                break
            if round_number < MOST_ROUNDS:
                self._resubmitted += len(again)
                console.say(
                    f"{len(again)} requests are still owed; asking again, round {round_number + 1}"
                )
        for ask in again:
            self._settle(ask, Reply("", "failed", error="expired in every batch"))
        unsent = [ask for ask in asks.values() if ask.owed]
        if unsent:
            _fail(asks, self._budget.error(self.price, unsent[0].most))

    async def _adopt(
        self, wire: Endpoint, asks: dict[str, _Ask], looked_at: set[str]
    ) -> list[_Sent]:
        """The batches of earlier runs that hold what is owed and are under way.

        Those that have ended give what they have.
        """
        under_way = []
        for noted in self._notes.of(self.identity):
            ours = {name: asks[name] for name in noted.requests if name in asks}
            ours = {name: ask for name, ask in ours.items() if ask.owed}
            if not ours or noted.label in looked_at:
                continue
            looked_at.add(noted.label)
            while (batch := await self._look_for(wire, noted)) is not None:
                console.say(f"batch {batch.name}: found again, {batch.status}")
                self._names.append(batch.name)
                sent = _Sent(noted, batch, ours)
                if not batch.over:
                    self._reserve(ours)
                    under_way.append(sent)
                    break
                if await self._take_results(wire, sent, late=True):
                    break
        return under_way

    async def _look_for(self, wire: Endpoint, noted: NotedBatch) -> Batch | None:
        """A noted batch, if its server has it."""
        if noted.name:
            try:
                return await _patiently(self._batches.look, wire, noted.name)
            except Refused as refused:
                if refused.status == 404:
                    return None
                raise
        batch = await _patiently(self._batches.found, wire, noted)
        if batch is None:
            self._notes.drop(noted)
        else:
            self._notes.name(noted, batch.name)
        return batch

    def _reserve(self, asks: Mapping[str, _Ask]) -> None:
        for ask in asks.values():
            ask.reserved = ask.reserved or self._budget.reserve(self.price, ask.most)

    async def _submit(self, wire: Endpoint, part: dict[str, _Ask]) -> _Sent:
        """Hand in a batch."""
        there = await _patiently(self._batches.before, wire)
        noted = self._notes.add(self.identity, list(part), there)
        lines = [ask.line for ask in part.values()]
        lost = False

        async def submit() -> Batch:
            nonlocal lost
            # A try that came to nothing here may have come to a batch there.
            if lost and (found := await self._batches.found(wire, noted)) is not None:
                return found
            try:
                return await self._batches.submit(wire, noted.label, lines)
            except Refused as refused:
                lost = lost or refused.status >= 500 or refused.status == 408
                raise
            except NoAnswer:
                lost = True
                raise

        try:
            batch = await _patiently(submit)
        except Refused:
            if not lost:
                self._notes.drop(noted)
            raise
        self._notes.name(noted, batch.name)
        console.say(f"batch {batch.name}: {len(lines)} requests submitted")
        self._names.append(batch.name)
        return _Sent(noted, batch, part)

    async def _collect(self, wire: Endpoint, sent: _Sent) -> bool:
        """Wait for a batch to end, and give its replies to those who asked; false if it is not ours."""
        batch, shown = sent.batch, None
        # Cancelled before this run: like one that ended before, but for the replies still to come.
        late = batch.cancelling
        while not batch.over:
            if await asyncio.to_thread(self._closing.wait, self.options.batch_poll_s):
                return True
            batch = sent.batch = await _patiently(self._batches.look, wire, batch.name)
            state = (batch.status, batch.done)
            if state != shown:
                done = f", {batch.done} of {batch.total}" if batch.done is not None else ""
                console.say(f"batch {batch.name}: {batch.status}{done}")
                shown = state
        if batch.error or batch.status == "failed":
            self._notes.drop(sent.noted)
            raise SrtError(
                f"{self.spec}: batch {batch.name} failed ({batch.error or 'no reason given'}). For a "
                "limit on enqueued tokens, use --limit, or run without --batch."
            )
        if not await self._take_results(wire, sent, late=late):
            return False
        if batch.status == "cancelled" and not late:  # by the user, who wants nothing sent anew
            cancelled = Reply("", "failed", error=f"batch {batch.name} was cancelled")
            for ask in sent.asks.values():
                if ask.owed and ask.reserved:
                    self._settle(ask, cancelled)
        return True

    async def _take_results(self, wire: Endpoint, sent: _Sent, *, late: bool) -> bool:
        """Hand out a batch's replies; false if it holds none of the requests that were noted.

        What failed in it is the row's error, but in one that ended in the time of an earlier run
        (`late`): then it is asked again.
        """
        told: set[str] = set()
        for place in sent.batch.results:
            try:
                content = await _patiently(self._batches.results, wire, place)
            except Refused as refused:
                if late and refused.status == 404:  # servers keep results for a month
                    continue
                raise
            for line in content.splitlines():
                # Read as any answer: half of a character in one reply must not lose the others.
                read = Answer(200, {}, line).json()
                outcome = self._batches.outcome(as_mapping(read))
                if outcome is None:
                    continue
                told.add(outcome.name)
                ask = sent.asks.get(outcome.name)
                reply = reply_of(outcome, ask.request) if ask and ask.owed else None
                if ask and reply and (outcome.is_final or not late):
                    self._settle(ask, priced(reply, self.price))
        if told and told.isdisjoint(sent.noted.requests):
            console.say(f"batch {sent.batch.name}: holds none of these requests; it is another's")
            self._notes.disown(sent.noted, sent.batch.name)
            return False
        return True

    def _settle(self, ask: _Ask, reply: Reply) -> None:
        used, price = reply.usage, self.price
        if ask.reserved:
            self._budget.settle(price, ask.most, used, reply.cost)
        else:  # an earlier run sent it
            dollars = price.of_call(used) if price and reply.cost is None else reply.cost
            self._budget.spent_before(dollars or 0.0, used, 1)
        for future in ask.futures:
            if not future.cancelled() and not future.done():
                future.set_result(reply)


def reply_of(outcome: BatchResult, request: Request) -> Reply | None:
    """What became of a request of a batch; None for one that expired, which is owed again."""
    if outcome.owed:
        return None
    if outcome.heard is None:
        return Reply("", "refused" if outcome.refused else "failed", error=outcome.error)
    return outcome.heard.reply(request, {}, 1)


async def _patiently(call: Callable[..., Awaitable[Found]], *arguments: object) -> Found:
    """Make a call, a few times where trouble passes."""
    for attempt in range(1, MOST_TRIES + 1):
        wait = FIRST_BACKOFF_S * 2**attempt
        try:
            return await call(*arguments)
        except Refused as refused:
            if refused.status not in PASSING or attempt == MOST_TRIES:
                raise
            wait = max(wait, min(refused.retry_after_s or 0.0, LONGEST_PAUSE_S))
        except NoAnswer:
            if attempt == MOST_TRIES:
                raise
        await asyncio.sleep(wait)
    raise AssertionError  # the last try returns or raises


def _fail(asks: Mapping[str, _Ask], error: BaseException) -> None:
    for ask in asks.values():
        for future in ask.futures:
            if not future.done():
                future.set_exception(error)


def _cut(asks: dict[str, _Ask], batches: Batches) -> Iterator[dict[str, _Ask]]:
    """Parts that fit one batch file each."""
    part: dict[str, _Ask] = {}
    size = 0
    for name, ask in asks.items():
        if part and (
            len(part) >= batches.most_requests or size + len(ask.line) > batches.most_bytes
        ):
            yield part
            part, size = {}, 0
        part[name] = ask
        size += len(ask.line)
    if part:
        yield part


# --- Files to take elsewhere -------------------------------------------------------------------


@dataclass
class ExportModel:
    """Writes requests into a batch file instead of sending them; their rows stay owed."""

    spec: str
    parsed: Spec
    options: ModelOptions
    path: Path
    batched: bool = False
    is_program: bool = False
    continues: bool = False
    gives_logprobs: bool = field(init=False)
    in_flight: int = EVERYTHING
    waiting: int = 0
    identity: str = field(init=False)
    _written: set[bytes] = field(default_factory=set)
    _file: IO[bytes] | None = None

    def __post_init__(self) -> None:
        self._place = place_of(self.spec, self.parsed, replace(self.options, offline=True))
        self._dialect = self._place.open_dialect()
        self.identity, self.gives_logprobs = self._place.identity, self._dialect.gives_logprobs
        if self._dialect.batches is None:
            raise UsageError(f"--export-batch: srt knows no batches of {self.spec}.")
        self._line = self._dialect.batches.line

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        # A command opens a model once per spec; both append to a file that this run began.
        self._file = self._file or open(self.path, "ab")  # noqa: SIM115  held until close()
        futures = [Future[Reply]() for _ in requests]
        for request, future in zip(requests, futures, strict=True):
            key = request_key(canonical_request(self, request))
            if key not in self._written:  # no server takes a name twice
                self._file.write(self._line(key.hex(), self._dialect.body(request)))
                self._written.add(key)
            future.cancel()
        return futures

    @property
    def can_be_told(self) -> bool:
        return bool(self._place.manner.thinking)

    def finish(self, seconds: float) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "identity": self.identity,
            "requests_exported": len(self._written),
        }

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


@dataclass(frozen=True)
class Awaited:
    """A call that is owed, and of its request what a reply in a file is held against."""

    key: bytes
    name: str
    identity: str
    request: Request


@dataclass
class Imported:
    """What a file of replies came to, in lines."""

    taken: int = 0
    without: int = 0
    """Requests that came to nothing, and are owed again."""
    unasked: int = 0
    """Replies to what is not owed here, and not known either."""
    first_error: str = ""


def import_replies(path: Path, journal: Journal, awaited: Iterable[Awaited]) -> Imported:
    """Take the replies of an exported batch file into the journal.

    Raises `SrtError` for a file that is no batch output, or none of ours.
    """
    found = Imported()
    owed = {each.key: each for each in awaited}
    readers = [dialect.batches for dialect in dialects() if dialect.batches is not None]
    for number, line in read_rows(path):
        outcomes = (each for reader in readers if (each := reader.outcome(line)) is not None)
        try:
            outcome = next(outcomes)
            key = bytes.fromhex(outcome.name)
        except (StopIteration, ValueError):
            raise SrtError(
                f"{path}:{number}: not a reply to an exported request (no custom_id of ours). "
                "Give the output file of the batch that --export-batch wrote."
            ) from None
        if key in journal:
            continue
        if key not in owed:
            found.unasked += 1
            continue
        call = owed[key]
        reply = reply_of(outcome, call.request)
        if reply is None or reply.status == "failed":
            found.without += 1
            found.first_error = found.first_error or (reply.error or "" if reply else "expired")
            continue
        journal.append(key, call.name, {"model": call.identity, **reply_to_plain(reply)})
        found.taken += 1
    return found
