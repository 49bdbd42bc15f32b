"""Are the stages better than the base? Outputs, checks, verdicts, and a report."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from srt_cli import console
from srt_cli.artifacts import OrderedWriter, Run, inherited, open_run, read_manifest, write_json
from srt_cli.asking import Asking
from srt_cli.call_options import ApiOptions
from srt_cli.critique import Critic, Sampling
from srt_cli.errors import TooManyFailures, UsageError
from srt_cli.judging import (
    Contestant,
    Judge,
    Order,
    Orders,
    Use,
    Verdicts,
    answer,
    check_output,
    judge_pair,
    orders_of,
    read_outputs,
    score_output,
)
from srt_cli.models import parse_spec
from srt_cli.options import RUNS_CODE_PREFIX, runtime, setting
from srt_cli.prompts import prompts_from
from srt_cli.records import Judgment, Output, Prompt, Record, Scored
from srt_cli.templates import read_judge_template

if TYPE_CHECKING:
    from srt_cli.contest import Contest

COMMAND = "eval"


@dataclass(frozen=True)
class Evaluate(ApiOptions):
    """Compare models with a reference on held-out prompts, and write a report.

    Every contestant answers every prompt (or brings a file of outputs); a judge compares each
    answer with the reference's in both orders; a program may check answers objectively. With
    --use refinement a model's answer is its draft after one round of its own critique.

    Examples:

      srt eval --prompts heldout.jsonl --model models/sft --model models/dpo --judge gpt-4

      srt eval --model models/dpo --check python:critic.py:check --use response --use refinement
    """

    prompts: str = setting(
        "prompts.jsonl", "Prompts: a JSONL file, - for stdin, or hf:NAME:SPLIT.", metavar="FILE"
    )
    model: tuple[str, ...] = setting(
        ("models/dpo",), "A contestant: a model, or a JSONL file of outputs. Several times.",
        metavar="SPEC",
    )  # fmt: skip
    reference: str | None = setting(
        None, "What they are compared with; default: the base of the first model.", metavar="SPEC"
    )
    judge: tuple[str, ...] = setting(
        (), "A judge: gpt-4, http://HOST/v1#NAME, python:FILE:CALLABLE. Several times; default: "
        "the critic.", metavar="SPEC",
    )  # fmt: skip
    orders: Orders = setting(
        "both", "Judge each pair in both orders, or in one that its prompt decides (AlpacaEval)."
    )
    verdicts: Verdicts = setting(
        "auto", "By the odds of one letter (weighted), or by a line behind reasons; auto: weighted "
        "where the judge gives log-probabilities.",
    )  # fmt: skip
    judge_max_tokens: int = setting(1024, "Most tokens of a judge's reasons and verdict.")
    judge_template: Path | None = setting(
        None, "The judge's prompt, with {instruction}, {answer_M}, {answer_m}.", metavar="FILE"
    )
    check: str | None = setting(
        None, "A program that says whether an answer passes: python:FILE:CALLABLE.", metavar="SPEC"
    )
    scorer: str | None = setting(
        None, "Who scores every direct answer blind, as its own model does too: shows drift. A "
        "model, or python:FILE:critique.", metavar="SPEC",
    )  # fmt: skip
    labels: Path | None = setting(
        None, "What people said of the pairs: id, label (model, reference, tie), a.", metavar="FILE"
    )
    objective: tuple[str, ...] = setting(
        (), "Results of lm-evaluation-harness for the drift table. Several times.",
        metavar="MODEL=FILE",
    )  # fmt: skip
    use: tuple[Use, ...] = setting(
        ("response",), "Which answer counts: response or refinement. Twice for both."
    )
    annotations: tuple[Path, ...] = setting(
        (), "Count saved judgments instead: AlpacaEval's annotations.json, or judgments.jsonl. "
        "Several times.", metavar="FILE",
    )  # fmt: skip
    pairs: Path | None = setting(
        None, "Instead: how often --model scores the chosen answer above the rejected (paper, Table "
        "5).", metavar="FILE",
    )  # fmt: skip
    critique_style: Literal["auto", "conversation", "message"] = setting(
        "auto", "How a critic is asked: in conversation, as srt trains it, or by one message (Table "
        "1). auto: models in process in conversation.",
    )  # fmt: skip
    export: Literal["alpaca_eval"] | None = runtime(
        None, "Write outputs and judgments in another tool's form too."
    )
    rounds: int = setting(1, "Refinements in a row of --use refinement; each is reported.")
    out: Path = runtime(Path("eval.json"), "Where the figures go.", metavar="FILE")
    prompt_field: str | None = setting(None, "The field that holds the prompt.", metavar="NAME")
    temperature: float = setting(0.0, "Sampling temperature of the answers (paper: greedy).")
    max_new_tokens: int = setting(512, "Most tokens of an answer.")
    critic_max_tokens: int = setting(2048, "Most tokens of feedback and refinement.")
    min_coverage: float = setting(
        0.95, "Exit 3 when a smaller share of the pairs has valid verdicts in both orders."
    )
    seed: int = setting(42, "Seed of sampled answers.")
    limit: int | None = setting(None, "Use only the first N prompts.", extends=True)
    markdown: Path | None = runtime(None, "Write the tables as Markdown too.", metavar="FILE")
    offline: bool = runtime(False, "Only replay the journal; send nothing.")
    examples: int = runtime(100, "Prompts shown one by one in the report.")
    overwrite: bool = runtime(False, "Replace an output of other settings; the journal stays.")


def run(options: Evaluate) -> None:
    """Answer, check, judge, count, report; or count what was judged before."""
    if options.annotations:
        _count_annotations(options)
        return
    if options.pairs is not None:
        _score_pairs(options, options.pairs)
        return
    if options.rounds < 1:
        raise UsageError("--rounds starts at 1.")
    reference = options.reference or base_of(options.model[0])
    judges = options.judge or critic_as_judge()
    if not judges and options.check is None and options.scorer is None:
        raise UsageError("Nobody to judge. Pass --judge SPEC, or --check python:FILE:CALLABLE.")
    if options.objective:
        from srt_cli.drift import read_objective

        read_objective(options.objective)  # a wrong file is said before any work is done
    prompts = prompts_from(options.prompts, options.prompt_field, options.limit)
    rows = list(prompts.read())
    run = open_run(
        COMMAND,
        options,
        options.out,
        inputs={**prompts.inputs, **template_inputs(options.judge_template)},
        overwrite=options.overwrite,
        resolved={"reference": reference, "judge": list(judges)},
    )
    with run:
        asking = Asking.begin(run, options, offline=options.offline)
        contestants = list(dict.fromkeys(options.model))
        try:
            outputs = _answers(options, reference, contestants, rows, asking)
            if options.check is not None:
                outputs = _checked(options.check, rows, outputs, asking)
            judgments = [
                judgment
                for judge in dict.fromkeys(judges)
                for judgment in _judgments(judge, reference, options, rows, outputs, asking)
            ]
            scores = _scores(options, reference, rows, outputs, asking)
        finally:
            run.manifest.cost = asking.cost.describe()
        _write(options.out.with_name(options.out.stem + ".outputs.jsonl"), outputs)
        _write(options.out.with_name("judgments.jsonl"), judgments)
        if scores:
            _write(options.out.with_name(options.out.stem + ".scores.jsonl"), scores)
        contest = _report(
            run, options, rows, outputs, judgments, reference, judges, options.orders, scores
        )
    console.say(asking.cost.sentence())
    _close(options, contest)


def _count_annotations(options: Evaluate) -> None:
    """`--annotations`: count saved judgments, with no model and no network."""
    if options.judge or options.check or options.reference:
        raise UsageError("--annotations are counted as they are: no --judge, --check, --reference.")
    from srt_cli.annotations import read_annotations

    found = read_annotations(options.annotations)
    assert found.reference is not None
    inputs = {f"annotations {n}": path for n, path in enumerate(options.annotations, start=1)}
    run = open_run(COMMAND, options, options.out, inputs=inputs, overwrite=options.overwrite)
    with run:
        prompts, outputs = list(found.prompts.values()), list(found.outputs.values())
        contest = _report(
            run, options, prompts, outputs, found.judgments, found.reference, found.judges,
            found.orders,
        )  # fmt: skip
    _close(options, contest)


def _score_pairs(options: Evaluate, path: Path) -> None:
    """`--pairs`: each model scores both sides of labelled pairs."""
    from srt_cli.labelled_pairs import count_pairs, pairs_table, read_pairs, score_pair

    pairs = list(read_pairs(path, options.limit))
    sampling = Sampling(options.critic_max_tokens, 0.0, seed=options.seed)
    run = open_run(
        COMMAND, options, options.out, inputs={"pairs": path}, overwrite=options.overwrite
    )
    found = []
    with run:
        asking = Asking.begin(run, options, offline=options.offline)
        for spec in dict.fromkeys(options.model):
            in_conversation = options.critique_style == "conversation" or (
                options.critique_style == "auto" and parse_spec(spec).kind == "local"
            )
            with asking.open(spec) as model:
                critic = Critic(model, sampling, in_conversation=in_conversation)
                scripts = (score_pair(critic, pair) for pair in pairs)
                scored = asking.ask(f"scores by {spec}", scripts, len(pairs))
            found.append(count_pairs(spec, pairs, scored))
        run.manifest.cost = asking.cost.describe()
        run.manifest.tallies = {"pairs": len(pairs)}
        write_json(options.out, {"pairs": [asdict(each) for each in found]})
    table = pairs_table(found)
    console.table(table.title, table.columns, table.cells)
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


def _report(
    run: Run,
    options: Evaluate,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    judgments: Sequence[Judgment],
    reference: str,
    judges: Sequence[str],
    orders: Orders,
    scores: Sequence[Scored] = (),
) -> "Contest":
    """Count, and write `eval.json`, the page and what is to be exported."""
    from srt_cli.contest import count_contest
    from srt_cli.drift import drift_of, read_objective
    from srt_cli.report.page import write_report
    from srt_cli.report.shell import write_markdown

    contest = count_contest(prompts, outputs, judgments, reference, judges, options.check, orders)
    if scores or options.objective:
        objective = read_objective(options.objective)
        contest.stages.extend(drift_of(contest, outputs, scores, objective))
    if options.labels is not None:
        from srt_cli.labels import agree_with_people, read_labels
        from srt_cli.verdicts import preferences_by_pair

        named = [f"{row.contestant} {row.use}" for row in contest.rows[1:]]
        labels = read_labels(options.labels, named)
        by_pair = preferences_by_pair(judgments, orders)
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
        from srt_cli.annotations import export_alpaca_eval
        from srt_cli.verdicts import preferences_by_pair

        folder = options.out.with_name(f"{options.out.stem}-{options.export}")
        preferences = preferences_by_pair(judgments, orders)
        files = export_alpaca_eval(folder, prompts, outputs, preferences, reference)
        console.say(f"{len(files)} files in AlpacaEval's form: {folder}")
    return contest


def _page_path(options: Evaluate) -> Path:
    name = "report.html" if options.out.stem == "eval" else f"{options.out.stem}.report.html"
    return options.out.with_name(name)


def _close(options: Evaluate, contest: "Contest") -> None:
    """The tables, where the report is, and exit 3 when too few pairs were judged."""
    show(contest)
    page = _page_path(options)
    console.finish(f"report: {page}", f"open {page}")
    if contest.coverage is not None and contest.coverage < options.min_coverage:
        raise TooManyFailures(
            f"only {contest.coverage:.1%} of the pairs have valid verdicts, less than "
            f"--min-coverage {options.min_coverage:g}. Look at the raw verdicts."
        )


def template_inputs(judge_template: Path | None) -> dict[str, Path]:
    """A judge's template given as a file, as an input of the run."""
    return {} if judge_template is None else {"judge_template": judge_template}


