"""Faults under open streams: for how long do they pause, and does every token come, and the right one?

    .venv/bin/python -m bench.faults --fault kill|stop|prefill-kill [--rounds 20] [--streams 32]

2 prefill and 2 decode instances with the mock engine. In each round all streams are open when the fault comes:

- *kill*: a decode instance gets SIGKILL, and `pdserve up` starts it again;
- *stop*: a decode instance gets SIGSTOP, and SIGCONT when the streams have ended;
- *prefill-kill*: prompts arrive in bursts, and a prefill instance gets SIGKILL just after one of them.

Before the first round, the same requests are sent undisturbed: their tokens must be the same later. A pause is the
longest gap between two tokens of a stream after the fault, less the usual gap of that stream; it counts for the streams
of the victim, which are those with the longest gaps, as many as the victim had requests. With *prefill-kill* it is the
time to the first token of that burst's requests, less the same request's time in the undisturbed round.
"""

import argparse
import asyncio
import os
import random
import signal
import statistics
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from bench.load import Item, LoadClient, Outcome, load_client
from bench.running import machine, pdserve_up
from pdserve.status import ask
from shared.errors import BusUnavailable
from shared.messages.control import InstanceStatus, Status
from shared.messages.records import Role

NUM_INSTANCES = 4
TIMES = "prefill=5ms+0.1ms/token,step=25ms+0ms/row,transfer=1ms+5us/token"
NUM_PROMPT_TOKENS = 64
NUM_TOKENS = 140
TOKENS_BEFORE = (20, 60)
"""The fault comes after so many tokens of the stream that has the fewest, chosen at random."""
BURST = 4
BURST_EVERY_S = 0.2
BURST_PROMPT_TOKENS = 400
BURST_TOKENS = 20
BURST_LEAD_S = 0.02
"""How long after its burst the fault comes."""
HUNG_AFTER_S = 60.0
BACK_WITHIN_S = 60.0
BACK_FOR_S = 1.0
"""For how long everything is there and idle before the next round: records are as old as a heartbeat."""


@dataclass(slots=True)
class Result:
    """What the rounds have found so far."""

    pauses_s: list[float] = field(default_factory=list)
    num_requests: int = 0
    errors: list[str] = field(default_factory=list)
    num_hung: int = 0
    num_differing: int = 0

    def count(self, outcomes: Sequence[Outcome], undisturbed: Sequence[Outcome]) -> None:
        """Compares the requests of a round with the same ones undisturbed."""
        self.num_requests += len(outcomes)
        for one, before in zip(outcomes, undisturbed, strict=True):
            if one.done_at is None:
                self.num_hung += 1
            elif one.error is not None:
                self.errors.append(one.error)
            elif one.token_ids != before.token_ids:
                self.num_differing += 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--fault", choices=["kill", "stop", "prefill-kill"], default="kill")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--streams", type=int, default=32)
    arguments = parser.parse_args()
    print(machine())
    print(f"{arguments.fault}; 2 prefill and 2 decode instances, mock engine ({TIMES}); {arguments.streams} streams")
    if arguments.fault == "prefill-kill":
        os.environ["PDSERVE_PREFIX_CACHE"] = "false"  # each round has the same prompts
    options = ("--engine", "mock", "--mock-times", TIMES, "--threads", "1", "--control", "off")
    with pdserve_up("--prefill", "2", "--decode", "2", *options) as running:
        result = asyncio.run(_measure(running.nats_url, arguments))
    pauses = result.pauses_s
    print(
        f"{arguments.rounds} rounds, {len(pauses)} streams of victims: pause median {statistics.median(pauses):.3f} s, "
        f"p99 {np.percentile(pauses, 99):.3f} s, longest {max(pauses):.3f} s"
    )
    print(
        f"{result.num_requests} requests: {len(result.errors)} failed, {result.num_hung} hung, "
        f"{result.num_differing} differ"
    )
    for error in result.errors[:5]:
        print(f"  {error}")


async def _measure(nats_url: str, arguments: argparse.Namespace) -> Result:
    result = Result()
    choose = random.Random(0)
    play = _burst_round if arguments.fault == "prefill-kill" else _stream_round
    killed_pids: set[int] = set()
    await _until_all_are_back(nats_url, killed_pids)
    undisturbed, _, _ = await play(nats_url, arguments, choose, None)
    for number in range(arguments.rounds):
        before = await _until_all_are_back(nats_url, killed_pids)
        role: Role = "prefill" if arguments.fault == "prefill-kill" else "decode"
        target = choose.choice([one for one in _live(before, killed_pids) if one.role == role])
        killed_pids |= set() if arguments.fault == "stop" else {target.pid}
        outcomes, fault_at, num_victims = await play(nats_url, arguments, choose, target)
        if arguments.fault == "stop":
            os.kill(target.pid, signal.SIGCONT)
        result.count(outcomes, undisturbed)
        if arguments.fault == "prefill-kill":
            pauses = _late_first_tokens(outcomes, undisturbed, fault_at)
        else:
            pauses = sorted((_pause(one, fault_at) for one in outcomes), reverse=True)[:num_victims]
        result.pauses_s += pauses
        print(f"round {number}: {len(pauses)} streams, pauses of {min(pauses):.3f} to {max(pauses):.3f} s", flush=True)
    return result


