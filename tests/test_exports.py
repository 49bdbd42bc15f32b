"""Pairs and trained chats in the forms of other trainers, read back as those trainers read them.

TRL's rows go through TRL's own functions, which are installed here. The others' go through loaders that
are written from their documentation: axolotl 0.19, docs/dataset-formats/conversation.qmd; LLaMA-Factory
0.9.5, data/README.md; ms-swift 4.6, Customization/Custom-dataset.md; OpenRLHF 0.11, its commands' help.
"""

import json
from types import SimpleNamespace

import pytest
from conftest import read_jsonl, write_jsonl
from datasets import load_dataset
from test_build_prefs import record
from test_data_forms import samples

from srt_cli.records import PLANTED, Message
from srt_cli.templates import CRITIQUE_REQUEST

SYSTEM = {"role": "system", "content": "Be brief."}
CRITIQUE = "Weaknesses: w\nSuggestions: s\nOverall Score: [[4]]\n\n### Improved Response\nAn apple."
ROWS = [
    record(id="1"),
    record(id="2", prompt=[Message(**SYSTEM), Message(role="user", content="And a root?"),
                           Message(role="assistant", content="A beet."),
                           Message(role="user", content="Name a fruit!")]),
]  # fmt: skip


def turn(role, content):
    return {"role": role, "content": content}


ASKED = [
    [turn("user", "Name a fruit.")],
    [
        SYSTEM,
        turn("user", "And a root?"),
        turn("assistant", "A beet."),
        turn("user", "Name a fruit!"),
    ],
]
BETTER, WORSE = turn("assistant", "An apple."), turn("assistant", "A carrot.")


@pytest.fixture
def rows(tmp_path):
    lines = [row.model_dump() for row in ROWS]
    write_jsonl(tmp_path / "self-feedback.jsonl", lines)
    write_jsonl(tmp_path / "feedback.jsonl", lines)
    return tmp_path


def loaded(path):
    """As every one of these tools opens a file: with `datasets`."""
    return load_dataset(
        "json", data_files=str(path), split="train", cache_dir=path.parent / "cache"
    )


# --- Loaders: what comes out is prompt, chosen, rejected, or turns with their loss --------------


def axolotl_pairs(row):
    """`type: chat_template.default`: messages before, chosen and rejected one message each."""
    return row["messages"], row["chosen"], row["rejected"]


def axolotl_chat(row):
    """`type: chat_template` with `roles_to_train: []` and `message_field_training: train`."""
    return [(turn(m["role"], m["content"]), m["train"]) for m in row["messages"]]


def llamafactory(row, info):
    """`formatting: sharegpt`: roles and texts by the tags, a system turn first, then user and model."""
    tags = {"role_tag": "from", "content_tag": "value", "user_tag": "human", "assistant_tag": "gpt",
            "system_tag": "system"} | info.get("tags", {})  # fmt: skip
    names = {
        tags["user_tag"]: "user",
        tags["assistant_tag"]: "assistant",
        tags["system_tag"]: "system",
    }

    def read(message):
        return turn(names[message[tags["role_tag"]]], message[tags["content_tag"]])

    messages = [read(message) for message in row[info["columns"]["messages"]]]
    talk = messages[1:] if messages[0]["role"] == "system" else messages
    assert [m["role"] for m in talk] == (["user", "assistant"] * len(talk))[: len(talk)]
    if info.get("ranking"):
        assert talk[-1]["role"] == "user"
        return messages, *(read(row[info["columns"][side]]) for side in ("chosen", "rejected"))
    assert talk[-1]["role"] == "assistant"
    # Under --mask_history the last turn alone carries loss.
    return [(m, place == len(messages) - 1) for place, m in enumerate(messages)]


def swift_pairs(row):
    """`messages` end with the better answer; `rejected_response` is the other one's text."""
    return row["messages"][:-1], row["messages"][-1], turn("assistant", row["rejected_response"])


def swift_chat(row):
    """`loss` of an assistant's message says whether it is trained; others never are."""
    return [(turn(m["role"], m["content"]), bool(m.get("loss"))) for m in row["messages"]]


def openrlhf_pairs(row):
    """--data.prompt_key, --data.chosen_key and --data.rejected_key: lists of messages."""
    return row["prompt"], row["chosen"][0], row["rejected"][0]


def behind_its_prompt(prompt, answer):
    return [(message, False) for message in prompt] + [(message, True) for message in answer]


PAIRS = {
    "axolotl": axolotl_pairs,
    "ms-swift": swift_pairs,
    "openrlhf": openrlhf_pairs,
}


@pytest.fixture
def pairs(srt, rows):
    names = ("axolotl", "llamafactory", "ms-swift", "openrlhf", "kto")
    finished = srt("build-prefs", *(part for name in names for part in ("--export", name)))
    assert finished.code == 0, finished.stderr
    return finished


