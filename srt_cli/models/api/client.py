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
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import ModelOptions, Reply, Request, Spec
from srt_cli.models.api.limits import (
    DEFAULT_PAUSE_S,
    HIGHEST_LIMIT,
    LONGEST_PAUSE_S,
    AdaptiveLimit,
    Pace,
    RateLimit,
)
from srt_cli.models.api.openai_chat import Endpoint, NoAnswer, Refused, read_reply
from srt_cli.models.budget import Budget, Price, likely_prompt_tokens, most_tokens, price_of
from srt_cli.records import Usage

MOST_ATTEMPTS: Final = 5
ATTEMPTS_BEFORE_FIRST_SUCCESS: Final = 3
FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 30.0
LOOK_EVERY_S: Final = 0.02
DOWN_FOR_S: Final = 30.0
DOWN_BEFORE_FIRST_SUCCESS_S: Final = 1.0
NO_KEY: Final = "none"
OPENAI_URL: Final = "https://api.openai.com/v1"
QUOTA_CODES: Final = (
    "insufficient_quota", "credit_balance_exhausted", "billing_hard_limit_reached",
)  # fmt: skip
# What a server may refuse to be told; dropped once, remembered, and noted in the manifest.
OPTIONAL_FIELDS: Final = ("temperature", "top_p", "seed", "stop", "logprobs", "top_logprobs")
TOKEN_FIELDS: Final = ("max_completion_tokens", "max_tokens")


@dataclass
class _Job:
    """A request on its way, with what is set aside for it."""

    request: Request
    future: Future[Reply]
    most: Usage
    likely_tokens: float = 0.0
    attempts: int = 0
    sent_fields: frozenset[str] = frozenset()


