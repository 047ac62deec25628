"""Whatever dies, hangs or is away: the client's stream has no seam, and in the end nothing is held.

One system for all of it: two instances of each role, with one slot each so that what waits is known. Tests may leave
processes dead: the fixture starts them again, and sees to it that nothing is held then.
"""

import os
import signal
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from urllib.parse import urlsplit

import httpx
import pytest
import redis

from pdserve.children import Program
from pdserve.forked import Forked
from tests.conftest import running_system
from tests.harness import System, free_port, wait_until
from tests.system.client import Streamed, asking, greedy, post, prompt_of, streaming, token_ids
from tests.system.models import ENDLESS, endless_model

NUM_TOKENS = 1200
"""Seconds of work: a request that a test disturbs is still there when the test has found who holds it."""
REQUEST = greedy(prompt_of(40), NUM_TOKENS)
LONG = greedy("x", ENDLESS)


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    folder = tmp_path_factory.mktemp("faults")
    settings = {
        "prefill_slots": 1,
        "decode_slots": 1,
        "max_step_tokens": 16,
        "kv_pool_bytes": 2**30,
        "lease_s": 2.0,
        "native_kernels": False,  # slower, so that requests last; and a whole system without a compiler
    }
    with running_system(folder, model=endless_model(folder), num_prefill=2, num_decode=2, settings=settings) as running:
        yield running


@pytest.fixture(scope="module")
def expected(shared: System) -> list[int]:
    """What REQUEST gives when nothing goes wrong."""
    return token_ids(post(shared.url, REQUEST))


@pytest.fixture
def system(shared: System, expected: list[int]) -> Iterator[System]:
    shared.wait_until_nothing_is_held()  # or `holder` finds who held the request of `expected`
    yield shared
    for child in shared.children:
        if child.exit_code() is not None:
            child.start()
    shared.wait_until_ready()
    shared.wait_until_nothing_is_held()


def holder(system: System, role: str) -> Forked:
    """Waits until one instance of a role holds a request, and says which."""
    wait_until(lambda: system.slots_used(role) == 1)
    [pid] = [one.pid for one in system.live() if one.role == role and one.slots_used == 1]
    return next(one for one in system.instances if one.pid == pid)


def occupy_decode(system: System, occupants: ExitStack) -> None:
    """Takes all slots for decode until `occupants` are closed."""
    for _ in range(2):
        occupants.enter_context(streaming(system.url, LONG)).read(10)
    wait_until(lambda: system.slots_used("decode") == 2 and system.slots_used("prefill") == 0)


def kill(*children: Forked | Program) -> None:
    for child in children:
        child.kill()
        wait_until(lambda child=child: child.exit_code() is not None)  # type: ignore[misc]


