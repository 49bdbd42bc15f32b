"""The knobs of every command that asks models: how fast, how much at most, and what to redo.

Stages inherit them; each is declared here once. None changes what a model replies.
"""

from dataclasses import dataclass, replace
from pathlib import Path

from srt_cli.errors import UsageError
from srt_cli.models import Engine, ModelOptions
from srt_cli.models.budget import Budget, parse_prices
from srt_cli.options import runtime
from srt_cli.records import STATUSES


@dataclass(frozen=True)
class ApiOptions:
    """Speed and caps of model calls."""

    concurrency: int | None = runtime(None, "Requests in flight; default: finds its own level.")
    rpm: float | None = runtime(None, "Requests a minute; default: what the server's headers say.")
    tpm: float | None = runtime(None, "Tokens a minute; default: what the server's headers say.")
    timeout: float = runtime(600.0, "Seconds after which a request counts as hung.")
    max_cost: float | None = runtime(None, "Stop before more than so many dollars are spent.")
    max_tokens_total: int | None = runtime(None, "Stop before more tokens than this are used.")
    max_requests: int | None = runtime(None, "Stop after so many requests.")
    price: tuple[str, ...] = runtime(
        (), "Dollars per million tokens; may be repeated.", metavar="NAME=IN/OUT[/CACHED]"
    )
    batch: bool = runtime(False, "Use the Batch API: half the price, within 24 hours.")
    batch_poll: float = runtime(60.0, "Seconds between looks at a batch.")
    max_failures: int | None = runtime(None, "Exit 3 when more rows than this failed.")
    batch_size: int | None = runtime(
        None, "Rows a batch, for models in process; default: what memory holds."
    )
    engine: Engine = runtime(
        "auto", "Of models in process: static batches (CPU) or continuous ones (GPU)."
    )
    trust_remote_code: bool = runtime(False, "Let a model directory run its own code.")

    def door(self) -> ModelOptions:
        """The knobs as the models' door takes them; every model opened with it shares one budget."""
        return ModelOptions(
            concurrency=self.concurrency,
            batch_size=self.batch_size,
            engine=self.engine,
            timeout_s=self.timeout,
            trust_remote_code=self.trust_remote_code,
            rpm=self.rpm,
            tpm=self.tpm,
            prices=parse_prices(self.price),
            budget=Budget(self.max_cost, self.max_tokens_total, self.max_requests),
            batch_poll_s=self.batch_poll if self.batch else None,
        )


@dataclass(frozen=True)
class CallOptions(ApiOptions):
    """The knobs of the feedback stages: also what to redo, and requests taken elsewhere."""

    dry_run: bool = runtime(False, "Count rows, calls, tokens and cost; send and write nothing.")
    reparse: bool = runtime(False, "Rebuild the output from the journal, without a single call.")
    retry_failed: str | None = runtime(
        None, "Ask again for rows that ended so: all, or unparsed,truncated,refused.",
        metavar="STATUS,...",
    )  # fmt: skip
    export_batch: Path | None = runtime(
        None, "Write the requests that are owed as a batch file (vllm run-batch).", metavar="FILE"
    )
    import_batch: Path | None = runtime(
        None, "Read the replies of an exported batch file.", metavar="FILE"
    )

    def door(self) -> ModelOptions:
        """The knobs as the models' door takes them; raises `UsageError` when they contradict."""
        alone = ("dry_run", "reparse", "batch", "export_batch")
        chosen = [f"--{name.replace('_', '-')}" for name in alone if getattr(self, name)]
        if len(chosen) > 1:
            raise UsageError(f"{' and '.join(chosen)}: choose one of them.")
        if self.export_batch is not None and self.export_batch.exists():
            raise UsageError(f"--export-batch {self.export_batch}: exists. Choose another name.")
        offline = self.dry_run or self.reparse
        return replace(super().door(), export_to=self.export_batch, offline=offline)

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
