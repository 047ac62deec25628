"""What a group did in a window, from records made by hand; pure."""

from collections.abc import Callable, Iterable

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from services.controller.policy.load import GroupLoad
from services.controller.policy.observe import LONG_S, MANY, USUAL_BASE, WINDOW_S, Samples
from shared.messages.records import Admissions, GatewayRecord, InstanceRecord, Role, Traffic, Work
from tests.controller.world import map_of, serving
from tests.registry.test_registry import GATEWAY

CHAT = map_of("chat", serving("p1", "prefill"), serving("d1", "decode"))
PAIR = map_of("chat", *(serving(f"{role[0]}{number}", role) for role in ("prefill", "decode") for number in (1, 2)))
STEP_S = 0.25
Records = Callable[[float], Iterable[InstanceRecord]]
Gateways = Callable[[float], Iterable[GatewayRecord]]


def prefill(at: float, name: str = "p1", **changes: object) -> InstanceRecord:
    """Since 0 it has computed 4 prompts a second, of 0.1 s each; 0.5 s after that a slot is free again."""
    number = int(4 * at)
    values: dict[str, object] = {
        "slots_total": 8,
        "slots_leased": 2,
        "work": Work(prefill_s=0.1 * number, num_prefilled=number, prefill_tokens=100 * number),
        "admissions": Admissions(
            num_accepted=number, num_rejected=2 * int(at), num_ended=number, occupied_s=0.6 * number
        ),
    }
    return serving(name, "prefill", **values | changes)


def decode(at: float, name: str = "d1", **changes: object) -> InstanceRecord:
    """20 steps a second of 0.02 s, of 10 rows each; 4 requests of 50 tokens end in a second, held 1 s each."""
    number = int(20 * at)
    values: dict[str, object] = {
        "slots_total": 64,
        "work": work([(10, 0.02)] * number),
        "admissions": Admissions(num_rejected=int(at), num_ended=int(4 * at), occupied_s=1.0 * int(4 * at)),
    }
    return serving(name, "decode", **values | changes)


def work(steps: Iterable[tuple[int, float]]) -> Work:
    """Of decode steps, each with rows and seconds."""
    found = list(steps)
    return Work(
        decode_steps=len(found),
        decode_s=sum(seconds for _, seconds in found),
        decode_rows=sum(rows for rows, _ in found),
        decode_rows_squared=sum(rows**2 for rows, _ in found),
        decode_rows_s=sum(rows * seconds for rows, seconds in found),
    )


def gateway(at: float, name: str = "g1", group: str = "chat", scale: float = 1.0, **changes: object) -> GatewayRecord:
    """4 requests a second come and are done, with 50 tokens each; 12 are open, 3 of them wait."""
    number = int(4 * at * scale)
    values: dict[str, object] = {
        "open": 12,
        "waiting_prefill": 2,
        "waiting_decode": 1,
        "num_arrived": number,
        "num_done": number,
        "num_first_tokens": number,
        "output_tokens": 50 * number,
        "ttft_s": 0.5 * number,
        "e2e_s": 2.0 * number,
    }
    return GATEWAY.model_copy(update={"id": name, "traffic": {group: Traffic.model_validate(values | changes)}})


def pair(at: float) -> list[InstanceRecord]:
    return [prefill(at), decode(at)]


def one_gateway(at: float) -> list[GatewayRecord]:
    return [gateway(at)]


def samples(
    until: float,
    instances: Records = pair,
    gateways: Gateways = one_gateway,
    start: float = 0.0,
    step_s: float = STEP_S,
) -> Samples:
    """What is seen each quarter of a second, from `start` on."""
    found = Samples()
    for step in range(int((until - start) / step_s) + 1):
        at = start + step * step_s
        found.add(at, {one.id: one for one in instances(at)}, gateways(at))
    return found


def load(found: Samples) -> GroupLoad:
    answer = found.load(CHAT)
    assert answer is not None
    return answer


