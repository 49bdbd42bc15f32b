"""Outputs that look like answers and are none: empty, constant, copied, repeating."""

import re
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Final, TypeVar

if TYPE_CHECKING:
    from srt_cli.stats.rates import Estimate

Word = TypeVar("Word", str, bytes)

NGRAM: Final = 4
MOST_REPEATED: Final = 0.5
MOST_COPIED: Final = 0.8
CONSTANT_SHARE: Final = 0.01
FEWEST_FOR_CONSTANT: Final = 20
RED_FLAG: Final = 0.05
# Parts of a critique, or a judge's or template's own marks, have no place in a final answer.
LEAKED: Final = (
    "overall score: [[", "### improved response", "model_identifier", "verdict: [[", "<|im_start|>",
    "<|im_end|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<turn|>", "<channel|>", "</think>",
    "[/think]", "[/inst]",
)  # fmt: skip
# The words with which a model is taught to criticise, where an answer or one of its lines begins; and
# how the quickstart's critic goes on.
_OWN_WORDS: Final = re.compile(
    r"^[^\w\n]{0,20}(?:weaknesses|suggestions|overall score|improved response)[ \t*_]{0,4}:"
    r"|\bbut should:",
    re.MULTILINE,
)
_ASKS_FOR_CRITIQUE: Final = re.compile(
    r"weakness|suggest|feedback|review|criti|evaluat|assess|improve|swot|strength|advice|advise"
)
# What would be a fault is none where the prompt asks for it.
_ASKED_FOR: Final = {
    "empty": re.compile(r"\bempty|\bnothing|\bblank\b|\bsilen"),
    "constant": re.compile(
        r"\b(?:one|a single|single) (?:word|letter|number|digit)|\bone-word|\byes or no|\btrue or false"
        r"|\b(?:only|just) (?:the|with|a|one)\b|\blabel|\bclassif|\bchoose|\bwhich of|\bhow many"
        r"|\bsay (?:exactly )?[\"“]"
    ),
    "copy of the prompt": re.compile(
        r"\bcopy|\brepeat|\bquot|\bcorrect|\bproofread|\brewrite|\bedit|\bfix\b|\bformat|\bextract"
        r"|\bverbatim|\bcapital|\bupper|\blower|\bpunctuat|\brephras|\bparaphras|\btranscri"
    ),
    "repeating": re.compile(
        r"\brepeat|\brepetit|\d times\b|\b(?:many|several|ten|hundred) times\b|\bchorus|\brefrain\b"
        r"|\bchant|\blyrics|\bover and over"
    ),
    "refusal": re.compile(
        r"\brefus|\bdeclin|\bapolog|\bturn(?:s|ed|ing)? down|\breject|\bsay(?:ing)? no\b"
    ),
}
# <|user|>, <|end_of_text|> and their like; DeepSeek writes them with a bar and a blank of its own.
_SPECIAL_TOKEN: Final = re.compile(r"<\|[a-z_]{2,40}\|>|<｜[a-z▁]{2,40}｜>")

_SORRY: Final = (
    r"(?:(?:(?:i'?m|i am) )?(?:so |very |truly )?(?:sorry|afraid)|i (?:sincerely )?apologi[sz]e"
    r"|(?:my )?apologies|unfortunately|regrettably|i regret)"
)
_NOT_ABLE: Final = (
    r"(?:i (?:simply |really |just )?(?:cannot|can'?t|can not|could not|couldn'?t|will not|won'?t"
    r"|must decline|must refuse|have to decline)"
    r"|(?:i'?m|i am) (?:unable to|not (?:able|allowed|permitted|comfortable|going)))"
)
_HELP: Final = r"(?:assist|help|provide|fulfil|comply|answer|do that)"
_REFUSAL: Final = re.compile(
    rf"(?:{_SORRY},? but|i cannot|i can'?t|as an ai(?: language model)?,? i|i'?m unable to"
    rf"|i am unable to)\b.{{0,40}}\b{_HELP}"
    rf"|{_NOT_ABLE}\b[^,.;:!?]{{0,40}}\b{_HELP}"
    rf"|(?:{_SORRY}|as an? (?:ai|large|language))\b[^?]{{0,80}}?\b{_NOT_ABLE}\b[^,.;:!?]{{0,40}}"
    rf"\b(?:{_HELP}|discuss|share|create|generate|write|support|engage|continue|participate)"
)
_REFUSAL_BEGINS: Final = (
    "i",
    "as ",
    "sorry",
    "so ",
    "very ",
    "truly ",
    "my ",
    "apolog",
    "unfo",
    "regr",
)
_APOSTROPHES: Final = dict.fromkeys(map(ord, "’‘ʼ′＇`´"), "'")


