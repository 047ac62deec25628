"""Scenarios that gateways found: from their counters to loads, and who has a group of its own; pure."""

from collections.abc import Callable, Iterable

import pytest

from services.controller.discovery import EVERY_S, WINDOW_S, Discovery, label_loads
from services.controller.policy.observe import Samples
from services.controller.policy.scenarios import Decision, Instances, LabelLoad, State
from shared.messages.records import GatewayRecord, LabelTraffic
from tests.registry.test_registry import GATEWAY

LABEL = "auto-long-in"
SIX = Instances(default=6)
Gateways = Callable[[float], Iterable[GatewayRecord]]


def traffic(num_done: float, prompt_tokens: int = 1000, output_tokens: int = 10, prefix: int = 0) -> LabelTraffic:
    """So many requests, of so many tokens each."""
    number = int(num_done)
    return LabelTraffic(
        num_done=number,
        prompt_tokens=prompt_tokens * number,
        output_tokens=output_tokens * number,
        shared_prefix_tokens=prefix,
    )


def gateway(name: str = "g1", **labels: LabelTraffic) -> GatewayRecord:
    """Labels by names in which _ stands for -; `none` is for requests without one."""
    found = {"" if label == "none" else label.replace("_", "-"): one for label, one in labels.items()}
    return GATEWAY.model_copy(update={"id": name, "labels": found})


def both(at: float) -> list[GatewayRecord]:
    """Long prompts, 4 a second, beside others of 10 a second."""
    return [gateway(auto_long_in=traffic(4 * at), none=traffic(10 * at, 100, 50))]


def samples(until: float, gateways: Gateways, step_s: float = 1.0) -> Samples:
    found = Samples()
    for step in range(int(until / step_s) + 1):
        found.add(step * step_s, {}, gateways(step * step_s))
    return found


def test_loads_are_of_the_last_window() -> None:
    def gateways(at: float) -> list[GatewayRecord]:
        late = max(0.0, at - 10.0)
        return [gateway(auto_a=traffic(50 * min(at, 10.0) + 4 * late, prefix=300), none=traffic(2 * at, 100, 50))]

    assert label_loads(samples(20.0, gateways), 20.0) == {
        "auto-a": LabelLoad(4.0, 1000.0, 10.0, 300),
        "": LabelLoad(2.0, 100.0, 50.0, 0),
    }


def test_gateways_are_summed_where_they_were_there_in_all_of_the_window() -> None:
    def gateways(at: float) -> list[GatewayRecord]:
        found = [gateway(auto_a=traffic(4 * at, prefix=200)), gateway("g2", auto_a=traffic(2 * at, 400, 40, 300))]
        return [*found, gateway("g3" if at < 15.0 else "g4", auto_a=traffic(100 * at))]

    [(label, found)] = label_loads(samples(20.0, gateways), 20.0).items()
    assert label == "auto-a"
    assert found == LabelLoad(6.0, pytest.approx(800.0), pytest.approx(20.0), 300)


def test_a_label_that_is_new_counts_from_nothing() -> None:
    found = label_loads(samples(20.0, lambda at: [gateway(**({"auto_a": traffic(20)} if at > 15.0 else {}))]), 20.0)
    assert found["auto-a"].requests_per_s == 20 / WINDOW_S


def test_a_gateway_that_restarted_under_its_name_takes_nothing_away() -> None:
    def gateways(at: float) -> list[GatewayRecord]:
        return [gateway(auto_a=traffic(4 * at)), gateway("g2", auto_a=traffic(at if at < 15.0 else 0))]

    assert label_loads(samples(20.0, gateways), 20.0)["auto-a"].requests_per_s == 4.0


@pytest.mark.parametrize("until", [0.0, 20.0])
def test_without_requests_there_are_no_loads(until: float) -> None:
    assert label_loads(samples(until, lambda at: [gateway(auto_a=traffic(7))]), until) == {}
    assert label_loads(samples(until, lambda at: []), until) == {}
    assert label_loads(Samples(), until) == {}


def test_a_label_is_found_and_dissolved() -> None:
    """By figures as they come, second by second."""
    discovery, seen = Discovery(), Samples()
    decided: list[tuple[float, Decision]] = []
    for second in range(1, 400):
        at = float(second)
        done = 4 * min(at, 100.0)
        seen.add(at, {}, [gateway(auto_long_in=traffic(done), none=traffic(10 * at, 100, 50))])
        decision = discovery.decide(seen, SIX, at)
        if decision is not None:
            decided.append((at, decision))
        assert (LABEL in discovery.state.groups) == (len(decided) == 1)
    assert [(one.action, one.label) for _, one in decided] == [("found", LABEL), ("dissolve", LABEL)]
    (found_at, _), (dissolved_at, _) = decided
    assert found_at == 2 + 30  # two samples, and then for so long
    assert 160 <= dissolved_at <= 160 + WINDOW_S


def test_what_has_no_label_is_what_labels_are_held_against() -> None:
    """It gets no group itself, however much it is."""
    discovery, seen = Discovery(), Samples()
    for second in range(1, 100):
        seen.add(float(second), {}, [gateway(none=traffic(50 * second), auto_long_out=traffic(second, 10, 10))])
        assert discovery.decide(seen, SIX, float(second)) is None
    assert discovery.state == State()


def test_it_looks_once_a_second() -> None:
    discovery, seen = Discovery(), samples(20.0, both)
    discovery.decide(seen, SIX, 20.0)
    assert discovery.state.due_since == {LABEL: 20.0}
    for step in range(1, int(100 / EVERY_S)):  # asked ten times a second, it is as if it was asked once
        discovery.decide(Samples(), SIX, 20.0 + step / 100)
    assert discovery.state.due_since == {LABEL: 20.0}
    discovery.decide(Samples(), SIX, 20.0 + EVERY_S)
    assert discovery.state.due_since == {}


def test_a_new_leader_begins_with_the_groups_that_it_finds() -> None:
    discovery = Discovery(State(frozenset({"auto-old"}), changed_at=1.0))
    discovery.take_over(["default", "chat", "automatic", LABEL])
    assert discovery.state == State(frozenset({LABEL}))


def test_a_replica_is_no_scenario() -> None:
    discovery = Discovery()
    discovery.take_over([LABEL, f"{LABEL}--2"])
    assert discovery.state.groups == {LABEL}
