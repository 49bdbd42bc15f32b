"""Critiques that people or other programs wrote become feedback.jsonl: their forms, and the joining."""

import json

import pytest
from conftest import read_jsonl, write_jsonl
from test_data_forms import CRITIC, GIVEN, samples
from test_data_forms import EXPECTED as PROMPTS_EXPECTED
from test_data_forms import FORMS as PROMPT_FORMS

PROGRAM = """\
from srt_cli.records import Feedback

def score(prompt, response):
    return Feedback(weaknesses="none", suggestions="none", score=9), response

def refine(prompt, response, feedback):
    return f"{response} By: {feedback}"
"""
ASKED = ("--critic-for", "refinement=python:program.py:refine",
         "--critic-for", "score=python:program.py:score")  # fmt: skip
FORMS = samples("Critiques that others wrote")
PROMPTS = [
    {"id": "a", "prompt": "One?", "response": "A given answer."},
    {"id": "b", "prompt": "Two?", "response": "Another answer."},
]
SAID = "Weaknesses and suggestions: "
EXPECTED = {
    "feedback records": [
        ("a", "Too short.", "Say more.", 4, "A longer answer.", 8, "gpt-4"),
        ("b", "None.", "None.", 9, "Another answer, kept.", 9, "Ann"),
    ],
    "critiques in parts": [
        ("a", "Too short.", "Say more.", 4, "A longer answer.", 9, "Ann"),
        ("b", "Wrong.", "", 2, f"Another answer. By: {SAID}Wrong.", 9, "file:critiques.jsonl"),
    ],
    "critiques in one text": [
        ("a", "Too short.", "Say more.", 4, "A longer answer.", 9, "file:critiques.jsonl"),
        ("b", "Right, but dull. Add an example.", "", 7,
         f"Another answer. By: {SAID}Right, but dull. Add an example.", 9, "file:critiques.jsonl"),
    ],
    "UltraFeedback": [
        ("a", "Too short.", "", 6.5, f"A given answer. By: {SAID}Too short.", 9,
         "file:critiques.jsonl"),
        ("b", "Dull.", "", 5.5, f"Another answer. By: {SAID}Dull.", 9, "file:critiques.jsonl"),
    ],
    "HelpSteer3 feedback": [
        ("a", "The response is mostly helpful. It is short.\n\nThe response is partially helpful.",
         "", 6.6, "A given answer. By: " + SAID + "The response is mostly helpful. It is short.\n\n"
         "The response is partially helpful.", 9, "file:critiques.jsonl"),
        ("b", "The response is not helpful. It is wrong.", "", 1,
         f"Another answer. By: {SAID}The response is not helpful. It is wrong.", 9,
         "file:critiques.jsonl"),
    ],
    "HelpSteer3 edits": [
        ("a", "The response is mostly helpful. It is short.", "", 7.8, "A longer answer.", 9,
         "file:critiques.jsonl"),
        ("b", "The response is perfectly helpful.", "", 10, "Another answer, kept.", 9,
         "file:critiques.jsonl"),
    ],
}  # fmt: skip


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "program.py").write_text(PROGRAM)
    write_jsonl(tmp_path / "prompts.jsonl", PROMPTS)
    return tmp_path


def take(srt, *extra):
    return srt("collect-feedback", "--critic", "file:critiques.jsonl", *extra)


def told(record):
    feedback = record["feedback"]
    return (
        record["id"], feedback["weaknesses"], feedback["suggestions"], feedback["score"],
        record["refinement"], record["refinement_score"], record["critic"],
    )  # fmt: skip


