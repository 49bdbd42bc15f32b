"""Every model behind a server: one asyncio loop behind the door, whatever the dialect.

Retries are by cause, because each wants its own: throttling waits and never uses up an attempt, trouble
backs off, and what cannot get better stops the run at once.
"""

import asyncio
import contextlib
import random
import threading
import time
from collections import Counter, deque
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any, Final

from srt_cli import console
from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import ModelOptions, Reply, Request, Spec, warn_if_deaf
from srt_cli.models.api.dialect import Answer, Dialect, NoAnswer, Refused, error_within
from srt_cli.models.api.limits import (
    DEFAULT_PAUSE_S,
    HIGHEST_LIMIT,
    LEAST_PAUSE_S,
    LONGEST_PAUSE_S,
    AdaptiveLimit,
    Pace,
    RateLimit,
)
from srt_cli.models.api.patience import Patience, is_loading
from srt_cli.models.api.refusals import about, is_of_key, same_words
from srt_cli.models.api.transport import Endpoint, Place, Redirected, place_of
from srt_cli.models.budget import Budget, Price, likely_prompt_tokens, most_tokens, price_of, priced
from srt_cli.records import Usage

MOST_ATTEMPTS: Final = 5
ATTEMPTS_BEFORE_FIRST_SUCCESS: Final = 3
ATTEMPTS_WITH_OTHERS: Final = 2
"""Of a row that may be what brings the server down; then it is sent alone."""
MOST_CHANGES: Final = 16
"""So often a request goes again without what was refused, or in another form."""
FIRST_BACKOFF_S: Final = 0.5
LONGEST_BACKOFF_S: Final = 30.0
LOOK_EVERY_S: Final = 0.02
DOWN: Final = (502, 503, 504)
"""Statuses of a server that is not there, as proxies tell."""
UNREACHED: Final = ("no connection", "wrong address")
"""Causes that no request has a part in."""
DOWN_FOR_S: Final = 30.0
DOWN_BEFORE_FIRST_SUCCESS_S: Final = 1.0
WATCH_EVERY_S: Final = 0.5
SAME_REFUSALS: Final = {"request": 4, "too long": 32}
"""So many first replies that are the same refusal are no trouble of a row's."""


@dataclass(eq=False)
class _Job:
    """A request on its way, with what is set aside for it."""

    request: Request
    future: Future[Reply]
    most: Usage
    likely_tokens: float = 0.0
    attempts: int = 0
    changes: int = 0
    throttled_since: float | None = None
    lost_at: float = float("inf")
    """When it was last lost, sent to a server that may have been there."""
    suspect: bool = False
    """It was lost again though others were served in between: it may be the cause."""
    sent: Mapping[str, Any] = field(default_factory=dict)

    @property
    def alone(self) -> bool:
        """Whether to send it with no other in flight, which would share its fate."""
        return self.suspect and self.attempts >= ATTEMPTS_WITH_OTHERS


