"""Two controllers: one leads, the other takes over, and requests need neither."""

from collections.abc import Callable

import pytest

from pdserve.children import Program
from tests.harness import System, wait_until
from tests.system.client import greedy, post, prompt_of, streaming, token_ids

REQUEST = greedy(prompt_of(40), 600)

pytestmark = pytest.mark.services


def test_the_leader_dies_and_the_other_leads(start_system: Callable[..., System]) -> None:
    system = start_system(num_decode=2, settings={"native_kernels": False})
    expected = token_ids(post(system.url, REQUEST))
    other = Program("other controller", "services.controller", system.controller.settings, system.folder / "other.log")
    other.start()
    try:
        wait_until(lambda: "ready" in other.log.read_text())
        first = system.status().leader
        assert first is not None
        answers = [system.status() for _ in range(5)]
        assert {one.controller for one in answers} == {first}, "the leader knows most, and answers"
        with streaming(system.url, REQUEST) as answer:
            answer.read(20)
            system.controller.kill()
            wait_until(lambda: system.controller.exit_code() is not None)
            wait_until(lambda: "leads from now on" in other.log.read_text())
            # Members stay members, and a newcomer joins, by the new leader's hand.
            assert system.serving() == {"prefill": 1, "decode": 2}
            system.instance("decode", 0).kill()
            wait_until(lambda: system.serving() == {"prefill": 1, "decode": 1})
            system.instance("decode", 0).start()
            wait_until(lambda: system.serving() == {"prefill": 1, "decode": 2})
            assert answer.read() == expected
        assert system.status().leader != first
    finally:
        other.terminate()
        wait_until(lambda: other.exit_code() is not None)
        system.controller.start()
    system.wait_until_ready()


def test_nobody_leads_and_requests_go_on(start_system: Callable[..., System]) -> None:
    system = start_system()
    system.controller.kill()
    wait_until(lambda: system.controller.exit_code() is not None)
    assert len(token_ids(post(system.url, greedy("x", 20)))) == 20
    system.controller.start()
    system.wait_until_ready()


def test_a_newcomer_takes_the_role_of_the_one_that_was_lost(start_system: Callable[..., System]) -> None:
    """Whatever it wishes to be: the group keeps its ratio."""
    system = start_system(num_prefill=1, num_decode=1)
    spare = system.add_instance("spare", 0)
    wait_until(lambda: len(system.live()) == 3)
    assert system.serving() == {"prefill": 1, "decode": 1}
    system.instance("decode", 0).kill()
    wait_until(lambda: any(one.pid == spare.pid and one.role == "decode" for one in system.live()))
    wait_until(lambda: system.serving() == {"prefill": 1, "decode": 1})
    assert len(token_ids(post(system.url, greedy("x", 20)))) == 20
    system.instances.remove(system.instance("decode", 0))
