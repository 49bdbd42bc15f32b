"""Anthropic's messages: `POST /v1/messages`, and the batches beside them."""

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Final

import orjson

from srt_cli.models import FinishReason, Request
from srt_cli.models.api.dialect import (
    Answer,
    Batch,
    BatchResult,
    Dialect,
    Heard,
    Manner,
    NoAnswer,
    NotedBatch,
    Refused,
    Wire,
    as_count,
    as_list,
    as_mapping,
    as_text,
    checked,
    listed_models,
    unreadable,
    warn_of_switch,
)
from srt_cli.models.api.refusals import refused_in_batch
from srt_cli.records import Usage

VERSION: Final = "2023-06-01"
PATH: Final = "/v1/messages"
# The least missed first: some models take only one of the first two.
OPTIONAL_FIELDS: Final = ("top_p", "temperature", "stop_sequences", "output_config")
FINISHES: Final[Mapping[str, FinishReason]] = {
    "end_turn": "stop", "stop_sequence": "stop", "refusal": "refused",
}  # fmt: skip
"""What else ends a reply leaves it incomplete: `max_tokens`, a full context, a pause, a tool."""
LEAST_BUDGET: Final = 1024
"""Tokens for thoughts; the API takes no fewer."""
NO_CREDIT: Final = "credit balance is too low"


class Anthropic:
    """One model's messages. It takes no seed, and tells no log-probabilities."""

    gives_logprobs: ClassVar[bool] = False

    def __init__(self, manner: Manner) -> None:
        self.manner = manner
        self.dropped = set(manner.refuses)
        self.adaptive = False
        self.batches = AnthropicBatches(self.read)

    @property
    def path(self) -> str:
        """The same for every model."""
        return PATH

    def headers(self, key: str | None) -> dict[str, str]:
        """The key, and which version of the protocol is meant."""
        return {**self.manner.key_headers(key), "anthropic-version": VERSION}

    def body(self, request: Request) -> dict[str, Any]:
        """A request: what the system says stands apart, and may be kept in the server's cache."""
        system = [turn.content for turn in request.messages if turn.role == "system"]
        body: dict[str, Any] = {
            "model": self.manner.model,
            "max_tokens": request.max_tokens,
            "messages": [
                {"role": turn.role, "content": turn.content}
                for turn in request.messages
                if turn.role != "system"
            ],
            "temperature": request.temperature,
        }
        body |= self._thinking(request)
        if system:
            # It is the same for row after row; what is shorter than a cache's least costs nothing.
            text = {"type": "text", "text": "\n\n".join(system)}
            body["system"] = [{**text, "cache_control": {"type": "ephemeral"}}]
        if request.top_p < 1:
            body["top_p"] = request.top_p
        if request.stop:
            body["stop_sequences"] = list(request.stop)
        if self.manner.effort is not None:
            body["output_config"] = {"effort": self.manner.effort}
        kept = {name: value for name, value in body.items() if name not in self.dropped}
        return kept | self.manner.extra

    def _thinking(self, request: Request) -> dict[str, Any]:
        """The switch; a model that thinks has its own temperature, and older ones a budget of tokens."""
        fields = dict(self.manner.told(request))
        if request.thinks.told == "on" and fields:
            fields["temperature"] = 1.0
            if self.adaptive:
                return fields | {"thinking": {"type": "adaptive"}}
            budget = max(LEAST_BUDGET, request.thinks.tokens)
            fields["thinking"] = {**fields["thinking"], "budget_tokens": budget}
            fields["max_tokens"] = request.max_tokens - request.thinks.tokens + budget
        return fields

    def read(self, data: object) -> Heard:
        """A message: its text, its thoughts, and why it ended."""
        told = as_mapping(data)
        if not isinstance(told.get("content"), list):
            raise unreadable(data)
        blocks = [as_mapping(block) for block in as_list(told["content"])]
        texts = [as_text(block.get("text")) for block in blocks if block.get("type") == "text"]
        thoughts = [
            as_text(block.get("thinking")) for block in blocks if block.get("type") == "thinking"
        ]
        usage = told.get("usage")
        return Heard(
            "".join(texts),
            FINISHES.get(as_text(told.get("stop_reason")), "length"),
            "\n\n".join(thoughts),
            _usage_of(usage) if isinstance(usage, dict) else None,
            cache_written=as_count(as_mapping(usage).get("cache_creation_input_tokens")),
        )

    def refusal(self, answer: Answer) -> Refused:
        """An error; an empty account is told as a malformed request, and by its words alone."""
        refused = Refused(answer)
        if NO_CREDIT in refused.message:
            refused.code = "insufficient_quota"
        return refused

    def adapt(self, refused: Refused, request: Request, sent: Mapping[str, Any]) -> Dialect | None:
        """A field less."""
        if refused.status != 400:
            return None
        if set(sent) != set(self.body(request)):
            return self  # learnt already from a request that was under way beside this one
        ours = sent.keys() - self.manner.extra.keys()
        if "thinking" in ours and "thinking" in refused.said:
            # Newer models take no budget; some think always, or never.
            if sent["thinking"].get("type") == "enabled":
                self.adaptive = True
                return self
            self.dropped.add("thinking")
            warn_of_switch(self.manner.model)
            return self
        for name in OPTIONAL_FIELDS:
            if name in ours and refused.names(name):
                self.dropped.add(name)
                return self
        return None

    async def offered(self, wire: Wire) -> list[str] | None:
        """The models that may be asked."""
        return await listed_models(wire, "/v1/models?limit=1000")

    def describe(self) -> dict[str, Any]:
        """The fields that were refused."""
        return {"protocol": "messages", "fields_refused": sorted(self.dropped)}


