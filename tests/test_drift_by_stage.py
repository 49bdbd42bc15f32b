"""The drift table through the front door: stages on a server, people's pairs, refinements, alarms."""

import json
import re

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer
from test_build_prefs import record

from srt_cli import console
from srt_cli.errors import SrtError
from srt_cli.evaluation.contestants import read_critiques
from srt_cli.records import Prompt

OWN = {"base": 4, "sft": 6, "dpo": 10}
RIGHT = {"base": 30, "sft": 34, "dpo": 12}
"""Of 40 pairs: how many each stage scores rightly."""


def score_for(model, text, question):
    if "good pair" in text or "bad pair" in text:
        right = int(re.search(r"pair question (\d+)", question)[1]) < RIGHT.get(model, 40)
        return 8 if ("good pair" in text) == right else 3
    if model == "judge":
        return 5 + (" improved" in text and "by sft" in text)
    return OWN[model] - (" improved" not in text and model == "sft")


def behaviour(body, number):
    model, messages = body["model"], body["messages"]
    last = messages[-1]["content"]
    if "### Answer M" in last:
        first = last.split("### Answer m")[0]
        return Answer(text=f"Fine.\nVerdict: [[{'m' if 'by base' in first else 'M'}]]")
    if "### Requirements" in last:
        text = last.split("### Response")[1].split("### Requirements")[0]
    elif last.startswith("Review your response"):
        text = messages[-2]["content"]
    else:
        return Answer(text=f"Answer {number % 7} written by {model} to: {last}.")
    score = score_for(model, text, messages[0]["content"])
    generic = model == "dpo"
    number = int(re.search(r"question (\d+)", messages[0]["content"])[1])
    weak = "It could be more detailed and engaging for all readers."
    if not generic:
        weak = " ".join(f"w{number}{place}" for place in range(20))
    feedback = f"Weaknesses: {weak}\nSuggestions: Say why.\nOverall Score: [[{score}]]"
    if body.get("stop"):
        return Answer(text=feedback)
    return Answer(text=f"{feedback}\n\n### Improved Response\n{text} improved")


