"""Critiques that people or other programs wrote: read in their forms, joined to what they are about.

`--critic file:critiques.jsonl`. What does not join is counted and left out; nothing is guessed.
"""

from collections import Counter
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Final, NamedTuple

from pydantic import ValidationError

from srt_cli.errors import SrtError, UsageError
from srt_cli.feedback.critic import read_critique
from srt_cli.forms import NEAREST, PROMPT_FIELDS, FieldNames, plainly_named, read_row, text_of
from srt_cli.prompts import files_in_words, names_of, rows_at
from srt_cli.records import GIVEN, MAX_SCORE, MIN_SCORE, Feedback, Prompt
from srt_cli.stats.hygiene import plain_form
from srt_cli.tables import many
from srt_cli.templates import number_in

FILE_PREFIX: Final = "file:"
TEXTS: Final = ("critique", "feedback")
SCORES: Final = ("overall_score", "score", "rating")
REFINEMENTS: Final = ("refinement", "edited_response", "improved_response")
ORIGINALS: Final = ("response", "original_response", "orig_response", "completion")
PARTS: Final = (
    *TEXTS, "weaknesses", "suggestions", *SCORES, *REFINEMENTS, "refinement_score",
    "refinement_feedback", "completions", "feedback1", "feedback2",
)  # fmt: skip
"""Fields that make a row one with a critique."""
FIELDS: Final = frozenset({*PROMPT_FIELDS, "id", *PARTS, *ORIGINALS, "critic", "policy"})
FINE_GRAINED: Final = "fine-grained_score"
HELPFULNESS: Final = {"not": 1, "slightly": 2, "partially": 3, "mostly": 4, "perfectly": 5}
"""How each feedback of HelpSteer3 begins: The response is mostly helpful."""
LOW_RATING: Final = 2.0


class Scale(NamedTuple):
    """The lowest and the highest score that somebody could give."""

    low: float
    high: float

    def ours(self, value: float) -> float:
        """A score on our scale, 1 to 10; a mapped one to a tenth."""
        if self == OURS:
            return value
        share = (value - self.low) / (self.high - self.low)
        return round(MIN_SCORE + share * (MAX_SCORE - MIN_SCORE), 1)

    def __str__(self) -> str:
        return f"{self.low:g} to {self.high:g}"


OURS: Final = Scale(MIN_SCORE, MAX_SCORE)
OF_FIVE: Final = Scale(1, 5)


def parse_scale(text: str) -> Scale:
    """`LOW-HIGH`, e.g. 1-5; raises `UsageError` for anything else."""
    low, _, high = text.partition("-")
    try:
        scale = Scale(float(low), float(high))
    except ValueError:
        scale = Scale(0, 0)
    if not scale.low < scale.high:
        raise UsageError(f"--critique-scale {text}: write LOW-HIGH, e.g. 1-5.")
    return scale


@dataclass(frozen=True, slots=True)
class Critique:
    """One critique in our terms; None is what it lacks, and `problem` says what cannot be used."""

    place: str
    """File and line."""
    id: str | None
    prompt: Prompt | None
    response: str | None
    weaknesses: str | None = None
    suggestions: str | None = None
    score: float | None = None
    score_mean: float | None = None
    refinement: str | None = None
    refinement_score: float | None = None
    refinement_score_mean: float | None = None
    refinement_feedback: Feedback | None = None
    problem: str | None = None
    critic: str | None = None
    policy: str = GIVEN

    @property
    def is_critique(self) -> bool:
        """Whether anything at all is said of the response."""
        said = (self.weaknesses, self.suggestions, self.score, self.refinement)
        return any(each is not None for each in said)


class WrittenRow(NamedTuple):
    """A prompt with the response that a critique is about, and the critique."""

    prompt: Prompt
    critique: Critique
    sample: int


@dataclass
class CritiqueFile:
    """Everything that a `file:` critic holds, read once."""

    location: str
    scale: Scale = OURS
    critiques: list[Critique] = field(default_factory=list)
    forms: Counter[str] = field(default_factory=Counter)
    empty: int = 0
    """Rows without a critique."""
    mapped: Counter[str] = field(default_factory=Counter)
    """Scores that were brought to 1 to 10, by the scale that they came from."""
    contradicting: int = 0
    off_scale: list[str] = field(default_factory=list)
    """Places of scores that lie outside the scale."""
    inputs: list[Path] = field(default_factory=list)

    @property
    def spec(self) -> str:
        """As `--critic` names it."""
        return FILE_PREFIX + self.location

    @cached_property
    def stands_alone(self) -> bool:
        """Whether every critique brings its prompt and response."""
        return all(each.prompt and each.response is not None for each in self.critiques)


