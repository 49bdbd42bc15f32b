"""What a model thinks before it answers, in the six forms in which it comes, is never its answer."""

import json
import random
from importlib.util import find_spec
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer, as_policy_and_critic
from test_build_prefs import record

from srt_cli.models import Reply, Request, canonical_request, open_model, reply_from_plain
from srt_cli.models.api.dialect import Heard
from srt_cli.models.chat import ChatFormat
from srt_cli.models.weights import load_tokenizer
from srt_cli.records import Feedback, FeedbackRecord, Message, Preference, Usage
from srt_cli.runs.journal import request_key
from srt_cli.training.sequences import feedback_sequences, preference_ids

SCRATCH = (
    "Scratch.\nWeaknesses: scratch?\nSuggestions: scratch\nOverall Score: [[2]]\n"
    "### Improved Response\nscratch work [[m]] Verdict: [[M]]"
)


def message(form, answer):
    """A reply's message, and its finish reason, in one of the forms."""
    tags = random.Random(answer).choice([("<think>", "</think>"), ("[THINK]", "[/THINK]")])
    content = {
        "tags": f"{tags[0]}\n{SCRATCH}\n{tags[1]}\n\n{answer}",
        "closing tag": f"{SCRATCH}\n{tags[1]}\n\n{answer}",
        "parts": [
            {"type": "thinking", "thinking": [{"type": "text", "text": SCRATCH}]},
            {"type": "text", "text": answer},
        ],
        "channels": f"<|channel|>analysis<|message|>{SCRATCH}<|end|><|start|>assistant"
        f"<|channel|>final<|message|>{answer}",
        "nothing but thoughts": random.Random(answer).choice([None, "", f"<think>\n{SCRATCH}"]),
    }.get(form, answer)
    fields = {"reasoning_content": SCRATCH} if form == "field" else {}
    if form == "nothing but thoughts" and not content:
        fields = {"reasoning": SCRATCH}
    finish = "length" if form == "nothing but thoughts" else "stop"
    return {"role": "assistant", "content": content, **fields}, finish


FORMS = ("tags", "closing tag", "field", "parts", "channels", "nothing but thoughts")


def completion(form, answer):
    told, finish = message(form, answer)
    usage = {"prompt_tokens": 90, "completion_tokens": 70, "total_tokens": 160}
    choice = {"index": 0, "finish_reason": finish, "message": told}
    return Answer(body=json.dumps({"choices": [choice], "usage": usage}).encode())


@pytest.fixture
def serve():
    servers = []

    def start(behaviour):
        servers.append(LoopbackServer(behaviour))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


def ask(server, **fields):
    model = open_model(server.spec)
    try:
        turns = (Message(role="user", content="Hi"),)
        (future,) = model.submit([Request(turns, max_tokens=99, **fields)])
        return future.result(20)
    finally:
        model.close()


@pytest.mark.parametrize("form", FORMS[:5])
def test_answer_and_thoughts_are_parted_where_the_reply_is_received(serve, form):
    reply = ask(serve(lambda body, number: completion(form, "It is so.")))
    assert (reply.text, reply.thoughts) == ("It is so.", SCRATCH)
    assert (reply.status, reply.reason, reply.usage.completion_tokens) == ("ok", None, 70)


@pytest.mark.parametrize("answer", ["one", "two", "three", "four", "five"])
def test_what_ends_inside_a_thought_is_truncated_and_says_so(serve, answer):
    reply = ask(serve(lambda body, number: completion("nothing but thoughts", answer)))
    assert (reply.text, reply.thoughts) == ("", SCRATCH)
    assert (reply.status, reply.reason) == ("truncated", "thought until the limit")


def test_a_stop_text_within_a_thought_cuts_nothing(serve):
    reply = ask(serve(lambda body, number: completion("tags", "It is so. ###")), stop=("###",))
    assert (reply.text, reply.thoughts, reply.status) == ("It is so. ", SCRATCH, "ok")


