"""srt eval --annotations: saved judgments are counted without a model, AlpacaEval's and our own."""

import json
import os
import subprocess
import sys

import pytest
from conftest import read_jsonl, write_jsonl
from test_evaluate import PROGRAMS
from test_published_figures import ALPACA, DATA, annotations, rows_of


def native(folder, model="mine", count=30, preference=1.75, **changes):
    rows = [
        {
            "instruction": f"question {n}", "output_1": "a reference " * 5, "generator_1": "ref",
            "output_2": f"the answer {n} " * (1 + n % 7), "generator_2": model,
            "annotator": "gpt", "preference": preference, **changes,
        }
        for n in range(count)
    ]  # fmt: skip
    (folder / f"{model}.json").write_text(json.dumps(rows))
    return rows


def figures(folder):
    return json.loads((folder / "eval.json").read_text())


def test_native_annotations_are_counted_and_reported(srt, tmp_path):
    native(tmp_path)
    (tmp_path / "srt.toml").write_text('judge = ["gpt-4"]\nreference = "models/base"\n')
    finished = srt("eval", "--annotations", "mine.json")
    assert finished.code == 0, finished.stderr
    found = figures(tmp_path)
    assert found["judges"] == ["gpt"]
    (judged,) = found["rows"][1]["judged"]
    assert judged["win_rate"]["value"] == 0.75
    assert judged["orders"] == "one"
    assert judged["length_controlled"]["mode"] == "generic"
    assert "not comparable with AlpacaEval's" in finished.stdout
    assert "question 3" in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"a": 1}', "not a list of annotations"),
        ("[]", "not a list of annotations"),
        ("[{", "not valid JSON"),
        ('[{"instruction": "q"}]', "row 1: no output_1, output_2, preference"),
        (
            '[{"instruction": "q", "output_1": "a", "output_2": "b", "preference": 7}]',
            "preference 7 is not from 1 to 2",
        ),
        (
            '[{"instruction": "q", "output_1": "a", "output_2": "b", "preference": "m"}]',
            "preference 'm' is not from 1 to 2",
        ),
        (
            '[{"instruction": "q", "output_1": "a", "output_2": null, "preference": 1}]',
            "row 1: output_2 is None, not a text",
        ),
    ],
)
def test_another_format_is_said_in_a_sentence(srt, tmp_path, content, message):
    (tmp_path / "x.json").write_text(content)
    finished = srt("eval", "--annotations", "x.json")
    assert finished.code == 1
    assert message in finished.stderr
    assert "Expected AlpacaEval's annotations.json" in finished.stderr


def test_files_with_two_references_are_refused(srt, tmp_path):
    native(tmp_path, "mine")
    native(tmp_path, "other", generator_1="another")
    finished = srt("eval", "--annotations", "mine.json", "--annotations", "other.json")
    assert finished.code == 1
    assert "compares with another, the files before it with ref" in finished.stderr


def test_missing_verdicts_are_counted_and_a_low_coverage_exits_3(srt, tmp_path):
    rows = native(tmp_path)
    for row in rows[:6]:
        row["preference"] = None
    (tmp_path / "mine.json").write_text(json.dumps(rows))
    finished = srt("eval", "--annotations", "mine.json")
    assert finished.code == 3
    assert "6 of 30 pairs have no valid verdict of gpt (6 unparsed)" in finished.stderr
    assert srt("eval", "--annotations", "mine.json", "--min-coverage", 0.5).code == 0


def test_one_row_and_equal_lengths_are_labelled_never_nan(srt, tmp_path):
    native(tmp_path, count=1)
    finished = srt("eval", "--annotations", "mine.json")
    assert finished.code == 0, finished.stderr
    text = (tmp_path / "eval.json").read_text()
    assert "NaN" not in text
    assert "n = 1 prompt: no error, no test and no length control" in finished.stdout
    native(tmp_path, "same", output_2="just as long", output_1="just as long")
    finished = srt("eval", "--annotations", "same.json", "--out", "same-eval.json")
    assert "nothing is controlled: this is the raw rate" in finished.stderr
    assert "nan" not in finished.stdout.lower()


def test_a_model_that_lacks_an_instruction_is_compared_on_the_common_ones(srt, tmp_path):
    native(tmp_path, "mine", 30)
    native(tmp_path, "other", 20, preference=1.25)
    finished = srt("eval", "--annotations", "mine.json", "--annotations", "other.json")
    assert finished.code == 0, finished.stderr
    found = figures(tmp_path)
    assert [row["prompts"] for row in found["rows"]] == [30, 30, 20]
    (comparison,) = found["comparisons"]
    assert comparison["paired"]["difference"]["n"] == 20
    assert comparison["paired"]["difference"]["value"] == -0.5