@dataclass
class ApiModel:
    """An endpoint (or several that share the load) behind the door."""

    spec: str
    parsed: Spec
    options: ModelOptions
    batched: bool = False
    is_program: bool = False
    continues: bool = False
    gives_logprobs: bool = True
    in_flight: int = field(init=False)
    identity: str = field(init=False)
    price: Price | None = field(init=False)
    _limit: AdaptiveLimit = field(init=False)
    _rate: RateLimit = field(init=False)
    _pace: Pace = field(default_factory=Pace)
    _jobs: "deque[_Job]" = field(default_factory=deque)
    _endpoints: list[Endpoint] = field(default_factory=list)
    _causes: Counter[str] = field(default_factory=Counter)
    _dropped_fields: set[str] = field(default_factory=set)
    _token_field: str = TOKEN_FIELDS[0]
    _completion_tokens: Counter[str] = field(default_factory=Counter)
    _fatal: SrtError | None = None
    _succeeded: bool = False
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _wake: asyncio.Event | None = None
    _closing: bool = False

    def __post_init__(self) -> None:
        self.in_flight = self.options.concurrency or HIGHEST_LIMIT
        self._limit = AdaptiveLimit(fixed=self.options.concurrency)
        self._rate = RateLimit.of(self.options.rpm, self.options.tpm)
        self._urls, self._key, self.identity = address_of(
            self.spec, self.parsed, needs_key=not self.options.offline
        )
        if self.parsed.kind == "http":
            self._token_field = "max_tokens"
        self.price = price_of(self.parsed, self.options.prices)
        if self.price is None and self._budget.max_cost is not None:
            raise UsageError(
                f"--max-cost: the price of {self.parsed.name} is not known. "
                f"Give it with --price {self.parsed.name}=INPUT/OUTPUT (dollars per million tokens)."
            )
        self._budget.listen(self._notify_from_anywhere)

    @property
    def _budget(self) -> Budget:
        return self.options.budget

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        jobs = [_Job(request, Future(), most_tokens(request)) for request in requests]
        if self.options.offline:
            raise SrtError(f"{self.spec}: a call is owed, and nothing may be sent.")
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
            "rate_limits": self._rate.describe(),
            "requests_per_second_found": self._pace.per_second,
        }

    def finish(self, seconds: float) -> bool:
        if self._loop is None or self._thread is None or not self._thread.is_alive():
            return True
        home = asyncio.run_coroutine_threadsafe(self._bring_home(), self._loop)
        try:
            home.result(seconds)
        except TimeoutError:
            return False
        return True

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
        self._endpoints = [Endpoint(url, self._key, self.options.timeout_s) for url in self._urls]
        ready.set()
        try:
            await self._dispatch()
        finally:
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()
            await asyncio.sleep(0)
            for endpoint in self._endpoints:
                with contextlib.suppress(Exception):
                    await endpoint.close()

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

    def _notify_from_anywhere(self) -> None:
        if self._loop is not None and not self._closing:
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._notify)

    async def _bring_home(self) -> None:
        self._fatal = self._fatal or SrtError("The run was stopped.")
        self._drop_waiting()
        while any(endpoint.in_flight for endpoint in self._endpoints):
            await asyncio.sleep(LOOK_EVERY_S)
            self._drop_waiting()  # what was refused meanwhile

    def _drop_waiting(self) -> None:
        for job in self._jobs:
            job.future.cancel()
        self._jobs.clear()

    def _stop(self) -> None:
        self._drop_waiting()
        self._notify()

    async def _dispatch(self) -> None:
        """Start a job whenever there is one and every limit has room; sleep until that changes."""
        assert self._wake is not None
        under_way: set[asyncio.Task[None]] = set()
        while not self._closing:
            self._wake.clear()
            wait = self._wait_s()
            while self._jobs and wait == 0:
                if not self._budget.reserve(self.price, self._jobs[0].most):
                    wait = float("inf")
                    if self._budget.in_flight == 0:
                        self._give_up(self._budget.error(self.price, self._jobs[0].most))
                    break
                job = self._jobs.popleft()
                task = asyncio.create_task(self._serve(job, self._begin(job)))
                under_way.add(task)
                task.add_done_callback(under_way.discard)
                wait = self._wait_s()
            alarm = None
            if self._jobs and wait != float("inf"):
                alarm = asyncio.get_running_loop().call_later(wait, self._notify)
            await self._wake.wait()
            if alarm is not None:
                alarm.cancel()

    def _wait_s(self) -> float:
        return max(self._limit.wait_s(), self._rate.wait_s(), self._pace.wait_s())

    def _begin(self, job: _Job) -> float:
        """Take a slot and the tokens that a job will likely use; returns the time."""
        if self._rate.tokens.per_minute is not None:
            answered = self._completion_tokens["replies"]
            written = self._completion_tokens["tokens"] / answered if answered else 0
            job.likely_tokens = likely_prompt_tokens(job.request) + (
                written or job.request.max_tokens / 4
            )
        self._rate.start(job.likely_tokens)
        self._pace.start()
        return self._limit.start()

    async def _serve(self, job: _Job, started: float) -> None:
        """One request once: answer its future, or put it back for another try."""
        endpoint = self._choose_endpoint()
        endpoint.in_flight += 1
        used = Usage()
        try:
            body = self._body(job.request)
            job.sent_fields = frozenset(body)
            data, headers = await endpoint.post(body)
            reply = read_reply(data, job.request, job.attempts + 1)
        except asyncio.CancelledError:
            job.future.cancel()
            raise
        except Refused as refused:
            endpoint.in_flight -= 1
            self._budget.settle(self.price, job.most, used)
            await self._handle_refusal(refused, endpoint, job, started)
        except NoAnswer as trouble:
            endpoint.in_flight -= 1
            # A request that went out and came to nothing may have been paid for.
            sent = trouble.cause != "no connection"
            self._budget.settle(self.price, job.most, job.most if sent else used)
            self._limit.troubled()
            await self._try_later(trouble.cause, str(trouble), endpoint, job)
        else:
            endpoint.in_flight -= 1
            endpoint.successes += 1
            self._take_in(job, reply, headers)
        finally:
            self._notify()

    def _take_in(self, job: _Job, reply: Reply, headers: Mapping[str, str]) -> None:
        used = reply.usage
        self._budget.settle(self.price, job.most, used)
        self._completion_tokens.update(replies=1, tokens=used.completion_tokens)
        self._rate.settle(job.likely_tokens, used.prompt_tokens + used.completion_tokens)
        self._rate.learn(headers)
        self._pace.succeeded()
        self._limit.succeeded()
        self._succeeded = True
        self._resolve(job, reply)

    def _choose_endpoint(self) -> Endpoint:
        """The least busy endpoint that is up; if none is, the one that may be up again first."""
        up = [endpoint for endpoint in self._endpoints if endpoint.up]
        if up:
            return min(up, key=lambda endpoint: endpoint.in_flight)
        return min(self._endpoints, key=lambda endpoint: endpoint.down_until)

    def _body(self, request: Request) -> dict[str, Any]:
        body = chat_body(self.parsed.name, request, self._token_field)
        return {name: value for name, value in body.items() if name not in self._dropped_fields}

    # --- errors by cause ---------------------------------------------------------------------

    async def _handle_refusal(
        self, refused: Refused, endpoint: Endpoint, job: _Job, started: float
    ) -> None:
        status = refused.status
        if status == 429 and refused.code not in QUOTA_CODES:
            await self._throttle(refused, job, started)
            return
        self._limit.troubled()
        if status in (408, 409) or status >= 500:
            await self._try_later("server error", refused.message, endpoint, job)
        elif status in (400, 422) and self._adapt_to(refused, job):
            self._jobs.appendleft(job)
        elif status in (400, 413, 422):
            reason = f"the server refuses the request: {refused.message}"
            self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts + 1))
        else:
            self._give_up(await self._fatal_error(refused, endpoint), job)

    async def _throttle(self, refused: Refused, job: _Job, started: float) -> None:
        """Too fast: slow down for all, and let this job wait as long as the server asks."""
        self._causes["throttled"] += 1
        if self._pace.refused(started):
            self._limit.refused(started, refused.retry_after_s)
        else:
            self._limit.released()
        self._rate.learn(refused.headers)
        self._notify()
        wait = refused.retry_after_s if refused.retry_after_s is not None else DEFAULT_PAUSE_S
        # Not all at once again: those refused together come back spread out.
        await asyncio.sleep(min(wait, LONGEST_PAUSE_S) * random.uniform(1.0, 1.2))
        self._jobs.appendleft(job)

    async def _try_later(self, cause: str, message: str, endpoint: Endpoint, job: _Job) -> None:
        """Timeouts, 5xx, broken connections and torn replies: back off with jitter, a few times."""
        job.attempts += 1
        self._causes[cause] += 1
        if cause == "no connection":
            if "certificate" in message.lower():
                fatal = SrtError(
                    f"{endpoint.url}: its certificate is not trusted ({message}). "
                    "Check the address, or install the certificate of its authority."
                )
                self._give_up(fatal, job)
                return
            down_s = DOWN_FOR_S if endpoint.successes else DOWN_BEFORE_FIRST_SUCCESS_S
            endpoint.down_until = time.monotonic() + down_s
        if not self._succeeded and job.attempts >= ATTEMPTS_BEFORE_FIRST_SUCCESS:
            self._give_up(self._unreachable(cause, message), job)
            return
        if job.attempts >= MOST_ATTEMPTS:
            reason = f"{cause} after {job.attempts} attempts: {message}"
            self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts))
            return
        backoff = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** (job.attempts - 1))
        self._notify()
        await asyncio.sleep(backoff * random.uniform(0.5, 1.5))
        self._jobs.appendleft(job)

    def _unreachable(self, cause: str, message: str) -> SrtError:
        why = {
            "timeout": "does not answer in time. Is the model loaded? Raise --timeout if it is slow.",
            "no connection": f"cannot be reached ({message}). Is the server running?",
            "malformed reply": (
                f"answers, but not as an OpenAI-compatible server ({message}...). "
                "Does the address end in /v1?"
            ),
        }
        said = why.get(cause, f"answers only with errors ({message}). Look at the server's log.")
        return SrtError(f"{', '.join(self._urls)}: {said}")

    def _adapt_to(self, refused: Refused, job: _Job) -> bool:
        """Learn what this server does not want to be told; true when the request may go again."""
        if job.sent_fields != frozenset(self._body(job.request)):
            return True  # learnt already from a request that was under way beside this one
        message = refused.message
        if self._token_field in message and "unsupported" in message.lower():
            other = TOKEN_FIELDS[self._token_field == TOKEN_FIELDS[0]]
            if other not in self._dropped_fields:
                self._dropped_fields.add(self._token_field)
                self._token_field = other
                return True
        for name in OPTIONAL_FIELDS:
            named = f"'{name}'" in message or f'"{name}"' in message or f"{name}:" in message
            if name not in self._dropped_fields and (named or refused.param == name):
                self._dropped_fields.add(name)
                return True
        return False

    async def _fatal_error(self, refused: Refused, endpoint: Endpoint) -> SrtError:
        message = refused.message
        if refused.status in (401, 403):
            return QuotaError(
                f"{endpoint.url}: the key is refused ({message}). Set OPENAI_API_KEY to a valid one."
            )
        if refused.status == 429:
            return QuotaError(
                f"{endpoint.url}: no credit left ({message}). What is answered is kept; add credit "
                "and run the same line again."
            )
        if refused.status == 404:
            names = await endpoint.listed_models()
            offer = (
                f". It offers: {', '.join(names[:8])}."
                if names
                else (
                    ", and lists none. Check the address and the name."
                    if names is None
                    else ", and its list of models is empty. Is a model loaded there?"
                )
            )
            return SrtError(f"{endpoint.url}: does not know the model {self.parsed.name!r}{offer}")
        return SrtError(f"{endpoint.url}: answers with status {refused.status} ({message}).")

    def _give_up(self, error: SrtError, job: _Job | None = None) -> None:
        """A fault that no row can escape: nothing further is sent."""
        if self._fatal is None:
            self._fatal = error
        for waiting in [*self._jobs, *([job] if job else [])]:
            if not waiting.future.cancelled():
                waiting.future.set_exception(error)
        self._jobs.clear()

    def _resolve(self, job: _Job, reply: Reply) -> None:
        if not job.future.cancelled():
            job.future.set_result(reply)


def address_of(
    spec: str, parsed: Spec, *, needs_key: bool = True
) -> tuple[tuple[str, ...], str, str]:
    """Where an API model is: its addresses, the key, and its identity in the journal.

    Raises `QuotaError` when the OpenAI API is to be asked without a key.
    """
    key = os.environ.get("OPENAI_API_KEY")
    if parsed.kind == "http":
        urls = parsed.endpoints
        return urls, key or NO_KEY, f"http:{','.join(sorted(urls))}#{parsed.name}"
    base = os.environ.get("OPENAI_BASE_URL")
    if not key and needs_key:
        raise QuotaError(
            f"{spec}: no key for the OpenAI API. Set OPENAI_API_KEY, or name another "
            "model (a directory, http://HOST/v1#NAME, python:FILE:CALLABLE)."
        )
    identity = f"openai:{parsed.name}" + (f"@{base}" if base else "")
    return (base.rstrip("/") if base else OPENAI_URL,), key or NO_KEY, identity


def chat_body(model: str, request: Request, token_field: str) -> dict[str, Any]:
    """A request as the chat completions endpoint wants it; only what was asked for is sent."""
    body: dict[str, Any] = {
        "model": model,
        "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
        token_field: request.max_tokens,
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
    return body
