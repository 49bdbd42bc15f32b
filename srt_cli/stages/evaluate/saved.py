"""What `srt eval` does on saved files alone: judgments, labelled pairs, feedback."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import replay
from srt_cli.calls.cost import Owed, open_replies, prices_of, show_estimates
from srt_cli.errors import TooManyFailures, UsageError
from srt_cli.evaluation.critic_quality import (
    OutsideScores,
    count_pairs,
    critic_quality,
    score_record,
    warnings_of,
)
from srt_cli.evaluation.evidence import Evidence
from srt_cli.evaluation.files import read_annotations
from srt_cli.evaluation.labelled_pairs import ask_pairs, read_pairs
from srt_cli.evaluation.tables import pairs_table, quality_tables
from srt_cli.feedback.critic import Critic, asked_in_conversation, blind_score
from srt_cli.models import open_model, refuse_unfit
from srt_cli.models.budget import likely_prompt_tokens
from srt_cli.options import typed_flags
from srt_cli.records import FeedbackRecord, Prompt
from srt_cli.runs.jsonl import read_records, write_json
from srt_cli.runs.run import Run, open_run
from srt_cli.stages.evaluate.figures import (
    close_contest,
    show,
    tell_of_changed_models,
    tell_of_changes,
    write_figures,
)
from srt_cli.stages.evaluate.options import Evaluate
from srt_cli.stats.critiques import knows_languages
from srt_cli.tables import many


def count_annotations(options: Evaluate, command: str) -> None:
    """`--annotations`: count saved judgments, with no model and no network."""
    if typed_flags(options) & {"--judge", "--check", "--reference"}:
        raise UsageError("--annotations are counted as they are: no --judge, --check, --reference.")
    options = replace(options, judge=(), check=(), reference=None)
    found = read_annotations(options.annotations)
    assert found.reference is not None
    inputs = {f"annotations {n}": path for n, path in enumerate(options.annotations, start=1)}
    run = open_run(command, options, inputs=inputs)
    if options.dry_run:
        prompts = many(len(found.prompts), "prompt")
        console.result(f"verdicts: {len(found.judgments)}, of {prompts}; nothing is owed")
        return
    tell_of_changes(run)
    with run:
        evidence = Evidence(
            list(found.prompts.values()), list(found.outputs.values()), found.judgments,
            found.reference, found.judges, found.orders,
        )  # fmt: skip
        findings = write_figures(run, options, evidence)
        if found.repeated:
            run.warn(
                f"{found.repeated} of {len(found.judgments)} rows judge a pair that an earlier row "
                "judged: each pair counts once, by its last row."
            )
    close_contest(options, findings)


def score_pairs(options: Evaluate, command: str, path: Path) -> None:
    """`--pairs`: each model scores both sides of labelled pairs."""
    pairs = list(read_pairs(path, options.limit))
    refuse_unfit(options.model, options.door())
    run = open_run(command, options, inputs={"pairs": path})
    if options.dry_run:
        door = replace(options.door(), offline=True)
        critics = [
            options.critic_of(
                open_model(spec, door),
                in_conversation=asked_in_conversation(options.critic_prompt, spec),
            )
            for spec in dict.fromkeys(options.model)
        ]
        sides = [(each.prompt, text) for each in pairs for text in (each.chosen, each.rejected)]
        _show_plan(options, run, critics, sides)
        return
    tell_of_changes(run)
    found = []
    with run:
        with Asking.begin(run, options, offline=options.offline) as asking:
            for spec in dict.fromkeys(options.model):
                in_conversation = asked_in_conversation(options.critic_prompt, spec)
                with asking.open(spec) as model:
                    critic = options.critic_of(model, in_conversation=in_conversation)
                    scored = ask_pairs(asking, critic, pairs)
                found.append(count_pairs(spec, pairs, scored))
        tell_of_changed_models(run)
        run.tally({"pairs": len(pairs)})
        write_json(options.out, {"pairs": [asdict(each) for each in found]})
    show([pairs_table(found)])
    console.result(
        f"n = {many(len(pairs), 'pair')}; a tie is not right; ties out: among the pairs with different "
        "scores."
    )
    console.finish(f"{options.out}: {many(len(pairs), 'pair')}", f"less {options.out}")
    covered = min((each.pairs - each.unread) / each.pairs for each in found)
    if covered < options.min_coverage:
        raise TooManyFailures(
            f"only {covered:.1%} of the pairs have two scores, less than --min-coverage "
            f"{options.min_coverage:g}."
        )


def judge_feedback(options: Evaluate, command: str) -> None:
    """`--feedback`: what critiques are like, and what a scorer from outside makes of their scores."""
    if typed_flags(options) & {"--judge", "--check"}:
        raise UsageError(
            "--feedback looks at critiques alone: no --judge or --check. --scorer SPEC scores "
            "their answers."
        )
    inputs = {f"feedback {n}": path for n, path in enumerate(options.feedback, start=1)}
    run = open_run(command, options, inputs=inputs)
    if options.dry_run:
        texts = [
            (Prompt(id=row.id, prompt=row.prompt), text)
            for path in options.feedback
            for row in read_records(path, FeedbackRecord.model_validate, limit=options.limit)
            for text in (row.response, row.refinement)
            if text
        ]
        critics: list[Critic] = []
        if options.scorer is not None:
            door = options.for_critics(replace(options.door(), offline=True))
            scorer = open_model(options.scorer, door)
            critics = [options.critic_of(scorer, in_conversation=False)]
        _show_plan(options, run, critics, texts)
        return
    tell_of_changes(run)
    found = []
    with run:
        with Asking.begin(run, options, offline=options.offline) as asking:
            for path in options.feedback:
                parse = FeedbackRecord.model_validate
                records = list(read_records(path, parse, limit=options.limit))
                outside: Sequence[OutsideScores] = ()
                if options.scorer is not None:
                    with asking.open(options.scorer, as_critic=True) as model:
                        critic = options.critic_of(model, in_conversation=False)
                        scripts = (score_record(critic, n, row) for n, row in enumerate(records))
                        outside = asking.ask(f"scores by {options.scorer}", scripts, len(records))
                found.append(critic_quality(str(path), records, options.scorer, outside))
        tell_of_changed_models(run)
        write_json(options.out, {"feedback": [asdict(each) for each in found]})
        for warning in warnings_of(found):
            run.warn(f"{warning}.")
    show(quality_tables(found))
    if not knows_languages():
        console.say(
            "Whether critiques are in the language of their answers is not shown: that needs the "
            "package py3langid: pip install 'srt-cli[languages]'."
        )
    console.finish(f"{options.out}: {many(len(found), 'file')}", f"less {options.out}")


def _show_plan(
    options: Evaluate, run: Run, critics: Sequence[Critic], texts: Sequence[tuple[Prompt, str]]
) -> None:
    """`--dry-run`: the scores that the journal does not hold yet; sends and writes nothing."""
    owed = {critic.model.identity: Owed() for critic in critics}
    with open_replies(run.journal_path) as look_up:
        for critic in critics:
            scripts = (blind_score(critic, prompt, text, prompt.id) for prompt, text in texts)
            for row in replay(scripts, look_up):
                if row.owed is not None:
                    request = row.owed.request
                    read = likely_prompt_tokens(request)
                    owed[critic.model.identity].add("score", read, request.max_tokens)
    console.result(f"scores: {len(texts) * len(critics)}")
    models = [critic.model for critic in critics]
    show_estimates(owed, prices_of(models, options), options)
    for model in models:
        model.close()
