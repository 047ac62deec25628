"""Whole instances in one event loop, with mock engines and real KV servers, on a bus that is none."""

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from opentelemetry.context import Context
from pydantic import BaseModel, ValidationError

from shared.bus import subjects
from shared.engine.mock import MockEngine, MockModel
from shared.engine.scheduler import StepPlan
from shared.errors import ModelRefused, NoResponders, PeerUnavailable, invalid_request
from shared.instance import accepting, body, gateway_watch, process, role
from shared.instance.body import Body, Loaded
from shared.instance.process import Instance
from shared.messages.control import Assign, Assigned
from shared.messages.records import InstanceRecord
from shared.messages.records import Role as RoleName
from shared.messages.serving import (
    Ask,
    AskReply,
    Cancel,
    Failed,
    KVLease,
    Message,
    Moved,
    OutputToken,
    Ping,
    Pong,
    Prefilled,
    SlotFreed,
    Start,
    StepTokens,
)
from shared.process import Lifetime
from shared.sampling import SamplingParams
from shared.settings import InstanceSettings
from tests.harness import eventually, free_port

TEST_S = 40.0
"""A test that hangs ends then."""
FOREVER_S = 1000.0
VOCAB_SIZE = 500
PROMPT = [(37 * position + position * position) % VOCAB_SIZE for position in range(50)]
NUM_TOKENS = 300
GATEWAY = "g"
GROUP = "one"

Handler = Callable[[Any], Awaitable[None]]


@dataclass
class Incoming:
    """A message as an instance gets it."""

    subject: str
    content: BaseModel | bytes
    reply_to: str = ""
    trace_context: Context = field(default_factory=Context)
    is_no_responders: bool = False
    answer: BaseModel | None = None

    def parse(self, kind: type[BaseModel]) -> Any:
        if isinstance(self.content, bytes):
            try:
                return kind.model_validate_json(self.content)
            except ValidationError as error:
                raise invalid_request(error) from error
        assert isinstance(self.content, kind)
        return self.content

    async def respond(self, message: BaseModel) -> None:
        self.answer = message


class Bus:
    """Takes what instances say to the gateway, and hands them what it says."""

    def __init__(self) -> None:
        self.handlers: dict[str, Handler] = {}
        self.came_back: list[Callable[[], None]] = []
        self.events: asyncio.Queue[Message] = asyncio.Queue()
        self.failed: list[Failed] = []
        self.slot_freed: list[SlotFreed] = []
        self.pings: list[tuple[str, Ping]] = []
        self.ping_error: Exception | None = None
        """What pings to gateways meet; without, gateways know all that they are asked for but `unknown`."""
        self.unknown: list[str] = []
        self.publish_error: Exception | None = None

    def on_reconnect(self, callback: Callable[[], None]) -> None:
        self.came_back.append(callback)

    async def subscribe(self, subject: str, handler: Handler) -> None:
        self.handlers[subject.removesuffix(".>")] = handler

    async def publish(self, subject: str, message: Message, *, no_responders_to: str = "") -> None:
        if self.publish_error is not None and not isinstance(message, Failed):
            error, self.publish_error = self.publish_error, None
            raise error
        if isinstance(message, Failed):
            self.failed.append(message)
        if isinstance(message, SlotFreed):
            self.slot_freed.append(message)
            return
        if subject.startswith(subjects.gateway(GATEWAY, "")):
            self.events.put_nowait(message)

    async def request(self, subject: str, message: Ping, answer: type[Pong], *, timeout_s: float) -> Pong:
        await asyncio.sleep(0)
        self.pings.append((subject, message))
        if self.ping_error is not None:
            raise self.ping_error
        return Pong(unknown=[one for one in self.unknown if one in message.request_ids])

    async def send(self, instance_id: str, verb: str, message: Message | bytes) -> BaseModel | None:
        """What the instance answers, if it does."""
        incoming = Incoming(subjects.instance(instance_id, verb), message, reply_to="inbox")
        await self.handlers[subjects.instance(instance_id, "").rstrip(".")](incoming)
        return incoming.answer


class Records:
    """The registry: each instance's last record, and none of those that have ended."""

    def __init__(self) -> None:
        self.last: dict[str, InstanceRecord] = {}

    async def write_instance(self, record: InstanceRecord) -> None:
        await asyncio.sleep(0)
        self.last[record.id] = record

    async def remove_instance(self, record: InstanceRecord) -> None:
        await asyncio.sleep(0)
        del self.last[record.id]


