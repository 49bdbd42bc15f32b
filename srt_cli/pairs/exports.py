"""The same pairs in the formats of other trainers."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final, Literal

Format = Literal["axolotl", "llamafactory", "kto"]
PairLine = Mapping[str, Any]
"""A line of `prefs.jsonl` as plain JSON: `prompt`, `chosen` and `rejected` are lists of turns."""


def export_path(out: Path, name: Format) -> Path:
    """Path of the pairs in another format: `prefs.axolotl.jsonl` beside `prefs.jsonl`."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{name}.jsonl")


def _to_axolotl(pair: PairLine) -> list[dict[str, Any]]:
    """Axolotl's DPO format chat_template.default."""
    return [
        {"messages": pair["prompt"], "chosen": pair["chosen"][0], "rejected": pair["rejected"][0]}
    ]


def _to_llamafactory(pair: PairLine) -> list[dict[str, Any]]:
    """LLaMA-Factory's sharegpt format with ranking."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in pair["prompt"]]
    chosen = {"from": "gpt", "value": pair["chosen"][0]["content"]}
    rejected = {"from": "gpt", "value": pair["rejected"][0]["content"]}
    return [{"conversations": turns, "chosen": chosen, "rejected": rejected}]


def _to_kto(pair: PairLine) -> list[dict[str, Any]]:
    """TRL's unpaired preferences: two rows per pair."""
    return [
        {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
        for answer in ("chosen", "rejected")
    ]


EXPORTS: Final[Mapping[Format, Callable[[PairLine], list[dict[str, Any]]]]] = {
    "axolotl": _to_axolotl,
    "llamafactory": _to_llamafactory,
    "kto": _to_kto,
}
