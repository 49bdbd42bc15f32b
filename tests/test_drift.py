"""The drift table: own scores against outside scores, stage by stage, and an alarm."""

import json

import numpy as np
import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from loopback_server import Answer, LoopbackServer

from srt_cli.stats.diversity import distinct_pairs, diversity_change, self_bleu
from srt_cli.stats.echo import Signs, distance_skewness, echo_alarm, self_bias


def scores(mean, n=60, seed=0):
    return (np.random.default_rng(seed).normal(mean, 0.5, n)).tolist()


def test_praise_without_improvement_is_red():
    alarm = echo_alarm(scores(6), scores(8, seed=1), scores(5, seed=2), scores(5, seed=3))
    assert alarm.colour == "red"
    assert alarm.reason.startswith("it praises itself more without being better")
    assert alarm.excess.low > 0 >= alarm.outside_growth.low


def test_improvement_that_others_see_too_is_green():
    alarm = echo_alarm(scores(6), scores(8, seed=1), scores(5, seed=2), scores(7, seed=3))
    assert alarm.colour == "green"


def test_longer_answers_without_more_wins_at_equal_length_are_amber():
    same = scores(6), scores(6), scores(5), scores(5)
    assert echo_alarm(*same, Signs(length_growth=1.3, gain=-0.01)).colour == "amber"
    assert echo_alarm(*same, Signs(length_growth=1.3, gain=0.05)).colour == "green"
    assert echo_alarm(*same, Signs(diversity_change=0.8, gain=0.0)).colour == "amber"


def test_without_judge_or_check_nothing_is_amber():
    same = scores(6), scores(6), scores(5), scores(5)
    assert echo_alarm(*same, Signs(length_growth=1.3, diversity_change=0.8)).colour == "green"


def test_too_few_scores_tell_nothing():
    assert echo_alarm([1.0] * 9, [9.0] * 9, [1.0] * 9, [1.0] * 9).colour == "unknown"


def test_self_bias_by_hand():
    found = self_bias([3.0, 4.0, 5.0], [2.0, 2.0, 2.0])
    assert found.bias.value == 2
    assert found.skewness.value == pytest.approx(0.7778, abs=1e-4)
    assert self_bias([], []) is None


@given(st.lists(st.floats(1, 10), min_size=10, max_size=30))
def test_a_stage_that_changes_nothing_is_never_red(values):
    assert echo_alarm(values, values, values, values).colour == "green"


def test_distinct_pairs_counts_different_word_pairs():
    found = distinct_pairs(["a b a b", "a b"])
    assert found.value == 2 / 4
    # Without the first text one of one pair is different, without the second two of three.
    assert found.standard_error == pytest.approx(1 / 6)
    assert distinct_pairs(["one", ""]) is None


def test_diversity_is_compared_at_equal_length():
    short = [f"answer {n} is new" for n in range(20)]
    longer = [f"{text} and so on and so on and so on" for text in short]
    assert distinct_pairs(longer).value < distinct_pairs(short).value / 2
    assert diversity_change(short, longer) == 1
    assert diversity_change(short, ["the same thing here"] * 20) < 0.2


def test_self_bleu_is_1_for_one_text_over_and_over():
    assert self_bleu(["a b c d e"] * 3).value == 1
    texts = ["the cat sat on the mat", "a dog ran in a park", "the cat sat on a chair"]
    # The first by hand: 1-grams 4 of 6 (the, once clipped; cat, sat, on), 2-grams 3 of 5,
    # 3-grams 2 of 4, 4-grams 1 of 3; no brevity penalty.
    first = (4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    second = (1 / 6 * 0.1 / 5 * 0.1 / 4 * 0.1 / 3) ** 0.25
    third = (5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25
    assert self_bleu(texts).value == pytest.approx((first + second + third) / 3)
    assert self_bleu(["too short", "as well"]) is None


@given(st.lists(st.integers(-9, 9), min_size=1, max_size=30))
def test_distance_skewness_is_its_definition(errors):
    apart = sum(abs(a - b) for a in errors for b in errors)
    summed = sum(abs(a + b) for a in errors for b in errors)
    expected = 1 - apart / summed if summed else 0.0
    assert distance_skewness(errors) == pytest.approx(expected, abs=1e-9)


@pytest.fixture
def servers(tmp_path):
    """A base that is modest and a stage that praises itself; an outside judge that sees no change."""
    own_score = {"base": 4, "tuned": 9}

    def behaviour(body, number):
        last = body["messages"][-1]["content"]
        if last.startswith("Review your response"):
            score = own_score[body["model"]]
            return Answer(text=f"Weaknesses: w\nSuggestions: s\nOverall Score: [[{score}]]")
        if "### Requirements" in last:
            return Answer(text="Weaknesses: w\nSuggestions: s\nOverall Score: [[5]]")
        return Answer(text=f"{body['model']} says {last}")

    server = LoopbackServer(behaviour, models=("base", "tuned", "judge"))
    rows = [{"id": f"q{n}", "prompt": f"question {n}"} for n in range(12)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    yield lambda name: f"{server.url}#{name}"
    server.close()


def test_a_stage_that_praises_itself_sets_off_the_alarm(srt, servers, tmp_path):
    results = {
        "results": {"gsm8k": {"exact_match,strict": 0.25, "exact_match_stderr,strict": 0.01}}
    }
    (tmp_path / "lm.json").write_text(json.dumps(results))
    finished = srt(
        "eval", "--reference", servers("base"), "--model", servers("tuned"),
        "--scorer", servers("judge"), "--objective", f"{servers('tuned')}=lm.json",
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert "red alarm: it praises itself more without being better" in finished.stderr
    base, tuned = json.loads((tmp_path / "eval.json").read_text())["stages"]
    assert (base["own_score"]["value"], tuned["own_score"]["value"]) == (4, 9)
    assert (base["outside_score"]["value"], tuned["outside_score"]["value"]) == (5, 5)
    assert tuned["bias"]["bias"]["value"] == 4
    assert tuned["echo"]["colour"] == "red"
    assert tuned["objective"]["gsm8k exact_match"]["value"] == 0.25
    assert "drift, stage by stage" in finished.stdout
    assert len(read_jsonl(tmp_path / "eval.scores.jsonl")) == 48
    page = (tmp_path / "report.html").read_text()
    assert "drift, stage by stage" in page
    assert "red alarm" in page


@pytest.mark.parametrize(
    ("given", "code", "message"),
    [
        ("lm.json", 2, "write MODEL=results.json"),
        ("tuned=none.json", 1, "none.json: no such file"),
        ("tuned=prompts.jsonl", 1, "not a result of lm-evaluation-harness"),
        ("other=prompts.jsonl", 2, "other is no contestant. Name one of: http"),
    ],
)
def test_bad_objective_files_are_said_before_any_work(srt, servers, given, code, message):
    finished = srt("eval", "--reference", servers("base"), "--model", servers("tuned"),
                   "--scorer", servers("judge"), "--objective", given)  # fmt: skip
    assert finished.code == code
    assert message in finished.stderr
