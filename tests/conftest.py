"""Fixtures for all tests: real NATS and Valkey servers, whole systems, and a watch over Redis keys."""

import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import hypothesis
import pytest
import redis

from pdserve.servers import Servers
from shared.registry import keys
from tests.harness import System

# A busy machine must not fail a test: how long an example takes says nothing about what it checks.
hypothesis.settings.register_profile("untimed", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow])
hypothesis.settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Marks the tests that start services, so that `make check` can leave them out."""
    for item in items:
        if {"system", "start_system"} & set(getattr(item, "fixturenames", ())):
            item.add_marker("services")


@pytest.fixture
def servers() -> Iterator[Servers]:
    """Embedded servers, ended after the test."""
    with embedded_servers() as servers:
        yield servers


@pytest.fixture
def nats_url(servers: Servers) -> str:
    return servers.start_nats()


@pytest.fixture
def redis_url(servers: Servers) -> Iterator[str]:
    url = servers.start_redis()
    yield url
    assert_keys_run_out(url)


@pytest.fixture
def start_system(tmp_path: Path, servers: Servers) -> Iterator[Callable[..., System]]:
    """Starts a system of this test's own: `start_system(num_decode=2, settings={...})`."""
    started: list[System] = []

    def start(**wishes: object) -> System:
        system = System(tmp_path, servers, **wishes)  # type: ignore[arg-type]
        started.append(system)
        return system.start()

    yield start
    try:
        for system in started:
            assert_keys_run_out(system.redis_url)
    finally:
        for system in started:
            system.stop()


@pytest.fixture(scope="session")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    """One system with the model in the repository, shared by all tests that only send it requests."""
    with running_system(tmp_path_factory.mktemp("system")) as running:
        yield running


@contextmanager
def running_system(folder: Path, **wishes: object) -> Iterator[System]:
    """A system that holds nothing in the end, and leaves nothing in Redis; `wishes` as of `System`."""
    with embedded_servers() as servers:
        running = System(folder, servers, **wishes)  # type: ignore[arg-type]
        try:
            yield running.start()
            running.wait_until_nothing_is_held()
            assert_keys_run_out(running.redis_url)
        finally:
            running.stop()


@contextmanager
def embedded_servers() -> Iterator[Servers]:
    with tempfile.TemporaryDirectory(prefix="pdserve-test-") as folder:
        servers = Servers(Path(folder))
        try:
            yield servers
        finally:
            servers.stop()


def assert_keys_run_out(redis_url: str) -> None:
    """Every key has a time to live unless it is declared permanent."""
    with redis.Redis.from_url(redis_url, decode_responses=True) as client:
        forever = {key for key in client.scan_iter() if client.ttl(key) == -1}
    assert forever <= keys.PERMANENT, f"keys without a time to live: {sorted(forever - keys.PERMANENT)}"
