"""The state of the whole, page by page, from what has been read and decided."""

import os
from collections.abc import Iterable
from dataclasses import asdict
from itertools import islice
from math import ceil
from typing import TypeVar

from services.controller.brain import Brain
from services.controller.cluster import Cluster
from shared import __version__
from shared.errors import MAX_MESSAGE_CHARS, shortened
from shared.messages.control import DecisionStatus, GroupStatus, InstanceStatus, Status
from shared.messages.records import GatewayRecord, GroupMap, InstanceRecord
from shared.registry.view import View

INSTANCES_PER_PAGE = 100
GROUPS_PER_PAGE = 50
GATEWAYS_PER_PAGE = 20
MAX_TEXT_CHARS = 500
MAX_ENTRIES = 50
"""A gateway's figures are shown for so many groups, labels and instances."""

Value = TypeVar("Value")


def status(controller_id: str, cluster: Cluster, brain: Brain, upgrade: str | None, page: int = 0) -> Status:
    """One page of the groups, instances and gateways as of the last reading.

    Its size has a bound, however many instances there are; `merged_status` puts the pages together.
    """
    view = cluster.view
    ids = _ids(view)
    members = {one.instance_id for known in cluster.maps.values() for one in known.members}
    everyone = [*ids, *sorted(members - view.seen.keys())]
    shown = set(_slice(everyone, page, INSTANCES_PER_PAGE))
    names = sorted(cluster.maps)
    shown_names = set(_slice(names, page, GROUPS_PER_PAGE))
    groups = [cluster.maps[name] for name in names]
    gateways = sorted(cluster.gateways, key=lambda one: one.id)
    return Status(
        page=page,
        num_pages=max(
            1,
            ceil(len(everyone) / INSTANCES_PER_PAGE),
            ceil(len(names) / GROUPS_PER_PAGE),
            ceil(len(gateways) / GATEWAYS_PER_PAGE),
        ),
        version=__version__,
        controller=controller_id,
        pid=os.getpid(),
        leader=cluster.leader,
        control="paused" if brain.is_paused else brain.control,
        groups=[
            group_of(group, shown, cluster, brain)
            for group in groups
            if group.name in shown_names or any(one.instance_id in shown for one in group.members)
        ],
        instances=_instances(view, [one for one in _slice(everyone, page, INSTANCES_PER_PAGE) if one in view.seen]),
        gateways=[_bounded(one) for one in _slice(gateways, page, GATEWAYS_PER_PAGE)],
        decisions=[_shortened(one) for one in brain.decisions.status()] if page == 0 else [],
        upgrade=None if upgrade is None else shortened(upgrade, MAX_MESSAGE_CHARS),
    )


def _ids(view: View[InstanceRecord]) -> list[str]:
    """A view's instances: by group, prefill first, spares last."""
    records = sorted(
        (one.record for one in view.seen.values()),
        key=lambda one: (one.group or "~", one.role != "prefill", one.started_at, one.id),
    )
    return [one.id for one in records]


def _instances(view: View[InstanceRecord], ids: Iterable[str]) -> list[InstanceStatus]:
    """Records, each with the age of its heartbeat."""
    found = []
    for one in (view.seen[instance_id] for instance_id in ids):
        fields = one.record.model_dump()
        fields["problem"] = fields["problem"] and shortened(fields["problem"], MAX_TEXT_CHARS)
        age_s = round(view.read_at - one.moved_at, 3)
        found.append(InstanceStatus(**fields, heartbeat_age_s=age_s, late=view.is_late(one)))
    return found


def group_of(group: GroupMap, shown: set[str], cluster: Cluster, brain: Brain) -> GroupStatus:
    """A group as gateways and the controller have seen it, with those of its members that are `shown`."""
    seen = cluster.view.seen
    members = {one.instance_id: one.role for one in group.members}
    late = {one for one in members if one not in seen or cluster.view.is_late(seen[one])}
    models = {_named(seen[one].record) for one in members if one in seen}
    traffic = [one.traffic[group.name] for one in cluster.gateways if group.name in one.traffic]
    load = brain.loads.get(group.name)
    return GroupStatus(
        name=group.name,
        scenario=group.scenario,
        model=shortened(", ".join(sorted(models)), MAX_TEXT_CHARS) or None,
        prefill=[one for one, role in members.items() if role == "prefill" and one in shown and one not in late],
        decode=[one for one, role in members.items() if role == "decode" and one in shown and one not in late],
        late=sorted(late & shown),
        map_version=group.version,
        waiting=sum(one.waiting_prefill + one.waiting_decode for one in traffic),
        open=sum(one.open for one in traffic),
        load=asdict(load) if load is not None else {},
    )


def _slice(values: list[Value], page: int, size: int) -> list[Value]:
    return values[page * size : (page + 1) * size]


def _bounded(gateway: GatewayRecord) -> GatewayRecord:
    names = ("traffic", "labels", "failures", "link_failures")
    return gateway.model_copy(
        update={name: dict(islice(getattr(gateway, name).items(), MAX_ENTRIES)) for name in names}
    )


def _shortened(decision: DecisionStatus) -> DecisionStatus:
    texts = {key: shortened(getattr(decision, key), MAX_TEXT_CHARS) for key in ("what", "why", "outcome")}
    return decision.model_copy(update=texts)


def _named(one: InstanceRecord) -> str:
    return f"{one.model} (mock engine)" if one.engine == "mock" else one.model
