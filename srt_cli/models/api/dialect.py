"""What a dialect is: the one place that knows how a protocol looks on the wire.

A dialect file says where a request goes, with which headers and body, and how replies, errors and
usage are read. It is opened once for each model and learns what that model's server refuses to be told.
`providers.toml` names it; nothing else has to change for a provider with another protocol.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, Literal, Protocol

import orjson

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.models import VERDICTS, FinishReason, Reply, Request, TokenLogprobs, part_reply
from srt_cli.models.api.limits import parse_duration_s, until_date_s
from srt_cli.models.budget import estimated_usage, is_believable
from srt_cli.records import Usage

LONGEST_MESSAGE: Final = 300
LONGEST_SAID: Final = 4000
"""Of an error, what is searched for its cause."""
COST_HEADERS: Final = ("x-litellm-response-cost",)
EVENTS: Final = ("data:", "event:", "id:", "retry:", ":")
"""How a stream of events may begin."""
_EVENT_DATA: Final = re.compile(r"data: ?(.*\S)\s*")
_UNWANTED: Final = re.compile(
    "unsupported|not (be )?(support|allow|permit|accept|enabl|available|recogni)|unknown|unrecogni|"
    "deprecated|unexpected|invalid|cannot find|can't|cannot|extra|not a valid|does not|doesn't|"
    "no longer|must|only|is not|should|ignored|removed|greater than|exceed",
    re.IGNORECASE,
)
_HALVES: Final = re.compile("[\ud800-\udfff]")
_FIGURES: Final = re.compile(r"\d{1,12}(\.\d{1,12})?s?")
CONTEXT_STEP: Final = 128
"""The size of a context is a multiple of this."""
LEAST_CONTEXT: Final = 256


@dataclass(frozen=True)
class Manner:
    """How one model is asked, beyond what a request says."""

    model: str
    path: str | None = None
    """Where its requests go, if not where the dialect has them go; `{model}` is filled in."""
    token_field: str = "max_tokens"
    key_header: str = "authorization"
    headers: Mapping[str, str] = field(default_factory=dict)
    refuses: tuple[str, ...] = ()
    """Fields that are known to be refused."""
    renames: Mapping[str, str] = field(default_factory=dict)
    """Fields that go by another name there."""
    thinking: Mapping[Literal["on", "off"], Mapping[str, Any]] = field(default_factory=dict)
    """The fields that tell the model to think (`on`), and not to (`off`); empty where none is known."""
    effort: str | None = None
    """How hard a reasoning model should think, in the provider's own word."""
    extra: dict[str, Any] = field(default_factory=dict)
    """Fields of the user's own, which win over ours."""

    def told(self, request: Request) -> Mapping[str, Any]:
        """The fields that tell the model to think, or not to; none where nothing is to be told."""
        told = request.thinks.told
        return self.thinking.get(told, {}) if told in ("on", "off") else {}

    def key_headers(self, key: str | None) -> dict[str, str]:
        """The headers that carry a key, and those that every request carries."""
        if key is None:
            return dict(self.headers)
        value = f"Bearer {key}" if self.key_header == "authorization" else key
        return {**self.headers, self.key_header: value}


@dataclass(frozen=True)
class Answer:
    """What came back from a server, unread."""

    status: int
    headers: Mapping[str, str]
    content: bytes

    def json(self) -> object:
        """The content as JSON, of a stream of events their list; raises `NoAnswer` when it is neither.

        Halves of a character become U+FFFD: a reply that holds one is paid for, and readable.
        """
        try:
            return orjson.loads(self.content)
        except orjson.JSONDecodeError:
            pass
        text = self.content.decode("utf-8", errors="replace").lstrip("\ufeff \t\r\n")
        try:
            if text.startswith(EVENTS):
                events = [_EVENT_DATA.fullmatch(line) for line in text.splitlines()]
                return [_plain_json(event[1]) for event in events if event and event[1] != "[DONE]"]
            return _plain_json(text)
        except (ValueError, RecursionError) as error:
            raise NoAnswer("malformed reply", f"{text[:60]!r}...") from error


class NoAnswer(Exception):
    """No reply came, or none that can be read.

    The causes: `timeout`, `no connection`, `connection lost`, `wrong address`, `not trusted`,
    `torn reply`, `malformed reply`, `server error`.
    """

    def __init__(self, cause: str, message: str) -> None:
        self.cause = cause
        super().__init__(message)


