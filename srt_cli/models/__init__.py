"""The one door to every model: `open_model(spec)`; requests in, replies out as they finish."""

import dataclasses
import math
import re
import shlex
import sys
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal, Protocol

from pydantic import TypeAdapter, ValidationError

from srt_cli import console
from srt_cli.errors import UsageError
from srt_cli.models.api.providers import KEY_IN_ADDRESS, holds_key, providers
from srt_cli.options import RUNS_CODE_PREFIX
from srt_cli.reading import part_thoughts
from srt_cli.records import Message, Prompt, Status, Usage

if TYPE_CHECKING:
    from srt_cli.models.budget import Budget, Price

FinishReason = Literal["stop", "length", "loop", "cut", "refused", "failed"]
EVERYTHING: Final = sys.maxsize
"""`in_flight` of a model that wants whatever there is, in one wave."""
Engine = Literal["auto", "static", "continuous"]
Thinking = Literal["off", "on", "auto"]
"""Whether a model is told to think before it answers; `auto` leaves it to its template."""
TaskKind = Literal["respond", "critique", "refine", "score", "contrast", "judge", "check"]
_HALVES: Final = re.compile("[\ud800-\udfff]")
_KEPT: Final = (
    "text", "finish_reason", "usage", "logprobs", "error", "thoughts", "cost", "estimated",
)  # fmt: skip
"""What of a reply the journal keeps."""
LOOP_LENGTH: Final = 128
PERIODS: Final = 4
LETTER_LOGPROBS_BEFORE: Final = 5
ON_BASE: Final = "-on-"
"""In an identity, between an adapter's digest and its base's."""
"""How many alternatives to a judge's letter 0.1.0 asked for."""
THOUGHT_UNTIL_LIMIT: Final = "thought until the limit"
"""Why a reply that thinks is `truncated`, which holds no answer yet."""


@dataclass(frozen=True)
class Task:
    """What a request is about, for models that are programs and do not read chat."""

    kind: TaskKind
    prompt: Prompt
    texts: tuple[str, ...] = ()


@dataclass(frozen=True)
class Thinks:
    """Whether a model is told to think, and its room for that on top of the answer's, in tokens."""

    told: Thinking | None = None
    """None says nothing, as an older srt did."""
    by_default: bool = False
    """Nobody asked for it: a reply that is known to the same request without it counts too."""
    tokens: int = 0


VERDICTS: Final = ("yes", "no")
"""The words that an item of a checklist ends in."""


@dataclass(frozen=True)
class Request:
    """One model call; all but `task` and `again` is sent to the model, so it is in the key."""

    messages: tuple[Message, ...]
    max_tokens: int
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int = 0
    sample: int = 0
    top_logprobs: int = 0
    logprobs_at: Literal["all", "digits", "verdicts"] = "all"
    """At which tokens log-probabilities are kept: around digits, for a score, or at yes and no."""
    continues: bool = False
    """The last message is the beginning of the reply. Only models with `continues` take it."""
    thinks: Thinks = Thinks()
    """Its tokens stand in `max_tokens` already."""
    task: Task | None = None
    again: int = 0
    """How often a reply to it was thrown away; a batch must not give the same one once more."""


@dataclass(frozen=True)
class TokenLogprobs:
    """One generated token's place: the most likely tokens there and their log-probabilities."""

    token: str
    top: dict[str, float]
    offset: int | None = None
    """Characters of the reply's text before this token, where it is known."""


