"""The controller's process: follow the registry, lead or stand by, answer operators."""

import asyncio
import contextlib
import logging
import secrets
from contextlib import AsyncExitStack

from services.controller.admin import Admin
from services.controller.brain import Brain
from services.controller.canary import Canary
from services.controller.cluster import Cluster
from services.controller.decisions import Decisions
from services.controller.leadership import Leadership
from services.controller.maps import LeadLost, Maps
from services.controller.provisioning import BusProvisioner, Provisioning
from services.controller.status import status
from services.controller.workflows import Workflows
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.errors import PDServeError, RegistryUnavailable
from shared.groups import GroupsFile, default_groups
from shared.groups_file import read_groups
from shared.messages.control import StatusRequest
from shared.process import Lifetime
from shared.registry import registry
from shared.registry.registry import Registry
from shared.settings import ControllerSettings, hostname
from shared.telemetry import tracing

THINK_EVERY_S = 0.25
LEADER_FIRST_S = 0.25
"""How long a controller that does not lead leaves a question about the status to the one that does."""

log = logging.getLogger(__name__)


async def serve(settings: ControllerSettings, lifetime: Lifetime) -> None:
    groups = read_groups(settings.groups) if settings.groups else default_groups()
    controller_id = f"controller-{hostname()}-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        stack.enter_context(tracing.exporting("controller", controller_id))
        bus = await stack.enter_async_context(
            connection.connect(settings.nats_url, name=controller_id, timeout_s=settings.connect_timeout_s)
        )
        records = await stack.enter_async_context(
            registry.connect(settings.redis_url, ttl_s=settings.record_ttl_s, timeout_s=settings.connect_timeout_s)
        )
        async with asyncio.TaskGroup() as tasks:
            await Controller(settings, controller_id, groups, bus, records, tasks).run(lifetime)


class Controller:
    """A controller: one of them leads, all of them see."""

    def __init__(
        self,
        settings: ControllerSettings,
        controller_id: str,
        groups: GroupsFile,
        bus: Bus,
        records: Registry,
        tasks: asyncio.TaskGroup,
    ) -> None:
        self._id = controller_id
        self._bus = bus
        self._records = records
        self._tasks = tasks
        self._cluster = Cluster(settings.heartbeat_late_s)
        self._leadership = Leadership(records, controller_id, settings.leader_lease_s)
        self._maps = Maps(self._cluster, records, bus, lambda: self._leadership.lead)
        self._canary = Canary(bus, controller_id, settings.canary_timeout_s)
        self._workflows = Workflows(settings, self._cluster, self._maps, self._canary, bus, tasks)
        self._brain = Brain(
            self._cluster,
            self._maps,
            self._workflows,
            Decisions(),
            Provisioning(BusProvisioner(bus)),
            groups,
            settings.control or groups.control,
        )
        self._admin = Admin(settings.admin_key, self._brain, self._maps, tasks)
        self._term: int | None = None
        self._look = asyncio.Event()

    async def run(self, lifetime: Lifetime) -> None:
        """Controls until the lifetime ends."""
        await self._cluster.read(self._records)
        await self._bus.subscribe(subjects.gateway(self._id, ">"), self._canary.on_message)
        await self._bus.subscribe(subjects.CHANGED, self._on_changed)
        await self._bus.subscribe(subjects.STATUS, self._on_status)
        await self._bus.subscribe(subjects.admin("*"), self._on_admin)
        working = [
            self._tasks.create_task(self._leadership.hold_forever()),
            self._tasks.create_task(self._follow()),
        ]
        log.info("ready: %s", self._id)
        await lifetime.until_ending()
        for task in working:
            task.cancel()
        await self._leadership.resign()
        self._admin.abandon()
        self._workflows.abandon()

    async def _follow(self) -> None:
        """Reads for ever, and thinks while we lead."""
        while True:
            self._look.clear()
            await self._cluster.read(self._records)
            if self._cluster.is_fresh:
                await self._lead()
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(THINK_EVERY_S):
                    await self._look.wait()

    async def _lead(self) -> None:
        lead = self._leadership.lead
        try:
            if lead is None:
                self._term = None
                return
            if lead.term != self._term:
                await self._cluster.forget_old_maps(self._records)
                await self._brain.take_over()
                self._term = lead.term
            await self._brain.think()
            await self._admin.go_on()
        except (LeadLost, RegistryUnavailable) as error:
            log.warning("nothing is decided now: %s", error)
        except Exception:
            # What one odd record or map leads to must not end whoever leads, and then the next.
            log.exception("a round of decisions met a fault of this program")

    async def _on_changed(self, incoming: Incoming) -> None:
        self._look.set()

    async def _on_status(self, incoming: Incoming) -> None:
        """The leader knows most, and whoever asks takes the first answer: the others give it time."""
        if self._leadership.lead is not None:
            await self._tell_status(incoming)
        else:
            self._tasks.create_task(self._tell_status(incoming, after_s=LEADER_FIRST_S))

    async def _tell_status(self, incoming: Incoming, after_s: float = 0.0) -> None:
        await asyncio.sleep(after_s)
        try:
            page = incoming.parse(StatusRequest).page
            upgrade = self._admin.upgrade_status()
            await incoming.respond(status(self._id, self._cluster, self._brain, upgrade, page))
        except PDServeError as error:
            log.warning("A status request was not answered: %s", error)
        except Exception:  # the edge to the bus: this may be a task whose failure would end the controller
            log.exception("A status request was not answered.")

    async def _on_admin(self, incoming: Incoming) -> None:
        """The leader alone answers operators."""
        if self._leadership.lead is not None and incoming.reply_to:
            self._tasks.create_task(self._admin.handle(incoming))
