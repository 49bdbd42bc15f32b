"""The process of a command: `srt`, or `python -m srt_cli` for launchers such as torchrun."""

import atexit
import os
import signal
import sys
import threading
from contextlib import suppress

from srt_cli.cli import main


def run() -> None:
    """Run the command line as a whole process, whose exit code is `main`'s whatever else it loaded.

    A run that was stopped or failed may leave a thread at work in a library; Python's own end would
    unwind that thread through C++ and so abort the process (SIGABRT).
    """
    sys.unraisablehook = _stop_again
    failed: list[int] = []
    atexit.register(_end_at_once, failed)  # first in, so after what all others registered
    try:
        main()
    except SystemExit as end:
        if isinstance(end.code, int) and end.code:
            failed.append(end.code)
        raise


def _stop_again(unraisable: "sys.UnraisableHookArgs") -> None:
    """A stop that came during a destructor or a weak reference's callback, where Python drops what is
    raised, comes once more as soon as that is over."""
    if not isinstance(unraisable.exc_value, KeyboardInterrupt):
        sys.__unraisablehook__(unraisable)
        return
    later = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGINT))
    later.daemon = True
    later.start()


def _end_at_once(failed: list[int]) -> None:
    for code in failed:
        for stream in (sys.stdout, sys.stderr):
            with suppress(OSError, ValueError, AttributeError):
                stream.flush()
        os._exit(code)


if __name__ == "__main__":
    run()