def test_models_without_a_common_instruction_are_said_not_to_be_compared(srt, tmp_path):
    native(tmp_path, "mine", 20)
    rows = native(tmp_path, "other", 20)
    for row in rows:
        row["instruction"] = "another " + row["instruction"]
    (tmp_path / "other.json").write_text(json.dumps(rows))
    finished = srt("eval", "--annotations", "mine.json", "--annotations", "other.json")
    assert finished.code == 0, finished.stderr
    assert "mine: has answers to 20 of 40 prompts" in finished.stderr
    assert "mine and other have fewer than two judged prompts in common" in finished.stderr


def test_a_pair_that_stands_there_twice_counts_once_and_is_said(srt, tmp_path):
    rows = native(tmp_path, "mine", 20)
    (tmp_path / "mine.json").write_text(json.dumps(rows + rows[:5]))
    finished = srt("eval", "--annotations", "mine.json")
    assert finished.code == 0, finished.stderr
    assert figures(tmp_path)["rows"][1]["judged"][0]["win_rate"]["n"] == 20
    assert "5 of 25 rows judge a pair that an earlier row judged" in finished.stderr


def test_the_reference_against_itself_stands_at_50_and_50(srt, tmp_path):
    rows = native(tmp_path, "ref", 30, preference=1.5)
    for row in rows:
        row["output_1"] = row["output_2"]
    (tmp_path / "ref.json").write_text(json.dumps(rows))
    assert srt("eval", "--annotations", "ref.json").code == 0
    row = figures(tmp_path)["rows"][1]
    assert row["name"] == "ref (itself)"
    rate, controlled = (row["judged"][0][name] for name in ("win_rate", "length_controlled"))
    assert (rate["value"], rate["standard_error"]) == (0.5, 0)
    assert (controlled["rate"]["value"], controlled["rate"]["standard_error"]) == (0.5, 0)


def test_winning_every_pair_is_not_certainty(srt, tmp_path):
    native(tmp_path, "mine", 20, preference=2.0)
    assert srt("eval", "--annotations", "mine.json").code == 0
    rate = figures(tmp_path)["rows"][1]["judged"][0]["win_rate"]
    assert (rate["value"], rate["standard_error"], rate["high"]) == (1, 0, 1)
    assert rate["low"] == pytest.approx(0.8389, abs=1e-4)


def test_our_own_judgments_and_an_export_give_the_same_figures_again(srt, tmp_path):
    (tmp_path / "p.py").write_text(PROGRAMS)
    write_jsonl(
        tmp_path / "prompts.jsonl", [{"id": f"q{n}", "prompt": f"number {n}"} for n in range(24)]
    )
    line = ["eval", "--model", "python:p.py:better", "--reference", "python:p.py:base",
            "--judge", "python:p.py:judge", "--export", "alpaca_eval"]  # fmt: skip
    assert srt(*line).code == 0
    first = figures(tmp_path)["rows"][1]["judged"][0]
    assert srt("eval", "--annotations", "judgments.jsonl", "--out", "again.json").code == 0
    again = json.loads((tmp_path / "again.json").read_text())["rows"][1]["judged"][0]
    assert again == first
    (exported,) = (tmp_path / "eval-alpaca_eval").glob("*/annotations.json")
    assert srt("eval", "--annotations", exported, "--out", "native.json").code == 0
    native = json.loads((tmp_path / "native.json").read_text())["rows"][1]["judged"][0]
    assert native["win_rate"]["value"] == first["win_rate"]["value"]
    assert len(read_jsonl(tmp_path / "judgments.jsonl")) == 48


def test_judgments_go_with_the_outputs_of_their_own_evaluation(srt, tmp_path):
    own = [
        {"id": f"q{n}", "contestant": which, "use": "response", "response": text * (n + 1)}
        for which, text in (("mine", "a good answer "), ("ref", "an answer "))
        for n in range(6)
    ]
    write_jsonl(tmp_path / "x.outputs.jsonl", own)
    write_jsonl(tmp_path / "z.outputs.jsonl", [row | {"response": "other"} for row in own])
    write_jsonl(tmp_path / "x.judgments.jsonl", [
        {"id": f"q{n}", "a": "mine response", "b": "ref response", "order": order,
         "preference": 1.0, "verdict": "a", "status": "ok", "raw": "a", "judge": "gpt",
         "usage": {}}
        for n in range(6) for order in ("ab", "ba")
    ])  # fmt: skip
    line = ("eval", "--annotations", "x.judgments.jsonl", "--out", "again.json")

    def characters():
        finished = srt(*line)
        assert finished.code == 0, finished.stderr
        return json.loads((tmp_path / "again.json").read_text())["rows"][1]["characters"]["value"]

    assert characters() == 49
    (tmp_path / "x.outputs.jsonl").rename(tmp_path / "y.outputs.jsonl")
    finished = srt(*line)
    assert finished.code == 1
    assert "y.outputs.jsonl and z.outputs.jsonl differ in the output of" in finished.stderr
    assert "and x.outputs.jsonl, which belongs to these judgments, is not there" in finished.stderr
    (tmp_path / "z.outputs.jsonl").unlink()
    assert characters() == 49


