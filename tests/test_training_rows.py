"""Which rows a training sees: held out by prompt, mixed in, ablated, and what falls out."""

import json
import re
import sys

import pytest
from conftest import read_jsonl, write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from test_dpo import pair_rows
from test_sequences import record, trained_text
from test_sft import feedback_rows

from srt_cli.errors import SrtError, UsageError
from srt_cli.models.chat import ChatFormat
from srt_cli.models.weights import load_tokenizer
from srt_cli.records import Message
from srt_cli.templates import CRITIQUE_REQUEST
from srt_cli.training.rows import (
    PARTS,
    draw_rows,
    is_held_out,
    parse_data,
    parse_mix,
    parse_targets,
    read_chats,
    split_rows,
)
from srt_cli.training.sequences import (
    TokenSequence,
    chat_sequences,
    feedback_sequences,
    refinement_sequence,
)

QUICK = ("--global-batch", 4, "--learning-rate", 1e-2, "--epochs", 1, "--samples", 0)


@pytest.fixture(scope="module")
def tokenizer(tiny_model):
    return load_tokenizer(str(tiny_model))


@pytest.fixture
def sft(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(24))

    def run(*extra):
        return srt("sft", "--model", tiny_model, *QUICK, "--critic-check", 0, *extra)

    return run


@pytest.fixture
def dpo(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(24))

    def run(*extra):
        return srt("dpo", "--model", tiny_model, *QUICK, "--beta", 0.1, *extra)

    return run


# --- Balance -----------------------------------------------------------------------------------


def test_critiques_of_the_rarer_kind_are_repeated_until_there_are_as_many(
    srt, tmp_path, tiny_model
):
    rows = feedback_rows(6)
    for row in rows[:2]:
        row["feedback"]["score"] = 9
        row["refinement_score"] = 9
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    line = ("sft", "--model", tiny_model, "--dry-run", "--show-masks", 20, "--balance")
    plan = srt(*line)
    assert plan.code == 0, plan.stderr
    shown = re.findall(r"^row (\S+?):", plan.stdout, re.MULTILINE)
    ids = [row["id"] for row in rows]
    assert shown == [*ids, *ids[:2]]

    alone = write_jsonl(tmp_path / "bad.jsonl", rows[2:])
    refused = srt(*line, "--data", alone)
    assert refused.code == 1
    assert "no answer in the feedback is good" in refused.stderr
    usage = srt(*line, "--refinement-only")
    assert (usage.code, "--balance would do nothing" in usage.stderr) == (2, True)


# --- The held-out share ------------------------------------------------------------------------


@given(st.lists(st.text(min_size=1), unique=True, max_size=40), st.text(min_size=1))
def test_a_row_that_is_added_moves_no_other_row(prompts, added):
    before = split_rows(prompts, str, 0.3)
    after = split_rows([added, *prompts], str, 0.3)
    assert [row for row in after[0] if row != added] == [row for row in before[0] if row != added]
    assert [row for row in after[1] if row != added] == [row for row in before[1] if row != added]


@given(st.text(min_size=1))
def test_one_prompt_is_never_on_both_sides_however_it_is_written(prompt):
    spaced = "  " + prompt.replace(" ", "\n ") + " "
    chat = [Message(role="user", content=prompt)]
    assert is_held_out(prompt, 0.5) == is_held_out(spaced, 0.5) == is_held_out(chat, 0.5)


def test_about_the_share_is_held_out():
    held_out = sum(is_held_out(f"prompt {n}", 0.05) for n in range(20_000))
    assert held_out == pytest.approx(1000, rel=0.1)


def test_a_split_that_leaves_a_side_empty_is_refused(sft):
    finished = sft("--eval-split", 0.0001)
    assert finished.code == 1
    assert "--eval-split 0.0001 of 24 rows leaves none to hold out. Raise it" in finished.stderr
    assert "give a share of the prompts" in sft("--eval-split", 1).stderr