@dataclass(frozen=True)
class Reply:
    """A finished call: the answer and, apart, what was thought; or the error why none came.

    What became of it is decided here, once: `status` and, in words, `reason`.
    """

    text: str
    finish_reason: FinishReason
    usage: Usage = Usage()
    logprobs: tuple[TokenLogprobs, ...] = ()
    error: str | None = None
    attempts: int = 1
    thoughts: str = ""
    """What the model thought before it answered; no part of `text`."""
    cost: float | None = None
    """Dollars, where the server tells them, or where the tokens alone do not."""
    estimated: bool = False
    """Whether `usage` is ours, for the server told none that can be believed."""
    cache_written: int = 0
    """Prompt tokens that went into the server's cache, for which some ask more; not in the journal."""

    @property
    def status(self) -> Status:
        """`ok` for a whole text; an empty one is `unparsed`, one that was cut off `truncated`."""
        if self.finish_reason in ("refused", "failed"):
            return self.finish_reason
        if self.finish_reason in ("length", "loop", "cut") or self._only_thinks:
            return "truncated"
        return "ok" if self.text.strip() else "unparsed"

    @property
    def reason(self) -> str | None:
        """Why the status is not `ok`; None when it is."""
        if self.finish_reason == "cut" and self.error:
            return f"cut off: {self.error}"
        if self.status == "truncated" and self._only_thinks and not self.loops:
            return THOUGHT_UNTIL_LIMIT if self.at_limit else "ended within its thoughts"
        if self.status == "truncated" and not self.loops and not self.text.strip():
            return "the token limit was reached before any text"
        if self.status == "truncated":
            loops = "repeats itself without end; cut"
            return loops if self.loops else "cut off at the token limit"
        reasons = {
            "failed": str(self.error),
            "refused": "refused by the model or a content filter"
            + (f": {self.error}" if self.error else ""),
            "unparsed": "empty reply",
        }
        return reasons.get(self.status)

    @property
    def loops(self) -> bool:
        """Whether the text was cut because it repeats itself without end."""
        if self.finish_reason == "length":
            return is_loop((self.text.strip() or self.thoughts).split())
        return self.finish_reason == "loop"

    @property
    def _only_thinks(self) -> bool:
        return bool(self.thoughts) and not self.text.strip()

    @property
    def at_limit(self) -> bool:
        """Whether the token limit ended it: with more room it may come to an end of its own."""
        return self.finish_reason == "length"

    @property
    def is_beginning(self) -> bool:
        """Whether the text is cut off at the token limit, and sound as far as it goes."""
        return self.at_limit and not self.loops and bool(self.text.strip())


def part_reply(reply: Reply, opening: str = "") -> Reply:
    """Take what was thought out of a reply's text; log-probabilities stay with the answer's tokens.

    `opening` is the tag that opened the thoughts already in the prompt. Offsets may count thoughts
    that the server told apart.
    """
    inside, text = part_thoughts(opening + reply.text)
    written = reply.text
    if reply.thoughts and reply.logprobs:
        written = "".join(place.token for place in reply.logprobs)
    if text == written:
        return reply
    start = max(0, written.rfind(text))
    places = [place for place in reply.logprobs if place.offset is None or place.offset >= start]
    return dataclasses.replace(
        reply,
        text=text,
        thoughts="\n\n".join(filter(None, [reply.thoughts, inside])),
        logprobs=tuple(
            place
            if place.offset is None
            else dataclasses.replace(place, offset=place.offset - start)
            for place in places
        ),
    )


class Model(Protocol):
    """A policy, critic, judge or reference, wherever it runs."""

    spec: str
    identity: str
    """Enters the journal key: the same identity and request mean the same reply."""
    in_flight: int
    """How many requests it wants to hold at once; may be `EVERYTHING`."""
    is_program: bool
    """Whether it is code of the user's, which is handed the texts themselves (`Request.task`)."""
    continues: bool
    """Whether it takes requests that continue a reply begun."""
    gives_logprobs: bool
    """Whether it can tell log-probabilities, as far as is known beforehand."""

    @property
    def can_be_told(self) -> bool:
        """Whether telling it to think, or not to, has an effect, as far as is known beforehand."""
        ...

    @property
    def waiting(self) -> int:
        """How many of the requests it was handed it has not begun with."""
        ...

    @property
    def batched(self) -> bool:
        """Whether replies depend, in the last bit, on the wave they are computed in."""
        ...

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        """Start requests; their futures resolve as they finish, in any order.

        `answered` marks requests whose reply is known already: they shape the batches of a
        `batched` model, so that a resumed run computes what the first would have, but their
        futures stay pending. A fatal error (wrong key, unknown model) is the future's exception.
        """
        ...

    def finish(self, seconds: float) -> bool:
        """Send nothing further, and wait so long for replies that are under way and cost money.

        True when none is under way any more.
        """
        ...

    def describe(self) -> dict[str, Any]:
        """What the manifest should know: weights, device, dtype and why, endpoint quirks."""
        ...

    def close(self) -> None:
        """Stop what is running and give resources back."""
        ...


