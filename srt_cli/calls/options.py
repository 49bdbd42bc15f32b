"""The knobs that commands which ask models share; each is declared here once.

`ApiOptions`: speed, caps, and how critics are asked; `PolicyOptions`: also how the policy is asked;
`PromptOptions`: where prompts come from; `CallOptions`: what the two feedback stages share.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from srt_cli import console
from srt_cli.errors import UsageError
from srt_cli.forms import FieldNames
from srt_cli.models import Engine, ModelOptions, Thinking, Thinks
from srt_cli.models.api.providers import parse_api_keys
from srt_cli.models.budget import Budget, parse_prices
from srt_cli.options import runtime, setting
from srt_cli.prompts import PromptSource, Selection, prompts_from
from srt_cli.records import STATUSES

THINKING_TOKENS: Final = 2048
"""Room for thoughts where a model is told to think."""


@dataclass(frozen=True)
class ApiOptions:
    """Speed and caps of model calls, and how critics, judges and scorers are asked."""

    concurrency: int | None = runtime(
        None, "Requests in flight.",
        otherwise="finds its own level", positive=True, group="Calls and money",
    )  # fmt: skip
    rpm: float | None = runtime(
        None, "Requests per minute.", otherwise="what the server's headers say",
        positive=True, group="Calls and money",
    )  # fmt: skip
    tpm: float | None = runtime(
        None, "Tokens per minute.", otherwise="what the server's headers say",
        positive=True, group="Calls and money",
    )  # fmt: skip
    timeout: float = runtime(
        600.0, "Give up on a request after this many seconds.",
        positive=True, group="Calls and money", metavar="SECONDS",
    )  # fmt: skip
    give_up_after: float = runtime(
        600.0, "End the run when a server has admitted nothing for this many seconds.",
        group="Calls and money", metavar="SECONDS",
    )  # fmt: skip
    max_cost: float | None = runtime(
        None, "Stop before spending more than this many dollars.",
        group="Calls and money", common=True, metavar="DOLLARS",
    )  # fmt: skip
    max_tokens_total: int | None = runtime(
        None, "Stop before using more than this many tokens.", group="Calls and money"
    )
    max_requests: int | None = runtime(
        None, "Stop after this many requests.", group="Calls and money"
    )
    price: tuple[str, ...] = runtime(
        (), "Dollars per million tokens of a model. Repeatable.",
        group="Calls and money", metavar="NAME=IN/OUT[/CACHED]",
    )  # fmt: skip
    cpu_int8: bool = setting(
        False, "Let models in process multiply in 8 bits on a CPU: faster drafts, but other texts.",
        group="Model",
    )  # fmt: skip
    thinking_tokens: int | None = setting(
        None, "Tokens for thoughts, on top of the answer's, of each model that is told to think or, as "
        "critics are, left to decide.",
        otherwise=f"{THINKING_TOKENS} with thinking on", group="Sampling",
    )  # fmt: skip
    critic_reasoning_effort: str | None = setting(
        None, "How hard critics, judges and scorers think.", group="Critic", metavar="EFFORT"
    )
    critic_extra_body: str | None = setting(
        None, "More fields for every request to critics, judges and scorers.",
        group="Critic", metavar="JSON|FILE",
    )  # fmt: skip
    critic_thinking: Thinking | None = setting(
        None, "Whether critics, judges and scorers are told to think before they answer.",
        otherwise="auto; as for its drafts, where a policy is its own", group="Critic",
    )  # fmt: skip
    critic_chat_template: str | None = setting(
        None, "Another chat template for critics, judges and scorers in process.",
        group="Critic", metavar="NAME|FILE",
    )  # fmt: skip
    batch: bool = runtime(
        False, "Use the Batch API: half the price, within 24 hours.", group="Calls and money"
    )
    batch_poll: float = runtime(
        60.0, "Seconds between checks on a batch.",
        group="Calls and money", metavar="SECONDS",
    )  # fmt: skip
    api_key: tuple[str, ...] = runtime(
        (), "The environment variable that holds the key of a host. Repeatable.",
        group="Calls and money", metavar="HOST=VARIABLE",
    )  # fmt: skip
    batch_size: int | None = runtime(
        None, "Rows per batch of a model in process.", otherwise="what memory holds",
        positive=True, group="Model",
    )  # fmt: skip
    engine: Engine = runtime(
        "auto", "How models in process batch: static (CPU) or continuous (GPU).", group="Model"
    )
    trust_remote_code: bool = runtime(
        False, "Let a model directory run its own code.", group="Model"
    )

    def __post_init__(self) -> None:
        # Before anything is written: what stands here may be a key by mistake.
        parse_api_keys(self.api_key)

    def door(self) -> ModelOptions:
        """The knobs as the models' door takes them; every model opened with it shares one budget."""
        return ModelOptions(
            concurrency=self.concurrency,
            batch_size=self.batch_size,
            engine=self.engine,
            int8=self.cpu_int8,
            timeout_s=self.timeout,
            give_up_after_s=self.give_up_after,
            trust_remote_code=self.trust_remote_code,
            rpm=self.rpm,
            tpm=self.tpm,
            prices=parse_prices(self.price),
            api_keys=parse_api_keys(self.api_key),
            budget=Budget(self.max_cost, self.max_tokens_total, self.max_requests),
            batch_poll_s=self.batch_poll if self.batch else None,
        )

    def critic_thinks(self) -> Thinks:
        """What critics, judges and scorers are told of thinking."""
        return self._thinks(None if self.critic_thinking == "auto" else self.critic_thinking)

    def _thinks(self, told: Thinking | None, *, by_default: bool = False) -> Thinks:
        tokens = THINKING_TOKENS if told == "on" else 0
        if self.thinking_tokens is not None and told != "off":
            tokens = self.thinking_tokens
        return Thinks(told, by_default, tokens)

    def for_critics(self, door: ModelOptions) -> ModelOptions:
        """The same door, as critics, judges and scorers are opened through it."""
        flag = "--critic-extra-body"
        return replace(
            door,
            effort=self.critic_reasoning_effort,
            extra_body=_extra_body(flag, self.critic_extra_body),
            extra_flag=flag,
            chat_template=self.critic_chat_template,
            template_flag="--critic-chat-template",
        )


