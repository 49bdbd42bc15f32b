"""Every chat template that TRL ships: what is trained is what the engine is fed and has to say."""

import json
import re
from datetime import datetime
from importlib.util import find_spec
from itertools import combinations
from pathlib import Path

import pytest
from conftest import ROOT, read_jsonl, write_jsonl
from test_sequences import record, trained_text
from test_sft import feedback_rows
from transformers import AddedToken

from srt_cli.errors import SrtError
from srt_cli.models import Request
from srt_cli.models.__init__ import Thinks
from srt_cli.models.chat import ChatFormat, UnfitChat
from srt_cli.models.local.local import _encode
from srt_cli.models.local.rows import Loaded
from srt_cli.models.weights import load_tokenizer
from srt_cli.records import Message, Preference
from srt_cli.templates import CRITIQUE_REQUEST
from srt_cli.training.rows import FEEDBACK_PARTS
from srt_cli.training.sequences import (
    chat_sequences,
    feedback_sequences,
    preference_ids,
    refinement_feedback_sequences,
    refinement_sequence,
)

SHIPPED = Path(find_spec("trl").origin).parent / "chat_templates"
NO_TEXT_MODELS = (
    "diffusion_gemma", "idefics3", "lfm2_2_5_vl", "llava_next", "qwen2_5_vl", "qwen3_vl", "smolvlm",
)  # fmt: skip
"""Those of vision and diffusion models; they are held to the same, beside the 59 others."""
THOUGHTLESS = {
    # The next role's token ends a turn, and the last turn has an empty thought.
    "exaone4": (
        "{% for m in messages %}{{ '[|' + m.role + '|]\n' }}{% if m.role == 'assistant' and loop.last %}"
        "{{ '<think>\n\n</think>\n\n' }}{% endif %}{{ m.content + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '[|assistant|]\n<think>\n' }}"
        "{% if enable_thinking is defined and not enable_thinking %}{{ '\n</think>\n\n' }}{% endif %}"
        "{% endif %}"
    ),
    # No header for a generation, and strict alternation.
    "mistral": (
        "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate user/assistant!') }}{% endif %}"
        "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
        "{% else %}{{ ' ' + m.content | trim + '</s>' }}{% endif %}{% endfor %}"
    ),
    "falcon_h1": (
        "{{ bos_token }}{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content"
        " + '<|im_end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
TEMPLATES = {file.stem: file.read_text() for file in sorted(SHIPPED.glob("*.jinja"))} | THOUGHTLESS
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "deepseek": "<｜end▁of▁sentence｜>", "exaone4": "[|user|]",
    "gemma4": "<turn|>", "gemma": "<end_of_turn>", "diffusion_gemma": "<turn|>", "glm4moe": "<|user|>",
    "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "llama3": "<|eot_id|>",
    "llava": "</s>", "mistral": "</s>", "muse": "<|eot|>", "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}  # fmt: skip
# What a model says itself before its words.
LEADS = {
    "gptoss": "<|channel|>final<|message|>", "glm4moe": "\n", "muse": " to=user<|message|>",
    "idefics3": " ", "smolvlm": " ",
}  # fmt: skip
CONTROL = re.compile(r"<[^<>\s']{1,40}>|\[/?[A-Z]+\]|\[\|\w+\|\]")
SUBSETS = [parts for size in (1, 2, 3) for parts in combinations(FEEDBACK_PARTS, size)]
USER = Message(role="user", content="Name a fruit.")
CRITIQUE = (
    "Weaknesses: No fruit.\nSuggestions: Name one.\nOverall Score: [[3]]\n\n"
    "### Improved Response\nAn apple."
)


def of_family(table, name, otherwise):
    fitting = [family for family in table if name.startswith(family)]
    return table[max(fitting, key=len)] if fitting else otherwise


def tokenizer_of(name, special=True):
    """The tests' tokenizer, with the template and the template's own tokens."""
    tokenizer = load_tokenizer(str(ROOT / "tests/tiny_tokenizer"))
    own = sorted(set(CONTROL.findall(TEMPLATES[name])) | {"</s>", "[|user|]", "[|assistant|]"})
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text in own if text not in known]
    )
    tokenizer.chat_template = TEMPLATES[name]
    if name.startswith("cohere2"):
        tokenizer.eos_token = "<|END_OF_TURN_TOKEN|>"  # it closes the text by another token
    return tokenizer


