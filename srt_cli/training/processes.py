"""Many processes, one run: started, joined, and led by the main process.

`--num-processes` and `--accelerate-config` start the command again under accelerate's launcher (on a
CPU under torchrun, for accelerate would start only one process there), with an environment variable
that keeps it from doing so twice. Started by torchrun or accelerate in the first place, the command
only takes its place among the others.

The same command line runs in every process. Only the main process reads, decides, prints and writes.
The others wait in `_follow` for the calls of functions marked `@in_every_process`, and make each of
them with the same arguments, which are sent to them. So a stage reads as if it ran alone, and what
is not marked cannot happen twice.

torch and accelerate are imported only where there are several processes.
"""

import contextlib
import difflib
import functools
import logging
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, ParamSpec, TypeVar

from srt_cli import console
from srt_cli.errors import Ended, SrtError, UsageError
from srt_cli.training.options import TrainingOptions

if TYPE_CHECKING:
    from accelerate.commands.config.config_args import ClusterConfig

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")

ASKED_FOR: Final = "SRT_PROCESSES"
"""How many processes there should be, in the environment of those that srt started."""
SHIPPED: Final = Path(__file__).parent / "accelerate"
SAVING_SECONDS: Final = 600
"""How long the processes may take, after Ctrl-C or SIGTERM, to finish their step and save."""
COLLECTIVE_TIMEOUT: Final = timedelta(hours=2)
PATIENCE: Final = timedelta(days=30)
"""The others may wait this long for the main process, which may tokenise for hours."""
GRACE_SECONDS: Final = 5.0
"""In this time the launcher ends the other processes when the main process has failed."""


# --- Starting them -----------------------------------------------------------------------------


def run_in_processes(options: TrainingOptions, work: Callable[[], None]) -> None:
    """Run `work` here, start the processes that the options ask for, or be one of them.

    Raises `UsageError` where options, machine and launcher contradict each other, and `Ended` with
    the exit code of processes that failed.
    """
    wanted = options.num_processes
    launched = ASKED_FOR in os.environ
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        size = int(os.environ["WORLD_SIZE"])
    else:
        size = 1
        if not launched and (options.accelerate_config is not None or (wanted or 1) > 1):
            start_processes(wanted, options.accelerate_config)
            return
    if launched:
        wanted = int(os.environ[ASKED_FOR])
    if wanted is not None and wanted != size:
        raise UsageError(
            f"--num-processes {wanted} contradicts the launcher, which started {size}. Leave "
            "--num-processes out, or start as many."
        )
    if size == 1:
        work()
        return
    run_together(work)


def start_processes(count: int | None, config: str | None) -> None:
    """Run this command line in `count` processes, as `config` says, and wait for them.

    Raises `UsageError` for what this machine cannot do, and `Ended` with the processes' exit code;
    what went wrong, the processes have said.
    """
    gpus = count_gpus()
    if config is None:
        count = count or 1
        _refuse_too_many(count, gpus)
        start = (
            _with_accelerate(SHIPPED / "multi_gpu.yaml", count) if gpus else _with_torchrun(count)
        )
    else:
        path = find_config(config)
        settings = read_config(path)
        if not gpus and not settings.use_cpu:
            raise UsageError(
                f"--accelerate-config {config} needs GPUs, and this machine has none. Without it, "
                "--num-processes trains on the CPU."
            )
        if settings.distributed_type == "DEEPSPEED" and find_spec("deepspeed") is None:
            raise SrtError(
                f"--accelerate-config {config} needs the package deepspeed: "
                "pip install 'srt-cli[deepspeed]'."
            )
        shipped = path.parent == SHIPPED
        count = count or (gpus if shipped else settings.num_processes)
        if settings.num_machines == 1 and gpus:
            _refuse_too_many(count, gpus)
        start = _with_accelerate(path, count, own_port=settings.num_machines == 1)
    _supervise(start, count)


def count_gpus() -> int:
    """The GPUs that this process can see."""
    import torch

    return torch.cuda.device_count()


