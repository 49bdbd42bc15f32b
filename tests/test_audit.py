"""The audit of preferences: an outside judge finds the share of wrong labels, and DPO allows for it."""

import json
import random

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer
from test_build_prefs import record

from srt_cli.pairs.audit import count_audit
from srt_cli.pairs.pairing import Pairing, Sample, pair_key, refined_of, text_key
from srt_cli.pairs.rows import read_row
from srt_cli.records import Message, Preference
from srt_cli.runs.jsonl import to_line
from srt_cli.stages.dpo import Dpo
from srt_cli.training.dpo import label_smoothing_of

JUDGES = """
def truth(prompt, a, b):
    return float("good" in a) if ("good" in a) != ("good" in b) else 0.5

def broken(prompt, a, b):
    raise RuntimeError("no opinion")

def half(prompt, a, b):
    import os
    if prompt.text[-1] in "02468" and not os.path.exists("mended"):
        raise RuntimeError("no opinion on even ones")
    return truth(prompt, a, b)
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
    assert "only 80% of the labels are right; --min-gain 4 reaches 95%" in finished.stderr
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
    assert (
        "120 of 120 replies hold no verdict (120 failed); the first one says: " in finished.stderr
    )
    assert "no opinion" in finished.stderr
    assert len(read_jsonl(feedback / "prefs.jsonl")) == 60


def test_a_judge_that_fails_half_way_keeps_what_was_judged(srt, feedback):
    line = ("build-prefs", "--audit", 60, "--audit-judge", "python:judge.py:half")
    first = srt(*line)
    assert first.code == 0
    assert (
        "30 audited pairs have no verdict; where a call failed, the same line asks" in first.stderr
    )
    journal = feedback / "prefs.journal.jsonl"
    assert journal.read_bytes().count(b"\n") == 60
    (feedback / "mended").touch()
    again = srt(*line)
    assert "48 right, 12 wrong, 0 ties, 0 unread" in again.stderr
    keys = [row["key"] for row in read_jsonl(journal)]
    assert len(keys) == len(set(keys)) == 120


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--audit", 5), "--audit goes with --audit-judge or --label-page"),
        (("--audit-judge", "gpt-4"), "--audit goes with --audit-judge or --label-page"),
        (("--label-page", "l.html"), "--audit goes with --audit-judge or --label-page"),
        (("--min-gain", "auto"), "--min-gain auto needs --audit N --audit-judge SPEC"),
        (("--min-gain", "auto", "--audit", 5, "--label-page", "l.html"), "--min-gain auto needs"),
        ((*AUDIT, "--min-precision", 80), "--min-precision is a share above 0, at most 1"),
        (("--min-gain", "much"), "--min-gain 'much': must be a number or auto."),
        ((*AUDIT, "--audit-labels", "l.jsonl"), "--audit-labels stands in for --audit-judge"),
        (
            ("--audit-labels", "l.jsonl", "--audit", 5, "--label-page", "l.html"),
            "leave out --audit",
        ),
    ],
)
def test_options_of_the_audit_that_mean_nothing_together_are_refused(srt, feedback, flags, message):
    finished = srt("build-prefs", *flags)
    assert finished.code == 2
    assert message in finished.stderr
    assert not (feedback / "prefs.run.json").exists()


def test_the_audits_judge_is_told_to_think_and_no_policys_option_is_offered(srt, feedback):
    server = LoopbackServer(lambda body, number: Answer(text="Verdict: [[M]]"))
    judge = ("--audit", 1, "--audit-judge", server.spec)
    told = ("--critic-thinking", "on", "--thinking-tokens", 9)
    finished = srt("build-prefs", *judge, *told)
    server.close()
    assert finished.code == 0, finished.stderr
    switches = [body["chat_template_kwargs"]["enable_thinking"] for body in server.requests]
    assert (switches, {body["max_tokens"] for body in server.requests}) == ([True] * 2, {1024 + 9})
    page = srt("build-prefs", "--help-all").stdout
    for flag in (
        "--thinking ",
        "--reasoning-effort",
        "--extra-body",
        "--chat-template",
        "--max-fail",
    ):
        assert f"  {flag}" not in page
    assert "  --critic-thinking" in page


def test_the_settings_of_an_older_run_may_hold_options_that_are_no_more(srt, feedback):
    assert srt("build-prefs", "--out", "old.jsonl").code == 0
    manifest = json.loads((feedback / "old.run.json").read_text())
    manifest["settings"] |= {"thinking": None, "extra_body": None}
    (feedback / "old.run.json").write_text(json.dumps(manifest))
    assert srt("build-prefs", "--out", "old.jsonl").code == 0
    assert srt("build-prefs", "--config", "old.run.json", "--out", "new.jsonl").code == 0
    manifest["settings"] |= {"thinking": "on"}
    (feedback / "old.run.json").write_text(json.dumps(manifest))
    refused = srt("build-prefs", "--config", "old.run.json", "--out", "new.jsonl")
    assert refused.code == 2
    assert "thinking" in refused.stderr


def test_a_judge_of_its_own_pairs_is_warned_of(srt, feedback):
    rows = [row | {"critic": AUDIT[-1]} for row in read_jsonl(feedback / "self-feedback.jsonl")]
    write_jsonl(feedback / "self-feedback.jsonl", rows)
    assert "judges pairs that it scored itself" in srt("build-prefs", *AUDIT).stderr


def test_the_audit_can_set_the_gain(srt, feedback):
    line = ("build-prefs", *AUDIT, "--min-gain", "auto", "--min-precision")
    finished = srt(*line, 0.95)
    assert finished.code == 0, finished.stderr
    assert "--min-gain auto: 4" in finished.stderr
    kept = read_jsonl(feedback / "prefs.jsonl")
    assert {row["chosen_score"] - row["rejected_score"] for row in kept} == {4}
    tallies = json.loads((feedback / "prefs.run.json").read_text())["tallies"]
    assert tallies["min_gain"] == 4
    assert tallies["dropped"] == {"gain below 4": 60 - len(kept)}
    # What is said of the labels is said of the pairs that are left.
    assert (tallies["audit"]["right"], tallies["audit"]["wrong"]) == (len(kept), 0)
    assert (feedback / "prefs.journal.jsonl").read_bytes().count(b"\n") == 120
    assert srt(*line, 0.95).code == 0
    for _ in range(2):
        other = srt(*line, 0.5)
        assert other.code == 1
        assert "was built with a gain of 4, and the audit now asks for 1" in other.stderr
    assert read_jsonl(feedback / "prefs.jsonl") == kept


def test_a_gain_that_no_audit_finds_is_said(srt, feedback):
    (feedback / "judge.py").write_text("def never(prompt, a, b):\n    return 'dull' in a\n")
    finished = srt(
        "build-prefs", "--audit", 60, "--audit-judge", "python:judge.py:never", "--min-gain", "auto"
    )
    assert finished.code == 1
    assert "20% [12, 32] of the labels are right" in finished.stderr
    assert "Lower --min-precision" in finished.stderr


PLANTED = """
import hashlib