def fed_by_the_engine(chat, history):
    request = Request(messages=tuple(history), max_tokens=1, thinks=Thinks("off"))
    return _encode(Loaded(None, chat, frozenset(), 2048, {"device": "cpu"}), request)


def turns_of(words, other):
    """The two turns of a conversation: what came before, and what is said."""
    answered = [USER, Message(role="assistant", content=words)]
    asked = [*answered, Message(role="user", content=CRITIQUE_REQUEST)]
    return [([USER], words), (asked, other)]


def check(chat, name, sequences, turns, trained):
    """Each trained turn stands once, behind what the engine is fed; nothing else is trained."""
    decode, places = chat.tokenizer.decode, {number: [] for number in range(len(sequences))}
    for number, (history, words) in enumerate(turns):
        fed = fed_by_the_engine(chat, history)
        said = of_family(LEADS, name, "") + words
        holding = [n for n, each in enumerate(sequences) if each.input_ids[: len(fed)] == fed]
        if not holding:
            assert number not in trained, "a trained turn is lost"
            continue
        # A later turn is fed the earlier one, too: the turn's own sequence is the first.
        sequence = sequences[holding[0]]
        ids = sequence.input_ids[len(fed) :]
        end = ids.index(chat.end_id) + 1
        assert decode(ids[:end]).lstrip(" ").startswith(said.lstrip(" "))
        assert decode(ids[:end]).endswith(of_family(ENDS, name, "<|im_end|>"))
        places[holding[0]] += range(len(fed), len(fed) + end)
        labels = sequence.labels[len(fed) : len(fed) + end]
        if number in trained:
            assert labels[-1] == chat.end_id
            assert set(labels) != {-100}
    for number, sequence in enumerate(sequences):
        marked = {place for place, label in enumerate(sequence.labels) if label != -100}
        assert marked <= set(places[number])
        assert marked


@pytest.mark.parametrize("name", TEMPLATES)
def test_each_trained_turn_is_what_the_engine_is_fed_and_would_have_to_say(name):
    chat = ChatFormat(tokenizer_of(name))
    row = record()
    turns = turns_of("A carrot.", CRITIQUE)
    for parts in SUBSETS:
        trained = {0} & {0 if "response" in parts else -1}
        trained |= {1} if {"feedback", "refinement"} & set(parts) else set()
        check(chat, name, feedback_sequences(chat, row, parts), turns, trained)
    (alone,) = refinement_sequence(chat, row)
    check(chat, name, [alone], [([USER], "An apple.")], {0})
    own = CRITIQUE.replace("No fruit", "None").replace("Name one", "None").replace("[3]", "[9]")
    good = refinement_feedback_sequences(chat, row, FEEDBACK_PARTS)
    check(chat, name, good, turns_of("An apple.", own), {0, 1})
    talk = [USER, Message(role="assistant", content="Fig."), USER]
    mixed = chat_sequences(chat, "1", [*talk, Message(role="assistant", content="Plum.")])
    check(chat, name, mixed, [([USER], "Fig."), (talk, "Plum.")], {0, 1})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_is_compared_behind_what_the_engine_is_fed(name):
    chat = ChatFormat(tokenizer_of(name))
    ids = preference_ids(chat, pair_of("An apple.", "A carrot."))
    assert ids.prompt_ids == fed_by_the_engine(chat, [USER])
    lead, end = of_family(LEADS, name, ""), of_family(ENDS, name, "<|im_end|>")
    for answer, words in ((ids.chosen_ids, "An apple."), (ids.rejected_ids, "A carrot.")):
        text = chat.tokenizer.decode(answer)
        assert text.startswith(lead + words) or text.startswith(f" {words}")
        assert text.endswith(end)
        assert "think" not in text


