"""`--num-processes`: rows split over processes, each with a journal of its own, joined by request.

Every file has one writer. The parent reads nothing of a row: it takes the parts' journals into its
own, and then goes through all rows as if alone, so that a killed process's rows are simply owed.
"""

import itertools
import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass
from multiprocessing import connection, resource_tracker
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from srt_cli import console
from srt_cli.calls.asking import Asking
from srt_cli.calls.conduct import Script, Tally
from srt_cli.errors import SrtError
from srt_cli.models import Model
from srt_cli.runs.journal import Journal

Options = TypeVar("Options")
WATCH_SECONDS: Final = 0.2


@dataclass(frozen=True)
class Share(Generic[Options]):
    """One process's part of the rows: those whose number leaves `index` when divided by `of`."""

    open_scripts: Callable[[Options], tuple[Iterable[Script[Any]], list[Model]]]
    """Opens the models, and gives every row's script; must be a module's function."""
    options: Options
    index: int
    of: int
    part: Path
    main: Path
    before: int
    """Bytes of `main` that are from earlier runs."""
    parent: int
    accelerator: str | None


@dataclass(frozen=True)
class _Word:
    """What a process says when a row is done."""

    tokens: int
    models: dict[str, dict[str, Any]]


def answer_in_processes(
    asking: Asking,
    open_scripts: Callable[[Options], tuple[Iterable[Script[Any]], list[Model]]],
    options: Options,
    processes: int,
    rows: int,
) -> bool:
    """Have every row's calls made by this many processes; False when they were interrupted.

    Their replies, counts and models' descriptions are added to `asking`. Raises `SrtError` when a
    process met an error of the user's; one that was killed is only named.
    """
    from srt_cli.models.weights import accelerators

    places = accelerators() or [None]
    journal = asking.journal
    journal.sync()
    before = _spent(journal)
    shares = [
        Share(
            open_scripts,
            options,
            index,
            processes,
            part=journal.part(str(index + 1)),
            main=journal.path,
            before=journal.before,
            parent=os.getpid(),
            accelerator=places[index % len(places)],
        )
        for index in range(processes)
    ]
    workers: dict[Any, Any] = {}
    problems: list[str] = []
    whole = False
    last_words: dict[Any, _Word] = {}
    try:
        with _deaf_to_the_terminal():
            for share in shares:
                _start(share, workers)
        problems = _listen(dict(workers), rows, last_words)
        whole = True
    except KeyboardInterrupt:
        pass
    finally:
        for worker in workers.values():
            worker.terminate()
        for worker in workers.values():
            worker.join()
        journal.absorb_parts()
    if problems:
        raise SrtError(problems[0])
    made = _spent(journal) - before
    asking.tally.made_elsewhere(made["calls"], made["completion_tokens"])
    for word in last_words.values():
        for spec, described in word.models.items():
            asking.elsewhere.setdefault(spec, []).append(described)
    return whole


def _spent(journal: Journal) -> Counter[str]:
    return sum(journal.spent.values(), Counter())


@contextmanager
def _deaf_to_the_terminal() -> Iterator[None]:
    """Processes started in here never hear Ctrl-C, nor that the terminal closed: the parent decides."""
    # Python's own helper process would end this when it starts.
    resource_tracker.ensure_running()
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGHUP})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)


def _start(share: Share[Any], workers: dict[Any, Any]) -> None:
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    worker = context.Process(target=_answer, args=(share, sender), daemon=True)
    worker.start()
    sender.close()
    workers[receiver] = worker


def _listen(workers: dict[Any, Any], rows: int, last_words: dict[Any, _Word]) -> list[str]:
    """Show the processes' progress until all have ended; gives the errors that they met."""
    problems: list[str] = []
    written = Tally()
    with console.progress(f"criticising in {len(workers)} processes", rows) as progress:
        while workers:
            ready: list[Any] = list(connection.wait(list(workers)))
            for receiver in ready:
                try:
                    said: str | _Word = receiver.recv()
                except (EOFError, OSError):
                    worker = workers.pop(receiver)
                    worker.join()
                    if worker.exitcode and not problems:
                        console.warn(
                            f"a process ended early (exit {worker.exitcode}); its rows are made here."
                        )
                    continue
                if isinstance(said, str):
                    problems.append(said)
                    continue
                last_words[receiver] = said
                written.completion_tokens += said.tokens
                progress.advance(note=written.speed())
    return problems


def _answer(share: Share[Options], sender: Any) -> None:
    """The work of one process: its rows, into its own journal."""
    # Before torch is loaded, which reads these once.
    threads = max(1, (os.cpu_count() or 1) // share.of)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if share.accelerator is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = share.accelerator
    threading.Thread(target=_end_with_parent, args=(share.parent,), daemon=True).start()
    console.quiet_libraries()
    try:
        scripts, models = share.open_scripts(share.options)
        mine = itertools.islice(scripts, share.index, None, share.of)
        before = 0
        with (
            Journal(share.part, beside=share.main, before=share.before) as journal,
            Asking(journal, models) as asking,
            closing(asking.answers(mine)) as answers,
        ):
            for _ in answers:
                described = {model.spec: model.describe() for model in models}
                written = asking.tally.completion_tokens
                sender.send(_Word(written - before, described))
                before = written
    except SrtError as error:
        sender.send(str(error))
    finally:
        sender.close()


def _end_with_parent(parent: int) -> None:
    """End with the parent, which cannot stop its processes when it is killed."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
