"""A rolling upgrade to another model: group by group, instance by instance, with the ratio kept and pairs alike.

Instances of unlike weights are never matched (their fingerprints differ), so a group that is half-way is two pairs of
pools. Each keeps an instance of both roles for as long as requests need it: a group whose role has a single instance
needs a spare, which joins with the new model first. A failed load or canary stops the upgrade, and what has changed in
that group goes back. What is next is decided anew after each step, from who is there: instances may be lost and join
meanwhile, and a leader that takes over goes on where the one before was.
"""

import asyncio
import logging
from dataclasses import dataclass, field

from services.controller.brain import Brain
from services.controller.canary import CanaryFailed
from services.controller.maps import LeadLost, Maps
from services.controller.policy.membership import Place, place_of
from services.controller.policy.upgrade import Batch, batches
from services.controller.workflows import WorkflowFailed
from shared.errors import PDServeError, RegistryUnavailable

SETTLE_TIMEOUT_S = 120.0
"""How long members of a group may be on their way elsewhere before it is upgraded."""

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Changed:
    """An instance that has the new model, what it had before, and whether it only stands in for others."""

    instance_id: str
    place: Place
    model_before: str
    is_borrowed: bool


@dataclass(slots=True)
class Upgrade:
    """One upgrade, from its beginning to its end."""

    brain: Brain
    maps: Maps
    model: str
    is_running: bool = True
    is_given_up: bool = False
    """It was stopped, and nobody is to go on with it."""
    _done: list[str] = field(default_factory=list)
    _total: int = 0
    _where: str = ""
    _outcome: str = ""
    _aborted: bool = False
    _going: asyncio.Event = field(default_factory=asyncio.Event)

    def __post_init__(self) -> None:
        self._going.set()

    def status(self) -> str:
        """How far it is, in a sentence."""
        if not self.is_running:
            return f"upgrade to {self.model}: {self._outcome}"
        paused = "" if self._going.is_set() else ", paused"
        return f"upgrade to {self.model}: {len(self._done)} of {self._total} instances{paused}; now {self._where}"

    def pause(self) -> str:
        self._going.clear()
        return "paused: it stops after what is under way (`pdserve upgrade --resume`)"

    def resume(self) -> str:
        self._going.set()
        return "goes on"

    def abort(self) -> str:
        self._aborted = True
        self._going.set()
        return "stops after what is under way; groups that are done keep the new model, the current one goes back"

    def refuse_impossible(self) -> None:
        """Raises ImpossibleUpgrade, with what to do, where it cannot be done without failing requests."""
        self._total = sum(len(batch.places) for name in self._groups() for batch in self._batches(name))

    async def run(self) -> None:
        """The upgrade, to its end."""
        self.brain.is_paused = True
        try:
            await self.maps.plan_model(self.model)
            for name in self._groups():
                await self._upgrade_group(name)
            for name in list(self.brain.cluster.maps):
                await self.maps.want_model(name, self.model)  # those that have no members now
            self._outcome = f"done, {len(self._done)} instances"
        except LeadLost as error:
            self._outcome = f"left to the next leader: {error}"
        except PDServeError as error:
            await self._stop(f"stopped: {error}")
        except Exception as error:
            log.exception("an upgrade met a fault of this program")
            await self._stop(f"stopped by a fault of this program: {error!r}")
        finally:
            self.is_running = False
            self.brain.is_paused = False

    async def _stop(self, outcome: str) -> None:
        self._outcome, self.is_given_up = outcome, True
        log.error("%s", outcome)
        await self._unplan()

    async def _unplan(self) -> None:
        """Nobody is to go on with it. What cannot be written now is written by `Admin.go_on`."""
        try:
            await self.maps.plan_model(None)
        except PDServeError as error:
            log.warning("that the upgrade is over cannot be written yet: %s", error)

    def _groups(self) -> list[str]:
        return sorted(name for name, one in self.brain.cluster.maps.items() if one.members)

    def _batches(self, name: str) -> list[Batch]:
        alive = self.brain.cluster.alive
        group = self.brain.cluster.maps.get(name)
        members = [alive[one.instance_id] for one in (group.members if group else ()) if one.instance_id in alive]
        return batches(name, members, self.brain.spares(), self.model)

    async def _upgrade_group(self, name: str) -> None:
        group = self.brain.cluster.maps.get(name)
        model_before = group.model_path if group else None
        changed: list[Changed] = []
        try:
            await self._carry_out(name, changed)
            await self.maps.want_model(name, self.model)
            await self._carry_out(name, changed)  # for who has joined meanwhile, with the old one
        except (WorkflowFailed, CanaryFailed) as error:
            self.is_given_up = True
            await self._unplan()
            await self._go_back(name, changed, model_before)
            raise WorkflowFailed(f"{error}; group {name} has its old model again") from error
        for one in changed:
            if one.is_borrowed:
                await self._release(one)

    async def _carry_out(self, name: str, changed: list[Changed]) -> None:
        """All that has to change in a group, a batch after another, each once nobody is on the way elsewhere."""
        while True:
            if not await self.brain.cluster.until(self._is_settled, SETTLE_TIMEOUT_S):
                raise WorkflowFailed(f"group {name} does not settle")
            await self._going.wait()
            if self._aborted:
                raise WorkflowFailed("aborted by an operator")
            plan = self._batches(name)
            if not plan:
                return
            self._where = f"{', '.join(plan[0].instance_ids)} of {name}"
            for instance_id, place in plan[0].places:
                await self._change(instance_id, place, plan[0].patience_s, changed)

    def _is_settled(self) -> bool:
        """Nobody is on its way, not by an order of the leader before either."""
        brain = self.brain
        left_alone = brain.workflows.kept_out | brain.workflows.resting()
        return not brain.workflows.coming and all(
            one.state != "changing" and (one.state != "ready" or brain.cluster.map_with(one.id) is not None)
            for one in brain.cluster.alive.values()
            if one.id not in left_alone
        )

    async def _change(self, instance_id: str, place: Place, patience_s: float | None, changed: list[Changed]) -> None:
        """One instance gets the new model. If it is lost meanwhile, it has none any more."""
        before = self.brain.cluster.alive.get(instance_id)
        if before is None:
            return
        try:
            await self._load(instance_id, place, self.model, patience_s)
        except WorkflowFailed:
            if instance_id in self.brain.cluster.alive:
                raise
            log.warning("%s was lost while it loaded %s", instance_id, self.model)
            return
        changed.append(Changed(instance_id, place, before.model_path, is_borrowed=place_of(before) is None))
        self._done.append(instance_id)

    async def _load(self, instance_id: str, place: Place, model: str, patience_s: float | None) -> None:
        """Raises WorkflowFailed, or LeadLost. While Redis is away it waits, and tries again."""
        workflows, cluster = self.brain.workflows, self.brain.cluster
        while True:
            decision = self.brain.decisions.take(place.group, f"{instance_id} loads {model}", "an operator upgrades")
            work = workflows.assign(instance_id, place, model=model, patience_s=patience_s)
            await asyncio.wait([workflows.start(instance_id, place, work, decision)])
            if isinstance(decision.error, LeadLost):
                raise decision.error
            if not isinstance(decision.error, RegistryUnavailable):
                break
            if not await cluster.until(lambda: cluster.is_fresh, SETTLE_TIMEOUT_S):
                raise WorkflowFailed(f"Redis is away for more than {SETTLE_TIMEOUT_S:g} s")
        if decision.outcome != "done":
            raise WorkflowFailed(decision.outcome)

    async def _release(self, borrowed: Changed) -> None:
        if borrowed.instance_id not in self.brain.cluster.alive:
            return
        why = "the upgrade needs it no more"
        decision = self.brain.decisions.take(borrowed.place.group, f"{borrowed.instance_id} is a spare again", why)
        workflows = self.brain.workflows
        work = workflows.release(borrowed.instance_id)
        await asyncio.wait([workflows.start(borrowed.instance_id, borrowed.place, work, decision)])

    async def _go_back(self, name: str, changed: list[Changed], model_before: str | None) -> None:
        """The old model again for the group and those of it that have the new one already, one after another."""
        await self.maps.want_model(name, model_before)
        for one in reversed(changed):
            if one.instance_id not in self.brain.cluster.alive:
                continue
            try:
                if one.is_borrowed:
                    await self._release(one)
                else:
                    await self._load(one.instance_id, one.place, one.model_before, None)
            except WorkflowFailed as error:
                log.error("%s keeps the new model: %s", one.instance_id, error)
