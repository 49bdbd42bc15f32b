"""Are the stages better than the base? Outputs, checks, verdicts, and a report."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import replay
from srt_cli.calls.cost import EXPECTED_TOKENS, Owed, open_replies, prices_of, show_estimates
from srt_cli.errors import UsageError
from srt_cli.evaluation.contestants import (
    Attempt,
    Contestant,
    Use,
    answer,
    check_output,
    is_outputs_file,
    read_critiques,
    read_outputs,
    score_output,
)
from srt_cli.evaluation.judging import Judge, Shown, Twice, ask_again, judge_pairs, orders_of
from srt_cli.evaluation.labelled_pairs import LabelledPair, ScoredPair, ask_pairs, read_pairs
from srt_cli.feedback.critic import Sampling, asked_in_conversation
from srt_cli.feedback.story import Policy
from srt_cli.feedback.written import FILE_PREFIX
from srt_cli.models import (
    Model,
    names_program,
    open_model,
    parse_spec,
    refuse_unfit,
    refuse_unless_program,
)
from srt_cli.models.budget import likely_prompt_tokens
from srt_cli.prompts import read_system
from srt_cli.records import Entrant, FeedbackRecord, Judgment, Output, Prompt, Scored
from srt_cli.runs.run import Run, inherited, open_run, read_manifest, template_input
from srt_cli.stages.evaluate.options import Evaluate
from srt_cli.templates import read_judge_template

COMMAND = "eval"


__all__ = ["Evaluate", "run"]


def run(options: Evaluate) -> None:
    """Answer, check, judge, score, count, report; or count what was judged before."""
    if _count_saved(options):
        return
    # Counting needs numpy, for which `srt eval --help` does not wait.
    from srt_cli.evaluation.evidence import Evidence
    from srt_cli.evaluation.files import write_evidence
    from srt_cli.stages.evaluate.figures import (
        close_contest,
        tell_of_changed_models,
        tell_of_changes,
        write_figures,
    )

    reference = _reference(options)
    judges = judges_of(options)
    _refuse_contradictions(options, judges)
    pairs = list(read_pairs(options.pairs, options.limit)) if options.pairs else []
    prompts = options.open_prompts()
    prompts.tell()
    rows = list(prompts.read())
    saved = _look_before(options, [reference, *options.model], judges, rows)
    inputs = {**prompts.inputs, **template_input(options.judge_template, "judge_template")}
    inputs |= read_system(options.system).inputs
    if options.pairs is not None:
        inputs["pairs"] = options.pairs
    inputs |= {f"model {n}": Path(spec) for n, spec in enumerate(saved, start=1)}
    run = open_run(
        COMMAND,
        options,
        inputs=inputs,
        resolved={"reference": reference, "judge": list(judges)},
    )
    _refuse_unfit(options, [reference, *options.model], judges)
    if options.dry_run:
        _show_plan(options, run, reference, judges, rows)
        return
    tell_of_changes(run)
    with run:
        for spec in options.model:
            run.tell_of_system(spec, options.system)
        with Asking.begin(run, options, offline=options.offline) as asking:
            outputs, critiques = _answers(options, reference, rows, saved, asking)
            for place, check in enumerate(options.check):
                name = _name_of(check, options.check) if place else ""
                outputs = _checked(check, name, rows, outputs, asking)
            shown = _shown(options, reference, rows, outputs)
            judged = [_judged(judge, options, shown, asking) for judge in judges]
            scores = _scores(options, rows, outputs, asking)
            paired = _pairs(options, reference, pairs, asking)
        tell_of_changed_models(run)
        evidence = Evidence(
            rows, outputs, [each for judgments, _ in judged for each in judgments], reference,
            judges, options.orders,
            repeats={judge: twice for judge, (_, twice) in zip(judges, judged, strict=True) if twice},
            scores=scores, critiques=critiques, pairs=pairs, scored_pairs=paired,
        )  # fmt: skip
        write_evidence(options.out, evidence)
        findings = write_figures(run, options, evidence)
    console.say(asking.cost_sentence())
    close_contest(options, findings)


def _reference(options: Evaluate) -> str:
    """What is compared with; a model that a check measures alone is its own reference."""
    if options.reference is not None:
        return options.reference
    first = options.model[0]
    alone = len(set(options.model)) == 1 and options.check and not options.judge
    if alone and (is_outputs_file(first) or read_manifest(Path(first)) is None):
        console.say(f"{first} is measured alone, by the check; --reference compares it")
        return first
    reference = base_of(first)
    console.say(f"reference: {reference}, by the manifests of {first}")
    return reference


Saved = dict[str, list[Output]]
"""File of outputs -> its answers."""


def _look_before(
    options: Evaluate, contestants: Sequence[str], judges: Sequence[str], rows: Sequence[Prompt]
) -> Saved:
    """Look at all that can fail before the first answer is asked for; returns saved outputs."""
    from srt_cli.evaluation.files import read_labels, read_objective

    if options.judge_template is not None:
        read_judge_template(options.judge_template)
    reference = contestants[0]
    if options.objective:
        read_objective(options.objective, contestants)
    wanted = {reference: list(dict.fromkeys(["response", *_uses(options, reference)]))}
    wanted |= {spec: list(_uses(options, spec)) for spec in contestants if spec != reference}
    if options.labels is not None:
        entrants = [Entrant(spec, use) for spec, uses in wanted.items() for use in uses]
        read_labels(options.labels, [e for e in entrants if e != Entrant(reference, "response")])
    door = replace(options.door(), offline=options.offline or options.dry_run)
    for spec in dict.fromkeys([*contestants, *options.check, *judges, options.scorer or ""]):
        if not spec or is_outputs_file(spec):
            continue
        held = Path(parse_spec(spec).name)
        if not parse_spec(spec).in_process or (held.is_dir() and not _is_loadable(held)):
            open_model(spec, door).close()
    return {
        spec: read_outputs(Path(spec), rows, uses)
        for spec, uses in wanted.items()
        if is_outputs_file(spec)
    }


def _uses(options: Evaluate, spec: str) -> Sequence[Use]:
    """Which answers of a contestant are wanted, beside the reference's direct ones."""
    return options.use if spec in options.model else ()


