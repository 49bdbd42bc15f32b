"""Does a freshly tuned model know good answers from bad? Asked before anyone builds on it."""

import random
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from srt_cli.calls.conduct import Call, conduct
from srt_cli.feedback.story import Critic, Sampling
from srt_cli.feedback.summary import show_confusion
from srt_cli.models import Reply, open_model
from srt_cli.records import FeedbackRecord, Prompt
from srt_cli.runs.journal import Journal
from srt_cli.runs.run import Run
from srt_cli.stats.counting import Confusion, confusion
from srt_cli.templates import parse_critique

if TYPE_CHECKING:
    from collections.abc import Generator

FEEDBACK_TOKENS = 512


def check_critic(
    run: Run, records: Sequence[FeedbackRecord], count: int, good_score: float, seed: int
) -> Confusion:
    """Let the model in `run.out` score answers whose score the training critic gave.

    `count` answers, drafts and refinements by turns. Shows and records says good / is good, and
    warns when the model says the same of all.
    """
    answers = _answers(records, count, seed)
    model = open_model(str(run.out))
    critic = Critic(model, Sampling(FEEDBACK_TOKENS, temperature=0.0), in_conversation=True)
    with Journal(run.out / "critic-check.journal.jsonl") as journal:
        scripts = (_score(critic, prompt, text) for prompt, text, _ in answers)
        try:
            scores = dict(conduct(scripts, journal, window=model.in_flight))
        finally:
            model.close()
    read = [(scores[n], truth) for n, (_, _, truth) in enumerate(answers) if scores[n] is not None]
    table = confusion(
        [says is not None and says >= good_score for says, _ in read],
        [truth >= good_score for _, truth in read],
    )
    run.manifest.tallies["critic_check"] = vars(table) | {
        "accuracy": table.accuracy,
        "unparsed": len(answers) - len(read),
    }
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


def _score(critic: Critic, prompt: Prompt, response: str) -> "Generator[Call, Reply, float | None]":
    reply = yield critic.call("score", prompt, response, f"{prompt.id} critic check")
    return parse_critique(reply.text, expect_refinement=False).score
