"""The rules of the house: who imports whom, who prints, who exits, and what is installed."""

import ast
import inspect
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
from house import House

from srt_cli import cli
from srt_cli.options import flag_of

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "srt_cli"
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "trl", "datasets", "openai", "accelerate", "peft", "aiohttp"}


def imports_of(path: Path) -> set[str]:
    """Full names of the modules a file imports at run time, wherever in it."""
    names = set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_nothing_imports_a_stage_but_the_command_line(path):
    if path.name == "cli.py":
        return
    # `evaluate` is a stage of several files, which import each other.
    own = "srt_cli.stages.evaluate." if path.parent.name == "evaluate" else "-"
    stages = {name for name in imports_of(path) if name.startswith("srt_cli.stages.")}
    assert not {name for name in stages if not name.startswith(own)}


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_heavy_packages_are_imported_only_by_models_and_training(path):
    if path.relative_to(PACKAGE).parts[0] in ("models", "training"):
        return
    roots = {name.split(".")[0] for name in imports_of(path)}
    assert not roots & HEAVY


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_only_the_console_prints_and_only_the_command_line_exits(path):
    tree = ast.parse(path.read_text())
    called = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert "print" not in called
    if path.name not in ("cli.py", "__main__.py"):
        assert not called & {"sys.exit", "exit", "quit", "os._exit"}
    if path.name != "console.py":
        assert "rich.console.Console" not in imports_of(path)


HOUSE = House(PACKAGE)


def test_arrows_point_down():
    assert HOUSE.upward_arrows() == []


def test_the_method_is_told_once():
    users = {
        name: {module_name(path) for path in MODULES if name in imports_of(path)}
        for name in (
            "srt_cli.templates.critic_messages",
            "srt_cli.templates.self_critique_messages",
            "srt_cli.templates.parse_critique",
            "srt_cli.calls.conduct.conduct",
        )
    }
    critic, driver = {"srt_cli.feedback.critic"}, {"srt_cli.calls.asking"}
    assert list(users.values()) == [critic, critic, critic, driver]


@pytest.mark.parametrize("path", MODULES, ids=module_name)
def test_what_became_of_a_reply_is_decided_where_it_is_received(path):
    if path.relative_to(PACKAGE).parts[0] == "models":
        return
    attributes = {
        node.attr
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Attribute)
    }
    assert "finish_reason" not in attributes


def test_no_two_files_need_each_other():
    assert HOUSE.circles() == []


def test_a_name_of_a_type_stands_once():
    assert HOUSE.doubled_names() == {}


def test_no_function_takes_six_parameters():
    assert HOUSE.wide_functions() == []


def test_the_house_stays_small():
    assert len(HOUSE.files) <= 137
    assert len(HOUSE.files_in("training")) <= 24


def test_no_module_is_a_drawer():
    assert not {path.stem for path in MODULES} & {"utils", "common", "base", "helpers", "misc"}


def test_every_imported_package_is_declared():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = list(document["dependencies"])
    for extra in document.get("optional-dependencies", {}).values():
        declared += extra
    names = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("-", "_") for line in declared}
    imported = {name.split(".")[0] for path in MODULES for name in imports_of(path)}
    third_party = imported - set(sys.stdlib_module_names) - {"srt_cli"}
    assert third_party <= names


def test_every_declared_package_is_pinned():
    document = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    pinned = {
        line.split("==")[0].replace("-", "_")
        for line in (ROOT / "constraints.txt").read_text().splitlines()
        if "==" in line
    }
    wanted = [*document["dependencies"], *document["optional-dependencies"]["dev"]]
    names = {re.split(r"[\[<>=!~ ]", line)[0].lower().replace("-", "_") for line in wanted}
    assert names <= pinned


def test_help_imports_nothing_heavy_and_is_quick():
    program = (
        "import sys; from srt_cli.cli import main; sys.argv = ['srt', '--help']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        f"heavy = {sorted(HEAVY | {'numpy', 'scipy'})!r}\n"
        "print([name for name in heavy if name in sys.modules], file=sys.stderr)"
    )
    took = []
    for _ in range(5):
        before = os.times()
        done = subprocess.run(
            [sys.executable, "-c", program], capture_output=True, text=True, check=True
        )
        after = os.times()
        took.append(
            after.children_user + after.children_system
            - before.children_user - before.children_system
        )  # fmt: skip
        assert done.stderr.strip() == "[]"
    # Seconds of processor, and the quickest of five: other tests share the two cores.
    assert min(took) < 0.3


@pytest.mark.parametrize("command", cli.STAGES)
def test_a_commands_help_begins_with_its_summary_and_has_two_examples(command, srt):
    options_class = getattr(
        import_module(cli.STAGES[command].module), cli.STAGES[command].options_class
    )
    assert inspect.getdoc(options_class).split("\n\n")[0].replace("\n", " ") == (
        cli.STAGES[command].summary
    )
    finished = srt(command, "--help")
    assert finished.code == 0
    assert finished.stdout.count(f"\n  srt {command}") == 2
    for option in ("--config", "--seed", "--limit", "--overwrite", "--out"):
        assert option in finished.stdout


