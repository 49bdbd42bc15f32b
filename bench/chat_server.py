"""A chat server for measuring clients: fast, its faults decided by a hash, every request logged.

Runs in a process of its own, so that the client under test has its core to itself:

    python bench/chat_server.py --latency 0.05 --fault 429:0.05 --log requests.jsonl

It prints its port on the first line. `GET /v1/stats` gives the counts that a benchmark reports;
nothing is taken from the client's own word. The HTTP spoken here is the little that clients send:
one request after the other on a kept connection, with a Content-Length.
"""

import argparse
import asyncio
import hashlib
import json
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TextIO

HUNG_S: Final = 3600.0
CRITIQUE: Final = (
    "Weaknesses: It is dull.\nSuggestions: Add spirit.\nOverall Score: [[{score}]]\n\n"
    "### Improved Response\nIt is grand!"
)
REASONS: Final = {
    200: "OK",
    400: "Bad Request",
    404: "Not Found",
    429: "Too Many Requests",
    500: "Server Error",
}


def share_of(text: str, salt: str) -> float:
    """A number in [0, 1) that a request keeps for ever: what decides its latency and its faults."""
    digest = hashlib.blake2b(f"{salt}|{text}".encode(), digest_size=7).digest()
    return int.from_bytes(digest) / (1 << 56)


@dataclass
class Behaviour:
    """What the server does to requests, as the command line says."""

    latency_s: float = 0.05
    jitter: float = 0.0
    """Latency varies by up to this share, by the request's hash."""
    faults: dict[str, float] = field(default_factory=dict)
    """Share of requests that meet a fault at first sight: 429, 500, hang, malformed, truncated."""
    retry_after_s: float | None = 1.0
    admit_per_s: float | None = None
    """A token bucket: what comes faster gets a 429."""
    quota: int | None = None
    """Answers given before the account is empty."""
    completion_tokens: tuple[int, int] = (7, 7)
    rate_headers: bool = False


@dataclass
class Server:
    """Counts and answers; one instance a process."""

    behaviour: Behaviour
    log: TextIO | None = None
    counts: Counter[str] = field(default_factory=Counter)
    seen: Counter[str] = field(default_factory=Counter)
    in_flight: int = 0
    _tokens: float = 0.0
    _filled_at: float = field(default_factory=time.monotonic)
    _first_at: float | None = None
    _last_at: float = 0.0

    async def answer(self, body: bytes) -> tuple[int, bytes, str]:
        """Status, body and further headers for one chat request."""
        now = time.monotonic()
        self._first_at = self._first_at or now
        self.counts["requests"] += 1
        text = body.decode()
        name = hashlib.blake2b(body, digest_size=8).hexdigest()
        self.seen[name] += 1
        self.in_flight += 1
        self.counts["most_in_flight"] = max(self.counts["most_in_flight"], self.in_flight)
        try:
            status, reply, headers = await self._decide(text, name)
        finally:
            self.in_flight -= 1
            self._last_at = time.monotonic()
        self.counts[str(status)] += 1
        if self.log is not None:
            self.log.write(json.dumps({"at": now, "request": name, "status": status}) + "\n")
            self.log.flush()
        return status, reply, headers

    async def _decide(self, text: str, name: str) -> tuple[int, bytes, str]:
        plan = self.behaviour
        body = json.loads(text)
        if not body["messages"]:  # so curator asks for the limits
            return refusal(400, "invalid_request_error", None)
        if not self._admits():
            return refusal(429, "rate_limit_exceeded", plan.retry_after_s)
        if plan.quota is not None and self.counts["granted"] >= plan.quota:
            return refusal(429, "insufficient_quota", None)
        self.counts["granted"] += 1
        await asyncio.sleep(plan.latency_s * (1 + plan.jitter * (2 * share_of(name, "l") - 1)))
        for fault, share in plan.faults.items():
            if self.seen[name] > 1 or share_of(name, fault) >= share:
                continue
            self.counts[f"fault_{fault}"] += 1
            if fault == "429":
                return refusal(429, "rate_limit_exceeded", plan.retry_after_s)
            if fault == "500":
                return refusal(500, "server_error", None)
            if fault == "hang":
                await asyncio.sleep(HUNG_S)
            if fault == "malformed":
                return 200, b'{"id": "x", "choi', ""
            if fault == "truncated":
                return 200, completion(body, name, plan, finish="length"), ""
        headers = "x-ratelimit-limit-requests: 60000\r\n" if plan.rate_headers else ""
        return 200, completion(body, name, plan), headers

    def _admits(self) -> bool:
        rate = self.behaviour.admit_per_s
        if rate is None:
            return True
        now = time.monotonic()
        # A tenth of a second's worth may burst: limits are enforced over short windows.
        self._tokens = min(max(1.0, rate / 10), self._tokens + (now - self._filled_at) * rate)
        self._filled_at = now
        if self._tokens < 1:
            return False
        self._tokens -= 1
        return True

    def stats(self) -> bytes:
        """Counts so far: requests, by status, different ones, most at once, seconds of work."""
        span = self._last_at - self._first_at if self._first_at is not None else 0.0
        repeated = sum(count - 1 for count in self.seen.values())
        return json.dumps(
            {**self.counts, "different": len(self.seen), "repeated": repeated, "seconds": span}
        ).encode()


