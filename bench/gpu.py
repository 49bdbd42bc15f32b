"""What one NVIDIA card makes of `srt`, in under eight minutes: `python bench/gpu.py`.

Each part is a process of its own with its own time limit and line of result; a part that fails leaves
the others. Weights are random, and nothing is fetched. The end is a table, and `gpu.json`. `--tiny`
runs every part on two layers, on a CPU too, so that nothing here is broken when a card is at hand.
"""

import argparse
import contextlib
import gc
import hashlib
import io
import json
import os
import platform
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, Final

from generate import Transformers, prompts
from train import PAIRS, SENTENCE, feedback_row, pair_row, write

from srt_cli import cli, console
from srt_cli.models import ModelOptions, Request
from srt_cli.records import Message

ALL_SECONDS: Final = 470.0
GIB: Final = 2**30
TOKENIZER: Final = Path(__file__).parents[1] / "tests" / "tiny_tokenizer"
PACKAGES: Final = (
    "torch", "transformers", "trl", "accelerate", "peft", "flash-attn", "kernels", "bitsandbytes",
    "deepspeed", "liger-kernel",
)  # fmt: skip
PEAK_FLOPS: Final = {"H100": 989e12, "H200": 989e12, "A100": 312e12, "L40S": 362e12, "4090": 165e12}
"""Dense bfloat16, from the vendor's data sheets; TRL's own table is asked first."""
PROGRAMS: Final = """
from srt_cli.records import Feedback

def critique(prompt, response):
    return Feedback(weaknesses="Dull.", suggestions="Spirit.", score=4), response + "!"

def check(prompt, response):
    return len(response) % 2 == 0
"""


@dataclass(frozen=True)
class Shape:
    """A Llama of random weights."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    kv_heads: int
    vocabulary: int | None = None
    """As large as the tokenizer's, if it is not given."""


TWO_LAYERS: Final = Shape(32, 64, 2, 4, 2)
ONE_B: Final = Shape(2048, 8192, 16, 32, 8, 32_768)
EIGHT_B: Final = Shape(4096, 14_336, 32, 32, 8, 32_768)


@dataclass(frozen=True)
class Bench:
    """Where a part works, and how large."""

    folder: Path
    tiny: bool

    def shape(self, shape: Shape) -> Shape:
        """The one that is asked for, or two layers."""
        return TWO_LAYERS if self.tiny else shape

    def size(self, real: int, tiny: int) -> int:
        """A number of rows or tokens."""
        return tiny if self.tiny else real


Figures = dict[str, Any]


# --- what parts share -------------------------------------------------------------------------


