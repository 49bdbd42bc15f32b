"""Does a critic know the better answer? It scores both sides of labelled pairs, one by one.

What the scores come to is counted in `critic_quality`.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import Call
from srt_cli.errors import SrtError
from srt_cli.feedback.critic import Critic, blind_score
from srt_cli.models import Reply
from srt_cli.records import Prompt
from srt_cli.runs.jsonl import read_rows


@dataclass(frozen=True)
class LabelledPair:
    """A prompt with an answer that people preferred, and one that they did not."""

    prompt: Prompt
    chosen: str
    rejected: str


@dataclass(frozen=True)
class ScoredPair:
    """A critic's scores of both sides; None where its reply could not be read."""

    id: str
    chosen: float | None
    rejected: float | None

    @property
    def right(self) -> bool | None:
        """Whether the chosen answer's score is the higher; None where one could not be read."""
        if self.chosen is None or self.rejected is None:
            return None
        return self.chosen > self.rejected


def read_pairs(path: Path, limit: int | None = None) -> Iterator[LabelledPair]:
    """Rows with `prompt` (text or turns), `chosen` and `rejected` (text, or turns as in TRL).

    Raises `SrtError` naming file and line.
    """
    for place, (number, row) in enumerate(read_rows(path)):
        if limit is not None and place >= limit:
            return
        try:
            chosen, rejected = _text_of(row["chosen"]), _text_of(row["rejected"])
            rest = {name: row[name] for name in row if name not in ("chosen", "rejected")}
            if "prompt" not in rest and isinstance(row["chosen"], list):
                rest["prompt"] = row["chosen"][:-1]
            yield LabelledPair(Prompt.from_row({"id": f"line {number}", **rest}), chosen, rejected)
        except KeyError as missing:
            found = ", ".join(row) or "nothing"
            raise SrtError(f"{path}:{number}: no {missing} (found: {found}).") from None
        except ValueError as error:
            raise SrtError(f"{path}:{number}: {error}.") from None


def _text_of(answer: Any) -> str:
    if isinstance(answer, str):
        return answer
    if isinstance(answer, list) and answer and isinstance(answer[-1], dict):
        return str(answer[-1]["content"])
    raise ValueError("chosen and rejected must be texts, or turns that end in the answer")


def score_pair(critic: Critic, pair: LabelledPair) -> Generator[Call, Reply, ScoredPair]:
    """Score both answers independently, blind."""
    name = pair.prompt.id
    chosen = yield from blind_score(critic, pair.prompt, pair.chosen, f"{name} chosen")
    rejected = yield from blind_score(critic, pair.prompt, pair.rejected, f"{name} rejected")
    return ScoredPair(name, chosen.score, rejected.score)


def ask_pairs(asking: Asking, critic: Critic, pairs: Sequence[LabelledPair]) -> list[ScoredPair]:
    """A critic's blind scores of both sides of each pair."""
    scripts = (score_pair(critic, pair) for pair in pairs)
    return asking.ask(f"scores of pairs by {critic.model.spec}", scripts, len(pairs))
