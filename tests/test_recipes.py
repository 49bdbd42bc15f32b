"""Where a training's values come from: the recipe, by method and size, unless they are given."""

import json

import pytest
from conftest import write_jsonl
from test_dpo import pair_rows
from test_sft import feedback_rows

from srt_cli.stages.dpo import Dpo
from srt_cli.stages.sft import Sft
from srt_cli.training.recipes import RECIPES, advise_on_size, choose_hyperparameters

# Rate for all weights at 7B and at 70B, rate of LoRA at 7B; schedule, warm-up, epochs, batch.
EXPECTED = {
    ("sft", "srt"): (1e-5, 1e-5, 1e-4, "cosine", 0.1, 5, 32),
    ("sft", "tulu2"): (2e-5, 1e-5, 1e-4, "linear", 0.03, 3, 128),
    ("sft", "tulu3"): (5e-6, 2e-6, 5e-5, "linear", 0.03, 2, 128),
    ("sft", "zephyr"): (2e-5, 2e-5, 2e-4, "cosine", 0.1, 1, 128),
    ("sft", "smol"): (1e-3, 1e-3, 1e-2, "cosine", 0.1, 2, 128),
    ("dpo", "srt"): (5e-7, 5e-7, 5e-6, "cosine", 0.1, 1, 32),
    ("dpo", "tulu2"): (5e-7, 5e-7, 5e-6, "linear", 0.1, 3, 32),
    ("dpo", "tulu3"): (5e-7, 2e-7, 5e-6, "linear", 0.1, 1, 128),
    ("dpo", "zephyr"): (5e-7, 5e-7, 5e-6, "cosine", 0.1, 1, 128),
    ("dpo", "smol"): (1e-6, 1e-6, 1e-5, "cosine", 0.1, 2, 128),
    ("dpo", "apo"): (1e-6, 1e-6, 1e-5, "cosine", 0.1, 1, 32),
}
BETAS = {
    "srt": (0.01, "sigmoid"), "tulu2": (0.1, "sigmoid"), "tulu3": (5.0, "sigmoid_norm"),
    "zephyr": (0.01, "sigmoid"), "smol": (0.5, "sigmoid"), "apo": (0.05, "apo_zero"),
}  # fmt: skip


@pytest.mark.parametrize(("stage", "recipe"), [(s, r) for s in RECIPES for r in RECIPES[s]])
def test_a_recipe_has_its_published_values(stage, recipe):
    options_class = {"sft": Sft, "dpo": Dpo}[stage]
    full, large, lora, schedule, warmup, epochs, batch = EXPECTED[stage, recipe]
    chosen = choose_hyperparameters(options_class(recipe=recipe), stage, int(7e9))
    assert chosen.learning_rate == full
    assert (chosen.lr_schedule, chosen.warmup) == (schedule, warmup)
    assert (chosen.epochs, chosen.global_batch) == (epochs, batch)
    assert chosen.sources["learning_rate"]
    at_70b = choose_hyperparameters(options_class(recipe=recipe), stage, int(70e9))
    assert at_70b.learning_rate == large
    by_lora = choose_hyperparameters(options_class(recipe=recipe, method="lora"), stage, int(7e9))
    assert by_lora.learning_rate == pytest.approx(lora)
    if stage == "dpo":
        assert (chosen.beta, chosen.loss_type) == BETAS[recipe]


def test_what_is_given_wins_and_is_called_given():
    chosen = choose_hyperparameters(Sft(learning_rate=3e-4, warmup=0.0), "sft", None)
    assert (chosen.learning_rate, chosen.warmup) == (3e-4, 0.0)
    assert chosen.sources["learning_rate"] == chosen.sources["warmup"] == "given"
    assert chosen.sources["epochs"] == "SRT paper (arXiv 2406.07168), section 4.1"
    assert chosen.sources["lora_r"].startswith("srt's choice; SRT paper")
    dpo = choose_hyperparameters(Dpo(), "dpo", None).sources
    assert dpo["beta"].startswith("SRT paper")
    assert dpo["global_batch"].startswith("srt's choice")


def test_the_manifest_holds_the_values_and_the_next_run_is_held_to_them(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    line = ("sft", "--model", tiny_model, "--critic-check", 0, "--global-batch", 4)
    assert srt(*line, "--recipe", "zephyr", "--samples", 0).code == 0
    settings = json.loads((tmp_path / "models/sft/run.json").read_text())["settings"]
    assert settings["learning_rate"] == 2e-5
    assert (settings["epochs"], settings["warmup"], settings["lr_schedule"]) == (1, 0.1, "cosine")
    other = srt(*line, "--recipe", "tulu3")
    assert other.code == 1
    assert "--learning-rate was 2e-05, now 5e-06" in other.stderr


def test_a_recipe_without_the_stage_is_refused(srt, tmp_path, tiny_model):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    finished = srt("sft", "--model", tiny_model, "--recipe", "apo")
    assert finished.code == 2
    assert "--recipe apo has no sft stage. Choose one of srt, tulu2" in finished.stderr


def test_a_small_model_gets_advice_and_a_large_one_none(srt, tmp_path, tiny_model):
    assert advise_on_size(Sft(), "sft", int(7e9)) is None
    assert advise_on_size(Sft(learning_rate=1e-3), "sft", int(1e6)) is None
    assert advise_on_size(Sft(recipe="smol"), "sft", int(1e6)) is None
    assert advise_on_size(Dpo(recipe="apo"), "dpo", int(1e6)) is None  # its rate is as high
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(4))
    finished = srt("dpo", "--model", tiny_model)
    assert "trains such models at 1e-06 (--recipe smol)" in finished.stderr


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("adam_beat2=0.9", "SFTConfig has no such field. Did you mean adam_beta2?"),
        ("learning_rate=1", "--set learning_rate: --learning-rate decides this."),
        ("adam_beta2=much", "--set adam_beta2=much: the value is not float."),
        ("adam_beta2", "--set adam_beta2: write KEY=VALUE."),
        ("push_to_hub=true", "--set push_to_hub: --push-to-hub decides this."),
        ("hub_model_id=me/mine", "--set hub_model_id: --push-to-hub decides this."),
    ],
)
def test_a_field_that_cannot_be_set_is_refused_before_any_work(
    srt, tmp_path, tiny_model, given, message
):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(4))
    finished = srt("sft", "--model", tiny_model, "--set", given)
    assert finished.code == 2
    assert message in finished.stderr
    assert not (tmp_path / "models").exists()
