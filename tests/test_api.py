"""The client against a real server on loopback: each cause of trouble has its own answer."""

import http.server
import shutil
import socket
import ssl
import subprocess
import threading
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer, as_policy_and_critic

from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import ModelOptions, Reply, Request, open_model
from srt_cli.models.api.dialect import Answer as Answered
from srt_cli.models.api.dialect import Refused
from srt_cli.models.api.limits import AdaptiveLimit, Pace, RateLimit, parse_duration_s
from srt_cli.models.api.patience import Patience
from srt_cli.records import Message


@pytest.fixture
def serve():
    servers = []

    def start(behaviour, **options):
        servers.append(LoopbackServer(behaviour, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture(autouse=True)
def _no_waiting(monkeypatch):
    monkeypatch.setattr("srt_cli.models.api.client.FIRST_BACKOFF_S", 0.01)
    monkeypatch.setattr("srt_cli.models.api.limits.DEFAULT_PAUSE_S", 0.05)
    monkeypatch.setattr("srt_cli.models.api.client.DEFAULT_PAUSE_S", 0.05)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


def requests(count=1, **changes) -> list[Request]:
    return [
        Request((Message(role="user", content=f"question {n}"),), max_tokens=50, **changes)
        for n in range(count)
    ]


def ask(spec, wanted, **options) -> list[Reply]:
    model = open_model(spec, ModelOptions(**options))
    try:
        return [future.result(20) for future in model.submit(wanted)]
    finally:
        model.close()


def fail_first(times, **answer):
    return lambda body, number: Answer(**answer) if number <= times else Answer()


@pytest.mark.parametrize(
    ("status", "said", "told"),
    [
        (400, "API key not valid. Please pass a valid API key.", "the key is refused"),
        (400, "No connected db.", "the key is refused"),  # LiteLLM, of a key that it does not know
        (403, "Your credit balance is too low", "no credit left"),
        (400, "Insufficient account balance", "no credit left"),
    ],
)
def test_a_wrong_key_is_told_from_an_empty_account(serve, status, said, told):
    server = serve(lambda body, number: Answer(status=status, error={"message": said}))
    with pytest.raises(QuotaError, match=told):
        ask(server.spec, requests())


def test_a_reply_carries_text_finish_reason_and_usage(serve):
    (reply,) = ask(serve(lambda body, number: Answer()).spec, requests())
    assert (reply.text, reply.finish_reason) == ("It is so.", "stop")
    assert (reply.usage.prompt_tokens, reply.usage.completion_tokens) == (11, 7)
    assert reply.usage.cached_tokens == 5


def test_only_what_was_asked_is_sent(serve):
    server = serve(lambda body, number: Answer())
    ask(server.spec, requests())
    assert server.requests == [
        {
            "model": "tester",
            "messages": [{"role": "user", "content": "question 0"}],
            "max_tokens": 50,
            "temperature": 0.0,
        }
    ]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        (Answer(finish_reason="length"), "length"),
        (Answer(finish_reason="content_filter", text=""), "refused"),
        (Answer(refusal="I can't.", text=""), "refused"),
    ],
)
def test_cut_and_refused_replies_are_final(serve, answer, reason):
    server = serve(lambda body, number: answer)
    (reply,) = ask(server.spec, requests())
    assert reply.finish_reason == reason
    assert len(server.requests) == 1


@pytest.mark.parametrize("status", [500, 408, 409])
def test_server_trouble_is_tried_again(serve, status):
    server = serve(fail_first(2, status=status, error={"message": "oops"}))
    (reply,) = ask(server.spec, requests())
    assert (reply.text, reply.attempts) == ("It is so.", 3)
    assert len(server.requests) == 3


def test_throttling_never_uses_up_an_attempt(serve):
    limited = {"message": "slow down", "code": "rate_limit_exceeded"}
    server = serve(fail_first(9, status=429, error=limited, headers={"retry-after-ms": "10"}))
    (reply,) = ask(server.spec, requests())
    assert (reply.finish_reason, reply.attempts) == ("stop", 1)
    assert len(server.requests) == 10


def test_retry_after_is_honoured(serve):
    server = serve(
        fail_first(1, status=429, error={"message": "x"}, headers={"retry-after": "0.4"})
    )
    ask(server.spec, requests())
    assert server.times[1] - server.times[0] >= 0.4


