"""Short prompts stay at a decode instance once that is known to be quicker, and say the same."""

from collections.abc import Callable

import pytest

from tests.harness import System, wait_until
from tests.system.client import greedy, post, prompt_of, streaming, token_ids

SHORT = greedy(prompt_of(12), 40)

pytestmark = pytest.mark.services


def num_prefilled(system: System) -> int:
    """How many requests the prefill instance has accepted."""
    return sum(one.admissions.num_accepted for one in system.live() if one.role == "prefill")


def test_a_short_prompt_stays_at_decode_and_says_the_same(start_system: Callable[..., System]) -> None:
    system = start_system(num_decode=2, gateway={"local_prefill": "auto"}, settings={"move_after_s": 0.01})
    expected = token_ids(post(system.url, SHORT))
    for number in range(25):  # to be measured
        assert len(token_ids(post(system.url, greedy(prompt_of(200, number), 4)))) == 4

    def stays() -> bool:
        before = num_prefilled(system)
        answers = [post(system.url, {**SHORT, "prompt": prompt_of(12, number)}) for number in range(4)]
        assert all(len(token_ids(answer)) == 40 for answer in answers)
        answer = post(system.url, SHORT)
        assert token_ids(answer) == expected
        assert answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
        wait_until(system.nothing_is_held)
        return num_prefilled(system) == before

    wait_until(stays)
    before = num_prefilled(system)
    with streaming(system.url, SHORT) as answer:
        assert answer.read() == expected
    wait_until(system.nothing_is_held)
    assert num_prefilled(system) == before
    assert len(token_ids(post(system.url, greedy(prompt_of(500), 4)))) == 4
    wait_until(lambda: num_prefilled(system) == before + 1)
