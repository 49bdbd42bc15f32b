"""Useless critics and pairs not worth training on, planted: each is warned of, sound ones are not."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import write_jsonl
from test_sft import feedback_rows

from srt_cli.feedback.critic_check import CriticFigures, check_critic, doubts_of
from srt_cli.pairs.worth import Labels, Worth
from srt_cli.records import FeedbackRecord
from srt_cli.runs.run import Manifest, Run
from srt_cli.stats.counting import Confusion

# A model that drafts, and is its own critic; even prompts get a good draft ("yes"), odd ones a bad one.
PROGRAM = """
from srt_cli.records import Feedback

def drafts(prompt):
    n = int(prompt.id)
    return f"Answer {n}, {'yes' if n % 2 == 0 else 'no'}."

def said(text, score, refinement):
    return Feedback(weaknesses=f"Look at: {text}", suggestions="Say yes.", score=score), refinement

def mended(prompt):
    return f"Answer {int(prompt.id)}: yes!"

def sound(prompt, response=None):
    if response is None:
        return drafts(prompt)
    return said(response, 9 if "yes" in response else 3, mended(prompt))

def coin(prompt, response=None):
    if response is None:
        return drafts(prompt)
    return said(response, 9 if int(prompt.id) % 4 < 2 else 3, mended(prompt))

def flatterer(prompt, response=None):
    if response is None:
        return drafts(prompt)
    return said(response, 4 if int(prompt.id) % 12 == 0 else 10, mended(prompt))

def copier(prompt, response=None):
    if response is None:
        return drafts(prompt)
    return said(response, 9 if "yes" in response else 3, response)

def check(prompt, response):
    return "yes" in response
