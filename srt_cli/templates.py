"""What we say to models, and how we read the answer: every template beside its parser.

Two ways of asking for feedback. An external critic gets the paper's Table 1 in one message
(`critic_messages`). The trained policy is asked in conversation, as it was trained: prompt,
response, `CRITIQUE_REQUEST`, feedback and refinement (`self_critique_messages`).

Parsing is tolerant of form and strict of substance: a missing `###` is mended, a missing score is not.
"""

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import islice, zip_longest
from pathlib import Path
from typing import Any, Final, Literal, NamedTuple

from srt_cli.errors import SrtError
from srt_cli.reading import (
    Span,
    fenced_blocks,
    is_within,
    part_thoughts,
    unfence,
    unwrapped,
    without_blocks,
)
from srt_cli.records import MAX_SCORE, MIN_SCORE, Feedback, Message, Prompt

FeedbackField = Literal["weaknesses", "suggestions", "score"]
FEEDBACK_FIELDS: Final[tuple[FeedbackField, ...]] = ("weaknesses", "suggestions", "score")
IMPROVED_HEADING: Final = "### Improved Response"

# Verbatim from the paper, slips included: the template is part of the method.
TABLE_1_REQUIREMENTS: Final = """\
As a AI assistant instructor, your task is to provide constructive feedback on responses generated \
by the assistant. Ensure that your feedback focuses on the original instruction and do not \
introduce new requirements. \
Follow these steps to ensure your feedback is effective and beneficial:
1. Identify Weaknesses: Carefully review the response and pinpoint any areas where it falls short.
2. Offer Actionable Advice: Provide specific suggestions on how the response can be improved.
3. Conclude with a Rating: After providing feedback, score the response on a scale from 1 to 10, \
with 1 being the lowest and 10 the highest. Use the format: "Overall Score: [[1-10]]".
4. Show an Improved Response: Offer an improved version that incorporates your feedback. \
Clearly indicate the enhanced response with the heading: "### Improved Response"."""

# The paper does not say how the trained model is asked; short, because every sequence carries it.
CRITIQUE_REQUEST: Final = (
    "Review your response: weaknesses, suggestions, an overall score from 1 to 10, "
    "and an improved response."
)


def critic_messages(prompt: Prompt, response: str) -> list[Message]:
    """Ask an external critic for feedback and an improved response (paper, Table 1)."""
    content = (
        f"### Instruction\n{fence(prompt.text)}\n"
        f"### Response\n{fence(response)}\n"
        f"### Requirements\n{TABLE_1_REQUIREMENTS}\n"
        "### Feedback"
    )
    return [Message(role="user", content=content)]


CHECKLIST_HEADING: Final = "### Checklist"
# Requirement, evidence, verdict: a verdict that stands right behind what was quoted follows from it.
CHECKLIST_REQUIREMENTS: Final = f"""\
Check the response against the instruction, item by item, and improve it.
1. Under the heading "{CHECKLIST_HEADING}" write one line for each thing that the instruction asks for: \
the requirement as a question, then what the response has, quoted, then ": yes." if it meets the \
requirement and ": no." if it does not. For example:
- Begin with "Perhaps"? It begins with "Today": no.
- At most ten words? It has 8 words: yes.
Add no requirements of your own. Where the instruction sets no conditions, ask whether it is answered, \
and whether what is said is correct.
2. Under the heading "### Suggestions" say how to meet each item that is not met.
3. Under the heading "{IMPROVED_HEADING}" write the response again so that it meets every item."""


def checklist_messages(prompt: Prompt, response: str) -> list[Message]:
    """Ask an external critic to check a response item by item (after RLCF, arXiv 2507.18624)."""
    content = (
        f"### Instruction\n{fence(prompt.text)}\n"
        f"### Response\n{fence(response)}\n"
        f"### Requirements\n{CHECKLIST_REQUIREMENTS}"
    )
    return [Message(role="user", content=content)]


def self_critique_messages(prompt: Prompt, response: str) -> list[Message]:
    """Ask the policy, in its own conversation, to criticise and refine its response."""
    return [
        *prompt.messages,
        Message(role="assistant", content=response),
        Message(role="user", content=CRITIQUE_REQUEST),
    ]


def contrast_messages(prompt: Prompt, response: str) -> list[Message]:
    """Ask for a good response with one fault, and otherwise as it is."""
    content = (
        f"### Instruction\n{fence(prompt.text)}\n"
        f"### Response\n{fence(response)}\n"
        "### Requirements\n"
        "The response above is good. Write it again with exactly one clear mistake, one that such "
        "a response could really have: a wrong fact, something asked for and left out, or a part of "
        "the instruction not followed. Change as little as possible, and keep length and style. "
        "Reply with the changed response alone."
    )
    return [Message(role="user", content=content)]


REFINE_REQUIREMENTS: Final = """\
Improve the response by this feedback. Keep to the original instruction, introduce no new \
requirements, and keep what the feedback does not mention. Reply with the whole improved response, \
and nothing else, under the heading "### Improved Response"."""


