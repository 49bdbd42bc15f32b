"""Models in this process: company changes nothing, stop texts stop, and nothing is forged."""

import hashlib
import json
import math
import pickle
import shutil
from collections import Counter
from concurrent.futures import Future
from dataclasses import replace

import pytest
import torch
from conftest import write_jsonl
from hypothesis import given
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from test_dpo import pair_rows
from test_sft import feedback_rows
from transformers import AutoModelForCausalLM

from srt_cli.calls.conduct import Call, look_up_call
from srt_cli.errors import SrtError
from srt_cli.models import ModelOptions, Request, canonical_request, is_loop, open_model
from srt_cli.models.local import local, static
from srt_cli.models.local.decoder import UnpaddedBatch
from srt_cli.models.local.rows import Generation
from srt_cli.models.local.sampling import Draw, choose_tokens, draw_key, gumbel_noise
from srt_cli.models.weights import fingerprint_of, load_tokenizer, load_weights
from srt_cli.records import Message
from srt_cli.runs.journal import request_key


def requests(texts, **changes):
    settings = {"max_tokens": 12} | changes
    return [Request((Message(role="user", content=text),), **settings) for text in texts]


TEXTS = [f"word {'and more ' * (n % 5)}{n}" for n in range(10)]


def ask(model, wanted):
    return [future.result(120) for future in model.submit(wanted)]


def expect_same(replies, others):
    """Texts and how they end, and log-probs but for rounding."""
    for one, other in zip(replies, others, strict=True):
        assert (one.text, one.finish_reason, one.usage) == (
            other.text, other.finish_reason, other.usage,
        )  # fmt: skip
        for place, same in zip(one.logprobs, other.logprobs, strict=True):
            assert (place.token, list(place.top)) == (same.token, list(same.top))
            assert list(place.top.values()) == pytest.approx(list(same.top.values()), abs=1e-3)


@pytest.fixture(params=["static", "continuous"])
def model(tiny_model, request):
    opened = open_model(str(tiny_model), ModelOptions(batch_size=4, engine=request.param))
    yield opened
    opened.close()


def test_both_engines_write_the_same_greedy_and_drawn_replies(tiny_model):
    wanted = [
        *requests(TEXTS, max_tokens=40),
        *requests(TEXTS, temperature=0.9),
        *requests(TEXTS[:3], temperature=0.9, top_p=0.5),
        *requests(TEXTS[:3], top_logprobs=2),
    ]
    replies = {}
    for engine in ("static", "continuous"):
        opened = open_model(str(tiny_model), ModelOptions(engine=engine))
        replies[engine] = ask(opened, wanted)
        opened.close()
    expect_same(*replies.values())


def test_guesses_save_steps_and_change_nothing(tiny_model, monkeypatch):
    """Right ones and wrong ones; greedy, drawn, with log-probs, up to a stop text."""
    wanted = [
        *requests(TEXTS, max_tokens=60, top_logprobs=2),
        *requests(TEXTS, max_tokens=60, temperature=0.9),
        *requests(TEXTS[:4], max_tokens=60, stop=("e",)),
    ]
    written, replies, steps = {}, {}, Counter()
    reply, step = Generation.reply, UnpaddedBatch.step

    def noted(row):
        written.setdefault((row.seed, row.request.temperature), list(row.tokens))
        return reply(row)

    def counted(batch, tokens):
        steps[static.MOST_STEP_TOKENS] += len(tokens)  # of each row
        return step(batch, tokens)

    def guess(row, most):
        if most < 1:
            return []
        done = len(row.tokens)
        ahead = written[row.seed, row.request.temperature][done : done + 4]
        if done % 3 == 0:
            ahead[-1:] = [(token + 1) % 50 for token in ahead[-1:]]
        return ahead[: min(most, row.limit - done - 1)]

    monkeypatch.setattr(Generation, "reply", noted)
    monkeypatch.setattr(Generation, "guess", guess)
    monkeypatch.setattr(UnpaddedBatch, "step", counted)
    for most in (0, 256):
        monkeypatch.setattr(static, "MOST_STEP_TOKENS", most)
        opened = open_model(str(tiny_model), ModelOptions(engine="static"))
        replies[most] = ask(opened, wanted)
        opened.close()
    expect_same(*replies.values())
    assert steps[256] < 0.4 * steps[0]


