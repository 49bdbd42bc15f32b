"""Are the stages better than the base? Outputs, checks, verdicts, and a report."""

from collections.abc import Iterable, Sequence
from pathlib import Path

from srt_cli import console
from srt_cli.artifacts import (
    OrderedWriter,
    inherited,
    open_run,
    read_manifest,
    template_input,
)
from srt_cli.asking import Asking
from srt_cli.critique import Critic, Sampling
from srt_cli.errors import UsageError
from srt_cli.eval_options import Evaluate, beside
from srt_cli.judging import (
    Contestant,
    Judge,
    Use,
    answer,
    check_output,
    judge_pairs,
    orders_of,
    read_outputs,
    score_output,
)
from srt_cli.options import RUNS_CODE_PREFIX
from srt_cli.prompts import prompts_from
from srt_cli.records import Judgment, Output, Prompt, Record, Scored
from srt_cli.templates import read_judge_template

COMMAND = "eval"


__all__ = ["Evaluate", "run"]


def run(options: Evaluate) -> None:
    """Answer, check, judge, count, report; or count what was judged before."""
    if _count_saved(options):
        return
    if options.rounds < 1:
        raise UsageError("--rounds starts at 1.")
    reference = options.reference or base_of(options.model[0])
    judges = tuple(dict.fromkeys(options.judge)) or critic_as_judge()
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
        inputs={**prompts.inputs, **template_input(options.judge_template, "judge_template")},
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
                for judge in judges
                for judgment in _judgments(judge, reference, options, rows, outputs, asking)
            ]
            scores = _scores(options, rows, outputs, asking)
        finally:
            run.manifest.cost = asking.cost.describe()
        _write(options.out.with_name(options.out.stem + ".outputs.jsonl"), outputs)
        _write(beside(options.out, "judgments.jsonl"), judgments)
        if scores:
            _write(options.out.with_name(options.out.stem + ".scores.jsonl"), scores)
        from srt_cli.eval_figures import close_contest, write_figures

        contest = write_figures(
            run, options, rows, outputs, judgments, reference, judges, options.orders, scores
        )
    console.say(asking.cost.sentence())
    close_contest(options, contest)


def _count_saved(options: Evaluate) -> bool:
    """The ways of `eval` that need no contestants; true when one of them was asked for."""
    chosen = [bool(options.annotations), options.pairs is not None, bool(options.feedback)]
    if sum(chosen) > 1:
        raise UsageError("--annotations, --pairs and --feedback: choose one of them.")
    if not any(chosen):
        return False
    from srt_cli.eval_saved import count_annotations, judge_feedback, score_pairs

    if options.annotations:
        count_annotations(options, COMMAND)
    elif options.pairs is not None:
        score_pairs(options, COMMAND, options.pairs)
    else:
        judge_feedback(options, COMMAND)
    return True


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
    template = read_judge_template(options.judge_template) if options.judge_template else None
    by_id = {prompt.id: prompt for prompt in prompts}
    references = {
        output.id: output
        for output in outputs
        if output.contestant == reference and output.use == "response"
    }
    pairs = [output for output in outputs if references[output.id] is not output]
    shown = [
        (by_id[output.id], output, references[output.id], order)
        for output in pairs
        for order in orders_of(by_id[output.id], options.orders)
    ]
    with asking.open(judge_spec) as model:
        judge = Judge(model, options.verdicts, template, options.judge_max_tokens)
        return judge_pairs(asking, f"judging by {judge_spec}", judge, shown)


def _scores(
    options: Evaluate,
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