def refine_messages(prompt: Prompt, response: str, feedback: str) -> list[Message]:
    """Ask for the improved response that a critique lacks, which somebody else wrote."""
    content = (
        f"### Instruction\n{fence(prompt.text)}\n"
        f"### Response\n{fence(response)}\n"
        f"### Feedback\n{fence(feedback)}\n"
        f"### Requirements\n{REFINE_REQUIREMENTS}"
    )
    return [Message(role="user", content=content)]


def reask_messages(
    asked: Sequence[Message],
    reply: str,
    problems: Sequence[str],
    *,
    expect_refinement: bool,
    by_checklist: bool = False,
) -> list[Message]:
    """Show a critic its unreadable reply and what it lacks, and ask for the whole of it again."""
    improved = f', and the improved response under the heading "{IMPROVED_HEADING}"'
    parts = 'weaknesses, suggestions, a line "Overall Score: [[1-10]]"'
    if by_checklist:
        parts = f'lines "- Requirement? Evidence: yes." under "{CHECKLIST_HEADING}", suggestions'
    content = (
        f"Your reply cannot be used: {'; '.join(problems)}. Write it again, complete: {parts}"
        + (improved if expect_refinement else "")
        + "."
    )
    return [
        *asked,
        Message(role="assistant", content=reply),
        Message(role="user", content=content),
    ]


def is_as_asked(text: str, *, expect_refinement: bool) -> bool:
    """Whether a critic's reply has the very form that was asked for, so that nothing was mended."""
    score = re.search(r"^Overall Score: \[\[\d+(?:\.\d+)?\]\]\s*$", text, re.MULTILINE)
    scored = score is not None or text.lstrip().startswith(f"{CHECKLIST_HEADING}\n")
    return scored and (not expect_refinement or f"\n{IMPROVED_HEADING}\n" in text)


def render_feedback(feedback: Feedback, drop: Sequence[FeedbackField] = ()) -> str:
    """Feedback as the policy is trained to write it: weaknesses, suggestions, score.

    A critique in one text, without suggestions of its own, stands under one heading. `drop` leaves
    fields out (paper, Table 6).
    """
    lines: dict[FeedbackField, str] = {
        "weaknesses": f"Weaknesses: {feedback.weaknesses}",
        "suggestions": f"Suggestions: {feedback.suggestions}",
        "score": f"Overall Score: [[{feedback.score:g}]]",
    }
    if not feedback.suggestions:
        del lines["suggestions"]
        if "suggestions" not in drop:
            lines["weaknesses"] = f"Weaknesses and suggestions: {feedback.weaknesses}"
    return "\n".join(line for field, line in lines.items() if field not in drop)


_CHECKED = re.compile(r": (?P<verdict>yes|no)(?:[.;\n]|$)")


def checklist_score(weaknesses: str | None) -> float | None:
    """The score, 1 to 10, that a checklist comes to: by the share of its items that end in `: yes`.

    None where no item ends in `: yes` or `: no`, so that the text is no checklist.
    """
    verdicts = _CHECKED.findall(weaknesses or "")
    if not verdicts:
        return None
    return score_of_share(verdicts.count("yes") / len(verdicts))


def score_of_share(met: float) -> float:
    """The score, 1 to 10, of an answer that meets this share of what was asked for."""
    return MIN_SCORE + (MAX_SCORE - MIN_SCORE) * met


def verdicts_at(text: str, weaknesses: str) -> list[int]:
    """Where in a reply the verdicts of the checklist begin that was read as its weaknesses.

    Empty where the checklist does not stand in the reply as it was read.
    """
    places, begins = list[int](), 0
    for line in weaknesses.splitlines():
        begins = text.find(line, begins)
        if begins < 0:
            return []
        places += [begins + found.start("verdict") for found in _CHECKED.finditer(line)]
        begins += len(line)
    return places


_SCORED = re.compile(r"^Overall Score: \[\[(?P<score>[\d.]+)\]\]", re.MULTILINE)


def judgements_in(text: str) -> list[Span]:
    """Where feedback judges, in order: the verdicts of a checklist's items, and the score's digits.

    The feedback is as `render_feedback` writes it.
    """
    verdicts = [Span(*found.span("verdict")) for found in _CHECKED.finditer(text)]
    return sorted(verdicts + [Span(*found.span("score")) for found in _SCORED.finditer(text)])


def render_refinement(refinement: str) -> str:
    """The improved response under the paper's heading; follows `render_feedback` directly."""
    return f"\n\n{IMPROVED_HEADING}\n{refinement}"


@dataclass(frozen=True)
class ParsedCritique:
    """What a critic's reply holds; `problems` says what it lacks, in the user's words."""

    weaknesses: str | None
    suggestions: str | None
    score: float | None
    refinement: str | None
    problems: tuple[str, ...]

    @property
    def feedback(self) -> Feedback | None:
        """The feedback, when it is complete (paper, section 4.1, rule 1)."""
        if self.weaknesses is None or self.suggestions is None or self.score is None:
            return None
        return Feedback(weaknesses=self.weaknesses, suggestions=self.suggestions, score=self.score)


NONE_NEEDED: Final = "no improved response (the critic says that none is needed)"
MOST_MARKS: Final = 1000
"""Headings, and lines with a score, that are looked at in one reply."""