def unreadable(data: object) -> NoAnswer:
    """JSON that is no reply, as it came."""
    return NoAnswer("malformed reply", f"{json.dumps(data, ensure_ascii=False)[:60]!r}...")


class Refused(Exception):
    """The server answered with an error."""

    def __init__(self, answer: Answer) -> None:
        error = error_in(answer.content)
        self.status = answer.status
        self.headers = answer.headers
        self.code = str(error.get("code") or error.get("type") or "")
        self.param = str(error.get("param") or "")
        said = as_text(error.get("message")) or answer.content.decode("utf-8", errors="replace")
        self.said = said.strip()[:LONGEST_SAID]
        self.message = self.said.rstrip(".")[:LONGEST_MESSAGE] or f"status {answer.status}"
        super().__init__(self.message)

    @property
    def retry_after_s(self) -> float | None:
        """How long the server asks us to wait, in figures or by a date; None for what is neither."""
        for name, unit in (("retry-after-ms", 0.001), ("retry-after", 1.0)):
            told = self.headers.get(name, "").strip()
            seconds = parse_duration_s(told) if _FIGURES.fullmatch(told) else until_date_s(told)
            if seconds is not None:
                return seconds * unit
        return None

    def names(self, field: str) -> bool:
        """Whether the refusal is about this field of the request, however it is quoted."""
        if re.split(r"[.\[]", self.param)[-1] == field:
            return True
        # As a word of its own; what is said of it tells a refusal from a word in passing.
        word = re.compile(rf"(?<![A-Za-z_]){re.escape(field)}(?![A-Za-z_])", re.IGNORECASE)
        return bool(word.search(self.said) and _UNWANTED.search(self.said))


@dataclass(frozen=True)
class Heard:
    """What a dialect reads in a reply, before it is held against the request."""

    text: str
    finish: FinishReason
    thoughts: str = ""
    usage: Usage | None = None
    cost: float | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    """What the server says beside the text: why it refused, or what word ended the reply."""
    cache_written: int = 0
    """Prompt tokens that went into the server's cache."""

    def reply(self, request: Request, headers: Mapping[str, str], attempts: int) -> Reply:
        """As the reply to a request: a stop text that was ignored cuts, and usage is believed or not."""
        usage = self.usage
        estimated = usage is None or not is_believable(usage, request)
        if usage is None or estimated:
            usage = estimated_usage(request, self.text + self.thoughts)
        finish, error = self.finish, self.error
        if finish == "length" and not estimated and (size := _full_context(usage, request)):
            finish = "cut"
            error = (
                f"the server's context is full: {size} tokens; start it with more, or lower the "
                "maximum of tokens (--max-new-tokens, --critic-max-tokens)"
            )
        reply = part_reply(
            Reply(
                text=self.text,
                finish_reason=finish,
                usage=usage,
                logprobs=_kept(self.logprobs, request),
                error=error,
                attempts=attempts,
                thoughts=self.thoughts,
                cost=self.cost if self.cost is not None else _told_cost(headers),
                estimated=estimated,
                cache_written=0 if estimated else max(0, self.cache_written),
            )
        )
        if request.thinks.told == "on" and reply.at_limit and not reply.thoughts:
            # Thoughts come first. These were cut before the tag that would have told them apart.
            reply = replace(reply, text="", thoughts=reply.text, logprobs=())
        stops = [place for stop in request.stop if (place := reply.text.find(stop)) >= 0]
        if stops and reply.finish_reason != "refused":
            # Some servers ignore stop texts, others keep them in the reply.
            reply = replace(reply, text=reply.text[: min(stops)], finish_reason="stop", error=None)
        return reply


def warn_of_switch(model: str) -> None:
    """Say that a server refused to be told whether its model thinks."""
    console.warn(
        f"the server of {model} does not let us tell it whether to think; what it thinks is kept apart "
        "from its answers all the same."
    )


def _kept(places: tuple[TokenLogprobs, ...], request: Request) -> tuple[TokenLogprobs, ...]:
    """The places that were asked for: around digits, for a score, or at yes and no."""
    if request.logprobs_at == "all":
        return places
    if request.logprobs_at == "verdicts":
        return tuple(place for place in places if place.token.strip().lower() in VERDICTS)
    digits = [any("0" <= sign <= "9" for sign in place.token) for place in places]
    # Also the place behind a digit: the 1 of a 10 is a token of its own in many tokenizers.
    kept = zip(places, digits, [False, *digits], strict=False)
    return tuple(place for place, here, before in kept if here or before)


