"""A headless Chromium for tests of pages, spoken to over its own debugging protocol."""

import asyncio
import base64
import json
import re
import shutil
import subprocess
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiohttp

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("chrome")

ANOTHER_TAB = "history.replaceState(null, '')"
"""An expression after which a page knows what the browser keeps, and no more what its tab keeps."""

RELOAD = "location.reload()"
"""An expression after which the page is awaited again."""


@dataclass
class Page:
    """What became of a page: the values of expressions, what it asked for, its complaints."""

    values: list[Any] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)
    complaints: list[str] = field(default_factory=list)
    pdf: bytes = b""
    saved: list[str] = field(default_factory=list)
    """Names of the files that it had the browser save."""
    downloads_open: int = 0


@dataclass(frozen=True)
class View:
    """How a page is looked at."""

    width: int = 1000
    scheme: str = "light"
    media: str = ""
    """`print` shows on the screen what the style says for paper."""
    photograph: Path | None = None
    """Where a picture of the whole page goes, for people."""
    printed: bool = False
    """Whether it is printed too, as PDF (A4)."""


def visit(path: Path, *expressions: str, **view: Any) -> Page:
    """Open a file and evaluate expressions one after the other; `view` is as in `View`."""
    return asyncio.run(_visit(path, expressions, View(**view)))


async def _visit(path: Path, expressions: tuple[str, ...], view: View) -> Page:
    assert CHROMIUM
    profile = path.parent / "chromium-profile"
    process = subprocess.Popen(
        [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0",
         "--no-first-run", f"--user-data-dir={profile}", "about:blank"],
        stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
    )  # fmt: skip
    try:
        assert process.stderr
        address = next(
            found[0] for line in process.stderr if (found := re.findall(r"ws://\S+", line))
        )
        port = address.split(":")[2].split("/")[0]
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json/list") as reply:
                (tab,) = [each for each in await reply.json() if each["type"] == "page"]
            async with session.ws_connect(tab["webSocketDebuggerUrl"], max_msg_size=0) as socket:
                return await _drive(socket, path, expressions, view)
    finally:
        process.kill()
        process.wait()
        shutil.rmtree(profile, ignore_errors=True)


async def _drive(
    socket: aiohttp.ClientWebSocketResponse, path: Path, expressions: tuple[str, ...], view: View
) -> Page:
    page = Page()
    loaded = False
    count = 0

    async def read() -> dict[str, Any]:
        nonlocal loaded
        message = json.loads((await socket.receive(timeout=60)).data)
        given = message.get("params", {})
        match message.get("method"):
            case "Network.requestWillBeSent":
                page.requests.append(given["request"]["url"])
            case "Runtime.exceptionThrown":
                page.complaints.append(given["exceptionDetails"]["text"])
            case "Log.entryAdded":
                page.complaints.append(given["entry"]["text"])
            case "Page.loadEventFired":
                loaded = True
            case "Page.downloadWillBegin":
                page.saved.append(given["suggestedFilename"])
                page.downloads_open += 1
            case "Page.downloadProgress":
                page.downloads_open -= given["state"] != "inProgress"
        return message

    async def call(method: str, **parameters: Any) -> Any:
        nonlocal count
        count += 1
        await socket.send_json({"id": count, "method": method, "params": parameters})
        while True:
            message = await read()
            if message.get("id") == count:
                assert "error" not in message, message
                return message["result"]

    for domain in ("Page", "Runtime", "Network", "Log"):
        await call(f"{domain}.enable")
    await call(
        "Emulation.setDeviceMetricsOverride",
        width=view.width, height=900, deviceScaleFactor=1, mobile=False,
    )  # fmt: skip
    await call(
        "Emulation.setEmulatedMedia",
        media=view.media,
        features=[{"name": "prefers-color-scheme", "value": view.scheme}],
    )
    # What a page saves comes to lie beside it.
    await call("Page.setDownloadBehavior", behavior="allow", downloadPath=str(path.parent))
    await call("Page.navigate", url=path.resolve().as_uri())
    while not loaded:
        await read()
    for expression in expressions:
        loaded = expression != RELOAD
        found = await call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in found, found
        page.values.append(found["result"].get("value"))
        while not loaded:
            await read()
    while page.downloads_open:
        await read()
    if view.photograph is not None:
        picture = await call("Page.captureScreenshot", captureBeyondViewport=True)
        view.photograph.write_bytes(base64.b64decode(picture["data"]))
    if view.printed:
        paper = await call("Page.printToPDF", paperWidth=8.27, paperHeight=11.69)
        page.pdf = base64.b64decode(paper["data"])
    return page
