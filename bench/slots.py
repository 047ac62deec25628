"""On-demand forwarding, slot by slot: what instances accept, who waits for whom, and is a large request ever served?

    .venv/bin/python -m bench.slots [--only burst|short|fair] [--rounds 20]

The engine is the mock engine, with 2 prefill and 2 decode instances. An observer on the bus sees every question,
answer and first token, and so knows at any time which prompts an instance has accepted and not computed.

- *burst*: 16 prompts of 1 s at once. How many prompts does an instance hold that it has not begun? The mean time to
  first token is compared with that of one queue for both instances, at the time that one prompt takes alone.
- *short*: both instances compute prompts of 1 s when a prompt of 20 ms arrives, and one becomes free within 0.3 s.
- *fair*: two prefill instances and one decode instance with small pools, two gateways, and small requests that fill
  the pools. How long does a request wait that needs most of a pool, and how many small ones are accepted meanwhile?
"""

import argparse
import asyncio
import itertools
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import nats
from nats.aio.msg import Msg

from bench.load import Item, LoadClient, Outcome, load_client
from bench.running import Running, machine, pdserve_up
from pdserve import runfile
from pdserve.status import ask
from shared.settings import DEMO_MODEL, environment_of

CONTEXT_TOKENS = 2**17
"""The mock engine takes any context length; the demonstration model's own is too short for prompts of 1 s."""
TIMES = "prefill=0ms+0.1ms/token,step=25ms+0ms/row,transfer=1ms+1us/token"
LONG_TOKENS = 10_000
SHORT_TOKENS = 200
NUM_PREFILL = 2
BURST = 16
BURST_ROUNDS = 3
FREE_IN_S = 0.3
STAGGER_S = 0.35
"""The second long prompt is sent so much later than the first."""
SETTLE_S = 0.3
FAIR_TIMES = "prefill=5ms+0.01ms/token,step=25ms+0ms/row,transfer=1ms+0us/token"
FAIR_POOL_BYTES = 2**20
FAIR_ROUNDS = 5
SMALL = Item(0.0, 4000, 80)
NUM_SMALL = 48
LARGE_SHARE = 0.85
"""The share of a pool that the large request needs."""
CLOSE_S = 0.02
"""The observer may see an acceptance so much earlier than the client sees the first token before it."""
FILL_S = 4.0
"""After how long the small ones have filled the pools."""


@dataclass(frozen=True, slots=True)
class Wait:
    """How long a large request waited for an instance, and how many small ones were accepted meanwhile."""

    seconds: float
    num_small: int


@dataclass(slots=True)
class Observer:
    """What is on the bus: which instance was asked what and when, and accepted it, and when its first token came."""

    accepted: dict[tuple[str, str], tuple[float, int]] = field(default_factory=dict)
    """By role and request: when, and the number of its tokens."""
    max_not_begun: int = 0
    """The largest number of accepted prompts that an instance had not begun to compute."""
    _questions: dict[str, tuple[str, str, str, int]] = field(default_factory=dict)
    """By reply inbox: role, instance, request, and number of tokens."""
    _uncomputed: Counter[str] = field(default_factory=Counter)
    """Prompts by instance."""

    async def on_message(self, message: Msg) -> None:
        subject = message.subject.split(".")
        if message.reply and subject[-1] in ("prefill", "decode") and "instance" in subject:
            question = json.loads(message.data)
            self._questions[message.reply] = (
                subject[-1],
                ".".join(subject[3:-1]),
                question["request_id"],
                question["num_tokens"],
            )
        elif message.subject in self._questions:
            self._on_answer(*self._questions.pop(message.subject), message)
        elif subject[-1] == "prefilled":
            self._uncomputed[json.loads(message.data)["instance_id"]] -= 1

    def _on_answer(self, role: str, instance_id: str, request_id: str, num_tokens: int, message: Msg) -> None:
        if not message.data or not json.loads(message.data)["accepted"]:
            return
        self.accepted[role, request_id] = (time.monotonic(), num_tokens)
        if role == "prefill":
            self._uncomputed[instance_id] += 1
            self.max_not_begun = max(self.max_not_begun, self._uncomputed[instance_id] - 1)

    def wait(self, role: str, num_tokens: int, since: float) -> Wait:
        """Returns how a request of at least so many tokens waited for a role."""
        later = [(at, found) for (of, _), (at, found) in self.accepted.items() if of == role and at > since - CLOSE_S]
        accepted_at = min((at for at, found in later if found >= num_tokens), default=float("inf"))
        return Wait(max(0.0, accepted_at - since), sum(found < num_tokens and at < accepted_at for at, found in later))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", choices=["burst", "short", "fair"])
    parser.add_argument("--rounds", type=int, default=20, help="of short")
    arguments = parser.parse_args()
    print(machine())
    if arguments.only != "fair":
        print(f"2 prefill and 2 decode instances, mock engine ({TIMES})")
        with _system(2, 2, TIMES) as running:
            asyncio.run(_burst_and_short(running, arguments))
    if arguments.only in (None, "fair"):
        os.environ["PDSERVE_KV_POOL_BYTES"] = str(FAIR_POOL_BYTES)
        print(f"2 prefill instances and 1 decode instance, two gateways, mock engine ({FAIR_TIMES})")
        with _system(2, 1, FAIR_TIMES) as running, _second_gateway(running):
            asyncio.run(_fair(running))