def test_a_spent_quota_stops_the_run_without_a_storm(serve):
    spent = {"message": "no credit", "type": "insufficient_quota", "code": "insufficient_quota"}
    server = serve(
        lambda body, number: Answer() if number <= 5 else Answer(status=429, error=spent)
    )
    model = open_model(server.spec, ModelOptions(concurrency=4))
    futures = model.submit(requests(100))
    errors = [future.exception(20) for future in futures]
    model.close()
    assert sum(error is None for error in errors) == 5
    assert all(isinstance(error, QuotaError) for error in errors if error is not None)
    assert len(server.requests) <= 5 + 4


@pytest.mark.parametrize("status", [401, 403])
def test_a_wrong_key_stops_the_run_with_exit_5(serve, status):
    server = serve(lambda body, number: Answer(status=status, error={"message": "bad key"}))
    with pytest.raises(QuotaError, match="the key is refused") as caught:
        ask(server.spec, requests())
    assert caught.value.exit_code == 5
    assert len(server.requests) == 1


def test_a_model_the_server_does_not_know_is_said_with_those_it_offers(serve):
    server = serve(
        lambda body, number: Answer(status=404, error={"message": "no"}), models=("one", "two")
    )
    with pytest.raises(SrtError, match=r"does not know the model 'tester'. It offers: one, two\."):
        ask(server.spec, requests())


def test_a_404_of_a_model_that_is_listed_names_what_was_asked(serve):
    server = serve(lambda body, number: Answer(status=404, error={"message": "no such path"}))
    with pytest.raises(SrtError) as stop:
        ask(server.spec, requests())
    assert str(stop.value) == (
        f"{server.url}/chat/completions: answers with status 404 (no such path), though the server "
        "lists the model 'tester'. Check the address, and whether it serves chats."
    )


def test_an_address_without_its_v1_is_named_with_what_was_asked(serve):
    server = serve(lambda body, number: Answer())
    address = server.url.removesuffix("/v1")
    with pytest.raises(SrtError) as stop:
        ask(f"{address}#tester", requests())
    assert str(stop.value) == (
        f"{address}/chat/completions: answers with status 404 (404: Not Found), and the server lists no "
        "models. Does the address end in /v1?"
    )


def test_an_empty_list_of_models_is_said(serve):
    server = serve(lambda body, number: Answer(status=404, error={"message": "no"}), models=())
    with pytest.raises(SrtError, match="its list of models is empty"):
        ask(server.spec, requests())


def test_a_server_that_speaks_no_json_is_said(serve):
    server = serve(lambda body, number: Answer(body=b"<html>hello</html>"))
    with pytest.raises(SrtError, match="not as an OpenAI-compatible server"):
        ask(server.spec, requests())


def test_a_host_that_nobody_knows_is_not_waited_for():
    with pytest.raises(
        SrtError, match=r"cannot be reached \(host not found: no-such-host.invalid\)"
    ):
        ask("http://no-such-host.invalid/v1#tester", requests(50))


def test_a_hung_request_is_cut_by_the_timeout(serve):
    server = serve(lambda body, number: Answer(delay_s=30 if number == 1 else 0))
    (reply,) = ask(server.spec, requests(), timeout_s=0.3)
    assert (reply.text, reply.attempts) == ("It is so.", 2)


def test_a_row_that_cannot_be_served_fails_alone(serve):
    long = {"message": "too many tokens", "code": "context_length_exceeded"}

    def behaviour(body, number):
        bad = body["messages"][0]["content"] == "question 1"
        return Answer(status=400, error=long) if bad else Answer()

    replies = ask(serve(behaviour).spec, requests(3))
    assert [reply.finish_reason for reply in replies] == ["stop", "failed", "stop"]
    assert "too many tokens" in str(replies[1].error)


def test_the_name_of_the_token_limit_is_learnt_once(serve):
    refused = {"message": "Unsupported parameter: 'max_tokens' is not supported", "code": "x"}

    def behaviour(body, number):
        return Answer(status=400, error=refused) if "max_tokens" in body else Answer()

    server = serve(behaviour)
    model = open_model(server.spec, ModelOptions(concurrency=1))
    for future in model.submit(requests(5)):
        assert future.result(20).finish_reason == "stop"
    assert model.describe()["token_field"] == "max_completion_tokens"
    model.close()
    assert len(server.requests) == 6


def test_a_refused_temperature_is_dropped_once_and_noted(serve):
    refused = {"message": "Unsupported value: 'temperature'", "param": "temperature"}

    def behaviour(body, number):
        return Answer(status=400, error=refused) if "temperature" in body else Answer()

    server = serve(behaviour)
    model = open_model(server.spec, ModelOptions(concurrency=1))
    for future in model.submit(requests(3)):
        future.result(20)
    assert model.describe()["fields_refused"] == ["temperature"]
    model.close()
    assert len(server.requests) == 4


