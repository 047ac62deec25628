"""Scenarios of unlabelled requests: by common prefixes, and by lengths; pure."""

import random
import re
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shared import scenario_labels
from shared.messages.records import LabelTraffic
from shared.prefix_keys import prefix_keys
from shared.scenario_labels import Classifier, ScenarioLabels

NAME = re.compile(r"auto-[A-Za-z0-9_-]+")
MANY = 10**6
"""A max_tokens that says nothing."""


def prompt(system: int, num_system: int, rng: random.Random, num_user: int = 100) -> list[int]:
    """A system prompt, the same for the same number, and a user's text like no other."""
    return [1000 + system] * num_system + [rng.randrange(10**6) for _ in range(num_user)]


def label_of(one: Classifier, tokens: list[int], max_tokens: int = MANY) -> str | None:
    return one.classify(prefix_keys(tokens), len(tokens), max_tokens)


def after(num_prompt_tokens: int, *outputs: int) -> Classifier:
    """Having seen requests of one length."""
    one = Classifier()
    for num_output_tokens in outputs:
        one.finished(None, num_prompt_tokens, num_output_tokens)
    return one


def test_nothing_is_known_at_first() -> None:
    assert Classifier().classify((), 100, MANY) is None
    assert label_of(Classifier(), [1] * 5000) is None


def test_a_common_system_prompt_is_a_scenario() -> None:
    one, rng = Classifier(), random.Random(1)
    labels = [label_of(one, prompt(7, 600, rng)) for _ in range(100)]
    assert set(labels[: scenario_labels.NAMED_AT_REQUESTS - 1]) == {None}
    [label] = set(labels[scenario_labels.NAMED_AT_REQUESTS + 1 :])
    assert label is not None
    assert re.fullmatch(r"auto-prefix-[0-9a-f]{8}", label)
    assert one.shared_prefix_tokens(label) == 512
    assert one.shared_prefix_tokens("auto-balanced") == 0


def test_system_prompts_are_told_apart_though_they_begin_alike() -> None:
    """Two tasks under one preamble of 300 tokens: the longest common prefix counts, and what has none is the rest."""
    one, rng = Classifier(), random.Random(2)
    labels: dict[int, Counter[str | None]] = {system: Counter() for system in (0, 1, 2)}
    for number in range(1200):
        system = number % 2 if number % 10 else 2
        own = rng.randrange(10**6) if system == 2 else system
        tokens = [5] * 300 + prompt(own, 800, rng)
        label = label_of(one, tokens)
        if number >= 600:
            labels[system][label] += 1
    found = [set(labels[system]) for system in (0, 1, 2)]
    assert [len(one) for one in found] == [1, 1, 1]
    assert len(set.union(*found)) == 3
    assert [one.shared_prefix_tokens(str(*labels)) for labels in found] == [1024, 1024, 256]


def test_gateways_that_see_alike_requests_use_the_same_labels() -> None:
    gateways = [Classifier(), Classifier()]
    labels: list[set[str | None]] = [set(), set()]
    for number, one in enumerate(gateways):
        rng = random.Random(number)
        for count in range(400):
            label = label_of(one, prompt(count % 3, 300, rng))
            if count >= 200:
                labels[number].add(label)
    assert labels[0] == labels[1]
    assert len(labels[0]) == 3


def test_a_prefix_shorter_than_256_tokens_is_none() -> None:
    """Chat templates begin all prompts alike."""
    one, rng = Classifier(), random.Random(3)
    assert {label_of(one, prompt(0, 192, rng)) for _ in range(200)} == {None}


def test_a_scenario_that_fades_is_none_any_more() -> None:
    one, rng = Classifier(), random.Random(4)
    label = None
    for _ in range(200):
        label = label_of(one, prompt(0, 300, rng))
    assert label is not None
    for number in range(3000):
        label_of(one, prompt(rng.randrange(10**6), 300, rng))
        if number == 300:
            assert label_of(one, prompt(0, 300, rng)) == label, "for a while it is remembered"
    assert label_of(one, prompt(0, 300, rng)) is None
    assert one.shared_prefix_tokens(label) == 0


def test_a_scenario_near_the_limit_keeps_its_name() -> None:
    """One request in 25 is more than it needs to stay, and less than it takes to become one."""
    one, rng = Classifier(), random.Random(5)
    quiet = {label_of(one, prompt(0 if n % 25 == 0 else rng.randrange(1, 10**6), 300, rng)) for n in range(3000)}
    assert quiet == {None}
    for _ in range(100):
        label_of(one, prompt(0, 300, rng))
    labels = [label_of(one, prompt(0 if n % 25 == 0 else rng.randrange(1, 10**6), 300, rng)) for n in range(3000)]
    assert None not in labels[::25]
    assert set(labels) == {labels[0], None}


