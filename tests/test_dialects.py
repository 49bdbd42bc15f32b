"""Anthropic's and the Responses protocol, against servers that check requests as the documents say."""

import json

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, as_policy_and_critic
from provider_servers import AnthropicServer, EveryServer, ResponsesServer
from test_api import ask, requests

from srt_cli.errors import QuotaError
from srt_cli.models import ModelOptions, Request, Thinks, open_model
from srt_cli.models.api.openai_chat import OpenAiChat
from srt_cli.records import Message

CLAUDE = "anthropic:claude-sonnet-4-5"
BATCH = ("--batch", "--batch-poll", "0.05")


@pytest.fixture
def serve(monkeypatch, tmp_path):
    servers = []
    monkeypatch.setenv("SRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("srt_cli.models.api.client.FIRST_BACKOFF_S", 0.01)

    def start(kind, behaviour=as_policy_and_critic, **options):
        servers.append(kind(behaviour, **options))
        if kind is AnthropicServer:
            monkeypatch.setenv("ANTHROPIC_BASE_URL", servers[-1].address)
            monkeypatch.setenv("ANTHROPIC_API_KEY", servers[-1].key)
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def test_claude_as_policy_and_critic_gives_whole_rows_with_thoughts_apart(srt, serve, tmp_path):
    server = serve(AnthropicServer)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"q{n}"} for n in range(5)])
    finished = srt("collect-feedback", "--model", CLAUDE, "--critic", CLAUDE, "--concurrency", 1)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert [row["status"] for row in rows] == ["ok"] * 5
    assert {row["feedback"]["score"] for row in rows} == {4.0}
    assert {text for row in rows for text in row["thoughts"].values()} == {
        "Overall Score: [[1]], or so."
    }
    assert "or so" not in str([{**row, "thoughts": {}} for row in rows])
    journal = read_jsonl(tmp_path / "feedback.journal.jsonl")
    assert {entry["thoughts"] for entry in journal} == {"Overall Score: [[1]], or so."}
    assert server.requests[0] == {
        "model": "claude-sonnet-4-5",
        "max_tokens": 512,
        "messages": [{"role": "user", "content": "q0"}],
        "temperature": 0.7,
        "thinking": {"type": "disabled"},
    }
    # Read from the cache, written into it, and the rest, all are tokens that were read.
    assert "tokens: 1965 read (76% from the server's cache), 105 written" in finished.stderr
    assert "cost: $" in finished.stderr


def test_what_the_system_says_stands_apart_and_may_be_cached(serve):
    server = serve(AnthropicServer)
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    (reply,) = ask(CLAUDE, [Request(turns, max_tokens=9, stop=("###",))])
    assert (reply.status, reply.thoughts) == ("ok", "Overall Score: [[1]], or so.")
    assert server.requests[0]["system"] == [
        {"type": "text", "text": "Be brief.", "cache_control": {"type": "ephemeral"}}
    ]
    assert server.requests[0]["messages"] == [{"role": "user", "content": "Hi"}]
    assert server.requests[0]["stop_sequences"] == ["###"]


def test_what_fills_the_cache_costs_more_than_what_is_read_from_it(srt, serve, tmp_path):
    serve(AnthropicServer)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q", "response": "A draft."}])
    finished = srt("collect-feedback", "--critic", CLAUDE, "--max-cost", 1)
    assert finished.code == 0, finished.stderr
    # Twice 11 tokens anew, 20 into the cache, 100 from it, 7 written.
    dollars = 2 * (11 * 3 + 20 * 3.75 + 100 * 0.3 + 7 * 15) / 1e6
    cost = json.loads((tmp_path / "feedback.run.json").read_text())["cost"]
    assert cost["dollars"] == pytest.approx(dollars)


@pytest.mark.parametrize(
    ("stop_reason", "finish"),
    [
        ("end_turn", "stop"),
        ("stop_sequence", "stop"),
        ("max_tokens", "length"),
        ("model_context_window_exceeded", "length"),
        ("pause_turn", "length"),
        ("something_new", "length"),
        ("refusal", "refused"),
    ],
)
def test_only_a_known_end_makes_a_message_whole(serve, stop_reason, finish):
    serve(AnthropicServer, lambda body, number: Answer(finish_reason=stop_reason))
    (reply,) = ask(CLAUDE, requests())
    assert reply.finish_reason == finish


