"""Prompts in the forms and formats that people have, as docs/data.md tells them."""

import gzip
import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pytest
from conftest import ROOT, read_jsonl, write_jsonl
from pyarrow import ipc, parquet

CRITIC = """\
from srt_cli.records import Feedback

def critique(prompt, response):
    return Feedback(weaknesses="thin", suggestions="more", score=5), response + " Better."

def respond(prompt):
    return "A written answer."
"""


def samples(heading: str) -> dict[str, list[str]]:
    """The samples of one table of the document, by their names."""
    text = (ROOT / "docs" / "data.md").read_text("utf-8")
    section = text.split(f"## {heading}\n")[1].split("\n## ")[0]
    rows = re.findall(r"^\| (?!Form|---)(.+?) \| (.+) \|$", section, re.MULTILINE)
    return {name: re.findall(r"`([^`]+)`", cell) for name, cell in rows}


FORMS, FORMATS = samples("Forms of a row"), samples("Formats of a file")


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "critic.py").write_text(CRITIC)
    return tmp_path


def collect(srt, *extra):
    return srt(
        "collect-feedback", "--critic", "python:critic.py:critique",
        "--model", "python:critic.py:respond", *extra,
    )  # fmt: skip


def turns(*texts: str) -> list[dict[str, str]]:
    roles = ("user",) if len(texts) == 1 else ("system", "user")
    return [{"role": r, "content": t} for r, t in zip(roles, texts, strict=True)]


SYSTEM = {"role": "system", "content": "Be brief."}
EARLIER = [{"role": "user", "content": "Hello?"}, {"role": "assistant", "content": "Yes?"}]
WRITTEN, GIVEN = "A written answer.", "A given answer."
EXPECTED = {
    "prompt": (["One?", "Two?"], [WRITTEN, GIVEN], None),
    "prompt turns": (
        [turns("One?"), turns("Be brief.", "Two?")], [WRITTEN, WRITTEN], "read as prompt turns.",
    ),
    "instruction": (["One?", "Two?"], [WRITTEN, WRITTEN], "2 prompts, read as instruction."),
    "instruction and input": (
        ["Translate.\n\nOne", "Translate.\n\nTwo"], [WRITTEN, WRITTEN],
        "read as instruction and input.",
    ),
    "messages": ([turns("One?"), turns("Two?")], [WRITTEN, GIVEN], "read as messages."),
    "messages as JSON text": (
        [turns("One?"), turns("Two?")], [WRITTEN, WRITTEN], "read as messages as JSON text.",
    ),
    "messages in parts": ([turns("One?"), turns("Two?")], [WRITTEN, WRITTEN], "read as messages."),
    "OpenAI fine-tuning messages": (
        [turns("Be brief.", "One?"), turns("Two?")], [WRITTEN, GIVEN],
        "read as OpenAI fine-tuning messages; left out of the chats: name (1 row), weight (1 row), "
        "tools (1 row).",
    ),
    "instruction and context": (
        ["Translate.\n\nOne", "Translate.\n\nTwo"], [WRITTEN, WRITTEN],
        "read as instruction and context.",
    ),
    "question with system_prompt": (
        [turns("Be brief.", "One?"), turns("Be brief.", "Two?")], [GIVEN, WRITTEN],
        "read as question with system_prompt.",
    ),
    "instruction with system and history": (
        [[SYSTEM, *EARLIER, *turns("One?")], [SYSTEM, *EARLIER, *turns("Two?")]],
        [WRITTEN, WRITTEN], "read as instruction with system and history.",
    ),
    "ShareGPT conversations": (
        [turns("One?"), turns("Be brief.", "Two?")], [WRITTEN, GIVEN],
        "read as ShareGPT conversations.",
    ),
}  # fmt: skip


def test_every_form_of_the_document_is_tried():
    assert FORMS.keys() == EXPECTED.keys()
    assert all(len(lines) == 2 for lines in [*FORMS.values(), *FORMATS.values()])