def test_smollm2_writes_what_it_would_have_in_fewer_steps(smollm2, monkeypatch):
    words = "red green blue red green blue red green"
    asked = requests([f"Repeat these words again and again: {words}"], max_tokens=40)
    texts, steps, step = set(), Counter(), UnpaddedBatch.step

    def counted(batch, tokens):
        steps[static.MOST_STEP_TOKENS] += 1
        return step(batch, tokens)

    monkeypatch.setattr(UnpaddedBatch, "step", counted)
    for most in (0, 256):
        monkeypatch.setattr(static, "MOST_STEP_TOKENS", most)
        opened = open_model(str(smollm2), ModelOptions(engine="static"))
        [reply] = ask(opened, asked)
        opened.close()
        texts.add(reply.text)
    assert len(texts) == 1
    assert steps[256] < 0.8 * steps[0]


def test_greedy_replies_are_those_of_generate(tiny_model):
    from srt_cli.models.chat import ChatFormat
    from srt_cli.models.weights import load_tokenizer

    tokenizer, weights = load_tokenizer(str(tiny_model)), load_weights(str(tiny_model))
    opened = open_model(str(tiny_model))
    for wanted, reply in zip(requests(TEXTS), ask(opened, requests(TEXTS)), strict=True):
        ids = ChatFormat(tokenizer).prompt_ids(wanted.messages)
        output = weights.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert reply.text == tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    opened.close()