def refusal(status: int, code: str, retry_after_s: float | None) -> tuple[int, bytes, str]:
    """An error as OpenAI's API words it."""
    error = {"message": code.replace("_", " "), "type": code, "code": code}
    headers = f"retry-after: {retry_after_s:g}\r\n" if retry_after_s is not None else ""
    return status, json.dumps({"error": error}).encode(), headers


def completion(body: dict[str, Any], name: str, plan: Behaviour, finish: str = "stop") -> bytes:
    """A draft for a plain prompt, a critique for a critic's prompt, stopped where asked."""
    content = body["messages"][-1]["content"]
    if "### Requirements" in content:
        text = CRITIQUE.format(score=9 if "It is grand!" in content else 4)
        for stop in body.get("stop") or []:
            text = text.split(stop)[0]
    else:
        text = f"Answer {name} to {content[:40]}"
    least, most = plan.completion_tokens
    written = least + int(share_of(name, "tokens") * (most - least + 1))
    written = min(written, body.get("max_tokens") or body.get("max_completion_tokens") or written)
    read = sum(len(turn["content"]) for turn in body["messages"]) // 4
    if finish == "length":
        text = text[: len(text) // 3]
    message = {"role": "assistant", "content": text, "refusal": None}
    choice = {"index": 0, "finish_reason": finish, "message": message}
    usage = {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
    plain = {"id": name, "object": "chat.completion", "created": 0, "model": body["model"]}
    return json.dumps(plain | {"choices": [choice], "usage": usage}).encode()


class Connection(asyncio.Protocol):
    """Enough of HTTP/1.1 for clients that are being measured."""

    def __init__(self, server: Server) -> None:
        self.server = server
        self.buffer = b""
        self.transport: asyncio.Transport | None = None
        self.work: asyncio.Task[None] | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport = transport

    def connection_lost(self, error: Exception | None) -> None:
        if self.work is not None:
            self.work.cancel()

    def data_received(self, data: bytes) -> None:
        self.buffer += data
        head, blank, rest = self.buffer.partition(b"\r\n\r\n")
        if not blank:
            return
        length = 0
        for line in head.split(b"\r\n")[1:]:
            name, _, value = line.partition(b":")
            if name.lower() == b"content-length":
                length = int(value)
        if len(rest) < length:
            return
        self.buffer = rest[length:]
        target = head.split(b" ", 2)[1]
        self.work = asyncio.get_running_loop().create_task(self.respond(target, rest[:length]))

    async def respond(self, target: bytes, body: bytes) -> None:
        if target.endswith(b"/chat/completions"):
            status, reply, headers = await self.server.answer(body)
        elif target.endswith(b"/stats"):
            status, reply, headers = 200, self.server.stats(), ""
        else:
            status, reply, headers = 404, b"{}", ""
        if self.transport is not None and not self.transport.is_closing():
            self.transport.write(
                f"HTTP/1.1 {status} {REASONS[status]}\r\ncontent-type: application/json\r\n"
                f"content-length: {len(reply)}\r\n{headers}\r\n".encode()
                + reply
            )


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--latency", type=float, default=0.05, help="seconds")
    parser.add_argument("--jitter", type=float, default=0.0, help="share of the latency")
    parser.add_argument("--fault", action="append", default=[], help="KIND:SHARE, several allowed")
    parser.add_argument(
        "--retry-after", type=float, default=1.0, help="seconds; below 0: no header"
    )
    parser.add_argument("--admit", type=float, help="requests a second; what exceeds it gets a 429")
    parser.add_argument("--quota", type=int, help="answers before the account is empty")
    parser.add_argument("--completion-tokens", default="7-7", help="LEAST-MOST a reply")
    parser.add_argument("--log", type=Path, help="one line a request")
    return parser.parse_args()


async def serve() -> None:
    asked = options()
    faults = {kind: float(share) for kind, _, share in (f.partition(":") for f in asked.fault)}
    least, _, most = asked.completion_tokens.partition("-")
    behaviour = Behaviour(
        latency_s=asked.latency, jitter=asked.jitter, faults=faults,
        retry_after_s=asked.retry_after if asked.retry_after >= 0 else None,
        admit_per_s=asked.admit, quota=asked.quota,
        completion_tokens=(int(least), int(most)),
    )  # fmt: skip
    server = Server(behaviour, open(asked.log, "a") if asked.log else None)  # noqa: SIM115
    listening = await asyncio.get_running_loop().create_server(
        lambda: Connection(server), "127.0.0.1", 0, backlog=2048
    )
    print(listening.sockets[0].getsockname()[1], flush=True)
    await listening.serve_forever()


if __name__ == "__main__":
    asyncio.run(serve())