def test_log_probabilities_stay_with_the_tokens_of_the_answer():
    from srt_cli.models import TokenLogprobs, part_reply

    tokens = ["<think>", "5", "</think>", "\n\n", "Score: ", "7"]
    offsets = [sum(map(len, tokens[:place])) for place in range(len(tokens))]
    places = tuple(
        TokenLogprobs(token, {token: -0.1}, offset)
        for token, offset in zip(tokens, offsets, strict=True)
    )
    reply = part_reply(Reply("".join(tokens), "stop", logprobs=places))
    assert (reply.text, reply.thoughts) == ("Score: 7", "5")
    assert [(place.token, place.offset) for place in reply.logprobs] == [("Score: ", 0), ("7", 7)]
    told_apart = part_reply(Reply("Score: 7", "stop", logprobs=places, thoughts="5"))
    assert told_apart.logprobs == reply.logprobs


def test_a_journal_of_an_older_srt_is_read_with_thoughts_apart():
    kept = {"text": "<think>\nHm.\n</think>\n\nYes.", "finish_reason": "stop", "usage": {}}
    reply = reply_from_plain(kept)
    assert (reply.text, reply.thoughts) == ("Yes.", "Hm.")


def thinking(seed):
    """A server's behaviour: every reply in a form drawn with a seed."""
    draw = random.Random(seed)

    def behave(body, number):
        if "### Requirements" in body["messages"][-1]["content"]:
            answer = as_policy_and_critic(body, number).text
        else:
            answer = f"The answer number {number}."
        # Only now and then nothing but thoughts, so that enough rows are whole.
        return completion(draw.choice(FORMS[:5] * 6 + FORMS[5:]), answer)

    return behave


def test_a_thousand_replies_leave_no_thought_in_any_text(srt, serve, tmp_path, tiny_model):
    server = serve(thinking(7))
    prompts = [{"id": str(n), "prompt": f"Say {n}."} for n in range(360)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    with_server = ("--model", server.spec, "--critic", server.spec, "--max-reasks", 0)
    collected = srt("collect-feedback", *with_server)
    assert collected.code == 0, collected.stderr
    built = srt("build-prefs", "--data", "feedback.jsonl", "--max-length-ratio", 30)
    assert built.code == 0, built.stderr
    judged = srt("eval", "--model", "feedback.jsonl", "--reference", server.spec, "--limit", 60,
                 "--judge", server.spec, "--use", "refinement", "--min-coverage", 0)  # fmt: skip
    assert judged.code in (0, 3), judged.stderr
    assert len(server.requests) > 1000

    asked = [turn["content"] for body in server.requests for turn in body["messages"]]
    assert "scratch" not in "".join(asked).lower()
    rows = [FeedbackRecord(**row) for row in read_jsonl(tmp_path / "feedback.jsonl")]
    for row in rows:
        told = row.model_copy(update={"thoughts": {}})
        assert "scratch" not in told.model_dump_json().lower()
        assert set(row.thoughts.values()) <= {SCRATCH}
        if row.status == "truncated":
            assert row.reason is not None
            assert row.reason.endswith(": thought until the limit")
    for name in ("prefs.jsonl", "outputs.jsonl", "judgments.jsonl"):
        for path in tmp_path.glob(f"*{name}"):
            for row in read_jsonl(path):
                row.pop("thoughts", None)
                assert "scratch" not in json.dumps(row).lower(), path
    trained = [row for row in rows if row.status == "ok"]
    assert len(trained) > 250
    masks = srt("sft", "--model", tiny_model, "--dry-run", "--show-masks", 400)
    assert masks.code == 0, masks.stderr
    assert masks.stdout.count("The answer number") + masks.stderr.count("The answer number") > 250
    assert "scratch" not in (masks.stdout + masks.stderr).lower()


def test_thoughts_stand_beside_raw_and_are_left_out_where_there_are_none(srt, serve, tmp_path):
    server = serve(thinking(3))
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}])
    (tmp_path / "p.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=5), response + '!'\n"
        "def respond(prompt):\n    return 'x'\n"
    )
    finished = srt("collect-feedback", "--model", server.spec, "--critic", "python:p.py:critique")
    assert finished.code == 0, finished.stderr
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["raw"]["response"] == row["response"] == "The answer number 1."
    assert row["thoughts"] == {"response": SCRATCH}
    plain = srt("collect-feedback", "--model", "python:p.py:respond", "--critic",
                "python:p.py:critique", "--out", "plain.jsonl")  # fmt: skip
    assert plain.code == 0, plain.stderr
    assert "thoughts" not in read_jsonl(tmp_path / "plain.jsonl")[0]