def test_a_stop_text_that_the_server_ignores_still_cuts(serve):
    server = serve(lambda body, number: Answer(text="kept ### Improved Response gone"))
    (reply,) = ask(server.spec, requests(stop=("### Improved Response",)))
    assert reply.text == "kept "


def test_a_fixed_concurrency_is_never_exceeded_and_is_used(serve):
    server = serve(lambda body, number: Answer(delay_s=0.05))
    ask(server.spec, requests(30), concurrency=3)
    assert server.most_at_once == 3


def test_several_endpoints_share_the_load_and_one_may_be_dead(serve):
    one, two = (serve(lambda body, number: Answer(delay_s=0.02)) for _ in range(2))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        dead = f"http://127.0.0.1:{free.getsockname()[1]}/v1"
    replies = ask(f"{one.url},{dead},{two.url}#tester", requests(60), concurrency=6)
    assert all(reply.finish_reason == "stop" for reply in replies)
    assert min(len(one.requests), len(two.requests)) >= 20


def test_the_limit_doubles_until_refused_and_is_cut_once_a_burst():
    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now)
    for _ in range(2):
        started = [limit.start() for _ in range(limit.limit)]
        for _ in started:
            limit.succeeded()
    assert limit.limit > 16
    before = limit.limit
    now = 1.0
    started = [limit.start() for _ in range(before)]
    for time in started:
        limit.refused(time, 0.5)
    assert limit.cuts == 1
    assert limit.limit == int(before * 0.7)
    assert limit.wait_s() == 0
    now = 1.1
    limit.refused(limit.start(), 0.5)
    assert limit.cuts == 2
    assert limit.wait_s() == pytest.approx(0.5)


def test_no_more_are_in_flight_than_a_queue_answers_in_half_of_the_timeout():
    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now, timeout_s=12.0)
    started = [limit.start() for _ in range(limit.limit)]
    for time in started[:3]:  # one a second: six of them in six seconds
        now += 1.0
        limit.succeeded(time)
        limit.start()
    assert limit.limit == 6
    assert limit.wait_s() == float("inf")

    now = 0.0
    limit = AdaptiveLimit(clock=lambda: now, timeout_s=12.0)
    started = [limit.start() for _ in range(limit.limit)]
    now = 3.0  # all at once, however long they took: nothing stands in a queue
    for time in started[:3]:
        now += 0.01
        limit.succeeded(time)
        limit.start()
    assert limit.limit == 19


def test_a_limit_whose_slots_are_not_used_does_not_grow():
    limit = AdaptiveLimit()
    for _ in range(100):
        limit.start()
        limit.succeeded()
    assert limit.limit == 16


def test_the_users_requests_a_minute_are_kept(serve):
    server = serve(lambda body, number: Answer())
    ask(server.spec, requests(16), rpm=600)
    # Ten a second, of which one second's worth may burst: the last five take their time.
    assert server.times[-1] - server.times[0] >= 0.4


def test_the_users_tokens_a_minute_are_kept(serve):
    server = serve(lambda body, number: Answer())
    ask(server.spec, requests(60), tpm=60 * 600)
    # 18 tokens a reply, 600 a second: sixty of them take the better part of a second more.
    assert server.times[-1] - server.times[0] >= 0.5


def test_limits_are_learnt_from_the_servers_headers(serve):
    headers = {"x-ratelimit-limit-requests": "60000", "x-ratelimit-limit-tokens": "9000000"}
    server = serve(lambda body, number: Answer(headers=headers))
    model = open_model(server.spec, ModelOptions(tpm=5e6))
    for future in model.submit(requests(3)):
        future.result(20)
    assert model.describe()["rate_limits"] == {"rpm": 60000, "tpm": 5e6}
    model.close()


def test_nothing_is_sent_while_the_server_says_that_nothing_remains(serve):
    empty = {"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": "400ms"}
    server = serve(lambda body, number: Answer(headers=empty if number == 1 else {}))
    ask(server.spec, requests(2), concurrency=1)
    assert server.times[1] - server.times[0] >= 0.4