def _unlimited() -> "Budget":
    from srt_cli.models.budget import Budget

    return Budget()


@dataclass(frozen=True)
class ModelOptions:
    """Knobs of the door, given by the stage.

    Only `chat_template`, `int8`, `effort` and `extra_body` change what is replied. `rpm` and `tpm` are
    requests and tokens a minute; models opened with one `budget` share it.
    """

    concurrency: int | None = None
    batch_size: int | None = None
    engine: Engine = "auto"
    int8: bool = False
    """A model in process on a CPU multiplies in 8 bits: faster, and other texts."""
    logprobs: bool = False
    """Log-probabilities will be asked for: an engine that must prepare for it does so at once."""
    timeout_s: float = 600.0
    give_up_after_s: float = 600.0
    """How long a server may admit nothing before the run ends."""
    trust_remote_code: bool = False
    chat_template: str | None = None
    """For a model in process, instead of its own: a file, or the name of a template."""
    template_flag: str = field(default="--chat-template", compare=False)
    """The option that names it, for sentences."""
    day: datetime | None = field(default=None, compare=False)
    """The date that chat templates of models in process write; None for today's."""
    rpm: float | None = None
    tpm: float | None = None
    prices: "Mapping[str, Price]" = field(default_factory=dict)
    budget: "Budget" = field(default_factory=_unlimited)
    api_keys: Mapping[str, str] = field(default_factory=dict)
    """The environment variables that hold the keys of hosts, by host or host:port."""
    effort: str | None = None
    """How hard a reasoning model is told to think, in its provider's word."""
    extra_body: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of every request, as the provider's documents name them."""
    extra_flag: str = field(default="--extra-body", compare=False)
    """The option that gives them, for sentences."""
    offline: bool = False
    """Nothing will be sent: an API model then needs no key."""
    batch_poll_s: float | None = None
    """Seconds between looks at a batch; None sends requests one by one."""
    batch_notes: Path | None = None
    """Where batches are noted, so that a later run finds them."""
    export_to: Path | None = None
    """Where requests are written instead of being sent."""


@dataclass(frozen=True)
class Spec:
    """A model spec taken apart: what answers for it, and what it needs."""

    kind: Literal["api", "local", "program"]
    name: str
    provider: str | None = None
    """Whose API it is; None for a server that is named by its address."""
    endpoints: tuple[str, ...] = ()

    @property
    def in_process(self) -> bool:
        """Whether its weights are loaded here, as those that srt trains are."""
        return self.kind == "local"

    @property
    def is_remote(self) -> bool:
        """Whether a server answers for it."""
        return self.kind == "api"


OUR_MODELS = "models/"
"""Where the trainings' own defaults lie; no owner on the hub has this name."""
_FILES = (".gguf", ".jsonl", ".json", ".csv", ".tsv", ".parquet")
"""How the names of files end which are no names of models."""
_BARE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_HUB_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


def names_program(spec: str) -> bool:
    """Whether a spec names code of the user's, which runs as soon as it is opened."""
    return spec.startswith(RUNS_CODE_PREFIX)


def refuse_unless_program(flag: str, spec: str) -> None:
    """Raise `UsageError` for a model where only code of the user's will do."""
    if not names_program(spec):
        raise UsageError(f"{flag} {spec}: is no program. Name one: python:FILE:CALLABLE.")