def read_critiques(location: str, scale: Scale = OURS) -> CritiqueFile:
    """Read critiques from a file, folder or glob in any format that `--prompts` takes.

    Raises `SrtError`, naming the place, for a row that holds none by any known field.
    """
    if not location:
        raise UsageError("--critic file: which file? Write file:critiques.jsonl.")
    rows, files = rows_at(location)
    found = CritiqueFile(location, scale, inputs=files)
    for name, number, raw in rows():
        place, row = f"{name}:{number}", plainly_named(raw, FIELDS)
        if not any(part in row for part in PARTS):
            known = '"critique", "feedback", or "weaknesses" and "suggestions"'
            raise SrtError(
                f"{place}: no {known} (found: {', '.join(row) or 'nothing'}). Rename the field, or "
                "look at the forms in docs/data.md."
            )
        reader = _Reader(found, place)
        try:
            said = [each for each in reader.critiques(row) if each.is_critique]
        except (ValueError, ValidationError) as error:
            reason = error.errors()[0]["msg"] if isinstance(error, ValidationError) else str(error)
            raise SrtError(f"{place}: {reason}.") from None
        found.empty += not said
        found.forms[reader.form] += len(said)
        found.critiques += said
    found.empty += len(rows.empty)
    if not found.critiques:
        raise SrtError(f"{location}: none of {many(found.empty, 'row')} holds a critique.")
    return found


@dataclass
class _Reader:
    """Reads one row; what is worth telling of it is counted in `file`."""

    file: CritiqueFile
    place: str
    form: str = ""

    def critiques(self, row: Mapping[str, Any]) -> Iterator[Critique]:
        """Every critique in a row."""
        identifier = None if row.get("id") is None else str(row["id"])
        asked = self._prompt_of(row)
        about = Critique(self.place, identifier, asked, None)
        if isinstance(row.get("completions"), list):
            self.form = "UltraFeedback"
            for number, completion in enumerate(row["completions"]):
                if not isinstance(completion, Mapping):
                    raise ValueError(f"completions.{number} is no completion with its critique")
                policy = completion.get("model")
                yield self._of(completion, replace(about, policy=policy or about.policy))
        elif "feedback1" in row or "feedback2" in row:
            self.form = "HelpSteer3 feedback"
            for n in ("1", "2"):
                part = {"response": row.get(f"response{n}"), "feedback": row.get(f"feedback{n}")}
                yield self._of(part, about)
        else:
            self.form = _form_of(row)
            if asked is not None:
                about = replace(about, response=asked.response)
            yield self._of(row, about)

    def _prompt_of(self, row: Mapping[str, Any]) -> Prompt | None:
        """The prompt that a row brings; a HelpSteer3 row has the chat as its context."""
        names = FieldNames()
        if isinstance(row.get("context"), list) and not any(name in row for name in NEAREST):
            names = FieldNames(prompt="context")
        elif not any(row.get(name) is not None for name in NEAREST):
            if row.get("id") is None:
                raise ValueError(f"neither an id nor a prompt (found: {', '.join(row)})")
            return None
        plain = {name: row[name] for name in (*PROMPT_FIELDS, "id") if name in row}
        return Prompt.of(read_row(plain, names))

    def _of(self, part: Mapping[str, Any], about: Critique) -> Critique:
        """One critique from its fields."""
        inner = part.get("feedback")
        said = {**part, **inner} if isinstance(inner, Mapping) else part
        response = next((said[name] for name in ORIGINALS if said.get(name) is not None), None)
        refinement = next((said[name] for name in REFINEMENTS if said.get(name) is not None), None)
        critique = replace(
            about,
            response=about.response if response is None else text_of(response, "response"),
            refinement=_worded_or_none(refinement),
            refinement_score=self._number(said.get("refinement_score"), self.file.scale),
            critic=_text(said.get("critic")),
            policy=_text(said.get("policy")) or about.policy,
        )
        if self.file.scale == OURS:
            critique = replace(
                critique,
                score_mean=number_in(said.get("score_mean")),
                refinement_score_mean=number_in(said.get("refinement_score_mean")),
            )
            if isinstance(own := said.get("refinement_feedback"), Mapping):
                critique = replace(critique, refinement_feedback=Feedback.model_validate(own))
        return self._judged(self._worded(critique, said), said)

    def _worded(self, critique: Critique, said: Mapping[str, Any]) -> Critique:
        """The same with what it says in words: in parts, or in one text or several."""
        if _texts(said.get("weaknesses")) or _texts(said.get("suggestions")):
            # An empty cell of a table is None, and says as little as an empty text.
            weaknesses, suggestions = (
                "" if name in said and said[name] is None else _points(said.get(name))
                for name in ("weaknesses", "suggestions")
            )
            return replace(critique, weaknesses=weaknesses, suggestions=suggestions)
        texts = [text for name in TEXTS for text in _texts(said.get(name))]
        if not texts:
            return critique
        levels = [level for text in texts if (level := _helpfulness(text)) is not None]
        read = read_critique("\n\n".join(texts))
        score = read.score
        if levels and score is None:
            score = OF_FIVE.ours(sum(levels) / len(levels))
            self.file.mapped["not to perfectly helpful"] += 1
        return replace(
            critique,
            weaknesses=read.weaknesses,
            suggestions=read.suggestions,
            score=score,
            refinement=critique.refinement or read.refinement,
        )

    def _judged(self, critique: Critique, said: Mapping[str, Any]) -> Critique:
        """The same with the score that stands in a field of its own; it beats one in the text."""
        # pandas and parquet have NaN where nothing is.
        told = {name: value for name, value in said.items() if value == value}
        given = next((told[name] for name in SCORES if told.get(name) is not None), None)
        ratings, scale = told.get(FINE_GRAINED), self.file.scale
        low = number_in(ratings)
        if given is None:
            given, scale = ratings, OF_FIVE
        elif number_in(given) == MAX_SCORE and low is not None and low <= LOW_RATING:
            # A slip of UltraFeedback's first release, where a 1 was read as 10.
            self.file.contradicting += 1
            problem = f"a score of {given} beside ratings of {low:g} of 5"
            return replace(critique, score=None, problem=problem)
        if given is None:
            return critique
        score = self._number(given, scale)
        if score is None:
            self.file.off_scale.append(self.place)
            problem = f"the score {given!r} is not on a scale of {scale} (--critique-scale)"
            return replace(critique, score=None, problem=problem)
        return replace(critique, score=score)

    def _number(self, value: Any, scale: Scale) -> float | None:
        """A score on our scale; None for what is none, or lies outside its own."""
        number = number_in(value, scale.high)
        if number is None or not scale.low <= number <= scale.high:
            return None
        if scale != OURS:
            self.file.mapped[str(scale)] += 1
        return scale.ours(number)


