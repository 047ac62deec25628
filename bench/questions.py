"""What one question costs the gateway in CPU time: in a large deployment beside a tiny one, for prompts of any length.

    .venv/bin/python -m bench.questions [--instances 300] [--streams 10000] [--prompts 30 1000 32000 100000]

A gateway's waiting queue asks over a real NATS server. The instances are one other process that answers for all of
them, so that only the gateway's own CPU time is measured: from a request's entry into the queue until an instance has
accepted it and its prompt is on its way, or, with instances that reject everything, for each question that was asked.
The open streams are registered with the event router, spread over all instances. `--waiting` requests wait besides.
"""

import argparse
import asyncio
import cProfile
import multiprocessing
import pstats
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import nats
import uvloop
from nats.aio.msg import Msg

from bench.running import machine
from pdserve.servers import Servers
from services.gateway.events import EventRouter
from services.gateway.groups import Group, Groups
from services.gateway.instance_watch import Instances
from services.gateway.request import Request, TokenOutput
from services.gateway.slot_queue import SlotQueue
from shared.bus import connection, subjects
from shared.errors import PeerUnavailable
from shared.messages.records import GroupMap, InstanceRecord, Member, Role
from shared.messages.serving import AskReply, Capacity, Ping, Pong
from shared.prefix_keys import prefix_keys
from shared.registry.heartbeats import Heartbeat
from shared.sampling import SamplingParams
from shared.settings import GatewaySettings
from shared.telemetry.gateway_metrics import GatewayMetrics

ACCEPTED = AskReply(accepted=True, capacity=Capacity(slots_free=8, tokens_free=512, blocks_free=1000, starts_in_s=0.1))
REJECTED = AskReply(accepted=False, reason="no_blocks", capacity=Capacity(slots_free=8, tokens_free=512))
COUNT = "bench.questions"
GATEWAY_ID = "gateway-bench"
LONG_S = 3600.0
TOKEN_IDS = list(range(1000, 1000 + 2**18))
"""Tokens of all prompts. They are made once, so that the time to free them is not counted with a later question."""
REJECTED_WAIT_S = 0.01
"""How long a request asks one instance after another while all of them reject it."""
ROUNDS = 5
CONNECT_WITHIN_S = 20.0


@dataclass(frozen=True, slots=True)
class Scale:
    """A deployment: half of its instances have each role."""

    num_instances: int
    num_streams: int
    num_waiting: int = 0

    def __str__(self) -> str:
        waiting = f", {self.num_waiting:,} waiting requests" if self.num_waiting else ""
        return f"{self.num_instances} instances, {self.num_streams:,} open streams{waiting}"


class FixedGroups(Groups):
    """One group that never changes, with a heartbeat of each instance."""

    def __init__(self, group: Group, heartbeats: dict[str, Heartbeat]) -> None:
        self._group = group
        self._heartbeats = heartbeats

    def heartbeat(self, instance_id: str) -> Heartbeat | None:
        return self._heartbeats.get(instance_id)

    def is_served_elsewhere(self, scenario: str | None, fingerprint: str | None, group: Group) -> bool:
        return False


class Gateway:
    """The parts of a gateway that ask instances."""

    def __init__(self, bus: connection.Bus, scale: Scale, label: str) -> None:
        self._bus = bus
        self._label = label
        self._num_requests = 0
        self.router = EventRouter(bus, GATEWAY_ID)
        records = [_record(label, number) for number in range(scale.num_instances)]
        members = tuple(
            Member.model_validate({"instance_id": one.id, **one.model_dump(include=set(Member.model_fields))})
            for one in records
        )
        group = Group(GroupMap(name="default", scenario="default", version=0, term=0))
        group.update(
            GroupMap(name="default", scenario="default", version=1, term=1, members=members),
            {one.id: one for one in records},
        )
        groups = FixedGroups(group, {one.id: Heartbeat.of(one) for one in records})
        self.instances = Instances(bus, self.router, lambda lost: None, lambda found: None)
        settings = GatewaySettings(max_waiting=100_000)
        self.queue = SlotQueue("prefill", group, groups, self.instances, self.router, settings, GatewayMetrics())
        for number in range(scale.num_streams):
            request = self.request(30)
            self.router.open(request)
            self.router.join(request, records[number % len(records)].id)

    def request(self, num_tokens: int) -> Request:
        """Makes a request as the dispatcher hands it to the queue."""
        self._num_requests += 1
        prompt = [10 + self._num_requests, *TOKEN_IDS[: num_tokens - 1]]
        request = Request(
            id=f"{self._label}-{self._num_requests}",
            prompt_token_ids=prompt,
            sampling=SamplingParams(max_tokens=100),
            deadline=time.monotonic() + LONG_S,
            output=TokenOutput(),
        )
        request.prefix_keys = prefix_keys(prompt)
        request.start_attempt()
        return request

    async def num_questions(self) -> int:
        """Returns how many questions the instances have received so far."""
        answer = await self._bus.request(COUNT, Ping(sender_id=GATEWAY_ID), Pong, timeout_s=LONG_S)
        return int(answer.unknown[0])


