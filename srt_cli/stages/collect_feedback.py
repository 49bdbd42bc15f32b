"""Stage 1, first half: the policy answers, a strong critic gives feedback and a refinement."""

from dataclasses import dataclass
from pathlib import Path

from srt_cli import console
from srt_cli.artifacts import open_run
from srt_cli.critique import Critic, Sampling, run_critiques
from srt_cli.errors import UsageError
from srt_cli.models import ModelOptions, open_model
from srt_cli.options import runtime, setting
from srt_cli.prompts import prompts_from

COMMAND = "collect-feedback"


@dataclass(frozen=True)
class CollectFeedback:
    """Let a policy answer prompts, and a critic write feedback and a refinement for each answer.

    The critic is asked twice a row: once for weaknesses, suggestions, a score and an improved
    response (paper, Table 1), and once, blind, for the score of that improved response. Nothing is
    filtered here: every input row ends in exactly one status.

    Examples:

      srt collect-feedback --prompts prompts.jsonl --model models/base --critic gpt-4

      srt collect-feedback --model http://localhost:8000/v1#llama --critic python:critic.py:critique
    """

    prompts: str = setting(
        "prompts.jsonl", "Prompts: a JSONL file, - for stdin, or hf:NAME:SPLIT.", metavar="FILE"
    )
    model: str | None = setting(
        None, "The policy that answers. Rows that bring a response need none.", metavar="SPEC"
    )
    critic: str | None = setting(
        None, "The critic: gpt-4, http://HOST/v1#NAME, a directory, python:FILE:CALLABLE.",
        metavar="SPEC",
    )  # fmt: skip
    out: Path = runtime(Path("feedback.jsonl"), "Where the feedback goes.", metavar="FILE")
    prompt_field: str | None = setting(None, "The field that holds the prompt.", metavar="NAME")
    temperature: float = setting(0.7, "Sampling temperature of the drafts (paper: 0.7).")
    max_new_tokens: int = setting(512, "Most tokens of a draft.")
    critic_temperature: float = setting(0.0, "Sampling temperature of the critic (paper: 0).")
    critic_max_tokens: int = setting(2048, "Most tokens of a critic's reply (paper: 2048).")
    seed: int = setting(42, "Seed of the drafts; the same seed draws the same drafts.")
    limit: int | None = setting(None, "Use only the first N prompts.", extends=True)
    max_failures: int | None = runtime(None, "Exit 3 when more rows than this failed.")
    concurrency: int | None = runtime(None, "Requests in flight; default: finds its own level.")
    batch_size: int | None = runtime(None, "Rows a batch, for models in process.")
    timeout: float = runtime(600.0, "Seconds after which a request counts as hung.")
    trust_remote_code: bool = runtime(False, "Let a model directory run its own code.")
    overwrite: bool = runtime(False, "Replace an output of other settings; the journal stays.")


def run(options: CollectFeedback) -> None:
    """Read prompts, criticise, write `feedback.jsonl`."""
    if options.critic is None:
        raise UsageError(
            "No critic. Pass --critic gpt-4, http://HOST/v1#NAME, a directory or "
            'python:FILE:CALLABLE, or put critic = "gpt-4" into srt.toml.'
        )
    prompts = prompts_from(options.prompts, options.prompt_field, options.limit)
    if options.model is None and prompts.without_response:
        raise UsageError(
            f"{options.prompts}: {prompts.without_response} of {prompts.count} rows bring no "
            "response. Pass --model, the policy that answers them."
        )
    door = ModelOptions(
        options.concurrency, options.batch_size, options.timeout, options.trust_remote_code
    )
    critic_model = open_model(options.critic, door)
    policy_model = critic_model
    if options.model != options.critic and options.model is not None:
        policy_model = open_model(options.model, door)
    drafts = Sampling(options.max_new_tokens, options.temperature, seed=options.seed)
    replies = Sampling(options.critic_max_tokens, options.critic_temperature, seed=options.seed)
    critic = Critic(critic_model, replies, in_conversation=False)
    policy = (policy_model, drafts) if options.model is not None else None

    run = open_run(
        COMMAND, options, options.out, inputs=prompts.inputs, overwrite=options.overwrite
    )
    with run:
        if policy is not None and prompts.without_response < prompts.count:
            given = prompts.count - prompts.without_response
            console.say(
                f"{given} of {prompts.count} rows bring their response; it is used as it is."
            )
        summary = run_critiques(
            run, prompts.read(), prompts.count, policy, critic, max_failures=options.max_failures
        )
    summary.close(f"{options.out}: {summary.rows} rows", f"srt sft --data {options.out}")
