"""Prompts, spreadsheets and folders as a newcomer has them, through the front door."""

import io
import json
import sys

import pyarrow as pa
import pytest
from conftest import read_jsonl, write_jsonl
from pyarrow import ipc, parquet

CRITIC = """\
def critique(prompt, response):
    return {"weaknesses": "w", "suggestions": "s", "score": 4}, "Better: " + response

def perfect(prompt, response):
    return {"weaknesses": "", "suggestions": "", "score": 10}, response
"""


@pytest.fixture(autouse=True)
def folder(tmp_path):
    (tmp_path / "c.py").write_text(CRITIC)
    return tmp_path


def collect(srt, *extra):
    return srt("collect-feedback", "--critic", "python:c.py:critique", *extra)


def prompts_of(srt, folder, rows, *extra):
    """The prompts of the records that rows become, and what was said."""
    write_jsonl(folder / "r.jsonl", rows)
    finished = collect(srt, "--prompts", "r.jsonl", "--out", "f.jsonl", "--overwrite", *extra)
    assert finished.code == 0, finished.stderr
    return [record["prompt"] for record in read_jsonl(folder / "f.jsonl")], finished.stderr


def turn(role, content):
    return {"role": role, "content": content}


SYSTEM, EARLIER = turn("system", "Be brief."), [turn("user", "q"), turn("assistant", "r")]
CHAT = [turn("user", "a"), turn("assistant", "x")]
QUESTION = turn("user", "a")


@pytest.mark.parametrize(
    ("row", "prompt", "form"),
    [
        ({"prompt": "a", "system": "Be brief.", "response": "x"}, [SYSTEM, QUESTION],
         "prompt with system"),
        ({"prompt": "a", "system": " ", "response": "x"}, "a", None),
        ({"prompt": "a", "system": None, "history": [], "response": "x"}, "a", None),
        ({"system": "Be brief.", "messages": CHAT}, [SYSTEM, QUESTION], "messages with system"),
        ({"system": "Be brief.", "messages": json.dumps(CHAT)}, [SYSTEM, QUESTION],
         "messages as JSON text with system"),
        ({"system": "Be long.", "messages": [SYSTEM, *CHAT]}, [SYSTEM, QUESTION],
         "messages; left out of the chats: system (1 row)"),
        ({"system": "Be brief.", "messages": [SYSTEM, *CHAT]}, [SYSTEM, QUESTION], "messages"),
        ({"instruction": "a", "input": "b", "system": "Be brief.", "history": [["q", "r"]],
          "response": "x"},
         [SYSTEM, *EARLIER, turn("user", "a\n\nb")],
         "instruction and input with system and history"),
        ({"prompt": "a", "history": [["q", "r"]], "response": "x"}, [*EARLIER, QUESTION],
         "prompt with history"),
        ({"prompt": "a", "history": '[["q", "r"]]', "response": "x"}, [*EARLIER, QUESTION],
         "prompt with history"),
        ({"prompt": "a", "history": EARLIER, "response": "x"}, [*EARLIER, QUESTION],
         "prompt with history"),
        ({"prompt": "a", "history": "edited in 2020", "response": "x"}, "a",
         "prompt; left out of the chats: history (1 row)"),
        ({"prompt": "a", "history": [{"date": "2020"}], "response": "x"}, "a",
         "prompt; left out of the chats: history (1 row)"),
        ({"prompt": "a", "history": [*EARLIER, turn("editor", "x")], "response": "x"}, "a",
         "prompt; left out of the chats: history (1 row)"),
        ({"instruction": "a", "context": "b", "category": "c", "response": "x"}, "a\n\nb",
         "instruction and context"),
        ({"instruction": "a", "context": "", "response": "x"}, "a", "instruction"),
        ({"system_prompt": "Be brief.", "question": "a", "response": "x"}, [SYSTEM, QUESTION],
         "question with system_prompt"),
        ({"system_prompt": "", "question": "a", "context": "b", "response": "x"}, "a\n\nb",
         "question and context"),
        ({"Prompt ": "a", "Response": "x"}, "a", None),
        ({"PROMPT": "b", "prompt": "a", "response": "x"}, "a", None),
        ({"messages": [turn("User", "a"), turn("Assistant ", "x")]}, [QUESTION], "messages"),
    ],
)  # fmt: skip
def test_what_a_row_says_before_its_question_is_part_of_the_prompt(srt, folder, row, prompt, form):
    asked, said = prompts_of(srt, folder, [row])
    assert asked == [prompt]
    assert [each["response"] for each in read_jsonl(folder / "f.jsonl")] == ["x"]
    if form is None:
        assert "read as" not in said
    else:
        assert f"r.jsonl: 1 prompt, read as {form}.\n" in said


