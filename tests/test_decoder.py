"""The decoder for CPUs computes what transformers' own forward does, or stands aside."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from transformers import (
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from srt_cli.models.local import decoder
from srt_cli.models.local.cache import filled_from_the_end
from srt_cli.models.local.decoder import UnpaddedBatch, decoder_of, groups_of_like_length
from srt_cli.models.local.products import in_int8, in_turn, packed

SIZES = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 500_000.0, "factor": 8.0, "low_freq_factor": 1.0,
    "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
}  # fmt: skip
KNOWN = {
    "llama": (LlamaForCausalLM, LlamaConfig(**SIZES, tie_word_embeddings=True)),
    "llama with biases": (
        LlamaForCausalLM, LlamaConfig(**SIZES, attention_bias=True, mlp_bias=True),
    ),
    "llama 3": (LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=LLAMA_3)),
    "mistral": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=None, head_dim=16)),
    "qwen 2": (Qwen2ForCausalLM, Qwen2Config(**SIZES)),
    "qwen 3": (Qwen3ForCausalLM, Qwen3Config(**SIZES, head_dim=16)),
}  # fmt: skip
DYNAMIC = {"rope_type": "dynamic", "rope_theta": 10_000.0, "factor": 2.0}
UNKNOWN = {
    "another family": (GemmaForCausalLM, GemmaConfig(**SIZES, head_dim=8)),
    "a window": (MistralForCausalLM, MistralConfig(**SIZES, sliding_window=64)),
    "rotations that change with the length": (
        LlamaForCausalLM, LlamaConfig(**SIZES, rope_parameters=DYNAMIC),
    ),
}  # fmt: skip


def made(kind, config):
    torch.manual_seed(0)
    model = kind(config).eval()
    with torch.no_grad():  # norms and biases too, which else begin as ones and zeros
        for weights in model.parameters():
            weights.add_(torch.randn_like(weights), alpha=0.1)
    return model


TINY = made(*KNOWN["qwen 3"])
READER = decoder_of(TINY, in_turn)


def never():
    return False


def logits_alone(model, ids):
    with torch.inference_mode():
        return model(torch.tensor([ids])).logits[0, -1]


def expect_as_alone(model, texts, logits):
    for ids, found in zip(texts, logits, strict=True):
        torch.testing.assert_close(found, logits_alone(model, ids), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", KNOWN)
@pytest.mark.parametrize("beginning", [0, 12])
def test_rows_are_read_and_continued_as_if_alone(name, beginning, monkeypatch):
    """Prompts in several passes, a common beginning, several tokens at once, rows that leave."""
    monkeypatch.setattr(decoder, "MOST_TOKENS", 30)
    monkeypatch.setattr(decoder, "PADDING_WORTH_A_GROUP", 20)
    model = made(*KNOWN[name])
    known = decoder_of(model, packed)
    assert known is not None
    batch, rests = UnpaddedBatch(known), [70, 31, 30, 12, 12, 11, 3, 1]
    rows = [
        [*range(beginning), *((7 * number + place) % 90 for place in range(length))]
        for number, length in enumerate(rests)
    ]
    with torch.inference_mode():
        logits = batch.read(rows, never)
        expect_as_alone(model, rows, logits)
        # Rows that end after each step, and how many tokens of a row are added, and taken back.
        for gone, added, wrong in (
            ([], [1] * 8, 0), ([0, 4], [1] * 6, 0), ([1], [1, 4, 1, 2, 1], 1), ([], [70] * 5, 69),
            ([0, 3], [3] * 3, 3), ([0], [2, 1], 0),
        ):  # fmt: skip
            rows = [rows[place] for place in batch.keep(gone, [0] * len(rows))]
            tokens = [[(11 * n + place) % 100 for place in range(n)] for n in added]
            logits = batch.step(tokens)
            beginnings = [
                [*ids, *new[: place + 1]]
                for ids, new in zip(rows, tokens, strict=True)
                for place in range(len(new))
            ]
            expect_as_alone(model, beginnings, logits)
            fallen = [min(wrong, count) for count in added]
            batch.keep([], fallen)
            rows = [
                [*ids, *new[: len(new) - count]]
                for ids, new, count in zip(rows, tokens, fallen, strict=True)
            ]


@pytest.mark.parametrize("name", UNKNOWN)
def test_a_model_of_another_shape_is_left_to_its_own_forward(name):
    assert decoder_of(made(*UNKNOWN[name]), in_turn) is None


def test_a_model_that_computes_otherwise_is_left_to_its_own_forward(monkeypatch):
    model = made(*KNOWN["llama"])
    assert decoder_of(model, in_turn) is not None
    assert decoder_of(model.bfloat16(), in_turn) is None
    adapted = get_peft_model(made(*KNOWN["llama"]), LoraConfig(target_modules=["q_proj"]))
    assert decoder_of(adapted.get_base_model(), in_turn) is None
    patched = made(*KNOWN["llama"])
    own = patched.model.layers[1].mlp.forward
    monkeypatch.setattr(patched.model.layers[1].mlp, "forward", lambda states: 2 * own(states))
    assert decoder_of(patched, in_turn) is None
    moved = made(*KNOWN["llama"])
    moved.model.layers[0].feed_forward = moved.model.layers[0].mlp
    del moved.model.layers[0].mlp
    assert decoder_of(moved, in_turn) is None


def test_products_in_8_bits_are_near_and_not_the_same():
    model = made(*KNOWN["qwen 2"])
    batch, rows = UnpaddedBatch(decoder_of(model, in_int8)), [[*range(20)], [5, 9, 13]]
    with torch.inference_mode():
        found = batch.read(rows, never)
    wanted = torch.stack([logits_alone(model, ids) for ids in rows])
    assert not torch.allclose(found, wanted, atol=1e-4)
    assert (found - wanted).norm() < 0.1 * wanted.norm()


LONG, SHORT = [*range(20, 44)], [1, 2, 3, 4, 5]
BEGINNINGS = [LONG, [*LONG[:20], 7, 7, 7, 7], [*SHORT, 8, 8, 9], [*SHORT, 8, 8], SHORT, SHORT]


def test_what_prompts_begin_with_is_read_once_and_nothing_is_padded(monkeypatch):
    monkeypatch.setattr(decoder, "MOST_TOKENS", 12)
    model = made(*KNOWN["llama"])
    known, read = decoder_of(model, in_turn), []
    embed = known._embed
    monkeypatch.setattr(known, "_embed", lambda ids: (read.append(ids.tolist()), embed(ids))[1])
    with torch.inference_mode():
        logits = UnpaddedBatch(known).read(BEGINNINGS, never)
    expect_as_alone(model, BEGINNINGS, logits)
    again = [SHORT[-1]]  # the same prompt: only its last token, for the logits behind it
    first = [*SHORT, *again, SHORT[-1], 8, 8, 8, 9]
    assert read == [first, LONG[:12], [*LONG[12:20], 7, 7, 7, 7], LONG[20:]]


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), min_size=1, max_size=12))
def test_prompts_of_any_beginnings_are_read_as_if_alone(prompts):
    prompts = sorted(prompts, key=len, reverse=True)
    with pytest.MonkeyPatch.context() as patched, torch.inference_mode():
        patched.setattr(decoder, "MOST_TOKENS", 4)
        logits = UnpaddedBatch(READER).read(prompts, never)
        expect_as_alone(TINY, prompts, logits)


def test_reading_stops_between_passes_when_cancelled(monkeypatch):
    monkeypatch.setattr(decoder, "MOST_TOKENS", 4)
    answers = iter([False, True])
    with torch.inference_mode():
        batch = UnpaddedBatch(decoder_of(made(*KNOWN["llama"]), in_turn))
        assert batch.read([[1, 2, 3, 4]] * 3, lambda: next(answers)) is None


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, 300), min_size=1, max_size=60))
def test_groups_hold_every_row_once_with_little_padding(lengths):
    groups = groups_of_like_length(lengths)
    assert [first for first, _, _ in groups] == [0, *(last for _, last, _ in groups[:-1])]
    assert groups[-1][1] == len(lengths)
    for first, last, width in groups:
        assert width == max(lengths[first:last])
        padding = width * (last - first) - sum(lengths[first:last])
        assert padding <= decoder.PADDING_WORTH_A_GROUP


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_rows_that_stay_keep_their_group_and_few_move(data):
    sizes = data.draw(st.lists(st.integers(1, 9), min_size=1, max_size=5))
    rows = data.draw(st.sets(st.integers(0, sum(sizes) - 1)))
    ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
    groups = [
        sorted(row for row in rows if end - size <= row < end)
        for size, end in zip(sizes, ends, strict=True)
    ]
    order = filled_from_the_end(groups)
    assert all(row >= place for place, row in enumerate(order))  # none is overwritten unread
    kept = iter(order)
    assert [sorted(next(kept) for _ in group) for group in groups] == groups
    gone = sum(sizes) - len(rows)
    assert sum(row != place for place, row in enumerate(order)) <= gone * len(sizes)
