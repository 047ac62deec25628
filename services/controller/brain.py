"""What the leading controller does each quarter of a second: read, decide, begin workflows.

Deciding is in `policy/`, doing is in `workflows.py`; here one is given to the other.
"""

import logging
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field

from pydantic import ValidationError

from services.controller.cluster import Cluster
from services.controller.decisions import Decisions
from services.controller.discovery import Discovery
from services.controller.maps import Maps
from services.controller.policy import membership, ratio
from services.controller.policy.load import GroupLoad
from services.controller.policy.membership import Admit, Place, Remove, Situation
from services.controller.policy.observe import Samples
from services.controller.policy.ratio import Bounds, History, Move
from services.controller.policy.scenarios import Instances
from services.controller.provisioning import Provisioning
from services.controller.scaling import Scaling
from services.controller.vacancies import VACANT_S, Vacancies
from services.controller.workflows import Workflows
from shared.groups import DEFAULT, Control, GroupsFile, GroupSpec, declared_name
from shared.messages.records import ROLES, InstanceRecord, Role

SETTLE_S = 5.0
"""How long a new group waits for instances that wish to be in it, before it takes spares."""
MIN_GROUP = 2
"""Instances that a group has at least: one of each role."""

LACKING_S = 3.0
"""How long a declared place may be vacant before instances are asked for."""
SCALE_IN_PATIENCE_S = 60.0
"""How long requests of a group that is no more may take to end."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Brain:
    """The leader's mind: what is declared, what was seen, and what is under way."""

    cluster: Cluster
    maps: Maps
    workflows: Workflows
    decisions: Decisions
    provisioning: Provisioning
    groups: GroupsFile
    control: Control
    specs: dict[str, GroupSpec] = field(default_factory=dict)
    """The groups that there should be now, by name."""
    scaling: Scaling = field(init=False)
    samples: Samples = field(default_factory=Samples)
    discovery: Discovery = field(default_factory=Discovery)
    loads: dict[str, GroupLoad] = field(default_factory=dict)
    is_paused: bool = False
    """Ratios are left alone, as during an upgrade."""
    _histories: dict[str, History] = field(default_factory=dict)
    _lacking_since: float | None = None
    _vacancies: Vacancies = field(default_factory=Vacancies)
    _known_since: dict[str, float] = field(default_factory=dict)
    """Since when (monotonic) there is a group."""
    _odd_names: set[str] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.scaling = Scaling({spec.name: spec for spec in self.groups.groups}, self.decisions)

    async def take_over(self) -> None:
        """The first thing that a new leader does: it goes on from what it finds."""
        self._histories.clear()
        if self.groups.automatic_scenarios:
            self.discovery.take_over(self.cluster.maps)
            for name in self.discovery.state.groups:
                self.scaling.declared.setdefault(name, GroupSpec(name=name, scenario=name))
        self.scaling.take_over(set(self.cluster.maps))

    async def think(self) -> None:
        """One round."""
        now = time.monotonic()
        await self.maps.restore()
        self.samples.add(now, self.cluster.alive, self.cluster.gateways)
        self._adopt_groups()
        await self._declare_groups(now)
        await self._follow_membership(now)
        for name in self.specs:
            self._control_ratio(name, now)
        if self.control == "auto" and not self.is_paused:
            self._give(now)
            self._discover(now)

    def _adopt_groups(self) -> None:
        """Groups that nobody has declared, but that instances wish to be in."""
        for record in self.cluster.alive.values():
            name = record.preferred_group
            if name is None or name in self.scaling.declared or name in self._odd_names:
                continue
            try:
                self.scaling.declared[name] = GroupSpec(name=name, scenario=name)
            except ValidationError:
                self._odd_names.add(name)
                log.warning("%s wishes to be in group %r, which is no name for a group", record.id, name)

    async def _declare_groups(self, now: float) -> None:
        """The groups that there should be have maps; those that should not lose theirs once nobody is in it."""
        self.scaling.follow(self.loads, len(self.spares()), now)
        self.specs = self.scaling.specs()
        for spec in self.specs.values():
            finds = self.groups.automatic_scenarios and spec.name == DEFAULT
            founder = DEFAULT if spec.name in self.discovery.state.groups else declared_name(spec.name)
            await self.maps.declare(spec, finds_scenarios=finds, founder=founder)
        for name, group in list(self.cluster.maps.items()):
            if name not in self.specs and not group.members:
                await self.maps.forget(name)
                self.loads.pop(name, None)

    def spares(self) -> list[InstanceRecord]:
        """Instances without a role that may be given one, the oldest first."""
        found = [
            one
            for one in self.cluster.alive.values()
            if one.state == "spare" and one.id not in self.workflows.coming and one.id not in self.workflows.kept_out
        ]
        return sorted(found, key=lambda one: (one.started_at, one.id))

    def _discover(self, now: float) -> None:
        """Founds and dissolves the groups of scenarios that gateways have found."""
        default = self.cluster.maps.get(DEFAULT)
        if not self.groups.automatic_scenarios or default is None:
            return
        can_be_spared = min(
            sum(min(1, len(self.to_spare(DEFAULT, role))) for role in ROLES),
            max(0, len(default.members) - self.specs[DEFAULT].min_instances),
        )
        instances = Instances(default=MIN_GROUP + can_be_spared, spare=len(self.spares()))
        found = self.discovery.decide(self.samples, instances, now)
        if found is None:
            return
        if found.action == "dissolve":
            self.decisions.take(found.label, "gives its instances back", found.reason).end("begun")
            self.scaling.declared.pop(found.label, None)
            return
        decision = self.decisions.take(found.label, "gets a group of its own", found.reason)
        self.scaling.declared[found.label] = GroupSpec(name=found.label, scenario=found.label)
        for role in ROLES[len(self.spares()) :]:  # membership gives it the spares
            for record in self.to_spare(DEFAULT, role)[:1]:
                place = Place(found.label, role)
                self.workflows.start(record.id, place, self._join_new(record.id, place), decision)

    async def _join_new(self, instance_id: str, place: Place) -> None:
        """Joins a group as soon as it is declared."""
        await self.cluster.until(lambda: place.group in self.cluster.maps, VACANT_S)
        await self.workflows.assign(instance_id, place)

    def _give(self, now: float) -> None:
        """An instance more for a group that is crowded."""
        gift = self.scaling.gift(self.loads, self.specs, len(self.spares()), now)
        if gift is None:
            return
        if gift.giver is not None and gift.from_role is not None:
            candidates = self.to_spare(gift.giver, gift.from_role)
        else:
            candidates = self.spares()
        if candidates:
            place = Place(gift.group, gift.role)
            self._begin(candidates[0].id, place, self.workflows.assign(candidates[0].id, place), gift.reason)

    async def _follow_membership(self, now: float) -> None:
        self._vacancies.forget_old(now)
        coming = self.workflows.coming
        situation = Situation(
            alive=self.cluster.alive,
            maps=self.cluster.maps,
            specs=self.specs,
            coming=coming,
            kept_out=self.workflows.kept_out,
            resting=self.workflows.resting(),
            too_new={name for name in self.specs if now - self._known_since.setdefault(name, now) < SETTLE_S},
            vacant=self._vacancies.places,
        )
        await self._provision(membership.num_lacking(situation), now)
        steps = membership.steps(situation)
        await self._remove([step for step in steps if isinstance(step, Remove)], now)
        for step in steps:
            if isinstance(step, Admit):
                place = membership.place_of(self.cluster.alive[step.instance_id])
                assert place is not None, "who is admitted plays a role"
                self._vacancies.come_back(place)
                self._begin(step.instance_id, place, self.workflows.admit(step.instance_id), "it plays that role")
            elif isinstance(step, membership.Assign):
                self._vacancies.fill(step.place, now)
                self._begin(
                    step.instance_id, step.place, self.workflows.assign(step.instance_id, step.place), step.reason
                )
            elif isinstance(step, membership.Release):
                work = self.workflows.release(step.instance_id, patience_s=SCALE_IN_PATIENCE_S)
                decision = self.decisions.take(step.place.group, f"{step.instance_id} leaves", "its group is no more")
                self.workflows.start(step.instance_id, step.place, work, decision)

    async def _provision(self, num_lacking: int, now: float) -> None:
        """Instances from elsewhere where spares do not do. What was lost has time to come back by itself."""
        self._lacking_since = (self._lacking_since or now) if num_lacking else None
        due = self._lacking_since is not None and now - self._lacking_since >= LACKING_S
        started = await self.provisioning.follow(num_lacking if due else 0, self.spares(), now)
        if started:
            self.decisions.take("-", f"asks for {started} instances", f"{num_lacking} places are vacant").end("begun")

    async def _remove(self, removals: list[Remove], now: float) -> None:
        for one in removals:
            group = self.cluster.map_with(one.instance_id)
            member = group.member(one.instance_id) if group else None
            if group is None or member is None:
                continue
            self.decisions.take(group.name, f"{one.instance_id} leaves", one.reason).end("done")
            # Who has ended in order has taken its record along, and is not to be replaced: somebody wished it.
            if one.instance_id not in self.cluster.alive and one.instance_id in self.cluster.present:
                self._vacancies.vacate(Place(group.name, member.role), now)
        if removals:
            await self.maps.remove([one.instance_id for one in removals])

    def _begin(self, instance_id: str, place: Place, work: Coroutine[None, None, None], why: str) -> None:
        decision = self.decisions.take(place.group, f"{instance_id} joins as {place.role}", why)
        self.workflows.start(instance_id, place, work, decision)

    def _control_ratio(self, name: str, now: float) -> None:
        group = self.cluster.maps.get(name)
        if group is None:
            return
        load = self.samples.load(group)
        if load is None:
            return
        self.loads[name] = load
        is_changing = any(place is not None and place.group == name for place in self.workflows.coming.values())
        if self.control == "off" or self.is_paused or is_changing:
            return
        bounds = Bounds(tpot_s=group.tpot_s, ttft_s=group.ttft_s)
        move, self._histories[name] = ratio.decide(load, self._histories.get(name, History()), bounds, now)
        if move is not None:
            self._carry_out(name, move)

    def _carry_out(self, name: str, move: Move) -> None:
        what = f"{move.number} from {move.from_role} to {move.to_role}"
        if self.control == "advise":
            self.decisions.take(name, f"would change {what}", move.reason).outcome = "advised"
            return
        decision = self.decisions.take(name, f"changes {what}", move.reason)
        for record in self.to_spare(name, move.from_role)[: move.number]:
            place = Place(name, move.to_role)
            self.workflows.start(record.id, place, self.workflows.assign(record.id, place), decision)

    def to_spare(self, name: str, role: Role) -> list[InstanceRecord]:
        """Those of `least_busy` that may leave: one that is not on its way elsewhere always stays."""
        return self.least_busy(name, role)[:-1]

    def least_busy(self, name: str, role: Role) -> list[InstanceRecord]:
        """The members of a role that are not on their way elsewhere, those that hold least first."""
        alive = self.cluster.alive
        members = [one.instance_id for one in self.cluster.maps[name].of(role)]
        records = [alive[one] for one in members if one in alive and one not in self.workflows.coming]
        return sorted(records, key=lambda one: (one.slots_used, one.id))