def test_a_validation_loss_whose_rows_all_fall_out_is_refused(sft, dpo, tmp_path):
    rows, pairs = feedback_rows(24), pair_rows(24)
    for row in rows:
        row["response"] *= 2500 if is_held_out(row["prompt"], 0.2) else 1
    for pair in pairs:
        is_long = is_held_out(pair["prompt"][0]["content"], 0.2)
        pair["chosen"][0]["content"] *= 2500 if is_long else 1
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    write_jsonl(tmp_path / "prefs.jsonl", pairs)
    for train in (sft, dpo):
        finished = train("--eval-split", 0.2, "--early-stopping", 2, "--truncation", "drop")
        assert finished.code == 1
        assert "rows leaves none to hold out. Raise it" in finished.stderr


# --- Validation loss ---------------------------------------------------------------------------


@pytest.mark.parametrize("packing", ["off", "bfd"])
def test_the_loss_of_each_part_is_that_of_transformers_alone(sft, tmp_path, tiny_model, packing):
    """Before the first step, on rows of different lengths; independent of TRL."""
    import torch
    from transformers import AutoModelForCausalLM

    rows = [row | {"response": "It is. " * (n % 5 + 1)} for n, row in enumerate(feedback_rows(24))]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    finished = sft("--eval-split", 0.3, "--packing", packing)
    assert finished.code == 0, finished.stderr
    held_out = [row for row in rows if is_held_out(row["prompt"], 0.3)]
    assert f"{len(held_out)} held out" in finished.stderr
    tokenizer = load_tokenizer(str(tiny_model))
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    losses = {part: [] for part in PARTS}
    for row in held_out:
        (sequence,) = feedback_sequences(ChatFormat(tokenizer), record(**row), PARTS)
        logits = model(torch.tensor([sequence.input_ids])).logits[0].log_softmax(-1)
        for part, places in sequence.parts:
            losses[part] += [-float(logits[p - 1, sequence.input_ids[p]]) for p in places]
    first = read_jsonl(tmp_path / "models/sft/metrics.jsonl")[0]
    everything = losses["response"] + losses["feedback"] + losses["refinement"]
    assert first["step"] == 0
    assert first["eval_loss"] == pytest.approx(sum(everything) / len(everything), abs=1e-5)
    for part in ("response", "feedback", "refinement"):
        expected = sum(losses[part]) / len(losses[part])
        assert first[f"eval_loss_{part}"] == pytest.approx(expected, abs=1e-5)


def test_evaluations_stand_where_they_were_asked_for_and_at_the_end(sft, tmp_path):
    sft("--eval-split", 0.3, "--eval-every", 2, "--epochs", 2)
    rows = read_jsonl(tmp_path / "models/sft/metrics.jsonl")
    last = max(row["step"] for row in rows)
    steps = [row["step"] for row in rows if "eval_loss" in row]
    assert steps == [*range(0, last, 2), last]


def test_held_out_rows_are_never_trained(sft, tmp_path):
    """Training on the other rows alone gives the very same steps."""
    sft("--eval-split", 0.3)
    metrics = read_jsonl(tmp_path / "models/sft/metrics.jsonl")
    rows = [row for row in feedback_rows(24) if not is_held_out(row["prompt"], 0.3)]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    sft("--out", "models/alone")
    alone = read_jsonl(tmp_path / "models/alone/metrics.jsonl")
    assert [row["loss"] for row in metrics if "loss" in row] == [row["loss"] for row in alone]


def test_dpo_evaluates_on_pairs_that_are_held_out(dpo, tmp_path):
    finished = dpo("--eval-split", 0.3, "--epochs", 2)
    assert finished.code == 0, finished.stderr
    evaluated = [
        row for row in read_jsonl(tmp_path / "models/dpo/metrics.jsonl") if "eval_loss" in row
    ]
    assert evaluated[0]["eval_loss"] == pytest.approx(0.693147, abs=1e-5)
    assert evaluated[-1]["eval_rewards/margins"] > evaluated[0]["eval_rewards/margins"]
    assert 0 <= evaluated[-1]["eval_rewards/accuracies"] <= 1


# --- Several files -----------------------------------------------------------------------------


@pytest.fixture
def rounds(tmp_path):
    """Two rounds of feedback on the same prompts, one of them by another name than most files."""
    write_jsonl(tmp_path / "r:1.jsonl", feedback_rows(12))
    write_jsonl(tmp_path / "r:2.jsonl", feedback_rows(12, response="One more draft."))
    (tmp_path / "r:2.jsonl").rename(tmp_path / "r.jsonl:2")
    return tmp_path


