"""The process of an instance, from its settings to its last heartbeat: load, listen, register, serve, drain.

connect to NATS and Redis -> load the model -> serve KV -> subscribe -> first heartbeat -> follow orders and serve
SIGTERM: "draining", reject -> what is held ends, moves or is given up -> out of the registry -> exit
"""

import asyncio
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack

from shared import __version__
from shared.bus import connection, subjects
from shared.bus.connection import Bus, Incoming
from shared.engine.device import find_device
from shared.engine.sequence import FailedSequence, NewToken
from shared.errors import InstanceFailed, ModelRefused, RequestError
from shared.instance.assignment import Assignment
from shared.instance.body import Body, Loaded, load, open_body
from shared.instance.gateway_watch import GatewayWatch
from shared.instance.outbox import Failure, Outbox
from shared.instance.parts import InstanceParts
from shared.instance.role import Role, find_role
from shared.messages.control import Assign
from shared.messages.records import Admissions, InstanceRecord
from shared.messages.records import Role as RoleName
from shared.messages.serving import MAX_SECONDS, AskReply, Message, Ping, Pong, Start
from shared.process import Lifetime, heartbeats
from shared.registry import registry
from shared.registry.registry import Registry
from shared.settings import InstanceSettings, hostname
from shared.telemetry import tracing

SWEEP_S = 0.25

log = logging.getLogger(__name__)


async def serve(settings: InstanceSettings, lifetime: Lifetime) -> None:
    if settings.engine == "torch":
        find_device(settings.device)  # before anybody else is bothered
    kind = "mock" if settings.engine == "mock" else "instance"
    instance_id = f"{kind}-{hostname()}-{secrets.token_hex(4)}"
    async with AsyncExitStack() as stack:
        stack.enter_context(tracing.exporting("instance", instance_id))
        bus = await stack.enter_async_context(
            connection.connect(settings.nats_url, name=instance_id, timeout_s=settings.connect_timeout_s)
        )
        records = await stack.enter_async_context(
            registry.connect(settings.redis_url, ttl_s=settings.record_ttl_s, timeout_s=settings.connect_timeout_s)
        )
        loaded = await load(settings, settings.model, lifetime)
        if loaded is not None:
            await Instance(settings, instance_id, bus, records, lifetime).run(loaded)


