"""Stage 1, first half: the policy answers, a strong critic gives feedback and a refinement."""

from dataclasses import dataclass
from pathlib import Path

from srt_cli import console
from srt_cli.calls.options import CallOptions
from srt_cli.errors import UsageError
from srt_cli.feedback.critic import Critic, Sampling
from srt_cli.feedback.run import Job, is_done, run_critiques, show_critique_plan
from srt_cli.feedback.story import Contrast, Policy, Roles
from srt_cli.models import open_model
from srt_cli.options import runtime, setting
from srt_cli.prompts import with_system
from srt_cli.report.critic import write_critic_report
from srt_cli.runs.run import open_run

COMMAND = "collect-feedback"


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
    """

    model: str | None = setting(
        None, "The policy that answers. Not needed where rows bring a response.",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    critic: str | None = setting(
        None, "The critic: gpt-4, http://HOST/v1#NAME, a directory, or python:FILE:CALLABLE.",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    out: Path = runtime(
        Path("feedback.jsonl"), "Where to write the feedback.",
        group="Output", common=True, metavar="FILE",
    )  # fmt: skip
    critic_temperature: float = setting(
        0.0, "Sampling temperature of the critic (paper: 0).", group="Critic"
    )
    contrast: str | None = setting(
        None, "Who plants one fault in each good refinement, for a row more: a model, or "
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
    if options.critic is None:
        raise UsageError(
            "No critic. Pass --critic gpt-4, http://HOST/v1#NAME, a directory or "
            'python:FILE:CALLABLE, or put critic = "gpt-4" into srt.toml.'
        )
    prompts = with_system(options.open_prompts(), options.system)
    if options.model is None and prompts.without_response:
        raise UsageError(
            f"{options.prompts}: {prompts.without_response} of {prompts.count} rows bring no "
            "response. Pass --model, the policy that answers them."
        )
    door = options.door()
    critics = options.for_critics(door)
    critic_model = open_model(options.critic, critics)
    policy_model = critic_model
    if options.model is not None and (options.model, door) != (options.critic, critics):
        policy_model = open_model(options.model, door)
    drafts = Sampling(
        options.max_new_tokens, options.temperature, seed=options.seed,
        thinks=options.policy_thinks,
    )  # fmt: skip
    replies = Sampling(
        options.critic_max_tokens, options.critic_temperature, seed=options.seed,
        thinks=options.critic_thinks(),
    )  # fmt: skip
    # A program would only give the same reply again.
    reasks = 0 if critic_model.is_program else options.max_reasks
    critic = Critic(
        critic_model, replies, in_conversation=False, max_reasks=reasks, longer_once=True
    )
    policy = Policy(policy_model, drafts) if options.model is not None else None
    contrast = None
    if options.contrast is not None:
        same = options.contrast == options.critic
        planter = critic_model if same else open_model(options.contrast, critics)
        contrast = Contrast(planter, replies, options.good_score)
    roles = Roles(critic, policy, contrast=contrast)
    job = Job(prompts.read, prompts.count, roles, door.budget)

    run = open_run(COMMAND, options, inputs=prompts.inputs)
    if options.dry_run:
        prompts.tell()
        show_critique_plan(run, job, options)
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
    summary.close(f"{options.out}: {summary.rows} rows", f"srt sft --data {options.out}")