@pytest.mark.parametrize(
    ("field", "said", "changes"),
    [
        ("temperature", "`temperature` is deprecated for this model.", {}),
        (
            "top_p",
            "`temperature` and `top_p` cannot both be specified for this model.",
            {"temperature": 0.5, "top_p": 0.9},
        ),
    ],
)
def test_a_field_that_claude_refuses_is_dropped_once(serve, field, said, changes):
    error = {"type": "invalid_request_error", "message": said}

    def behaviour(body, number):
        return Answer(status=400, error=error) if field in body else Answer()

    server = serve(AnthropicServer, behaviour)
    replies = ask(CLAUDE, requests(3, **changes), concurrency=1)
    assert [reply.status for reply in replies] == ["ok"] * 3
    assert len(server.requests) == 4
    assert field in server.requests[0]


@pytest.mark.parametrize(("status", "kind"), [(429, "rate_limit_error"), (529, "overloaded_error")])
def test_a_busy_claude_is_waited_for_without_using_up_attempts(serve, status, kind):
    def behaviour(body, number):
        if number <= 7:
            busy = {"type": kind, "message": "Overloaded"}
            return Answer(status=status, error=busy, headers={"retry-after": "0.01"})
        return Answer()

    serve(AnthropicServer, behaviour)
    (reply,) = ask(CLAUDE, requests())
    assert (reply.status, reply.attempts) == ("ok", 1)


@pytest.mark.parametrize(
    ("status", "kind", "said", "match"),
    [
        (401, "authentication_error", "invalid x-api-key", "Set ANTHROPIC_API_KEY to a valid one"),
        (400, "invalid_request_error", "Your credit balance is too low to access the Anthropic API.",
         "no credit left"),
    ],
)  # fmt: skip
def test_the_accounts_trouble_ends_the_run_with_exit_5(serve, status, kind, said, match):
    error = {"type": kind, "message": said}
    server = serve(AnthropicServer, lambda body, number: Answer(status=status, error=error))
    with pytest.raises(QuotaError, match=match):
        ask(CLAUDE, requests(20), concurrency=1)
    assert len(server.requests) == 1


