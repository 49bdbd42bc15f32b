"""Many processes, one run: the main process runs the command, the others repeat its heavy calls.

torchrun and accelerate start the same command line in every process. Only the first one reads,
decides, prints and writes. The others wait in `follow` for the calls of functions marked
`@in_every_process`, and make each of them with the same arguments, which are sent to them. So a
stage reads as if it ran alone, and what is not marked cannot happen twice.
"""

import contextlib
import functools
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from typing import Any, Final, ParamSpec, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState

from srt_cli import console
from srt_cli.errors import Ended, SrtError

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

COLLECTIVE_TIMEOUT: Final = timedelta(hours=2)
PATIENCE: Final = timedelta(days=30)
"""The others may wait this long for the main process, which may tokenise for hours."""
GRACE_SECONDS: Final = 5.0
"""In this time the launcher ends the other processes when the main process has failed."""


class AgreedStop(KeyboardInterrupt):
    """All processes left the same call at the same step, because one was asked to stop."""


@dataclass
class Team:
    """The processes of a training; alone, every question is answered without asking."""

    rank: int = 0
    size: int = 1
    group: Any = None
    listening: bool = field(default=True, init=False)
    """Whether the others wait for a call of the main process."""

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """For each flag whether it is up in some process; the same answer in all."""
        if self.size == 1:
            return flags
        raised = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in raised)

    def wait(self) -> None:
        """Go on when every process has come here."""
        if self.size > 1:
            self.any(False)


_team = Team()


def team() -> Team:
    """The processes that this one works with."""
    return _team


def is_main() -> bool:
    """Whether this process is the one that prints and writes."""
    return _team.rank == 0


@dataclass(frozen=True)
class _Goodbye:
    """What the others hear last: how the main process ended."""

    exit_code: int


def in_every_process(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Make a function one that the other processes repeat; its arguments must bear pickling."""

    @functools.wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        if _team.size == 1:
            return function(*args, **kwargs)
        with _peers_may_fail():
            _team.share((f"{function.__module__}:{function.__qualname__}", args, kwargs))
            _team.listening = False
            try:
                result = function(*args, **kwargs)
                _team.wait()
            except AgreedStop:
                _team.listening = True
                raise
        _team.listening = True
        return result

    call.alone = function  # type: ignore[attr-defined]
    return call


def run_together(work: Callable[[], None]) -> None:
    """Run `work` in the main process and repeat its marked calls in the others.

    Raises `Ended` in the others when the main process has failed: it has said why.
    """
    global _team
    if _team.size > 1:
        return work()  # among the others already
    _team = _join()
    try:
        if is_main():
            _lead(work)
        else:
            console.hush()
            _follow()
    finally:
        if _team.listening:
            # Else another process may be gone, and this would wait for it.
            dist.destroy_process_group()
        _team = Team()


def _join() -> Team:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available() and local >= torch.cuda.device_count():
        raise SrtError(
            f"process {local} of this machine has no GPU: there are {torch.cuda.device_count()}. "
            "Start one process a GPU."
        )
    PartialState(cpu=not torch.cuda.is_available(), timeout=COLLECTIVE_TIMEOUT)
    # Talk between the processes goes past the GPUs, and may be slow.
    group = dist.new_group(backend="gloo", timeout=PATIENCE)
    return Team(dist.get_rank(), dist.get_world_size(), group)


def _lead(work: Callable[[], None]) -> None:
    code = 1
    try:
        work()
        code = 0
    except SrtError as error:
        code = error.exit_code
        raise
    except KeyboardInterrupt:
        code = 130
        raise
    finally:
        if _team.listening:
            with _peers_may_fail():
                _team.share(_Goodbye(code))


def _follow() -> None:
    while True:
        with _peers_may_fail():
            heard = _team.share(None)
            if isinstance(heard, _Goodbye):
                if heard.exit_code:
                    _give_way()
                    raise Ended(heard.exit_code)
                return
            name, args, kwargs = heard
            try:
                _find(name)(*args, **kwargs)
                _team.wait()
            except AgreedStop:
                continue
            except Ended:
                raise
            except SrtError as error:
                _give_way()
                console.speak()
                raise SrtError(f"process {_team.rank}: {error}") from error


def _find(name: str) -> Callable[..., object]:
    module, _, attribute = name.partition(":")
    function: Callable[..., object] = getattr(import_module(module), attribute).alone
    return function


@contextlib.contextmanager
def _peers_may_fail() -> Iterator[None]:
    """A connection that another process closed by dying is that process's error, not ours."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        _give_way()
        raise Ended(1) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "by peer" in text


def _give_way() -> None:
    """Let the process that failed first be the one whose end the launcher sees."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(GRACE_SECONDS)
