"""The Batch API: half the price for patience; and its file format, which vLLM reads too.

A batch is found again by what it asks: its plan's digest stands in the batch's metadata, so a client
that was killed adopts its own batches instead of paying for them twice.
"""

import hashlib
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

import openai
import orjson

from srt_cli import console
from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import ModelOptions, Reply, Request, Spec, canonical_request, reply_to_plain
from srt_cli.models.api.client import TOKEN_FIELDS, address_of, chat_body
from srt_cli.models.api.openai_chat import read_reply
from srt_cli.models.budget import Budget, Price, most_tokens, price_of
from srt_cli.runs.journal import Journal, request_key
from srt_cli.runs.jsonl import read_rows

MOST_REQUESTS: Final = 50_000
MOST_BYTES: Final = 200_000_000
MOST_ROUNDS: Final = 5
ENDPOINT: Final = "/v1/chat/completions"
COMPLETION_WINDOW: Final = "24h"
PLAN: Final = "srt_plan"
DEAD: Final = ("failed", "cancelled", "cancelling")
ENDED: Final = ("completed", "expired", "failed", "cancelled")


def batch_line(identifier: str, body: Mapping[str, Any]) -> bytes:
    """One request in the batch file format."""
    line = {"custom_id": identifier, "method": "POST", "url": ENDPOINT, "body": body}
    return orjson.dumps(line) + b"\n"


@dataclass
class _Ask:
    """A request of a wave; equal ones are asked once."""

    line: bytes
    request: Request
    futures: list[Future[Reply]]
    known: bool


@dataclass
class BatchModel:
    """An OpenAI-compatible server asked through its Batch API."""

    spec: str
    parsed: Spec
    options: ModelOptions
    # Whole waves: each becomes one plan, which a resumed run finds again.
    batched: bool = True
    is_program: bool = False
    continues: bool = False
    gives_logprobs: bool = True
    in_flight: int = MOST_REQUESTS
    identity: str = field(init=False)
    price: Price | None = field(init=False)
    _client: openai.OpenAI = field(init=False)
    _token_field: str = field(init=False)
    _batches: list[str] = field(default_factory=list)
    _resubmitted: int = 0
    _closing: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        urls, key, self.identity = address_of(self.spec, self.parsed)
        full = price_of(self.parsed, self.options.prices)
        self.price = full.of_batch() if full is not None else None
        if self.price is None and self._budget.max_cost is not None:
            raise UsageError(
                f"--max-cost: the price of {self.parsed.name} is not known. Give it with --price."
            )
        self._token_field = TOKEN_FIELDS[self.parsed.kind == "http"]
        self._client = openai.OpenAI(
            api_key=key, base_url=urls[0], timeout=self.options.timeout_s, max_retries=5
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
            body = chat_body(self.parsed.name, request, self._token_field)
            digest = hashlib.blake2b(orjson.dumps([body, request.sample]), digest_size=16)
            name = digest.hexdigest()
            ask = asks.setdefault(name, _Ask(batch_line(name, body), request, [], True))
            ask.known &= known
            ask.futures.append(future)
        threading.Thread(target=self._work, args=(asks,), name="batch", daemon=True).start()
        return futures

    def finish(self, seconds: float) -> bool:
        return True  # Batches go on without us, and the next run finds them.

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "identity": self.identity,
            "batches": self._batches,
            "requests_resubmitted": self._resubmitted,
        }

    def close(self) -> None:
        self._closing.set()

    def _work(self, asks: dict[str, _Ask]) -> None:
        try:
            self._run(asks)
        except openai.AuthenticationError as error:
            _fail(asks, QuotaError(f"{self.spec}: the key is refused ({error.message})."))
        except openai.OpenAIError as error:
            _fail(asks, SrtError(f"{self.spec}: the Batch API answers: {error}"))
        except BaseException as error:  # a thread has no caller: the futures carry it
            _fail(asks, error)

    def _run(self, asks: dict[str, _Ask]) -> None:
        left = self._reserved(asks)
        for round_number in range(1, MOST_ROUNDS + 1):
            plans = list(_cut(left))
            batches = [self._adopt_or_submit(plan) for plan in plans]
            for plan, batch in zip(plans, batches, strict=True):
                self._collect(plan, batch)
            left = {name: ask for name, ask in left.items() if not _settled(ask)}
            if not left or self._closing.is_set():
                break
            self._resubmitted += len(left)
            console.say(f"{len(left)} requests expired; asking again, round {round_number + 1}")
        for ask in left.values():
            self._settle(ask, Reply("", "failed", error="expired in every batch"))
        unsent = [ask for ask in asks.values() if not _settled(ask)]
        if unsent:
            _fail(asks, self._budget.error(self.price, most_tokens(unsent[0].request)))

    def _reserved(self, asks: dict[str, _Ask]) -> dict[str, _Ask]:
        """The requests that the budget allows; those known already cost nothing again."""
        return {
            name: ask
            for name, ask in asks.items()
            if ask.known or self._budget.reserve(self.price, most_tokens(ask.request))
        }

    def _adopt_or_submit(self, plan: dict[str, _Ask]) -> Any:
        digest = hashlib.blake2b("".join(sorted(plan)).encode(), digest_size=16).hexdigest()
        for batch in self._client.batches.list(limit=100):
            if (batch.metadata or {}).get(PLAN) == digest and batch.status not in DEAD:
                console.say(f"batch {batch.id}: found again, {batch.status}")
                self._batches.append(batch.id)
                return batch
        content = b"".join(ask.line for ask in plan.values())
        file = self._client.files.create(file=("srt.jsonl", content), purpose="batch")
        batch = self._client.batches.create(
            input_file_id=file.id,
            endpoint=ENDPOINT,
            completion_window=COMPLETION_WINDOW,
            metadata={PLAN: digest},
        )
        console.say(f"batch {batch.id}: {len(plan)} requests submitted")
        self._batches.append(batch.id)
        return batch

    def _collect(self, plan: dict[str, _Ask], batch: Any) -> None:
        """Wait for a batch to end, and give its replies to those who asked."""
        shown = None
        while batch.status not in ENDED:
            if self._closing.wait(self.options.batch_poll_s):
                return
            batch = self._client.batches.retrieve(batch.id)
            counts = batch.request_counts
            state = (batch.status, counts.completed if counts else None)
            if state != shown:
                done = f", {counts.completed} of {counts.total}" if counts else ""
                console.say(f"batch {batch.id}: {batch.status}{done}")
                shown = state
        if batch.status == "failed":
            errors = batch.errors.data if batch.errors and batch.errors.data else []
            said = "; ".join(str(error.message) for error in errors) or "no reason given"
            raise SrtError(
                f"{self.spec}: batch {batch.id} failed ({said}). For a limit on enqueued tokens, "
                "use --limit, or run without --batch."
            )
        for file_id in (batch.output_file_id, batch.error_file_id):
            if file_id:
                for line in self._client.files.content(file_id).content.splitlines():
                    self._take_in(plan, orjson.loads(line))

    def _take_in(self, plan: dict[str, _Ask], line: dict[str, Any]) -> None:
        ask = plan.get(line.get("custom_id", ""))
        if ask is None or _settled(ask):
            return
        reply = reply_in(line, ask.request)
        if reply is not None:
            self._settle(ask, reply)

    def _settle(self, ask: _Ask, reply: Reply) -> None:
        if not ask.known:
            self._budget.settle(self.price, most_tokens(ask.request), reply.usage)
        for future in ask.futures:
            if not future.cancelled() and not future.done():
                future.set_result(reply)


