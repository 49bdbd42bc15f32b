"""What srt eval shows unasked: parts of checks, refined minus direct, own critics; and its plan."""

import hashlib
import json

import pytest
from conftest import write_jsonl

# Even prompts get a good answer; a critique sees that on two of three; a good draft is kept as it is.
PROGRAMS = """
from srt_cli.records import Feedback

def base(prompt):
    return "no idea"

def model(prompt, response=None):
    n = int(prompt.id)
    if response is None:
        return f"{n} yes" if n % 2 == 0 else f"{n} no"
    good = "yes" in response
    said = good if n % 3 else not good
    return Feedback(weaknesses="w", suggestions="s", score=9 if said else 3), (
        response if said else f"{n} oh yes"
    )

def leaky(prompt):
    return f"Weaknesses: it has {prompt.id}." if int(prompt.id) < 2 else f"A cat, {prompt.id}."

def check(prompt, response):
    return "yes" in response

def parts(prompt, response):
    found = {"strict": response.endswith("yes"), "loose": 0.5 + 0.5 * ("yes" in response)}
    return found | ({"kind:even": "yes" in response} if int(prompt.id) % 2 == 0 else {})
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAMS)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"task {n}"} for n in range(24)])
    return tmp_path


def compared(folder):
    return json.loads((folder / "eval.json").read_text())


LINE = ("eval", "--model", "python:p.py:model", "--reference", "python:p.py:base")
BOTH = ("--use", "response", "--use", "refinement")


def test_refined_minus_direct_and_the_critic_against_the_check_stand_in_tables(srt, folder):
    finished = srt(*LINE, *BOTH, "--check", "python:p.py:check")
    assert finished.code == 0, finished.stderr
    said = " ".join(finished.stdout.split())
    refined, critics = said.split("refined minus direct, paired")[1].split("critics of their own")
    assert "python:p.py:model check +33 [+13, +54]" in refined
    (critic,) = compared(folder)["own_critics"]
    assert critic["confusion"] == {
        "good_called_good": 8, "bad_called_good": 4, "good_called_bad": 4, "bad_called_bad": 8,
    }  # fmt: skip
    assert critic["balanced"]["value"] == pytest.approx(2 / 3)
    assert critic["copies"]["value"] == 0.5
    assert "python:p.py:model 67% [47, 80] 67% 67% 50% 24" in critics


def test_a_check_may_say_parts_and_shares_and_several_checks_stand_side_by_side(srt, folder):
    checks = ("--check", "python:p.py:parts", "--check", "python:p.py:check")
    finished = srt(*LINE, *checks)
    assert finished.code == 0, finished.stderr
    base, model = compared(folder)["rows"]
    assert {name: rate["value"] for name, rate in model["parts"].items()} == {
        "strict": 0.5, "loose": 0.75, "kind:even": 1, "check": 0.5,
    }  # fmt: skip
    assert (model["parts"]["kind:even"]["n"], model["pass_rate"]["value"]) == (12, 0.5)
    assert base["parts"]["loose"]["value"] == 0.5
    assert "passes, part by part" in finished.stdout
    assert "kind:even" in (folder / "report.html").read_text()


def test_equal_passes_of_all_prompts_are_no_certainty(srt, folder):
    finished = srt(
        "eval", "--model", "python:p.py:leaky", *LINE[3:], "--check", "python:p.py:check"
    )
    assert "+0 [-14, +14]" in finished.stdout
    assert "[+0, +0]" not in finished.stdout


def test_a_critics_words_in_direct_answers_are_counted(srt, folder):
    finished = srt(
        "eval", "--model", "python:p.py:leaky", *LINE[3:], "--check", "python:p.py:check"
    )
    assert compared(folder)["rows"][1]["degenerate"]["reasons"] == {"template leakage": 2}
    assert "python:p.py:leaky 2 of 24" in " ".join(finished.stdout.split())


def test_a_baseline_is_measured_alone(srt, folder):
    finished = srt("eval", "--model", "python:p.py:model", "--check", "python:p.py:check")
    assert finished.code == 0, finished.stderr
    (row,) = compared(folder)["rows"]
    assert row["pass_rate"]["value"] == 0.5
    assert "is measured alone, by the check" in finished.stderr
    assert "n = 24 prompts.\n" in finished.stdout  # no reference, and nothing paired
    assert json.loads((folder / "eval.run.json").read_text())["warnings"] == []


def test_a_plan_counts_what_would_be_asked_and_writes_nothing(srt, folder):
    before = sorted(path.name for path in folder.iterdir())
    finished = srt(*LINE, *BOTH, "--check", "python:p.py:check", "--dry-run")
    assert finished.code == 0, finished.stderr
    assert "prompts: 24; answers: 72 of 2 contestants; checks: 72; verdicts: 0" in finished.stdout
    assert sorted(path.name for path in folder.iterdir()) == before


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--labels", "labels.jsonl"), "labels.jsonl:1"),
        (("--judge", "python:p.py:check", "--judge-template", "none.txt"), "none.txt"),
        (("--check", "python:p.py:none"), "has no callable 'none'"),
        (("--model", "short.jsonl"), "short.jsonl: has no output for prompt"),
    ],
)
def test_what_can_fail_is_looked_at_before_the_first_answer(srt, folder, flags, said):
    write_jsonl(folder / "labels.jsonl", [{"id": "1"}])
    write_jsonl(folder / "short.jsonl", [{"id": "1", "response": "yes"}])
    finished = srt(*LINE, "--check", "python:p.py:check", *flags)
    assert finished.code in (1, 2)
    assert said in finished.stderr
    assert not (folder / "eval.journal.jsonl").exists()


def test_a_file_with_several_rows_a_prompt_is_told_and_the_first_counts(srt, folder):
    line = ("eval", "--model", "mine.jsonl", *LINE[3:], "--check", "python:p.py:check")
    for joined in (
        {n: {"id": n} for n in range(24)},
        {n: {"prompt": f"task {n}"} for n in range(24)},
    ):
        rows = [joined[n] | {"response": text} for n in range(24) for text in ("yes", "no")]
        write_jsonl(folder / "mine.jsonl", rows)
        finished = srt(*line)
        said = (
            "mine.jsonl: has several rows (samples, rounds) for 24 of 24 prompts; the first of each"
        )
        assert said in finished.stderr
        assert "and 24 are left out" in finished.stderr
        assert compared(folder)["rows"][1]["pass_rate"]["value"] == 1


def test_an_edited_helper_makes_a_program_another_one(srt, folder):
    (folder / "c.py").write_text("import rules\n\ncheck = lambda p, r: rules.good(r)\n")
    (folder / "rules.py").write_text("from words import WORD\n\ngood = lambda r: WORD in r\n")
    line = (*LINE, "--check", "python:c.py:check")
    passes = {}
    for word in ("yes", "no"):
        (folder / "words.py").write_text(f"WORD = {word!r}\n")
        finished = srt(*line, "--overwrite")
        assert finished.code == 0, finished.stderr
        passes[word] = [row["pass_rate"]["value"] for row in compared(folder)["rows"]]
    assert passes == {"yes": [0, 0.5], "no": [1, 0.5]}


def test_a_program_that_imports_nothing_of_its_folder_keeps_its_name_in_journals(folder):
    from srt_cli.models import open_model

    source = (folder / "p.py").read_bytes()
    model = open_model(f"python:{folder / 'p.py'}:check")
    digest = hashlib.sha256(source).hexdigest()[:12]
    assert model.identity == f"python:{folder / 'p.py'}:check@{digest}"
    model.close()