def base_of(model: str) -> str:
    """The model a stage-1 or stage-2 model was first trained from, by the manifests on the way."""
    seen = {model}
    current = model
    while Path(current).is_dir() and read_manifest(Path(current)) is not None:
        earlier = inherited(Path(current), "model")
        if earlier is None or earlier in seen:
            break
        seen.add(earlier)
        current = earlier
    if current == model:
        raise UsageError(f"{model}: no manifest tells its base. Pass --reference.")
    return current


def critic_as_judge() -> tuple[str, ...]:
    """The critic of `feedback.jsonl` in this folder, unless it is a program: those run code."""
    critic = inherited(Path("feedback.jsonl"), "critic")
    return () if critic is None or critic.startswith(RUNS_CODE_PREFIX) else (critic,)


def _answers(
    options: Evaluate,
    reference: str,
    contestants: Sequence[str],
    prompts: Sequence[Prompt],
    asking: Asking,
) -> list[Output]:
    """Everyone's outputs, the reference's direct answers first; one model in memory at a time."""
    outputs: list[Output] = []
    wanted: list[tuple[str, Sequence[Use]]] = [(reference, ("response",))]
    wanted += [(spec, options.use) for spec in contestants]
    for spec, uses in wanted:
        if spec == reference:
            uses = tuple(use for use in uses if (spec, use) not in _already(outputs))
        if not uses:
            continue
        if spec.endswith((".jsonl", ".jsonl.gz")):
            outputs += read_outputs(Path(spec), prompts, uses)
            continue
        with asking.open(spec) as model:
            contestant = Contestant(
                spec,
                model,
                Sampling(options.max_new_tokens, options.temperature, seed=options.seed),
                Sampling(options.critic_max_tokens, 0.0, seed=options.seed),
            )
            scripts = (answer(contestant, prompt, uses, options.rounds) for prompt in prompts)
            answered = asking.ask(f"answers of {spec}", scripts, len(prompts))
        outputs += [output for row in answered for output in row]
    return outputs