def reply_in(line: Mapping[str, Any], request: Request) -> Reply | None:
    """The reply in a line of a batch's output; null for one that expired, which is owed again."""
    error = line.get("error") or {}
    if error.get("code") == "batch_expired":
        return None
    response = line.get("response") or {}
    body = response.get("body") or {}
    if response.get("status_code", 200) == 200 and body.get("choices"):
        return read_reply(body, request, 1)
    said = error or body.get("error") or {}
    message = said.get("message") if isinstance(said, dict) else said
    return Reply("", "failed", error=f"in a batch: {message or 'no reply'}")


def _settled(ask: _Ask) -> bool:
    return all(future.done() for future in ask.futures)


def _fail(asks: Mapping[str, _Ask], error: BaseException) -> None:
    for ask in asks.values():
        for future in ask.futures:
            if not future.done():
                future.set_exception(error)


def _cut(asks: dict[str, _Ask]) -> Iterator[dict[str, _Ask]]:
    """Parts that fit one batch file each."""
    part: dict[str, _Ask] = {}
    size = 0
    for name, ask in asks.items():
        if part and (len(part) >= MOST_REQUESTS or size + len(ask.line) > MOST_BYTES):
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
    path: Path
    batched: bool = False
    is_program: bool = False
    continues: bool = False
    gives_logprobs: bool = True
    in_flight: int = MOST_REQUESTS
    identity: str = field(init=False)
    written: int = 0
    _file: IO[bytes] | None = None

    def __post_init__(self) -> None:
        _, _, self.identity = address_of(self.spec, self.parsed, needs_key=False)
        self._token_field = TOKEN_FIELDS[self.parsed.kind == "http"]

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        # A command opens a model once per spec; both append to a file that this run began.
        self._file = self._file or open(self.path, "ab")  # noqa: SIM115  held until close()
        futures = []
        for request in requests:
            key = request_key(canonical_request(self, request)).hex()
            body = chat_body(self.parsed.name, request, self._token_field)
            self._file.write(batch_line(key, body))
            self.written += 1
            futures.append(Future[Reply]())
            futures[-1].set_result(Reply("", "failed", error=f"written to {self.path}"))
        return futures

    def finish(self, seconds: float) -> bool:
        return True

    def describe(self) -> dict[str, Any]:
        return {"spec": self.spec, "identity": self.identity, "requests_exported": self.written}

    def close(self) -> None:
        if self._file is not None:
            self._file.close()


def import_replies(path: Path, journal: Journal) -> tuple[int, int]:
    """Take the replies of an exported batch file into the journal; returns (taken, without reply).

    Raises `SrtError` for a file that is no batch output, or none of ours.
    """
    taken = without = 0
    for number, line in read_rows(path):
        try:
            key = bytes.fromhex(line["custom_id"])
            reply = reply_in(line, Request((), 0))
        except (KeyError, ValueError, TypeError, AttributeError):
            raise SrtError(
                f"{path}:{number}: not a reply to an exported request (no custom_id of ours). "
                "Give the output file of the batch that --export-batch wrote."
            ) from None
        if reply is None or reply.finish_reason == "failed":
            without += 1
        elif key not in journal:
            journal.append(key, "imported", {"model": "", **reply_to_plain(reply)})
            taken += 1
    return taken, without
