"""Answers that others wrote: several to a prompt, each with a score, and those of a first model.

UltraFeedback's `completions` with an `overall_score` or ratings are the best known form; lists of texts
beside a list of scores, ranked answers and single answers with a score are read as well.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from srt_cli.errors import SrtError
from srt_cli.forms import PROMPT_FIELDS, FieldNames, plainly_named, read_row, text_of
from srt_cli.prompts import rows_at
from srt_cli.records import Message, Prompt, as_messages, content_id
from srt_cli.runs.jsonl import naming_row
from srt_cli.stats.hygiene import plain_form
from srt_cli.templates import number_in

ANSWERS: Final = ("completions", "responses", "generations", "answers", "outputs", "candidates")
TEXTS: Final = ("response", "text", "content", "completion", "output", "answer", "generation")
SCORES: Final = ("overall_score", "score", "rating", "reward", "pm_score")
LISTS_OF_SCORES: Final = ("scores", "ratings", "rewards", "overall_scores")
FIELDS: Final = frozenset(
    {*PROMPT_FIELDS, "id", "response", "rank", "annotations", *ANSWERS, *SCORES, *LISTS_OF_SCORES}
)
GIVEN: Final = "given scores"
"""The source of pairs that scores in the data decided."""


class ScoredAnswers(NamedTuple):
    """A prompt and its answers, each with a score."""

    id: str
    prompt: str | list[Message]
    answers: tuple[tuple[str, float], ...]


def read_scored(row: Mapping[str, Any]) -> ScoredAnswers | None:
    """A row with scored answers; None where it has none, and is for others to read.

    Answers without a score (UltraFeedback has some) are left out. Raises `ValueError` with a sentence
    for the user.
    """
    rest = plainly_named(row, FIELDS)
    answers = _take_answers(rest)
    if answers is None:
        return None
    prompt = Prompt.of(read_row(rest))
    return ScoredAnswers(prompt.id, prompt.prompt, tuple(answers))


def _take_answers(rest: dict[str, Any]) -> list[tuple[str, float]] | None:
    field = next(
        (name for name in ANSWERS if isinstance(rest.get(name), list) and rest[name]), None
    )
    if field is None:
        score = None if "feedback" in rest else _score_of(rest)
        text = rest.get("response")
        return [(text, score)] if isinstance(text, str) and score is not None else None
    listed = rest.pop(field)
    found = []
    if all(isinstance(each, str) for each in listed):
        scores = next((rest[name] for name in LISTS_OF_SCORES if name in rest), None)
        if not isinstance(scores, list) or len(scores) != len(listed):
            raise ValueError(
                f"{field} holds {len(listed)} texts, and there is no list of as many scores "
                f"({', '.join(LISTS_OF_SCORES)})"
            )
        found = list(zip(listed, map(number_in, scores), strict=True))
    else:
        for number, each in enumerate(listed):
            place = f"{field}.{number}"
            if not isinstance(each, Mapping):
                raise ValueError(f"{place} is {type(each).__name__}, not an answer with a score")
            name = next((name for name in TEXTS if each.get(name) is not None), None)
            if name is None:
                raise ValueError(f"{place} holds no text (found: {', '.join(each) or 'nothing'})")
            found.append((text_of(each[name], f"{place}.{name}"), _score_of(each)))
    scored = [(text, score) for text, score in found if score is not None]
    if not scored:
        raise ValueError(
            f"no answer in {field} has a score ({', '.join(SCORES)}, rank or annotations)"
        )
    return scored


def _score_of(answer: Mapping[str, Any]) -> float | None:
    """The overall score of an answer; else the mean of its ratings, else its rank, the first best."""
    for name in SCORES:
        if (score := number_in(answer.get(name))) is not None:
            return score
    noted = answer.get("annotations")
    if isinstance(noted, Mapping):
        ratings = [
            rating
            for each in noted.values()
            if isinstance(each, Mapping) and (rating := number_in(each.get("Rating"))) is not None
        ]
        if ratings:
            return sum(ratings) / len(ratings)
    rank = number_in(answer.get("rank"))
    return None if rank is None else -rank


# --- The first model's answers -----------------------------------------------------------------


@dataclass(frozen=True)
class FirstAnswer:
    """An answer of the first model; its score is known where the file is feedback."""

    text: str
    score: float | None
    model: str
    passes: float | None = None
    """What a check said of it; None where none was asked."""


class FirstAnswers:
    """The first model's answers, by prompt or, in a file without prompts, by id; held in memory.

    Chosen from now, rejected from the first model: Temporal Self-Rewarding, arXiv 2508.06026.
    """

    def __init__(self, path: Path) -> None:
        """Raises `SrtError` for a file without answers, naming the row that is none."""
        self._by_prompt: dict[str, FirstAnswer] = {}
        self._by_id: dict[str, FirstAnswer] = {}
        for identifier, prompt, answer in _read_answers(path):
            if prompt is not None:
                self._keep(self._by_prompt, _plain_id(prompt), answer)
            elif identifier is not None:
                self._keep(self._by_id, identifier, answer)
        if not self._by_prompt and not self._by_id:
            raise SrtError(
                f"{path}: no answer in there. Give outputs or feedback of the first model."
            )

    @staticmethod
    def _keep(kept: dict[str, FirstAnswer], key: str, answer: FirstAnswer) -> None:
        """The worst of several answers to a prompt; of those without a score, the longest."""
        known = kept.get(key)
        if known is None or _worse(answer) > _worse(known):
            kept[key] = answer

    def answer_to(self, prompt: str | list[Message], identifier: str) -> FirstAnswer | None:
        """The answer to a prompt; None where there is none."""
        return self._by_prompt.get(_plain_id(prompt)) or self._by_id.get(identifier)


def _worse(answer: FirstAnswer) -> tuple[float, int, str]:
    return (-(answer.score or 0.0), len(answer.text), answer.text)


def _passes(said: Any) -> float | None:
    """What a check said: yes or no, or a share."""
    return float(said) if isinstance(said, bool) else number_in(said)


def _plain_id(prompt: str | list[Message]) -> str:
    """The same for prompts that differ in white space or Unicode form alone."""
    turns = as_messages(prompt)
    return content_id([Message(role=t.role, content=plain_form(t.content)) for t in turns])


def _read_answers(
    path: Path,
) -> Iterator[tuple[str | None, str | list[Message] | None, FirstAnswer]]:
    """Id, prompt and answer of each row; a row of `srt eval` has no prompt."""
    rows, _ = rows_at(str(path))
    for name, number, row in rows():
        with naming_row(name, number):
            if "contestant" in row and "use" in row:
                if row["use"] == "response":
                    text = text_of(row.get("response"), "response").strip()
                    model, passes = str(row["contestant"]), _passes(row.get("passed"))
                    answer = FirstAnswer(text, None, model, passes)
                    yield str(row["id"]), None, answer
                continue
            given = next(
                (field for field in ("response", "output", "answer") if row.get(field)), None
            )
            if given is None and row.get("messages") is None and row.get("conversations") is None:
                if "feedback" in row:  # a draft that failed
                    continue
                raise ValueError(
                    f"no answer (found: {', '.join(row) or 'nothing'}). Name it response"
                )
            read = read_row(row, FieldNames(response=given))
            prompt = Prompt.of(read)
            feedback = row.get("feedback")
            score = feedback.get("score") if isinstance(feedback, Mapping) else _score_of(row)
            model = row.get("policy") or row.get("generator") or row.get("model") or path.name
            if prompt.response and prompt.response.strip():
                passes = _passes(row.get("response_passes"))
                answer = FirstAnswer(prompt.response.strip(), number_in(score), str(model), passes)
                yield read.id, prompt.prompt, answer
