"""Writing the maps of groups, and announcing them."""

import asyncio
import logging
import time
from collections.abc import Callable, Iterable

from services.controller.cluster import Cluster
from shared.bus import subjects
from shared.bus.connection import Bus
from shared.errors import PDServeError
from shared.groups import GroupSpec
from shared.messages.records import GroupMap, InstanceRecord, Member
from shared.messages.serving import Message
from shared.registry.registry import Lead, Registry

log = logging.getLogger(__name__)


class LeadLost(PDServeError):
    """Another controller leads: what was to be written must not be."""


class GroupGone(PDServeError):
    """The group has no map any more: nobody can join it."""


class Maps:
    """The leader's pen. Every change is written under its lease, and announced once it is."""

    def __init__(self, cluster: Cluster, registry: Registry, bus: Bus, lead: Callable[[], Lead | None]) -> None:
        self._cluster = cluster
        self._registry = registry
        self._bus = bus
        self._lead = lead
        self._writing = asyncio.Lock()
        """Each change begins with what the one before has left."""

    def term(self) -> int:
        """Of our leadership. Raises `LeadLost`."""
        lead = self._lead()
        if lead is None:
            raise LeadLost("this controller leads no more")
        return lead.term

    async def declare(self, spec: GroupSpec, *, finds_scenarios: bool = False, founder: str = "") -> None:
        """Makes sure that a group has a map, with the objectives that are declared, and the model of its `founder` if
        it is new: the group whose replica it is, or whose requests it takes over.
        """
        name = spec.name
        wanted = {
            "scenario": spec.scenario,
            "ttft_s": spec.ttft_s,
            "tpot_s": spec.tpot_s,
            "finds_scenarios": finds_scenarios,
        }
        async with self._writing:
            known = self._cluster.maps.get(name)
            if known is None:
                found = self._cluster.maps.get(founder)
                models = {"model_path": found.model_path, "next_model_path": found.next_model_path} if found else {}
                await self._write(GroupMap.model_validate({"name": name, "version": 0, "term": 0, **wanted, **models}))
            elif {key: getattr(known, key) for key in wanted} != wanted:
                await self._write(known.model_copy(update=wanted))

    async def add(self, group: str, record: InstanceRecord) -> None:
        """Announces an instance as a member, as its record has it. Raises `GroupGone`."""
        assert record.role is not None, "a member has a role"
        member = Member(
            instance_id=record.id,
            role=record.role,
            epoch=record.epoch,
            fingerprint=record.fingerprint,
            kv_host=record.kv_host,
            kv_port=record.kv_port,
        )
        async with self._writing:
            known = self._known(group)
            others = tuple(one for one in known.members if one.instance_id != record.id)
            await self._write(known.model_copy(update={"members": (*others, member)}))

    async def remove(self, instance_ids: Iterable[str]) -> None:
        """Takes instances out of whichever map has them."""
        gone = set(instance_ids)
        async with self._writing:
            for known in list(self._cluster.maps.values()):
                kept = tuple(one for one in known.members if one.instance_id not in gone)
                if len(kept) < len(known.members):
                    await self._write(known.model_copy(update={"members": kept}))

    def next_model(self) -> str | None:
        """The model of an upgrade under way, whoever has begun it."""
        return next((one.next_model_path for one in self._cluster.maps.values() if one.next_model_path), None)

    async def plan_model(self, model_path: str | None) -> None:
        """Says that an upgrade will give all groups other weights; None that it will not, after all."""
        async with self._writing:
            for known in list(self._cluster.maps.values()):
                if known.next_model_path != model_path:
                    await self._write(known.model_copy(update={"next_model_path": model_path}))

    async def want_model(self, name: str, model_path: str | None) -> None:
        """From now on the group's members have these weights, and whoever joins gets them. Raises `GroupGone`."""
        async with self._writing:
            update = {"model_path": model_path, "next_model_path": None}
            await self._write(self._known(name).model_copy(update=update))

    async def forget(self, name: str) -> None:
        """Forgets a group that is no more."""
        async with self._writing:
            lead = self._lead()
            if lead is None or not await self._registry.remove_map(lead, name):
                raise LeadLost("this controller leads no more")
            self._cluster.maps.pop(name, None)

    async def restore(self) -> None:
        """Writes maps again that Redis has lost, or that somebody else has changed."""
        versions = await self._registry.map_versions()
        maps = await self._registry.maps()
        written = {one.name: one.version for one in maps if versions.get(one.name) == one.version}
        async with self._writing:
            for name, known in list(self._cluster.maps.items()):
                if written.get(name, -1) < known.version:
                    await self._write(known)

    def _known(self, name: str) -> GroupMap:
        known = self._cluster.maps.get(name)
        if known is None:
            raise GroupGone(f"group {name} is no more")
        return known

    async def _write(self, changed: GroupMap) -> None:
        lead = self._lead()
        version = max(changed.version + 1, int(time.time() * 1000))
        new = changed.model_copy(update={"version": version, "term": self.term()})
        if lead is None or not await self._registry.write_map(lead, new):
            raise LeadLost("this controller leads no more")
        self._cluster.maps[new.name] = new
        await self._bus.publish(subjects.CHANGED, Message())
