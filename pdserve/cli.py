"""The command line: its words, and what to call for them."""

import argparse
import os
import sys
from collections.abc import Callable
from pathlib import Path

from shared import __version__
from shared.errors import PDServeError, SettingsInvalid


def main() -> None:
    """Runs one command; a known error becomes one sentence and exit code 1."""
    arguments = parser().parse_args()
    try:
        code = arguments.run(arguments)
        sys.stdout.flush()
        sys.exit(code)
    except PDServeError as error:
        sys.exit(f"pdserve: {error}")
    except KeyboardInterrupt:
        sys.exit(130)
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
    _add_operators_commands(commands)
    return root


def _add_up(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    up = commands.add_parser("up", help="start everything on this machine and serve until Ctrl-C")
    up.add_argument(
        "--model",
        help="a folder or the id of a model on the hub (default: the demonstration model)",
    )
    up.add_argument("--model-name", help="the name that clients use (default: the last part of --model)")
    up.add_argument("--prefill", type=_count, metavar="N", help="prefill instances to begin with (default 1)")
    up.add_argument("--decode", type=_count, metavar="N", help="decode instances to begin with (default 1)")
    up.add_argument("--spares", type=_number, default=0, metavar="N", help="instances without a role (default 0)")
    up.add_argument(
        "--max-instances", type=_count, default=0, metavar="N", help="start up to so many as the controller asks"
    )
    up.add_argument(
        "--groups", metavar="FILE", help="groups and their scenarios (docs/groups.md), in place of the above"
    )
    up.add_argument("--control", choices=["auto", "advise", "off"], help="whether roles follow the load (default auto)")
    up.add_argument(
        "--engine", choices=["torch", "mock"], help="mock computes nothing: it waits, and its text is noise"
    )
    up.add_argument("--mock-times", metavar="TIMES", help="how long the mock engine takes (docs/operations.md)")
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
        "--nats-open",
        action="store_true",
        default=None,
        help="start our own NATS server without accounts: everybody may publish and subscribe everywhere",
    )
    up.add_argument(
        "--redis", metavar="URL", help="a Redis server to use (default: PDSERVE_REDIS_URL, or one of our own)"
    )
    up.set_defaults(run=_run_up)


def _add_status(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    status = commands.add_parser("status", help="show groups, instances and gateways")
    _add_nats(status)
    status.add_argument("--json", action="store_true", help="as JSON")
    status.set_defaults(run=_run_status)


def _add_operators_commands(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    groups = commands.add_parser("groups", help="show groups, their scenarios and their load")
    _add_nats(groups)
    groups.set_defaults(run=_run_groups)

    flip = commands.add_parser("flip", help="give an instance another role, or another group, while it runs")
    flip.add_argument("instance", help="its id, or the beginning or end of it")
    flip.add_argument("role", choices=["prefill", "decode"])
    flip.add_argument("--group", help="in which group (default: the one that it is in)")
    flip.set_defaults(run=_wish("flip", "instance", "role", "group"))

    drain = commands.add_parser(
        "drain", help="take an instance out of service until it is flipped; what it holds ends or moves"
    )
    drain.add_argument("instance", help="its id, or the beginning or end of it")
    drain.set_defaults(run=_wish("drain", "instance"))

    control = commands.add_parser("control", help="whether roles follow the load")
    control.add_argument("control", choices=["auto", "advise", "off"])
    control.set_defaults(run=_wish("control", "control"))

    upgrade = commands.add_parser("upgrade", help="load another model, instance by instance, while requests run")
    what = upgrade.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help="a folder, as instances see it, or the id of a model on the hub")
    for verb in ("pause", "resume", "abort"):
        what.add_argument(f"--{verb}", action="store_true", help=f"{verb} the one that is under way")
    upgrade.set_defaults(run=_run_upgrade)
    for command in (flip, drain, control, upgrade):
        _add_nats(command)
        command.add_argument("--admin-key", help="the controller's PDSERVE_ADMIN_KEY, if it has one (default: ours)")


def _add_nats(command: argparse.ArgumentParser) -> None:
    command.add_argument("--nats", metavar="URL", help="the NATS server (default: that of `pdserve up` in this folder)")


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
    from pdserve.up import up
    from pdserve.wishes import Wishes, places_of
    from shared import settings
    from shared.groups import default_groups
    from shared.groups_file import read_groups

    model = _given(model=arguments.model, model_name=arguments.model_name)
    servers = _given(nats_url=arguments.nats, redis_url=arguments.redis)
    gateway = _given(http_host=arguments.host, http_port=arguments.port)
    instance = _given(
        dtype=arguments.dtype,
        quantization=arguments.quantization,
        max_model_len=arguments.max_model_len,
        threads=arguments.threads,
        engine=arguments.engine,
        mock_times=arguments.mock_times,
    )
    groups_file = arguments.groups or settings.given("groups")
    if groups_file and (arguments.prefill or arguments.decode):
        raise SettingsInvalid("--prefill and --decode say what the groups file says: leave them out, or --groups")
    groups = read_groups(groups_file) if groups_file else default_groups(arguments.prefill or 1, arguments.decode or 1)
    places = places_of(groups, arguments.spares)
    controller = _given(groups=groups_file and str(Path(groups_file).resolve()), control=arguments.control)
    wishes = Wishes(
        places,
        gateway | model | servers,
        instance | model | servers,
        controller | servers,
        arguments.max_instances,
        _given(nats_open=arguments.nats_open),
    )
    return up(wishes, Path.cwd())


def _run_status(arguments: argparse.Namespace) -> int:
    from pdserve.status import show_status

    return show_status(arguments.nats, as_json=arguments.json, folder=Path.cwd())


def _run_groups(arguments: argparse.Namespace) -> int:
    from pdserve.status import show_groups

    return show_groups(arguments.nats, folder=Path.cwd())


def _run_upgrade(arguments: argparse.Namespace) -> int:
    verb = next((one for one in ("pause", "resume", "abort") if getattr(arguments, one)), "upgrade")
    if arguments.model is not None:
        arguments.model = _model_path(arguments.model)
    return _wish(verb, "model")(arguments)


def _model_path(model: str) -> str:
    """A folder by its whole path, as instances have a working folder of their own; or the id of a model on the hub."""
    if Path(model).is_dir():
        return str(Path(model).resolve())
    if model.startswith((".", "/", "~")):
        raise SettingsInvalid(f"there is no folder {model}: give one that instances see, too, or an id on the hub")
    return model


def _wish(verb: str, *fields: str) -> Callable[[argparse.Namespace], int]:
    """A command that is a wish to the leading controller, with these options as its fields."""

    def run(arguments: argparse.Namespace) -> int:
        from pdserve.admin import wish

        values = {field: getattr(arguments, field) for field in fields}
        return wish(verb, values, arguments.nats, arguments.admin_key, Path.cwd())

    return run


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


def _number(text: str) -> int:
    if not text.isdigit():
        raise argparse.ArgumentTypeError(f"{text!r} is not a number of 0 or more")
    return int(text)


def _port(text: str) -> int:
    if not text.isdigit() or not 0 < int(text) < 65536:
        raise argparse.ArgumentTypeError(f"{text!r} is no port: take one from 1 to 65535")
    return int(text)
