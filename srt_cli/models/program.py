"""`python:FILE_OR_MODULE:CALLABLE`: the user's own critic, judge or check, called in process.

A program is a model like any other: what it returns is rendered as the text a model would have
written, journalled, and parsed by the same parser.
"""

import ast
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from pydantic import ValidationError

from srt_cli.errors import SrtError, UsageError
from srt_cli.models import Reply, Request, Task, TaskKind, part_reply
from srt_cli.records import Feedback
from srt_cli.tables import one_line
from srt_cli.templates import render_feedback, render_parts, render_preference, render_refinement

CALLED_AS: Final[Mapping[TaskKind, str]] = {
    "critique": "critique(prompt, response), which returns feedback and an improved text",
    "score": "critique(prompt, response), which returns feedback and an improved text",
    "judge": "judge(prompt, a, b), which returns 1 where a is better, 0 where b is",
    "check": "check(prompt, response), which returns 1 (or True) for a good response, else less, or "
    "a dict of named parts",
    "respond": "respond(prompt), which returns a text",
    "refine": "refine(prompt, response, feedback), which returns an improved text",
    "contrast": "contrast(prompt, response), which returns the response with one fault",
}


class ProgramModel:
    """A callable behind the door, called as `CALLED_AS` tells; `prompt` is a `records.Prompt`.

    What it raises, and what it returns that is something else, fails that row only.
    """

    batched = False
    is_program = True
    continues = False
    gives_logprobs = False
    can_be_told = False
    in_flight = 64

    def __init__(self, spec: str, location: str) -> None:
        self.spec = spec
        self._callable, digest = _load(location)
        self.identity = f"{spec}@{digest}"
        # One thread: user code need not be thread-safe.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="program")
        self._handed = self._begun = 0

    def submit(
        self, requests: Sequence[Request], answered: Sequence[bool] = ()
    ) -> list[Future[Reply]]:
        self._handed += len(requests)
        return [self._thread.submit(self._call, request) for request in requests]

    @property
    def waiting(self) -> int:
        return self._handed - self._begun

    def finish(self, seconds: float) -> bool:
        return True  # A program costs no money.

    def describe(self) -> dict[str, Any]:
        return {"spec": self.spec, "identity": self.identity}

    def close(self) -> None:
        self._thread.shutdown(wait=False, cancel_futures=True)

    def _call(self, request: Request) -> Reply:
        self._begun += 1
        if request.task is None:
            raise SrtError(f"{self.spec} is a program; it cannot continue a chat.")
        task = request.task
        try:
            value = self._callable(task.prompt, *task.texts)
        except (Exception, SystemExit) as error:  # user code may raise anything; the row says what
            return self._failed(f"raised {_told(error, task.kind)}")
        try:
            text = _render(task, value)
        except Exception as error:  # what it returned is user code, too
            return self._failed(f"returned {error}. It is called as {CALLED_AS[task.kind]}")
        return part_reply(Reply(text=text, finish_reason="stop"))

    def _failed(self, what: str) -> Reply:
        return Reply(text="", finish_reason="failed", error=f"{self.spec} {what}")


def _told(error: BaseException, kind: TaskKind) -> str:
    """An error of user code, with its place there; one of the call itself with the way it is called."""
    said = f"{type(error).__name__}: {error}"
    steps = traceback.extract_tb(error.__traceback__)[1:]
    if not steps:
        return f"{said}. It is called as {CALLED_AS[kind]}"
    return f"{said} ({Path(steps[-1].filename).name}:{steps[-1].lineno})"


def _render(task: Task, value: Any) -> str:
    """What the program returned, as the text a model would have written.

    Raises an error saying what it is, where it is something else.
    """
    if inspect.iscoroutine(value):
        value.close()
        raise TypeError("a coroutine: it is an async function, and is to be a plain one")
    if task.kind in ("respond", "refine", "contrast"):
        return _as_text(value)
    if task.kind == "check" and isinstance(value, Mapping):
        return render_parts({name: _as_number(part) for name, part in value.items()})
    if task.kind in ("judge", "check"):
        return render_preference(_as_number(value))
    pair = [] if isinstance(value, str | Mapping) or not isinstance(value, Iterable) else [*value]
    if len(pair) != 2:
        raise TypeError(f"{_shown(value)}, which is no pair")
    feedback = _as_feedback(pair[0])
    if task.kind == "score":
        return render_feedback(feedback)
    return render_feedback(feedback) + render_refinement(_as_text(pair[1]))