class Cluster:
    """Instances, and a gateway that takes one request after another through them."""

    def __init__(self, tasks: asyncio.TaskGroup, model: Path, **wishes: object) -> None:
        self.bus = Bus()
        self.records = Records()
        self.lifetimes: dict[str, Lifetime] = {}
        self.running: dict[str, asyncio.Task[None]] = {}
        self.instances: dict[str, Instance] = {}
        patient = {"move_after_s": FOREVER_S, "drain_timeout_s": FOREVER_S, "stall_timeout_s": 5.0}
        self._settings = {
            "model": str(model),
            "engine": "mock",
            "mock_times": "prefill=0ms,step=1ms,transfer=0ms",
            "kv_pool_bytes": 2**20,
            "heartbeat_s": 0.05,
            **patient,
            **wishes,
        }
        self._tasks = tasks
        self._num_requests = 0

    async def start(self, name: str) -> Instance:
        settings = InstanceSettings.model_validate(self._settings)
        lifetime = self.lifetimes[name] = Lifetime()
        instance = Instance(settings, name, self.bus, self.records, lifetime)  # type: ignore[arg-type]
        loaded = await body.load(settings, settings.model, lifetime)
        assert loaded is not None
        self.running[name] = self._tasks.create_task(instance.run(loaded))
        await eventually(lambda: name in self.records.last)
        self.instances[name] = instance
        return instance

    async def end(self, name: str) -> None:
        """Ends an instance as SIGTERM does."""
        self.lifetimes[name].end()
        await self.running[name]
        assert name not in self.records.last
        assert not any(role.slots_used for role in self.instances[name].assignment.roles)

    async def order(self, name: str, role: RoleName | None, **wishes: Any) -> Assigned:
        epoch = self.instances[name].assignment.epoch + 1
        order = Assign(term=1, epoch=epoch, role=role, group=GROUP if role else None, **wishes)
        answer = await self.bus.send(name, "assign", order)
        assert isinstance(answer, Assigned)
        return answer

    async def becomes(self, name: str, role: RoleName, **wishes: Any) -> None:
        """Orders, and waits until the record says that it was followed."""
        assert (await self.order(name, role, **wishes)).accepted
        await eventually(lambda: self.plays(name, role))

    def plays(self, name: str, role: RoleName) -> bool:
        record = self.records.last[name]
        epoch = self.instances[name].assignment.epoch
        return (record.state, record.role, record.group, record.epoch) == ("ready", role, GROUP, epoch)

    # The gateway.

    def request(self, max_tokens: int) -> "Request":
        self._num_requests += 1
        return Request(self, f"r{self._num_requests}", SamplingParams(max_tokens=max_tokens, seed=7))

    async def event(self) -> Message:
        return await self.bus.events.get()


@dataclass
class Request:
    """A request on its way; its tokens are checked one by one."""

    cluster: Cluster
    request_id: str
    sampling: SamplingParams
    tokens: list[int] = field(default_factory=list)
    lease: KVLease | None = None
    is_done: bool = False

    async def prefill(self, name: str) -> None:
        """Accepted, computed, and its KV waits."""
        answer = await self.ask(name, "prefill")
        assert answer.accepted, answer
        event = await self.cluster.event()
        assert isinstance(event, Prefilled)
        self._take(event.token)
        self.lease = event.lease

    async def decode(self, name: str, num_tokens: int = NUM_TOKENS) -> None:
        """Accepted, and so many tokens are there."""
        answer = await self.ask(name, "decode")
        assert answer.accepted, answer
        self.lease = None
        await self.go_on(num_tokens)

    async def go_on(self, num_tokens: int = NUM_TOKENS) -> None:
        """Until so many tokens are there, or it is done, or it moves."""
        while len(self.tokens) < num_tokens and not self.is_done and self.lease is None:
            event = await self.cluster.event()
            if isinstance(event, Moved):
                assert event.lease.num_tokens == len(PROMPT) + len(self.tokens) - 1
                self.lease = event.lease
                return
            assert isinstance(event, StepTokens), event
            for token in event.tokens:
                self._take(token)

    async def ask(self, name: str, verb: RoleName, *, with_work: bool = True) -> AskReply:
        question = self.question(name)
        message = question if with_work else question.model_copy(update={"start": None})
        answer = await self.cluster.bus.send(name, verb, message)
        assert isinstance(answer, AskReply)
        return answer

    async def start(self, name: str) -> None:
        """Sends the work of an accepted question."""
        start = self.question(name).start
        assert start is not None
        await self.cluster.bus.send(name, "start", start)

    def question(self, name: str) -> Ask:
        record = self.cluster.records.last[name]
        token_ids = PROMPT + self.tokens
        return Ask(
            request_id=self.request_id,
            gateway_id=GATEWAY,
            epoch=record.epoch,
            fingerprint=record.fingerprint,
            num_tokens=len(token_ids),
            num_prompt_tokens=len(PROMPT),
            max_tokens=self.sampling.max_tokens,
            expires_in_s=FOREVER_S,
            lease=self.lease,
            start=Start(request_id=self.request_id, token_ids=token_ids, sampling=self.sampling),
        )

    async def cancel(self, name: str) -> None:
        await self.cluster.bus.send(name, "cancel", Cancel(request_ids=[self.request_id]))

    def _take(self, token: OutputToken) -> None:
        assert (token.request_id, token.index) == (self.request_id, len(self.tokens))
        self.tokens.append(token.token_id)
        self.is_done = token.finish_reason is not None