@contextmanager
def _system(num_prefill: int, num_decode: int, times: str) -> Iterator[Running]:
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "long"
        shutil.copytree(DEMO_MODEL, model)
        config = json.loads((model / "config.json").read_text())
        (model / "config.json").write_text(json.dumps(config | {"max_position_embeddings": CONTEXT_TOKENS}))
        counts = ("--prefill", str(num_prefill), "--decode", str(num_decode))
        engine = ("--model", str(model), "--engine", "mock", "--mock-times", times, "--threads", "1")
        with pdserve_up(*counts, *engine, "--control", "off", "--nats-open") as running:
            asyncio.run(_until_all_are_there(running.nats_url, num_prefill + num_decode))
            yield running


@contextmanager
def _second_gateway(running: Running) -> Iterator[None]:
    run = runfile.read(running.folder)
    assert run is not None, "it serves"
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    status = asyncio.run(ask(running.nats_url))
    model = next(one.model_path for one in status.instances)
    settings = {"nats_url": run.nats_url, "redis_url": run.redis_url, "http_port": port, "model": model}
    log = (running.folder / "second.log").open("wb")
    command = [sys.executable, "-m", "services.gateway"]
    gateway = subprocess.Popen(command, env=environment_of(settings), stdout=log, stderr=log)
    try:
        asyncio.run(_until_two_gateways(running.nats_url))
        yield
    finally:
        gateway.terminate()
        gateway.wait(30)


async def _until_all_are_there(nats_url: str, number: int) -> None:
    while [len(one.prefill) + len(one.decode) for one in (await ask(nats_url)).groups] != [number]:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def _until_two_gateways(nats_url: str) -> None:
    while len((await ask(nats_url)).gateways) < 2:  # noqa: ASYNC110 - nobody tells when
        await asyncio.sleep(0.1)


async def _burst_and_short(running: Running, arguments: argparse.Namespace) -> None:
    async with load_client(running.nats_url) as client:
        alone_s = [(await client.send(Item(0.0, LONG_TOKENS, 1))).ttft_s for _ in range(4)]
        service_s = min(alone_s)  # other programs on the machine make prompts slower, never quicker
        print(f"a prompt of {LONG_TOKENS:,} tokens takes {service_s:.3f} s alone")
        if arguments.only != "short":
            for number in range(BURST_ROUNDS):
                await _burst(running, client, number, service_s)
        if arguments.only != "burst":
            times = [await _short(client, service_s) for _ in range(arguments.rounds)]
            print(
                f"a short prompt, one of two busy instances free within {FREE_IN_S:g} s: first token after median "
                f"{statistics.median(times):.3f} s, longest {max(times):.3f} s ({arguments.rounds} rounds)"
            )
    _print_errors(client.outcomes)


