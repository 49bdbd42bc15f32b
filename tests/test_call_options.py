"""Every option of the commands that ask models changes something, and a test names it."""

import dataclasses
import json
import time
from pathlib import Path

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer, as_policy_and_critic

from srt_cli.options import flag_of
from srt_cli.stages.collect_feedback import CollectFeedback
from srt_cli.stages.evaluate.run import Evaluate
from srt_cli.stages.self_critique import SelfCritique

TESTS = "".join(path.read_text() for path in Path(__file__).parent.glob("*.py"))


@pytest.fixture
def server():
    running = LoopbackServer(as_policy_and_critic)
    yield running
    running.close()


def bodies(srt, server, folder, *flags, model=True):
    """What the server is sent by a run of one row with these flags, and by one without."""
    write_jsonl(folder / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    line = ["collect-feedback", "--critic", server.spec, "--model", server.spec]
    for out, extra in (("plain.jsonl", ()), ("with.jsonl", flags)):
        finished = srt(*line, "--out", out, *extra)
        assert finished.code == 0, finished.stderr
    plain, changed = server.requests[:3], server.requests[3:]
    return [
        {name for name in with_ | without if with_.get(name) != without.get(name)}
        for with_, without in zip(changed, plain, strict=True)
    ]


DRAFT_ONLY, CRITIC_ONLY = (1, 0, 0), (0, 1, 1)


@pytest.mark.parametrize(
    ("flags", "field", "where"),
    [
        (("--temperature", 0.2), "temperature", DRAFT_ONLY),
        (("--max-new-tokens", 99), "max_tokens", DRAFT_ONLY),
        (("--seed", 7), "seed", DRAFT_ONLY),
        (("--critic-max-tokens", 99), "max_tokens", CRITIC_ONLY),
    ],
    ids=lambda value: value[0] if isinstance(value, tuple) and isinstance(value[0], str) else "",
)
def test_how_a_model_is_asked(srt, server, tmp_path, flags, field, where):
    expected = [{field} if touched else set() for touched in where]
    assert bodies(srt, server, tmp_path, *flags) == expected


def test_a_critic_that_samples_gets_a_seed_too(srt, server, tmp_path):
    changed = bodies(srt, server, tmp_path, "--critic-temperature", 0.5)
    assert changed == [set(), {"temperature", "seed"}, {"temperature", "seed"}]


@pytest.mark.parametrize(
    ("flags", "fields", "where"),
    [
        (("--reasoning-effort", "low"), {"reasoning_effort"}, DRAFT_ONLY),
        (("--critic-reasoning-effort", "low"), {"reasoning_effort"}, CRITIC_ONLY),
        (("--extra-body", '{"min_p": 0.1, "seed": 3}'), {"min_p", "seed"}, DRAFT_ONLY),
        (("--critic-extra-body", "more.json"), {"top_k"}, CRITIC_ONLY),
    ],
)
def test_what_is_said_of_a_models_manner_is_sent_to_that_model(
    srt, server, tmp_path, flags, fields, where
):
    (tmp_path / "more.json").write_text('{"top_k": 40}')
    expected = [fields if touched else set() for touched in where]
    assert bodies(srt, server, tmp_path, *flags) == expected
    assert server.requests[3].get("reasoning_effort", "low") == "low"


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("none.json", "neither a JSON object nor a file of one"),
        ("{", "neither a JSON object nor a file of one"),
        ('{"messages": [], "n": 2}', "srt itself sets messages, n"),
    ],
)
def test_fields_that_cannot_be_sent_are_said(srt, server, tmp_path, given, said):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    line = ("collect-feedback", "--critic", server.spec, "--model", server.spec)
    finished = srt(*line, "--extra-body", given)
    assert finished.code == 2
    assert said in finished.stderr


def test_the_same_model_in_two_manners_is_asked_and_billed_as_two(srt, server, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    line = ("collect-feedback", "--critic", server.spec, "--model", server.spec)
    assert srt(*line, "--critic-reasoning-effort", "high").code == 0
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    assert sorted(one["calls"] for one in manifest["cost"]["models"].values()) == [1, 2]
    assert manifest["settings"]["critic_reasoning_effort"] == "high"


def test_a_prompt_field_is_read(srt, server, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "wanted": "What of it?"}])
    line = ("collect-feedback", "--critic", server.spec, "--model", server.spec)
    assert srt(*line).code == 1
    assert srt(*line, "--prompt-field", "wanted").code == 0
    assert server.requests[0]["messages"][-1]["content"] == "What of it?"