DIALECT: Final[type[Dialect]] = Anthropic


def _usage_of(told: Mapping[str, Any]) -> Usage:
    # What was read from the cache or written into it is told apart from the rest of the prompt.
    read = as_count(told.get("cache_read_input_tokens"))
    written = as_count(told.get("cache_creation_input_tokens"))
    details = as_mapping(told.get("output_tokens_details"))
    return Usage(
        prompt_tokens=as_count(told.get("input_tokens")) + written + read,
        completion_tokens=as_count(told.get("output_tokens")),
        cached_tokens=read,
        reasoning_tokens=as_count(details.get("thinking_tokens")),
    )


class AnthropicBatches:
    """Message batches; one carries no words of ours but the names of its requests."""

    most_requests: ClassVar[int] = 100_000
    most_bytes: ClassVar[int] = 250_000_000

    def __init__(self, read: Any) -> None:
        self.read = read

    def line(self, name: str, body: Mapping[str, Any]) -> bytes:
        """One request, as it stands in the list that is posted."""
        return orjson.dumps({"custom_id": name, "params": body}) + b"\n"

    async def before(self, wire: Wire) -> list[str]:
        """The newest thousand batches, among which a later one is new."""
        return [batch.name for batch in await self._listed(wire)]

    async def found(self, wire: Wire, noted: NotedBatch) -> Batch | None:
        """The first batch since of as many requests; whether it is ours, its results tell."""
        since = [batch for batch in await self._listed(wire) if batch.name not in noted.others]
        alike = [batch for batch in since if batch.total == len(noted.requests)]
        return alike[-1] if alike else None

    async def submit(self, wire: Wire, label: str, lines: Sequence[bytes]) -> Batch:
        """Post all requests at once, without the label, for which there is no place."""
        body = {"requests": [orjson.Fragment(line) for line in lines]}
        return _batch(checked(await wire.post(f"{PATH}/batches", body)))

    async def _listed(self, wire: Wire) -> list[Batch]:
        """The newest thousand batches."""
        told = checked(await wire.get(f"{PATH}/batches?limit=1000"))
        return [_batch(as_mapping(each)) for each in as_list(told.get("data"))]

    async def look(self, wire: Wire, name: str) -> Batch:
        """How a batch stands."""
        return _batch(checked(await wire.get(f"{PATH}/batches/{name}")))

    async def results(self, wire: Wire, place: str) -> bytes:
        """What a batch's requests came to, in any order."""
        answer = await wire.get(place)
        if answer.status >= 300:
            raise Refused(answer)
        return answer.content

    def outcome(self, line: Mapping[str, Any]) -> BatchResult | None:
        """A line of the results."""
        name, result = line.get("custom_id"), as_mapping(line.get("result"))
        if not isinstance(name, str) or not result:
            return None
        if result.get("type") == "expired":
            return BatchResult(name, owed=True)
        try:
            return BatchResult(name, self.read(result.get("message")))
        except NoAnswer:
            error = as_mapping(as_mapping(result.get("error")).get("error"))
            said = error or {"message": as_text(result.get("type")) or "no reply"}
            return refused_in_batch(name, Refused(Answer(400, {}, orjson.dumps({"error": said}))))


def _batch(told: Mapping[str, Any]) -> Batch:
    counts = {
        name: as_count(count) for name, count in as_mapping(told.get("request_counts")).items()
    }
    name, total = as_text(told.get("id")), sum(counts.values())
    status = as_text(told.get("processing_status"))
    over = status == "ended"
    return Batch(
        name,
        status,
        over=over,
        cancelling=status == "canceling",
        done=total - counts.get("processing", 0),
        total=total,
        # Not its `results_url`, which names Anthropic's own host, whoever stands between.
        results=(f"{PATH}/batches/{name}/results",) if over else (),
    )
