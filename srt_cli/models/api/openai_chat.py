"""OpenAI's chat completions, which most servers speak: `POST /chat/completions`."""

import math
import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar, Final

from srt_cli.models import FinishReason, Request, TokenLogprobs
from srt_cli.models.api.dialect import (
    Answer,
    Batches,
    Dialect,
    Heard,
    Manner,
    Refused,
    Wire,
    as_count,
    as_dollars,
    as_list,
    as_mapping,
    as_text,
    as_texts,
    listed_models,
    refused_as,
    unreadable,
    warn_of_switch,
)
from srt_cli.models.api.openai_responses import OpenAiResponses
from srt_cli.records import Usage

PATH: Final = "/chat/completions"
MOST_LOGPROB: Final = 1e-3
"""A logarithm of a probability is not above 0, but for rounding."""
TOKEN_FIELDS: Final = ("max_completion_tokens", "max_tokens")
# What a server may refuse to be told; dropped once, remembered, and noted in the manifest.
LOGPROB_FIELDS: Final = ("logprobs", "top_logprobs")
OPTIONAL_FIELDS: Final = ("temperature", "top_p", "seed", "stop", *LOGPROB_FIELDS)
MOST_LOGPROBS: Final = 20
_TOO_MANY: Final = re.compile(
    r"less than|at most|between|greater than|larger than|more than|max|exceed|range|up to|<=|"
    "too (many|large)",
    re.IGNORECASE,
)
LEARNS_FROM: Final = (400, 403, 404, 405, 406, 415, 422, 501)
_WANTS_OTHER_FIELD: Final = re.compile(
    "unsupported|not supported|instead|unknown|unrecogni|unexpected|not permitted|extra", re.I
)
WHOLE: Final = (
    "stop", "eos", "eos_token", "stop_sequence", "end_turn", "end", "complete", "completed",
    "finish_reason_stop", "done",
)  # fmt: skip
AT_LIMIT: Final = (
    "length", "max_tokens", "max_output_tokens", "max_new_tokens", "finish_reason_max_tokens",
    "model_length", "max_length",
)  # fmt: skip
FILTERED: Final = (
    "content_filter", "content_filtered", "safety", "refusal", "recitation", "prohibited_content",
    "blocklist", "spii", "moderation", "sensitive", "content-filter", "guardrail_intervened",
    "error_toxic", "image_safety", "language",
)  # fmt: skip
FINISHES: Final[Mapping[str, FinishReason]] = {
    **dict.fromkeys(WHOLE, "stop"),
    **dict.fromkeys(AT_LIMIT, "length"),
    **dict.fromkeys(FILTERED, "refused"),
}
"""What the words of many houses mean; whatever else ends a reply leaves it incomplete."""


