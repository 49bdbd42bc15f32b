"""A critic, judge and check for verifiable instructions: everything is decided by code.

    --critic python:examples/quickstart/critic.py:critique
    --judge  python:examples/quickstart/critic.py:judge
    --check  python:examples/quickstart/critic.py:check

A prompt row carries its `constraints` as [kind, argument] pairs. The critic says in plain language
which of them the response breaks and how to mend it, scores it by the share it meets, and writes a
refinement that meets all of them, made from the response's own words.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from srt_cli.records import Feedback, Prompt

MOST_WORDS = 12


@dataclass(frozen=True)
class Kind:
    """One kind of instruction: how it is asked, looked up, checked and mended.

    `evidence` says in words what the text has, quoting it, so that the verdict follows from what
    was just written: a small model learns to look before it judges.
    """

    ask: str
    evidence: Callable[[str, str], str]
    wanted: str
    advice: str
    check: Callable[[str, str], bool]
    mend: Callable[[str, str], str]


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9']+", text)


def sentences_of(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words_of(part)]


def one_sentence(text: str) -> str:
    """The first sentence of a text, plain and not long, ending with a full stop."""
    found = sentences_of(re.sub(r"[\"*#`{}\[\]<>|]|^\s*[-\d.]+\s", "", text.replace("\n", " ")))
    first = found[0] if found else "This is a thing worth a closer look."
    kept = " ".join(first.split()[:MOST_WORDS])
    return kept.rstrip(".!?,;: ") + "."


def lower_first(text: str) -> str:
    return text[:1].lower() + text[1:] if not text.startswith("I ") else text


def _has_word(text: str, word: str) -> bool:
    return word.lower() in (found.lower() for found in words_of(text))


def _without_word(text: str, word: str) -> str:
    text = re.sub(rf"\b{re.escape(word)}\b\s*", "", text, flags=re.IGNORECASE).strip()
    return text[:1].upper() + text[1:]


def _is_answer_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict) and list(value) == ["answer"] and bool(str(value["answer"]).strip())
    )


def _last_words(text: str, count: int) -> str:
    return " ".join(text.rstrip('".!?} ').split()[-count:])


def _around_comma(text: str) -> str:
    if "," not in text:
        return "It has no comma"
    before = text.split(",")[0].split()
    return f'It has a comma after "{before[-1] if before else ""}"'


def _word_in_case(text: str, wanted: Callable[[str], str]) -> str:
    """The first word in the wrong case, else the first word."""
    words = text.split() or [""]
    return next((word for word in words if word != wanted(word)), words[0])


def _last_part(text: str) -> str:
    return text.split()[-1] if text.split() else ""


def _opening(text: str) -> str:
    return text.split()[0] if text.split() else ""


KINDS: dict[str, Kind] = {
    "without": Kind(
        'Do not use the word "{0}".',
        lambda text, word: f'It {"has" if _has_word(text, word) else "does not have"} "{word}"',
        'leave out "{0}"',
        'Leave out the word "{0}".',
        lambda text, word: not _has_word(text, word),
        _without_word,
    ),
    "no_commas": Kind(
        "Use no commas.",
        lambda text, _: _around_comma(text),
        "no commas",
        "Take out every comma.",
        lambda text, _: "," not in text,
        lambda text, _: text.replace(",", ""),
    ),
    "at_most": Kind(
        "Use at most {0} words.",
        lambda text, _: f"It has {len(text.split())} words",
        "at most {0}",
        "Cut it to {0} words or fewer.",
        lambda text, most: len(text.split()) <= int(most),
        lambda text, most: " ".join(text.split()[: int(most)]).rstrip(".,;: ") + ".",
    ),
    "include": Kind(
        'Use the word "{0}".',
        lambda text, word: f'It {"has" if _has_word(text, word) else "does not have"} "{word}"',
        'use "{0}"',
        'Work in the word "{0}".',
        _has_word,
        lambda text, word: text.rstrip(".!? ") + f", with a touch of {word}.",
    ),
    "start": Kind(
        'Begin with the word "{0}".',
        lambda text, _: f'It begins with "{(words_of(text) or [""])[0]}"',
        'begin with "{0}"',
        'Put "{0}" at the beginning.',
        lambda text, word: text.lstrip('"').startswith(word),
        lambda text, word: f"{word}, {lower_first(text)}",
    ),
    "end": Kind(
        'End with the words "{0}".',
        lambda text, phrase: f'It ends with "{_last_words(text, len(phrase.split()))}"',
        'end with "{0}"',
        'Put "{0}" at the end.',
        lambda text, phrase: text.rstrip('".!?} ').endswith(phrase),
        lambda text, phrase: text.rstrip(".!? ") + f" {phrase}.",
    ),
    "two_sentences": Kind(
        "Write exactly two sentences.",
        lambda text, _: f"It has {len(sentences_of(text))} sentences",
        "exactly two",
        "Write two sentences, no more and no fewer.",
        lambda text, _: len(sentences_of(text)) == 2,
        lambda text, _: f"{one_sentence(text)} It is worth knowing well.",
    ),
    "lower": Kind(
        "Use only small letters.",
        lambda text, _: f'It has the word "{_word_in_case(text, str.lower)}"',
        "small letters",
        "Write every letter small.",
        lambda text, _: text == text.lower(),
        lambda text, _: text.lower(),
    ),
    "upper": Kind(
        "Use only capital letters.",
        lambda text, _: f'It has the word "{_word_in_case(text, str.upper)}"',
        "capital letters",
        "Write every letter as a capital.",
        lambda text, _: text == text.upper(),
        lambda text, _: text.upper(),
    ),
    "bullet": Kind(
        'Write it as one bullet that starts with "- ".',
        lambda text, _: f"It starts with {_opening(text)}",
        'one bullet with "- "',
        'Start the line with "- ".',
        lambda text, _: text.startswith("- ") and "\n" not in text.strip(),
        lambda text, _: f"- {text}",
    ),
    "quoted": Kind(
        "Put the whole answer in double quotes.",
        lambda text, _: f"It runs from {_opening(text)} to {_last_part(text)}",
        "double quotes around it",
        "Put double quotes around the whole answer.",
        lambda text, _: len(text) > 2 and text[0] == text[-1] == '"',
        lambda text, _: '"' + text.strip('" ') + '"',
    ),
    "json": Kind(
        'Answer as JSON with the one key "answer".',
        lambda text, _: f"It starts with {_opening(text)}",
        'JSON with the key "answer"',
        'Write {{"answer": "..."}} around the text.',
        lambda text, _: _is_answer_json(text),
        lambda text, _: json.dumps({"answer": text}),
    ),
}
"""In the order in which mending them leaves the earlier ones whole."""


def constraints_of(prompt: Prompt) -> list[tuple[Kind, str, str]]:
    """The prompt row's constraints as (kind, argument, name), in the order of mending."""
    rows = (prompt.model_extra or {}).get("constraints", [])
    if not rows:
        raise ValueError(f"prompt {prompt.id} has no constraints to check")
    given = {str(name): str(argument) for name, argument in rows}
    return [(KINDS[name], given[name], name) for name in KINDS if name in given]


