"""`pdserve chat`: a conversation in the terminal, streamed from the HTTP API."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import httpx

from pdserve import runfile
from shared.errors import PDServeError

DEFAULT_URL = "http://127.0.0.1:8000"
HELP = "Write, and Enter. /new starts afresh, Ctrl-C stops an answer, Ctrl-D ends."


class ApiRefused(PDServeError):
    """The HTTP API is not there, or says no."""


@dataclass(frozen=True, slots=True)
class Talk:
    """What the command line asks for."""

    url: str | None
    api_key: str | None
    model: str | None
    max_tokens: int | None
    temperature: float | None


def talk(wishes: Talk, folder: Path) -> int:
    """Talks until Ctrl-D. Raises `ApiRefused` where the API cannot be reached or refuses the key."""
    run = runfile.read(folder)
    url = wishes.url or (run.address if run is not None else DEFAULT_URL)
    headers = {"Authorization": f"Bearer {wishes.api_key}"} if wishes.api_key else {}
    with httpx.Client(base_url=url, headers=headers, timeout=None, trust_env=False) as client:
        model = _model(client, url, wishes.model)
        print(f"{model} at {url}. {HELP}")
        _converse(client, model, wishes)
    return 0


def _converse(client: httpx.Client, model: str, wishes: Talk) -> None:
    messages: list[dict[str, str]] = []
    while True:
        try:
            text = input("> ").strip()
        except KeyboardInterrupt:
            print()
            continue
        except EOFError:
            print()
            return
        if text == "/new":
            messages.clear()
        elif text.startswith("/"):
            print(HELP)
        elif text:
            messages.append({"role": "user", "content": text})
            answer = _print_answer(client, model, messages, wishes)
            if answer:
                messages.append({"role": "assistant", "content": answer})
            else:
                messages.pop()


def _print_answer(client: httpx.Client, model: str, messages: list[dict[str, str]], wishes: Talk) -> str:
    """Prints the answer as it comes and returns it; what there is of it after Ctrl-C, nothing after an error."""
    answer = ""
    try:
        for piece in _stream(client, model, messages, wishes):
            print(piece, end="", flush=True)
            answer += piece
    except KeyboardInterrupt:
        pass
    except (ApiRefused, httpx.TransportError) as error:
        print(f"error: {error or type(error).__name__}")
        return ""
    print()
    return answer


def _stream(client: httpx.Client, model: str, messages: list[dict[str, str]], wishes: Talk) -> Iterator[str]:
    body: dict[str, object] = {"model": model, "messages": messages, "stream": True}
    if wishes.max_tokens is not None:
        body["max_tokens"] = wishes.max_tokens
    if wishes.temperature is not None:
        body["temperature"] = wishes.temperature
    with client.stream("POST", "/v1/chat/completions", json=body) as response:
        if response.status_code != 200:
            response.read()
            raise ApiRefused(_message(response))
        for line in response.iter_lines():
            if not line.startswith("data: ") or line == "data: [DONE]":
                continue
            event = json.loads(line.removeprefix("data: "))
            if "error" in event:
                raise ApiRefused(event["error"]["message"])
            for choice in event["choices"]:
                yield choice["delta"].get("content") or ""


def _model(client: httpx.Client, url: str, wanted: str | None) -> str:
    """The wanted model, or the first one served."""
    try:
        response = client.get("/v1/models", timeout=5.0)
    except httpx.HTTPError as error:
        raise ApiRefused(f"nothing answers at {url} ({error}): start `pdserve up`, or give --url") from error
    if response.status_code != 200:
        raise ApiRefused(_message(response))
    served = [str(one["id"]) for one in response.json()["data"]]
    if wanted is not None and wanted not in served:
        raise ApiRefused(f"{wanted} is not served at {url}, but {', '.join(served)} is")
    return wanted or served[0]


def _message(response: httpx.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"HTTP {response.status_code}"