def make_model(bench: Bench, shape: Shape) -> Path:
    """A directory of random weights with the tests' tokenizer."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from srt_cli.models.weights import load_tokenizer

    folder = bench.folder / f"model-{shape.hidden}"
    if (folder / "config.json").is_file():
        return folder
    tokenizer = load_tokenizer(str(TOKENIZER))
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=shape.vocabulary or len(tokenizer), hidden_size=shape.hidden,
        intermediate_size=shape.intermediate, num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads, num_key_value_heads=shape.kv_heads,
        max_position_embeddings=8192, tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=torch.float32 if bench.tiny else torch.bfloat16
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model
    free()
    return folder


def free() -> None:
    """Give back what the last step held, and forget its peak."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_gib() -> float:
    """The peak of the card's memory since `free`; without one, of this process's."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / GIB
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def srt(*line: object, expect: tuple[int, ...] = (0,)) -> str:
    """Run an `srt` line in this process; its stdout. Raises RuntimeError for another exit code."""
    sys.argv = ["srt", *map(str, line)]
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said):
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 1
    if code not in expect:
        raise RuntimeError(f"srt {line[0]} ended with {code}")
    return said.getvalue()


def trained(line: list[object], out: Path) -> Figures:
    """Train, and compare with the plan: tokens/s, MFU, memory."""
    import torch

    plan = srt(*line, "--dry-run")
    estimate = re.search(r"together\W+(\d+\.\d+)", plan)
    free()
    srt(*line)
    manifest = json.loads((out / "run.json").read_text())
    training = manifest["tallies"]["training"]
    place = next(m for m in manifest["models"].values() if "attention" in m)
    weights = torch.cuda.get_device_name() if torch.cuda.is_available() else "a CPU"
    share = training["mfu"] or of_peak(line, training["tokens_per_second"])
    return {
        "tokens_per_second": round(training["tokens_per_second"]),
        "mfu": share,
        "peak_gib": round(peak_gib(), 2),
        "planned_gib": float(estimate[1]) if estimate else None,
        "attention": place["attention"],
        "bf16": place["bf16_autocast"],
        "checkpointing": place["activation_checkpointing"],
        "loss": [training["first_loss"], training["final_loss"]],
        "on": weights,
    }


def of_peak(line: list[object], rate: float) -> float | None:
    """MFU by this file's table, for a card that TRL does not know."""
    import torch

    if not torch.cuda.is_available():
        return None
    from srt_cli.training.setup import count_parameters

    peak = next((v for k, v in PEAK_FLOPS.items() if k in torch.cuda.get_device_name()), None)
    parameters = count_parameters(str(line[line.index("--model") + 1]))
    factor = 4 if "lora" in line else 6
    return None if not peak or not parameters else factor * parameters * rate / peak