def _full_context(usage: Usage, request: Request) -> int | None:
    """The size of the context that a reply came to the end of, before its own limit; else None."""
    if usage.reasoning_tokens or usage.completion_tokens >= request.max_tokens:
        return None
    size = usage.prompt_tokens + usage.completion_tokens
    whole = round(size / CONTEXT_STEP) * CONTEXT_STEP
    return whole if abs(size - whole) <= 1 and whole >= LEAST_CONTEXT else None


def _told_cost(headers: Mapping[str, str]) -> float | None:
    for name in COST_HEADERS:
        cost = as_dollars(headers.get(name))
        if cost is not None:
            return cost
    return None


# --- Batches -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Batch:
    """A batch on its way, as its server tells."""

    name: str
    status: str
    over: bool = False
    cancelling: bool = False
    """It will be over as soon as what is being answered is."""
    done: int | None = None
    total: int | None = None
    results: tuple[str, ...] = ()
    """Where the results lie."""
    error: str = ""


@dataclass
class NotedBatch:
    """What is noted of a batch before it is handed in, so that a later run finds it."""

    label: str
    model: str
    """The identity of the model that is asked."""
    requests: list[str]
    """Their names."""
    others: list[str]
    """Batches that are not it: those that were there before, where a label does not tell."""
    name: str = ""
    """What its server calls it; empty until that is known."""


@dataclass(frozen=True)
class BatchResult:
    """What became of one request of a batch."""

    name: str
    heard: Heard | None = None
    error: str = ""
    refused: bool = False
    """For good: its text is not wanted."""
    owed: bool = False
    """It expired, and may be asked again."""

    @property
    def is_final(self) -> bool:
        """Whether asking again would tell nothing else."""
        return self.heard is not None or self.refused


class Wire(Protocol):
    """A connection to one server."""

    url: str

    async def get(self, path: str) -> Answer:
        """Fetch a path, or an address on the same host."""
        ...

    async def post(self, path: str, body: object) -> Answer:
        """Post a body as JSON."""
        ...

    async def send(self, method: str, path: str, content: bytes | None, kind: str) -> Answer:
        """Any request; `kind` is the content's type."""
        ...


class Batches(Protocol):
    """How a protocol takes many requests at once, for half the price."""

    most_requests: ClassVar[int]
    most_bytes: ClassVar[int]

    def line(self, name: str, body: Mapping[str, Any]) -> bytes:
        """One request as a line of a batch's file."""
        ...

    async def before(self, wire: Wire) -> list[str]:
        """The batches that are there already, where a new one would not carry its label."""
        ...

    async def found(self, wire: Wire, noted: NotedBatch) -> Batch | None:
        """A batch whose name is not known, because the answer to `submit` was lost."""
        ...

    async def submit(self, wire: Wire, label: str, lines: Sequence[bytes]) -> Batch:
        """Hand in lines as one batch."""
        ...

    async def look(self, wire: Wire, name: str) -> Batch:
        """How a batch stands."""
        ...

    async def results(self, wire: Wire, place: str) -> bytes:
        """One of the files of results that a batch names, a line a request."""
        ...

    def outcome(self, line: Mapping[str, Any]) -> BatchResult | None:
        """What a line of the results says; None when it is no line of this protocol."""
        ...


# --- The dialect itself --------------------------------------------------------------------------


class Dialect(Protocol):
    """One protocol, spoken to one model."""

    gives_logprobs: ClassVar[bool]

    def __init__(self, manner: Manner) -> None: ...

    @property
    def path(self) -> str:
        """Where requests go, below the server's address."""
        ...

    @property
    def batches(self) -> Batches | None:
        """How many requests go at once; None where they cannot."""
        ...

    def headers(self, key: str | None) -> dict[str, str]:
        """What stands above every request."""
        ...

    def body(self, request: Request) -> dict[str, Any]:
        """A request on the wire; only what was asked for is sent."""
        ...

    def read(self, data: object) -> Heard:
        """A reply; raises `NoAnswer` when it is none, `Refused` when it is an error."""
        ...

    def refusal(self, answer: Answer) -> Refused:
        """An answer with an error status."""
        ...

    def adapt(
        self, refused: Refused, request: Request, sent: Mapping[str, Any]
    ) -> "Dialect | None":
        """Learn how not to be refused again: how to go on, None when nothing can be learnt.

        `sent` is the body of the request that was refused; what stands in it as the user's own field
        stays.
        """
        ...

    async def offered(self, wire: Wire) -> list[str] | None:
        """Names of the models that the server offers; None when it does not say."""
        ...

    def describe(self) -> dict[str, Any]:
        """What was learnt, for the manifest."""
        ...


