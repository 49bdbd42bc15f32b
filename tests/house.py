"""The house in figures: python tests/house.py [PACKAGE_FOLDER] [--no-flows].

Counts files, lines, circles between files, arrows that point up, names that stand twice, functions
with six parameters or more, and the files that three flows enter. Works on older trees too.
"""

import ast
import contextlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import FrameType

from loopback_server import CRITIQUE, Answer, LoopbackServer

TESTS = Path(__file__).parent

ROOMS = (
    "errors", "forms", "records", "reading", "templates", "stats", "tables", "console", "options",
    "runs", "models", "prompts", "preferences", "exports", "calls", "feedback", "evaluation", "pairs",
    "report", "training", "stages", "help", "cli", "__main__",
)  # fmt: skip
"""From the ground up: a file may import from its own room and from those before it."""
ROOM_AT_51B2E33 = {
    "artifacts": "runs", "journal": "runs", "asking": "calls", "call_plan": "calls",
    "call_options": "calls", "recipes": "training", "training_options": "training",
    "training_rows": "training",
}  # fmt: skip
MOST_PARAMETERS = 5


class House:
    """A package's files, who imports whom, and what they define."""

    def __init__(self, package: Path) -> None:
        self.package = package.resolve()
        self.files = {self._module(path): path for path in sorted(self.package.rglob("*.py"))}
        self.trees = {
            module: ast.parse(path.read_text("utf-8")) for module, path in self.files.items()
        }
        self.arrows = {
            module: {name for node in ast.walk(tree) for name in self._imported(node)} - {module}
            for module, tree in self.trees.items()
        }

    def _module(self, path: Path) -> str:
        parts = path.relative_to(self.package.parent).with_suffix("").parts
        return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)

    def _imported(self, node: ast.AST) -> Iterator[str]:
        """The files of the package that an import statement names."""
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in self.files)
        elif isinstance(node, ast.ImportFrom) and node.module in self.files:
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                yield full if full in self.files else node.module

    @property
    def lines(self) -> int:
        return sum(path.read_bytes().count(b"\n") for path in self.files.values())

    def files_in(self, room: str) -> list[str]:
        return [module for module in self.files if module.split(".")[1:2] == [room]]

    def circles(self) -> list[list[str]]:
        """Groups of files that need one another, imports for types and inside functions included.

        One kind of arrow is left out: a package's `__init__.py` that imports a file of its own
        package inside a function. That is a door, and what lies behind it may know it.
        """
        arrows = {
            module: self.arrows[module] - self._behind_the_door(module) for module in self.files
        }
        reach = {module: _reachable(module, arrows) for module in arrows}
        circles = {
            tuple(sorted(each for each in reach[module] if module in reach[each]))
            for module in arrows
            if module in reach[module]
        }
        return [list(circle) for circle in sorted(circles)]

    def _behind_the_door(self, module: str) -> set[str]:
        if self.files[module].name != "__init__.py":
            return set()
        imported = {
            name
            for function in ast.walk(self.trees[module])
            if isinstance(function, ast.FunctionDef | ast.AsyncFunctionDef)
            for node in ast.walk(function)
            for name in self._imported(node)
        }
        return {name for name in imported if name.startswith(module + ".")}

    def upward_arrows(self) -> list[str]:
        """Imports from a room that stands higher."""
        return [
            f"{module} -> {name}"
            for module, names in self.arrows.items()
            for name in sorted(names)
            if _height(name) > _height(module)
        ]

    def doubled_names(self) -> dict[str, list[str]]:
        """Names of classes and of types that are defined in more than one place."""
        places = defaultdict(list)
        for module, tree in self.trees.items():
            names = [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]
            for name in [*names, *_named_types(tree)]:
                places[name].append(module)
        return {name: where for name, where in sorted(places.items()) if len(where) > 1}

    def wide_functions(self) -> list[str]:
        """Functions with six parameters or more, `self` and `cls` not counted."""
        found = []
        for module, tree in self.trees.items():
            for node in ast.walk(tree):
                if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                    arguments = node.args.posonlyargs + node.args.args + node.args.kwonlyargs
                    count = sum(each.arg not in ("self", "cls") for each in arguments)
                    if count > MOST_PARAMETERS:
                        found.append(f"{module}:{node.lineno} {node.name} ({count})")
        return found


def _named_types(tree: ast.Module) -> Iterator[str]:
    """`Name = Literal[...]` and the like at the top of a file; type variables are not counted."""
    for node in tree.body:
        match node:
            case ast.Assign(value=ast.Call(func=ast.Name("TypeVar"))):
                pass
            case ast.Assign(targets=[ast.Name(id=name)]) if re.fullmatch(r"[A-Z]+[a-z]\w*", name):
                yield name