@pytest.mark.parametrize("command", cli.STAGES)
def test_importing_a_stage_needs_no_heavy_package(command):
    program = (
        "import sys\n"
        f"for name in {sorted(HEAVY | {'numpy', 'scipy'})!r}: sys.modules[name] = None\n"
        f"import {cli.STAGES[command].module}"
    )
    subprocess.run([sys.executable, "-c", program], check=True, capture_output=True)


def test_the_version_is_printed(srt):
    assert srt("--version").stdout == "srt 0.1.0\n"


def test_every_test_that_the_documents_name_exists():
    tests = "".join(path.read_text() for path in (ROOT / "tests").glob("test_*.py"))
    for document in [ROOT / "README.md", *(ROOT / "docs").glob("*.md")]:
        for name in re.findall(r"`(test_\w+)`", document.read_text()):
            assert f"def {name}(" in tests, f"{document.name}: {name}"


@pytest.mark.parametrize(
    "document",
    [
        "README.md",
        "docs/collect.md",
        "docs/data.md",
        "docs/eval.md",
        "docs/preferences.md",
        "docs/providers.md",
        "docs/recipes.md",
        "docs/reliability.md",
        "docs/scale.md",
        "docs/training.md",
        "docs/performance.md",
        "docs/method.md",
        "docs/house.md",
    ],
)
def test_every_option_that_the_documents_name_exists(document):
    known = {
        flag
        for command in cli.STAGES
        for field in fields(cli._load(command)[0])
        for flag in [flag_of(field)]
    }
    known |= {"--no-" + flag.removeprefix("--") for flag in known}
    # Of srt itself, of other tools.
    known |= {"--config", "--version", "--help", "--help-all", "--output_path"}
    known |= {"--install-completion", "--show-completion"}
    known |= {"--max-tokens", "--again", "--rows"}  # of the benches
    known |= {"--mask_history"}  # of LLaMA-Factory
    # Of torchrun, accelerate launch and Slurm.
    known |= {"--nnodes", "--nproc_per_node", "--rdzv_backend", "--rdzv_endpoint"}
    known |= {"--shutdown-timeout", "--config_file", "--num_machines", "--num_processes"}
    known |= {"--machine_rank", "--main_process_ip", "--main_process_port", "--nodes"}
    known |= {"--ntasks-per-node", "--gpus-per-node", "--cpus-per-task", "--signal"}
    known |= {"--tensor-parallel-size", "--data-parallel-size"}
    text = re.sub(r"```diff\n.*?```", "", (ROOT / document).read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if "vllm " not in line]
    named = set(re.findall(r"(?<![\w-])--[a-z][a-z0-9-_]*[a-z0-9]", "\n".join(lines)))
    assert not named - known


def lines_shown():
    """The lines of `srt` in the documents' blocks, but those with `...`, without their comments."""
    for document in [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]:
        text = document.read_text().replace("\\\n", "")
        for line in re.findall(r"^ {4,}(srt .*)", text, re.MULTILINE):
            line = re.split(r" +# ", line)[0]
            if "..." not in line:
                yield pytest.param(line, id=f"{document.name}: {line[:60]}")


@pytest.mark.parametrize("line", [*lines_shown()])
def test_every_line_that_the_documents_show_is_taken(line, srt, monkeypatch):
    """Options, their values and what they exclude; nothing is run."""
    monkeypatch.setenv("GPU_KEY", "a key of that server")
    load, taken = cli._load, []
    monkeypatch.setattr(cli, "_load", lambda command: (load(command)[0], taken.append))
    finished = srt(*shlex.split(line)[1:])
    assert finished.code == 0, finished.stderr
    assert len(taken) == 1


BOOK = (ROOT / "docs/house.md").read_text()


def test_the_book_of_the_house_lists_every_file_and_none_else():
    listed, folders = [], []
    for line in re.search(r"```\n(srt_cli/\n.*?)```", BOOK, re.DOTALL)[1].splitlines():
        name = line.split()[0]
        folders[(len(line) - len(line.lstrip())) // 2 :] = [name]
        if not name.endswith("/"):
            listed.append("".join(folders))
    only_words = [path for path in MODULES if path.name == "__init__.py" and _is_only_words(path)]
    files = [str(path.relative_to(ROOT)) for path in MODULES if path not in only_words]
    assert sorted(name for name in listed if name.endswith(".py")) == sorted(files)
    assert all((ROOT / name).is_file() for name in listed)


def _is_only_words(path):
    """Whether a file holds a docstring and constants alone."""
    body = ast.parse(path.read_text()).body
    return all(isinstance(node, ast.Expr | ast.Assign) for node in body)


@pytest.mark.parametrize("diff", re.findall(r"```diff\n(.*?)```", BOOK, re.DOTALL))
def test_the_diffs_of_the_house_still_apply(diff):
    """Forwards, or backwards where the document shows what something cost that is there."""
    outcomes = [
        subprocess.run(["git", "apply", "--check", "-C1", *direction], cwd=ROOT, input=diff,
                       text=True, capture_output=True, check=False)
        for direction in ([], ["--reverse"])
    ]  # fmt: skip
    assert 0 in [outcome.returncode for outcome in outcomes], outcomes[0].stderr