def test_the_ids_of_rows_without_such_fields_are_those_of_before(srt, folder):
    rows = [{"prompt": "a", "response": "x"}, {"prompt": "a", "system": "S", "response": "x"}]
    prompts_of(srt, folder, rows)
    ids = [record["id"] for record in read_jsonl(folder / "f.jsonl")]
    assert ids[0] == "7e983b56b043"
    assert ids[1] != ids[0]


def test_a_named_field_stands_as_it_is_spelt(srt, folder):
    rows = [{"Prompt ": "a", "prompt": "another", "Answer": "x"}]
    asked, _ = prompts_of(srt, folder, rows, "--prompt-field", "Prompt ",
                          "--response-field", "Answer")  # fmt: skip
    assert asked == ["a"]
    rows = [{"Prompt": {"text": "a"}, "Response": ["x"], "ID": {"n": 7}}]
    asked, _ = prompts_of(srt, folder, rows, "--prompt-field", "Prompt.text",
                          "--response-field", "Response.0", "--id-field", "ID.n")  # fmt: skip
    [record] = read_jsonl(folder / "f.jsonl")
    assert (asked, record["response"], record["id"]) == (["a"], "x", "7")


def test_a_turn_with_no_images_in_its_list_of_images_is_text(srt, folder):
    rows = [{"messages": [turn("user", "a") | {"images": [], "audio": None}], "response": "x"}]
    assert prompts_of(srt, folder, rows)[0] == [[turn("user", "a")]]
    write_jsonl(folder / "r.jsonl", [{"messages": [turn("user", "a") | {"images": ["x.png"]}]}])
    told = "error: r.jsonl:1: messages.0.images: srt reads text alone.\n"
    assert collect(srt, "--prompts", "r.jsonl", "--out", "g.jsonl").stderr == told


def test_a_named_field_is_found_whatever_its_case_and_spaces(srt, folder):
    rows = [{"Ticket No": "7", "Customer message ": "a", "The Reply": "x"}]
    names = ("--prompt-field", "Customer message", "--id-field", "ticket no")
    asked, _ = prompts_of(srt, folder, rows, *names, "--response-field", "the reply")
    assert asked == ["a"]
    assert [record["id"] for record in read_jsonl(folder / "f.jsonl")] == ["7"]
    wrong = srt("collect-feedback", "--prompts", "r.jsonl", "--prompt-field", "message",
                "--critic", "python:critic.py:critique", "--out", "g.jsonl")  # fmt: skip
    assert 'no "message" (found: Ticket No, Customer message , The Reply)' in wrong.stderr


def test_preferences_bring_their_earlier_turns(srt, folder):
    from srt_cli.preferences import read_pair

    row = {"instruction": "a", "context": "b", "system": "Be brief.", "history": [["q", "r"]],
           "Chosen": "c", "rejected ": "d"}  # fmt: skip
    pair = read_pair(row, "1").pair
    assert [each.model_dump() for each in pair.prompt] == [
        SYSTEM, *EARLIER, turn("user", "a\n\nb"),
    ]  # fmt: skip
    assert (pair.chosen[0].content, pair.rejected[0].content) == ("c", "d")


def test_critiques_join_prompts_whose_system_turn_they_leave_out(srt, folder):
    write_jsonl(folder / "p.jsonl", [{"prompt": "a", "system": "Be brief.", "response": "x"}])
    said = {"weaknesses": "w", "suggestions": "s", "score": 4, "refinement": "y",
            "refinement_score": 8}  # fmt: skip
    write_jsonl(folder / "w.jsonl", [{"prompt": "a", **said}])
    line = ("collect-feedback", "--critic", "file:w.jsonl", "--prompts", "p.jsonl", "--overwrite")
    assert srt(*line).code == 0
    assert read_jsonl(folder / "feedback.jsonl")[0]["prompt"] == [SYSTEM, QUESTION]
    two = [{"prompt": "a", "system": name, "response": "x"} for name in ("One.", "Two.")]
    write_jsonl(folder / "p.jsonl", two)
    ambiguous = srt(*line)
    assert ambiguous.code == 1
    assert "none of 1 critique joins a prompt (without such a prompt" in ambiguous.stderr


