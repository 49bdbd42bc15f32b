"""A knob is declared once: a field of the frozen dataclass at the top of its stage.

`setting` changes the result, so a finished output made under another value is refused;
`runtime` changes only speed or looks. The command line, its help and completion, `--config`,
`srt.toml` and the manifest are all derived from these fields.
"""

import dataclasses
import difflib
import glob
import json
import os
import re
import tomllib
import types
import typing
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal, Required, TypedDict, TypeVar, Unpack, cast

from pydantic import TypeAdapter, ValidationError

from srt_cli import console
from srt_cli.errors import SrtError, UsageError

Kind = Literal["setting", "runtime"]
Group = Literal[
    "Data", "Model", "Pairs", "Sampling", "Critic", "Judge", "Training", "Loss", "Adapters",
    "Audit", "Calls and money", "Many processes", "Run", "Output",
]  # fmt: skip
"""The headings of the help, in their order there."""
GROUPS: Final[tuple[Group, ...]] = typing.get_args(Group)
Config = TypeVar("Config")

RUNS_CODE_PREFIX = "python:"
SIDE_FILES: Final = (".run.json", ".journal.jsonl", ".batches.jsonl", ".dropped.jsonl")
"""What stands beside the outputs of runs."""
_BEFORE_SPEC: Final = re.compile(r"^[a-z]+=")
"""What a spec is for, where an option says that too: refinement=gpt-4."""
_WEIGHTED: Final = re.compile(r":[0-9.]+$")
_AROUND_FILE: Final = tuple(map(re.compile, (r"^[^=]*=", r"^(hf|file):", r":[^:/]*$")))
"""What may stand before a file's name, and behind it: a weight, or a split."""
_HARMLESS_SET: Final = re.compile(
    r"(?!\w*(hub|deepspeed|fsdp|path|dir|config|code|resume|space))\w+=(true|false|[-+]?\d[\d.e+-]*)",
    re.IGNORECASE,
)
"""A number or a switch of TRL's that uploads, loads and runs nothing."""


@dataclass(frozen=True)
class Former:
    """How an option was spelled before: still read everywhere, with one note."""

    name: str
    values: Mapping[str, str] = dataclasses.field(default_factory=dict)
    """Values that had another name, too: the former one -> today's."""

    def today(self, value: Any) -> Any:
        """A value in today's spelling."""
        return self.values.get(value, value) if isinstance(value, str) else value


class Declared(TypedDict, total=False):
    """What a declaration may say beside the default and the help text."""

    group: Required[Group]
    common: bool
    """Stands in `--help`; the others in `--help-all` alone."""
    otherwise: str
    """What happens without the option, where its default is None."""
    flag: str
    metavar: str
    extends: bool
    """A changed value adds rows to a run instead of contradicting it (`--limit`)."""
    positive: bool
    """Zero is refused, too; no number may be negative."""
    formerly: Former


@dataclass(frozen=True)
class Knob:
    """What a field's declaration says of it."""

    kind: Kind
    help: str
    group: Group
    common: bool = False
    otherwise: str | None = None
    flag: str | None = None
    metavar: str | None = None
    extends: bool = False
    positive: bool = False
    formerly: Former | None = None


def setting(default: Any, help: str, **declared: Unpack[Declared]) -> Any:
    """Declare a knob that changes the result."""
    return dataclasses.field(default=default, metadata={_KNOB: Knob("setting", help, **declared)})


def runtime(default: Any, help: str, **declared: Unpack[Declared]) -> Any:
    """Declare a knob that changes only speed, place or looks."""
    return dataclasses.field(default=default, metadata={_KNOB: Knob("runtime", help, **declared)})


_KNOB: Final = "knob"
_TYPED: Final = "_typed"


