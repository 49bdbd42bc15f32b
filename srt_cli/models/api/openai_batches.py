"""OpenAI's Batch API: a file of requests goes up, a file of replies comes back within 24 hours.

Its file format is read elsewhere too (`vllm run-batch`), so exported requests have it as well.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, Final

import orjson

from srt_cli.models.api.dialect import (
    Batch,
    BatchResult,
    Heard,
    NoAnswer,
    Refused,
    Upload,
    Wire,
    as_list,
    as_mapping,
    as_text,
    checked,
)

COMPLETION_WINDOW: Final = "24h"
PLAN: Final = "srt_plan"
DEAD: Final = ("failed", "cancelled", "cancelling")
OVER: Final = ("completed", "expired", "failed", "cancelled")


class OpenAiBatches:
    """Batches of requests to one endpoint; `read` is how its dialect reads a reply."""

    most_requests: ClassVar[int] = 50_000
    most_bytes: ClassVar[int] = 200_000_000

    def __init__(self, path: str, read: Callable[[object], Heard]) -> None:
        self.url = f"/v1{path}"
        self.read = read

    def line(self, name: str, body: Mapping[str, Any]) -> bytes:
        """One request in the batch file format."""
        line = {"custom_id": name, "method": "POST", "url": self.url, "body": body}
        return orjson.dumps(line) + b"\n"

    async def found(self, wire: Wire, plan: str) -> Batch | None:
        """The newest batch whose metadata names the plan, unless it died."""
        listed = checked(await wire.get("/batches?limit=100"))
        for each in map(as_mapping, as_list(listed.get("data"))):
            if (
                as_mapping(each.get("metadata")).get(PLAN) == plan
                and each.get("status") not in DEAD
            ):
                return _batch(each)
        return None

    async def submit(self, wire: Wire, plan: str, lines: Sequence[bytes]) -> Batch:
        """Upload the file, then have it worked on."""
        upload = Upload("srt.jsonl", b"".join(lines), {"purpose": "batch"})
        file = checked(await wire.post("/files", upload))
        body = {
            "input_file_id": file.get("id"),
            "endpoint": self.url,
            "completion_window": COMPLETION_WINDOW,
            "metadata": {PLAN: plan},
        }
        return _batch(checked(await wire.post("/batches", body)))

    async def look(self, wire: Wire, name: str) -> Batch:
        """How a batch stands."""
        return _batch(checked(await wire.get(f"/batches/{name}")))

    def outcome(self, line: Mapping[str, Any]) -> BatchResult | None:
        """A line of the output or the error file."""
        name = line.get("custom_id")
        if not isinstance(name, str) or not ("response" in line or "error" in line):
            return None
        error, response = as_mapping(line.get("error")), as_mapping(line.get("response"))
        if error.get("code") == "batch_expired":
            return BatchResult(name, owed=True)
        body = as_mapping(response.get("body"))
        try:
            if response.get("status_code", 200) == 200 and body:
                return BatchResult(name, self.read(dict(body)))
        except (NoAnswer, Refused):
            pass
        said = error or body.get("error") or {}
        message = said.get("message") if isinstance(said, Mapping) else said
        return BatchResult(name, error=f"in a batch: {message or 'no reply'}")


def _batch(told: Mapping[str, Any]) -> Batch:
    status, counts = as_text(told.get("status")), as_mapping(told.get("request_counts"))
    errors = as_list(as_mapping(told.get("errors")).get("data"))
    files = (told.get("output_file_id"), told.get("error_file_id"))
    return Batch(
        as_text(told.get("id")),
        status,
        over=status in OVER,
        dead=status in DEAD,
        done=counts.get("completed"),
        total=counts.get("total"),
        results=tuple(f"/files/{file}/content" for file in files if file),
        error="; ".join(str(as_mapping(error).get("message")) for error in errors),
    )
