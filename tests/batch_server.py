"""The Batch API on loopback: files and batches over the answers of an ordinary loopback server."""

import json
from collections.abc import Callable
from typing import Any

from aiohttp import web
from loopback_server import Answer, Behaviour, LoopbackServer, response_body

Fate = Callable[[str, int], str]


class BatchServer(LoopbackServer):
    """Completes a batch after `looks` looks at it; `fate` may let requests expire or break."""

    def __init__(self, behaviour: Behaviour, *, looks: int = 2, fate: Fate | None = None) -> None:
        self.files: dict[str, bytes] = {}
        self.batches: dict[str, dict[str, Any]] = {}
        self.asked: list[str] = []
        self.told: list[dict[str, str]] = []
        """The headers of every request, in small letters."""
        self.lose_answers = 0
        """To so many new batches, which are taken all the same."""
        self.looks = looks
        self.fate = fate or (lambda identifier, times: "ok")
        super().__init__(behaviour)

    def routes(self, app: web.Application) -> None:
        super().routes(app)

        @web.middleware
        async def note(
            request: web.Request, handler: Callable[[web.Request], Any]
        ) -> web.StreamResponse:
            self.told.append({name.lower(): value for name, value in request.headers.items()})
            answered: web.StreamResponse = await handler(request)
            return answered

        app.middlewares.append(note)
        app.router.add_post("/v1/files", self._upload)
        app.router.add_get("/v1/files/{id}/content", self._content)
        app.router.add_post("/v1/batches", self._create)
        app.router.add_get("/v1/batches", self._all)
        app.router.add_get("/v1/batches/{id}", self._look)

    async def _upload(self, request: web.Request) -> web.Response:
        form = await request.post()
        content = form["file"].file.read()
        name = f"file-{len(self.files)}"
        self.files[name] = content
        plain = {"id": name, "object": "file", "bytes": len(content), "created_at": 0}
        return web.json_response(
            plain | {"filename": "srt.jsonl", "purpose": "batch", "status": "processed"}
        )

    async def _content(self, request: web.Request) -> web.Response:
        content = self.files.get(request.match_info["id"])
        if content is None:
            return web.json_response({"error": {"message": "No such File object"}}, status=404)
        return web.Response(body=content)

    async def _create(self, request: web.Request) -> web.Response:
        body = await request.json()
        name = f"batch_{len(self.batches)}"
        self.batches[name] = {
            "id": name, "object": "batch", "status": "in_progress", "created_at": 0, "looks": 0,
            "endpoint": body["endpoint"], "input_file_id": body["input_file_id"],
            "completion_window": body["completion_window"], "metadata": body["metadata"],
        }  # fmt: skip
        if self.lose_answers > 0:
            self.lose_answers -= 1
            return web.json_response({"error": {"message": "gateway timeout"}}, status=504)
        return web.json_response(self.batches[name])

    async def _all(self, request: web.Request) -> web.Response:
        found = list(reversed(self.batches.values()))
        return web.json_response({"object": "list", "data": found, "has_more": False})

    async def _look(self, request: web.Request) -> web.Response:
        batch = self.batches[request.match_info["id"]]
        batch["looks"] += 1
        if batch["looks"] >= self.looks and batch["status"] == "in_progress":
            self.finish(batch)
        return web.json_response(batch)

    def finish(self, batch: dict[str, Any]) -> None:
        """End a batch: every request to its fate."""
        done, broken = [], []
        for line in self.files[batch["input_file_id"]].splitlines():
            row = json.loads(line)
            name = row["custom_id"]
            self.asked.append(name)
            fate = self.fate(name, self.asked.count(name))
            if fate == "expired":
                error = {"code": "batch_expired", "message": "too late"}
                broken.append({"custom_id": name, "response": None, "error": error})
                continue
            if fate == "failed":
                response = {"status_code": 500, "body": {"error": {"message": "engine died"}}}
                broken.append({"custom_id": name, "response": response, "error": None})
                continue
            if fate == "responses":
                error = {"message": f"This model is only supported in v1/{fate}.", "code": None}
                response = {"status_code": 404, "body": {"error": error}}
                broken.append({"custom_id": name, "response": response, "error": None})
                continue
            answer: Answer = self.behaviour(row["body"], len(self.asked))
            body = response_body(answer)
            done.append({"custom_id": name, "response": {"status_code": 200, "body": body}})
        for kind, rows in (("output", reversed(done)), ("error", broken)):
            lines = "".join(json.dumps(row) + "\n" for row in rows)
            if lines:
                batch[f"{kind}_file_id"] = f"{batch['id']}-{kind}"
                self.files[f"{batch['id']}-{kind}"] = lines.encode()
        batch["status"] = "completed" if all(row["response"] for row in broken) else "expired"

    def cancel(self, name: str, done: int) -> None:
        """End a batch when so many of its requests are answered."""
        batch = self.batches[name]
        lines = self.files[batch["input_file_id"]].splitlines(keepends=True)
        self.files[batch["input_file_id"]] = b"".join(lines[:done])
        self.finish(batch)
        batch["status"] = "cancelled"
