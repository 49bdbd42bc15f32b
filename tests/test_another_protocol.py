"""A provider with another protocol costs two files: its dialect, and its table in providers.toml."""

from pathlib import Path

from aiohttp import web
from conftest import read_jsonl, write_jsonl
from loopback_server import LoopbackServer, as_policy_and_critic

import srt_cli.models.api

FOLDER = Path(__file__).parent / "another_protocol"


class OllamaServer(LoopbackServer):
    """Answers `/api/chat` in Ollama's form."""

    def routes(self, app):
        app.router.add_post("/api/chat", self._native)

    async def _native(self, request):
        body = await request.json()
        self.requests.append(body)
        asked = {"messages": body["messages"], **body["options"]}
        answer = self.behaviour(asked, len(self.requests))
        message = {"role": "assistant", "content": answer.text, "thinking": "Hm."}
        told = {"message": message, "done": True, "done_reason": "stop"}
        return web.json_response(told | {"prompt_eval_count": 11, "eval_count": 7})


def test_two_files_are_all_that_another_protocol_takes(srt, tmp_path, monkeypatch):
    assert sorted(path.name for path in FOLDER.rglob("*") if path.is_file()) == [
        "ollama_native.py",
        "providers.toml",
    ]
    server = OllamaServer(as_policy_and_critic)
    folders = [*srt_cli.models.api.__path__, str(FOLDER)]
    monkeypatch.setattr(srt_cli.models.api, "__path__", folders)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(FOLDER))
    monkeypatch.setenv("NATIVE_HOST", server.url.removesuffix("/v1"))
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"q{n}"} for n in range(4)])
    line = ("collect-feedback", "--model", "native:tester", "--critic", "native:tester")
    finished = srt(*line)
    server.close()
    assert finished.code == 0, finished.stderr
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")] == ["ok"] * 4
    assert server.requests[0]["options"] == {"num_predict": 512, "temperature": 0.7, "seed": 42}
    assert "tokens: 132 read, 84 written" in finished.stderr
    journal = read_jsonl(tmp_path / "feedback.journal.jsonl")
    assert {entry["thoughts"] for entry in journal} == {"Hm."}
