"""Training in two processes on a CPU: the same run as in one, started, stopped and refused rightly."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import read_jsonl, write_jsonl
from safetensors.torch import load_file
from test_dpo import pair_rows
from test_sft import feedback_rows

from srt_cli.errors import SrtError, UsageError
from srt_cli.training import processes
from srt_cli.training.setup import divide_batch

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "COLUMNS": "200", "PYTHONPATH": str(ROOT),
}  # fmt: skip
COMMANDS = {
    "sft-full": ("sft", "--method", "full"),
    "sft-lora": ("sft", "--method", "lora"),
    "dpo-full": ("dpo", "--method", "full"),
    "dpo-lora": ("dpo", "--method", "lora"),
}
SEVERAL = """
import contextlib, json, sys
from srt_cli import cli
from srt_cli.training.processes import run_together

def run_all():
    for line in json.load(open("lines.json")):
        sys.argv = ["srt", *line]
        with contextlib.suppress(SystemExit):
            cli.main()

run_together(run_all)
"""


def line_of(name, model, out):
    command, *method = COMMANDS[name]
    line = [command, "--model", model, "--out", out, "--global-batch", 8, "--micro-batch", 2]
    line += ["--epochs", 2, "--learning-rate", 1e-2, *method]
    line += ["--critic-check", 0, "--samples", 0] if command == "sft" else ["--beta", 0.1]
    return [str(word) for word in line]


def run_line(*line, folder, **more):
    return subprocess.run(
        [sys.executable, *map(str, line)], cwd=folder, env=os.environ | ENVIRONMENT,
        capture_output=True, text=True, **more,
    )  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory, tiny_model):
    folder = tmp_path_factory.mktemp("processes")
    # 20 rows at 8 a step: the last step of an epoch is a short one.
    write_jsonl(folder / "feedback.jsonl", feedback_rows(20))
    write_jsonl(folder / "prefs.jsonl", pair_rows(16))
    return folder


@pytest.fixture(scope="module")
def stopped(folder, tiny_model):
    """`srt sft --num-processes 2`, sent a SIGTERM in its second step."""
    line = [*line_of("sft-lora", tiny_model, "stopped"), "--lora-dropout", "0.1"]
    srt = subprocess.Popen(
        [sys.executable, "-m", "srt_cli", *line, "--num-processes", "2"], cwd=folder,
        env=os.environ | ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    metrics = folder / "stopped/metrics.jsonl"
    while srt.poll() is None and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.02)
    srt.send_signal(signal.SIGTERM)
    stdout, stderr = srt.communicate()
    steps = len(read_jsonl(metrics))
    saved = sorted(path.name for path in (folder / "stopped/checkpoints").glob("checkpoint-*"))
    manifest = json.loads((folder / "stopped/run.json").read_text())
    return srt.returncode, stdout, stderr, steps, saved, manifest


@pytest.fixture(scope="module")
def two(folder, stopped, tiny_model):
    """Each training in two processes, in one start of torchrun, for imports take longest."""
    lines = [line_of(name, tiny_model, f"two/{name}") for name in COMMANDS]
    dropout = ["--lora-dropout", "0.1"]
    lines += [line_of("sft-lora", tiny_model, out) + dropout for out in ("stopped", "straight")]
    (folder / "lines.json").write_text(json.dumps(lines))
    (folder / "several.py").write_text(SEVERAL)
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2)
    done = run_line(*torchrun, "several.py", folder=folder)
    assert done.returncode == 0, done.stderr
    return done


@pytest.mark.parametrize("name", COMMANDS)
def test_two_processes_train_as_one(name, two, srt, folder, tiny_model, monkeypatch):
    monkeypatch.chdir(folder)
    finished = srt(*line_of(name, tiny_model, f"one/{name}"))
    assert finished.code == 0, finished.stderr
    alone, together = (read_jsonl(folder / n / name / "metrics.jsonl") for n in ("one", "two"))
    assert len(alone) == len(together) == (6 if "sft" in name else 4)
    for one, other in zip(alone, together, strict=True):
        assert one["loss"] == pytest.approx(other["loss"], rel=1e-6)
        assert one["learning_rate"] == other["learning_rate"]
    weights = [load_file(folder / n / name / "model.safetensors") for n in ("one", "two")]
    start = load_file(tiny_model / "model.safetensors")
    moved = max(float((weights[0][key] - start[key]).abs().max()) for key in start)
    apart = max(float((weights[0][key] - weights[1][key]).abs().max()) for key in start)
    assert moved > 1e-3
    # Adam makes steps of the rounding in gradients that are nearly zero.
    assert apart < 3e-6


def test_only_the_main_process_speaks_and_writes(two, folder):
    results = [line for line in two.stdout.splitlines() if "a model" in line]
    assert len(results) == len(COMMANDS) + 2
    for line in ("20 sequences, ", "4 steps in", "reference: "):
        assert (
            two.stderr.count(line) == {"20 sequences, ": 4, "4 steps in": 2, "reference: ": 2}[line]
        )
    files = {path.name for path in (folder / "two/dpo-full").iterdir()}
    assert files == {
        "README.md", "chat_template.jinja", "config.json", "generation_config.json",
        "metrics.jsonl", "model.safetensors", "run.json", "samples.jsonl", "tokenizer.json",
        "tokenizer_config.json", "training.html",
    }  # fmt: skip
    manifest = json.loads((folder / "two/dpo-full/run.json").read_text())
    assert manifest["status"] == "complete"


def test_sigterm_to_the_launcher_saves_one_checkpoint_and_exits_130(stopped):
    code, stdout, stderr, steps, saved, manifest = stopped
    assert code == 130, stderr
    assert stdout == ""
    assert stderr.count("stopping after this step, with a checkpoint") == 1
    assert "Traceback" not in stderr
    assert saved == [f"checkpoint-{steps}"]
    assert manifest["status"] == "interrupted"
    assert manifest["progress"] == f"{steps} of 6 steps"


def test_resumed_in_two_processes_equals_straight(two, stopped, folder):
    assert stopped[3] < 6
    assert f"going on from step {stopped[3]} " in two.stderr
    resumed, straight = (folder / name / "model.safetensors" for name in ("stopped", "straight"))
    assert resumed.read_bytes() == straight.read_bytes()


def test_an_error_of_the_main_process_ends_all_with_one_message_and_its_code(folder, tiny_model):
    line = line_of("sft-full", tiny_model, "refused")
    line[line.index("--global-batch") + 1] = "7"
    done = run_line("-m", "srt_cli", *line, "--num-processes", 2, folder=folder)
    assert done.returncode == 2
    assert done.stderr == (
        "error: --global-batch 7 cannot be shared evenly by 2 processes. Choose a multiple of 2, "
        "such as 6, or another number of processes.\n"
    )


@pytest.mark.parametrize(
    ("step", "micro", "processes", "rows"),
    [(32, 8, 1, 8), (32, 3, 1, 2), (12, 8, 1, 6), (32, 8, 8, 4), (4, 8, 1, 4), (7, 2, 1, 1)],
)
def test_a_step_has_exactly_the_rows_of_the_global_batch(step, micro, processes, rows, capsys):
    assert divide_batch(step, micro, processes) == rows
    assert step % (rows * processes) == 0
    said = "rows a forward pass instead of" in capsys.readouterr().err
    assert said == (rows < micro)


def test_a_global_batch_that_the_processes_cannot_share_is_refused():
    with pytest.raises(UsageError, match="Choose a multiple of 8, such as 24"):
        divide_batch(30, 2, 8)
    with pytest.raises(UsageError, match="1 or more"):
        divide_batch(4, 0, 1)


def test_an_unknown_configuration_is_refused_with_the_nearest(srt, tmp_path):
    finished = srt("sft", "--model", "m", "--accelerate-config", "zero33")
    assert finished.code == 2
    assert finished.stderr == (
        "error: --accelerate-config zero33: neither one of fsdp2, multi_gpu, zero2, zero3 nor a file. "
        "Did you mean zero3?\n"
    )


def test_a_file_that_accelerate_refuses_is_named_with_its_reason(srt, tmp_path):
    (tmp_path / "odd.yaml").write_text("distributed_type: FSDP\nnum_proceses: 2\n")
    finished = srt("dpo", "--model", "m", "--accelerate-config", "odd.yaml")
    assert finished.code == 1
    assert finished.stderr.startswith("error: odd.yaml: accelerate refuses it (")
    assert "num_proceses" in finished.stderr
    (tmp_path / "text.yaml").write_text("just: [text")
    assert "accelerate refuses it" in srt("sft", "--accelerate-config", "text.yaml").stderr


def test_a_configuration_for_gpus_is_refused_where_there_are_none(srt, monkeypatch):
    monkeypatch.setattr(processes, "count_gpus", lambda: 0)
    finished = srt("sft", "--model", "m", "--accelerate-config", "fsdp2")
    assert finished.code == 2
    assert "needs GPUs, and this machine has none" in finished.stderr


def test_more_processes_than_gpus_are_refused(srt, monkeypatch):
    monkeypatch.setattr(processes, "count_gpus", lambda: 2)
    for more in ((), ("--accelerate-config", "fsdp2")):
        finished = srt("sft", "--model", "m", "--num-processes", 8, *more)
        assert finished.code == 2
        assert "--num-processes 8: this machine has 2 GPUs" in finished.stderr
    assert (
        srt("sft", "--num-processes", 0).stderr == "error: --num-processes 0: must be 1 or more.\n"
    )


def test_a_launcher_that_started_another_number_is_contradicted(srt, monkeypatch):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    finished = srt("sft", "--num-processes", 4)
    assert finished.code == 2
    assert "--num-processes 4 contradicts the launcher, which started 2" in finished.stderr


def test_a_launcher_that_started_but_one_process_is_noticed_not_started_again(srt, monkeypatch):
    """`accelerate launch --cpu` does so."""
    monkeypatch.setenv("SRT_PROCESSES", "2")
    finished = srt("sft", "--num-processes", 2)
    assert finished.code == 2
    assert "--num-processes 2 contradicts the launcher, which started 1" in finished.stderr


SHIPPED = {
    "multi_gpu": DistributedType.MULTI_GPU,
    "fsdp2": DistributedType.FSDP,
    "zero2": DistributedType.DEEPSPEED,
    "zero3": DistributedType.DEEPSPEED,
}


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configurations_are_what_accelerates_parser_reads(name):
    assert {path.stem for path in processes.SHIPPED.glob("*.yaml")} == set(SHIPPED)
    config = processes.read_config(processes.find_config(name))
    assert config.distributed_type == SHIPPED[name]
    assert config.mixed_precision == "bf16"
    assert not config.use_cpu
    if name == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
        assert config.fsdp_config["fsdp_activation_checkpointing"]
        assert config.fsdp_config["fsdp_cpu_ram_efficient_loading"]
        assert config.fsdp_config["fsdp_state_dict_type"] == "FULL_STATE_DICT"
    if name == "zero3":
        assert config.deepspeed_config["zero3_init_flag"]
        assert config.deepspeed_config["zero3_save_16bit_model"]


@pytest.mark.parametrize("name", SHIPPED)
def test_accelerate_passes_the_shipped_configurations_on_to_the_processes(name, monkeypatch):
    """Up to the environment that the processes would see, by accelerate's own launcher."""
    from accelerate.commands import launch as accelerates
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    monkeypatch.setattr(sys, "argv", ["srt", "sft", "--epochs", "1"])
    started = {}
    for launcher in ("multi_gpu_launcher", "deepspeed_launcher"):
        monkeypatch.setattr(
            accelerates, launcher, lambda arguments, by=launcher: started.update({by: arguments})
        )
    processes._with_accelerate(processes.find_config(name), 4)()
    ((launcher, arguments),) = started.items()
    assert arguments.num_processes == 4
    assert arguments.training_script == "srt_cli"
    assert arguments.module
    assert arguments.training_script_args == ["sft", "--epochs", "1"]
    if launcher == "deepspeed_launcher":
        _, environment = prepare_deepspeed_cmd_env(arguments)
        assert environment["ACCELERATE_USE_DEEPSPEED"] == "true"
        assert environment["ACCELERATE_DEEPSPEED_ZERO_STAGE"] == name[-1]
    else:
        environment = prepare_multi_gpu_env(arguments)
        assert (environment.get("ACCELERATE_USE_FSDP") == "true") == (name == "fsdp2")


@pytest.mark.parametrize("adapters", [False, True])
def test_gathered_weights_make_an_ordinary_model_again(adapters, tiny_model):
    """What FSDP and ZeRO-3 hand over is a dictionary of whole tensors; which is all this needs."""
    from peft import get_peft_model
    from transformers import AutoModelForCausalLM

    from srt_cli.training.saving import rebuild
    from srt_cli.training.setup import Adapters, lora_config

    kind = Adapters(r=4, alpha=8, dropout=0.0, dora=False, rslora=False) if adapters else None
    model = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    if kind is not None:
        model = get_peft_model(model, lora_config(kind))
    for weight in model.parameters():
        weight.data += 0.01
    gathered = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    ids = torch.arange(20).reshape(2, 10)
    again = rebuild(model, gathered, kind)
    assert torch.equal(again(ids).logits, model(ids).logits)
    gathered.popitem()
    lacking = next(name for name in gathered if "q_proj" in name)
    del gathered[lacking]
    with pytest.raises(SrtError, match="the gathered weights lack"):
        rebuild(model, gathered, kind)
