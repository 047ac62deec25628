"""What tests stand on: real servers and real services on free ports, and waiting for a condition."""

import asyncio
import socket
import time
from collections.abc import Awaitable, Callable, Mapping
from pathlib import Path

import httpx

from pdserve.children import Child, Program, last_words, wait_for_exit
from pdserve.forked import Forked, fork_server
from pdserve.nats_accounts import NatsUrls, new_accounts
from pdserve.servers import Servers
from pdserve.status import ask
from shared.errors import BusUnavailable
from shared.messages.control import InstanceStatus, Status
from shared.settings import DEMO_MODEL, tame_threads

TIMEOUT_S = 60.0
HEARTBEAT_S = 0.1
SETTLE_S = 0.6


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port: int = server.getsockname()[1]
        return port


def wait_until(predicate: Callable[[], object], timeout_s: float = TIMEOUT_S) -> None:
    """Returns once `predicate()` is true; fails after `timeout_s`."""
    end = time.monotonic() + timeout_s
    while not predicate():
        assert time.monotonic() < end, f"not within {timeout_s} s"
        time.sleep(0.02)


async def eventually(predicate: Callable[[], object | Awaitable[object]], timeout_s: float = TIMEOUT_S) -> None:
    """`wait_until` for coroutines."""
    end = time.monotonic() + timeout_s
    while True:
        result = predicate()
        if await result if isinstance(result, Awaitable) else result:
            return
        assert time.monotonic() < end, f"not within {timeout_s} s"
        await asyncio.sleep(0.02)


