"""Who serves models, and whose key goes where: a key belongs to a host and is sent to no other."""

import os
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from importlib import resources
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import parse_qsl, urlsplit

from pydantic import BaseModel, ConfigDict, ValidationError

from srt_cli.errors import QuotaError, UsageError

TABLE: Final = "providers.toml"
_LIKE_A_KEY: Final = re.compile(r"\bsk-[A-Za-z0-9_-]{16,}")
_VARIABLE: Final = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_files: list[Path] = []


class Provider(BaseModel):
    """One who serves models: where, in which dialect, with which key, and what is known of it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dialect: str
    """A file of `srt_cli.models.api`."""
    address: str = ""
    address_variable: str | None = None
    key: str | None = None
    """The environment variable that holds its key."""
    key_header: str = "authorization"
    header_variables: dict[str, str] = {}
    """Other headers, from environment variables that may be set."""
    path: str | None = None
    version: str = ""
    version_variable: str | None = None
    token_field: str = "max_tokens"
    refuses: tuple[str, ...] = ()
    renames: dict[str, str] = {}
    thinking: dict[Literal["on", "off"], dict[str, Any]] = {}
    """The fields that tell a model to think, and not to; empty where none is known."""
    prices: str | None = None
    """Its name in genai-prices."""
    free: bool = False
    """What it serves costs nothing."""

    @property
    def told_address(self) -> str | None:
        """The address that the environment names for it."""
        told = os.environ.get(self.address_variable or "")
        return told.rstrip("/") if told else None

    @property
    def url(self) -> str:
        """Where it is; empty when nothing says so."""
        return self.told_address or self.address


PLAIN: Final = Provider(
    dialect="openai_chat",
    thinking={
        "on": {"chat_template_kwargs": {"enable_thinking": True, "thinking": True}},
        "off": {"chat_template_kwargs": {"enable_thinking": False, "thinking": False}},
    },
)
"""A server of which nothing but its address is known."""


@dataclass(frozen=True)
class Key:
    """A key, and the environment variable it came from; only the variable is ever shown."""

    variable: str
    value: str = field(repr=False)


def also_read(path: Path) -> None:
    """Have the `[providers.NAME]` tables of a configuration file count too."""
    _files.append(path)


def providers() -> Mapping[str, Provider]:
    """Every provider by its name: the package's, and those of the user's own files."""
    own = Path(os.environ.get("XDG_CONFIG_HOME", Path.home() / ".config")) / "srt" / TABLE
    files = [file for file in (own, *_files) if file.is_file()]
    return _read_all(tuple((file, file.stat().st_mtime_ns) for file in files))


@lru_cache(maxsize=4)
def _read_all(files: tuple[tuple[Path, int], ...]) -> Mapping[str, Provider]:
    package = resources.files(__package__).joinpath(TABLE)
    tables = {name: dict(table) for name, table in tomllib.loads(package.read_text()).items()}
    for file, _ in files:
        try:
            found = tomllib.loads(file.read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError, OSError) as error:
            raise UsageError(f"{file}: cannot be read as TOML ({error}).") from error
        own = found if file.name == TABLE else found.get("providers", {})
        for name, table in own.items():
            tables[name] = tables.get(name, {}) | table
            _provider(name, tables[name], str(file))
    return {name: _provider(name, table, TABLE) for name, table in tables.items()}


def _provider(name: str, table: Mapping[str, object], where: str) -> Provider:
    try:
        provider = Provider.model_validate(table)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise UsageError(f"{where}: [{name}] {place}: {first['msg']}.") from error
    if holds_key(provider.address):
        raise UsageError(f"{where}: [{name}] address: {KEY_IN_ADDRESS}")
    return provider


KEY_IN_ADDRESS: Final = (
    "a key or password in an address would be written to disk. Take it out, and name the environment "
    "variable that holds it: --api-key HOST=VARIABLE (OPENAI_API_KEY goes to OpenAI's address alone)."
)


def holds_key(address: str) -> bool:
    """Whether an address carries a key: a password, a query (but a version), or what looks like one."""
    try:
        parts = urlsplit(address)
    except ValueError:  # which part of it is what, nobody can tell
        return bool({"@", "?"} & set(address)) or bool(_LIKE_A_KEY.search(address))
    asked = {name for name, _ in parse_qsl(parts.query, keep_blank_values=True)}
    return "@" in parts.netloc or bool(asked - {"api-version"}) or bool(_LIKE_A_KEY.search(address))


def refuse_no_address(address: str, where: str) -> None:
    """Raise `UsageError`, naming where it stands, for an address to which nothing can be sent."""
    try:
        parts = urlsplit(address)
        host = parts.hostname or ""
        host.encode("idna")
        whole = parts.scheme in ("http", "https") and bool(host) and parts.port != 0
    except ValueError:  # also of a name that is none
        whole = False
    if not whole:
        raise UsageError(
            f"{where}: {address!r} is no address of a server. Write http://HOST:PORT/v1."
        )


def provider_at(url: str) -> Provider | None:
    """The provider whose address has this scheme, host and port."""
    found = (
        each for each in providers().values() if each.url and _origin(each.url) == _origin(url)
    )
    return next(found, None)


def parse_api_keys(given: Sequence[str]) -> dict[str, str]:
    """`--api-key HOST=VARIABLE`; raises `UsageError` without ever showing what may be a key."""
    variables = {}
    for text in given:
        host, equals, variable = text.partition("=")
        if not equals or not host or not _VARIABLE.fullmatch(variable) or "/" in host:
            raise UsageError(
                "--api-key: write HOST=VARIABLE or HOST:PORT=VARIABLE, with the name of an environment "
                "variable that holds the key, never the key itself."
            )
        if not os.environ.get(variable):
            raise UsageError(
                f"--api-key {host}=...: there is no environment variable of that name. "
                "Set it, and give its name here, never the key itself."
            )
        variables[host.lower()] = variable
    return variables


def key_for(url: str, given: Mapping[str, str], provider: Provider | None) -> Key | None:
    """The key that may go to an address: the one the user names, or that of the provider there.

    An address that was given without a provider is looked up among all.
    """
    parts = urlsplit(url)
    variable = given.get(parts.netloc.lower()) or given.get((parts.hostname or "").lower())
    if variable is None:
        at = provider or provider_at(url)
        variable = at.key if at is not None else None
    value = os.environ.get(variable, "").strip() if variable is not None else ""
    if not variable or not value:
        return None
    if not value.isascii() or not value.isprintable():
        raise QuotaError(
            f"{variable}: holds a line break or another sign that no key has. Set it anew."
        )
    return Key(variable, value)


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"https": 443, "http": 80}.get(parts.scheme)
