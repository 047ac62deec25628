"""The state of the whole, from what has been read and decided."""

import os
from dataclasses import asdict

from services.controller.brain import Brain
from services.controller.cluster import Cluster
from shared import __version__
from shared.messages.control import GroupStatus, InstanceStatus, Status
from shared.messages.records import GroupMap, InstanceRecord
from shared.registry.view import View


def status(controller_id: str, cluster: Cluster, brain: Brain, upgrade: str | None) -> Status:
    """Groups, instances and gateways as of the last reading."""
    instances = instances_of(cluster.view)
    return Status(
        version=__version__,
        controller=controller_id,
        pid=os.getpid(),
        leader=cluster.leader,
        control="paused" if brain.is_paused else brain.control,
        groups=[group_of(cluster.maps[name], instances, cluster, brain) for name in sorted(cluster.maps)],
        instances=instances,
        gateways=sorted(cluster.gateways, key=lambda one: one.id),
        decisions=brain.decisions.status(),
        upgrade=upgrade,
    )


def instances_of(view: View[InstanceRecord]) -> list[InstanceStatus]:
    """A view's instances, by group, prefill first, spares last, each with the age of its heartbeat."""
    ordered = sorted(
        view.seen.values(),
        key=lambda one: (one.record.group or "~", one.record.role != "prefill", one.record.started_at, one.record.id),
    )
    return [
        InstanceStatus(
            **one.record.model_dump(), heartbeat_age_s=round(view.read_at - one.moved_at, 3), late=view.is_late(one)
        )
        for one in ordered
    ]


def group_of(group: GroupMap, instances: list[InstanceStatus], cluster: Cluster, brain: Brain) -> GroupStatus:
    """A group's members, and what gateways and the controller have seen of it."""
    members = {one.instance_id: one.role for one in group.members}
    late = members.keys() - {one.id for one in instances if not one.late}
    models = {_named(one) for one in instances if one.id in members}
    traffic = [one.traffic[group.name] for one in cluster.gateways if group.name in one.traffic]
    load = brain.loads.get(group.name)
    return GroupStatus(
        name=group.name,
        scenario=group.scenario,
        model=", ".join(sorted(models)) or None,
        prefill=[one for one, role in members.items() if role == "prefill" and one not in late],
        decode=[one for one, role in members.items() if role == "decode" and one not in late],
        late=sorted(late),
        map_version=group.version,
        waiting=sum(one.waiting_prefill + one.waiting_decode for one in traffic),
        open=sum(one.open for one in traffic),
        load=asdict(load) if load is not None else {},
    )


def _named(one: InstanceStatus) -> str:
    return f"{one.model} (mock engine)" if one.engine == "mock" else one.model