def test_a_hung_request_is_cut_at_the_timeout(srt, tmp_path):
    def hangs_once(body, number):
        answer = as_policy_and_critic(body, number)
        return dataclasses.replace(answer, delay_s=30 if number == 2 else 0)

    server = LoopbackServer(hangs_once)
    rows = [{"id": str(n), "prompt": f"q{n}", "response": "A draft."} for n in range(2)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    began = time.monotonic()
    line = ("collect-feedback", "--critic", server.spec, "--timeout", 1)
    finished = srt(*line)
    server.close()
    assert finished.code == 0, finished.stderr
    assert time.monotonic() - began < 10
    assert '"timeout": 1' in (tmp_path / "feedback.run.json").read_text()


def test_tokens_a_minute_slow_a_run_down(srt, tmp_path):
    server = LoopbackServer(lambda body, number: dataclasses.replace(
        as_policy_and_critic(body, number), completion_tokens=600
    ))  # fmt: skip
    rows = [{"id": str(n), "prompt": f"q{n}", "response": "A draft."} for n in range(10)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", server.spec, "--critic-max-tokens", 600)
    assert srt(*line, "--out", "fast.jsonl").code == 0
    fast = server.times[-1] - server.times[0]
    begun = len(server.times)
    # 20 calls of 611 tokens at 4,000 a second take 3 s; the first second's worth is free.
    assert srt(*line, "--out", "slow.jsonl", "--tpm", 240_000).code == 0
    slow = server.times[-1] - server.times[begun]
    server.close()
    assert fast < 0.5
    assert 1 < slow < 6


def test_too_many_failed_rows_exit_3(srt, tmp_path):

    def behaviour(body, number):
        if "q0" in body["messages"][-1]["content"]:
            return as_policy_and_critic(body, number)
        return Answer(status=400, error={"message": "no"})

    refuses = LoopbackServer(behaviour)
    rows = [{"id": str(n), "prompt": f"q{n}", "response": "A draft."} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", refuses.spec)
    assert srt(*line, "--out", "a.jsonl").code == 0
    assert srt(*line, "--out", "b.jsonl", "--max-failures", 1).code == 3
    refuses.close()


@pytest.fixture
def own_critic():
    """A model that criticises itself: each refinement is scored one higher than what it mends."""

    def behaviour(body, number):
        last = body["messages"][-1]["content"]
        if not last.startswith("Review your response"):
            return Answer(text=f"Draft {body['seed']}")
        response = body["messages"][-2]["content"]
        score = 5 + response.count("!")
        text = f"Weaknesses: w\nSuggestions: s\nOverall Score: [[{score}]]"
        if not body.get("stop"):
            text += f"\n\n### Improved Response\n{response}!"
        return Answer(text=text)

    running = LoopbackServer(behaviour)
    yield running
    running.close()


def test_samples_and_rounds_make_rows_and_a_good_score_draws_the_line(srt, own_critic, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    (tmp_path / "check.py").write_text("def check(prompt, response):\n    return '!' in response\n")
    line = ("self-critique", "--model", own_critic.spec, "--check", "python:check.py:check")
    finished = srt(*line, "--samples", 2, "--rounds", 2)
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(tmp_path / "self-feedback.jsonl")
    assert [(row["sample"], row["round"], row["response"]) for row in rows] == [
        (0, 1, "Draft 42"), (0, 2, "Draft 42!"), (1, 1, "Draft 43"), (1, 2, "Draft 43!"),
    ]  # fmt: skip
    assert [row["refinement_score"] for row in rows] == [6, 7, 6, 7]

    def judged(good_score):
        assert srt(*line, "--good-score", good_score, "--out", f"at-{good_score}.jsonl").code == 0
        manifest = json.loads((tmp_path / f"at-{good_score}.run.json").read_text())
        return manifest["tallies"]["confusion_refinements"]

    assert judged(6) != judged(9)


@pytest.mark.parametrize("options_class", [CollectFeedback, SelfCritique, Evaluate])
def test_every_option_is_named_by_a_test(options_class):
    flags = {flag_of(field) for field in dataclasses.fields(options_class)}
    # Its effect is what the house's security test is about; running remote code is not.
    flags -= {"--trust-remote-code"}
    assert not {flag for flag in flags if f'"{flag}"' not in TESTS}