def knob_of(field: dataclasses.Field[Any]) -> Knob:
    """What was declared for a field."""
    return cast(Knob, field.metadata[_KNOB])


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The long option of a field, e.g. `--max-new-tokens`."""
    return knob_of(field).flag or flag_named(field.name)


def takes_several(field: dataclasses.Field[Any]) -> bool:
    """Whether an option may be given again and again."""
    return typing.get_origin(without_none(field.type)) is tuple


def takes_files(field: dataclasses.Field[Any]) -> bool:
    """Whether an option takes files, each given once."""
    return takes_several(field) and (knob_of(field).metavar or "").startswith("FILE")


def repeatable_flags(config_class: type[Any]) -> frozenset[str]:
    """The options of a class that take several values."""
    return frozenset(
        flag_of(each) for each in dataclasses.fields(config_class) if takes_several(each)
    )


def flag_named(name: str) -> str:
    """A name as it is typed: `max_new_tokens` is `--max-new-tokens`."""
    return "--" + name.replace("_", "-")


def _as_key(name: str) -> str:
    """An option as files name it: `--max-new-tokens` and `max-new-tokens` are `max_new_tokens`."""
    return name.removeprefix("--").replace("-", "_")


def group_of(config_class: type[Any], field: dataclasses.Field[Any]) -> Group:
    """The heading under which a class's option stands.

    A class whose inherited options serve one purpose gathers them: `inherited_group = "Audit"`.
    """
    if is_own(config_class, field):
        return knob_of(field).group
    return cast(Group, getattr(config_class, "inherited_group", knob_of(field).group))


def is_common(config_class: type[Any], field: dataclasses.Field[Any]) -> bool:
    """Whether an option stands in `--help` and not in `--help-all` alone."""
    gathered = hasattr(config_class, "inherited_group") and not is_own(config_class, field)
    return knob_of(field).common and not gathered


def is_own(config_class: type[Any], field: dataclasses.Field[Any]) -> bool:
    """Whether the class itself declares the option, and not a class that it inherits from."""
    return field.name in config_class.__annotations__


def choices_of(declared: Any) -> tuple[str, ...]:
    """The words that a type allows, also as items of a tuple; none for any other type."""
    declared = without_none(declared)
    if typing.get_origin(declared) is tuple:
        declared = typing.get_args(declared)[0]
    return typing.get_args(declared) if typing.get_origin(declared) is Literal else ()


def without_none(declared: Any) -> Any:
    """A field's type when it is given; a number or a word counts as text."""
    if typing.get_origin(declared) in (types.UnionType, typing.Union):
        kept = [part for part in typing.get_args(declared) if part is not type(None)]
        return kept[0] if len(kept) == 1 else str
    return declared


def values_of(config: Any, kind: Kind) -> dict[str, Any]:
    """The config's values of one kind as plain JSON values, keyed by field name."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if knob_of(field).kind == kind
    }


def differing_settings(
    config: Any, earlier: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings whose value contradicts an earlier run's: flag -> (earlier, now)."""
    differing = {}
    for field in dataclasses.fields(config):
        if knob_of(field).kind != "setting" or knob_of(field).extends:
            continue
        if field.name in earlier and earlier[field.name] != now[field.name]:
            differing[flag_of(field)] = (earlier[field.name], now[field.name])
    return differing


def typed_flags(config: Any) -> set[str]:
    """The options that were typed. Only there an idle one is refused: a preset may serve other runs."""
    typed: frozenset[str] = getattr(config, _TYPED, frozenset())
    return {flag_of(field) for field in dataclasses.fields(config) if field.name in typed}