def _worded_or_none(refinement: Any) -> str | None:
    """An improved response; None where there is none, or one without words."""
    text = "" if refinement is None else text_of(refinement, "refinement")
    return text if text.strip() else None


def _form_of(row: Mapping[str, Any]) -> str:
    if "edited_response" in row:
        return "HelpSteer3 edits"
    if isinstance(row.get("feedback"), Mapping):
        return "feedback records"
    return "critiques in parts" if row.get("weaknesses") is not None else "critiques in one text"


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _points(value: Any) -> str | None:
    """What is said in a field: a text, or points in a list, a line each."""
    return "\n".join(_texts(value)) if isinstance(value, list) else _text(value)


def _texts(value: Any) -> list[str]:
    """The texts in a field: one, or a list of them, as several people wrote."""
    several = value if isinstance(value, list) else [value]
    return [text for text in several if isinstance(text, str) and text.strip()]


def _helpfulness(text: str) -> int | None:
    """The level that a feedback of HelpSteer3 begins with, 1 to 5."""
    words = text.casefold().split()[:6]
    if words[:3] != ["the", "response", "is"] or len(words) < 5:
        return None
    return HELPFULNESS.get(words[3]) if words[4].startswith("helpful") else None


# --- Joining -----------------------------------------------------------------------------------