def model(folder: Path, name: str, vocab_size: int = VOCAB_SIZE) -> Path:
    """What a mock engine needs of a model."""
    path = folder / name
    path.mkdir()
    (path / "config.json").write_text(json.dumps({"vocab_size": vocab_size, "max_position_embeddings": 4096}))
    (path / "tokenizer.json").write_text("{}")
    return path


@asynccontextmanager
async def cluster(folder: Path, names: str = "abc", **wishes: object) -> AsyncIterator[Cluster]:
    """Instances without roles, which end in order."""
    async with asyncio.timeout(TEST_S), asyncio.TaskGroup() as tasks:
        made = Cluster(tasks, model(folder, "model"), **wishes)
        for name in names:
            await made.start(name)
        yield made
        for name, running in made.running.items():
            if not running.done():
                await made.end(name)


async def test_a_request_goes_on_where_it_moves_and_gives_the_same_tokens(tmp_path: Path) -> None:
    async with cluster(tmp_path) as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode", peers=[(one.records.last["a"].kv_host, one.records.last["a"].kv_port)])
        undisturbed = one.request(NUM_TOKENS)
        await undisturbed.prefill("a")
        await undisturbed.decode("b")
        assert undisturbed.is_done
        await one.becomes("c", "decode")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await request.decode("b", num_tokens=20)
        assert (await one.order("b", "prefill", patience_s=0.0)).accepted
        await request.go_on()
        assert request.lease is not None
        assert request.lease.instance_id == "b"
        await eventually(lambda: one.plays("b", "prefill"))
        assert one.records.last["b"].slots_leased == 1
        await request.decode("c")
        assert request.is_done
        assert request.tokens == undisturbed.tokens
        await eventually(lambda: one.instances["b"].assignment.left == [])
        assert one.bus.failed == []
        for record in one.records.last.values():
            await eventually(lambda record=record: one.records.last[record.id].slots_used == 0)  # type: ignore[misc]


