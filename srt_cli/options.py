"""A knob is declared once: a field of the frozen dataclass at the top of its stage.

`setting` changes the result, so a finished output made under another value is refused;
`runtime` changes only speed or looks. The command line, `--config`, `srt.toml`, the manifest and
the help text are all derived from these fields.
"""

import dataclasses
import difflib
import json
import tomllib
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from srt_cli.errors import SrtError, UsageError

Kind = Literal["setting", "runtime"]
Config = TypeVar("Config")

RUNS_CODE_PREFIX = "python:"


def setting(
    default: Any,
    help: str,
    *,
    flag: str | None = None,
    extends: bool = False,
    metavar: str | None = None,
) -> Any:
    """Declare a knob that changes the result.

    `extends` marks a knob whose change adds rows to a run instead of contradicting it (`--limit`).
    """
    return _declare("setting", default, help, flag, extends, metavar)


def runtime(default: Any, help: str, *, flag: str | None = None, metavar: str | None = None) -> Any:
    """Declare a knob that changes only speed, place or looks."""
    return _declare("runtime", default, help, flag, False, metavar)


def _declare(
    kind: Kind, default: Any, help: str, flag: str | None, extends: bool, metavar: str | None
) -> Any:
    metadata = {"kind": kind, "help": help, "flag": flag, "extends": extends, "metavar": metavar}
    return dataclasses.field(default=default, metadata=metadata)


def flag_of(field: dataclasses.Field[Any]) -> str:
    """The long option of a field, e.g. `--max-new-tokens`."""
    return cast(str, field.metadata["flag"]) or "--" + field.name.replace("_", "-")


def values_of(config: Any, kind: Kind) -> dict[str, Any]:
    """The config's values of one kind as plain JSON values, keyed by field name."""
    return {
        field.name: _plain(getattr(config, field.name))
        for field in dataclasses.fields(config)
        if field.metadata["kind"] == kind
    }


def differing_settings(
    config: Any, earlier: Mapping[str, Any], now: Mapping[str, Any]
) -> dict[str, tuple[Any, Any]]:
    """Settings whose value contradicts an earlier run's: flag -> (earlier, now)."""
    differing = {}
    for field in dataclasses.fields(config):
        if field.metadata["kind"] != "setting" or field.metadata["extends"]:
            continue
        if field.name in earlier and earlier[field.name] != now[field.name]:
            differing[flag_of(field)] = (earlier[field.name], now[field.name])
    return differing


def resolve(
    config_class: type[Config],
    command: str,
    flags: Mapping[str, Any],
    config_file: Path | None,
    shared_names: Callable[[], frozenset[str]],
    found_file: Path = Path("srt.toml"),
) -> Config:
    """Layer the knobs: flags over `--config` over a found `srt.toml` over the defaults.

    `shared_names` gives the options of all commands: what may stand at a file's top level.
    A spec that runs code counts only from a flag or an explicit `--config`.
    """
    values: dict[str, Any] = {}
    if found_file.is_file() and not (config_file and _same_file(config_file, found_file)):
        found = _read_preset(found_file, config_class, command, shared_names)
        for name, value in found.items():
            if _runs_code(name, value):
                raise SrtError(
                    f"{found_file}: {name} = {value!r} would run code, which a file that was merely "
                    f"found may not do. Pass it as a flag, or name the file with --config {found_file}."
                )
        values |= found
    if config_file is not None:
        values |= _read_preset(config_file, config_class, command, shared_names)
    values |= {name: value for name, value in flags.items() if value is not None}
    return config_class(**_typed(config_class, values))


def _same_file(one: Path, other: Path) -> bool:
    return one.exists() and one.samefile(other)


def _runs_code(name: str, value: Any) -> bool:
    if name == "trust_remote_code":
        return bool(value)
    specs = value if isinstance(value, list) else [value]
    return any(isinstance(spec, str) and spec.startswith(RUNS_CODE_PREFIX) for spec in specs)


def _read_preset(
    path: Path, config_class: type[Any], command: str, shared_names: Callable[[], frozenset[str]]
) -> dict[str, Any]:
    """Options from a TOML file (top level, then the command's table) or from a `run.json`."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SrtError(f"{path}: cannot be read as a configuration ({error}).") from error
    known = {field.name for field in dataclasses.fields(config_class)}
    if path.suffix == ".json":
        return _options_of_manifest(path, text, known)
    try:
        document = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SrtError(f"{path}: not valid TOML ({error}).") from error
    shared = {key: value for key, value in document.items() if not isinstance(value, dict)}
    table = document.get(command, {})
    options: dict[str, Any] = {}
    for key, value in shared.items():
        name = key.replace("-", "_")
        if name in known:
            options[name] = value
        elif name not in shared_names():
            _refuse_unknown(path, key, name, known | shared_names())
    for key, value in table.items():
        name = key.replace("-", "_")
        if name not in known:
            _refuse_unknown(path, f"[{command}] {key}", name, known)
        options[name] = value
    return options


def _options_of_manifest(path: Path, text: str, known: set[str]) -> dict[str, Any]:
    try:
        manifest = json.loads(text)
    except json.JSONDecodeError as error:
        raise SrtError(f"{path}: not valid JSON ({error}).") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("settings"), dict):
        raise SrtError(f"{path}: not the run.json of an earlier run (it has no settings).")
    options: dict[str, Any] = dict(manifest["settings"])
    for name in options:
        if name not in known:
            _refuse_unknown(path, name, name, known)
    return options


def _refuse_unknown(path: Path, shown: str, name: str, known: set[str]) -> None:
    near = difflib.get_close_matches(name, sorted(known), n=1)
    hint = f" Did you mean {near[0]}?" if near else ""
    raise UsageError(f"{path}: unknown option {shown}.{hint}")


def _typed(config_class: type[Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """Bring TOML, JSON and command-line values to the types the dataclass declares."""
    fields = {field.name: field for field in dataclasses.fields(config_class)}
    typed = {}
    for name, value in values.items():
        declared: Any = fields[name].type
        if typing.get_origin(declared) is tuple and isinstance(value, str):
            value = [value]  # one where several may be given
        try:
            typed[name] = TypeAdapter(declared).validate_python(value)
        except ValidationError as error:
            reason = error.errors()[0]["msg"]
            raise UsageError(f"{flag_of(fields[name])} {value!r}: {reason}.") from error
    return typed


def _plain(value: Any) -> Any:
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value