async def _burst(running: Running, client: LoadClient, number: int, service_s: float) -> None:
    observing = await nats.connect(running.nats_url)
    observer = Observer()
    await observing.subscribe(">", cb=observer.on_message)
    await observing.flush()
    outcomes = await asyncio.gather(*(client.send(Item(0.0, LONG_TOKENS, 1)) for _ in range(BURST)))
    await observing.close()
    mean_s = statistics.mean(one.ttft_s for one in outcomes)
    ideal_s = service_s * statistics.mean(1 + index // NUM_PREFILL for index in range(BURST))
    print(
        f"burst {number}: {BURST} prompts, first token after {mean_s:.3f} s on average, one shared queue "
        f"{ideal_s:.3f} s (ratio {mean_s / ideal_s:.3f}); an instance held at most {observer.max_not_begun} not begun",
        flush=True,
    )


async def _short(client: LoadClient, service_s: float) -> float:
    """Sends two long prompts one after the other, and a short one shortly before the first is done."""
    first = asyncio.create_task(client.send(Item(0.0, LONG_TOKENS, 1)))
    await asyncio.sleep(STAGGER_S)
    second = asyncio.create_task(client.send(Item(0.0, LONG_TOKENS, 1)))
    await asyncio.sleep(service_s - FREE_IN_S - STAGGER_S)
    short = await client.send(Item(0.0, SHORT_TOKENS, 1))
    await asyncio.gather(first, second)
    await asyncio.sleep(SETTLE_S)
    return short.ttft_s


async def _fair(running: Running) -> None:
    [pool] = {one.blocks_total for one in (await ask(running.nats_url)).instances}
    large = Item(0.0, int(LARGE_SHARE * pool * 16), 4)
    print(
        f"pools of {pool:,} blocks; {NUM_SMALL} clients of {SMALL.num_prompt_tokens:,} tokens and "
        f"{SMALL.num_output_tokens} to generate; a large prompt has {large.num_prompt_tokens:,} tokens"
    )
    observing = await nats.connect(running.nats_url, pending_size=2**26)
    observer = Observer()
    await observing.subscribe(">", cb=observer.on_message, pending_bytes_limit=2**30)
    done = asyncio.Event()
    waits: list[tuple[Wait, Wait]] = []
    async with load_client(running.nats_url) as client, load_client(running.nats_url, seed=1) as other:
        alone = await other.send(large)
        print(f"alone its first token takes {alone.ttft_s:.2f} s")
        loading = asyncio.create_task(client.closed_loop(itertools.repeat(SMALL), NUM_SMALL, done.is_set))
        for number in range(FAIR_ROUNDS):
            await asyncio.sleep(FILL_S)
            outcome = await other.send(large)
            waits.append(_waited(observer, outcome))
            print(f"large request {number}: {_words(waits[-1])}", flush=True)
        done.set()
        await loading
    await observing.close()
    for role, ours in zip(("prefill", "decode"), zip(*waits, strict=True), strict=True):
        seconds = [one.seconds for one in ours]
        print(f"accepted by {role} after median {statistics.median(seconds):.2f} s, longest {max(seconds):.2f} s")
    _print_errors([*client.outcomes, *other.outcomes])


def _waited(observer: Observer, outcome: Outcome) -> tuple[Wait, Wait]:
    """Returns how a large request waited for prefill, from when it was sent, and for decode, from its first token."""
    num_tokens = outcome.item.num_prompt_tokens
    first_token_at = outcome.first_token_at or outcome.sent_at
    return observer.wait("prefill", num_tokens, outcome.sent_at), observer.wait("decode", num_tokens, first_token_at)


def _words(waits: tuple[Wait, Wait]) -> str:
    prefill, decode = waits
    return (
        f"accepted by prefill after {prefill.seconds:.2f} s and {prefill.num_small} small ones, "
        f"by decode {decode.seconds:.2f} s after its first token and {decode.num_small} small ones"
    )


def _print_errors(outcomes: Sequence[Outcome]) -> None:
    errors = Counter(one.error for one in outcomes if one.error is not None)
    print(f"{len(outcomes)} requests, {sum(errors.values())} failed")
    for error, number in errors.most_common(5):
        print(f"  {number} x {error}")


if __name__ == "__main__":
    main()