async def listed_models(wire: Wire, path: str) -> list[str] | None:
    """Names in a list of models as OpenAI has it; None when there is none."""
    try:
        answer = await wire.get(path)
        listed = as_mapping(answer.json()).get("data")
    except (NoAnswer, SrtError):
        return None
    if answer.status != 200 or not isinstance(listed, list):
        return None
    return sorted(as_text(as_mapping(model).get("id")) for model in listed)


def checked(answer: Answer) -> Mapping[str, Any]:
    """The object in an answer; raises `Refused` for an error."""
    if answer.status >= 300:
        raise Refused(answer)
    return as_mapping(answer.json())


# --- Reading what may have any shape --------------------------------------------------------------


def as_mapping(value: object) -> Mapping[str, Any]:
    """The value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_text(value: object) -> str:
    """The value if it is a text, else an empty one."""
    return value if isinstance(value, str) else ""


def as_texts(value: object) -> tuple[str, str]:
    """What a content says and what it thinks: a text, or a list of parts as Mistral has it."""
    if isinstance(value, str):
        return value, ""
    said: list[str] = []
    thought: list[str] = []
    for part in as_list(value):
        told = as_mapping(part)
        if told.get("type") in ("thinking", "reasoning", "reasoning_content"):
            thought += [
                *as_texts(told.get("thinking") or told.get("reasoning")),
                as_text(told.get("text")),
            ]
        else:
            said.append(part if isinstance(part, str) else as_text(told.get("text")))
    return "".join(said), "".join(thought)


def as_count(value: object) -> int:
    """A number of tokens; 0 for none, -1 for what is no number of anything."""
    if value is None:
        return 0
    if isinstance(value, bool) or not isinstance(value, int):
        return -1
    return value


def as_dollars(value: object) -> float | None:
    """An amount of money, as a number or as text; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        dollars = float(value)
    except ValueError:
        return None
    return dollars if 0 <= dollars < float("inf") else None


def error_in(content: bytes) -> Mapping[str, Any]:
    """The error object of a body: `{"error": {...}}`, the same in a list, or the object itself."""
    try:
        body = Answer(0, {}, content).json()
    except NoAnswer:
        return {}
    return _error_of(body) or as_mapping(_first(body))


def error_within(answer: Answer, data: object) -> Refused | None:
    """The error that some servers send with status 200, under its own status; None without one."""
    told = as_mapping(_first(data))
    error = _error_of(told)
    if not error or any(as_list(told.get(name)) for name in ("choices", "content", "output")):
        return None
    return refused_as(answer, error)


def refused_as(answer: Answer, error: Mapping[str, Any]) -> Refused:
    """An error of an answer, with the status that it names; 500 without one."""
    code = error.get("code", error.get("status"))
    digits = code if isinstance(code, int) else as_text(code)
    said = f"{code} {error.get('type')} {error.get('message')}".lower()
    status = 429 if "rate" in said and "limit" in said else 500
    if str(digits).isdecimal() and 400 <= int(digits) < 600:
        status = int(digits)
    return Refused(
        Answer(status, answer.headers, orjson.dumps({"error": dict(error)}, default=str))
    )


def _error_of(body: object) -> Mapping[str, Any]:
    told = as_mapping(_first(body))
    error = told.get("error")
    if isinstance(error, str) and error:
        return {"message": error, "code": told.get("code")}
    return as_mapping(error)


def _first(body: object) -> object:
    return body[0] if isinstance(body, list) and body else body


def _plain_json(text: str) -> object:
    """JSON as the standard library reads it, NaN and halves of characters included; none stay."""
    value = json.loads(text)
    written = json.dumps(value, ensure_ascii=False)
    return json.loads(_HALVES.sub("\ufffd", written)) if _HALVES.search(written) else value