# --- Splits ------------------------------------------------------------------------------------


def write_table(path, prompts):
    path.parent.mkdir(parents=True, exist_ok=True)
    table = pa.table({"prompt": prompts, "response": ["x"] * len(prompts)})
    if path.suffix == ".arrow":
        with ipc.new_stream(str(path), table.schema) as writer:
            writer.write_table(table)
    else:
        parquet.write_table(table, path)


@pytest.mark.parametrize(
    ("files", "splits", "one"),
    [
        (["train/data-00000-of-00001.arrow", "test/data-00000-of-00001.arrow"], "train, test",
         "d/train"),
        (["train.parquet", "test.parquet"], "train, test", "'d/*train*.parquet'"),
        (["data/train-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"], "train, test",
         "'d/data/*train*.parquet'"),
        (["data/train_sft-00000-of-00001.parquet", "data/train_prefs-00000-of-00001.parquet"],
         "train_prefs, train_sft", "'d/data/*train_prefs*.parquet'"),
        (["part-1.parquet", "validation.parquet"], "validation and others",
         "'d/*validation*.parquet'"),
    ],
)  # fmt: skip
def test_a_folder_of_several_splits_is_not_read_as_one(srt, folder, files, splits, one):
    for number, name in enumerate(files):
        write_table(folder / "d" / name, [f"q{number}"])
    finished = collect(srt, "--prompts", "d")
    assert finished.code == 1
    assert (
        f"error: d: holds several splits ({splits}). Pass one, such as {one}, or" in finished.stderr
    )
    assert collect(srt, "--prompts", one.strip("'")).code == 0
    assert len(read_jsonl(folder / "feedback.jsonl")) == 1


def test_splits_of_any_name_that_datasets_saved_are_told_apart(srt, folder):
    for split in ("first", "second"):
        write_table(folder / "d" / split / "data-00000-of-00001.arrow", [split])
    (folder / "d/dataset_dict.json").write_text('{"splits": ["first", "second"]}')
    finished = collect(srt, "--prompts", "d")
    assert (
        "d: holds several splits (first, second). Pass one, such as d/first, or" in finished.stderr
    )
    one = collect(srt, "--prompts", "d/first")
    assert "d/first: 1 prompt in an arrow file, read as prompt." in one.stderr


def test_shards_of_one_split_are_one(srt, folder):
    for number in range(2):
        write_table(folder / "d" / f"test-0000{number}-of-00002.parquet", [f"q{number}"])
    assert collect(srt, "--prompts", "d").code == 0


# --- Spreadsheets ------------------------------------------------------------------------------

HEADER = "prompt,response,weaknesses,suggestions,score,refinement,refinement_score\n"


def written(srt, folder, text, *extra, encoding="utf-8"):
    (folder / "h.csv").write_bytes(text.encode(encoding))
    finished = srt("collect-feedback", "--critic", "file:h.csv", "--overwrite", *extra)
    return finished, read_jsonl(folder / "feedback.jsonl")


def test_an_empty_cell_is_an_empty_text(srt, folder):
    finished, [record] = written(srt, folder, HEADER + "a,x,Too short.,,4,y,8\n")
    assert finished.code == 0, finished.stderr
    assert record["feedback"]["weaknesses"] == "Too short."
    assert record["feedback"]["suggestions"] == ""


def test_a_perfect_answer_needs_words_and_the_message_says_which(srt, folder):
    finished, [record] = written(srt, folder, HEADER + "a,x,,,10,x,10\n")
    assert finished.code == 3
    told = 'no weaknesses and no suggestions (write "None." where there is nothing to improve)'
    assert record["reason"] == f"critique: {told}"
    assert told in finished.stderr
    write_jsonl(folder / "p.jsonl", [{"prompt": "a", "response": "x"}])
    program = srt("collect-feedback", "--critic", "python:c.py:perfect", "--prompts", "p.jsonl",
                  "--out", "g.jsonl")  # fmt: skip
    assert program.code == 3
    assert 'return "None." for what there is nothing to say of' in program.stderr