def test_every_form_of_the_document_is_tried():
    assert FORMS.keys() == EXPECTED.keys()
    assert all(len(lines) == 2 for lines in FORMS.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_the_document_says(srt, folder, form):
    (folder / "critiques.jsonl").write_text("\n".join(FORMS[form]) + "\n")
    finished = take(srt, *ASKED)
    assert finished.code == 0, finished.stderr
    assert f"2 critiques, read as {form}." in finished.stderr
    assert "2 critiques of 2 prompts joined." in finished.stderr
    records = read_jsonl(folder / "feedback.jsonl")
    assert [told(record) for record in records] == EXPECTED[form]
    assert [record["response"] for record in records] == ["A given answer.", "Another answer."]
    assert {record["status"] for record in records} == {"ok"}
    assert "nothing to do" in take(srt, *ASKED).stdout


def test_critiques_that_bring_everything_need_no_prompts(srt, folder):
    (folder / "prompts.jsonl").unlink()
    (folder / "critiques.jsonl").write_text("\n".join(FORMS["UltraFeedback"]) + "\n")
    finished = take(srt, *ASKED, "--model", "a-policy")
    assert finished.code == 0, finished.stderr
    assert "no prompts.jsonl here: the critiques bring their prompts" in finished.stderr
    records = read_jsonl(folder / "feedback.jsonl")
    assert [(r["prompt"], r["policy"], r["sample"]) for r in records] == [
        ("One?", "alpaca-7b", 0), ("Two?", "gpt-4", 0),
    ]  # fmt: skip
    manifest = json.loads((folder / "feedback.run.json").read_text())
    assert manifest["settings"]["model"] == "a-policy"  # which sft will train
    assert manifest["inputs"]["critic"]["path"] == "critiques.jsonl"
    assert manifest["tallies"]["critiques"]["joined"] == 2


def test_what_does_not_join_is_counted_and_makes_no_row(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [*PROMPTS, {"id": "c", "prompt": "C?", "response": "C."}])
    said = {"weaknesses": "w", "suggestions": "s", "score": 5, "refinement": "r",
            "refinement_score": 6}  # fmt: skip
    write_jsonl(
        folder / "critiques.jsonl",
        [
            {"prompt": " One?\n", "response": "A given  answer.", **said},  # in another form
            {"id": "a", "prompt": "One?", "response": "Not that answer.", **said},
            {"id": "b", "prompt": "Three?", **said},
            {"id": "nobody", **said},
            {"id": "b", "feedback": None},
            {"id": "b", **said},
            {"id": "b", **said, "critic": "Ann"},
        ],
    )
    finished = take(srt)
    assert finished.code == 0, finished.stderr
    assert (
        "not joined: 1 of another response (first: critiques.jsonl:2), 1 with another prompt than "
        "that of the id (first: critiques.jsonl:3), 1 without such a prompt (first: "
        "critiques.jsonl:4)." in finished.stderr
    )
    assert "1 row of it without a critique." in finished.stderr
    assert "6 critiques, read as critiques in parts." in finished.stderr
    assert (
        "of 2 prompts joined; prompts without a critique, which make no row: 1." in finished.stderr
    )
    records = read_jsonl(folder / "feedback.jsonl")
    assert [(r["id"], r["sample"], r["critic"]) for r in records] == [
        ("a", 0, "file:critiques.jsonl"), ("b", 0, "file:critiques.jsonl"), ("b", 1, "Ann"),
    ]  # fmt: skip
    (folder / "feedback.jsonl").unlink()
    write_jsonl(folder / "critiques.jsonl", [{"id": "nobody", **said}])
    nothing = take(srt, "--overwrite")
    assert nothing.code == 1
    assert "none of 1 critique joins a prompt (without such a prompt; first: crit" in nothing.stderr


def test_what_a_critique_lacks_is_a_status_or_is_asked_of_another_critic(srt, folder):
    write_jsonl(
        folder / "critiques.jsonl",
        [
            {"id": "a", "weaknesses": "w", "suggestions": "s"},
            {"id": "b", "weaknesses": "w", "score": 5},
            {"id": "a", "critique": "Short.", "score": 11},
            {"id": "a", "critique": "Short.", "score": 5, "refinement": "r"},
            {"id": "a", "critique": "Short.", "score": 5},
        ],
    )
    finished = take(srt)
    assert finished.code == 3
    outside = "scores outside their scale (--critique-scale), which count as missing: 1 (first: "
    assert f"{outside}critiques.jsonl:3)." in finished.stderr
    assert (
        "they lack 4 improved responses (--critic-for refinement=SPEC) and 7 scores (--critic-for "
        "score=SPEC)." in finished.stderr
    )
    assert [record["reason"] for record in read_jsonl(folder / "feedback.jsonl")] == [
        "critique: no overall score (--critic-for score=SPEC asks for one)",
        "critique: the score 11 is not on a scale of 1 to 10 (--critique-scale)",
        "score: nobody scored the improved response (--critic-for score=SPEC)",
        "critique: no improved response (--critic-for refinement=SPEC asks for one)",
        "critique: no suggestions",
    ]
    alone = take(srt, "--overwrite", *ASKED[:2])
    assert alone.code == 2
    assert "nobody would score those improved responses" in alone.stderr
    asked = take(srt, "--overwrite", *ASKED)
    assert asked.code == 0, asked.stderr
    assert (
        "drafts are scored in file:critiques.jsonl, improved responses by python:" in asked.stderr
    )
    records = read_jsonl(folder / "feedback.jsonl")
    assert [record["reason"] for record in records] == [None] * 4 + ["critique: no suggestions"]
    assert [record["feedback"]["score"] for record in records[:4]] == [9, 9, 5, 5]
    assert "draft score" in records[0]["raw"]


def test_an_improved_response_without_words_is_none(srt, folder):
    said = {"weaknesses": "w", "suggestions": "s", "score": 5, "refinement_score": 8}
    rows = [{"id": "a", "refinement": " ", **said}, {"id": "b", "refinement": "r", **said}]
    write_jsonl(folder / "critiques.jsonl", rows)
    finished = take(srt)
    assert "they lack 1 improved response (--critic-for refinement=SPEC)." in finished.stderr
    empty, whole = read_jsonl(folder / "feedback.jsonl")
    assert empty["status"] == "unparsed"
    assert "no improved response" in empty["reason"]
    assert (whole["status"], whole["refinement"]) == ("ok", "r")


def test_scores_of_another_scale_are_mapped_and_that_is_said(srt, folder):
    said = {"critique": "w", "refinement": "r"}
    rows = [
        {"id": "a", "score": 3, "refinement_score": "5", **said},
        {"id": "b", "score": 6, **said},
    ]
    write_jsonl(folder / "critiques.jsonl", rows)
    finished = take(srt, "--critique-scale", "1-5")
    assert finished.code == 0, finished.stderr
    assert "scores mapped linearly to 1 to 10: 2 from 1 to 5." in finished.stderr
    first, second = read_jsonl(folder / "feedback.jsonl")
    assert (first["feedback"]["score"], first["refinement_score"]) == (5.5, 10)
    assert (
        second["reason"] == "critique: the score 6 is not on a scale of 1 to 5 (--critique-scale)"
    )
    assert "write LOW-HIGH, e.g. 1-5." in take(srt, "--critique-scale", "5-1").stderr


def test_what_a_table_holds_no_value_for_is_missing(srt, folder):
    import pyarrow as pa
    from pyarrow import parquet

    rows = [
        {"id": "a", "critique": "w", "overall_score": 7.0, "fine-grained_score": float("nan")},
        {"id": "b", "critique": "w", "overall_score": float("nan"), "fine-grained_score": 3.0},
    ]
    (folder / "critiques").mkdir()
    for row in rows:
        table = pa.Table.from_pylist([row])
        parquet.write_table(table, folder / "critiques" / f"{row['id']}.parquet")
    line = ("collect-feedback", "--critic", "file:critiques", *ASKED)
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    records = read_jsonl(folder / "feedback.jsonl")
    assert [record["feedback"]["score"] for record in records] == [7, 5.5]
    manifest = json.loads((folder / "feedback.run.json").read_text())
    assert {"critic 1", "critic 2", "prompts"} == manifest["inputs"].keys()
    assert "nothing to do" in srt(*line).stdout


def test_a_ten_that_ratings_contradict_is_no_score(srt, folder):
    completion = {"response": "A given answer.", "critique": "Bad.", "overall_score": 10,
                  "fine-grained_score": 1.25}  # fmt: skip
    write_jsonl(folder / "critiques.jsonl", [{"instruction": "One?", "completions": [completion]}])
    finished = take(srt)
    assert "1 score of 10 beside ratings of 2 or less, a slip of UltraFeedback's" in finished.stderr
    [record] = read_jsonl(folder / "feedback.jsonl")
    assert record["reason"] == "critique: a score of 10 beside ratings of 1.25 of 5"


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"id": "a", "text": "x"}, 'critiques.jsonl:1: no "critique", "feedback", or "weaknesses"'),
        (
            {"instruction": "q", "completions": ["x"]},
            "critiques.jsonl:1: completions.0 is no completion with its critique.",
        ),
        ({"critique": "x"}, "critiques.jsonl:1: neither an id nor a prompt (found: critique)."),
        ({"id": "a", "critique": ""}, "critiques.jsonl: none of 1 row holds a critique."),
    ],
)
def test_a_file_without_critiques_is_refused_with_its_place(srt, folder, row, message):
    write_jsonl(folder / "critiques.jsonl", [row])
    finished = take(srt)
    assert finished.code == 1
    assert message in finished.stderr


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (("--critic-for", "refinement"), "--critic-for refinement: write refinement=SPEC"),
        (("--critic-for", "everything=x"), "write refinement=SPEC or score=SPEC, each once"),
        (("--system", "Be brief."), "--system is for drafts"),
        (("--critique-page", "p.html"), "leave out --critic. Then pass what the page saves"),
    ],
)
def test_options_that_mean_nothing_are_refused(srt, folder, extra, message):
    write_jsonl(folder / "critiques.jsonl", [{"id": "a", "critique": "x", "score": 5}])
    finished = take(srt, *extra)
    assert finished.code == 2
    assert message in finished.stderr


