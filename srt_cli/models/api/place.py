"""Where an API model is, with which key, and how it is asked there."""

import os
from dataclasses import dataclass, field
from hashlib import blake2b
from importlib import import_module

import orjson

from srt_cli.errors import QuotaError, UsageError
from srt_cli.models import ModelOptions, Spec
from srt_cli.models.api.dialect import Dialect, Manner
from srt_cli.models.api.providers import (
    KEY_IN_ADDRESS,
    PLAIN,
    Key,
    Provider,
    holds_key,
    key_for,
    providers,
)
from srt_cli.models.api.transport import LEAST_KEY, Endpoint


@dataclass(frozen=True)
class Place:
    """Where an API model is: its addresses with their keys, its dialect, its name in the journal."""

    provider: Provider
    manner: Manner
    urls: tuple[str, ...]
    keys: tuple[Key | None, ...] = field(repr=False)
    identity: str

    def open_dialect(self) -> Dialect:
        """The dialect that is spoken there, as the table of providers names it."""
        return _dialect_called(self.provider.dialect)(self.manner)

    def endpoints(self, dialect: Dialect, timeout_s: float) -> list[Endpoint]:
        """A connection for each address, with the key that belongs to it."""
        return [
            Endpoint(
                url,
                dialect.headers(key.value if key is not None else None),
                (key.value,) if key is not None and len(key.value) >= LEAST_KEY else (),
                timeout_s,
            )
            for url, key in zip(self.urls, self.keys, strict=True)
        ]

    def how_to_give_a_key(self) -> str:
        """What to do about a key that is refused, or missing."""
        variables = {key.variable for key in self.keys if key is not None}
        if variables or self.provider.key is not None:
            return f"Set {', '.join(sorted(variables)) or self.provider.key} to a valid one."
        return "Name the environment variable that holds its key: --api-key HOST=VARIABLE."


def _dialect_called(name: str) -> type[Dialect]:
    dialect: type[Dialect] = import_module(f"srt_cli.models.api.{name}").DIALECT
    return dialect


def dialects() -> list[Dialect]:
    """Every dialect that some provider speaks, to no model in particular."""
    names = sorted({provider.dialect for provider in providers().values()})
    return [_dialect_called(name)(Manner("")) for name in names]


def place_of(spec: str, parsed: Spec, options: ModelOptions) -> Place:
    """Where an API model is; raises `QuotaError` when a provider is to be asked without a key."""
    name = parsed.name
    if parsed.provider is None:
        provider, urls = PLAIN, parsed.endpoints
        identity = f"http:{','.join(sorted(urls))}#{name}"
    else:
        provider = providers()[parsed.provider]
        if not provider.url:
            raise UsageError(f"{spec}: set {provider.address_variable} to the address of your own.")
        if holds_key(provider.url):
            raise UsageError(f"{provider.address_variable}: {KEY_IN_ADDRESS}")
        urls = (provider.url,)
        told = os.environ.get(provider.address_variable or "")
        identity = f"{parsed.provider}:{name}" + (f"@{told}" if told else "")
    named = provider if parsed.provider is not None else None
    keys = tuple(key_for(url, options.api_keys, named) for url in urls)
    if provider.key is not None and keys == (None,) and not options.offline:
        whose = "the OpenAI API" if parsed.provider == "openai" else parsed.provider
        raise QuotaError(
            f"{spec}: no key for {whose}. Set {provider.key}, or name another "
            "model (a directory, http://HOST/v1#NAME, python:FILE:CALLABLE)."
        )
    version = os.environ.get(provider.version_variable or "") or provider.version
    told_headers = {
        header: value
        for header, variable in provider.header_variables.items()
        if (value := os.environ.get(variable))
    }
    manner = Manner(
        name,
        path=provider.path.replace("{version}", version) if provider.path else None,
        token_field=provider.token_field,
        key_header=provider.key_header,
        headers=told_headers,
        refuses=provider.refuses,
        renames=provider.renames,
        switches_thinking=parsed.provider is None,
        effort=options.effort,
        extra=dict(options.extra_body),
    )
    return Place(provider, manner, urls, keys, identity + _asked_otherwise(options))


def _asked_otherwise(options: ModelOptions) -> str:
    """What sets a model asked in the user's own manner apart in the journal."""
    if options.effort is None and not options.extra_body:
        return ""
    plain = orjson.dumps([options.effort, options.extra_body], option=orjson.OPT_SORT_KEYS)
    return f"?{blake2b(plain, digest_size=8).hexdigest()}"
