"""srt build-prefs: only pairs that teach, everything else with its reason."""

import json
import random

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from srt_cli.records import Feedback, FeedbackRecord, Usage
from srt_cli.stages.build_prefs import BuildPrefs, pair_of, why_no_pair


def record(**changes) -> FeedbackRecord:
    score = changes.pop("score", 4)
    plain = {
        "id": "1",
        "prompt": "Name a fruit.",
        "response": "A carrot.",
        "feedback": Feedback(weaknesses="w", suggestions="s", score=score),
        "refinement": "An apple.",
        "refinement_score": 8,
        "refinement_feedback": None,
        "status": "ok",
        "reason": None,
        "raw": {},
        "policy": "p",
        "critic": "c",
        "sample": 0,
        "round": 1,
        "usage": Usage(),
    }
    return FeedbackRecord(**(plain | changes))


ROWS = [
    record(id="kept"),
    record(id="same score", score=8, refinement="A pear."),
    record(id="worse", score=9, refinement="A plum."),
    record(id="copy", refinement="A carrot. "),
    record(id="empty", response="  "),
    record(id="cut", status="truncated", refinement=None, refinement_score=None),
    record(id="unread", status="unparsed", refinement=None, refinement_score=None),
    record(id="long", refinement="An apple. " * 9),
    record(id="again"),
]


@pytest.fixture
def prefs(srt, tmp_path):
    def build(rows=ROWS, *extra):
        write_jsonl(tmp_path / "self-feedback.jsonl", [row.model_dump() for row in rows])
        return srt("build-prefs", *extra)

    return build


def test_a_pair_is_trls_conversational_form(prefs, tmp_path):
    assert prefs().code == 0
    assert read_jsonl(tmp_path / "prefs.jsonl") == [
        {
            "id": "kept",
            "prompt": [{"role": "user", "content": "Name a fruit."}],
            "chosen": [{"role": "assistant", "content": "An apple."}],
            "rejected": [{"role": "assistant", "content": "A carrot."}],
            "chosen_score": 8.0,
            "rejected_score": 4.0,
            "source": "c",
        }
    ]


def test_every_other_row_falls_out_with_its_reason(prefs, tmp_path):
    prefs()
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == {
        "same score": "gain below 1",
        "worse": "gain below 1",
        "copy": "copy",
        "empty": "empty",
        "cut": "truncated",
        "unread": "unparsed",
        "long": "refinement over 3 times as long",
        "again": "duplicate",
    }


def test_kept_and_dropped_add_up_to_the_input(prefs, tmp_path):
    prefs()
    tallies = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]
    assert tallies["rows"] == 9
    assert tallies["kept"] + sum(tallies["dropped"].values()) == 9


def test_a_larger_gain_keeps_fewer_pairs(prefs, tmp_path):
    assert prefs(ROWS, "--min-gain", "5").code == 1
    assert not (tmp_path / "prefs.jsonl").exists()


def test_when_no_pair_is_left_the_message_says_which_filter_took_them(prefs):
    finished = prefs([record(score=8), record(id="2", status="unparsed")] * 2)
    assert finished.code == 1
    assert "no pair is left (2 gain below 1, 2 unparsed)" in finished.stderr
    assert "--min-gain" in finished.stderr


def test_a_negative_gain_never_makes_a_worse_refinement_the_chosen_one(prefs):
    assert prefs([record(score=9)], "--min-gain", "-5").code == 1


def test_pairs_of_several_samples_and_rounds_have_their_own_ids(prefs, tmp_path):
    prefs([record(), record(sample=1, refinement="A fig."), record(round=2, refinement="A kiwi.")])
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["1", "1/1/1", "1/0/2"]


def test_the_order_of_the_rows_changes_the_order_only(prefs, tmp_path):
    rows = [record(id=str(n), refinement=f"Apple {n}.", score=n % 9 + 1) for n in range(30)]
    prefs(rows)
    straight = read_jsonl(tmp_path / "prefs.jsonl")
    random.Random(0).shuffle(rows)
    prefs(rows, "--overwrite")
    shuffled = read_jsonl(tmp_path / "prefs.jsonl")
    assert sorted(map(str, straight)) == sorted(map(str, shuffled))


def test_torch_is_not_needed(tmp_path):
    import subprocess
    import sys

    write_jsonl(tmp_path / "self-feedback.jsonl", [record().model_dump()])
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'trl', 'datasets', 'openai', 'numpy', 'peft'):\n"
        "    sys.modules[name] = None\n"
        "sys.argv = ['srt', 'build-prefs']\n"
        "from srt_cli.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert (tmp_path / "prefs.jsonl").is_file()


scores = st.floats(1, 10).map(lambda score: round(score, 1))


@given(scores, scores, st.text(), st.text(), st.floats(0, 5))
def test_no_pair_breaks_a_rule_whatever_the_row(draft, refined, response, refinement, min_gain):
    row = record(score=draft, refinement_score=refined, response=response, refinement=refinement)
    if why_no_pair(row, BuildPrefs(min_gain=min_gain)) is None:
        pair = pair_of(row)
        assert pair.chosen_score - pair.rejected_score >= min_gain
        assert pair.chosen_score > pair.rejected_score
        assert pair.chosen[0].content != pair.rejected[0].content
        assert pair.chosen[0].content.strip()
