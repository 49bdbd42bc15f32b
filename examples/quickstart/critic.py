"""A critic, judge and check for verifiable instructions: everything is decided by code.

    --critic   python:examples/quickstart/critic.py:critique
    --contrast python:examples/quickstart/critic.py:contrast
    --judge    python:examples/quickstart/critic.py:judge
    --check    python:examples/quickstart/critic.py:check

A prompt row carries its `constraints` as [kind, argument] pairs. The critic goes through them like a
checklist: what is asked, what the response has in that place, and whether that will do. It scores the
share that is met, and writes a refinement that meets all of them, made from the response's own words.
`contrast` takes a refinement that meets everything, and breaks one constraint.
"""

import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from srt_cli.records import Feedback, Prompt

MOST_WORDS = 12
STARTS = ("Today", "Perhaps", "Certainly", "Sometimes", "Clearly", "Often")
ENDINGS = ("in the end", "every day", "after all", "as always", "for everyone")
INCLUDED = ("silver", "morning", "quiet", "bright", "simple", "golden", "gentle", "distant")
NAMES = ("Anna", "Ben", "Clara", "David")
LABELS = ("Note", "Fact", "Tip", "Idea")
NUMBERS = ("3", "7", "12", "40")
NO_LAST_WORDS = re.compile(
    "an?|the|of|in|on|at|to|for|with|and|or|but|that|which|who|is|are|was|can|be|as|by|from|its|their|it|"
    "this|these|into|through|such|while|when|where|they|we|you|have|has|had|not|so|very|more|most|both"
)


@dataclass(frozen=True)
class Kind:
    """One kind of instruction: how it is asked, looked up, checked, mended and broken.

    `quote` is what the text has in the place that counts, so that the verdict follows from what stands
    right before it: a small model learns to look before it judges.
    """

    ask: str
    item: str
    quote: Callable[[str, str], str]
    advice: str
    check: Callable[[str, str], bool]
    mend: Callable[[str, str], str]
    spoil: Callable[[str, str, random.Random], str]
    arguments: tuple[str, ...] = ("",)


def words_of(text: str) -> list[str]:
    return re.findall(r"[A-Za-z0-9']+", text)


def longest_letters(text: str) -> str:
    """The longest word, in small letters, without what is no letter."""
    return re.sub("[^a-z]", "", max(words_of(text), key=len).lower()) or "topic"


def sentences_of(text: str) -> list[str]:
    return [part for part in re.split(r"(?<=[.!?])\s+", text.strip()) if words_of(part)]


def one_sentence(text: str) -> str:
    """The first sentence of a text, plain and not long, ending with a full stop."""
    plain = re.sub(r"[\"“”*#`{}\[\]<>|()]|^\s*[-\d.]+\s", "", text.replace("\n", " "))
    found = sentences_of(plain)
    words = (found[0] if found else "This is a thing worth a closer look.").split()
    kept = words[:MOST_WORDS]
    if len(words) > MOST_WORDS:
        breaks = [n for n in range(5, MOST_WORDS) if kept[n - 1].endswith((",", ";"))]
        kept = kept[: breaks[-1]] if breaks else kept
    while len(kept) > 3 and NO_LAST_WORDS.fullmatch(kept[-1].lower().strip(".,;:!?")):
        kept = kept[:-1]
    sentence = " ".join(kept).rstrip(".!?,;: ") + "."
    return sentence[:1].upper() + sentence[1:]


def lower_first(text: str) -> str:
    return text if text.startswith(("I ", "I'")) else text[:1].lower() + text[1:]


def upper_first(text: str) -> str:
    return text[:1].upper() + text[1:]


def without_end(text: str) -> str:
    return text.rstrip('.!?") ')


def first(text: str) -> str:
    return (text.split() or [""])[0]


def last(text: str, count: int = 1) -> str:
    return " ".join(text.split()[-count:])


def frame(text: str, _: str = "") -> str:
    return f"from {first(text)} to {last(text)}"


def _has_word(text: str, word: str) -> bool:
    return word.lower() in (found.lower() for found in words_of(text))


def _beside_word(text: str, word: str) -> str:
    """The word with the one before it, as the text has them."""
    words = text.split()
    found = (n for n, each in enumerate(words) if _has_word(each, word))
    return next((" ".join(words[max(0, n - 1) : n + 1]) for n in found), "not there")


def _word_with(text: str, mark: str) -> str:
    return next((word for word in text.split() if mark in word), "none")


def _word_in_case(text: str, wanted: Callable[[str], str], none: str) -> str:
    return next((word for word in text.split() if word != wanted(word)), none)


def _without_word(text: str, word: str) -> str:
    return upper_first(re.sub(rf"\b{re.escape(word)}\b\s*", "", text, flags=re.IGNORECASE).strip())