"""
CHECK = ("--check", "python:p.py:check")


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"task {n}"} for n in range(72)])
    return tmp_path


def warnings_in(path: Path) -> list[str]:
    return json.loads(path.read_text())["warnings"]


def test_a_sound_critic_and_its_pairs_are_not_warned_of(srt, folder):
    criticised = srt("self-critique", "--model", "python:p.py:sound", *CHECK)
    assert criticised.code == 0, criticised.stderr
    assert warnings_in(folder / "self-feedback.run.json") == []
    built = srt("build-prefs")
    assert built.code == 0, built.stderr
    assert warnings_in(folder / "prefs.run.json") == []
    assert (
        "is stage 2 worth it? 36 pairs; 100% [90, 100] of the labels are likely right (36 of 36, by "
        "the check)"
    ) in built.stderr


@pytest.mark.parametrize(
    ("model", "flags", "warned", "command"),
    [
        ("coin", CHECK, "no better than a coin: balanced accuracy", "srt collect-feedback --model"),
        ("flatterer", (), "gave 132 of 144 answers the score 10", "--score expected"),
        ("copier", (), "72 of 72 refinements", "--strategy best-worst"),
    ],
)
def test_a_useless_critic_is_warned_of_by_itself_and_by_what_builds_on_it(
    srt, folder, model, flags, warned, command
):
    srt("self-critique", "--model", f"python:p.py:{model}", *flags)
    built = srt("build-prefs", "--min-gain", 0)
    for name in ("self-feedback", "prefs"):
        (found,) = (w for w in warnings_in(folder / f"{name}.run.json") if warned in w)
        assert "Likely cause: " in found or "Pairs without refinements" in found
        assert command in found
    assert warned in built.stderr


def test_a_critic_that_keeps_good_drafts_as_they_are_is_sound(srt, folder):
    keeps = PROGRAM.replace(
        'said(response, 9 if "yes" in response else 3, mended(prompt))',
        'said(response, 9, response) if "yes" in response else said(response, 3, mended(prompt))',
    )
    (folder / "p.py").write_text(keeps)
    numbers = [*range(0, 144, 2), *range(1, 66, 2)]
    write_jsonl(folder / "prompts.jsonl", [{"id": n, "prompt": f"task {n}"} for n in numbers])
    assert srt("self-critique", "--model", "python:p.py:sound", *CHECK).code == 0
    tallies = json.loads((folder / "self-feedback.run.json").read_text())["tallies"]
    assert (tallies["copies"], tallies["rows"]) == (72, 105)
    assert srt("build-prefs").code == 0
    for name in ("self-feedback", "prefs"):
        assert warnings_in(folder / f"{name}.run.json") == []


def test_sft_warns_of_a_tuned_model_that_is_a_coin_as_a_critic_and_not_of_a_sound_one(
    folder, monkeypatch
):
    monkeypatch.chdir(folder)
    rows = [
        FeedbackRecord(**row | {"response": f"{row['id']}, no", "refinement": f"{row['id']}: yes"})
        for row in feedback_rows(32)
    ]
    found = {}
    for model in ("sound", "coin"):
        out = Path(f"python:p.py:{model}")
        out.mkdir()
        run = Run(Manifest(command="sft", settings={"seed": 42}, runtime={}), out, None)
        table = check_critic(run, rows, 32, 8.0, held_out=True)
        assert (table.n, table.smaller_class) == (32, 16)
        found[model] = run.manifest
    assert found["sound"].warnings == []
    assert found["sound"].tallies["critic_check"]["right_order"] == 16
    (warning,) = found["coin"].warnings
    assert "the tuned model tells good answers from bad no better than a coin" in warning
    assert "--data round-2.jsonl" in warning


def test_a_critic_that_was_sound_on_other_answers_may_still_say_one_score_of_all():
    sound = CriticFigures("it", Confusion(16, 0, 0, 16), {10: 90, 3: 4})
    assert doubts_of(sound) == []
    (doubt,) = doubts_of(replace(sound, elsewhere=True))
    assert "it gave 90 of 94 answers the score 10" in doubt


def test_the_interval_of_balanced_accuracy_is_that_of_two_shares():
    # 12 of 16 and 12 of 16: Wilson's 0.5050 to 0.8982 each, square-and-add.
    low, high = Confusion(12, 4, 4, 12).balanced_interval or (0, 0)
    assert (round(low, 3), round(high, 3)) == (0.577, 0.855)
    assert Confusion(3, 0, 1, 0).balanced_interval is None


def test_sft_says_what_its_feedback_is(srt, tmp_path, tiny_model):
    rows = feedback_rows(12, response_cut=True)
    copies = [row | {"refinement": row["response"]} for row in rows[:7]]
    write_jsonl(tmp_path / "feedback.jsonl", [*copies, *rows[7:]])
    manifest = {"command": "collect-feedback", "settings": {}, "runtime": {}}
    manifest |= {"status": "interrupted", "progress": "12 of 40"}
    (tmp_path / "feedback.run.json").write_text(json.dumps(manifest))
    line = ("sft", "--model", tiny_model, "--epochs", 1, "--critic-check", 0, "--samples", 0)
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert "cut at the token limit: 12 of 12 drafts (100%)" in finished.stderr
    interrupted, copying = warnings_in(tmp_path / "models/sft/run.json")[1:3]
    assert "feedback.jsonl: is of a run that was interrupted at 12 of 40" in interrupted
    assert "7 of 12 refinements of drafts that score below 8 copy them" in copying
    assert "srt sft --loss-on response,feedback" in copying
    ending = (
        "12 of 12 drafts were cut at the token limit, and a model trained on them learns to end"
    )
    assert ending in finished.stderr
    other = srt(*line, "--loss-on", "feedback,refinement", "--out", "models/critic")
    assert "drafts (100%)" in other.stderr
    assert "to end in the middle" not in other.stderr


def test_dpo_on_two_pairs_says_so_before_it_trains_and_calls_it_no_progress(
    srt, tmp_path, tiny_model
):
    pairs = [
        {
            "id": str(n),
            "prompt": [{"role": "user", "content": f"Say {n}."}],
            "chosen": [{"role": "assistant", "content": f"It is {n}."}],
            "rejected": [{"role": "assistant", "content": "No."}],
            "chosen_score": 9,
            "rejected_score": 3,
            "source": "c",
        }
        for n in range(2)
    ]
    write_jsonl(tmp_path / "prefs.jsonl", pairs)
    line = ("dpo", "--model", tiny_model, "--learning-rate", 1e-2, "--epochs", 2, "--samples", 0)
    planned = srt(*line, "--dry-run")
    assert "2 pairs are too few to move a model" in planned.stdout + planned.stderr
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    said = finished.stderr
    ends = said.index("on 2 pairs, which is no sign of progress")
    assert said.index("2 pairs are too few to move a model") < said.index("float32") < ends


def test_what_such_pairs_gave_is_quoted_from_the_study_where_it_has_a_figure(tmp_path):
    study = tmp_path / "study.csv"
    worth = Worth(90, Labels("the check", 40, 50))
    assert worth.lines(study) == [
        "is stage 2 worth it? 90 pairs; 80% [67, 89] of the labels are likely right (40 of 50, by the "
        "check)"
    ]
    study.write_text("pairs,precision,gain,low,high\n100,0.8,3.1,0.4,5.8\n400,0.8,9,7,11\n")
    assert worth.lines(study)[1] == (
        "in the study (docs/study.md) 100 pairs, 80% of them right, gave +3.1 points [+0.4, +5.8]"
    )
    with study.open("a") as figures:
        figures.write("60,0.85,1.5,-2,5\n170,0.74,-0.5,-4,3\n80,0.7,-9,-12,-6\n")
    assert worth.lines(study)[1] == (
        "in the study (docs/study.md) 3 models gained -0.5 to +3.1 points by such pairs (60 to 170, "
        "74% to 85% of them right), +1.4 in the mean; intervals above 0: 1 of 3"
    )
    assert len(Worth(90, Labels("the check", 30, 50)).lines(study)) == 1
    assert "right is not known" in Worth(90, None).lines(study)[0]
    (warning,) = Worth(90, Labels("the check", 11, 20)).warnings()
    assert "as a coin would have it" in warning


def test_refinements_that_shrink_or_grow_are_told_when_feedback_is_collected(srt, folder):
    (folder / "c.py").write_text(
        "def terse(prompt, response):\n"
        "    return dict(weaknesses='w', suggestions='s', score=3), response[:6]\n"
    )
    rows = [{"id": n, "prompt": f"task {n}", "response": "A long answer. " * 4} for n in range(12)]
    write_jsonl(folder / "prompts.jsonl", rows)
    finished = srt("collect-feedback", "--critic", "python:c.py:terse")
    assert finished.code == 0, finished.stderr
    (warning, *_) = (w for w in warnings_in(folder / "feedback.run.json") if "as long" in w)
    assert "refinements are 0.10 times as long as their drafts" in warning
