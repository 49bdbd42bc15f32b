"""Many providers in one run: each has its own key, and no key reaches anybody else."""

import dataclasses
import json
import re
import shlex
import subprocess
import sys

import pytest
from aiohttp import web
from batch_server import BatchServer
from conftest import ROOT, read_jsonl, write_jsonl
from loopback_server import Answer, LoopbackServer, as_policy_and_critic
from provider_servers import AnthropicServer, EveryServer
from test_api import ask, requests

from srt_cli.errors import QuotaError, SrtError, UsageError
from srt_cli.models import ModelOptions, open_model, parse_spec
from srt_cli.models.api import transport
from srt_cli.models.api.providers import parse_api_keys, providers

SECRET = "sk-secret-of-openai"


@pytest.fixture
def serve():
    servers = []

    def start(behaviour=as_policy_and_critic, kind=LoopbackServer, **options):
        servers.append(kind(behaviour, **options))
        return servers[-1]

    yield start
    for server in servers:
        server.close()


@pytest.fixture
def own(tmp_path, monkeypatch):
    """Write the user's own file of providers."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "configuration"))

    def write(text):
        folder = tmp_path / "configuration" / "srt"
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "providers.toml").write_text(text)

    return write


def keys_seen(server):
    return {headers.get("authorization") for headers in server.headers}


def test_openais_key_goes_to_no_other_server(srt, serve, tmp_path, monkeypatch):
    """Case 59: the README's pair, a policy on a server of one's own and a critic at OpenAI."""
    policy, openai = serve(), serve()
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", openai.url)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "What?"}])
    finished = srt("collect-feedback", "--model", policy.spec, "--critic", "gpt-4")
    assert finished.code == 0, finished.stderr
    assert keys_seen(policy) == {None}
    assert keys_seen(openai) == {f"Bearer {SECRET}"}


def test_three_providers_in_one_run_each_see_their_own_key(srt, serve, own, tmp_path, monkeypatch):
    one, two, three = serve(), serve(), serve()
    own(
        f'[one]\naddress = "{one.url}"\nkey = "KEY_ONE"\ndialect = "openai_chat"\n'
        f'[two]\naddress = "{two.url}"\nkey = "KEY_TWO"\ndialect = "openai_chat"\n'
    )
    for name in ("ONE", "TWO", "THREE"):
        monkeypatch.setenv(f"KEY_{name}", f"secret-of-{name.lower()}")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": str(n), "prompt": f"q{n}"} for n in range(3)])
    host = three.url.split("/")[2]
    judge = ("--judge", three.spec, "--api-key", f"{host}=KEY_THREE", "--verdicts", "reasoned")
    finished = srt("eval", "--model", "one:tester", "--reference", "two:tester", *judge)
    assert finished.code in (0, 3), finished.stderr
    assert keys_seen(one) == {"Bearer secret-of-one"}
    assert keys_seen(two) == {"Bearer secret-of-two"}
    assert keys_seen(three) == {"Bearer secret-of-three"}


def test_a_key_of_ones_own_goes_to_the_host_it_is_named_for(serve, monkeypatch):
    named, other = serve(), serve()
    monkeypatch.setenv("MINE", "secret-of-mine")
    host = named.url.split("/")[2]
    keys = parse_api_keys([f"{host}=MINE"])
    for server in (named, other):
        ask(server.spec, requests(), api_keys=keys)
    assert keys_seen(named) == {"Bearer secret-of-mine"}
    assert keys_seen(other) == {None}


@pytest.mark.parametrize(
    "given", ["sk-abc", "h=sk-abc-def", "=X", "h=", "http://h/v1=X", "h=gsk_k3y"]
)
def test_a_key_where_its_variable_should_stand_is_refused_and_not_shown(srt, tmp_path, given):
    write_jsonl(tmp_path / "prompts.jsonl", [{"prompt": "p", "response": "r"}])
    finished = srt("collect-feedback", "--critic", "http://h/v1#m", "--api-key", given)
    assert finished.code == 2
    assert "never the key itself" in finished.stderr
    assert "sk-abc" not in finished.stderr
    assert "gsk_k3y" not in finished.stderr
    assert not (tmp_path / "feedback.run.json").exists()


def test_a_found_file_sends_no_key_anywhere(srt, tmp_path, monkeypatch):
    monkeypatch.setenv("MINE", "secret-of-mine")
    (tmp_path / "srt.toml").write_text('[collect-feedback]\napi-key = ["h=MINE"]\n')
    finished = srt("collect-feedback", "--critic", "http://h/v1#m")
    assert finished.code == 1
    assert "sends a key to a host" in finished.stderr


@pytest.mark.parametrize(
    "address",
    ["http://me:pass@h/v1", "http://h/v1?api_key=k", "https://h/sk-abcdefghijklmnopqr/v1"],
)
def test_a_key_in_any_address_is_refused(address, monkeypatch, own):
    with pytest.raises(UsageError, match="would be written to disk"):
        parse_spec(f"{address}#m")
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(UsageError, match="OPENAI_BASE_URL: a key or password"):
        open_model("gpt-4")
    own(f'[mine]\naddress = "{address}"\ndialect = "openai_chat"\n')
    with pytest.raises(UsageError, match=r"\[mine\] address: a key or password"):
        parse_spec("mine:m")


@pytest.mark.parametrize("address", ["localhost:8000/v1", "h/v1", "https://h:port/v1"])
def test_an_address_that_is_none_is_said_at_once(address, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", address)
    with pytest.raises(UsageError, match=f"OPENAI_BASE_URL: '{address}' is no address of a server"):
        open_model("gpt-4")


def test_a_password_in_an_address_that_is_none_is_not_shown():
    with pytest.raises(UsageError, match="would be written to disk"):
        parse_spec("http://me:pass@[::1/v1#m")


def test_what_a_server_echoes_of_a_key_reaches_nothing(srt, serve, tmp_path, monkeypatch):
    def echoes(body, number):
        if number == 1:
            error = {"message": f"slow down, {SECRET}", "param": SECRET}
            return Answer(status=400, error=error)
        return Answer(text=as_policy_and_critic(body, number).text + f"\n{SECRET}")

    server = serve(echoes)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    monkeypatch.setenv("SRT_TRACEBACK", "1")
    rows = [{"id": str(n), "prompt": "p", "response": "r"} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    finished = srt("collect-feedback", "--critic", "gpt-4", "--concurrency", 1)
    assert finished.code == 0, finished.stderr
    written = b"".join(path.read_bytes() for path in tmp_path.iterdir() if path.is_file())
    assert b"[key]" in written
    assert SECRET.encode() not in written
    assert SECRET not in finished.stdout + finished.stderr


@pytest.mark.parametrize(
    "quoted", ["sk-secre***********enai", "sk-secret-of...", "****enai", "sk-*****enai", SECRET]
)
def test_a_part_of_a_key_in_an_error_is_blotted_out_too(serve, monkeypatch, quoted):
    said = f"Incorrect API key provided: {quoted}, see the page."
    server = serve(lambda body, number: Answer(status=401, error={"message": said}))
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    with pytest.raises(QuotaError) as caught:
        ask("gpt-4", requests())
    assert "Incorrect API key provided: [key], see the page" in str(caught.value)


def test_a_password_in_netrc_takes_no_keys_place(serve, tmp_path, monkeypatch):
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password secret-of-netrc\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("MINE", "secret-of-mine")
    server = serve()
    ask(server.spec, requests(), api_keys={"127.0.0.1": "MINE"})
    assert keys_seen(server) == {"Bearer secret-of-mine"}


def test_the_environments_proxy_is_used(serve, monkeypatch):
    proxy = serve()
    monkeypatch.setenv("HTTP_PROXY", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("http_proxy", proxy.url.removesuffix("/v1"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    (reply,) = ask("http://behind.invalid/v1#tester", requests())
    assert reply.status == "ok"
    assert proxy.headers[0]["host"] == "behind.invalid"


def test_a_redirect_to_another_host_is_not_followed(serve, monkeypatch):
    other = serve()
    elsewhere = other.url.replace("127.0.0.1", "localhost") + "/chat/completions"
    server = serve(
        lambda body, number: Answer(status=307, body=b"", headers={"location": elsewhere})
    )
    with pytest.raises(SrtError, match="on to another host"):
        ask(server.spec, requests())
    assert not other.requests


BATCH = ("--batch", "--batch-poll", 0.01)


class SendsOn(BatchServer):
    """Sends those who look at a batch to another host."""

    elsewhere = ""

    async def _look(self, request):
        raise web.HTTPTemporaryRedirect(self.elsewhere)


class RefusesFiles(BatchServer):
    """Takes no file, and quotes the key."""

    async def _upload(self, request):
        said = f"Incorrect API key provided: {request.headers['authorization']}."
        return web.json_response({"error": {"message": said}}, status=401)


def test_batches_tell_openais_key_and_organisation_to_no_other_server(
    srt, serve, tmp_path, monkeypatch
):
    own, openai = serve(kind=BatchServer), serve(kind=BatchServer)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_ORG_ID", "org-of-mine")
    monkeypatch.setenv("OPENAI_BASE_URL", openai.url)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "What?", "response": "That."}])
    for critic, out in ((own.spec, "own.jsonl"), ("gpt-4", "theirs.jsonl")):
        finished = srt("collect-feedback", "--critic", critic, "--out", out, *BATCH)
        assert finished.code == 0, finished.stderr
    assert {headers.get("authorization") for headers in own.told} == {None}
    assert not any("org-of-mine" in headers.values() for headers in own.told)
    assert {headers.get("authorization") for headers in openai.told} == {f"Bearer {SECRET}"}
    assert {headers.get("openai-organization") for headers in openai.told} == {"org-of-mine"}


def test_batches_follow_no_redirect_to_another_host(srt, serve, tmp_path, monkeypatch):
    other, server = serve(kind=BatchServer), serve(kind=SendsOn)
    server.elsewhere = other.url.replace("127.0.0.1", "localhost") + "/batches"
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "What?", "response": "That."}])
    finished = srt("collect-feedback", "--critic", "gpt-4", *BATCH)
    assert finished.code == 1
    assert "sends requests on to another host (localhost" in finished.stderr
    assert not other.told


def test_a_key_that_a_refused_batch_quotes_is_blotted_out(srt, serve, tmp_path, monkeypatch):
    server = serve(kind=RefusesFiles)
    monkeypatch.setenv("OPENAI_API_KEY", SECRET)
    monkeypatch.setenv("OPENAI_BASE_URL", server.url)
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "What?", "response": "That."}])
    finished = srt("collect-feedback", "--critic", "gpt-4", *BATCH)
    assert finished.code == 5
    assert "the key is refused (Incorrect API key provided: Bearer [key]" in finished.stderr
    assert SECRET not in finished.stdout + finished.stderr


def test_an_ordinary_call_does_without_the_openai_package(serve, tmp_path):
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "What?", "response": "That."}])
    program = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'trl', 'datasets', 'openai', 'httpx2'):\n"
        "    sys.modules[name] = None\n"
        f"sys.argv = ['srt', 'collect-feedback', '--critic', {serve().spec!r}]\n"
        "from srt_cli.cli import main; main()"
    )
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, check=True, capture_output=True)
    assert len(read_jsonl(tmp_path / "feedback.jsonl")) == 1


def test_a_redirect_on_the_same_host_is_followed(serve):
    def behaviour(body, number):
        if number == 1:
            return Answer(status=307, body=b"", headers={"location": "/v1/chat/completions"})
        return Answer()

    (reply,) = ask(serve(behaviour).spec, requests())
    assert reply.text == "It is so."


def test_a_provider_without_its_key_is_said_before_any_work(monkeypatch):
    monkeypatch.delenv("DEEPSEEK_API_KEY", raising=False)
    with pytest.raises(QuotaError, match=r"no key for deepseek\. Set DEEPSEEK_API_KEY"):
        open_model("deepseek:deepseek-chat")


def test_a_key_with_a_line_break_is_said_and_not_shown(monkeypatch):
    monkeypatch.setenv("DEEPSEEK_API_KEY", "secret\nof mine")
    with pytest.raises(QuotaError, match="DEEPSEEK_API_KEY: holds a line break") as caught:
        open_model("deepseek:deepseek-chat")
    assert "secret" not in str(caught.value)


def test_an_unknown_provider_is_said_with_those_there_are():
    with pytest.raises(UsageError, match=r"no provider is called 'antrophic'\. There are openai, "):
        parse_spec("antrophic:claude")


def test_every_provider_in_the_table_opens_with_its_key_and_a_dialect(monkeypatch):
    for name, provider in providers().items():
        monkeypatch.setenv(provider.key or "UNUSED", "secret-of-this-one")
        if provider.address_variable:
            monkeypatch.setenv(
                provider.address_variable, provider.address or "https://mine.example"
            )
        model = open_model(f"{name}:some-model", ModelOptions())
        assert model.identity.startswith(f"{name}:some-model")
        model.close()


def test_a_file_of_ones_own_may_change_a_provider_and_a_wrong_one_is_said(own):
    own('[deepseek]\naddress = "https://mine.example/v1"\n')
    assert providers()["deepseek"].address == "https://mine.example/v1"
    assert providers()["deepseek"].key == "DEEPSEEK_API_KEY"
    own('[mine]\naddress = "https://mine.example/v1"\ndialekt = "x"\n')
    with pytest.raises(UsageError, match=r"providers.toml: \[mine\]"):
        providers()


def test_a_configuration_file_that_is_named_may_bring_providers(srt, serve, tmp_path, monkeypatch):
    monkeypatch.setattr("srt_cli.models.api.providers._files", [])
    server = serve()
    table = f'[providers.mine]\naddress = "{server.url}"\ndialect = "openai_chat"\n'
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "q"}])
    (tmp_path / "srt.toml").write_text(table)
    line = ("collect-feedback", "--model", "mine:tester", "--critic", "mine:tester")
    found = srt(*line)
    assert found.code == 2
    assert "no provider is called 'mine'" in found.stderr
    assert srt(*line, "--config", "srt.toml").code == 0
    assert len(server.requests) == 3


TOLD = {"prompt_tokens": 11, "completion_tokens": 7, "cost": 0.25}


@pytest.mark.parametrize(
    "told", [{"headers": {"x-litellm-response-cost": "0.25"}}, {"usage": TOLD}]
)
def test_what_a_server_tells_of_its_cost_counts(srt, serve, tmp_path, told):
    def behaviour(body, number):
        return dataclasses.replace(as_policy_and_critic(body, number), **told)

    server = serve(behaviour)
    rows = [{"id": str(n), "prompt": f"q{n}", "response": "r"} for n in range(3)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--critic", server.spec)
    finished = srt(*line)
    assert "cost: $1.5000, of which $1.5000 in this run" in finished.stderr
    manifest = json.loads((tmp_path / "feedback.run.json").read_text())
    assert manifest["cost"]["dollars"] == 1.5
    capped = srt(
        *line, "--out", "b.jsonl", "--max-cost", 0.6, "--price", "tester=1/1", "--concurrency", 1
    )
    assert capped.code == 4
    assert "spent $0.7500" in capped.stderr


@pytest.mark.parametrize(
    "usage",
    [None, {}, {"prompt_tokens": -4, "completion_tokens": 7}, {"prompt_tokens": 10**12}, [1]],
)
def test_missing_or_absurd_usage_is_estimated_and_said(srt, serve, tmp_path, usage):
    """Case 07: a cap holds although the server does not tell what it used."""
    server = serve(lambda body, number: Answer(text="A fine answer.", usage=usage))
    (tmp_path / "own.py").write_text(
        "def critique(prompt, response):\n"
        "    return {'weaknesses': 'w', 'suggestions': 's', 'score': 6}, response + '!'\n"
    )
    rows = [{"id": str(n), "prompt": f"Question number {n}?"} for n in range(60)]
    write_jsonl(tmp_path / "prompts.jsonl", rows)
    line = ("collect-feedback", "--model", server.spec, "--critic", "python:own.py:critique")
    caps = (
        "--max-cost",
        0.05,
        "--price",
        "tester=100/300",
        "--concurrency",
        1,
        "--max-new-tokens",
        8,
    )
    finished = srt(*line, *caps)
    assert finished.code == 4
    assert finished.stderr.count("does not tell how many tokens a reply took") == 1
    # 13 tokens read and 4 written, at four bytes each: a quarter of a cent a call.
    assert 10 <= len(server.requests) <= 20


LINES = [
    line.strip()
    for line in (ROOT / "docs/providers.md").read_text().replace("\\\n", "").splitlines()
    if line.startswith("    srt collect-feedback") and "--model" in line
]


@pytest.mark.parametrize("line", LINES)
def test_every_line_of_the_document_works(line, srt, serve, own, tmp_path, monkeypatch):
    chat = serve(kind=EveryServer)
    claude = serve(kind=AnthropicServer, key="secret-of-anthropic")
    host = chat.url.split("/")[2]
    tables = []
    for name, provider in providers().items():
        address = claude.address if provider.dialect == "anthropic" else chat.url
        address = address.removesuffix("/v1") if name == "azure" else address
        monkeypatch.setenv(provider.address_variable or "UNUSED", address)
        monkeypatch.setenv(provider.key or "UNUSED", f"secret-of-{name}")
        if not provider.address_variable:
            tables.append(f'[{name}]\naddress = "{address}"\n')
    own("".join(tables))
    monkeypatch.setenv("GPU_KEY", "secret-of-gpu")
    write_jsonl(tmp_path / "prompts.jsonl", [{"id": "a", "prompt": "What?"}])
    finished = srt(*shlex.split(line.replace("gpu-1:8000", host))[1:])
    assert finished.code == 0, finished.stderr
    (row,) = read_jsonl(tmp_path / "feedback.jsonl")
    assert row["status"] == "ok"
    assert len(chat.requests) + len(claude.requests) == 3
    keys = {headers.get("authorization") or headers.get("api-key") for headers in chat.headers}
    specs = re.findall(r"--(?:model|critic) (\S+)", line)
    named = {parse_spec(spec).provider for spec in specs} - {"anthropic", None}
    own_keys = {f"secret-of-{name}" for name in named if providers()[name].key}
    own_keys |= {"secret-of-gpu"} if "GPU_KEY" in line else set()
    assert {key.removeprefix("Bearer ") for key in keys if key} == own_keys
    if "--extra-body" in line:
        draft, critique, score = chat.requests
        assert draft["min_p"] == 0.05
        assert critique["reasoning_effort"] == score["reasoning_effort"] == "high"
        assert "min_p" not in critique


def test_the_environment_is_read_for_a_proxy_once_and_not_for_every_request(serve, monkeypatch):
    read = []
    monkeypatch.setattr(transport, "getproxies", lambda: read.append(1) or {})
    ask(serve().spec, requests(5))
    assert len(read) == 1


def test_azure_is_asked_at_the_deployment_with_its_version_and_its_key(serve, monkeypatch):
    server = serve(kind=EveryServer)
    monkeypatch.setenv("AZURE_OPENAI_ENDPOINT", server.url.removesuffix("/v1"))
    monkeypatch.setenv("AZURE_OPENAI_API_KEY", "secret-of-azure")
    (reply,) = ask("azure:my-deployment", requests())
    assert reply.status == "ok"
    assert server.headers[0]["api-key"] == "secret-of-azure"
    assert "authorization" not in server.headers[0]
