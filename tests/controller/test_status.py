"""The state of the whole, from readings and decisions; pure."""

import asyncio
import os
from typing import cast

import pytest

from services.controller.brain import Brain
from services.controller.canary import Canary
from services.controller.cluster import Cluster
from services.controller.decisions import Decisions
from services.controller.maps import Maps
from services.controller.policy.load import GroupLoad
from services.controller.provisioning import BusProvisioner, Provisioning
from services.controller.status import status
from services.controller.workflows import Workflows
from shared.bus.connection import Bus
from shared.groups import Control, default_groups
from shared.messages.control import merged_status
from shared.messages.records import GroupMap, InstanceRecord, LabelTraffic, Traffic
from shared.registry.registry import Registry
from shared.settings import ControllerSettings
from tests.controller.world import map_of, serving, spare
from tests.registry.test_registry import GATEWAY
from tests.registry.test_view import record, view


def brain_of(*readings: tuple[float, list[InstanceRecord]], maps: tuple[GroupMap, ...] = ()) -> Brain:
    """A mind that has read this, and has neither bus nor registry."""
    bus, registry = cast(Bus, None), cast(Registry, None)
    cluster = Cluster(2.0)
    cluster.view, cluster.maps = view(*readings), {one.name: one for one in maps}
    written = Maps(cluster, registry, bus, lambda: None)
    tasks = cast(asyncio.TaskGroup, None)
    workflows = Workflows(ControllerSettings(), cluster, written, Canary(bus, "c", 1.0), bus, tasks)
    provisioning = Provisioning(BusProvisioner(bus))
    return Brain(cluster, written, workflows, Decisions(), provisioning, default_groups(), "auto")


def test_groups_instances_and_who_is_late() -> None:
    late, beating = record("p1", group="chat"), record("d1", role="decode", group="chat")
    other = record("p9", group="code", model="other")
    readings = [
        (1.0 + step, [late, *(one.model_copy(update={"heartbeat": step}) for one in (beating, other))])
        for step in range(4)
    ]
    maps = (map_of("code", other, version=3), map_of("chat", late, beating, scenario="talk", version=7))
    brain = brain_of(*readings, maps=maps)
    brain.cluster.gateways = [GATEWAY]
    brain.cluster.leader = "controller-1"
    found = status("controller-1", brain.cluster, brain, None)
    assert (found.controller, found.leader, found.pid) == ("controller-1", "controller-1", os.getpid())
    assert [(group.name, group.scenario, group.map_version) for group in found.groups] == [
        ("chat", "talk", 7),
        ("code", "code", 3),
    ]
    first, second = found.groups
    assert (first.prefill, first.decode, first.late, first.model) == ([], ["d1"], ["p1"], "m")
    assert (second.prefill, second.decode, second.late, second.model) == (["p9"], [], [], "other")
    assert [one.id for one in found.instances] == ["p1", "d1", "p9"]
    assert [one.late for one in found.instances] == [True, False, False]
    assert found.instances[0].heartbeat_age_s == 3.0
    assert found.gateways == [GATEWAY]


def test_instances_by_group_prefill_first_and_spares_last() -> None:
    records = [
        spare("s1"),
        serving("d1", "decode"),
        serving("p2", "prefill", started_at=2.0),
        serving("p1", "prefill", started_at=1.0),
        serving("a1", "decode", group="a"),
    ]
    brain = brain_of((1.0, records))
    assert [one.id for one in status("c", brain.cluster, brain, None).instances] == ["a1", "p1", "p2", "d1", "s1"]


def test_a_member_is_who_is_in_the_map() -> None:
    """One that is ready, and not announced, is nobody's member."""
    announced, comes = serving("p1", "prefill"), serving("p2", "prefill")
    brain = brain_of((1.0, [announced, comes]), maps=(map_of("chat", announced),))
    [group] = status("c", brain.cluster, brain, None).groups
    assert group.prefill == ["p1"]


def test_the_models_of_a_group_that_is_half_way() -> None:
    members = [serving("p1", "prefill", model="new"), serving("p2", "prefill", model="a")]
    mock = serving("p3", "prefill", engine="mock")
    brain = brain_of((1.0, [*members, mock]), maps=(map_of("chat", *members), map_of("empty"), map_of("mock", mock)))
    found = status("c", brain.cluster, brain, None).groups
    assert [one.model for one in found] == ["a, new", None, "m (mock engine)"]