def test_a_draft_of_nothing_but_thoughts_is_no_draft(srt, serve, tmp_path):
    server = serve(lambda body, number: completion("nothing but thoughts", "x"))
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}])
    finished = srt("collect-feedback", "--model", server.spec, "--critic", server.spec)
    assert finished.code in (0, 3), finished.stderr
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert (row["status"], row["response"]) == ("truncated", None)
    assert row["reason"] == "response: thought until the limit"
    assert "Raise --max-new-tokens" in finished.stderr


def test_thoughts_are_read_in_batches_too():
    heard = Heard(f"<think>{SCRATCH}</think>Yes.", "stop")
    reply = heard.reply(Request((), 0), {}, 1)
    assert (reply.text, reply.thoughts) == ("Yes.", SCRATCH)


KWARGS = {"enable_thinking": False, "thinking": False}
PROGRAM = """
from srt_cli.records import Feedback

def critique(prompt, response):
    return Feedback(weaknesses="w", suggestions="s", score=5), response + "!"
"""


def drafts_of(srt, tmp_path, server, *arguments):
    """What the policy was sent by a run with these arguments."""
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}])
    before = len(server.requests)
    finished = srt("collect-feedback", "--model", server.spec, "--critic", "python:p.py:critique",
                   *arguments)  # fmt: skip
    assert finished.code == 0, finished.stderr
    return server.requests[before:], finished


def test_a_policy_on_a_server_is_told_whether_to_think(srt, serve, tmp_path):
    server = serve(as_policy_and_critic)
    (default,), _ = drafts_of(srt, tmp_path, server)
    assert (default["chat_template_kwargs"], default["max_tokens"]) == (KWARGS, 512)
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    assert manifest["models"][server.spec]["thinking"] == ["off"]
    (on,), _ = drafts_of(srt, tmp_path, server, "--thinking", "on", "--overwrite")
    assert on["chat_template_kwargs"] == {"enable_thinking": True, "thinking": True}
    assert on["max_tokens"] == 512 + 2048
    (auto,), _ = drafts_of(srt, tmp_path, server, "--thinking", "auto", "--thinking-tokens", 9,
                           "--overwrite")  # fmt: skip
    assert "chat_template_kwargs" not in auto
    assert auto["max_tokens"] == 521
    again, _ = drafts_of(srt, tmp_path, server, "--thinking", "off", "--overwrite")
    assert again == []  # what is sent is the same as by default


def test_critics_are_told_by_their_own_flag(srt, serve, tmp_path):
    server = serve(as_policy_and_critic)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "p", "response": "r"}])
    finished = srt("collect-feedback", "--critic", server.spec)
    assert finished.code == 0, finished.stderr
    assert not any("chat_template_kwargs" in body for body in server.requests)
    server.requests.clear()
    finished = srt("collect-feedback", "--critic", server.spec, "--critic-thinking", "off",
                   "--overwrite")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert [body["chat_template_kwargs"] for body in server.requests] == [KWARGS] * 2


