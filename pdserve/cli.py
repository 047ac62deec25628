"""The command line: its words, and what to call for them."""

import argparse
import os
import sys
from pathlib import Path

from shared import __version__
from shared.errors import PDServeError


def main() -> None:
    """Runs one command; a known error becomes one sentence and exit code 1."""
    arguments = parser().parse_args()
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except PDServeError as error:
        sys.exit(f"pdserve: {error}")
    except BrokenPipeError:
        # Whoever read us has had enough (`pdserve status | head`); python would complain once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)


def parser() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="pdserve", description="Serve a language model with prefill and decode apart.")
    root.add_argument("--version", action="version", version=f"pdserve {__version__}")
    commands = root.add_subparsers(required=True, metavar="COMMAND")
    _add_up(commands)
    _add_status(commands)
    _add_chat(commands)
    return root


def _add_up(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    up = commands.add_parser("up", help="start everything on this machine and serve until Ctrl-C")
    up.add_argument(
        "--model",
        help="a folder or the id of a model on the hub (default: the demonstration model)",
    )
    up.add_argument("--model-name", help="the name that clients use (default: the last part of --model)")
    up.add_argument("--prefill", type=_count, default=1, metavar="N", help="prefill instances (default 1)")
    up.add_argument("--decode", type=_count, default=1, metavar="N", help="decode instances (default 1)")
    up.add_argument("--host", help="address of the HTTP API (default 127.0.0.1)")
    up.add_argument("--port", type=_port, help="port of the HTTP API (default 8000)")
    up.add_argument("--quantization", choices=["none", "int8"], help="of the weights (default none)")
    up.add_argument("--dtype", choices=["float32", "bfloat16"], help="of weights and KV (default float32)")
    up.add_argument(
        "--max-model-len", type=_count, help="longest request in tokens, prompt and answer (default: the model's)"
    )
    up.add_argument("--threads", type=_count, help="torch threads of an instance (default: cores / instances)")
    up.add_argument("--nats", metavar="URL", help="a NATS server to use (default: PDSERVE_NATS_URL, or one of our own)")
    up.add_argument(
        "--redis", metavar="URL", help="a Redis server to use (default: PDSERVE_REDIS_URL, or one of our own)"
    )
    up.set_defaults(run=_run_up)


def _add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    status = commands.add_parser("status", help="show groups, instances and gateways")
    status.add_argument("--nats", metavar="URL", help="the NATS server (default: that of `pdserve up` in this folder)")
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_run_status)


def _add_chat(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    chat = commands.add_parser("chat", help="talk with the model")
    chat.add_argument("--url", help="the HTTP API (default: that of `pdserve up` in this folder)")
    chat.add_argument("--api-key", help="the key, if the API wants one")
    chat.add_argument("--model", help="the model's name (default: the first one served)")
    chat.add_argument("--max-tokens", type=_count, help="longest answer in tokens")
    chat.add_argument("--temperature", type=float, help="0 for the likeliest answer")
    chat.set_defaults(run=_run_chat)


# Each command imports its own modules: `pdserve status` should not wait for what `pdserve up` needs.
def _run_up(arguments: argparse.Namespace) -> int:
    from pdserve.up import Wishes, up

    model = _given(model=arguments.model, model_name=arguments.model_name)
    servers = _given(nats_url=arguments.nats, redis_url=arguments.redis)
    gateway = _given(http_host=arguments.host, http_port=arguments.port)
    instance = _given(
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_model_len=arguments.max_model_len,
        threads=arguments.threads,
    )
    wishes = Wishes(arguments.prefill, arguments.decode, gateway | model | servers, instance | model | servers)
    return up(wishes, Path.cwd())


def _run_status(arguments: argparse.Namespace) -> int:
    from pdserve.status import show_status

    return show_status(arguments.nats, as_json=arguments.json, folder=Path.cwd())


def _run_chat(arguments: argparse.Namespace) -> int:
    from pdserve.chat import Talk, talk

    return talk(
        Talk(arguments.url, arguments.api_key, arguments.model, arguments.max_tokens, arguments.temperature), Path.cwd()
    )


def _given(**options: object) -> dict[str, object]:
    """The options that the command line has; the environment and the defaults decide about the others."""
    return {name: value for name, value in options.items() if value is not None}


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 1 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: take one from 1 to 65535")
    return int(text)