async def test_a_prefill_instance_fetches_from_itself_in_its_next_role(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await one.becomes("a", "decode")
        await request.decode("a", num_tokens=50)
        assert (await one.order("a", "prefill", patience_s=0.0)).accepted
        await request.go_on()
        assert request.lease is not None
        await eventually(lambda: one.plays("a", "prefill"))
        await one.becomes("a", "decode")
        await request.decode("a")
        assert request.is_done
        assert len(request.tokens) == NUM_TOKENS


async def test_kv_that_nobody_fetches_is_let_go_of_in_a_role_before(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a", lease_s=0.5) as one:
        await one.becomes("a", "prefill")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await one.becomes("a", "decode")
        await eventually(lambda: one.instances["a"].assignment.left == [])
        await eventually(lambda: one.records.last["a"].slots_used == 0)
        record = one.records.last["a"]
        assert record.blocks_free == record.blocks_total


async def test_requests_for_another_role_or_epoch_are_refused(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        request = one.request(NUM_TOKENS)
        assert (await request.ask("a", "prefill")).reason == "wrong_role"
        await one.becomes("a", "prefill")
        before = one.records.last["a"]
        await request.prefill("a")
        computing = one.request(NUM_TOKENS)
        assert (await computing.ask("a", "prefill")).accepted
        assert (await one.order("a", "decode")).accepted
        assert (await one.request(1).ask("a", "prefill")).reason == "draining"
        assert (await one.request(1).ask("a", "decode")).reason == "draining"
        await eventually(lambda: one.plays("a", "decode"))
        assert (await one.request(1).ask("a", "prefill")).reason == "wrong_role"
        one.records.last["a"] = before
        assert (await request.ask("a", "decode")).reason == "wrong_epoch"
        for waits in (request, computing):
            await waits.cancel("a")
        await eventually(lambda: one.instances["a"].assignment.left == [])


async def test_a_model_that_cannot_be_loaded_leaves_the_old_one_usable(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        before = one.records.last["a"]
        for refused, why in (
            (tmp_path / "nowhere", "there is no such folder"),
            (model(tmp_path, "strange", VOCAB_SIZE + 1), "a vocabulary of 501"),
        ):
            assert (await one.order("a", "prefill", model=str(refused))).accepted
            await eventually(lambda: one.records.last["a"].state == "spare")
            record = one.records.last["a"]
            assert why in (record.problem or "")
            assert (record.role, record.group) == (None, None)
            assert (record.fingerprint, record.model_path) == (before.fingerprint, before.model_path)
            await one.becomes("a", "prefill")
            assert one.records.last["a"].problem is None
            request = one.request(1)
            await request.prefill("a")
            assert request.is_done


async def test_a_model_that_does_not_fit_leaves_the_old_one_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That shows only when the old one's pool is gone."""
    max_model_len = body.max_model_len

    def refuses(settings: InstanceSettings, loaded: Loaded, num_blocks: int) -> int:
        if loaded.name.endswith("large"):
            raise ModelRefused("the pool holds no request of it")
        return max_model_len(settings, loaded, num_blocks)

    monkeypatch.setattr(body, "max_model_len", refuses)
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        assert (await one.order("a", "prefill", model=str(model(tmp_path, "large")))).accepted
        await eventually(lambda: "the pool holds no request of it" in (one.records.last["a"].problem or ""))
        await one.becomes("a", "decode")
        await one.becomes("a", "prefill")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await one.becomes("a", "decode")
        await request.decode("a")
        assert request.is_done


async def test_another_model_takes_requests_of_its_own_fingerprint(tmp_path: Path) -> None:
    async with cluster(tmp_path, "ab") as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        before = one.records.last["a"]
        moving = one.request(NUM_TOKENS)
        await moving.prefill("a")
        await moving.decode("b", num_tokens=5)
        other = str(model(tmp_path, "other"))
        assert (await one.order("b", "decode", model=other, patience_s=0.0)).accepted
        await moving.go_on()
        assert moving.lease is not None
        await moving.cancel("b")
        await eventually(lambda: one.plays("b", "decode"))
        await one.becomes("a", "prefill", model=other)
        after = one.records.last["a"]
        assert (after.model_path, after.fingerprint) == (other, one.records.last["b"].fingerprint)
        assert after.fingerprint != before.fingerprint
        one.records.last["a"] = after.model_copy(update={"fingerprint": before.fingerprint})
        assert (await one.request(1).ask("a", "prefill")).reason == "wrong_model"
        one.records.last["a"] = after
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await request.decode("b")
        assert request.is_done


async def test_peers_that_cannot_be_reached_leave_a_spare(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        assert (await one.order("a", "decode", peers=[("127.0.0.1", free_port())])).accepted
        await eventually(lambda: "no connection to the KV of 127.0.0.1" in (one.records.last["a"].problem or ""))
        assert (one.records.last["a"].state, one.records.last["a"].epoch) == ("spare", 1)


async def test_the_end_of_the_process_moves_what_decodes(tmp_path: Path) -> None:
    async with cluster(tmp_path, drain_timeout_s=1e-6) as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        await one.becomes("c", "decode")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await request.decode("b", num_tokens=20)
        ending = asyncio.create_task(one.end("b"))
        await request.go_on()
        assert request.lease is not None
        assert (await one.order("b", "prefill")).reason == "draining"
        await request.decode("c")
        assert request.is_done
        await ending
        assert one.bus.failed == []


async def test_the_end_of_the_process_gives_up_what_nobody_fetches(tmp_path: Path) -> None:
    async with cluster(tmp_path, "ab", drain_timeout_s=1e-6, stall_timeout_s=0.5) as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await request.decode("b", num_tokens=20)
        await one.end("b")
        [failed] = one.bus.failed
        assert (failed.request_id, failed.counts) == (request.request_id, False)


@pytest.mark.parametrize("num_turns", [0, 1, 2, 3, 5, 8, 13, 21, 34, 55])
async def test_the_process_may_end_while_an_order_is_followed(tmp_path: Path, num_turns: int) -> None:
    """At any moment of getting another model: no task is left that keeps it."""
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        assert (await one.order("a", "decode", model=str(model(tmp_path, "other")))).accepted
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await one.end("a")


@pytest.mark.parametrize("num_turns", range(0, 40, 3))
async def test_the_process_may_end_while_a_model_takes_the_place_of_another(
    tmp_path: Path, num_turns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = asyncio.Event()
    load = process.load

    async def loads(*args: Any) -> Loaded | None:
        model = await load(*args)
        loaded.set()
        return model

    monkeypatch.setattr(process, "load", loads)
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        assert (await one.order("a", "decode", model=str(model(tmp_path, "other")))).accepted
        await loaded.wait()
        for _ in range(num_turns):
            await asyncio.sleep(0)
        await one.end("a")


@pytest.mark.parametrize("fault", [None, ModelRefused("it does not fit")], ids=["it comes", "it does not come"])
async def test_the_process_may_end_before_a_model_is_there(
    tmp_path: Path, fault: ModelRefused | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who gave the order waits no more when it comes, or does not come."""
    asked, may_come = asyncio.Event(), asyncio.Event()
    open_body = process.open_body

    @asynccontextmanager
    async def opens(settings: InstanceSettings, model_path: str, *rest: Any) -> AsyncIterator[Body]:
        if model_path.endswith("other"):
            asked.set()
            await may_come.wait()
            if fault is not None:
                raise fault
        async with open_body(settings, model_path, *rest) as body:
            yield body

    monkeypatch.setattr(process, "open_body", opens)
    async with cluster(tmp_path, "a") as one, asyncio.TaskGroup() as tasks:
        await one.becomes("a", "prefill")
        assert (await one.order("a", "decode", model=str(model(tmp_path, "other")))).accepted
        await asked.wait()
        following = one.instances["a"].assignment._following
        assert following is not None
        tasks.create_task(one.end("a"))
        await eventually(following.done)
        may_come.set()


@pytest.mark.parametrize("is_changed", [False, True])
async def test_a_fault_in_serving_kv_ends_the_process(tmp_path: Path, is_changed: bool) -> None:
    """Of the body that it began with, and of another one's."""

    async def live() -> None:
        async with cluster(tmp_path, "a") as one:
            await one.becomes("a", "prefill")
            if is_changed:
                await one.becomes("a", "prefill", model=str(model(tmp_path, "other")))
            one.instances["a"].body.holder._leases = None  # type: ignore[assignment]
            await asyncio.wait([one.running["a"]], timeout=10.0)
            assert one.running["a"].done()

    with pytest.raises(BaseExceptionGroup) as caught:
        await live()
    assert caught.group_contains(AttributeError)


async def test_an_engine_that_fails_ends_the_process_and_gives_all_up(tmp_path: Path) -> None:
    async with cluster(tmp_path, "ab") as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        await request.decode("b", num_tokens=5)
        engine = one.instances["b"].body.engine
        assert isinstance(engine.loaded, MockModel)

        def fail() -> None:
            raise RuntimeError("no more memory")

        engine.step = fail  # type: ignore[assignment, method-assign]
        await one.running["b"]
        assert "no more memory" in (one.lifetimes["b"].failed or "")
        [failed] = one.bus.failed
        assert (failed.request_id, failed.counts, failed.in_failed_step) == (request.request_id, True, True)


async def test_a_bus_that_comes_back_gives_up_what_is_held_and_what_ended_in_any_role(tmp_path: Path) -> None:
    async with cluster(tmp_path, "ab") as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        ended, held = one.request(2), one.request(NUM_TOKENS)
        await ended.prefill("a")
        await ended.decode("b")
        assert ended.is_done
        await held.prefill("a")
        await held.decode("b", num_tokens=5)
        assert (await one.order("b", "prefill", patience_s=0.0)).accepted
        await held.go_on()
        await eventually(lambda: one.plays("b", "prefill"))
        one.bus.came_back[1]()
        await eventually(lambda: {one.request_id for one in one.bus.failed} == {ended.request_id, held.request_id})
        await eventually(lambda: one.instances["b"].assignment.left == [])


async def test_a_failed_step_is_charged_to_no_request_outside_of_the_engine(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        leased = one.request(NUM_TOKENS)
        await leased.prefill("a")
        reserved = one.request(NUM_TOKENS)
        assert (await reserved.ask("a", "prefill", with_work=False)).accepted
        engine = one.instances["a"].body.engine

        def fail() -> None:
            raise RuntimeError("no more memory")

        engine.step = fail  # type: ignore[assignment, method-assign]
        computing = one.request(NUM_TOKENS)
        assert (await computing.ask("a", "prefill")).accepted
        await one.running["a"]
        seen = {failed.request_id: (failed.counts, failed.in_failed_step) for failed in one.bus.failed}
        assert seen == {
            leased.request_id: (False, False),
            reserved.request_id: (False, False),
            computing.request_id: (True, True),
        }


async def test_a_sequence_that_the_engine_drops_fails_its_request_only(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        engine = one.instances["a"].body.engine
        compute = engine._compute
        dropped = ["r1"]

        def drop_one(plan: StepPlan) -> list[Any]:
            return [(each, None if each.request_id in dropped else choice) for each, choice in compute(plan)]

        engine._compute = drop_one  # type: ignore[method-assign]
        first, second = one.request(1), one.request(1)
        assert (await first.ask("a", "prefill")).accepted
        failed = await one.event()
        assert isinstance(failed, Failed)
        assert (failed.request_id, failed.counts) == ("r1", True)
        assert "not finite" in failed.error.message
        await second.prefill("a")
        assert second.is_done
        await eventually(lambda: one.records.last["a"].slots_used == 0)


async def test_the_next_gateway_is_told_if_the_one_before_does_not_use_what_is_free(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(accepting, "NOTIFY_NEXT_AFTER_S", 0.01)
    async with cluster(tmp_path, "a", prefill_slots=1) as one:
        await one.becomes("a", "prefill")
        leased = one.request(NUM_TOKENS)
        await leased.prefill("a")
        for gateway_id in ("g1", "g2", "g3"):
            question = one.request(1).question("a").model_copy(update={"gateway_id": gateway_id})
            answer = await one.bus.send("a", "prefill", question)
            assert isinstance(answer, AskReply)
            assert (answer.reason, answer.capacity.slots_free) == ("no_slot", 0)
        assert one.bus.slot_freed == []
        await leased.cancel("a")
        await eventually(lambda: len(one.bus.slot_freed) == 3)
        assert [each.capacity.slots_free for each in one.bus.slot_freed] == [1, 1, 1]


async def test_the_work_may_follow_the_question(tmp_path: Path) -> None:
    async with cluster(tmp_path, "ab") as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        request = one.request(NUM_TOKENS)
        assert (await request.ask("a", "prefill", with_work=False)).accepted
        assert one.instances["a"].body.cache.num_free < one.instances["a"].body.cache.num_blocks
        await request.start("a")
        event = await one.event()
        assert isinstance(event, Prefilled)
        request._take(event.token)
        request.lease = event.lease
        assert (await request.ask("b", "decode", with_work=False)).accepted
        await request.start("b")
        request.lease = None
        await request.go_on()
        assert request.is_done
        assert one.bus.failed == []


async def test_work_that_comes_too_late_fails_without_being_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(role, "START_TIMEOUT_S", 0.0)
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        request = one.request(NUM_TOKENS)
        assert (await request.ask("a", "prefill", with_work=False)).accepted
        await eventually(lambda: one.instances["a"].assignment.roles[0].slots_used == 0)
        assert one.bus.failed == [], "it is released silently"
        await request.start("a")
        [failed] = one.bus.failed
        assert (failed.request_id, failed.counts) == (request.request_id, False)


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b'"expires_in_s":1000.0', b'"expires_in_s":NaN'),
        (b'"expires_in_s":1000.0', b'"expires_in_s":-1'),
        (b'"expires_in_s":1000.0', b'"expires_in_s":1e300'),
        (b'"age_s":0.0', b'"age_s":Infinity'),
        (b'"num_tokens":50', b'"num_tokens":51'),
        (b'"epoch":1', b'"epoch":-1'),
        (b'"lease":null', b'"lease":{}'),
        (b"{", b""),
    ],
)
async def test_absurd_figures_are_invalid_and_leave_the_instance_intact(tmp_path: Path, old: bytes, new: bytes) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        request = one.request(1)
        text = request.question("a").model_dump_json().encode()
        assert old in text
        answer = await one.bus.send("a", "prefill", text.replace(old, new, 1))
        assert answer == AskReply(accepted=False, reason="invalid")
        await request.prefill("a")
        assert request.is_done


async def test_a_forged_lease_is_invalid_and_leaves_the_instance_intact(tmp_path: Path) -> None:
    async with cluster(tmp_path, "ab") as one:
        await one.becomes("a", "prefill")
        await one.becomes("b", "decode")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        lease = request.lease
        assert lease is not None
        request.lease = lease.model_copy(update={"num_bytes": 10**12})
        assert (await request.ask("b", "decode")).reason == "invalid"
        request.lease = lease
        await request.decode("b")
        assert request.is_done


async def test_tokens_that_cannot_be_sent_fail_their_request_and_leave_the_instance_intact(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        first, second = one.request(1), one.request(1)
        one.bus.publish_error = RuntimeError("as the test wants it")
        assert (await first.ask("a", "prefill")).accepted
        await eventually(lambda: [failed.request_id for failed in one.bus.failed] == [first.request_id])
        assert one.bus.failed[0].error.code == "internal_error"
        assert isinstance(await one.event(), Failed)
        await second.prefill("a")
        assert second.is_done


@pytest.mark.parametrize("verb", ["prefill", "decode"])
@pytest.mark.parametrize("with_work", [True, False])
async def test_a_request_that_cannot_be_started_leaves_nothing_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, verb: RoleName, with_work: bool
) -> None:
    """Whatever it was: the gateway learns of it, and slot and blocks are free, once the answer is there."""
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", verb)
        playing = one.instances["a"].assignment.role
        assert playing is not None
        request = one.request(1)

        def fail(sequence: object) -> None:
            raise RuntimeError("as the test wants it")

        with monkeypatch.context() as patch:
            patch.setattr(one.instances["a"].body.runner, "add", fail)
            answer = await request.ask("a", verb, with_work=with_work)
            if with_work:
                assert answer == AskReply(accepted=False, reason="invalid")
            else:
                assert answer.accepted
                await request.start("a")
                failed = await one.event()
                assert isinstance(failed, Failed)
                assert (failed.request_id, failed.error.code) == (request.request_id, "internal_error")
                assert failed.counts
        assert playing.slots_used == 0
        cache = one.instances["a"].body.cache
        assert cache.num_free == cache.num_blocks
        assert (await request.ask("a", verb)).accepted
        await one.event()


async def test_an_internal_error_before_the_work_begins_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        playing = one.instances["a"].assignment.role
        assert playing is not None
        request = one.request(1)
        assert (await request.ask("a", "prefill", with_work=False)).accepted

        def fail(start: Start) -> None:
            raise RuntimeError("as the test wants it")

        monkeypatch.setattr(playing, "_match", fail)
        await request.start("a")
        failed = await one.event()
        assert isinstance(failed, Failed)
        assert (failed.request_id, failed.error.code) == (request.request_id, "internal_error")
        assert playing.slots_used == 0


async def test_it_says_which_requests_it_does_not_know(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        leased, reserved = one.request(NUM_TOKENS), one.request(NUM_TOKENS)
        await leased.prefill("a")
        assert (await reserved.ask("a", "prefill", with_work=False)).accepted
        ids = [leased.request_id, "other", reserved.request_id]
        assert await one.bus.send("a", "ping", Ping(sender_id=GATEWAY, request_ids=ids)) == Pong(unknown=["other"])
        await one.becomes("a", "decode")
        assert await one.bus.send("a", "ping", Ping(sender_id=GATEWAY, request_ids=ids[:1])) == Pong()
        await leased.cancel("a")


async def test_a_pong_says_for_how_long_the_engine_has_been_in_its_step(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The event loop answers while only the engine hangs."""
    goes_on = threading.Event()
    compute = MockEngine._compute

    def hang(engine: MockEngine, plan: StepPlan) -> Any:
        goes_on.wait(TEST_S)
        return compute(engine, plan)

    monkeypatch.setattr(MockEngine, "_compute", hang)
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")

        async def step_s() -> float:
            pong = await one.bus.send("a", "ping", Ping(sender_id=GATEWAY))
            assert isinstance(pong, Pong)
            return pong.step_s

        async def is_longer_than(seconds: float) -> bool:
            return await step_s() > seconds

        assert await step_s() == 0.0
        request = one.request(1)
        assert (await request.ask("a", "prefill")).accepted
        await eventually(lambda: is_longer_than(0.1))
        await eventually(lambda: is_longer_than(0.2))
        goes_on.set()
        await one.event()
        assert await step_s() == 0.0


@pytest.mark.parametrize("error", [NoResponders("nobody"), PeerUnavailable("no answer"), None])
async def test_only_a_gateway_without_subscription_loses_its_requests(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception | None
) -> None:
    monkeypatch.setattr(gateway_watch, "PING_INTERVAL_S", 0.02)
    monkeypatch.setattr(gateway_watch, "DEAD_AFTER_S", 0.05)
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        one.bus.ping_error = error
        num_pings = len(one.bus.pings)
        if isinstance(error, NoResponders):
            await eventually(lambda: one.instances["a"].assignment.roles[0].slots_used == 0)
        else:
            await eventually(lambda: len(one.bus.pings) > num_pings + 5)
            assert one.instances["a"].assignment.roles[0].slots_used == 1
            await request.cancel("a")
        assert one.bus.pings[0][0] == subjects.gateway(GATEWAY, "ping")
        assert one.bus.pings[0][1].sender_id == "a"
        assert one.bus.failed == []


async def test_a_forged_report_that_a_gateway_is_gone_releases_nothing(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        request = one.request(NUM_TOKENS)
        await request.prefill("a")
        num_pings = len(one.bus.pings)
        for _ in range(20):
            await one.bus.send("a", subjects.gone(GATEWAY), b"")
            await one.bus.send("a", subjects.gone("stranger"), b"")
        await eventually(lambda: len(one.bus.pings) > num_pings)
        assert one.instances["a"].assignment.roles[0].slots_leased == 1
        assert {subject for subject, _ in one.bus.pings} == {subjects.gateway(GATEWAY, "ping")}
        await request.cancel("a")


async def test_a_request_that_its_gateway_does_not_know_is_released(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gateway_watch, "PING_INTERVAL_S", 0.02)
    monkeypatch.setattr(role, "UNCHANGED_AFTER_S", 0.1)
    async with cluster(tmp_path, "a") as one:
        await one.becomes("a", "prefill")
        known, unknown = one.request(NUM_TOKENS), one.request(NUM_TOKENS)
        await known.prefill("a")
        await unknown.prefill("a")
        one.bus.unknown = [unknown.request_id]
        await eventually(lambda: one.records.last["a"].slots_used == 1)
        assert one.instances["a"].assignment.knows(known.request_id)
        assert one.bus.failed == []
        await known.cancel("a")


async def test_the_record_has_a_version_for_each_change_and_what_prompts_cost(tmp_path: Path) -> None:
    async with cluster(tmp_path, "a", mock_times="prefill=0.1ms/token,step=1ms,transfer=0ms") as one:
        versions = [one.records.last["a"].state_version]
        roles: list[RoleName] = ["prefill", "decode", "prefill"]
        for name in roles:
            await one.becomes("a", name)
            versions.append(one.records.last["a"].state_version)
        assert versions == sorted(set(versions))
        assert one.records.last["a"].prefill_token_s == 0.0
        await one.request(1).prefill("a")
        await eventually(lambda: one.records.last["a"].prefill_token_s > 0)
        assert one.records.last["a"].max_step_tokens == 512
        assert one.records.last["a"].state_version == versions[-1]


async def test_of_16_prompts_of_a_second_neither_of_two_instances_has_more_than_one_that_it_has_not_begun(
    tmp_path: Path,
) -> None:
    """Prompts of 1,000 tokens of 0.1 ms, in steps of 64: a gateway asks whenever it is told that a slot is free."""
    prompts = [[(number * 131 + position * 7) % VOCAB_SIZE for position in range(1000)] for number in range(16)]
    times = "prefill=0.1ms/token,step=1ms,transfer=0ms"
    async with cluster(tmp_path, "ab", mock_times=times, max_step_tokens=64, prefill_slots=16) as one:
        waiting = list(range(len(prompts)))
        most_not_begun = dict.fromkeys("ab", 0)
        num_freed, num_done = dict.fromkeys("ab", 0), dict.fromkeys("ab", 0)

        async def ask(name: str) -> None:
            if not waiting:
                return
            record = one.records.last[name]
            number = waiting[0]
            start = Start(request_id=f"p{number}", token_ids=prompts[number], sampling=SamplingParams(max_tokens=1))
            question = Ask(
                request_id=start.request_id,
                gateway_id=GATEWAY,
                epoch=record.epoch,
                fingerprint=record.fingerprint,
                num_tokens=1000,
                num_prompt_tokens=1000,
                max_tokens=1,
                expires_in_s=FOREVER_S,
                start=start,
            )
            answer = await one.bus.send(name, "prefill", question)
            assert isinstance(answer, AskReply)
            assert answer.reason in (None, "busy")
            if answer.accepted:
                waiting.remove(number)
                await ask(name)
            held = one.instances[name].assignment.roles[0]._held.values()
            not_begun = sum(each.sequence.num_planned_tokens == 0 for each in held)
            most_not_begun[name] = max(most_not_begun[name], not_begun)

        for name in "ab":
            await one.becomes(name, "prefill")
            for _ in range(3):
                await ask(name)
        while sum(num_done.values()) < len(prompts):
            while one.bus.slot_freed:
                freed = one.bus.slot_freed.pop(0).instance_id
                num_freed[freed] += 1
                await ask(freed)
            if not one.bus.events.empty():
                done = one.bus.events.get_nowait()
                assert isinstance(done, Prefilled)
                num_done[done.instance_id] += 1
                # The gateway hears of a free slot while the last step is computed, and not only with the first token.
                assert not waiting or num_freed[done.instance_id] >= num_done[done.instance_id]
            await asyncio.sleep(0)
        assert most_not_begun == {"a": 1, "b": 1}