def test_room_for_thoughts_goes_to_those_that_may_think_and_it_is_said_when_nobody_may(
    srt, serve, tmp_path
):
    server = serve(as_policy_and_critic)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "p"}])
    line = ("collect-feedback", "--model", server.spec, "--critic", server.spec)
    said = "--thinking-tokens: no model may think, so none has them."
    for flags, draft, critique, warned in (
        ((), 512, 2048 + 9, False),
        (("--critic-thinking", "auto"), 512, 2048 + 9, False),
        (("--thinking", "on"), 512 + 9, 2048 + 9, False),
        (("--thinking", "on", "--critic-thinking", "off"), 512 + 9, 2048, False),
        (("--critic-thinking", "off"), 512, 2048, True),
    ):
        server.requests.clear()
        finished = srt(*line, "--thinking-tokens", 9, *flags, "--overwrite", "--out", "f.jsonl")
        assert finished.code == 0, finished.stderr
        assert (said in " ".join(finished.stderr.split())) is warned
        (tmp_path / "f.journal.jsonl").unlink()
        assert [body["max_tokens"] for body in server.requests][:2] == [draft, critique]
    for critic, warned in ((), True), (("--critic", server.spec), False):
        finished = srt("self-critique", "--model", server.spec, "--thinking-tokens", 9, *critic,
                       "--dry-run", "--out", "s.jsonl")  # fmt: skip
        assert finished.code == 0, finished.stderr
        assert (said in " ".join(finished.stderr.split())) is warned


def test_a_server_that_refuses_the_switch_is_asked_without_and_that_is_said_once(
    srt, serve, tmp_path
):
    def behave(body, number):
        if "chat_template_kwargs" in body:
            message = "Unrecognized request argument supplied: chat_template_kwargs"
            return Answer(status=400, error={"message": message, "param": None})
        return as_policy_and_critic(body, number)

    server = serve(behave)
    sent, finished = drafts_of(srt, tmp_path, server)
    assert ["chat_template_kwargs" in body for body in sent] == [True, False]
    assert finished.stderr.count("does not let us tell it whether to think") == 1


SWITCHES = {
    "deepseek": ({"thinking": {"type": "enabled"}}, {"thinking": {"type": "disabled"}}),
    "openrouter": ({"reasoning": {"enabled": True}}, {"reasoning": {"effort": "none"}}),
    "vllm": ({"chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
             {"chat_template_kwargs": KWARGS}),
}  # fmt: skip


@pytest.mark.parametrize("name", SWITCHES)
def test_a_named_provider_is_told_to_think_by_its_own_field(
    srt, serve, tmp_path, monkeypatch, name
):
    server = serve(as_policy_and_critic)
    folder = tmp_path / "configuration/srt"
    folder.mkdir(parents=True)
    (folder / "providers.toml").write_text(f'[{name}]\naddress = "{server.url}"\n')
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))
    monkeypatch.setenv(f"{name.upper()}_API_KEY", "secret")
    spec = ("--model", f"{name}:tester")
    for told, fields in zip(("on", "off"), SWITCHES[name], strict=True):
        (sent,), _ = drafts_of(srt, tmp_path, server, *spec, "--thinking", told, "--overwrite")
        assert {field: sent.get(field) for field in fields} == fields


def test_claude_is_given_a_budget_to_think_and_newer_ones_their_own_way(serve):
    from srt_cli.models import ModelOptions, Thinks, parse_spec
    from srt_cli.models.api.anthropic import Anthropic
    from srt_cli.models.api.dialect import Answer as Heard
    from srt_cli.models.api.transport import place_of

    place = place_of("anthropic:m", parse_spec("anthropic:m"), ModelOptions(offline=True))
    dialect = Anthropic(place.manner)
    turns = (Message(role="user", content="Hi"),)
    request = Request(turns, 512 + 2048, thinks=Thinks("on", tokens=2048))
    body = dialect.body(request)
    assert body["thinking"] == {"type": "enabled", "budget_tokens": 2048}
    assert (body["max_tokens"], body["temperature"]) == (2560, 1.0)
    said = '"thinking.type.enabled" is not supported for this model. Use "thinking.type.adaptive".'
    error = json.dumps({"error": {"type": "invalid_request_error", "message": said}}).encode()
    assert dialect.adapt(dialect.refusal(Heard(400, {}, error)), request, body) is dialect
    assert dialect.body(request)["thinking"] == {"type": "adaptive"}
    off = dialect.body(Request(turns, 512, thinks=Thinks("off")))
    assert off["thinking"] == {"type": "disabled"}