# No pattern can match a stretch of text in two ways (hence *+ and ++), or a model that loops on spaces
# would keep the reader busy for hours. Headings and scores are looked for in lower case (`_plain`).
_BOLD = r"(?:\*\*|__)?[ \t]*+"
_NUMBER = r"(?:\d{1,3}[.)][ \t]*+)?"
_DECORATION = (
    rf"(?=[^\n]{{5}})[ \t]*+(?:#{{1,6}}[ \t]*+)?{_NUMBER}(?:[-*•][ \t]++)?{_BOLD}{_NUMBER}(?=[a-z])"
)
_PART = re.compile(
    rf"^(?P<decoration>{_DECORATION})(?:"
    r"(?P<improved>(?:show an |the |an )?(?:improved|enhanced|revised|refined) "
    r"(?:response|answer|version))"
    r"|(?P<both>weaknesses (?:and|&) suggestions)"
    r"|(?P<weaknesses>(?:identif(?:y|ied|ying) )?(?:key |main )?weakness(?:es)?(?: identified)?"
    r"|areas? for improvement)"
    r"|(?P<suggestions>(?:offer |provide )?(?:actionable |specific )?"
    r"(?:advice|suggestions?|recommendations?)(?: for improvement)?)"
    r"|conclude with a rating|rating|feedback"
    rf")[ \t]*+{_BOLD}(?::[ \t]*+{_BOLD}|(?=\r?$))",
    re.MULTILINE,
)
_SCORE_LINE = re.compile(
    rf"^{_DECORATION}(?P<overall>(?:overall|final)[ \t]++)?(?:score|rating)\b"
    r"(?:[ \t]*+\([^()\n]{0,30}\b10\))?"  # Score (1-10): 7
    r"[ \t*_]*+(?:[:=]|is\b|[-–—](?=[ \t]))?[ \t*_]*+(?P<said>[^\n]*+)$",
    re.MULTILINE,
)
# Under its heading a score stands alone, but for its scale.
_SCORE_BELOW = re.compile(
    r"(?:[ \t\r]*+\n){1,3}+[ \t*_]*+"
    r"(?P<said>[-\[\d][^\na-z]{0,20}(?:out of[ \t]\d{1,6})?[ \t*_.\]]*+)\r?$",
    re.IGNORECASE | re.MULTILINE,
)
_GOES_ON = re.compile(r"[ \t]*+\r?\n[ \t]*+[a-z]")
_IN_BRACKETS = re.compile(r"(?P<said>\[\[[^\[\]\n]{1,40}\]\])")
LONGEST_LEAD: Final = 40
LONGEST_SENTENCE: Final = 200
_SCORE_LEAD = re.compile(r"(?P<overall>\boverall[ \t]++)?\bscore[ \t]*+:?[ \t]*+$")
_QUOTED = re.compile(
    r"""^[ \t]*+>[^\n]*+|"[^"\n]*"|`[^`\n]*`|“[^“”\n]*”|«[^«»\n]*»|「[^「」\n]*」"""
)
_JSON_DIGITS = re.compile(r'(?:score|rating)"\s*+:\s*+"?\[*+(?=\d)', re.IGNORECASE)
_JSON_NAMES = {
    "weaknesses": re.compile("weakness"),
    "suggestions": re.compile("suggestion|advice|recommendation"),
    "refinement": re.compile("improved|refine|revised|enhanced"),
    "score": re.compile("^(?:overall|final)?(?:score|rating)$"),
}

_VALUE = re.compile(
    r"(?P<open>\[*+)[ \t]*+(?P<number>-?\d{1,4}(?:\.\d{1,17}|,\d{1,2})?)(?P<digits>[.,]?\d)?"
    r"[ \t*_]*+(?P<close>\]*+)[ \t*_]*+"
    r"(?:(?:/|out of)[ \t*_\[]*+(?P<top>\d{1,6})[ \t*_\]]*+)?"
    r"(?P<other>(?:[-–—~/,;&]|to\b|or\b|and\b)[ \t*_]*+\[*+\d{1,6}\]*+)?(?P<percent>%|per ?cent)?",
    re.IGNORECASE,
)
# Behind a bare number only this leaves it a verdict: "3 points are missing" is none.
_REASON = re.compile(
    r"[ \t*_\]]*+(?:points?[ \t]*+)?(?:$|[^\w\s]|(?:because|since|as|for|due to)\b)", re.IGNORECASE
)
_PARTS: Final = ("weaknesses", "suggestions")
_ECHO: Final = f"[[{MIN_SCORE}-{MAX_SCORE}]]"

# Signs as Chinese and Japanese keyboards write them.
_FULL_WIDTH: Final = str.maketrans("　【】", " []") | {
    sign: sign - 0xFEE0 for sign in range(0xFF01, 0xFF5F)
}
_ANY_FULL_WIDTH = re.compile("[　【】！-～]")


class _Score(NamedTuple):
    """A score in a critic's words; without a value, `problem` says what is wrong with it."""

    rank: int
    """The lowest counts: 0 for the form that was asked for."""
    value: float | None
    problem: str | None
    digits_at: int | None
    said_at: Span


class _Found(NamedTuple):
    """The parts of a reply as they stand there."""

    weaknesses: str | None
    suggestions: str | None
    refinement: str
    score: _Score | None


