"""Roles change in running processes, under requests that notice nothing; what cannot be is refused with a sentence."""

import asyncio
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import pytest

from pdserve.admin import ask_admin
from shared.messages.control import AdminAnswer, AdminRequest, InstanceStatus
from tests.conftest import running_system
from tests.harness import System, wait_until
from tests.system.client import greedy, post, prompt_of, streaming, token_ids

NUM_TOKENS = 400
REQUEST = greedy(prompt_of(40), NUM_TOKENS)

pytestmark = pytest.mark.services


@pytest.fixture(scope="module")
def system(tmp_path_factory: pytest.TempPathFactory) -> Iterator[System]:
    settings = {"move_after_s": 0.01, "native_kernels": False}
    with running_system(
        tmp_path_factory.mktemp("roles"),
        num_prefill=2,
        num_decode=2,
        settings=settings,
        controller={"admin_key": "secret"},
    ) as running:
        yield running


@pytest.fixture(scope="module")
def expected(system: System) -> list[int]:
    return token_ids(post(system.url, REQUEST))


@pytest.fixture(autouse=True)
def _two_of_each(system: System) -> Iterator[None]:
    yield
    for one in system.live():
        if one.role is None:
            answered = wish(system, "flip", instance=one.id, role=one.preferred_role, group="default")
            assert answered.ok, answered.message
    wait_until(lambda: system.serving() == {"prefill": 2, "decode": 2} or even_out(system))
    system.wait_until_nothing_is_held()


def even_out(system: System) -> bool:
    """Flips one instance if roles are unequal; False, so that it is looked at again."""
    by_role = {role: [one.id for one in system.live() if one.role == role] for role in ("prefill", "decode")}
    more, fewer = sorted(by_role, key=lambda role: -len(by_role[role]))
    if len(by_role[more]) > len(by_role[fewer]) + 1:
        wish(system, "flip", instance=by_role[more][0], role=fewer)
    return False


def wish(system: System, verb: str, *, key: str = "secret", **fields: object) -> AdminAnswer:
    request = AdminRequest.model_validate({"key": key, **fields})
    return asyncio.run(ask_admin(system.nats_url, verb, request))


def instances(system: System, role: str) -> list[InstanceStatus]:
    return [one for one in system.live() if one.role == role]


def holder(system: System) -> InstanceStatus:
    """The decode instance that holds the one request."""
    wait_until(lambda: sum(one.slots_used for one in instances(system, "decode")) == 1)
    return next(one for one in instances(system, "decode") if one.slots_used == 1)


def test_a_request_moves_with_its_kv_when_its_instance_changes_its_role(system: System, expected: list[int]) -> None:
    with streaming(system.url, REQUEST) as answer:
        answer.read(20)
        changed = holder(system)
        answered = wish(system, "flip", instance=changed.id, role="prefill")
        assert answered.ok, answered.message
        after = next(one for one in system.live() if one.id == changed.id)
        assert (after.role, after.state, after.pid, after.epoch) == ("prefill", "ready", changed.pid, changed.epoch + 1)
        assert answer.read() == expected
    log = system.gateway.log.read_text()
    assert f"at request {answer.request_id} failed" not in log


def test_many_changes_under_requests(system: System, expected: list[int]) -> None:
    """Prefill to decode and back, again and again; every answer is what it would have been."""
    stop = Future[None]()

    def ask_again_and_again(_: int) -> int:
        number = 0
        while not stop.done():
            assert token_ids(post(system.url, REQUEST)) == expected
            number += 1
        return number

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_again_and_again, number) for number in range(3)]
        try:
            for number in range(8):
                role = "decode" if len(instances(system, "prefill")) > 1 else "prefill"
                candidates = instances(system, "prefill" if role == "decode" else "decode")
                answered = wish(system, "flip", instance=candidates[number // 2 % len(candidates)].id, role=role)
                assert answered.ok, answered.message
        finally:
            stop.set_result(None)
        assert all(one.result() >= 1 for one in asking)
    assert "failed this request" not in system.gateway.log.read_text()


def test_the_last_of_a_role_keeps_it(system: System) -> None:
    first, last = instances(system, "prefill")
    assert wish(system, "flip", instance=first.id, role="decode").ok
    refused = wish(system, "flip", instance=last.id, role="decode")
    assert not refused.ok
    assert f"{last.id} is the last prefill instance of group default" in refused.message
    refused = wish(system, "drain", instance=last.id)
    assert not refused.ok
    assert "give the group another one first" in refused.message
    assert len(token_ids(post(system.url, greedy("x", 5)))) == 5


def test_a_drained_instance_stays_without_a_role_whoever_leads(system: System) -> None:
    drained = instances(system, "decode")[0]
    answered = wish(system, "drain", instance=drained.id)
    assert answered.ok, answered.message
    after = next(one for one in system.live() if one.id == drained.id)
    assert (after.role, after.group, after.state) == (None, None, "drained")
    assert len(token_ids(post(system.url, greedy("x", 5)))) == 5
    assert system.serving() == {"prefill": 2, "decode": 1}
    before = system.status().leader
    system.controller.kill()
    wait_until(lambda: system.controller.exit_code() is not None)
    system.controller.start()
    wait_until(lambda: len(system.live()) == 4)
    wait_until(lambda: system.status().leader not in (None, before))
    lost = instances(system, "decode")[0]
    assert not wish(system, "drain", instance=lost.id).ok, "the new leader sees no other decode instance"
    assert system.serving() == {"prefill": 2, "decode": 1}
    answered = wish(system, "flip", instance=drained.id, role="decode")
    assert answered.ok, answered.message
    assert system.serving() == {"prefill": 2, "decode": 2}
    assert wish(system, "drain", instance=drained.id).ok
    assert wish(system, "drain", instance=drained.id).ok, "it is, and stays so"


@pytest.mark.parametrize(
    ("verb", "fields", "said"),
    [
        ("flip", {"instance": "nobody", "role": "decode"}, "no instance 'nobody' is alive: take one of instance-"),
        ("flip", {"instance": "instance-", "role": "decode"}, "4 instances fit 'instance-'"),
        ("flip", {"role": "decode", "key": "wrong"}, "this needs the key of PDSERVE_ADMIN_KEY"),
        ("control", {}, "Give auto, advise or off"),
        ("upgrade", {}, "to which model?"),
        ("pause", {}, "no upgrade is under way"),
        ("dance", {}, "there is no wish 'dance': take one of flip, drain"),
    ],
)
def test_what_cannot_be_is_refused(system: System, verb: str, fields: dict[str, str], said: str) -> None:
    answered = wish(system, verb, **fields)
    assert not answered.ok
    assert said in answered.message


def test_a_group_that_is_not_there(system: System) -> None:
    answered = wish(system, "flip", instance=instances(system, "decode")[0].id, role="decode", group="chat")
    assert not answered.ok
    assert "there is no group 'chat': take one of default" in answered.message
