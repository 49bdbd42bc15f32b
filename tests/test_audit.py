"""The audit of preferences: an outside judge finds the share of wrong labels, and DPO allows for it."""

import json
import random

import pytest
from conftest import read_jsonl, write_jsonl
from test_build_prefs import record

from srt_cli.audit import count_audit
from srt_cli.pairing import Sample
from srt_cli.records import Message, Preference

JUDGES = """
def truth(prompt, a, b):
    return float("good" in a) if ("good" in a) != ("good" in b) else 0.5

def broken(prompt, a, b):
    raise RuntimeError("no opinion")
"""


def pair(number, gain=1.0):
    return Preference(
        id=str(number), prompt=[Message(role="user", content=f"q{number}")],
        chosen=[Message(role="assistant", content="c")],
        rejected=[Message(role="assistant", content="r")],
        chosen_score=5 + gain, rejected_score=5, source="m",
    )  # fmt: skip


@pytest.fixture
def feedback(tmp_path):
    """60 pairs, of which every fifth with a small gain is labelled the wrong way round."""
    (tmp_path / "judge.py").write_text(JUDGES)
    rows = []
    for number in range(60):
        wrong = number % 5 == 0
        refinement, response = (
            (f"dull {number}", f"good {number}") if wrong else (f"good {number}", f"dull {number}")
        )
        rows.append(
            record(id=str(number), prompt=f"q{number}", response=response, refinement=refinement,
                   score=4, refinement_score=5 if wrong or number % 2 else 8)
        )  # fmt: skip
    write_jsonl(tmp_path / "self-feedback.jsonl", [row.model_dump() for row in rows])
    return tmp_path


AUDIT = ("--audit", 60, "--audit-judge", "python:judge.py:truth")


def test_the_audit_finds_the_share_of_wrong_labels_and_the_gain_to_ask_for(srt, feedback):
    finished = srt("build-prefs", *AUDIT, "--min-precision", 0.95)
    assert finished.code == 0, finished.stderr
    audit = json.loads((feedback / "prefs.run.json").read_text())["tallies"]["audit"]
    assert (audit["right"], audit["wrong"], audit["ties"], audit["invalid"]) == (48, 12, 0, 0)
    assert audit["noise"] == pytest.approx(0.2)
    assert audit["precision"]["low"] < 0.8 < audit["precision"]["high"]
    assert audit["gain_to_ask_for"] == 4
    assert "--min-gain 4 reaches 95%" in finished.stderr
    assert len(read_jsonl(feedback / "prefs.jsonl")) == 60


def test_every_pair_is_seen_in_both_orders_and_a_second_audit_asks_nothing(srt, feedback):
    srt("build-prefs", *AUDIT)
    journal = (feedback / "prefs.journal.jsonl").read_bytes()
    assert journal.count(b"\n") == 120
    assert srt("build-prefs", *AUDIT).code == 0
    assert (feedback / "prefs.journal.jsonl").read_bytes() == journal


def test_a_judge_that_fails_leaves_the_pairs_and_says_so(srt, feedback):
    line = ("build-prefs", "--audit", 60, "--audit-judge", "python:judge.py:broken")
    finished = srt(*line)
    assert finished.code == 0
    assert "60 unread; nothing can be said of the labels" in finished.stderr
    assert len(read_jsonl(feedback / "prefs.jsonl")) == 60


def test_an_audit_without_a_judge_is_a_usage_error(srt, feedback):
    assert srt("build-prefs", "--audit", 5).code == 2
    assert srt("build-prefs", "--audit-judge", "gpt-4").code == 2


@pytest.mark.parametrize("error", [0.1, 0.2, 0.3])
def test_the_interval_covers_the_planted_error_in_nine_of_ten_repetitions(error):
    pairs = [pair(number) for number in range(200)]
    covered = 0
    for seed in range(100):
        wrong = random.Random(seed)
        said = [float(wrong.random() >= error) for _ in pairs]
        found = count_audit("j", pairs, [v for v in said for _ in range(2)], 0.8)
        covered += 1 - found.precision.high <= error <= 1 - found.precision.low
    assert covered >= 90


def test_the_sample_does_not_depend_on_the_order_of_the_pairs():
    def sample(order):
        drawn = Sample(10, seed=3)
        for number in order:
            drawn.offer(str(number).encode(), pair(number))
        return [each.id for each in drawn.pairs()]

    numbers = list(range(100))
    first = sample(numbers)
    assert len(first) == 10
    assert sample(numbers[::-1]) == first
    assert sample(range(100, 200)) != first


def test_a_small_gain_may_be_wrong_where_a_large_one_is_right():
    pairs = [pair(n, gain=1) for n in range(20)] + [pair(n, gain=4) for n in range(20, 40)]
    said = [0.0] * 20 + [1.0] * 40 + [1.0] * 20
    found = count_audit("j", pairs, said, 0.9)
    assert [(band.gain, band.precision.value) for band in found.from_gain] == [(1, 0.75), (4, 1.0)]
    assert found.gain_to_ask_for == 4


def dpo(srt, folder, model, *flags):
    return srt("dpo", "--prefs", "prefs.jsonl", "--model", model, "--global-batch", 4, *flags)


def test_dpo_allows_for_what_the_audit_found(srt, feedback, tiny_model):
    srt("build-prefs", *AUDIT, "--limit", 8)
    line = ("--loss-type", "robust", "--label-smoothing", "auto")
    finished = dpo(srt, feedback, tiny_model, *line)
    assert finished.code == 0, finished.stderr
    settings = json.loads((feedback / "models/dpo/run.json").read_text())["settings"]
    assert float(settings["label_smoothing"]) == pytest.approx(0.25)  # 2 of 8
    again = dpo(srt, feedback, tiny_model, *line)
    assert "trained already" in again.stderr
    repeated = srt("dpo", "--config", "models/dpo/run.json", "--out", "models/dpo-2")
    assert repeated.code == 0, repeated.stderr


@pytest.mark.parametrize(
    ("flags", "code", "message"),
    [
        (("--label-smoothing", "0.1"), 2, "does nothing under --loss-type sigmoid"),
        (("--loss-type", "robust", "--label-smoothing", "0.5"), 2, "half of the labels wrong"),
        (("--loss-type", "robust", "--label-smoothing", "much"), 2, "give a share, or auto"),
        (("--loss-type", "robust", "--label-smoothing", "auto"), 1, "was never audited"),
    ],
)
def test_a_smoothing_that_would_do_nothing_is_refused(
    srt, feedback, tiny_model, flags, code, message
):
    srt("build-prefs")
    finished = dpo(srt, feedback, tiny_model, *flags)
    assert finished.code == code
    assert message in finished.stderr
