"""srt eval through the front door, with programs as contestants, judge and check."""

import json
import re
from html.parser import HTMLParser
from typing import Final

import pytest
from conftest import read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer
from test_data_forms import samples

from srt_cli import console

PROGRAMS = """
def base(prompt):
    return "no idea about " + prompt.text

def better(prompt):
    return "good answer <script>alert(1)</script> " + prompt.id

def check(prompt, response):
    return "good" in response

def judge(prompt, a, b):
    return 0.5 if ("good" in a) == ("good" in b) else float("good" in a)

def first_wins(prompt, a, b):
    return 1.0

def nonsense(prompt, a, b):
    raise RuntimeError("no opinion")

def constant(prompt):
    return "good"
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "p.py").write_text(PROGRAMS)
    rows = [{"id": f"q{n}", "prompt": f"question number {n}"} for n in range(24)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    return tmp_path


def evaluate(srt, *extra, model="python:p.py:better", judge="python:p.py:judge"):
    line = ["eval", "--model", model, "--reference", "python:p.py:base", "--judge", judge]
    return srt(*line, *extra)


def figures(folder):
    return json.loads((folder / "eval.json").read_text())["rows"]


def test_a_better_model_wins_and_the_paired_interval_excludes_0(srt, folder):
    finished = evaluate(srt, "--check", "python:p.py:check")
    assert finished.code == 0, finished.stderr
    base, better = figures(folder)
    assert (base["pass_rate"]["value"], better["pass_rate"]["value"]) == (0, 1)
    assert better["difference"]["difference"]["value"] == 1
    assert better["difference"]["only_a"] == 24
    assert better["judged"][0]["win_rate"]["value"] == 1
    assert better["judged"][0]["position"]["consistency"]["value"] == 1
    assert better["judged"][0]["position"]["first_slot_rate"]["value"] == 0.5
    assert "100% [86, 100]" in finished.stdout
    assert "+100 [+72, +100]" in finished.stdout
    assert finished.stdout.rstrip().endswith(
        "report: report.html   next: open report.html in a browser"
    )


def test_every_pair_is_judged_in_both_orders(srt, folder):
    evaluate(srt)
    rows = read_jsonl(folder / "judgments.jsonl")
    assert len(rows) == 48
    assert [row["order"] for row in rows[:4]] == ["ab", "ba", "ab", "ba"]
    assert {row["preference"] for row in rows} == {1.0}


def test_a_judge_that_follows_the_order_is_exposed(srt, folder):
    finished = evaluate(srt, judge="python:p.py:first_wins")
    judged = figures(folder)[1]["judged"][0]
    assert judged["win_rate"]["value"] == 0.5
    position = judged["position"]
    shares = position["consistency"]["value"], position["first_slot_rate"]["value"]
    assert (*shares, position["n"]) == (0, 1, 24)
    assert position["gap"]["value"] == -1
    assert judged["strict_win_rate"]["value"] == 0.5
    assert "says the same in both orders in only 0%" in finished.stderr
    assert "favours the answer shown first by 100 points" in finished.stderr


def test_the_reference_against_itself_is_no_contest_and_that_is_said(srt, folder):
    finished = evaluate(srt, model="python:p.py:base")
    assert finished.code == 0
    (row,) = figures(folder)
    assert row["judged"] == []
    assert "The only contestant is the reference itself" in finished.stderr


@pytest.mark.parametrize("orders", ["both", "one"])
def test_a_judge_that_always_names_one_slot_tells_nothing(srt, folder, orders):
    finished = evaluate(srt, "--orders", orders, judge="python:p.py:first_wins")
    assert "always prefers the answer shown first: its verdicts tell nothing" in finished.stderr


def test_verdicts_that_fail_are_counted_never_scored_and_exit_3(srt, folder):
    finished = evaluate(srt, judge="python:p.py:nonsense")
    assert finished.code == 3
    assert "only 0.0% of the pairs have valid verdicts" in finished.stderr
    judged = figures(folder)[1]["judged"][0]
    assert judged["win_rate"] is None
    assert judged["statuses"] == {"failed": 48}
    page = (folder / "report.html").read_text()
    listed = re.search(r"verdicts that fail.*?</table>", page, re.DOTALL)[0]
    assert re.findall(r"shown (?:first|second)|>24<", listed) == [
        "shown first", ">24<", "shown second", ">24<",
    ]  # fmt: skip
    assert "Look at what the judge said in judgments.jsonl" in finished.stderr


def test_a_constant_answer_gets_a_red_flag_although_it_wins(srt, folder):
    finished = evaluate(srt, model="python:p.py:constant")
    assert "100% of its outputs are degenerate (24 constant)" in finished.stderr
    assert "Nothing can be said: the answers are degenerate" in (folder / "report.html").read_text()
    assert figures(folder)[1]["judged"][0]["win_rate"]["value"] == 1


def test_a_second_run_pays_nothing_and_writes_the_same_bytes(srt, folder):
    names = ("eval.json", "judgments.jsonl", "eval.outputs.jsonl", "report.html")
    evaluate(srt, "--check", "python:p.py:check")
    first = [(folder / name).read_bytes() for name in names]
    (folder / "eval.journal.jsonl").chmod(0o644)
    lines = (folder / "eval.journal.jsonl").read_bytes()
    evaluate(srt, "--check", "python:p.py:check")
    assert [(folder / name).read_bytes() for name in names] == first
    assert (folder / "eval.journal.jsonl").read_bytes() == lines


@pytest.mark.parametrize("name", ["response", "output"])
def test_contestants_may_be_files_of_outputs(srt, folder, name):
    rows = [{"prompt": f"question number {n}", name: f"good {n}"} for n in reversed(range(24))]
    write_jsonl(folder / "mine.jsonl", rows)
    finished = evaluate(srt, "--check", "python:p.py:check", model="mine.jsonl")
    assert finished.code == 0, finished.stderr
    assert figures(folder)[1]["pass_rate"]["value"] == 1


def test_two_judges_are_compared_and_share_the_outputs(srt, folder):
    finished = evaluate(srt, "--judge", "python:p.py:first_wins")
    assert finished.code == 0, finished.stderr
    contest = json.loads((folder / "eval.json").read_text())
    assert contest["judges"] == ["python:p.py:judge", "python:p.py:first_wins"]
    one, other = contest["rows"][1]["judged"]
    assert (one["win_rate"]["value"], other["win_rate"]["value"]) == (1, 0.5)
    (agreed,) = contest["agreements"]
    # One says win of every pair, the other, in the mean of both orders, a tie.
    assert agreed["agreement"]["accuracy"]["value"] == 0
    assert "judges against each other" in finished.stdout
    calls = [row["call"] for row in read_jsonl(folder / "eval.journal.jsonl")]
    assert sum("response" in call for call in calls) == 48


def test_one_order_is_picked_by_the_prompt_and_labelled(srt, folder):
    finished = evaluate(srt, "--orders", "one")
    assert finished.code == 0, finished.stderr
    rows = read_jsonl(folder / "judgments.jsonl")
    assert len(rows) == 24
    assert {row["order"] for row in rows} == {"ab", "ba"}
    judged = figures(folder)[1]["judged"][0]
    assert judged["win_rate"]["value"] == 1
    assert judged["strict_win_rate"] is None
    assert "judged in one order only" in finished.stdout


def test_every_two_contestants_are_compared_in_pairs(srt, folder):
    finished = evaluate(srt, "--model", "python:p.py:constant", "--check", "python:p.py:check")
    assert finished.code == 0, finished.stderr
    found = json.loads((folder / "eval.json").read_text())["comparisons"]
    by_judge = [c for c in found if c["by"] == "python:p.py:judge"]
    assert [(c["a"], c["b"]) for c in by_judge] == [("python:p.py:constant", "python:p.py:better")]
    by_check = [c for c in found if c["by"] == "check"]
    assert len(by_check) == 3
    sure = next(c for c in by_check if c["b"] == "python:p.py:base")
    assert sure["paired"]["p_value"] < sure["p_adjusted"] < 1e-5
    assert "every two, paired" in finished.stdout


def test_tables_of_long_names_fit_eighty_columns_and_break_no_heading(srt, folder, monkeypatch):
    monkeypatch.setattr(console._result, "width", 80)
    monkeypatch.setattr(type(console._result), "is_terminal", True)
    line = ["eval", "--reference", "python:p.py:base", "--judge", "python:p.py:judge",
            "--check", "python:p.py:check", "--use", "response", "--use", "refinement"]  # fmt: skip
    for stage in ("sft", "dpo"):
        file = folder / f"runs/smollm2-135m-instruct-srt-{stage}/outputs.jsonl"
        file.parent.mkdir(parents=True)
        rows = [{"id": f"q{n}", "response": f"good {n % 3}", "refinement": "r"} for n in range(24)]
        write_jsonl(file, rows)
        line += ["--model", file.relative_to(folder)]
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    tables = [row.rstrip() for row in finished.stdout.split("n = 24")[0].splitlines()]
    assert max(map(len, tables)) <= 80
    headings = [" ".join(row.split()) for row in tables if "%" in row and "±" not in row]
    assert "passes [95 %] vs reference chars parses" in headings
    assert "wins, % equal length W/T/L same both orders" in headings
    assert "difference [95 %] p (Holm) detectable" in headings
    names = [row.strip().split("  ")[0] for row in tables]
    # The check, the judge; the first of every two.
    assert names.count("…sft/outputs.jsonl") == 2
    assert names.count("…dpo/outputs.jsonl") == 2
    assert names.count("…dpo/…") == 2
    assert names.count("refined") == 4


def test_two_evaluations_in_one_folder_leave_each_other_alone(srt, folder):
    evaluate(srt)
    first = {path.name: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    finished = evaluate(srt, "--out", "second.json", judge="python:p.py:first_wins")
    assert finished.code == 0, finished.stderr
    assert {name: (folder / name).read_bytes() for name in first} == first
    assert len(read_jsonl(folder / "second.judgments.jsonl")) == 48


def test_judges_and_cheap_rules_are_held_against_people(srt, folder):
    rows = [{"id": f"q{n}", "label": "model" if n < 18 else "tie"} for n in range(24)]
    write_jsonl(folder / "labels.jsonl", rows)
    finished = evaluate(srt, "--labels", "labels.jsonl")
    assert finished.code == 0, finished.stderr
    found = json.loads((folder / "eval.json").read_text())["people"]
    by_who = {each["who"]: each["agreement"] for each in found}
    assert by_who["python:p.py:judge"]["accuracy"]["value"] == 0.75
    assert by_who["python:p.py:judge"]["without_ties"]["value"] == 1
    assert by_who["the longer answer"]["accuracy"]["value"] == 0.75
    assert by_who["the usual label"]["accuracy"]["value"] == 0.75
    assert "agreement with people" in finished.stdout
    assert "labels.jsonl: 24 of 24 labels found their answers" in finished.stderr


def test_labels_that_are_of_nothing_here_are_told(srt, folder):
    write_jsonl(folder / "labels.jsonl", [{"id": f"p{n}", "label": "model"} for n in range(3)])
    finished = evaluate(srt, "--labels", "labels.jsonl")
    assert finished.code == 0, finished.stderr
    assert "labels.jsonl: none of its 3 labels found an answer" in " ".join(finished.stderr.split())
    assert "Its ids, such as 'p0', have to be those of the prompts, such as 'q0'" in finished.stderr


def test_what_has_changed_since_the_run_before_is_named(srt, folder):
    write_jsonl(folder / "mine.jsonl", [{"id": f"q{n}", "response": "good"} for n in range(24)])
    assert "has changed" not in evaluate(srt, model="mine.jsonl").stderr
    assert "has changed" not in evaluate(srt, model="mine.jsonl").stderr
    write_jsonl(folder / "mine.jsonl", [{"id": f"q{n}", "response": "bad"} for n in range(24)])
    (folder / "p.py").write_text(PROGRAMS.replace("else float(", "else 1 - float("))
    said = evaluate(srt, model="mine.jsonl").stderr
    assert "mine.jsonl has changed since the run of 20" in said
    assert "python:p.py:judge has changed since the run of 20" in said


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "q0"}, 'needs "id" and "label"'),
        ({"id": "q0", "label": "good"}, "label 'good' is none of model"),
        ({"id": "q0", "label": 1, "a": "nobody"}, "which contestant?"),
    ],
)
def test_bad_labels_are_named_by_line(srt, folder, row, message):
    write_jsonl(folder / "labels.jsonl", [row])
    finished = evaluate(srt, "--labels", "labels.jsonl")
    assert finished.code == 1
    assert "labels.jsonl:1: " in finished.stderr
    assert message in finished.stderr


def test_the_page_marks_what_a_refinement_changed(srt, folder):
    rows = [
        {
            "id": f"q{n}",
            "response": "a good answer to <it>",
            "refinement": "a better answer to <it>",
        }
        for n in range(24)
    ]
    write_jsonl(folder / "mine.jsonl", rows)
    finished = evaluate(srt, "--use", "response", "--use", "refinement", model="mine.jsonl")
    assert finished.code == 0, finished.stderr
    page = (folder / "report.html").read_text()
    assert page.count("a <mark>better</mark> answer to &lt;it&gt;") == 24


def test_outputs_are_not_joined_by_id_against_their_own_prompts(srt, folder):
    rows = [
        {"id": f"q{23 - n}", "instruction": f"question  number {n}", "output": "good"}
        for n in range(24)
    ]
    write_jsonl(folder / "mine.jsonl", rows)
    finished = evaluate(srt, model="mine.jsonl")
    assert finished.code == 1
    assert (
        "mine.jsonl: the output with id 'q0' answers 'question  number 23', but the prompt with that "
        "id is 'question number 0'. Give both files the same ids"
    ) in finished.stderr
    write_jsonl(
        folder / "mine.jsonl", [row | {"id": f"q{23 - int(row['id'][1:])}"} for row in rows]
    )
    assert evaluate(srt, model="mine.jsonl").code == 0


SPELLED: Final = {
    "texts": lambda text: text,
    "lists of one": lambda text: [text],
    "turns": lambda text: [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": text},
    ],
    "parts": lambda text: [{"type": "text", "text": text[:2]}, {"type": "text", "text": text[2:]}],
    "messages": lambda text: {"role": "assistant", "content": text},
    "texts in objects": lambda text: {"text": text},
}


@pytest.mark.parametrize("spelled", SPELLED.values(), ids=SPELLED)
@pytest.mark.parametrize("shape", ["rows", "by id", "by instruction", "columns", "lines"])
def test_outputs_come_in_the_shapes_that_people_have(srt, folder, shape, spelled):
    asked = [f"question number {n}" for n in range(24)]
    given = [spelled(f"good {n}") for n in range(24)]
    content = {
        "rows": [{"instruction": q, "output": a} for q, a in zip(asked, given, strict=True)],
        "by id": {f"q{n}": answer for n, answer in enumerate(given)},
        "by instruction": dict(zip(asked, given, strict=True)),
        "columns": {"instruction": asked, "output": given},
    }
    if shape == "lines":
        write_jsonl(folder / "mine.json", content["rows"])
    else:
        (folder / "mine.json").write_text(json.dumps(content[shape]))
    finished = evaluate(srt, "--check", "python:p.py:check", model="mine.json")
    assert finished.code == 0, finished.stderr
    assert figures(folder)[1]["pass_rate"]["value"] == 1
    saved = [
        row for row in read_jsonl(folder / "eval.outputs.jsonl") if row["contestant"] == "mine.json"
    ]
    assert [row["response"] for row in saved] == [f"good {n}" for n in range(24)]


@pytest.mark.parametrize("form", samples("Outputs"))
def test_outputs_are_read_as_the_document_says(srt, folder, form):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "One?"}, {"prompt": "Two?"}])
    (folder / "mine.jsonl").write_text("\n".join(samples("Outputs")[form]) + "\n", "utf-8")
    finished = evaluate(srt, model="mine.jsonl")
    assert finished.code == 0, finished.stderr
    saved = read_jsonl(folder / "eval.outputs.jsonl")
    answers = [row["response"] for row in saved if row["contestant"] == "mine.jsonl"]
    assert answers == ["An answer.", "Another."]


@pytest.mark.parametrize(
    ("output", "message"),
    [
        (["one", "two"], "mine.json: prompt 'q0': output is a list of 2, not one text."),
        ([], "mine.json: prompt 'q0': output is a list of 0, not one text."),
        (None, "mine.json: prompt 'q0': output is None, not text."),
        (7, "mine.json: prompt 'q0': output is int, not text."),
        ({"tokens": 3}, "mine.json: prompt 'q0': output holds no text (found: tokens)."),
    ],
)
def test_an_output_that_is_no_text_is_refused_and_never_judged(srt, folder, output, message):
    rows = [{"instruction": f"question number {n}", "output": output} for n in range(24)]
    (folder / "mine.json").write_text(json.dumps(rows))
    finished = evaluate(srt, model="mine.json")
    assert finished.code == 1
    assert message in finished.stderr


def test_instructions_that_differ_in_form_are_joined_and_counted(srt, folder):
    decomposed = "cafe\u0301 number"
    write_jsonl(folder / "prompts.jsonl", [{"prompt": f"caf\u00e9 number {n}"} for n in range(24)])
    rows = [
        {
            "instruction": f"{decomposed}  {n}\n" if n < 5 else f"caf\u00e9 number {n}",
            "output": "good",
        }
        for n in range(24)
    ]
    (folder / "mine.json").write_text(json.dumps(rows))
    finished = evaluate(srt, model="mine.json")
    assert finished.code == 0, finished.stderr
    assert "mine.json: 5 of 24 outputs stand beside an instruction that differs" in finished.stderr


def test_a_missing_output_is_said(srt, folder):
    write_jsonl(folder / "mine.jsonl", [{"id": "q0", "response": "r"}])
    finished = evaluate(srt, model="mine.jsonl")
    assert finished.code == 1
    assert "mine.jsonl: has no output for prompt 'q1', nor for 22 more of 24" in finished.stderr


def test_a_file_without_answers_is_said(srt, folder):
    write_jsonl(folder / "mine.jsonl", [{"id": f"q{n}", "text": "r"} for n in range(24)])
    finished = evaluate(srt, model="mine.jsonl")
    assert finished.code == 1
    assert 'no "response" or "output" for prompt \'q0\' (found: id, text)' in finished.stderr


def test_alpaca_evals_own_file_of_outputs_is_a_contestant(srt, folder):
    rows = [
        {"instruction": f"question number {n}", "output": f"a good answer {n}", "generator": "m"}
        for n in range(24)
    ]
    (folder / "model_outputs.json").write_text(json.dumps(rows))
    finished = evaluate(srt, model="model_outputs.json")
    assert finished.code == 0, finished.stderr
    assert figures(folder)[1]["judged"][0]["win_rate"]["value"] == 1
    (folder / "model_outputs.json").write_text('{"a": 1}')
    finished = evaluate(srt, "--out", "again.json", model="model_outputs.json")
    assert finished.code == 1
    assert "not a list of outputs. Expected AlpacaEval's model_outputs.json" in finished.stderr


def test_nobody_to_judge_is_a_usage_error(srt):
    finished = srt("eval", "--model", "python:p.py:better", "--reference", "python:p.py:base")
    assert finished.code == 2
    assert "Pass --judge SPEC, or --check" in finished.stderr


def test_without_a_manifest_the_reference_must_be_named(srt):
    finished = srt("eval", "--model", "python:p.py:better", "--judge", "python:p.py:judge")
    assert finished.code == 2
    assert "no manifest tells its base. Pass --reference" in finished.stderr


def test_direct_and_refined_answers_of_a_local_model_stand_side_by_side(srt, folder, tiny_model):
    finished = evaluate(
        srt, "--use", "response", "--use", "refinement", "--limit", 3, "--max-new-tokens", 6,
        "--critic-max-tokens", 6, "--check", "python:p.py:check", model=str(tiny_model),
    )  # fmt: skip
    assert finished.code == 0, finished.stderr
    rows = figures(folder)
    assert [row["use"] for row in rows] == ["response", "response", "refinement"]
    # A random model's critique never parses: the draft stands, and the share says so.
    assert rows[2]["parsed"]["value"] == 0
    outputs = read_jsonl(folder / "eval.outputs.jsonl")
    assert [o["response"] for o in outputs[3::2]] == [o["response"] for o in outputs[4::2]]


def test_a_cut_draft_that_stands_for_a_refinement_is_cut(srt, folder):
    def behaviour(body, number):
        last = body["messages"][-1]["content"]
        if last.startswith("question"):
            cut = int(last.split()[-1]) % 2 == 0
            return Answer(
                text=f"A whole answer to {last}", finish_reason="length" if cut else "stop"
            )
        return Answer(text="I have nothing to say.")

    server = LoopbackServer(behaviour, models=("m",))
    finished = srt(
        "eval", "--model", f"{server.url}#m", "--reference", "python:p.py:base", "--limit", 6,
        "--use", "response", "--use", "refinement", "--check", "python:p.py:check",
    )  # fmt: skip
    server.close()
    assert finished.code == 0, finished.stderr
    direct, refined = figures(folder)[1:]
    assert refined["statuses"] == {"unparsed": 6}
    assert (direct["cut"]["value"], refined["cut"]["value"]) == (0.5, 0.5)
    assert "direct 3 of 6" in finished.stdout
    assert "refined 3 of 6" in finished.stdout

    # The same answers from files say the same.
    mine = [
        row for row in read_jsonl(folder / "eval.outputs.jsonl")
        if row["contestant"].endswith("#m") and row["use"] == "response"
    ]  # fmt: skip
    write_jsonl(folder / "mine.jsonl", mine)
    write_jsonl(folder / "feedback.jsonl", [
        {"id": row["id"], "response": row["response"], "refinement": None,
         "response_cut": row["status"] == "truncated", "status": "unparsed"}
        for row in mine
    ])  # fmt: skip
    for file, uses in (
        ("mine.jsonl", ["response"]),
        ("feedback.jsonl", ["response", "refinement"]),
    ):
        finished = srt(
            "eval", "--model", file, "--reference", "python:p.py:base", "--limit", 6, "--check",
            "python:p.py:check", *(f"--use={use}" for use in uses), "--out", "again.json",
            "--overwrite",
        )  # fmt: skip
        assert finished.code == 0, finished.stderr
        rows = json.loads((folder / "again.json").read_text())["rows"][1:]
        assert [row["cut"]["value"] for row in rows] == [0.5] * len(uses)


def test_without_a_valid_verdict_nobody_is_said_to_be_no_better(srt, folder):
    (folder / "critic.py").write_text(
        "from srt_cli.records import Feedback\n\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=5)\n"
    )
    rows = [{"id": f"q{n}", "response": f"a {n} very different answer " * 9} for n in range(24)]
    write_jsonl(folder / "long.jsonl", rows)
    finished = evaluate(
        srt, "--scorer", "python:critic.py:critique", model="long.jsonl",
        judge="python:p.py:nonsense",
    )  # fmt: skip
    assert finished.code == 3
    stage = json.loads((folder / "eval.json").read_text())["stages"][1]
    assert stage["length_to_previous"]["value"] > 1.15
    assert (stage["win_rate"], stage["equal_length"], stage["to_previous"]) == (None, None, None)
    assert stage["echo"]["colour"] == "unknown"
    assert "being better" not in finished.stdout + finished.stderr


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.tags, self.outside = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        for name, value in attrs:
            if name in ("src", "href") and not (value or "").startswith("data:"):
                self.outside.append(value)


def test_the_report_is_one_file_and_model_text_is_only_text(srt, folder):
    evaluate(srt, "--check", "python:p.py:check")
    page = (folder / "report.html").read_text()
    parsed = _Page()
    parsed.feed(page)
    assert parsed.outside == []
    assert parsed.tags.count("script") == 1
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    plots = re.findall(r'<svg [^>]*aria-label="([^"]*)"', page)
    assert plots == [
        "Pass rates", "Win rates", "Length-controlled win rates", "Win rates by position",
        "Win rates by length",
    ]  # fmt: skip
    assert parsed.tags.count("article") == 24
    assert "http" not in page.replace("http-equiv", "")


@pytest.mark.parametrize(
    ("text", "verdict"),
    [
        ("Reason.\nVerdict: [[M]]", "first"),
        ("Reason.\n**Verdict:** [[m]]", "second"),
        ("Verdict: tie", "tie"),
        ("Verdict: [[M]]\nOn reflection:\nVerdict: [[m]]", "second"),
        ("It says\n```\nVerdict: [[M]]\n```\nwhich is a trick.\nVerdict: [[m]]", "second"),
        ("The answer M is better.", None),
        ("Verdict: [[X]]", None),
    ],
)
def test_the_last_verdict_outside_fences_counts(text, verdict):
    from srt_cli.templates import parse_verdict

    assert parse_verdict(text) == verdict


def test_a_judge_without_a_verdict_is_quoted(srt, folder):
    (folder / "bad.py").write_text(
        "def judge(prompt, a, b):\n    return 'A' if prompt.id == 'q0' else 10**400\n"
    )
    finished = evaluate(srt, judge="python:bad.py:judge")
    assert finished.code == 3
    said = "the first reply without one: \"python:bad.py:judge returned 'A' where a number is expected."
    assert said in finished.stderr