@pytest.mark.parametrize(
    ("score", "scale", "read"),
    [
        ("7,5", "1-10", 7.5), ("2/10", "1-10", 2), ("7.5 ", "1-10", 7.5), ("[[6]]", "1-10", 6),
        ("4/5", "1-5", 7.8), ("4/5", "1-10", None), ("7-8", "1-10", None), ("80%", "1-10", None),
        ("good", "1-10", None),
    ],
)  # fmt: skip
def test_a_score_is_read_as_from_a_critics_reply(srt, folder, score, scale, read):
    row = f'a,x,w,s,"{score}",y,8\n'.replace("y,8", "y,4") if scale == "1-5" else None
    row = row or f'a,x,w,s,"{score}",y,8\n'
    finished, [record] = written(srt, folder, HEADER + row, "--critique-scale", scale)
    if read is None:
        assert finished.code == 3
        assert f"the score {score!r} is not on a scale of 1 to 10" in record["reason"]
    else:
        assert finished.code == 0, finished.stderr
        assert record["feedback"]["score"] == read


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("p.csv", "id;prompt;response\n1;a, b;x\n", " (its columns parted by semicolons)"),
        ("p.csv", "id\tprompt\tresponse\n1\ta, b\tx\n", " (its columns parted by tabs)"),
        ("p.tsv", 'id,prompt,response\n1,"a, b",x\n', " (its columns parted by commas)"),
        ("p.csv", 'id,prompt,response\n1,"a, b",x\n', ""),
        ("p.csv", '\n\nid,prompt,response\n1,"a, b",x\n', ""),
        ("p.csv", "sep=;\nprompt;response\na, b;x\n", " (its columns parted by semicolons)"),
        ("p.csv", '"the prompt; id",prompt,response\n1,"a, b",x\n', ""),
        ("p.csv", '\rid,prompt,response\r1,"a, b",x\r', ""),
        ("p.csv", "id;prompt;response\r1;a, b;x\r", " (its columns parted by semicolons)"),
    ],
)  # fmt: skip
def test_a_table_is_parted_as_its_header_shows(srt, folder, name, text, told):
    (folder / name).write_text(text)
    finished = collect(srt, "--prompts", name)
    assert finished.code == 0, finished.stderr
    assert f"{name}: 1 prompt in a CSV file{told}, read as prompt." in finished.stderr
    assert read_jsonl(folder / "feedback.jsonl")[0]["prompt"] == "a, b"


def test_empty_rows_are_no_rows_and_counted(srt, folder):
    (folder / "p.csv").write_text("Prompt ,response\na,x\n,\n , \nb,x,\n,,\n")
    finished = collect(srt, "--prompts", "p.csv")
    assert finished.code == 0, finished.stderr
    assert (
        "p.csv: 2 prompts in a CSV file, read as prompt; 3 empty rows left out." in finished.stderr
    )
    finished, records = written(srt, folder, HEADER + "a,x,w,s,4,y,8\n,,,,,,\n")
    assert (finished.code, len(records)) == (0, 1)
    assert "1 row of it without a critique." in finished.stderr


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "prompt,response\nä,x\n"),
        ("p.json", '[{"prompt": "ä", "response": "x"}]'),
        ("p.jsonl", '{"prompt": "ä", "response": "x"}\n'),
    ],
)
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-be"])
def test_utf_16_that_says_so_is_read(srt, folder, name, text, encoding):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    (folder / name).write_bytes(mark + text.encode(encoding))
    finished = collect(srt, "--prompts", name)
    assert finished.code == 0, finished.stderr
    assert read_jsonl(folder / "feedback.jsonl")[0]["prompt"] == "ä"