def test_a_provider_without_a_known_field_is_said_to_have_none(srt, serve, tmp_path, monkeypatch):
    server = serve(as_policy_and_critic)
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    spec = ("--model", "openai:tester")
    (sent,), finished = drafts_of(srt, tmp_path, server, *spec, "--thinking", "on")
    assert "thinking" not in json.dumps(sent)
    assert "cannot be told whether to think: srt knows no field" in " ".join(
        finished.stderr.split()
    )


def test_thoughts_that_are_cut_off_before_their_tag_are_no_draft(srt, serve, tmp_path):
    def cut(body, number):
        usage = {"prompt_tokens": 9, "completion_tokens": 2560, "total_tokens": 2569}
        message = {"role": "assistant", "content": SCRATCH}
        choice = {"index": 0, "finish_reason": "length", "message": message}
        return Answer(body=json.dumps({"choices": [choice], "usage": usage}).encode())

    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}])
    server = serve(cut)
    finished = srt("collect-feedback", "--model", server.spec, "--critic", "python:p.py:critique",
                   "--thinking", "on")  # fmt: skip
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert (row["status"], row["response"]) == ("truncated", None), finished.stderr
    assert row["reason"] == "response: thought until the limit"


def test_thoughts_in_given_responses_and_saved_outputs_are_kept_apart(srt, serve, tmp_path):
    server = serve(as_policy_and_critic)
    given = f"<think>\n{SCRATCH}\n</think>\n\nIt is so."
    rows = [
        {"id": "a", "prompt": "Say a.", "response": given},
        {"id": "b", "prompt": "Say b.", "response": f"<think>\n{SCRATCH}"},
    ]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    finished = srt("collect-feedback", "--critic", server.spec)
    assert finished.code == 0, finished.stderr
    whole, cut = read_jsonl(tmp_path / "feedback.jsonl")
    assert (whole["status"], whole["response"]) == ("ok", "It is so.")
    assert whole["thoughts"] == {"response": SCRATCH}
    assert (cut["status"], cut["response"]) == ("truncated", None)
    assert cut["reason"] == "response: ended within its thoughts"
    write_jsonl(tmp_path / "saved.jsonl", [{"id": "a", "output": given}])
    write_jsonl(tmp_path / "one.jsonl", [{"id": "a", "prompt": "Say a."}])
    judged = srt("eval", "--prompts", "one.jsonl", "--model", "saved.jsonl", "--reference",
                 server.spec, "--judge", server.spec, "--min-coverage", 0)  # fmt: skip
    assert judged.code in (0, 3), judged.stderr
    asked = [turn["content"] for body in server.requests for turn in body["messages"]]
    assert "It is so." in asked[-1]
    assert "scratch" not in "".join(asked).lower()


