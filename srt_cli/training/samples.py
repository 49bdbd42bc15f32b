"""Samples while a model trains: what it answers so far, without any effect on the training."""

import random
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, Final

import numpy as np
import orjson
import torch
from transformers import GenerationConfig

from srt_cli.models.chat import ChatFormat
from srt_cli.records import Message

SAMPLES: Final = "samples.jsonl"
MAX_NEW_TOKENS: Final = 128


@dataclass
class Sampler:
    """Lets the model answer the same few prompts again and again, greedily."""

    chat: ChatFormat
    prompts: Sequence[Sequence[Message]]
    rows: list[dict[str, Any]] = field(default_factory=list)
    """Lines of `samples.jsonl` so far."""

    @property
    def last_step(self) -> int | None:
        """The step of the newest samples."""
        return self.rows[-1]["step"] if self.rows else None

    def sample(self, model: Any, step: int, out: Path) -> None:
        """Answer every prompt and write the answers; random state and train mode are kept."""
        if not self.prompts or step == self.last_step:
            return
        with _undisturbed(model):
            answers = generate_greedily(model, self.chat, self.prompts)
        lines = [
            {"step": step, "prompt": [turn.model_dump() for turn in prompt], **answer}
            for prompt, answer in zip(self.prompts, answers, strict=True)
        ]
        self.rows += lines
        with open(out / SAMPLES, "ab") as file:
            file.writelines(orjson.dumps(line, option=orjson.OPT_APPEND_NEWLINE) for line in lines)


def generate_greedily(
    model: Any, chat: ChatFormat, prompts: Sequence[Sequence[Message]]
) -> list[dict[str, Any]]:
    """Answer one batch, padded on the left: text, tokens, and whether the answer ended by itself."""
    tokenizer = chat.tokenizer
    encoded = [chat.prompt_ids(prompt) for prompt in prompts]
    width = max(map(len, encoded))
    pad = int(tokenizer.pad_token_id or 0)
    device = model.get_input_embeddings().weight.device
    ids = torch.tensor([[pad] * (width - len(row)) + row for row in encoded], device=device)
    mask = torch.tensor(
        [[0] * (width - len(row)) + [1] * len(row) for row in encoded], device=device
    )  # both (prompts, width)
    ends = {chat.end_id, tokenizer.eos_token_id} - {None}
    positions = getattr(model.config, "max_position_embeddings", None) or 1 << 30
    settings = GenerationConfig(
        max_new_tokens=max(1, min(MAX_NEW_TOKENS, positions - width)),
        do_sample=False,
        eos_token_id=sorted(ends),
        pad_token_id=pad,
    )
    with torch.no_grad():
        output = model.generate(input_ids=ids, attention_mask=mask, generation_config=settings)
    answers = []
    for tokens in output[:, width:].tolist():
        end = next((place for place, token in enumerate(tokens) if token in ends), None)
        kept = tokens if end is None else tokens[:end]
        text = tokenizer.decode(kept, skip_special_tokens=True)
        written = len(kept) + (end is not None)
        answers.append({"text": text, "tokens": written, "stopped": end is not None})
    return answers


@contextmanager
def _undisturbed(model: Any) -> Iterator[None]:
    """Switch to eval mode; afterwards modes and random states are restored bit for bit."""
    training = [module for module in model.modules() if module.training]
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    on_gpu = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else None
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])
        if on_gpu is not None:
            torch.cuda.set_rng_state_all(on_gpu)


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, float]]:
    """For the manifest: step, mean tokens and share that ended, of the first and the last samples."""
    if not rows:
        return {}
    named = {"first": rows[0]["step"], "last": rows[-1]["step"]}
    found = {}
    for name, step in named.items():
        part = [row for row in rows if row["step"] == step]
        found[name] = {
            "step": step,
            "tokens": round(fmean(row["tokens"] for row in part), 2),
            "stopped": round(fmean(row["stopped"] for row in part), 4),
        }
    return found
