"""`pdserve up`: embedded servers, controller, gateway and instances on this machine, until Ctrl-C.

servers -> controller, gateway, instances -> ready -> serve (a child that dies is started again) -> drain, in this
order: gateway first (it takes no more and ends what it has), then instances, controller, servers
"""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from pdserve import checks, runfile
from pdserve.children import Child, Program, last_words
from pdserve.forked import Forked, fork_server
from pdserve.keeping import Asked, Starter, end, say, watch
from pdserve.nats_accounts import NatsUrls, new_accounts
from pdserve.servers import Servers
from pdserve.wishes import Wishes
from shared import settings
from shared.addresses import shown
from shared.errors import PDServeError, SettingsInvalid
from shared.settings import ControllerSettings, GatewaySettings, InstanceSettings, UpSettings
from shared.text.files import read_object

NATS_PORT = 4222
READY_POLL_S = 0.05
KILL_AFTER_S = 5.0


class StartFailed(PDServeError):
    """A service ended before the first request could be served."""


def up(wishes: Wishes, folder: Path) -> int:
    """Serves until SIGINT or SIGTERM; the exit code."""
    asked_to_end = _listen_for_signals()
    gateway = settings.load(GatewaySettings, **wishes.gateway)
    launcher = settings.load(UpSettings, **wishes.launcher)
    # To refuse now what services would refuse.
    checks.refuse_mock_times(settings.load(InstanceSettings, **wishes.instance))
    settings.load(ControllerSettings, **wishes.controller)
    checks.refuse_second_up(folder)
    checks.refuse_port_in_use(gateway.http_host, gateway.http_port)
    started_at = time.monotonic()
    with _scratch(folder) as (logs, scratch):
        servers = Servers(scratch)
        children: list[Child] = []
        try:
            given = gateway.model_fields_set
            nats = NatsUrls.given(gateway.nats_url) if "nats_url" in given else _start_nats(servers, launcher)
            redis_url = gateway.redis_url if "redis_url" in given else servers.start_redis()
            asyncio.run(checks.refuse_absent_servers(nats.of("operator"), redis_url))
            say(f"NATS at {shown(nats.of('operator'))}, Redis at {shown(redis_url)}")
            children = _children(wishes, gateway, nats, redis_url, logs)
            for child in children:
                child.start()
            run = runfile.RunFile(
                pid=os.getpid(),
                nats_url=nats.of("operator"),
                nats_client_url=next(iter(nats.clients.values()), nats.of("operator")),
                redis_url=redis_url,
                address=gateway.local_address,
                logs=str(logs),
            )
            runfile.write(folder, run, nats.clients)
            for name in nats.clients:
                say(f"the NATS URL of {name}, with its password: {runfile.client_path(folder, name)}")
            say(f"loading {gateway.model} for {wishes.summary}; logs: {logs}")
            if wishes.instance.get("engine") == "mock" or settings.given("engine") == "mock":
                say("MOCK ENGINE: nothing is computed, text is noise, and no figure says anything about real serving")
            if _wait_until_ready(gateway, children, asked_to_end, started_at):
                _say_hello(gateway, time.monotonic() - started_at)
                start_more = Starter(wishes, children, nats.of("launcher"))
                watch(children, servers, asked_to_end, start_more)
                start_more.close()
            say("draining (Ctrl-C again to end at once)")
        finally:
            end(children, asked_to_end, gateway.drain_timeout_s + KILL_AFTER_S)
            servers.stop()
            runfile.remove(folder)
    say("ended")
    return 0


def _listen_for_signals() -> Asked:
    asked = Asked()

    def on_signal(number: int, frame: object) -> None:
        asked.times += 1

    signal.signal(signal.SIGINT, on_signal)
    signal.signal(signal.SIGTERM, on_signal)
    signal.signal(signal.SIGHUP, on_signal)
    return asked


def _start_nats(servers: Servers, launcher: UpSettings) -> NatsUrls:
    """Starts our own server: with a user for each role and client, unless it is to be open."""
    if launcher.nats_open:
        return NatsUrls.given(servers.start_nats(_usual_nats_port()))
    clients = launcher.nats_clients.split(",")
    accounts = new_accounts(clients)
    return NatsUrls.of_accounts(accounts, servers.start_nats(_usual_nats_port(), accounts))


