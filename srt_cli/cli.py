"""The Typer app: six commands derived from the stages' dataclasses, and the one error boundary."""

import dataclasses
import errno
import inspect
import os
import shlex
import signal
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from itertools import chain
from pathlib import Path
from typing import Annotated, Any, Final, NamedTuple

import typer
from typer.core import TyperCommand, TyperGroup

import srt_cli
from srt_cli import console, help
from srt_cli.errors import Ended, Interrupted, SrtError, UsageError
from srt_cli.options import (
    choices_of,
    every_name,
    flag_named,
    flag_of,
    knob_of,
    repeatable_flags,
    resolve,
    without_none,
)

STOPPED: Final = "stopped; what is complete is written. Run the same line to continue."


class Stage(NamedTuple):
    """Where a command lives; its module's `run` takes an instance of its options class."""

    part: str
    """The heading under which `srt --help` lists it."""
    module: str
    options_class: str
    summary: str
    """First sentence of the class docstring, kept here so that `srt --help` imports no stage."""


STAGES: Final = {
    "collect-feedback": Stage(
        "Stage 1",
        "srt_cli.stages.collect_feedback",
        "CollectFeedback",
        "Let a policy answer prompts, and a critic write feedback and a refinement for each answer.",
    ),
    "sft": Stage(
        "Stage 1",
        "srt_cli.stages.sft",
        "Sft",
        "Fine-tune the policy on response, feedback and refinement.",
    ),
    "self-critique": Stage(
        "Stage 2",
        "srt_cli.stages.self_critique",
        "SelfCritique",
        "Let the tuned model answer new prompts, criticise its own answers and refine them.",
    ),
    "build-prefs": Stage(
        "Stage 2",
        "srt_cli.stages.build_prefs",
        "BuildPrefs",
        "Turn feedback into preference pairs: the refinement is chosen, the draft rejected.",
    ),
    "dpo": Stage(
        "Stage 2",
        "srt_cli.stages.dpo",
        "Dpo",
        "Teach the tuned model to prefer its refinements over its drafts.",
    ),
    "eval": Stage(
        "Evaluation",
        "srt_cli.stages.evaluate.run",
        "Evaluate",
        "Compare models with a reference on held-out prompts, and write a report.",
    ),
}


class _App(TyperGroup):
    """`srt` itself, with its commands under the part of the method that they belong to."""

    def get_help(self, ctx: Any) -> str:
        parts: dict[str, list[help.Entry]] = {}
        for command, stage in STAGES.items():
            parts.setdefault(stage.part, []).append(help.Entry(command, stage.summary))
        for option in self.get_params(ctx):
            entry = help.Entry(", ".join(option.opts), getattr(option, "help", ""))
            parts.setdefault("Options", []).append(entry)
        return help.app_page(self.help or "", parts.items())


class _Command(TyperCommand):
    """A command with the help page of its options class."""

    def get_help(self, ctx: Any) -> str:
        return self.page(everything=False)

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        ctx.allow_extra_args = True  # which are refused here, with the option that they lack
        repeatable = repeatable_flags(self._options)
        words = list(_each_with_its_flag(args, repeatable))
        stray = super().parse_args(ctx, list(words))
        if ctx.resilient_parsing:
            return stray
        valued = (each.opts for each in self.params if not getattr(each, "is_flag", False))
        _say_what_gives_way(words, frozenset(chain(*valued)), repeatable)
        if stray:
            raise UsageError(
                f"{stray[0]}: belongs to no option. Did you mean {_reads(self._options)} {stray[0]}?"
            )
        return stray

    @property
    def _options(self) -> type[Any]:
        return _load(self.name or "")[0]

    def page(self, *, everything: bool) -> str:
        """The help, of the common options or of every one."""
        return help.command_page(self.name or "", self._options, everything=everything)


def _each_with_its_flag(words: Sequence[str], flags: frozenset[str]) -> Iterator[str]:
    """The words of a line, with `--data a b`, as a shell makes it of `--data *`, as `--data a --data b`.

    No command takes a word that belongs to no option, so the words after a value are values too.
    """
    flag, values = "", 0
    for word in words:
        if word.startswith("-") and word != "-":
            flag, _, value = word.partition("=")
            values = int(bool(value))
        elif flag in flags:
            if values:
                yield flag
            values += 1
        yield word


