"""Bytes to a server and back: one address with its key, and nothing of the key comes back out."""

import os
import re
import ssl
import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Final
from urllib.parse import urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

import aiohttp
import certifi
import orjson

import srt_cli
from srt_cli.errors import SrtError
from srt_cli.models.api.dialect import Answer, NoAnswer, Upload

MOST_BYTES: Final = 64 << 20
"""Of a reply; log-probabilities of long ones take some megabytes."""
MOST_RESULT_BYTES: Final = 4 << 30
"""Of a batch's results, which come as one file."""
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
    down_until: float = 0.0
    successes: int = 0
    _session: aiohttp.ClientSession | None = field(default=None, repr=False)

    async def get(self, path: str) -> Answer:
        """Fetch a path below the address, or an address on its host; raises `NoAnswer`."""
        return await self._ask("GET", self._address(path), MOST_RESULT_BYTES)

    async def post(self, path: str, body: object) -> Answer:
        """Post a body as JSON, an `Upload` as a form; raises `NoAnswer` when nothing comes back."""
        data = body if isinstance(body, Upload) else orjson.dumps(body)
        return await self._ask("POST", self._address(path), MOST_BYTES, data)

    @property
    def up(self) -> bool:
        """Whether the endpoint is not known to be down."""
        return self.down_until <= time.monotonic()

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

    async def _ask(
        self, method: str, url: str, most_bytes: int, data: bytes | Upload | None = None
    ) -> Answer:
        for _ in range(MOST_REDIRECTS):
            answer = await self._ask_once(method, url, most_bytes, data)
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

    async def _ask_once(
        self, method: str, url: str, most_bytes: int, data: bytes | Upload | None
    ) -> Answer:
        headers = {"user-agent": f"srt/{srt_cli.__version__}", **self.headers}
        if isinstance(data, bytes):
            headers["content-type"] = "application/json"
        try:
            body = _form(data) if isinstance(data, Upload) else data
            async with self.open().request(
                method,
                url,
                data=body,
                headers=headers,
                proxy=_proxy_for(url),
                allow_redirects=False,
            ) as response:
                content = await _read(response, most_bytes)
                return Answer(
                    response.status, response.headers, self.blot(content, response.status)
                )
        except TimeoutError as error:
            raise NoAnswer("timeout", f"no whole reply within {self.timeout_s:g} s") from error
        except (aiohttp.ClientError, OSError) as error:
            torn = isinstance(error, aiohttp.ClientPayloadError | aiohttp.ClientResponseError)
            cause = "malformed reply" if torn else "no connection"
            said = str(error) or type(error).__name__
            raise NoAnswer(cause, blot_text(said, self.secrets)) from None

    def open(self) -> aiohttp.ClientSession:
        """The session, made when it is first asked for, within the loop that uses it."""
        if self._session is None:
            self._session = aiohttp.ClientSession(
                # How many connections there are is the caller's affair.
                connector=aiohttp.TCPConnector(limit=0, ssl=_trusted(self.url)),
                timeout=aiohttp.ClientTimeout(total=self.timeout_s),
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


def _proxy_for(url: str) -> str | None:
    """The proxy that the environment names for an address.

    aiohttp would find it too (`trust_env`), and put a password of .netrc in the place of our key.
    """
    parts = urlsplit(url)
    proxies = getproxies()
    if proxy_bypass(parts.hostname or ""):
        return None
    return proxies.get(parts.scheme) or proxies.get("all")


def _form(upload: Upload) -> aiohttp.FormData:
    form = aiohttp.FormData(dict(upload.fields))
    form.add_field("file", upload.content, filename=upload.name)
    return form


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
