"""Commands forked from a process that holds their libraries, for tests that start many to kill them."""

import ctypes
import json
import os
import resource
import signal
import subprocess
import sys
from importlib import import_module
from pathlib import Path
from typing import Final

LIBRARIES: Final = {
    "calls": ("srt_cli.stages.collect_feedback", "srt_cli.stages.build_prefs", "srt_cli.pairs.audit",
              "srt_cli.stages.evaluate.figures", "srt_cli.models.api.client", "jinja2", "aiohttp"),
    "torch": ("torch", "transformers", "trl", "srt_cli.stages.self_critique", "srt_cli.training.sft",
              "srt_cli.training.dpo"),
}  # fmt: skip


class Nursery:
    """A process that has loaded what commands need, and forks them from there.

    They become our own children: this process adopts what its descendants leave behind.
    """

    def __init__(self, kind: str, environment: dict[str, str]) -> None:
        ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)  # PR_SET_CHILD_SUBREAPER
        self._process = subprocess.Popen(
            [sys.executable, __file__, kind],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
            start_new_session=True,  # Ctrl-C is for who starts commands
        )  # fmt: skip

    def fork(self, line: list[str], talk: Path, room: int | None) -> tuple[int, int]:
        """The process's id and its session's; it talks into a file beside its folder."""
        assert self._process.stdin
        assert self._process.stdout
        print(json.dumps([line, str(talk), room]), file=self._process.stdin, flush=True)
        pid, session = map(int, self._process.stdout.readline().split())
        return pid, session

    def close(self) -> None:
        self._process.communicate("")


def nurse(kind: str) -> None:
    """The nursery's own life: forks one command for each line that it reads."""
    from srt_cli.__main__ import run

    for library in LIBRARIES[kind]:
        import_module(library)
    for asked in sys.stdin:
        line, talk, room = json.loads(asked)
        told, tell = os.pipe()
        between = os.fork()
        if between:
            os.close(tell)
            os.waitpid(between, 0)  # from here on its child is its parent's
            print(os.read(told, 20).decode(), between, flush=True)
            os.close(told)
            continue
        os.setsid()
        born = os.fork()
        if born:
            os.write(tell, str(born).encode())
            os._exit(0)
        os.close(told)
        os.close(tell)
        _take_place(Path(talk), room)
        sys.argv = ["srt", *line]
        signal.signal(signal.SIGINT, signal.default_int_handler)
        run()
        sys.exit(0)


def _take_place(talk: Path, room: int | None) -> None:
    """Stand where a started process would stand."""
    os.chdir(talk.with_suffix(""))
    said = os.open(talk, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    nothing = os.open(os.devnull, os.O_RDWR)
    for place, what in enumerate((nothing, nothing, said)):
        os.dup2(what, place)
    sys.stdin = open(0)  # noqa: SIM115  it stands for the old one
    if room is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, room))


if __name__ == "__main__":
    nurse(sys.argv[1])