def test_a_plan_counts_the_rows_of_each_file_by_weight(sft, rounds):
    planned = sft("--data", "r:1.jsonl:0.5", "r.jsonl:2", "--data", "feedback.jsonl:2",
                  "--eval-split", 0.3, "--dry-run")  # fmt: skip
    assert planned.code == 0, planned.stderr
    held_12 = sum(is_held_out(row["prompt"], 0.3) for row in feedback_rows(12))
    held_24 = sum(is_held_out(row["prompt"], 0.3) for row in feedback_rows(24))
    table = [line.split() for line in planned.stdout.splitlines()]
    figures = {row[0]: row[1:6] for row in table if row and ".jsonl" in row[0]}
    assert figures == {
        "r:1.jsonl": ["0.5", "12", "12", str(held_12), str(round((12 - held_12) / 2))],
        "r.jsonl:2": ["1", "12", "12", str(held_12), str(12 - held_12)],
        "feedback.jsonl": ["2", "24", "24", str(held_24), str(2 * (24 - held_24))],
    }


def test_several_files_are_trained_on_and_no_prompt_is_on_both_sides(sft, rounds):
    line = ("--data", "*r*", "--eval-split", 0.3, "--global-batch", 24, "--samples", 0)
    (rounds / "feedback.jsonl").unlink()
    finished = sft(*line)
    assert finished.code == 0, finished.stderr
    assert "r:1.jsonl: 12 rows: 12 kept" in finished.stderr
    manifest = json.loads((rounds / "models/sft/run.json").read_text())
    named = {name: file["path"] for name, file in manifest["inputs"].items()}
    assert named == {"data": "r.jsonl:2", "data 2": "r:1.jsonl"}
    files = manifest["tallies"]["files"]
    assert [each["trained"] + each["held_out"] for each in files] == [12, 12]
    # The same prompts stand in both files, so both hold out the same.
    assert files[0]["held_out"] == files[1]["held_out"] > 0
    assert manifest["tallies"]["sequences"] == sum(each["trained"] for each in files)
    assert sum(each["tokens"] for each in files) == manifest["tallies"]["tokens"]
    assert "nothing to do" in sft(*line).stderr
    assert "--data was" in sft("--data", "r:1.jsonl", *line[2:]).stderr


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_a_weight_that_is_no_share_is_refused(weight):
    with pytest.raises(UsageError, match="a weight is a number above 0"):
        parse_data(f"feedback.jsonl:{weight}")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sft --data no.jsonl --model m", "no.jsonl: no such file. Check the path."),
        ("sft --mix no.jsonl:1 --model m", "no.jsonl: no such file. Check the path."),
        ("dpo --prefs no.jsonl --model m", "no.jsonl: no such file. Check the path."),
        ("sft", "http://h:8000/v1#llama answers on a server. Pass --model with its weights:"),
        ("dpo", "http://h:8000/v1#llama answers on a server. Pass --model with its weights:"),
        ("sft --model openrouter:m", "openrouter:m answers on a server."),
        ("sft --model python:p.py:f", "python:p.py:f: a program has no weights to train."),
        ("dpo --model python:p.py:f", "python:p.py:f: a program has no weights to train."),
        ("sft --model m --probe", "--probe is a part of --dry-run, which trains nothing."),
        ("dpo --model m --show-masks 2", "--show-masks is a part of --dry-run, which trains"),
        ("sft --model m --hub-public", "--hub-public is for what --push-to-hub uploads."),
    ],
)
def test_what_cannot_be_trained_is_said_before_torch_is_loaded(
    srt, tmp_path, monkeypatch, line, message
):
    for module in ("sft", "dpo"):
        monkeypatch.setitem(sys.modules, f"srt_cli.training.{module}", None)
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(2))
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(2))
    manifest = {"command": "", "settings": {"model": "http://h:8000/v1#llama"}, "runtime": {}}
    data = {"data": {"path": "feedback.jsonl"}}
    (tmp_path / "feedback.run.json").write_text(json.dumps(manifest))
    (tmp_path / "prefs.run.json").write_text(json.dumps(manifest | {"inputs": data}))
    refused = srt(*line.split())
    assert refused.code in (1, 2)
    assert refused.stderr.startswith(f"error: {message}")


