"""What stands where in a text that a model wrote: its thoughts, its fenced blocks, its answer.

All of it takes time linear in the text, because models that loop write megabytes of one sign.
"""

import re
from bisect import bisect
from collections.abc import Iterable, Sequence
from itertools import islice, zip_longest
from typing import Final, NamedTuple


class Span(NamedTuple):
    """Where a piece of a text begins and ends, in characters."""

    start: int
    end: int


THOUGHT_TAGS: Final = {
    "<think>": "</think>",
    "<thinking>": "</thinking>",
    "<thought>": "</thought>",  # EXAONE
    "<seed:think>": "</seed:think>",
    "[THINK]": "[/THINK]",  # Magistral
    "◁think▷": "◁/think▷",  # Kimi
    "<|channel>thought": "<channel|>",  # Gemma 4
    "<|START_THINKING|>": "<|END_THINKING|>",  # Command A
    "<|begin_of_thought|>": "<|end_of_thought|>",
}
"""What models put around their thoughts, by their own chat templates; gpt-oss has channels instead."""
ANALYSIS: Final = ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant")
"""What stands around the thoughts of gpt-oss."""
_SIGNS_OF_THOUGHTS: Final = ("hink", "hought", "HINK", "channel")
"""What no tag is without."""
_OPENED_BY: Final = {closing: opening for opening, closing in THOUGHT_TAGS.items()}
_OPENING_TAG: Final = "|".join(map(re.escape, THOUGHT_TAGS))
_FIRST: Final = re.compile(rf"\s*+({_OPENING_TAG})")
_LATER: Final = re.compile(rf"^[ \t]*+({_OPENING_TAG})", re.MULTILINE)
# In quotes or backticks a tag is only spoken of.
_CLOSING: Final = re.compile(rf"(?<![`'\"])(?:{'|'.join(map(re.escape, _OPENED_BY))})")

# gpt-oss: <|channel|>analysis<|message|>...<|end|><|start|>assistant<|channel|>final<|message|>...
_CHANNEL: Final = re.compile(
    r"<\|channel\|>\s*+(\w++)[^<\n]*+(?:<\|constrain\|>[^<\n]*+)?<\|message\|>"
)
_CHANNEL_END: Final = re.compile(r"<\|(?:end|return|call|start|channel)\|>")
# The same without its special tokens, as a decoder leaves it that takes them out.
_BARE_ANALYSIS: Final = re.compile(r"\s*+analysis(?=[A-Z])")
_BARE_FINAL: Final = "assistantfinal"


_CHANNEL_MARKS: Final = (
    "<|channel|>", "<|message|>", "<|constrain|>", "<|start|>", "<|end|>", "<|return|>", "<|call|>",
)  # fmt: skip


def opened_by(prompt: str) -> str:
    """The tag at the end of a prompt that opens a model's thoughts; "" where there is none."""
    end = prompt.rstrip()
    return next((tag for tag in THOUGHT_TAGS if end.endswith(tag)), "")


def marks_of_thoughts(controls: Iterable[str]) -> set[str]:
    """Which of a model's control tokens tell its thoughts from its answers."""
    known = set(controls)
    tags = {tag for pair in THOUGHT_TAGS.items() for tag in pair} | {"<|channel>"}
    return known & (tags | set(_CHANNEL_MARKS if _CHANNEL_MARKS[0] in known else ()))


def part_thoughts(text: str) -> tuple[str, str]:
    """Part what a model thought from what it answered: (thoughts, answer).

    Knows tags (also a closing one alone, where the opening one ended the prompt) and the channels
    of gpt-oss and Gemma 4. Thoughts that never end leave an empty answer. A text without thoughts
    is the answer, unchanged.
    """
    if text.lstrip().startswith("<|channel|>") or "<|start|>assistant<|channel|>" in text:
        return _part_channels(text)
    if bare := _BARE_ANALYSIS.match(text):
        analysis, _, answer = text[bare.end() :].partition(_BARE_FINAL)
        return analysis.strip(), answer.lstrip()
    if not any(map(text.__contains__, _SIGNS_OF_THOUGHTS)):
        return "", text
    first, rest = _take_first(text)
    later, answer = _take_later(rest)
    return _joined(first + later), answer.lstrip() if first or later else text


def _part_channels(text: str) -> tuple[str, str]:
    headers = list(_CHANNEL.finditer(text))
    if not headers:
        return "", text
    # What stands before every channel stands in the one that the prompt opened.
    thoughts = [_CHANNEL_END.split(text[: headers[0].start()], maxsplit=1)[0]]
    answer: list[str] = []
    for header in headers:
        end = _CHANNEL_END.search(text, header.end())
        content = text[header.end() : end.start() if end else len(text)]
        (answer if header[1] == "final" else thoughts).append(content)
    return _joined(thoughts), _joined(answer)


def _take_first(text: str) -> tuple[list[str], str]:
    """The thoughts with which a text begins, and the rest."""
    thoughts: list[str] = []
    at = 0
    while opening := _FIRST.match(text, at):
        thought, at = _thought_after(text, opening)
        thoughts.append(thought)
    if not thoughts and (closing := _CLOSING.search(text)):
        before = text[: closing.start()]
        if _OPENED_BY[closing[0]] not in before:
            return [before], text[closing.end() :]
    return thoughts, text[at:]


