"""srt build-prefs on answers that others scored, and against those of a first model."""

import json

import pyarrow as pa
import pytest
from conftest import read_jsonl, write_jsonl
from pyarrow import parquet
from test_build_prefs import record
from test_data_forms import samples

FORMS = samples("Scored answers")


def texts(path):
    return [
        (row["prompt"][-1]["content"], row["chosen"][0]["content"], row["rejected"][0]["content"])
        for row in read_jsonl(path)
    ]


@pytest.mark.parametrize("form", FORMS)
def test_a_form_of_scored_answers_is_read_as_the_document_says(srt, tmp_path, form):
    (tmp_path / "scored.jsonl").write_text("\n".join(FORMS[form]) + "\n", "utf-8")
    for strategy in ("best-worst", "tiers"):
        line = ("build-prefs", "--data", "scored.jsonl", "--strategy", strategy, "--min-gain", 0.5)
        finished = srt(*line, "--out", f"{strategy}.jsonl")
        assert finished.code == 0, finished.stderr
        asked = ["One?"] if form == "single answers" else ["One?", "Two?"]
        assert texts(tmp_path / f"{strategy}.jsonl") == [(q, "Good.", "Bad.") for q in asked]


def test_ultrafeedback_as_parquet_makes_pairs_with_scores_and_every_row_has_its_reason(
    srt, tmp_path
):
    rows = [
        {"instruction": f"q{n}", "completions": [
            {"response": "Middling.", "overall_score": 5.0}, {"response": "Good.", "overall_score": 8.5},
            {"response": "Bad.", "overall_score": 8.5 if n == 2 else 2.0}]}
        for n in range(3)
    ]  # fmt: skip
    rows[1]["completions"] = rows[1]["completions"][:1]
    parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "uf.parquet")
    line = ("build-prefs", "--data", "uf.parquet", "--strategy", "best-worst")
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    first, _ = read_jsonl(tmp_path / "prefs.jsonl")
    assert (first["chosen_score"], first["rejected_score"], first["source"]) == (
        8.5,
        2,
        "given scores",
    )
    assert texts(tmp_path / "prefs.jsonl")[1] == ("q2", "Bad.", "Middling.")
    [dropped] = read_jsonl(tmp_path / "prefs.dropped.jsonl")
    assert dropped["reason"] == "no pair by best-worst"
    assert dropped["row"]["instruction"] == "q1"
    refused = srt("build-prefs", "--data", "uf.parquet", "--out", "other.jsonl")
    assert refused.code == 3
    assert "(3 no refinement). Answers that others scored have none: pass --str" in refused.stderr


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"completions": [{"response": "a"}]}, "no answer in completions has a score (overall_score,"),
        ({"completions": [{"said": "a", "score": 1}]}, "completions.0 holds no text (found: said, sc"),
        ({"completions": ["a", "b"], "scores": [1]}, "completions holds 2 texts, and there is no list"),
        ({"completions": [7]}, "completions.0 is int, not an answer with a score"),
    ],
)  # fmt: skip
def test_what_is_no_scored_answer_is_named(srt, tmp_path, row, message):
    write_jsonl(tmp_path / "d.jsonl", [record().model_dump(), {"prompt": "q"} | row])
    finished = srt("build-prefs", "--data", "d.jsonl")
    assert finished.code == 1
    assert f"d.jsonl:2: {message}" in finished.stderr


# --- Against a first model ---------------------------------------------------------------------

ROWS = [
    record(id="a", prompt="One?"), record(id="b", prompt="Two?", refinement="A fig."),
    record(id="c", prompt="Three?"), record(id="d", prompt="Four?", score=8, refinement="A kiwi."),
]  # fmt: skip


@pytest.fixture
def against(srt, tmp_path):
    def build(first, *extra):
        write_jsonl(tmp_path / "self-feedback.jsonl", [row.model_dump() for row in ROWS])
        write_jsonl(tmp_path / "first.jsonl", first)
        finished = srt("build-prefs", "--rejected", "first.jsonl", *extra)
        assert "Traceback" not in finished.stderr
        return finished

    return build


def reasons(tmp_path):
    return {row["id"]: row["reason"] for row in read_jsonl(tmp_path / "prefs.dropped.jsonl")}


