"""What `srt eval` does on saved files alone: judgments, labelled pairs, feedback."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from srt_cli import console
from srt_cli.calls.asking import Asking
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
from srt_cli.feedback.critic import asked_in_conversation
from srt_cli.models import refuse_unfit
from srt_cli.options import typed_flags
from srt_cli.records import FeedbackRecord
from srt_cli.runs.jsonl import read_records, write_json
from srt_cli.runs.run import open_run
from srt_cli.stages.evaluate.figures import close_contest, show, write_figures
from srt_cli.stages.evaluate.options import Evaluate
from srt_cli.stats.critiques import knows_languages


def count_annotations(options: Evaluate, command: str) -> None:
    """`--annotations`: count saved judgments, with no model and no network."""
    if typed_flags(options) & {"--judge", "--check", "--reference"}:
        raise UsageError("--annotations are counted as they are: no --judge, --check, --reference.")
    options = replace(options, judge=(), check=(), reference=None)
    found = read_annotations(options.annotations)
    assert found.reference is not None
    inputs = {f"annotations {n}": path for n, path in enumerate(options.annotations, start=1)}
    run = open_run(command, options, inputs=inputs)
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
    found = []
    with run:
        with Asking.begin(run, options, offline=options.offline) as asking:
            for spec in dict.fromkeys(options.model):
                in_conversation = asked_in_conversation(options.critic_prompt, spec)
                with asking.open(spec) as model:
                    critic = options.critic_of(model, in_conversation=in_conversation)
                    scored = ask_pairs(asking, critic, pairs)
                found.append(count_pairs(spec, pairs, scored))
        run.tally({"pairs": len(pairs)})
        write_json(options.out, {"pairs": [asdict(each) for each in found]})
    show([pairs_table(found)])
    console.result(
        f"n = {len(pairs)} pairs; a tie is not right; ties out: among the pairs with different scores."
    )
    console.finish(f"{options.out}: {len(pairs)} pairs", f"less {options.out}")
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
        write_json(options.out, {"feedback": [asdict(each) for each in found]})
        for warning in warnings_of(found):
            run.warn(f"{warning}.")
    show(quality_tables(found))
    if not knows_languages():
        console.say(
            "Whether critiques are in the language of their answers is not shown: that needs the "
            "package py3langid: pip install 'srt-cli[languages]'."
        )
    console.finish(f"{options.out}: {len(found)} files", f"less {options.out}")