def _take_later(text: str) -> tuple[list[str], str]:
    """Thoughts that begin a line within an answer, outside its fenced blocks; and the rest."""
    if not _LATER.search(text):
        return [], text
    blocks = fenced_blocks(text)
    thoughts: list[str] = []
    rest: list[str] = []
    at = 0
    for opening in _LATER.finditer(text):
        if opening.start() >= at and not is_within(blocks, opening.start()):
            rest.append(text[at : opening.start()])
            thought, at = _thought_after(text, opening)
            thoughts.append(thought)
    return thoughts, "".join([*rest, text[at:]])


def _thought_after(text: str, opening: re.Match[str]) -> tuple[str, int]:
    """The thought behind an opening tag, and where its closing tag ends, or the text."""
    closing = THOUGHT_TAGS[opening[1]]
    end = text.find(closing, opening.end())
    if end < 0:
        return text[opening.end() :], len(text)
    return text[opening.end() : end], end + len(closing)


def _joined(parts: Iterable[str]) -> str:
    return "\n\n".join(part for part in map(str.strip, parts) if part)


_FENCE: Final = re.compile(r"^[ \t]*+(?P<marks>`{3,}+|~{3,}+)(?P<info>[^\n]*+)$", re.MULTILINE)
MOST_FENCES: Final = 10_000


class _Fence(NamedTuple):
    line: Span
    sign: str
    length: int
    bare: bool
    """Whether it names no language, so that it can end a block."""

    def ends(self, opening: "_Fence") -> bool:
        """Whether a block that began with `opening` ends here."""
        return self.bare and self.sign == opening.sign and self.length >= opening.length


def fenced_blocks(text: str) -> list[Span]:
    """Where fenced blocks stand, fences included; a fence that is never closed begins none.

    As in CommonMark, a block ends at a bare fence of the same sign, at least as long. With more than
    ten thousand fences all of the text from the first one on is one block.
    """
    fences = _fences_of(text)
    if not fences:
        return []
    if len(fences) > MOST_FENCES:
        return [Span(fences[0].line.start, len(text))]
    # The longest fence behind each one that could end its block.
    to_come = {"`": 0, "~": 0}
    longest = []
    for fence_line in reversed(fences):
        longest.append(to_come[fence_line.sign])
        if fence_line.bare:
            to_come[fence_line.sign] = max(to_come[fence_line.sign], fence_line.length)
    blocks = []
    opening: _Fence | None = None
    for fence_line, reach in zip(fences, reversed(longest), strict=True):
        if opening is None:
            opening = fence_line if fence_line.length <= reach else None
        elif fence_line.ends(opening):
            blocks.append(Span(opening.line.start, fence_line.line.end))
            opening = None
    return blocks


def _fences_of(text: str) -> list[_Fence]:
    if "```" not in text and "~~~" not in text:
        return []
    fences = []
    for line in islice(_FENCE.finditer(text), MOST_FENCES + 1):
        sign, info = line["marks"][0], line["info"]
        # Backticks behind backticks are code within a line.
        if sign == "~" or "`" not in info:
            bare = not info or info.isspace()
            fences.append(_Fence(Span(*line.span()), sign, len(line["marks"]), bare))
    return fences


def is_within(blocks: Sequence[Span], place: int) -> bool:
    """Whether a place lies in one of some blocks, which are in order."""
    before = bisect(blocks, place, key=lambda block: block.start) - 1
    return before >= 0 and place < blocks[before].end


def without_blocks(text: str, blocks: Sequence[Span]) -> str:
    """The text with these blocks blanked: every other character keeps its place."""
    if not blocks:
        return text
    ends = [0, *(block.end for block in blocks)]
    starts = [*(block.start for block in blocks), len(text)]
    spaces = [" " * (block.end - block.start) for block in blocks]
    kept = [text[end:start] for end, start in zip(ends, starts, strict=True)]
    return "".join(piece for pair in zip_longest(kept, spaces, fillvalue="") for piece in pair)


def unwrapped(text: str) -> str:
    """What stands in the one fenced block that is all of a text; else the text itself."""
    fences = _fences_of(text)
    open_ones: list[_Fence] = []
    for number, fence_line in enumerate(fences, start=1):
        if open_ones and fence_line.ends(open_ones[-1]):
            open_ones.pop()
            if not open_ones and number < len(fences):
                return text
        elif not open_ones or not fence_line.bare:
            open_ones.append(fence_line)  # a block may quote another that names its language
    if not fences or open_ones or len(fences) > MOST_FENCES:
        return text
    first, last = fences[0].line, fences[-1].line
    if text[: first.start].strip() or text[last.end :].strip():
        return text
    return text[first.end + 1 : last.start].removesuffix("\n")


def unfence(text: str) -> str:
    """Take off one bare fence around a whole text; a fence that names a language is content."""
    return unwrapped(text) if re.match(r"`{3,}+[ \t]*+\n", text) else text
