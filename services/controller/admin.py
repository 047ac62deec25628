"""Operators' wishes (`pdserve flip`, `drain`, `control`, `upgrade`): requests on NATS to the leading controller."""

import asyncio
import hmac
import logging
from collections.abc import Awaitable, Callable

from services.controller.brain import Brain
from services.controller.maps import Maps
from services.controller.policy.membership import Place, place_of
from services.controller.policy.upgrade import ImpossibleUpgrade
from services.controller.upgrade import Upgrade
from services.controller.workflows import WorkflowFailed
from shared.bus.connection import Incoming
from shared.errors import MAX_MESSAGE_CHARS, PDServeError, shortened
from shared.messages.control import AdminAnswer, AdminRequest
from shared.messages.records import GroupMap, InstanceRecord

log = logging.getLogger(__name__)


class Refused(PDServeError):
    """A wish that cannot be granted; the message says what to do."""


class Admin:
    """Grants wishes one after another, and says what became of each."""

    def __init__(self, key: str, brain: Brain, maps: Maps, tasks: asyncio.TaskGroup) -> None:
        self._key = key
        self._brain = brain
        self._maps = maps
        self._tasks = tasks
        self._upgrade: Upgrade | None = None
        self._upgrading: asyncio.Task[None] | None = None
        self._verbs: dict[str, Callable[[AdminRequest], Awaitable[str]]] = {
            "flip": self._flip,
            "drain": self._drain,
            "control": self._control,
            "upgrade": self._begin_upgrade,
            "pause": self._pause_upgrade,
            "resume": self._resume_upgrade,
            "abort": self._abort_upgrade,
        }

    async def go_on(self) -> None:
        """Goes on with an upgrade that the leader before has begun, as soon as it can be."""
        model = self._maps.next_model()
        if model is None or (self._upgrade and self._upgrade.is_running):
            return
        if self._upgrade is not None and self._upgrade.is_given_up:
            await self._maps.plan_model(None)
            return
        try:
            self._start_upgrade(model)
        except ImpossibleUpgrade as error:
            log.info("the upgrade to %s waits: %s", model, error)

    def upgrade_status(self) -> str | None:
        return self._upgrade.status() if self._upgrade else None

    def abandon(self) -> None:
        """Ends an upgrade where it is: what is half-way serves, and the next leader goes on with it."""
        if self._upgrading is not None:
            self._upgrading.cancel()

    async def handle(self, incoming: Incoming) -> None:
        """Answers one request, whatever becomes of it."""
        verb = incoming.subject.rpartition(".")[2]
        try:
            request = incoming.parse(AdminRequest)
            answer = AdminAnswer(ok=True, message=await self._grant(verb, request))
        except PDServeError as error:
            answer = AdminAnswer(ok=False, message=getattr(error, "message", None) or str(error))
        except Exception:
            log.exception("the wish %s met a fault of this program", verb)
            answer = AdminAnswer(ok=False, message="the controller failed at this; its log says why")
        try:
            await incoming.respond(answer.model_copy(update={"message": shortened(answer.message, MAX_MESSAGE_CHARS)}))
        except PDServeError as error:  # a reply inbox that NATS does not accept must not end the controller
            log.warning("The answer to %s could not be sent: %s", incoming.subject, error)

    async def _grant(self, verb: str, request: AdminRequest) -> str:
        if self._key and not hmac.compare_digest(self._key.encode(), request.key.encode()):
            raise Refused("this needs the key of PDSERVE_ADMIN_KEY: set it, or give --admin-key")
        if verb not in self._verbs:
            raise Refused(f"there is no wish {verb!r}: take one of {', '.join(self._verbs)}")
        return await self._verbs[verb](request)

    async def _flip(self, request: AdminRequest) -> str:
        record = self._instance(request)
        group = self._group_of(record, request)
        if request.role is None:
            raise Refused("which role? Give prefill or decode")
        if (record.role, record.group) == (request.role, group.name) and group.member(record.id):
            return f"{record.id} is {record.role} of {group.name} already"
        self._refuse_last(record, f"make it {request.role}")
        place = Place(group.name, request.role)
        self._brain.workflows.kept_out.discard(record.id)
        await self._run(record, place, f"flips {record.id} to {place.role}", "flip")
        return f"{record.id} is {place.role} of {place.group}"

    async def _run(self, record: InstanceRecord, place: Place, what: str, why: str) -> None:
        """A workflow to its end. Raises `WorkflowFailed` where it fails."""
        workflows = self._brain.workflows
        decision = self._brain.decisions.take(place.group, what, f"an operator wishes it ({why})")
        done = workflows.start(record.id, place, workflows.assign(record.id, place), decision)
        await asyncio.wait([done])
        if decision.outcome != "done":
            raise WorkflowFailed(decision.outcome)

    async def _drain(self, request: AdminRequest) -> str:
        record = self._instance(request)
        self._refuse_last(record, "drain it")
        workflows = self._brain.workflows
        group = record.group or "-"
        decision = self._brain.decisions.take(group, f"drains {record.id}", "an operator wishes it (drain)")
        work = workflows.release(record.id, drained=True)
        await asyncio.wait([workflows.start(record.id, place_of(record), work, decision)])
        if decision.outcome != "done":
            raise WorkflowFailed(decision.outcome)
        return f"{record.id} is drained: end it, or give it a role with `pdserve flip`"

    async def _control(self, request: AdminRequest) -> str:
        if request.control is None:
            raise Refused("which? Give auto, advise or off")
        self._brain.control = request.control
        return f"ratio control is {request.control}, until another controller leads (PDSERVE_CONTROL is for good)"

    async def _begin_upgrade(self, request: AdminRequest) -> str:
        if not request.model:
            raise Refused("to which model? Give its folder, as instances see it, or its id on the hub")
        if self._upgrade is not None and self._upgrade.is_running:
            raise Refused(
                f"an upgrade is under way ({self._upgrade.status()}): wait for it, or `pdserve upgrade --abort`"
            )
        self._start_upgrade(request.model)
        return f"upgrades to {request.model}: `pdserve status` shows how far it is"

    def _start_upgrade(self, model: str) -> None:
        """Raises ImpossibleUpgrade."""
        upgrade = Upgrade(self._brain, self._maps, model)
        upgrade.refuse_impossible()
        self._upgrade = upgrade
        self._upgrading = self._tasks.create_task(upgrade.run())

    async def _pause_upgrade(self, request: AdminRequest) -> str:
        return self._running_upgrade().pause()

    async def _resume_upgrade(self, request: AdminRequest) -> str:
        return self._running_upgrade().resume()

    async def _abort_upgrade(self, request: AdminRequest) -> str:
        upgrade = self._running_upgrade()
        await self._maps.plan_model(None)  # so that no other leader goes on with it
        return upgrade.abort()

    def _running_upgrade(self) -> Upgrade:
        if self._upgrade is None or not self._upgrade.is_running:
            raise Refused("no upgrade is under way")
        return self._upgrade

    def _instance(self, request: AdminRequest) -> InstanceRecord:
        """The one that the request names: its id, or an unambiguous beginning or end of it."""
        alive = self._brain.cluster.alive
        name = request.instance or ""
        found = [one for one in alive if name and (one == name or one.startswith(name) or one.endswith(name))]
        if len(found) != 1:
            many = f"{len(found)} instances fit {name!r}" if found else f"no instance {name!r} is alive"
            raise Refused(f"{many}: take one of {', '.join(sorted(alive)) or 'none'}")
        record = alive[found[0]]
        if record.id in self._brain.workflows.coming or record.state in ("changing", "draining"):
            raise Refused(f"{record.id} is on its way to another role already: wait until it is there")
        return record

    def _group_of(self, record: InstanceRecord, request: AdminRequest) -> GroupMap:
        name = request.group or record.group or record.preferred_group or "default"
        group = self._brain.cluster.maps.get(name)
        if group is None:
            known = ", ".join(sorted(self._brain.cluster.maps))
            raise Refused(f"there is no group {name!r}: take one of {known}")
        return group

    def _refuse_last(self, record: InstanceRecord, wish: str) -> None:
        group = self._brain.cluster.map_with(record.id)
        if group is None or record.role is None:
            return
        others = [one for one in self._brain.least_busy(group.name, record.role) if one.id != record.id]
        if not others:
            raise Refused(
                f"{record.id} is the last {record.role} instance of group {group.name}, which could serve nothing "
                f"without it: give the group another one first, then {wish}"
            )