@pytest.mark.parametrize("form", FORMS)
def test_a_form_is_read_as_the_document_says(srt, folder, form):
    (folder / "prompts.jsonl").write_text("\n".join(FORMS[form]) + "\n", "utf-8")
    prompts, responses, said = EXPECTED[form]
    finished = collect(srt)
    assert finished.code == 0, finished.stderr
    records = read_jsonl(folder / "feedback.jsonl")
    assert [record["prompt"] for record in records] == prompts
    assert [record["response"] for record in records] == responses
    assert (said or "read as") in finished.stderr or said is None
    assert ("read as" in finished.stderr) == (said is not None)


def write_as(path: Path, lines: list[str]) -> None:
    """A file of a format from its sample."""
    text = "\n".join(lines).replace("⇥", "\t") + "\n"
    if path.suffix == ".parquet":
        parquet.write_table(pa.Table.from_pylist([json.loads(line) for line in lines]), path)
    elif path.suffix in (".arrow", ".feather"):
        table = pa.Table.from_pylist([json.loads(line) for line in lines])
        # `datasets` writes streams, feather files.
        open_new = ipc.new_stream if path.suffix == ".arrow" else ipc.new_file
        with open_new(str(path), table.schema) as writer:
            writer.write_table(table)
    elif path.suffix == ".gz":
        path.write_bytes(gzip.compress(text.encode()))
    elif path.suffix == ".zst":
        with pa.CompressedOutputStream(str(path), "zstd") as file:
            file.write(text.encode())
    else:
        path.write_text(text, "utf-8")


SUFFIXES = [suffix for names in FORMATS for suffix in names.split(", ")]
PLAIN = [suffix for suffix in SUFFIXES if suffix not in (".parquet", ".arrow", ".feather")]


@pytest.mark.parametrize(
    "suffix", [*SUFFIXES, *(f"{s}{c}" for s in PLAIN for c in (".gz", ".zst"))]
)
def test_a_format_is_read_as_the_document_says(srt, folder, suffix):
    [lines] = [
        lines for names, lines in FORMATS.items()
        if any(suffix.removesuffix(".gz").removesuffix(".zst") == n for n in names.split(", "))
    ]  # fmt: skip
    write_as(folder / f"prompts{suffix}", lines)
    finished = collect(srt, "--prompts", f"prompts{suffix}")
    assert finished.code == 0, finished.stderr
    asked = [record["prompt"] for record in read_jsonl(folder / "feedback.jsonl")]
    alone = {".csv": ["One, or two?"], ".tsv": ["One?"]}
    assert asked == alone.get(Path(f"x{suffix.removesuffix('.gz').removesuffix('.zst')}").suffix,
                              ["One?", "Two?"])  # fmt: skip
    manifest = json.loads((folder / "feedback.run.json").read_text())
    assert manifest["inputs"]["prompts"]["sha256"]


@pytest.mark.parametrize("location", ["shards", "shards/part-*.parquet", "shards/**/*.parquet"])
def test_shards_are_read_in_the_order_of_their_names(srt, folder, location):
    (folder / "shards").mkdir()
    for shard in range(3):
        table = pa.Table.from_pylist([{"prompt": f"q{shard}-{n}"} for n in range(2)])
        parquet.write_table(table, folder / "shards" / f"part-{shard}.parquet")
    (folder / "shards" / "dataset_info.json").write_text("{}")
    finished = collect(srt, "--prompts", location)
    assert finished.code == 0, finished.stderr
    assert f"{location}: 6 prompts in 3 parquet files, read as prompt." in finished.stderr
    asked = [record["prompt"] for record in read_jsonl(folder / "feedback.jsonl")]
    assert asked == ["q0-0", "q0-1", "q1-0", "q1-1", "q2-0", "q2-1"]
    assert "nothing to do" in collect(srt, "--prompts", location).stdout