def _is_loadable(directory: Path) -> bool:
    return (directory / "config.json").is_file()


def _name_of(check: str, checks: Sequence[str]) -> str:
    """A further check's name among the parts: its callable's, if no other check has it."""
    short = [each.rpartition(":")[2] for each in checks]
    return check if short.count(check.rpartition(":")[2]) > 1 else check.rpartition(":")[2]


def _show_plan(
    options: Evaluate, run: Run, reference: str, judges: Sequence[str], rows: Sequence[Prompt]
) -> None:
    """`--dry-run`: what would be asked, and what it may cost; sends and writes nothing."""
    door = replace(options.door(), offline=True)
    before = read_system(options.system).before
    wanted: dict[str, set[Use]] = {spec: set(_uses(options, spec)) for spec in options.model}
    wanted.setdefault(reference, set()).add("response")
    models: list[Model] = []
    owed: dict[str, Owed] = {}
    pairs = list(read_pairs(options.pairs, options.limit)) if options.pairs is not None else []
    with open_replies(run.journal_path) as look_up:
        for spec, uses in wanted.items():
            if is_outputs_file(spec):
                continue
            model = open_model(spec, door)
            models.append(model)
            estimate = owed.setdefault(model.identity, Owed())
            contestant = _contestant(model, sorted(uses), options)
            for row in replay((answer(contestant, before(prompt)) for prompt in rows), look_up):
                if row.owed is None:
                    continue
                read = likely_prompt_tokens(row.owed.request)
                estimate.add("respond", read, options.max_new_tokens)
                for _ in range(options.rounds if "refinement" in uses else 0):
                    longer = read + EXPECTED_TOKENS["respond"]
                    estimate.add("critique", longer, options.critic_max_tokens)
            own = len(rows) * len(uses) if options.scorer is not None else 0
            for _ in range(2 * len(pairs) + own if _is_model(spec) else 0):
                estimate.add("score", 2 * EXPECTED_TOKENS["respond"], options.critic_max_tokens)
    answers = len(rows) * sum(map(len, wanted.values()))
    compared = answers - len(rows)
    orders = 2 if options.orders == "both" else 1
    for spec in [*judges, *filter(None, [options.scorer])]:
        model = open_model(spec, options.for_critics(door))
        models.append(model)
        kind = "judge" if spec in judges else "score"
        calls = compared * orders + options.repeat if kind == "judge" else answers
        for _ in range(calls):
            read = 2 * EXPECTED_TOKENS["respond"]
            owed.setdefault(model.identity, Owed()).add(kind, read, options.judge_max_tokens)
    console.result(
        f"prompts: {len(rows)}; answers: {answers} of {len(wanted)} contestants; checks: "
        f"{answers * len(options.check)}; verdicts: {compared * orders * len(judges)}"
    )
    show_estimates(owed, prices_of(models, options), options)
    for model in models:
        model.close()


