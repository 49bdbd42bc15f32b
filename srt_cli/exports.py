"""The same rows for other trainers: pairs, and the chats that stage 1 trains on.

Fields and layouts are those of TRL 1.x, axolotl 0.19, LLaMA-Factory 0.9.5, ms-swift 4.6 and
OpenRLHF 0.11.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

import orjson

from srt_cli.errors import SrtError
from srt_cli.records import FeedbackRecord, Message, as_messages
from srt_cli.runs.jsonl import write_atomically, write_json
from srt_cli.templates import CRITIQUE_REQUEST, FeedbackField, render_feedback, render_refinement

Format = Literal["axolotl", "llamafactory", "ms-swift", "openrlhf", "kto"]
TrainingFormat = Literal["trl", "sdft", "axolotl", "llamafactory", "ms-swift", "openrlhf"]
PairLine = Mapping[str, Any]
"""A line of `prefs.jsonl` as plain JSON: `prompt`, `chosen` and `rejected` are lists of turns."""
Rows = list[dict[str, Any]]

LLAMAFACTORY: Final = "llamafactory"
DATASET_INFO: Final = "dataset_info.json"
_OPENAI_TAGS: Final = {
    "role_tag": "role", "content_tag": "content", "user_tag": "user",
    "assistant_tag": "assistant", "system_tag": "system",
}  # fmt: skip
HOW: Final[Mapping[str, str]] = {
    "trl": "load_dataset('json', data_files=...); SFTTrainer trains the completions",
    "sdft": "TRL's SDFTTrainer and SDPOTrainer read prompt and privileged_context",
    "axolotl": "in its config: type: chat_template, roles_to_train: [], message_field_training: train",
    "axolotl pairs": "in its config: rl: dpo, type: chat_template.default",
    "llamafactory": "pass --dataset_dir and --dataset as in dataset_info.json, and --mask_history true",
    "llamafactory pairs": "pass --dataset_dir and --dataset as in dataset_info.json",
    "ms-swift": "pass it as --dataset",
    "openrlhf": "pass --data.input_key prompt --data.output_key response --data.apply_chat_template",
    "openrlhf pairs": "pass --data.prompt_key prompt --data.chosen_key chosen "
    "--data.rejected_key rejected --data.apply_chat_template",
    "kto": "TRL's KTOTrainer reads it",
}
"""What to tell the other tool, by format."""


def how(name: str, *, pairs: bool) -> str:
    """What to tell the tool of a format."""
    return (HOW.get(f"{name} pairs") if pairs else None) or HOW[name]


def export_path(out: Path, name: str) -> Path:
    """Path of the rows in another format: `prefs.axolotl.jsonl` beside `prefs.jsonl`."""
    return out.with_name(f"{out.name.removesuffix('.jsonl')}.{name}.jsonl")


# --- Pairs -------------------------------------------------------------------------------------


def _to_axolotl(pair: PairLine) -> Rows:
    """Axolotl's DPO format chat_template.default."""
    return [
        {"messages": pair["prompt"], "chosen": pair["chosen"][0], "rejected": pair["rejected"][0]}
    ]


def _to_llamafactory(pair: PairLine) -> Rows:
    """LLaMA-Factory's sharegpt format with ranking."""
    names = {"system": "system", "user": "human", "assistant": "gpt"}
    turns = [{"from": names[turn["role"]], "value": turn["content"]} for turn in pair["prompt"]]
    chosen = {"from": "gpt", "value": pair["chosen"][0]["content"]}
    rejected = {"from": "gpt", "value": pair["rejected"][0]["content"]}
    return [{"conversations": turns, "chosen": chosen, "rejected": rejected}]


def _to_swift(pair: PairLine) -> Rows:
    """ms-swift's: the chat with the better answer, and the worse one."""
    worse = pair["rejected"][0]["content"]
    return [{"messages": [*pair["prompt"], *pair["chosen"]], "rejected_response": worse}]


def _to_openrlhf(pair: PairLine) -> Rows:
    """OpenRLHF's, with a key for each part."""
    return [{part: pair[part] for part in ("prompt", "chosen", "rejected")}]


def _to_kto(pair: PairLine) -> Rows:
    """TRL's unpaired preferences: two rows per pair."""
    return [
        {"prompt": pair["prompt"], "completion": pair[answer], "label": answer == "chosen"}
        for answer in ("chosen", "rejected")
    ]


EXPORTS: Final[Mapping[Format, Callable[[PairLine], Rows]]] = {
    "axolotl": _to_axolotl,
    "llamafactory": _to_llamafactory,
    "ms-swift": _to_swift,
    "openrlhf": _to_openrlhf,
    "kto": _to_kto,
}


# --- Chats with their trained turns ------------------------------------------------------------


@dataclass(frozen=True)
class TrainedChat:
    """A conversation, and which of its turns carry loss."""

    turns: Sequence[Message]
    trained: Sequence[bool]
    asked: int
    """How many turns the prompt has, which the draft follows."""
    critique: str | None = None
    """The draft and what its critic says of it, for one who answers anew."""

    def each_turn(self) -> Iterable[tuple[Rows, dict[str, str]]]:
        """Every trained turn behind the turns before it."""
        plain = [turn.model_dump() for turn in self.turns]
        for place, trained in enumerate(self.trained):
            if trained:
                yield plain[:place], plain[place]


