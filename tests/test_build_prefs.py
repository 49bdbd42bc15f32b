"""srt build-prefs: only pairs that teach, everything else with its reason."""

import json
import random

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st

from srt_cli.pairing import GROUPING
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


def samples(*scored, prompt="Name a fruit.", identifier="1"):
    """One record a sample: (draft, its score, refinement, its score)."""
    return [
        record(id=identifier, prompt=prompt, sample=number, response=draft, score=score,
               refinement=refinement, refinement_score=refined)
        for number, (draft, score, refinement, refined) in enumerate(scored)
    ]  # fmt: skip


GROUP = samples(
    ("A carrot.", 3, "A ripe apple, I think.", 7),
    ("Rock.", 1, "A stone fruit.", 6),
    ("A pear.", 8, "A sweet pear.", 9),
)


@pytest.mark.parametrize(
    ("strategy", "chosen", "rejected"),
    [
        ("best-worst", "A sweet pear.", "Rock."),
        ("refine-best", "A sweet pear.", "Rock."),
        # With rho 0.3 the top tier begins at 6.6 and the bottom tier ends at 3.4.
        ("tiers", "A pear.", "A carrot."),
    ],
)
def test_strategies_choose_among_all_answers_to_a_prompt(
    prefs, tmp_path, strategy, chosen, rejected
):
    finished = prefs(GROUP, "--strategy", strategy, "--rho", "0.3")
    assert finished.code == 0, finished.stderr
    (pair,) = read_jsonl(tmp_path / "prefs.jsonl")
    assert pair["chosen"][0]["content"] == chosen
    assert pair["rejected"][0]["content"] == rejected


@given(
    st.lists(st.tuples(st.text("ab "), scores, st.text("ab "), scores), max_size=5),
    st.sampled_from(["best-worst", "refine-best", "tiers"]),
    st.floats(0, 0.49),
    st.randoms(),
)
def test_no_strategy_depends_on_order_or_repetition(group, strategy, rho, random_):
    rows = samples(*group)
    straight = GROUPING[strategy](rows, rho)
    random_.shuffle(rows)
    shuffled = GROUPING[strategy](rows + rows, rho)
    assert (straight is None) == (shuffled is None)
    if straight is not None:
        assert [(c.text, c.score) for c in straight] == [(c.text, c.score) for c in shuffled]
        assert straight[0].text.strip()


@pytest.mark.parametrize("strategy", ["refine", "best-worst", "refine-best", "tiers"])
def test_used_and_dropped_rows_add_up_under_every_strategy(prefs, tmp_path, strategy):
    other = samples(("Blue.", 2, "Navy.", 2), ("Red.", 2, "Crimson.", 2), identifier="2")
    assert prefs(GROUP + other, "--strategy", strategy).code == 0
    tallies = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]
    assert tallies["rows"] == 5
    assert tallies["rows_used"] + sum(tallies["dropped"].values()) == 5
    assert len(read_jsonl(tmp_path / "prefs.dropped.jsonl")) == 5 - tallies["rows_used"]


def test_several_files_gzip_and_stdin_are_read(srt, tmp_path, monkeypatch):
    import gzip

    first, second, third = (
        [record(id=str(n), refinement=f"Apple {n}.").model_dump()] for n in range(3)
    )
    write_jsonl(tmp_path / "a.jsonl", first)
    lines = write_jsonl(tmp_path / "b.jsonl", second).read_bytes()
    (tmp_path / "b.jsonl.gz").write_bytes(gzip.compress(lines))
    piped = write_jsonl(tmp_path / "c.jsonl", third).read_bytes()

    class Stdin:
        buffer = (piped,)

    monkeypatch.setattr("sys.stdin", Stdin())
    finished = srt("build-prefs", "--data", "a.jsonl", "--data", "b.jsonl.gz", "--data", "-")
    assert finished.code == 0, finished.stderr
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["0", "1", "2"]
    (tmp_path / "b.jsonl.gz").write_bytes(lines)
    broken = srt("build-prefs", "--data", "b.jsonl.gz", "--out", "other.jsonl")
    assert broken.code == 1
    assert "b.jsonl.gz: not a readable gzip file" in broken.stderr


def test_a_configuration_may_give_one_file_where_several_may_be_given(prefs, tmp_path):
    (tmp_path / "srt.toml").write_text('data = "self-feedback.jsonl"\n')
    assert prefs().code == 0
    (tmp_path / "srt.toml").write_text('[build-prefs]\ndata = ["self-feedback.jsonl"]\n')
    assert prefs().code == 0


def test_prompts_of_an_evaluation_are_left_out(prefs, tmp_path):
    write_jsonl(tmp_path / "heldout.jsonl", [{"prompt": "name  a FRUIT."}])
    rows = [record(), record(id="2", prompt="Name a colour.")]
    assert prefs(rows, "--exclude", "heldout.jsonl").code == 0
    assert [row["id"] for row in read_jsonl(tmp_path / "prefs.jsonl")] == ["2"]
    (dropped,) = read_jsonl(tmp_path / "prefs.dropped.jsonl")
    assert dropped["reason"] == "prompt is excluded"


def test_answers_that_are_none_are_left_out_unless_wanted(prefs, tmp_path):
    rows = [
        record(
            id="refuses", response="x" * 60, refinement="I'm sorry, but I cannot help with that."
        ),
        record(id="leaks", response="x" * 60, refinement="A fig. Overall Score: [[9]]"),
        record(id="repeats", response="x" * 60, refinement="a fig and " * 9),
        record(id="fine"),
    ]
    assert prefs(rows).code == 0
    reasons = {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}
    assert reasons == {
        "refuses": "refusal", "leaks": "template leakage", "repeats": "repeating",
    }  # fmt: skip
    assert prefs(rows, "--no-hygiene", "--overwrite").code == 0
    assert len(read_jsonl(tmp_path / "prefs.jsonl")) == 4


def test_the_pairs_are_written_for_other_trainers_too(prefs, tmp_path):
    finished = prefs(ROWS, "--format", "axolotl", "--format", "llamafactory", "--format", "kto")
    assert finished.code == 0, finished.stderr
    assert read_jsonl(tmp_path / "prefs.axolotl.jsonl") == [
        {
            "messages": [{"role": "user", "content": "Name a fruit."}],
            "chosen": {"role": "assistant", "content": "An apple."},
            "rejected": {"role": "assistant", "content": "A carrot."},
        }
    ]
    assert read_jsonl(tmp_path / "prefs.llamafactory.jsonl") == [
        {
            "conversations": [{"from": "human", "value": "Name a fruit."}],
            "chosen": {"from": "gpt", "value": "An apple."},
            "rejected": {"from": "gpt", "value": "A carrot."},
        }
    ]
    assert [row["label"] for row in read_jsonl(tmp_path / "prefs.kto.jsonl")] == [True, False]