def test_anthropics_rate_headers_are_obeyed():
    now = [100.0]
    rate = RateLimit.of(None, None, lambda: now[0])
    limits = {"requests-limit": "50", "tokens-limit": "40000", "requests-remaining": "7"}
    rate.learn({f"anthropic-ratelimit-{name}": value for name, value in limits.items()})
    assert rate.describe() == {"rpm": 50, "tpm": 40000}
    assert rate.wait_s() == 0
    soon = (datetime.now(UTC) + timedelta(seconds=20)).isoformat(timespec="seconds")
    empty = {"output-tokens-remaining": "0", "output-tokens-reset": soon}
    rate.learn({f"anthropic-ratelimit-{name}": value for name, value in empty.items()})
    assert 15 < rate.wait_s() <= 20


@pytest.mark.parametrize("figure", ["0", "-5", "nan", "inf", "1e400", "0.0001", "", "x", "9" * 30])
def test_a_hostile_limit_is_not_believed(figure):
    rate = RateLimit.of(None, None)
    rate.learn({f"x-ratelimit-limit-{kind}": figure for kind in ("requests", "tokens")})
    assert rate.describe() == {"rpm": None, "tpm": None}


@pytest.mark.parametrize(
    "reset", ["-9", "nan", "inf", "9" * 11, "Fri, 01 Jan 2100 00:00:00 GMT", "?"]
)
def test_no_hostile_reset_stops_a_run_for_longer_than_two_minutes(reset):
    rate = RateLimit.of(None, None, lambda: 100.0)
    rate.learn({"x-ratelimit-remaining-requests": "0", "x-ratelimit-reset-requests": reset})
    assert 0 <= rate.wait_s() <= 120


@pytest.mark.parametrize(
    ("told", "seconds"),
    [
        ("0", 0), ("1.5", 1.5), ("20s", 20), ("-5", None), ("nan", None), ("inf", None),
        ("1e9", None), ("soon", None), ("", None), ("Wed, 21 Oct 2015 07:28:00 GMT", 0),
        ("2015-10-21T07:28:00Z", 0), ("9" * 400, None), ("Mon, 99 Foo 9999 99:99:99 GMT", None),
    ],
)  # fmt: skip
def test_how_long_to_wait_is_read_in_figures_and_as_a_date(told, seconds):
    assert Refused(Answered(429, {"retry-after": told}, b"{}")).retry_after_s == seconds


def test_a_date_to_come_is_waited_for():
    soon = format_datetime(datetime.now(UTC) + timedelta(seconds=30), usegmt=True)
    assert 25 < Refused(Answered(429, {"retry-after": soon}, b"{}")).retry_after_s <= 30


@pytest.mark.parametrize("told", ["-5", "nan", "0", "Wed, 21 Oct 2015 07:28:00 GMT"])
def test_no_hostile_word_makes_a_storm_of_what_was_refused(serve, told):
    server = serve(fail_first(6, status=429, error={"message": "x"}, headers={"retry-after": told}))
    (reply,) = ask(server.spec, requests())
    assert (reply.text, len(server.requests)) == ("It is so.", 7)
    assert server.times[-1] - server.times[0] > 6 * 0.045


@pytest.mark.parametrize(
    ("text", "seconds"),
    [
        ("12ms", 0.012),
        ("1s", 1.0),
        ("6m0s", 360.0),
        ("1h2m3.5s", 3723.5),
        ("7", 7.0),
        ("soon", None),
    ],
)
def test_reset_headers_are_read(text, seconds):
    assert parse_duration_s(text) == (None if seconds is None else pytest.approx(seconds))


def test_scattered_refusals_do_not_slow_the_others(serve):
    seen = set()

    def behaviour(body, number):
        name = body["messages"][0]["content"]
        first = name not in seen
        seen.add(name)
        if first and int(name.split()[-1]) % 20 == 0:
            return Answer(status=429, error={"message": "x"}, headers={"retry-after": "0.2"})
        return Answer(delay_s=0.01)

    server = serve(behaviour)
    model = open_model(server.spec, ModelOptions())
    for future in model.submit(requests(200)):
        assert future.result(20).finish_reason == "stop"
    described = model.describe()
    model.close()
    assert described["causes_of_retries"] == {"throttled": 10}
    assert described["requests_per_second_found"] is None


def test_the_pace_settles_where_the_server_admits():
    """A simulated server admits 50 a second; the client is told nothing but yes or no."""
    now = 0.0
    pace, level, admitted, refused = Pace(clock=lambda: now), 5.0, 0, 0
    for _ in range(200_000):
        now += 0.001
        level = min(5.0, level + 0.05)
        if pace.wait_s() > 0 or (pace.per_second is None and now * 1000 % 5 > 1):
            continue
        pace.start()
        if level >= 1:
            level -= 1
            admitted += 1
            pace.succeeded()
        else:
            refused += 1
            pace.refused(now)
    assert admitted / now > 0.9 * 50
    assert refused / (admitted + refused) < 0.05


