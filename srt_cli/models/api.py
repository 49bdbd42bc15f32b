"""OpenAI and every server that speaks its chat protocol: one asyncio loop behind the door.

Retries are ours (`max_retries=0`), because each cause wants its own: throttling waits and never uses
up an attempt, trouble backs off, and what cannot get better stops the run at once.
"""

import asyncio
import contextlib
import os
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

import openai
import orjson

from srt_cli.errors import QuotaError, SrtError
from srt_cli.models import ModelOptions, Reply, Request, Spec, TokenLogprobs
from srt_cli.models.limits import HIGHEST_LIMIT, AdaptiveLimit
from srt_cli.records import Usage

MOST_ATTEMPTS: Final = 5
ATTEMPTS_BEFORE_FIRST_SUCCESS: Final = 3
FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 30.0
DOWN_FOR_S: Final = 30.0
NO_KEY: Final = "none"
QUOTA_CODES: Final = (
    "insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached",
)  # fmt: skip
# What a server may refuse to be told; dropped once, remembered, and noted in the manifest.
OPTIONAL_FIELDS: Final = ("temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs")
TOKEN_FIELDS: Final = ("max_completion_tokens", "max_tokens")


@dataclass
class _Job:
    request: Request
    future: Future[Reply]
    attempts: int = 0
    sent_fields: frozenset[str] = frozenset()


@dataclass
class _Endpoint:
    url: str
    client: openai.AsyncOpenAI
    in_flight: int = 0
    down_until: float = 0.0
    successes: int = 0


class _Row(Exception):
    """This row cannot be answered, whatever is tried; the run goes on."""


