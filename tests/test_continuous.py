"""Continuous batching when something goes wrong: every row is answered, or the error is said."""

import functools
import sys

import pytest
import torch
from conftest import write_jsonl
from test_local import TEXTS, ask, requests
from transformers import LlamaForCausalLM
from transformers.generation.continuous_batching import continuous_api

from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions, Request, open_model
from srt_cli.models.local import continuous
from srt_cli.records import Message


def opened(model):
    return open_model(str(model), ModelOptions(engine="continuous"))


@pytest.fixture
def static_replies(tiny_model):
    def answer(wanted):
        model = open_model(str(tiny_model))
        replies = ask(model, wanted)
        model.close()
        return replies

    return answer


@pytest.fixture
def at_step(monkeypatch):
    """Have the model's forward pass raise at some of its calls; gives how often it was called."""

    def plant(fails, error):
        forward, calls = LlamaForCausalLM.forward, []

        @functools.wraps(forward)
        def failing(self, *args, **kwargs):
            calls.append(kwargs["input_ids"].numel())
            if fails(len(calls)):
                raise error
            return forward(self, *args, **kwargs)

        monkeypatch.setattr(LlamaForCausalLM, "forward", failing)
        return calls

    return plant


@pytest.fixture
def blocks(monkeypatch):
    """How large each manager's cache was asked to be."""
    asked = []
    init = continuous_api.ContinuousMixin.init_continuous_batching

    def watch(self, *args, **kwargs):
        asked.append(kwargs["continuous_batching_config"].num_blocks)
        return init(self, *args, **kwargs)

    monkeypatch.setattr(continuous_api.ContinuousMixin, "init_continuous_batching", watch)
    return asked


@pytest.mark.parametrize("step", [1, 7])
@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
    ],
)
def test_out_of_memory_reopens_with_half_the_cache_and_loses_nothing(
    tiny_model, static_replies, at_step, blocks, step, error
):
    expected = static_replies(requests(TEXTS))
    at_step(lambda call: call == step, error)
    model = opened(tiny_model)
    assert ask(model, requests(TEXTS)) == expected
    assert model.describe()["halved_for_memory"] == 1
    assert "engine" not in model.describe()
    assert "batches" not in model.describe()  # rows come and go
    assert blocks == [1024, 512]
    model.close()


def test_memory_that_never_suffices_is_said_also_to_rows_that_come_later(tiny_model, at_step):
    at_step(lambda call: True, torch.OutOfMemoryError("out of memory"))
    model = opened(tiny_model)
    for futures in (model.submit(requests(TEXTS)), model.submit(requests(["later"]))):
        for future in futures:
            with pytest.raises(SrtError, match=r"also with small batches\. Lower --max-new-tokens"):
                future.result(60)
    model.close()


def test_a_crash_under_way_reaches_every_row_in_one_sentence(tiny_model, at_step):
    at_step(lambda call: call == 5, RuntimeError("planted\nwith more lines"))
    model = opened(tiny_model)
    for futures in (model.submit(requests(TEXTS)), model.submit(requests(["later"]))):
        for future in futures:
            with pytest.raises(SrtError) as said:
                future.result(60)
            assert str(said.value) == (
                "continuous batching stopped (planted). Run the same line with --engine static."
            )
    model.close()


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_manager_whose_thread_dies_silently_is_noticed(tiny_model, at_step):
    at_step(lambda call: call == 5, SystemExit())
    model = opened(tiny_model)
    with pytest.raises(SrtError, match="the generation loop ended"):
        ask(model, requests(TEXTS))
    model.close()


def in_static_batches(model, reason):
    described = model.describe()["engine"]
    assert described.startswith("static batches (")
    assert reason in described
    assert model.batched  # so that its rows come in waves
    return True


def test_a_model_that_fails_at_its_first_token_is_answered_in_static_batches(
    tiny_model, static_replies, at_step, capsys
):
    expected = static_replies(requests(TEXTS))
    at_step(lambda call: call == 1, ValueError("no such attention"))
    model = opened(tiny_model)
    assert ask(model, requests(TEXTS)) == expected
    ask(model, requests(["later"]))
    assert in_static_batches(model, "continuous batching failed: no such attention")
    assert "answered in static batches instead" in capsys.readouterr().err
    model.close()


def test_self_critique_goes_on_when_its_engine_changes_under_way(
    srt, tiny_model, at_step, tmp_path
):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": n, "prompt": f"p {n}"} for n in range(5)])
    line = ("self-critique", "--model", tiny_model, "--max-new-tokens", 8,
            "--critic-max-tokens", 8)  # fmt: skip
    assert srt(*line).code == 3  # eight tokens hold no critique
    at_step(lambda call: call == 1, ValueError("no such attention"))
    finished = srt(*line, "--engine", "continuous", "--out", "other.jsonl")
    assert finished.code == 3, finished.stderr
    assert (tmp_path / "other.jsonl").read_bytes() == (
        tmp_path / "self-feedback.jsonl"
    ).read_bytes()


