"""Servers of Anthropic's messages and OpenAI's responses that refuse what the documents forbid."""

import json
from typing import Any

from aiohttp import web
from loopback_server import Answer, Behaviour, LoopbackServer

MESSAGE_FIELDS = {
    "model", "max_tokens", "messages", "system", "temperature", "top_p", "stop_sequences",
    "output_config", "thinking", "metadata",
}  # fmt: skip
RESPONSE_FIELDS = {
    "model", "input", "instructions", "max_output_tokens", "temperature", "top_p", "reasoning",
    "store", "metadata",
}  # fmt: skip


def _plainly(body: dict[str, Any], turns: list[dict[str, str]], stop: Any) -> dict[str, Any]:
    """The request as the behaviours of a chat server read it."""
    return {**body, "messages": turns} | ({"stop": stop} if stop else {})


class AnthropicServer(LoopbackServer):
    """`/v1/messages` and its batches; a request that the documents do not allow is a 400."""

    def __init__(
        self, behaviour: Behaviour, *, key: str = "secret-of-anthropic", looks: int = 2
    ) -> None:
        self.key = key
        self.looks = looks
        self.batches: dict[str, dict[str, Any]] = {}
        self.expire_first = 0
        self.lose_answers = 0
        """To so many new batches, which are taken all the same."""
        self.cancelled: set[str] = set()
        super().__init__(behaviour)

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/messages", self._message)
        app.router.add_post("/v1/messages/batches", self._create)
        app.router.add_get("/v1/messages/batches", self._all)
        app.router.add_get("/v1/messages/batches/{id}", self._look)
        app.router.add_get("/v1/messages/batches/{id}/results", self._results)

    def _problem(self, request: web.Request, body: dict[str, Any]) -> tuple[int, str, str] | None:
        if request.headers.get("x-api-key") != self.key:
            return 401, "authentication_error", "invalid x-api-key"
        if "authorization" in request.headers:
            return 401, "authentication_error", "two keys"
        if request.headers.get("anthropic-version") != "2023-06-01":
            return 400, "invalid_request_error", "anthropic-version: header is required"
        if request.headers.get("content-type") != "application/json":
            return 400, "invalid_request_error", "content-type: must be application/json"
        return self.problem_in(body)

    def problem_in(self, body: dict[str, Any]) -> tuple[int, str, str] | None:
        """What is wrong with the body of a message."""
        for name in body.keys() - MESSAGE_FIELDS:
            return 400, "invalid_request_error", f"{name}: Extra inputs are not permitted"
        if not isinstance(body.get("max_tokens"), int):
            return 400, "invalid_request_error", "max_tokens: Field required"
        roles = [turn["role"] for turn in body["messages"]]
        if roles[:1] != ["user"] or not set(roles) <= {"user", "assistant"}:
            return 400, "invalid_request_error", "messages: first message must use the user role"
        return None

    async def _message(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        problem = self._problem(request, body)
        if problem is not None:
            return _error(*problem)
        answer = self.answer_to(body)
        if answer.error is not None:
            kind, said = answer.error["type"], answer.error["message"]
            return _error(answer.status, kind, said, answer.headers)
        return web.json_response(message_body(answer), headers=answer.headers)

    def answer_to(self, body: dict[str, Any]) -> Answer:
        plain = _plainly(body, body["messages"], body.get("stop_sequences"))
        return self.behaviour(plain, len(self.requests))

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        if request.headers.get("x-api-key") != self.key or set(body) != {"requests"}:
            return _error(400, "invalid_request_error", "requests: Field required")
        for each in body["requests"]:
            if set(each) != {"custom_id", "params"} or (problem := self.problem_in(each["params"])):
                return _error(400, "invalid_request_error", str(problem))
        name = f"msgbatch_{len(self.batches)}"
        self.batches[name] = {"requests": body["requests"], "looks": 0}
        if self.lose_answers > 0:
            self.lose_answers -= 1
            return _error(504, "timeout_error", "The request timed out.")
        return web.json_response(self._told(name))

    async def _all(self, request: web.Request) -> web.Response:
        return web.json_response({"data": [self._told(name) for name in reversed(self.batches)]})

    def _told(self, name: str) -> dict[str, Any]:
        batch = self.batches[name]
        ended, count = batch["looks"] >= self.looks, len(batch["requests"])
        counts = dict.fromkeys(("processing", "succeeded", "errored", "canceled", "expired"), 0)
        counts["succeeded" if ended else "processing"] = count
        url = f"{self.address}/v1/messages/batches/{name}/results"
        return {
            "id": name, "type": "message_batch", "request_counts": counts,
            "processing_status": "ended" if ended else "in_progress",
            "results_url": url if ended else None,
        }  # fmt: skip

    async def _look(self, request: web.Request) -> web.Response:
        name = request.match_info["id"]
        if name not in self.batches:
            return _error(404, "not_found_error", "no such batch")
        self.batches[name]["looks"] += 1
        return web.json_response(self._told(name))

    async def _results(self, request: web.Request) -> web.Response:
        lines = []
        name = request.match_info["id"]
        for each in reversed(self.batches[name]["requests"]):
            if name in self.cancelled:
                result: dict[str, Any] = {"type": "canceled"}
                lines.append(json.dumps({"custom_id": each["custom_id"], "result": result}))
                continue
            self.requests.append(each["params"])
            if self.expire_first > 0:
                self.expire_first -= 1
                result = {"type": "expired"}
            else:
                message = message_body(self.answer_to(each["params"]))
                result = {"type": "succeeded", "message": message}
            lines.append(json.dumps({"custom_id": each["custom_id"], "result": result}))
        return web.Response(text="\n".join(lines) + "\n")


def message_body(answer: Answer) -> dict[str, Any]:
    """An answer as a message that thought before it spoke."""
    thought = {"type": "thinking", "thinking": "Overall Score: [[1]], or so.", "signature": "x"}
    return {
        "id": "msg_1", "type": "message", "role": "assistant", "model": "claude",
        "content": [thought, {"type": "text", "text": answer.text}],
        "stop_reason": answer.finish_reason if answer.finish_reason != "stop" else "end_turn",
        "stop_sequence": None,
        "usage": {
            "input_tokens": 11, "cache_creation_input_tokens": 20, "cache_read_input_tokens": 100,
            "output_tokens": answer.completion_tokens,
        },
    }  # fmt: skip


def _error(status: int, kind: str, said: str, headers: Any = None) -> web.Response:
    body = {"type": "error", "error": {"type": kind, "message": said}, "request_id": "req_1"}
    return web.json_response(body, status=status, headers=headers)


class ResponsesServer(LoopbackServer):
    """A model that only `/v1/responses` serves; chat completions say so, as OpenAI does."""

    def routes(self, app: web.Application) -> None:
        app.router.add_post("/v1/chat/completions", self._elsewhere)
        app.router.add_post("/v1/responses", self._respond)
        self.chats = 0

    async def _elsewhere(self, request: web.Request) -> web.Response:
        self.chats += 1
        said = "This model is only supported in v1/responses and not in v1/chat/completions."
        error = {"message": said, "type": "invalid_request_error", "param": "model", "code": None}
        return web.json_response({"error": error}, status=404)

    async def _respond(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        unknown = body.keys() - RESPONSE_FIELDS
        if unknown or "max_output_tokens" not in body or body.get("store") is not False:
            said = f"Unknown parameter: '{min(unknown, default='store')}'."
            return web.json_response({"error": {"message": said}}, status=400)
        answer = self.behaviour(_plainly(body, body["input"], None), len(self.requests))
        if answer.error is not None:
            return web.json_response({"error": answer.error}, status=answer.status)
        part: dict[str, Any] = {"type": "output_text", "text": answer.text, "annotations": []}
        if answer.refusal:
            part = {"type": "refusal", "refusal": answer.refusal}
        cut = answer.finish_reason == "length"
        plain = {
            "id": "resp_1", "object": "response", "status": "incomplete" if cut else "completed",
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None, "error": None,
            "output": [
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "Hm."}]},
                {"type": "message", "role": "assistant", "content": [part]},
            ],
            "usage": {
                "input_tokens": 11, "input_tokens_details": {"cached_tokens": 5},
                "output_tokens": answer.completion_tokens,
                "output_tokens_details": {"reasoning_tokens": 3},
            },
        }  # fmt: skip
        return web.json_response(plain)


class EveryServer(LoopbackServer):
    """Chat completions where OpenAI has them, and where Azure has a deployment's."""

    def routes(self, app: web.Application) -> None:
        super().routes(app)
        app.router.add_post("/openai/deployments/{name}/chat/completions", self._deployed)

    async def _deployed(self, request: web.Request) -> web.Response:
        if not request.query.get("api-version") or "api-key" not in request.headers:
            return web.json_response({"error": {"message": "no api-version"}}, status=404)
        return await self._chat(request)
