"""The knobs of `srt eval`; its stage and what works on saved files both read them."""

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from srt_cli.calls.options import ApiOptions
from srt_cli.evaluation.contestants import Use
from srt_cli.evaluation.judging import Orders, Verdicts
from srt_cli.options import runtime, setting


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
    repeat: int = setting(
        0, "Put so many of a judge's questions twice: does it repeat itself?", extends=True
    )
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
        ("response",),
        "Which answer counts: response or refinement. Twice for both.",
        metavar="response|refinement",
    )
    annotations: tuple[Path, ...] = setting(
        (), "Count saved judgments instead: AlpacaEval's annotations.json, or judgments.jsonl. "
        "Several times.", metavar="FILE",
    )  # fmt: skip
    feedback: tuple[Path, ...] = setting(
        (), "Instead: how good the critiques of feedback files are; with --scorer, what their scores "
        "are worth. Several times.", metavar="FILE",
    )  # fmt: skip
    pairs: Path | None = setting(
        None, "How often each --model scores the chosen answer above the rejected (paper, Table 5): "
        "alone, or with a judge, check or scorer as a row of the drift table.", metavar="FILE",
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