def find_config(name: str) -> Path:
    """The YAML file behind `--accelerate-config`; raises `UsageError` when there is none."""
    shipped = {path.stem: path for path in sorted(SHIPPED.glob("*.yaml"))}
    if name in shipped:
        return shipped[name]
    if Path(name).is_file():
        return Path(name)
    near = difflib.get_close_matches(name, shipped, n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(
        f"--accelerate-config {name}: neither one of {', '.join(shipped)} nor a file.{hint}"
    )


def read_config(path: Path) -> "ClusterConfig":
    """The configuration as accelerate's own parser reads it; raises `SrtError` where it refuses."""
    from accelerate.commands.config.config_args import ClusterConfig, load_config_from_file

    try:
        config = load_config_from_file(str(path))
    except Exception as error:  # whatever a parser raises, the file is what is wrong
        reason = " ".join(str(error).split())
        raise SrtError(f"{path}: accelerate refuses it ({reason}).") from None
    if not isinstance(config, ClusterConfig):
        raise SrtError(f"{path}: srt runs on machines of your own, and this is for SageMaker.")
    return config


def _refuse_too_many(count: int, gpus: int) -> None:
    if gpus and count > gpus:
        raise UsageError(
            f"--num-processes {count}: this machine has {gpus} GPU{'s' if gpus > 1 else ''}, and a "
            f"process needs one. Pass at most {gpus}; docs/scale.md tells how to use more machines."
        )


def _with_torchrun(count: int) -> Callable[[], Any]:
    from torch.distributed import run as torchrun

    flags = ["--standalone", "--nproc_per_node", str(count)]
    flags += ["--shutdown_timeout", str(SAVING_SECONDS)]
    arguments = torchrun.get_args_parser().parse_args([*flags, "-m", "srt_cli", *sys.argv[1:]])
    # torchrun would give each process one thread, and say so.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    return lambda: torchrun.run(arguments)


def _with_accelerate(path: Path, count: int, own_port: bool = True) -> Callable[[], Any]:
    from accelerate.commands.launch import launch_command, launch_command_parser

    flags = ["--config_file", str(path), "--num_processes", str(count)]
    flags += ["--main_process_port", "0"] if own_port else []
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, len(os.sched_getaffinity(0)) // count)))
    os.environ["TORCH_ELASTIC_SHUTDOWN_TIMEOUT"] = str(SAVING_SECONDS)
    arguments = launch_command_parser().parse_args([*flags, "-m", "srt_cli", *sys.argv[1:]])
    return lambda: launch_command(arguments)


def _supervise(start: Callable[[], Any], count: int) -> None:
    """Wait for the processes, and report only what none of them could report itself."""
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    os.environ[ASKED_FOR] = str(count)
    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)
    try:
        start()
    except SignalException:
        raise Ended(130) from None
    except ChildFailedError as error:
        failed = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        # torchrun ends the other processes with SIGTERM: that is no cause.
        for rank, code in failed.items():
            if code < 0 and code != -signal.SIGTERM:
                raise SrtError(_describe_killed(rank, -code)) from None
        spoken = [code for code in failed.values() if code > 0]
        raise Ended(spoken[0] if spoken else 130) from None
    except (ValueError, ImportError) as error:
        raise SrtError(f"accelerate refuses to start ({error}).") from None
    finally:
        del os.environ[ASKED_FOR]


def _describe_killed(rank: int, number: int) -> str:
    why = ", often for want of memory" if number == signal.SIGKILL else ""
    return (
        f"process {rank} was killed by signal {number}{why}. Run the same line to go on from the "
        "newest checkpoint."
    )


# --- Working together --------------------------------------------------------------------------


class AgreedStop(KeyboardInterrupt):
    """All processes left the same call at the same step, because one was asked to stop."""


@dataclass
class Team:
    """The processes of a training; a single process answers every question itself."""

    rank: int = 0
    size: int = 1
    group: Any = None
    listening: bool = field(default=True, init=False)
    """Whether the others wait for a call of the main process."""

    def share(self, value: Any) -> Any:
        """The main process's value, in every process."""
        if self.size == 1:
            return value
        import torch.distributed as dist

        box = [value]
        dist.broadcast_object_list(box, src=0, group=self.group)
        return box[0]

    def any(self, *flags: bool) -> tuple[bool, ...]:
        """Whether each flag is up in any process; every process gets the same answer."""
        if self.size == 1:
            return flags
        import torch
        import torch.distributed as dist

        raised = torch.tensor([int(flag) for flag in flags])
        dist.all_reduce(raised, op=dist.ReduceOp.MAX, group=self.group)
        return tuple(bool(flag) for flag in raised)

    def wait(self) -> None:
        """Return when every process has called this."""
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
    """The last message to the others: how the main process ended."""

    exit_code: int


def in_every_process(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Let the other processes repeat each call of a function; its arguments must pickle."""

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
            import torch.distributed as dist

            dist.destroy_process_group()
        _team = Team()


def _join() -> Team:
    import torch
    import torch.distributed as dist
    from accelerate import PartialState

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
    """Leave the error to the process that caused it by closing its connection."""
    try:
        yield
    except RuntimeError as error:
        if not _is_lost_connection(error):
            raise
        _give_way()
        raise Ended(1) from error


def _is_lost_connection(error: RuntimeError) -> bool:
    import torch.distributed as dist

    text = str(error).lower()
    return isinstance(error, dist.DistError) or "gloo" in text or "by peer" in text


def _give_way() -> None:
    """Wait, so that the launcher sees the process that failed first end first."""
    with contextlib.suppress(KeyboardInterrupt):
        time.sleep(GRACE_SECONDS)