def test_pairs_are_read_back_as_they_are(pairs, rows):
    readers = PAIRS | {
        "llamafactory": lambda row: llamafactory(
            row, json.loads((rows / "dataset_info.json").read_text())["prefs"]
        )
    }
    for name, read in readers.items():
        assert f"the same pairs for {name}: prefs.{name}.jsonl; " in pairs.stderr
        found = [read(row) for row in loaded(rows / f"prefs.{name}.jsonl")]
        assert found == [(asked, BETTER, WORSE) for asked in ASKED], name


def test_trl_reads_pairs_and_unpaired_rows(pairs, rows, tiny_model):
    from transformers import AutoTokenizer
    from trl.data_utils import apply_chat_template, is_conversational

    tokenizer = AutoTokenizer.from_pretrained(tiny_model)
    columns = ["prompt", "chosen", "rejected"]
    paired = loaded(rows / "prefs.jsonl").select_columns(columns)
    for row, asked in zip(paired, ASKED, strict=True):
        assert is_conversational(row)
        assert [row[name] for name in columns] == [asked, [BETTER], [WORSE]]
        assert apply_chat_template(row, tokenizer)["chosen"].startswith("An apple.")
    unpaired = loaded(rows / "prefs.kto.jsonl")
    assert unpaired["label"] == [True, False] * 2
    texts = [apply_chat_template(row, tokenizer)["completion"] for row in unpaired]
    assert [text.startswith("An apple.") for text in texts] == [True, False] * 2


def test_what_llamafactory_lists_already_stays(srt, rows):
    listed = rows / "dataset_info.json"
    listed.write_text('{"mine": {"file_name": "mine.json"}}')
    line = ("build-prefs", "--export", "llamafactory")
    assert srt(*line).code == 0
    assert list(json.loads(listed.read_text())) == ["mine", "prefs"]
    listed.write_text('{"prefs": {"file_name": "mine.json"}}')
    refused = srt(*line, "--overwrite")
    assert refused.code == 1
    assert "dataset_info.json: prefs is the name of mine.json there." in refused.stderr
    assert listed.read_text() == '{"prefs": {"file_name": "mine.json"}}'


CHATS = ("trl", "sdft", "axolotl", "llamafactory", "ms-swift", "openrlhf")


def export(srt, *extra):
    names = [part for name in CHATS for part in ("--export", name)]
    return srt("sft", "--out", "models/sft", *names, *extra)


def told(asked, *, draft=True, critique=True):
    """The conversation that stage 1 trains, and which turns carry loss."""
    turns = [*asked, WORSE, turn("user", CRITIQUE_REQUEST), turn("assistant", CRITIQUE)]
    loss = [False] * len(asked) + [draft, False, critique]
    return list(zip(turns, loss, strict=True))


def in_rows(chats):
    """A row for each turn with loss, as tools without a flag want it."""
    return [
        [(turn, False) for turn, _ in chat[:place]] + [chat[place]]
        for chat in chats
        for place, (_, loss) in enumerate(chat)
        if loss
    ]


@pytest.mark.parametrize(
    ("flags", "draft", "critique"),
    [((), True, True), (("--loss-on", "feedback,refinement"), False, True),
     (("--loss-on", "response"), True, False)],
)  # fmt: skip
def test_chats_carry_loss_where_stage_1_trains(srt, rows, flags, draft, critique):
    finished = export(srt, *flags)
    assert finished.code == 0, finished.stderr
    assert not (rows / "models/sft").exists()
    whole = [told(asked, draft=draft, critique=critique) for asked in ASKED]
    info = json.loads((rows / "models/dataset_info.json").read_text())["sft"]
    readers = {
        "axolotl": (axolotl_chat, whole),
        "ms-swift": (swift_chat, whole),
        "llamafactory": (lambda row: llamafactory(row, info), in_rows(whole)),
        "trl": (lambda row: behind_its_prompt(row["prompt"], row["completion"]), in_rows(whole)),
        "openrlhf": (lambda row: behind_its_prompt(row["prompt"], row["response"]), in_rows(whole)),
    }
    for name, (read, expected) in readers.items():
        assert f"models/sft.{name}.jsonl: 2 chats for {name}; " in finished.stdout
        assert [read(row) for row in loaded(rows / f"models/sft.{name}.jsonl")] == expected, name