def test_what_is_preset_for_plans_and_uploads_stops_no_other_training(srt, tmp_path):
    (tmp_path / "own.toml").write_text("probe = true\nshow_masks = 2\nhub_public = true\n")
    for line in ("sft --data", "dpo --prefs"):
        line = f"{line} no.jsonl --model m --config own.toml"
        assert srt(*line.split()).stderr == "error: no.jsonl: no such file. Check the path.\n"


def test_the_policy_is_that_of_all_files_or_is_asked_for(srt, tmp_path):
    for name, model in (("a", "base"), ("b", "base"), ("c", "other")):
        write_jsonl(tmp_path / f"{name}.jsonl", feedback_rows(1))
        manifest = {"command": "collect-feedback", "settings": {"model": model}, "runtime": {}}
        (tmp_path / f"{name}.run.json").write_text(json.dumps(manifest))
    same = srt("sft", "--data", "a.jsonl", "b.jsonl", "--dry-run")
    assert "base" in same.stderr
    assert "Several policies" not in same.stderr
    several = srt("sft", "--data", "a.jsonl", "c.jsonl")
    assert several.code == 2
    assert (
        "(base by the manifest of a.jsonl, other by the manifest of c.jsonl). Pass"
        in several.stderr
    )


def test_training_goes_on_from_a_tuned_model_and_says_so(srt, sft, tmp_path):
    short = ("--limit", 4, "--warmup", 0, "--samples", 0, "--critic-check", 0)
    assert sft(*short).code == 0
    again = srt("sft", "--model", "models/sft", "--overwrite", "--critic-check", 0)
    assert again.code == 2
    assert "--out models/sft: is the model that training starts from." in again.stderr
    further = srt("sft", "--model", "models/sft", "--out", "models/further", *QUICK, *short)
    assert further.code == 0, further.stderr
    assert "models/sft: srt sft made it from" in further.stderr
    assert "training goes on from there" in further.stderr
    first, second = (
        read_jsonl(tmp_path / f"models/{name}/metrics.jsonl") for name in ("sft", "further")
    )
    assert second[0]["loss"] < first[0]["loss"]


# --- Ablations of the target -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("drop", "feedback"),
    [
        (("score",), "Weaknesses: No fruit.\nSuggestions: Name one.\n\n"),
        (("suggestions",), "Weaknesses: No fruit.\nOverall Score: [[3]]\n\n"),
        (("weaknesses",), "Suggestions: Name one.\nOverall Score: [[3]]\n\n"),
        (("weaknesses", "suggestions", "score"), ""),
    ],
)
def test_what_is_dropped_is_not_in_the_target(tokenizer, drop, feedback):
    (sequence,) = feedback_sequences(ChatFormat(tokenizer), record(), PARTS, drop)
    assert trained_text(tokenizer, sequence) == [
        "A carrot.<|im_end|>",
        f"{feedback}### Improved Response\nAn apple.<|im_end|>",
    ]
    assert sequence.tokens_of("refinement") == sequence.trained["refinement"]


def test_refinement_only_is_the_refinement_as_the_first_answer(tokenizer):
    (sequence,) = refinement_sequence(ChatFormat(tokenizer), record())
    text = tokenizer.decode(sequence.input_ids)
    assert trained_text(tokenizer, sequence) == ["An apple.<|im_end|>"]
    assert "A carrot." not in text
    assert CRITIQUE_REQUEST not in text


