"""The state of the whole, from readings; pure."""

from services.controller.status import status
from tests.registry.test_registry import GATEWAY
from tests.registry.test_view import record, view


def test_groups_instances_and_who_is_late() -> None:
    readings = [(1.0 + step, [record("d1", role="decode", heartbeat=step), record("p1")]) for step in range(4)]
    chat = view(*readings)
    code = view((1.0, [record("p9", group="code", model="other")]))
    found = status("controller-1", {"code": code, "chat": chat}, [GATEWAY])
    assert [group.name for group in found.groups] == ["chat", "code"]
    first = found.groups[0]
    assert (first.prefill, first.decode, first.late, first.model) == ([], ["d1"], ["p1"], "m")
    assert [one.id for one in found.instances] == ["p1", "d1", "p9"]
    assert [one.late for one in found.instances] == [True, False, False]
    assert found.instances[0].heartbeat_age_s == 3.0
    assert found.gateways == [GATEWAY]


def test_nobody() -> None:
    assert status("controller-1", {}, []).groups == []