def test_feedback_of_the_first_model_is_joined_by_prompt_and_its_scores_count(against, tmp_path):
    first = [
        record(id="x", prompt=" One? ", response="Mud.", score=2, policy="models/base"),
        record(id="y", prompt="Two?", response="Sand.", score=8, policy="models/base"),
        record(id="c", prompt="Another?", response="Clay.", score=1, policy="models/base"),
    ]
    assert against([row.model_dump() for row in first]).code == 0
    assert texts(tmp_path / "prefs.jsonl") == [("One?", "An apple.", "Mud.")]
    [pair] = read_jsonl(tmp_path / "prefs.jsonl")
    assert (pair["chosen_score"], pair["rejected_score"]) == (8, 2)
    assert (pair["rejected_by"], pair["source"]) == ("models/base", "c")
    # The id of c is that of another prompt there, so it does not count.
    no_answer = "no answer of the first model"
    assert reasons(tmp_path) == {"b": "tie", "c": no_answer, "d": no_answer}
    manifest = json.loads((tmp_path / "prefs.run.json").read_text())
    assert manifest["inputs"]["rejected"]["rows"] == 3


def test_outputs_without_scores_count_as_much_as_the_draft_they_replace(against, tmp_path):
    outputs = [
        {"id": name, "contestant": "base", "use": use, "response": f"{use} {name}", "status": "ok"}
        for name in "abd" for use in ("response", "refinement")
    ]  # fmt: skip
    finished = against(
        outputs, "--strategy", "best-worst", "--export", "ms-swift", "--report", "page.html"
    )
    assert finished.code == 0, finished.stderr
    assert "rejected, no score" in (tmp_path / "page.html").read_text()
    pairs = read_jsonl(tmp_path / "prefs.jsonl")
    assert [(p["id"], p["rejected"][0]["content"], p["rejected_score"]) for p in pairs] == [
        ("a", "response a", None), ("b", "response b", None),
    ]  # fmt: skip
    assert {pair["rejected_by"] for pair in pairs} == {"base"}
    assert reasons(tmp_path) == {"c": "no answer of the first model", "d": "tie"}
    assert [row["rejected_response"] for row in read_jsonl(tmp_path / "prefs.ms-swift.jsonl")] == [
        "response a", "response b",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["outputs", "feedback"])
def test_what_a_check_said_of_the_first_answers_tells_how_many_labels_are_right(
    srt, tmp_path, form
):
    rows = [
        record(id=name, prompt=f"{name}?", refinement_passes=float(good)).model_dump()
        for name, good in zip("abc", (True, True, False), strict=True)
    ]
    write_jsonl(tmp_path / "self-feedback.jsonl", rows)
    passed = dict(zip("abc", (False, True, True), strict=True))
    write_jsonl(tmp_path / "first.jsonl", [
        {"id": name, "contestant": "base", "use": "response", "response": "Mud.", "status": "ok",
         "passed": good}
        if form == "outputs" else
        record(id=name, prompt=f"{name}?", response="Mud.", response_passes=float(good)).model_dump()
        for name, good in passed.items()
    ])  # fmt: skip
    finished = srt("build-prefs", "--rejected", "first.jsonl")
    assert finished.code == 0, finished.stderr
    labels = json.loads((tmp_path / "prefs.run.json").read_text())["tallies"]["labels"]
    assert (labels["right"], labels["decided"], labels["equal"]) == (1, 2, 1)


def test_alpaca_eval_outputs_and_the_worst_of_several_answers_are_taken(against, tmp_path):
    first = [
        {"instruction": "One?", "output": "Mud.", "generator": "m0", "score": 3},
        {"instruction": "One?", "output": "Silt.", "generator": "m0", "score": 1},
    ]
    assert against(first).code == 0
    [pair] = read_jsonl(tmp_path / "prefs.jsonl")
    assert (pair["rejected"][0]["content"], pair["rejected_score"]) == ("Silt.", 1)
    assert pair["rejected_by"] == "m0"


def test_a_file_without_answers_is_refused(against):
    finished = against([{"prompt": "One?", "reply": "Mud."}])
    assert finished.code == 1
    assert "first.jsonl:1: no answer (found: prompt, reply). Name it response." in finished.stderr