def _reachable(start: str, arrows: dict[str, set[str]]) -> set[str]:
    reached: set[str] = set()
    waiting = list(arrows[start])
    while waiting:
        module = waiting.pop()
        if module not in reached:
            reached.add(module)
            waiting += arrows[module]
    return reached


def _height(module: str) -> int:
    room = (module.split(".")[1:2] or ["errors"])[0]
    return ROOMS.index(ROOM_AT_51B2E33.get(room, room))


FLOWS = {
    "one prompt to feedback.jsonl": (
        "collect-feedback --model {url}#policy --critic {url}#critic --limit 1 --out flow.jsonl"
    ),
    "one feedback row to a loss": "sft --critic-check 0 --samples 0 --out models/flow",
    "one pair to a win rate": (
        "eval --prompts heldout.jsonl --model {url}#policy --reference {url}#base "
        "--judge {url}#judge --out flow.json"
    ),
}
"""Run in a copy of `finished_by_0_1_0`, with the models of one server on loopback."""


def files_entered(package: Path, flow: str) -> list[str]:
    """The files whose functions run while a command works: not what importing them runs.

    The command line itself (cli.py) is left out.
    """
    server = LoopbackServer(_answer, models=("policy", "critic", "base", "judge"))
    with tempfile.TemporaryDirectory() as folder, contextlib.closing(server):
        shutil.copytree(TESTS / "finished_by_0_1_0", folder, dirs_exist_ok=True)
        line = FLOWS[flow].format(url=server.url).split()
        environment = os.environ | {
            "PYTHONPATH": str(package.resolve().parent), "HF_HUB_OFFLINE": "1",
        }  # fmt: skip
        done = subprocess.run(
            [sys.executable, __file__, "--watch", str(package.resolve()), *line],
            cwd=folder, env=environment, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            raise RuntimeError(f"srt {' '.join(line)}\n{done.stderr}")
        entered: list[str] = json.loads(Path(folder, "entered.json").read_text())
    return [name for name in entered if name.endswith(".py") and name != "cli.py"]


def _answer(body: dict, number: int) -> Answer:
    last = body["messages"][-1]["content"]
    if "### Answer M" in last:
        return Answer(text="It is short.\nVerdict: [[M]]")
    text = CRITIQUE.format(score=4) if "### Requirements" in last else f"Answer {number}"
    for stop in body.get("stop") or []:
        text = text.split("\n" + stop)[0]
    return Answer(text=text)


def _watch(package: str, line: list[str]) -> None:
    """Run a command in this process, and leave the files that it entered in entered.json."""
    entered: set[str] = set()
    known: set[object] = set()

    def note(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event != "call" or code in known:
            return
        # Templates of pages are run as code too, but are no files of code.
        if not code.co_filename.startswith(package) or not code.co_filename.endswith(".py"):
            known.add(code)
        # A class body is code too, but no function (0x1: optimised); nor does an import count.
        elif code.co_flags & 0x1 and not _is_importing(frame, package):
            known.add(code)
            entered.add(str(Path(code.co_filename).relative_to(package)))

    from srt_cli import cli

    sys.argv = ["srt", *line]
    threading.setprofile(note)
    sys.setprofile(note)
    try:
        cli.main()
    finally:
        sys.setprofile(None)
        Path("entered.json").write_text(json.dumps(sorted(entered)))


def _is_importing(frame: FrameType | None, package: str) -> bool:
    while frame is not None:
        if frame.f_code.co_name == "<module>" and frame.f_code.co_filename.startswith(package):
            return True
        frame = frame.f_back
    return False


def _list(title: str, entries: Iterable[str]) -> None:
    entries = list(entries)
    print(f"{len(entries):6,}  {title}")
    for entry in entries:
        print(f"        {entry}")


def main(arguments: list[str]) -> None:
    if arguments[:1] == ["--watch"]:
        _watch(arguments[1], arguments[2:])
        return
    flows = "--no-flows" not in arguments
    given = [each for each in arguments if not each.startswith("--")]
    house = House(Path(given[0]) if given else TESTS.parent / "srt_cli")
    print(f"{len(house.files):6,}  files ({len(house.files_in('training'))} in training/)")
    print(f"{house.lines:6,}  lines")
    _list("circles between files", (" <> ".join(circle) for circle in house.circles()))
    _list("arrows that point up", house.upward_arrows())
    doubled = house.doubled_names().items()
    _list("names that stand twice", (f"{name}: {', '.join(where)}" for name, where in doubled))
    _list("functions with six parameters or more", house.wide_functions())
    for flow in FLOWS if flows else ():
        entered = files_entered(house.package, flow)
        outside = sum(not name.startswith("models/") for name in entered)
        print(f"{len(entered):6,}  files from {flow} ({outside} outside models/)")
        print(f"        {' '.join(entered)}")


if __name__ == "__main__":
    main(sys.argv[1:])