def test_a_preset_that_means_nothing_to_written_critiques_stops_nobody(srt, folder):
    write_jsonl(folder / "critiques.jsonl", [{"id": "a", "critique": "x", "score": 5}])
    (folder / "srt.toml").write_text('system = "Be brief."\ncontrast = "gpt-4"\n')
    assert take(srt, "--dry-run").code == 0


def test_written_critiques_are_no_model_elsewhere(srt, folder):
    finished = srt("self-critique", "--model", "file:critiques.jsonl")
    assert finished.code == 2
    assert "critiques in a file are no model. srt collect-feedback takes them" in finished.stderr


def test_a_found_file_names_no_program_for_a_part(srt, folder):
    write_jsonl(folder / "critiques.jsonl", [{"id": "a", "critique": "x", "score": 5}])
    (folder / "srt.toml").write_text('critic_for_parts = ["score=python:program.py:score"]\n')
    finished = take(srt)
    assert finished.code == 1
    assert "would run code, which a file that was merely found may not do" in finished.stderr


def test_weaknesses_and_suggestions_in_lists_are_points(srt, folder):
    said = {"weaknesses": ["Too short.", "Dull."], "suggestions": ["Say more."], "score": 4}
    rest = {"refinement": "A longer answer.", "refinement_score": 8}
    write_jsonl(folder / "critiques.jsonl", [{"id": "a"} | said | rest])
    finished = take(srt)
    assert finished.code == 0, finished.stderr
    feedback = read_jsonl(folder / "feedback.jsonl")[0]["feedback"]
    assert feedback["weaknesses"] == "Too short.\nDull."
    assert feedback["suggestions"] == "Say more."