@pytest.mark.parametrize("ablation", [("--drop", "score"), ("--refinement-only",)])
def test_an_ablated_model_is_not_asked_for_what_it_never_learnt(srt, sft, tmp_path, ablation):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "Say 1."}])
    finished = sft(*ablation, "--critic-check", 4)
    assert finished.code == 0, finished.stderr
    assert "no critic check: this model is not trained to score" in finished.stderr
    refused = srt("self-critique")
    assert refused.code == 1
    assert f"was trained with {ablation[0]}, so it writes no whole feedback" in refused.stderr


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("response,score", None, False, False), "name some of response, feedback, refinement"),
        (("response", "advice", False, False), "name some of weaknesses, suggestions, score"),
        (("refinement", "score", True, False), "so --drop would do nothing"),
        (("refinement", None, True, True), "so --refinement-feedback would do nothing"),
        (("response", None, True, False), "--refinement-only trains no response"),
        (("feedback", "score,weaknesses,suggestions", False, False), "leaves nothing of the feed"),
    ],
)
def test_targets_that_contradict_one_another_are_refused(arguments, sentence):
    with pytest.raises(UsageError, match=sentence):
        parse_targets(*arguments)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (("--verdict-weight", 0), "--verdict-weight 0: must be above 0"),
        (
            ("--verdict-weight", 3, "--refinement-only"),
            "weighs feedback, which would not be trained",
        ),
        (("--verdict-weight", 3, "--loss-on", "response"), "feedback, which would not be trained"),
        (("--verdict-weight", 3, "--set", "label_smoothing_factor=0.1"), "Leave one of them out"),
        (("--verdict-weight", 3, "--drop", "score"), "no feedback here holds a score, or an"),
        (("--verdict-weight", 3, "--export", "trl"), "is nothing that --export can tell"),
    ],
)
def test_a_weight_of_verdicts_that_would_do_nothing_is_refused(sft, arguments, sentence):
    for dry in ((), ("--dry-run",)):
        refused = sft(*arguments, *dry)
        assert refused.code in (1, 2), dry
        assert sentence in refused.stderr, dry


def test_a_preset_weight_of_verdicts_stops_no_training_without_any(sft, tmp_path):
    (tmp_path / "srt.toml").write_text("verdict-weight = 3.0\n")
    for without in (("--refinement-only",), ("--loss-on", "response")):
        planned = sft(*without, "--dry-run")
        assert planned.code == 0, planned.stderr


# --- Other chats -------------------------------------------------------------------------------

CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "So long."},
]


def test_every_answer_of_a_mixed_in_chat_is_trained(tokenizer):
    (sequence,) = chat_sequences(ChatFormat(tokenizer), "1", [Message(**turn) for turn in CHAT])
    assert trained_text(tokenizer, sequence) == ["Hello.<|im_end|>", "So long.<|im_end|>"]
    assert sequence.trained["mix"] == sum(label != -100 for label in sequence.labels)


def test_of_a_prompt_of_several_turns_only_what_follows_is_trained(tokenizer):
    prompt = [Message(**turn) for turn in CHAT[:4]]
    (sequence,) = feedback_sequences(ChatFormat(tokenizer), record(prompt=prompt), ("response",))
    assert "Hello." in tokenizer.decode(sequence.input_ids)
    assert trained_text(tokenizer, sequence) == ["A carrot.<|im_end|>"]


def test_a_mix_brings_so_many_chats_for_each_feedback_row(sft, tmp_path):
    write_jsonl(
        tmp_path / "chats.jsonl",
        [{"messages": CHAT}, *({"prompt": f"p{n}", "response": f"r{n}"} for n in range(29))],
    )
    write_jsonl(tmp_path / "more.jsonl", [{"instruction": "q", "response": "a"}])
    finished = sft("--mix", "chats.jsonl:0.5", "--mix", "more.jsonl:0.25")
    assert finished.code == 0, finished.stderr
    assert "42 sequences" in finished.stderr  # 24 rows of feedback, 12 chats, 6 times the one
    assert "of mix" in finished.stderr
    other = sft("--mix", "chats.jsonl:0.5")
    assert "--mix was" in other.stderr


def test_mixed_in_chats_have_a_validation_loss_of_their_own(sft, tmp_path):
    chats = [{"prompt": f"p{n}", "response": f"r{n}"} for n in range(30)]
    write_jsonl(tmp_path / "chats.jsonl", chats)
    sft("--mix", "chats.jsonl:0.5", "--eval-split", 0.3)
    first = read_jsonl(tmp_path / "models/sft/metrics.jsonl")[0]
    assert first["eval_loss_mix"] > 0


def test_a_mixed_in_file_that_would_be_overwritten_is_named_with_its_option(sft, tmp_path):
    (tmp_path / "models").mkdir()
    write_jsonl(tmp_path / "models/chats.jsonl", [{"prompt": "p", "response": "r"}])
    refused = sft("--mix", "models/chats.jsonl:1", "--out", "models")
    assert "would replace models/chats.jsonl, the input of --mix." in refused.stderr


