"""The plan before a training: what it shows, that it writes nothing, and that its figures hold."""

import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import read_jsonl, write_jsonl
from test_dpo import pair_rows
from test_sft import feedback_rows

MEASURE = """
import json, os, sys
from srt_cli import cli
import srt_cli.training.dpo as dpo, srt_cli.training.sft as sft

def of_status(name):
    lines = open("/proc/self/status").read().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(name))) * 1024

def of_weights():
    kilobytes, path = 0, ""
    for line in open("/proc/self/smaps"):
        key, *rest = line.split()
        if not key.endswith(":"):
            path = rest[-1]
        elif key == "Rss:" and path.endswith(".safetensors"):
            kilobytes += int(rest[0])
    return kilobytes * 1024

def measured(train):
    def measure(*args, **kwargs):
        trained = train(*args, **kwargs)
        # Of what is mapped from files weights alone count: a fork finds its libraries' pages anew.
        files = of_status("RssFile") - of_weights()
        print("peak", of_status("VmHWM") - files - before, flush=True)
        os._exit(0)
    return measure

sft.train, dpo.train = measured(sft.train), measured(dpo.train)
for asked in sys.stdin:
    if os.fork() == 0:
        folder, *line = json.loads(asked)
        os.chdir(folder)
        sys.argv = ["srt", *line]
        before = of_status("RssAnon")
        sys.exit(cli.main() or "the training did not start")
    if os.wait()[1]:
        sys.exit(1)
"""


@pytest.fixture
def data(tmp_path):
    write_jsonl(tmp_path / "feedback.jsonl", feedback_rows(24))
    write_jsonl(tmp_path / "prefs.jsonl", pair_rows(24))


def files_in(folder):
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_the_plan_of_sft_names_rows_tokens_values_memory_and_steps(srt, data, tmp_path, tiny_model):
    rows = [*feedback_rows(24), feedback_rows(1, id="x", status="unparsed", feedback=None)[0]]
    write_jsonl(tmp_path / "feedback.jsonl", rows)
    before = files_in(tmp_path)
    line = ("--model", tiny_model, "--epochs", 2, "--global-batch", 8, "--learning-rate", 1e-3)
    plan = srt("sft", *line, "--dry-run", "--eval-split", 0.3)
    assert plan.code == 0, plan.stderr
    assert files_in(tmp_path) == before
    assert re.search(r"read +25\b", plan.stdout)
    assert re.search(r"dropped: unparsed +1\b", plan.stdout)
    for part in ("prompt", "response", "feedback", "refinement", "whole row"):
        assert re.search(rf"^ *{part} +\d+", plan.stdout, re.MULTILINE)
    assert re.search(r"learning_rate +0.001 +given", plan.stdout)
    assert re.search(r"warmup +0.1 +SRT paper", plan.stdout)
    assert "lora_r" not in plan.stdout
    for part in (
        "weights",
        "gradients",
        "optimizer",
        "activations",
        "together",
        "free on this cpu",
    ):
        assert re.search(rf"{part} +\d+\.\d\d", plan.stdout)
    done = srt("sft", *line, "--eval-split", 0.3, "--critic-check", 0, "--samples", 0)
    assert done.code == 0, done.stderr
    steps = sum("loss" in row for row in read_jsonl(tmp_path / "models/sft/metrics.jsonl"))
    assert f"{steps} steps: 2 epochs of" in plan.stdout
    before = files_in(tmp_path)
    again = srt("sft", *line, "--dry-run", "--eval-split", 0.3)
    assert again.code == 0
    assert "trained already under these settings" in again.stderr
    other = ("sft", *line, "--dry-run", "--eval-split", 0.5)
    refused = srt(*other)
    assert refused.code == 1
    assert "--eval-split was 0.3, now 0.5" in refused.stderr
    assert "together" in refused.stdout
    assert srt(*other, "--overwrite").code == 0
    assert files_in(tmp_path) == before


def test_the_plan_of_dpo_leaves_nothing_behind_not_even_with_a_probe(
    srt, data, tmp_path, tiny_model, monkeypatch
):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(scratch))
    before = files_in(tmp_path)
    plan = srt("dpo", "--model", tiny_model, "--dry-run", "--probe", "--global-batch", 8)
    assert plan.code == 0, plan.stderr
    assert files_in(tmp_path).keys() == before.keys()
    assert re.search(
        r"about [\d.]+ s \([\d.]+ s of it for the reference's log-probs\), at [\d,]+ tokens/s "
        r"\(measured in [\d.]+ s of real steps\)",
        plan.stdout,
    )
    for part in ("prompt", "chosen", "rejected"):
        assert re.search(rf"^ *{part} +\d+", plan.stdout, re.MULTILINE)
    assert re.search(r"reference \(its log-probs are computed beforehand\) +0.00", plan.stdout)
    assert re.search(r"beta +0.01 +SRT paper", plan.stdout)


