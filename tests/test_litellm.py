"""LiteLLM's proxy in front of llama.cpp's server: `make test-servers`, which installs it."""

import os
import re
import socket
import subprocess
import time
import urllib.error
import urllib.request

import pytest
from conftest import read_jsonl, write_jsonl
from test_real_server import CRITIC, RealServer

PROXY = os.environ.get("LITELLM")
pytestmark = pytest.mark.skipif(PROXY is None, reason="needs LiteLLM: make test-servers")
KEY = "sk-of-the-proxy-1234"
CONFIG = """
model_list:
  - model_name: small
    litellm_params:
      model: openai/smollm2
      api_base: {url}
      api_key: none
      input_cost_per_token: 0.001
      output_cost_per_token: 0.002
litellm_settings: {{num_retries: 0}}
general_settings: {{master_key: {key}}}
"""
LINE = ("collect-feedback", "--critic", "python:critic.py:critique", "--max-new-tokens", 8)


@pytest.fixture(scope="module")
def proxy(smollm2_gguf, tmp_path_factory):
    server = RealServer(smollm2_gguf)
    folder = tmp_path_factory.mktemp("proxy")
    config = CONFIG.format(url=server.spec.partition("#")[0], key=KEY)
    (folder / "config.yaml").write_text(config)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with open(folder / "log.txt", "w") as log:
        process = subprocess.Popen(
            [str(PROXY), "--config", "config.yaml", "--host", "127.0.0.1", "--port", str(port)],
            cwd=folder, env=os.environ | {"LITELLM_LOCAL_MODEL_COST_MAP": "True"},
            stdout=log, stderr=log,
        )  # fmt: skip
    deadline = time.monotonic() + 240
    while True:
        try:
            address = f"http://127.0.0.1:{port}"
            urllib.request.urlopen(f"{address}/health/liveliness", timeout=5).read()
            break
        except urllib.error.HTTPError:
            break
        except OSError:
            said = (folder / "log.txt").read_text()[-2000:]
            assert process.poll() is None, said
            assert time.monotonic() < deadline, said
            time.sleep(0.5)
    yield f"127.0.0.1:{port}"
    process.kill()
    process.wait()
    server.kill()


@pytest.fixture
def collect(srt, proxy, tmp_path, monkeypatch):
    (tmp_path / "critic.py").write_text(CRITIC)
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"Name {n + 2} fruits."} for n in range(3)]
    )

    def run(name, key):
        monkeypatch.setenv("PROXY_KEY", key)
        address = f"http://{proxy}/v1#{name}"
        return srt(*LINE, "--model", address, "--api-key", f"{proxy}=PROXY_KEY")

    return run


def test_what_the_proxy_says_a_reply_cost_counts(collect, tmp_path):
    finished = collect("small", KEY)
    assert finished.code == 0, finished.stderr
    usages = [
        reply["usage"]
        for reply in read_jsonl(tmp_path / "feedback.journal.jsonl")
        if reply["call"].endswith("response")
    ]
    assert len(usages) == 3
    dollars = sum(0.001 * u["prompt_tokens"] + 0.002 * u["completion_tokens"] for u in usages)
    (told,) = re.findall(r"cost: \$([0-9.]+)", finished.stderr)
    assert float(told) == pytest.approx(dollars, abs=1e-4)


def test_a_wrong_key_ends_the_run_at_once(collect, tmp_path):
    finished = collect("small", "sk-of-nobody-5678")
    assert finished.code == 5, finished.stderr
    assert "the key is refused" in finished.stderr
    assert "sk-of-nobody-5678" not in finished.stderr
    assert read_jsonl(tmp_path / "feedback.jsonl") == []


def test_a_wrong_model_ends_the_run_and_says_which_there_are(collect, tmp_path):
    finished = collect("large", KEY)
    assert finished.code == 1, finished.stderr
    assert "does not know the model 'large'" in finished.stderr
    assert "It offers: small" in finished.stderr
    assert read_jsonl(tmp_path / "feedback.jsonl") == []
