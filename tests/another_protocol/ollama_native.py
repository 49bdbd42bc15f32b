"""Ollama's own protocol, as a dialect that the package does not have: what adding one takes."""

from srt_cli.models.api.dialect import Heard, NoAnswer, Refused, as_count, as_mapping, as_text
from srt_cli.records import Usage


class OllamaNative:
    """`POST /api/chat`, without streaming."""

    gives_logprobs = False
    batches = None
    path = "/api/chat"

    def __init__(self, manner):
        self.manner = manner

    def headers(self, key):
        return self.manner.key_headers(key)

    def body(self, request):
        options = {"num_predict": request.max_tokens, "temperature": request.temperature}
        if request.stop:
            options["stop"] = list(request.stop)
        if request.temperature > 0:
            options["seed"] = request.seed + request.sample
        messages = [{"role": turn.role, "content": turn.content} for turn in request.messages]
        asked = {"model": self.manner.model, "messages": messages, "options": options}
        return asked | {"stream": False} | self.manner.extra

    def read(self, data):
        told = as_mapping(data)
        message = as_mapping(told.get("message"))
        if "content" not in message:
            raise NoAnswer("malformed reply", repr(str(data)[:60]))
        usage = Usage(
            prompt_tokens=as_count(told.get("prompt_eval_count")),
            completion_tokens=as_count(told.get("eval_count")),
        )
        finish = "length" if told.get("done_reason") == "length" else "stop"
        return Heard(as_text(message["content"]), finish, as_text(message.get("thinking")), usage)

    def refusal(self, answer):
        return Refused(answer)

    def adapt(self, refused, request, sent):
        return None

    async def offered(self, wire):
        return None

    def describe(self):
        return {"protocol": "ollama"}


DIALECT = OllamaNative
