"""What pairing needs of a feedback record, read quickly."""

from typing import Any, NamedTuple, Self

import orjson

from srt_cli.records import Message, Status


class FeedbackRow(NamedTuple):
    """A feedback record, cut to what pairing looks at; the scores are those of its feedback."""

    id: str
    prompt: str | list[Message]
    response: str | None
    score: float | None
    score_mean: float | None
    refinement: str | None
    refinement_score: float | None
    refinement_score_mean: float | None
    status: Status
    critic: str
    sample: int
    round: int

    @classmethod
    def of_line(cls, line: bytes) -> Self:
        """Read the line of a record that was found valid before: to do so again costs most of a row."""
        row: dict[str, Any] = orjson.loads(line)
        prompt, feedback = row["prompt"], row["feedback"] or {}
        if not isinstance(prompt, str):
            prompt = [Message.model_construct(**turn) for turn in prompt]
        return cls(
            row["id"],
            prompt,
            row["response"],
            _number(feedback.get("score")),
            _number(feedback.get("score_mean")),
            row["refinement"],
            _number(row["refinement_score"]),
            _number(row.get("refinement_score_mean")),
            row["status"],
            row["critic"],
            int(row["sample"]),
            int(row["round"]),
        )


def _number(value: float | str | None) -> float | None:
    """A number as the record's validation takes it, which lets `7` and `"7"` pass."""
    return None if value is None else float(value)