def _say_what_gives_way(
    words: Iterable[str], valued: frozenset[str], repeatable: frozenset[str]
) -> None:
    """An option given twice has its last value, as scripts use it; but nobody should have to guess."""
    given: dict[str, str] = {}
    left = iter(words)
    for word in left:
        flag, equals, value = word.partition("=")
        if flag not in valued:
            continue
        value = shlex.quote(value if equals else next(left, ""))
        if flag not in repeatable and given.setdefault(flag, value) != value:
            console.say(f"{flag} is given twice: {value} counts, and not {given[flag]}")
        given[flag] = value


def _load(command: str) -> tuple[type[Any], Callable[[Any], None]]:
    stage = STAGES[command]
    module = import_module(stage.module)
    return getattr(module, stage.options_class), module.run


def every_option() -> dict[str, list[Any]]:
    """The options of all commands, which may stand at the top level of a configuration file.

    Each with the types that it has in them.
    """
    found: dict[str, list[Any]] = {}
    for command in STAGES:
        for name, declared in every_name(_load(command)[0]).items():
            found.setdefault(name, []).append(declared)
    return found


def _command(command: str) -> Callable[..., None]:
    """A function whose signature is the stage's dataclass, so that typer derives the options."""
    options_class, run = _load(command)

    def invoke(**flags: Any) -> None:
        config_file = flags.pop("config")
        del flags["help_all"]
        given = {name: value for name, value in flags.items() if value not in (None, [])}
        for name in [name for name in given if name.startswith(_NOT)]:
            given[name.removeprefix(_NOT)] = not given.pop(name)
        if config_file is not None and config_file.suffix == ".toml":
            from srt_cli.models.api.providers import also_read

            also_read(config_file)
        options = resolve(options_class, command, given, config_file, every_option)
        console.quiet_libraries()
        try:
            run(options)
        except KeyboardInterrupt:  # which click would swallow
            raise Interrupted(STOPPED) from None

    parameters = [
        parameter for field in dataclasses.fields(options_class) for parameter in _parameters(field)
    ]
    name, metavar = help.CONFIG.name.split()
    config = typer.Option(name, metavar=metavar, help=help.CONFIG.text)
    parameters.append(_parameter("config", Path, config))
    everything = help.HELP[1]
    show_all = typer.Option(
        everything.name, is_eager=True, callback=_show_every_option, help=everything.text
    )
    parameters.append(_parameter("help_all", bool, show_all))
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return invoke


def _reads(options_class: type[Any]) -> str:
    """The option that names what a command reads."""
    flags = [flag_of(field) for field in dataclasses.fields(options_class)]
    return next(flag for flag in ("--prompts", "--data", "--prefs") if flag in flags)


def _show_every_option(context: typer.Context, asked: bool) -> None:
    if asked and isinstance(context.command, _Command):
        typer.echo(context.command.page(everything=True))
        raise typer.Exit


_NOT: Final = "no_"
"""Before a switch's name: the parameter that turns it off. No field is called so."""


def _parameters(field: dataclasses.Field[Any]) -> Iterator[inspect.Parameter]:
    """Typer's options for one field: its own, and hidden ones for other spellings of it."""
    declared = without_none(field.type)
    is_list = typing.get_origin(declared) is tuple
    item: Any = typing.get_args(declared)[0] if is_list else declared
    knob, flag = knob_of(field), flag_of(field)
    completed = _completion(choices) if (choices := choices_of(field.type)) else None
    if choices or item in (int, float):
        item = str  # checked with the values of files, and refused in the same words
    taken = list[item] if is_list else item
    off = f"--no-{flag.removeprefix('--')}"
    spelled = f"{flag}/{off}" if declared is bool and field.default else flag
    option = typer.Option(
        spelled, help=knob.help, metavar=knob.metavar, autocompletion=completed, show_default=False
    )
    yield _parameter(field.name, taken, option)
    if declared is bool and not field.default:  # typed so until now, and takes back a preset
        yield _parameter(_NOT + field.name, bool, typer.Option(off, hidden=True))
    if knob.formerly is not None:
        former = typer.Option(flag_named(knob.formerly.name), hidden=True)
        yield _parameter(knob.formerly.name, list[str] if is_list else str, former)


