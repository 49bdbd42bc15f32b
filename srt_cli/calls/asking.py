"""The only driver of model calls: journal, progress, cost and interruption, for every command."""

import gc
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import ExitStack, closing, contextmanager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Final, TypeVar, cast

from srt_cli import console
from srt_cli.calls.conduct import Script, Tally, conduct, replay
from srt_cli.calls.cost import Cost
from srt_cli.calls.options import ApiOptions
from srt_cli.errors import SrtError
from srt_cli.models import Model, ModelOptions, identity_before, open_model
from srt_cli.models.budget import Budget
from srt_cli.models.local.meter import together
from srt_cli.records import Usage
from srt_cli.runs.journal import Journal
from srt_cli.runs.run import TEMPLATE_DAY, Run, batches_path, first_day

Result = TypeVar("Result")
COLLECT_AFTER: Final = 20_000
"""New objects between two searches for cycles; a call or a row makes hundreds, and no cycle."""


@contextmanager
def few_collections() -> Iterator[None]:
    """Have the garbage collector search seldom, and never among what is there already."""
    before = gc.get_threshold()
    gc.freeze()
    gc.set_threshold(COLLECT_AFTER, *before[1:])
    try:
        yield
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


@dataclass
class Asking:
    """Models at work under one journal and one budget; offline, what the journal holds.

    Leaving the `with` block closes the models. What they are and what they cost stands in the
    run's manifest then, however the block was left.
    """

    journal: Journal
    models: list[Model] = field(default_factory=list)
    """Those that may be asked now."""
    run: Run | None = None
    door: ModelOptions = field(default_factory=ModelOptions)
    critic_door: ModelOptions = field(default_factory=ModelOptions)
    cost: Cost | None = None
    offline: bool = False
    tally: Tally = field(default_factory=Tally)
    usage: Usage | None = None
    """Tokens of the rows that were written, for the manifest."""
    elsewhere: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    """By spec, how the models of other processes of this run described themselves."""
    _cleanup: ExitStack = field(default_factory=ExitStack)

    @classmethod
    def begin(
        cls, run: Run, options: ApiOptions, *, offline: bool = False, budget: Budget | None = None
    ) -> "Asking":
        """Open the run's journal, and a door through which its models are opened.

        Models that are open already share their `budget`.
        """
        beside = batches_path(run.out)
        door = replace(options.door(), offline=offline, day=first_day(run.out), batch_notes=beside)
        door = door if budget is None else replace(door, budget=budget)
        journal = run.journal()
        cost = Cost(journal, options, door.budget)
        critics = options.for_critics(door)
        return cls(journal, run=run, door=door, critic_door=critics, cost=cost, offline=offline)

    def __enter__(self) -> "Asking":
        self._cleanup.enter_context(few_collections())
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._cleanup.close()
        for model in self.models:
            self._leave(model)
        if self.run is not None and self.cost is not None:
            self.run.bill(self.cost.describe(), self.usage)

    def employ(self, models: Iterable[Model]) -> None:
        """Have models at work that are open already, until the end."""
        models = list(models)
        if self.door.concurrency is not None and all(model.is_program for model in models):
            for model in models:
                console.say(
                    f"--concurrency {self.door.concurrency}: changes nothing for {model.spec}, a "
                    "program, which is called once at a time."
                )
        for model in models:
            self.models.append(model)
            if self.cost is not None:
                self.cost.watch(model)
            if self.run is not None:
                self.run.keep_day(model.spec, model.describe().get(TEMPLATE_DAY))

    @contextmanager
    def open(self, spec: str, *, as_critic: bool = False) -> Iterator[Model]:
        """A model for as long as it is needed; `as_critic` also means a judge, and a scorer."""
        model = open_model(spec, self.critic_door if as_critic else self.door)
        self.employ([model])
        try:
            yield model
        finally:
            self._leave(model)

    def _leave(self, model: Model) -> None:
        """Close a model; its description goes into the manifest."""
        self.models = [other for other in self.models if other is not model]
        if self.run is not None:
            described = {"identity": model.identity, **model.describe()}
            others = self.elsewhere.get(model.spec)
            if others:
                described = together([described, *others], self.tally.seconds)
            self.run.describe_models({model.spec: described})
        model.close()

    def cost_sentence(self) -> str:
        """Tokens and dollars, for the end of a run."""
        assert self.cost is not None
        return self.cost.sentence()

    def answers(
        self, scripts: Iterable[Script[Result]]
    ) -> Generator[tuple[int, Result], None, None]:
        """Run scripts side by side; gives each one's place and result as it ends.

        Offline, the results of those that the journal holds whole.
        """
        if not self.offline:
            yield from conduct(scripts, self.journal, self.models, self.tally)
            return
        for row in replay(scripts, self.journal.get):
            self.tally.from_journal += len(row.answered)
            if row.owed is None:
                yield row.index, cast(Result, row.result)

    def stream(
        self,
        label: str,
        scripts: Iterable[Script[Result]],
        total: int,
        note: Callable[[], str] = str,
    ) -> Generator[tuple[int, Result], None, None]:
        """`answers` behind a progress line; `note` tells what stands beside the count."""
        rows = closing(self.answers(scripts))
        with console.progress(label, total, self.tally.pulse) as progress, rows as answers:
            for answer in answers:
                yield answer
                cost = self.cost.note() if self.cost is not None else ""
                progress.advance(note=", ".join(filter(None, [note(), cost])))

    def ask(self, label: str, scripts: Iterable[Script[Result]], total: int) -> list[Result]:
        """Run scripts and give their results in the order of the scripts."""
        results = dict(self.stream(label, scripts, total))
        if len(results) < total:
            raise SrtError(
                f"--offline: {label}: {total - len(results)} of {total} are not whole in the "
                "journal. Run the same line without --offline to have them made."
            )
        return [results[place] for place in range(total)]


def changed_models(run: Run, identities: Mapping[str, str]) -> list[str]:
    """The specs, of these with their identities, that meant another model in the run before."""
    earlier = run.earlier.models if run.earlier is not None else {}
    return [
        spec
        for spec, identity in identities.items()
        if spec in earlier
        and earlier[spec].get("identity") not in (identity, identity_before(identity))
    ]


def tell_of_changed_models(run: Run, identities: Mapping[str, str], *, asked: str) -> None:
    """Name such models; `asked` says whether their replies "are asked" or "were asked" again."""
    for spec in changed_models(run, identities):
        assert run.earlier is not None
        console.say(
            f"{spec} has changed since the run of {run.earlier.started}: its replies {asked} for again"
        )
