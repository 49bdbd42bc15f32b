"""The examples' critics keep their word, their page tells what it may, and their lines are ours."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, write_jsonl
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from srt_cli.records import Prompt
from srt_cli.templates import (
    checklist_score,
    parse_critique,
    render_feedback,
    render_refinement,
)

QUICKSTART = ROOT / "examples" / "quickstart"
STUDY = ROOT / "examples" / "study"
FILES = ("prompts.jsonl", "more-prompts.jsonl", "self-prompts.jsonl", "heldout.jsonl")
DRAFTS = (
    "",
    "The sea, vast and blue, is the home of many whales.",
    '"Quoted," she said. "Twice."',
    '{"answer": "Bread is old."}',
    "- one\n- two\n- three",
    "A balloon's day, 100000000.",
    "Today ... 12 3.5 items; silver, silver and the end every day",
)


def make_prompts(folder, *flags):
    made = [sys.executable, QUICKSTART / "make_prompts.py", folder, *flags]
    subprocess.run(made, check=True, env={"PYTHONPATH": str(ROOT)})


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """The study's prompt files, as run.sh has them made."""
    folder = tmp_path_factory.mktemp("study")
    make_prompts(folder, "--study")
    return folder


@pytest.fixture
def programs(monkeypatch):
    """The modules of both examples, as srt imports them."""
    monkeypatch.syspath_prepend(str(QUICKSTART))
    monkeypatch.syspath_prepend(str(STUDY))
    for name in ("critic", "planted", "page"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import critic
    import page
    import planted

    yield critic, planted, page
    for name in ("critic", "planted", "page"):
        sys.modules.pop(name, None)


def prompts_of(folder: Path) -> list[Prompt]:
    return [Prompt.from_row(row) for name in FILES for row in read_jsonl(folder / name)]


def test_every_refinement_passes_and_every_planted_fault_is_found(written, programs):
    critic, _, _ = programs
    kinds = set()
    for prompt in prompts_of(written):
        for draft in DRAFTS:
            feedback, refinement = critic.critique(prompt, draft)
            assert critic.check(prompt, refinement), (prompt.prompt, refinement)
            assert (feedback.score == 10) == critic.check(prompt, draft)
            faulty = critic.contrast(prompt, refinement)
            assert not critic.check(prompt, faulty), (prompt.prompt, faulty)
            parsed = parse_critique(render_feedback(feedback) + render_refinement(refinement))
            assert (parsed.feedback, parsed.refinement) == (feedback, refinement)
        kinds |= {kind for kind, _ in prompt.model_extra["constraints"]}
    assert len(kinds) >= 20


def test_feedback_is_a_checklist_that_quotes(programs):
    critic, _, _ = programs
    rows = [["start", "Perhaps"], ["end", "every day"]]
    prompt = Prompt.from_row({"id": "p", "prompt": "p", "constraints": rows})
    feedback, refinement = critic.critique(prompt, "It rains every day.")
    assert feedback.weaknesses == (
        'Begin with "Perhaps"? It: no. End with "every day"? every day.: yes.'
    )
    assert (feedback.suggestions, feedback.score) == ('Put "Perhaps" at the beginning.', 4)
    assert refinement == "Perhaps, it rains every day."


@given(draft=st.text(max_size=200), number=st.integers(0, 10_000))
@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_no_draft_breaks_the_critic(programs, draft, number):
    critic, _, _ = programs
    rows = read_jsonl(QUICKSTART / "prompts.jsonl")
    prompt = Prompt.from_row(rows[number % len(rows)])
    feedback, refinement = critic.critique(prompt, draft)
    assert critic.check(prompt, refinement)
    assert (feedback.score == 10) == critic.check(prompt, draft)


def test_the_judge_prefers_more_constraints_met_and_knows_ties(programs):
    critic, _, _ = programs
    prompt = Prompt.from_row({"prompt": "p", "constraints": [["start", "Today"]]})
    assert critic.judge(prompt, "Today.", "No.") == 1
    assert critic.judge(prompt, "No.", "Today.") == 0
    assert critic.judge(prompt, "No.", "Nor this.") == 0.5
    assert not critic.check(prompt, " ")


def test_the_files_share_no_topic_and_hold_enough(written):
    for folder in (written, QUICKSTART):
        topics = [
            {row["id"].rsplit("-", 1)[0] for row in read_jsonl(folder / name)} for name in FILES
        ]
        assert len(set().union(*topics)) == sum(map(len, topics))
        assert len(read_jsonl(folder / "heldout.jsonl")) >= 200


def test_the_generator_writes_the_committed_files(tmp_path):
    make_prompts(tmp_path)
    for name in FILES:
        assert (tmp_path / name).read_bytes() == (QUICKSTART / name).read_bytes()


@pytest.mark.parametrize("accuracy", [50, 75, 100])
def test_a_planted_critic_is_right_as_often_as_it_says(programs, accuracy):
    critic, planted, _ = programs
    score = getattr(planted, f"right_{accuracy}")
    right = 0
    for number in range(1000):
        prompt = Prompt.from_row({"id": str(number), "prompt": "p", "constraints": [["upper", ""]]})
        answer = "GOOD." if number % 2 else "Bad."
        right += (score(prompt, answer)[0].score >= 8) == critic.check(prompt, answer)
    assert abs(right / 10 - accuracy) < 4


def test_a_flatterer_finds_every_constraint_met(written, programs):
    critic, planted, _ = programs
    for prompt in prompts_of(written):
        feedback, refinement = planted.praise(prompt, "A poor answer")
        honest = critic.critique(prompt, "A poor answer")[0]
        assert checklist_score(feedback.weaknesses) == 10
        assert feedback.weaknesses == honest.weaknesses.replace(": no.", ": yes.")
        assert feedback.score == 10
        assert refinement == "A poor answer"


def test_the_page_tells_better_from_what_cannot_be_told(programs, tmp_path):
    _, _, page = programs
    arms = {
        "base": range(10),
        "models/stage-1": range(70),
        "models/no-contrast": range(1, 71),
        "models/stage-1-dpo": range(20),
    }
    write_jsonl(tmp_path / "eval.outputs.jsonl", [
        {"id": str(n), "contestant": arm, "use": "response", "passed": n in passed}
        for arm, passed in arms.items() for n in range(100)
    ])  # fmt: skip
    write_jsonl(tmp_path / "best-of.jsonl", [
        {"id": str(n), "sample": sample, "response_passes": sample == 1 - n % 2,
         "feedback": {"score": 8, "score_mean": 8.0 + sample}}
        for n in range(100) for sample in (0, 1)
    ])  # fmt: skip
    write_jsonl(tmp_path / "best-of.journal.jsonl", [
        {"model": "local"}, *(
            {"call": f"{n}/{sample} {kind}", "model": model, "usage": {"completion_tokens": tokens}}
            for n in range(100) for sample in (0, 1)
            for kind, model, tokens in (
                ("response", "round-2", 10), ("response", "base", 70),
                ("round 1 critique", "round-2", 30),
                ("round 1 blind score", "round-2", 5), ("round 2 critique", "round-2", 7),
            )
        ),
    ])  # fmt: skip
    stages = [
        {"name": "models/stage-1", "own_score": {"value": 7.04}, "outside_score": None, "echo": None},
        {"name": "ill/flattered", "own_score": {"value": 10.0}, "outside_score": {"value": 6.5},
         "echo": {"colour": "red", "reason": "own scores rose <alone>"}},
    ]  # fmt: skip
    (tmp_path / "drift.json").write_text(json.dumps({"stages": stages}))
    document = tmp_path / "study.md"
    counts = dict.fromkeys(("good_called_good", "good_called_bad", "bad_called_bad"), 40)
    manifest = {"tallies": {"confusion_drafts": counts | {"bad_called_good": 0}}}
    (tmp_path / "round-2-self.run.json").write_text(json.dumps(manifest))
    document.write_text(f"# S\n<!-- {tmp_path.name}: comparisons -->\nold\n<!-- end -->\nkept\n")
    tallies = {"kept": 150, "labels": {"precision": 0.8, "right": 80, "decided": 100}}
    (tmp_path / "stage-1-prefs.run.json").write_text(json.dumps({"tallies": tallies}))
    other = "90,1.0,4.2,2.0,6.5,another"
    head = "pairs,precision,gain,low,high,study"
    (tmp_path / "study.csv").write_text(f"{head}\n{other}\n9,0.5,1.0,1.0,1.0,{tmp_path.name}\n")
    page.main(tmp_path, document, tmp_path / "study.csv")
    assert (tmp_path / "study.csv").read_text().splitlines() == [
        head, other, f"150,0.8,-50.0,-60.0,-40.0,{tmp_path.name}",
    ]  # fmt: skip
    assert document.read_text().splitlines() == [
        "# S",
        f"<!-- {tmp_path.name}: comparisons -->",
        "| question | difference in points, paired [95 %] | verdict |",
        "| --- | --- | --- |",
        "| stage 1 against the base (stage-1 − base) | +60.0 [+50.0, +70.0] | better |",
        "| what contrast adds (stage-1 − no-contrast) | +0.0 [-3.0, +3.0] | cannot be told |",
        "| stage 2 after one round (stage-1-dpo − stage-1) | -50.0 [-60.0, -40.0] | worse |",
        "<!-- end -->",
        "kept",
    ]
    shown = (tmp_path / "study.html").read_text()
    assert "<td>75% [68%, 80%]</td><td>40 of 80</td><td>40 of 40</td>" in shown
    assert "<td>best-of-4</td><td>50% [40%, 60%]</td>" in shown
    assert "<td>70% [60%, 78%]</td>" in shown
    assert "<td>best of four</td><td>50% of 100</td><td>80</td>" in shown
    assert "<td>stage-1</td><td>7.0</td><td></td><td></td><td></td>" in shown
    assert "<td>10.0</td><td>6.5</td><td>red</td><td>own scores rose &lt;alone&gt;</td>" in shown
    assert "<td>stage-1</td><td>150</td><td>80% [71%, 87%], 80 of 100</td>" in shown
    assert ": agreement</h2>" not in shown  # which was not run


def test_prompts_that_all_gain_alike_are_no_certainty(programs):
    _, _, page = programs
    assert page.paired([0.0] * 60) == pytest.approx((0, -0.0602, 0.0602), abs=1e-4)
    assert page.paired([1.0] * 60) == pytest.approx((1, 0.9398, 1), abs=1e-4)


def test_a_second_seed_stands_beside_the_first_and_must_not_contradict_it(programs, tmp_path):
    _, _, page = programs
    folders = tmp_path / "study", tmp_path / "study-seed-7"
    for folder, better, gained, alone in zip(
        folders, (range(60), range(20)), (range(50), range(29, 30)), (None, range(90)), strict=True
    ):
        folder.mkdir()
        arms = {
            "base": range(10), "models/stage-1": better, "models/round-2": gained,
            **({} if alone is None else {"models/refinement-only": alone}),
        }  # fmt: skip
        write_jsonl(folder / "eval.outputs.jsonl", [
            {"id": str(n), "contestant": arm, "use": "response", "passed": n in passed}
            for arm, passed in arms.items() for n in range(100)
        ])  # fmt: skip
    (tmp_path / "study-seed-8").mkdir()  # has just begun
    document = tmp_path / "study.md"
    document.write_text("<!-- study: comparisons -->\n<!-- end -->\n")
    page.main(folders[0], document)
    _, head, _, *lines, _ = document.read_text().splitlines()
    assert head.strip("| ").split(" | ")[1:] == [
        "seed 42", "seed 7", "all: difference in points, paired [95 %]", "verdict",
    ]  # fmt: skip
    told = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    # Of 100 answers 60 pass by the one seed and 20 by the other; the base passes 10.
    first, second, both, verdict = told["stage 1 against the base (stage-1 − base)"]
    assert [cell.split()[0] for cell in (first, second, both)] == ["+50.0", "+10.0", "+30.0"]
    assert verdict == "better"
    # -10 and -19: both worse.
    first, second, both, verdict = told["a second round on its own drafts (round-2 − stage-1)"]
    assert [cell.split()[0] for cell in (first, second, both)] == ["-10.0", "-19.0", "-14.5"]
    assert verdict == "worse"
    # Run with one seed alone.
    first, second, both, verdict = told[
        "refinements alone, as many tokens read (refinement-only − base)"
    ]
    assert (first, second.split()[0], both, verdict) == ("", "+80.0", second, "better")
    assert page.verdict_of([-0.1, 0.5], 0.05, 0.3) == "cannot be told"  # the seeds disagree
    assert page.verdict_of([0.1, 0.5], 0.05, 0.3) == "better"


@pytest.mark.parametrize("folder", [QUICKSTART, STUDY], ids=["quickstart", "study"])
def test_every_option_in_run_sh_is_one_of_ours(srt, folder):
    text = (folder / "run.sh").read_text()
    used = {}
    for line in re.findall(r"^\s*(?:attempt )?srt (.+)$", text, re.MULTILINE):
        used.setdefault(line.split()[0], []).append(line)
    assert set(used) == {
        "collect-feedback", "sft", "self-critique", "build-prefs", "dpo", "eval",
    }  # fmt: skip
    shared = dict(re.findall(r"^(\w+)=\((.+)\)$", text, re.MULTILINE))
    for command, lines in used.items():
        known = set(re.findall(r"--[a-z][a-z-]+", srt(command, "--help-all").stdout))
        for line in lines:
            while names := re.findall(r"\$\{(\w+)\[@\]\S*\}", line):
                for name in names:
                    line = re.sub(rf"\$\{{{name}\[@\]\S*\}}", shared.get(name, ""), line)
            options = set(re.findall(r"(?<!\S)--[a-z][a-z-]+", line))
            assert options, line
            assert options <= known, (command, options - known)
