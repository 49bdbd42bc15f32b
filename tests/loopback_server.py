"""A chat server on loopback that answers as a test tells it to, and logs every request."""

import asyncio
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web

CRITIQUE = (
    "Weaknesses: It is dull.\nSuggestions: Add spirit.\nOverall Score: [[{score}]]\n\n"
    "### Improved Response\nIt is grand!"
)


@dataclass
class Answer:
    """What one request gets: a status, a body, headers, after a delay."""

    text: str = "It is so."
    status: int = 200
    finish_reason: str = "stop"
    error: dict[str, Any] | None = None
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    refusal: str | None = None
    completion_tokens: int = 7
    top_logprobs: dict[str, float] | None = None
    logprobs: dict[str, Any] | None = None
    """Of every token, as the API spells them; `top_logprobs` is short for one token's."""
    usage: Any = "told"
    """What stands as `usage`, if not the usual; None leaves it out."""


Behaviour = Callable[[dict[str, Any], int], Answer]


def as_policy_and_critic(body: dict[str, Any], number: int) -> Answer:
    """A draft for a plain prompt, a critique in the paper's form for a critic's prompt."""
    content = body["messages"][-1]["content"]
    if "### Requirements" not in content:
        return Answer(text=f"Answer to {content}")
    text = CRITIQUE.format(score=9 if "It is grand!" in content else 4)
    for stop in body.get("stop") or []:
        text = text.split(stop)[0]
    return Answer(text=text)


class LoopbackServer:
    """Runs in a thread of its own; `requests` and `headers` hold every chat request, in order."""

    def __init__(
        self, behaviour: Behaviour, models: tuple[str, ...] = ("tester",), port: int = 0
    ) -> None:
        self.behaviour = behaviour
        self.port = port
        self.models = models
        self.requests: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.times: list[float] = []
        self.most_at_once = 0
        self._at_once = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), daemon=True)
        self._thread.start()
        assert self._ready.wait(10)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    @property
    def spec(self) -> str:
        return f"{self.url}#tester"

    def close(self) -> None:
        if not self._thread.is_alive():
            return
        self._loop.call_soon_threadsafe(self._stop.set)
        self._thread.join(10)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._stop = asyncio.Event()
        app = web.Application(client_max_size=1 << 26)
        self.routes(app)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        site = web.TCPSite(runner, "127.0.0.1", self.port)
        await site.start()
        self.port = runner.addresses[0][1]
        self._ready.set()
        await self._stop.wait()
        await runner.cleanup()

    def routes(self, app: web.Application) -> None:
        """What the server serves."""
        app.router.add_post("/v1/chat/completions", self._chat)
        app.router.add_get("/v1/models", self._list)

    async def _list(self, request: web.Request) -> web.Response:
        rows = [
            {"id": name, "object": "model", "created": 0, "owned_by": "t"} for name in self.models
        ]
        return web.json_response({"object": "list", "data": rows})

    async def _chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.requests.append(body)
        self.headers.append({name.lower(): value for name, value in request.headers.items()})
        self.times.append(time.monotonic())
        number = len(self.requests)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            answer = self.behaviour(body, number)
            if answer.delay_s:
                await asyncio.sleep(answer.delay_s)
        finally:
            self._at_once -= 1
        return _response(answer)


def _response(answer: Answer) -> web.Response:
    if answer.body is not None:
        return web.Response(body=answer.body, status=answer.status, headers=answer.headers)
    if answer.error is not None:
        return web.json_response(
            {"error": answer.error}, status=answer.status, headers=answer.headers
        )
    return web.json_response(response_body(answer), headers=answer.headers)


def response_body(answer: Answer) -> dict[str, Any]:
    """An answer as a chat completion."""
    message = {"role": "assistant", "content": answer.text, "refusal": answer.refusal}
    choice = {"index": 0, "finish_reason": answer.finish_reason, "message": message}
    if answer.top_logprobs is not None:
        top = [{"token": t, "logprob": p, "bytes": None} for t, p in answer.top_logprobs.items()]
        choice["logprobs"] = {"content": [{**top[0], "top_logprobs": top}]}
    if answer.logprobs is not None:
        choice["logprobs"] = answer.logprobs
    usage = {
        "prompt_tokens": 11,
        "completion_tokens": answer.completion_tokens,
        "total_tokens": 11 + answer.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": 5},
    }
    if answer.usage != "told":
        usage = answer.usage
    plain = {"id": "x", "object": "chat.completion", "created": 0, "model": "tester"}
    return plain | {"choices": [choice]} | ({"usage": usage} if usage is not None else {})
