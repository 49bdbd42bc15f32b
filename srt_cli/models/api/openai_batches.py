"""OpenAI's Batch API: a file of requests goes up, a file of replies comes back within 24 hours.

Its file format is read elsewhere too (`vllm run-batch`), so exported requests have it as well.
"""

from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, ClassVar, Final, Literal

import orjson

from srt_cli.errors import SrtError
from srt_cli.models.api.dialect import (
    LONGEST_MESSAGE,
    Answer,
    Batch,
    BatchResult,
    Heard,
    NoAnswer,
    NotedBatch,
    Refused,
    Wire,
    as_count,
    as_mapping,
    checked,
)
from srt_cli.models.api.refusals import refused_in_batch

if TYPE_CHECKING:
    import openai
    from openai.types import Batch as ToldBatch

CHAT: Final = "/v1/chat/completions"
RESPONSES: Final = "/v1/responses"
PLAN: Final = "srt_plan"
OVER: Final = ("completed", "expired", "failed", "cancelled")


class OpenAiBatches:
    """Batches of requests to one endpoint; `read` is how its dialect reads a reply."""

    most_requests: ClassVar[int] = 50_000
    most_bytes: ClassVar[int] = 200_000_000

    def __init__(
        self,
        endpoint: Literal["/v1/chat/completions", "/v1/responses"],
        read: Callable[[object], Heard],
    ) -> None:
        self.endpoint = endpoint
        self.read = read

    def line(self, name: str, body: Mapping[str, Any]) -> bytes:
        """One request in the batch file format."""
        line = {"custom_id": name, "method": "POST", "url": self.endpoint, "body": body}
        return orjson.dumps(line) + b"\n"

    async def before(self, wire: Wire) -> list[str]:
        """None: metadata tell them apart."""
        return []

    async def found(self, wire: Wire, noted: NotedBatch) -> Batch | None:
        """The newest batch whose metadata hold the label, but none that failed before it began."""
        async with _client(wire) as client:
            async for each in client.batches.list(limit=100):
                if (each.metadata or {}).get(PLAN) == noted.label and each.status != "failed":
                    return _batch(each)
        return None

    async def submit(self, wire: Wire, label: str, lines: Sequence[bytes]) -> Batch:
        """Upload the file, then have it worked on."""
        async with _client(wire) as client:
            file = await client.files.create(file=("srt.jsonl", b"".join(lines)), purpose="batch")
            batch = await client.batches.create(
                input_file_id=file.id,
                endpoint=self.endpoint,
                completion_window="24h",
                metadata={PLAN: label},
            )
            return _batch(batch)

    async def look(self, wire: Wire, name: str) -> Batch:
        """How a batch stands."""
        async with _client(wire) as client:
            batch = _batch(await client.batches.retrieve(name))
        self._check_endpoint(batch.error)
        return batch

    async def results(self, wire: Wire, place: str) -> bytes:
        """The output or the error file."""
        async with _client(wire) as client:
            return (await client.files.content(place)).content

    def outcome(self, line: Mapping[str, Any]) -> BatchResult | None:
        """A line of the output or the error file."""
        name = line.get("custom_id")
        if not isinstance(name, str) or not ("response" in line or "error" in line):
            return None
        error, response = as_mapping(line.get("error")), as_mapping(line.get("response"))
        if error.get("code") == "batch_expired":
            return BatchResult(name, owed=True)
        body, status = as_mapping(response.get("body")), response.get("status_code") or 200
        try:
            if status == 200 and body:
                return BatchResult(name, self.read(dict(body)))
        except NoAnswer:
            pass
        except Refused as error_within:
            return refused_in_batch(name, error_within)
        said = error or body.get("error") or {"message": "no reply"}
        refused = Refused(Answer(as_count(status), {}, orjson.dumps({"error": said})))
        self._check_endpoint(refused.said)
        return refused_in_batch(name, refused)

    def _check_endpoint(self, error: str) -> None:
        if self.endpoint == CHAT and RESPONSES[1:] in error:
            raise SrtError(
                "A batch of chat completions was refused, because only the Responses API serves this "
                f"model ({error[:LONGEST_MESSAGE]}): run again without --batch, --export-batch and "
                "--import-batch, and it will be used."
            )


def _batch(told: "ToldBatch") -> Batch:
    counts, errors = told.request_counts, told.errors
    files = (told.output_file_id, told.error_file_id)
    return Batch(
        told.id,
        told.status,
        over=told.status in OVER,
        cancelling=told.status == "cancelling",
        done=counts.completed if counts else None,
        total=counts.total if counts else None,
        results=tuple(file for file in files if file),
        error="; ".join(str(error.message) for error in (errors and errors.data) or []),
    )


@asynccontextmanager
async def _client(wire: Wire) -> "AsyncIterator[openai.AsyncOpenAI]":
    """OpenAI's client, which knows the paths and the forms; `wire` carries what it says.

    So it holds no key, and our rules on hosts, proxies, time and retries are the only ones.
    """
    import httpx2  # what the client is made of
    import openai

    class Carried(httpx2.AsyncBaseTransport):
        async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
            kind = request.headers.get("content-type", "")
            content = await request.aread()
            answer = await wire.send(request.method, str(request.url), content, kind)
            if answer.status >= 300:
                raise Refused(answer)
            if not request.url.path.endswith("/content"):
                return httpx2.Response(200, json=dict(checked(answer)))
            return httpx2.Response(200, content=answer.content)

    client = openai.AsyncOpenAI(
        api_key="carried by the wire",
        base_url=wire.url,
        max_retries=0,
        http_client=httpx2.AsyncClient(transport=Carried(), trust_env=False),
    )
    try:
        yield client
    except openai.APIConnectionError as error:
        # Whatever the wire raises comes out as this.
        raise error.__cause__ or NoAnswer("no connection", str(error)) from None