@pytest.mark.parametrize(
    ("global_batch", "said"),
    [
        (64, "1 step: 1 epoch of 1, each of 24 rows in 12 forward passes"),
        (16, "2 steps: 1 epoch of 2, each of up to 16 rows in 8 forward passes"),
        (8, "3 steps: 1 epoch of 3, each of 8 rows in 4 forward passes"),
        (2, "12 steps: 1 epoch of 12, each of 2 rows in 1 forward pass\n"),
    ],
)
def test_the_plan_says_what_a_step_really_takes(srt, data, tiny_model, global_batch, said):
    plan = srt("dpo", "--model", tiny_model, "--dry-run", "--epochs", 1, "--global-batch",
               global_batch, "--micro-batch", 2)  # fmt: skip
    assert said in plan.stdout


def test_masks_are_shown_between_brackets_without_colour(srt, data, tiny_model):
    line = ("sft", "--model", tiny_model, "--dry-run", "--show-masks", 1)
    plan = srt(*line, "--loss-on", "response,refinement")
    assert "⟦response: It is 0.<|im_end|>⟧" in plan.stdout
    assert "⟦refinement: \n\n### Improved Response\nIt is the number 0 in words.<|im_end|>⟧" in (
        plan.stdout
    )
    assert "⟦feedback" not in plan.stdout
    assert "\x1b[" not in plan.stdout
    pairs = srt("dpo", "--model", tiny_model, "--dry-run", "--show-masks", 1)
    assert "⟦chosen: It is the number 0 in words.<|im_end|>⟧" in pairs.stdout
    assert "⟦rejected: It is 0.<|im_end|>⟧" in pairs.stdout


def test_the_plan_counts_what_exceeds_the_length_where_a_run_refuses(
    srt, data, tmp_path, tiny_model
):
    long = feedback_rows(1, id="long", response="word " * 300)[0]
    write_jsonl(tmp_path / "feedback.jsonl", [*feedback_rows(4), long])
    plan = srt("sft", "--model", tiny_model, "--dry-run", "--max-length", 200)
    assert plan.code == 0, plan.stderr
    assert "1 rows exceed --max-length 200: a run would refuse them. Raise" in plan.stdout


def test_preferences_of_another_model_are_warned_of(srt, data, tmp_path, tiny_model):
    for name, settings in {"prefs": {}, "self-feedback": {"model": "models/other"}}.items():
        manifest = {"command": "x", "settings": settings, "runtime": {}}
        if name == "prefs":
            manifest["inputs"] = {"data": {"path": "self-feedback.jsonl"}}
        (tmp_path / f"{name}.run.json").write_text(json.dumps(manifest))
    plan = srt("dpo", "--model", tiny_model, "--dry-run")
    assert "prefs.jsonl holds answers of models/other" in plan.stderr


# --- Memory ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def middle_model(tiny_model, tmp_path_factory) -> Path:
    """A Llama of six layers and 26M random parameters: big enough for its memory to be measured."""
    sizes = {"hidden_size": 512, "intermediate_size": 1408, "num_hidden_layers": 6}
    return random_llama(tiny_model, tmp_path_factory.mktemp("middle") / "model", sizes)


@pytest.fixture(scope="module")
def small_model(tiny_model, tmp_path_factory) -> Path:
    """A Llama of four layers and 6M random parameters, whose passes take a while."""
    sizes = {"hidden_size": 320, "intermediate_size": 1024, "num_hidden_layers": 4}
    return random_llama(tiny_model, tmp_path_factory.mktemp("small") / "model", sizes)