def _already(outputs: Iterable[Output]) -> set[tuple[str, str]]:
    return {(output.contestant, output.use) for output in outputs}


def _checked(
    check: str, prompts: Sequence[Prompt], outputs: list[Output], asking: Asking
) -> list[Output]:
    by_id = {prompt.id: prompt for prompt in prompts}
    with asking.open(check) as model:
        scripts = (check_output(model, by_id[output.id], output) for output in outputs)
        return asking.ask("checking", scripts, len(outputs))


def _judgments(
    judge_spec: str,
    reference: str,
    options: Evaluate,
    prompts: Sequence[Prompt],
    outputs: list[Output],
    asking: Asking,
) -> list[Judgment]:
    """Each output against the reference's direct answer, in both orders or in one."""
    orders = options.orders
    template = read_judge_template(options.judge_template) if options.judge_template else None
    by_id = {prompt.id: prompt for prompt in prompts}
    references = {
        output.id: output
        for output in outputs
        if output.contestant == reference and output.use == "response"
    }
    pairs = [output for output in outputs if references[output.id] is not output]
    with asking.open(judge_spec) as model:
        judge = Judge(model, options.verdicts, template, options.judge_max_tokens)
        shown = [
            (output, order) for output in pairs for order in orders_of(by_id[output.id], orders)
        ]

        def ask(part: Sequence[tuple[Output, Order]]) -> list[Judgment]:
            scripts = (
                judge_pair(judge, by_id[output.id], output, references[output.id], order)
                for output, order in part
            )
            return asking.ask(f"judging by {judge_spec}", scripts, len(part))

        # The first pair alone tells whether this judge gives log-probabilities.
        alone = 1 if judge.asks_for_letter and options.verdicts == "auto" else 0
        return [*ask(shown[:alone]), *ask(shown[alone:])] if alone else ask(shown)