def test_processors_that_transformers_ignores_do_not_change_what_is_drawn(
    tiny_model, static_replies, monkeypatch
):
    wanted = requests(TEXTS, temperature=0.9)
    expected = static_replies(wanted)

    def keep_the_first(self, value):
        vars(self).setdefault("own_processors", value)

    own = property(lambda self: vars(self)["own_processors"], keep_the_first)
    manager = continuous_api.ContinuousBatchingManager
    monkeypatch.setattr(manager, "logit_processor", own, raising=False)
    model = opened(tiny_model)
    assert ask(model, wanted) == expected
    assert in_static_batches(model, "would draw replies in its own way")
    model.close()


def test_a_manager_of_another_shape_is_not_waited_for(tiny_model, static_replies, monkeypatch):
    expected = static_replies(requests(TEXTS))
    monkeypatch.delattr(continuous_api.ContinuousBatchingManager, "start")
    model = opened(tiny_model)
    assert ask(model, requests(TEXTS)) == expected
    assert in_static_batches(model, "no attribute 'start'")
    model.close()


def test_a_queue_of_results_that_has_moved_is_not_looked_for(
    tiny_model, static_replies, monkeypatch
):
    expected = static_replies(requests(TEXTS))
    monkeypatch.setattr(continuous_api.OutputRouter, "__getattribute__", _without_queue)
    model = opened(tiny_model)
    assert ask(model, requests(TEXTS)) == expected
    assert in_static_batches(model, "no attribute 'output_queue'")
    model.close()


def _without_queue(self, name):
    if name == "output_queue":
        raise AttributeError("'OutputRouter' has no attribute 'output_queue'")
    return object.__getattribute__(self, name)


def test_requests_that_are_taken_in_another_way_go_in_static_batches(
    tiny_model, static_replies, monkeypatch
):
    expected = static_replies(requests(TEXTS))
    manager = continuous_api.ContinuousBatchingManager
    monkeypatch.setattr(manager, "add_request", lambda self, prompt: None)
    model = opened(tiny_model)
    assert ask(model, requests(TEXTS)) == expected
    assert in_static_batches(model, "unexpected keyword argument")
    model.close()


def test_a_part_that_transformers_has_moved_is_no_error(tiny_model, static_replies, monkeypatch):
    expected = static_replies(requests(TEXTS))
    part = "transformers.generation.continuous_batching.cb_logits_processors"
    monkeypatch.setitem(sys.modules, part, None)
    for name in ("continuous", "processors"):
        monkeypatch.delitem(sys.modules, f"srt_cli.models.local.{name}", raising=False)
    model = opened(tiny_model)
    assert ask(model, requests(TEXTS)) == expected
    assert in_static_batches(model, "lacks a part")
    model.close()


def test_a_row_longer_than_the_cache_is_answered_in_static_batches(
    tiny_model, static_replies, monkeypatch
):
    wanted = requests(TEXTS[:3], max_tokens=120)
    expected = static_replies(wanted)
    monkeypatch.setattr(continuous, "CPU_CACHE_TOKENS", 96)
    model = opened(tiny_model)
    assert ask(model, wanted) == expected
    assert in_static_batches(model, "No requests can be scheduled")
    model.close()


def test_layers_that_are_no_attention_are_answered_in_static_batches(tiny_model, tmp_path):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from srt_cli.models.weights import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    torch.manual_seed(0)
    config = Lfm2Config(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, initializer_range=0.3,
        layer_types=["conv", "full_attention"], bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    Lfm2ForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    model = opened(tmp_path / "model")
    replies = ask(model, requests(TEXTS[:3], max_tokens=4))
    assert [reply.usage.completion_tokens for reply in replies] == [4, 4, 4]
    assert in_static_batches(model, "layers of type conv")
    model.close()


def test_a_critique_reads_only_what_its_draft_has_not(tiny_model, at_step):
    """Tokens are counted as they go through the model."""
    computed = at_step(lambda call: False, None)
    model = open_model(str(tiny_model), ModelOptions(engine="continuous", logprobs=True))
    prompt = Message(role="user", content="word and more " * 12)
    (draft,) = ask(model, [Request((prompt,), max_tokens=4, temperature=0.7)])
    assert sum(computed) == draft.usage.prompt_tokens + 3  # the last token is read by nobody
    computed.clear()
    turns = (prompt, Message(role="assistant", content=draft.text),
             Message(role="user", content="Criticise it."))  # fmt: skip
    (critique,) = ask(model, [Request(turns, max_tokens=4, top_logprobs=2)])
    shared = critique.usage.prompt_tokens + 3 - sum(computed)
    assert draft.usage.prompt_tokens - 16 < shared <= draft.usage.prompt_tokens + 4
    assert shared % 16 == 0
    model.close()