def planted(prompt, a, b):
    wrong = int.from_bytes(hashlib.sha256(prompt.text.encode()).digest()[:4]) < {error} * 2**32
    return float(("good" in a) != wrong)
"""


@pytest.mark.parametrize("error", [0.1, 0.2, 0.3])
def test_dpo_is_told_the_error_that_the_audit_of_a_planted_judge_found(srt, tmp_path, error):
    (tmp_path / "judge.py").write_text(PLANTED.format(error=error))
    rows = [
        record(id=str(n), prompt=f"q{n}", response=f"dull {n}", refinement=f"good {n}").model_dump()
        for n in range(300)
    ]
    write_jsonl(tmp_path / "self-feedback.jsonl", rows)
    flags = ("--audit", 300, "--audit-judge", "python:judge.py:planted")
    assert srt("build-prefs", *flags).code == 0
    audit = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]["audit"]
    assert 1 - audit["precision"]["high"] <= error <= 1 - audit["precision"]["low"]
    options = Dpo(loss_type="robust", label_smoothing="auto")
    assert label_smoothing_of(options) == audit["noise"]
    assert audit["noise"] == pytest.approx(audit["wrong"] / 300)


def labels_of(pairs, sides):
    return [
        {"pair": pair_key(pair), "better": side and text_key(getattr(pair, side)[0].content)}
        for pair, side in zip(pairs, sides, strict=True)
    ]


@pytest.fixture
def kept(srt, feedback):
    srt("build-prefs")
    return [Preference.model_validate(row) for row in read_jsonl(feedback / "prefs.jsonl")]


def test_peoples_labels_stand_in_for_a_judge(srt, feedback, kept):
    sides = ["chosen", "rejected", None, "chosen"]
    twice = labels_of(kept[:4], sides) + labels_of(kept[1:2], ["chosen"])
    write_jsonl(feedback / "labels.jsonl", twice)
    finished = srt("build-prefs", "--audit-labels", "labels.jsonl")
    assert finished.code == 0, finished.stderr
    assert "(2 right, 0 wrong, 2 ties, 0 unread)" in finished.stderr
    manifest = json.loads((feedback / "prefs.run.json").read_text())
    assert manifest["tallies"]["audit"]["judge"] == "labels.jsonl"
    assert manifest["inputs"]["audit labels"]["rows"] == 5


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ({"pair": "ff" * 16}, "labels.jsonl:1: better: field required"),
        ({"pair": "x", "better": None}, "labels.jsonl:1: pair: string should match"),
    ],
)
def test_labels_of_another_tool_are_refused(srt, feedback, line, message):
    write_jsonl(feedback / "labels.jsonl", [line])
    finished = srt("build-prefs", "--audit-labels", "labels.jsonl")
    assert finished.code == 1
    assert message in finished.stderr


def test_a_label_for_a_text_that_its_pair_does_not_have_is_refused(srt, feedback, kept):
    write_jsonl(feedback / "labels.jsonl", [{"pair": pair_key(kept[0]), "better": "ff" * 16}])
    finished = srt("build-prefs", "--audit-labels", "labels.jsonl")
    assert finished.code == 1
    assert "names neither of its texts" in finished.stderr


def test_labels_of_other_pairs_say_so(srt, feedback):
    write_jsonl(feedback / "labels.jsonl", [{"pair": "ff" * 16, "better": None}])
    finished = srt("build-prefs", "--audit-labels", "labels.jsonl")
    assert finished.code == 0
    assert "labels.jsonl: none of its pairs is among the kept ones" in finished.stderr


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
            line = to_line(record(id=str(number), prompt=f"q{number}"))
            row = refined_of(read_row(line), "integer")
            drawn.offer(Pairing(row.refinement, row.draft))
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
    assert [(band.wrong_here, band.decided_here) for band in found.from_gain] == [(10, 20), (0, 20)]
    assert found.gain_to_ask_for == 4


def dpo(srt, folder, model, *flags):
    line = ("dpo", "--prefs", "prefs.jsonl", "--model", model, "--global-batch", 4, "--samples", 0)
    return srt(*line, *flags)


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
