"""Models in this process: company changes nothing, stop texts stop, and nothing is forged."""

import shutil

import pytest
from safetensors.torch import load_file, save_file

from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions, Request, open_model
from srt_cli.models.weights import fingerprint_of, load_weights
from srt_cli.records import Message


def requests(texts, **changes):
    settings = {"max_tokens": 12} | changes
    return [Request((Message(role="user", content=text),), **settings) for text in texts]


TEXTS = [f"word {'and more ' * (n % 5)}{n}" for n in range(10)]


def ask(model, wanted):
    return [future.result(120) for future in model.submit(wanted)]


@pytest.fixture
def model(tiny_model):
    opened = open_model(str(tiny_model), ModelOptions(batch_size=4))
    yield opened
    opened.close()


@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_a_reply_is_the_same_alone_and_in_company(model, temperature):
    together = ask(model, requests(TEXTS, temperature=temperature))
    alone = [ask(model, [request])[0] for request in requests(TEXTS, temperature=temperature)]
    assert [reply.text for reply in together] == [reply.text for reply in alone]


def test_seed_and_sample_draw_anew_and_repeat_themselves(model):
    def draw(**changes):
        return ask(model, requests(TEXTS[:2], temperature=1.0, **changes))[0].text

    assert draw() == draw()
    assert len({draw(), draw(seed=1), draw(sample=1)}) == 3


def test_a_reply_that_reaches_the_limit_says_so(model):
    (reply,) = ask(model, requests(["x"], max_tokens=3))
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("length", 3)
    assert reply.usage.prompt_tokens > 20


def test_a_stop_text_ends_and_is_cut_off(model):
    (free,) = ask(model, requests(["x"], max_tokens=12))
    stop = free.text[3:6]
    (cut,) = ask(model, requests(["x"], max_tokens=12, stop=(stop,)))
    assert cut.text == free.text[: free.text.find(stop)]
    assert cut.finish_reason == "stop"


def test_log_probs_come_with_each_token_and_the_greedy_one_leads(model):
    (reply,) = ask(model, requests(["x"], max_tokens=4, top_logprobs=3))
    assert len(reply.logprobs) == 4
    for place in reply.logprobs:
        assert max(place.top, key=place.top.get) == place.token
        assert all(value <= 0 for value in place.top.values())


def test_a_prompt_longer_than_the_model_fails_alone(model):
    replies = ask(model, requests(["word " * 3000, "short"]))
    assert [reply.finish_reason for reply in replies] == ["failed", "length"]
    assert "2048 positions" in str(replies[0].error)


def test_batches_are_the_same_whatever_is_answered_already(tiny_model):
    first = open_model(str(tiny_model), ModelOptions(batch_size=4))
    wanted = requests(TEXTS, temperature=0.9)
    replies = ask(first, wanted)
    first.close()
    second = open_model(str(tiny_model), ModelOptions(batch_size=4))
    answered = [n % 3 == 0 for n in range(len(TEXTS))]
    futures = second.submit(wanted, answered)
    for reply, future, known in zip(replies, futures, answered, strict=True):
        if not known:
            assert future.result(120).text == reply.text
    second.close()


def test_nothing_is_loaded_when_all_is_answered(tiny_model):
    model = open_model(str(tiny_model))
    model.submit(requests(TEXTS), [True] * len(TEXTS))
    assert "dtype" not in model.describe()
    model.close()


def test_closing_stops_at_the_next_token_and_cancels_the_rest(tiny_model):
    model = open_model(str(tiny_model), ModelOptions(batch_size=2))
    futures = model.submit(requests(TEXTS, max_tokens=1500))
    model.close()
    assert all(future.cancelled() for future in futures)


def test_a_retrained_directory_is_another_model(tiny_model, tmp_path):
    copy = shutil.copytree(tiny_model, tmp_path / "copy")
    assert fingerprint_of(str(copy)) == fingerprint_of(str(tiny_model))
    weights = copy / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    assert fingerprint_of(str(copy)) != fingerprint_of(str(tiny_model))


def half_a_file(weights):
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])


def without_a_tensor(weights):
    tensors = load_file(weights)
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, weights, metadata={"format": "pt"})


def with_another_shape(weights):
    tensors = load_file(weights)
    tensors["model.norm.weight"] = tensors["model.norm.weight"][:4].clone()
    save_file(tensors, weights, metadata={"format": "pt"})


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (half_a_file, "cannot be loaded"),
        (without_a_tensor, "lacks 1 of its tensors (model.layers.1.mlp.up_proj.weight)"),
        (with_another_shape, "cannot be loaded"),
    ],
)
def test_damaged_weights_are_said_in_one_sentence(tiny_model, tmp_path, damage, said):
    shutil.copytree(tiny_model, tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    with pytest.raises(SrtError) as refused:
        load_weights(str(tmp_path / "model"))
    assert said in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_directory_without_a_model_is_said(tmp_path):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SrtError, match=r"not a model directory \(it holds notes.txt\)"):
        open_model(str(tmp_path))


def test_a_hub_name_out_of_reach_is_one_clear_sentence():
    with pytest.raises(
        SrtError, match="not in the local cache, and the model hub cannot be reached"
    ):
        load_weights("nobody/no-such-model")


@pytest.mark.smollm2
def test_smollm2_from_gguf_answers_in_words(smollm2_gguf, smollm2):
    model = open_model(str(smollm2_gguf))
    wanted = requests(["What is the capital of France?", "Name a color."], max_tokens=24)
    replies = ask(model, wanted)
    model.close()
    assert "Paris" in replies[0].text
    assert replies[0].finish_reason == "stop"
