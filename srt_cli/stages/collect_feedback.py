"""Stage 1, first half: the policy answers, a strong critic gives feedback and a refinement."""

from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Final

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import Call
from srt_cli.calls.options import CallOptions
from srt_cli.errors import SrtError, UsageError
from srt_cli.feedback.critic import Critic, OutsidePrompt, Sampling
from srt_cli.feedback.run import Job, is_done, run_critiques, show_critique_plan
from srt_cli.feedback.story import Contrast, Draft, Policy, Roles, write_draft
from srt_cli.feedback.written import (
    FILE_PREFIX,
    CritiqueFile,
    Joined,
    join,
    own_prompts,
    parse_scale,
    read_critiques,
)
from srt_cli.models import Model, ModelOptions, Reply, open_model, parse_spec
from srt_cli.options import runtime, setting, typed_flags
from srt_cli.prompts import PromptSource, with_system
from srt_cli.records import GIVEN, Prompt
from srt_cli.report.critic import write_critic_report
from srt_cli.report.critique import PageRow, write_critique_page
from srt_cli.runs.run import batches_path, first_day, open_run
from srt_cli.tables import many

COMMAND = "collect-feedback"
PARTS: Final = ("refinement", "score")
"""The parts of a written critique that another critic can give."""


@dataclass(frozen=True)
class CollectFeedback(CallOptions):
    """Let a policy answer prompts, and a critic write feedback and a refinement for each answer.

    The critic is asked twice per row: once for weaknesses, suggestions, a score and an improved
    response (paper, Table 1), and once, blind, for the score of that improved response. Nothing is
    filtered here: every input row ends in exactly one status.

    Examples:
      srt collect-feedback --model models/base --critic gpt-4

      srt collect-feedback --model http://localhost:8000/v1#llama \\
          --critic python:critic.py:critique

      srt collect-feedback --critic file:others.jsonl --critic-for score=gpt-4

      srt collect-feedback --limit 50 --critique-page page.html
    """

    model: str | None = setting(
        None, "The policy that answers. Not needed where rows bring a response.",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    critic: str | None = setting(
        None, "The critic: gpt-4, http://HOST/v1#NAME, a directory, python:FILE:CALLABLE, or "
        "file:FILE of critiques that others wrote.",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    out: Path = runtime(
        Path("feedback.jsonl"), "Where to write the feedback.",
        group="Output", common=True, metavar="FILE",
    )  # fmt: skip
    # Not named critic_for: that of self-critique, set in srt.toml for every command, is not meant.
    critic_for_parts: tuple[str, ...] = setting(
        (), "Ask SPEC for what written critiques lack: refinement, or score. Repeatable.",
        group="Critic", flag="--critic-for", metavar="PART=SPEC",
    )  # fmt: skip
    critique_scale: str = setting(
        "1-10", "The scale of the scores in file:FILE. Others are mapped to 1 to 10.",
        group="Critic", metavar="LOW-HIGH",
    )  # fmt: skip
    critique_page: Path | None = runtime(
        None, "Instead of asking a critic, write a page on which a person writes the critiques.",
        group="Output", metavar="FILE.html",
    )  # fmt: skip
    critic_prompt: OutsidePrompt = setting(
        "table-1", "How the critic is asked: by the paper's Table 1, or item by item, with the score "
        "the share that is met (checklist).", group="Critic",
    )  # fmt: skip
    critic_temperature: float = setting(
        0.0, "Sampling temperature of the critic (paper: 0).", group="Critic"
    )
    contrast: str | None = setting(
        None, "Who plants one fault in each good refinement, which makes another row: a model, or "
        "python:FILE:CALLABLE.", group="Critic", metavar="SPEC",
    )  # fmt: skip
    good_score: float = setting(
        8.0, "Count a refinement as good from this blind score up (--contrast).", group="Critic"
    )
    max_reasks: int = setting(
        1, "How often to ask again when a critic's reply cannot be read (paper: never).",
        group="Critic",
    )  # fmt: skip


def run(options: CollectFeedback) -> None:
    """Read prompts, criticise, write `feedback.jsonl`."""
    if options.critique_page is not None:
        _write_page(options, options.critique_page)
        return
    if options.critic is None:
        raise UsageError(
            "No critic. Pass --critic gpt-4, http://HOST/v1#NAME, a directory or "
            'python:FILE:CALLABLE, or put critic = "gpt-4" into srt.toml.'
        )
    if options.critic.startswith(FILE_PREFIX):
        _take_written(options, options.critic.removeprefix(FILE_PREFIX))
        return
    typed = typed_flags(options)
    if "--critic-for" in typed:
        raise UsageError("--critic-for completes critiques that others wrote: --critic file:FILE.")
    if "--critique-scale" in typed:
        raise UsageError(
            "--critique-scale is that of critiques that others wrote: --critic file:FILE."
        )
    prompts = _with_responses(options)
    door = _door(options)
    critics = options.for_critics(door)
    critic_model = open_model(options.critic, critics)
    policy_model = critic_model
    if options.model is not None and (options.model, door) != (options.critic, critics):
        policy_model = open_model(options.model, door)
    critic = _critic(options, critic_model)
    policy = Policy(policy_model, _drafting(options)) if options.model is not None else None
    contrast = None
    if options.contrast is not None:
        same = options.contrast == options.critic
        planter = critic_model if same else open_model(options.contrast, critics)
        contrast = Contrast(planter, critic.sampling, options.good_score)
    roles = Roles(critic, policy, contrast=contrast)
    job = Job(prompts.read, prompts.count, roles, door.budget)

    if options.dry_run:
        prompts.tell()
        show_critique_plan(options.out, job, options)
    run = open_run(COMMAND, options, inputs=prompts.inputs)
    if options.dry_run:  # what would be refused has been, below the plan
        return
    if options.report is None and is_done(run, job, options):
        return
    with run:
        prompts.tell()
        if policy is not None and prompts.without_response < prompts.count:
            given = prompts.count - prompts.without_response
            console.say(
                f"{given} of {prompts.count} rows bring their response; it is used as it is."
            )
        summary = run_critiques(run, job, options)
    if options.report is not None:
        write_critic_report(options.report, f"{options.critic} as a critic", summary)
    following = f"srt sft --data {options.out}"
    if options.model is None or not parse_spec(options.model).in_process:
        following += " --model MODEL"
    summary.close(f"{options.out}: {many(summary.rows, 'row')}", following)


def _with_responses(options: CollectFeedback) -> PromptSource:
    """The prompts, all of which bring a response or have a policy that answers them."""
    prompts = with_system(options.open_prompts(), options.system)
    if options.model is None and prompts.without_response:
        field = (
            f", or --response-field {prompts.answers}, if it holds them" if prompts.answers else ""
        )
        raise UsageError(
            f"{options.prompts}: {prompts.without_response} of {prompts.count} rows bring no "
            f"response. Pass --model, the policy that answers them{field}."
        )
    return prompts


def _door(options: CollectFeedback) -> ModelOptions:
    """How models are opened: with what is kept beside the output."""
    out = options.out
    return replace(options.door(), day=first_day(out), batch_notes=batches_path(out))


def _drafting(options: CollectFeedback) -> Sampling:
    """How the policy is asked."""
    return Sampling(
        options.max_new_tokens, options.temperature, seed=options.seed,
        thinks=options.policy_thinks,
    )  # fmt: skip


def _critic(options: CollectFeedback, model: Model) -> Critic:
    """A model as a critic of this stage."""
    replies = Sampling(
        options.critic_max_tokens, options.critic_temperature, seed=options.seed,
        thinks=options.critic_thinks(),
    )  # fmt: skip
    # A program would only give the same reply again.
    reasks = 0 if model.is_program else options.max_reasks
    by_items = options.critic_prompt == "checklist"
    return Critic(
        model, replies, in_conversation=False, by_checklist=by_items, max_reasks=reasks,
        longer_once=True,
    )  # fmt: skip


# --- Critiques that others wrote ---------------------------------------------------------------


def _take_written(options: CollectFeedback, location: str) -> None:
    """Join critiques to prompts and responses, and have what they lack asked of others."""
    if "--system" in typed_flags(options):
        raise UsageError(
            "--system is for drafts, and written critiques bring theirs. Leave it out."
        )
    if "--contrast" in typed_flags(options):
        raise UsageError(
            "--contrast is for a critic that is asked. Leave it out with --critic file:."
        )
    file = read_critiques(location, parse_scale(options.critique_scale))
    source = _prompts_beside(options, file)
    read: Callable[[], Iterator[Prompt]] = (
        (lambda: islice(own_prompts(file), options.limit)) if source is None else source.read
    )
    joined = join(file, read)
    door = _door(options)
    roles = _others(options, joined, door)
    job = Job(read, len(joined.rows), roles, door.budget, written=joined)
    inputs = {"critic": file.inputs[0]} if len(file.inputs) == 1 else {}
    if len(file.inputs) > 1:
        inputs = {f"critic {n}": path for n, path in enumerate(file.inputs, 1)}
    if options.dry_run:
        _tell(options, joined, source)
        show_critique_plan(options.out, job, options)
    run = open_run(COMMAND, options, inputs=inputs | dict(source.inputs if source else {}))
    if options.dry_run:
        return
    if options.report is None and is_done(run, job, options):
        return
    with run:
        _tell(options, joined, source)
        run.tally({"critiques": joined.describe()})
        if roles.scorer is not None and any(row.critique.score is not None for row in joined.rows):
            run.warn(
                f"drafts are scored in {options.critic}, improved responses by "
                f"{roles.scorer.model.spec}: a gain compares two critics."
            )
        summary = run_critiques(run, job, options)
    if options.report is not None:
        write_critic_report(options.report, f"{options.critic} as a critic", summary)
    summary.close(f"{options.out}: {many(summary.rows, 'row')}", f"srt sft --data {options.out}")


def _prompts_beside(options: CollectFeedback, file: CritiqueFile) -> PromptSource | None:
    """The prompts of `--prompts`; None where there is no such file, and the critiques bring theirs."""
    by_default = options.prompts == CollectFeedback.prompts
    if by_default and not Path(options.prompts).exists() and file.stands_alone:
        return None
    return options.open_prompts()


def _tell(options: CollectFeedback, joined: Joined, source: PromptSource | None) -> None:
    if source is None:
        console.say(f"no {options.prompts} here: the critiques bring their prompts and responses.")
    else:
        source.tell()
    for sentence in joined.sentences():
        console.say(sentence)
    lacking = joined.lacking(_asked_for(options))
    if lacking is not None:
        console.say(lacking)


def _asked_for(options: CollectFeedback) -> dict[str, str]:
    """Who is asked for which part that critiques lack; raises `UsageError` for another part."""
    asked: dict[str, str] = {}
    for text in options.critic_for_parts:
        part, equals, spec = text.partition("=")
        if part not in PARTS or not equals or not spec or part in asked:
            raise UsageError(
                f"--critic-for {text}: write refinement=SPEC or score=SPEC, each once, such as "
                "refinement=gpt-4."
            )
        asked[part] = spec
    return asked


def _others(options: CollectFeedback, joined: Joined, door: ModelOptions) -> Roles:
    """Who writes the improved responses, and who gives the scores, that the critiques lack."""
    asked = _asked_for(options)
    if "refinement" in asked and "score" not in asked and joined.lacks("refinement"):
        raise UsageError(
            f"--critic-for refinement={asked['refinement']}: nobody would score those improved "
            f"responses. Pass --critic-for score=SPEC as well."
        )
    critics = options.for_critics(door)
    models = {spec: open_model(spec, critics) for spec in sorted({*asked.values()})}
    refiner, scorer = (
        _critic(options, models[asked[part]]) if part in asked else None for part in PARTS
    )
    return Roles(None, refiner=refiner, scorer=scorer)


# --- A page for a person -----------------------------------------------------------------------


def _write_page(options: CollectFeedback, page: Path) -> None:
    """Have the policy answer what has no response, and write the page on which a person criticises."""
    if "--critic" in typed_flags(options):
        raise UsageError(
            "--critique-page has a person write the critiques: leave out --critic. Then pass what the "
            "page saves, as --critic file:FILE."
        )
    if options.reparse or options.retry_failed or options.export_batch or options.import_batch:
        raise UsageError("--critique-page goes without --reparse, --retry-failed and batch files.")
    prompts = _with_responses(options)
    if options.dry_run:
        prompts.tell()
        console.result(f"{page}: {many(prompts.count, 'row')} to criticise by hand")
        return
    door = _door(options)
    model = open_model(options.model, door) if options.model is not None else None
    run = open_run(COMMAND, options, inputs=prompts.inputs)
    with run, Asking.begin(run, options, budget=door.budget) as asking:
        prompts.tell()
        drafts: list[Draft] = []
        if model is None:
            drafts = [Draft(each, GIVEN, 0, each.response or "") for each in prompts.read()]
        else:
            asking.employ([model])
            policy = Policy(model, _drafting(options))
            scripts = (_draft(policy, prompt) for prompt in prompts.read())
            drafts = asking.ask("answering", scripts, prompts.count)
        rows = [
            PageRow(draft.prompt, draft.text, draft.policy) for draft in drafts if draft.is_usable
        ]
        if not rows:
            raise SrtError(f"{page}: no response is there to criticise.")
        file = write_critique_page(page, rows)
        run.wrote("critique_page", page)
        run.reached(f"{len(rows)} of {prompts.count}")
    if len(rows) < prompts.count:
        console.warn(f"{prompts.count - len(rows)} prompts have no usable draft, and are left out.")
    whose = f" --model {options.model}" if options.model is not None else ""
    console.finish(
        f"{page}: {many(len(rows), 'row')} to criticise by hand",
        f"open {page}, then srt collect-feedback --critic file:{file}{whose} --critic-for score=SPEC",
    )


def _draft(policy: Policy, prompt: Prompt) -> Generator[Call, Reply, Draft]:
    """A prompt's own response, or what the policy replies."""
    if prompt.response is not None:
        return Draft(prompt, GIVEN, 0, prompt.response)
    return (yield from write_draft(policy, prompt))