def test_a_new_request_enters_while_another_is_under_way(tiny_model):
    opened = open_model(str(tiny_model), ModelOptions(engine="continuous"))
    (long,) = opened.submit(requests(["long"], max_tokens=400))
    (short,) = opened.submit(requests(["short"], max_tokens=4))
    assert short.result(60).usage.completion_tokens == 4
    assert not long.done()
    opened.close()
    assert long.cancelled()


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("planted"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_out_of_memory_halves_the_batch_and_loses_nothing(tiny_model, monkeypatch, error):
    plain = open_model(str(tiny_model))
    replies = ask(plain, requests(TEXTS))
    plain.close()
    choose, sizes = static.choose_tokens, []

    def fail_when_large(logits, draws):
        sizes.append(len(logits))
        if len(logits) > 3:
            raise error
        return choose(logits, draws)

    monkeypatch.setattr(static, "choose_tokens", fail_when_large)
    short_of_memory = open_model(str(tiny_model))
    assert ask(short_of_memory, requests(TEXTS)) == replies
    described = short_of_memory.describe()
    assert described["halved_for_memory"] == 2
    ask(short_of_memory, requests(TEXTS[:6]))
    assert max(sizes[-20:]) <= 3  # the limit that was found is kept
    short_of_memory.close()


def test_memory_that_runs_out_when_rows_have_just_ended_loses_none_of_them(tiny_model, monkeypatch):
    wanted = [*requests(TEXTS[:1], max_tokens=3), *requests(TEXTS[1:3], max_tokens=9)]
    plain = open_model(str(tiny_model))
    replies = ask(plain, wanted)
    plain.close()
    keep_tops, calls = static.keep_tops, []

    def fail_once(logits, wanting):
        calls.append(len(logits))
        if len(calls) == 3:
            raise torch.OutOfMemoryError("planted")
        keep_tops(logits, wanting)

    monkeypatch.setattr(static, "keep_tops", fail_once)
    short_of_memory = open_model(str(tiny_model))
    assert ask(short_of_memory, wanted) == replies
    short_of_memory.close()


def test_a_row_alone_that_does_not_fit_is_said(tiny_model, monkeypatch):
    def fail(logits, draws):
        raise torch.OutOfMemoryError("planted")

    monkeypatch.setattr(static, "choose_tokens", fail)
    opened = open_model(str(tiny_model))
    (future,) = opened.submit(requests(["x"]))
    with pytest.raises(SrtError, match=r"single row of \d+ tokens. Lower --max-new-tokens"):
        future.result(60)
    opened.close()


def test_rows_leave_a_batch_as_they_end(tiny_model, monkeypatch):
    choose, sizes = static.choose_tokens, []

    def watch(logits, draws):
        sizes.append(len(logits))
        return choose(logits, draws)

    monkeypatch.setattr(static, "choose_tokens", watch)
    opened = open_model(str(tiny_model))
    lengths = [2, 9, 4, 9, 6]
    wanted = [
        replace(requests([text])[0], max_tokens=n) for text, n in zip(TEXTS, lengths, strict=False)
    ]
    together = ask(opened, wanted)
    assert sizes == [5, 5, 4, 4, 3, 3, 2, 2, 2]
    assert together == [ask(opened, [one])[0] for one in wanted]
    opened.close()


def test_a_reply_that_repeats_itself_is_cut(tiny_model, monkeypatch):
    def always_the_same(logits, draws):
        return torch.full((len(logits),), 1000)

    monkeypatch.setattr(static, "choose_tokens", always_the_same)
    opened = open_model(str(tiny_model))
    (reply,) = ask(opened, requests(["x"], max_tokens=500))
    assert (reply.finish_reason, reply.usage.completion_tokens) == ("loop", 128)
    opened.close()


@pytest.mark.parametrize(
    ("written", "loops"),
    [
        ([7] * 128, True),
        ([1, 2, 3] * 43, True),
        (list(range(32)) * 4, True),
        (list(range(33)) * 4, False),
        ([*([7] * 127), 8], False),
        ([7] * 127, False),
    ],
)
def test_what_counts_as_a_loop(written, loops):
    assert is_loop(written) == loops


def test_log_probs_are_kept_only_around_digits_when_a_score_is_wanted(model):
    whole = ask(model, requests(TEXTS, max_tokens=60, top_logprobs=3))
    digits = ask(model, requests(TEXTS, max_tokens=60, top_logprobs=3, logprobs_at="digits"))
    assert [reply.text for reply in whole] == [reply.text for reply in digits]
    for all_places, kept in zip(whole, digits, strict=True):
        behind = [False, *(any(map(str.isdecimal, place.token)) for place in all_places.logprobs)]
        wanted = [
            place.offset
            for place, after_digit in zip(all_places.logprobs, behind, strict=False)
            if any(c in "0123456789" for c in place.token) or after_digit
        ]
        assert [place.offset for place in kept.logprobs] == wanted


def test_a_reply_that_was_begun_is_continued(model):
    (whole,) = ask(model, requests(["x"]))
    begun = whole.text[:9]
    turns = (Message(role="user", content="x"), Message(role="assistant", content=begun))
    (rest,) = ask(model, [Request(turns, max_tokens=4, continues=True)])
    assert rest.usage.prompt_tokens > whole.usage.prompt_tokens


@given(st.integers(0, 2**64 - 1), st.integers(0, 4000))
def test_the_noise_of_a_draw_depends_on_its_key_alone(seed, position):
    key = draw_key(seed, position)
    assert 0 <= key < 2**32
    alone = gumbel_noise(torch.tensor([key]), 50)
    together = gumbel_noise(torch.tensor([key ^ 1, key, 5]), 50)
    assert torch.equal(alone[0], together[1])


@given(st.integers(0, 2**32 - 1), st.integers(0, 151_935))
def test_noise_is_the_hash_of_key_and_token_as_a_gumbel_number(key, token):
    mixed = (key + token * 0x9E3779B9) % 2**32
    for shift, factor in ((16, 0x7FEB352D), (15, 0x846CA68B)):
        mixed = (mixed ^ (mixed >> shift)) * factor % 2**32
    mixed ^= mixed >> 16
    wanted = -math.log(-math.log1p(-(mixed + 0.5) / 2**32))
    found = gumbel_noise(torch.tensor([key]), token + 1)[0, token]
    assert float(found) == pytest.approx(wanted, rel=1e-5, abs=1e-5)


def test_rows_are_drawn_each_by_itself_however_many_there_are():
    logits = torch.randn(11, 500, generator=torch.Generator().manual_seed(1))
    draws = [Draw(0.8 * (row % 3), 1.0, draw_key(7, row)) for row in range(11)]
    together = choose_tokens(logits, draws)
    alone = [choose_tokens(logits[row, None], [draws[row]]) for row in range(11)]
    assert together.tolist() == torch.cat(alone).tolist()
    assert together[::3].tolist() == logits[::3].argmax(-1).tolist()


def test_draws_follow_the_probabilities():
    logits = torch.tensor([0.5, 0.3, 0.15, 0.05]).log().repeat(4000, 1)
    draws = [Draw(1.0, 1.0, draw_key(11, place)) for place in range(4000)]
    shares = choose_tokens(logits, draws).bincount(minlength=4) / 4000
    assert shares.tolist() == pytest.approx([0.5, 0.3, 0.15, 0.05], abs=0.025)
    cut = [Draw(1.0, 0.7, draw_key(11, place)) for place in range(400)]
    assert set(choose_tokens(logits[:400], cut).tolist()) == {0, 1}


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


def test_a_model_is_loaded_by_one_thread_and_answers_with_all(tiny_model, monkeypatch):
    """Threads that loading starts would stay, and be in the way of the engine's."""
    counts = []

    def counting(work):
        def counted(*given):
            counts.append(torch.get_num_threads())
            return work(*given)

        return counted

    monkeypatch.setattr(local, "_load", counting(local._load))
    monkeypatch.setattr(static, "plan_batches", counting(static.plan_batches))
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        model = open_model(str(tiny_model))
        ask(model, requests(["q"], max_tokens=2))
        model.close()
        assert counts == [1, 3]
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


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


def test_an_adapter_on_a_retrained_base_is_another_model(tiny_model, tmp_path):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    adapter = tmp_path / "adapter"
    adapter.mkdir()

    def fingerprint_on(name):
        config = {"base_model_name_or_path": str(name)}
        (adapter / "adapter_config.json").write_text(json.dumps(config))
        return fingerprint_of(str(adapter))

    before = fingerprint_on(base)
    (base / "generation_config.json").write_text("{}")
    assert fingerprint_on(base) != before
    config = adapter / "adapter_config.json"
    by_name = fingerprint_on("org/base")  # as ever: the journals of such runs are read on
    digest = hashlib.sha256(config.read_bytes()).hexdigest()[:16]
    assert by_name == hashlib.sha256(f"{config.name}:{digest};".encode()).hexdigest()[:16]


def test_what_an_adapter_was_asked_by_older_srt_is_not_asked_again(srt, tiny_model, tmp_path):
    adapter = tmp_path / "adapter"
    base = AutoModelForCausalLM.from_pretrained(shutil.copytree(tiny_model, tmp_path / "base"))
    get_peft_model(base, LoraConfig(target_modules="all-linear")).save_pretrained(adapter)
    load_tokenizer(str(tiny_model)).save_pretrained(adapter)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "a"}])
    (tmp_path / "c.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w', 'suggestions': 's', 'score': 4}, response + '!'\n"
    )
    line = ("collect-feedback", "--model", str(adapter), "--critic", "python:c.py:critique",
            "--max-new-tokens", 2)  # fmt: skip
    assert srt(*line, "--max-failures", 1).code == 0
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    identity = manifest["models"][str(adapter)]["identity"]
    own, weights = identity.removeprefix("local:").split("-on-")
    assert weights == fingerprint_of(str(tmp_path / "base"))
    model = open_model(str(adapter), ModelOptions(offline=True))
    call = Call(model, Request((Message(role="user", content="a"),), 2), "draft")
    older = canonical_request(model, call.request) | {"model": f"local:{own}"}
    assert look_up_call(call, {request_key(older): {"text": "A"}}.get)[1] == {"text": "A"}
    manifest["models"][str(adapter)]["identity"] = f"local:{own}"
    (tmp_path / "feedback.run.json").write_text(json.dumps(manifest))
    again = srt(*line, "--max-failures", 1)
    assert "nothing to do" in again.stdout
    assert "has changed" not in again.stderr


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


