"""How long prompts will take; pure."""

import pytest

from shared.instance.pace import MARGIN, RECENT, Pace
from shared.registry.records import Work


def test_nothing_is_expected_before_anything_was_measured() -> None:
    pace = Pace()
    assert pace.seconds(1000, Work()) == 0.0
    assert pace.seconds(1000, Work(decode_steps=10, decode_s=3.0)) == 0.0


def test_a_prompt_takes_as_long_as_others_did_and_a_margin() -> None:
    pace = Pace()
    assert pace.seconds(50, Work(prefill_tokens=100, prefill_s=2.0)) == pytest.approx(MARGIN * 1.0)
    assert pace.seconds(0, Work(prefill_tokens=100, prefill_s=2.0)) == 0.0


def test_what_is_new_counts_by_its_own_seconds_and_only_once() -> None:
    pace = Pace()
    pace.seconds(1, Work(prefill_tokens=100, prefill_s=2.0))
    later = Work(prefill_tokens=200, prefill_s=12.0)
    token_s = (1 - RECENT) * 0.02 + RECENT * 0.1
    for _ in range(3):
        assert pace.seconds(10, later) == pytest.approx(MARGIN * 10 * token_s)


def test_it_follows_a_change_in_the_end() -> None:
    pace = Pace()
    for number in range(1, 100):
        seconds = pace.seconds(1, Work(prefill_tokens=100 * number, prefill_s=1000.0 + 1.0 * number))
    assert seconds == pytest.approx(MARGIN * 0.01, rel=0.01)