def test_chats_are_drawn_without_repeating_before_all_were_taken(tmp_path):
    path = write_jsonl(
        tmp_path / "chats.jsonl", [{"prompt": f"p{n}", "response": "r"} for n in range(10)]
    )
    chats = read_chats(path)
    drawn = draw_rows(chats, 25, seed=1)
    assert len({chat.id for chat in drawn[:10]}) == 10
    assert draw_rows(chats, 7, seed=1) == drawn[:7]


@pytest.mark.parametrize("text", ["chats.jsonl", "chats.jsonl:", "chats.jsonl:-1", ":0.5", "a:nan"])
def test_a_mix_without_a_weight_is_refused(text):
    with pytest.raises(UsageError, match="write FILE:WEIGHT"):
        parse_mix(text)


def test_a_mixed_in_row_without_an_answer_is_named(tmp_path):
    path = write_jsonl(
        tmp_path / "chats.jsonl", [{"prompt": "p", "response": "r"}, {"prompt": "q"}]
    )
    with pytest.raises(SrtError, match=r"chats.jsonl:2: no response, and no assistant's turn"):
        read_chats(path)


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        ([{"role": "assistant", "content": "a", "weight": 0}], "a turn of weight 0, and every"),
        (
            [{"role": "tool", "content": "21"}, {"role": "assistant", "content": "a"}],
            "turns of tools, which srt does not train",
        ),
    ],
)
def test_a_chat_that_would_be_trained_otherwise_than_meant_is_refused(tmp_path, turns, message):
    chat = {"messages": [{"role": "user", "content": "q"}, *turns]}
    path = write_jsonl(tmp_path / "chats.jsonl", [{"prompt": "p", "response": "r"}, chat])
    with pytest.raises(SrtError, match=rf"chats.jsonl:2: {message}"):
        read_chats(path)


# --- Health ------------------------------------------------------------------------------------


def test_a_row_that_teaches_nothing_or_no_end_is_refused():
    from srt_cli.training.examples import check_labels

    silent = TokenSequence("silent", [1, 2], [-100, -100], (("response", range(1, 2)),))
    endless = TokenSequence("endless", [1, 5], [-100, 5], (("response", range(1, 2)),))
    with pytest.raises(SrtError, match="no token would be trained in silent"):
        check_labels([silent], end_of_turn=2)
    with pytest.raises(SrtError, match="no end-of-turn token would be trained in endless"):
        check_labels([endless], end_of_turn=2)


def test_rows_longer_than_the_models_positions_are_refused_or_dropped(sft, tmp_path):
    long = feedback_rows(1, id="long", response="word " * 2500)[0]
    write_jsonl(tmp_path / "feedback.jsonl", [*feedback_rows(4), long])
    refused = sft()
    assert refused.code == 1
    assert (
        "1 of 5 sequences exceed the model's 2048 positions (the longest, long:" in refused.stderr
    )
    assert sft("--truncation", "drop").code == 0
    (dropped,) = read_jsonl(tmp_path / "models/sft/sft.dropped.jsonl")
    assert (dropped["id"], dropped["reason"]) == ("long", "longer than the model's 2048 positions")


def test_pairs_that_teach_nothing_fall_out_and_doubtful_ones_are_named(dpo, tmp_path):
    rows = pair_rows(8)
    same = rows[0] | {"id": "same", "chosen": rows[0]["rejected"]}
    twice = rows[1] | {"id": "twice"}
    opposite = rows[2] | {
        "id": "opposite", "chosen": rows[2]["rejected"], "rejected": rows[2]["chosen"]
    }  # fmt: skip
    write_jsonl(tmp_path / "prefs.jsonl", [*rows, same, twice, opposite])
    finished = dpo()
    assert finished.code == 0, finished.stderr
    assert "1 pairs prefer an answer to itself" in finished.stderr
    assert "1 pairs stand there more than once" in finished.stderr
    assert "1 pairs say the opposite of another pair" in finished.stderr
    (dropped,) = read_jsonl(tmp_path / "models/dpo/dpo.dropped.jsonl")
    assert dropped["id"] == "same"
