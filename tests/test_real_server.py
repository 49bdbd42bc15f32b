"""llama.cpp's own server with SmolLM2: what a loopback server cannot show."""

import importlib.util
import json
import math
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl

from srt_cli.evaluation.judging import LETTER_LOGPROBS
from srt_cli.models import ModelOptions, Request, open_model
from srt_cli.records import Prompt
from srt_cli.templates import LETTER_REQUIREMENTS, judge_messages

pytestmark = [
    pytest.mark.smollm2,
    pytest.mark.skipif(
        importlib.util.find_spec("xllamacpp") is None, reason="needs the package xllamacpp"
    ),
]

SERVE = """
import sys, time, xllamacpp
parameters = xllamacpp.CommonParams()
parameters.model.path, parameters.port = sys.argv[1], int(sys.argv[2])
parameters.n_parallel, parameters.n_ctx = int(sys.argv[3]), int(sys.argv[4])
parameters.cpuparams.n_threads, parameters.warmup = 1, False
parameters.endpoint_metrics = True
server = xllamacpp.Server(parameters)
time.sleep(600)
"""
CRITIC = """
def critique(prompt, response):
    return {"weaknesses": "Thin.", "suggestions": "More.", "score": 6}, response + " And more."
"""


class RealServer:
    """A server in a process of its own, which can be killed and started again at its port."""

    def __init__(self, weights: Path, slots: int = 2, context: int = 4096) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self.line = [sys.executable, "-c", SERVE, str(weights), str(self.port)]
        self.line += [str(slots), str(context)]
        self.start()

    @property
    def spec(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1#smollm2"

    def start(self, *, wait: bool = True) -> None:
        self.process = subprocess.Popen(
            self.line, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        deadline = time.monotonic() + 60
        while wait and time.monotonic() < deadline:
            try:
                with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/health", timeout=2):
                    return
            except OSError:
                time.sleep(0.1)

    def ask(self, prompt: str, tokens: int) -> None:
        """One request, to see how long it takes."""
        body = {"messages": [{"role": "user", "content": prompt}], "max_tokens": tokens}
        address = f"http://127.0.0.1:{self.port}/v1/chat/completions"
        kind = {"content-type": "application/json"}
        asked = urllib.request.Request(address, json.dumps(body).encode(), kind)
        with urllib.request.urlopen(asked, timeout=120) as reply:
            reply.read()

    def tokens_computed(self) -> int:
        """Steps of the model, each of which gave a token; with one slot, each token was one."""
        with urllib.request.urlopen(f"http://127.0.0.1:{self.port}/metrics", timeout=5) as reply:
            told = reply.read().decode()
        (steps,) = re.findall(r"^llamacpp:n_decode_total (\d+)", told, re.MULTILINE)
        return int(steps)

    def kill(self) -> None:
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()


@pytest.fixture
def real(smollm2_gguf):
    servers = []

    def start(weights=smollm2_gguf, **options):
        servers.append(RealServer(weights, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.kill()


def _rows(folder, count):
    (folder / "critic.py").write_text(CRITIC)
    rows = [{"id": str(n), "prompt": f"Name {n + 2} fruits."} for n in range(count)]
    write_jsonl(folder / "prompts.jsonl", rows)


def test_one_slot_and_a_short_timeout_lose_no_row(srt, real, tmp_path):
    server = real(slots=1)
    _rows(tmp_path, 80)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    # Eight replies' time, however busy the machine is: sixteen at once stand in a queue for longer.
    began = time.monotonic()
    for _ in range(8):
        server.ask("Name a fruit.", 8)
    result = srt(*line, "--max-new-tokens", 8, "--timeout", time.monotonic() - began)
    assert result.code == 0, result.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["id"] for row in rows if row["status"] != "failed"] == [str(n) for n in range(80)]
    drafts = [
        reply["usage"]["completion_tokens"]
        for reply in read_jsonl(tmp_path / "feedback.journal.jsonl")
        if reply["call"].endswith("response")
    ]
    # A pause of the whole machine, too, lets replies go to waste that were all but there.
    assert sum(drafts) + 64 >= 0.75 * server.tokens_computed()


def test_a_server_that_is_killed_and_starts_again_costs_no_row(srt, real, tmp_path):
    server = real()
    _rows(tmp_path, 30)

    def restart():
        journal = tmp_path / "feedback.journal.jsonl"
        while not journal.exists() or journal.read_bytes().count(b"\n") < 8:
            time.sleep(0.05)
        server.kill()
        time.sleep(3)
        server.start(wait=False)

    thread = threading.Thread(target=restart)
    thread.start()
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    result = srt(*line, "--max-new-tokens", 12)
    thread.join()
    statuses = {row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")}
    assert (result.code, "failed" in statuses) == (0, False), result.stderr
    assert "waiting, at most 600 s" in result.stderr


# So small a model writes no critique by itself. What it would have written stands in the
# log-probabilities all the same: the server tells them as they are before the grammar.
GRAMMAR = {
    "grammar": 'root ::= "Weaknesses: Short.\nSuggestions: Say more.\nOverall Score: [[" [1-9] "]]\n\n'
    '### Improved Response\n" [a-z ]{6,12}'
}


def test_self_critique_keeps_expected_scores(srt, real, tmp_path):
    server = real()
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Name a fruit."}])
    (tmp_path / "grammar.json").write_text(json.dumps(GRAMMAR))
    critic = ("--critic", server.spec, "--critic-for", "everything")
    line = ("self-critique", "--model", server.spec, *critic, "--max-new-tokens", 8)
    finished = srt(*line, "--critic-extra-body", "grammar.json")
    assert finished.code == 0, finished.stderr
    (row,) = read_jsonl(tmp_path / "self-feedback.jsonl")
    assert row["status"] == "ok"
    critique = read_jsonl(tmp_path / "self-feedback.journal.jsonl")[1]
    place, behind = critique["logprobs"]
    assert place["token"] == f"{row['feedback']['score']:g}"
    shares = {token: math.exp(p) for token, p in place["top"].items() if token in "123456789"}
    others = math.exp(behind["top"].get("0", -99)) / sum(map(math.exp, behind["top"].values()))
    if place["token"] == "1":  # else nobody knows what a 1 would have been the beginning of
        ten = shares["1"] * others
        mean = sum(int(token) * share for token, share in shares.items()) + 9 * ten
        assert row["feedback"]["score_mean"] == pytest.approx(mean / sum(shares.values()))


@pytest.fixture(scope="session")
def plain_gguf(smollm2_gguf, cache):
    """The weights as the model in process has them: the server computes with what is in the file."""
    import numpy
    from gguf import GGUFReader, GGUFValueType, GGUFWriter, dequantize

    path = cache / "smollm2-f16.gguf"
    reader, writer = GGUFReader(smollm2_gguf), GGUFWriter(path, "llama")
    for field in reader.fields.values():
        if field.name.startswith(("GGUF.", "general.architecture", "general.file_type")):
            continue
        kind = field.types[0]
        inner = field.types[-1] if kind == GGUFValueType.ARRAY else None
        writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    for tensor in reader.tensors:
        values = dequantize(tensor.data, tensor.tensor_type)
        plain = numpy.float32 if values.ndim == 1 else numpy.float16
        writer.add_tensor(tensor.name, values.astype(plain))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


@pytest.mark.timeout(900)  # weights are converted twice before it begins
def test_weighted_verdicts_are_the_odds_of_the_model_in_process(
    srt, real, tmp_path, plain_gguf, smollm2
):
    server = real(weights=plain_gguf)
    prompts = [{"id": str(n), "prompt": f"Name {n + 2} fruits."} for n in range(2)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    texts = {"mine": "an apple and a pear", "base": "7"}
    for name, text in texts.items():
        write_jsonl(
            tmp_path / f"{name}.jsonl", [{"id": str(n), "response": text} for n in range(2)]
        )
    line = ("eval", "--model", "mine.jsonl", "--reference", "base.jsonl", "--judge", server.spec)
    finished = srt(*line, "--verdicts", "weighted", "--min-coverage", 0)
    assert finished.code == 0, finished.stderr
    (shares,) = json.loads((tmp_path / "eval.run.json").read_text())["tallies"][
        "letter_shares"
    ].values()
    judged = read_jsonl(tmp_path / "judgments.jsonl")
    assert shares["verdicts"] == len(judged) == 4
    assert sum(row["status"] == "unparsed" for row in judged) == shares["below_half"]

    asked = [
        Request(
            tuple(judge_messages(Prompt(**prompt), *pair, LETTER_REQUIREMENTS)),
            max_tokens=1, top_logprobs=LETTER_LOGPROBS,
        )
        for prompt in prompts
        for pair in ((texts["mine"], texts["base"]), (texts["base"], texts["mine"]))
    ]  # fmt: skip
    model = open_model(str(smollm2), ModelOptions(logprobs=True))
    here = [future.result(300).logprobs[0].top for future in model.submit(asked)]
    model.close()
    journal = read_jsonl(tmp_path / "eval.journal.jsonl")
    told = {reply["call"]: reply["logprobs"][0]["top"] for reply in journal}
    there = [told[f"{n} verdict {order}, by a letter"] for n in range(2) for order in ("ab", "ba")]
    likeliest = [max(top, key=top.__getitem__) for top in here]
    gaps = [
        abs(mine[token] - other.get(token, -99))
        for mine, other, token in zip(here, there, likeliest, strict=True)
    ]
    assert max(gaps) < 0.3, gaps


def test_a_context_that_is_full_is_told_from_a_token_limit(srt, real, tmp_path):
    server = real(slots=1, context=512)
    (tmp_path / "critic.py").write_text(CRITIC)
    words = {"fits": 430, "too long": 700}
    rows = [{"id": name, "prompt": "Repeat: " + "moss " * count} for name, count in words.items()]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    # It goes on to the end of what there is room for.
    finished = srt(*line, "--max-new-tokens", 200, "--extra-body", '{"ignore_eos": true}')
    assert finished.code == 3, finished.stderr
    fits, too_long = read_jsonl(tmp_path / "feedback.jsonl")
    assert fits["status"] == "truncated"
    assert "the server's context is full: 512 tokens" in fits["reason"]
    assert too_long["status"] == "failed"
    assert "the server refuses the request" in too_long["reason"]
    assert len(read_jsonl(tmp_path / "feedback.journal.jsonl")) == 1