def _insert(text: str, what: str, draw: random.Random) -> str:
    words = text.split()
    place = draw.randrange(1, max(2, len(words) - 1))
    return " ".join(words[:place]) + what + " ".join(words[place:])


def _other(draw: random.Random, choices: tuple[str, ...], one: str) -> str:
    return draw.choice([choice for choice in choices if choice != one])


def _is_answer_json(text: str) -> bool:
    try:
        value = json.loads(text)
    except ValueError:
        return False
    return (
        isinstance(value, dict) and list(value) == ["answer"] and bool(str(value["answer"]).strip())
    )


def _misplace(text: str, phrase: str, draw: random.Random) -> str:
    """An ending left out, exchanged, put at the beginning, or no longer the end."""
    bare = text.replace(f" {phrase}", "")
    return draw.choice([
        bare,
        text.replace(phrase, _other(draw, ENDINGS, phrase)),
        f"{upper_first(phrase)}, {lower_first(bare)}",
        f"{text.rstrip('.')} and more.",
    ])  # fmt: skip


def _unbegin(text: str, word: str, draw: random.Random) -> str:
    bare = upper_first(re.sub(rf"^{word},? ", "", text))
    return draw.choice([bare, text.replace(word, _other(draw, STARTS, word), 1)])


def wrapped(ask: str, item: str, opening: str, closing: str, name: str) -> Kind:
    """The whole answer between two marks."""

    def spoil(text: str, _: str, draw: random.Random) -> str:
        if not (text.startswith(opening) and text.endswith(closing)):
            return text.replace(opening, "").replace(closing, "")
        inner = text[len(opening) : -len(closing)]
        return draw.choice([inner, inner + closing, opening + inner])

    return Kind(
        ask, item, frame, f"Put {name} around the whole answer.",
        lambda text, _: (
            len(text) > len(opening + closing)
            and text.startswith(opening) and text.endswith(closing)
        ),
        lambda text, _: opening + text.strip('" ') + closing,
        spoil,
    )  # fmt: skip


MARKS = ("- ", "1. ", "# ", "> ", "* ")


def marked(ask: str, mark: str) -> Kind:
    """One line that starts with a mark."""
    return Kind(
        ask, f'Begin with "{mark}"', lambda text, _: first(text), f'Start with "{mark}".',
        lambda text, _: text.startswith(mark) and "\n" not in text.strip(),
        lambda text, _: mark + text,
        lambda text, _, draw: draw.choice(["", _other(draw, MARKS, mark)]) + text.removeprefix(mark),
    )  # fmt: skip