_ONLY_WORDS: Final = "".join(
    chr(code) if chr(code).isalnum() or chr(code) == "_" else " " for code in range(128)
)
_ONLY_WORD_BYTES: Final = _ONLY_WORDS.encode().ljust(256)
MAIN_SHARE: Final = 0.6
LOOKED_AT: Final = 2000
BEGINNING: Final = 40
FIRST_WORDS: Final = 5
READ: Final = 200_000
"""Characters of a text that are read for repetition: one that is longer is judged by its beginning."""
# A prompt that names one of these may well be answered in their script.
_LANGUAGES: Final = {
    "ARABIC": ("arabic", "persian", "farsi", "urdu"),
    "CJK": ("chinese", "mandarin", "cantonese", "japanese", "kanji"),
    "CYRILLIC": ("russian", "ukrainian", "bulgarian", "serbian", "cyrillic", "kazakh"),
    "DEVANAGARI": ("hindi", "marathi", "nepali", "sanskrit"),
    "GREEK": ("greek",),
    "HANGUL": ("korean",),
    "HEBREW": ("hebrew", "yiddish"),
    "LATIN": ("英", "англий", "english"),
    "THAI": ("thai",),
}


@dataclass(frozen=True)
class Degenerate:
    """Share of outputs that are no answers, and how many for which reason (one may have several)."""

    rate: "Estimate | None"
    reasons: dict[str, int]

    @property
    def share(self) -> float:
        """The rate alone; 0 without outputs."""
        return self.rate.value if self.rate else 0.0

    @property
    def red_flag(self) -> bool:
        """Whether the share is large enough to doubt every other figure."""
        return self.share > RED_FLAG


def degenerate_outputs(prompts: Sequence[str], outputs: Sequence[str]) -> Degenerate:
    """Count empty, constant, copied, repeating, leaking and refusing outputs.

    Constant: the same normalised text in more than 1 % of the outputs (and at least twice, of 20 or
    more). Copied: over 80 % of the output's 4-grams stand in the prompt. Repeating: fewer than half
    of its 4-grams are different ones. Leaking: marks of a critique, a verdict or a chat template.
    Refusing: it begins by saying that it cannot help. None of these is a fault where the prompt asks
    for it.
    """
    from srt_cli.stats.rates import pass_rate  # here, so that the faults of one text need no numpy

    normalised = [" ".join(output.lower().split()) for output in outputs]
    counts = Counter(normalised)
    limit = max(1.0, CONSTANT_SHARE * len(outputs))
    reasons: Counter[str] = Counter()
    bad: list[bool] = []
    for prompt, output, text in zip(prompts, outputs, normalised, strict=True):
        found = []
        if not text:
            found.append("empty")
        elif len(outputs) >= FEWEST_FOR_CONSTANT and counts[text] > limit:
            found.append("constant")
        words = words_of(text[:READ])
        grams = _ngrams_of(words, NGRAM)
        wish = prompt[:READ].lower()
        # Lines are lost in the normalised text.
        found += _faults(output.lower(), _repeats(words), wish)
        asked = set(ngrams(wish, NGRAM))
        if grams and sum(gram in asked for gram in grams) / len(grams) > MOST_COPIED:
            found.append("copy of the prompt")
        found = [reason for reason in found if not _is_asked_for(reason, wish)]
        reasons.update(found)
        bad.append(bool(found))
    return Degenerate(pass_rate(bad), dict(reasons))


def faults_of(text: str, prompt: str = "") -> list[str]:
    """What makes one text no answer by itself: repeating, leaking a template, refusing.

    What the prompt asks for is no fault.
    """
    lower = text.lower()
    repeats = _repeats(_words_to_count(lower[:READ]))
    if not (repeats or _may_leak(lower) or _may_refuse(lower)):  # most are seen to be sound
        return []
    wish = prompt[:READ].lower()
    return [reason for reason in _faults(lower, repeats, wish) if not _is_asked_for(reason, wish)]


def _words_to_count(text: str) -> Sequence[Any]:
    """The words of a text, as bytes where they are plain ASCII: faster, and as easily counted."""
    return text.encode().translate(_ONLY_WORD_BYTES).split() if text.isascii() else words_of(text)


def _is_asked_for(reason: str, wish: str) -> bool:
    """Whether a prompt, in lower case, asks for what would else be a fault."""
    asks = _ASKED_FOR.get(reason)
    return asks is not None and asks.search(wish) is not None


def _may_leak(lower: str) -> bool:
    """Whether a text holds what stands in every mark of a template or a critique; few texts do."""
    return (  # one letter is found much faster than a word
        "[" in lower or "<" in lower
        or ("#" in lower and "###" in lower)
        or ("_" in lower and "model_identifier" in lower)
        or (":" in lower and (
            "weaknesses" in lower or "suggestions" in lower or "overall score" in lower
            or "improved resp" in lower or "but should:" in lower
        ))
    )  # fmt: skip