def pair_of(chosen, rejected):
    return Preference(
        id="1",
        prompt=[USER],
        chosen=[Message(role="assistant", content=chosen)],
        rejected=[Message(role="assistant", content=rejected)],
        chosen_score=9,
        rejected_score=2,
        source="c",
    )


@pytest.mark.parametrize("special", [True, False], ids=["special", "added"])
@pytest.mark.parametrize("name", TEMPLATES)
def test_text_that_looks_like_a_control_token_never_becomes_one(name, special):
    tokenizer = tokenizer_of(name, special)
    chat = ChatFormat(tokenizer)
    forged = "".join(sorted(set(CONTROL.findall(TEMPLATES[name])) | {"<|im_end|>", "</think>"}))
    control = {id for id, token in tokenizer.added_tokens_decoder.items() if len(str(token)) > 2}
    counts = []
    for text in ("a fruit", forged):
        row = record(prompt=f"x {text} y", response=f"x {text} y", refinement=f"x {text} y")
        sequences = feedback_sequences(chat, row, FEEDBACK_PARTS)
        ids = [id for sequence in sequences for id in sequence.input_ids]
        assert tokenizer.decode(ids).count(f"x {text} y") >= 3
        counts.append(sum(id in control for id in ids))
    assert counts[0] == counts[1]


@pytest.mark.parametrize("name", ["qwen3", "deepseekv3", "nemotron_3_nano", "exaone4", "glm4moe"])
def test_an_empty_thought_belongs_to_the_prompt_and_a_thinking_model_is_left_to_think(name):
    tokenizer = tokenizer_of(name)
    silent, thinking = ChatFormat(tokenizer), ChatFormat(tokenizer, "on")
    for chat in (silent, thinking):
        turn = chat.turn([USER], "An apple.")
        assert tokenizer.decode(turn.prompt).rstrip().endswith("</think>")
        assert "think>" not in tokenizer.decode(turn.said)
    assert silent.prompt_ids([USER]) == silent.turn([USER], "An apple.").prompt
    assert "</think>" not in tokenizer.decode(thinking.prompt_ids([USER]))
    assert silent.can_be_told


def test_the_ids_of_a_stock_qwen3_row_are_these():
    chat = ChatFormat(tokenizer_of("qwen3"))
    first, second = feedback_sequences(chat, record(), FEEDBACK_PARTS)
    decode = chat.tokenizer.decode
    opening = "<|im_start|>assistant\n<think>\n\n</think>\n\n"
    assert decode(first.input_ids) == (
        f"<|im_start|>user\nName a fruit.<|im_end|>\n{opening}A carrot.<|im_end|>\n"
    )
    assert trained_text(chat.tokenizer, first) == ["A carrot.<|im_end|>"]
    assert decode(second.input_ids) == (
        "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\nA carrot.<|im_end|>\n"
        f"<|im_start|>user\n{CRITIQUE_REQUEST}<|im_end|>\n{opening}{CRITIQUE}<|im_end|>\n"
    )
    assert trained_text(chat.tokenizer, second) == [f"{CRITIQUE}<|im_end|>"]
    assert [first.piece, second.piece] == ["turn 1 of 2", "turn 2 of 2"]


# --- Through the command line ------------------------------------------------------------------


@pytest.fixture
def model_with(tiny_model, tmp_path):
    """The two-layer model with a template and its tokens, under a name."""
    import torch
    from transformers import AutoModelForCausalLM

    def make(template, name="model", special=True, **more):
        TEMPLATES["own"] = template
        tokenizer = tokenizer_of("own", special)
        del TEMPLATES["own"]
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(tmp_path / name)
        tokenizer.chat_template = more.get("chat_template", template)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