@pytest.mark.parametrize(
    ("name", "text", "byte"),
    [
        ("p.csv", "prompt,response\na,x\nb,x\nä,x\n", 1),
        ("p.jsonl", '{"prompt": "a"}\n\n\n{"prompt": "ä"}\n', 13),
        ("p.json", '[\n{"prompt": "a"},\n{"prompt": "b"},\n{"prompt": "ä"}\n]', 13),
    ],
)
def test_a_text_in_latin_1_is_named_with_its_line(srt, folder, name, text, byte):
    (folder / name).write_bytes(text.encode("latin-1"))
    finished = collect(srt, "--prompts", name, "--model", "python:c.py:critique")
    assert finished.stderr == (
        f"error: {name}:4: not UTF-8 (byte {byte}). Convert it: iconv -f WINDOWS-1252 -t UTF-8.\n"
    )


def test_a_system_turn_in_latin_1_is_named(srt, folder):
    write_jsonl(folder / "prompts.jsonl", [{"prompt": "a"}])
    (folder / "s.txt").write_bytes("Sei kühn.".encode("latin-1"))
    finished = collect(srt, "--model", "python:c.py:critique", "--system", "s.txt")
    assert (finished.code, finished.stderr) == (1, (
        "error: --system s.txt: not UTF-8 (byte 6). Convert it: iconv -f WINDOWS-1252 -t UTF-8.\n"
    ))  # fmt: skip


def test_names_are_read_without_regard_to_case_in_every_table(srt, folder):
    (folder / "h.csv").write_text(
        "Prompt;Response;Weaknesses;Suggestions;Score;Refinement;Refinement Score\na;x;w;s;4;y;8\n"
    )
    finished = srt("collect-feedback", "--critic", "file:h.csv")
    assert finished.code == 0, finished.stderr
    assert (
        "h.csv: 1 critique in a CSV file (its columns parted by semicolons), read as critiques in "
        "parts." in finished.stderr
    )
    (folder / "s.csv").write_text('Prompt,Response,Score\na,good,"7,5"\na,bad,2\n')
    finished = srt("build-prefs", "--data", "s.csv", "--strategy", "best-worst")
    assert finished.code == 0, finished.stderr
    [pair] = read_jsonl(folder / "prefs.jsonl")
    assert (pair["chosen"][0]["content"], pair["chosen_score"]) == ("good", 7.5)
    write_jsonl(folder / "p.jsonl", [{"prompt": "a", "system": "Be brief."}])
    for name in ("m", "n"):
        (folder / f"{name}.csv").write_text("Instruction,Output\na,x\n")
    (folder / "j.py").write_text("def judge(prompt, a, b):\n    return 0.5\n")
    finished = srt("eval", "--prompts", "p.jsonl", "--model", "m.csv", "--reference", "n.csv",
                   "--judge", "python:j.py:judge")  # fmt: skip
    assert finished.code == 0, finished.stderr
    assert {each["response"] for each in read_jsonl(folder / "eval.outputs.jsonl")} == {"x"}


# --- What is said ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"user query": "a", "answer": "b"}, "or pass --prompt-field 'user query'. "),
        ({"id": 1, "query": "a", "label": "b"}, "or pass --prompt-field query. "),
        ({"Customer message": "a", "ticket": 7}, "or pass --prompt-field 'Customer message'. "),
        ({"left": "a", "right": "b"}, "Rename the field. "),
        ({"dialog": [{"role": "user", "content": "a"}]}, "or pass --prompt-field dialog. "),
        ({"title": "a", "answer": "b"}, "Rename the field. The nearest known form is"),
        ({"version": 1, "data": [{"prompt": "a"}]},
         "The rows seem to stand within data: jq -c '.\"data\"[]' FILE > ROWS.jsonl."),
    ],
)  # fmt: skip
def test_only_a_likely_field_is_suggested(srt, folder, row, told):
    (folder / "r.json").write_text(json.dumps(row))
    finished = collect(srt, "--prompts", "r.json")
    assert finished.code == 1
    assert told in finished.stderr


