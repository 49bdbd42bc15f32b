"""Asking models many questions under one journal and one budget, or replaying what was asked."""

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TypeVar, cast

from srt_cli import console
from srt_cli.calls.conduct import Script, Tally, conduct, replay
from srt_cli.calls.cost import Cost
from srt_cli.calls.options import ApiOptions
from srt_cli.errors import SrtError
from srt_cli.models import Model, ModelOptions, open_model
from srt_cli.runs.journal import Journal
from srt_cli.runs.run import Run

Result = TypeVar("Result")


@dataclass(frozen=True)
class Asking:
    """What every question to a model needs: the journal, the door with its budget, the cost."""

    run: Run
    journal: Journal
    door: ModelOptions
    cost: Cost
    offline: bool

    @classmethod
    def begin(cls, run: Run, options: ApiOptions, *, offline: bool) -> "Asking":
        """Open the run's journal, and a door through which all its models are opened."""
        journal, door = run.journal(), replace(options.door(), offline=offline)
        return cls(run, journal, door, Cost(journal, options, door.budget), offline)

    @contextmanager
    def open(self, spec: str) -> Iterator[Model]:
        """A model for as long as it is needed; its description goes into the manifest."""
        model = open_model(spec, self.door)
        self.cost.watch(model)
        try:
            yield model
        finally:
            self.run.describe_models({spec: model.describe()})
            model.close()

    def ask(self, label: str, scripts: Iterable[Script[Result]], total: int) -> list[Result]:
        """Run scripts and give their results in the order of the scripts."""
        results: dict[int, Result] = {}
        if self.offline:
            return self._replay(label, scripts)
        with console.progress(label, total) as progress:
            for index, result in conduct(scripts, self.journal, window=512, tally=Tally()):
                results[index] = result
                progress.advance(note=self.cost.note())
        return [results[index] for index in range(total)]

    def _replay(self, label: str, scripts: Iterable[Script[Result]]) -> list[Result]:
        """`--offline`: what the journal holds, all of it or an error."""
        results = []
        owed = 0
        for row in replay(scripts, self.journal.get):
            if row.owed is not None:
                owed += 1
            else:
                results.append(cast(Result, row.result))
        if owed:
            raise SrtError(
                f"--offline: {label}: {owed} of {owed + len(results)} are not whole in the journal. "
                "Run the same line without --offline to have them made."
            )
        return results
