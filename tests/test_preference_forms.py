"""Preferences in the forms that people have, as docs/data.md tells them, from file to trained model."""

import json

import pyarrow as pa
import pytest
from conftest import read_jsonl, write_jsonl
from pyarrow import parquet
from test_data_forms import samples

from srt_cli.preferences import read_pair, read_preferences

FORMS = samples("Preferences")
SYSTEM = {"role": "system", "content": "Be brief."}


def turns(*texts):
    roles = ["user", "assistant"] * len(texts)
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]


ONE, TWO, BRIEFLY = turns("One?"), turns("Two?"), [SYSTEM, *turns("Two?")]
CHAT = turns("One?", "Yes?", "Two?")
PROMPTS = {
    "TRL's conversational preferences": (ONE, BRIEFLY),
    "TRL's conversational preferences, implicit prompt": (ONE, CHAT),
    "TRL's standard preferences": (ONE, BRIEFLY),
    "TRL's standard preferences, implicit prompt": (ONE, TWO),
    "UltraFeedback, binarised": (ONE, TWO),
    "HH-RLHF transcripts": (ONE, CHAT),
    "LLaMA-Factory's ranking": (ONE, BRIEFLY),
    "axolotl's preferences": (ONE, BRIEFLY),
    "ms-swift's preferences": (ONE, BRIEFLY),
}


def test_every_form_of_the_document_is_tried():
    assert FORMS.keys() == PROMPTS.keys()
    assert all(len(lines) == 2 for lines in FORMS.values())


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_the_document_says(tmp_path, form):
    file = tmp_path / "prefs.jsonl"
    file.write_text("\n".join(FORMS[form]) + "\n", "utf-8")
    source = read_preferences([str(file)])
    own = form == "TRL's conversational preferences"
    assert source.recognised == ([] if own else [f"{file}: 2 pairs, read as {form}."])
    for pair, prompt in zip(source.pairs, PROMPTS[form], strict=True):
        assert [turn.model_dump() for turn in pair.prompt] == prompt
        assert [turn.model_dump() for turn in pair.chosen] == turns("", "Good.")[1:]
        assert [turn.model_dump() for turn in pair.rejected] == turns("", "Bad.")[1:]


def test_scores_ids_and_sources_are_kept_where_they_are_known():
    read = [
        read_pair(json.loads(line), "p.jsonl:7").pair for line in FORMS["UltraFeedback, binarised"]
    ]
    assert [(p.id, p.chosen_score, p.rejected_score, p.source) for p in read] == [
        ("a", 8.0, 5.5, None), ("b", 8.0, 5.5, None),
    ]  # fmt: skip
    bare = read_pair({"prompt": "q", "chosen": "a", "rejected": "b"}, "p.jsonl:7").pair
    assert (bare.id, bare.chosen_score, bare.gain) == ("p.jsonl:7", None, None)


def test_all_forms_together_train_a_model(srt, tmp_path, tiny_model):
    folder = tmp_path / "shards"
    folder.mkdir()
    for number, lines in enumerate(FORMS.values()):
        (folder / f"{number}.jsonl").write_text("\n".join(lines) + "\n", "utf-8")
    table = pa.Table.from_pylist([json.loads(line) for line in FORMS["UltraFeedback, binarised"]])
    parquet.write_table(table, tmp_path / "ultra.parquet")
    (tmp_path / "plain.csv").write_text("prompt,chosen,rejected\nThree?,Good.,Bad.\n")
    line = ("dpo", "--prefs", "shards/*.jsonl", "--prefs", "ultra.parquet", "--prefs", "plain.csv",
            "--model", tiny_model, "--learning-rate", 1e-3, "--global-batch", 32)  # fmt: skip
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    assert "ultra.parquet: 2 pairs in a parquet file, read as UltraFeedback, bin" in finished.stderr
    assert (
        "plain.csv: 1 pairs in a CSV file, read as TRL's standard preferences." in finished.stderr
    )
    assert "21 pairs; chosen" in finished.stderr
    manifest = json.loads((tmp_path / "models/dpo/run.json").read_text())
    assert len(manifest["inputs"]) == 11
    assert len(read_jsonl(tmp_path / "models/dpo/metrics.jsonl")) == 1
    assert "nothing to do" in srt(*line).stderr


def test_a_data_set_of_the_hub_is_read_and_what_it_was_taken_for_is_said(
    srt, tmp_path, tiny_model, monkeypatch
):
    rows = [json.loads(line) for line in FORMS["UltraFeedback, binarised"]]
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return rows

    monkeypatch.setattr("datasets.load_dataset", load_dataset)
    finished = srt("dpo", "--prefs", "hf:org/pairs:test", "--model", tiny_model, "--dry-run")
    assert finished.code == 0, finished.stderr
    assert asked == [("org/pairs", "test")]
    assert "hf:org/pairs:test: 2 pairs, read as UltraFeedback, binarised." in finished.stderr


GOOD = {"prompt": "q", "chosen": "a", "rejected": "b"}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "q", "good": "a", "bad": "b"},
         'no "chosen" and "rejected" (found: prompt, good, bad). The nearest known form is {"prompt": '
         'TEXT, "chosen": TEXT, "rejected": TEXT}.'),
        ({"prompt": ONE, "better": ONE}, '{"prompt": [{"role": "user", "content": TEXT}], "chosen": ['),
        ({"prompt": "q", "feedback": {}, "refinement": "r"}, "This is feedback. Make pairs of it first"),
        ({"prompt": "q", "completion": "a", "label": True}, "These are KTO's unpaired rows"),
        ({"instruction": "q", "completions": []}, "--strategy best-worst."),
        (GOOD | {"images": ["x.png"]}, "images: srt reads text alone."),
        (GOOD | {"chosen_score": "high"}, "chosen_score is 'high', not a number."),
        (GOOD | {"prompt": turns("q", "a")}, "the conversation has no user turn to answer."),
        ({"chosen": turns("q", "a", "q"), "rejected": turns("q", "b", "r")},
         "chosen ends with the user's turn, not an answer."),
        ({"chosen": turns("q", "a"), "rejected": turns("r", "b")}, "do not begin with the same prompt."),
        ({"chosen": "Yes.", "rejected": "No."}, "have no common beginning, and there is no field of a"),
        ({"prompt": "q", "chosen": [{"role": "assistant", "content": [{"type": "image"}]}],
          "rejected": "b"}, "chosen.0.content.0 is of type 'image': srt reads text alone."),
        ({"prompt": "q", "chosen": 7, "rejected": "b"}, "chosen is int, not text or turns."),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_named_with_its_place(srt, tmp_path, row, message):
    write_jsonl(tmp_path / "prefs.jsonl", [GOOD, row])
    finished = srt("dpo", "--model", "none", "--dry-run")
    assert finished.code == 1
    assert "prefs.jsonl:2: " in finished.stderr
    assert message in finished.stderr


def test_several_writers_are_told_apart(srt, tmp_path):
    for name in ("a", "b"):
        write_jsonl(tmp_path / f"{name}.jsonl", [GOOD])
        runs = {name: {"data": {"path": f"{name}.fed.jsonl"}}, f"{name}.fed": {}}
        for stem, inputs in runs.items():
            manifest = {"command": "x", "settings": {"model": f"models/{name}"}, "runtime": {}}
            (tmp_path / f"{stem}.run.json").write_text(json.dumps(manifest | {"inputs": inputs}))
    finished = srt("dpo", "--prefs", "a.jsonl", "--prefs", "b.jsonl", "--dry-run")
    assert finished.code == 2
    assert "(a.jsonl of models/a, b.jsonl of models/b). Pass --model." in finished.stderr
