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
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from multiprocessing import connection
from pathlib import Path
from typing import Any, Final, Generic, TypeVar

from srt_cli import console
from srt_cli.calls import Script, Tally, conduct
from srt_cli.errors import SrtError
from srt_cli.journal import Journal
from srt_cli.models import Model

Options = TypeVar("Options")
WINDOW: Final = 512
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
    parent: int
    accelerator: str | None


def part_paths(main: Path) -> list[Path]:
    """Journals that processes left beside a journal."""
    stem = main.name.removesuffix(".jsonl")
    return sorted(main.parent.glob(f"{stem}.part-*.jsonl"))


def absorb_parts(journal: Journal) -> None:
    """Take over what processes of this run, or of one that was killed, have answered."""
    for part in part_paths(journal.path):
        journal.absorb(part)


def answer_in_processes(
    journal: Journal,
    open_scripts: Callable[[Options], tuple[Iterable[Script[Any]], list[Model]]],
    options: Options,
    *,
    processes: int,
    rows: int,
) -> bool:
    """Have every row's calls made by so many processes; false when it was interrupted.

    Raises `SrtError` when a process met an error of the user's; one that was killed is only named.
    """
    from srt_cli.models.weights import accelerators

    places = accelerators() or [None]
    context = multiprocessing.get_context("spawn")
    stem = journal.path.name.removesuffix(".jsonl")
    workers = {}
    journal.sync()
    for index in range(processes):
        part = journal.path.with_name(f"{stem}.part-{index + 1}.jsonl")
        place = places[index % len(places)]
        share = Share(
            open_scripts, options, index, processes, part, journal.path, os.getpid(), place
        )
        receiver, sender = context.Pipe(duplex=False)
        worker = context.Process(target=_answer, args=(share, sender), daemon=True)
        worker.start()
        sender.close()
        workers[receiver] = worker
    try:
        problems = _listen(dict(workers), rows)
        finished = True
    except KeyboardInterrupt:
        problems, finished = [], False
    finally:
        for worker in workers.values():
            worker.terminate()
            worker.join()
        absorb_parts(journal)
    if problems:
        raise SrtError(problems[0])
    return finished


def _listen(workers: dict[Any, Any], rows: int) -> list[str]:
    """Show the processes' progress until all have ended; gives the errors that they met."""
    problems: list[str] = []
    tokens, started = 0, time.monotonic()
    with console.progress(f"criticising in {len(workers)} processes", rows) as progress:
        while workers:
            ready: list[Any] = list(connection.wait(list(workers)))
            for receiver in ready:
                try:
                    said: str | int = receiver.recv()
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
                tokens += said
                speed = tokens / max(time.monotonic() - started, 1e-3)
                progress.advance(note=f"{speed:.0f} tokens/s" if tokens else "")
    return problems


def _answer(share: Share[Options], sender: Any) -> None:
    """What one process does: its rows, into its own journal."""
    # Before torch is loaded, which reads these once.
    threads = max(1, (os.cpu_count() or 1) // share.of)
    os.environ.setdefault("OMP_NUM_THREADS", str(threads))
    if share.accelerator is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = share.accelerator
    # Ctrl-C reaches the whole group; the parent decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, args=(share.parent,), daemon=True).start()
    console.quiet_libraries()
    models: list[Model] = []
    try:
        scripts, models = share.open_scripts(share.options)
        mine = itertools.islice(scripts, share.index, None, share.of)
        tally, before = Tally(), 0
        with Journal(share.part, beside=share.main) as journal:
            for _ in conduct(mine, journal, window=WINDOW, tally=tally):
                sender.send(tally.completion_tokens - before)
                before = tally.completion_tokens
    except SrtError as error:
        sender.send(str(error))
    finally:
        for model in models:
            model.close()
        sender.close()


def _end_with_parent(parent: int) -> None:
    """A parent that was killed cannot stop its processes: they watch it."""
    while os.getppid() == parent:
        time.sleep(WATCH_SECONDS)
    os.kill(os.getpid(), signal.SIGKILL)