@contextmanager
def stopped(child: Forked) -> Iterator[None]:
    """The process stands still, and its heart with it."""
    assert child.pid is not None
    os.kill(child.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(child.pid, signal.SIGCONT)


@contextmanager
def draining_within(system: System, timeout_s: float) -> Iterator[None]:
    """The decode instances have another drain_timeout_s."""
    usual = system.instance("decode").settings
    try:
        restart_decode(system, {"drain_timeout_s": timeout_s})
        yield
    finally:
        restart_decode(system, {"drain_timeout_s": usual.get("drain_timeout_s")})


def restart_decode(system: System, settings: dict[str, object]) -> None:
    for child in system.instances:
        if child.name.startswith("decode"):
            kill(child)
            given = {**child.settings, **settings}
            child.settings = {name: value for name, value in given.items() if value is not None}
            child.start()
    system.wait_until_ready()


@contextmanager
def another_gateway(system: System, **settings: object) -> Iterator[str]:
    """The URL of one more gateway, with settings of its own."""
    port = free_port()
    settings = {"nats_url": system.nats.of("gateway"), **system.settings, "http_port": port, **settings}
    gateway = Program("another gateway", "services.gateway", settings, system.folder / "another-gateway.log")
    gateway.start()
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until(lambda: status_of(f"{url}/health/live") == 200)
        yield url
    finally:
        kill(gateway)


def status_of(url: str) -> int | None:
    try:
        return httpx.get(url, trust_env=False).status_code
    except httpx.TransportError:
        return None


def was_retaken(system: System, answer: Streamed) -> bool:
    """Whether an attempt at the request failed, and another went on with it."""
    return f"at request {answer.request_id} failed" in system.gateway.log.read_text()


def test_decode_dies(system: System, expected: list[int]) -> None:
    with streaming(system.url, REQUEST) as answer:
        answer.read(20)
        kill(holder(system, "decode"))
        assert answer.read() == expected
    assert was_retaken(system, answer)


def test_decode_hangs(system: System, expected: list[int]) -> None:
    with streaming(system.url, REQUEST) as answer:
        answer.read(20)
        with stopped(holder(system, "decode")):
            assert answer.read() == expected
    assert was_retaken(system, answer)


def test_all_of_decode_dies_and_is_started_again(system: System, expected: list[int]) -> None:
    with streaming(system.url, REQUEST) as answer:
        answer.read(20)
        kill(system.instance("decode", 0), system.instance("decode", 1))
        system.instance("decode", 0).start()
        assert answer.read() == expected


def test_prefill_dies_while_it_computes(system: System) -> None:
    request = greedy(prompt_of(3000), 20)
    with ThreadPoolExecutor() as pool:
        answer = pool.submit(post, system.url, request)
        kill(holder(system, "prefill"))
        served = token_ids(answer.result())
    assert served == token_ids(post(system.url, request))


def test_prefill_dies_while_it_holds_kv(system: System, expected: list[int]) -> None:
    with ExitStack() as occupants:
        occupy_decode(system, occupants)
        with streaming(system.url, REQUEST) as answer:
            answer.read(1)
            kill(holder(system, "prefill"))
            occupants.close()
            assert answer.read() == expected
    assert was_retaken(system, answer)


def test_prefill_hangs_while_it_holds_kv(system: System, expected: list[int]) -> None:
    with ExitStack() as occupants:
        occupy_decode(system, occupants)
        with streaming(system.url, REQUEST) as answer:
            answer.read(1)
            with stopped(holder(system, "prefill")):
                occupants.close()
                assert answer.read() == expected
    assert was_retaken(system, answer)


def test_a_lease_ends_before_its_kv_is_fetched(system: System, expected: list[int]) -> None:
    with ExitStack() as occupants:
        occupy_decode(system, occupants)
        with streaming(system.url, REQUEST) as answer:
            answer.read(1)
            wait_until(lambda: was_retaken(system, answer))
            occupants.close()
            assert answer.read() == expected


def test_nats_dies_more_often_than_instances_may_fail(system: System, expected: list[int]) -> None:
    port = urlsplit(system.nats_url).port
    assert port is not None
    with streaming(system.url, REQUEST) as answer:
        for num_tokens in (40, 110, 180, 250):
            answer.read(num_tokens)
            system.servers.processes["nats"].kill()
            system.servers.processes["nats"].wait()
            system.servers.start_nats(port, system.accounts)
        assert answer.read() == expected
    assert was_retaken(system, answer)


def test_redis_dies(system: System, expected: list[int]) -> None:
    with streaming(system.url, REQUEST) as answer:
        answer.read(20)
        system.servers.processes["redis"].kill()
        system.servers.processes["redis"].wait()
        assert answer.read() == expected
        assert not was_retaken(system, answer)
    assert token_ids(post(system.url, greedy(prompt_of(40), 50))) == expected[:50]
    system.servers.start_redis()
    with redis.Redis.from_url(system.redis_url) as client:
        wait_until(lambda: len(client.keys("pdserve:v1:instance:*")) == 4)


def test_the_gateway_dies(system: System) -> None:
    """Its clients see their connections break; instances let go of all that it had."""
    with ExitStack() as occupants:
        occupy_decode(system, occupants)
        with streaming(system.url, LONG) as answer:
            answer.read(1)
            holder(system, "prefill")
            kill(system.gateway)
            with pytest.raises(httpx.RemoteProtocolError):
                answer.read()
        wait_until(system.nothing_is_held)


def test_the_controller_dies(system: System, expected: list[int]) -> None:
    with streaming(system.url, REQUEST) as answer:
        answer.read(20)
        kill(system.controller)
        assert answer.read() == expected
    assert not was_retaken(system, answer)


def test_an_instance_is_asked_to_end(system: System, expected: list[int]) -> None:
    """It finishes what it holds and takes nothing new."""
    with draining_within(system, 60.0), streaming(system.url, REQUEST) as answer:
        answer.read(20)
        ending = holder(system, "decode")
        ending.terminate()
        assert len(token_ids(post(system.url, greedy("y", 5)))) == 5
        assert answer.read() == expected
        assert not was_retaken(system, answer)
        wait_until(lambda: ending.exit_code() == 0)


def test_an_instance_is_asked_to_end_at_once(system: System, expected: list[int]) -> None:
    """What it holds moves to another instance with its KV: nothing is computed twice."""
    with draining_within(system, 0.1), streaming(system.url, REQUEST) as answer:
        answer.read(20)
        ending = holder(system, "decode")
        ending.terminate()
        assert answer.read() == expected
        assert not was_retaken(system, answer)
        wait_until(lambda: ending.exit_code() == 0)


def test_the_deadline_passes(system: System) -> None:
    with another_gateway(system, request_timeout_s=1.0) as url:
        with streaming(url, LONG) as answer:
            answer.read()
            assert [error["code"] for error in answer.errors] == ["deadline_exceeded"]
            assert not answer.is_done
        refused = post(url, LONG)
        assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_exceeded")
        system.wait_until_nothing_is_held()


def test_the_deadline_passes_while_waiting(system: System) -> None:
    with another_gateway(system, request_timeout_s=1.0) as url, ExitStack() as occupants:
        occupy_decode(system, occupants)
        for role in ("decode", "prefill"):
            refused = post(url, LONG)
            assert (refused.status_code, refused.json()["error"]["code"]) == (504, "deadline_exceeded"), role
            for _ in range(2):
                occupants.enter_context(asking(system.url, LONG))


def test_more_requests_than_slots(system: System, expected: list[int]) -> None:
    request = greedy(prompt_of(40), 150)
    with another_gateway(system, ttft_timeout_s=0.5) as url, ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda _: post(url, request), range(24)))
    served = [answer for answer in answers if answer.status_code == 200]
    refused = [answer for answer in answers if answer.status_code != 200]
    assert served
    assert refused
    assert all(token_ids(answer) == expected[:150] for answer in served)
    for answer in refused:
        assert (answer.status_code, answer.json()["error"]["code"]) == (429, "overloaded"), answer.text
        assert int(answer.headers["retry-after"]) >= 1


def test_no_instance_at_all(system: System) -> None:
    """Everybody in the line is told, and not one after another."""
    request = {**REQUEST, "model": "nobody"}
    with another_gateway(system, model_name="nobody", instance_wait_s=0.5, request_timeout_s=10.0) as url:
        assert status_of(f"{url}/health/ready") == 503
        with ThreadPoolExecutor(40) as pool:
            answers = list(pool.map(lambda _: post(url, request), range(40)))
        for answer in answers:
            assert (answer.status_code, answer.json()["error"]["code"]) == (503, "no_instance"), answer.text
            assert int(answer.headers["retry-after"]) >= 1
