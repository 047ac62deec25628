"""What `pdserve up` refuses before it starts anything that would fail later, with what to do instead."""

import os
import socket
from pathlib import Path

from pdserve import runfile
from shared.bus import connection
from shared.errors import SettingsInvalid
from shared.registry import registry
from shared.settings import InstanceSettings

SERVERS_TIMEOUT_S = 3.0


def refuse_second_up(folder: Path) -> None:
    run = runfile.read(folder)
    if run is not None:
        raise SettingsInvalid(
            f"`pdserve up` runs in this folder already (process {run.pid}, {run.address}): "
            "end it, or start in another folder"
        )


def refuse_mock_times(instance: InstanceSettings) -> None:
    if instance.engine != "mock":
        if "mock_times" in instance.model_fields_set:
            raise SettingsInvalid("--mock-times (PDSERVE_MOCK_TIMES) is for the mock engine: add --engine mock")
    else:
        from shared.engine.mock import MockTimes  # which imports torch

        MockTimes.parse(instance.mock_times)


def refuse_port_in_use(host: str, port: int) -> None:
    try:
        with socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET):
            pass
    except OSError as error:
        why = os.strerror(error.errno) if error.errno else error
        raise SettingsInvalid(f"{host}:{port} cannot be used ({why}): take another with --port or --host") from error


async def refuse_absent_servers(nats_url: str, redis_url: str) -> None:
    """Raises `BusUnavailable` or `RegistryUnavailable` before anything waits for servers that are not there."""
    async with (
        connection.connect(nats_url, name="pdserve-up", timeout_s=SERVERS_TIMEOUT_S),
        registry.connect(redis_url, ttl_s=1.0, timeout_s=SERVERS_TIMEOUT_S),
    ):
        pass
