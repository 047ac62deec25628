"""A rolling upgrade to another model: group by group, instance by instance, with the ratio kept and pairs alike.

Instances of unlike weights are never matched (their fingerprints differ), so a group that is half-way is two pairs of
pools. Each keeps an instance of both roles for as long as requests need it: a group whose role has a single instance
needs a spare, which joins with the new model first. A failed load or canary stops the upgrade, and what has changed in
that group goes back.
"""

import asyncio
import contextlib
import logging
from dataclasses import dataclass, field

from services.controller.brain import Brain
from services.controller.canary import CanaryFailed
from services.controller.maps import LeadLost, Maps
from services.controller.policy.membership import Place, place_of
from services.controller.policy.upgrade import Batch, batches
from services.controller.workflows import WorkflowFailed
from shared.errors import PDServeError

SETTLE_TIMEOUT_S = 120.0
"""How long members of a group may be on their way elsewhere before it is upgraded."""

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Upgrade:
    """One upgrade, from its beginning to its end."""

    brain: Brain
    maps: Maps
    model: str
    is_running: bool = True
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
        self._total = sum(len(batch.instance_ids) for name in self._groups() for batch in self._batches(name))

    async def run(self) -> None:
        """The upgrade, to its end."""
        self.brain.is_paused = True
        groups = self._groups()
        try:
            await self.maps.plan_model(groups, self.model)
            for name in groups:
                await self._upgrade_group(name)
            self._outcome = f"done, {len(self._done)} instances"
        except LeadLost as error:
            self._outcome = f"left to the next leader: {error}"
        except PDServeError as error:
            await self._stop(groups, f"stopped: {error}")
        except Exception as error:
            log.exception("an upgrade met a fault of this program")
            await self._stop(groups, f"stopped by a fault of this program: {error!r}")
        finally:
            self.is_running = False
            self.brain.is_paused = False

    async def _stop(self, groups: list[str], outcome: str) -> None:
        """Nobody is to go on with it."""
        self._outcome = outcome
        log.error("%s", outcome)
        with contextlib.suppress(LeadLost):
            await self.maps.plan_model(groups, None)

    def _groups(self) -> list[str]:
        return sorted(name for name, one in self.brain.cluster.maps.items() if one.members)

    def _batches(self, name: str) -> list[Batch]:
        alive = self.brain.cluster.alive
        group = self.brain.cluster.maps.get(name)
        members = [alive[one.instance_id] for one in (group.members if group else ()) if one.instance_id in alive]
        return batches(name, members, self.brain.spares(), self.model)

    async def _upgrade_group(self, name: str) -> None:
        before = {one.id: one.model_path for one in self.brain.cluster.alive.values()}
        changed: list[tuple[str, Place]] = []
        try:
            await self._carry_out(name, changed)
            await self.maps.want_model(name, self.model)
            await self._carry_out(name, changed)  # for who has joined meanwhile, with the old one
        except (WorkflowFailed, CanaryFailed) as error:
            await self._go_back(changed, before)
            raise WorkflowFailed(f"{error}; group {name} has its old model again") from error

    async def _carry_out(self, name: str, changed: list[tuple[str, Place]]) -> None:
        """All that has to change in a group, once nobody of it is on the way elsewhere."""
        coming = self.brain.workflows.coming
        settled = await self.brain.cluster.until(
            lambda: all(place.group != name for place in coming.values()), SETTLE_TIMEOUT_S
        )
        if not settled:
            raise WorkflowFailed(f"group {name} does not settle")
        for batch in self._batches(name):
            await self._going.wait()
            if self._aborted:
                raise WorkflowFailed("aborted by an operator")
            self._where = f"{', '.join(batch.instance_ids)} of {name}"
            await self._upgrade_batch(batch, changed)

    async def _upgrade_batch(self, batch: Batch, changed: list[tuple[str, Place]]) -> None:
        """One after another: until the last of a batch has changed, nobody is sent to the others."""
        for instance_id, place in batch.places:
            await self._change(instance_id, place, self.model, batch.patience_s)
            changed.append((instance_id, place))
            self._done.append(instance_id)
        for instance_id in batch.released:
            await self._release(instance_id)

    async def _change(self, instance_id: str, place: Place, model: str, patience_s: float | None) -> None:
        workflows = self.brain.workflows
        decision = self.brain.decisions.take(place.group, f"{instance_id} loads {model}", "an operator upgrades")
        work = workflows.assign(instance_id, place, model=model, patience_s=patience_s)
        await asyncio.wait([workflows.start(instance_id, place, work, decision)])
        if decision.outcome != "done":
            raise WorkflowFailed(decision.outcome)

    async def _release(self, instance_id: str) -> None:
        record = self.brain.cluster.alive.get(instance_id)
        place = place_of(record) if record else None
        if place is None:
            return
        decision = self.brain.decisions.take(
            place.group, f"{instance_id} is a spare again", "the upgrade needs it no more"
        )
        workflows = self.brain.workflows
        await asyncio.wait([workflows.start(instance_id, place, workflows.release(instance_id), decision)])

    async def _go_back(self, changed: list[tuple[str, Place]], before: dict[str, str]) -> None:
        """The old model again for those of the group that have the new one already, one after another."""
        for instance_id, place in reversed(changed):
            if instance_id not in self.brain.cluster.alive:
                continue
            try:
                await self._change(instance_id, place, before[instance_id], None)
            except WorkflowFailed as error:
                log.error("%s keeps the new model: %s", instance_id, error)
