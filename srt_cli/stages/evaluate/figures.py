"""From outputs and judgments to figures: `eval.json`, the page, the tables, the exit."""

from pathlib import Path

from srt_cli import console
from srt_cli.errors import TooManyFailures
from srt_cli.evaluation.annotations import export_alpaca_eval
from srt_cli.evaluation.contest import Contest, count_contest
from srt_cli.evaluation.contest_tables import footnotes_of, tables_of, warnings_of
from srt_cli.evaluation.critic_quality import own_quality
from srt_cli.evaluation.drift import DriftMaterial, drift_of
from srt_cli.evaluation.drift_table import alarm_notes
from srt_cli.evaluation.evidence import Evidence, beside
from srt_cli.evaluation.judge_quality import repeats_itself
from srt_cli.evaluation.labels import agree_with_people, read_labels
from srt_cli.evaluation.objective import read_objective
from srt_cli.evaluation.pair_accuracy import count_pairs
from srt_cli.evaluation.verdicts import preferences_by_pair
from srt_cli.report.page import write_report
from srt_cli.report.shell import write_markdown
from srt_cli.runs.jsonl import write_json
from srt_cli.runs.run import Run
from srt_cli.stages.evaluate.options import Evaluate


def write_figures(run: Run, options: Evaluate, evidence: Evidence) -> Contest:
    """Count, and write `eval.json`, the page and what is to be exported."""
    contest = count_contest(
        evidence.prompts, evidence.outputs, evidence.judgments, evidence.reference, evidence.judges,
        options.check, evidence.orders,
    )  # fmt: skip
    contest.repeats.extend(repeats_itself(*asked) for asked in evidence.repeats.items())
    by_pair = preferences_by_pair(evidence.judgments, evidence.orders)
    material = _drift_material(options, evidence)
    if material:
        contest.stages.extend(drift_of(contest, evidence.outputs, by_pair, material))
    if options.labels is not None:
        named = [f"{row.contestant} {row.use}" for row in contest.rows[1:]]
        labels = read_labels(options.labels, named)
        found = agree_with_people(labels, by_pair, evidence.outputs, evidence.reference)
        contest.people.extend(found)
    write_json(options.out, contest.as_plain())
    page = _page_path(options)
    if options.markdown is not None:
        notes = [*footnotes_of(contest), *alarm_notes(contest.stages)]
        write_markdown(options.markdown, tables_of(contest), notes)
    write_report(page, contest, evidence, options.examples)
    run.wrote("report", page)
    prompts = len(evidence.prompts)
    run.tally({"prompts": prompts, "judgments": len(evidence.judgments)})
    run.reached(f"{prompts} of {prompts}")
    for warning in warnings_of(contest):
        run.warn(warning)
    if options.export is not None:
        folder = options.out.with_name(f"{options.out.stem}-{options.export}")
        files = export_alpaca_eval(
            folder, evidence.prompts, evidence.outputs, by_pair, evidence.reference
        )
        console.say(f"{len(files)} files in AlpacaEval's form: {folder}")
    return contest


def _drift_material(options: Evaluate, evidence: Evidence) -> DriftMaterial:
    qualities = {
        contestant: own_quality(contestant, records, evidence.scores, options.scorer)
        for contestant, records in evidence.critiques.items()
    }
    pairs = {
        spec: (count_pairs(spec, evidence.pairs, scored), scored)
        for spec, scored in evidence.scored_pairs.items()
    }
    objective = read_objective(options.objective, [evidence.reference, *options.model])
    return DriftMaterial(evidence.scores, objective, pairs, qualities)


def _page_path(options: Evaluate) -> Path:
    return beside(options.out, "report.html")


def close_contest(options: Evaluate, contest: Contest) -> None:
    """The tables, where the report is, and exit 3 when too few pairs were judged."""
    show(contest)
    page = _page_path(options)
    console.finish(f"report: {page}", f"open {page}")
    if contest.coverage is not None and contest.coverage < options.min_coverage:
        raw = beside(options.out, "judgments.jsonl")
        raise TooManyFailures(
            f"only {contest.coverage:.1%} of the pairs have valid verdicts, less than "
            f"--min-coverage {options.min_coverage:g}. Look at what the judge said in {raw}."
        )


def show(contest: Contest) -> None:
    """The tables of the contest on stdout."""
    for table in tables_of(contest, brief=True):
        console.table(table.title, table.columns, table.cells, table.things)
    for note in [*footnotes_of(contest), *alarm_notes(contest.stages)]:
        console.result(note)