def _as_feedback(value: Any) -> Feedback:
    score = value.get("score") if isinstance(value, Mapping) else None
    if isinstance(score, bool):
        raise TypeError(f"the score {score}, which is no number")
    if isinstance(value, Mapping):
        value = {name: _in_lines(part) for name, part in value.items()}
    try:
        return Feedback.model_validate(value)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        what = f"feedback whose {where} is wrong" if where else "something else as feedback"
        wrong = f"{_shown(first['input'])}: " if where and first["type"] != "missing" else ""
        raise ValueError(f"{what} ({wrong}{first['msg'].lower()}): {_shown(value)}") from None


def _in_lines(value: Any) -> Any:
    """Points in a list as one text, a line each, as in a file of critiques; all else as it is."""
    if isinstance(value, list) and all(isinstance(point, str) for point in value):
        return "\n".join(point for point in value if point.strip())
    return value


def _as_text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_shown(value)} where a text is expected")
    return value


def _as_number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError, OverflowError):
        raise TypeError(f"{_shown(value)} where a number is expected") from None


def _shown(value: Any) -> str:
    try:
        return one_line(repr(value))
    except Exception:
        return f"a {type(value).__name__}"


def _load(location: str) -> tuple[Callable[..., Any], str]:
    """Import the callable; the digest of its source file makes an edited program another model."""
    where, colon, name = location.rpartition(":")
    if not colon or not where or not name:
        raise UsageError(
            f"python:{location}: write python:FILE_OR_MODULE:CALLABLE, "
            "e.g. python:critic.py:critique."
        )
    module = _import_file(Path(where)) if where.endswith(".py") else _import_module(where)
    found = getattr(module, name, None)
    if not callable(found):
        offered = ", ".join(
            key
            for key, value in vars(module).items()
            if callable(value)
            and not key.startswith("_")
            and getattr(value, "__module__", None) == module.__name__
        )
        raise UsageError(f"{where} has no callable {name!r} (it has: {offered or 'none'}).")
    source = getattr(module, "__file__", None)
    digest = hashlib.sha256(Path(source).read_bytes() if source else where.encode())
    for file in _imported_beside(Path(source)) if source else ():
        digest.update(file.name.encode() + b"\0" + file.read_bytes())
    return found, digest.hexdigest()[:12]


def _imported_beside(program: Path) -> list[Path]:
    """The files of a program's folder that it imports, and those that they import, in order of path.

    Read from the sources alone, so that it does not matter what else was imported before.
    """
    folder = program.resolve().parent
    if "site-packages" in folder.parts:
        return []
    seen, unread = {program.resolve()}, [program.resolve()]
    while unread:
        file = unread.pop()
        try:
            tree = ast.parse(file.read_bytes())
        except (SyntaxError, ValueError):  # importing it says so better
            continue
        found = {
            path
            for base, name in _names_imported(tree, file, folder)
            for path in _files_of(base, name)
        }
        unread += found - seen
        seen |= found
    return sorted(seen - {program.resolve()})


def _names_imported(tree: ast.Module, file: Path, folder: Path) -> Iterator[tuple[Path, str]]:
    """Where a file looks for modules, and their dotted names."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((folder, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            # Importing says better where there are more dots than folders.
            base = (folder, *file.parents)[min(node.level, len(file.parents))]
            start = f"{node.module}." if node.module else ""
            yield from ((base, f"{start}{alias.name}") for alias in node.names)


def _files_of(base: Path, name: str) -> Iterator[Path]:
    """The files that a dotted name brings in below a folder; its last part may be no module."""
    for part in name.split("."):
        for path in (base / f"{part}.py", base / part / "__init__.py"):
            if path.is_file():
                yield path.resolve()
        base = base / part


def _import_file(path: Path) -> ModuleType:
    if not path.is_file():
        raise SrtError(f"{path}: no such file. Give the path of the program from this folder.")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and pickling look a module up by its name.
    sys.modules.setdefault(path.stem, module)
    # A module of the same name may have come from another program's folder, or been edited since.
    for file in _imported_beside(path):
        name = ".".join(file.relative_to(path.resolve().parent).with_suffix("").parts)
        sys.modules.pop(name.removesuffix(".__init__"), None)
    sys.path.insert(0, str(path.resolve().parent))
    writes_none, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # no litter in your folder
    try:
        spec.loader.exec_module(module)
    except (Exception, SystemExit) as error:
        raise SrtError(f"{path}: cannot be imported ({type(error).__name__}: {error}).") from error
    finally:
        sys.path.remove(str(path.resolve().parent))
        sys.dont_write_bytecode = writes_none
    return module


def _import_module(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise SrtError(
            f"python:{name}: no such module ({error}). Is it a file? End it in .py."
        ) from error