class Planted:
    """A pickle that leaves a trace when it is read."""

    def __init__(self, trace):
        self.trace = str(trace)

    def __reduce__(self):
        return open, (self.trace, "w")


@pytest.mark.parametrize("adapter", [False, True])
def test_pickled_weights_are_refused_by_every_command_and_never_read(
    srt, tiny_model, tmp_path, adapter
):
    pickled = tmp_path / "pickled"
    shutil.copytree(tiny_model, pickled)
    (pickled / "model.safetensors").unlink()
    if adapter:
        config = {"base_model_name_or_path": str(tiny_model), "peft_type": "LORA"}
        (pickled / "adapter_config.json").write_text(json.dumps(config))
    names = ("pytorch_model.bin", "model.pt", "adapter_model.bin", "consolidated.00.pth")
    for name in names:
        with open(pickled / name, "wb") as file:
            pickle.dump(Planted(tmp_path / "trace"), file)
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p"}])
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(4))
    train = ("--model", "pickled", "--learning-rate", 1e-3)
    lines = [
        ("collect-feedback", "--model", "./pickled", "--critic", "./pickled"),
        ("sft", "--data", "feedback.jsonl", *train),
        ("self-critique", "--model", "./pickled"),
        ("build-prefs", "--data", "feedback.jsonl", "--audit", 1, "--audit-judge", "./pickled",
         "--max-length-ratio", 99),
        ("dpo", "--prefs", "prefs.jsonl", *train),
        ("eval", "--model", "./pickled", "--reference", tiny_model, "--judge", "./pickled"),
    ]  # fmt: skip
    for number, line in enumerate(lines):
        out = f"out{number}" + {1: "", 4: "", 5: ".json"}.get(number, ".jsonl")
        refused = srt(*line, "--out", out)
        assert refused.code == 1, refused.stderr
        assert "no weights as safetensors, and no others are read: a pickle" in refused.stderr, line
    assert not (tmp_path / "trace").exists()