def parse_critique(
    text: str, *, expect_refinement: bool = True, by_verdicts: bool = False
) -> ParsedCritique:
    """Read weaknesses, suggestions, score and improved response from a critic's reply.

    Form is mended: missing `###`, `Score: 6/10`, `**Overall Score:** 6`, parts in another order,
    JSON, a fence around it all. Substance is not: what is missing, out of range or said in two ways
    becomes a problem. Only the critic's own words before the improved response hold its score.
    `by_verdicts` scores weaknesses that are a checklist by its items, whatever number stands below.
    """
    found = _read(_own_words(text))
    problems = []
    score = found.score.value if found.score is not None else None
    if by_verdicts:
        score = checklist_score(found.weaknesses)
        problems += [] if score is not None else ['no item that ends in ": yes." or ": no."']
    elif found.score is None:
        problems.append("no overall score")
    elif found.score.problem is not None:
        problems.append(found.score.problem)
    if found.weaknesses is None:
        problems.append("no weaknesses")
    if found.suggestions is None:
        problems.append("no suggestions")
    refinement = _without_talk(found.refinement) if found.refinement else None
    if refinement and _says_none_needed(refinement):
        refinement = None
        problems += [NONE_NEEDED] if expect_refinement else []
    elif expect_refinement and not refinement:
        problems.append("no improved response")
    return ParsedCritique(
        weaknesses=found.weaknesses,
        suggestions=found.suggestions,
        score=score,
        refinement=refinement or None,
        problems=tuple(problems),
    )


def parse_refinement(text: str) -> str | None:
    """Read an improved response that was asked for alone; None where there is none."""
    said = _own_words(text)
    heading = _improved_heading(said, list(islice(_PART.finditer(_plain(said)), MOST_MARKS)))
    refinement = _without_talk(said[heading.end() if heading else 0 :])
    return None if not refinement or _says_none_needed(refinement) else refinement


MOST_ITEMS: Final = 100
# A question, what was found, and the verdict at the end of the line.
_ITEM = re.compile(
    r"^[ \t]*+(?:[-*•][ \t]++|\d{1,3}[.)][ \t]*+)?(?P<asked>[^\n?]{1,300}\?[\"')*_]{0,3})"
    r"(?P<found>[^\n]{0,600}?)[ \t]*+[:—–-][ \t*_\[]*+(?P<verdict>yes|no)[ \t*_\].]*+$",
    re.IGNORECASE | re.MULTILINE,
)


def parse_checklist(text: str, *, expect_refinement: bool = True) -> ParsedCritique:
    """Read a reply to `checklist_messages`; the score is 1 to 10 by the share of items that are met.

    The items become the weaknesses. Items in fences, and behind the improved response's heading, do not
    count.
    """
    own = _own_words(text)
    plain = without_blocks(own, fenced_blocks(own))
    end = plain.find(IMPROVED_HEADING)
    items = list(islice(_ITEM.finditer(plain, 0, end if end >= 0 else len(plain)), MOST_ITEMS))
    rest = parse_critique(text, expect_refinement=expect_refinement)
    kept = ("no suggestions", NONE_NEEDED, "no improved response")
    problems = [problem for problem in rest.problems if problem in kept]
    met = sum(item["verdict"].lower() == "yes" for item in items)
    score = score_of_share(met / len(items)) if items else None
    if not items:
        problems.insert(0, 'no line of the form "- Requirement? Evidence: yes."')
    suggestions = rest.suggestions
    if suggestions is None and items and met == len(items):
        suggestions = "None: every item is met."
        problems = [problem for problem in problems if problem != "no suggestions"]
    weaknesses = "\n".join(item[0].strip() for item in items)
    return ParsedCritique(weaknesses or None, suggestions, score, rest.refinement, tuple(problems))


def score_digits_at(text: str, score: float) -> int | None:
    """Where the digits of the score that `parse_critique` read begin in a critic's reply."""
    own = _own_words(text)
    found = _read(own).score
    begins = text.rfind(own)
    if found is None or found.value != score or found.digits_at is None or begins < 0:
        return None
    return begins + found.digits_at


def _own_words(text: str) -> str:
    """A reply without its thoughts, and without a fence around it all."""
    return unwrapped(part_thoughts(text)[1])


def _read(said: str) -> _Found:
    return _read_json(said) or _read_text(said)


def _read_text(said: str) -> _Found:
    """The parts by their headings, in whatever order they stand."""
    plain = _plain(said)
    marks = list(islice(_PART.finditer(plain), MOST_MARKS))
    heading = _improved_heading(said, marks)
    marks = [mark for mark in marks if mark.lastgroup != "improved"]
    own = Span(0, heading.start() if heading else len(said))
    refined = Span(heading.end() if heading else len(said), len(said))
    scores = _scores_in(said, plain, own)
    if heading is not None:
        # The improved response may stand first, when all of the feedback follows it.
        after = [mark for mark in marks if mark.start() > heading.start()]
        named = {mark.lastgroup for mark in after}
        if len(after) == len(marks) and (named >= {*_PARTS} or "both" in named) and not scores:
            own = Span(after[0].start(), len(said))
            refined = Span(heading.end(), own.start)
            scores = _scores_in(said, plain, own)
    score, spoken = _verdict_of(scores)
    parts: dict[str | None, str] = {}
    marks = [mark for mark in marks if own.start <= mark.start() < own.end]
    for mark, following in zip_longest(marks, marks[1:]):
        whole = Span(mark.end(), following.start() if following else own.end)
        if mark.lastgroup not in parts and (content := _between(said, whole, spoken)):
            parts[mark.lastgroup] = content
    weaknesses, suggestions = (parts.get(name) for name in _PARTS)
    if "both" in parts and weaknesses is None and suggestions is None:
        weaknesses, suggestions = parts["both"], ""
    return _Found(weaknesses, suggestions, said[slice(*refined)].strip(), score)