def test_a_plan_counts_what_other_critics_would_be_asked(srt, folder):
    write_jsonl(
        folder / "critiques.jsonl",
        [{"id": "a", "critique": "x", "score": 5}, {"id": "b", "critique": "y", "refinement": "r"}],
    )
    finished = take(srt, "--dry-run", "--critic-for", "score=gpt-4",
                    "--critic-for", "refinement=gpt-4-turbo")  # fmt: skip
    assert finished.code == 0, finished.stderr
    calls = {
        line.split()[0]: line.split()[1] for line in finished.stdout.splitlines() if "k" in line
    }
    assert "rows: 2, of which 0 need no call" in finished.stdout
    assert "they lack" not in finished.stderr
    assert calls["gpt-4-turbo"] == "1"
    assert calls["gpt-4"] == "3"  # the draft of b, and the improved responses of both
    assert not (folder / "feedback.run.json").exists()


def test_a_refinement_is_read_from_what_a_model_wrote(srt, folder):
    """Heading and talk are not part of it, and a cut reply is no refinement."""
    from loopback_server import Answer, LoopbackServer

    replies = [
        Answer("Sure.\n\n### Improved Response\nA better answer."),
        Answer("Another", finish_reason="length"),
    ]
    write_jsonl(
        folder / "critiques.jsonl",
        [{"id": name, "critique": "x", "score": 5} for name in ("a", "b")],
    )
    server = LoopbackServer(lambda body, number: replies["Two?" in str(body)])
    try:
        finished = take(srt, "--critic-for", f"refinement={server.spec}", *ASKED[2:])
    finally:
        server.close()
    assert finished.code == 0, finished.stderr
    first, second = read_jsonl(folder / "feedback.jsonl")
    assert first["refinement"] == "A better answer."
    assert first["raw"]["refinement"].startswith("Sure.")
    assert second["status"] == "truncated"
    assert second["reason"].startswith("refinement: ")