def under_todays_names(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values, some perhaps under former names, as `config` (a class, or one of it) names them.

    Raises `UsageError` where an option is given under both names.
    """
    renamed = dict(values)
    for field in dataclasses.fields(config):
        former = knob_of(field).formerly
        if former is None or former.name not in renamed:
            continue
        if field.name in renamed:
            raise UsageError(
                f"{flag_of(field)} and {flag_named(former.name)} are the same option. Give one."
            )
        renamed[field.name] = former.today(renamed.pop(former.name))
    return renamed


def as_declared(config: Any, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values of an earlier run as `config` (a class, or one of it) declares them today.

    One value of an option that takes several today is a list of it, and None is an empty one.
    """
    several = {field.name for field in dataclasses.fields(config) if takes_several(field)}
    return {
        name: [value]
        if name in several and isinstance(value, str)
        else []
        if name in several and value is None
        else value
        for name, value in values.items()
    }


def every_name(config_class: type[Any]) -> dict[str, Any]:
    """The names that a configuration file may use, today's and former ones, with their types."""
    names = {}
    for field in dataclasses.fields(config_class):
        names[field.name] = field.type
        if (former := knob_of(field).formerly) is not None:
            names[former.name] = field.type
    return names


Shared = Callable[[], Mapping[str, list[Any]]]
"""The options of all commands: name -> the types it has in them."""


def resolve(
    config_class: type[Config],
    command: str,
    flags: Mapping[str, Any],
    config_file: Path | None,
    shared: Shared,
) -> Config:
    """Layer the knobs: flags over `--config` over a found `srt.toml` over the defaults.

    `shared` gives the options of all commands, which may stand at a file's top level. Raises `SrtError`
    where a found `srt.toml` would run code, send a key, replace or upload something, or names a file
    outside its folder: that takes a flag or `--config`.
    """
    notes: dict[str, None] = {}
    values: dict[str, Any] = {}
    found_file = Path("srt.toml")
    if found_file.is_file() and not (config_file and _same_file(config_file, found_file)):
        values = _read_preset(found_file, config_class, command, shared, notes)
        given, values = values, _typed(config_class, values, f"{found_file}: ")
        for field in dataclasses.fields(cast(Any, config_class)):
            if field.name in given:
                _allow_found(found_file, field, given[field.name])
    if config_file is not None:
        preset = _read_preset(config_file, config_class, command, shared, notes)
        values |= _typed(config_class, preset, f"{config_file}: ")
    typed = _renamed(config_class, flags, notes)
    for note in notes:
        console.warn(note)
    config = config_class(**_typed(config_class, values | typed))
    object.__setattr__(config, _TYPED, frozenset(typed))
    return config


def _renamed(
    config_class: type[Any], values: Mapping[str, Any], notes: dict[str, None]
) -> dict[str, Any]:
    """Values under today's names; what was renamed goes into `notes`."""
    for field in dataclasses.fields(config_class):
        former = knob_of(field).formerly
        if former is not None and former.name in values:
            was, now = values[former.name], former.today(values[former.name])
            value = "" if was == now else f", and its value {was} is {now}"
            notes[
                f"{flag_named(former.name)} is now {flag_of(field)}{value}. The old spelling still "
                "works."
            ] = None
    return under_todays_names(config_class, values)


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _allow_found(file: Path, field: dataclasses.Field[Any], value: Any) -> None:
    """Raise `SrtError` for what a file may not choose that nobody named; say what it sends where."""
    name = field.name
    texts = [each for each in (value if isinstance(value, list) else [value]) if each is not None]
    specs = [_BEFORE_SPEC.sub("", spec) for spec in texts if isinstance(spec, str)]
    does = None
    if name == "api_key":
        does = f"{file}: api-key sends a key to a host"
    elif (name == "trust_remote_code" and value) or any(
        spec.startswith(RUNS_CODE_PREFIX) for spec in specs
    ):
        does = f"{file}: {name} = {value!r} would run code"
    elif name == "overwrite" and value:
        does = f"{file}: overwrite replaces outputs"
    elif name == "push_to_hub":
        does = f"{file}: {name} = {value!r} uploads a model"
    elif name == "hub_public" and value:
        does = f"{file}: hub_public shows a model to everybody"
    elif name == "report_to" and set(texts) - {"tensorboard"}:
        does = f"{file}: {name} = {value!r} sends figures to a service"
    elif name == "set" and not all(_HARMLESS_SET.fullmatch(each) for each in texts):
        does = f"{file}: {name} = {value!r} may upload, load or run something"
    elif name == "accelerate_config" and Path(str(value)).is_file():
        does = f"{file}: {name} = {value!r} chooses with which machines to compute"
    elif any(_leads_out(field, str(text)) for text in texts):
        does = f"{file}: {name} = {value!r} leads out of its folder"
    if does is not None:
        raise SrtError(
            f"{does}, which a file that was merely found may not do. Pass it as a flag, or name the "
            f"file with --config {file}."
        )
    for spec in specs:
        if spec.startswith(("http://", "https://")):
            console.say(f"{file}: {name} is {spec}")


def _leads_out(field: dataclasses.Field[Any], text: str) -> bool:
    """Whether a value names an output, or anything that exists, outside the working folder.

    Links and globs are followed. Weights may lie anywhere: they are read, and sent to nobody.
    """
    knob = knob_of(field)
    if knob.kind == "runtime" and without_none(field.type) is Path:
        return not _is_inside(text)
    named = {text}
    while further := {each.sub("", name) for name in named for each in _AROUND_FILE} - named:
        named |= further
    named = {os.path.expanduser(each) for each in named}
    named |= {found for each in named for found in glob.iglob(each, recursive=True)}
    metavar = knob.metavar or ""
    if metavar.endswith("SPEC") and not text.startswith("file:"):
        named = {each for each in named if not (os.path.isdir(each) or each.endswith(".gguf"))}
    return any(os.path.exists(each) and not _is_inside(each) for each in named)


def _is_inside(path: str) -> bool:
    """Whether a path, links followed, stays within the working folder."""
    return Path(path).resolve().is_relative_to(Path.cwd().resolve())


def _read_preset(
    path: Path, config_class: type[Any], command: str, shared: Shared, notes: dict[str, None]
) -> dict[str, Any]:
    """Options from a TOML file (top level, then the command's table) or from a `run.json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise SrtError(f"{path}: no such file. Check the path.") from None
    except UnicodeDecodeError as error:
        raise SrtError(f"{path}: cannot be read as a configuration ({error}).") from error
    known = every_name(config_class)
    if path.suffix == ".json":
        options = as_declared(config_class, _options_of_manifest(path, text, known))
        return _renamed(config_class, options, notes)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SrtError(f"{path}: not valid TOML ({error}).") from error
    top, table = {}, {}
    for key, value in document.items():
        name = _as_key(key)
        if isinstance(value, dict):
            continue
        if name not in known:
            if name not in shared():
                _refuse_unknown(path, key, name, {*known, *shared()})
        elif _fits(known[name], value) or not any(_fits(kind, value) for kind in shared()[name]):
            top[name] = value  # else it is meant for a command that takes other values
    # At the top, critic is that of stage 1 for every command; in a command's own table it is what
    # --critic is there.
    typed_as = {_as_key(flag_of(field)): field.name for field in dataclasses.fields(config_class)}
    for key, value in _table_of(path, document, command).items():
        name = typed_as.get(_as_key(key), _as_key(key))
        if name not in known:
            _refuse_unknown(path, f"[{command}] {key}", name, set(known))
        table[name] = value
    return _renamed(config_class, top, notes) | _renamed(config_class, table, notes)


def _table_of(path: Path, document: Mapping[str, Any], command: str) -> Mapping[str, Any]:
    """A command's table, under its name with hyphens or underscores; refuses one close to it."""
    own: dict[str, Any] = {}
    for key, value in document.items():
        if not isinstance(value, dict):
            continue
        if (name := key.replace("_", "-")) == command:
            own |= value
        elif difflib.get_close_matches(name, [command], cutoff=0.8):
            raise UsageError(f"{path}: unknown table [{key}]. Did you mean [{command}]?")
    return own


def _options_of_manifest(path: Path, text: str, known: Mapping[str, Any]) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise SrtError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise SrtError(f"{path}: not the run.json of an earlier run (it has no settings).")
    # An option that the command has no more, and that was not given, says nothing.
    told = manifest["settings"].items()
    options = {name: value for name, value in told if name in known or value is not None}
    for name in options:
        if name not in known:
            _refuse_unknown(path, name, name, set(known))
    return options


def _refuse_unknown(path: Path, shown: str, name: str, known: set[str]) -> None:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"{path}: unknown option {shown}.{hint}")


