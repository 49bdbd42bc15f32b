"""One server on the wire: a request's bytes go out, a reply comes back, or why there is none.

Requests are posted through the OpenAI client's own HTTP client, address and headers, but past its
model classes, which cost more than all the rest of a call (0.95 ms against 0.34 ms on one core).
"""

import contextlib
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

import openai
import orjson

from srt_cli.models import Reply, Request, TokenLogprobs
from srt_cli.records import Usage

LONGEST_MESSAGE: Final = 300


class Refused(Exception):
    """The server answered with an error status."""

    def __init__(self, status: int, headers: Mapping[str, str], content: bytes) -> None:
        self.status = status
        self.headers = headers
        error = _error_in(content)
        self.code = str(error.get("code") or error.get("type") or "")
        self.param = str(error.get("param") or "")
        said = error.get("message") or content.decode("utf-8", errors="replace")
        self.message = str(said).strip().rstrip(".")[:LONGEST_MESSAGE] or f"status {status}"
        super().__init__(self.message)

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks us to wait."""
        for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            with contextlib.suppress(KeyError, ValueError):
                return float(self.headers[name]) * unit
        return None


class NoAnswer(Exception):
    """No reply came, or none that can be read: `timeout`, `no connection`, `malformed reply`."""

    def __init__(self, cause: str, message: str) -> None:
        self.cause = cause
        super().__init__(message)


@dataclass
class Endpoint:
    """One address of a model, with what is known of its state."""

    url: str
    key: str
    timeout_s: float
    in_flight: int = 0
    down_until: float = 0.0
    successes: int = 0
    client: openai.AsyncOpenAI = field(init=False)
    _http: Any = field(init=False)
    _headers: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self._http = openai.DefaultAioHttpClient()
        self.client = openai.AsyncOpenAI(
            api_key=self.key,
            base_url=self.url,
            max_retries=0,
            timeout=self.timeout_s,
            http_client=self._http,
        )
        headers = {**self.client.default_headers, **self.client.auth_headers}
        self._headers = {name: value for name, value in headers.items() if isinstance(value, str)}

    async def post(self, body: Mapping[str, Any]) -> tuple[dict[str, Any], Mapping[str, str]]:
        """Send a chat request; returns the reply's JSON and the response's headers.

        Raises `Refused` for an error status and `NoAnswer` for everything that is no reply.
        """
        try:
            response = await self._http.post(
                f"{self.url}/chat/completions",
                content=orjson.dumps(body),
                headers=self._headers,
                timeout=self.timeout_s,
            )
        # The transport's errors have no base class that every version of the client shares.
        except Exception as error:
            raise NoAnswer(_cause_of(error), _root_message(error)) from error
        if response.status_code != 200:
            raise Refused(response.status_code, response.headers, response.content)
        try:
            data = orjson.loads(response.content)
            data["choices"][0]["message"]
        except (orjson.JSONDecodeError, KeyError, IndexError, TypeError) as error:
            start = response.content[:60].decode("utf-8", errors="replace")
            raise NoAnswer("malformed reply", repr(start)) from error
        return data, response.headers

    async def listed_models(self) -> list[str] | None:
        """Names of the models that the server offers; null when it does not say."""
        try:
            page = await self.client.models.list(timeout=10)
        except openai.OpenAIError:
            return None
        return sorted(model.id for model in page.data)

    @property
    def up(self) -> bool:
        """Whether the endpoint is not known to be down."""
        return self.down_until <= time.monotonic()

    async def close(self) -> None:
        """Give the connections back."""
        await self.client.close()


def _error_in(content: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(content)
    except orjson.JSONDecodeError:
        return {}
    inner = body.get("error", body) if isinstance(body, dict) else {}
    if isinstance(inner, str):
        return {"message": inner}
    return inner if isinstance(inner, dict) else {}


def _chain(error: BaseException) -> list[BaseException]:
    chain = [error]
    while (cause := chain[-1].__cause__) is not None:
        chain.append(cause)
    return chain


def _cause_of(error: BaseException) -> str:
    # The transport calls refused, broken and untrusted connections timeouts; their roots do not.
    root = _chain(error)[-1]
    names = " ".join(type(link).__name__ for link in _chain(error))
    broken = isinstance(root, OSError) and not isinstance(root, TimeoutError)
    if broken or "Disconnected" in names:
        return "no connection"
    return "timeout" if "Timeout" in names else "no connection"


def _root_message(error: BaseException) -> str:
    root = _chain(error)[-1]
    return str(root) or type(root).__name__


def read_reply(data: Mapping[str, Any], request: Request, attempts: int) -> Reply:
    """A server's chat completion as a reply; stop texts that the server ignored are applied."""
    choice = data["choices"][0]
    message = choice["message"]
    text = message.get("content") or ""
    refusal = message.get("refusal")
    finish = choice.get("finish_reason")
    stops = [place for stop in request.stop if (place := text.find(stop)) >= 0]
    if stops:
        # Some servers ignore stop texts, others keep them in the reply.
        text, finish = text[: min(stops)], "stop"
    reason: Any = {"length": "length", "content_filter": "refused"}.get(str(finish), "stop")
    if refusal:
        text, reason = refusal, "refused"
    return Reply(
        text=text,
        finish_reason=reason,
        usage=_read_usage(data.get("usage") or {}),
        logprobs=_read_logprobs(choice.get("logprobs"), request),
        attempts=attempts,
    )


def _read_usage(usage: Mapping[str, Any]) -> Usage:
    # Servers leave the details out, or null.
    read, written = (
        usage.get(name) or {} for name in ("prompt_tokens_details", "completion_tokens_details")
    )
    return Usage(
        prompt_tokens=usage.get("prompt_tokens") or 0,
        completion_tokens=usage.get("completion_tokens") or 0,
        cached_tokens=read.get("cached_tokens") or 0,
        reasoning_tokens=written.get("reasoning_tokens") or 0,
    )


def _read_logprobs(
    logprobs: Mapping[str, Any] | None, request: Request
) -> tuple[TokenLogprobs, ...]:
    found: list[TokenLogprobs] = []
    offset, behind_digit = 0, False
    for place in (logprobs or {}).get("content") or []:
        token = place["token"]
        has_digit = any("0" <= character <= "9" for character in token)
        if request.logprobs_at == "all" or has_digit or behind_digit:
            top = {other["token"]: other["logprob"] for other in place.get("top_logprobs") or []}
            found.append(TokenLogprobs(token, top, offset))
        offset, behind_digit = offset + len(token), has_digit
    return tuple(found)