def test_every_form_of_prompts_and_critiques_leads_to_a_trained_model(srt, folder, tiny_model):
    """From the document's samples to weights, with the two-layer model as the policy."""
    (folder / "critic.py").write_text(CRITIC)
    for number, (form, lines) in enumerate(PROMPT_FORMS.items()):
        (folder / "prompts.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
        out = folder / f"prompts-{number}.feedback.jsonl"
        finished = srt("collect-feedback", "--model", tiny_model, "--max-new-tokens", 4,
                       "--critic", "python:critic.py:critique", "--out", out.name)  # fmt: skip
        assert finished.code == 0, finished.stderr
        records, (prompts, responses, _) = read_jsonl(out), PROMPTS_EXPECTED[form]
        assert [record["prompt"] for record in records] == prompts
        given = [response for response in responses if response == GIVEN]
        assert [r["response"] for r in records if r["policy"] == "given"] == given
        assert all(r["refinement"] == f"{r['response']} Better." for r in records)
    write_jsonl(folder / "prompts.jsonl", PROMPTS)
    for number, lines in enumerate(FORMS.values()):
        (folder / "critiques.jsonl").write_text("\n".join(lines) + "\n")
        assert take(srt, *ASKED, "--out", f"critiques-{number}.feedback.jsonl").code == 0
    trained = srt("sft", "--data", "*.feedback.jsonl", "--model", tiny_model, "--epochs", 1,
                  "--global-batch", 30, "--samples", 0, "--critic-check", 0)  # fmt: skip
    assert trained.code == 0, trained.stderr
    manifest = json.loads((folder / "models/sft/run.json").read_text())
    files = manifest["tallies"]["files"]
    assert [each["rows"] for each in files] == [2] * (len(PROMPT_FORMS) + len(FORMS))
    # One draft that was called perfect is scored higher than its edit, which the paper leaves out.
    assert sum(each["trained"] for each in files) == 2 * len(files) - 1
    assert manifest["tallies"]["training"]["trained_tokens"] > 0
