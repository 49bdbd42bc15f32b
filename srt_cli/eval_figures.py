"""From outputs and judgments to figures: `eval.json`, the page, the tables, the exit."""

from collections.abc import Sequence
from pathlib import Path

from srt_cli import console
from srt_cli.annotations import export_alpaca_eval
from srt_cli.artifacts import Run, write_json
from srt_cli.contest import Contest, count_contest
from srt_cli.drift import drift_of, read_objective
from srt_cli.errors import TooManyFailures
from srt_cli.eval_options import Evaluate, beside
from srt_cli.judging import Orders
from srt_cli.labels import agree_with_people, read_labels
from srt_cli.records import Judgment, Output, Prompt, Scored
from srt_cli.report.page import write_report
from srt_cli.report.shell import write_markdown
from srt_cli.verdicts import preferences_by_pair


def write_figures(
    run: Run,
    options: Evaluate,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    judgments: Sequence[Judgment],
    reference: str,
    judges: Sequence[str],
    orders: Orders,
    scores: Sequence[Scored] = (),
) -> Contest:
    """Count, and write `eval.json`, the page and what is to be exported."""
    contest = count_contest(prompts, outputs, judgments, reference, judges, options.check, orders)
    if scores or options.objective:
        objective = read_objective(options.objective)
        contest.stages.extend(drift_of(contest, outputs, scores, objective))
    by_pair = preferences_by_pair(judgments, orders) if options.labels or options.export else {}
    if options.labels is not None:
        named = [f"{row.contestant} {row.use}" for row in contest.rows[1:]]
        labels = read_labels(options.labels, named)
        contest.people.extend(agree_with_people(labels, by_pair, outputs, reference))
    write_json(options.out, contest.as_plain())
    page = _page_path(options)
    if options.markdown is not None:
        write_markdown(options.markdown, contest.tables(), contest.footnotes())
    write_report(page, contest, prompts, outputs, judgments, options.examples)
    run.manifest.outputs |= {"report": str(page)}
    run.manifest.tallies = {"prompts": len(prompts), "judgments": len(judgments)}
    run.manifest.progress = f"{len(prompts)} of {len(prompts)}"
    for warning in contest.warnings():
        run.warn(warning)
    if options.export is not None:
        folder = options.out.with_name(f"{options.out.stem}-{options.export}")
        files = export_alpaca_eval(folder, prompts, outputs, by_pair, reference)
        console.say(f"{len(files)} files in AlpacaEval's form: {folder}")
    return contest


def _page_path(options: Evaluate) -> Path:
    return beside(options.out, "report.html")


def close_contest(options: Evaluate, contest: Contest) -> None:
    """The tables, where the report is, and exit 3 when too few pairs were judged."""
    show(contest)
    page = _page_path(options)
    console.finish(f"report: {page}", f"open {page}")
    if contest.coverage is not None and contest.coverage < options.min_coverage:
        raise TooManyFailures(
            f"only {contest.coverage:.1%} of the pairs have valid verdicts, less than "
            f"--min-coverage {options.min_coverage:g}. Look at the raw verdicts."
        )


def show(contest: Contest) -> None:
    """The tables of the contest on stdout."""
    for table in contest.tables(brief=True):
        console.table(table.title, table.columns, table.cells)
    for note in contest.footnotes():
        console.result(note)