def main() -> None:
    arguments = _arguments()
    print(machine())
    large = Scale(arguments.instances, arguments.streams)
    scales = [Scale(2, 0), large]
    if arguments.waiting:
        scales.append(replace(large, num_waiting=arguments.waiting))
    with tempfile.TemporaryDirectory() as folder:
        servers = Servers(Path(folder))
        try:
            uvloop.run(_measure_all(servers.start_nats(), scales, arguments))
        finally:
            servers.stop()


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--instances", type=int, default=300)
    parser.add_argument("--streams", type=int, default=10_000)
    parser.add_argument("--waiting", type=int, default=0, help="requests that wait and ask as well")
    parser.add_argument("--prompts", type=int, nargs="+", default=[30, 1_000, 32_000, 100_000])
    parser.add_argument("--requests", type=int, default=100, help="for each of the rounds")
    parser.add_argument("--profile", action="store_true", help="print where the time goes, for the large deployment")
    return parser.parse_args()


async def _measure_all(nats_url: str, scales: Sequence[Scale], arguments: argparse.Namespace) -> None:
    for scale in scales:
        print(scale)
        for accept in (True, False):
            async with _gateway(nats_url, scale, accept=accept) as gateway:
                for num_tokens in arguments.prompts:
                    await _measure(gateway, num_tokens, arguments, accept=accept)  # not reported: caches fill
                    seconds = [await _measure(gateway, num_tokens, arguments, accept=accept) for _ in range(ROUNDS)]
                    print(
                        f"  {'accepted' if accept else 'rejected'}, {num_tokens:>7,} tokens: "
                        f"{1000 * statistics.median(seconds):.3f} ms for each question "
                        f"({1000 * min(seconds):.3f} to {1000 * max(seconds):.3f})",
                        flush=True,
                    )
                if arguments.profile and scale is scales[-1]:
                    await _profile(gateway, arguments, accept=accept)


@asynccontextmanager
async def _gateway(nats_url: str, scale: Scale, *, accept: bool) -> AsyncIterator[Gateway]:
    label = f"{'accept' if accept else 'reject'}-{scale.num_instances}-{scale.num_streams}-{scale.num_waiting}"
    instances = multiprocessing.get_context("spawn").Process(
        target=_run_instances, args=(nats_url, accept), daemon=True
    )
    instances.start()
    waiting: list[asyncio.Task[object]] = []
    try:
        async with connection.connect(nats_url, name=GATEWAY_ID, timeout_s=CONNECT_WITHIN_S) as bus:
            gateway = Gateway(bus, scale, label)
            await _until_answered(gateway)
            for _ in range(scale.num_waiting):
                acquiring = gateway.queue.acquire(gateway.request(30), until=time.monotonic() + LONG_S)
                waiting.append(asyncio.ensure_future(acquiring))
            yield gateway
            for task in waiting:
                task.cancel()
            await asyncio.gather(*waiting, return_exceptions=True)
    finally:
        instances.terminate()
        instances.join()


async def _until_answered(gateway: Gateway) -> None:
    async with asyncio.timeout(CONNECT_WITHIN_S):
        while True:
            try:
                await gateway.num_questions()
                return
            except PeerUnavailable:
                await asyncio.sleep(0.05)


async def _measure(gateway: Gateway, num_tokens: int, arguments: argparse.Namespace, *, accept: bool) -> float:
    """Returns the CPU seconds of this process for each question."""
    num_before = await gateway.num_questions()
    seconds = 0.0
    for _ in range(arguments.requests):
        request = gateway.request(num_tokens)
        gateway.router.open(request)
        until = time.monotonic() + (LONG_S if accept else REJECTED_WAIT_S)
        started_at = time.process_time()
        try:
            await gateway.queue.acquire(request, until=until)
        except TimeoutError:
            assert not accept, "all questions are accepted"
        seconds += time.process_time() - started_at
        await gateway.router.close(request)
    return seconds / (await gateway.num_questions() - num_before)


async def _profile(gateway: Gateway, arguments: argparse.Namespace, *, accept: bool) -> None:
    profile = cProfile.Profile()
    profile.enable()
    await _measure(gateway, arguments.prompts[0], arguments, accept=accept)
    profile.disable()
    pstats.Stats(profile).sort_stats("cumulative").print_stats(60)


def _record(label: str, number: int) -> InstanceRecord:
    role: Role = "prefill" if number % 2 == 0 else "decode"
    return InstanceRecord(
        id=f"{role}-{label}-{number}",
        pid=1,
        host="bench",
        version="0",
        started_at=0.0,
        role=role,
        group="default",
        epoch=1,
        state="ready",
        model="bench",
        fingerprint="0123456789abcdef",
        max_model_len=2**20,
        kv_host="127.0.0.1",
        kv_port=1 + number,
        slots_total=64,
        slots_used=0,
        blocks_total=2**20,
        blocks_free=2**20,
        prefill_token_s=1e-5,
    )


def _run_instances(nats_url: str, accept: bool) -> None:
    """Answers for every instance; the process ends with its parent."""
    asyncio.run(_answer(nats_url, (ACCEPTED if accept else REJECTED).model_dump_json().encode()))


async def _answer(nats_url: str, reply: bytes) -> None:
    client = await nats.connect(nats_url)
    num_questions = 0

    async def on_question(message: Msg) -> None:
        nonlocal num_questions
        num_questions += 1
        await message.respond(reply)

    async def on_count(message: Msg) -> None:
        await message.respond(Pong(unknown=[str(num_questions)]).model_dump_json().encode())

    await client.subscribe(subjects.instance("*", "prefill"), cb=on_question)
    await client.subscribe(COUNT, cb=on_count)
    await asyncio.Event().wait()


if __name__ == "__main__":
    main()
