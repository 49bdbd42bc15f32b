"""Does a critic know good answers from bad? Asked of a new model, and said to who builds on it."""

import random
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final, NamedTuple

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.feedback.critic import Critic, Sampling, blind_score
from srt_cli.feedback.summary import show_confusion
from srt_cli.models import Thinks
from srt_cli.records import FeedbackRecord, Prompt
from srt_cli.runs.journal import Journal
from srt_cli.runs.run import Run
from srt_cli.stats.counting import Confusion, confusion
from srt_cli.templates import checklist_score

FEEDBACK_TOKENS = 512
COIN: Final = 0.5
FEWEST_OF_A_CLASS: Final = 8
"""With fewer good or bad answers a critic that is right on three of four looks like a coin."""
FEWEST_SCORES: Final = 10
ONE_SCORE: Final = 0.8
MOSTLY: Final = 0.5


@dataclass(frozen=True)
class CriticFigures:
    """What is known of a critic."""

    who: str
    """For a sentence: "the tuned model", "the critic of feedback.jsonl"."""
    table: Confusion | None = None
    """Its word against the truth; None where nobody checked."""
    scores: Mapping[float, int] = field(default_factory=dict)
    """How often it gave each score."""
    refined: int = 0
    """Refinements, where a check was asked only those of drafts that fail it: a good draft may stay."""
    copies: int = 0
    """How many of these repeat the draft."""
    only_failing: bool = False
    elsewhere: bool = False
    """Whether `table` is of other answers, those that stage 1 checked."""
    unread_checklists: bool = False
    """Whether its feedback is checklists, and its scores are the numbers below them."""

    @property
    def is_known_to_see(self) -> bool:
        """Whether a check of these very answers shows that it does better than a coin."""
        interval = self.table.balanced_interval if self.table and not self.elsewhere else None
        return interval is not None and interval[0] > COIN


def doubts_of(figures: CriticFigures, model: str = "models/sft") -> list[str]:
    """What makes a critic doubtful, the likely cause, and the command to try; empty when it is sound.

    `model` is who would write the drafts of another round.
    """
    own_round = (
        f"Try a round on its own drafts: srt collect-feedback --model {model} --critic CRITIC --prompts "
        "NEW.jsonl --out round-2.jsonl, then srt sft --data feedback.jsonl --data round-2.jsonl."
    )
    found = []
    table = figures.table
    interval = table.balanced_interval if table else None
    if table and interval and table.smaller_class >= FEWEST_OF_A_CLASS and interval[0] <= COIN:
        found.append(
            f"{figures.who} tells good answers from bad no better than a coin"
            f"{', as stage 1 found' if figures.elsewhere else ''}: balanced accuracy "
            f"{table.balanced_accuracy:.0%} [{100 * interval[0]:.0f}, {100 * interval[1]:.0f}] over "
            f"{table.n} answers. Likely cause: in training, good answers were refinements and bad ones "
            f"drafts of another model, so that it learnt style. {own_round}"
        )
    total = sum(figures.scores.values())
    score, often = max(figures.scores.items(), key=lambda item: item[1], default=(0.0, 0))
    if total >= FEWEST_SCORES and often >= ONE_SCORE * total and not figures.is_known_to_see:
        remedy = (
            "Its checklists may tell more than the number below them: srt self-critique --score "
            "checklist."
            if figures.unread_checklists
            else "Likely cause: it saw few answers that deserve another score. Train with srt sft "
            f"--balance. {own_round} Expected scores seldom tie: srt build-prefs --score expected."
        )
        found.append(
            f"{figures.who} gave {often} of {total} answers the score {score:g}: it tells little. "
            f"{remedy}"
        )
    if figures.refined >= FEWEST_SCORES and figures.copies > MOSTLY * figures.refined:
        of_failing = " of failing drafts" if figures.only_failing else ""
        found.append(
            f"{figures.copies} of {figures.refined} refinements{of_failing} by {figures.who} copy their "
            "draft. "
            "Likely cause: it takes its drafts for good, or was trained on copies. Pairs without "
            "refinements: srt self-critique --samples 4, then srt build-prefs --strategy best-worst."
        )
    return found


def checked_before(tallies: Mapping[str, Any]) -> Confusion | None:
    """The confusion table that a manifest's tallies hold: of a check of answers, or of stage 1."""
    counted = [tallies.get(name) for name in ("confusion_drafts", "confusion_refinements")]
    tables = [each for each in counted if each] or [tallies.get("critic_check") or {}]
    names = tuple(vars(Confusion(0, 0, 0, 0)))
    sums = {name: sum(int(table.get(name, 0)) for table in tables) for name in names}
    found = Confusion(**sums)
    return found if found.n else None


class _ScoredAnswer(NamedTuple):
    """An answer that the training critic scored."""

    row: int
    prompt: Prompt
    text: str
    score: float


