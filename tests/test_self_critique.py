"""srt self-critique through the front door: samples, rounds, other critics, expected scores."""

import json
import math
import re
from contextlib import closing

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer

CRITIQUE = (
    "Weaknesses: Dull.\nSuggestions: Spirit.\nOverall Score: [[{}]]\n\n### Improved Response\n{}"
)
PROGRAM = """
from srt_cli.records import Feedback

def model(prompt, response=None):
    if response is None:
        return "It is " + prompt.text
    score = {0: 4, 1: 8, 2: 6}.get(response.count("!"), 6)
    return Feedback(weaknesses="Dull.", suggestions="Spirit.", score=score), response + "!"

def other(prompt, response):
    return Feedback(weaknesses="w", suggestions="s", score=2 + response.count("!")), "other's"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"task {n}"} for n in range(3)])
    return tmp_path


def criticise(srt, *flags, model="python:p.py:model", code=0):
    finished = srt("self-critique", "--model", model, *flags)
    assert finished.code == code, finished.stderr
    return finished


def self_critic(body, number):
    """A model that drafts, criticises and scores; its log-probabilities are unsure of the score."""
    turns = body["messages"]
    draft = turns[1]["content"] if len(turns) > 1 else ""
    if len(turns) == 1:
        return Answer(text="It is so.")
    score = 7 if draft.endswith("!") else 6
    text = CRITIQUE.format(score, draft + "!")
    for stop in body.get("stop") or []:
        text = text.split("\n" + stop)[0]
    return Answer(text=text, logprobs=likely(text) if body.get("logprobs") else None)


def likely(text):
    content = []
    for token in re.findall(r"\d|\D+", text):
        others = [{"token": token, "logprob": math.log(0.6)}]
        if token.isdecimal():
            others.append({"token": str(int(token) + 1), "logprob": math.log(0.4)})
        content.append({"token": token, "logprob": others[0]["logprob"], "top_logprobs": others})
    return {"content": content}


@pytest.fixture
def server():
    running = LoopbackServer(self_critic)
    yield running
    running.close()


def test_expected_scores_stand_beside_the_integers(srt, folder, server):
    finished = criticise(srt, "--expected-score", model=server.spec)
    for row in read_jsonl(folder / "self-feedback.jsonl"):
        assert (row["feedback"]["score"], row["refinement_score"]) == (6, 7)
        assert row["feedback"]["score_mean"] == pytest.approx(6.4)
        assert row["refinement_score_mean"] == pytest.approx(7.4)
        assert row["refinement_feedback"]["score_mean"] == pytest.approx(7.4)
    assert "expected scores: 3 pairs, of which 0 tie by integer and 0 by expectation" in (
        finished.stderr
    )
    tallies = json.loads((folder / "self-feedback.run.json").read_text())["tallies"]
    assert tallies["expected_scores"]["same_order"] == 3


@pytest.mark.parametrize("refuses", [False, True])
def test_a_server_without_log_probabilities_leaves_integers_and_is_told_of_once(
    srt, folder, refuses
):
    def deaf(body, number):
        if refuses and "logprobs" in body:
            return Answer(status=403, error={"message": "You are not allowed to sample logprobs"})
        body.pop("logprobs", None)
        return self_critic(body, number)

    server = LoopbackServer(deaf)
    finished = criticise(srt, model=server.spec)
    server.close()
    said = "gives no log-probabilities that tell a score's expectation: scores are integers."
    assert finished.stderr.count(said) == 1
    for row in read_jsonl(folder / "self-feedback.jsonl"):
        assert (row["status"], row["feedback"]["score_mean"]) == ("ok", None)


def test_no_expected_score_asks_for_no_log_probabilities(srt, folder, server):
    criticise(srt, "--no-expected-score", model=server.spec)
    assert not any(body.get("logprobs") for body in server.requests)
    assert read_jsonl(folder / "self-feedback.jsonl")[0]["feedback"]["score_mean"] is None


def test_score_samples_are_drawn_blind_and_averaged(srt, folder, server):
    criticise(srt, "--score-samples", 3, "--no-expected-score", "--limit", 1, model=server.spec)
    (row,) = read_jsonl(folder / "self-feedback.jsonl")
    assert (row["feedback"]["score_mean"], row["refinement_score_mean"]) == (6, 7)
    assert {"critique sample 2", "critique sample 3", "score sample 2", "score sample 3"} <= set(
        row["raw"]
    )
    drawn = [body for body in server.requests[1:] if body["temperature"] > 0]
    assert [body["temperature"] for body in drawn] == [0.7] * 4
    assert len({body["seed"] for body in drawn}) == 2
    assert all(body["stop"] for body in drawn)


def test_samples_and_rounds_each_give_a_record(srt, folder):
    criticise(srt, "--samples", 2, "--rounds", 2)
    rows = read_jsonl(folder / "self-feedback.jsonl")
    assert [(row["id"], row["sample"], row["round"]) for row in rows[:4]] == [
        ("0", 0, 1), ("0", 0, 2), ("0", 1, 1), ("0", 1, 2),
    ]  # fmt: skip
    assert rows[1]["response"] == rows[0]["refinement"]
    assert [row["refinement_score"] for row in rows[:2]] == [8, 6]


def test_stop_when_worse_ends_a_row_after_the_round_that_lost(srt, folder):
    criticise(srt, "--rounds", 4, "--stop-when-worse")
    rows = read_jsonl(folder / "self-feedback.jsonl")
    assert [row["round"] for row in rows] == [1, 2] * 3


def test_another_critic_gives_the_scores(srt, folder):
    criticise(srt, "--critic", "python:p.py:other")
    (row, *_) = read_jsonl(folder / "self-feedback.jsonl")
    assert (row["feedback"]["score"], row["refinement_score"]) == (2, 3)
    assert row["feedback"]["weaknesses"] == "Dull."
    assert row["refinement"] == "It is task 0!"
    assert (row["policy"], row["critic"]) == ("python:p.py:model", "python:p.py:other")
    assert {"response", "critique", "draft score", "score"} <= set(row["raw"])


def test_another_critic_does_everything(srt, folder):
    criticise(srt, "--critic", "python:p.py:other", "--critic-for", "everything")
    (row, *_) = read_jsonl(folder / "self-feedback.jsonl")
    assert (row["response"], row["refinement"]) == ("It is task 0", "other's")
    assert row["feedback"]["score"] == 2


@pytest.mark.parametrize("flags", ["--critic-for everything", "--critic-prompt table-1"])
def test_what_is_for_another_critic_is_refused_without_one(srt, folder, flags):
    refused = srt("self-critique", "--model", "python:p.py:model", *flags.split())
    assert refused.code == 2
    assert "is for another critic. Pass --critic SPEC" in refused.stderr
    name, value = flags.removeprefix("--").split()
    (folder / "srt.toml").write_text(f'{name} = "{value}"\n')
    assert srt("self-critique", "--model", "python:p.py:model", "--dry-run").code == 0


@pytest.mark.parametrize(
    ("flags", "in_conversation"),
    [
        ((), False),
        (("--critic-prompt", "conversation"), True),
        (("--critic-prompt", "table-1"), False),
    ],
)
def test_how_another_critic_is_asked(srt, server, flags, in_conversation):
    usable = 0 if in_conversation else 3
    criticise(srt, "--critic", server.spec, "--limit", 1, *flags, code=usable)
    asked = server.requests[0]["messages"]
    assert (len(asked) == 3) == in_conversation
    assert ("### Requirements" in asked[0]["content"]) != in_conversation


def test_the_critic_of_stage_1_in_srt_toml_is_not_taken_for_stage_2(srt, folder):
    (folder / "srt.toml").write_text('critic = "gpt-4"\n')
    criticise(srt)
    assert read_jsonl(folder / "self-feedback.jsonl")[0]["critic"] == "python:p.py:model"


def test_a_commands_own_table_names_options_as_they_are_typed(srt, folder):
    table = '[self-critique]\ncritic = "python:p.py:other"\ncritic-for = "everything"\n'
    (folder / "mine.toml").write_text(table)
    criticise(srt, "--config", "mine.toml")
    assert read_jsonl(folder / "self-feedback.jsonl")[0]["feedback"]["score"] == 2


def test_a_reply_that_loops_has_its_status(srt, folder):
    looping = LoopbackServer(
        lambda body, number: (
            Answer(text="so " * 300, finish_reason="length")
            if len(body["messages"]) > 1
            else Answer(text="It is so.")
        )
    )
    criticise(srt, "--limit", 1, model=looping.spec, code=3)
    looping.close()
    (row,) = read_jsonl(folder / "self-feedback.jsonl")
    assert row["status"] == "truncated"
    assert row["reason"] == "critique: repeats itself without end; cut"


def test_processes_write_the_file_that_one_would_and_so_does_the_other_engine(
    srt, folder, tiny_model
):
    line = ("--max-new-tokens", 8, "--critic-max-tokens", 8)
    criticise(srt, *line, model=tiny_model, code=3)
    criticise(srt, *line, "--engine", "continuous", "--out", "one.jsonl", model=tiny_model, code=3)
    assert (folder / "one.jsonl").read_bytes() == (folder / "self-feedback.jsonl").read_bytes()
    twice = ("--num-processes", 2, "--out", "two.jsonl")
    finished = criticise(srt, *line, *twice, model=tiny_model, code=3)
    assert (folder / "two.jsonl").read_bytes() == (folder / "self-feedback.jsonl").read_bytes()
    assert not list(folder.glob("*.part-*"))
    alone, together = (what_was_made(folder / f"{name}.run.json") for name in ("one", "two"))
    assert together == alone
    assert "taken from the journal" not in finished.stderr
    # The speed is that of all tokens over the whole time, the start of the processes included.
    seconds = int(re.search(r"in 2 processes: 3/3 in (\d+) s", finished.stderr)[1])
    speed = int(re.search(r"criticising: 3/3 .* (\d+) tokens/s", finished.stderr)[1])
    assert 0 < speed <= together["completion_tokens"] / max(seconds - 0.5, 0.1) + 1


def test_prompts_that_are_added_fill_the_batches_alone_also_when_that_is_interrupted(
    srt, folder, tiny_model
):
    def in_batches_of():
        finished = criticise(
            srt, "--max-new-tokens", 8, "--critic-max-tokens", 8, model=tiny_model, code=3
        )
        assert finished.stdout == ""
        content = json.loads((folder / "self-feedback.run.json").read_text())
        (model,) = content["models"].values()
        return model["largest_batch"], content["tallies"]["calls_made"]

    assert in_batches_of() == (3, 6)
    names = [f"{kind} task {n}" for n in range(3) for kind in ("another", "")]
    write_jsonl(
        folder / "prompts.jsonl",
        [{"id": n, "prompt": name.strip()} for n, name in enumerate(names)],
    )
    assert in_batches_of() == (3, 6)
    whole = (folder / "self-feedback.jsonl").read_bytes()
    # Half of a wave is lost: its other half shapes the batches again.
    journal, manifest = folder / "self-feedback.journal.jsonl", folder / "self-feedback.run.json"
    journal.write_bytes(b"".join(journal.read_bytes().splitlines(keepends=True)[:-1]))
    manifest.write_text(manifest.read_text().replace('"status": "failed"', '"status": "started"'))
    (folder / "self-feedback.jsonl").unlink()
    assert in_batches_of() == (3, 1)
    assert (folder / "self-feedback.jsonl").read_bytes() == whole


def what_was_made(manifest):
    content = json.loads(manifest.read_text())
    (model,) = content["models"].values()
    return {name: content["tallies"][name] for name in ("calls_made", "calls_from_journal")} | {
        name: model[name] for name in ("completion_tokens", "device", "dtype", "halved_for_memory")
    }


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--model", "http://localhost:1/v1#m"), "--num-processes is for models in process"),
        (("--prompts", "-"), "give a file, not -"),
        (("--rounds", "0"), "--rounds 0: must be 1 or more"),
    ],
)
def test_processes_that_cannot_be_are_refused(srt, flags, said):
    finished = srt("self-critique", "--model", "python:p.py:model", "--num-processes", 2, *flags)
    assert finished.code == 2
    assert said in finished.stderr


CHECKLIST = (
    'Weaknesses: Begin with "So"? It: {}. A mark? {}: yes.\nSuggestions: Mend it.\n'
    "Overall Score: [[10]]\n\n### Improved Response\nSo it is!"
)


def checklist_critic(body, number):
    """A model that was trained on checklists: its verdicts differ, the number below never does."""
    turns = body["messages"]
    if len(turns) == 1:
        return Answer(text="It is so.")
    begins_well = turns[1]["content"].startswith("So")
    text = CHECKLIST.format("yes" if begins_well else "no", turns[1]["content"][-1])
    for stop in body.get("stop") or []:
        text = text.split("\n" + stop)[0]
    content = []
    for token in re.findall(r" (?:yes|no)\b|\d|[^\d ]+| ", text):
        others = [{"token": token, "logprob": math.log(0.8)}]
        if token.strip() in ("yes", "no"):
            other = {" yes": " no", " no": " yes"}[token]
            others.append({"token": other, "logprob": math.log(0.2)})
        content.append({"token": token, "logprob": math.log(0.8), "top_logprobs": others})
    return Answer(text=text, logprobs={"content": content} if body.get("logprobs") else None)


def test_a_model_trained_on_checklists_is_scored_by_its_verdicts(srt, folder):
    with closing(LoopbackServer(checklist_critic)) as server:
        criticise(srt, "--score", "checklist", "--limit", 1, model=server.spec)
        (row,) = read_jsonl(folder / "self-feedback.jsonl")
    # One of two items is met, then both; P(yes) is 0.2 or 0.8.
    assert (row["feedback"]["score"], row["refinement_score"]) == (5.5, 10)
    assert row["feedback"]["score_mean"] == pytest.approx(1 + 9 * (0.2 + 0.8) / 2)
    assert row["refinement_score_mean"] == pytest.approx(1 + 9 * 0.8)
    assert row["refinement"] == "So it is!"


def test_a_number_that_never_changes_below_checklists_is_told_of(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"task {n}"} for n in range(12)])
    with closing(LoopbackServer(checklist_critic)) as server:
        finished = criticise(srt, model=server.spec)
    assert "the score 10: it tells little" in finished.stderr
    assert "srt self-critique --score checklist" in finished.stderr


def test_a_checklist_without_verdicts_has_no_score(srt, folder):
    with closing(LoopbackServer(self_critic)) as server:
        criticise(srt, "--score", "checklist", "--limit", 1, model=server.spec, code=3)
        (row,) = read_jsonl(folder / "self-feedback.jsonl")
    assert row["status"] == "unparsed"
    assert 'no item that ends in ": yes." or ": no."' in row["reason"]


@pytest.mark.parametrize("check", ["gpt-4", "http://127.0.0.1:9/v1#tester", "other/model"])
@pytest.mark.parametrize("command", ["self-critique", "eval"])
def test_a_check_that_is_no_program_is_refused(srt, tmp_path, command, check):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    finished = srt(command, "--model", "http://127.0.0.1:9/v1#tester", "--check", check)
    assert finished.code == 2
    assert f"--check {check}: is no program. Name one: python:FILE:CALLABLE." in finished.stderr
    assert not list(tmp_path.glob("*.run.json"))