def test_all_figures_of_a_quiet_stream() -> None:
    found = load(samples(10.0))
    assert found.window_s == WINDOW_S
    assert (found.num_prefill, found.num_decode) == (1, 1)
    assert (found.prefill_slots, found.decode_slots) == (8.0, 64.0)
    assert (found.num_open, found.num_waiting, found.num_leased) == (12.0, 3.0, 2.0)
    assert (found.arrivals_per_s, found.done_per_s) == (4.0, 4.0)
    assert found.refusals_per_s == pytest.approx((2 * 3 + 3) / WINDOW_S)  # of whole seconds, from 7.5 to 10
    assert found.prefill_s == pytest.approx(0.1)
    assert (found.held_prefill_s, found.held_decode_s) == (pytest.approx(0.6), pytest.approx(1.0))
    assert (found.e2e_s, found.ttft_s) == (pytest.approx(2.0), pytest.approx(0.5))
    assert found.prefill_busy == pytest.approx(0.4)
    assert found.decode_busy == pytest.approx(0.4)
    assert found.tpot_s == pytest.approx(1.0 / 49)  # held for a second each, for 49 further tokens
    assert found.output_tokens == pytest.approx(1 + 20 * 10 / 4)


def test_too_few_samples_say_nothing() -> None:
    assert Samples().load(CHAT) is None
    assert samples(0.0).load(CHAT) is None
    assert samples(0.7 * WINDOW_S).load(CHAT) is None
    assert samples(0.9 * WINDOW_S).load(CHAT) is not None
    assert samples(10.0, step_s=5.0).load(CHAT) is None


def test_a_group_of_which_nothing_is_known() -> None:
    found = samples(10.0, lambda at: [], lambda at: []).load(map_of("chat"))
    assert found == GroupLoad(window_s=WINDOW_S, num_prefill=0, num_decode=0, prefill_slots=0.0, decode_slots=0.0)


def test_only_the_last_window_counts() -> None:
    """What was before is another traffic; only what is rare may be older."""

    def gateways(at: float) -> list[GatewayRecord]:
        return [gateway(min(at, 10.0) + 5 * max(0.0, at - 10.0), open=int(at))]

    found = load(samples(12.5, gateways=gateways))
    assert found.arrivals_per_s == pytest.approx(20.0)
    assert found.num_open == pytest.approx(sum(int(10 + STEP_S * step) for step in range(11)) / 11)


def test_samples_are_kept_for_as_long_as_they_may_be_asked_for() -> None:
    found = samples(100.0)
    assert found.since(0.0)[0].at == 100.0 - LONG_S - 1.0
    assert [one.at for one in found.since(99.5)] == [99.5, 99.75, 100.0]


@pytest.mark.parametrize("changed", ["epoch", "gone", "late"])
def test_instances_that_changed_meanwhile_are_left_out(changed: str) -> None:
    """Their counters are of two roles, or of two processes."""

    def instances(at: float) -> list[InstanceRecord]:
        others = [
            prefill(at, "p2", epoch=1 if at < 9.0 else 2, work=Work(prefill_s=9 * at, num_prefilled=int(at))),
            decode(at, "d2", epoch=1 if at < 9.0 else 2, work=work([(40, 0.05)] * int(at))),
        ]
        is_there = changed == "epoch" or (at < 9.0) == (changed == "gone")
        return [prefill(at), decode(at), *(others if is_there else [])]

    found = samples(10.0, instances).load(PAIR)
    assert found is not None
    assert (found.num_prefill, found.num_decode) == (2, 2)
    assert found.prefill_s == pytest.approx(0.1)
    assert (found.held_prefill_s, found.held_decode_s) == (pytest.approx(0.6), pytest.approx(1.0))
    assert found.refusals_per_s == pytest.approx((2 * 3 + 3) / WINDOW_S)
    assert found.output_tokens == pytest.approx(51.0)