KINDS: dict[str, Kind] = {
    "without": Kind(
        'Do not use the word "{0}".', 'Without "{0}"', _beside_word, 'Leave out the word "{0}".',
        lambda text, word: not _has_word(text, word),
        _without_word,
        lambda text, word, draw: _insert(text, f" {word} ", draw),
        ("the", "and", "is", "of"),
    ),
    "no_commas": Kind(
        "Use no commas.", "No commas", lambda text, _: _word_with(text, ","), "Take out every comma.",
        lambda text, _: "," not in text,
        lambda text, _: text.replace(",", ""),
        lambda text, _, draw: _insert(text, ", ", draw),
    ),
    "at_most": Kind(
        "Use at most {0} words.", "At most {0} words", lambda text, _: f"{len(text.split())} words",
        "Cut it to {0} words or fewer.",
        lambda text, most: len(text.split()) <= int(most),
        lambda text, most: " ".join(text.split()[: int(most)]).rstrip(".,;: ") + ".",
        lambda text, most, draw: f"{without_end(text)}" + " and much more" * (int(most) // 3 + 1) + ".",
        ("8", "10", "12"),
    ),
    "two_sentences": Kind(
        "Write exactly two sentences.", "Two sentences",
        lambda text, _: f"{len(sentences_of(text))} of them",
        "Write two sentences, no more and no fewer.",
        lambda text, _: len(sentences_of(text)) == 2,
        lambda text, _: f"{one_sentence(text)} It is worth knowing well.",
        lambda text, _, draw: sentences_of(text)[0],
    ),
    "include": Kind(
        'Use the word "{0}".', 'Use "{0}"', _beside_word, 'Work in the word "{0}".',
        _has_word,
        lambda text, word: f"{without_end(text)}, with a touch of {word}.",
        lambda text, word, draw: re.sub(
            rf"\b{word}\b", _other(draw, INCLUDED, word), text, flags=re.IGNORECASE
        ),
        INCLUDED,
    ),
    "number": Kind(
        "Use the number {0}.", "The number {0}",
        lambda text, _: (re.findall(r"[0-9]+", text) or ["none"])[0], "Work in the number {0}.",
        lambda text, number: number in re.findall(r"[0-9]+", text),
        lambda text, number: f"{without_end(text)} in {number} ways.",
        lambda text, number, draw: draw.choice([
            text.replace(f" in {number} ways", "").replace(number, "some"),
            text.replace(number, _other(draw, NUMBERS, number)),
        ]),
        NUMBERS,
    ),
    "semicolon": Kind(
        "Use a semicolon.", "A semicolon", lambda text, _: _word_with(text, ";"), "Put in a semicolon.",
        lambda text, _: ";" in text,
        lambda text, _: f"{without_end(text)}; that is worth knowing.",
        lambda text, _, draw: draw.choice([text.split(";")[0] + ".", text.replace(";", ",")]),
    ),
    "start": Kind(
        'Begin with the word "{0}".', 'Begin with "{0}"', lambda text, _: (words_of(text) or [""])[0],
        'Put "{0}" at the beginning.',
        lambda text, word: (words_of(text) or [""])[0] == word,
        lambda text, word: f"{word}, {lower_first(text)}",
        _unbegin, STARTS,
    ),
    "label": Kind(
        'Begin with "{0}:".', 'Begin with "{0}:"', lambda text, _: first(text),
        'Put "{0}:" at the beginning.',
        lambda text, word: text.startswith(f"{word}:"),
        lambda text, word: f"{word}: {text}",
        lambda text, word, draw: draw.choice([
            text.removeprefix(f"{word}: "),
            text.replace(f"{word}:", f"{word},", 1),
            text.replace(word, _other(draw, LABELS, word), 1),
        ]),
        LABELS,
    ),
    "end": Kind(
        'End with the words "{0}".', 'End with "{0}"',
        lambda text, phrase: last(text, len(phrase.split())),
        'Put "{0}" at the end.',
        lambda text, phrase: text.rstrip('".!?})*]> ').endswith(phrase),
        lambda text, phrase: f"{without_end(text)} {phrase}.",
        _misplace, ENDINGS,
    ),
    "question": Kind(
        "Write it as a question.", "A question mark at the end", lambda text, _: last(text),
        "Turn it into a question.",
        lambda text, _: text.endswith("?"),
        lambda text, _: f"Did you know that {without_end(lower_first(text))}?",
        lambda text, _, draw: text.rstrip("?") + draw.choice([".", "!"]),
    ),
    "exclaim": Kind(
        "End with an exclamation mark.", "An exclamation mark at the end", lambda text, _: last(text),
        "End with an exclamation mark.",
        lambda text, _: text.endswith("!"),
        lambda text, _: without_end(text) + "!",
        lambda text, _, draw: text.rstrip("!") + draw.choice([".", "?"]),
    ),
    "dots": Kind(
        'End with three dots, "...".', "Three dots at the end", lambda text, _: last(text),
        "End with three dots.",
        lambda text, _: text.endswith("..."),
        lambda text, _: without_end(text) + "...",
        lambda text, _, draw: text.rstrip(".") + draw.choice([".", "!"]),
    ),
    "sign": Kind(
        'Sign it with "- {0}" at the end.', 'Sign it "- {0}"', lambda text, _: last(text, 2),
        'Sign it "- {0}".',
        lambda text, name: text.endswith(f"- {name}"),
        lambda text, name: f"{text} - {name}",
        lambda text, name, draw: draw.choice([
            text.removesuffix(f" - {name}"),
            text.removesuffix(name) + _other(draw, NAMES, name),
        ]),
        NAMES,
    ),
    "postscript": Kind(
        'Add a postscript that begins with "P.S."', "A postscript",
        lambda text, _: _word_with(text, "P.S."), 'Add a "P.S." at the end.',
        lambda text, _: "P.S. " in text[1:],
        lambda text, _: f"{text} P.S. It is worth knowing.",
        lambda text, _, draw: text.split(" P.S.")[0],
    ),
    "hashtag": Kind(
        "End with a hashtag.", "A hashtag at the end", lambda text, _: last(text), "End with a hashtag.",
        lambda text, _: bool(re.search(r"\s#[A-Za-z]\w*$", text)),
        lambda text, _: f"{text} #{longest_letters(text)}",
        lambda text, _, draw: draw.choice([re.sub(r"\s#\w+$", "", text), text.replace(" #", " ")]),
    ),
    "lower": Kind(
        "Use only small letters.", "Small letters only",
        lambda text, _: _word_in_case(text, str.lower, "no capitals"), "Write every letter small.",
        lambda text, _: text == text.lower(),
        lambda text, _: text.lower(),
        lambda text, _, draw: draw.choice([upper_first(text), text.title()]),
    ),
    "upper": Kind(
        "Use only capital letters.", "Capital letters only",
        lambda text, _: _word_in_case(text, str.upper, "no small letters"),
        "Write every letter as a capital.",
        lambda text, _: text == text.upper(),
        lambda text, _: text.upper(),
        lambda text, _, draw: draw.choice([text.capitalize(), text.title()]),
    ),
    "bullet": marked('Write it as one bullet that starts with "- ".', "- "),
    "numbered": marked('Number it, starting with "1. ".', "1. "),
    "heading": marked('Write it as a heading that starts with "# ".', "# "),
    "quote": marked('Write it as a quote that starts with "> ".', "> "),
    "quoted": wrapped(
        "Put the whole answer in double quotes.", "Double quotes around it", '"', '"', "double quotes"
    ),
    "parens": wrapped(
        "Put the whole answer in round brackets.", "Round brackets around it", "(", ")",
        "round brackets",
    ),
    "square": wrapped(
        "Put the whole answer in square brackets.", "Square brackets around it", "[", "]",
        "square brackets",
    ),
    "bold": wrapped(
        "Put the whole answer between ** and **.", "Bold, with ** around it", "**", "**", "** and **"
    ),
    "json": Kind(
        'Answer as JSON with the one key "answer".', 'JSON with the key "answer"', frame,
        'Write {{"answer": "..."}} around the text.',
        lambda text, _: _is_answer_json(text),
        lambda text, _: json.dumps({"answer": text}),
        lambda text, _, draw: draw.choice([text[12:-2], text.replace('"answer"', '"text"'), text[:-1]]),
    ),
}  # fmt: skip
"""In the order in which mending them leaves the earlier ones whole."""


def constraints_of(prompt: Prompt) -> list[tuple[Kind, str]]:
    """The prompt row's constraints as (kind, argument), in the order of mending."""
    rows = (prompt.model_extra or {}).get("constraints", [])
    if not rows:
        raise ValueError(f"prompt {prompt.id} has no constraints to check")
    given = {str(name): str(argument) for name, argument in rows}
    return [(KINDS[name], given[name]) for name in KINDS if name in given]


def broken_constraints(prompt: Prompt, response: str) -> list[tuple[Kind, str]]:
    """What a response does not meet; an empty one meets nothing."""
    return [
        (kind, argument)
        for kind, argument in constraints_of(prompt)
        if not response.strip() or not kind.check(response.strip(), argument)
    ]


def checklist(prompt: Prompt, text: str, broken: list[tuple[Kind, str]]) -> str:
    """Every constraint with a quotation from the text, and no for those that are broken."""
    return " ".join(
        f"{kind.item.format(argument)}? {kind.quote(text, argument)}: "
        f"{'no' if (kind, argument) in broken else 'yes'}."
        for kind, argument in constraints_of(prompt)
    )


def critique(prompt: Prompt, response: str) -> tuple[Feedback, str]:
    """Honest feedback on a response, item by item, and a refinement that meets every constraint."""
    text = response.strip()
    broken = broken_constraints(prompt, text)
    weaknesses = checklist(prompt, text, broken)
    if not broken:
        return Feedback(weaknesses=weaknesses, suggestions="Keep it.", score=10), text
    met = 1 - len(broken) / len(constraints_of(prompt))
    suggestions = " ".join(kind.advice.format(argument) for kind, argument in broken)
    feedback = Feedback(weaknesses=weaknesses, suggestions=suggestions, score=2 + round(4 * met))
    return feedback, refine(prompt, response)


def refine(prompt: Prompt, response: str) -> str:
    """The response's first sentence, mended until it meets every constraint."""
    text = one_sentence(response)
    for kind, argument in constraints_of(prompt):
        if not kind.check(text, argument):
            text = kind.mend(text, argument)
    assert not broken_constraints(prompt, text), (prompt.id, text)
    return text


def contrast(prompt: Prompt, response: str) -> str:
    """A good response with one fault planted in it; unchanged where none can be."""
    draw = random.Random(f"{prompt.id} {response}")
    constraints = constraints_of(prompt)
    for _ in range(20):
        kind, argument = draw.choice(constraints)
        spoiled = kind.spoil(response.strip(), argument, draw).strip()
        if spoiled and not kind.check(spoiled, argument):
            return spoiled
    return response


def check(prompt: Prompt, response: str) -> bool:
    """Whether a response meets every constraint."""
    return not broken_constraints(prompt, response)


def judge(prompt: Prompt, a: str, b: str) -> float:
    """1 when `a` meets more constraints, 0 when `b` does, 0.5 when they meet as many."""
    broken_a, broken_b = len(broken_constraints(prompt, a)), len(broken_constraints(prompt, b))
    return 0.5 if broken_a == broken_b else float(broken_a < broken_b)