def test_trl_distils_with_the_critique_as_privileged_context(srt, rows, monkeypatch):
    monkeypatch.setenv("TRL_EXPERIMENTAL_SILENCE", "1")
    from trl.experimental.sdft.sdft_config import SDFTConfig
    from trl.experimental.sdft.sdft_trainer import DemonstrationTeacherContextBuilder

    assert export(srt).code == 0
    template = SDFTConfig.__dataclass_fields__["teacher_prompt_template"].default
    trainer = SimpleNamespace(args=SimpleNamespace(teacher_prompt_template=template))
    builder = DemonstrationTeacherContextBuilder(trainer)
    data = loaded(rows / "models/sft.sdft.jsonl")
    asked = builder.select_generation_prompts(data["prompt"], data["privileged_context"])
    context = "A first answer:\nA carrot.\n\nFeedback on it:\n" + CRITIQUE.split("\n\n###")[0]
    assert asked == [
        [*prompt[:-1], turn("user", f"{prompt[-1]['content']}\n\n{context}")] for prompt in ASKED
    ]


def test_refinements_alone_and_chats_mixed_in_are_exported_too(srt, rows):
    write_jsonl(rows / "chats.jsonl", [{"prompt": "Hello?", "response": "Hi."}])
    finished = export(srt, "--refinement-only", "--mix", "chats.jsonl:0.5")
    assert finished.code == 0, finished.stderr
    found = [axolotl_chat(row) for row in read_jsonl(rows / "models/sft.axolotl.jsonl")]
    expected = [behind_its_prompt(asked, [BETTER]) for asked in ASKED]
    assert found == [
        *expected,
        behind_its_prompt([turn("user", "Hello?")], [turn("assistant", "Hi.")]),
    ]
    assert read_jsonl(rows / "models/sft.sdft.jsonl") == []


def test_what_flags_cannot_tell_and_files_of_others_are_refused(srt, rows):
    for flags, message in (
        (
            ("--loss-on", "refinement"),
            "--export flags whole turns, and feedback and refinement are one",
        ),
        (("--refinement-feedback",), "--refinement-feedback is nothing that --export can tell"),
        (("--balance",), "--balance is nothing that --export can tell"),
        (("--compare",), "--compare is nothing that --export can tell"),
        (("--truncation", "drop"), "--truncation drop is nothing that --export can tell"),
        (("--unfit", "drop"), "--unfit drop is nothing that --export can tell"),
        (("--dry-run",), "--export trains nothing, so --dry-run goes without it."),
        (("--push-to-hub", "me/m"), "--export trains nothing, so --push-to-hub goes without it."),
    ):
        refused = export(srt, *flags)
        assert refused.code == 2
        assert message in refused.stderr
    (rows / "srt.toml").write_text('unfit = "drop"\n')
    preset = export(srt)
    assert "--unfit drop is nothing that --export can tell other trainers: what" in preset.stderr
    assert preset.code == export(srt).code == 0
    (rows / "models/sft.trl.jsonl").write_text("mine\n")
    refused = export(srt)
    assert refused.code == 1
    assert "sft.trl.jsonl: exists, with other rows." in refused.stderr
    assert (rows / "models/sft.trl.jsonl").read_text() == "mine\n"
    assert export(srt, "--overwrite").code == 0


def test_a_planted_fault_is_exported_as_it_is_trained_and_never_as_an_answer(srt, rows):
    planted = ROWS[0].model_copy(update={"policy": PLANTED, "sample": -1})
    write_jsonl(rows / "feedback.jsonl", [planted.model_dump()])
    assert srt("sft", "--export", "axolotl", "trl", "--refinement-only").code == 3
    assert srt("sft", "--export", "axolotl", "trl", "--loss-on", "response").code == 3
    assert srt("sft", "--export", "axolotl", "trl").code == 0  # one flag, two values
    (chat,) = read_jsonl(rows / "models/sft.axolotl.jsonl")
    assert [turn["train"] for turn in chat["messages"][-3:]] == [False, False, True]
    assert len(read_jsonl(rows / "models/sft.trl.jsonl")) == 1


def test_the_document_shows_what_is_written(srt, tmp_path):
    short = [
        record(id=name, prompt=name, response="Bad.", refinement="Good.")
        for name in ("One?", "Two?")
    ]
    for name in ("self-feedback.jsonl", "feedback.jsonl"):
        write_jsonl(tmp_path / name, [row.model_dump() for row in short])
    names = ("axolotl", "llamafactory", "ms-swift", "openrlhf", "kto")
    assert srt("build-prefs", *(part for name in names for part in ("--export", name))).code == 0
    assert export(srt).code == 0
    shown = samples("Exports")
    files = {f"pairs for {name}": f"prefs.{name}.jsonl" for name in names}
    files |= {f"chats for {name}": f"models/sft.{name}.jsonl" for name in CHATS}
    assert {
        name: (tmp_path / file).read_text().splitlines()[:2] for name, file in files.items()
    } == shown
