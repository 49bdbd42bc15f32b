"""The six commands in a row: each finds in the manifest of its input what it was not told."""

import json

from conftest import read_jsonl, write_jsonl
from test_build_prefs import record

PROGRAMS = """
from srt_cli.records import Feedback

def critique(prompt, response):
    good = response.endswith("!")
    feedback = Feedback(weaknesses="Dull.", suggestions="Spirit.", score=9 if good else 4)
    return feedback, response + "!"

def check(prompt, response):
    return len(response) % 2 == 0
"""


def test_six_commands_need_model_and_critic_once(srt, tmp_path, tiny_model):
    (tmp_path / "p.py").write_text(PROGRAMS)
    prompts = [{"id": str(n), "prompt": f"Say {n}."} for n in range(6)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    (tmp_path / "srt.toml").write_text(
        "max-new-tokens = 8\ncritic-max-tokens = 8\ncritic-check = 2\nepochs = 1\n"
    )

    collected = srt("collect-feedback", "--model", tiny_model, "--critic", "python:p.py:critique")
    assert collected.code == 0, collected.stderr
    tuned = srt("sft")
    assert tuned.code == 0, tuned.stderr
    assert "do not parse" in tuned.stderr
    assert "balanced accuracy" not in tuned.stderr  # a table of nothing
    criticised = srt("self-critique")
    assert criticised.code == 3, criticised.stderr  # a random model writes no whole critique
    assert {row["policy"] for row in read_jsonl(tmp_path / "self-feedback.jsonl")} == {"models/sft"}

    # A random model writes no critique that parses; such rows stand in for a model that does.
    rows = [record(id=str(n), prompt=f"Say {n}.", response=f"{n}") for n in range(4)]
    rows = [row.model_copy(update={"refinement": f"It is {row.id}"}) for row in rows]
    write_jsonl(tmp_path / "self-feedback.jsonl", [row.model_dump() for row in rows])
    paired = srt("build-prefs", "--max-length-ratio", 30)
    assert paired.code == 0, paired.stderr
    preferred = srt("dpo")
    assert preferred.code == 0, preferred.stderr
    assert "reference: models/sft" in preferred.stderr

    evaluated = srt("eval", "--check", "python:p.py:check", "--use", "response")
    assert evaluated.code == 0, evaluated.stderr
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert figures["reference"] == str(tiny_model)
    assert [row["contestant"] for row in figures["rows"]] == [str(tiny_model), "models/dpo"]
    manifest = json.loads((tmp_path / "models/dpo/run.json").read_text())
    assert manifest["inputs"]["prefs"]["run"] is not None


def test_self_critique_shows_whether_the_model_knows_good_from_bad(srt, tmp_path, tiny_model):
    (tmp_path / "p.py").write_text(PROGRAMS + "\ndef respond(prompt):\n    return 'x'\n")
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"p{n}"} for n in range(12)])
    finished = srt("collect-feedback", "--model", "python:p.py:respond",
                   "--critic", "python:p.py:critique")  # fmt: skip
    assert finished.code == 0
    assert "the critic gave every one of 12 drafts the score 4: it tells nothing" in finished.stderr
