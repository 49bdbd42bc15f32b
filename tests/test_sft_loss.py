"""What sft optimises, held against transformers alone; and what must make no difference to it."""

import json
import shutil
from itertools import combinations

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from safetensors.torch import load_file
from test_sft import feedback_rows
from transformers import AutoModelForCausalLM

from srt_cli.models.chat import ChatFormat
from srt_cli.models.weights import load_tokenizer
from srt_cli.records import FeedbackRecord
from srt_cli.training.rows import FEEDBACK_PARTS
from srt_cli.training.sequences import feedback_sequences, judging_tokens

ROWS = [
    row | {"response": "It is. " * (1 + 3 * (n % 3)), "refinement": "So it is. " * (1 + n % 4)}
    for n, row in enumerate(feedback_rows(6))
]
SUBSETS = [parts for size in (1, 2, 3) for parts in combinations(FEEDBACK_PARTS, size)]


@pytest.fixture(scope="module")
def left_padding_model(tiny_model, tmp_path_factory):
    """The trap: a tokenizer that pads on the left, as many do for generation."""
    folder = tmp_path_factory.mktemp("left") / "model"
    shutil.copytree(tiny_model, folder)
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"padding_side": "left"}))
    assert load_tokenizer(str(folder)).padding_side == "left"
    return folder


@pytest.fixture
def train(srt, tmp_path, left_padding_model):
    write_jsonl(tmp_path / "feedback.jsonl", ROWS)

    def run(out, *extra):
        line = ("sft", "--model", left_padding_model, "--global-batch", 6, "--learning-rate", 1e-3)
        finished = srt(*line, "--critic-check", 0, "--samples", 0, "--out", out, *extra)
        assert finished.code == 0, finished.stderr
        return read_jsonl(tmp_path / out / "metrics.jsonl"), load_file(
            tmp_path / out / "model.safetensors"
        )

    return run


@pytest.mark.parametrize("packing", ["off", "bfd"])
@pytest.mark.parametrize("parts", SUBSETS, ids=",".join)
def test_the_first_loss_of_each_subset_is_that_of_transformers_alone(
    train, left_padding_model, parts, packing
):
    metrics, _ = train(
        "out", "--epochs", 1, "--loss-on", ",".join(parts), "--packing", packing, "--micro-batch", 3
    )
    tokenizer = load_tokenizer(str(left_padding_model))
    model = AutoModelForCausalLM.from_pretrained(left_padding_model, dtype=torch.float32)
    total, count = 0.0, 0
    for row in ROWS:
        (sequence,) = feedback_sequences(ChatFormat(tokenizer), FeedbackRecord(**row), parts)
        logits = model(torch.tensor([sequence.input_ids])).logits[0].double()
        labels = torch.tensor(sequence.labels)
        picked = labels[1:] != -100
        losses = torch.nn.functional.cross_entropy(
            logits[:-1][picked], labels[1:][picked], reduction="sum"
        )
        total, count = total + float(losses), count + int(picked.sum())
    assert metrics[0]["loss"] == pytest.approx(total / count, abs=1e-5)
    assert metrics[0]["trained_tokens"] == count


CHECKLIST = {
    "weaknesses": "In words? 3: no. Short? It is: yes.",
    "suggestions": "Words.",
    "score": 5.5,
}


@pytest.mark.parametrize("packing", ["off", "bfd"])
def test_verdicts_and_scores_weigh_as_often_as_they_are_told_to(
    train, tmp_path, left_padding_model, packing
):
    """Half of the rows hold a checklist; the loss is the mean of all trained tokens by weight."""
    rows = [row | ({"feedback": CHECKLIST} if n % 2 else {}) for n, row in enumerate(ROWS)]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    metrics, _ = train(
        "out", "--epochs", 1, "--verdict-weight", 5, "--packing", packing, "--micro-batch", 3
    )
    chat = ChatFormat(load_tokenizer(str(left_padding_model)))
    model = AutoModelForCausalLM.from_pretrained(left_padding_model, dtype=torch.float32)
    total, weight, said = 0.0, 0.0, []
    for row in rows:
        (sequence,) = feedback_sequences(chat, FeedbackRecord(**row), FEEDBACK_PARTS)
        places = judging_tokens(chat, sequence)
        said.append([chat.tokenizer.decode(sequence.input_ids[place]).strip() for place in places])
        weights = torch.ones(len(sequence.labels), dtype=torch.double)
        weights[places] = 5.0
        picked = torch.tensor(sequence.labels)[1:] != -100
        losses = torch.nn.functional.cross_entropy(
            model(torch.tensor([sequence.input_ids])).logits[0, :-1].double()[picked],
            torch.tensor(sequence.labels)[1:][picked],
            reduction="none",
        )
        total += float((losses * weights[1:][picked]).sum())
        weight += float(weights[1:][picked].sum())
    assert ["".join(each) for each in said] == ["3", "noyes5.5"] * 3
    assert metrics[0]["loss"] == pytest.approx(total / weight, abs=1e-5)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (("--micro-batch", 6, "--packing", "off"), ("--micro-batch", 1, "--packing", "off")),
        (("--micro-batch", 2, "--packing", "off"), ("--micro-batch", 2, "--packing", "bfd")),
    ],
    ids=["one pass = six passes", "packed = unpacked"],
)
def test_how_rows_are_cut_into_passes_changes_neither_loss_nor_weights(train, one, other):
    """A step covers the same six rows either way."""
    metrics, weights = train("one", "--epochs", 3, *one)
    metrics_too, weights_too = train("other", "--epochs", 3, *other)
    losses, losses_too = ([row["loss"] for row in rows] for rows in (metrics, metrics_too))
    assert losses == pytest.approx(losses_too, abs=2e-5)
    assert len(losses) == 3
    for name, weight in weights.items():
        torch.testing.assert_close(weight, weights_too[name], atol=2e-4, rtol=0)


def test_auto_packs_only_where_padding_is_worth_it(srt, tmp_path, tiny_model):
    """Rows of one length have no padding to save; wildly different ones in one pass do."""
    for name, lengths, said in (
        ("like", [3] * 8, "not packed: rows of like length share a pass, and 0% of its tokens"),
        ("unlike", [1, 1, 1, 1, 1, 1, 1, 200], "rows are packed: although rows of like length"),
    ):
        rows = [
            row | {"id": str(n), "prompt": "p", "response": "word " * length}
            for n, (row, length) in enumerate(zip(feedback_rows(8), lengths, strict=True))
        ]
        write_jsonl(tmp_path / "feedback.jsonl", [row | {"refinement": "r"} for row in rows])
        line = ("sft", "--model", tiny_model, "--dry-run", "--global-batch", 8)
        assert said in srt(*line, "--micro-batch", 8).stdout, name


def test_a_packed_step_has_about_as_many_rows_as_were_asked_for():
    from srt_cli.training.batches import pack, pack_length, packs_a_step

    lengths = [10 + 7 * (n % 9) for n in range(90)]
    columns = {"input_ids": [[1] * length for length in lengths]}
    packed = pack(columns, pack_length(lengths, micro_batch=4))
    packs = len(packed["input_ids"])
    assert sorted(n for pack in packed["seq_lengths"] for n in pack) == sorted(lengths)
    step = packs_a_step(len(lengths), packs, global_batch=32, processes=1)
    assert step * len(lengths) / packs == pytest.approx(32, rel=0.15)