def broken_constraints(prompt: Prompt, response: str) -> list[tuple[Kind, str]]:
    """What a response does not meet; an empty one meets nothing."""
    return [
        (kind, argument)
        for kind, argument, _ in constraints_of(prompt)
        if not response.strip() or not kind.check(response.strip(), argument)
    ]


def critique(prompt: Prompt, response: str) -> tuple[Feedback, str]:
    """Honest feedback on a response, and a refinement that meets every constraint."""
    text = response.strip()
    broken = broken_constraints(prompt, text)
    findings = []
    for kind, argument, _ in constraints_of(prompt):
        asked = kind.wanted.format(argument)
        verdict = f"but should: {asked}" if (kind, argument) in broken else "as asked"
        findings.append(f"{kind.evidence(text, argument)}, {verdict}.")
    if not broken:
        return Feedback(weaknesses=" ".join(findings), suggestions="Keep it.", score=10), text
    met = 1 - len(broken) / len(constraints_of(prompt))
    feedback = Feedback(
        weaknesses=" ".join(findings),
        suggestions=" ".join(kind.advice.format(argument) for kind, argument in broken),
        score=2 + round(4 * met),
    )
    return feedback, refine(prompt, response)


def refine(prompt: Prompt, response: str) -> str:
    """The response's first sentence, mended until it meets every constraint."""
    text = one_sentence(response)
    for kind, argument, _ in constraints_of(prompt):
        if not kind.check(text, argument):
            text = kind.mend(text, argument)
    assert not broken_constraints(prompt, text), (prompt.id, text)
    return text


def check(prompt: Prompt, response: str) -> bool:
    """Whether a response meets every constraint."""
    return not broken_constraints(prompt, response)


def judge(prompt: Prompt, a: str, b: str) -> float:
    """1 when `a` meets more constraints, 0 when `b` does, 0.5 when they meet as many."""
    broken_a, broken_b = len(broken_constraints(prompt, a)), len(broken_constraints(prompt, b))
    return 0.5 if broken_a == broken_b else float(broken_a < broken_b)
