"""OpenAI's Responses API, which some models are only served by: `POST /responses`."""

from collections.abc import Collection, Mapping
from typing import Any, ClassVar, Final

from srt_cli.models import FinishReason, Request
from srt_cli.models.api.dialect import (
    Answer,
    Batches,
    Dialect,
    Heard,
    Manner,
    NoAnswer,
    Refused,
    Wire,
    as_count,
    as_list,
    as_mapping,
    as_text,
    listed_models,
    unreadable,
)
from srt_cli.records import Usage

PATH: Final = "/responses"
OPTIONAL_FIELDS: Final = ("temperature", "top_p")
INCOMPLETE: Final[Mapping[str, FinishReason]] = {
    "max_output_tokens": "length", "content_filter": "refused",
}  # fmt: skip


class OpenAiResponses:
    """One model's responses; nothing is stored on the server."""

    # The API has them, but no model that is served only here gives them.
    gives_logprobs: ClassVar[bool] = False

    def __init__(self, manner: Manner) -> None:
        self.manner = manner
        self.dropped: set[str] = set()

    @property
    def path(self) -> str:
        """The same for every model."""
        return PATH

    @property
    def batches(self) -> Batches:
        """OpenAI's."""
        from srt_cli.models.api.openai_batches import OpenAiBatches

        return OpenAiBatches("/v1/responses", self.read)

    def headers(self, key: str | None) -> dict[str, str]:
        """The key as a bearer, or in the header that the manner names."""
        return self.manner.key_headers(key)

    def body(self, request: Request) -> dict[str, Any]:
        """A request: what the system says stands apart; stop texts and seeds are not taken."""
        system = [turn.content for turn in request.messages if turn.role == "system"]
        said = [turn for turn in request.messages if turn.role != "system"]
        body: dict[str, Any] = {
            "model": self.manner.model,
            "input": [{"role": turn.role, "content": turn.content} for turn in said],
            "max_output_tokens": request.max_tokens,
            "temperature": request.temperature,
            "store": False,
        }
        if system:
            body["instructions"] = "\n\n".join(system)
        if request.top_p < 1:
            body["top_p"] = request.top_p
        if self.manner.effort is not None:
            body["reasoning"] = {"effort": self.manner.effort}
        kept = {name: value for name, value in body.items() if name not in self.dropped}
        return kept | self.manner.extra

    def read(self, data: object) -> Heard:
        """A response: its text, its summaries of thoughts, and why it is incomplete if it is."""
        told = as_mapping(data)
        if not isinstance(told.get("output"), list):
            raise unreadable(data)
        texts, refusals, thoughts = [], [], []
        for item in map(as_mapping, as_list(told["output"])):
            parts = [*as_list(item.get("content")), *as_list(item.get("summary"))]
            for part in map(as_mapping, parts):
                if item.get("type") == "reasoning":
                    thoughts.append(as_text(part.get("text")))
                elif part.get("type") == "output_text":
                    texts.append(as_text(part.get("text")))
                elif part.get("type") == "refusal":
                    refusals.append(as_text(part.get("refusal")))
        finish: FinishReason = "refused" if refusals else "stop"
        if told.get("status") == "incomplete":
            why = as_text(as_mapping(told.get("incomplete_details")).get("reason"))
            finish = INCOMPLETE.get(why, "length")
        elif told.get("status") == "failed":
            raise NoAnswer("server error", as_text(as_mapping(told.get("error")).get("message")))
        usage = told.get("usage")
        return Heard(
            "".join(refusals if refusals else texts),
            finish,
            "\n\n".join(thoughts),
            _usage_of(usage) if isinstance(usage, dict) else None,
        )

    def refusal(self, answer: Answer) -> Refused:
        """An error object, wherever a server puts it."""
        return Refused(answer)

    def adapt(self, refused: Refused, request: Request, sent: Collection[str]) -> Dialect | None:
        """A field less; a request that still spoke chat goes again in this protocol."""
        if "messages" in sent:
            return self
        if refused.status not in (400, 422):
            return None
        if set(sent) != set(self.body(request)):
            return self
        for name in OPTIONAL_FIELDS:
            if name in sent and name not in self.manner.extra and refused.names(name):
                self.dropped.add(name)
                return self
        return None

    async def offered(self, wire: Wire) -> list[str] | None:
        """The models that may be asked."""
        return await listed_models(wire, "/models")

    def describe(self) -> dict[str, Any]:
        """That it is this API, and the fields that were refused."""
        return {"protocol": "responses", "fields_refused": sorted(self.dropped)}


DIALECT: Final[type[Dialect]] = OpenAiResponses


def _usage_of(told: Mapping[str, Any]) -> Usage:
    read, written = (
        as_mapping(told.get(name)) for name in ("input_tokens_details", "output_tokens_details")
    )
    return Usage(
        prompt_tokens=as_count(told.get("input_tokens")),
        completion_tokens=as_count(told.get("output_tokens")),
        cached_tokens=as_count(read.get("cached_tokens")),
        reasoning_tokens=as_count(written.get("reasoning_tokens")),
    )
