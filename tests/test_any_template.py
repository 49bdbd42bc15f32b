"""Every chat template that TRL ships: what is trained is what the engine is fed and has to say."""

import copy
import json
import re
from datetime import datetime
from functools import cache
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
TINY = load_tokenizer(str(ROOT / "tests/tiny_tokenizer"))
TEMPLATES = {file.stem: file.read_text() for file in sorted(SHIPPED.glob("*.jinja"))} | THOUGHTLESS
TEXT = [name for name in TEMPLATES if name.removesuffix("_training") not in NO_TEXT_MODELS]
ENDS = {
    "cohere": "<|END_OF_TURN_TOKEN|>", "cohere2": "<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
    "deepseek": "<｜end▁of▁sentence｜>", "exaone4": "\n[|user|]",
    "gemma4": "<turn|>", "gemma": "<end_of_turn>", "diffusion_gemma": "<turn|>", "glm4moe": "<|user|>",
    "gptoss": "<|return|>", "idefics3": "<end_of_utterance>", "llama3": "<|eot_id|>",
    "llava": "</s>", "mistral": "</s>", "muse": "<|eot|>", "phi3": "<|end|>",
    "smolvlm": "<end_of_utterance>",
}  # fmt: skip
# What a model says itself before its words.
LEADS = {
    "gptoss": "<|channel|>final<|message|>", "glm4moe": "\n", "muse": " to=user<|message|>",
    "idefics3": " ", "smolvlm": " ", "mistral": " ", "llava": " ",
}  # fmt: skip
# What closes a thought that the template itself has opened.
EMPTY_THOUGHTS = {"deepseek": "\n</think>\n\n"}
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


@cache
def loaded(name, special=True):
    """A shipped template as an engine holds it; all tests of it share what was found out about it."""
    chat = ChatFormat(
        tokenizer_of(TEMPLATES[name], special, closes_twice=name.startswith("cohere2"))
    )
    return Loaded(None, chat, frozenset(), 2048, {"device": "cpu"})


def tokenizer_of(template, special=True, closes_twice=False):
    """The tests' tokenizer, with the template and the template's own tokens."""
    tokenizer = copy.deepcopy(TINY)
    own = sorted(set(CONTROL.findall(template)) | {"</s>", "[|user|]", "[|assistant|]"})
    known = tokenizer.get_vocab()
    tokenizer.add_tokens(
        [AddedToken(text, special=special, normalized=False) for text in own if text not in known]
    )
    tokenizer.chat_template = template
    if closes_twice:
        tokenizer.eos_token = "<|END_OF_TURN_TOKEN|>"  # it closes the text by another token
    return tokenizer


def fed_by_the_engine(name, history):
    request = Request(messages=tuple(history), max_tokens=1, thinks=Thinks("off"))
    return _encode(loaded(name), request)


def turns_of(words, other):
    """The two turns of a conversation: what came before, and what is said."""
    answered = [USER, Message(role="assistant", content=words)]
    asked = [*answered, Message(role="user", content=CRITIQUE_REQUEST)]
    return [([USER], words), (asked, other)]


def check(name, sequences, turns, trained):
    """Each trained turn stands once, behind what the engine is fed; nothing else is trained."""
    chat = loaded(name).chat
    decode, places = chat.tokenizer.decode, {number: [] for number in range(len(sequences))}
    for number, (history, words) in enumerate(turns):
        fed = fed_by_the_engine(name, history)
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
    chat = loaded(name).chat
    row = record()
    turns = turns_of("A carrot.", CRITIQUE)
    for parts in SUBSETS:
        trained = {0} & {0 if "response" in parts else -1}
        trained |= {1} if {"feedback", "refinement"} & set(parts) else set()
        check(name, feedback_sequences(chat, row, parts), turns, trained)
    (alone,) = refinement_sequence(chat, row)
    check(name, [alone], [([USER], "An apple.")], {0})
    own = CRITIQUE.replace("No fruit", "None").replace("Name one", "None").replace("[3]", "[9]")
    good = refinement_feedback_sequences(chat, row, FEEDBACK_PARTS)
    check(name, good, turns_of("An apple.", own), {0, 1})
    talk = [USER, Message(role="assistant", content="Fig."), USER]
    mixed = chat_sequences(chat, "1", [*talk, Message(role="assistant", content="Plum.")])
    check(name, mixed, [([USER], "Fig."), (talk, "Plum.")], {0, 1})


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_pair_is_compared_behind_what_the_engine_is_fed(name):
    chat = loaded(name).chat
    ids = preference_ids(chat, pair_of("An apple.", "A carrot."))
    assert ids.prompt_ids == fed_by_the_engine(name, [USER])
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
    chat = loaded(name, special).chat
    tokenizer = chat.tokenizer
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
    tokenizer = loaded(name).tokenizer
    silent, thinking = ChatFormat(tokenizer), ChatFormat(tokenizer, "on")
    for chat in (silent, thinking):
        turn = chat.turn([USER], "An apple.")
        assert tokenizer.decode(turn.prompt).rstrip().endswith("</think>")
        assert "think>" not in tokenizer.decode(turn.said)
    assert silent.prompt_ids([USER]) == silent.turn([USER], "An apple.").prompt
    assert "</think>" not in tokenizer.decode(thinking.prompt_ids([USER]))
    assert silent.can_be_told