def parse_spec(spec: str) -> Spec:
    """Tell what a `--model`, `--critic`, `--judge` or `--reference` means, without opening it.

    Raises `UsageError` for what is none of: a file or directory, an OpenAI name, `PROVIDER:NAME`, a URL
    with `#NAME`, a hub name, `python:FILE_OR_MODULE:CALLABLE`.
    """
    if not spec.strip():
        raise UsageError("A model's name is empty. Is a shell variable not set?")
    if names_program(spec):
        return Spec("program", spec.removeprefix(RUNS_CODE_PREFIX))
    if spec.startswith("file:"):
        raise UsageError(
            f"{spec}: critiques in a file are no model. srt collect-feedback takes them, as --critic."
        )
    if spec.startswith("hf:"):
        return Spec("local", spec.removeprefix("hf:"))
    if spec.startswith(("http://", "https://")):
        return _parse_addresses(spec)
    prefix, colon, name = spec.partition(":")
    if colon and name and prefix in providers():
        return Spec("api", name, prefix)
    path = Path(spec)
    if path.is_file() and path.suffix.lower() != ".gguf":
        if path.suffix == ".py":
            raise UsageError(f"{spec}: this file is no model. Name python:{spec}:CALLABLE.")
        raise UsageError(
            f"{spec}: this file is no model. Name a directory or a FILE.gguf. Critiques in a file are "
            f"--critic {shlex.quote(f'file:{spec}')}."
        )
    if path.exists():
        return Spec("local", spec)
    if spec.endswith(_FILES) or spec.startswith((".", "/", "~")) or spec.count("/") > 1:
        raise UsageError(f"{spec}: no such file or directory.")
    if spec.startswith(OUR_MODELS):
        raise UsageError(
            f"{spec}: no such directory here. srt sft and srt dpo make models there; make it first, or "
            "name another model."
        )
    if _HUB_NAME.fullmatch(spec):
        return Spec("local", spec)
    if _BARE_NAME.fullmatch(spec):
        return Spec("api", spec, "openai")
    if colon and _BARE_NAME.fullmatch(prefix):
        raise UsageError(
            f"{spec}: no provider is called {prefix!r}. There are {', '.join(providers())}; a server is "
            "http://HOST:PORT/v1#NAME."
        )
    raise UsageError(
        f"{spec!r} is no model: give an OpenAI name, PROVIDER:NAME, a directory, ORG/NAME, FILE.gguf, "
        "http://HOST/v1#NAME, or python:FILE:CALLABLE."
    )


def _parse_addresses(spec: str) -> Spec:
    addresses, hash_mark, name = spec.partition("#")
    urls = tuple(url.rstrip("/") for url in addresses.split(","))
    if any(map(holds_key, urls)) or holds_key(spec):
        raise UsageError(KEY_IN_ADDRESS[0].upper() + KEY_IN_ADDRESS[1:])
    if not hash_mark or not name:
        raise UsageError(f"{spec}: which model? Write {addresses}#NAME.")
    return Spec("api", name, None, urls)


def open_model(spec: str, options: ModelOptions | None = None) -> Model:
    """Open the model a spec names; raises `SrtError` when it cannot be had.

    Backends are imported here, so that a command pays only for what its models need.
    """
    options = options or ModelOptions()
    parsed = parse_spec(spec)
    if parsed.kind == "program":
        from srt_cli.models.program import ProgramModel

        return ProgramModel(spec, parsed.name)
    if parsed.kind == "local":
        from srt_cli.models.local.local import LocalModel

        with console.waiting(f"{spec}: loading torch and the tokenizer"):
            return LocalModel(spec, parsed.name, options)
    if options.export_to is not None:
        from srt_cli.models.api.batch import ExportModel

        return ExportModel(spec, parsed, options, options.export_to)
    if options.batch_poll_s is not None:
        from srt_cli.models.api.batch import BatchModel

        return BatchModel(spec, parsed, options)
    from srt_cli.models.api.client import ApiModel

    return ApiModel(spec, parsed, options)


def refuse_unfit(specs: Iterable[str], options: ModelOptions) -> None:
    """Raise `SrtError` for a model in process whose chat template is of no use.

    For commands that open their models one after another: it is said before anything is written.
    """
    for spec in dict.fromkeys(specs):
        parsed = parse_spec(spec)
        if parsed.in_process:
            from srt_cli.models.local.local import chat_of

            chat_of(parsed.name, options)


