"""A batch of any model: its prompts are read in groups, and what they begin with in common once."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from srt_cli.models.local import padded
from srt_cli.models.local.cache import shared_beginning
from srt_cli.models.local.padded import PaddedBatch, groups_of_like_length
from srt_cli.models.local.rows import Loaded

BEGINNING = [5, 9, 13, 2, 8, 40, 41, 42, 43]


def never():
    return False


def with_a_window(tiny_model):
    """A model whose layers keep only the last 8 tokens."""
    from transformers import MistralConfig, MistralForCausalLM

    torch.manual_seed(0)
    return MistralForCausalLM(
        MistralConfig(
            vocab_size=100, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, sliding_window=8,
        )
    ).eval()  # fmt: skip


def plain(tiny_model):
    from srt_cli.models.weights import load_weights

    return load_weights(str(tiny_model))


def load(make, tiny_model):
    from srt_cli.models.chat import ChatFormat
    from srt_cli.models.weights import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    return Loaded(make(tiny_model), ChatFormat(tokenizer), frozenset(), 2048, {"device": "cpu"})


@pytest.fixture(params=[plain, with_a_window])
def loaded(tiny_model, request):
    return load(request.param, tiny_model)


def logits_alone(loaded, ids):
    with torch.inference_mode():
        return loaded.model(torch.tensor([ids])).logits[0, -1]


@pytest.mark.parametrize("beginning", [[], BEGINNING])
def test_every_prompt_is_read_as_if_alone(loaded, beginning, monkeypatch):
    monkeypatch.setitem(padded.GROUP_TOKENS, "cpu", 24)
    prompts = [beginning + list(range(start, 60, 7)) for start in (1, 2, 15, 30, 30, 50)]
    batch = PaddedBatch(loaded)
    with torch.inference_mode():
        logits = batch.read(prompts, never)
        for gone in ([], [1, 4], [0]):  # what the cache holds is what they are continued from
            for ids, found in zip(prompts, logits, strict=True):
                torch.testing.assert_close(found, logits_alone(loaded, ids))
            prompts = [[*prompts[place], 3] for place in batch.keep(gone, [0] * 6)]
            logits = batch.step([[3]] * len(prompts))


def test_a_common_beginning_is_read_once_and_short_prompts_are_not_padded_to_long_ones(
    tiny_model, monkeypatch
):
    monkeypatch.setitem(padded.GROUP_TOKENS, "cpu", 12)
    loaded, shapes = load(plain, tiny_model), []
    loaded.model.register_forward_pre_hook(
        lambda module, given, named: shapes.append(tuple(named["input_ids"].shape)),
        with_kwargs=True,
    )
    rests = [[50] * 20, [51] * 6, [52] * 5, [53] * 2, [54]]
    with torch.inference_mode():
        PaddedBatch(loaded).read([BEGINNING + rest for rest in rests], never)
        assert shapes == [(1, 9), (1, 20), (2, 6), (2, 2)]
        shapes.clear()
        PaddedBatch(loaded).read([[*BEGINNING[:7], 50], [*BEGINNING[:7], 51]], never)
    assert shapes == [(1, 8), (1, 8)]  # seven are not worth a pass of their own


def test_reading_stops_between_groups_when_cancelled(tiny_model, monkeypatch):
    monkeypatch.setitem(padded.GROUP_TOKENS, "cpu", 4)
    loaded = load(plain, tiny_model)
    answers = iter([False, True])
    with torch.inference_mode():
        batch = PaddedBatch(loaded)
        assert batch.read([[1, 2, 3, 4]] * 3, lambda: next(answers)) is None


@pytest.mark.parametrize(
    ("prompts", "shared"),
    [
        ([BEGINNING], 0),  # nobody to share with
        ([[*BEGINNING, 1, 2], [*BEGINNING, 3]], 9),
        ([[*BEGINNING, 1], [*BEGINNING]], 8),  # each keeps a token of its own
        ([BEGINNING, BEGINNING], 8),
        ([[*BEGINNING, 1], [*BEGINNING, 2], [7, *BEGINNING]], 0),
    ],
)
def test_what_prompts_begin_with_in_common(prompts, shared):
    assert shared_beginning(prompts) == shared


@settings(max_examples=50, deadline=None)
@given(
    lengths=st.lists(st.integers(10, 200), min_size=1, max_size=40),
    shared=st.integers(0, 9),
    most=st.integers(1, 500),
)
def test_groups_hold_every_prompt_once_within_their_bound(lengths, shared, most):
    prompts = [[1] * length for length in sorted(lengths, reverse=True)]
    groups = list(groups_of_like_length(prompts, shared, most))
    assert [first for first, _ in groups] == [0, *(last for _, last in groups[:-1])]
    assert groups[-1][1] == len(prompts)
    for first, last in groups:
        width = len(prompts[first]) - shared
        assert (last - first) * width <= most or last - first == 1