def check_critic(
    run: Run, records: Sequence[FeedbackRecord], count: int, good_score: float, *, held_out: bool
) -> Confusion:
    """Let the model in `run.out` score answers whose score the training critic gave.

    `count` drafts and refinements, half of them good ones where there are so many. Shows and records
    says good / is good and the order of draft and refinement, and warns of a critic that is doubtful.
    `held_out` tells whether the model was not trained on these records.
    """
    answers = _answers(records, count, good_score, seed=int(run.manifest.settings["seed"]))
    by_items = all(
        checklist_score(record.feedback.weaknesses) is not None
        for record in records
        if record.feedback is not None
    )
    with (
        Journal(run.out / "critic-check.journal.jsonl") as journal,
        Asking(journal) as asking,
        asking.open(str(run.out)) as model,
    ):
        sampling = Sampling(FEEDBACK_TOKENS, 0.0, thinks=Thinks("off", by_default=True))
        critic = Critic(model, sampling, in_conversation=True, by_checklist=by_items)
        scripts = (
            blind_score(critic, each.prompt, each.text, f"{each.prompt.id} critic check")
            for each in answers
        )
        said = asking.ask("checking the tuned model as a critic", scripts, len(answers))
    read = [
        (answer, each.score)
        for answer, each in zip(answers, said, strict=True)
        if each.score is not None
    ]
    table = confusion(
        [says >= good_score for _, says in read],
        [answer.score >= good_score for answer, _ in read],
    )
    unparsed = len(answers) - len(read)
    scores = Counter(says for _, says in read)
    right, decided = _in_right_order(read)
    run.tally(
        {
            "critic_check": vars(table)
            | {
                "accuracy": table.accuracy,
                "balanced_accuracy": table.balanced_accuracy,
                "balanced_interval": table.balanced_interval,
                "unparsed": unparsed,
                "scores": {f"{score:g}": n for score, n in sorted(scores.items())},
                "held_out": held_out,
                "right_order": right,
                "decided_order": decided,
            }
        }
    )
    which = "held-out answers" if held_out else "training answers"
    if read:
        show_confusion(
            f"the tuned model as a critic of {which} (good: score {good_score:g} or more)",
            [("answers", table)],
        )
    if by_items:
        console.say(
            "it was trained on checklists: its score is the share of items that it answers with yes, "
            "as with srt self-critique --score checklist"
        )
    if decided:
        console.say(
            f"of {decided} drafts and refinements that it scores differently, {right} are in the "
            "training critic's order"
        )
    figures = CriticFigures("the tuned model", table, scores)
    if len(read) < len(answers) / 2:
        run.warn(
            f"{unparsed} of {len(answers)} of the tuned model's critiques do not "
            "parse: train longer, or with a higher --learning-rate."
        )
    elif table.constant and table.n >= 8:
        run.warn(
            "the tuned model calls every answer the same: as a critic it tells nothing. Balance good "
            "and bad drafts in the feedback, or train on --refinement-feedback."
        )
    else:
        for doubt in doubts_of(figures, str(run.out)):
            run.warn(doubt)
    return table


def _answers(
    records: Sequence[FeedbackRecord], count: int, good_score: float, seed: int
) -> list[_ScoredAnswer]:
    """Drafts and refinements of rows in random order: as many good as bad ones, as far as they go."""
    drawn = random.Random(seed).sample(list(records), len(records))
    answers = list(_drafts_and_refinements(drawn))
    good, bad = (
        [place for place, each in enumerate(answers) if (each.score >= good_score) == is_good]
        for is_good in (True, False)
    )
    half = count // 2
    of_good = max(count - half, count - len(bad))
    kept = good[:of_good] + bad[: count - min(of_good, len(good))]
    return [answers[place] for place in sorted(kept)]


def _drafts_and_refinements(records: Iterable[FeedbackRecord]) -> Iterable[_ScoredAnswer]:
    for row, record in enumerate(records):
        prompt = Prompt(id=record.id, prompt=record.prompt)
        if record.response is not None and record.feedback is not None:
            yield _ScoredAnswer(row, prompt, record.response, record.feedback.score)
        if record.refinement is not None and record.refinement_score is not None:
            yield _ScoredAnswer(row, prompt, record.refinement, record.refinement_score)


def _in_right_order(read: Sequence[tuple[_ScoredAnswer, float]]) -> tuple[int, int]:
    """Rows whose draft and refinement it scores differently, as the training critic did: right, all."""
    by_row: dict[int, list[tuple[float, float]]] = {}
    for answer, says in read:
        by_row.setdefault(answer.row, []).append((says, answer.score))
    gaps = [
        (pair[1][0] - pair[0][0], pair[1][1] - pair[0][1])
        for pair in by_row.values()
        if len(pair) == 2
    ]
    decided = [(says > 0) == (truth > 0) for says, truth in gaps if says and truth]
    return sum(decided), len(decided)
