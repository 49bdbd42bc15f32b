"""How a judge is asked: by the odds of one letter, by a line behind reasons, in the user's words."""

import json
import math

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer

from srt_cli.records import Prompt
from srt_cli.templates import fill_judge_template, read_letter

PROGRAMS = """
def base(prompt):
    return "plain " + prompt.id

def better(prompt):
    return "good " + prompt.id

def judge_exclamations(prompt, a, b):
    return (1 + (a.count("!") > b.count("!")) - (a.count("!") < b.count("!"))) / 2
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAMS)
    rows = [{"id": f"q{n}", "prompt": f"question {n}"} for n in range(6)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    return tmp_path


@pytest.fixture
def serve():
    running = []

    def start(behaviour):
        running.append(LoopbackServer(behaviour))
        return running[-1]

    yield start
    for server in running:
        server.close()


def evaluate(srt, judge, *extra):
    line = ["eval", "--model", "python:p.py:better", "--reference", "python:p.py:base"]
    return srt(*line, "--judge", judge, *extra)


def good_is_first(body):
    text = body["messages"][-1]["content"]
    return text.index("good ") < text.index("plain ")


def with_odds(body, number):
    """Says with 90 % that the good answer is better."""
    if body["max_tokens"] > 1:
        return Answer(text="Reasons.\nVerdict: [[tie]]")
    best = ("M", "m") if good_is_first(body) else ("m", "M")
    odds = {f" {best[0]}": math.log(0.63), best[1]: math.log(0.07), "The": math.log(0.3)}
    return Answer(text=best[0], finish_reason="length", completion_tokens=1, top_logprobs=odds)


def without_odds(body, number):
    letter = "M" if good_is_first(body) else "m"
    return Answer(text=f"It is better.\nVerdict: [[{letter}]]")


def judged(folder):
    return json.loads((folder / "eval.json").read_text())["rows"][1]["judged"][0]


def test_the_odds_of_a_letter_are_the_preference(srt, serve, folder):
    server = serve(with_odds)
    finished = evaluate(srt, server.spec)
    assert finished.code == 0, finished.stderr
    assert judged(folder)["win_rate"]["value"] == pytest.approx(0.9)
    assert judged(folder)["statuses"] == {"ok": 12}
    assert {(r["max_tokens"], r["top_logprobs"]) for r in server.requests} == {(1, 20)}
    assert {row["verdict"] for row in read_jsonl(folder / "judgments.jsonl")} == {
        "P(first) = 0.9000", "P(first) = 0.1000",
    }  # fmt: skip


def test_a_judge_without_log_probabilities_is_asked_for_reasons(srt, serve, folder):
    server = serve(without_odds)
    finished = evaluate(srt, server.spec)
    assert finished.code == 0, finished.stderr
    assert judged(folder)["win_rate"]["value"] == 1
    # Found out once, not for every pair.
    letters = [body for body in server.requests if body["max_tokens"] == 1]
    assert len(letters) == 1
    assert "gives no log-probabilities: it is asked for reasons" in finished.stderr
    assert '"unparsed"' not in (folder / "judgments.jsonl").read_text()


def test_reasons_may_be_asked_for_although_there_are_odds(srt, serve, folder):
    server = serve(with_odds)
    evaluate(srt, server.spec, "--verdicts", "reasoned")
    assert judged(folder)["ties"] == 6
    assert all("top_logprobs" not in body for body in server.requests)


def test_odds_may_be_insisted_on(srt, serve, folder):
    finished = evaluate(srt, serve(without_odds).spec, "--verdicts", "weighted")
    assert finished.code == 3
    assert "Pass --verdicts reasoned, or auto" in finished.stderr
    assert judged(folder)["statuses"] == {"unparsed": 12}


def test_a_judge_that_says_nothing_gives_no_verdict(srt, serve, folder):
    def silent(body, number):
        answer = with_odds(body, number)
        answer.text, answer.finish_reason = "", "stop"
        return answer

    finished = evaluate(srt, serve(silent).spec)
    assert finished.code == 3
    assert judged(folder)["statuses"] == {"unparsed": 12}
    assert judged(folder)["win_rate"] is None


def test_a_template_of_the_users_own_is_filled_and_kept_apart_from_the_texts(srt, serve, folder):
    (folder / "judge.txt").write_text(
        "Q:\n{instruction}\nM:\n{answer_M}\nm:\n{answer_m}\nSay Verdict."
    )
    server = serve(without_odds)
    finished = evaluate(srt, server.spec, "--judge-template", "judge.txt")
    assert finished.code == 0, finished.stderr
    assert server.requests[0]["messages"][-1]["content"].startswith("Q:\n```\nquestion")
    assert judged(folder)["win_rate"]["value"] == 1
    inputs = json.loads((folder / "eval.run.json").read_text())["inputs"]
    assert inputs["judge_template"]["sha256"]


def test_a_template_without_its_places_is_refused(srt, serve, folder):
    (folder / "judge.txt").write_text("Which is better?")
    finished = evaluate(srt, serve(without_odds).spec, "--judge-template", "judge.txt")
    assert finished.code == 1
    assert "judge.txt: has no {instruction}, {answer_M}, {answer_m}" in finished.stderr


def test_what_a_text_holds_is_never_a_place():
    prompt = Prompt(id="a", prompt="what is {answer_m}?")
    template = "{instruction} {answer_M} {answer_m}"
    (message,) = fill_judge_template(template, prompt, "{answer_m}", "second")
    assert message.content.count("second") == 1


def test_letter_odds_by_hand():
    odds = {"M": math.log(0.3), " M": math.log(0.1), "m": math.log(0.4), "The": math.log(0.2)}
    assert read_letter(odds) == (pytest.approx(0.8), pytest.approx(0.5))
    assert read_letter({"M": math.log(0.25)}) == (pytest.approx(0.25), 1)
    assert read_letter({"Mm": -0.1}) == (0, None)


def of_few_words(body, number):
    """Writes a letter that it hardly believes in: 60 % of what it would say is no letter."""
    if body["max_tokens"] > 1:
        return without_odds(body, number)
    odds = {"M": math.log(0.3), "m": math.log(0.1), "The": math.log(0.2), "Both": math.log(0.2)}
    return Answer(text="M", finish_reason="length", completion_tokens=1, top_logprobs=odds)


def test_letters_that_hold_less_than_half_of_the_probability_are_no_verdict(srt, serve, folder):
    server = serve(of_few_words)
    finished = evaluate(srt, server.spec)
    assert finished.code == 0, finished.stderr
    assert judged(folder)["win_rate"]["value"] == 1  # by its reasons
    assert len(server.requests) == 24
    said = (
        "in 12 of 12 verdicts the letters M and m hold less than half of the probability (on average "
        "40%): there it is asked for reasons and a verdict line instead."
    )
    assert said in finished.stderr
    told = json.loads((folder / "eval.run.json").read_text())["tallies"]["letter_shares"]
    shares = {"verdicts": 12, "mean": 0.4, "below_half": 12}
    assert told == {f"judging by {server.spec}": shares}


def test_a_verdict_by_weak_letters_that_is_insisted_on_is_unparsed(srt, serve, folder):
    finished = evaluate(srt, serve(of_few_words).spec, "--verdicts", "weighted")
    assert finished.code == 3
    assert judged(folder)["statuses"] == {"unparsed": 12}
    assert "hold less than half of the probability (on average 40%): no preference is read" in (
        finished.stderr
    )


@pytest.mark.parametrize(
    ("said", "param"),
    [
        ("Invalid value for 'top_logprobs': must be less than or equal to 5.", "top_logprobs"),
        ("top_logprobs must be between 0 and 5, but got 20", None),
        ("Requested sample logprobs of 20, which is greater than max allowed: 5", None),
    ],
)
def test_a_server_that_tells_fewer_alternatives_is_asked_for_fewer(srt, serve, folder, said, param):
    def limited(body, number):
        if body.get("top_logprobs", 0) > 5:
            return Answer(status=400, error={"message": said, "param": param})
        return with_odds(body, number)

    server = serve(limited)
    finished = evaluate(srt, server.spec)
    assert finished.code == 0, finished.stderr
    assert judged(folder)["win_rate"]["value"] == pytest.approx(0.9)
    assert [body["top_logprobs"] for body in server.requests] == [20, *[5] * 12]


def test_letters_that_0_1_0_asked_for_are_not_paid_for_again(srt, serve, folder, monkeypatch):
    server = serve(with_odds)
    with monkeypatch.context() as before:
        before.setattr("srt_cli.evaluation.judging.LETTER_LOGPROBS", 5)
        assert evaluate(srt, server.spec, "--limit", 3).code == 0
    assert {body["top_logprobs"] for body in server.requests} == {5}
    (folder / "eval.json").unlink()
    assert evaluate(srt, server.spec).code == 0
    assert [body["top_logprobs"] for body in server.requests[6:]] == [20] * 6


def test_offline_replays_all_or_says_what_is_missing(srt, serve, folder):
    server = serve(with_odds)
    assert evaluate(srt, server.spec, "--limit", 4).code == 0
    first = (folder / "eval.json").read_bytes()
    server.close()
    asked = len(server.requests)
    again = evaluate(srt, server.spec, "--limit", 4, "--offline")
    assert again.code == 0, again.stderr
    assert (folder / "eval.json").read_bytes() == first
    more = evaluate(srt, server.spec, "--offline")
    assert more.code == 1
    assert (
        "--offline: answers of python:p.py:base: 2 of 6 are not whole in the journal" in more.stderr
    )
    assert len(server.requests) == asked


def test_a_local_model_judges_by_its_odds(srt, folder, tiny_model):
    finished = evaluate(srt, str(tiny_model), "--limit", 2, "--verdicts", "weighted")
    statuses = judged(folder)["statuses"]
    # A random model's first token is hardly a letter; what counts is that odds were asked for.
    assert set(statuses) <= {"ok", "unparsed"}
    assert finished.code in (0, 3)
    raw = [row for row in read_jsonl(folder / "eval.journal.jsonl") if "letter" in row["call"]]
    assert all(len(row["logprobs"][0]["top"]) >= 1 for row in raw)


def test_each_round_refines_the_last_and_is_reported(srt, serve, folder):
    def behaviour(body, number):
        last = body["messages"][-1]["content"]
        if not last.startswith("Review your response"):
            return Answer(text="good")
        response = body["messages"][-2]["content"]
        return Answer(text=f"Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]\n\n"
                           f"### Improved Response\n{response}!")  # fmt: skip

    finished = srt(
        "eval", "--reference", "python:p.py:base", "--model", serve(behaviour).spec,
        "--judge", "python:p.py:judge_exclamations", "--use", "response", "--use", "refinement",
        "--rounds", 3, "--markdown", "tables.md",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    rows = json.loads((folder / "eval.json").read_text())["rows"]
    assert [row["use"] for row in rows[1:]] == [
        "response", "refinement", "refinement-2", "refinement-3",
    ]  # fmt: skip
    outputs = read_jsonl(folder / "eval.outputs.jsonl")
    assert [o["response"] for o in outputs if o["id"] == "q0"][1:] == [
        "good",
        "good!",
        "good!!",
        "good!!!",
    ]
    assert "refined x3" in finished.stdout
    assert "| --- |" in (folder / "tables.md").read_text()


@pytest.mark.parametrize(
    ("cut_at", "status", "reason"),
    [
        ("critique", "truncated", "critique: cut off at the token limit"),
        ("draft", "ok", None),
    ],
)
def test_a_refinement_counts_as_whole_when_its_critique_is(
    srt, serve, folder, cut_at, status, reason
):
    def behaviour(body, number):
        asks = body["messages"][-1]["content"].startswith("Review your response")
        cut = "length" if asks == (cut_at == "critique") else "stop"
        text = "a draft"
        if asks:
            text = (
                "Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]\n\n"
                "### Improved Response\na refine"
            )
        return Answer(text=text, finish_reason=cut)

    finished = srt(
        "eval", "--reference", "python:p.py:base", "--model", serve(behaviour).spec,
        "--judge", "python:p.py:judge_exclamations", "--use", "response", "--use", "refinement",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    _, direct, refined = json.loads((folder / "eval.json").read_text())["rows"]
    assert direct["statuses"] == {"truncated" if cut_at == "draft" else "ok": 6}
    assert refined["statuses"] == {status: 6}
    assert refined["parsed"]["value"] == (status == "ok")
    texts = {
        o["response"] for o in read_jsonl(folder / "eval.outputs.jsonl") if o["parsed"] is not None
    }
    assert texts == {"a refine" if status == "ok" else "a draft"}
    critiques = read_jsonl(folder / "eval.feedback.jsonl")
    assert {(row["status"], row["reason"]) for row in critiques} == {(status, reason)}