@dataclass
class Joined:
    """Which critiques belong to which prompts; the others are counted, with the first of each kind."""

    file: CritiqueFile
    rows: list[WrittenRow] = field(default_factory=list)
    prompts: int = 0
    prompts_without: int = 0
    left_out: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)

    def leave_out(self, critique: Critique, reason: str) -> None:
        """Count a critique that does not join."""
        self.left_out[reason] += 1
        self.first.setdefault(reason, critique.place)

    def lacks(self, part: str) -> int:
        """How many joined critiques lack a part."""
        return sum(getattr(row.critique, part) is None for row in self.rows)

    def lacking(self, asked: Container[str]) -> str | None:
        """What the critiques lack that nobody is `asked` for, and how to ask; None where nothing."""
        scores = self.lacks("score") + self.lacks("refinement_score")
        lacks = {"refinement": (self.lacks("refinement"), "improved response"),
                 "score": (scores, "score")}  # fmt: skip
        told = [
            f"{many(count, name)} (--critic-for {part}=SPEC)"
            for part, (count, name) in lacks.items()
            if count and part not in asked
        ]
        return f"they lack {' and '.join(told)}." if told else None

    def sentences(self) -> Iterator[str]:
        """What was read and joined, and what was not, for the terminal."""
        file, forms = self.file, +self.file.forms
        named = " and ".join(
            f"{f} ({n:,})" if len(forms) > 1 else f for f, n in forms.most_common()
        )
        critiques = many(len(file.critiques), "critique") + files_in_words(file.inputs)
        yield f"{file.location}: {critiques}, read as {named}."
        if file.mapped:
            scales = ", ".join(f"{n:,} from {scale}" for scale, n in file.mapped.most_common())
            yield f"scores mapped linearly to 1 to 10: {scales}."
        if file.empty:
            yield f"{many(file.empty, 'row')} of it without a critique."
        if file.contradicting:
            yield (
                f"{many(file.contradicting, 'score')} of 10 beside ratings of {LOW_RATING:g} or less, "
                "a slip of UltraFeedback's first release: left out."
            )
        if file.off_scale:
            yield (
                "scores outside their scale (--critique-scale), which count as missing: "
                f"{len(file.off_scale):,} (first: {file.off_scale[0]})."
            )
        if self.left_out:
            reasons = ", ".join(
                f"{n:,} {reason} (first: {self.first[reason]})"
                for reason, n in self.left_out.most_common()
            )
            yield f"not joined: {reasons}."
        without = ""
        if self.prompts_without:
            without = f"; prompts without a critique, which make no row: {self.prompts_without:,}"
        joined = self.prompts - self.prompts_without
        yield f"{many(len(self.rows), 'critique')} of {many(joined, 'prompt')} joined{without}."

    def describe(self) -> dict[str, Any]:
        """For the manifest."""
        return {
            "read": len(self.file.critiques),
            "joined": len(self.rows),
            "not_joined": dict(self.left_out),
            "prompts_without": self.prompts_without,
            "forms": dict(+self.file.forms),
            "mapped_scores": dict(self.file.mapped),
        }


def own_prompts(file: CritiqueFile) -> Iterator[Prompt]:
    """The prompts that critiques bring themselves, each once, without its response."""
    seen: set[str] = set()
    for each in file.critiques:
        if each.prompt is not None and each.prompt.id not in seen:
            seen.add(each.prompt.id)
            yield each.prompt.model_copy(update={"response": None})


def join(file: CritiqueFile, prompts: Callable[[], Iterable[Prompt]]) -> Joined:
    """Join critiques to prompts and responses: by id where both have it, else by the prompt's text.

    Texts are the same but for white space and Unicode's two spellings. Rows come in the order of the
    prompts. Raises `SrtError` when nothing joins.
    """
    ids, names = {prompt.id for prompt in prompts()}, names_of(prompts())
    by_id: dict[str, list[int]] = {}
    by_text: dict[str, list[int]] = {}
    for position, each in enumerate(file.critiques):
        if each.id is not None and each.id in ids:
            by_id.setdefault(each.id, []).append(position)
        elif each.prompt is not None:
            by_text.setdefault(plain_form(each.prompt.text), []).append(position)
    joined = Joined(file)
    used: set[int] = set()
    missed: dict[int, str] = {}
    for prompt in prompts():
        joined.prompts += 1
        candidates = [*by_id.get(prompt.id, [])]
        candidates += [n for text in names(prompt) for n in by_text.get(text, [])]
        sample = 0
        for position in sorted(set(candidates) - used):
            critique = file.critiques[position]
            reason = _why_apart(prompt, critique)
            if reason is not None:
                missed[position] = reason
                continue
            used.add(position)
            response = critique.response if prompt.response is None else prompt.response
            about = prompt.model_copy(update={"response": response})
            joined.rows.append(WrittenRow(about, critique, sample))
            sample += 1
        joined.prompts_without += not sample
    for position, each in enumerate(file.critiques):
        if position not in used:
            joined.leave_out(each, missed.get(position, "without such a prompt"))
    if not joined.rows:
        reasons = ", ".join(joined.left_out)
        first = next(iter(joined.first.values()))
        raise SrtError(
            f"{file.location}: none of {many(len(file.critiques), 'critique')} joins a prompt "
            f"({reasons}; first: {first}). They are joined by id, or by the text of prompt and response."
        )
    return joined


def _why_apart(prompt: Prompt, critique: Critique) -> str | None:
    """Why a critique is not about this prompt and its response; None when it is."""
    texts = map(plain_form, prompt.texts)
    if critique.prompt is not None and plain_form(critique.prompt.text) not in texts:
        return "with another prompt than that of the id"
    if prompt.response is None and critique.response is None:
        return "that bring no response, nor does the prompt"
    if prompt.response is None or critique.response is None:
        return None
    if plain_form(prompt.response) != plain_form(critique.response):
        return "of another response"
    return None
