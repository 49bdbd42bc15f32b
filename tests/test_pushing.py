"""--push-to-hub against a hub that is no hub: a server on this machine that takes what is sent."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import write_jsonl
from test_sft import feedback_rows

TOKEN = "hf_secretsecretsecret"


class Hub(ThreadingHTTPServer):
    """Creates any repository and takes any commit; says no to writing where `refuses` is set."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Answer)
        self.seen, self.files, self.refuses = [], {}, False
        self.url = f"http://127.0.0.1:{self.server_port}"


class Answer(BaseHTTPRequestHandler):
    def do_POST(self):
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.server.seen.append((self.path, self.headers["Authorization"], body))
        if self.server.refuses:
            self.answer({"error": "You don't have the rights"}, 403)
        elif self.path == "/api/repos/create":
            self.answer({"url": f"{self.server.url}/me/tiny", "name": "me/tiny", "id": "me/tiny"})
        elif "/preupload/" in self.path:
            files = json.loads(body)["files"]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer({"files": [{"path": file["path"], **told} for file in files]})
        elif "/commit/" in self.path:
            for line in body.splitlines():
                sent = json.loads(line)
                if sent["key"] == "file":
                    content = base64.b64decode(sent["value"]["content"])
                    self.server.files[sent["value"]["path"]] = content
            url = f"{self.server.url}/me/tiny/commit/1"
            self.answer({"success": True, "commitUrl": url, "commitOid": "1" * 40})
        else:
            self.answer({})

    def do_GET(self):
        self.answer({"error": "not found"}, 404)

    def answer(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


@pytest.fixture
def hub():
    server = Hub()
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


def test_a_finished_model_is_uploaded_for_its_owners_eyes_only(hub, srt, tmp_path, tiny_model):
    failed = feedback_rows(1, id="failed", status="failed")
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4) + failed)
    line = ["sft", "--model", str(tiny_model), "--epochs", "1", "--critic-check", "0",
            "--samples", "1"]  # fmt: skip
    assert srt(*line).code == 0
    out = tmp_path / "models/sft"

    def push(*extra):
        environment = os.environ | {
            "HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN,
            "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(tmp_path / "home"), "COLUMNS": "200",
        }  # fmt: skip
        return subprocess.run(
            [sys.executable, "-m", "srt_cli", *line, "--push-to-hub", "me/tiny", *extra],
            cwd=tmp_path, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip

    done = push()
    assert done.returncode == 0, done.stderr
    assert f"uploaded to {hub.url}/me/tiny" in done.stderr
    (path, authorization, body) = hub.seen[0]
    assert path == "/api/repos/create"
    assert authorization == f"Bearer {TOKEN}"
    asked = json.loads(body)
    assert asked.get("private") is True or asked.get("visibility") == "private"
    kept = {"model.safetensors", "config.json", "tokenizer.json", "README.md", "run.json"}
    assert kept <= set(hub.files)
    assert hub.files["model.safetensors"] == (out / "model.safetensors").read_bytes()
    assert not [name for name in hub.files if "journal" in name or "checkpoints" in name]
    rows_of_the_data = {"sft.dropped.jsonl", "samples.jsonl", "training.html"}
    assert rows_of_the_data <= {path.name for path in out.iterdir()}
    assert rows_of_the_data.isdisjoint(hub.files)

    hub.refuses = True
    refused = push("--hub-public")
    assert refused.returncode == 1
    assert "not uploaded to me/tiny: the hub answers 403. Does the token" in refused.stderr
    asked = json.loads(hub.seen[-1][2])
    assert asked.get("private") is False or asked.get("visibility") == "public"
    # The token is nowhere on disk or screen.
    for text in (done.stdout, done.stderr, refused.stdout, refused.stderr):
        assert TOKEN not in text
    written = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert not [path for path in written if TOKEN.encode() in path.read_bytes()]