class System:
    """A whole pdserve of real processes: its own NATS and Valkey, a controller, a gateway, and instances.

    Settings apply to every service that knows them, as `PDSERVE_*` would; those of `controller` and `gateway` to
    these alone. `folder` gets the logs.
    """

    def __init__(
        self,
        folder: Path,
        servers: Servers,
        *,
        model: str = DEMO_MODEL,
        num_prefill: int = 1,
        num_decode: int = 1,
        settings: Mapping[str, object] | None = None,
        controller: Mapping[str, object] | None = None,
        gateway: Mapping[str, object] | None = None,
        num_gateways: int = 1,
    ) -> None:
        tame_threads()
        self.folder = folder
        self.servers = servers
        self.accounts = new_accounts(("client", "eve"))
        self.nats = NatsUrls.of_accounts(self.accounts, servers.start_nats(free_port(), self.accounts))
        self.nats_url = self.nats.of("operator")
        """For operators' commands, and for clients that are not about accounts."""
        self.redis_url = servers.start_redis()
        self.ports = [free_port() for _ in range(num_gateways)]
        self.settings = {
            "redis_url": self.redis_url,
            "heartbeat_s": HEARTBEAT_S,
            "heartbeat_late_s": 1.0,
            "model": model,
            "log_level": "debug",
            **(settings or {}),
        }
        self.context = fork_server(["transformers.models.llama.modeling_llama"])
        self.gateways = [self._gateway(number, port, gateway or {}) for number, port in enumerate(self.ports)]
        # Roles are left alone unless a test wants otherwise: it says itself who plays what.
        controller = {"control": "off", **self._settings_of("controller"), **(controller or {})}
        self.controller = Program("controller", "services.controller", controller, folder / "controller.log")
        self.instances = [self._instance("prefill", n) for n in range(num_prefill)]
        self.instances += [self._instance("decode", n) for n in range(num_decode)]

    @property
    def gateway(self) -> Program:
        return self.gateways[0]

    @property
    def port(self) -> int:
        return self.ports[0]

    @property
    def url(self) -> str:
        return self.url_of(0)

    def url_of(self, number: int) -> str:
        """The HTTP API of a gateway."""
        return f"http://127.0.0.1:{self.ports[number]}"

    @property
    def children(self) -> list[Child]:
        return [self.controller, *self.gateways, *self.instances]

    def start(self) -> "System":
        """Starts everything and waits until it can serve."""
        for child in self.children:
            child.start()
        self.wait_until_ready()
        return self

    def wait_until_ready(self) -> None:
        """Waits until each gateway is ready and every instance is known, as the process that it is now."""
        wait_until(lambda: self._all_run() and self._is_ready() and self._all_are_known())

    def stop(self) -> None:
        """Ends everything as `pdserve up` does; nothing may be left."""
        waves: list[list[Child]] = [[*self.gateways], [*self.instances], [self.controller]]
        for wave in waves:
            for child in wave:
                child.terminate()
            for child in wait_for_exit(wave, 20.0):
                child.kill()
                raise AssertionError(f"{child.name} did not end: {last_words(child.log)}")
        self.servers.stop()

    def status(self) -> Status:
        return asyncio.run(ask(self.nats_url))

    def live(self) -> list[InstanceStatus]:
        """The instances whose hearts beat, as the controller sees them; none while there is no controller."""
        try:
            return [one for one in self.status().instances if not one.late]
        except BusUnavailable:
            return []

    def nothing_is_held(self) -> bool:
        """Whether all instances are there, and every block and slot is free."""
        return self._all_are_known() and all(
            one.slots_used == 0 and one.blocks_free == one.blocks_total for one in self.live()
        )

    def wait_until_nothing_is_held(self) -> None:
        """Waits until that is so, and has been for longer than it takes a request to show in the status."""
        since = time.monotonic()

        def is_settled() -> bool:
            nonlocal since
            if not self.nothing_is_held():
                since = time.monotonic()
            return time.monotonic() - since > SETTLE_S

        wait_until(is_settled)

    def serving(self) -> dict[str, int]:
        """How many instances of each role are in maps, and live; nobody while no controller answers."""
        try:
            groups = self.status().groups
        except BusUnavailable:
            return {}
        return {
            "prefill": sum(len(group.prefill) for group in groups),
            "decode": sum(len(group.decode) for group in groups),
        }

    def add_instance(self, role: str, number: int) -> Forked:
        """Starts one more."""
        child = self._instance(role, number)
        self.instances.append(child)
        child.start()
        return child

    def slots_used(self, role: str) -> int:
        """How many requests the instances of a role hold."""
        return sum(one.slots_used for one in self.live() if one.role == role)

    def instance(self, role: str, number: int = 0) -> Forked:
        return next(one for one in self.instances if one.name == f"{role}-{number}")

    def _gateway(self, number: int, port: int, settings: Mapping[str, object]) -> Program:
        name = f"gateway-{number}" if number else "gateway"
        settings = {"local_prefill": "off", **self._settings_of("gateway"), "http_port": port, **settings}
        return Program(name, "services.gateway", settings, self.folder / f"{name}.log")

    def _instance(self, role: str, number: int) -> Forked:
        name = f"{role}-{number}"
        settings = {"kv_pool_bytes": 2**28, **self._settings_of("instance"), "role": role, "threads": 1}
        return Forked(name, settings, self.folder / f"{name}.log", self.context)

    def _settings_of(self, service: str) -> dict[str, object]:
        return {"nats_url": self.nats.of(service), **self.settings}

    def _all_run(self) -> bool:
        for child in self.children:
            assert child.exit_code() is None, f"{child.name} ended: {last_words(child.log)}"
        return True

    def _all_are_known(self) -> bool:
        """Whether the instances that run are those in the registry, and each is announced in its group's map."""
        try:
            status = self.status()
        except BusUnavailable:
            return False
        members = {one for group in status.groups for one in (*group.prefill, *group.decode)}
        live = [one for one in status.instances if not one.late]
        announced = all(one.id in members or one.preferred_role is None for one in live)
        return announced and {one.pid for one in live} == {one.pid for one in self.instances}

    def _is_ready(self) -> bool:
        try:
            return all(
                httpx.get(f"{self.url_of(number)}/health/ready", timeout=2.0, trust_env=False).status_code == 200
                for number in range(len(self.gateways))
            )
        except httpx.TransportError:
            return False