@pytest.mark.parametrize("name", ["output", "answer"])
def test_a_field_that_may_hold_the_response_is_named(srt, folder, name):
    write_jsonl(folder / "r.jsonl", [{"question": "a", name: "x"}])
    finished = collect(srt, "--prompts", "r.jsonl")
    assert finished.code == 2
    assert (
        "1 of 1 rows bring no response. Pass --model, the policy that answers them, or "
        f"--response-field {name}, if it holds them." in finished.stderr
    )
    assert collect(srt, "--prompts", "r.jsonl", "--response-field", name).code == 0


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("r.jsonl", json.dumps({"prompt": "a"}, indent=2), "Convert it: jq -c '.' FILE > FILE.jsonl."),
        ("r.jsonl", json.dumps([{"prompt": "a"}], indent=2), "jq -c '.[]' FILE > FILE.jsonl."),
        ("r.txt", "prompt,response\na,x\n", "r.txt:1: not JSON, and a file of this name is read as"),
        ("r.jsonl", "oops\n", "r.jsonl:1: not valid JSON ("),
        ("r.dat", b"\x1f\x8b\x08", "r.dat:1: is compressed. Give its name the ending .gz."),
    ],
)  # fmt: skip
def test_another_format_is_named(srt, folder, name, content, told):
    (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    finished = collect(srt, "--prompts", name)
    assert finished.code == 1
    assert told in finished.stderr


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("prompt,response\na,x\n", "-:1: not JSON, and what comes through a pipe is read as JSONL"),
        ('[{"prompt": "a", "response": "x"},\n {"prompt": "b", "response": "x"}]\n', None),
        ('{"prompt": "a", "response": "x"}\n{"prompt": "b", "response": "x"}\n', None),
    ],
)
def test_standard_input_is_jsonl_or_an_array(srt, folder, monkeypatch, text, told):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(text.encode())))
    finished = collect(srt, "--prompts", "-")
    if told is None:
        assert [each["prompt"] for each in read_jsonl(folder / "feedback.jsonl")] == ["a", "b"]
    else:
        assert told in finished.stderr


def test_two_answers_to_one_prompt_need_ids_of_their_own(srt, folder):
    rows = [{"prompt": "a", "response": text} for text in ("x", "y")]
    write_jsonl(folder / "r.jsonl", rows)
    finished = collect(srt, "--prompts", "r.jsonl")
    assert finished.stderr == (
        "error: r.jsonl:2: this prompt is already on line 1, with another response. Give each row an "
        "id of its own to keep both, or pass --unique to keep the first.\n"
    )
    assert collect(srt, "--prompts", "r.jsonl", "--unique").code == 0
    rows = [{"id": n, **row} for n, row in enumerate(rows)]
    assert len(prompts_of(srt, folder, rows)[0]) == 2


def test_rows_by_hand_are_no_records_of_feedback_and_become_some(srt, folder):
    row = {"prompt": "a", "response": "x", "refinement": "y"}
    write_jsonl(folder / "thin.jsonl", [row])
    finished = srt("build-prefs", "--data", "thin.jsonl")
    assert finished.code == 1
    assert (
        "thin.jsonl:1: no record of feedback (it lacks id, feedback, refinement_score). Critiques that "
        "others wrote become such records: srt collect-feedback --critic file:thin.jsonl."
        in finished.stderr
    )


def test_a_file_of_critiques_is_named_where_a_model_is_asked_for(srt, folder):
    (folder / "h.csv").write_text(HEADER)
    write_jsonl(folder / "r.jsonl", [{"prompt": "a", "response": "x"}])
    finished = srt("collect-feedback", "--prompts", "r.jsonl", "--critic", "h.csv")
    assert finished.code == 2
    assert "Critiques in a file are --critic file:h.csv." in finished.stderr
    missing = srt("collect-feedback", "--prompts", "r.jsonl", "--critic", "i.csv")
    assert "i.csv: no such file or directory." in missing.stderr
    for flag in ("--model", "--critic"):
        finished = collect(srt, "--prompts", "r.jsonl", flag, "")
        assert finished.code == 2, finished.stderr
        assert "A model's name is empty. Is a shell variable not set?" in finished.stderr


@pytest.mark.parametrize(("command", "flag"), [("sft", "--data"), ("dpo", "--prefs")])
def test_a_training_takes_no_empty_name_for_the_model_of_the_manifest(srt, folder, command, flag):
    prompts_of(srt, folder, [{"prompt": "a", "response": "x"}])
    finished = srt(command, flag, "f.jsonl", "--model", "")
    assert finished.code == 2
    assert "A model's name is empty. Is a shell variable not set?" in finished.stderr