@dataclass
class ApiModel:
    """An endpoint (or several that share the load) behind the door."""

    spec: str
    parsed: Spec
    options: ModelOptions
    batched: bool = False
    in_flight: int = field(init=False)
    identity: str = field(init=False)
    _limit: AdaptiveLimit = field(init=False)
    _jobs: "deque[_Job]" = field(default_factory=deque)
    _endpoints: list[_Endpoint] = field(default_factory=list)
    _causes: Counter[str] = field(default_factory=Counter)
    _dropped_fields: set[str] = field(default_factory=set)
    _token_field: str = TOKEN_FIELDS[0]
    _fatal: SrtError | None = None
    _succeeded: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _wake: asyncio.Event | None = None
    _closing: bool = False

    def __post_init__(self) -> None:
        self.in_flight = self.options.concurrency or HIGHEST_LIMIT
        self._limit = AdaptiveLimit(fixed=self.options.concurrency)
        key = os.environ.get("OPENAI_API_KEY")
        if self.parsed.kind == "openai":
            base = os.environ.get("OPENAI_BASE_URL")
            if not key:
                raise QuotaError(
                    f"{self.spec}: no key for the OpenAI API. Set OPENAI_API_KEY, or name another "
                    "model (a directory, http://HOST/v1#NAME, python:FILE:CALLABLE)."
                )
            urls: tuple[str, ...] = (base.rstrip("/") if base else "https://api.openai.com/v1",)
            self.identity = f"openai:{self.parsed.name}" + (f"@{base}" if base else "")
        else:
            urls = self.parsed.endpoints
            self.identity = f"http:{','.join(sorted(urls))}#{self.parsed.name}"
            self._token_field = "max_tokens"
        self._urls = urls
        self._key = key or NO_KEY

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        jobs = [_Job(request, Future()) for request in requests]
        self._start()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._accept, jobs)
        return [job.future for job in jobs]

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "endpoints": list(self._urls),
            "token_field": self._token_field,
            "fields_refused": sorted(self._dropped_fields),
            "causes_of_retries": dict(self._causes),
            "most_in_flight": self._limit.peak,
            "limit_at_the_end": self._limit.limit,
        }

    def close(self) -> None:
        if self._loop is None or self._thread is None:
            return
        self._closing = True
        with contextlib.suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._stop)
        self._thread.join(timeout=10)

    # --- the loop's side ---------------------------------------------------------------------

    def _start(self) -> None:
        if self._thread is not None:
            return
        ready = threading.Event()

        def work() -> None:
            asyncio.run(self._main(ready))

        self._thread = threading.Thread(target=work, name="api", daemon=True)
        self._thread.start()
        ready.wait()

    async def _main(self, ready: threading.Event) -> None:
        self._loop = asyncio.get_running_loop()
        self._wake = asyncio.Event()
        self._endpoints = [_Endpoint(url, self._client(url)) for url in self._urls]
        ready.set()
        try:
            await self._dispatch()
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            for endpoint in self._endpoints:
                with contextlib.suppress(Exception):
                    await endpoint.client.close()

    def _client(self, url: str) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(
            api_key=self._key,
            base_url=url,
            max_retries=0,
            timeout=self.options.timeout_s,
            http_client=openai.DefaultAioHttpClient(),
        )

    def _accept(self, jobs: list[_Job]) -> None:
        if self._fatal is not None:
            for job in jobs:
                job.future.set_exception(self._fatal)
            return
        self._jobs.extend(jobs)
        self._notify()

    def _notify(self) -> None:
        if self._wake is not None:
            self._wake.set()

    def _stop(self) -> None:
        for job in self._jobs:
            job.future.cancel()
        self._jobs.clear()
        self._notify()

    async def _dispatch(self) -> None:
        """Start a job whenever there is one and the limit has room; sleep until either changes."""
        assert self._wake is not None
        under_way: set[asyncio.Task[None]] = set()
        while not self._closing:
            self._wake.clear()
            wait = self._limit.wait_s()
            while self._jobs and wait == 0:
                task = asyncio.create_task(self._serve(self._jobs.popleft(), self._limit.start()))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                wait = self._limit.wait_s()
            timeout = wait if self._jobs and wait != float("inf") else None
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._wake.wait(), timeout)

    async def _serve(self, job: _Job, started: float) -> None:
        """One request once: answer its future, or put it back for another try."""
        endpoint = self._choose_endpoint()
        endpoint.in_flight += 1
        try:
            reply = await self._ask(endpoint, job)
        except asyncio.CancelledError:
            job.future.cancel()
            raise
        except _Row as row:
            self._limit.succeeded()
            self._resolve(job, Reply("", "failed", error=str(row), attempts=job.attempts + 1))
        except openai.OpenAIError as error:
            await self._handle(error, endpoint, job, started)
        except SrtError as error:
            self._limit.troubled()
            self._give_up(error)
            self._fail(job, error)
        else:
            self._limit.succeeded()
            self._succeeded = True
            endpoint.successes += 1
            self._resolve(job, reply)
        finally:
            endpoint.in_flight -= 1
            self._notify()

    def _choose_endpoint(self) -> _Endpoint:
        """The least busy endpoint that is up; if none is, the one that may be up again first."""
        now = time.monotonic()
        up = [endpoint for endpoint in self._endpoints if endpoint.down_until <= now]
        if up:
            return min(up, key=lambda endpoint: endpoint.in_flight)
        return min(self._endpoints, key=lambda endpoint: endpoint.down_until)

    async def _ask(self, endpoint: _Endpoint, job: _Job) -> Reply:
        body = self._body(job.request)
        job.sent_fields = frozenset(body)
        raw = await endpoint.client.chat.completions.with_raw_response.create(**body)
        content = raw.content
        try:
            data = orjson.loads(content)
            choice = data["choices"][0]
            return _read_reply(choice, data.get("usage") or {}, job)
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            if not self._succeeded:
                start = content[:60].decode("utf-8", errors="replace")
                raise SrtError(
                    f"{endpoint.url}: answers, but not as an OpenAI-compatible server "
                    f"({start!r}...). Does the address end in /v1?"
                ) from error
            raise openai.APIConnectionError(request=raw.http_request) from error

    def _body(self, request: Request) -> dict[str, Any]:
        body: dict[str, Any] = {
            "model": self.parsed.name,
            "messages": [turn.model_dump() for turn in request.messages],
            self._token_field: request.max_tokens,
            "temperature": request.temperature,
        }
        if request.top_p < 1:
            body["top_p"] = request.top_p
        if request.stop:
            body["stop"] = list(request.stop)
        if request.temperature > 0:
            # Samples of one prompt must differ, and a re-run must repeat them where it can.
            body["seed"] = request.seed + request.sample
        if request.top_logprobs:
            body |= {"logprobs": True, "top_logprobs": request.top_logprobs}
        return {name: value for name, value in body.items() if name not in self._dropped_fields}

    # --- errors by cause ---------------------------------------------------------------------

    async def _handle(
        self, error: openai.OpenAIError, endpoint: _Endpoint, job: _Job, started: float
    ) -> None:
        status = error.status_code if isinstance(error, openai.APIStatusError) else None
        if status == 429 and _error_code(error) not in QUOTA_CODES:
            self._causes["throttled"] += 1
            self._limit.refused(started, _retry_after_s(error))
            self._jobs.appendleft(job)
            return
        self._limit.troubled()
        if status is None or status in (408, 409) or status >= 500:
            await self._try_later(error, endpoint, job)
        elif status in (400, 422) and self._adapt_to(error, job):
            self._jobs.appendleft(job)
        elif status in (400, 413, 422):
            reason = f"the server refuses the request: {_message_of(error)}"
            self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts + 1))
        else:
            fatal = await self._fatal_error(error, endpoint, status)
            self._give_up(fatal)
            self._fail(job, fatal)

    async def _try_later(self, error: openai.OpenAIError, endpoint: _Endpoint, job: _Job) -> None:
        """Timeouts, 5xx and broken connections: back off with jitter, a few times."""
        job.attempts += 1
        cause = _cause_of(error)
        self._causes[cause] += 1
        if cause == "no connection":
            if "certificate" in _root_message(error).lower():
                fatal = SrtError(
                    f"{endpoint.url}: its certificate is not trusted ({_root_message(error)}). "
                    "Check the address, or install the certificate of its authority."
                )
                self._give_up(fatal)
                self._fail(job, fatal)
                return
            endpoint.down_until = time.monotonic() + (DOWN_FOR_S if endpoint.successes else 1.0)
        if not self._succeeded and job.attempts >= ATTEMPTS_BEFORE_FIRST_SUCCESS:
            fatal = SrtError(f"{self._where(endpoint)}: {_why_unreachable(cause, error)}")
            self._give_up(fatal)
            self._fail(job, fatal)
            return
        if job.attempts >= MOST_ATTEMPTS:
            reason = f"{cause} after {job.attempts} attempts: {_message_of(error)}"
            self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts))
            return
        backoff = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (job.attempts - 1))
        await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
        self._jobs.appendleft(job)

    def _where(self, endpoint: _Endpoint) -> str:
        return endpoint.url if len(self._urls) == 1 else ", ".join(self._urls)

    def _adapt_to(self, error: openai.OpenAIError, job: _Job) -> bool:
        """Learn what this server does not want to be told; true when the request may go again."""
        if job.sent_fields != frozenset(self._body(job.request)):
            return True  # learnt already from a request that was under way beside this one
        message = _message_of(error)
        if self._token_field in message and "unsupported" in message.lower():
            other = TOKEN_FIELDS[self._token_field == TOKEN_FIELDS[0]]
            if other not in self._dropped_fields:
                self._dropped_fields.add(self._token_field)
                self._token_field = other
                return True
        for name in OPTIONAL_FIELDS:
            named = f"'{name}'" in message or f'"{name}"' in message or f"{name}:" in message
            if name not in self._dropped_fields and (named or _error_param(error) == name):
                self._dropped_fields.add(name)
                return True
        return False

    async def _fatal_error(
        self, error: openai.OpenAIError, endpoint: _Endpoint, status: int
    ) -> SrtError:
        message = _message_of(error)
        if status in (401, 403):
            return QuotaError(
                f"{endpoint.url}: the key is refused ({message}). Set OPENAI_API_KEY to a valid one."
            )
        if status == 429:
            return QuotaError(
                f"{endpoint.url}: no credit left ({message}). What is answered is kept; add credit "
                "and run the same line again."
            )
        if status == 404:
            listed = await self._listed_models(endpoint)
            return SrtError(f"{endpoint.url}: does not know the model {self.parsed.name!r}{listed}")
        return SrtError(f"{endpoint.url}: answers with status {status} ({message}).")

    async def _listed_models(self, endpoint: _Endpoint) -> str:
        try:
            page = await endpoint.client.models.list(timeout=10)
        except openai.OpenAIError:
            return ", and lists none. Check the address and the name."
        names = sorted(model.id for model in page.data)
        if not names:
            return ", and its list of models is empty. Is a model loaded there?"
        return f". It offers: {', '.join(names[:8])}."

    def _give_up(self, error: SrtError) -> None:
        """A fault that no row can escape: nothing further is sent."""
        if self._fatal is None:
            self._fatal = error
        for job in self._jobs:
            self._fail(job, error)
        self._jobs.clear()

    def _resolve(self, job: _Job, reply: Reply) -> None:
        if not job.future.cancelled():
            job.future.set_result(reply)

    def _fail(self, job: _Job, error: SrtError) -> None:
        if not job.future.cancelled():
            job.future.set_exception(error)