def _scores(
    options: Evaluate,
    reference: str,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    asking: Asking,
) -> list[Scored]:
    """`--scorer`: each direct answer scored blind, by its own model and by somebody outside."""
    if options.scorer is None:
        return []
    by_id = {prompt.id: prompt for prompt in prompts}
    direct = [output for output in outputs if output.use == "response"]
    sampling = Sampling(options.critic_max_tokens, 0.0, seed=options.seed)
    scores: list[Scored] = []

    def score(spec: str, answers: Sequence[Output], in_conversation: bool) -> list[Scored]:
        with asking.open(spec) as model:
            critic = Critic(model, sampling, in_conversation=in_conversation)
            scripts = (score_output(critic, spec, by_id[o.id], o) for o in answers)
            return asking.ask(f"scores by {spec}", scripts, len(answers))

    for spec in dict.fromkeys(output.contestant for output in direct):
        if not spec.endswith((".jsonl", ".jsonl.gz")) and not spec.startswith(RUNS_CODE_PREFIX):
            scores += score(spec, [o for o in direct if o.contestant == spec], True)
    return scores + score(options.scorer, direct, False)


def _write(path: Path, records: Iterable[Record]) -> None:
    writer = OrderedWriter(path)
    try:
        writer.add(0, records)
        writer.commit()
    finally:
        writer.discard()


def show(contest: "Contest") -> None:
    """The tables of the contest on stdout."""
    for table in contest.tables(brief=True):
        console.table(table.title, table.columns, table.cells)
    for note in contest.footnotes():
        console.result(note)