def is_loop(written: Sequence[object]) -> bool:
    """Whether the last 128 tokens (or words) are one run of them, four times or more in a row."""
    if len(written) < LOOP_LENGTH:
        return False
    tail = written[-LOOP_LENGTH:]
    return any(
        tail[-1] == tail[-1 - period] and tail[period:] == tail[:-period]
        for period in range(1, LOOP_LENGTH // PERIODS + 1)
    )


def canonical_request(model: Model, request: Request) -> dict[str, Any]:
    """The request as plain values, the same for the same call: what the journal hashes."""
    plain: dict[str, Any] = {
        "model": model.identity,
        "messages": [[turn.role, turn.content] for turn in request.messages],
        "max_tokens": request.max_tokens,
        "temperature": request.temperature,
        "top_p": request.top_p,
        "stop": list(request.stop),
        "sample": request.sample,
        "top_logprobs": request.top_logprobs,
    }
    if request.temperature > 0:
        plain["seed"] = request.seed
    if request.logprobs_at != "all":
        plain["logprobs_at"] = request.logprobs_at
    if request.continues:
        plain["continues"] = True
    if request.thinks.told is not None and model.can_be_told:
        plain["thinking"] = request.thinks.told
    if request.task is not None and model.is_program:
        plain["task"] = [
            request.task.kind,
            request.task.prompt.model_dump(mode="json"),
            list(request.task.texts),
        ]
    return plain


def identity_before(identity: str) -> str:
    """What older srt called the same model: an adapter without its base."""
    return re.sub(f"(?<=^local:[0-9a-f]{{16}})({ON_BASE}[0-9a-f]{{16}})+", "", identity)


def as_asked_before(request: Request) -> list[Request]:
    """How older srt asked the same, where what was replied then is what is asked for now."""
    asked = [request]
    if request.thinks.by_default:
        asked.append(dataclasses.replace(request, thinks=Thinks()))
    by_letter = request.task is not None and request.task.kind == "judge"
    if by_letter and request.top_logprobs > LETTER_LOGPROBS_BEFORE:
        fewer = LETTER_LOGPROBS_BEFORE
        asked += [dataclasses.replace(each, top_logprobs=fewer) for each in asked]
    return asked[1:]


def warn_if_deaf(model: Model, requests: Sequence[Request]) -> bool:
    """Say that a model is told in vain to think or not to; true when that was said."""
    thinks = next((each.thinks for each in requests if each.thinks.told in ("on", "off")), None)
    if thinks is None or thinks.by_default or model.can_be_told:
        return False
    in_process = parse_spec(model.spec).in_process
    why = (
        "its chat template has no switch for it"
        if in_process
        else "srt knows no field of its API for it (--reasoning-effort and --extra-body send others)"
    )
    console.warn(
        f"{model.spec} cannot be told whether to think: {why}. What it thinks is kept apart from its "
        "answers all the same."
    )
    return True


def reply_to_plain(reply: Reply) -> dict[str, Any]:
    """A reply as the journal keeps it: what JSON cannot hold is left out, halves of characters too."""
    plain: dict[str, Any] = {
        "text": _without_halves(reply.text),
        "finish_reason": reply.finish_reason,
        "usage": reply.usage.model_dump(exclude_defaults=True),
    }
    if reply.logprobs:
        plain["logprobs"] = [_place_to_plain(place) for place in reply.logprobs]
    if reply.error is not None:
        plain["error"] = _without_halves(reply.error)
    if reply.thoughts:
        plain["thoughts"] = _without_halves(reply.thoughts)
    if reply.cost is not None:
        plain["cost"] = reply.cost
    if reply.estimated:
        plain["estimated"] = True
    return plain


def _place_to_plain(place: TokenLogprobs) -> dict[str, Any]:
    top = {
        _without_halves(token): logprob
        for token, logprob in place.top.items()
        if math.isfinite(logprob)
    }
    return dataclasses.asdict(place) | {"token": _without_halves(place.token), "top": top}


def _without_halves(text: str) -> str:
    """A text that UTF-8 can hold: half of a character becomes U+FFFD."""
    return text if text.isascii() else _HALVES.sub("\ufffd", text)


@lru_cache
def _reader() -> "TypeAdapter[Reply]":
    return TypeAdapter(Reply)


def reply_from_plain(plain: Mapping[str, Any]) -> Reply | None:
    """Read back what `reply_to_plain` wrote; None for what is no reply, so that it is owed again.

    An older srt left thoughts in the text.
    """
    kept = {name: plain[name] for name in _KEPT if name in plain}
    try:
        reply = _reader().validate_python(kept)
    except ValidationError:
        return None
    return reply if reply.thoughts else part_reply(reply)