def test_what_is_no_set_of_shards_is_said(srt, folder):
    (folder / "mixed").mkdir()
    (folder / "mixed" / "a.csv").write_text("prompt\nq\n")
    write_jsonl(folder / "mixed" / "b.jsonl", [{"prompt": "q"}])
    mixed = collect(srt, "--prompts", "mixed")
    assert "mixed: holds several formats (a.csv, b.jsonl). Pass a glob" in mixed.stderr
    none = collect(srt, "--prompts", "mixed/*.parquet")
    assert "mixed/*.parquet: no file has such a name. Check the path." in none.stderr


def test_one_file_is_not_read_as_what_its_name_says_and_that_is_said(srt, folder):
    (folder / "p.parquet").write_text("no parquet")
    (folder / "p.jsonl.zst").write_text("no zst")
    (folder / "p.csv").write_text("prompt\nq,r\n")
    (folder / "p.json").write_text('[{"prompt": "q"},\n oops]')
    for name, message in (
        ("p.parquet", "p.parquet: not a readable parquet file ("),
        ("p.jsonl.zst", "p.jsonl.zst: not a readable zst file ("),
        ("p.csv", "p.csv:2: has more cells than the header. Quote texts that hold ','."),
        ("p.json", "p.json: not valid JSON ("),
    ):
        finished = collect(srt, "--prompts", name)
        assert finished.code == 1
        assert message in finished.stderr


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('id,prompt\n1,"a\nb"\n\n2,"c\r\nd",e\n', "p.csv:5: has more cells than the header."),
        ('prompt\n"a\nb"\n"c\nd\n', "p.csv:4: not valid CSV in the row that begins here"),
        ('prompt\n"a\nb\n', "p.csv:2: not valid CSV in the row that begins here"),
        ('"prompt\na\nb\n', "p.csv:1: not valid CSV in the row that begins here"),
    ],
)
def test_a_row_of_a_table_is_named_by_its_first_line(srt, folder, text, message):
    (folder / "p.csv").write_bytes(text.encode())
    finished = collect(srt, "--prompts", "p.csv")
    assert finished.code == 1
    assert message in finished.stderr


def test_fields_are_named_with_dots(srt, folder):
    row = {"meta": {"key": 7, "ask": "What?"}, "answers": [{"text": "A given answer."}], "id": "x"}
    write_jsonl(folder / "prompts.jsonl", [row])
    fields = ("--prompt-field", "meta.ask", "--response-field", "answers.0.text")
    assert collect(srt, *fields, "--id-field", "meta.key").code == 0
    [record] = read_jsonl(folder / "feedback.jsonl")
    assert (record["id"], record["prompt"]) == ("7", "What?")
    assert record["response"] == "A given answer."
    wrong = collect(srt, "--prompt-field", "meta.asked", "--out", "other.jsonl")
    assert 'no "meta.asked" (found: meta.key, meta.ask, answers, id). Pass another' in wrong.stderr


