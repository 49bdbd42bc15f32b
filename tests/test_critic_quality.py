"""srt eval --feedback: critiques as texts, and their scores against an outside scorer."""

import json
import sys

import pytest
from conftest import write_jsonl
from test_sft import feedback_rows

from srt_cli.stats.critiques import generic_share, is_grounded, same_language

SCORER = """
from srt_cli.records import Feedback

def strict(prompt, response):
    score = 3 if "better" in response else 5
    return Feedback(weaknesses="w", suggestions="s", score=score), response

def constant(prompt, response):
    return Feedback(weaknesses="w", suggestions="s", score=5), response
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "s.py").write_text(SCORER)
    rows = feedback_rows(12)
    for number, row in enumerate(rows):
        row["response"] = f"the answer is number {number} and nothing else at all"
        row["refinement"] = f"better: {number}"
        row["feedback"] = {
            "weaknesses": f'It says "number {number} and nothing else" only.' if number % 2
            else "It is too short and could be more detailed and engaging overall.",
            "suggestions": "Say more.", "score": 4.0 + number % 3,
        }  # fmt: skip
        row["refinement_score"] = 9.0
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    return tmp_path


def quality(folder):
    return json.loads((folder / "eval.json").read_text())["feedback"]


def test_critiques_are_described_without_any_model(srt, folder):
    finished = srt("eval", "--feedback", "feedback.jsonl")
    assert finished.code == 0, finished.stderr
    (found,) = quality(folder)
    assert found["grounded"]["value"] == 0.5
    assert found["generic"]["value"] == 0.5
    assert found["valid"]["value"] == 1
    assert found["outside"] is None
    assert "about the answer" in finished.stdout


def test_without_py3langid_languages_are_not_told_apart_and_that_is_said(srt, folder, monkeypatch):
    monkeypatch.setitem(sys.modules, "py3langid", None)
    finished = srt("eval", "--feedback", "feedback.jsonl")
    assert finished.code == 0, finished.stderr
    assert quality(folder)[0]["same_language"] is None
    assert "in its language" not in finished.stdout
    assert "needs the package py3langid: pip install 'srt-cli[languages]'" in finished.stderr


def test_an_outside_scorer_shows_inflation_and_false_accepts(srt, folder):
    finished = srt("eval", "--feedback", "feedback.jsonl", "--scorer", "python:s.py:strict")
    assert finished.code == 0, finished.stderr
    outside = quality(folder)[0]["outside"]
    assert outside["own_gain"]["value"] == pytest.approx(4)
    assert outside["outside_gain"]["value"] == -2
    assert outside["inflation"]["value"] == pytest.approx(6)
    assert outside["false_accepts"]["value"] == 1
    assert outside["bias"]["bias"]["value"] == pytest.approx(0)
    assert set(outside["calibration"]) == {"4", "5", "6"}
    # Always 5 from outside: no ranks to compare, but a distance, and chance-corrected agreement of 0.
    assert outside["agreement"]["mean_distance"]["value"] == pytest.approx(2 / 3)
    assert outside["agreement"]["weighted_kappa"]["value"] == pytest.approx(0)
    assert "the critic sees 6.0 points more gain than python:s.py:strict does" in finished.stderr


def test_a_plan_of_scores_sends_and_writes_nothing(srt, folder):
    before = sorted(path.name for path in folder.iterdir())
    for scorer, said in (
        ((), "nothing is owed"),
        (("--scorer", "python:s.py:strict"), "scores: 24"),
    ):
        finished = srt("eval", "--feedback", "feedback.jsonl", *scorer, "--dry-run")
        assert finished.code == 0, finished.stderr
        assert said in finished.stdout
    assert sorted(path.name for path in folder.iterdir() if path.name != "__pycache__") == before
    assert srt("eval", "--feedback", "feedback.jsonl", *scorer).code == 0
    assert (
        "nothing is owed"
        in srt("eval", "--feedback", "feedback.jsonl", *scorer, "--dry-run").stdout
    )


def test_a_scorer_that_never_varies_has_no_rank_correlation(srt, folder):
    finished = srt("eval", "--feedback", "feedback.jsonl", "--scorer", "python:s.py:constant")
    assert quality(folder)[0]["outside"]["agreement"]["spearman"] is None
    assert "gives every draft the same score" in finished.stderr
    assert "nan" not in finished.stdout.lower()


def test_two_ways_at_once_are_a_usage_error(srt, folder):
    finished = srt("eval", "--feedback", "feedback.jsonl", "--pairs", "feedback.jsonl")
    assert finished.code == 2
    assert "choose one of them" in finished.stderr
    for extra in (("--judge", "gpt-4"), ("--check", "python:s.py:strict")):
        finished = srt("eval", "--feedback", "feedback.jsonl", *extra)
        assert finished.code == 2
        assert "--feedback looks at critiques alone: no --judge or --check" in finished.stderr
    (folder / "srt.toml").write_text('judge = ["gpt-4"]\n[eval]\ncritic-prompt = "table-1"\n')
    finished = srt("eval", "--feedback", "feedback.jsonl")
    assert finished.code == 0, finished.stderr


def test_grounded_is_a_quotation_or_four_words_in_a_row():
    answer = "Pears are green and they grow on trees."
    assert is_grounded('It claims "they grow on trees" without proof.', answer)
    assert is_grounded("That pears are green and sweet is left open.", answer)
    assert not is_grounded("It is too short and not engaging.", answer)


def test_a_critique_in_another_language_is_told_apart_and_a_short_one_is_not_judged():
    english = "The answer names no sources although the question asks for them in so many words."
    german = "Die Antwort nennt keine Quellen, obwohl ausdrücklich nach ihnen gefragt worden war."
    chinese = "这个回答没有提供任何来源，尽管问题明确要求提供来源，而且回答太短，没有解释原因。"
    assert same_language(english, english.replace("answer", "reply"))
    assert same_language(english, german) is False
    assert same_language(english, chinese) is False
    assert same_language(chinese, chinese)
    assert same_language("Too short.", german) is None


def test_generic_critiques_are_those_that_resemble_another():
    same = "it is too short and could be more detailed and engaging overall"
    other = "the second sentence confuses pears with apples which grow elsewhere entirely"
    assert generic_share([same, same + " really", other]).value == pytest.approx(2 / 3)
    assert generic_share([same]) is None