def test_what_gateways_have_of_a_group_is_summed() -> None:
    brain = brain_of((1.0, []), maps=(map_of("chat"), map_of("default")))
    traffic = {"chat": Traffic(open=5, waiting_prefill=2, waiting_decode=1)}
    brain.cluster.gateways = [GATEWAY.model_copy(update={"id": "g2", "traffic": traffic}), GATEWAY]
    brain.cluster.gateways.append(GATEWAY.model_copy(update={"id": "g0", "traffic": traffic}))
    found = status("c", brain.cluster, brain, None)
    assert [(one.name, one.open, one.waiting) for one in found.groups] == [("chat", 10, 6), ("default", 3, 1)]
    assert [one.id for one in found.gateways] == ["g0", "g1", "g2"]


def test_loads_decisions_and_the_upgrade_are_shown() -> None:
    brain = brain_of((1.0, []), maps=(map_of("chat"), map_of("code")))
    brain.loads["chat"] = GroupLoad(window_s=2.5, num_prefill=1, num_decode=2, ttft_s=0.5)
    brain.decisions.take("chat", "p1 leaves", "it is gone").end("done")
    found = status("c", brain.cluster, brain, "upgrade to x: 1 of 4 instances")
    assert (found.groups[0].load["num_decode"], found.groups[0].load["ttft_s"]) == (2, 0.5)
    assert found.groups[0].load["tpot_s"] is None
    assert found.groups[1].load == {}
    assert [(one.what, one.outcome) for one in found.decisions] == [("p1 leaves", "done")]
    assert found.upgrade == "upgrade to x: 1 of 4 instances"


@pytest.mark.parametrize("control", ["auto", "advise", "off"])
def test_control_is_as_it_was_set_and_paused_meanwhile(control: Control) -> None:
    brain = brain_of((1.0, []))
    brain.control = control
    assert status("c", brain.cluster, brain, None).control == control
    brain.is_paused = True
    assert status("c", brain.cluster, brain, None).control == "paused"


def test_nobody() -> None:
    brain = brain_of()
    found = status("controller-1", brain.cluster, brain, None)
    assert (found.groups, found.instances, found.gateways, found.decisions, found.leader) == ([], [], [], [], None)


def test_the_status_of_many_instances_comes_in_pages_of_bounded_size() -> None:
    """Each fits NATS' default limit, and together they have everything once."""
    members = [
        serving(f"instance-of-a-long-name-{number:05}", "prefill" if number % 2 else "decode", problem="x" * 5000)
        for number in range(2000)
    ]
    gone = serving("gone", "prefill")
    maps = [map_of(f"group-{number:04}") for number in range(300)]
    brain = brain_of((1.0, members), maps=(map_of("all", gone, *members), *maps))
    labels = {f"label-{number}": LabelTraffic() for number in range(1000)}
    failures = {f"instance-of-a-long-name-{number:05}": 1 for number in range(10_000)}
    brain.cluster.gateways = [
        GATEWAY.model_copy(update={"id": f"g{number:02}", "labels": labels, "failures": failures})
        for number in range(50)
    ]
    for number in range(100):
        brain.decisions.take("all", f"decision {number}", "y" * 10_000)
    first = status("c", brain.cluster, brain, "z" * 10_000)
    pages = [first, *(status("c", brain.cluster, brain, None, page) for page in range(1, first.num_pages))]
    assert max(len(page.model_dump_json()) for page in pages) < 700_000
    whole = merged_status(pages)
    assert sorted(one.id for one in whole.instances) == [one.id for one in members]
    assert [one.name for one in whole.groups] == ["all", *(one.name for one in maps)]
    assert sorted([*whole.groups[0].prefill, *whole.groups[0].decode]) == [one.id for one in members]
    assert whole.groups[0].late == ["gone"]
    assert len(whole.gateways) == 50
    assert len(whole.decisions) == 50
    assert status("c", brain.cluster, brain, None, first.num_pages).instances == []


def test_a_status_of_one_page_is_itself() -> None:
    members = [serving("p1", "prefill"), serving("d1", "decode")]
    brain = brain_of((1.0, members), maps=(map_of("chat", *members),))
    found = status("c", brain.cluster, brain, None)
    assert found.num_pages == 1
    assert merged_status([found]) == found