def test_contestants_are_asked_under_the_system_turn_and_judges_are_not(srt, serve, tmp_path):
    contestant, judge = serve(as_policy_and_critic), serve(as_policy_and_critic)
    own = [{"role": "system", "content": "My own."}, {"role": "user", "content": "Say b."}]
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}, {"messages": own}])
    (tmp_path / "p.py").write_text("def respond(prompt):\n    return 'x'\n")
    finished = srt("eval", "--model", contestant.spec, "--reference", "python:p.py:respond",
                   "--judge", judge.spec, "--system", "Be brief.", "--concurrency", 1,
                   "--min-coverage", 0)  # fmt: skip
    assert finished.code in (0, 3), finished.stderr
    system = {"role": "system", "content": "Be brief."}
    sent = [body["messages"] for body in contestant.requests]
    assert sent == [[system, {"role": "user", "content": "Say a."}], own]
    assert "Be brief." not in json.dumps([body["messages"] for body in judge.requests])


def test_a_model_that_was_trained_under_a_system_turn_and_is_asked_without_is_warned_of(
    srt, serve, tmp_path, tiny_model
):
    server = serve(as_policy_and_critic)
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"Say {n}."} for n in range(2)]
    )
    (tmp_path / "p.py").write_text(PROGRAM + "\ndef check(prompt, response):\n    return True\n")
    collected = srt("collect-feedback", "--model", server.spec, "--critic", "python:p.py:critique",
                    "--system", "Be brief.")  # fmt: skip
    assert collected.code == 0, collected.stderr
    tuned = srt("sft", "--model", tiny_model, "--epochs", 1, "--critic-check", 0, "--samples", 0)
    assert tuned.code == 0, tuned.stderr
    short = ("--max-new-tokens", 4, "--critic-max-tokens", 4)
    line = ("eval", "--model", "models/sft", "--check", "python:p.py:check", "--use", "response")
    for command in (("self-critique", *short), (*line, *short)):
        asked = srt(*command)
        said = " ".join(asked.stderr.split())
        assert "models/sft was trained under a system turn, and is asked without it" in said
        assert "Pass --system 'Be brief.'" in said
        again = srt(*command, "--system", "Be brief.", "--overwrite")
        assert "asked without it" not in " ".join(again.stderr.split())


def test_what_an_older_srt_asked_is_not_asked_again(srt, serve, tmp_path):
    server = serve(as_policy_and_critic)
    drafts_of(srt, tmp_path, server)
    # An older srt wrote the key of the same request without a word on thinking.
    model = open_model(server.spec)
    journal = tmp_path / "feedback.journal.jsonl"
    entries = read_jsonl(journal)
    old = Request(
        (Message(role="user", content="Say a."),), 512, temperature=0.7, seed=42, sample=0
    )
    entries[0]["key"] = request_key(canonical_request(model, old)).hex()
    write_jsonl(journal, entries)
    for left in tmp_path.glob("feedback*"):
        if left != journal:
            left.unlink()
    sent, _ = drafts_of(srt, tmp_path, server)
    assert sent == []


def test_a_model_in_process_without_a_switch_is_said_to_have_none(srt, tmp_path, tiny_model):
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}])
    line = ("collect-feedback", "--model", tiny_model, "--critic", "python:p.py:critique",
            "--max-new-tokens", 4)  # fmt: skip
    silent = srt(*line)
    assert silent.code == 0, silent.stderr
    assert "cannot be told" not in silent.stderr
    told = srt(*line, "--thinking", "on", "--thinking-tokens", 4, "--out", "on.jsonl")
    assert told.code == 0, told.stderr
    assert told.stderr.count("cannot be told whether to think: its chat template has no") == 1


@pytest.mark.parametrize("as_file", [False, True])
def test_a_system_turn_stands_before_drafts_and_is_trained_with_them(
    srt, serve, tmp_path, tiny_model, as_file
):
    server = serve(as_policy_and_critic)
    (tmp_path / "system.txt").write_text("Be brief.\n")
    given = "system.txt" if as_file else "Be brief."
    (tmp_path / "p.py").write_text(PROGRAM)
    own = [{"role": "system", "content": "My own."}, {"role": "user", "content": "Say b."}]
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "Say a."}, {"messages": own}])
    finished = srt("collect-feedback", "--model", server.spec, "--critic", "python:p.py:critique",
                   "--system", given, "--concurrency", 1)  # fmt: skip
    assert finished.code == 0, finished.stderr
    system = {"role": "system", "content": "Be brief."}
    sent = [body["messages"] for body in server.requests]
    assert sent == [[system, {"role": "user", "content": "Say a."}], own]
    rows = read_jsonl(tmp_path / "feedback.jsonl")
    assert rows[0]["prompt"] == sent[0]
    masks = srt("sft", "--model", tiny_model, "--dry-run", "--show-masks", 2)
    assert masks.code == 0, masks.stderr
    assert "Be brief." in masks.stdout + masks.stderr