def _parameter(name: str, taken: Any, option: Any) -> inspect.Parameter:
    """An option whose own default is None, so that only what was typed is given."""
    annotation = Annotated[taken | None, option]
    kind = inspect.Parameter.KEYWORD_ONLY
    return inspect.Parameter(name, kind, default=None, annotation=annotation)


def _completion(choices: Sequence[str]) -> Callable[[str], list[str]]:
    def beginning_with(incomplete: str) -> list[str]:
        return [choice for choice in choices if choice.startswith(incomplete)]

    return beginning_with


def _print_version(asked: bool) -> None:
    if asked:
        console.result(f"srt {srt_cli.__version__}")
        raise typer.Exit


def _describe_app(
    version: Annotated[
        bool,
        typer.Option(
            "--version", callback=_print_version, is_eager=True, help="Print the version."
        ),
    ] = False,
) -> None:
    """Improve a language model by language feedback: Self-Refinement Tuning (arXiv 2406.07168).

    Each command reads and writes plain files, and by default takes what the one before it wrote.
    """


def build_app(only: str | None = None) -> typer.Typer:
    """The app with its six commands, in the order of the method.

    With `only`, the other commands are listed but not loaded, which keeps start-up short.
    """
    app = typer.Typer(
        cls=_App,
        no_args_is_help=True,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_describe_app)
    for command, stage in STAGES.items():
        loaded = only is None or only == command
        app.command(command, cls=_Command, short_help=stage.summary)(
            _command(command) if loaded else _listed
        )
    return app


def _listed() -> None:
    raise AssertionError("a command that was only listed was called")


def _stop(signal_number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def _words_to_complete() -> list[str]:
    """The line that a shell wants completed: bash passes it in one variable, the others in another."""
    lines = [os.environ.get(name, "") for name in ("COMP_WORDS", "_TYPER_COMPLETE_ARGS")]
    return " ".join(lines).split() if "_SRT_COMPLETE" in os.environ else []


@contextmanager
def _quiet_end() -> Iterator[None]:
    """Behind the block everything is written: what signal comes then ends the process without a word."""
    try:
        yield
    finally:
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(number) is not signal.SIG_IGN:
                signal.signal(number, signal.SIG_DFL)


def main() -> None:
    """Run the command line; every expected error leaves as one message and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:  # as it is under nohup
        signal.signal(signal.SIGHUP, _stop)
    try:
        with _quiet_end():
            words = [*sys.argv[1:], *_words_to_complete()]
            named = [word for word in words if word in STAGES]
            build_app(only=named[0] if named else "")(standalone_mode=True, prog_name="srt")
    except KeyboardInterrupt:
        _exit(Interrupted(STOPPED))
    except SrtError as error:
        _exit(error)
    except OSError as error:
        _exit(SrtError(_describe_os_error(error)), error)


_WAYS_OUT: Final = {
    errno.ENOSPC: "Free some space, then run the same line again.",
    errno.EDQUOT: "Free some of your quota, then run the same line again.",
    errno.EFBIG: "A limit allows no larger file (ulimit -f).",
    errno.EACCES: "Change its permissions, or choose another path.",
    errno.EPERM: "Change its permissions, or choose another path.",
    errno.EROFS: "Choose a path that can be written.",
    errno.ENOENT: "Check the path.",
    errno.ENOTDIR: "Check the path.",
    errno.EISDIR: "Check the path.",
    errno.ELOOP: "Check where its link leads.",
    errno.ENAMETOOLONG: "Choose a shorter name.",
    errno.EMFILE: "Allow more open files (ulimit -n).",
    errno.EIO: "Check the disk, then run the same line again.",
}


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    way_out = f" {_WAYS_OUT[error.errno]}" if error.errno in _WAYS_OUT else ""
    return f"{where}{reason[:1].lower()}{reason[1:]}.{way_out}"


def _exit(error: SrtError, cause: BaseException | None = None) -> typing.NoReturn:
    if os.environ.get("SRT_TRACEBACK") == "1":
        raise cause or error
    if not isinstance(error, Ended):
        console.fail(str(error))
    sys.exit(error.exit_code)