Round = tuple[list[Outcome], float, int]
"""The requests of a round, when the fault came, and how many requests the victim had."""


async def _stream_round(
    nats_url: str, arguments: argparse.Namespace, choose: random.Random, target: InstanceStatus | None
) -> Round:
    """Opens all streams at once; the fault comes in their midst."""
    fault_at, num_victims = 0.0, 0
    item = Item(0.0, NUM_PROMPT_TOKENS, NUM_TOKENS)

    async def fault(client: LoadClient) -> None:
        nonlocal fault_at, num_victims
        num_before = choose.randrange(*TOKENS_BEFORE)
        await _until(lambda: min((one.num_tokens for one in client.outcomes), default=0) >= num_before)
        if target is not None:
            num_victims = next(one for one in (await ask(nats_url)).instances if one.id == target.id).slots_used
            fault_at = _do(arguments.fault, target)

    outcomes = await _play(nats_url, [item] * arguments.streams, fault)
    return outcomes, fault_at, num_victims


async def _burst_round(
    nats_url: str, arguments: argparse.Namespace, choose: random.Random, target: InstanceStatus | None
) -> Round:
    """Sends prompts in bursts; the fault comes just after one in their midst."""
    fault_at = 0.0
    num_bursts = arguments.streams // BURST
    items = [
        Item(number * BURST_EVERY_S, BURST_PROMPT_TOKENS, BURST_TOKENS)
        for number in range(num_bursts)
        for _ in range(BURST)
    ]

    async def fault(client: LoadClient) -> None:
        nonlocal fault_at
        num_before = BURST * choose.randrange(2, num_bursts)
        await _until(lambda: len(client.outcomes) >= num_before)
        await asyncio.sleep(BURST_LEAD_S)
        if target is not None:
            fault_at = _do(arguments.fault, target)

    return await _play(nats_url, items, fault), fault_at, 0


def _do(fault: str, target: InstanceStatus) -> float:
    """Does the fault; returns when."""
    os.kill(target.pid, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
    return time.monotonic()


async def _play(nats_url: str, items: Sequence[Item], fault: Callable[[LoadClient], Awaitable[None]]) -> list[Outcome]:
    """Sends the same requests in each round, and the fault meanwhile."""
    async with load_client(nats_url) as client:
        loading = asyncio.create_task(client.open_loop(items))
        await asyncio.sleep(0)
        faulting = asyncio.ensure_future(fault(client))
        await asyncio.wait([loading], timeout=HUNG_AFTER_S)
        loading.cancel()
        await asyncio.wait([loading])
        await faulting
        return client.outcomes


def _pause(outcome: Outcome, fault_at: float) -> float:
    gaps = np.diff(outcome.token_at)
    ends_after = np.array(outcome.token_at[1:]) > fault_at
    return float(gaps[ends_after].max(initial=0.0) - np.median(gaps))


def _late_first_tokens(outcomes: Sequence[Outcome], undisturbed: Sequence[Outcome], fault_at: float) -> list[float]:
    """Returns by how much later the first tokens of the burst before the fault came."""
    last_sent_at = max(one.sent_at for one in outcomes if one.sent_at < fault_at)
    return [
        one.ttft_s - before.ttft_s
        for one, before in zip(outcomes, undisturbed, strict=True)
        if last_sent_at - BURST_EVERY_S / 2 < one.sent_at < fault_at
    ]


async def _until(predicate: Callable[[], bool]) -> None:
    async with asyncio.timeout(HUNG_AFTER_S):
        while not predicate():  # noqa: ASYNC110 - nobody tells when
            await asyncio.sleep(0.002)


async def _until_all_are_back(nats_url: str, killed_pids: set[int]) -> Status:
    """Waits until every instance is in the map and idle; returns the status."""
    since = time.monotonic()
    async with asyncio.timeout(BACK_WITHIN_S):
        while True:
            try:
                status = await ask(nats_url)
            except BusUnavailable:
                continue
            if not _all_are_back(status, killed_pids):
                since = time.monotonic()
            elif time.monotonic() - since > BACK_FOR_S:
                return status
            await asyncio.sleep(0.1)


def _live(status: Status, killed_pids: set[int]) -> list[InstanceStatus]:
    return [one for one in status.instances if not one.late and one.pid not in killed_pids]


def _all_are_back(status: Status, killed_pids: set[int]) -> bool:
    live = _live(status, killed_pids)
    num_members = sum(len(group.prefill) + len(group.decode) for group in status.groups)
    is_idle = all(one.slots_used == 0 and one.state == "ready" for one in live)
    return len(live) == NUM_INSTANCES == num_members and is_idle


if __name__ == "__main__":
    main()
