"""Stage 2, first half: the tuned model answers, criticises and refines by itself."""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

from srt_cli.calls.conduct import Script
from srt_cli.calls.options import CallOptions
from srt_cli.errors import SrtError, UsageError
from srt_cli.feedback.critic import (
    Critic,
    CriticPrompt,
    Sampling,
    ScoredBy,
    asked_in_conversation,
    scores_by_checklist,
)
from srt_cli.feedback.processes import answer_in_processes
from srt_cli.feedback.run import Job, is_done, run_critiques, show_critique_plan
from srt_cli.feedback.story import Check, CheckedRow, Policy, Roles
from srt_cli.models import Model, ModelOptions, open_model, parse_spec, refuse_unless_program
from srt_cli.options import runtime, setting, typed_flags
from srt_cli.prompts import PromptSource, with_system
from srt_cli.report.critic import write_critic_report
from srt_cli.runs.run import batches_path, first_day, open_run, read_manifest
from srt_cli.tables import many

COMMAND = "self-critique"


@dataclass(frozen=True)
class SelfCritique(CallOptions):
    """Let the tuned model answer new prompts, criticise its own answers and refine them.

    The model is asked in conversation, as it was trained: a draft at a temperature, feedback and
    refinement greedily, then the score of the refinement in a fresh conversation that never saw
    the first feedback. With --check, a program says which answers are good, and the summary shows
    whether the model knows. With --critic, another model gives the scores, or the whole critique.

    Examples:
      srt self-critique --prompts prompts.jsonl --model models/sft

      srt self-critique --prompts more.jsonl --samples 4 --score-samples 3

      srt self-critique --model models/dpo --critic models/sft --out r2.jsonl
    """

    model: str = setting(
        "models/sft", "The tuned model, which is its own critic.",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    out: Path = runtime(
        Path("self-feedback.jsonl"), "Where to write the feedback.",
        group="Output", common=True, metavar="FILE",
    )  # fmt: skip
    samples: int = setting(
        1, "Drafts per prompt (paper: 1).", positive=True, group="Sampling", common=True
    )
    rounds: int = setting(
        1, "Refine this many times in a row, scoring each blind (paper: 1).",
        positive=True, group="Sampling",
    )  # fmt: skip
    stop_when_worse: bool = setting(
        False, "Stop refining once a refinement scores lower than what it refines.",
        group="Sampling",
    )  # fmt: skip
    # Not named critic: the critic of stage 1, set in srt.toml for every command, is not meant.
    other_critic: str | None = setting(
        None, "Another critic for the scores, or with --critic-for everything for all feedback.",
        otherwise="the model itself",
        group="Model", common=True, flag="--critic", metavar="SPEC",
    )  # fmt: skip
    critic_for: Literal["scores", "everything"] = setting(
        "scores", "What --critic gives: scores alone, or feedback and refinement too.",
        group="Critic",
    )  # fmt: skip
    critic_prompt: CriticPrompt = setting(
        "auto", "How --critic is asked: in conversation, as srt trains it, by the paper's "
        "Table 1, or item by item (checklist). auto: models in process in conversation, others by "
        "Table 1.", group="Critic",
    )  # fmt: skip
    score: ScoredBy = setting(
        "written", "The model's score: the number that it writes, or, for one that was trained on "
        "checklists, the share of their items that it answers with yes (checklist).", group="Critic",
    )  # fmt: skip
    expected_score: bool = setting(
        True, "Also record each score's expectation under the critic's log-probabilities.",
        group="Critic",
    )  # fmt: skip
    score_samples: int = setting(
        1, "Judgements to average for each answer's expected score.", positive=True, group="Critic"
    )
    compare: bool = setting(
        False, "Also record how likely a refinement is better than its draft, and one sample's draft "
        "than another's, asked in both orders (srt sft --compare trains it).", group="Critic",
    )  # fmt: skip
    check: str | None = setting(
        None, "A program that tells good answers from bad: python:FILE:CALLABLE.",
        group="Critic", metavar="SPEC",
    )  # fmt: skip
    good_score: float = setting(
        8.0, "Take the model to call an answer good from this score up.", group="Critic"
    )
    num_processes: int = runtime(
        1, "Split the rows over N processes, each with its own GPU.",
        positive=True, group="Many processes", common=True,
    )  # fmt: skip

    @property
    def policy_is_critic(self) -> bool:
        """Whether no `--critic` is named."""
        return self.other_critic is None


def run(options: SelfCritique) -> None:
    """Read prompts, let the model criticise itself, write `self-feedback.jsonl`."""
    if options.num_processes > 1:
        _refuse_processes(options)
    idle = {
        "--critic-for everything": options.critic_for == "everything",
        "--critic-prompt": options.critic_prompt != "auto",
    }
    for flag, given in idle.items():
        idles = given and options.other_critic is None
        if idles and flag.split()[0] in typed_flags(options):
            raise UsageError(f"{flag} is for another critic. Pass --critic SPEC, or leave it out.")
    job, prompts = _open_job(options)
    if options.dry_run:
        prompts.tell()
        show_critique_plan(options.out, job, options)
    run = open_run(COMMAND, options, inputs=prompts.inputs)
    if options.dry_run:  # what would be refused has been, below the plan
        return
    if options.report is None and is_done(run, job, options):
        return
    beforehand = None
    if options.num_processes > 1 and not options.sends_nothing:
        beforehand = partial(
            answer_in_processes,
            open_scripts=_open_scripts,
            options=options,
            processes=options.num_processes,
            rows=job.rows,
        )
    with run:
        prompts.tell()
        run.tell_of_system(options.model, options.system)
        summary = run_critiques(run, job, options, beforehand)
    if options.report is not None:
        critic = f"with {options.other_critic} as its" if options.other_critic else "as its own"
        write_critic_report(options.report, f"{options.model} {critic} critic", summary)
    summary.close(
        f"{options.out}: {many(summary.rows, 'row')}", f"srt build-prefs --data {options.out}"
    )


def refuse_partial_critic(model: Path) -> None:
    """Raise `SrtError` for a model that was trained, as an ablation, to write no whole feedback."""
    manifest = read_manifest(model) if model.is_dir() else None
    if manifest is None or manifest.command != "sft":
        return
    ablation = [
        f"--{name.replace('_', '-')}"
        for name in ("drop", "refinement_only")
        if manifest.settings.get(name)
    ]
    if ablation:
        raise SrtError(
            f"{model}: was trained with {ablation[0]}, so it writes no whole feedback and its "
            "critiques would not parse. Compare its answers with srt eval instead."
        )


def _refuse_processes(options: SelfCritique) -> None:
    """Raise `UsageError` for a server's model, whose caps hold for one process, and for a pipe."""
    specs = [spec for spec in (options.model, options.other_critic) if spec is not None]
    elsewhere = [spec for spec in specs if parse_spec(spec).is_remote]
    if elsewhere:
        raise UsageError(
            f"--num-processes is for models in process; {elsewhere[0]} answers many requests at "
            "once by itself. Leave it out."
        )
    if options.prompts == "-" or Path(options.prompts).is_fifo():
        raise UsageError(
            "--num-processes reads the prompts several times: give a file, not - or another pipe."
        )


def _open_job(options: SelfCritique) -> tuple[Job, PromptSource]:
    """The models and what they are to do, and the prompts."""
    if options.check is not None:
        refuse_unless_program("--check", options.check)
    prompts = with_system(options.open_prompts(), options.system)
    if options.other_critic is None or options.critic_for == "scores":
        refuse_partial_critic(Path(options.model))
    door = replace(
        options.door(),
        logprobs=options.expected_score,
        day=first_day(options.out),
        batch_notes=batches_path(options.out),
    )
    model = open_model(options.model, door)
    drafts = Sampling(
        options.max_new_tokens, options.temperature, seed=options.seed,
        thinks=options.policy_thinks,
    )  # fmt: skip
    replies = Sampling(
        options.critic_max_tokens, temperature=0.0, seed=options.seed,
        thinks=options.critic_thinks(itself=True),
    )  # fmt: skip
    by_items = options.score == "checklist"
    itself = Critic(model, replies, in_conversation=True, by_checklist=by_items)
    others = replace(replies, thinks=options.critic_thinks())
    other = _other_critic(options, others, model, door)
    scorer = other if options.critic_for == "scores" else None
    critic = other if other is not None and scorer is None else itself
    if scorer is not None:
        scorer = _judging(scorer, options)
    else:
        critic = _judging(critic, options)
    roles = Roles(
        critic,
        Policy(model, drafts),
        scorer,
        rounds=options.rounds,
        stop_when_worse=options.stop_when_worse,
        compares=options.compare,
    )
    check = Check(open_model(options.check), options.good_score) if options.check else None
    job = Job(prompts.read, prompts.count, roles, door.budget, check, options.samples)
    return job, prompts


def _judging(critic: Critic, options: SelfCritique) -> Critic:
    """The critic whose scores count, asked for expected scores as the options say."""
    return replace(critic, expects=options.expected_score, score_samples=options.score_samples)


def _other_critic(
    options: SelfCritique, replies: Sampling, model: Model, door: ModelOptions
) -> Critic | None:
    if options.other_critic is None:
        return None
    critics = options.for_critics(door)
    same = (options.other_critic, critics) == (options.model, door)
    critic = model if same else open_model(options.other_critic, critics)
    asked = asked_in_conversation(options.critic_prompt, options.other_critic)
    by_items = scores_by_checklist(asked, options.score, options.critic_prompt)
    return Critic(critic, replies, in_conversation=asked, by_checklist=by_items)


def _open_scripts(options: SelfCritique) -> tuple[Iterable[Script[CheckedRow]], list[Model]]:
    """What another process needs: every row's script, and the models to close."""
    job, _ = _open_job(options)
    return job.scripts(), job.models
