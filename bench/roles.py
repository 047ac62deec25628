"""Live role changes under continuous load: how long they take, and whether a request notices.

    .venv/bin/python -m bench.roles [--changes 50] [--clients 8]

Clients send request after request, of mixed lengths, while instances change from prefill to decode and back, one after
another, by `pdserve flip`'s own way. Requests that are decoded move to another instance with their KV at once, so the
time of a change has little of "finishing what is held" in it. Any answer that is not whole counts as failed.
"""

import argparse
import asyncio
import itertools
import os
import random
import statistics
import time

from bench.load import Item, LoadClient, load_client
from bench.running import START_TIMEOUT_S, machine, pdserve_up
from pdserve.admin import ask_admin
from pdserve.status import ask
from shared.messages.control import AdminRequest
from shared.messages.records import Role


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--changes", type=int, default=50)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--model", help="a folder; the demonstration model unless given")
    arguments = parser.parse_args()
    print(machine())
    print(f"2 prefill and 2 decode instances, one thread each; {arguments.clients} clients; requests move at once")
    os.environ["PDSERVE_MOVE_AFTER_S"] = "0.001"
    model = ["--model", arguments.model] if arguments.model else []
    with pdserve_up("--prefill", "2", "--decode", "2", "--threads", "1", "--control", "off", *model) as running:
        asyncio.run(_measure(running.nats_url, arguments.changes, arguments.clients))


async def _measure(nats_url: str, num_changes: int, num_clients: int) -> None:
    lengths = random.Random(0)
    items = (Item(0.0, lengths.randrange(8, 400), lengths.randrange(2, 120)) for _ in itertools.count())
    done = asyncio.Event()
    async with asyncio.timeout(START_TIMEOUT_S):
        await _until_all_are_there(nats_url)
    async with load_client(nats_url) as client:
        loading = asyncio.create_task(client.closed_loop(items, num_clients, done.is_set))
        took_s = []
        for number in range(num_changes):
            await _until_done(client, len(client.outcomes) + num_clients)
            took_s.append(await _change(nats_url, number))
        done.set()
        await loading
    failed = [one for one in client.outcomes if one.error is not None]
    print(f"{num_changes} changes: median {statistics.median(took_s):.3f} s, longest {max(took_s):.3f} s")
    print(f"{len(client.outcomes)} requests, {len(failed)} failed")
    for one in failed[:5]:
        print(f"  {one.error}")


async def _until_all_are_there(nats_url: str) -> None:
    """The first pair serves before the others are there."""
    while [len(one.prefill) + len(one.decode) for one in (await ask(nats_url)).groups] != [4]:  # noqa: ASYNC110
        await asyncio.sleep(0.1)


async def _until_done(client: LoadClient, num_requests: int) -> None:
    """Some requests come and go between two changes."""
    while len(client.outcomes) < num_requests:  # noqa: ASYNC110 - nobody tells when
        await asyncio.sleep(0.01)


async def _change(nats_url: str, number: int) -> float:
    """An instance of the role that has more of them gets the other; how long it took until that was announced."""
    [group] = (await ask(nats_url)).groups
    role: Role = "decode" if len(group.prefill) >= len(group.decode) else "prefill"
    instance = (group.prefill if role == "decode" else group.decode)[number // 2 % 2]
    started_at = time.perf_counter()
    answer = await ask_admin(nats_url, "flip", AdminRequest(instance=instance, role=role))
    if not answer.ok:
        raise SystemExit(f"change {number} was not carried out: {answer.message}")
    return time.perf_counter() - started_at


if __name__ == "__main__":
    main()
