"""How many prompts an instance accepts for its next step."""

import pytest

from shared.instance.admission import can_start_next, tokens_free


@pytest.mark.parametrize(
    ("num_uncomputed", "num_prompt_tokens", "accepted"),
    [
        (0, 1, True),
        (0, 5000, True),  # begins alone
        (100, 412, True),  # fits as a whole
        (100, 413, False),  # would make the prompts before it wait for its beginning
        (511, 1, True),
        (512, 1, False),
        (3000, 1, False),
    ],
)
def test_a_prompt_shares_the_next_step_only_as_a_whole(
    num_uncomputed: int, num_prompt_tokens: int, accepted: bool
) -> None:
    free = tokens_free(512, 0, num_uncomputed)
    assert can_start_next(num_prompt_tokens, free, num_uncomputed) is accepted


def test_no_prompt_begins_where_decodes_take_the_whole_step() -> None:
    assert not can_start_next(1, tokens_free(512, 512, 0), 0)


def test_a_larger_bound_makes_a_queue() -> None:
    assert can_start_next(2000, tokens_free(10_000, 0, 6000), 6000)
    assert not can_start_next(2000, tokens_free(10_000, 0, 9000), 9000)