def test_claude_in_batches_asks_again_for_what_expired_and_finds_its_own(
    srt, serve, tmp_path, monkeypatch
):
    server = serve(AnthropicServer, looks=2)
    server.expire_first = 2
    rows = [{"id": n, "prompt": f"q{n}", "response": "A draft."} for n in range(6)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", CLAUDE, *BATCH)

    def killed(self, wire, sent):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr("srt_cli.models.api.batch.BatchModel._collect", killed)
        assert srt(*line).code == 130
    assert len(server.batches) == 1
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert "batch msgbatch_0: found again" in finished.stderr
    assert {row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")} == {"ok"}
    # Critiques and, of those that expired, two once more; then the blind scores.
    assert [len(batch["requests"]) for batch in server.batches.values()] == [6, 2, 6]


@pytest.mark.parametrize("lost", ["the answer", "the client"])
def test_a_batch_of_claudes_that_has_no_name_here_is_looked_for(
    srt, serve, tmp_path, monkeypatch, lost
):
    monkeypatch.setattr("srt_cli.models.api.batch.FIRST_BACKOFF_S", 0.001)
    server = serve(AnthropicServer)
    rows = [{"id": n, "prompt": f"q{n}", "response": "A draft."} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", CLAUDE, *BATCH)
    if lost == "the answer":
        server.lose_answers = 1
    else:

        def killed(told):
            raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr("srt_cli.models.api.anthropic._batch", killed)
            assert srt(*line).code == 130
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert [len(batch["requests"]) for batch in server.batches.values()] == [3, 3]


def test_a_batch_of_another_client_is_not_taken_for_one_whose_answer_was_lost(
    srt, serve, tmp_path, monkeypatch
):
    monkeypatch.setattr("srt_cli.models.api.batch.FIRST_BACKOFF_S", 0.001)
    rows = [{"id": n, "prompt": f"q{n}", "response": "A draft."} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    create = AnthropicServer._create

    async def create_behind_another(self, request):
        if not self.batches:
            body = await request.json()
            strange = [{**each, "custom_id": f"x{n}"} for n, each in enumerate(body["requests"])]
            self.batches["msgbatch_0"] = {"requests": strange, "looks": 0}
        return await create(self, request)

    monkeypatch.setattr(AnthropicServer, "_create", create_behind_another)
    server = serve(AnthropicServer)
    server.lose_answers = 1
    finished = srt("collect-feedback", "--critic", CLAUDE, *BATCH)
    assert finished.code == 0, finished.stderr
    assert "msgbatch_0: holds none of these requests" in finished.stderr
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")] == ["ok"] * 3
    # The other's, the critiques, and the blind scores.
    assert [len(batch["requests"]) for batch in server.batches.values()] == [3, 3, 3]


def test_a_batch_that_was_looked_for_has_its_name_from_then_on(srt, serve, tmp_path, monkeypatch):
    server = serve(AnthropicServer, looks=3)
    rows = [{"id": n, "prompt": f"q{n}", "response": "A draft."} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", CLAUDE, *BATCH)

    def killed(*arguments):
        raise KeyboardInterrupt

    for where in ("anthropic._batch", "batch.BatchModel._collect"):
        with monkeypatch.context() as patch:
            patch.setattr(f"srt_cli.models.api.{where}", killed)
            assert srt(*line).code == 130
        # Another client's of the same size, and later.
        strange = [{"custom_id": f"x{n}", "params": {}} for n in range(3)]
        server.batches["msgbatch_1"] = {"requests": strange, "looks": 0}
    noted = read_jsonl(tmp_path / "feedback.batches.jsonl")
    assert [entry.get("name") for entry in noted] == [None, "msgbatch_0"]
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert "batch msgbatch_0: found again" in finished.stderr
    assert "msgbatch_1" not in finished.stderr
    assert len(server.batches) == 3


def test_a_batch_that_was_cancelled_at_anthropic_is_asked_anew_by_the_next_run(
    srt, serve, tmp_path
):
    server = serve(AnthropicServer)
    rows = [{"id": n, "prompt": f"q{n}", "response": "A draft."} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", CLAUDE, *BATCH)
    server.cancelled.add("msgbatch_0")
    cancelled = srt(*line)
    assert cancelled.code == 3
    assert "in a batch: canceled" in cancelled.stderr
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert [len(batch["requests"]) for batch in server.batches.values()] == [3, 3, 3]


def test_an_export_for_claude_is_answered_elsewhere_and_imported(srt, serve, tmp_path):
    server = serve(AnthropicServer)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q", "response": "A draft."}])
    line = ("collect-feedback", "--critic", CLAUDE)
    srt(*line, "--export-batch", "ask.jsonl")
    (asked,) = read_jsonl(tmp_path / "ask.jsonl")
    assert server.problem_in(asked["params"]) is None
    from provider_servers import message_body

    message = message_body(as_policy_and_critic(asked["params"], 1))
    result = {"type": "succeeded", "message": message}
    write_jsonl(tmp_path / "told.jsonl", [{"custom_id": asked["custom_id"], "result": result}])
    finished = srt(*line, "--import-batch", "told.jsonl")
    assert finished.code == 0, finished.stderr
    assert "1 replies taken into the journal" in finished.stderr
    assert "1 of 1 rows are owed" in finished.stderr  # the blind score
    assert server.requests == []


def test_a_model_served_only_by_responses_is_found_out(srt, serve, tmp_path):
    server = serve(ResponsesServer)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"q{n}"} for n in range(4)])
    line = ("--model", server.spec, "--critic", server.spec, "--concurrency", 1)
    finished = srt("collect-feedback", *line)
    assert finished.code == 0, finished.stderr
    assert [row["status"] for row in read_jsonl(tmp_path / "feedback.jsonl")] == ["ok"] * 4
    assert server.requests[0] == {
        "model": "tester",
        "input": [{"role": "user", "content": "q0"}],
        "max_output_tokens": 512,
        "temperature": 0.7,
        "store": False,
    }
    assert server.chats == 1
    assert "(36 of them reasoning)" in finished.stderr
    journal = read_jsonl(tmp_path / "feedback.journal.jsonl")
    assert {entry["thoughts"] for entry in journal} == {"Hm."}


def test_responses_that_are_cut_or_refused_and_a_refused_temperature(serve):
    said = "Unsupported parameter: 'temperature' is not supported with this model."

    def behaviour(body, number):
        if "temperature" in body:
            return Answer(status=400, error={"message": said, "param": "temperature"})
        if body["input"][-1]["content"] == "question 1":
            return Answer(refusal="I can't.")
        return Answer(finish_reason="length")

    server = serve(ResponsesServer, behaviour)
    replies = ask(server.spec, requests(2, stop=("so",)), concurrency=1)
    assert [reply.finish_reason for reply in replies] == ["stop", "refused"]
    # It takes no stop texts, so the reply is cut here.
    assert [reply.text for reply in replies] == ["It is ", "I can't."]
    turns = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    (reply,) = ask(server.spec, [Request(turns, max_tokens=9)])
    assert reply.finish_reason == "length"
    assert server.requests[-1]["instructions"] == "Be brief."


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (AnthropicServer, "output_config", {"effort": "low"}),
        (ResponsesServer, "reasoning", {"effort": "low"}),
    ],
)
def test_effort_and_fields_of_ones_own_are_sent_in_each_dialect(serve, kind, field, value):
    server = serve(kind)
    spec = CLAUDE if kind is AnthropicServer else server.spec
    extra = {"metadata": {"user": "me"}}
    ask(spec, requests(), effort="low", extra_body=extra)
    assert server.requests[-1][field] == value
    assert server.requests[-1]["metadata"] == {"user": "me"}


@pytest.mark.parametrize(
    ("kind", "extra", "said"),
    [
        (EveryServer, {"temperature": 0.3}, "'temperature' does not support 0.3 with this model."),
        (EveryServer, {"top_logprobs": 25}, "Invalid 'top_logprobs': Expected <= 20, got 25."),
        (EveryServer, {"max_tokens": 9}, "'max_tokens' is not supported, use max_completion_tokens"),
        (ResponsesServer, {"temperature": 0.3}, "Unsupported parameter: 'temperature'."),
        (AnthropicServer, {"thinking": {"type": "enabled", "budget_tokens": 2000}},
         '"thinking.type.enabled" is not supported for this model.'),
        (AnthropicServer, {"thinking": {"budget_tokens": 2000}}, "thinking.type: Field required"),
    ],
)  # fmt: skip
def test_a_refused_field_of_the_users_own_stays_and_is_said(serve, kind, extra, said):
    refusal = Answer(status=400, error={"type": "invalid_request_error", "message": said})
    server = serve(kind, lambda body, number: refusal)
    spec = CLAUDE if kind is AnthropicServer else server.spec
    asked = requests(thinks=Thinks("on"), top_logprobs=5)
    (reply,) = ask(spec, asked, extra_body=extra)
    (field,) = extra
    assert (reply.status, len(server.requests)) == ("failed", 1)
    assert reply.error.endswith(f"{said.rstrip('.')}; --extra-body asks for {field}")


def test_a_field_that_a_critic_is_sent_by_the_user_ends_the_run_when_all_rows_are_refused(
    srt, serve, tmp_path
):
    said = "Unsupported value: 'temperature' does not support 0.3 with this model."
    server = serve(EveryServer, lambda body, number: Answer(status=400, error={"message": said}))
    rows = [{"id": n, "prompt": f"q{n}", "response": "A draft."} for n in range(30)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    own = ("--critic-extra-body", '{"temperature": 0.3}')
    finished = srt("collect-feedback", "--critic", server.spec, "--concurrency", 2, *own)
    assert finished.code == 1
    assert "with this model; --critic-extra-body asks for temperature)" in finished.stderr
    assert len(server.requests) <= 6


def test_an_error_while_a_refusal_is_read_ends_the_run(serve, monkeypatch):
    def broken(self, refused, request, sent):
        raise KeyError("type")

    monkeypatch.setattr("srt_cli.models.api.openai_chat.OpenAiChat.adapt", broken)
    server = serve(EveryServer, lambda body, number: Answer(status=400, error={"message": "no"}))
    with pytest.raises(KeyError, match="type"):
        ask(server.spec, requests(3), concurrency=1)


def test_a_dialect_that_never_ends_to_change_its_request_is_stopped(serve, monkeypatch):
    def body(self, request, before=OpenAiChat.body):
        self.tries = getattr(self, "tries", 0) + 1
        return before(self, request) | {"user": str(self.tries)}

    monkeypatch.setattr("srt_cli.models.api.openai_chat.OpenAiChat.body", body)
    monkeypatch.setattr(
        "srt_cli.models.api.openai_chat.OpenAiChat.adapt", lambda self, *refused: self
    )
    server = serve(EveryServer, lambda body, number: Answer(status=400, error={"message": "no"}))
    (reply,) = ask(server.spec, requests())
    assert (reply.status, len(server.requests)) == ("failed", 17)


def test_what_is_asked_otherwise_is_another_model_to_the_journal(serve):
    serve(AnthropicServer)
    names = [
        open_model(CLAUDE, ModelOptions(**options)).identity
        for options in ({}, {"effort": "low"}, {"effort": "high"}, {"extra_body": {"a": 1}})
    ]
    assert names[0].startswith("anthropic:claude-sonnet-4-5@http://127.0.0.1:")
    assert len(set(names)) == 4


def test_a_judge_without_log_probabilities_gives_reasons_and_no_weighted_verdicts(
    srt, serve, tmp_path
):
    server = serve(AnthropicServer, lambda body, number: Answer(text="So.\nVerdict: [[M]]"))
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    for name in ("one", "two"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"id": "a", "response": f"Answer {name}."}])
    line = ("eval", "--model", "one.jsonl", "--reference", "two.jsonl", "--judge", CLAUDE)
    refused = srt(*line, "--verdicts", "weighted", "--out", "weighted.jsonl")
    assert refused.code == 2
    assert "gives no log-probabilities" in refused.stderr
    assert not server.requests
    assert srt(*line, "--critic-reasoning-effort", "low").code == 0
    assert len(server.requests) == 2
    assert server.requests[0]["output_config"] == {"effort": "low"}
