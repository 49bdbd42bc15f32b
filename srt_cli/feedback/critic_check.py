"""Does a freshly tuned model know good answers from bad? Asked before anyone builds on it."""

import random
from collections.abc import Iterable, Sequence

from srt_cli.calls.asking import Asking
from srt_cli.feedback.critic import Critic, Sampling, blind_score
from srt_cli.feedback.summary import show_confusion
from srt_cli.models import Thinks
from srt_cli.records import FeedbackRecord, Prompt
from srt_cli.runs.journal import Journal
from srt_cli.runs.run import Run
from srt_cli.stats.counting import Confusion, confusion

FEEDBACK_TOKENS = 512


def check_critic(
    run: Run, records: Sequence[FeedbackRecord], count: int, good_score: float, seed: int
) -> Confusion:
    """Let the model in `run.out` score answers whose score the training critic gave.

    `count` answers, drafts and refinements by turns. Shows and records says good / is good, and
    warns when the model says the same of all.
    """
    answers = _answers(records, count, seed)
    with (
        Journal(run.out / "critic-check.journal.jsonl") as journal,
        Asking(journal) as asking,
        asking.open(str(run.out)) as model,
    ):
        sampling = Sampling(FEEDBACK_TOKENS, 0.0, thinks=Thinks("off", by_default=True))
        critic = Critic(model, sampling, in_conversation=True)
        scripts = (
            blind_score(critic, prompt, text, f"{prompt.id} critic check")
            for prompt, text, _ in answers
        )
        said = asking.ask("checking the tuned model as a critic", scripts, len(answers))
    read = [
        (each.score, truth)
        for each, (_, _, truth) in zip(said, answers, strict=True)
        if each.score is not None
    ]
    table = confusion(
        [says >= good_score for says, _ in read],
        [truth >= good_score for _, truth in read],
    )
    unparsed = len(answers) - len(read)
    run.tally({"critic_check": vars(table) | {"accuracy": table.accuracy, "unparsed": unparsed}})
    show_confusion(
        f"the tuned model as a critic of training answers (good: score {good_score:g} or more)",
        [("answers", table)],
    )
    if len(read) < len(answers) / 2:
        run.warn(
            f"{len(answers) - len(read)} of {len(answers)} of the tuned model's critiques do not "
            "parse: train longer, or with a higher --learning-rate."
        )
    elif table.constant and table.n >= 8:
        run.warn(
            "the tuned model calls every answer the same: as a critic it tells nothing. Balance good "
            "and bad drafts in the feedback, or train on --refinement-feedback."
        )
    return table


def _answers(
    records: Sequence[FeedbackRecord], count: int, seed: int
) -> list[tuple[Prompt, str, float]]:
    chosen = random.Random(seed).sample(list(records), min(len(records), (count + 1) // 2))
    return list(_drafts_and_refinements(chosen))[:count]


def _drafts_and_refinements(
    records: Iterable[FeedbackRecord],
) -> Iterable[tuple[Prompt, str, float]]:
    for record in records:
        prompt = Prompt(id=record.id, prompt=record.prompt)
        if record.response is not None and record.feedback is not None:
            yield prompt, record.response, record.feedback.score
        if record.refinement is not None and record.refinement_score is not None:
            yield prompt, record.refinement, record.refinement_score