def test_the_ids_of_a_stock_qwen3_row_are_these():
    chat = loaded("qwen3").chat
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
        tokenizer = tokenizer_of(template, special)
        model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
        torch.manual_seed(0)
        model.resize_token_embeddings(len(tokenizer))
        model.save_pretrained(tmp_path / name)
        tokenizer.chat_template = more.get("chat_template", template)
        tokenizer.save_pretrained(tmp_path / name)
        return tmp_path / name

    return make


def first_loss(weights, tokenizer, name, turns):
    """Loss per token of what a server would see and get, by transformers alone; and the tokens."""
    import torch

    total = count = 0
    for history, words in turns:
        plain = [turn.model_dump() for turn in history]
        fed = tokenizer.apply_chat_template(
            plain, add_generation_prompt=True, tokenize=False, enable_thinking=False, thinking=False
        )
        fed += of_family(EMPTY_THOUGHTS, name, "")
        said = of_family(LEADS, name, "") + words + of_family(ENDS, name, "<|im_end|>")
        ids = tokenizer(fed, add_special_tokens=False)["input_ids"]
        start = len(ids)
        ids += tokenizer(said, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            scores = weights(torch.tensor([ids])).logits[0, start - 1 : -1].double()
        told = torch.tensor(ids[start:])
        total += float(torch.nn.functional.cross_entropy(scores, told, reduction="sum"))
        count += len(told)
    return total / count, count


def test_the_first_loss_of_a_training_is_that_of_transformers_alone(srt, tmp_path, model_with):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    model = model_with(TEMPLATES["qwen3"])
    line = ("sft", "--model", model, "--global-batch", 4, "--epochs", 1, "--samples", 0)
    finished = srt(*line, "--critic-check", 0, "--packing", "off")
    assert finished.code == 0, finished.stderr
    first = read_jsonl(tmp_path / "models/sft/metrics.jsonl")[0]
    turns = []
    for row in feedback_rows(2):
        feedback = row["feedback"]
        told = (
            f"Weaknesses: {feedback['weaknesses']}\nSuggestions: {feedback['suggestions']}\n"
            f"Overall Score: [[{feedback['score']:g}]]\n\n### Improved Response\n{row['refinement']}"
        )
        asked = [Message(role="user", content=row["prompt"])]
        answered = [*asked, Message(role="assistant", content=row["response"])]
        answered.append(Message(role="user", content=CRITIQUE_REQUEST))
        turns += [(asked, row["response"]), (answered, told)]
    weights = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    loss, count = first_loss(weights, AutoTokenizer.from_pretrained(model), "qwen3", turns)
    assert first["trained_tokens"] == count
    assert first["loss"] == pytest.approx(loss, abs=1e-5)


@pytest.fixture(scope="module")
def trainer(tiny_model, tmp_path_factory):
    """TRL's trainer on the two-layer model, whose vocabulary holds every template's tokens."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import SFTConfig, SFTTrainer

    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    torch.manual_seed(0)
    model.resize_token_embeddings(max(len(loaded(name).tokenizer) for name in TEXT))
    config = SFTConfig(
        output_dir=str(tmp_path_factory.mktemp("trainer")), report_to="none", use_cpu=True, bf16=False,
        max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
    )  # fmt: skip
    rows = Dataset.from_list([{"input_ids": [1, 2], "labels": [1, 2]}])
    return SFTTrainer(model=model.eval(), args=config, train_dataset=rows, processing_class=TINY)


@pytest.mark.parametrize("name", TEXT)
def test_the_first_loss_under_each_template_is_that_of_transformers_alone(trainer, name):
    import torch

    chat = loaded(name).chat
    rows = [
        {"input_ids": sequence.input_ids, "labels": sequence.labels}
        for sequence in feedback_sequences(chat, record(), FEEDBACK_PARTS)
    ]
    turns = turns_of("A carrot.", CRITIQUE)
    loss, count = first_loss(trainer.model, chat.tokenizer, name, turns)
    batch = trainer.data_collator(rows)
    with torch.no_grad():
        ours = trainer.compute_loss(trainer.model, batch, num_items_in_batch=torch.tensor(count))
    assert int((batch["labels"] >= 0).sum()) == count
    assert float(ours) == pytest.approx(loss, abs=1e-5)


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


@pytest.fixture(scope="module")
def every_token(tiny_model, tmp_path_factory):
    """The two-layer model with a tokenizer that knows the control tokens of all templates."""
    import torch
    from transformers import AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("every") / "model"
    tokenizer = tokenizer_of("".join(TEMPLATES[name] for name in FAMILIES))
    tokenizer.chat_template = None
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model.resize_token_embeddings(len(tokenizer))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


FAMILIES = {"qwen3": False, "gptoss": False, "glm4moe": True, "llama3": False}
"""Whether both turns of a row are one sequence. This tokenizer cuts two line breaks by what follows."""


@pytest.mark.parametrize("name", FAMILIES)
def test_plans_of_sft_and_dpo_show_every_trained_turn(srt, tmp_path, every_token, name):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(1))
    write_jsonl(tmp_path / "prefs.jsonl", [json.loads(pair_of("An a.", "A b.").model_dump_json())])
    asked = [{"role": "user", "content": "Say."}, {"role": "assistant", "content": "Said."}]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": asked}])
    line = ("--model", every_token, "--chat-template", name, "--dry-run", "--show-masks", 9)
    planned = srt("sft", *line, "--mix", "chats.jsonl:1", "--refinement-feedback")
    assert planned.code == 0, planned.stderr
    masks = [" ".join(each.split()) for each in re.findall("⟦(.*?)⟧", planned.stdout, re.DOTALL)]
    lead, end = of_family(LEADS, name, "").strip(), of_family(ENDS, name, "<|im_end|>").strip()
    responses = [each for each in masks if each.startswith("response:")]
    assert [re.sub(r"\s", "", each) for each in responses] == [f"response:{lead}Itis0.{end}"]
    assert any(each.startswith(f"mix: {lead}") and "Said." in each for each in masks)
    assert sum("Overall Score: [[3]]" in each for each in masks) == 1
    assert sum("Overall Score: [[9]]" in each for each in masks) == 1
    apart = "each trained turn is a sequence of its own" in " ".join(planned.stdout.split())
    assert apart is not FAMILIES[name]
    planned = srt("dpo", *line)
    assert planned.code == 0, planned.stderr
    assert "An a." in planned.stdout


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


def test_no_sample_is_drawn_from_a_row_that_was_dropped(srt, tmp_path, model_with):
    model = model_with(STRICT)
    rows = feedback_rows(3)
    write_jsonl(tmp_path / "feedback.jsonl", [rows[0] | {"prompt": SYSTEM}, *rows[1:]])
    pair = json.loads(pair_of("An apple.", "A carrot.").model_dump_json())
    write_jsonl(tmp_path / "prefs.jsonl", [pair | {"id": "2", "prompt": SYSTEM}, pair])
    for line in (("sft", "--critic-check", 0), ("dpo",)):
        trained = srt(*line, "--model", model, "--unfit", "drop", "--epochs", 1, "--samples", 1)
        assert trained.code == 0, trained.stderr
        for sample in read_jsonl(tmp_path / "models" / line[0] / "samples.jsonl"):
            assert [turn["role"] for turn in sample["prompt"]] == ["user"]


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


ENDLESS = "".join(f"{{% for i{n} in range(9999) %}}" for n in range(3)) + "{% endfor %}" * 3


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{% for m in messages %}", "is broken, line 1"),
        ("{{ raise_exception('not today') }}", "takes not even a plain question (the chat template "),
        ("{{ messages[0].nothing.more }}", "takes not even a plain question"),
        (ENDLESS, "does not come to an end"),
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


@pytest.mark.parametrize(
    ("then", "words"),
    [
        (ENDLESS, "does not come to an end in 0.5 seconds"),
        ("{% for i in range(99999) %}{{ messages[0].content * 100 }}{% endfor %}", "1000000 characters"),
    ],
    ids=["endless", "huge"],
)  # fmt: skip
def test_what_a_later_text_triggers_in_a_template_is_bounded_too(
    tiny_model, monkeypatch, then, words
):
    monkeypatch.setattr("srt_cli.models.chat.SECONDS", 0.5)
    tokenizer = load_tokenizer(str(tiny_model))
    tokenizer.chat_template = (
        "{% if 'plum' in messages[0].content %}" + then + "{% endif %}" + STRICT
    )
    chat = ChatFormat(tokenizer)
    before = chat.prompt_ids([USER])
    with pytest.raises(UnfitChat, match=words):
        chat.prompt_ids([Message(role="user", content="Name a plum.")])
    assert chat.prompt_ids([USER]) == before


def test_a_base_model_is_told_of_two_ways_out_and_both_work(srt, tmp_path, tiny_model, model_with):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    base = model_with(STRICT, chat_template=None)
    refused = srt("sft", "--model", base, "--dry-run")
    assert "has no chat template. Pass --chat-template" in refused.stderr
    assert "or use an instruct model" in refused.stderr
    assert srt("sft", "--model", base, "--dry-run", "--chat-template", "qwen3").code == 0
    assert srt("sft", "--model", tiny_model, "--dry-run").code == 0


def test_a_refusal_for_want_of_a_template_leaves_nothing_behind(srt, tmp_path, model_with):
    """Each line works when the template is added to it, without --overwrite."""
    base = model_with(STRICT, chat_template=None)
    (tmp_path / "p.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=5), 'better'\n"
        "def check(prompt, response):\n    return True\n"
        "def respond(prompt):\n    return 'one'\n"
        "def other(prompt):\n    return 'two'\n"
    )
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    write_jsonl(tmp_path / "rows.jsonl", feedback_rows(2))
    write_jsonl(tmp_path / "prefs.jsonl", [json.loads(pair_of("An a.", "A b.").model_dump_json())])
    short = ("--max-new-tokens", 4, "--critic-max-tokens", 4)
    program = "python:p.py:critique"
    lines = [
        ("--chat-template", "collect-feedback", "--model", base, "--critic", program, *short[:2]),
        ("--chat-template", "self-critique", "--model", base, *short),
        ("--chat-template", "eval", "--model", base, "--reference", "python:p.py:other",
         "--check", "python:p.py:check", *short[:2]),
        ("--critic-chat-template", "eval", "--model", "python:p.py:respond", "--reference",
         "python:p.py:other", "--out", "judged.json", "--judge", base, "--judge-max-tokens", 4),
        ("--critic-chat-template", "collect-feedback", "--model", "python:p.py:respond", "--critic",
         base, "--out", "other.jsonl", *short),
        ("--chat-template", "sft", "--model", base, "--data", "rows.jsonl", "--epochs", 1,
         "--critic-check", 0, "--samples", 0),
    ]  # fmt: skip

    def files():
        return {path for path in tmp_path.rglob("*") if "__pycache__" not in path.parts}

    for flag, *line in lines:
        before = files()
        refused = srt(*line)
        assert refused.code == 1, (line, refused.stderr)
        assert f"has no chat template. Pass {flag} with" in refused.stderr
        assert files() == before
        finished = srt(*line, flag, "qwen3")
        assert "belongs to a run" not in finished.stderr, finished.stderr
        assert finished.code in (0, 3), finished.stderr  # random weights say nothing that parses
        assert files() > before


def test_a_date_in_a_template_stays_that_of_the_first_day_while_a_run_goes_on(
    srt, tmp_path, model_with, monkeypatch
):
    model = model_with("{{ strftime_now('%d %b %Y') }}\n" + STRICT)
    (tmp_path / "p.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=5), 'better'\n"
    )
    prompts = [{"id": str(n), "prompt": f"Say {n}."} for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    fed = []

    class Clock(datetime):
        day = 1

        @classmethod
        def now(cls, tz=None):
            return datetime(2026, 3, cls.day, 12, tzinfo=tz)

    monkeypatch.setattr("srt_cli.models.local.local.datetime", Clock)
    prompt_ids = ChatFormat.prompt_ids

    def noted(chat, history):
        ids = prompt_ids(chat, history)
        fed.append(chat.tokenizer.decode(ids).partition("\n")[0])
        return ids

    monkeypatch.setattr(ChatFormat, "prompt_ids", noted)
    line = ("collect-feedback", "--model", model, "--critic", "python:p.py:critique",
            "--max-new-tokens", 4)  # fmt: skip
    first = srt(*line, "--limit", 2)
    assert "its chat template writes the date" in " ".join(first.stderr.split())
    assert set(fed) == {"01 Mar 2026"}
    fed.clear()
    Clock.day = 9
    second = srt(*line, "--limit", 4)
    assert "keeps its first day's, here 2026-03-01" in " ".join(second.stderr.split())
    assert set(fed) == {"01 Mar 2026"}
    fed.clear()
    srt(*line, "--limit", 4, "--out", "another.jsonl")
    assert set(fed) == {"09 Mar 2026"}


def test_a_training_goes_on_under_its_first_day_to_the_same_weights(
    srt, tmp_path, model_with, monkeypatch
):
    """Case 55, also bit for bit."""
    import torch
    from safetensors.torch import load_file

    from srt_cli.training import loop

    model = model_with("{{ strftime_now('%d %b %Y') }}\n" + STRICT)
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    line = ("sft", "--model", model, "--global-batch", 2, "--epochs", 2, "--samples", 0,
            "--critic-check", 0, "--save-every", 2)  # fmt: skip
    days = iter(("2026-03-01T12:00:00+00:00", "2026-03-09T12:00:00+00:00"))
    today = next(days)
    monkeypatch.setattr("srt_cli.runs.run._now", lambda: today)
    whole = srt(*line, "--out", "straight")
    assert whole.code == 0, whole.stderr
    with monkeypatch.context() as patch:
        patch.setattr(loop, "mark_whole", stopping(loop.mark_whole))
        assert srt(*line, "--out", "cut").code == 130
    today = next(days)
    again = srt(*line, "--out", "cut")
    assert again.code == 0, again.stderr
    one, other = (load_file(tmp_path / name / "model.safetensors") for name in ("straight", "cut"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def stopping(mark):
    """Ctrl-C as soon as a checkpoint is whole."""

    def act(*arguments):
        mark(*arguments)
        raise KeyboardInterrupt

    return act


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
    assert (
        "prefs.jsonl:2: chosen is empty and needs at least one turn. Fill it in" in refused.stderr
    )


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


def test_thoughts_in_chats_and_preferences_of_others_are_not_trained_unless_asked(
    srt, tmp_path, model_with
):
    model = model_with(TEMPLATES["qwen3"])
    thinking = "<think>\nHm, a fruit.\n</think>\n\n"
    chats = [
        {"role": "user", "content": "Name a fruit."},
        {"role": "assistant", "content": f"{thinking}Plum."},
        {"role": "user", "content": "Another?"},
        {"role": "assistant", "content": f"{thinking}Fig."},
    ]
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chats}])
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(1))
    pair = json.loads(pair_of(f"{thinking}An apple.", "A carrot.").model_dump_json())
    write_jsonl(tmp_path / "prefs.jsonl", [pair])
    line = ("sft", "--model", model, "--mix", "chats.jsonl:1", "--dry-run", "--show-masks", 9)
    dropped = srt(*line)
    assert dropped.code == 0, dropped.stderr
    assert "⟦mix: Plum." in dropped.stdout
    assert "⟦mix: Fig." in dropped.stdout
    assert "Hm, a fruit" not in dropped.stdout
    kept = srt(*line, "--thoughts", "keep")
    assert kept.stdout.count("Hm, a fruit.\n</think>\n\nPlum.") == 1
    assert kept.stdout.count("Hm, a fruit.\n</think>\n\nFig.") == 1
    planned = srt("dpo", "--model", model, "--dry-run", "--show-masks", 1)
    assert planned.code == 0, planned.stderr
    assert "An apple." in planned.stdout
    assert "Hm, a fruit" not in planned.stdout
    assert "1 pairs hold thoughts" in " ".join((planned.stdout + planned.stderr).split())


def test_a_template_is_told_how_hard_to_think(srt, tmp_path, model_with):
    chat = ChatFormat(tokenizer_of(TEMPLATES["gptoss"]), effort="high")
    assert chat.takes_effort
    assert "Reasoning: high" in chat.tokenizer.decode(chat.prompt_ids([USER]))
    assert not ChatFormat(tokenizer_of(TEMPLATES["qwen3"])).takes_effort
    (tmp_path / "p.py").write_text(
        "from srt_cli.records import Feedback\n"
        "def critique(prompt, response):\n"
        "    return Feedback(weaknesses='w', suggestions='s', score=5), 'better'\n"
    )
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Hi"}])
    line = (
        "collect-feedback",
        "--critic",
        "python:p.py:critique",
        "--max-new-tokens",
        4,
        "--model",
    )
    for name, deaf in (("gptoss", False), ("qwen3", True)):
        model = model_with(TEMPLATES[name], name)
        identities = []
        for how in ((), ("--reasoning-effort", "high")):
            out = f"{name}{len(how)}.jsonl"
            finished = srt(*line, model, "--out", out, *how)
            assert finished.code == 0, finished.stderr
            manifest = json.loads((tmp_path / out.replace(".jsonl", ".run.json")).read_text())
            identities.append(manifest["models"][str(model)]["identity"])
        assert ("cannot be told how hard to think" in finished.stderr) is deaf
        assert (identities[0] == identities[1]) is deaf
