"""The loops that people write by hand, to measure `srt` against: a client, a semaphore, a gather.

    python bench/plain_clients.py openai http://127.0.0.1:8000/v1 --calls 2000 --in-flight 128

`openai` is AsyncOpenAI as it comes, `openai-aiohttp` the same on its aiohttp transport, `aiohttp` a
bare loop without any client, the least that Python can do. None of them keeps anything. `curator` is
bespokelabs-curator, which does (`make bench-peers` installs it).
"""

import argparse
import asyncio
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

Ask = Callable[[dict[str, Any]], Awaitable[str]]


def body_of(number: int) -> dict[str, Any]:
    """A request of the size of a critic's."""
    turn = {"role": "user", "content": f"Prompt {number}: " + "say something grand. " * 60}
    return {"model": "bench", "messages": [turn], "max_tokens": 512, "temperature": 0}


async def open_openai(url: str, in_flight: int, aiohttp_transport: bool) -> Ask:
    import openai

    transport = openai.DefaultAioHttpClient if aiohttp_transport else openai.DefaultAsyncHttpxClient
    client = openai.AsyncOpenAI(base_url=url, api_key="none", http_client=transport())

    async def ask(body: dict[str, Any]) -> str:
        reply = await client.chat.completions.create(**body)
        return reply.choices[0].message.content or ""

    return ask


async def open_aiohttp(url: str, in_flight: int, stack: AsyncExitStack) -> Ask:
    import aiohttp

    connector = aiohttp.TCPConnector(limit=in_flight)
    session = await stack.enter_async_context(aiohttp.ClientSession(connector=connector))

    async def ask(body: dict[str, Any]) -> str:
        while True:
            async with session.post(f"{url}/chat/completions", json=body) as response:
                if response.status == 429:
                    await asyncio.sleep(float(response.headers["retry-after"]))
                    continue
                reply = await response.json()
                return str(reply["choices"][0]["message"]["content"])

    return ask


async def ask_all(kind: str, url: str, calls: int, in_flight: int) -> None:
    async with AsyncExitStack() as stack:
        if kind == "aiohttp":
            ask = await open_aiohttp(url, in_flight, stack)
        else:
            ask = await open_openai(url, in_flight, kind == "openai-aiohttp")
        room = asyncio.Semaphore(in_flight)

        async def one(number: int) -> str:
            async with room:
                return await ask(body_of(number))

        answers = await asyncio.gather(*(one(number) for number in range(calls)))
    assert all(answers)


def ask_curator(url: str, calls: int, in_flight: int) -> None:
    """The same by bespokelabs-curator, with limits that never bind, and nothing fetched from outside."""
    import importlib.util
    import os

    litellm = importlib.util.find_spec("litellm")
    assert litellm is not None
    assert litellm.origin is not None
    tokenizers = os.path.join(os.path.dirname(litellm.origin), "litellm_core_utils/tokenizers")
    os.environ |= {
        "LITELLM_LOCAL_MODEL_COST_MAP": "True",
        "TIKTOKEN_CACHE_DIR": tokenizers,
        "TELEMETRY_ENABLED": "false",
        "CURATOR_CACHE_DIR": os.path.abspath("curator"),
    }
    from bespokelabs import curator

    bodies = [body_of(number) for number in range(calls)]
    model = curator.LLM(
        model_name="bench",
        backend="openai",
        generation_params={"max_tokens": 512, "temperature": 0},
        backend_params={
            "base_url": url,
            "max_requests_per_minute": 10_000_000,
            "max_tokens_per_minute": 10_000_000_000,
            "max_concurrent_requests": in_flight,
        },
    )
    answers = model([body["messages"][0]["content"] for body in bodies])
    assert len(getattr(answers, "dataset", answers)) == calls


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("kind", choices=["openai", "openai-aiohttp", "aiohttp", "curator"])
    parser.add_argument("url")
    parser.add_argument("--calls", type=int, default=2000)
    parser.add_argument("--in-flight", type=int, default=128)
    asked = parser.parse_args()
    if asked.kind == "curator":
        ask_curator(asked.url, asked.calls, asked.in_flight)
        raise SystemExit
    asyncio.run(ask_all(asked.kind, asked.url, asked.calls, asked.in_flight))