def _read_reply(choice: dict[str, Any], usage: dict[str, Any], job: _Job) -> Reply:
    message = choice["message"]
    text = message.get("content") or ""
    refusal = message.get("refusal")
    finish = choice.get("finish_reason")
    stops = [place for stop in job.request.stop if (place := text.find(stop)) >= 0]
    if stops:
        # Some servers ignore stop texts, others keep them in the reply.
        text, finish = text[: min(stops)], "stop"
    reason: Any = {"length": "length", "content_filter": "refused"}.get(str(finish), "stop")
    if refusal:
        text, reason = refusal, "refused"
    return Reply(
        text=text,
        finish_reason=reason,
        usage=Usage(
            prompt_tokens=usage.get("prompt_tokens") or 0,
            completion_tokens=usage.get("completion_tokens") or 0,
            cached_tokens=(usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0,
            reasoning_tokens=(usage.get("completion_tokens_details") or {}).get("reasoning_tokens")
            or 0,
        ),
        logprobs=_read_logprobs(choice.get("logprobs")),
        attempts=job.attempts + 1,
    )


def _read_logprobs(logprobs: dict[str, Any] | None) -> tuple[TokenLogprobs, ...]:
    places = (logprobs or {}).get("content") or []
    return tuple(
        TokenLogprobs(
            place["token"],
            {other["token"]: other["logprob"] for other in place.get("top_logprobs") or []},
        )
        for place in places
    )


def _error_body(error: openai.OpenAIError) -> dict[str, Any]:
    body = error.body if isinstance(error, openai.APIError) else None
    if isinstance(body, dict):
        inner = body.get("error")
        return inner if isinstance(inner, dict) else body
    return {}


def _error_code(error: openai.OpenAIError) -> str | None:
    body = _error_body(error)
    code = body.get("code") or body.get("type")
    return str(code) if code else None


def _error_param(error: openai.OpenAIError) -> str | None:
    param = _error_body(error).get("param")
    return str(param) if param else None


def _message_of(error: openai.OpenAIError) -> str:
    message = _error_body(error).get("message") or str(error)
    return str(message).strip().rstrip(".")[:300]


def _root_of(error: BaseException) -> BaseException:
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _root_message(error: BaseException) -> str:
    root = _root_of(error)
    return str(root) or type(root).__name__


def _retry_after_s(error: openai.OpenAIError) -> float | None:
    if not isinstance(error, openai.APIStatusError):
        return None
    headers = error.response.headers
    for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
        with contextlib.suppress(KeyError, ValueError):
            return float(headers[name]) * unit
    return None


def _cause_of(error: openai.OpenAIError) -> str:
    # The aiohttp transport reports a refused connection as a timeout; its cause tells them apart.
    if isinstance(_root_of(error), ConnectionError):
        return "no connection"
    if isinstance(error, openai.APITimeoutError):
        return "timeout"
    if isinstance(error, openai.APIConnectionError):
        return "no connection"
    return "server error"


def _why_unreachable(cause: str, error: openai.OpenAIError) -> str:
    if cause == "timeout":
        return "does not answer in time. Is the model loaded? Raise --timeout if it is slow."
    if cause == "no connection":
        return f"cannot be reached ({_root_message(error)}). Is the server running?"
    return f"answers only with errors ({_message_of(error)}). Look at the server's log."