def test_repeated_prompts_are_counted_and_left_out_on_request(srt, folder):
    rows = [{"id": n, "prompt": text} for n, text in enumerate(["a", "b", "a", "c"])]
    write_jsonl(folder / "prompts.jsonl", rows)
    counted = collect(srt)
    assert "4 prompts, read as prompt; 1 row with an earlier prompt (--unique" in counted.stderr
    unique = collect(srt, "--unique", "--limit", 3, "--out", "unique.jsonl")
    assert "3 prompts, read as prompt; 1 row with an earlier prompt, left out." in unique.stderr
    assert [record["id"] for record in read_jsonl(folder / "unique.jsonl")] == ["0", "1", "3"]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]},
            "messages.0.content.0 is of type 'image_url': srt reads text alone.",
        ),
        ({"messages": "[{'role': 'user'}]"}, "messages is a text, and not the JSON of a list"),
        ({"messages": [{"role": "user"}]}, "messages.0.content is missing"),
        ({"messages": [{"role": "robot", "content": "x"}]}, "'robot' (messages.0.role) is no role"),
        ({"conversation": [{"from": "human", "value": "x"}]},
         'pass --prompt-field conversation. The nearest known form is {"conversations": [{"from": '),
        ({"instructions": "x"}, 'The nearest known form is {"instruction": TEXT, "input": TEXT}.'),
        ({"dialog": [{"a": "x"}]}, 'The nearest known form is {"messages": [{"role": "user", '),
    ],
)  # fmt: skip
def test_what_is_not_taken_is_named_with_its_place(srt, folder, row, message):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "q"}, row])
    finished = collect(srt)
    assert finished.code == 1
    assert finished.stderr.startswith("error: prompts.jsonl:2: ")
    assert message in finished.stderr


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "hi", "rating": NaN}', "rating is NaN, which is no JSON (pandas and json.dumps"),
        ('{"prompt": "hi", "m": {"x": [1, -Infinity]}}', "m.x.1 is -Infinity, which is no JSON"),
    ],
)  # fmt: skip
def test_a_number_that_json_has_not_is_named_with_its_field(srt, folder, line, message):
    (folder / "prompts.jsonl").write_text(line + "\n")
    finished = collect(srt)
    assert finished.code == 1
    assert f"prompts.jsonl:1: {message}" in finished.stderr


def test_what_a_shell_makes_of_a_command_is_read_once(folder):
    write_jsonl(folder / "p.jsonl", [{"id": "a", "prompt": "What?"}])
    line = (
        f"{sys.executable} -m srt_cli collect-feedback --prompts <(cat p.jsonl) "
        "--model python:critic.py:respond --critic python:critic.py:critique"
    )
    finished = subprocess.run(
        ["bash", "-c", line], cwd=folder, capture_output=True, text=True, check=False
    )
    assert finished.returncode == 0, finished.stderr
    assert [record["id"] for record in read_jsonl(folder / "feedback.jsonl")] == ["a"]


def test_a_chat_that_opens_with_tools_keeps_its_words_alone(srt, folder):
    messages = [
        {"role": "user", "content": "How warm?"},
        {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]},
        {"role": "tool", "tool_call_id": "1", "content": "21"},
        {"role": "assistant", "content": "21 degrees."},
        {"role": "user", "content": "And there?"},
    ]
    write_jsonl(folder / "prompts.jsonl", [{"messages": messages}])
    finished = collect(srt)
    assert "left out of the chats: turns of tools (1 row)." in finished.stderr
    [record] = read_jsonl(folder / "feedback.jsonl")
    assert [turn["content"] for turn in record["prompt"]] == [
        "How warm?", "21 degrees.", "And there?",
    ]  # fmt: skip


MEASURED = """\
import resource, sys
from srt_cli.forms import FieldNames
from srt_cli.prompts import Selection, prompts_from
import pyarrow.parquet
prompts_from("few", Selection())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
source = prompts_from("many", Selection())
assert sum(1 for _ in source.read()) == source.count == 60_000
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024)
"""


def test_shards_stream_in_constant_memory(folder):
    for name, shards, rows in (("few", 1, 2_000), ("many", 10, 6_000)):
        (folder / name).mkdir()
        for shard in range(shards):
            prompts = [f"{shard} {row} " + "word " * 400 for row in range(rows)]
            parquet.write_table(
                pa.table({"prompt": prompts}), folder / name / f"{shard:02}.parquet",
                row_group_size=1_000,
            )  # fmt: skip
    measured = subprocess.run(
        [sys.executable, "-c", MEASURED], cwd=folder, capture_output=True, text=True, check=False
    )
    assert measured.returncode == 0, measured.stderr
    # 60,000 prompts are 120 MB of text; what is kept of them is sixteen bytes each, and their sets.
    assert float(measured.stdout) < 60