def random_llama(tiny_model, folder, sizes) -> Path:
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from srt_cli.models.weights import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        num_attention_heads=8,
        num_key_value_heads=4,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **sizes,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def peak_of():
    """The peak memory of a line's training, in a process forked from one that holds the libraries."""
    with subprocess.Popen(
        [sys.executable, "-c", MEASURE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    ) as process:  # fmt: skip

        def peak(folder: Path, *line: str) -> int:
            print(json.dumps([str(folder), *line]), file=process.stdin, flush=True)
            said = (re.match(r"peak (\d+)", words) for words in process.stdout)
            return int(next(found[1] for found in said if found))

        yield peak


@pytest.mark.parametrize(("command", "method"), [("sft", "full"), ("sft", "lora"), ("dpo", "full")])
def test_the_estimate_is_within_a_quarter_of_the_real_peak(
    srt, tmp_path, middle_model, peak_of, command, method
):
    words = "several words of an answer that goes on " * 8
    feedback = feedback_rows(4, response=words, refinement=words)
    write_jsonl(tmp_path / "feedback.jsonl", feedback)
    pairs = [row | {"chosen": [{"role": "assistant", "content": words}]} for row in pair_rows(4)]
    write_jsonl(tmp_path / "prefs.jsonl", pairs)
    # Two steps: the optimizer's moments are there from the end of the first on.
    line = [command, "--model", str(middle_model), "--method", method, "--epochs", "2",
            "--global-batch", "4", "--micro-batch", "2", "--samples", "0"]  # fmt: skip
    plan = srt(*line, "--dry-run")
    estimated = float(re.search(r"together +(\d+\.\d\d)", plan.stdout)[1]) * 2**30
    assert estimated == pytest.approx(peak_of(tmp_path, *line), rel=0.25)


def test_checkpointing_is_chosen_only_where_memory_needs_it(tiny_model):
    from dataclasses import replace

    from srt_cli.stages.sft import Sft
    from srt_cli.training import memory
    from srt_cli.training.memory import LargestPass, estimate_memory
    from srt_cli.training.setup import set_up

    setup, largest = set_up(Sft(), "sft", str(tiny_model)), LargestPass(8, 1024, 4)
    decided = {}
    with pytest.MonkeyPatch.context() as patch:
        for free in (2**40, 2**20):
            patch.setattr(memory, "available_memory", lambda setup, free=free: free)
            decided[free] = memory.fit(setup, largest)
    roomy, tight = decided[2**40], decided[2**20]
    assert not roomy.setup.place.checkpointing
    assert roomy.setup.place.keeps_freed
    assert tight.setup.place.checkpointing
    assert not tight.setup.place.keeps_freed
    assert not tight.fits
    assert tight.memory.activations < roomy.memory.activations
    assert "GiB without it, and 1024.0 are free" in roomy.setup.place.checkpointing_reason
    on_gpu = replace(setup.place.placement, device="cuda")
    place = replace(setup.place, placement=on_gpu, bf16=True)
    gpu = estimate_memory(replace(setup, place=place), largest)
    assert 0 < gpu.activations < roomy.memory.activations


KEEPING = """
import resource, sys, torch
from srt_cli.training.memory import keep_freed_memory

def faults_of(steps):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(steps):
        blocks = [torch.ones(size << 18) for size in (100, 50, 30)]  # 180 MiB
        del blocks
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

if "keep" in sys.argv:
    keep_freed_memory()
faults_of(2)
print(faults_of(4))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="glibc's mallopt")
def test_what_a_step_frees_is_not_cleared_again_for_the_next():
    line = [sys.executable, "-c", KEEPING]
    given_back, kept = (
        int(subprocess.run([*line, *flag], capture_output=True, text=True, check=True).stdout)
        for flag in ([], ["keep"])
    )
    assert given_back > 4 * 150 * 2**20 / 4096  # pages of most of it, in each of four steps
    assert kept < given_back / 5


def test_the_parts_of_memory_follow_from_the_number_of_parameters(tiny_model, monkeypatch):
    from srt_cli.stages.dpo import Dpo
    from srt_cli.training import setup
    from srt_cli.training.memory import LargestPass, estimate_memory
    from srt_cli.training.setup import count_parameters, decide_training_place

    # An estimate needs no bitsandbytes.
    parameters = count_parameters(str(tiny_model))
    place = decide_training_place(Dpo(), parameters)
    monkeypatch.setattr(setup, "decide_training_place", lambda *_: place)

    def estimate(**options):
        made = setup.set_up(Dpo(**options), "dpo", str(tiny_model))
        return estimate_memory(made, LargestPass(1, 16))

    full = estimate()
    assert (full.weights, full.gradients) == (4 * parameters, 4 * parameters)
    assert full.optimizer == 8 * parameters
    assert full.reference == 0
    assert estimate(set=("precompute_ref_log_probs=false",)).reference == 4 * parameters
    assert estimate(set=("optim=adamw_8bit",)).optimizer == 2 * parameters
    lora = estimate(method="lora", lora_r=4, lora_alpha=8)
    assert lora.gradients == lora.weights - 4 * parameters
    four_bit = estimate(method="qlora", lora_r=4, lora_alpha=8)
    assert four_bit.weights == pytest.approx(0.56 * parameters + lora.gradients, rel=0.01)


# --- Time --------------------------------------------------------------------------------------


@pytest.fixture
def processor_time(monkeypatch):
    """Clocks that stand still while other programs have the processor."""
    from srt_cli.training import dpo, loop, probe

    for module in (dpo, loop, probe):
        monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=time.process_time))


@pytest.mark.parametrize("command", ["sft", "dpo"])
def test_the_time_is_within_a_quarter_of_the_real_training(
    srt, tmp_path, small_model, command, processor_time
):
    """Steps of 8 passes, where the probe's have 2, and rows of many lengths, the shortest first."""
    words = "several words of an answer that goes on "
    write_jsonl(
        tmp_path / "feedback.jsonl",
        [
            feedback_rows(1, id=str(n), prompt=f"p {n}", response=words * (1 + n // 4))[0]
            for n in range(32)
        ],
    )
    write_jsonl(
        tmp_path / "prefs.jsonl",
        [
            row | {"chosen": [{"role": "assistant", "content": words * (1 + n // 4)}]}
            for n, row in enumerate(pair_rows(16))
        ],
    )
    line = [command, "--model", small_model, "--epochs", 1, "--global-batch", 8, "--micro-batch", 1,
            "--samples", 0, "--out", "model"]  # fmt: skip
    line += ["--packing", "off", "--critic-check", 0] if command == "sft" else []
    ratios: list[float] = []
    while len(ratios) < 3 and not (ratios and within_a_quarter(ratios[0])):
        plan = srt(*line, "--dry-run", "--probe")
        assert plan.code == 0, plan.stderr
        estimated = float(re.search(r"about ([\d.]+) s", plan.stdout)[1])
        done = srt(*line, "--overwrite")
        assert done.code == 0, done.stderr
        real = sum(row.get("seconds", 0) for row in read_jsonl(tmp_path / "model/metrics.jsonl"))
        tallies = json.loads((tmp_path / "model/run.json").read_text())["tallies"]
        ratios.append(estimated / (real + tallies.get("reference_seconds", 0)))
    assert within_a_quarter(statistics.median(ratios)), ratios


def within_a_quarter(ratio):
    return 0.75 <= ratio <= 1.25


def test_a_model_without_sdpa_is_planned_and_trained_with_what_it_has(
    srt, data, tmp_path, tiny_model
):
    from transformers import MambaConfig, MambaForCausalLM

    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "state_size": 4}
    save_like(
        tiny_model, tmp_path / "mamba", MambaForCausalLM, MambaConfig(**sizes, vocab_size=2048)
    )
    line = ("dpo", "--model", "mamba", "--limit", 2, "--samples", 0)
    plan = srt(*line, "--dry-run")
    assert plan.code == 0, plan.stderr
    assert "memory of a step" in plan.stdout
    finished = srt(*line)
    assert finished.code == 0, finished.stderr
    manifest = json.loads((tmp_path / "models/dpo/run.json").read_text())
    assert manifest["models"]["policy"]["attention"] == "eager"
    # Rows of one pack would not be apart: its state knows no mask.
    line = ("sft", "--model", "mamba", "--limit", 2, "--dry-run")
    assert "rows are not packed: this model would carry its state from one" in srt(*line).stdout
    refused = srt(*line, "--packing", "bfd")
    assert refused.code == 2
    assert "--packing bfd: this model would carry its state" in refused.stderr


def test_adapters_that_leave_the_experts_out_say_so(srt, data, tmp_path, tiny_model):
    from transformers import Qwen2MoeConfig, Qwen2MoeForCausalLM

    config = Qwen2MoeConfig(
        vocab_size=2048, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, num_key_value_heads=2, moe_intermediate_size=16,
        shared_expert_intermediate_size=16, num_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    save_like(tiny_model, tmp_path / "moe", Qwen2MoeForCausalLM, config)
    line = ("sft", "--model", "moe", "--dry-run")
    adapters = srt(*line, "--method", "lora")
    assert adapters.code == 0, adapters.stderr
    said = "are no linear layers and get no adapters: --method lora trains the other layers alone."
    assert said in adapters.stderr
    assert "get no adapters" not in srt(*line).stderr


def save_like(tiny_model, folder, kind, config):
    from srt_cli.models.weights import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model))
    config.pad_token_id = tokenizer.pad_token_id
    kind(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