class Instance:
    """A loaded model, the roles that it plays, and what the world is told of both."""

    def __init__(
        self, settings: InstanceSettings, instance_id: str, bus: Bus, records: Registry, lifetime: Lifetime
    ) -> None:
        self.settings = settings
        self.instance_id = instance_id
        self.lifetime = lifetime
        self._bus = bus
        self._records = records
        self._started_at = time.time()
        self._outbox = Outbox(bus, instance_id)
        self._state_version = 1
        self._beat: Callable[[], Awaitable[None]] | None = None
        self._over = asyncio.Event()
        """Tells the body to end."""

    async def run(self, loaded: Loaded) -> None:
        """Serves until the lifetime ends, then drains."""
        async with asyncio.TaskGroup() as self._bodies, AsyncExitStack() as last, asyncio.TaskGroup() as tasks:
            last.callback(lambda: self._over.set())
            self._tasks = tasks
            await self._embody(self.settings.model, loaded)
            self.assignment = Assignment(self.settings, tasks, self._make_role, self._change_body, self._announce)
            self._bus.on_reconnect(self._bus_came_back)
            self._gateways = GatewayWatch(self._bus, self.instance_id, self.assignment, tasks)
            working = [tasks.create_task(self._sweep()), tasks.create_task(self._gateways.run())]
            await self._bus.subscribe(subjects.instance(self.instance_id, ">"), self._on_message)
            async with heartbeats(
                self.record, self._records.write_instance, self._records.remove_instance, self.settings.heartbeat_s
            ) as self._beat:
                holder = self.body.holder
                log.info("ready: %s waits for its role, KV at %s:%d", self.instance_id, holder.host, holder.port)
                await self._tell_that_it_changed()
                await self.lifetime.until_ending()
                await self._drain()
            for task in working:
                task.cancel()
            self.assignment.close()

    async def _embody(self, model_path: str, loaded: Loaded) -> None:
        """Raises ModelRefused, or whatever else keeps the body from being there."""
        there: asyncio.Future[Body] = asyncio.get_running_loop().create_future()
        self._over = asyncio.Event()
        self._life = self._bodies.create_task(self._live(model_path, loaded, there, self._over))
        self.body: Body = await there

    async def _live(self, model_path: str, loaded: Loaded, there: asyncio.Future[Body], over: asyncio.Event) -> None:
        """A body, until it is over. It has a task of its own, so that a fault in what it serves ends the instance."""
        try:
            callbacks = (self._on_crash, self._on_prefill_step, self._on_failed)
            async with open_body(self.settings, model_path, loaded, *callbacks) as body:
                telling = self._bodies.create_task(body.tell_tokens(self._tell))
                if not there.cancelled():  # who waited for it may have been told to end meanwhile
                    there.set_result(body)
                try:
                    await over.wait()
                finally:
                    telling.cancel()
        except Exception as error:
            if there.cancelled():
                log.warning("a model that nobody waits for any more cannot be had: %s", error)
                return
            if there.done():
                raise
            there.set_exception(error)

    async def _change_body(self, model_path: str) -> None:
        """Another model in place of this one, which stays if that cannot be served."""
        if model_path == self.body.model_path:
            return
        before = self.body
        loaded = await load(self.settings, model_path, self.lifetime)
        if loaded is None:
            return
        if loaded.vocab_size != before.loaded.vocab_size:
            raise ModelRefused(
                f"model {model_path!r} has a vocabulary of {loaded.vocab_size} and {before.model_path!r} one of "
                f"{before.loaded.vocab_size}: gateways could not speak to both; start it as a deployment of its own"
            )
        old_path, old = before.model_path, before.loaded
        self._over.set()
        await asyncio.wait([self._life])
        try:
            await self._embody(model_path, loaded)
        except Exception as error:
            await self._embody(old_path, old)
            raise ModelRefused(f"model {model_path!r} cannot be used here: {error}") from error

    async def _make_role(self, name: RoleName) -> Role:
        await self.body.prepare(name)
        body = self.body
        return find_role(name)(
            InstanceParts(
                settings=self.settings,
                instance_id=self.instance_id,
                epoch=lambda: self.assignment.epoch,
                group=lambda: self.assignment.group or "",
                accepting=lambda: self.assignment.state == "ready",
                loaded=body.loaded,
                max_model_len=body.max_model_len,
                staging=body.staging,
                cache=body.cache,
                runner=body.runner,
                holder=body.holder,
                outbox=self._outbox,
                tasks=self._tasks,
                told=body.told,
                work=body.engine.work.snapshot,
                in_step_s=body.engine.in_step_s,
                latency=body.latency,
                notify_gateways=self._on_prefill_step,
                room_came_free=lambda: self.assignment.room_came_free(),
            )
        )

    def record(self, heartbeat: int) -> InstanceRecord:
        """This instance's record as of now."""
        settings, body, post = self.settings, self.body, self.assignment
        work = body.engine.work.snapshot()
        body.latency.observe(work)
        wishes_role = None if settings.role == "spare" else settings.role
        return InstanceRecord(
            id=self.instance_id,
            pid=os.getpid(),
            host=hostname(),
            version=__version__,
            started_at=self._started_at,
            heartbeat=heartbeat,
            role=post.role.verb if post.role else None,
            group=post.group,
            preferred_role=wishes_role,
            preferred_group=settings.group if wishes_role else None,
            epoch=post.epoch,
            term=post.term,
            state=post.state,
            state_version=self._state_version,
            engine=settings.engine,
            model=settings.served_model_name,
            model_path=body.model_path,
            fingerprint=body.loaded.fingerprint,
            max_model_len=body.max_model_len,
            kv_host=body.holder.host,
            kv_port=body.holder.port,
            slots_total=post.role.slots_total if post.role else 0,
            slots_used=sum(role.slots_used for role in post.roles),
            slots_leased=sum(role.slots_leased for role in post.roles),
            blocks_total=body.cache.num_blocks,
            blocks_free=body.cache.num_free,
            blocks_cached=body.cache.num_cached,
            cache_query_tokens=body.cache.num_query_tokens,
            cache_hit_tokens=body.cache.num_hit_tokens,
            prefill_token_s=body.latency.token_s,
            prefill_pair_s=body.latency.pair_s,
            max_step_tokens=settings.max_step_tokens,
            work=work,
            admissions=post.role.admissions() if post.role else Admissions(),
            on_demand=settings.on_demand,
            problem=post.problem,
        )

    async def _announce(self) -> None:
        self._state_version += 1
        if self._beat is not None:
            await self._beat()
            await self._tell_that_it_changed()

    async def _tell_that_it_changed(self) -> None:
        await self._bus.publish(subjects.CHANGED, Message())

    async def _on_message(self, incoming: Incoming) -> None:
        verb, key = subjects.verb_and_key(incoming.subject)
        try:
            await self._handle(verb, key, incoming)
        except RequestError as error:
            log.warning("Rejected a message on %s: %s", incoming.subject, error.message)
            await self._reject(incoming)
        except Exception:
            log.exception("Internal error while handling a message on %s.", incoming.subject)
            await self._reject(incoming)

    async def _handle(self, verb: str, key: str, incoming: Incoming) -> None:
        role = self.assignment.role
        if verb == "assign":
            await incoming.respond(self.assignment.order(incoming.parse(Assign)))
        elif verb == "ping":
            await incoming.respond(self._pong(incoming.parse(Ping)))
        elif role is not None and verb == role.verb:
            await incoming.respond(await role.take(incoming))
        elif verb in ("prefill", "decode"):
            is_changing = self.assignment.state in ("changing", "draining")
            await incoming.respond(AskReply(accepted=False, reason="draining" if is_changing else "wrong_role"))
        elif verb == "start":
            await self._start(incoming.parse(Start))
        elif verb == "gone":
            self._gateways.ping_now(key)
        else:
            for one in self.assignment.roles:
                one.handle(verb, incoming)

    def _pong(self, ping: Ping) -> Pong:
        unknown = [one for one in ping.request_ids if not self.assignment.knows(one)]
        return Pong(unknown=unknown, step_s=min(MAX_SECONDS, self.body.engine.in_step_s()))

    async def _start(self, start: Start) -> None:
        """Starts a request that one of the roles has accepted, or fails it if it was released meanwhile."""
        if any(role.start(start) for role in self.assignment.roles):
            return
        gateway_id = self._outbox.gateway_of(start.request_id)
        if gateway_id is not None and not self.assignment.knows(start.request_id):
            error = InstanceFailed("The work came too late: the slot was released.")
            await self._outbox.failed(gateway_id, start.request_id, Failure(error, counts=False))

    async def _reject(self, incoming: Incoming) -> None:
        if incoming.reply_to:
            await incoming.respond(AskReply(accepted=False, reason="invalid"))

    async def _tell(self, tokens: list[NewToken]) -> None:
        """Every role knows its own requests. One that is left still has tokens on their way."""
        for role in self.assignment.roles:
            try:
                await role.on_tokens(tokens)
            except Exception:  # the edge to the bus: these requests end, and no others
                log.exception("Internal error while sending the tokens of a step.")
                role.fail_requests((token.request_id for token in tokens), "an internal error of the instance")

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_S)
            for role in self.assignment.roles:
                role.sweep(time.monotonic())
            self.assignment.notify_gateways()

    def _on_prefill_step(self) -> None:
        """There may be room in the step after the one that has begun."""
        self.assignment.notify_gateways()

    def _on_failed(self, failed: list[FailedSequence]) -> None:
        for role in self.assignment.roles:
            role.fail_sequences(failed)

    def _bus_came_back(self) -> None:
        self._tasks.create_task(self._outbox.bus_came_back())
        for role in self.assignment.roles:
            role.bus_came_back()

    def _on_crash(self, error: BaseException) -> None:
        log.error("the engine failed", exc_info=error)
        self.lifetime.fail(f"the engine failed: {error!r}")
        for role in self.assignment.roles:
            role.fail_crashed("the engine of this instance failed")

    async def _drain(self) -> None:
        if self.lifetime.failed:
            self.assignment.state = "draining"
            await self._announce()
            await self.assignment.give_up("the engine of this instance failed")
        else:
            await self.assignment.drain()
