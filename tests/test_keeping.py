"""What becomes of a trained model: it stands alone, merged or as an adapter, and is read back."""

import json
import shutil

import pytest
import torch
from conftest import read_jsonl, write_jsonl
from test_dpo import pair_rows
from test_sft import feedback_rows

from srt_cli.models.weights import load_tokenizer, load_weights

LORA = ("--method", "lora", "--lora-dropout", 0.1, "--learning-rate", 1e-2, "--samples", 0)


@pytest.fixture
def sft(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows())
    line = ("sft", "--model", tiny_model, "--global-batch", 4, "--epochs", 2, "--critic-check", 0)
    return lambda *extra: srt(*line, *extra)


@pytest.fixture
def dpo(srt, tmp_path):
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows())
    line = ("dpo", "--global-batch", 4, "--epochs", 2, "--beta", 0.1)
    return lambda *extra: srt(*line, *extra)


def manifest_of(folder):
    return json.loads((folder / "run.json").read_text())


def logits(directory):
    torch.manual_seed(0)
    row = torch.randint(10, 400, (1, 24))
    with torch.no_grad():
        return load_weights(str(directory))(input_ids=row).logits


def test_what_is_saved_is_what_was_trained(sft, tmp_path):
    finished = sft("--learning-rate", 1e-2, "--samples", 0)
    assert finished.code == 0, finished.stderr
    assert "read back from models/sft: largest difference of a logit 0" in finished.stderr
    saved = manifest_of(tmp_path / "models/sft")["tallies"]["saved"]
    assert saved == {"largest_logit_difference": 0.0, "rows_compared": 4}
    # The same line again finds a model that is lost or damaged, and trains nothing of its own accord.
    weights = tmp_path / "models/sft/model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[: len(whole) // 2])
    again = sft("--learning-rate", 1e-2, "--samples", 0)
    assert (again.code, again.stdout) == (1, "")
    assert "its training has finished, but model.safetensors is damaged." in again.stderr
    weights.unlink()
    again = sft("--learning-rate", 1e-2, "--samples", 0)
    assert (again.code, again.stdout) == (1, "")
    assert "but model.safetensors is not there. Put the file back, or train again" in again.stderr
    weights.write_bytes(whole)
    assert sft("--learning-rate", 1e-2, "--samples", 0).code == 0


def test_a_model_that_is_not_what_was_trained_is_not_kept(sft, tmp_path, monkeypatch):
    from srt_cli.training import saving

    def save_other(model, tokenizer, out, card, *, save=saving.save_model):
        with torch.no_grad():
            model.model.norm.weight.mul_(1.5)
        save(model, tokenizer, out, card)

    monkeypatch.setattr(saving, "save_model", save_other)
    finished = sft("--learning-rate", 1e-2, "--samples", 0)
    assert finished.code == 1
    assert "read back from disk, the model does not answer as the one that was" in finished.stderr
    assert not (tmp_path / "models/sft/config.json").exists()
    assert manifest_of(tmp_path / "models/sft")["status"] == "failed"


def test_the_saved_model_ends_with_its_turn_and_never_with_its_padding(sft, tmp_path, tiny_model):
    sft("--samples", 0)
    out = tmp_path / "models/sft"
    tokenizer = load_tokenizer(str(out))
    config = json.loads((out / "generation_config.json").read_text())
    ends = (
        config["eos_token_id"]
        if isinstance(config["eos_token_id"], list)
        else [config["eos_token_id"]]
    )
    assert tokenizer.convert_tokens_to_ids("<|im_end|>") in ends
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert config["pad_token_id"] not in ends
    assert tokenizer.chat_template == load_tokenizer(str(tiny_model)).chat_template


def test_the_card_names_data_base_method_and_figures(sft, tmp_path, tiny_model):
    sft("--samples", 0)
    card = (tmp_path / "models/sft/README.md").read_text()
    rows = read_jsonl(tmp_path / "models/sft/metrics.jsonl")
    assert card.startswith('---\nlibrary_name: "transformers"\n')
    assert f"- base: {tiny_model}" in card
    assert "- method: supervised fine-tuning (full), loss on response, feedback, refinement" in card
    digest = manifest_of(tmp_path / "models/sft")["inputs"]["data"]["sha256"]
    assert f"- data: feedback.jsonl (sha256 {digest[:16]}, 8 rows)" in card
    assert f"first to final step: {rows[0]['loss']:.4f} to {rows[-1]['loss']:.4f}" in card


