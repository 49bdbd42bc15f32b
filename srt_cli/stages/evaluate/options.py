"""The knobs of `srt eval`; its stage and what works on saved files both read them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli.calls.options import PolicyOptions, PromptOptions
from srt_cli.evaluation.contestants import Use
from srt_cli.evaluation.judging import Orders, Verdicts
from srt_cli.feedback.critic import (
    Critic,
    CriticPrompt,
    Sampling,
    ScoredBy,
    scores_by_checklist,
)
from srt_cli.models import Model
from srt_cli.options import Former, runtime, setting


@dataclass(frozen=True)
class Evaluate(PolicyOptions, PromptOptions):
    """Compare models with a reference on held-out prompts, and write a report.

    Every contestant answers every prompt, or brings a file of outputs. A judge compares each
    answer with the reference's in both orders; a program may check answers objectively. With
    --use refinement, a model's answer is its draft refined by its own critique (--rounds).

    Examples:
      srt eval --model models/sft --model models/dpo --judge gpt-4

      srt eval --check python:critic.py:check --use response --use refinement
    """

    model: tuple[str, ...] = setting(
        ("models/dpo",), "A contestant: a model, or a JSONL file of outputs. Repeatable.",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    reference: str | None = setting(
        None, "What to compare them with.", otherwise="the base of the first model",
        group="Model", common=True, metavar="SPEC",
    )  # fmt: skip
    judge: tuple[str, ...] = setting(
        (), "A judge: gpt-4, http://HOST/v1#NAME, or python:FILE:CALLABLE. Repeatable.",
        otherwise="the critic, without --check", group="Judge", common=True, metavar="SPEC",
    )  # fmt: skip
    repeat: int = setting(
        0, "Ask N of the judge's questions twice to measure its consistency.",
        group="Judge", extends=True,
    )  # fmt: skip
    orders: Orders = setting(
        "both", "Judge each pair in both orders, or in one that its prompt decides (AlpacaEval).",
        group="Judge",
    )  # fmt: skip
    verdicts: Verdicts = setting(
        "auto", "Read verdicts from the odds of one letter (weighted), or from a line after the "
        "reasons. auto: weighted where the judge gives log-probabilities.", group="Judge",
    )  # fmt: skip
    judge_max_tokens: int = setting(
        1024, "Maximum tokens in a judge's reasons and verdict.", positive=True, group="Judge"
    )
    judge_template: Path | None = setting(
        None, "Your own prompt for the judge, with {instruction}, {answer_M} and {answer_m}.",
        group="Judge", metavar="FILE",
    )  # fmt: skip
    check: tuple[str, ...] = setting(
        (), "A program that says whether an answer passes: python:FILE:CALLABLE. Repeatable.",
        group="Judge", common=True, metavar="SPEC",
    )  # fmt: skip
    good_score: float = setting(
        8.0, "Take a model to call an answer of its own good from this score up.", group="Critic"
    )
    scorer: str | None = setting(
        None, "Also score every direct answer blind with this model, or python:FILE:critique, to "
        "show how far a model's own scores drift.", group="Judge", metavar="SPEC",
    )  # fmt: skip
    labels: Path | None = setting(
        None, "People's verdicts on the pairs: id, label (model, reference or tie) and, of several "
        "models, a (which one).",
        group="Judge", metavar="FILE",
    )  # fmt: skip
    objective: tuple[str, ...] = setting(
        (), "Results of lm-evaluation-harness for the drift table. Repeatable.",
        group="Data", metavar="MODEL=FILE",
    )  # fmt: skip
    use: tuple[Use, ...] = setting(
        ("response",), "Which answer to judge. Repeat for both.", group="Model", common=True
    )
    annotations: tuple[Path, ...] = setting(
        (), "Count saved judgments instead: AlpacaEval's annotations.json, or judgments.jsonl. "
        "Repeatable.", group="Data", metavar="FILE",
    )  # fmt: skip
    feedback: tuple[Path, ...] = setting(
        (), "Rate the critiques of feedback files instead; with --scorer, also what their scores "
        "are worth. Repeatable.", group="Data", metavar="FILE",
    )  # fmt: skip
    pairs: Path | None = setting(
        None, "How often each --model scores chosen above rejected (paper, Table 5): alone, or, "
        "with a judge, check or scorer, as a row of the drift table.",
        group="Data", metavar="FILE",
    )  # fmt: skip
    critic_prompt: CriticPrompt = setting(
        "auto", "How a critic is asked: in conversation, as srt trains it, by the paper's "
        "Table 1, or item by item (checklist). auto: models in process in conversation, others by "
        "Table 1.", group="Critic",
        formerly=Former("critique_style", {"message": "table-1"}),
    )  # fmt: skip
    score: ScoredBy = setting(
        "written", "A trained model's score as its own critic: the number that it writes, or the "
        "share of yes in its checklist.", group="Critic",
    )  # fmt: skip
    export: Literal["alpaca_eval"] | None = runtime(
        None, "Also write outputs and judgments in another tool's format.", group="Output"
    )
    rounds: int = setting(
        1, "Refine this many times for --use refinement. Each round is reported.",
        positive=True, group="Sampling",
    )  # fmt: skip
    out: Path = runtime(
        Path("eval.json"), "Where to write the figures; report.html goes beside it.",
        group="Output", common=True, metavar="FILE",
    )  # fmt: skip
    temperature: float = setting(
        0.0, "Sampling temperature of the answers (paper: greedy).", group="Sampling"
    )
    max_new_tokens: int = setting(
        512, "Maximum tokens in an answer.", positive=True, group="Sampling", common=True
    )
    critic_max_tokens: int = setting(
        2048, "Maximum tokens in feedback and refinement together.", positive=True, group="Critic"
    )
    min_coverage: float = runtime(
        0.95, "Exit with status 3 if fewer than this share of the pairs have valid verdicts "
        "(of --pairs: scores).", group="Judge", metavar="SHARE",
    )  # fmt: skip
    seed: int = setting(42, "Seed of sampled answers.", group="Sampling", common=True)
    markdown: Path | None = runtime(
        None, "Also write the tables as Markdown.", group="Output", common=True, metavar="FILE"
    )
    dry_run: bool = runtime(
        False, "Count answers, verdicts, tokens and cost. Send and write nothing.", group="Run"
    )
    offline: bool = runtime(False, "Only replay the journal. Send nothing.", group="Run")
    examples: int = runtime(100, "Prompts to show one by one in the report.", group="Output")
    overwrite: bool = runtime(
        False, "Replace an output made with other settings. The journal stays.",
        group="Run", common=True,
    )  # fmt: skip

    def critic_of(self, model: Model, *, in_conversation: bool) -> Critic:
        """A model as a critic: the one that it was trained to be, or one from outside."""
        thinks = self.critic_thinks(itself=in_conversation)
        sampling = Sampling(self.critic_max_tokens, 0.0, seed=self.seed, thinks=thinks)
        by_items = scores_by_checklist(in_conversation, self.score, self.critic_prompt)
        return Critic(model, sampling, in_conversation, by_checklist=by_items)