class OpenAiChat:
    """One model's chat completions; learns the token limit's name and which fields are refused."""

    gives_logprobs: ClassVar[bool] = True

    def __init__(self, manner: Manner) -> None:
        self.manner = manner
        self.token_field = manner.token_field
        self.dropped = set(manner.refuses)
        self.most_logprobs = MOST_LOGPROBS

    @property
    def path(self) -> str:
        """The manner's, where it names one."""
        return (self.manner.path or PATH).format(model=self.manner.model)

    @property
    def batches(self) -> Batches | None:
        """OpenAI's; none where chats are served in an uncommon place, as on Azure."""
        if self.manner.path is not None:
            return None
        from srt_cli.models.api.openai_batches import OpenAiBatches

        return OpenAiBatches("/v1/chat/completions", self.read)

    def headers(self, key: str | None) -> dict[str, str]:
        """The key as a bearer, or in the header that the manner names."""
        return self.manner.key_headers(key)

    def body(self, request: Request) -> dict[str, Any]:
        """A request; only what was asked for is sent, and nothing that was refused."""
        body: dict[str, Any] = {
            "model": self.manner.model,
            "messages": [{"role": turn.role, "content": turn.content} for turn in request.messages],
            self.token_field: request.max_tokens,
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
            body |= {
                "logprobs": True,
                "top_logprobs": min(request.top_logprobs, self.most_logprobs),
            }
        body |= self.manner.told(request)
        if self.manner.effort is not None:
            body["reasoning_effort"] = self.manner.effort
        kept = {name: value for name, value in body.items() if name not in self.dropped}
        renames = self.manner.renames
        return {renames.get(name, name): value for name, value in kept.items()} | self.manner.extra

    def read(self, data: object) -> Heard:
        """A chat completion, also one that came as a stream of events though none was asked for."""
        told = _whole(data)
        choice = as_mapping(next(iter(as_list(told.get("choices"))), None))
        word = as_text(choice.get("finish_reason"))
        if word == "error" or as_mapping(choice.get("error")):
            error = as_mapping(choice.get("error")) or as_mapping(told.get("error"))
            raise refused_as(Answer(200, {}, b""), error or {"message": "the provider failed"})
        message = as_mapping(choice.get("message"))
        if not message:
            raise unreadable(data)
        text, thoughts = _text_and_thoughts(message)
        finish: FinishReason = FINISHES.get(word.lower(), "cut")
        error_words = f"the server ended it with {word or 'no finish reason'!r}"
        if refusal := as_text(message.get("refusal")):
            text, finish = refusal, "refused"
        usage = told.get("usage")
        return Heard(
            text,
            finish,
            thoughts,
            _usage_of(usage) if isinstance(usage, dict) else None,
            as_dollars(as_mapping(usage).get("cost")),
            _places(choice.get("logprobs")),
            error_words if finish == "cut" else None,
        )

    def refusal(self, answer: Answer) -> Refused:
        """An error object, wherever a server puts it."""
        return Refused(answer)

    def adapt(self, refused: Refused, request: Request, sent: Mapping[str, Any]) -> Dialect | None:
        """Another name for the token limit, a field less or smaller, or the Responses API."""
        if refused.status == 404 and "v1/responses" in refused.message:
            return OpenAiResponses(self.manner)
        if refused.status not in LEARNS_FROM:
            return None
        if set(sent) != set(self.body(request)):
            return self  # learnt already from a request that was under way beside this one
        ours = sent.keys() - self.manner.extra.keys()
        if self.token_field in ours and refused.names(self.token_field):
            other = TOKEN_FIELDS[self.token_field == TOKEN_FIELDS[0]]
            if other not in self.dropped and _WANTS_OTHER_FIELD.search(refused.said):
                self.dropped.add(self.token_field)
                self.token_field = other
                return self
        if "top_logprobs" in ours and self._wants_fewer_logprobs(refused, sent["top_logprobs"]):
            return self
        switches = set(self.manner.told(request))
        for name in (*OPTIONAL_FIELDS, *switches):
            sent_as = self.manner.renames.get(name, name)
            named = refused.names(sent_as) or (name in switches and name in refused.said.lower())
            if sent_as in ours and named:
                self.dropped |= set(LOGPROB_FIELDS) if name in LOGPROB_FIELDS else {name}
                if name in switches:
                    warn_of_switch(self.manner.model)
                return self
        return None

    def _wants_fewer_logprobs(self, refused: Refused, asked: int) -> bool:
        """Whether it is only the number of alternatives that is refused; then fewer are asked for."""
        if not any(map(refused.names, LOGPROB_FIELDS)) or not _TOO_MANY.search(refused.said):
            return False
        if asked > self.most_logprobs:
            return True  # learnt already
        allowed = [int(number) for number in re.findall(r"\b\d+\b", refused.said)]
        fewer = max((number for number in allowed if 0 < number < asked), default=0)
        if not fewer:
            return False
        self.most_logprobs = fewer
        return True

    async def offered(self, wire: Wire) -> list[str] | None:
        """The models that may be asked."""
        return await listed_models(wire, "/models")

    def describe(self) -> dict[str, Any]:
        """The name of the token limit and the fields that were refused."""
        learnt = {"token_field": self.token_field, "fields_refused": sorted(self.dropped)}
        fewer = self.most_logprobs < MOST_LOGPROBS
        return learnt | ({"most_top_logprobs": self.most_logprobs} if fewer else {})


DIALECT: Final[type[Dialect]] = OpenAiChat


def _usage_of(told: Mapping[str, Any]) -> Usage:
    # Servers leave the details out, or null.
    read, written = (
        as_mapping(told.get(name))
        for name in ("prompt_tokens_details", "completion_tokens_details")
    )
    return Usage(
        prompt_tokens=as_count(told.get("prompt_tokens")),
        completion_tokens=as_count(told.get("completion_tokens")),
        cached_tokens=as_count(read.get("cached_tokens")),
        reasoning_tokens=as_count(written.get("reasoning_tokens")),
    )


def _places(told: object) -> tuple[TokenLogprobs, ...]:
    """The places of a reply; none where no log-probability can be read."""
    places = tuple(_each_place(told))
    return places if any(place.top for place in places) else ()


def _each_place(told: object) -> Iterator[TokenLogprobs]:
    offset = 0
    for place in map(as_mapping, as_list(as_mapping(told).get("content"))):
        token, others = as_text(place.get("token")), as_list(place.get("top_logprobs"))
        top = {
            other["token"]: float(other["logprob"])
            for other in map(as_mapping, others)
            if isinstance(other.get("token"), str) and _is_logprob(other.get("logprob"))
        }
        yield TokenLogprobs(token, top, offset)
        offset += len(token)


def _is_logprob(value: object) -> bool:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return number and math.isfinite(value) and value <= MOST_LOGPROB  # type: ignore[arg-type, operator]


def _text_and_thoughts(message: Mapping[str, Any]) -> tuple[str, str]:
    text, thoughts = as_texts(message.get("content"))
    for name in ("reasoning_content", "reasoning"):  # some servers send both, with the same text
        thoughts = thoughts or "".join(as_texts(message.get(name)))
    return text, thoughts


def _whole(data: object) -> Mapping[str, Any]:
    """The completion: as it is, in a list, or put together from the pieces of a stream."""
    pieces = [as_mapping(piece) for piece in data] if isinstance(data, list) else []
    if not any("delta" in as_mapping(choice) for piece in pieces for choice in _choices(piece)):
        return pieces[0] if pieces else as_mapping(data)
    whole: dict[str, Any] = {"finish_reason": None}
    message = {"content": "", "reasoning_content": ""}
    usage: object = None
    places: list[Any] = []
    for piece in pieces:
        usage = piece.get("usage") or usage
        for choice in map(as_mapping, _choices(piece)[:1]):
            delta = as_mapping(choice.get("delta"))
            text, thoughts = _text_and_thoughts(delta)
            message["content"] += text
            message["reasoning_content"] += thoughts
            places += as_list(as_mapping(choice.get("logprobs")).get("content"))
            whole["finish_reason"] = choice.get("finish_reason") or whole["finish_reason"]
    return {
        "choices": [whole | {"message": message, "logprobs": {"content": places}}],
        "usage": usage,
    }


def _choices(piece: Mapping[str, Any]) -> list[Any]:
    return as_list(piece.get("choices"))