def test_members_are_summed_and_slots_averaged() -> None:
    def instances(at: float) -> list[InstanceRecord]:
        return [*pair(at), prefill(at, "p2", slots_total=4, work=Work()), decode(at, "d2", slots_total=32)]

    found = samples(10.0, instances).load(PAIR)
    assert found is not None
    assert (found.num_leased, found.prefill_slots, found.decode_slots) == (4.0, 6.0, 48.0)
    assert (found.prefill_busy, found.decode_busy) == (pytest.approx(0.2), pytest.approx(0.4))
    assert found.output_tokens == pytest.approx(101.0)


def test_instances_and_requests_of_other_groups_do_not_count() -> None:
    def gateways(at: float) -> list[GatewayRecord]:
        return [gateway(at), gateway(at, "g2", group="code", scale=7.0)]

    found = load(samples(10.0, lambda at: [*pair(at), decode(at, "d9", group="code")], gateways))
    assert (found.num_open, found.arrivals_per_s, found.num_decode) == (12.0, 4.0, 1)


def test_gateways_are_summed() -> None:
    found = load(samples(10.0, gateways=lambda at: [gateway(at), gateway(at, "g2", scale=2.0, e2e_s=10.0)]))
    assert (found.num_open, found.num_waiting, found.arrivals_per_s) == (24.0, 6.0, 12.0)
    assert found.e2e_s == pytest.approx(2.0 / 3)


def test_a_gateway_that_has_come_or_gone_meanwhile_counts_not() -> None:
    """But what is open in it now does."""

    def gateways(at: float) -> list[GatewayRecord]:
        return [gateway(at), gateway(at, "g2" if at < 9.0 else "g3", scale=100.0)]

    found = load(samples(10.0, gateways=gateways))
    assert (found.arrivals_per_s, found.done_per_s) == (4.0, 4.0)
    assert found.num_open == 24.0
    assert load(samples(10.0, gateways=lambda at: one_gateway(at) if at < 9.0 else [])).arrivals_per_s == 0.0


def test_a_gateway_that_restarted_under_its_name_takes_nothing_away() -> None:
    def gateways(at: float) -> list[GatewayRecord]:
        return [gateway(at), gateway(at if at < 9.0 else 0.0, "g2")]

    found = load(samples(10.0, gateways=gateways))
    assert found.arrivals_per_s == 4.0


def test_a_gateway_whose_first_request_of_the_group_came_meanwhile() -> None:
    def gateways(at: float) -> list[GatewayRecord]:
        return [gateway(at, group="chat" if at > 8.0 else "code")]

    assert load(samples(10.0, gateways=gateways)).arrivals_per_s == pytest.approx(40 / WINDOW_S)


def stepping(steps: Callable[[float], list[tuple[int, float]]]) -> Records:
    """A decode instance that has done these steps until a moment."""
    return lambda at: [prefill(at), decode(at, work=work(steps(at)))]


@settings(deadline=None, max_examples=50)
@given(base=st.floats(0, 0.1), row=st.floats(0, 0.01), low=st.integers(1, 20), more=st.integers(2, 40))
def test_what_a_step_takes_is_fitted_from_sums(base: float, row: float, low: int, more: int) -> None:
    """Steps of `low` and of `low + more` rows in turn, far enough apart to tell rows from base."""
    assume(more > 0.3 * low)

    def steps(at: float) -> list[tuple[int, float]]:
        rows = [low + more * (number % 2) for number in range(int(20 * at))]
        return [(one, base + row * one) for one in rows]

    found = load(samples(3.0, stepping(steps)))
    assert found.step_base_s == pytest.approx(base, abs=1e-6)
    assert found.step_row_s == pytest.approx(row, abs=1e-6)


@pytest.mark.parametrize("rows", [2, 10, 1000])
def test_of_steps_with_constant_rows_a_usual_part_is_base(rows: int) -> None:
    found = load(samples(10.0, stepping(lambda at: [(rows, 0.02)] * int(20 * at))))
    assert found.step_base_s == pytest.approx(0.02 * USUAL_BASE)
    assert found.step_row_s == pytest.approx(0.02 * (1 - USUAL_BASE) / rows)