def feedback_chat(
    record: FeedbackRecord, trained: tuple[bool, bool], drop: Sequence[FeedbackField] = ()
) -> TrainedChat:
    """A feedback record as stage 1 trains it; `trained` says whether draft and critique carry loss."""
    assert record.response is not None
    assert record.feedback is not None
    assert record.refinement is not None
    prompt = as_messages(record.prompt)
    feedback = render_feedback(record.feedback, drop)
    improved = render_refinement(record.refinement.strip())
    turns = [
        *prompt,
        Message(role="assistant", content=record.response.strip()),
        Message(role="user", content=CRITIQUE_REQUEST),
        Message(role="assistant", content=(feedback + improved).lstrip("\n")),
    ]
    flags = [False] * len(prompt) + [trained[0], False, trained[1]]
    critique = f"A first answer:\n{record.response.strip()}\n\nFeedback on it:\n{feedback}"
    return TrainedChat(turns, flags, len(prompt), critique)


def answered_chat(prompt: str | list[Message], answer: str) -> TrainedChat:
    """A prompt and its answer, which carries loss."""
    asked = as_messages(prompt)
    turns = [*asked, Message(role="assistant", content=answer.strip())]
    return TrainedChat(turns, [False] * len(asked) + [True], len(asked))


def whole_chat(turns: Sequence[Message]) -> TrainedChat:
    """A chat whose every assistant turn carries loss."""
    return TrainedChat(turns, [turn.role == "assistant" for turn in turns], len(turns) - 1)


def _flagged(chat: TrainedChat, flag: str, *, everywhere: bool) -> Rows:
    """One row, each turn with a flag that says whether it is trained."""
    turns = []
    for turn, trained in zip(chat.turns, chat.trained, strict=True):
        flagged = everywhere or turn.role == "assistant"
        turns.append(turn.model_dump() | ({flag: trained} if flagged else {}))
    return [{"messages": turns}]


def _distilled(chat: TrainedChat) -> Rows:
    """TRL's self-distillation: what the teacher knows beside the prompt is the critique."""
    if chat.critique is None:
        return []
    prompt = [turn.model_dump() for turn in chat.turns[: chat.asked]]
    return [{"prompt": prompt, "privileged_context": chat.critique}]


CHAT_EXPORTS: Final[Mapping[TrainingFormat, Callable[[TrainedChat], Rows]]] = {
    "trl": lambda chat: [
        {"prompt": before, "completion": [turn]} for before, turn in chat.each_turn()
    ],
    "sdft": _distilled,
    "axolotl": lambda chat: _flagged(chat, "train", everywhere=True),
    # It has no flag of a turn: a row for each, and --mask_history trains the last one alone.
    "llamafactory": lambda chat: [
        {"messages": [*before, turn]} for before, turn in chat.each_turn()
    ],
    "ms-swift": lambda chat: _flagged(chat, "loss", everywhere=False),
    "openrlhf": lambda chat: [
        {"prompt": before, "response": [turn]} for before, turn in chat.each_turn()
    ],
}


def write_chats(
    out: Path, name: TrainingFormat, chats: Iterable[TrainedChat], *, anew: bool
) -> Path:
    """Write chats beside `out` for another trainer.

    Raises `SrtError` where another file stands there, unless it may be replaced (`anew`).
    """
    path = export_path(out, name)
    rows = [row for chat in chats for row in CHAT_EXPORTS[name](chat)]
    content = b"".join(orjson.dumps(row, option=orjson.OPT_APPEND_NEWLINE) for row in rows)
    if path.exists() and not anew and path.read_bytes() != content:
        raise SrtError(
            f"{path}: exists, with other rows. Choose another --out, or pass --overwrite."
        )
    write_atomically(path, content)
    if name == LLAMAFACTORY:
        register(path, {"columns": {"messages": "messages"}, "tags": dict(_OPENAI_TAGS)})
    return path


# --- LLaMA-Factory's list of data sets ---------------------------------------------------------

RANKING: Final = {
    "ranking": True,
    "columns": {"messages": "conversations", "chosen": "chosen", "rejected": "rejected"},
}


def register(file: Path, entry: Mapping[str, Any]) -> None:
    """Name a file in the `dataset_info.json` of its folder; what else stands there stays.

    Raises `SrtError` where that file cannot be read, or has the name for another file.
    """
    path = file.with_name(DATASET_INFO)
    name = file.name.removesuffix(f".{LLAMAFACTORY}.jsonl")
    listed: dict[str, Any] = {}
    if path.exists():
        try:
            listed = dict(orjson.loads(path.read_bytes()))
        except (ValueError, TypeError):
            raise SrtError(
                f"{path}: is no list of data sets. Move it away, or repair it."
            ) from None
    other = listed.get(name, {}).get("file_name", file.name)
    if other != file.name:
        raise SrtError(
            f"{path}: {name} is the name of {other} there. Rename that entry, or choose another --out."
        )
    listed[name] = {"file_name": file.name, "formatting": "sharegpt", **entry}
    write_json(path, listed)