def _usual_nats_port() -> int:
    """NATS' own port if nobody has it, so that clients find it there; or any (-1)."""
    try:
        with socket.create_server(("127.0.0.1", NATS_PORT)):
            return NATS_PORT
    except OSError:
        return -1


@contextmanager
def _scratch(folder: Path) -> Iterator[tuple[Path, Path]]:
    """A folder for logs, which stays, and one for sockets and such, whose path is short and which goes."""
    logs = folder / runfile.FOLDER / "logs"
    try:
        shutil.rmtree(logs, ignore_errors=True)
        logs.mkdir(parents=True)
    except OSError as error:
        raise SettingsInvalid(
            f"no folder for logs can be made here ({error}): start in a folder that you may write to"
        ) from error
    with tempfile.TemporaryDirectory(prefix="pdserve-") as scratch:
        yield logs, Path(scratch)


def _children(wishes: Wishes, gateway: GatewaySettings, nats: NatsUrls, redis_url: str, logs: Path) -> list[Child]:
    """All services in the order in which they start: light ones first, since the first instance waits for torch."""

    def urls(user: str) -> dict[str, object]:
        return {"nats_url": nats.of(user), "redis_url": redis_url}

    threads = max(1, (os.cpu_count() or 1) // len(wishes.places))
    instance = {"threads": threads, **wishes.instance, **urls("instance")}
    settings.tame_threads()
    context = fork_server(_modules_of(gateway.model))
    instances: list[Child] = [
        Forked(place.name, {**instance, "role": place.role, "group": place.group}, logs / f"{place.name}.log", context)
        for place in wishes.places
    ]
    return [
        Program("gateway", "services.gateway", {**wishes.gateway, **urls("gateway")}, logs / "gateway.log"),
        Program(
            "controller", "services.controller", {**wishes.controller, **urls("controller")}, logs / "controller.log"
        ),
        *instances,
    ]


def _wait_until_ready(gateway: GatewaySettings, children: list[Child], asked: Asked, started_at: float) -> bool:
    """Whether a request can be served now; False if we were asked to end first."""
    shown = 0.0
    with httpx.Client(trust_env=False, timeout=2.0) as client:
        while not asked:
            for child in children:
                if child.exit_code() is not None:
                    raise StartFailed(
                        f"{child.name} ended before it could serve: {last_words(child.log)} (log: {child.log})"
                    )
            try:
                answer = client.get(f"{gateway.local_address}/health/ready")
                if answer.status_code == 200:
                    return True
            except httpx.TransportError:
                pass
            elapsed = time.monotonic() - started_at
            if elapsed - shown >= 5.0:
                shown = elapsed
                say(f"  {elapsed:3.0f} s: {_progress(children)}")
            time.sleep(READY_POLL_S)
    return False


def _progress(children: list[Child]) -> str:
    """What each instance said last, without time and module."""
    return "; ".join(
        f"{one.name}: {last_words(one.log).split(': ', 1)[-1]}" for one in children if isinstance(one, Forked)
    )


def _modules_of(model: str) -> list[str]:
    """The module of transformers that a local model needs, for the fork server to import beforehand."""
    kind = read_object(Path(model) / "config.json").get("model_type")
    return [f"transformers.models.{kind}.modeling_{kind}"] if isinstance(kind, str) else []


def _say_hello(gateway: GatewaySettings, elapsed_s: float) -> None:
    address = gateway.local_address
    question = '[{"role": "user", "content": "What does os.path.join do?"}]'
    body = f'{{"model": "{gateway.served_model_name}", "messages": {question}}}'
    say(f"ready in {elapsed_s:.1f} s at {address} (OpenAI's API under /v1). Try:\n")
    say(f"  curl {address}/v1/chat/completions -H 'Content-Type: application/json' -d '{body}'\n")
    say(f"or, in this folder: {sys.argv[0]} chat, {sys.argv[0]} status. Ctrl-C ends.")