def test_steps_of_one_row_are_all_base() -> None:
    found = load(samples(10.0, stepping(lambda at: [(1, 0.02)] * int(20 * at))))
    assert (found.step_base_s, found.step_row_s) == (pytest.approx(0.02), 0.0)


def test_rows_cost_neither_less_than_nothing_nor_more_than_all() -> None:
    """Whatever noise says."""

    def quicker(at: float) -> list[tuple[int, float]]:
        return [(10, 0.03) if number % 2 else (20, 0.02) for number in range(int(20 * at))]

    def steep(at: float) -> list[tuple[int, float]]:
        return [(10, 0.001) if number % 2 else (20, 0.1) for number in range(int(20 * at))]

    found = load(samples(3.0, stepping(quicker)))
    assert (found.step_base_s, found.step_row_s) == (pytest.approx(0.025), 0.0)
    found = load(samples(3.0, stepping(steep)))
    assert found.step_base_s == pytest.approx(0.0)
    assert found.step_row_s == pytest.approx(0.0505 / 15)


def test_figures_that_the_window_lacks_are_of_a_longer_one() -> None:
    """Prompts, steps and requests are few in the last seconds."""

    def instances(at: float) -> list[InstanceRecord]:
        return [prefill(min(at, 5.0)), decode(min(at, 5.0))]

    found = load(samples(20.0, instances, lambda at: [gateway(min(at, 5.0))]))
    assert found.prefill_s == pytest.approx(0.1)
    assert found.step_base_s == pytest.approx(0.01)
    assert found.output_tokens == pytest.approx(50.0)
    assert (found.arrivals_per_s, found.prefill_busy, found.decode_busy) == (0.0, 0.0, 0.0)
    assert (found.held_prefill_s, found.held_decode_s, found.e2e_s, found.ttft_s, found.tpot_s) == (None,) * 5


def test_prompts_that_stay_at_decode_take_nothing_of_prefill() -> None:
    """Half as many of these requests as all come to prefill."""
    found = load(samples(10.0, gateways=lambda at: [gateway(at, scale=2.0)]))
    assert found.prefill_s == pytest.approx(0.05)


def test_what_was_never_measured_is_unknown() -> None:
    found = load(samples(10.0, lambda at: [prefill(0.0), decode(0.0)], lambda at: [gateway(0.0)]))
    assert (found.prefill_s, found.step_base_s, found.step_row_s, found.output_tokens) == (None,) * 4


def test_output_tokens_are_those_that_flow() -> None:
    """Long answers that are still going on count, where the mean over those done knows only short ones."""
    rows = 400 // 20
    found = load(samples(10.0, stepping(lambda at: [(rows, 0.02)] * int(20 * at))))
    assert found.done_per_s * found.window_s >= MANY
    assert found.output_tokens == pytest.approx(1 + 400 / 4)


def test_few_requests_say_half_of_what_flows() -> None:
    """500 tokens flow while 5 requests are done, all of which had 50."""
    found = load(samples(30.0, gateways=lambda at: [gateway(at, scale=0.5)]))
    assert found.done_per_s * found.window_s == MANY / 2
    assert found.output_tokens == pytest.approx(1 + (500 / 5 + 49) / 2)


@pytest.mark.parametrize("role", ["prefill", "decode"])
def test_nobody_is_busier_than_all_the_time(role: Role) -> None:
    """Steps are counted when they end."""
    instances = {
        "prefill": lambda at: [prefill(at, work=Work(prefill_s=3 * at, num_prefilled=int(at))), decode(at)],
        "decode": stepping(lambda at: [(10, 0.2)] * int(20 * at)),
    }
    found = load(samples(10.0, instances[role]))
    assert (found.prefill_busy if role == "prefill" else found.decode_busy) == 1.0