def sentences_for(tokens: int) -> int:
    """How many sentences make so many tokens."""
    from srt_cli.models.weights import load_tokenizer

    return max(1, tokens // len(load_tokenizer(str(TOKENIZER))(SENTENCE)["input_ids"]))


# --- the parts --------------------------------------------------------------------------------


def machine(bench: Bench) -> Figures:
    """Card, driver, torch, packages."""
    import torch

    found: Figures = {"python": platform.python_version(), "cores": os.cpu_count()}
    for package in PACKAGES:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    if torch.cuda.is_available():
        memory = torch.cuda.get_device_properties(0).total_memory / GIB
        found |= {"card": torch.cuda.get_device_name(), "memory_gib": round(memory)}
        found["cuda"] = torch.version.cuda
    else:
        found["card"] = "none"
    if shutil.which("nvidia-smi"):
        query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        asked = subprocess.run(query, capture_output=True, text=True, timeout=20, check=False)
        found["driver"] = asked.stdout.strip().split("\n")[0]
    return found


def generation(bench: Bench) -> Figures:
    """Static `generate`, srt's static engine and continuous batching, 32 rows; memory runs out."""
    rows, new = bench.size(32, 4), bench.size(256, 12)
    name = str(make_model(bench, bench.shape(ONE_B)))
    texts = prompts(rows)
    hand = Transformers(name, new)
    encoded = [hand.encode((Message(role="user", content=text),)) for text in texts]
    hand.batch(encoded[:1])
    free()
    started = time.perf_counter()
    written = hand.batch(encoded)
    seconds = time.perf_counter() - started
    wanted = [str(hand.tokenizer.decode(row, skip_special_tokens=True)) for row in written]
    found: Figures = {
        "generate": {
            "tokens_per_second": round(sum(map(len, written)) / seconds),
            "peak_gib": round(peak_gib(), 2),
        }
    }
    del hand
    for engine in ("static", "continuous"):
        found[engine] = _by_engine(name, engine, texts, new)
        said = found[engine].pop("texts")
        # A row of ours ends when it goes round in circles, which random weights do.
        found[engine]["equal"] = sum(
            bool(one) and other.startswith(one) for one, other in zip(said, wanted, strict=True)
        )
        found[engine]["rows"] = rows
    found["out_of_memory"] = _out_of_memory(name, texts, new)
    return found


def _by_engine(name: str, engine: Any, texts: list[str], new: int) -> Figures:
    from srt_cli.models.local.local import LocalModel

    free()
    model = LocalModel(name, name, ModelOptions(engine=engine, batch_size=len(texts)))
    asked = [Request((Message(role="user", content=text),), max_tokens=new) for text in texts]
    try:
        model.submit(asked[:1])[0].result()
        started = time.perf_counter()
        replies = [future.result() for future in model.submit(asked)]
        seconds = time.perf_counter() - started
        tokens = sum(reply.usage.completion_tokens for reply in replies)
        return {
            "tokens_per_second": round(tokens / seconds),
            "peak_gib": round(peak_gib(), 2),
            "engine": str(model.describe().get("engine", engine)),
            "halvings": model._meter.halvings,
            "texts": [reply.text for reply in replies],
        }
    finally:
        model.close()


def _out_of_memory(name: str, texts: list[str], new: int) -> Figures:
    """A static batch that does not fit is halved, and every row still answered."""
    import torch

    from srt_cli.models.local import static

    free()
    generate = static.generate
    if torch.cuda.is_available():
        total = torch.cuda.get_device_properties(0).total_memory
        room = sum(file.stat().st_size for file in Path(name).glob("*.safetensors")) + GIB
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
    else:  # planted: a CPU's memory is not ours to fill

        def planted(loaded: Any, batch: Any, cancelled: Any) -> Any:
            if len(batch) > 2:
                raise torch.OutOfMemoryError("planted")
            return generate(loaded, batch, cancelled)

        static.generate = planted
    try:
        found = _by_engine(name, "static", texts * 8, new)
        return {"halvings": found["halvings"], "answered": sum(map(bool, found["texts"]))}
    finally:
        static.generate = generate
        if torch.cuda.is_available():
            torch.cuda.set_per_process_memory_fraction(1.0)


def sft(bench: Bench) -> Figures:
    """Full fine-tuning of 1B in bfloat16, packed at 4,096 tokens."""
    return _sft(bench, ONE_B, bench.size(256, 8))


def sft_lora(bench: Bench) -> Figures:
    """LoRA on 8B in bfloat16, packed at 4,096 tokens."""
    return _sft(bench, EIGHT_B, bench.size(64, 8), "--method", "lora", "--no-merge")


def _sft(bench: Bench, shape: Shape, rows: int, *more: object) -> Figures:
    model = make_model(bench, bench.shape(shape))
    data, out = bench.folder / "rows.jsonl", bench.folder / f"sft-{shape.hidden}"
    sentences = sentences_for(bench.size(900, 20))
    write(data, [feedback_row(number, sentences) for number in range(rows)])
    line: list[object] = [
        "sft", "--data", data, "--model", model, "--out", out, "--overwrite", "--epochs", 1,
        "--packing", "bfd", "--micro-batch", bench.size(4, 2), "--global-batch", bench.size(16, 4),
        "--samples", 0, "--critic-check", 0, *more,
    ]  # fmt: skip
    return trained(line, out)


def dpo(bench: Bench) -> Figures:
    """DPO of 1B in bfloat16, the reference's log-probs beforehand."""
    model = make_model(bench, bench.shape(ONE_B))
    data, out = bench.folder / "pairs.jsonl", bench.folder / "dpo"
    long = SENTENCE * sentences_for(bench.size(900, 20))
    pairs = [pair_row(number) for number in range(bench.size(64, PAIRS))]
    for pair in pairs:
        for side in ("chosen", "rejected"):
            pair[side][0]["content"] += long
    write(data, pairs)
    line: list[object] = [
        "dpo", "--prefs", data, "--model", model, "--out", out, "--overwrite", "--epochs", 1,
        "--micro-batch", bench.size(2, 2), "--global-batch", bench.size(16, 4), "--samples", 0,
    ]  # fmt: skip
    found = trained(line, out)
    manifest = json.loads((out / "run.json").read_text())
    return found | {"reference_seconds": round(manifest["tallies"]["reference_seconds"], 2)}


def end_to_end(bench: Bench) -> Figures:
    """The six commands in a row, on two layers."""
    model = make_model(bench, TWO_LAYERS)
    home = bench.folder / "six"
    home.mkdir(exist_ok=True)
    os.chdir(home)
    Path("p.py").write_text(PROGRAMS)
    write(Path("prompts.jsonl"), [{"id": str(n), "prompt": f"Say {n}."} for n in range(6)])
    short = ("--max-new-tokens", 8)
    critic = ("--critic", "python:p.py:critique")
    seconds = {}

    def timed(*line: object, expect: tuple[int, ...] = (0,)) -> None:
        started = time.perf_counter()
        srt(*line, expect=expect)
        seconds[str(line[0])] = round(time.perf_counter() - started, 1)

    timed("collect-feedback", "--model", model, *critic, *short)
    timed("sft", "--epochs", 1, "--critic-check", 0)
    # Random weights write no critique that can be read; rows of ours stand in for it.
    timed("self-critique", *short, "--critic-max-tokens", 8, expect=(0, 3))
    rows = [
        feedback_row(n, 0) | {"response": f"{n}.", "refinement": f"{n} it is."} for n in range(6)
    ]
    write(Path("self-feedback.jsonl"), rows)
    timed("build-prefs", "--max-length-ratio", 30)
    timed("dpo", "--model", "models/sft", "--epochs", 1)
    timed("eval", "--model", "models/dpo", "--reference", model, "--check", "python:p.py:check",
          "--use", "response", *short)  # fmt: skip
    return {"seconds": seconds, "commands": len(seconds)}


def resume(bench: Bench) -> Figures:
    """A training that is killed goes on to the same weights, under `--deterministic`."""
    model = make_model(bench, TWO_LAYERS)
    data = bench.folder / "few.jsonl"
    write(data, [feedback_row(number, number % 4) for number in range(8)])
    line: list[object] = [
        "sft", "--data", data, "--model", model, "--epochs", 8, "--global-batch", 2,
        "--micro-batch", 2, "--save-every", 2, "--samples", 0, "--critic-check", 0,
        "--deterministic",
    ]  # fmt: skip
    straight, killed = bench.folder / "straight", bench.folder / "killed"
    # cuBLAS asks for it where results are to be the same every time.
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    other = subprocess.Popen(
        [sys.executable, "-m", "srt_cli", *map(str, line), "--out", str(killed)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        while other.poll() is None and not list(killed.glob("checkpoints/*/whole")):
            time.sleep(0.05)
    finally:
        was_running = other.poll() is None
        with contextlib.suppress(ProcessLookupError):
            os.killpg(other.pid, signal.SIGKILL)
        other.wait()
    srt(*line, "--out", killed)
    srt(*line, "--out", straight)
    one, two = (
        hashlib.sha256((out / "model.safetensors").read_bytes()).hexdigest()
        for out in (straight, killed)
    )
    return {"killed_midway": was_running, "same_weights": one == two}


def sharding(bench: Bench) -> Figures:
    """FSDP2 and ZeRO in one process, as far as one card shows; on a CPU, two processes."""
    import torch

    model = make_model(bench, TWO_LAYERS)
    data = bench.folder / "shared.jsonl"
    write(data, [feedback_row(number, number % 4) for number in range(4)])
    ways: dict[str, tuple[object, ...]] = {"two processes": ("--num-processes", 2)}
    if torch.cuda.is_available():
        ways = {
            name: ("--accelerate-config", name, "--num-processes", 1)
            for name in ("fsdp2", "zero2", "zero3")
        }
    found: Figures = {}
    for name, flags in ways.items():
        out = bench.folder / f"shared-{name.replace(' ', '-')}"
        line = [
            "sft", "--data", data, "--model", model, "--out", out, "--overwrite", "--epochs", 1,
            "--global-batch", 4, "--samples", 0, "--critic-check", 0, *flags,
        ]  # fmt: skip
        done = subprocess.run(
            [sys.executable, "-m", "srt_cli", *map(str, line)], capture_output=True, text=True,
            check=False,
        )  # fmt: skip
        tail = done.stderr.strip().split("\n")[-1]
        found[name] = "trained" if done.returncode == 0 else f"failed: {tail[:200]}"
    return found


PARTS: Final[Mapping[str, tuple[Callable[[Bench], Figures], float]]] = {
    "machine": (machine, 40),
    "generation": (generation, 110),
    "sft": (sft, 90),
    "sft_lora": (sft_lora, 120),
    "dpo": (dpo, 90),
    "end_to_end": (end_to_end, 80),
    "resume": (resume, 60),
    "sharding": (sharding, 100),
}
"""Each part with its time limit, in seconds."""


# --- one after the other ----------------------------------------------------------------------


def run_part(name: str, bench: Bench, seconds: float) -> Figures:
    """One part in a process of its own; what it found, or why it failed. Its log stays in the folder."""
    result, log = bench.folder / f"{name}.json", bench.folder / f"{name}.log"
    line = [sys.executable, __file__, "--part", name, "--folder", str(bench.folder)]
    with open(log, "w") as said:
        part = subprocess.Popen(
            [*line, *(["--tiny"] if bench.tiny else [])],
            stdout=said, stderr=subprocess.STDOUT, start_new_session=True,
        )  # fmt: skip
        try:
            code: int | None = part.wait(timeout=seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(part.pid, signal.SIGKILL)
            part.wait()
    if code == 0 and result.is_file():
        found: Figures = json.loads(result.read_text())
        return found
    last = (log.read_text().strip().split("\n") or [""])[-1]
    return {"failed": f"more than {seconds:.0f} s" if code is None else last[:300]}


def show(name: str, found: Figures) -> str:
    """A part's line of result."""
    return f"{name}: " + ", ".join(f"{key} {value}" for key, value in found.items())


def main() -> None:
    """Run the parts that are asked for, and write `gpu.json`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tiny", action="store_true", help="two layers, on a CPU too")
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--out", type=Path, default=Path("gpu.json"))
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        help="stretch every time limit by this, on a busy machine",
    )
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    os.environ.setdefault("PYTHONPATH", str(Path(__file__).resolve().parents[1]))
    if asked.tiny:  # on a busy CPU, threads for two layers do little but wait for one another
        os.environ.setdefault("OMP_NUM_THREADS", "1")
    if asked.part:
        found = PARTS[asked.part][0](Bench(asked.folder, asked.tiny))
        (asked.folder / f"{asked.part}.json").write_text(json.dumps(found))
        return
    asked.out.parent.mkdir(parents=True, exist_ok=True)
    started, results = time.monotonic(), {}
    with tempfile.TemporaryDirectory(prefix="srt-gpu-") as name:
        bench = Bench(Path(name), asked.tiny)
        for part in asked.only:
            begun = time.monotonic()
            left = ALL_SECONDS * asked.patience - (begun - started)
            found = (
                run_part(part, bench, min(PARTS[part][1] * asked.patience, left))
                if left > 5
                else {"failed": "no time"}
            )
            results[part] = found | {"took_s": round(time.monotonic() - begun, 1)}
            console.result(show(part, results[part]))
            asked.out.write_text(json.dumps(results, indent=1) + "\n")
    rows = [
        [part, key, str(value)] for part, found in results.items() for key, value in found.items()
    ]
    card = results.get("machine", {}).get("card", "unknown")
    console.table(f"card: {card}", ["part", "figure", "value"], rows)
    console.result(f"{asked.out}: all of it, in {time.monotonic() - started:.0f} s")
    sys.exit(any("failed" in found for found in results.values()))


if __name__ == "__main__":
    main()
