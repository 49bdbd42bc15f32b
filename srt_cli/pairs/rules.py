"""The filters of `srt build-prefs`, each with the reason it gives."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from srt_cli.errors import SrtError
from srt_cli.pairs.pairing import Pairing, digest
from srt_cli.prompts import read_prompts
from srt_cli.records import Message, Prompt, as_messages
from srt_cli.stats.hygiene import faults_of, is_in_another_script, is_same_text, words_of

PERMUTATIONS: Final = 128
RUN_OF_WORDS: Final = 3
SEED: Final = 42
TIE: Final = "tie"
# What to do when most rows were dropped for one reason.
ADVICE: Final = {
    TIE: "Try --score expected, where the critic's log-probabilities are known.",
    "copy": "The critic repeats the draft: it was trained on too many good drafts.",
    "unparsed": "The critic does not keep the format: train it longer.",
    "truncated": "Replies do not end, and the rows' `reason` says why. At a token limit, raise "
    "--critic-max-tokens, or --max-new-tokens for drafts.",
    "refused": "The critic refuses: look at the prompts, or take another critic.",
    "failed": "The calls failed: run the command that made the file again.",
    "gain below": "Relax --min-gain, or look at the scores in the data.",
    "refinement over": "Relax --max-length-ratio.",
    "prompt is excluded": "The data are the prompts of --exclude: take other prompts.",
    "near duplicate": "Raise --near-duplicates.",
    "no checklist": "Leave out --score checklist: the feedback holds no items with yes or no.",
    "no expected score": "Leave out --score expected: the critic gave no log-probabilities.",
    "no refinement": "Answers that others scored have none: pass --strategy best-worst or tiers.",
    "no answer of the first": "Give --rejected the first model's answers to these prompts.",
    "no comparison": "Run srt self-critique with --compare, or leave out --score compared.",
    "no pair by": "Take several samples (self-critique --samples), or --strategy refine.",
    "length balance": "Leave out --length-balance.",
    "repeating": "Look at these answers; --no-hygiene keeps them.",
    "template leakage": "Look at these answers; --no-hygiene keeps them.",
    "refusal": "Look at these answers; --no-hygiene keeps them.",
    "another script": "Look at these answers; --no-hygiene keeps them.",
}


def advice_for(reason: str) -> str:
    """What to change when most rows were dropped for `reason`."""
    found = (advice for start, advice in ADVICE.items() if reason.startswith(start))
    return next(found, "Look at the dropped rows.")


@dataclass(frozen=True)
class PairRules:
    """The filters that look at one pair by itself."""

    min_gain: float
    max_length_ratio: float
    hygiene: bool
    excluded: "ExcludedPrompts"

    def fault_of(self, pairing: Pairing) -> str | None:
        """The first rule that a pair breaks, those of length aside; None if it breaks none."""
        chosen, rejected = pairing
        if is_same_text(chosen.text, rejected.text):
            return "copy"
        gain = chosen.score - rejected.score
        if gain == 0:
            return TIE
        if gain < self.min_gain or gain < 0:
            return f"gain below {self.min_gain:g}"
        prompt = chosen.record.prompt
        if prompt in self.excluded:
            return "prompt is excluded"
        if self.hygiene:
            text = prompt if isinstance(prompt, str) else prompt[-1].content
            faults = faults_of(chosen.text, text)
            if faults:
                return faults[0]
            if is_in_another_script(chosen.text, text, rejected.text):
                return "another script"
        return None

    def is_too_long(self, pairing: Pairing) -> str | None:
        """The reason, if the chosen answer is too long beside the rejected one."""
        chosen, rejected = pairing
        if len(chosen.text) > self.max_length_ratio * len(rejected.text):
            return f"refinement over {self.max_length_ratio:g} times as long"
        return None


class ExcludedPrompts:
    """Prompts that must not be trained on; case and spacing do not matter."""

    def __init__(self, paths: Sequence[Path]) -> None:
        self.prompts = [prompt for path in paths for prompt in read_prompts(str(path))]
        self._digests = {_plain_digest(prompt.messages) for prompt in self.prompts}

    def __contains__(self, prompt: str | list[Message]) -> bool:
        return bool(self._digests) and _plain_digest(as_messages(prompt)) in self._digests


def _plain_digest(turns: Iterable[Message]) -> bytes:
    return digest(*(" ".join(turn.content.lower().split()) for turn in turns))


class NearDuplicates:
    """An index of prompts that finds near repetitions by MinHash (Broder 1997).

    Two prompts are alike when the Jaccard index of their runs of three words (runs in both over
    runs in either) reaches the threshold. It is estimated from 128 permutations: standard error at
    most 0.045. Memory grows by about 1.6 KB a prompt.
    """

    def __init__(self, threshold: float) -> None:
        try:
            from rensa import RMinHashDeduplicator
        except ImportError:
            raise SrtError(
                "--near-duplicates needs the package rensa: pip install 'srt-cli[near-duplicates]'."
            ) from None
        self._index = RMinHashDeduplicator(
            threshold=threshold, num_perm=PERMUTATIONS, use_lsh=True, seed=SEED
        )
        self._count = 0
        self._last: tuple[str, bool] | None = None

    def add(self, text: str) -> bool:
        """Add a prompt unless one like it is there; returns whether it was added.

        The same text several times in a row counts as one prompt.
        """
        if self._last is not None and self._last[0] == text:
            return self._last[1]
        from rensa import RMinHash

        words = words_of(text.lower())
        runs = max(1, len(words) - RUN_OF_WORDS + 1)
        shingles = [" ".join(words[place : place + RUN_OF_WORDS]) for place in range(runs)]
        sketch = RMinHash(num_perm=PERMUTATIONS, seed=SEED)
        sketch.update(shingles)
        self._count += 1
        taken = bool(self._index.add(str(self._count), sketch))
        self._last = text, taken
        return taken


def near_duplicates_of(threshold: float | None, excluded: ExcludedPrompts) -> NearDuplicates | None:
    """An index of prompts, begun with the excluded ones; None without a threshold."""
    if threshold is None:
        return None
    index = NearDuplicates(threshold)
    for prompt in excluded.prompts:
        index.add(text_of(prompt.prompt))
    return index


def text_of(prompt: str | list[Message]) -> str:
    """A prompt as one text."""
    return prompt if isinstance(prompt, str) else Prompt(id="", prompt=prompt).text
