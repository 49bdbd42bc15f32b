"""The six commands under the stock templates of Qwen3 and gpt-oss; the trained model ends by itself."""

import json

import pytest
from conftest import read_jsonl, write_jsonl
from test_build_prefs import record
from test_chain import PROGRAMS
from test_thoughts import chat_under


def make_model(folder, name):
    """A two-layer model of random weights whose tokenizer knows the template's control tokens."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = chat_under(name).tokenizer
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=2048,
        tie_word_embeddings=True, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_six_commands_under_a_template_that_thinks(srt, tmp_path, name):
    make_model(tmp_path / "base", name)
    (tmp_path / "p.py").write_text(PROGRAMS)
    prompts = [{"id": str(n), "prompt": f"Say {n}."} for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    (tmp_path / "srt.toml").write_text(
        "max-new-tokens = 24\ncritic-max-tokens = 160\ncritic-check = 0\nthinking-tokens = 24\n"
    )
    collected = srt("collect-feedback", "--model", "base", "--critic", "python:p.py:critique")
    assert collected.code == 0, collected.stderr
    # A random model says nothing that ends; these rows stand in for a model's that does.
    rows = [
        record(id=str(n), prompt=f"Say {n}.", response="One, two.", refinement="It is grand!")
        for n in range(4)
    ]
    write_jsonl(tmp_path / "feedback.jsonl", [row.model_dump() for row in rows])
    tuned = srt("sft", "--epochs", 60, "--learning-rate", "5e-3", "--samples", 0)
    assert tuned.code == 0, tuned.stderr
    criticised = srt("self-critique", "--temperature", 0)
    assert criticised.code == 0, criticised.stderr
    own = read_jsonl(tmp_path / "self-feedback.jsonl")
    assert [row["response"] for row in own] == ["One, two."] * 4
    for row in own:
        assert row["status"] == "ok", row
        assert row["refinement"] == "It is grand!"
        assert "thoughts" not in row
    # It was shown no refinement's score to learn from, so it scores all alike.
    rated = [{**row, "refinement_score": 9} for row in own]
    write_jsonl(tmp_path / "self-feedback.jsonl", rated)
    paired = srt("build-prefs", "--max-length-ratio", 30)
    assert paired.code == 0, paired.stderr
    preferred = srt("dpo", "--epochs", 1, "--samples", 0)
    assert preferred.code == 0, preferred.stderr
    evaluated = srt("eval", "--check", "python:p.py:check", "--use", "response")
    assert evaluated.code == 0, evaluated.stderr
    outputs = read_jsonl(next(tmp_path.glob("*outputs.jsonl")))
    ended = [row for row in outputs if row["contestant"] == "models/dpo"]
    assert [row["status"] for row in ended] == ["ok"] * 4, ended
    assert not any("think" in row["response"] or "channel" in row["response"] for row in ended)
    figures = json.loads((tmp_path / "eval.json").read_text())
    assert [row["contestant"] for row in figures["rows"]] == ["base", "models/dpo"]


THOUGHTS = {"response": "Easy", "critique": "So so"}


@pytest.mark.parametrize("name", ["qwen3", "gptoss"])
def test_six_commands_of_a_model_that_thinks(srt, tmp_path, name):
    """It is taught to think, and thinks briefly before every reply; no thought is anybody's text."""
    make_model(tmp_path / "base", name)
    (tmp_path / "p.py").write_text(PROGRAMS)
    prompts = [{"id": str(n), "prompt": f"Say {n}."} for n in range(4)]
    write_jsonl(tmp_path / "prompts.jsonl", prompts)
    (tmp_path / "srt.toml").write_text(
        "max-new-tokens = 24\ncritic-max-tokens = 160\ncritic-check = 0\n"
        'thinking = "on"\nthinking-tokens = 24\n'
    )
    collected = srt("collect-feedback", "--model", "base", "--critic", "python:p.py:critique")
    assert collected.code in (0, 3), collected.stderr
    # A random model says nothing that ends; these rows stand in for a model's that thinks. Half of
    # them criticise what the others refine to, so that a blind score is known too.
    rows = [
        record(id=str(n), prompt=f"Say {n}.", response="One, two.", refinement="It is grand!")
        for n in range(4)
    ]
    rows += [
        record(id=f"g{n}", prompt=f"Say {n} well.", response="It is grand!", score=9,
               refinement="It is so grand!", refinement_score=10)
        for n in range(4)
    ]  # fmt: skip
    thinking = [row.model_copy(update={"thoughts": THOUGHTS}).model_dump() for row in rows]
    write_jsonl(tmp_path / "feedback.jsonl", thinking)
    tuned = srt("sft", "--thoughts", "keep", "--epochs", 80, "--learning-rate", "5e-3",
                "--samples", 0)  # fmt: skip
    assert tuned.code == 0, tuned.stderr
    criticised = srt("self-critique", "--temperature", 0)
    assert criticised.code == 0, criticised.stderr
    own = read_jsonl(tmp_path / "self-feedback.jsonl")
    for row in own:
        assert row["status"] == "ok", row
        assert (row["response"], row["refinement"]) == ("One, two.", "It is grand!")
        assert row["thoughts"] == {**THOUGHTS, "score": "So so"}
        assert row["refinement_score"] == 9
    paired = srt("build-prefs", "--max-length-ratio", 30)
    assert paired.code == 0, paired.stderr
    preferred = srt("dpo", "--epochs", 1, "--samples", 0)
    assert preferred.code == 0, preferred.stderr
    evaluated = srt("eval", "--check", "python:p.py:check", "--use", "response")
    assert evaluated.code == 0, evaluated.stderr
    outputs = read_jsonl(next(tmp_path.glob("*outputs.jsonl")))
    answers = [row for row in outputs if row["contestant"] == "models/dpo"]
    assert [row["status"] for row in answers] == ["ok"] * 4, answers
    assert [row["thoughts"] for row in answers] == ["Easy"] * 4
    assert not any("think" in row["response"] or "channel" in row["response"] for row in answers)
    for path in ("self-feedback.jsonl", "prefs.jsonl"):
        for row in read_jsonl(tmp_path / path):
            row.pop("thoughts", None)
            assert "So so" not in json.dumps(row), path