def chat_under(name):
    """The tiny tokenizer under one of TRL's templates, whose control tokens it knows."""
    trl = find_spec("trl")
    assert trl is not None
    template = Path(trl.origin).parent / "chat_templates" / f"{name}.jinja"
    tokenizer = load_tokenizer(str(ROOT / "tests/tiny_tokenizer"))
    tokenizer.chat_template = template.read_text()
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": [
                f"<|{mark}|>" for mark in
                ("im_start", "im_end", "start", "end", "message", "channel", "return", "call")
            ]
        }
    )  # fmt: skip
    return ChatFormat(tokenizer)


KEPT = {
    "qwen3": "<think>\nHm, 4.\n</think>\n\nFour.<|im_end|>",
    "gptoss": "<|channel|>analysis<|message|>Hm, 4.<|end|><|start|>assistant"
    "<|channel|>final<|message|>Four.<|return|>",
}
DROPPED = {
    "qwen3": ("<|im_start|>assistant\n<think>\n\n</think>\n\n", "Four.<|im_end|>"),
    "gptoss": ("<|start|>assistant", "<|channel|>final<|message|>Four.<|return|>"),
}


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_thoughts_are_trained_only_when_they_are_to_be_kept(name):
    chat = chat_under(name)
    row = FeedbackRecord(
        id="a", prompt="2 + 2?", response="Four.", refinement="4.", refinement_score=7,
        feedback=Feedback(weaknesses="w", suggestions="s", score=5), refinement_feedback=None,
        status="ok", reason=None, raw={}, thoughts={"response": "Hm, 4.", "critique": "So so."},
        policy="p", critic="c", sample=0, round=1, usage=Usage(),
    )  # fmt: skip

    def trained(**how):
        return "".join(
            chat.tokenizer.decode([label for label in sequence.labels if label >= 0])
            for sequence in feedback_sequences(chat, row, ("response", "feedback"), **how)
        )

    assert trained(thoughts="keep").startswith(KEPT[name])
    assert "So so." in trained(thoughts="keep")
    dropped = trained()
    assert "Hm" not in dropped
    assert "So so" not in dropped
    assert "think" not in dropped
    turn = chat.turn([Message(role="user", content="2 + 2?")], "Four.")
    prompt, said = DROPPED[name]
    assert chat.tokenizer.decode(turn.prompt).endswith(prompt)
    assert chat.tokenizer.decode(turn.said) == said
    answers = [Message(role="assistant", content=text) for text in ("Four.", "Five.")]
    pair = Preference(
        id="a", prompt=[Message(role="user", content="2 + 2?")], chosen=answers[:1],
        rejected=answers[1:], chosen_score=1, rejected_score=0, source="s",
    )  # fmt: skip
    ids = preference_ids(chat, pair)
    assert chat.tokenizer.decode(ids.chosen_ids) == said
    assert chat.tokenizer.decode(ids.prompt_ids).endswith(prompt)


def test_thoughts_that_a_template_has_no_place_for_cannot_be_kept(srt, tmp_path, tiny_model):
    rows = [record(id="a").model_dump()]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    refused = srt("sft", "--model", tiny_model, "--thoughts", "keep", "--dry-run")
    assert refused.code == 1
    assert "has no place for thoughts" in refused.stderr
