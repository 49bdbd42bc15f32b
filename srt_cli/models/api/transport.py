"""A model behind a server: its address, key and dialect; bytes there and back, and no key comes out."""

import errno
import os
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from importlib import import_module
from typing import Final
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import certifi
import orjson

import srt_cli
from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import ModelOptions, Spec
from srt_cli.models.api.dialect import Answer, Dialect, Manner, NoAnswer
from srt_cli.models.api.providers import (
    KEY_IN_ADDRESS,
    PLAIN,
    Key,
    Provider,
    holds_key,
    key_for,
    providers,
    refuse_no_address,
)

MOST_BYTES: Final = 64 << 20
"""Of a reply; log-probabilities of long ones take some megabytes."""
MOST_RESULT_BYTES: Final = 4 << 30
"""Of a batch's results, which come as one file."""
LONGEST_CONNECT_S: Final = 30.0
MOST_REDIRECTS: Final = 3
REDIRECTS: Final = (301, 302, 303, 307, 308)
LEAST_KEY: Final = 8
"""A shorter key is no secret, and its letters stand in many words."""
BLOTTED: Final = "[key]"


class Redirected(SrtError):
    """A server sent a request on to another host, where it was not meant to go."""


@dataclass
class Endpoint:
    """One address of a model, with what is known of its state."""

    url: str
    headers: Mapping[str, str] = field(repr=False)
    secrets: tuple[str, ...] = field(repr=False)
    timeout_s: float
    in_flight: int = 0
    down: bool = False
    """Nobody was there when it was last asked."""
    lost_at: float = float("-inf")
    due_at: float = 0.0
    """When to try it again, while another is not down."""
    succeeded_at: float = float("-inf")
    """When it last served a request."""
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)
    _proxies: dict[str, str | None] = field(default_factory=dict, repr=False)
    """By address without its path: finding one reads the whole environment."""

    async def get(self, path: str) -> Answer:
        """Fetch a path below the address, or an address on its host; raises `NoAnswer`."""
        return await self.send("GET", path, None, "")

    async def post(self, path: str, body: object) -> Answer:
        """Post a body as JSON; raises `NoAnswer` when nothing comes back."""
        return await self.send("POST", path, orjson.dumps(body), "application/json")

    async def send(self, method: str, path: str, content: bytes | None, kind: str) -> Answer:
        """Any request; raises `NoAnswer`, and `Redirected` where it would go to another host."""
        url = self._address(path)
        for _ in range(MOST_REDIRECTS):
            answer = await self._ask(method, url, content, kind)
            if answer.status not in REDIRECTS or "location" not in answer.headers:
                return answer
            there = urljoin(url, answer.headers["location"])
            if not _same_host(url, there):
                raise Redirected(
                    f"{self.url}: sends requests on to another host ({_host(there)}), which is not "
                    "followed. If it is the right one, give its address instead."
                )
            url = there
        raise NoAnswer("malformed reply", "redirected again and again")

    @property
    def due(self) -> bool:
        """Whether to send it a request: while it is down, one at a time, and not too often."""
        return not self.down or (not self.in_flight and self.due_at <= time.monotonic())

    def lost(self, seconds: float) -> None:
        """Nobody is there; it is due again after some seconds."""
        self.down, self.lost_at = True, time.monotonic()
        self.due_at = self.lost_at + seconds

    def served(self) -> None:
        """A request was served."""
        self.down, self.succeeded_at = False, time.monotonic()

    async def close(self) -> None:
        """Give the connections back."""
        if self._session is not None:
            await self._session.close()

    def _address(self, path: str) -> str:
        if not path.startswith(("http://", "https://")):
            return self.url + path
        if not _same_host(self.url, path):
            raise Redirected(f"{self.url}: names an address on another host ({_host(path)}).")
        return path

    async def _ask(self, method: str, url: str, content: bytes | None, kind: str) -> Answer:
        headers = {"user-agent": f"srt/{srt_cli.__version__}", **self.headers}
        if kind:
            headers["content-type"] = kind
        most_bytes = MOST_RESULT_BYTES if method == "GET" else MOST_BYTES
        try:
            async with self.open().request(
                method,
                url,
                data=content,
                headers=headers,
                proxy=self._proxy_for(url),
                allow_redirects=False,
            ) as response:
                told = await _read(response, most_bytes)
                return Answer(response.status, response.headers, self.blot(told, response.status))
        except (aiohttp.ClientError, OSError) as error:
            cause, said = self._why(error)
            raise NoAnswer(cause, blot_text(said, self.secrets)) from None

    def _why(self, error: Exception) -> tuple[str, str]:
        """Why no reply came: the cause, and the words for it."""
        match error:
            case aiohttp.ConnectionTimeoutError():
                return "no connection", "timed out"
            case TimeoutError():
                return "timeout", f"no whole reply within {self.timeout_s:g} s"
            case aiohttp.ClientPayloadError():
                return "torn reply", "the connection closed in the middle of a reply"
            case aiohttp.ClientResponseError():
                return "malformed reply", error.message.partition("\n")[0].rstrip(":")
            case aiohttp.ClientConnectorCertificateError():
                return "not trusted", str(error.certificate_error)
            case _ if (refused := _of_tls(str(error))) is not None:
                return "wrong address", refused
            case aiohttp.ClientConnectorDNSError():
                return "wrong address", f"host not found: {error.host}"
            case aiohttp.ClientProxyConnectionError():
                return "no connection", f"the proxy {error.host}: {in_words(error.os_error)}"
            case aiohttp.ClientConnectorError():
                return "no connection", in_words(error.os_error)
            case aiohttp.ServerDisconnectedError():
                return "connection lost", "connection closed before a reply"
        said = in_words(error) if isinstance(error, OSError) else str(error)
        return "connection lost", said or type(error).__name__

    def _proxy_for(self, url: str) -> str | None:
        parts = urlsplit(url)
        place = f"{parts.scheme}://{parts.netloc}"
        if place not in self._proxies:
            self._proxies[place] = _named_proxy(parts.scheme, parts.hostname or "")
        return self._proxies[place]

    def open(self) -> aiohttp.ClientSession:
        """The session, made when it is first asked for, within the loop that uses it."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # How many connections there are is the caller's affair.
                connector=aiohttp.TCPConnector(limit=0, ssl=_trusted(self.url)),
                timeout=aiohttp.ClientTimeout(
                    total=self.timeout_s, sock_connect=min(LONGEST_CONNECT_S, self.timeout_s)
                ),
            )
        return self._session

    def blot(self, content: bytes, status: int) -> bytes:
        """Content without what it echoes of the key; in an error, also without a part of it."""
        for secret in self.secrets:
            for form in {secret, secret.replace("/", "\\/")}:
                content = content.replace(form.encode(), BLOTTED.encode())
            if status >= 400:
                part = partial(_without_part, secret.encode())
                content = _WORD.sub(part, content)
        return content


_WORD: Final = re.compile(rb"""[^\s"'\\,]{6,}""")