@pytest.mark.parametrize(
    ("num_prompt_tokens", "num_output_tokens", "label"),
    [
        (2000, 100, scenario_labels.LONG_IN),
        (2000, 500, scenario_labels.LONG_IN),
        (500, 250, scenario_labels.BALANCED),
        (300, 300, scenario_labels.BALANCED),
        (50, 200, scenario_labels.LONG_OUT),
        (20, 2000, scenario_labels.LONG_OUT),
    ],
)
def test_lengths_are_called_after_what_they_lead_to(num_prompt_tokens: int, num_output_tokens: int, label: str) -> None:
    one = after(num_prompt_tokens, *[num_output_tokens] * (scenario_labels.NUM_DONE_FOR_CLASS - 1))
    assert one.classify((), num_prompt_tokens, MANY) is None
    one.finished(None, num_prompt_tokens, num_output_tokens)
    assert one.classify((), num_prompt_tokens, MANY) == label
    assert one.classify((), 8 * num_prompt_tokens, MANY) is None, "other lengths are for themselves"


def test_a_request_that_may_generate_little_is_known_without_a_past() -> None:
    assert Classifier().classify((), 1000, 250) == scenario_labels.LONG_IN
    assert Classifier().classify((), 1000, 251) is None
    assert after(100, *[1000] * 20).classify((), 100, 1) == scenario_labels.LONG_IN


def test_a_mean_that_wavers_at_a_boundary_changes_nothing() -> None:
    one = after(400, *[90] * 200)
    for _ in range(300):
        one.finished(None, 400, 130)
        assert one.classify((), 400, MANY) == scenario_labels.LONG_IN
    for _ in range(600):
        one.finished(None, 400, 180)
    assert one.classify((), 400, MANY) == scenario_labels.BALANCED


def test_lengths_learn_nothing_from_scenarios_by_prefix() -> None:
    one = after(500, *[250] * 20)
    for _ in range(500):
        one.finished("auto-prefix-1a2b3c4d", 500, 1)
    assert one.classify((), 500, MANY) == scenario_labels.BALANCED


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.integers(0, 40), st.integers(0, 10**6), st.integers(1, 10**5)), max_size=200
    )
)
def test_labels_are_names(requests: list[tuple[int, int, int, int]]) -> None:
    one = Classifier()
    for system, num_blocks, num_prompt_tokens, num_output_tokens in requests:
        keys = tuple(hash((system, number)) & (2**64 - 1) for number in range(num_blocks))
        label = one.classify(keys, num_prompt_tokens, num_output_tokens + 1)
        assert label is None or NAME.fullmatch(label)
        one.finished(label, num_prompt_tokens, num_output_tokens)


def test_memory_is_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenario_labels, "MAX_PREFIXES", 64)
    one = Classifier()
    rng = random.Random(6)
    for number in range(2000):
        system = 0 if number < 100 else rng.randrange(10**9)
        one.classify(tuple(range(system, system + 32)), rng.randrange(10**6), MANY)
        one.finished(None, rng.randrange(10**6), 5)
    assert len(one._prefixes._counts) == 64
    assert one._prefixes._named == {}, "what is not counted any more is no scenario"
    assert len(one._lengths) <= 21


def test_finished_requests_are_counted_by_label() -> None:
    labels, rng = ScenarioLabels(), random.Random(7)
    found = None
    for _ in range(100):
        tokens = prompt(7, 300, rng)
        found = labels.label(prefix_keys(tokens), len(tokens), MANY)
    assert found is not None
    labels.done(None, 10, 5)
    labels.done(found, 400, 20)
    labels.done(found, 400, 30)
    assert labels.traffic() == {
        "": LabelTraffic(num_done=1, prompt_tokens=10, output_tokens=5),
        found: LabelTraffic(num_done=2, prompt_tokens=800, output_tokens=50, shared_prefix_tokens=256),
    }


def test_the_label_that_was_seen_longest_ago_is_forgotten_first() -> None:
    labels = ScenarioLabels()
    for number in range(scenario_labels.MAX_LABELS):
        labels.done(f"auto-prefix-{number:08x}", 10, 5)
    labels.done("auto-prefix-00000000", 10, 5)
    labels.done("auto-prefix-ffffffff", 10, 5)
    traffic = labels.traffic()
    assert len(traffic) == scenario_labels.MAX_LABELS
    assert traffic["auto-prefix-00000000"].num_done == 2
    assert "auto-prefix-00000001" not in traffic