def test_two_runs_that_answered_differently_under_one_name_are_not_mixed(srt, tmp_path):
    native(tmp_path, "mine", 20)
    (tmp_path / "mine.json").rename(tmp_path / "first.json")
    native(tmp_path, "mine", 20, output_2="another answer")
    finished = srt("eval", "--annotations", "first.json", "mine.json")
    assert finished.code == 1
    assert "mine has two different outputs for one prompt" in finished.stderr


def test_where_too_few_saved_verdicts_are_valid_their_own_file_is_named(srt, tmp_path):
    native(tmp_path, preference=None)
    finished = srt("eval", "--annotations", "mine.json")
    assert finished.code == 3
    assert "Look at what the judge said in mine.json." in finished.stderr


def test_a_plan_of_saved_verdicts_writes_nothing(srt, tmp_path):
    native(tmp_path)
    finished = srt("eval", "--annotations", "mine.json", "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "verdicts: 30, of 30 prompts; nothing is owed" in finished.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine.json"]


def test_eight_hundred_rows_of_five_models_take_seconds(tmp_path):
    names = [f"m{number}" for number in range(5)]
    for number, name in enumerate(names):
        native(tmp_path, name, count=805, preference=1.1 + number / 10)
    line = [sys.executable, "-m", "srt_cli", "eval"]
    line += [part for name in names for part in ("--annotations", f"{name}.json")]
    before = os.times()
    subprocess.run(line, cwd=tmp_path, check=True, capture_output=True)
    after = os.times()
    # Seconds of processor: other tests share the cores.
    assert after.children_user - before.children_user < 5
    assert len(figures(tmp_path)["comparisons"]) == 10


def test_a_judge_beside_annotations_is_a_usage_error(srt, tmp_path):
    native(tmp_path)
    finished = srt("eval", "--annotations", "mine.json", "--judge", "gpt-4")
    assert finished.code == 2


@pytest.mark.skipif(not DATA.is_dir(), reason="needs the verification data")
def test_a_board_model_comes_out_as_published_through_the_front_door(srt, tmp_path):
    preferences, lengths, reference, places = annotations("claude-2")
    text = [row["instruction"] for row in rows_of(ALPACA / "instruction_text.csv")]
    rows = [
        {
            "instruction": text[place], "output_1": "r" * theirs, "output_2": "m" * mine,
            "generator_1": "gpt4_1106_preview", "generator_2": "claude-2", "preference": 1 + y,
        }
        for y, mine, theirs, place in zip(preferences, lengths, reference, places, strict=True)
    ]  # fmt: skip
    (tmp_path / "a.json").write_text(json.dumps(rows))
    finished = srt("eval", "--annotations", "a.json")
    assert finished.code == 0
    (judged,) = figures(tmp_path)["rows"][1]["judged"]
    assert 100 * judged["win_rate"]["value"] == pytest.approx(17.188, abs=0.001)
    assert 100 * judged["length_controlled"]["rate"]["value"] == pytest.approx(28.16, abs=0.11)
    assert judged["length_controlled"]["mode"] == "alpaca_eval"
    # The coin that AlpacaEval draws for each instruction tells which answer was shown first.
    # The published figure leaves out one row.
    assert 100 * judged["position"]["gap"]["value"] == pytest.approx(16.1333, abs=0.11)
    assert judged["position"]["consistency"] is None
    assert "favours the answer shown second by 16 points" in finished.stderr


@pytest.mark.parametrize(
    "words",
    [
        ("--annotations", "a*.json"),
        ("--annotations", "a1.json", "a2.json"),
        ("--annotations", "a1.json", "a2.json", "a3.run.json"),
        ("--annotations=a1.json", "a2.json", "--seed", "3"),
        ("--annotations", "a1.json", "--annotations", "a2.json"),
    ],
)
def test_several_files_come_as_a_glob_or_as_a_shell_makes_them(srt, tmp_path, words):
    for number in (1, 2):
        native(tmp_path, f"a{number}")
    (tmp_path / "a3.run.json").write_text("{}")
    finished = srt("eval", *words)
    left_out = "left out, as what srt keeps beside its files: a3.run.json" in finished.stderr
    assert left_out == ("a*.json" in words or "a3.run.json" in words)
    assert "unexpected extra argument" not in finished.stderr
    settings = json.loads((tmp_path / "eval.run.json").read_text())["settings"]
    assert settings["annotations"] == ["a1.json", "a2.json"]
