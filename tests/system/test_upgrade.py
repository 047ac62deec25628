"""Another model, instance by instance, under requests of which none fails; or back to the old one."""

import re
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from shared.settings import DEMO_MODEL
from tests.harness import System, wait_until
from tests.system.client import greedy, post, prompt_of, token_ids
from tests.system.models import other_weights
from tests.system.test_roles import wish

REQUEST = greedy(prompt_of(40), 60)

pytestmark = pytest.mark.services


def upgrade_is_over(system: System) -> bool:
    said = system.status().upgrade or ""
    return "done" in said or "stopped" in said


def paths(system: System) -> set[str]:
    return {one.model_path for one in system.live()}


def test_no_request_fails_and_no_answer_is_of_both(start_system: Callable[..., System], tmp_path: Path) -> None:
    system = start_system(num_prefill=2, num_decode=2, controller={"admin_key": "secret"})
    model = other_weights(tmp_path)
    old = token_ids(post(system.url, REQUEST))
    stop = threading.Event()

    def ask_again_and_again(_: int) -> list[list[int]]:
        answers = []
        while not stop.is_set():
            answers.append(token_ids(post(system.url, REQUEST)))
        return answers

    with ThreadPoolExecutor(3) as pool:
        asking = [pool.submit(ask_again_and_again, number) for number in range(3)]
        try:
            answered = wish(system, "upgrade", model=model)
            assert answered.ok, answered.message
            again = wish(system, "upgrade", model=model)
            assert "an upgrade is under way" in again.message
            wait_until(lambda: upgrade_is_over(system), timeout_s=120.0)
        finally:
            stop.set()
        answers = [answer for one in asking for answer in one.result()]
    assert "done, 4 instances" in (system.status().upgrade or "")
    assert paths(system) == {model}
    new = token_ids(post(system.url, REQUEST))
    assert new != old
    assert all(answer in (old, new) for answer in answers)
    # Who comes later gets the new model too, whatever its settings say.
    system.instance("decode", 0).kill()
    system.instance("decode", 0).start()
    system.wait_until_ready()
    assert paths(system) == {model}


def test_the_next_leader_goes_on_with_an_upgrade(start_system: Callable[..., System], tmp_path: Path) -> None:
    """Even where the one before ended with a role down to a single member."""
    system = start_system(num_prefill=2, num_decode=2, controller={"admin_key": "secret"})
    model = other_weights(tmp_path)
    assert wish(system, "upgrade", model=model).ok
    wait_until(lambda: any(one.state == "changing" for one in system.live()))
    system.controller.kill()
    wait_until(lambda: system.controller.exit_code() is not None)
    system.controller.start()
    wait_until(lambda: len(system.live()) == 4)
    wait_until(lambda: upgrade_is_over(system), timeout_s=120.0)
    done = re.search(r"done, (\d) instances", system.status().upgrade or "")
    assert done
    assert 0 < int(done[1]) < 4, "each leader has done a part"
    assert paths(system) == {model}
    assert system.serving() == {"prefill": 2, "decode": 2}
    assert len(token_ids(post(system.url, REQUEST))) == 60
    # It is over for good: the leader after that has nothing to go on with.
    system.controller.kill()
    wait_until(lambda: system.controller.exit_code() is not None)
    system.controller.start()
    system.wait_until_ready()
    assert system.status().upgrade is None


def test_a_single_pair_needs_spares(start_system: Callable[..., System], tmp_path: Path) -> None:
    system = start_system(controller={"admin_key": "secret"})
    model = other_weights(tmp_path)
    refused = wish(system, "upgrade", model=model)
    assert not refused.ok
    assert "there is no spare to stand in for it" in refused.message
    for number in range(2):
        system.add_instance("spare", number)
    wait_until(lambda: len(system.live()) == 4)
    assert wish(system, "upgrade", model=model).ok
    wait_until(lambda: upgrade_is_over(system), timeout_s=120.0)
    assert "done" in (system.status().upgrade or ""), system.status().upgrade
    members = [one for one in system.live() if one.role is not None]
    assert {one.model_path for one in members} == {model}
    assert system.serving() == {"prefill": 1, "decode": 1}
    assert len(token_ids(post(system.url, REQUEST))) == 60


def test_a_model_that_does_not_load_is_rolled_back(start_system: Callable[..., System], tmp_path: Path) -> None:
    system = start_system(num_prefill=2, num_decode=2, controller={"admin_key": "secret"})
    before = token_ids(post(system.url, REQUEST))
    assert wish(system, "upgrade", model=str(tmp_path / "nothing")).ok
    wait_until(lambda: upgrade_is_over(system), timeout_s=120.0)
    said = system.status().upgrade or ""
    assert "stopped" in said
    assert "nothing" in said
    wait_until(lambda: system.serving() == {"prefill": 2, "decode": 2})
    assert paths(system) == {DEMO_MODEL}
    assert token_ids(post(system.url, REQUEST)) == before