def _without_part(secret: bytes, word: re.Match[bytes]) -> bytes:
    """A word of an error; errors quote a key by its beginning, or with stars before its end."""
    starred = b"**" in word[0] and secret[-4:] in word[0]
    return BLOTTED.encode() if starred or secret[:6] in word[0] else word[0]


def _trusted(url: str) -> ssl.SSLContext | bool:
    """Whose certificates count: those that certifi brings, or the user's own where they are named."""
    if url.startswith("http://"):
        return True
    own = "SSL_CERT_FILE" in os.environ or "SSL_CERT_DIR" in os.environ
    return ssl.create_default_context(cafile=None if own else certifi.where())


def _named_proxy(scheme: str, host: str) -> str | None:
    """The proxy that the environment names for a host.

    aiohttp would find it too (`trust_env`), and put a password of .netrc in the place of our key.
    """
    if proxy_bypass(host):
        return None
    proxies = getproxies()
    return proxies.get(scheme) or proxies.get("all")


_OF_OPENSSL: Final = re.compile(r"\[SSL(?:: \w+)?\] (.+?)(?: \(_ssl|\]|$)")
CLOSED_IN_TLS: Final = "eof"
NOT_TLS: Final = (
    "wrong version number",
    "record layer failure",
    "unknown protocol",
    "http request",
    "packet length too long",
)
"""What OpenSSL says of bytes that are no TLS, over its versions."""


def _of_tls(said: str) -> str | None:
    """Why two sides do not come together in TLS; None when that is not the trouble."""
    told = _OF_OPENSSL.search(said)
    if told is None or CLOSED_IN_TLS in told[1].lower():
        return None
    return "it speaks no TLS" if told[1].lower() in NOT_TLS else f"TLS: {told[1]}"


def in_words(error: OSError) -> str:
    """What the system says of a connection: "connection refused" rather than its number and address."""
    numbers = [error.errno or 0, *map(int, re.findall(r"\[Errno (\d+)\]", str(error)))]
    # A name may stand for several addresses, of which one is not even tried.
    number = errno.ECONNREFUSED if errno.ECONNREFUSED in numbers else numbers[-1]
    # Names that are not found are numbered below 0, which the system has no words for.
    said = os.strerror(number) if number > 0 else error.strerror or str(error)
    return said[:1].lower() + said[1:] or "connection closed"


def blot_text(text: str, secrets: Iterable[str]) -> str:
    """A text without these secrets."""
    for secret in secrets:
        text = text.replace(secret, BLOTTED)
    return text


def _same_host(one: str, other: str) -> bool:
    """Whether a key that may go to one may go to the other: the same host, and no less safe."""
    here, there = urlsplit(one), urlsplit(other)
    if here.hostname != there.hostname:
        return False
    safer = here.scheme == "http" and there.scheme == "https"
    return (here.scheme, here.port) == (there.scheme, there.port) or safer


def _host(address: str) -> str:
    return urlsplit(address).netloc


async def _read(response: aiohttp.ClientResponse, most_bytes: int) -> bytes:
    parts, size = [], 0
    async for part in response.content.iter_any():
        size += len(part)
        if size > most_bytes:
            raise NoAnswer("malformed reply", f"more than {most_bytes >> 20} MiB")
        parts.append(part)
    return b"".join(parts)


# --- Who serves a model -----------------------------------------------------------------------


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
    for url in urls:
        refuse_no_address(url, (parsed.provider and provider.address_variable) or spec)
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
        thinking=provider.thinking,
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
