"""From one command to many processes: `--num-processes` and `--accelerate-config`.

The command starts itself anew under accelerate's launcher (on a CPU under torchrun, for accelerate
would start only one process there), with an environment variable that keeps it from doing so twice.
Started by torchrun or accelerate in the first place, it only takes its place among the others.
"""

import os
from collections.abc import Callable
from typing import Final, TypeVar

from srt_cli.errors import UsageError
from srt_cli.training.options import TrainingOptions

Options = TypeVar("Options", bound=TrainingOptions)

ASKED_FOR: Final = "SRT_PROCESSES"
"""In the environment of processes that a command of ours started: how many there should be."""


def run_in_processes(work: Callable[[Options], None], options: Options) -> None:
    """Run `work(options)` here, start the processes that the options ask for, or be one of them.

    Raises `UsageError` where options, machine and launcher contradict each other, and `Ended` with
    the exit code of processes that failed.
    """
    wanted = options.num_processes
    if wanted is not None and wanted < 1:
        raise UsageError(f"--num-processes {wanted}: must be 1 or more.")
    launched = ASKED_FOR in os.environ
    if "WORLD_SIZE" in os.environ and "RANK" in os.environ:
        size = int(os.environ["WORLD_SIZE"])
    else:
        size = 1
        if not launched and (options.accelerate_config is not None or (wanted or 1) > 1):
            from srt_cli.training.starting import start_processes

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
        work(options)
        return
    from srt_cli.training.processes import run_together

    run_together(lambda: work(options))
