"""The state of the whole, from what has been read of the registry. Pure."""

from collections.abc import Iterable, Mapping

from shared import __version__
from shared.bus.messages import GroupStatus, InstanceStatus, Status
from shared.registry.records import GatewayRecord
from shared.registry.view import View


def status(controller_id: str, groups: Mapping[str, View], gateways: Iterable[GatewayRecord]) -> Status:
    """Groups with their instances, as of each view's last reading."""
    instances = [one for name in sorted(groups) for one in instances_of(groups[name])]
    return Status(
        version=__version__,
        controller=controller_id,
        groups=[group_of(name, instances_of(groups[name])) for name in sorted(groups)],
        instances=instances,
        gateways=sorted(gateways, key=lambda one: one.id),
    )


def instances_of(view: View) -> list[InstanceStatus]:
    """A view's instances, prefill first, each with the age of its heartbeat."""
    ordered = sorted(view.seen.values(), key=lambda one: (one.record.role != "prefill", one.record.id))
    return [
        InstanceStatus(
            **one.record.model_dump(), heartbeat_age_s=round(view.read_at - one.moved_at, 3), late=view.is_late(one)
        )
        for one in ordered
    ]


def group_of(name: str, instances: list[InstanceStatus]) -> GroupStatus:
    """A group: who plays which role, and whose heartbeat is late."""
    live = [one for one in instances if not one.late]
    return GroupStatus(
        name=name,
        model=live[0].model if live else None,
        prefill=[one.id for one in live if one.role == "prefill"],
        decode=[one.id for one in live if one.role == "decode"],
        late=[one.id for one in instances if one.late],
    )