def _refuse_contradictions(options: Evaluate, judges: Sequence[str]) -> None:
    """Raise `UsageError` for options that contradict each other or would do nothing."""
    if options.rounds < 1:
        raise UsageError("--rounds starts at 1.")
    if options.rounds > 1 and "refinement" not in options.use:
        raise UsageError("--rounds refines answers several times. Pass --use refinement too.")
    for check in options.check:
        refuse_unless_program("--check", check)
    if not judges and not options.check and options.scorer is None:
        raise UsageError("Nobody to judge. Pass --judge SPEC, or --check python:FILE:CALLABLE.")
    if options.repeat and not judges:
        raise UsageError("--repeat asks a judge twice. Pass --judge SPEC.")
    if options.scorer is not None and "response" not in options.use:
        raise UsageError("--scorer scores direct answers. Pass --use response too.")
    if options.pairs is not None and not any(map(_is_model, options.model)):
        raise UsageError("--pairs needs a model that scores; every --model is a file or a program.")


def _refuse_unfit(options: Evaluate, contestants: Sequence[str], judges: Sequence[str]) -> None:
    """Raise the error for an unusable chat template before there is a run."""
    door = options.door()
    refuse_unfit(filter(_is_model, contestants), door)
    critics = [spec for spec in (*judges, options.scorer) if spec is not None]
    refuse_unfit(critics, options.for_critics(door))


def _is_model(spec: str) -> bool:
    """Whether a contestant can be asked for scores: no file of outputs, no program."""
    return not is_outputs_file(spec) and not names_program(spec)


def _count_saved(options: Evaluate) -> bool:
    """Count saved files, if that is what was asked for; returns whether it was."""
    compares = bool(options.judge) or bool(options.check) or options.scorer is not None
    pairs_alone = options.pairs is not None and (not compares or bool(options.feedback))
    chosen = [bool(options.annotations), pairs_alone, bool(options.feedback)]
    if sum(chosen) > 1:
        raise UsageError("--annotations, --pairs and --feedback: choose one of them.")
    if not any(chosen):
        return False
    from srt_cli.stages.evaluate.saved import count_annotations, judge_feedback, score_pairs

    if options.annotations:
        count_annotations(options, COMMAND)
    elif options.pairs is not None:
        score_pairs(options, COMMAND, options.pairs)
    else:
        judge_feedback(options, COMMAND)
    return True


def base_of(model: str) -> str:
    """The model from which a chain of trainings began, by the manifests on the way.

    Raises `UsageError` where no manifest tells.
    """
    seen = {model}
    current = model
    while Path(current).is_dir() and read_manifest(Path(current)) is not None:
        earlier = inherited(Path(current), "model")
        if earlier is None or earlier in seen:
            break
        seen.add(earlier)
        current = earlier
    if current == model:
        if not is_outputs_file(model):
            parse_spec(model)  # one that is not there has no manifest either
        elif not Path(model).exists():
            raise UsageError(f"{model}: no such file. Check the path.")
        raise UsageError(
            f"{model}: no manifest tells its base. Pass --reference, or --check to measure it alone."
        )
    return current


def judges_of(options: Evaluate) -> tuple[str, ...]:
    """The judges that were named; where nothing else measures, the critic of `feedback.jsonl`.

    A program is not taken unasked, for it runs code; nor are critiques in a file, which judge nothing.
    """
    if options.judge or options.check or options.scorer is not None:
        return tuple(dict.fromkeys(options.judge))
    critic = inherited(Path("feedback.jsonl"), "critic")
    if critic is None or names_program(critic) or critic.startswith(FILE_PREFIX):
        return ()
    console.say(f"judge: {critic}, the critic of feedback.jsonl; --judge takes another")
    return (critic,)


def _answers(
    options: Evaluate, reference: str, prompts: Sequence[Prompt], saved: Saved, asking: Asking
) -> tuple[list[Output], dict[str, list[FeedbackRecord]]]:
    """Everyone's outputs, the reference's direct answers first, and their critiques of their own.

    One model is in memory at a time.
    """
    outputs: list[Output] = []
    critiques: dict[str, list[FeedbackRecord]] = {}
    wanted: list[tuple[str, Sequence[Use]]] = [(reference, ("response",))]
    wanted += [(spec, options.use) for spec in dict.fromkeys(options.model)]
    for spec, uses in wanted:
        known = {output.entrant for output in outputs}
        uses = [use for use in uses if Entrant(spec, use) not in known]
        if not uses:
            continue
        if spec in saved:
            outputs += [output for output in saved[spec] if output.use in uses]
            own = read_critiques(Path(spec), prompts)
        else:
            answered = _asked(spec, uses, options, prompts, asking)
            outputs += [output for each in answered for output in each.outputs]
            own = [each.critique for each in answered if each.critique is not None]
        if own:
            critiques[spec] = own
    return outputs, critiques