@dataclass(frozen=True)
class PolicyOptions(ApiOptions):
    """The same, and how the policy is asked."""

    reasoning_effort: str | None = setting(
        None, "How hard a reasoning model thinks, as its provider calls it: low, high, ...",
        group="Model", metavar="EFFORT",
    )  # fmt: skip
    extra_body: str | None = setting(
        None, "More fields for every request to a server, as a JSON object or a file of one.",
        group="Model", metavar="JSON|FILE",
    )  # fmt: skip
    chat_template: str | None = setting(
        None, "Another chat template for a model in process: a .jinja file, one of the model's own by "
        "name, or one that TRL ships (such as qwen3).", group="Model", metavar="NAME|FILE",
    )  # fmt: skip
    thinking: Thinking | None = setting(
        None, "Whether the policy is told to think before it answers.",
        otherwise="off, where it can be told", group="Sampling",
    )  # fmt: skip

    def __post_init__(self) -> None:
        super().__post_init__()
        asked = self.policy_thinks, self.critic_thinks(itself=self.policy_is_critic)
        if self.thinking_tokens is not None and {thinks.told for thinks in asked} == {"off"}:
            console.warn(
                "--thinking-tokens: no model may think, so none has them. Pass --thinking on, or "
                "--critic-thinking on or auto."
            )

    @property
    def policy_is_critic(self) -> bool:
        """Whether the policy is its own critic, and no other is asked."""
        return False

    def door(self) -> ModelOptions:
        """The knobs as the door takes them that the policy is opened through."""
        return replace(
            super().door(),
            effort=self.reasoning_effort,
            extra_body=_extra_body("--extra-body", self.extra_body),
            chat_template=self.chat_template,
        )

    @property
    def policy_thinks(self) -> Thinks:
        """What the policy is told of thinking."""
        return self._thinks(self.thinking or "off", by_default=self.thinking is None)

    def critic_thinks(self, *, itself: bool = False) -> Thinks:
        """What critics, judges and scorers are told of thinking; `itself` is the policy as its own."""
        if itself and self.critic_thinking is None:
            return self.policy_thinks
        return super().critic_thinks()


OURS: Final = frozenset({"messages", "input", "model", "stream", "n"})
"""What no field of the user's may change: srt would not read the reply, or ask something else."""


def _extra_body(flag: str, given: str | None) -> dict[str, Any]:
    """The fields in a JSON object or in a file of one; raises `UsageError` for anything else."""
    if given is None:
        return {}
    try:
        text = given if given.lstrip().startswith("{") else Path(given).read_text(encoding="utf-8")
        fields = json.loads(text)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{flag} {given}: neither a JSON object nor a file of one ({error})."
        ) from error
    if not isinstance(fields, dict):
        raise UsageError(f"{flag} {given}: not a JSON object.")
    if taken := sorted(OURS & fields.keys()):
        raise UsageError(f"{flag}: srt itself sets {', '.join(taken)}. Take it out.")
    return fields