def test_a_directory_without_a_model_is_said(tmp_path, monkeypatch):
    (tmp_path / "notes.txt").write_text("x")
    with pytest.raises(SrtError, match=r"not a model directory \(it holds notes.txt\)"):
        open_model(str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    with pytest.raises(SrtError, match=r"not a model directory \(it holds notes.txt\)"):
        open_model(f"hf:~/{tmp_path.name}")


def test_a_hub_name_out_of_reach_is_one_clear_sentence():
    with pytest.raises(
        SrtError, match="not in the local cache, and the model hub cannot be reached"
    ):
        load_weights("nobody/no-such-model")


ODD = {
    "architectures": ["Odd"], "model_type": "odd",
    "auto_map": {"AutoConfig": "odd.OddConfig", "AutoModelForCausalLM": "odd.Odd"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (
            {"model_type": "of-tomorrow"},
            r"cannot be loaded \(The checkpoint you are trying to load ",
        ),
        (ODD, "brings code of its own, .* pass --trust-remote-code if you trust it"),
        ({"model_type": "gpt2"}, r"cannot be loaded \(.*safetensors"),  # a .bin alone
    ],
)
def test_why_a_model_of_the_hub_cannot_be_loaded_is_said(tmp_path, monkeypatch, config, said):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    repository = tmp_path / "models--me--odd"
    snapshot = repository / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text("0" * 40)
    (snapshot / "config.json").write_text(json.dumps(config))
    (snapshot / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(SrtError, match=f"^me/odd: {said}"):
        load_weights("me/odd")


@pytest.mark.smollm2
def test_smollm2_from_gguf_answers_in_words(smollm2_gguf, smollm2):
    model = open_model(str(smollm2_gguf))
    wanted = requests(["What is the capital of France?", "Name a color."], max_tokens=24)
    replies = ask(model, wanted)
    model.close()
    assert "Paris" in replies[0].text
    assert replies[0].finish_reason == "stop"


def test_a_batch_on_a_cpu_is_cut_so_that_it_ends_within_two_minutes(tiny_model, monkeypatch):
    opened = open_model(str(tiny_model), ModelOptions(engine="static"))
    monkeypatch.setattr(static.torch, "get_num_threads", lambda: 1)
    loaded = opened._start().loaded
    cost = 2 * loaded.model.num_parameters()
    # A core that writes 2,000 tokens of this model in two minutes: 20 rows of 100, 8 of 300.
    monkeypatch.setattr(static, "OPERATIONS_A_SECOND", 2000 * cost / static.LONGEST_BATCH_S)
    for limit, rows in (100, 20), (300, 8):
        asked = requests([f"word {n}" for n in range(40)], max_tokens=limit)
        wave = [opened._row(request, Future(), False) for request in asked]
        assert len(static.plan_batches(wave, loaded, None)[0]) == rows
        assert len(static.plan_batches(wave, loaded, 30)[0]) == 30
    opened.close()


def test_the_conversion_of_a_gguf_file_is_told_and_counted(tmp_path, monkeypatch, capsys):
    from transformers import modeling_gguf_pytorch_utils as reading

    from srt_cli import console
    from srt_cli.models import weights

    def convert(gguf, directory):
        with console.progress("converting", None) as line, weights._counting_tensors(line):
            assert list(reading.tqdm(["a", "b", "c"], desc="")) == ["a", "b", "c"]

    monkeypatch.setenv("SRT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(weights, "_convert", convert)
    (tmp_path / "small.gguf").write_bytes(b"x")
    own = reading.tqdm
    weights.resolve_source(str(tmp_path / "small.gguf"))
    assert reading.tqdm is own
    first, counted = capsys.readouterr().err.splitlines()
    assert first == "small.gguf: is converted once, which may take minutes; later runs find it"
    assert counted.startswith("converting: 3/3 in ")


def test_a_batch_that_is_stopped_has_given_out_the_rows_that_ended(tiny_model):
    opened = open_model(str(tiny_model), ModelOptions(engine="static"))
    short = opened.submit([*requests(["a", "b"], max_tokens=1), *requests(["c"], max_tokens=1500)])
    texts = [future.result(120).finish_reason for future in short[:2]]
    opened.close()
    assert texts == ["length", "length"]
    assert all(future.done() for future in short)