def _typed(config_class: type[Any], values: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Bring TOML, JSON and command-line values to the types the dataclass declares.

    Raises `UsageError` for one that has another; `where` it stands comes first.
    """
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    typed = {}
    for name, value in values.items():
        if takes_files(fields[name]):
            given = value if isinstance(value, list | tuple) else [value]
            value = _without_side_files([name for each in given for name in _expanded(each)])
        try:
            typed[name] = _read_as(fields[name].type, value)
        except ValidationError as error:
            given = error.errors()[0]["input"]
            raise UsageError(
                f"{where}{flag_of(fields[name])} {given!r}: {_wanted_instead(error)}"
            ) from None
        if told := _senseless(fields[name], typed[name]):
            raise UsageError(f"{where}{flag_of(fields[name])} {told}")
    return typed


def _wanted_instead(error: ValidationError) -> str:
    """What a value must be, in a user's words."""
    faults = error.errors()
    wanted = [_wanted(fault["type"], fault.get("ctx", {})) for fault in faults]
    if not all(wanted):
        return f"{faults[0]['msg']}."
    choices = re.split(", | or ", wanted[-1])
    near = difflib.get_close_matches(str(faults[0]["input"]), choices, n=1)
    return f"must be {' or '.join(wanted)}." + (f" Did you mean {near[0]}?" if near else "")


def _wanted(fault: str, told: Mapping[str, Any]) -> str:
    """For a fault as pydantic names it; "" for those that it tells well itself."""
    if fault == "literal_error":
        return str(told["expected"]).replace("'", "")
    numbers = {"int": "a whole number", "float": "a number"}
    return numbers.get(fault.partition("_")[0], "")


def _senseless(field: dataclasses.Field[Any], value: Any) -> str | None:
    """What is wrong with a value that has the right type; None with one that makes sense."""
    kind, knob = without_none(field.type), knob_of(field)
    is_output = knob.kind == "runtime" and (knob.metavar or "").startswith("FILE")
    if kind is Path and is_output and value is not None and value.is_dir():
        return f"{value}: is a directory, where a file is expected."
    if kind not in (int, float) or value is None or value > 0:
        return None
    if value == 0 and not knob.positive:
        return None
    least = "above 0" if kind is float else "1 or more"
    return f"{value:.12g}: must be {least if knob.positive else '0 or more'}."


def _expanded(given: Any) -> list[Any]:
    """The files that a glob names, sorted, each with the weight behind it; anything else as it is."""
    text = str(given)
    if not glob.has_magic(text) or Path(text).exists():
        return [given]
    pattern, colon, weight = text.rpartition(":") if _WEIGHTED.search(text) else (text, "", "")
    found = sorted(glob.glob(pattern, recursive=True))
    return [f"{name}{colon}{weight}" for name in found] or [given]


def _without_side_files(files: list[Any]) -> list[Any]:
    """Several files without those that srt keeps beside its own, which a glob finds too; says so."""
    kept = [file for file in files if not str(file).endswith(SIDE_FILES)]
    if not kept or len(kept) == len(files):
        return files
    left_out = ", ".join(str(file) for file in files if file not in kept)
    console.say(f"left out, as what srt keeps beside its files: {left_out}")
    return kept


def _read_as(declared: Any, value: Any) -> Any:
    if typing.get_origin(declared) is tuple and isinstance(value, str):
        value = [value]  # one where several may be given
    return TypeAdapter(declared).validate_python(value)


def _fits(declared: Any, value: Any) -> bool:
    try:
        _read_as(declared, value)
    except ValidationError:
        return False
    return True


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
