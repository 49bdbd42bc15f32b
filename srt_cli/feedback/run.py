"""A whole run of critiques: journal, budget, retries, and the artifact in the order of the input.

Both feedback stages hand their prompts and models in here; what happens to one row is in
`story.py`.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

from srt_cli import console
from srt_cli.calls.asking import Asking, changed_models, tell_of_changed_models
from srt_cli.calls.conduct import Call, Script, look_up_call, replay
from srt_cli.calls.cost import (
    EXPECTED_TOKENS,
    Owed,
    open_replies,
    prices_of,
    show_estimates,
)
from srt_cli.calls.options import CallOptions
from srt_cli.errors import SrtError, TooManyFailures
from srt_cli.feedback.critic_check import CriticFigures, checked_before, doubts_of
from srt_cli.feedback.story import (
    Check,
    CheckedRow,
    Roles,
    complete,
    step_that_failed,
    tell_and_check,
    tell_and_compare,
)
from srt_cli.feedback.summary import CritiqueSummary
from srt_cli.feedback.written import Joined
from srt_cli.models import Model, Reply, Task, reply_from_plain
from srt_cli.models.budget import BYTES_A_TOKEN, Budget, likely_prompt_tokens
from srt_cli.records import MAX_SCORE, Feedback, FeedbackRecord, Prompt
from srt_cli.runs.journal import Journal
from srt_cli.runs.jsonl import OrderedWriter
from srt_cli.runs.run import Run, journal_path, read_manifest
from srt_cli.tables import many
from srt_cli.templates import LETTERS, render_feedback, render_preference, render_refinement


@dataclass(frozen=True)
class Job:
    """What a feedback stage wants done: which prompts, by whom, how often."""

    prompts: Callable[[], Iterator[Prompt]]
    """Reads the prompts from the beginning; called once a pass over them."""
    count: int
    roles: Roles
    budget: Budget
    check: Check | None = None
    samples: int = 1
    written: Joined | None = None
    """Critiques that are written already, with their prompts; each makes one row."""

    @property
    def own_critic(self) -> str | None:
        """The model that criticises and scores its own drafts; None where another one does."""
        critic, roles = self.roles.critic, self.roles
        if critic is None or not critic.in_conversation or roles.scorer or roles.policy is None:
            return None
        return critic.model.spec

    @property
    def models(self) -> list[Model]:
        """Every model that may be asked, each once."""
        roles = self.roles
        asked = (
            roles.critic, roles.policy, roles.scorer, roles.refiner, roles.contrast, self.check
        )  # fmt: skip
        named = [each.model for each in asked if each is not None]
        return list({id(model): model for model in named}.values())

    @property
    def rows(self) -> int:
        """How many scripts there are; samples that are compared are told in one."""
        return self.count * (1 if self.roles.compares else self.samples)

    def scripts(self) -> Iterator[Script[CheckedRow]]:
        """One script a row, in the order of the input."""
        if self.written is not None:
            for row in self.written.rows:
                yield complete(self.roles, row, self.written.file.spec)
            return
        for prompt in self.prompts():
            if self.roles.compares:
                yield tell_and_compare(self.roles, self.check, prompt, self.samples)
                continue
            for sample in range(self.samples):
                yield tell_and_check(self.roles, self.check, prompt, sample)


def is_done(run: Run, job: Job, options: CallOptions) -> bool:
    """Whether an earlier run left nothing to do; if so, says it.

    False when the user asked for something again (--reparse, --retry-failed, ...).
    """
    again = options.reparse or options.retry_failed or options.import_batch or options.export_batch
    if run.earlier is None:
        return False
    identities = {model.spec: model.identity for model in job.models}
    if not options.sends_nothing:
        tell_of_changed_models(run, identities, asked="are asked")
    if again or not run.up_to_date:
        return False
    statuses = run.earlier.tally("statuses", dict[str, int]) or {}
    others = run.earlier.models.keys() != identities.keys() or changed_models(run, identities)
    if statuses.get("failed") or others:
        return False
    console.result(
        f"{run.out}: {many(sum(statuses.values()), 'row')}, complete since {run.earlier.finished}; "
        "nothing to do. --reparse reads the replies in the journal again."
    )
    return True


def show_critique_plan(out: Path, job: Job, options: CallOptions) -> None:
    """`--dry-run`: what the run would come to; sends and writes nothing."""
    prices = prices_of(job.models, options)
    estimates = {identity: Owed() for identity in prices}
    rows = owed = 0
    with (
        open_replies(journal_path(out)) as look_up,
        console.progress("planning", job.count) as progress,
    ):
        for script in job.scripts():
            calls = list(_owed_calls(script, look_up))
            progress.advance()
            rows += 1
            owed += bool(calls)
            for call in calls:
                task, read = call.request.task, likely_prompt_tokens(call.request)
                kind = task.kind if task is not None else "look"
                estimates[call.model.identity].add(kind, read, call.request.max_tokens)
    known = "are answered in the journal" if job.written is None else "need no call"
    console.result(f"rows: {rows}, of which {rows - owed} {known}")
    show_estimates(estimates, prices, options)


def _owed_calls(
    script: Script[CheckedRow], look_up: Callable[[bytes], dict[str, Any] | None]
) -> Iterator[Call]:
    """The calls that a row owes, in order, if each reply to come is one that can be read."""
    reply: Reply | None = None
    with suppress(StopIteration):
        for number in count():
            call = next(script) if reply is None else script.send(reply)
            _, kept = look_up_call(call, look_up)
            reply = reply_from_plain(kept) if kept is not None else None
            if reply is None:
                yield call
                reply = _likely_reply(call.request.task, number)


def _likely_reply(task: Task | None, number: int) -> Reply:
    """What stands for the reply to a row's call of this number: readable for any critic, of the usual
    length, good enough for a fault to be planted in it, and like no other of the row."""
    kind = task.kind if task is not None else "look"
    written = f"{number} ".ljust(round(EXPECTED_TOKENS.get(kind, 0) * BYTES_A_TOKEN), "x")
    match kind:
        case "critique" | "score":
            met = Feedback(
                weaknesses="Is it whole? It is: yes.", suggestions="None.", score=MAX_SCORE
            )
            improved = written[: round(EXPECTED_TOKENS["refine"] * BYTES_A_TOKEN)]
            return Reply(render_feedback(met) + render_refinement(improved), "stop")
        case "check":
            return Reply(render_preference(1.0), "stop")
        case "judge":
            return Reply(LETTERS[0], "stop")
    return Reply(written, "stop")


def run_critiques(
    run: Run,
    job: Job,
    options: CallOptions,
    beforehand: Callable[[Asking], bool] | None = None,
) -> CritiqueSummary:
    """Write the feedback of every prompt to `run.out`, in the order of the input.

    `beforehand` may fill the journal in other processes, and returns False when it was interrupted.
    An interrupted run writes what is complete. Raises `TooManyFailures` at the end.
    """
    finished, expected = 0, job.rows
    interrupted = False
    with Asking.begin(run, options, budget=job.budget) as asking:
        asking.employ(job.models)
        itself = job.own_critic
        summary = CritiqueSummary(asking.tally, itself=itself is not None)
        _prepare_journal(asking.journal, job, options)
        if beforehand is not None:
            interrupted = not beforehand(asking)
        asking.offline = options.sends_nothing or interrupted

        def note() -> str:
            return ", ".join(filter(None, [summary.note(), asking.tally.speed()]))

        writer = OrderedWriter(run.out)
        try:
            rows = asking.stream("criticising", job.scripts(), expected, note)
            with closing(rows):
                for index, row in rows:
                    writer.add(index, row.records)
                    summary.add(row)
                    finished += 1
            writer.commit()
            if interrupted:
                raise KeyboardInterrupt
        except (SrtError, KeyboardInterrupt):
            if not interrupted:
                writer.commit()
            raise
        finally:
            writer.discard()
            summary.owed = expected - finished
            run.reached(f"{finished} of {expected}", whole=finished == expected)
            run.tally(summary.tallies())
            asking.usage = summary.usage
    _close(run, summary, job, options)
    if itself is not None and not summary.owed:
        checklists = 2 * summary.checklists > summary.weaknesses.total()
        scorer = job.roles.scorer or job.roles.critic
        unread = checklists and not (scorer is not None and scorer.reads_items)
        for doubt in _doubts(summary, itself, unread_checklists=unread):
            run.warn(doubt)
    console.say(asking.cost_sentence())
    return summary


def _doubts(summary: CritiqueSummary, model: str, *, unread_checklists: bool) -> list[str]:
    """What makes a model doubtful as its own critic, by a check, or as stage 1 checked it."""
    checked, who = summary.confusion(), "the model as its own critic"
    manifest = read_manifest(Path(model)) if Path(model).is_dir() else None
    figures = CriticFigures(
        who,
        checked if checked.n else checked_before(manifest.tallies) if manifest else None,
        summary.draft_scores + summary.blind_scores,
        *summary.copied.counts,
        elsewhere=not checked.n,
        unread_checklists=unread_checklists,
    )
    return doubts_of(figures, model)


def _prepare_journal(journal: Journal, job: Job, options: CallOptions) -> None:
    """Take in what is known from elsewhere, and forget what is to be asked again."""
    journal.absorb_parts()
    if options.import_batch is not None:
        _import(options.import_batch, job, journal)
    statuses = options.statuses_to_retry()
    if statuses:
        forgotten = forget_rows(job.scripts(), journal, statuses)
        ended = ", ".join(sorted(statuses))
        console.say(f"owed again: {many(forgotten, 'row')} that ended {ended}")


def _close(run: Run, summary: CritiqueSummary, job: Job, options: CallOptions) -> None:
    """Warn of what should be looked at before training; raise when too much went wrong."""
    owed, rows = summary.owed, f"{summary.owed} of {job.count * job.samples} rows"
    requests, replies = options.export_batch, options.import_batch
    if requests is not None and owed:
        summary.next_step = (
            f"have {requests} answered (vllm run-batch -i {requests} -o REPLIES --model NAME), then "
            "run the same line with --import-batch REPLIES instead"
        )
        console.say(f"{rows} are owed; their next requests are in {requests}")
    elif requests is not None:
        console.say(f"nothing is owed: {requests} is not written")
    elif replies is not None and owed:
        summary.next_step = "run the same line with --export-batch REQUESTS instead"
        console.say(f"{rows} are owed; their next requests can be exported")
    elif owed:
        run.warn(
            f"{rows} are not in the journal. Run the same line without --reparse to ask for them."
        )
    for warning in summary.warnings():
        run.warn(warning)
    scorer = job.roles.scorer or job.roles.critic
    untold = bool(summary.draft_scores) and not summary.expected_scores
    if scorer is not None and scorer.expects and untold and not scorer.model.is_program:
        console.say(
            f"{scorer.model.spec} gives no log-probabilities that tell a score's expectation: scores "
            "are integers."
        )
    first = summary.first_not_ok
    if not owed and first is not None and not summary.statuses["ok"]:
        raise TooManyFailures(
            f"{run.out}: no row is usable ({summary.unusable}). The first that is {first.status}: "
            f"{first.reason}. {_asks_again(first, summary)}"
        )
    failed = summary.statuses["failed"]
    if options.max_failures is not None and failed > options.max_failures:
        raise TooManyFailures(
            f"{many(failed, 'row')} failed, more than --max-failures {options.max_failures} "
            f"({summary.firsts['failed'].reason}). Run the same line again: only those rows are owed."
        )


def _asks_again(first: FeedbackRecord, summary: CritiqueSummary) -> str:
    """What has rows asked for again, of which none is usable and most ended like the first."""
    if first.at_limit:
        flag = "--max-new-tokens" if first.response is None else "--critic-max-tokens"
        return f"The same line with a larger {flag} and --overwrite asks again."
    only_failed = summary.statuses.keys() == {"failed"}
    again = "the same line" if only_failed else "the same line with --retry-failed all"
    return f"Once that is mended, {again} asks again."


def _import(path: Path, job: Job, journal: Journal) -> None:
    from srt_cli.models.api.batch import Awaited, import_replies

    def awaited() -> Iterator[Awaited]:
        for row in replay(job.scripts(), journal.get):
            if (call := row.owed) is not None:
                # The texts are most of the memory, and no reply is held against them.
                request = replace(call.request, messages=(), task=None)
                key, _ = look_up_call(call, journal.get)
                yield Awaited(key, call.name, call.model.identity, request)

    found = import_replies(path, journal, awaited())
    without = f"; {found.without} came to nothing ({found.first_error}) and stay owed"
    unasked = f"; {found.unasked} answer what is not owed here, and are left in the file"
    console.say(
        f"{path}: {found.taken} replies taken into the journal"
        + (without if found.without else "")
        + (unasked if found.unasked else "")
    )


def forget_rows(
    scripts: Iterable[Script[CheckedRow]], journal: Journal, statuses: frozenset[str]
) -> int:
    """Owe again the step at which rows came to one of these ends; returns how many rows."""
    rows = 0
    for row in replay(scripts, journal.get):
        records = row.result.records if row.result is not None else []
        failed = {step_that_failed(record) for record in records if record.status in statuses}
        for step in failed:
            again = [
                key
                for call, key in row.answered
                if call.name == step or call.name.startswith(f"{step}, ")  # its repeats
            ]
            rows += bool(again)
            for key in again:
                journal.forget(key)
    return rows