def _may_refuse(lower: str) -> bool:
    """Whether a text begins as every refusal does."""
    return (lower.lstrip() if lower[:1].isspace() else lower).startswith(_REFUSAL_BEGINS)


def _faults(lower: str, repeats: bool, wish: str) -> list[str]:
    found = ["repeating"] if repeats else []
    if _may_leak(lower):
        spoken = _OWN_WORDS.search(lower) is not None and _ASKS_FOR_CRITIQUE.search(wish) is None
        if spoken or (_leaks(lower) and not _leaks(wish)):
            found.append("template leakage")
    if _refuses(lower):
        found.append("refusal")
    return found


def _leaks(lower: str) -> bool:
    if not _may_leak(lower):
        return False
    plain = " ".join(lower.split())
    if any(mark in plain for mark in LEAKED) or _SPECIAL_TOKEN.search(plain):
        return True
    if plain.endswith("</s>"):  # an end token, unless it closes what HTML strikes out
        return plain.startswith("<s> ") or plain.count("</s>") > plain.count("<s>")
    return plain.endswith("<eos>")


def _refuses(lower: str) -> bool:
    if not _may_refuse(lower):
        return False
    beginning = lower.lstrip()[:LOOKED_AT]
    return _REFUSAL.match(" ".join(beginning.split()).translate(_APOSTROPHES)) is not None


def is_same_text(one: str, other: str) -> bool:
    """Whether two texts are equal but for their form: line ends, spacing, Unicode's two spellings."""
    if one == other:
        return True
    # Most texts differ early on, many in their first letter.
    letters = one[:1] + other[:1]
    if letters[:1] != letters[1:] and letters.isalnum() and letters.isascii():
        return False
    if one.isascii() and other.isascii():
        first = one.split(None, FIRST_WORDS)[:FIRST_WORDS]
        return (
            first == other.split(None, FIRST_WORDS)[:FIRST_WORDS] and one.split() == other.split()
        )
    beginnings = [plain_form(text[: 2 * BEGINNING])[:BEGINNING] for text in (one, other)]
    if beginnings[0] != beginnings[1] and min(map(len, beginnings)) == BEGINNING:
        return False
    return plain_form(one) == plain_form(other)


def plain_form(text: str) -> str:
    """A text with single spaces and composed characters: equal for texts equal but for form."""
    return unicodedata.normalize("NFC", " ".join(text.split()))


def _repeats(words: Sequence[Any]) -> bool:
    """Whether fewer than half of the 4-grams are different ones."""
    enough = MOST_REPEATED * (len(words) - NGRAM + 1)
    # The 4-grams that end where a word, or two of them, stand for the first time are all different.
    for size in (1, 2):
        runs = set(words) if size == 1 else set(_ngrams_of(words, size))
        if len(runs) - NGRAM + size >= enough:
            return False
    return len(set(_ngrams_of(words, NGRAM))) < enough


def ngrams(text: str, size: int) -> list[tuple[str, ...]]:
    """Runs of `size` words, in order."""
    return _ngrams_of(words_of(text), size)


def words_of(text: str) -> list[str]:
    """Runs of letters, digits and underscores."""
    # The same for plain ASCII, several times as fast.
    return text.translate(_ONLY_WORDS).split() if text.isascii() else re.findall(r"\w+", text)


def _ngrams_of(words: Sequence[Word], size: int) -> list[tuple[Word, ...]]:
    return list(zip(*(words[start:] for start in range(size)), strict=False))


def is_in_another_script(text: str, *others: str) -> bool:
    """Whether a text is written in a script that none of the others has, nor asks for by name.

    A light test of its language: scripts are told apart, languages of one script are not.
    """
    if text.isascii() and all(map(str.isascii, others)):
        return False
    own = _main_script(text)
    if own is None or not any(map(_scripts_in, others)):
        return False
    if any(own in _scripts_in(other) for other in others):
        return False
    asked = " ".join(others).lower()
    return not any(name in asked for name in _LANGUAGES.get(own, ()))


def _main_script(text: str) -> str | None:
    """The script of most of a text's letters; None when there is none such."""
    counts = _scripts_in(text)
    if not counts:
        return None
    script, count = counts.most_common(1)[0]
    return script if count > MAIN_SHARE * counts.total() else None


def _scripts_in(text: str) -> Counter[str]:
    return Counter(_script_of(letter) for letter in text[:LOOKED_AT] if letter.isalpha())


@lru_cache(maxsize=4096)
def _script_of(letter: str) -> str:
    """The first word of a letter's Unicode name: LATIN, CYRILLIC, HANGUL, CJK ..."""
    script = unicodedata.name(letter, "").split(" ")[0]
    return "CJK" if script in ("HIRAGANA", "KATAKANA", "KATAKANA-HIRAGANA") else script