@dataclass(frozen=True)
class PromptOptions:
    """Where prompts come from."""

    prompts: str = setting(
        "prompts.jsonl", "Prompts: JSONL, JSON, CSV, parquet or arrow; a file, a folder or a glob, - "
        "for stdin, or hf:NAME:SPLIT.",
        group="Data", common=True, metavar="FILE",
    )  # fmt: skip
    prompt_field: str | None = setting(
        None, "The field that holds the prompt. Dots lead into it: meta.question.",
        group="Data", metavar="NAME",
    )  # fmt: skip
    response_field: str | None = setting(
        None, "The field that holds a given response.", otherwise="response",
        group="Data", metavar="NAME",
    )  # fmt: skip
    id_field: str | None = setting(
        None, "The field that holds the id.", otherwise="id, else a digest of the prompt",
        group="Data", metavar="NAME",
    )  # fmt: skip
    unique: bool = setting(False, "Use a prompt that stands several times once.", group="Data")
    limit: int | None = setting(
        None, "Use only the first N prompts.",
        positive=True, group="Data", common=True, extends=True,
    )  # fmt: skip
    system: str | None = setting(
        None, "A system turn for drafts, which are trained with it. A prompt's own stays.",
        group="Sampling", metavar="TEXT|FILE",
    )  # fmt: skip

    def open_prompts(self) -> PromptSource:
        """The prompts, read once."""
        names = FieldNames(self.prompt_field, self.response_field, self.id_field)
        return prompts_from(self.prompts, Selection(names, self.limit, self.unique))


@dataclass(frozen=True)
class CallOptions(PolicyOptions, PromptOptions):
    """The knobs of the feedback stages: how drafts are made, and what to redo or take elsewhere."""

    temperature: float = setting(
        0.7, "Sampling temperature of the drafts (paper: 0.7).", group="Sampling", common=True
    )
    max_new_tokens: int = setting(
        512, "Maximum tokens in a draft.", positive=True, group="Sampling", common=True
    )
    seed: int = setting(
        42, "Seed of the drafts. The same seed gives the same drafts.",
        group="Sampling", common=True,
    )  # fmt: skip
    critic_max_tokens: int = setting(
        2048, "Maximum tokens in a critic's reply (paper: 2048).", positive=True, group="Critic"
    )
    max_failures: int | None = runtime(
        None, "Exit with status 3 if more than this many rows fail.", group="Run"
    )
    report: Path | None = runtime(
        None, "Write a page about the quality of the critic.",
        group="Output", common=True, metavar="FILE",
    )  # fmt: skip
    overwrite: bool = runtime(
        False, "Replace an output made with other settings. The journal stays.",
        group="Run", common=True,
    )  # fmt: skip

    dry_run: bool = runtime(
        False, "Count rows, calls, tokens and cost. Send and write nothing.",
        group="Run", common=True,
    )  # fmt: skip
    reparse: bool = runtime(
        False, "Rebuild the output from the journal without a single call.", group="Run"
    )
    retry_failed: str | None = runtime(
        None, "Ask again for rows with these statuses: all, or unparsed,truncated,refused.",
        group="Run", metavar="STATUS,...",
    )  # fmt: skip
    export_batch: Path | None = runtime(
        None, "Write the owed requests to a batch file, e.g. for vllm run-batch.",
        group="Calls and money", metavar="FILE",
    )  # fmt: skip
    import_batch: Path | None = runtime(
        None, "Read the replies to an exported batch file.",
        group="Calls and money", metavar="FILE",
    )  # fmt: skip

    def door(self) -> ModelOptions:
        """The knobs as the models' door takes them; raises `UsageError` when they contradict."""
        alone = ("dry_run", "reparse", "batch", "export_batch")
        chosen = [f"--{name.replace('_', '-')}" for name in alone if getattr(self, name)]
        imports = ["--import-batch"] if self.import_batch and (self.dry_run or self.batch) else []
        if len(chosen + imports) > 1:
            raise UsageError(f"{' and '.join(chosen + imports)}: choose one of them.")
        if self.export_batch is not None and self.export_batch.exists():
            raise UsageError(f"--export-batch {self.export_batch}: exists. Choose another name.")
        offline = self.dry_run or self.sends_nothing
        return replace(super().door(), export_to=self.export_batch, offline=offline)

    @property
    def sends_nothing(self) -> bool:
        """Whether the output is made of what is known already, and what is not stays owed."""
        return self.reparse or (self.import_batch is not None and self.export_batch is None)

    def statuses_to_retry(self) -> frozenset[str]:
        """`--retry-failed` as statuses; raises `UsageError` for an unknown one."""
        bad = [status for status in STATUSES if status != "ok"]
        if self.retry_failed is None:
            return frozenset()
        named = [name.strip() for name in self.retry_failed.split(",") if name.strip()]
        if named == ["all"]:
            return frozenset(bad)
        unknown = [name for name in named if name not in bad]
        if unknown or not named:
            raise UsageError(
                f"--retry-failed {self.retry_failed!r}: name some of {', '.join(bad)}, or all."
            )
        return frozenset(named)
