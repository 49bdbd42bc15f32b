"""The Typer app: six commands derived from the stages' dataclasses, and the one error boundary."""

import dataclasses
import inspect
import os
import signal
import sys
import types
import typing
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NamedTuple

import typer

import srt_cli
from srt_cli import console
from srt_cli.errors import Ended, Interrupted, SrtError
from srt_cli.options import flag_of, resolve

STOPPED: Final = "stopped; what is complete is written. Run the same line to go on."


class Stage(NamedTuple):
    """Where a command lives; its module's `run` takes an instance of its options class."""

    module: str
    options_class: str
    summary: str
    """First sentence of the class docstring, kept here so that `srt --help` imports no stage."""


STAGES: Final = {
    "collect-feedback": Stage(
        "srt_cli.stages.collect_feedback",
        "CollectFeedback",
        "Let a policy answer prompts, and a critic write feedback and a refinement for each answer.",
    ),
    "sft": Stage(
        "srt_cli.stages.sft",
        "Sft",
        "Fine-tune the policy on response, feedback and refinement.",
    ),
    "self-critique": Stage(
        "srt_cli.stages.self_critique",
        "SelfCritique",
        "Let the tuned model answer new prompts, criticise its own answers and refine them.",
    ),
    "build-prefs": Stage(
        "srt_cli.stages.build_prefs",
        "BuildPrefs",
        "Turn feedback into preference pairs: the refinement is chosen, the draft rejected.",
    ),
    "dpo": Stage(
        "srt_cli.stages.dpo",
        "Dpo",
        "Teach the tuned model to prefer its refinements over its drafts.",
    ),
    "eval": Stage(
        "srt_cli.stages.evaluate.run",
        "Evaluate",
        "Compare models with a reference on held-out prompts, and write a report.",
    ),
}


def _load(command: str) -> tuple[type[Any], Callable[[Any], None]]:
    stage = STAGES[command]
    module = import_module(stage.module)
    return getattr(module, stage.options_class), module.run


def every_option_name() -> frozenset[str]:
    """The options of all commands: what may stand at the top level of a configuration file."""
    return frozenset(
        field.name for command in STAGES for field in dataclasses.fields(_load(command)[0])
    )


def _command(command: str) -> Callable[..., None]:
    """A function whose signature is the stage's dataclass, so that typer derives the options."""
    options_class, run = _load(command)

    def invoke(**flags: Any) -> None:
        config_file = flags.pop("config")
        given = {name: value for name, value in flags.items() if value not in (None, [])}
        options = resolve(options_class, command, given, config_file, every_option_name)
        console.quiet_libraries()
        try:
            run(options)
        except KeyboardInterrupt:  # which click would swallow
            raise Interrupted(STOPPED) from None

    # A stage's own options first, then those that it shares with others.
    fields = sorted(
        dataclasses.fields(options_class),
        key=lambda field: field.name not in options_class.__annotations__,
    )
    parameters = [_parameter(field) for field in fields]
    parameters.append(
        inspect.Parameter(
            "config",
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                Path | None,
                typer.Option(
                    "--config",
                    metavar="FILE",
                    help="Presets: a TOML file, or the run.json of an earlier run. Flags win.",
                ),
            ],
        )
    )
    invoke.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    invoke.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    invoke.__doc__ = inspect.getdoc(options_class)
    return invoke


def _parameter(field: dataclasses.Field[Any]) -> inspect.Parameter:
    """A typer option for one field; its own default is None, so only what was typed is given."""
    declared = _without_none(field.type)
    is_list = typing.get_origin(declared) is tuple
    item: Any = typing.get_args(declared)[0] if is_list else declared
    if is_list and typing.get_origin(item) is Literal:
        item = str  # typer takes no list of choices; the values are checked with the others
    help_text = field.metadata["help"] + _shown_default(field.default)
    flag = flag_of(field)
    option = typer.Option(
        f"{flag}/--no-{flag.removeprefix('--')}" if item is bool else flag,
        help=help_text,
        show_default=False,
        metavar=field.metadata["metavar"],
    )
    annotation = Annotated[list[item] | None if is_list else item | None, option]  # type: ignore[valid-type]
    return inspect.Parameter(
        field.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=annotation
    )


def _shown_default(default: Any) -> str:
    if default is None or default is False or default == ():
        return ""
    if isinstance(default, tuple):
        default = ",".join(map(str, default))
    shown = f"{default:g}" if isinstance(default, float) else str(default)
    return f" (default: {shown})"


def _without_none(annotation: Any) -> Any:
    if typing.get_origin(annotation) in (types.UnionType, typing.Union):
        kept = [part for part in typing.get_args(annotation) if part is not type(None)]
        # A number or a word is typed as text; the value is checked with the others.
        return kept[0] if len(kept) == 1 else str
    return annotation


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

    Stage 1: collect-feedback, sft. Stage 2: self-critique, build-prefs, dpo. Then: eval.
    Each command reads and writes plain files; its defaults take what the one before it wrote.
    """


def build_app(only: str | None = None) -> typer.Typer:
    """The app with its six commands, in the order of the method.

    With `only`, the other commands are listed but not loaded, which keeps start-up short.
    """
    app = typer.Typer(
        no_args_is_help=True,
        add_completion=False,
        rich_markup_mode=None,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )
    app.callback()(_describe_app)
    for command, stage in STAGES.items():
        loaded = only is None or only == command
        app.command(command, help=None if loaded else stage.summary, short_help=stage.summary)(
            _command(command) if loaded else _listed
        )
    return app


def _listed() -> None:
    raise AssertionError("a command that was only listed was called")


def _stop(signal_number: int, frame: types.FrameType | None) -> None:
    raise KeyboardInterrupt


def main() -> None:
    """Run the command line; every expected error leaves as one message and an exit code."""
    signal.signal(signal.SIGTERM, _stop)
    try:
        named = [argument for argument in sys.argv[1:] if argument in STAGES]
        build_app(only=named[0] if named else "")(standalone_mode=True)
    except KeyboardInterrupt:
        _exit(Interrupted(STOPPED))
    except SrtError as error:
        _exit(error)
    except OSError as error:
        _exit(SrtError(_describe_os_error(error)), error)


def _describe_os_error(error: OSError) -> str:
    where = f"{error.filename}: " if error.filename else ""
    reason = error.strerror or str(error)
    hint = " Free some space and run the same line again." if error.errno == 28 else ""
    return f"{where}{reason[:1].lower()}{reason[1:]}.{hint}"


def _exit(error: SrtError, cause: BaseException | None = None) -> typing.NoReturn:
    if os.environ.get("SRT_TRACEBACK") == "1":
        raise cause or error
    if not isinstance(error, Ended):
        console.fail(str(error))
    sys.exit(error.exit_code)
