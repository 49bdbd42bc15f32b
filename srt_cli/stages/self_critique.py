"""Stage 2, first half: the tuned model answers, criticises and refines by itself."""

from dataclasses import dataclass
from pathlib import Path

from srt_cli.artifacts import open_run, read_manifest
from srt_cli.call_options import CallOptions
from srt_cli.critique import Check, Critic, Sampling
from srt_cli.critique_run import Work, is_done, run_critiques, show_critique_plan
from srt_cli.errors import SrtError, UsageError
from srt_cli.models import open_model
from srt_cli.options import runtime, setting
from srt_cli.prompts import prompts_from
from srt_cli.report.critic import write_critic_report

COMMAND = "self-critique"


@dataclass(frozen=True)
class SelfCritique(CallOptions):
    """Let the tuned model answer new prompts, criticise its own answers and refine them.

    The model is asked in conversation, as it was trained: draft at a temperature, feedback and
    refinement greedily, then the score of the refinement in a fresh conversation that never saw
    the first feedback. With --check, a program says what is really good, and the summary shows
    whether the model knows.

    Examples:

      srt self-critique --prompts prompts.jsonl --model models/sft

      srt self-critique --prompts more.jsonl --samples 4 --out self-feedback.jsonl
    """

    prompts: str = setting(
        "prompts.jsonl", "Prompts: a JSONL file, - for stdin, or hf:NAME:SPLIT.", metavar="FILE"
    )
    model: str = setting("models/sft", "The tuned model, its own critic.", metavar="SPEC")
    out: Path = runtime(Path("self-feedback.jsonl"), "Where the feedback goes.", metavar="FILE")
    prompt_field: str | None = setting(None, "The field that holds the prompt.", metavar="NAME")
    temperature: float = setting(0.7, "Sampling temperature of the drafts (paper: 0.7).")
    max_new_tokens: int = setting(512, "Most tokens of a draft.")
    critic_max_tokens: int = setting(2048, "Most tokens of feedback and refinement (paper: 2048).")
    samples: int = setting(1, "Drafts a prompt (paper: 1).")
    rounds: int = setting(1, "Refinements in a row (paper: 1).")
    check: str | None = setting(
        None, "A program that knows good answers: python:FILE:CALLABLE.", metavar="SPEC"
    )
    good_score: float = setting(8.0, "From this score on, the model calls an answer good.")
    seed: int = setting(42, "Seed of the drafts; the same seed draws the same drafts.")
    limit: int | None = setting(None, "Use only the first N prompts.", extends=True)
    report: Path | None = runtime(None, "Write a page about the critic's quality.", metavar="FILE")
    overwrite: bool = runtime(False, "Replace an output of other settings; the journal stays.")


def run(options: SelfCritique) -> None:
    """Read prompts, let the model criticise itself, write `self-feedback.jsonl`."""
    if options.samples < 1 or options.rounds < 1:
        raise UsageError("--samples and --rounds start at 1.")
    prompts = prompts_from(options.prompts, options.prompt_field, options.limit)
    refuse_partial_critic(Path(options.model))
    door = options.door()
    model = open_model(options.model, door)
    drafts = Sampling(options.max_new_tokens, options.temperature, seed=options.seed)
    replies = Sampling(options.critic_max_tokens, temperature=0.0, seed=options.seed)
    check = Check(open_model(options.check), options.good_score) if options.check else None

    run = open_run(
        COMMAND, options, options.out, inputs=prompts.inputs, overwrite=options.overwrite
    )
    work = Work(
        prompts.read,
        prompts.count,
        policy=(model, drafts),
        critic=Critic(model, replies, in_conversation=True),
        budget=door.budget,
        check=check,
        samples=options.samples,
        rounds=options.rounds,
    )
    if options.dry_run:
        show_critique_plan(run, work, options)
        return
    if options.report is None and is_done(run, work, options):
        return
    with run:
        summary = run_critiques(run, work, options)
    if options.report is not None:
        write_critic_report(options.report, f"{options.model} as its own critic", summary)
    summary.close(f"{options.out}: {summary.rows} rows", f"srt build-prefs --data {options.out}")


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