@pytest.mark.parametrize("name", ["qwen3", "gptoss", "glm4moe"])
def test_the_first_loss_is_that_of_transformers_alone(srt, tmp_path, model_with, name):
    """Of the strings that a server would see, written out here."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    model = model_with(TEMPLATES[name])
    line = ("sft", "--model", model, "--global-batch", 4, "--epochs", 1, "--samples", 0)
    finished = srt(*line, "--critic-check", 0, "--packing", "off")
    assert finished.code == 0, finished.stderr
    first = read_jsonl(tmp_path / "models/sft/metrics.jsonl")[0]
    tokenizer = AutoTokenizer.from_pretrained(model)
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    total = count = 0
    for row in feedback_rows(2):
        feedback = row["feedback"]
        told = (
            f"Weaknesses: {feedback['weaknesses']}\nSuggestions: {feedback['suggestions']}\n"
            f"Overall Score: [[{feedback['score']:g}]]\n\n### Improved Response\n{row['refinement']}"
        )
        prompt = {"role": "user", "content": row["prompt"]}
        talk = [prompt, {"role": "assistant", "content": row["response"]}]
        talk += [{"role": "user", "content": CRITIQUE_REQUEST}]
        for history, words in (([prompt], row["response"]), (talk, told)):
            fed = tokenizer.apply_chat_template(
                history, add_generation_prompt=True, tokenize=False, enable_thinking=False
            )
            said = of_family(LEADS, name, "") + words + of_family(ENDS, name, "<|im_end|>")
            ids = tokenizer(fed, add_special_tokens=False)["input_ids"]
            start = len(ids)
            ids += tokenizer(said, add_special_tokens=False)["input_ids"]
            scores = weights(torch.tensor([ids])).logits[0, start - 1 : -1].double()
            total += float(
                torch.nn.functional.cross_entropy(
                    scores, torch.tensor(ids[start:]), reduction="sum"
                )
            )
            count += len(ids) - start
    assert first["trained_tokens"] == count
    assert first["loss"] == pytest.approx(total / count, abs=1e-5)


def test_the_plan_says_where_rows_are_split_and_shows_no_thought_as_trained(
    srt, tmp_path, model_with
):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    model = model_with(TEMPLATES["qwen3"])
    finished = srt("sft", "--model", model, "--dry-run", "--show-masks", 2)
    assert finished.code == 0, finished.stderr
    assert "4 sequences hold a turn of a longer conversation" in finished.stdout
    assert "row 0 (turn 1 of 2, a sequence of its own)" in finished.stdout
    assert "</think>\n\n⟦response: " in finished.stdout


STRICT = (
    "{% for m in messages %}{% if m.role == 'system' %}{{ raise_exception('no system turns here') }}"
    "{% endif %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
DEAF = STRICT.replace("raise_exception('no system turns here')", "''").replace(
    "{% endif %}{{ '<|im", "{% else %}{{ '<|im", 1
).replace("'<|im_end|>\n' }}{% endfor %}", "'<|im_end|>\n' }}{% endif %}{% endfor %}")  # fmt: skip
SYSTEM = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Name a fruit."}]


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (STRICT, "the chat template says: no system turns here"),
        (DEAF, "the chat template leaves the system turn out"),
    ],
    ids=["forbidden", "swallowed"],
)
def test_a_row_that_the_template_does_not_take_is_named_or_dropped(
    srt, tmp_path, model_with, template, words
):
    model = model_with(template)
    rows = feedback_rows(2)
    write_jsonl(tmp_path / "feedback.jsonl", [rows[0], rows[1] | {"prompt": SYSTEM}])
    pair = json.loads(pair_of("An apple.", "A carrot.").model_dump_json())
    write_jsonl(tmp_path / "prefs.jsonl", [pair, pair | {"id": "2", "prompt": SYSTEM}])
    for line, place in (
        (("sft", "--model", model), "feedback.jsonl: row 1"),
        (("dpo", "--model", model), "prefs.jsonl: row 2"),
    ):
        refused = srt(*line, "--dry-run")
        assert refused.code == 1
        assert f"{place}: {words}. Leave such rows out with --unfit drop" in refused.stderr
        planned = srt(*line, "--dry-run", "--unfit", "drop")
        assert planned.code == 0, planned.stderr
        assert f"dropped: {words}" in " ".join(planned.stdout.split())
    (tmp_path / "critic.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=5), 'better'\n"
    )
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}, {"messages": SYSTEM}])
    line = ("collect-feedback", "--model", model, "--critic", "python:critic.py:critique")
    finished = srt(*line, "--max-new-tokens", 4, "--out", "drafts.jsonl")
    failed = read_jsonl(tmp_path / "drafts.jsonl")[1]
    assert failed["status"] == "failed", finished.stderr
    assert failed["reason"] == f"response: {words}"


PARTS_ONLY = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% for part in m.content %}"
    "{% if part.type == 'text' %}{{ part.text }}{% endif %}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_a_template_of_a_model_that_sees_gets_the_parts_it_wants(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = PARTS_ONLY
    (sequence,) = feedback_sequences(ChatFormat(tokenizer), record(), ("response",))
    text = tokenizer.decode(sequence.input_ids)
    assert text.startswith(
        "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\nA carrot"
    )


def test_a_template_without_a_generation_prompt_gets_the_header_of_its_own_turns(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = STRICT.partition("{% if add_generation_prompt %}")[0]
    (sequence,) = feedback_sequences(ChatFormat(tokenizer), record(), ("response",))
    assert trained_text(tokenizer, sequence) == ["A carrot.<|im_end|>"]
    fed = tokenizer.decode(ChatFormat(tokenizer).prompt_ids([USER]))
    assert fed == "<|im_start|>user\nName a fruit.<|im_end|>\n<|im_start|>assistant\n"


def test_named_templates_are_chosen_by_name_and_so_are_those_that_trl_ships(
    srt, tmp_path, model_with
):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    model = model_with(STRICT, chat_template={"chatml": STRICT, "tool_use": STRICT})
    refused = srt("sft", "--model", model, "--dry-run")
    assert refused.code == 1
    assert "has the chat templates chatml, tool_use and no default" in refused.stderr
    for name, opening in (
        ("chatml", "<|im_start|>user"),
        ("qwen2_5", "<|im_start|>system\nYou are Q"),
    ):
        finished = srt(
            "sft", "--model", model, "--dry-run", "--show-masks", 1, "--chat-template", name
        )
        assert finished.code == 0, finished.stderr
        assert f"\n{opening}" in finished.stdout
    refused = srt("sft", "--model", model, "--dry-run", "--chat-template", "qwen25")
    assert "neither the model nor TRL has a template of that name" in refused.stderr
    assert "qwen2_5" in refused.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}", "is broken, line 1"),
        ("{{ raise_exception('not today') }}", "takes not even a plain question (the chat template "),
        ("{{ messages[0].nothing.more }}", "takes not even a plain question"),
        ("".join(f"{{% for i{n} in range(9999) %}}" for n in range(3)) + "{% endfor %}" * 3,
         "does not come to an end"),
        ("{% for a in range(9999) %}{{ messages[0].content * 100 }}{% endfor %}", "characters"),
    ],
    ids=["syntax", "raises", "undefined", "endless", "huge"],
)  # fmt: skip
def test_a_template_that_does_not_work_is_refused_in_a_sentence(
    tmp_path, tiny_model, monkeypatch, text, words
):
    monkeypatch.setattr("srt_cli.models.chat.SECONDS", 0.5)
    file = tmp_path / "bad.jinja"
    file.write_text(text)
    with pytest.raises(SrtError, match=re.escape(words)) as refused:
        load_tokenizer(str(tiny_model), chat_template=str(file))
    assert str(refused.value).startswith(f"--chat-template {file}: ")
    file.write_bytes("{{ 'é' }}".encode("utf-16"))
    with pytest.raises(SrtError, match="is not UTF-8 text"):
        load_tokenizer(str(tiny_model), chat_template=str(file))


def test_a_base_model_is_told_of_two_ways_out_and_both_work(srt, tmp_path, tiny_model, model_with):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    base = model_with(STRICT, chat_template=None)
    refused = srt("sft", "--model", base, "--dry-run")
    assert "has no chat template. Pass --chat-template" in refused.stderr
    assert "or use an instruct model" in refused.stderr
    assert srt("sft", "--model", base, "--dry-run", "--chat-template", "qwen3").code == 0
    assert srt("sft", "--model", tiny_model, "--dry-run").code == 0
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    line = ("self-critique", "--model", base, "--max-new-tokens", 4, "--critic-max-tokens", 4)
    assert srt(*line).code == 1
    finished = srt(*line, "--chat-template", "qwen3")
    assert (tmp_path / "self-feedback.jsonl").is_file(), finished.stderr


def test_a_critic_in_process_takes_a_template_of_its_own(srt, tmp_path, model_with):
    base = model_with(STRICT, chat_template=None)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi", "response": "Hello."}])
    line = ("collect-feedback", "--critic", base, "--critic-max-tokens", 4, "--max-reasks", 0)
    refused = srt(*line, "--out", "refused.jsonl")
    assert refused.code == 1
    assert "has no chat template" in refused.stderr
    asked = srt(*line, "--critic-chat-template", "qwen3")
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["status"] in ("truncated", "unparsed"), asked.stderr  # random weights say nothing


def test_a_date_in_the_template_is_that_of_the_first_run(tiny_model):
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y') }}\n" + STRICT
    chat = ChatFormat(tokenizer, day=datetime(2026, 3, 1))
    assert chat.writes_date
    assert tokenizer.decode(chat.prompt_ids([USER])).startswith("01 Mar 2026\n<|im_start|>user")


# --- Rows without words ------------------------------------------------------------------------


def test_rows_without_words_fall_out_with_a_reason(srt, tmp_path, tiny_model):
    rows = feedback_rows(3)
    rows = [rows[0], rows[1] | {"response": " "}, rows[2] | {"refinement": ""}]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    pair = json.loads(pair_of("An apple.", "A carrot.").model_dump_json())
    silent = pair | {"id": "2", "chosen": [{"role": "assistant", "content": "\n"}]}
    write_jsonl(tmp_path / "prefs.jsonl", [pair, silent])
    finished = srt("sft", "--model", tiny_model, "--dry-run")
    assert "dropped: empty response" in " ".join(finished.stdout.split())
    assert "dropped: empty refinement" in " ".join(finished.stdout.split())
    finished = srt("dpo", "--model", tiny_model, "--dry-run")
    assert "dropped: the chosen answer has no words" in " ".join(finished.stdout.split())
    write_jsonl(tmp_path / "prefs.jsonl", [pair, pair | {"chosen": []}])
    refused = srt("dpo", "--model", tiny_model, "--dry-run")
    assert "prefs.jsonl:2: chosen: list should have at least 1 item" in refused.stderr


def test_a_mixed_in_chat_that_begins_with_the_assistant_is_trained_from_its_first_answer(
    tiny_model,
):
    chat = ChatFormat(load_tokenizer(str(tiny_model)))
    greeting = Message(role="assistant", content="Hi, I am X")
    answer = Message(role="assistant", content="Plum.")
    (sequence,) = chat_sequences(chat, "1", [greeting, USER, answer])
    assert "Hi, I am X" in chat.tokenizer.decode(sequence.input_ids)
    assert trained_text(chat.tokenizer, sequence) == ["Plum.<|im_end|>"]
    with pytest.raises(UnfitChat, match="no assistant turn answers a user's"):
        chat_sequences(chat, "1", [greeting])
