"""What servers send that no document foresees: read or classified, and no run hangs on it."""

import asyncio
import contextlib
import http.server
import json
import re
import socket
import threading
import time

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer, as_policy_and_critic, response_body

from srt_cli.errors import QuotaError, SrtError
from srt_cli.models import (
    ModelOptions,
    Reply,
    Request,
    TokenLogprobs,
    open_model,
    reply_from_plain,
    reply_to_plain,
)
from srt_cli.models.api.dialect import Answer as Unread
from srt_cli.models.api.dialect import NoAnswer, Refused
from srt_cli.models.api.limits import AdaptiveLimit
from srt_cli.models.api.refusals import about
from srt_cli.models.api.transport import in_words
from srt_cli.records import Message, Usage
from srt_cli.runs.journal import Journal

CRITIC = """
def critique(prompt, response):
    feedback = {"weaknesses": "Thin.", "suggestions": "More.", "score": 6}
    return feedback, response + " And more."
"""


@pytest.fixture
def serve():
    servers = []

    def start(behaviour):
        servers.append(LoopbackServer(behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("srt_cli.models.api.client.FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr("srt_cli.models.api.limits.DEFAULT_PAUSE_S", 0.05)
    monkeypatch.setattr("srt_cli.models.api.client.DEFAULT_PAUSE_S", 0.05)
    monkeypatch.setattr("srt_cli.models.api.patience.PROBE_EVERY_S", 0.1)
    monkeypatch.setattr("srt_cli.models.api.client.WATCH_EVERY_S", 0.05)


def ask(server, count=1, options=None, **changes) -> list[Reply]:
    model = open_model(server.spec, ModelOptions(**(options or {})))
    wanted = [
        Request((Message(role="user", content=f"question {n}"),), max_tokens=50, **changes)
        for n in range(count)
    ]
    try:
        return [future.result(20) for future in model.submit(wanted)]
    finally:
        model.close()


def always(body, **answer):
    content = body if isinstance(body, bytes) else json.dumps(body).encode()
    return lambda request, number: Answer(body=content, **answer)


def completion(text="It is so.", **choice):
    whole = response_body(Answer(text=text))
    whole["choices"][0] |= choice
    return whole


def stream(*pieces) -> bytes:
    events = [b": OPENROUTER PROCESSING", *(b"data: " + json.dumps(p).encode() for p in pieces)]
    return b"\n\n".join([*events, b"data: [DONE]", b""])


PIECES = (
    {"choices": [{"index": 0, "delta": {"role": "assistant", "content": "It is"}}]},
    {"choices": [{"index": 0, "delta": {"content": " so."}, "finish_reason": "stop"}]},
    {"choices": [], "usage": {"prompt_tokens": 11, "completion_tokens": 7}},
)
USAGE = {"prompt_tokens": 11, "completion_tokens": 7}
NO_LOGPROB = {"token": "M", "logprob": None}
PARTS = [
    {"type": "thinking", "thinking": [{"type": "text", "text": "hm"}]},
    {"type": "text", "text": "It is so."},
]


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (completion(), 201),
        ([completion()], 200),
        (b"\n\n \r\n" + json.dumps(completion()).encode(), 200),
        (b"\xef\xbb\xbf" + json.dumps(completion()).encode(), 200),
        (stream(*PIECES), 200),
        (completion(message={"role": "assistant", "content": PARTS}), 200),
        (completion() | {"usage": [1, 2]}, 200),
        (completion() | {"usage": {"prompt_tokens": "x", "completion_tokens": -4}}, 200),
        (completion() | {"usage": USAGE | {"prompt_tokens_details": [{}]}}, 200),
        (completion(logprobs=[1, {"a": 2}]), 200),
        (completion(logprobs={"content": [None, {"token": 3, "top_logprobs": {"a": 1}}]}), 200),
        (completion(logprobs={"content": [{"token": "M", "top_logprobs": [NO_LOGPROB]}]}), 200),
        (completion() | {"error": None}, 200),
    ],
    ids=[
        "201", "a list", "white space before", "byte order mark", "a stream", "parts", "usage a list",
        "usage absurd", "details a list", "logprobs a list", "logprobs null", "logprob null",
        "error null",
    ],
)  # fmt: skip
def test_a_whole_answer_is_read_in_whatever_form(serve, body, status):
    (reply,) = ask(serve(always(body, status=status)), top_logprobs=5)
    assert (reply.text, reply.status, reply.logprobs) == ("It is so.", "ok", ())


def test_half_a_character_is_kept_as_a_sign_for_it_and_asked_for_once(serve):
    cut = json.dumps(completion("smile ?")).replace("smile ?", "smile \\ud83d").encode()
    server = serve(always(cut))
    (reply,) = ask(server)
    assert (reply.text, len(server.requests)) == ("smile \ufffd", 1)


@pytest.mark.parametrize(
    "body",
    [
        b"<html><body>Bad gateway</body></html>", b"", b"null", b"[]", b"7", b'"text"', b"{",
        b"[" * 100_000,
        {"choices": None}, {"choices": []}, {"choices": [None]}, {"choices": {"a": 1}},
        completion(message=None), completion(message=[1]), stream({"a": 1}),
    ],
)  # fmt: skip
def test_what_cannot_be_read_ends_in_a_sentence(serve, body):
    with pytest.raises(SrtError, match="not as an OpenAI-compatible server"):
        ask(serve(always(body)))


def test_what_cannot_be_read_is_shown_as_it_came_and_a_good_address_is_not_doubted(serve):
    with pytest.raises(SrtError) as stop:
        ask(serve(always({"choices": [{"message": None}]})))
    assert """('{"choices": [{"message": null}]}'...). Look at its log.""" in str(stop.value)


@pytest.mark.parametrize(
    ("word", "status"),
    [
        ("stop", "ok"), ("STOP", "ok"), ("eos_token", "ok"), ("end_turn", "ok"),
        ("length", "truncated"), ("MAX_TOKENS", "truncated"), ("max_tokens", "truncated"),
        ("content_filter", "refused"), ("SAFETY", "refused"),
        ("tool_calls", "truncated"), ("OTHER", "truncated"), (None, "truncated"), (7, "truncated"),
    ],
)  # fmt: skip
def test_only_a_word_that_is_known_to_mean_a_whole_answer_makes_one_whole(serve, word, status):
    (reply,) = ask(serve(always(completion(finish_reason=word))))
    assert reply.status == status


def test_a_critic_that_calls_a_tool_is_not_said_to_need_more_tokens(srt, serve, tmp_path):
    rows = [{"id": str(n), "prompt": "p", "response": f"r{n}"} for n in range(2)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)

    def behaviour(body, number):
        if "r0" in body["messages"][-1]["content"]:
            return Answer(text="", finish_reason="tool_calls")
        return as_policy_and_critic(body, number)

    finished = srt("collect-feedback", "--critic", serve(behaviour).spec)
    assert finished.code == 0
    assert "0: critique: cut off: the server ended it with 'tool_calls'" in finished.stderr
    assert "at the token limit" not in finished.stderr


def test_an_error_as_finish_word_is_tried_again(serve):
    died = completion("Half", finish_reason="error", error={"code": 502, "message": "died"})
    answers = [json.dumps(died).encode(), json.dumps(completion()).encode()]
    server = serve(lambda body, number: Answer(body=answers[min(number, 2) - 1]))
    (reply,) = ask(server)
    assert (reply.text, len(server.requests)) == ("It is so.", 2)


@pytest.mark.parametrize("wrap", [lambda e: {"error": e}, lambda e: [{"error": e}]])
def test_an_error_inside_a_200_obeys_its_own_code(serve, wrap):
    no_credit = {"code": 402, "message": "Insufficient credits"}
    with pytest.raises(QuotaError, match=r"no credit left \(Insufficient credits\)"):
        ask(serve(always(wrap(no_credit))))
    busy = json.dumps(wrap({"code": 429, "message": "Slow down"})).encode()
    server = serve(lambda body, number: Answer(body=busy) if number < 9 else Answer())
    assert ask(server)[0].text == "It is so."


# --- Whose trouble it is ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "error", "field"),
    [
        (400, {"message": "temperature is deprecated for this model.", "param": None}, "temperature"),
        (400, {"message": "Unsupported value: `temperature` does not support 0.7"}, "temperature"),
        (422, {"detail": [{"loc": ["body", "seed"], "msg": "Extra inputs are not permitted"}]}, "seed"),
        (400, {"message": "Argument not supported on this model: stop"}, "stop"),
        (400, {"message": "Unrecognized request argument supplied: seed", "param": None}, "seed"),
        (404, {"message": "no.", "param": "body.top_p"}, "top_p"),
        (403, {"message": "You are not allowed to request logprobs from this model"}, "logprobs"),
        (400, {"message": "Logprobs is not enabled for models/gemini"}, "top_logprobs"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("wrap", [lambda e: {"error": e}, lambda e: [{"error": e}], lambda e: e])
def test_a_refused_field_is_learnt_however_it_is_named(serve, status, error, field, wrap):
    refusal = json.dumps(wrap(error)).encode()
    server = serve(
        lambda body, number: Answer(body=refusal, status=status) if field in body else Answer()
    )
    asked = {"temperature": 0.7, "top_p": 0.9, "stop": ("END",), "top_logprobs": 5}
    replies = ask(server, 3, {"concurrency": 1}, **asked)
    assert [reply.text for reply in replies] == ["It is so."] * 3
    assert len(server.requests) == 4


@pytest.mark.parametrize(
    ("status", "error", "whose"),
    [
        (403, {"message": 'm requires moderation. Your input was flagged for "violence".'}, "filter"),
        (400, {"code": "content_filter", "message": "filtered"}, "filter"),
        (400, {"code": "data_inspection_failed", "message": "may be inappropriate"}, "filter"),
        (400, {"message": "Your request was rejected by our safety system."}, "filter"),
        (400, {"message": "This model's maximum context length is 512 tokens."}, "too long"),
        (400, {"type": "exceed_context_size_error", "message": "exceeds"}, "too long"),
        (413, {"message": "Payload too large"}, "too long"),
        (429, {"message": "Request too large for m on tokens per min (TPM)"}, "too long"),
        (401, {"message": "no"}, "account"),
        (403, {"message": "Forbidden"}, "account"),
        (402, {"message": "Insufficient Balance"}, "account"),
        (429, {"type": "exceeded_current_quota_error", "message": "suspended"}, "account"),
        (429, {"message": "Account has insufficient balance, please recharge"}, "account"),
        (400, {"message": "Your credit balance is too low to access the API."}, "account"),
        (400, {"message": "API key not valid. Please pass a valid API key."}, "account"),
        (429, {"message": "You exceeded your current quota. Please retry in 35.2s."}, "pace"),
        (429, {"message": "Rate limit exceeded: free-models-per-day. Add 10 credits"}, "pace"),
        (529, {"message": "Overloaded"}, "pace"),
        (404, {"message": "Not Found"}, "endpoint"),
        (400, {"message": "Invalid model name passed in model=foo. Call `/v1/models`"}, "endpoint"),
        (400, {"message": "The model `gpt-9` does not exist"}, "endpoint"),
        (503, {"message": "Loading model"}, "trouble"),
        (422, {"message": "messages: roles must alternate"}, "request"),
    ],
)  # fmt: skip
def test_whose_trouble_a_refusal_is(status, error, whose):
    refused = Refused(Unread(status, {}, json.dumps({"error": error}).encode()))
    assert about(refused) == whose


def test_a_filter_takes_one_row_and_for_good(srt, serve, tmp_path):
    flagged = {"message": "Your input was flagged", "code": 403}

    def behave(body, number):
        if "2" in body["messages"][-1]["content"]:
            return Answer(status=403, error=flagged)
        return Answer()

    server = serve(behave)
    _rows(tmp_path, 3)
    for told in (True, False):
        result = srt(
            "collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique"
        )
        assert (result.code, len(server.requests)) == (0, 3)
        said = re.search(r"first that is refused: \w+: response: refused .*flagged", result.stderr)
        assert (said is not None) is told
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["status"] for row in rows] == ["ok", "refused", "ok"]
    assert "flagged" in rows[1]["reason"]


def test_the_same_refusal_of_the_first_requests_ends_the_run(srt, serve, tmp_path):
    server = serve(
        lambda body, number: Answer(status=400, error={"message": f"bad proxy {number}"})
    )
    _rows(tmp_path, 200)
    result = srt(
        "collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique"
    )
    assert result.code == 1
    assert "the first 4 requests are all refused" in result.stderr
    assert len(server.requests) <= 40  # those under way besides; a busy machine has more of them


def test_no_usable_row_is_exit_3_with_the_first_reason(srt, serve, tmp_path):
    too_long = {"message": "This model's maximum context length is 512 tokens"}
    server = serve(lambda body, number: Answer(status=400, error=too_long))
    _rows(tmp_path, 3)
    for _ in range(2):
        result = srt(
            "collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique"
        )
        assert result.code == 3
        assert "no row is usable (3 failed)" in result.stderr
        assert "maximum context length is 512 tokens" in result.stderr
        assert "Once that is mended, the same line asks again." in result.stderr
        assert "next:" not in result.stdout


def test_the_reason_that_most_rows_share_is_told_and_the_line_that_asks_again(srt, serve, tmp_path):
    too_long = {"message": "This model's maximum context length is 512 tokens"}

    def behave(body, number):
        if body["max_tokens"] >= 64:
            return Answer()
        if body["messages"][-1]["content"] == "Question 1?":
            return Answer(status=400, error=too_long)
        return Answer(text="<think>Well,", finish_reason="length", delay_s=0.1)

    server = serve(behave)
    _rows(tmp_path, 3)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    first = srt(*line, "--max-new-tokens", 32)
    assert first.code == 3
    assert (
        "no row is usable (2 truncated, 1 failed). The first that is truncated: response: thought until "
        "the limit. The same line with a larger --max-new-tokens and --overwrite asks again.\n"
    ) in first.stderr
    refused = srt(*line, "--max-new-tokens", 64)
    assert (
        "--max-new-tokens was 32, now 64). Choose another --out, or replace it with --overwrite; "
        "feedback.journal.jsonl stays, and calls that ask the same are not made again.\n"
    ) in refused.stderr
    assert srt(*line, "--max-new-tokens", 64, "--overwrite").code == 0
    assert len(server.requests) == 6


def test_overwrite_asks_for_nothing_again_that_another_limit_leaves_as_it_was(srt, serve, tmp_path):
    def behave(body, number):
        answer = as_policy_and_critic(body, number)
        if body["max_tokens"] >= 64:
            return answer
        return Answer(text="<think>Well,", finish_reason="length")

    server = serve(behave)
    _rows(tmp_path, 2)
    line = ("collect-feedback", "--model", server.spec, "--critic", server.spec)
    first = srt(*line, "--critic-max-tokens", 16)
    assert first.code == 3
    assert "larger --critic-max-tokens and --overwrite asks again" in first.stderr
    drafts = [body for body in server.requests if body["max_tokens"] == 512]
    assert srt(*line, "--critic-max-tokens", 64, "--overwrite").code == 0
    assert [body for body in server.requests if body["max_tokens"] == 512] == drafts


def test_concurrency_that_changes_nothing_for_a_program_is_said(srt, serve, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    (tmp_path / "critic.py").write_text(CRITIC)
    line = ("collect-feedback", "--critic", "python:critic.py:critique")
    said = (
        "--concurrency 4: changes nothing for python:critic.py:critique, a program, which is called "
        "once at a time.\n"
    )
    assert said in srt(*line, "--concurrency", 4).stderr
    server = serve(as_policy_and_critic)
    _rows(tmp_path, 2)
    mixed = srt(*line, "--model", server.spec, "--concurrency", 4, "--out", "mixed.jsonl")
    assert (mixed.code, "--concurrency" in mixed.stderr) == (0, False)


def test_a_full_context_is_told_from_a_token_limit_and_not_asked_again(srt, serve, tmp_path):
    def behave(body, number):
        if "### Requirements" not in body["messages"][-1]["content"]:
            return Answer()
        return Answer(
            text="Weak",
            finish_reason="length",
            usage={"prompt_tokens": 400, "completion_tokens": 112},
        )

    server = serve(behave)
    _rows(tmp_path, 1)
    result = srt("collect-feedback", "--model", server.spec, "--critic", server.spec)
    assert result.code == 3
    assert "the server's context is full: 512 tokens" in result.stderr
    assert len(server.requests) == 2


# --- The journal --------------------------------------------------------------------------------


def test_the_journal_takes_only_what_can_be_read_back(tmp_path):
    odd = Reply(
        "a \ud83d", "stop", Usage(), (TokenLogprobs("M\udc00", {"M": -1.0, "m": float("-inf")}, 0),)
    )  # fmt: skip
    with Journal(tmp_path / "x.journal.jsonl") as journal:
        journal.append(b"1" * 16, "call", {"model": "m", **reply_to_plain(odd)})
        kept = reply_from_plain(journal.get(b"1" * 16))
    assert kept == Reply("a \ufffd", "stop", Usage(), (TokenLogprobs("M\ufffd", {"M": -1.0}, 0),))


@pytest.mark.parametrize(
    "change",
    [
        {"text": [{"type": "text", "text": "a"}]}, {"usage": {"prompt_tokens": "many"}}, {"usage": [1]},
        {"logprobs": [{"token": "M", "top": {"M": None}, "offset": 0}]}, {"cost": "free"},
        {"finish_reason": "whatever"}, {"text": None},
    ],
)  # fmt: skip
def test_a_journal_that_holds_what_cannot_be_read_is_read_past_it(srt, serve, tmp_path, change):
    server = serve(as_policy_and_critic)
    _rows(tmp_path, 2)
    line = ["collect-feedback", "--model", server.spec, "--critic", server.spec]
    assert srt(*line).code == 0
    calls = len(server.requests)
    journal = tmp_path / "feedback.journal.jsonl"
    entries = read_jsonl(journal)
    write_jsonl(journal, [entries[0] | change, *entries[1:]])
    (tmp_path / "feedback.jsonl").unlink()
    result = srt(*line)
    assert (result.code, len(server.requests)) == (0, calls + 1)
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")] == ["ok", "ok"]


# --- Waits --------------------------------------------------------------------------------------


def test_a_429_without_end_ends_the_run(serve, capfd, monkeypatch):
    monkeypatch.setattr("srt_cli.models.api.patience.SAY_AFTER_S", 0.2)
    server = serve(lambda body, number: Answer(status=429, error={"message": "Too many requests"}))
    with pytest.raises(
        QuotaError, match=r"nothing was admitted for 1 s \(429: Too many requests\)"
    ):
        ask(server, 3, {"give_up_after_s": 1.0})
    assert "nothing admitted for 0 s (429: Too many requests); waiting" in capfd.readouterr().err


def test_give_up_after_is_the_users(srt, serve, tmp_path):
    server = serve(lambda body, number: Answer(status=429, error={"message": "Too many requests"}))
    _rows(tmp_path, 3)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    result = srt(*line, "--give-up-after", 0.5)
    assert (result.code, "nothing was admitted for 0.5 s" in result.stderr) == (5, True)


def test_a_server_that_is_loading_is_waited_for_without_using_up_attempts(serve):
    loading = Answer(status=503, error={"code": 503, "message": "Loading model"})
    server = serve(lambda body, number: loading if number <= 12 else Answer())
    assert [reply.attempts for reply in ask(server, 5)] == [1] * 5


def test_a_server_that_never_loads_ends_the_run(serve):
    loading = Answer(status=503, error={"code": 503, "message": "Loading model"})
    with pytest.raises(SrtError, match=r"is not up after 0.5 s \(503: Loading model\)"):
        ask(serve(lambda body, number: loading), 5, {"give_up_after_s": 0.5})


@pytest.fixture
def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_a_server_that_is_started_behind_the_command_is_waited_for(srt, tmp_path, free_port, host):
    _rows(tmp_path, 3)
    spec, started = f"http://{host}:{free_port}/v1#tester", []

    def start():
        started.append(LoopbackServer(as_policy_and_critic, port=free_port))

    later = threading.Timer(0.7, start)
    later.start()
    result = srt("collect-feedback", "--model", spec, "--critic", spec)
    later.join()
    started[0].close()
    assert result.code == 0, result.stderr
    assert re.search(r"answers after \d s$", result.stderr, re.MULTILINE)
    assert (
        f"{spec}: is not up yet (connection refused); waiting, at most 600 s (--give-up-after), "
        "Ctrl-C stops\n"
    ) in result.stderr


def test_a_server_that_never_starts_ends_the_run_in_plain_words(free_port):
    spec = f"http://127.0.0.1:{free_port}/v1#tester"
    model = open_model(spec, ModelOptions(give_up_after_s=0.3))
    futures = model.submit([Request((Message(role="user", content="q"),), max_tokens=5)] * 40)
    with pytest.raises(SrtError) as stop:
        futures[-1].result(10)
    model.close()
    assert str(stop.value) == (
        f"{spec}: is not up after 0.3 s (connection refused). Check the address, start the server, "
        "and run the same line again; --give-up-after waits longer."
    )


@pytest.mark.parametrize("status", [502, 503, 504])
def test_a_proxy_without_its_server_is_waited_for_from_the_beginning(serve, status):
    down = Answer(status=status, body=b"<html>no upstream</html>")
    server = serve(lambda body, number: down if number <= 24 else Answer())
    assert [reply.attempts for reply in ask(server, 5)] == [1] * 5


def test_of_several_servers_one_that_is_not_up_costs_no_row_an_attempt(serve):
    behind = Answer(status=503, body=b"no upstream")
    dead, alive = (
        serve(lambda body, number: behind),
        serve(lambda body, number: Answer(delay_s=0.01)),
    )
    model = open_model(f"{dead.url},{alive.url}#tester", ModelOptions(concurrency=4))
    message = (Message(role="user", content="q"),)
    futures = model.submit([Request(message, max_tokens=50)] * 40)
    assert {future.result(10).attempts for future in futures} == {1}
    model.close()
    assert len(dead.requests) <= 8


@pytest.mark.parametrize("served", [False, True], ids=["at first", "later"])
def test_servers_that_are_slow_to_say_that_nobody_is_there_end_the_run(serve, monkeypatch, served):
    """Each is due again before the other has failed, and yet neither counts as up."""
    monkeypatch.setattr("srt_cli.models.api.client.DOWN_FOR_S", 0.02)
    monkeypatch.setattr("srt_cli.models.api.client.DOWN_BEFORE_FIRST_SUCCESS_S", 0.02)

    def behave(body, number):
        if body["messages"][0]["content"] == "first":
            return Answer()
        return Answer(status=504, body=b"gateway timeout", delay_s=0.1)

    one, other = serve(behave), serve(behave)
    model = open_model(f"{one.url},{other.url}#tester", ModelOptions(give_up_after_s=0.4))

    def send(content):
        return model.submit([Request((Message(role="user", content=content),), max_tokens=5)])[0]

    if served:
        assert send("first").result(5).status == "ok"
    with pytest.raises(SrtError, match=r"0\.4 s \(504: gateway timeout\)"):
        send("last").result(5)
    model.close()
    assert len(one.requests) + len(other.requests) <= 8


def test_a_server_that_nobody_answers_at_is_tried_by_one_row_at_a_time(serve, monkeypatch):
    monkeypatch.setattr("srt_cli.models.api.client.DOWN_FOR_S", 0.02)
    monkeypatch.setattr("srt_cli.models.api.client.DOWN_BEFORE_FIRST_SUCCESS_S", 0.02)
    hung = serve(lambda body, number: Answer(status=504, body=b"timeout", delay_s=0.2))
    alive = serve(lambda body, number: Answer(delay_s=0.01))
    model = open_model(f"{hung.url},{alive.url}#tester", ModelOptions(concurrency=8))
    message = (Message(role="user", content="q"),)
    futures = model.submit([Request(message, max_tokens=5)] * 200)
    assert {future.result(10).status for future in futures} == {"ok"}
    model.close()
    assert len(hung.requests) <= 10


def test_an_address_without_tls_is_said_at_once(serve):
    server = serve(lambda body, number: Answer())
    url = server.url.replace("http:", "https:")
    model = open_model(f"{url}#tester", ModelOptions())
    (future,) = model.submit([Request((Message(role="user", content="q"),), max_tokens=5)])
    with pytest.raises(
        SrtError, match=r"cannot be reached \(it speaks no TLS\). Check the address"
    ):
        future.result(10)
    model.close()


@pytest.mark.parametrize(
    ("alert", "said"),
    [(116, "tlsv13 alert certificate required"), (70, "tlsv1 alert protocol version")],
)
def test_a_server_that_refuses_our_tls_is_quoted(alert, said):
    with socket.create_server(("127.0.0.1", 0)) as server:

        def refuse():
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(bytes([21, 3, 3, 0, 2, 2, alert]))

        threading.Thread(target=refuse, daemon=True).start()
        model = open_model(f"https://127.0.0.1:{server.getsockname()[1]}/v1#tester", ModelOptions())
        (future,) = model.submit([Request((Message(role="user", content="q"),), max_tokens=5)])
        with pytest.raises(SrtError, match=rf"cannot be reached \(TLS: {said}\)\."):
            future.result(10)
        model.close()
        server.shutdown(socket.SHUT_RDWR)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (socket.gaierror(-2, "Name or service not known"), "name or service not known"),
        (ConnectionResetError(), "connection closed"),
        (ConnectionRefusedError(111, "Connect call failed ('127.0.0.1', 9)"), "connection refused"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_what_the_system_says_of_a_connection(error, said):
    assert in_words(error) == said


@pytest.fixture
def tearing():
    """A server whose first replies break off 20 bytes before their end."""
    whole = json.dumps(completion()).encode()
    asked = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            self.rfile.read(int(self.headers["content-length"]))
            asked.append(self.path)
            self.send_response(200)
            self.send_header("content-length", str(len(whole)))
            self.end_headers()
            self.wfile.write(whole[:-20] if len(asked) <= self.server.torn else whole)

        def log_message(self, *arguments):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.spec = f"http://127.0.0.1:{server.server_port}/v1#tester"
    threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def test_replies_that_are_torn_are_asked_again_from_the_beginning(tearing):
    tearing.torn = 12
    assert [reply.status for reply in ask(tearing, 3)] == ["ok"] * 3


def test_replies_that_are_all_torn_end_the_run_in_plain_words(tearing):
    tearing.torn = 1000
    with pytest.raises(SrtError) as stop:
        ask(tearing, 3)
    assert str(stop.value) == (
        f"{tearing.spec.partition('#')[0]}: no reply came whole (the connection closed in the middle "
        "of a reply). Look at its log."
    )


def test_a_timeout_that_is_too_short_is_named(serve, capfd):
    server = serve(lambda body, number: Answer(delay_s=1))
    with pytest.raises(SrtError, match=r"pass a longer --timeout than 0\.1\."):
        ask(server, 1, {"timeout_s": 0.1})
    said = f"{server.url}: no whole reply within 0.1 s (--timeout); asking again\n"
    assert capfd.readouterr().err == said


@pytest.mark.parametrize(
    "line",
    [
        ("self-critique", "--model", "SPEC"),
        ("eval", "--model", "SPEC", "--reference", "SPEC", "--judge", "SPEC"),
        ("build-prefs", "--data", "rows.jsonl", "--audit", 1, "--audit-judge", "SPEC"),
    ],
    ids=lambda line: line[0],
)
def test_every_command_waits_as_long_as_it_is_told(srt, serve, tmp_path, free_port, line):
    _rows(tmp_path, 1)
    server = serve(as_policy_and_critic)
    made = srt(
        "collect-feedback", "--model", server.spec, "--critic", server.spec, "--out", "rows.jsonl"
    )
    assert made.code == 0
    spec = f"http://127.0.0.1:{free_port}/v1#tester"
    line = [spec if word == "SPEC" else word for word in line]
    result = srt(*line, "--give-up-after", 0.2)
    assert (result.code, "is not up after 0.2 s (connection refused)" in result.stderr) == (1, True)


def test_a_server_that_goes_away_and_comes_back_costs_no_row(serve):
    """A proxy's 502 while nothing is served: the rows wait, however long it lasts."""
    down = Answer(status=502, body=b"<html>Bad Gateway</html>")
    server = serve(lambda body, number: down if 20 < number <= 60 else Answer(delay_s=0.01))
    replies = ask(server, 60)
    assert {reply.status for reply in replies} == {"ok"}


def test_a_row_that_no_server_survives_fails_alone(serve):
    """The others are served in between: it is that row, and no restart that would have an end."""
    gone = Answer(status=502, body=b"<html>Bad Gateway</html>")

    def behave(body, number):
        return gone if body["messages"][0]["content"] == "question 1" else Answer()

    replies = ask(serve(behave), 12, {"concurrency": 1})
    assert [reply.status for reply in replies] == ["ok", "failed", *["ok"] * 10]
    assert replies[1].error == "server error after 5 attempts: 502: <html>Bad Gateway</html>"


def test_a_row_that_keeps_the_server_down_fails_alone_after_the_others(serve):
    """Nothing shows that the server is up: the row waits as for any server, and the run goes on."""
    gone = Answer(status=502, body=b"no upstream")

    def behave(body, number):
        return gone if body["messages"][0]["content"] == "question 1" else Answer()

    server = serve(behave)
    server.models = ()
    replies = ask(server, 5, {"concurrency": 1, "give_up_after_s": 0.4})
    assert [reply.status for reply in replies] == ["ok", "failed", *["ok"] * 3]
    assert replies[1].error == (
        "nothing was admitted for 0.4 s (502: no upstream), though other rows were served before"
    )


def test_a_row_that_no_server_survives_takes_no_other_with_it(monkeypatch):
    """Those that are in flight with it are lost each time, and those after it are refused."""
    up_at, deaths = [0.0], [0]

    async def post(endpoint, path, body):
        if time.monotonic() < up_at[0]:
            raise NoAnswer("no connection", "connection refused")
        deaths_before = deaths[0]
        await asyncio.sleep(0.01)
        if body["messages"][0]["content"] == "question 3":
            up_at[0] = time.monotonic() + 0.12
            deaths[0] += 1
        if deaths[0] > deaths_before:
            raise NoAnswer("connection lost", "connection closed before a reply")
        return Unread(200, {}, json.dumps(completion()).encode())

    monkeypatch.setattr("srt_cli.models.api.transport.Endpoint.post", post)
    spec = "http://127.0.0.1:9/v1#tester"
    model = open_model(spec, ModelOptions(concurrency=12, give_up_after_s=1.0))
    futures = model.submit(
        [Request((Message(role="user", content=f"question {n}"),), max_tokens=5) for n in range(24)]
    )
    replies = [future.result(20) for future in futures]
    model.close()
    assert [n for n, reply in enumerate(replies) if reply.status != "ok"] == [3]


def test_a_connection_that_is_refused_uses_up_no_attempt(serve, free_port, monkeypatch):
    """However often a row meets it while others are served: it has no part in it."""
    monkeypatch.setattr("srt_cli.models.api.client.DOWN_BEFORE_FIRST_SUCCESS_S", 0.0)
    alive = serve(lambda body, number: Answer(delay_s=0.002))
    spec = f"http://127.0.0.1:{free_port}/v1,{alive.url}#tester"
    model = open_model(spec, ModelOptions(concurrency=2))
    message = (Message(role="user", content="q"),)
    futures = model.submit([Request(message, max_tokens=5)] * 60)
    assert {future.result(10).attempts for future in futures} == {1}
    assert model.describe()["causes_of_retries"]["no connection"] > 4
    model.close()


def test_a_server_that_is_down_is_asked_by_one_row_at_a_time(serve):
    server = serve(lambda body, number: Answer(status=502, body=b"no upstream"))
    with pytest.raises(SrtError, match="is not up after"):
        ask(server, 40, {"concurrency": 16, "give_up_after_s": 0.5})
    assert len(server.requests) <= 16 + 6


def test_a_server_that_restarts_twice_costs_the_same_row_nothing(serve):
    """The row is met by both restarts, and is the last one left at the second."""
    down_since = []

    def behave(body, number):
        others = {request["messages"][0]["content"] for request in server.requests[1:]}
        if number > 1 and len(others - {"question 0"}) == 3 and not down_since:
            down_since.append(time.monotonic())
            server.models = ()
            return Answer()
        again = down_since and time.monotonic() - down_since[0] < 0.8
        return Answer(status=502, body=b"no upstream") if number == 1 or again else Answer()

    server = serve(behave)
    replies = ask(server, 4, {"concurrency": 1})
    assert [(reply.status, reply.attempts) for reply in replies] == [("ok", 2), *[("ok", 1)] * 3]
    assert server.requests[-1]["messages"][0]["content"] == "question 0"


def test_a_server_that_queues_stops_the_growth():
    """One slot: each request waits for those before it, so more in flight brings nothing."""
    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now)
    under_way = [limit.start() for _ in range(limit.limit)]
    for _ in range(600):
        now += 0.1
        limit.succeeded(under_way.pop(0), tokens=20)
        while limit.in_flight < limit.limit:
            under_way.append(limit.start())
    assert limit.limit <= 27
    assert limit.peak <= 80


def test_a_server_without_a_queue_does_not():
    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now)
    for _ in range(40):
        started = [limit.start() for _ in range(limit.limit)]
        now += 1.0
        for one in started:
            limit.succeeded(one, tokens=20)
    assert limit.limit == 512


def test_timeouts_behind_a_queue_halve_the_limit_once_and_use_no_attempt():
    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now, timeout_s=8.0)
    started = [limit.start() for _ in range(16)]
    for one in started[:6]:
        now += 1.3
        limit.succeeded(one, 20)
    now = 8.0
    assert all(limit.timed_out(one) for one in started[6:])
    assert (limit.cuts, limit.limit <= 11) == (1, True)


def test_a_timeout_among_quick_replies_is_that_requests_own():
    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now, timeout_s=8.0)
    hung, *others = [limit.start() for _ in range(16)]
    now = 0.5
    for one in others:
        limit.succeeded(one, 20)
    limit.start()
    now = 8.0
    assert not limit.timed_out(hung)
    assert limit.cuts == 0


def _rows(folder, count):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"Question {n + 1}?"} for n in range(count)])
    (folder / "critic.py").write_text(CRITIC)


def test_a_sign_of_life_comes_though_no_row_ends(srt, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("srt_cli.console.PLAIN_LINE_EVERY_S", 0.2)
    server = serve(lambda body, number: Answer(delay_s=1.0))
    _rows(tmp_path, 2)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    result = srt(*line)
    assert "s  0 calls done, 2 in flight, 0 tokens" in result.stderr


def test_calls_that_wait_for_a_slot_are_not_told_as_in_flight(srt, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("srt_cli.console.PLAIN_LINE_EVERY_S", 0.2)
    server = serve(lambda body, number: Answer(delay_s=0.5))
    _rows(tmp_path, 20)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:critic.py:critique")
    result = srt(*line)
    assert "0 calls done, 16 in flight, 4 waiting, 0 tokens" in result.stderr