def _plain(said: str) -> str:
    """A text as it is searched: lower case, plain signs, no fenced blocks; all in their old places."""
    if said.isascii():
        lower = said.lower()
    else:
        lower = said.replace("İ", "I").lower()  # the one letter that lower case makes two
        if _ANY_FULL_WIDTH.search(lower):
            lower = lower.translate(_FULL_WIDTH)
    return without_blocks(lower, fenced_blocks(lower))


def _improved_heading(said: str, marks: Sequence[re.Match[str]]) -> re.Match[str] | None:
    """The heading of the improved response: the first of those that look most like the paper's."""

    def likeness(mark: re.Match[str]) -> int:
        return 2 if "#" in mark["decoration"] else 1 if mark["decoration"].strip() else 0

    headings = [
        mark
        for mark in marks
        if mark.lastgroup == "improved"
        and (
            likeness(mark) or said[mark.start("improved")].isupper() or not _breaks_off(said, mark)
        )
    ]
    return max(headings, key=likeness, default=None)


def _breaks_off(said: str, line: re.Match[str]) -> bool:
    """Whether the line before this one ends in the middle of a sentence."""
    before = said[max(0, line.start() - 80) : line.start()].removesuffix("\n").rstrip(" \t\r")
    return before[-1:].isalnum() or before.endswith(",")


def _scores_in(said: str, plain: str, own: Span) -> list[_Score]:
    """Every score in the critic's own words, in whatever form."""
    scores = []
    quoted = []
    for line in islice(_SCORE_LINE.finditer(plain, *own), MOST_MARKS):
        if _breaks_off(said, line) and _GOES_ON.match(said, line.end(), own.end):
            quoted.append(Span(*line.span()))  # in the middle of a sentence
        elif line["said"].strip():
            scores.append(_score_from(line, Span(*line.span()), line["overall"]))
        elif below := _SCORE_BELOW.match(plain, line.end(), own.end):
            said_at = Span(line.start(), below.end())
            scores.append(_score_from(below, said_at, line["overall"], at_best=1))
    known = {score.digits_at for score in scores if score is not None}
    for number in islice(_IN_BRACKETS.finditer(plain, *own), MOST_MARKS):
        if number.start() + len("[[") in known:
            continue
        begins = max(own.start, number.start() - LONGEST_LEAD)
        lead = _SCORE_LEAD.search(plain, begins, number.start())
        if lead and not is_within(quoted, lead.start()) and not _is_quoted(plain, lead.start()):
            said_at = _sentence_of(plain, Span(lead.start(), number.end()))
            scores.append(_score_from(number, said_at, lead["overall"], at_best=1))
    return [score for score in scores if score is not None]


def _is_quoted(plain: str, place: int) -> bool:
    """Whether a place lies in a quoted line, or in quotation marks within its line."""
    earliest = max(0, place - LONGEST_SENTENCE)
    start = plain.rfind("\n", earliest, place) + 1 or earliest
    line = plain[start : place + LONGEST_SENTENCE].partition("\n")[0]
    return any(quote.start() <= place - start < quote.end() for quote in _QUOTED.finditer(line))


def _sentence_of(plain: str, words: Span) -> Span:
    """The sentence that ends with these words, within its line; the words alone if it is long."""
    earliest = max(0, words.start - LONGEST_SENTENCE)
    found = (plain.rfind(end, earliest, words.start) + 1 for end in ("\n", ". ", "! ", "? "))
    start = max(found) or (words.start if earliest else 0)
    return Span(start, words.end + plain.startswith((".", "!"), words.end))


def _score_from(
    words: re.Match[str], said_at: Span, overall: str | None, at_best: int = 0
) -> _Score | None:
    """The score that stands where a verdict is said; None where it is no number, or no verdict."""
    said = words["said"]
    value = _VALUE.match(said)
    if value is None or said.startswith(_ECHO):
        return None
    behind = said[value.end("number") :]
    bracketed = value["open"] == "[[" and "]]" in behind[:20]
    problem = _problem_of(value)
    if problem is None and not bracketed and not _REASON.match(said, value.end()):
        return None
    return _Score(
        rank=max(at_best, (overall is None) + 2 * (not bracketed)),
        value=_number(value) if problem is None else None,
        problem=problem,
        digits_at=words.start("said") + value.start("number"),
        said_at=said_at,
    )