@pytest.fixture
def spec(tmp_path):
    server = LoopbackServer(behaviour, models=("base", "sft", "dpo", "judge"))
    rows = [{"id": f"q{n}", "prompt": f"question {n} about things"} for n in range(15)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    pairs = [
        {"prompt": f"pair question {n}", "chosen": "good pair", "rejected": "bad pair"}
        for n in range(40)
    ]
    write_jsonl(tmp_path / "pairs.jsonl", pairs)
    yield lambda name: f"{server.url}#{name}"
    server.close()


def evaluate(srt, spec, *extra):
    return srt(
        "eval", "--reference", spec("base"), "--model", spec("sft"), "--model", spec("dpo"), *extra
    )


@pytest.fixture
def whole(srt, spec, tmp_path):
    finished = evaluate(
        srt, spec, "--judge", spec("judge"), "--scorer", spec("judge"), "--pairs", "pairs.jsonl",
        "--use", "response", "--use", "refinement",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    return finished, json.loads((tmp_path / "eval.json").read_text())["stages"]


def test_a_plan_counts_what_every_stage_scores_as_its_own_critic(srt, spec):
    finished = evaluate(
        srt, spec, "--scorer", spec("judge"), "--pairs", "pairs.jsonl", "--use", "response",
        "--use", "refinement", "--dry-run",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    # Of the base 15 answers and their scores, and both sides of 40 pairs; of a stage also refinements.
    owed = re.findall(r"^ (base|sft|dpo) +(\d+) ", finished.stdout, re.MULTILINE)
    assert owed == [("sft", "140"), ("dpo", "140"), ("base", "110")]


def test_every_figure_of_the_drift_table_is_there_with_its_n(whole):
    _, (base, sft, dpo) = whole
    assert [stage["pair_accuracy"]["accuracy"]["value"] for stage in (base, sft, dpo)] == [
        0.75, 0.85, 0.3,
    ]  # fmt: skip
    for stage in (base, sft, dpo):
        for name in ("own_score", "outside_score", "top_share", "distinct_pairs", "self_bleu",
                     "degenerate"):  # fmt: skip
            assert stage[name]["low"] <= stage[name]["value"] <= stage[name]["high"], name
            assert stage[name]["n"] == 15
    assert (base["top_share"]["value"], dpo["top_share"]["value"]) == (0, 1)
    assert dpo["bias"]["bias"]["value"] == 5
    assert dpo["bias"]["skewness"]["value"] == 1
    for stage in (sft, dpo):
        assert stage["critiques"]["valid"]["value"] == 1
    assert (sft["critiques"]["generic"]["value"], dpo["critiques"]["generic"]["value"]) == (0, 1)
    # What sft scores higher the outside scorer does too; what dpo refines it leaves at 5.
    assert sft["critiques"]["outside"]["own_gain"]["value"] == 1
    assert sft["critiques"]["outside"]["outside_gain"]["value"] == 1
    assert sft["critiques"]["outside"]["false_accepts"]["value"] == 0
    assert dpo["critiques"]["outside"]["outside_gain"]["value"] == 0


def test_a_step_is_paired_and_a_first_stage_is_held_against_one_half(whole):
    _, (base, sft, dpo) = whole
    assert base["to_previous"] is None
    step = sft["to_previous"]
    assert step["paired"]["difference"]["value"] == 0.5
    assert (step["paired"]["only_a"], step["paired"]["only_b"]) == (15, 0)
    # A sign test of 15 wins, and two steps: Holm doubles it.
    assert step["paired"]["p_value"] == pytest.approx(2 * 0.5**15)
    assert step["p_adjusted"] == pytest.approx(4 * 0.5**15)
    assert dpo["to_previous"]["paired"]["difference"]["value"] == 0


def test_telling_peoples_pairs_apart_less_often_is_an_alarm(srt, spec, tmp_path):
    finished = evaluate(srt, spec, "--judge", spec("judge"), "--pairs", "pairs.jsonl")
    assert finished.code == 0, finished.stderr
    _, sft, dpo = json.loads((tmp_path / "eval.json").read_text())["stages"]
    assert sft["echo"]["colour"] == "unknown"
    assert dpo["echo"]["colour"] == "amber"
    assert dpo["pairs_to_previous"]["difference"]["value"] == pytest.approx(-22 / 40)
    assert dpo["pairs_to_previous"]["only_b"] == 22
    assert "amber alarm: it tells people's pairs apart 55 points less often" in finished.stderr


def test_critiques_of_an_evaluation_are_a_feedback_file(srt, spec, whole, tmp_path):
    rows = read_jsonl(tmp_path / "eval.feedback.jsonl")
    assert len(rows) == 30
    assert {row["refinement_score"] for row in rows} == {6, 10}
    finished = srt("eval", "--feedback", "eval.feedback.jsonl", "--out", "quality.json")
    assert finished.code == 0, finished.stderr
    again = evaluate(
        srt, spec, "--model", "eval.feedback.jsonl", "--judge", spec("judge"), "--pairs",
        "pairs.jsonl", "--out", "again.json", "--limit", 15,
    )  # fmt: skip
    assert again.code == 0, again.stderr
    stages = json.loads((tmp_path / "again.json").read_text())["stages"]
    assert stages[3]["critiques"]["valid"]["n"] == 15
    assert stages[3]["pair_accuracy"] is None


def test_the_table_fits_eighty_columns_and_each_alarm_has_its_reason(srt, spec, monkeypatch):
    monkeypatch.setattr(console._result, "width", 80)
    monkeypatch.setattr(type(console._result), "is_terminal", True)
    finished = evaluate(
        srt, spec, "--judge", spec("judge"), "--scorer", spec("judge"), "--pairs", "pairs.jsonl",
        "--use", "response", "--use", "refinement",
    )  # fmt: skip
    table = finished.stdout.split("drift, stage by stage")[1].split("alarm")[0]
    lines = [line.rstrip() for line in table.splitlines() if line.strip()]
    assert max(map(len, lines)) <= 80
    # Nothing is folded: every row has a label and three figures.
    rows = [re.split(r"\s{2,}", line.strip()) for line in lines[2:]]
    assert {len(row) for row in rows} <= {4, 5}
    assert "human pairs right" in [row[0] for row in rows]
    assert "dpo, red: it praises itself more without being better" in finished.stdout


def test_stages_that_cannot_be_scored_are_refused_before_any_work(srt, spec, tmp_path):
    judged = ("--judge", spec("judge"))
    programs = srt(
        "eval", "--model", "python:x.py:f", "--reference", spec("base"), "--pairs", "pairs.jsonl",
        *judged,
    )  # fmt: skip
    assert programs.code == 2
    assert "--pairs needs a model that scores" in programs.stderr
    refined = evaluate(srt, spec, "--scorer", spec("judge"), "--use", "refinement")
    assert refined.code == 2
    assert "--scorer scores direct answers. Pass --use response too" in refined.stderr
    rounds = evaluate(srt, spec, *judged, "--rounds", 2)
    assert rounds.code == 2
    assert "Pass --use refinement too" in rounds.stderr
    assert not (tmp_path / "eval.journal.jsonl").exists()


def test_feedback_with_a_field_of_ones_own_is_named_with_its_row(tmp_path):
    row = record(id="a", prompt="q").model_dump() | {"note": "mine"}
    write_jsonl(tmp_path / "mine.jsonl", [row])
    with pytest.raises(SrtError, match=r"mine\.jsonl: row 'a': .*note"):
        read_critiques(tmp_path / "mine.jsonl", [Prompt(id="a", prompt="q")])