@dataclass
class ApiModel:
    """An endpoint (or several that share the load) behind the door."""

    spec: str
    parsed: Spec
    options: ModelOptions
    batched: bool = False
    is_program: bool = False
    continues: bool = False
    gives_logprobs: bool = field(init=False)
    in_flight: int = field(init=False)
    identity: str = field(init=False)
    price: Price | None = field(init=False)
    _limit: AdaptiveLimit = field(init=False)
    _rate: RateLimit = field(init=False)
    _pace: Pace = field(default_factory=Pace)
    _jobs: "deque[_Job]" = field(default_factory=deque)
    _endpoints: list[Endpoint] = field(default_factory=list)
    _causes: Counter[str] = field(default_factory=Counter)
    _place: Place = field(init=False)
    _dialect: Dialect = field(init=False)
    _estimated: int = 0
    """Replies whose usage the server did not tell."""
    _completion_tokens: Counter[str] = field(default_factory=Counter)
    _told: set[str] = field(default_factory=set)
    _deaf: bool = False
    """It was said that the model cannot be told whether to think."""
    _fatal: SrtError | None = None
    _succeeded: bool = False
    _patience: Patience = field(init=False)
    _alone: bool = False
    """The last request that went out is to have no company."""
    _asleep: set[_Job] = field(default_factory=set)
    """Jobs that wait for another try."""
    _refusals: Counter[str] = field(default_factory=Counter)
    """What was said before anything was served."""
    _loop: asyncio.AbstractEventLoop | None = None
    _thread: threading.Thread | None = None
    _wake: asyncio.Event | None = None
    _closing: bool = False

    def __post_init__(self) -> None:
        self.in_flight = self.options.concurrency or HIGHEST_LIMIT
        self._limit = AdaptiveLimit(self.options.concurrency, timeout_s=self.options.timeout_s)
        self._patience = Patience(self.spec, self.options.give_up_after_s)
        self._rate = RateLimit.of(self.options.rpm, self.options.tpm)
        self._place = place_of(self.spec, self.parsed, self.options)
        self._dialect = self._place.open_dialect()
        self.identity, self.gives_logprobs = self._place.identity, self._dialect.gives_logprobs
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
        self._deaf = self._deaf or warn_if_deaf(self, requests)
        self._told.update(each.thinks.told for each in requests if each.thinks.told)
        if self.options.offline:
            raise SrtError(f"{self.spec}: a call is owed, and nothing may be sent.")
        jobs = [
            _Job(request, Future(), most_tokens(request, self._dialect.body(request)))
            for request in requests
        ]
        self._start()
        assert self._loop is not None
        self._loop.call_soon_threadsafe(self._accept, jobs)
        return [job.future for job in jobs]

    def describe(self) -> dict[str, Any]:
        return {
            "spec": self.spec,
            "endpoints": list(self._place.urls),
            **self._dialect.describe(),
            **({"thinking": sorted(self._told)} if self._told and self.can_be_told else {}),
            "causes_of_retries": dict(self._causes),
            "most_in_flight": self._limit.peak,
            "limit_at_the_end": self._limit.limit,
            "rate_limits": self._rate.describe(),
            "requests_per_second_found": self._pace.per_second,
            **({"replies_without_usage": self._estimated} if self._estimated else {}),
        }

    @property
    def can_be_told(self) -> bool:
        return bool(self._place.manner.thinking)

    @property
    def waiting(self) -> int:
        return len(self._jobs) + len(self._asleep)

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
        self._endpoints = self._place.endpoints(self._dialect, self.options.timeout_s)
        for endpoint in self._endpoints:
            endpoint.open()
        ready.set()
        watch = asyncio.create_task(self._watch())
        try:
            await self._dispatch()
        finally:
            watch.cancel()
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

    async def _watch(self) -> None:
        """Give up on a server that admits nothing for too long."""
        while True:
            await asyncio.sleep(WATCH_EVERY_S)
            waiting = [*self._jobs, *self._asleep]
            if not waiting or not self._patience.is_over():
                continue
            if self._patience.down and all(job.suspect for job in waiting):
                self._fail_alone(waiting)
            else:
                self._give_up(self._nothing_admitted())

    def _fail_alone(self, suspects: list[_Job]) -> None:
        """End rows that may be what keeps the server down, and not the run."""
        waited, why = self.options.give_up_after_s, self._patience.why
        reason = (
            f"nothing was admitted for {waited:g} s ({why}), though other rows were served before"
        )
        for job in suspects:
            self._resolve(job, Reply("", "failed", error=reason, attempts=max(1, job.attempts)))
        self._jobs.clear()
        self._patience.start_again()

    def _nothing_admitted(self) -> SrtError:
        waited, why = self.options.give_up_after_s, self._patience.why
        if self._patience.never_up:
            return SrtError(
                f"{self.spec}: is not up after {waited:g} s ({why}). Check the address, start the "
                "server, and run the same line again; --give-up-after waits longer."
            )
        said = f"{self.spec}: nothing was admitted for {waited:g} s ({why}). What is answered is kept; "
        if self._patience.down:
            return SrtError(f"{said}start the server and run the same line again.")
        return QuotaError(
            f"{said}run the same line later, or pass --give-up-after with more seconds."
        )

    async def _bring_home(self) -> None:
        self._fatal = self._fatal or SrtError("The run was stopped.")
        self._drop_waiting()
        while any(endpoint.in_flight for endpoint in self._endpoints):
            await asyncio.sleep(LOOK_EVERY_S)
            self._drop_waiting()  # what was refused meanwhile

    def _drop_waiting(self) -> None:
        for job in [*self._jobs, *self._asleep]:
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
        in_flight = self._limit.in_flight
        if in_flight and self._jobs and (self._alone or self._jobs[0].alone):
            return float("inf")
        down = self._patience.wait_s(in_flight)
        return max(down, self._limit.wait_s(), self._rate.wait_s(), self._pace.wait_s())

    def _begin(self, job: _Job) -> float:
        """Take a slot and the tokens that a job will likely use; returns the time."""
        if self._rate.tokens.per_minute is not None:
            answered = self._completion_tokens["replies"]
            written = self._completion_tokens["tokens"] / answered if answered else 0
            job.likely_tokens = likely_prompt_tokens(job.request) + (
                written or job.request.max_tokens / 4
            )
        self._alone = job.alone
        self._rate.start(job.likely_tokens)
        self._pace.start()
        return self._limit.start()

    async def _serve(self, job: _Job, started: float) -> None:
        """One request once: answer its future, or put it back for another try."""
        try:
            await self._ask(job, started)
        except asyncio.CancelledError:
            job.future.cancel()
            raise
        except Exception as error:  # a task has no caller: the future carries it
            if not job.future.done():
                job.future.set_exception(error)
        finally:
            self._notify()

    async def _ask(self, job: _Job, started: float) -> None:
        endpoint = self._choose_endpoint()
        try:
            reply, headers = await self._exchange(endpoint, job)
        except Redirected as fatal:
            self._budget.settle(self.price, job.most, Usage())
            self._limit.troubled()
            self._give_up(fatal, job)
        except Refused as refused:
            self._budget.settle(self.price, job.most, Usage())
            await self._handle_refusal(refused, endpoint, job, started)
        except NoAnswer as trouble:
            # A request that went out and came to nothing may have been paid for.
            sent = trouble.cause not in (*UNREACHED, "connection lost", "not trusted")
            self._budget.settle(self.price, job.most, job.most if sent else Usage())
            if trouble.cause != "timeout":
                self._limit.troubled()
            elif self._limit.timed_out(started):
                job.attempts -= 1  # it stood in a queue that our own haste made
            await self._try_later(trouble, endpoint, job)
        except Exception:
            self._budget.settle(self.price, job.most, job.most)
            self._limit.troubled()
            raise
        else:
            endpoint.served()
            self._take_in(job, reply, headers, started)

    async def _exchange(self, endpoint: Endpoint, job: _Job) -> tuple[Reply, Mapping[str, str]]:
        """Send a request and read what comes back, with its headers."""
        dialect = self._dialect
        endpoint.in_flight += 1
        try:
            job.sent = dialect.body(job.request)
            answer = await endpoint.post(dialect.path, job.sent)
        finally:
            endpoint.in_flight -= 1
        if not 200 <= answer.status < 300:
            raise dialect.refusal(answer)
        return _read(dialect, answer, job), answer.headers

    def _take_in(self, job: _Job, reply: Reply, headers: Mapping[str, str], started: float) -> None:
        used, reply = reply.usage, priced(reply, self.price)
        self._budget.settle(self.price, job.most, used, reply.cost)
        if reply.estimated:
            if not self._estimated:
                console.warn(
                    f"{self.spec} does not tell how many tokens a reply took; they are estimated, at "
                    "4 bytes each, and so are the cost and the caps."
                )
            self._estimated += 1
        self._completion_tokens.update(replies=1, tokens=used.completion_tokens)
        self._rate.settle(job.likely_tokens, used.prompt_tokens + used.completion_tokens)
        self._rate.learn(headers)
        self._pace.succeeded()
        self._limit.succeeded(started, used.completion_tokens)
        self._succeeded = True
        self._patience.succeeded()
        self._resolve(job, reply)

    def _choose_endpoint(self) -> Endpoint:
        """The least busy endpoint that is due; if all are down, the one tried the longest ago."""
        if all(endpoint.down for endpoint in self._endpoints):
            return min(self._endpoints, key=lambda endpoint: endpoint.lost_at)
        due = [endpoint for endpoint in self._endpoints if endpoint.due]
        # One that is down is only tried while the others have something to do.
        return min(due, key=lambda endpoint: (endpoint.in_flight, endpoint.down))

    # --- errors by cause ---------------------------------------------------------------------

    async def _handle_refusal(
        self, refused: Refused, endpoint: Endpoint, job: _Job, started: float
    ) -> None:
        kind = about(refused)
        endpoint.down = endpoint.down and kind == "trouble"
        if kind == "pace":
            await self._throttle(refused, job, started)
            return
        self._limit.troubled()
        if kind == "trouble":
            trouble = NoAnswer("server error", refused.message)
            down = refused.status in DOWN and endpoint.succeeded_at < started
            if down or is_loading(refused.status, refused.said):
                self._causes["server error"] += 1
                gone = NoAnswer("server error", f"{refused.status}: {refused.message}")
                await self._wait_until_back(gone, endpoint, job)
            else:
                await self._try_later(trouble, endpoint, job)
            return
        self._patience.admitted()
        if kind == "filter":
            self._resolve(
                job, Reply("", "refused", error=refused.message, attempts=job.attempts + 1)
            )
        elif self._learns(refused, job):
            self._put_back(job)
        elif kind in SAME_REFUSALS:
            self._fail(job, refused, kind, endpoint)
        else:
            self._give_up(await self._fatal_error(refused, endpoint), job)

    def _learns(self, refused: Refused, job: _Job) -> bool:
        """Whether a request may go again, which is never in the form that was just refused."""
        learnt = self._dialect.adapt(refused, job.request, job.sent)
        if learnt is None or job.changes == MOST_CHANGES:
            return False
        if learnt is self._dialect and learnt.body(job.request) == job.sent:
            return False
        self._dialect = learnt
        job.changes += 1
        return True

    def _asked_for(self, refused: Refused) -> str:
        """A clause that names those fields of the user's own that a refusal is about."""
        said = f"{refused.param} {refused.said}"
        named = [name for name in self.options.extra_body if name in said]
        return f"; {self.options.extra_flag} asks for {', '.join(named)}" if named else ""

    def _fail(self, job: _Job, refused: Refused, kind: str, endpoint: Endpoint) -> None:
        """A row's own trouble; when the first replies all say the same, everyone's."""
        if not self._succeeded:
            self._refusals[same_words(refused)] += 1
            alike = len(self._refusals) == 1 and self._refusals.total() >= SAME_REFUSALS[kind]
            if alike:
                error = SrtError(
                    f"{endpoint.url}: the first {self._refusals.total()} requests are all refused "
                    f"with the same words ({refused.message}{self._asked_for(refused)}). "
                    "Check the model's name and the settings."
                )
                self._give_up(error, job)
                return
        reason = f"the server refuses the request: {refused.message}{self._asked_for(refused)}"
        self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts + 1))

    async def _throttle(self, refused: Refused, job: _Job, started: float) -> None:
        """Too fast: slow down for all, and let this job wait as long as the server asks."""
        self._causes["throttled"] += 1
        if self._pace.refused(started):
            self._limit.refused(started, refused.retry_after_s)
        else:
            self._limit.released()
        self._rate.learn(refused.headers)
        self._notify()
        now = time.monotonic()
        job.throttled_since = job.throttled_since or now
        if self._patience.succeeded_at < started:
            self._patience.held_up(f"{refused.status}: {refused.message}")
        elif now - job.throttled_since > self.options.give_up_after_s:
            reason = f"refused as too fast, though others were admitted: {refused.message}"
            self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts + 1))
            return
        told = refused.retry_after_s
        wait = DEFAULT_PAUSE_S if told is None else min(max(told, LEAST_PAUSE_S), LONGEST_PAUSE_S)
        # Not all at once again: those refused together come back spread out.
        await self._sleep(job, wait * random.uniform(1.0, 1.2))

    async def _sleep(self, job: _Job, seconds: float) -> None:
        """Put a job back after a while, unless the run ended meanwhile."""
        self._asleep.add(job)
        try:
            await asyncio.sleep(seconds)
        finally:
            self._asleep.discard(job)
        self._put_back(job)

    def _put_back(self, job: _Job, *, innocent: bool = False) -> None:
        if job.future.done():
            return
        if self._fatal is not None:
            job.future.set_exception(self._fatal)
        elif job.lost_at < float("inf") and not innocent:  # those that it may harm go first
            self._jobs.append(job)
        else:
            self._jobs.appendleft(job)

    async def _wait_until_back(self, gone: NoAnswer, endpoint: Endpoint, job: _Job) -> None:
        """Nobody is there, or not yet: the row waits, and no attempt is used up.

        An address is down until it answers again; one row at a time tries it. While another is not
        down, rows go there; while all are, one row at a time is sent, and --give-up-after runs. A row
        that is lost again (not: cannot connect) though others were served in between is suspect, and
        soon sent alone: that uses up an attempt, and so does a server that lists its models all the
        same, once only suspects are left. If only they are left when the time is over, they fail, and
        not the run.
        """
        first = endpoint.succeeded_at == float("-inf")
        endpoint.lost(DOWN_BEFORE_FIRST_SUCCESS_S if first else DOWN_FOR_S)
        if all(each.down for each in self._endpoints):
            self._patience.held_up(str(gone), down=True)
        if gone.cause in UNREACHED:
            self._put_back(job, innocent=True)
            return
        again = self._patience.succeeded_at > job.lost_at
        job.lost_at, job.suspect = time.monotonic(), job.suspect or again
        left = all(each.suspect for each in [job, *self._jobs])
        if again or (left and await self._dialect.offered(endpoint)):
            await self._back_off(gone, endpoint, job)
        else:
            self._put_back(job)

    async def _try_later(self, trouble: NoAnswer, endpoint: Endpoint, job: _Job) -> None:
        """Timeouts, 5xx and torn replies: back off with jitter, a few times; no connection: wait."""
        cause = trouble.cause
        self._causes[cause] += 1
        if cause == "not trusted":
            self._give_up(self._unusable(trouble, endpoint), job)
            return
        others = any(not other.down for other in self._endpoints if other is not endpoint)
        waits = ("no connection", "connection lost")
        if cause in waits or (cause == "wrong address" and (self._succeeded or others)):
            await self._wait_until_back(trouble, endpoint, job)
        else:
            await self._back_off(trouble, endpoint, job)

    async def _back_off(self, trouble: NoAnswer, endpoint: Endpoint, job: _Job) -> None:
        job.attempts += 1
        many = self._succeeded or trouble.cause == "torn reply"
        if job.attempts >= (MOST_ATTEMPTS if many else ATTEMPTS_BEFORE_FIRST_SUCCESS):
            if not self._succeeded:
                self._give_up(self._unusable(trouble, endpoint), job)
                return
            reason = f"{trouble.cause} after {job.attempts} attempts: {trouble}"
            self._resolve(job, Reply("", "failed", error=reason, attempts=job.attempts))
            return
        if not self._succeeded and trouble.cause == "timeout" and self._causes["timeout"] == 1:
            console.say(f"{endpoint.url}: {trouble} (--timeout); asking again")
        backoff = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** max(0, job.attempts - 1))
        self._notify()
        await self._sleep(job, backoff * random.uniform(0.5, 1.5))

    def _unusable(self, trouble: NoAnswer, endpoint: Endpoint) -> SrtError:
        """A server of which nothing has come so far, and why it is asked no longer."""
        message = str(trouble)
        why = {
            "timeout": (
                f"does not answer in time ({message}). Is the model loaded? "
                f"If it is slow, pass a longer --timeout than {self.options.timeout_s:g}."
            ),
            "wrong address": f"cannot be reached ({message}). Check the address.",
            "not trusted": (
                f"its certificate is not trusted ({message}). "
                "Check the address, or install the certificate of its authority."
            ),
            "torn reply": f"no reply came whole ({message}). Look at its log.",
            "malformed reply": (
                f"answers, but not as an OpenAI-compatible server ({message}). "
                f"{'Look at its log.' if self._is_usual(endpoint) else 'Does the address end in /v1?'}"
            ),
        }
        said = why.get(
            trouble.cause, f"answers only with errors ({message}). Look at the server's log."
        )
        return SrtError(f"{endpoint.url}: {said}")

    def _is_usual(self, endpoint: Endpoint) -> bool:
        """Whether an address looks right: a provider's, or one that ends as they mostly do."""
        return self.parsed.provider is not None or endpoint.url.endswith("/v1")

    async def _fatal_error(self, refused: Refused, endpoint: Endpoint) -> SrtError:
        message = f"{refused.message}{self._asked_for(refused)}"
        if is_of_key(refused):
            return QuotaError(
                f"{endpoint.url}: the key is refused ({message}). {self._place.how_to_give_a_key()}"
            )
        if about(refused) == "account":
            return QuotaError(
                f"{endpoint.url}: no credit left ({message}). What is answered is kept; add credit "
                "and run the same line again."
            )
        if about(refused) == "endpoint" and refused.status in (400, 404, 422):
            asked, name = f"{endpoint.url}{self._dialect.path}", self.parsed.name
            names = await self._dialect.offered(endpoint)
            if names and name in names:
                return SrtError(
                    f"{asked}: answers with status {refused.status} ({message}), though the server "
                    f"lists the model {name!r}. Check the address, and whether it serves chats."
                )
            if names is None:
                usual = self._is_usual(endpoint)
                look = (
                    "Check the address and the name." if usual else "Does the address end in /v1?"
                )
                return SrtError(
                    f"{asked}: answers with status {refused.status} ({message}), and the server lists "
                    f"no models. {look}"
                )
            offer = (
                f". It offers: {', '.join(names[:8])}."
                if names
                else ", and its list of models is empty. Is a model loaded there?"
            )
            said = f" ({message})" if refused.status != 404 else ""
            return SrtError(f"{endpoint.url}: does not know the model {name!r}{said}{offer}")
        return SrtError(f"{endpoint.url}: answers with status {refused.status} ({message}).")

    def _give_up(self, error: SrtError, job: _Job | None = None) -> None:
        """A fault that no row can escape: nothing further is sent."""
        if self._fatal is None:
            self._fatal = error
        for waiting in [*self._jobs, *self._asleep, *([job] if job else [])]:
            if not waiting.future.done():
                waiting.future.set_exception(error)
        self._jobs.clear()

    def _resolve(self, job: _Job, reply: Reply) -> None:
        if not job.future.done():
            job.future.set_result(reply)


def _read(dialect: Dialect, answer: Answer, job: _Job) -> Reply:
    """What a dialect makes of an answer; one that it cannot take is no reply, whatever it raises."""
    try:
        data = answer.json()
        if (refused := error_within(answer, data)) is not None:
            raise refused
        return dialect.read(data).reply(job.request, answer.headers, job.attempts + 1)
    except (NoAnswer, Refused):
        raise
    except Exception as error:
        raise NoAnswer("malformed reply", f"{type(error).__name__}: {error}") from error