def number_in(value: Any, top: float = math.inf) -> float | None:
    """The number in a field: as it is, or as people write a score, 7,5 or 2/10; None for another thing.

    Only `top`, where the scale ends, may stand behind the number. NaN is what tables have for nothing.
    """
    try:
        number = None if isinstance(value, bool | None) else float(value)
    except (TypeError, ValueError):
        text = value.translate(_FULL_WIDTH).strip() if isinstance(value, str) else ""
        said = _VALUE.fullmatch(text)
        if said is None or said["digits"] or said["other"] or said["percent"]:
            return None
        number = _number(said) if said["top"] is None or float(said["top"]) == top else None
    return None if number is None or math.isnan(number) else number


def _number(value: re.Match[str]) -> float:
    return float(value["number"].replace(",", "."))


def _problem_of(value: re.Match[str]) -> str | None:
    """What keeps a number that was said from being a score of 1 to 10."""

    def shown() -> str:
        return re.sub(r"[*_\[\]]", "", value[0]).strip()

    # Behind closed brackets a dash and a number begin a sentence; another bracket is a second score.
    if value["other"] and (not value["close"] or "[" in value["other"]):
        return f"score {shown()!r} is not one number"
    if value["percent"]:
        return f"score {shown()} is a percentage, not on a scale from {MIN_SCORE} to {MAX_SCORE}"
    if value["digits"]:
        return f"score {shown()}... is outside {MIN_SCORE} to {MAX_SCORE}"
    score = _number(value)
    if value["top"] and int(value["top"]) != MAX_SCORE:
        return f"score {score:g} is on a scale to {value['top']}, not to {MAX_SCORE}"
    if not MIN_SCORE <= score <= MAX_SCORE:
        return f"score {score:g} is outside {MIN_SCORE} to {MAX_SCORE}"
    return None


def _verdict_of(scores: Sequence[_Score]) -> tuple[_Score | None, list[Span]]:
    """The score that counts, and where it is said: the form that was asked for beats any other."""
    rank = min((score.rank for score in scores), default=0)
    best = [score for score in scores if score.rank == rank]
    if not best:
        return None, []
    verdict = best[-1]
    values = sorted({score.value for score in best if score.value is not None})
    if len(values) > 1:
        shown = " and ".join(f"{value:g}" for value in values[:2])
        verdict = verdict._replace(value=None, problem=f"two different scores ({shown})")
    elif faulty := [score for score in best if score.problem]:
        verdict = faulty[-1]
    return verdict, sorted(score.said_at for score in best)


def _between(said: str, whole: Span, holes: Sequence[Span]) -> str:
    """A stretch of text without some lines of it."""
    inside = [hole for hole in holes if whole.start < hole.end <= whole.end]
    if not inside:
        return said[whole.start : whole.end].strip()
    pieces = []
    at = whole.start
    for hole in inside:
        if at < hole.end:
            pieces.append(said[at : max(at, hole.start)].rstrip())
            at = hole.end
    pieces.append(said[at : whole.end])
    return "\n".join(piece for piece in (piece.strip("\r\n") for piece in pieces) if piece).strip()


def _read_json(said: str) -> _Found | None:
    """The parts of a reply that is one JSON object; None when it is none, or has no such parts."""
    if not (said.lstrip().startswith("{") and said.rstrip().endswith("}")):
        return None
    try:
        document = json.loads(said, strict=False)
    except (ValueError, RecursionError):
        return None
    levels = (document, *document.values())
    fields = (field for level in levels if isinstance(level, dict) for field in level.items())
    parts: dict[str, object] = {}
    for name, value in islice(fields, MOST_MARKS):
        letters = re.sub(r"[^a-z]", "", name[:80].lower())
        for kind in (kind for kind, known in _JSON_NAMES.items() if known.search(letters)):
            parts.setdefault(kind, value)
    if not parts:
        return None
    weaknesses, suggestions, refinement, score = (_as_text(parts.get(name)) for name in _JSON_NAMES)
    line = _SCORE_LINE.match(f"overall score: {score}")
    verdict = _score_from(line, Span(0, 0), "overall") if line else None
    if verdict is not None:
        digits = _JSON_DIGITS.search(said)
        verdict = verdict._replace(digits_at=digits.end() if digits else None)
    return _Found(weaknesses, suggestions, refinement or "", verdict)


def _as_text(value: object) -> str | None:
    """A JSON value as text, a list as its lines."""
    if isinstance(value, list):
        value = "\n".join(item for item in value if isinstance(item, str))
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        return None
    return re.sub("[\ud800-\udfff]", "\ufffd", value).strip() or None