def test_an_adapter_merged_answers_as_the_adapter_alone(sft, tmp_path):
    merged = sft(*LORA, "--out", "models/merged")
    assert merged.code == 0, merged.stderr
    assert "over the first tokens of 4 rows, prompts included, the loss was" in merged.stderr
    apart = sft(*LORA, "--no-merge", "--out", "models/apart")
    assert apart.code == 0, apart.stderr
    names = {path.name for path in (tmp_path / "models/apart").iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja"} <= names
    assert not names & {"config.json", "model.safetensors"}
    one, other = logits("models/merged"), logits("models/apart")
    assert float((one - other).abs().max()) < 1e-4
    assert float((one - logits("models/merged/adapter")).abs().max()) < 1e-4
    # It holds no tokenizer: its base has one.
    template = load_tokenizer("models/merged/adapter").chat_template
    assert template == load_tokenizer("models/merged").chat_template
    saved = manifest_of(tmp_path / "models/merged")["tallies"]["saved"]
    assert saved["merge_largest_logit_difference"] < 1e-4
    assert saved["loss_after_merge"] == pytest.approx(saved["loss_before_merge"], abs=1e-5)


def test_an_adapter_on_an_adapter_is_kept_only_where_it_loads_rightly(sft, tmp_path):
    assert sft(*LORA, "--no-merge", "--out", "models/first").code == 0
    line = (*LORA, "--epochs", 1, "--model", "models/first")
    merged = sft(*line, "--out", "models/second")
    assert merged.code == 0, merged.stderr
    assert "no models/second/adapter: it was trained on models/first" in merged.stderr
    assert not (tmp_path / "models/second/adapter").exists()
    apart = sft(*line, "--no-merge", "--out", "models/apart")
    assert "srt loads both, but peft and servers leave that one out" in apart.stderr
    assert float((logits("models/second") - logits("models/apart")).abs().max()) < 1e-4


def test_an_adapter_without_its_base_is_one_sentence(sft, srt, tmp_path, tiny_model):
    base = tmp_path / "base"
    shutil.copytree(tiny_model, base)
    assert sft(*LORA, "--no-merge", "--model", base).code == 0
    shutil.rmtree(base)
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows())
    for more in ((), ("--dry-run",)):
        finished = srt("dpo", "--model", "models/sft", "--samples", 0, *more)
        assert finished.code == 1
        (error,) = [line for line in finished.stderr.splitlines() if line.startswith("error: ")]
        said = f"models/sft is an adapter, and its base cannot be had: {base}: no such directory."
        assert said in error
    assert not (tmp_path / "models/dpo").exists()


def test_dpo_goes_on_from_an_adapter_merged_or_further_trained(sft, dpo, tmp_path, tiny_model):
    assert sft(*LORA, "--no-merge").code == 0
    started = logits("models/sft")
    for way, reference in (
        ("merge", f"{tiny_model} with the adapter of models/sft merged into it"),
        ("continue", f"{tiny_model} with a frozen copy of the adapter of models/sft"),
    ):
        out = tmp_path / "models" / way
        line = ("--model", "models/sft", "--method", "lora", "--samples", 0, "--adapter", way)
        finished = dpo(*line, "--learning-rate", 1e-3, "--out", out)
        assert finished.code == 0, finished.stderr
        first = read_jsonl(out / "metrics.jsonl")[0]
        # ln 2: the reference is the tuned model, and not its base.
        assert first["loss"] == pytest.approx(0.693147, abs=1e-5)
        manifest = manifest_of(out)
        assert manifest["models"]["reference"]["is"] == reference
        assert f"- reference: {reference}" in (out / "README.md").read_text()
        assert not (out / "adapter/ref").exists()
        moved = float((logits(out) - started).abs().max())
        assert 1e-4 < moved < 5.0


def test_going_on_with_an_adapter_needs_one(dpo, tiny_model, tmp_path):
    finished = dpo("--model", tiny_model, "--method", "lora", "--adapter", "continue")
    assert finished.code == 2
    assert "it needs an adapter directory as --model" in finished.stderr
    assert not (tmp_path / "models").exists()


def test_flags_about_adapters_are_refused_where_none_are_trained(sft, tmp_path):
    finished = sft("--dora", "--lora-r", 8)
    assert finished.code == 2
    assert "--lora-r is about adapters, and --method full trains none." in finished.stderr
    (tmp_path / "srt.toml").write_text("[sft]\nlora_r = 8\n")  # a preset may serve other lines
    assert sft("--dry-run").code == 0


def test_qlora_trains_on_four_bits_and_merges_into_all(srt, tmp_path, tiny_model):
    pytest.importorskip("bitsandbytes")
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows())
    wide = tmp_path / "wide"
    make_wide_model(tiny_model, wide)
    found = {}
    for base in ("original", "dequantised"):
        out = tmp_path / "models" / base
        finished = srt(
            "sft", "--model", wide, "--method", "qlora", "--learning-rate", 1e-2, "--out", out,
            "--global-batch", 4, "--epochs", 3, "--critic-check", 0, "--samples", 0,
            "--merge-base", base,
        )  # fmt: skip
        assert finished.code == 0, finished.stderr
        rows = read_jsonl(out / "metrics.jsonl")
        assert rows[-1]["loss"] < rows[0]["loss"] - 0.3
        found[base] = manifest_of(out)["tallies"]["saved"]
        assert found[base]["largest_logit_difference"] < 1e-3
        # Merged, it is an ordinary model again.
        assert load_weights(str(out)).config.to_dict().get("quantization_config") is None
    # The adapter knew the rounded base: there it fits exactly.
    rounding = found["original"]["merge_largest_logit_difference"]
    assert found["dequantised"]["merge_largest_logit_difference"] < rounding / 5


def make_wide_model(tokenizer_from, folder):
    """Four bits come in blocks of 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = load_tokenizer(str(tokenizer_from))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=True,
        initializer_range=0.1, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