def test_a_malformed_reply_is_asked_for_again_and_takes_no_endpoint_down(serve):
    server = serve(lambda body, number: Answer(body=b'{"choi') if number == 2 else Answer())
    replies = ask(server.spec, requests(4), concurrency=1)
    assert [reply.finish_reason for reply in replies] == ["stop"] * 4
    assert server.times[-1] - server.times[0] < 2


@pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl makes the certificate")
def test_a_certificate_that_is_not_trusted_is_said(tmp_path):
    made = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", "key.pem",
            "-out", "cert.pem", "-days", "1", "-subj", "/CN=localhost"]  # fmt: skip
    subprocess.run(made, cwd=tmp_path, check=True, capture_output=True)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(tmp_path / "cert.pem", tmp_path / "key.pem")
    server = http.server.HTTPServer(("127.0.0.1", 0), http.server.SimpleHTTPRequestHandler)
    server.socket = context.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    with pytest.raises(SrtError, match="its certificate is not trusted"):
        ask(f"https://127.0.0.1:{server.server_address[1]}/v1#tester", requests())
    server.shutdown()


def test_without_a_key_gpt_4_says_so_before_any_work(srt, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    finished = srt("collect-feedback", "--critic", "gpt-4")
    assert finished.code == 5
    assert finished.stderr == (
        "error: gpt-4: no key for the OpenAI API. Set OPENAI_API_KEY, or name another model "
        "(a directory, http://HOST/v1#NAME, python:FILE:CALLABLE).\n"
    )
    assert not (tmp_path / "feedback.run.json").exists()


def test_gpt_4_goes_to_the_address_and_with_the_key_of_the_environment(
    srt, serve, tmp_path, monkeypatch
):
    server = serve(as_policy_and_critic)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    monkeypatch.setenv("OPENAI_API_KEY", "sk-secret-of-mine")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    finished = srt("collect-feedback", "--critic", "gpt-4")
    assert finished.code == 0
    assert server.requests[0]["model"] == "gpt-4"
    assert "max_completion_tokens" in server.requests[0]
    for path in tmp_path.iterdir():
        assert b"sk-secret" not in path.read_bytes()
    assert "sk-secret" not in finished.stdout + finished.stderr


def test_a_key_in_the_address_is_refused():
    with pytest.raises(UsageError, match="OPENAI_API_KEY"):
        open_model("http://me:secret@127.0.0.1:1/v1#x")


def test_a_server_as_policy_and_critic_gives_whole_rows(srt, serve, tmp_path):
    server = serve(as_policy_and_critic)
    prompts = [{"id": n, "prompt": f"q{n}"} for n in range(20)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    line = ("collect-feedback", "--model", server.spec, "--critic", server.spec)
    assert srt(*line).code == 0
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert {row["status"] for row in rows} == {"ok"}
    assert rows[3]["response"] == "Answer to q3"
    assert (rows[3]["feedback"]["score"], rows[3]["refinement_score"]) == (4, 9)
    assert len(server.requests) == 60
    assert srt(*line).code == 0
    assert len(server.requests) == 60


def test_the_blind_score_never_sees_the_first_feedback(srt, serve, tmp_path):
    server = serve(as_policy_and_critic)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "response": "draft"}])
    srt("collect-feedback", "--critic", server.spec)
    first, blind = server.requests
    assert blind["stop"] == ["### Improved Response"]
    assert len(blind["messages"]) == 1
    assert "It is grand!" in blind["messages"][0]["content"]
    assert "It is dull." not in blind["messages"][0]["content"]
    assert "draft" not in blind["messages"][0]["content"]
    assert "stop" not in first


def test_a_server_that_came_up_and_throttles_is_not_called_down():
    now = [0.0]
    patience = Patience("m", 600.0, clock=lambda: now[0])
    patience.held_up("connection refused", down=True)
    assert (patience.never_up, patience.wait_s(1)) == (True, float("inf"))
    now[0] = 5.0
    patience.held_up("429: slow down")
    assert (patience.never_up, patience.down, patience.wait_s(1)) == (False, False, 0.0)
    now[0] = 601.0
    assert patience.is_over()