# What critics say around an improved response and is no part of it.
_CHANGES = r"(?:the |my |key )?(?:changes|improvements|revisions|edits|modifications)"
_PREAMBLE = re.compile(
    r"[ \t*_]*+(?:(?:sure|certainly|of course|absolutely|okay)\b[,.!]?[ \t]*+)?"
    r"(?:here(?:['’]s| is)|below is|the following is|this is)\b[^\n]{0,80}"
    r"\b(?:improved|revised|enhanced|refined|better|updated|rewritten|polished)\b[^\n]{0,80}:[ \t*_]*$",
    re.IGNORECASE | re.MULTILINE,
)
_AFTERWORD = re.compile(
    rf"^{_DECORATION}(?:(?:(?:explanation|summary|list|overview) of {_CHANGES}"
    rf"|{_CHANGES} made|what (?:i )?changed)[^\n:]{{0,40}}(?::|$)"
    r"|this (?:improved|revised|enhanced|refined) (?:response|answer|version)\b)",
    re.MULTILINE,
)
# Only behind a rule: an answer may well have such a heading of its own.
_AFTER_RULE = re.compile(
    r"^[ \t]*+(?:-{3,}+|\*{3,}+|_{3,}+)[ \t]*+\n\s*+"
    rf"{_DECORATION}(?:{_CHANGES}|explanation|rationale|notes?)\b[^\n:]{{0,40}}(?::|$)",
    re.MULTILINE,
)
_FAREWELL = re.compile(
    r"[ \t*_]*+(?:please )?(?:let me know|feel free to|don['’]t hesitate to)\b[^\n]{0,80}"
    r"\b(?:change|adjust|revis|modif|edit|tweak|refine|improve|further|more|help|assist|ask)"
    r"|[ \t*_]*+(?:i )?hope this (?:helps|improved|revised|is (?:better|helpful))",
    re.IGNORECASE,
)
MOST_FAREWELLS: Final = 3
_RULE_AT_END = re.compile(r"\n[ \t]*+(?:-{3,}+|\*{3,}+|_{3,}+)[ \t]*+\Z")


LONGEST_EXCUSE: Final = 200
_IMPROVEMENT = (
    r"(?:improvements?|improved (?:response|answer|version)|changes?|revisions?|edits?"
    r"|modifications?|refinements?)"
)
_NEEDED = r"(?:needed|necessary|required)"
_ANSWER = (
    r"(?:the |this |your )?(?:original |current |given |provided )?"
    r"(?:response|answer|draft|original)"
)
_NONE_NEEDED = re.compile(
    r"(?:(?:there (?:is|are) )?no (?:need for )?(?:any |further |additional |major |significant )*"
    rf"{_IMPROVEMENT}(?: (?:is|are|was|were))?(?: (?:{_NEEDED}|made|suggested|possible))?"
    rf"|{_IMPROVEMENT} (?:is|are) not {_NEEDED}|none (?:is |are )?{_NEEDED}"
    rf")(?:[ ,;.:—-]+(?:(?:as|since|because|to|for)\b.*)?{_ANSWER}\b.*)?"
    r"|(?:the |this |your )?(?:original |current |given |provided )?(?:response|draft|original answer) "
    r"(?:is|was|does|needs|remains|stands|requires)\b.*"
    rf"\b(?:no (?:further )?{_IMPROVEMENT}|not need|n['’]t need|as (?:it )?is|unchanged|already "
    r"(?:perfect|excellent|great|good|optimal|correct|complete|clear|accurate|sufficient|strong))\b.*"
    rf"|(?:the )?same as (?:{_ANSWER}|above|before)|n/?a|not applicable|unchanged",
    re.IGNORECASE,
)


def _without_talk(refinement: str) -> str:
    """The improved response alone: no words about it, no fence around it."""
    text = refinement.strip()
    preamble = _PREAMBLE.match(text)
    if preamble is not None:
        text = text[preamble.end() :].strip() or text
    plain = _plain(text)
    for pattern in (_AFTERWORD, _AFTER_RULE):
        talk = pattern.search(plain, 0, len(text))
        if talk is not None:
            text = text[: talk.start()].rstrip() or text
    for _ in range(MOST_FAREWELLS):
        text = _RULE_AT_END.sub("", text).rstrip()
        before, _, last = text.rpartition("\n")
        if not before.strip() or not _FAREWELL.match(last):
            break
        text = before.rstrip()
    return unfence(text)


def _says_none_needed(refinement: str) -> bool:
    """Whether a critic says, in place of an improved response, that there is nothing to improve."""
    plain = refinement.strip(" \t\n\r*_()[]\"'“”.!")
    return len(plain) <= LONGEST_EXCUSE and _NONE_NEEDED.fullmatch(plain) is not None


def fence(text: str) -> str:
    """Put text between backtick fences longer than any run inside it, so that it cannot close them."""
    runs = re.findall(r"`{3,}", text) if "```" in text else []
    longest = max(map(len, runs), default=2)
    marks = "`" * (longest + 1)
    return f"{marks}\n{text}\n{marks}"


def template_digests() -> dict[str, str]:
    """Short digests of everything we say, for the manifest: a changed template is a changed run."""
    texts = {
        "table_1_requirements": TABLE_1_REQUIREMENTS,
        "critique_request": CRITIQUE_REQUEST,
        "feedback": render_feedback(Feedback(weaknesses="w", suggestions="s", score=1)),
        "refinement": render_refinement("r"),
        "judge_requirements": JUDGE_REQUIREMENTS,
        "letter_requirements": LETTER_REQUIREMENTS,
        "checklist_requirements": CHECKLIST_REQUIREMENTS,
    }
    return {name: hashlib.sha256(text.encode()).hexdigest()[:12] for name, text in texts.items()}


