"""From outputs and judgments to figures: `eval.json`, the page, the tables, the exit."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from srt_cli import console
from srt_cli.calls import asking
from srt_cli.errors import TooManyFailures
from srt_cli.evaluation.evidence import Evidence
from srt_cli.evaluation.files import beside, export_alpaca_eval, read_labels, read_objective
from srt_cli.evaluation.findings import Findings, alarms_of, find, footnotes_of, warnings_of
from srt_cli.evaluation.tables import tables_of
from srt_cli.report.eval import write_markdown, write_report
from srt_cli.runs.jsonl import write_json
from srt_cli.runs.run import Run
from srt_cli.stages.evaluate.options import Evaluate
from srt_cli.tables import Table, many


def write_figures(run: Run, options: Evaluate, evidence: Evidence) -> Findings:
    """Count, and write `eval.json`, the page and what is to be exported."""
    evidence = _with_files(options, evidence)
    findings = find(evidence)
    write_json(options.out, findings.as_plain())
    page = _page_path(options)
    if options.markdown is not None:
        notes = [*footnotes_of(findings), *alarms_of(findings)]
        write_markdown(options.markdown, tables_of(findings), notes)
    write_report(page, findings, evidence, options.examples)
    run.wrote("report", page)
    prompts = len(evidence.prompts)
    run.tally({"prompts": prompts, "judgments": len(evidence.judgments)})
    run.reached(f"{prompts} of {prompts}")
    for warning in warnings_of(findings):
        run.warn(warning)
    if options.labels is not None:
        _tell_of_labels(run, options.labels, evidence)
    if options.export is not None:
        folder = options.out.with_name(f"{options.out.stem}-{options.export}")
        files = export_alpaca_eval(folder, evidence)
        console.say(f"{many(len(files), 'file')} in AlpacaEval's form: {folder}")
    return findings


def _with_files(options: Evaluate, evidence: Evidence) -> Evidence:
    """The evidence with what people and lm-evaluation-harness said, and who checked and scored."""
    entrants = [entrant for entrant in evidence.answers if entrant != evidence.base]
    contestants = [evidence.reference, *options.model]
    return replace(
        evidence,
        check=", ".join(options.check) or None,
        good_score=options.good_score,
        scorer=options.scorer,
        labels=read_labels(options.labels, entrants) if options.labels is not None else {},
        objective=read_objective(options.objective, contestants),
    )


def tell_of_changes(run: Run) -> None:
    """Name the inputs that the run before read otherwise: its figures are replaced."""
    for name, file in run.manifest.inputs.items():
        then = run.earlier.inputs.get(name, file) if run.earlier is not None else file
        if run.earlier is not None and then.path == file.path and then.sha256 != file.sha256:
            console.say(
                f"{file.path} has changed since the run of {run.earlier.started}, whose figures are "
                "replaced"
            )


def tell_of_changed_models(run: Run) -> None:
    """Name the models and programs that have changed since the run before, once they were asked."""
    identities = {spec: known["identity"] for spec, known in run.manifest.models.items()}
    asking.tell_of_changed_models(run, identities, asked="were asked")


def _tell_of_labels(run: Run, path: Path, evidence: Evidence) -> None:
    """How many of the labels are of answers that were compared here."""
    known = sum(item in evidence.answers.get(entrant, {}) for entrant, item in evidence.labels)
    if known:
        console.say(f"{path}: {known} of {many(len(evidence.labels), 'label')} found their answers")
        return
    theirs = next((f", such as {item!r}" for _, item in evidence.labels), "")
    run.warn(
        f"{path}: none of its {many(len(evidence.labels), 'label')} found an answer, so nothing is "
        f"compared with people. Its ids{theirs}, have to be those of the prompts, such as "
        f"{evidence.prompts[0].id!r}."
    )


def _page_path(options: Evaluate) -> Path:
    return beside(options.out, "report.html")


def close_contest(options: Evaluate, findings: Findings) -> None:
    """The tables, where the report is, and exit 3 when too few pairs were judged."""
    show(tables_of(findings, brief=True))
    for note in [*footnotes_of(findings), *alarms_of(findings)]:
        console.result(note)
    page = _page_path(options)
    console.finish(f"report: {page}", f"open {page} in a browser")
    coverage = findings.contest.coverage
    if coverage is not None and coverage < options.min_coverage:
        raw = " ".join(map(str, options.annotations)) or beside(options.out, "judgments.jsonl")
        raise TooManyFailures(
            f"only {coverage:.1%} of the pairs have valid verdicts, less than "
            f"--min-coverage {options.min_coverage:g}. Look at what the judge said in {raw}."
        )


def show(tables: Iterable[Table]) -> None:
    """Tables on stdout."""
    for table in tables:
        console.table(table.title, table.columns, table.cells, table.things)