def _asked(
    spec: str, uses: Sequence[Use], options: Evaluate, prompts: Sequence[Prompt], asking: Asking
) -> list[Attempt]:
    with asking.open(spec) as model:
        contestant = _contestant(model, uses, options)
        before = read_system(options.system).before
        scripts = (answer(contestant, before(prompt)) for prompt in prompts)
        return asking.ask(f"answers of {spec}", scripts, len(prompts))


def _contestant(model: Model, uses: Sequence[Use], options: Evaluate) -> Contestant:
    drafts = Sampling(
        options.max_new_tokens, options.temperature, seed=options.seed,
        thinks=options.policy_thinks,
    )  # fmt: skip
    own_critic = options.critic_of(model, in_conversation=True)
    return Contestant(Policy(model, drafts), own_critic, uses, options.rounds)


def _checked(
    check: str, name: str, prompts: Sequence[Prompt], outputs: list[Output], asking: Asking
) -> list[Output]:
    by_id = {prompt.id: prompt for prompt in prompts}
    with asking.open(check) as model:
        scripts = (check_output(model, by_id[output.id], output, name) for output in outputs)
        return asking.ask(f"checking {name}".rstrip(), scripts, len(outputs))


def _shown(
    options: Evaluate, reference: str, prompts: Sequence[Prompt], outputs: Sequence[Output]
) -> list[Shown]:
    """Each output against the reference's direct answer, in the orders that were asked for."""
    by_id = {prompt.id: prompt for prompt in prompts}
    base = Entrant(reference, "response")
    references = {output.id: output for output in outputs if output.entrant == base}
    return [
        Shown(by_id[output.id], output, references[output.id], order)
        for output in outputs
        if references[output.id] is not output
        for order in orders_of(by_id[output.id], options.orders)
    ]


def _judged(
    spec: str, options: Evaluate, shown: Sequence[Shown], asking: Asking
) -> tuple[list[Judgment], list[Twice]]:
    """A judge's verdicts; then some of the questions once more."""
    template = read_judge_template(options.judge_template) if options.judge_template else None
    with asking.open(spec, as_critic=True) as model:
        judge = Judge(
            model, options.verdicts, template, options.judge_max_tokens, options.critic_thinks()
        )
        judgments = judge_pairs(asking, f"judging by {spec}", judge, shown)
        if not options.repeat:
            return judgments, []
        judged = list(zip(shown, judgments, strict=True))
        return judgments, ask_again(asking, judge, judged, options.repeat, options.seed)


def _scores(
    options: Evaluate,
    prompts: Sequence[Prompt],
    outputs: Sequence[Output],
    asking: Asking,
) -> list[Scored]:
    """`--scorer`: each direct answer, and what the first refinement made of it, scored blind.

    By its own model, and by the scorer.
    """
    if options.scorer is None:
        return []
    by_id = {prompt.id: prompt for prompt in prompts}
    before = read_system(options.system).before
    trained_on = {prompt.id: before(prompt) for prompt in prompts}
    scored = [
        output
        for output in outputs
        if output.use == "response" or (output.use == "refinement" and output.parsed)
    ]
    scores: list[Scored] = []

    def score(spec: str, answers: Sequence[Output], in_conversation: bool) -> list[Scored]:
        with asking.open(spec, as_critic=not in_conversation) as model:
            critic = options.critic_of(model, in_conversation=in_conversation)
            asked = trained_on if in_conversation else by_id
            scripts = (score_output(critic, asked[o.id], o) for o in answers)
            return asking.ask(f"scores by {spec}", scripts, len(answers))

    for spec in dict.fromkeys(output.contestant for output in scored):
        if _is_model(spec):
            scores += score(spec, [o for o in scored if o.contestant == spec], True)
    return scores + score(options.scorer, scored, False)


def _pairs(
    options: Evaluate, reference: str, pairs: Sequence[LabelledPair], asking: Asking
) -> dict[str, list[ScoredPair]]:
    """`--pairs`: every stage scores both sides of the labelled pairs, as its own critic."""
    found = {}
    for spec in dict.fromkeys([reference, *options.model]):
        if pairs and _is_model(spec):
            in_conversation = asked_in_conversation(options.critic_prompt, spec)
            with asking.open(spec) as model:
                critic = options.critic_of(model, in_conversation=in_conversation)
                found[spec] = ask_pairs(asking, critic, pairs)
    return found