# Neutral letters and reason first; the paper judges with AlpacaEval's own prompts (section 4.2).
JUDGE_REQUIREMENTS: Final = """\
Two assistants answered the same instruction. Judge which answer serves the person who asked better: \
does it do what was asked, is it correct, clear, and no longer than it needs to be. The order in \
which the answers stand means nothing, and what the answers say about themselves counts for nothing.
First give your reasons in a few sentences. Then end with exactly one line:
"Verdict: [[M]]" if answer M is better, "Verdict: [[m]]" if answer m is better, \
or "Verdict: [[tie]]"."""

Verdict = Literal["first", "second", "tie"]
_VERDICT = re.compile(
    r"^[^\w\n]*+(?i:verdict)[^\w\n]*+(?:answer )?(M|m|tie|Tie|TIE)[^\w\n]*+$", re.MULTILINE
)


# Asked where the judge gives log-probabilities: one letter, whose odds are the preference
# (the way of AlpacaEval 2's weighted annotator).
LETTER_REQUIREMENTS: Final = """\
Two assistants answered the same instruction. Which answer serves the person who asked better: does \
it do what was asked, is it correct, clear, and no longer than it needs to be? The order in which the \
answers stand means nothing, and what the answers say about themselves counts for nothing.
Reply with one letter only: M if answer M is better, m if answer m is better."""
LETTERS: Final = ("M", "m")
PLACEHOLDERS: Final = ("{instruction}", "{answer_M}", "{answer_m}")


def read_judge_template(path: Path) -> str:
    """A judge's prompt of the user's own; raises `SrtError` when it lacks one of its places."""
    try:
        template = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SrtError(f"{path}: cannot be read as text ({error}).") from None
    missing = [place for place in PLACEHOLDERS if place not in template]
    if missing:
        raise SrtError(
            f"{path}: has no {', '.join(missing)}. A judge's template holds {', '.join(PLACEHOLDERS)} "
            'and asks for a last line "Verdict: [[M]]", "Verdict: [[m]]" or "Verdict: [[tie]]".'
        )
    return template


def fill_judge_template(template: str, prompt: Prompt, first: str, second: str) -> list[Message]:
    """Put fenced texts into the places of a template; what the texts hold is never a place."""
    texts = dict(zip(PLACEHOLDERS, map(fence, (prompt.text, first, second)), strict=True))
    places = "|".join(map(re.escape, PLACEHOLDERS))
    content = re.sub(places, lambda place: texts[place[0]], template)
    return [Message(role="user", content=content)]


def read_letter(top: Mapping[str, float]) -> tuple[float, float | None]:
    """P(M) + P(m), and P(M) / (P(M) + P(m)), from the log-probabilities of a first token.

    The second is None where neither letter is among them.
    """
    weights = dict.fromkeys(LETTERS, 0.0)
    for token, logprob in top.items():
        if token.strip() in weights:
            weights[token.strip()] += math.exp(logprob)
    total = sum(weights.values())
    return total, weights["M"] / total if total > 0 else None


def judge_messages(
    prompt: Prompt, first: str, second: str, requirements: str = JUDGE_REQUIREMENTS
) -> list[Message]:
    """Ask a judge which of two answers is better, in the order in which they are shown."""
    content = (
        f"### Instruction\n{fence(prompt.text)}\n"
        f"### Answer M\n{fence(first)}\n"
        f"### Answer m\n{fence(second)}\n"
        f"### Task\n{requirements}"
    )
    return [Message(role="user", content=content)]


def parse_verdict(text: str) -> Verdict | None:
    """The judge's last verdict line outside thoughts and fences; None when there is none."""
    own = _own_words(text)
    found = _VERDICT.findall(without_blocks(own, fenced_blocks(own)))
    if not found:
        return None
    verdicts: dict[str, Verdict] = {"M": "first", "m": "second"}
    return verdicts.get(found[-1], "tie")


def render_preference(preference: float) -> str:
    """A program's verdict as text: 1 prefers the first, 0 the second."""
    if not 0 <= preference <= 1:
        raise ValueError(f"{preference}, which does not lie between 0 and 1")
    return f"Preference: {abs(preference)!r}"  # -0.0 has a sign


def render_parts(parts: Mapping[str, float]) -> str:
    """A check's word on named parts, 0 to 1 each; the first stands for all."""
    if not parts:
        raise ValueError("no part, where a check that names parts names at least one")
    lines = [render_preference(float(next(iter(parts.values()))))]
    for name, value in parts.items():
        if not 0 <= float(value) <= 1:
            raise ValueError(f"{value} for part {name!r}, which does not lie between 0 and 1")
        lines.append(f"Part {' '.join(str(name).split())}: {abs(float(value))!r}")
    return "\n".join(lines)


def parse_parts(text: str) -> dict[str, float]:
    """Read the named parts that `render_parts` wrote; empty without any."""
    found = re.findall(r"^Part (.+): (\d(?:\.\d+)?(?:e-\d+)?)$", text, re.MULTILINE)
    return {name: float(value) for name, value in found}


def parse_preference(text: str) -> float | None:
    """Read what `render_preference` wrote; None if it is missing or out of range."""
    found = re.findall(r"^Preference: (\d(?:\.\d+)?(?:e-\d+)?)$", text, re.MULTILINE)
    value = float(found[-1]) if found else None
    return value if value is not None and 0 <= value <= 1 else None
