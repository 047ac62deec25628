"""An upgrade and the death of the leading controller, under load: does a request fail, and how long does it take?

    .venv/bin/python -m bench.upgrade [--clients 6]

Clients send request after request to 2 prefill and 2 decode instances. Meanwhile the model is upgraded to a copy in
another folder, which every instance loads; then the leading one of two controllers is killed. Reported are failed
requests, how long the upgrade took, and after how many seconds another controller led.
"""

import argparse
import asyncio
import itertools
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from bench.load import Item, load_client
from bench.running import Running, machine, pdserve_up
from pdserve import runfile
from pdserve.admin import ask_admin
from pdserve.status import ask
from shared.errors import BusUnavailable
from shared.messages.control import AdminRequest
from shared.settings import DEMO_MODEL, environment_of


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--clients", type=int, default=6)
    arguments = parser.parse_args()
    print(machine())
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder) / "demo"
        shutil.copytree(DEMO_MODEL, model)
        with pdserve_up(
            "--prefill", "2", "--decode", "2", "--threads", "1", "--control", "off", "--nats-open"
        ) as running:
            other = _another_controller(running)
            try:
                asyncio.run(_measure(running.nats_url, str(model), arguments.clients))
            finally:
                other.terminate()
                other.wait(20)


def _another_controller(running: Running) -> "subprocess.Popen[bytes]":
    run = runfile.read(running.folder)
    assert run is not None, "it serves"
    settings = {"nats_url": run.nats_url, "redis_url": run.redis_url, "control": "off"}
    log = (running.folder / "other.log").open("wb")
    return subprocess.Popen(
        [sys.executable, "-m", "services.controller"], env=environment_of(settings), stdout=log, stderr=log
    )


async def _measure(nats_url: str, model: str, num_clients: int) -> None:
    lengths = random.Random(0)
    items = (Item(0.0, lengths.randrange(8, 400), lengths.randrange(2, 120)) for _ in itertools.count())
    done = asyncio.Event()
    async with load_client(nats_url) as client:
        loading = asyncio.create_task(client.closed_loop(items, num_clients, done.is_set))
        await asyncio.sleep(3.0)
        print(f"upgrade of 4 instances: {await _upgrade(nats_url, model):.1f} s", flush=True)
        await asyncio.sleep(3.0)
        print(f"another controller led {await _kill_leader(nats_url):.2f} s after the first was killed", flush=True)
        await asyncio.sleep(3.0)
        done.set()
        await loading
    failed = [one for one in client.outcomes if one.error is not None]
    print(f"{len(client.outcomes)} requests, {len(failed)} failed")
    for one in failed[:5]:
        print(f"  {one.error}")


async def _upgrade(nats_url: str, model: str) -> float:
    started_at = time.perf_counter()
    answer = await ask_admin(nats_url, "upgrade", AdminRequest(model=model))
    assert answer.ok, answer.message
    while True:
        said = (await ask(nats_url)).upgrade or ""
        if "done" in said:
            return time.perf_counter() - started_at
        assert "stopped" not in said, said
        await asyncio.sleep(0.1)


async def _kill_leader(nats_url: str) -> float:
    """Kills the leader; the seconds until another leads: the other one, or this one, started again."""
    status = await ask(nats_url)
    while status.controller != status.leader:  # any of them answers
        status = await ask(nats_url)
    first = status.leader
    os.kill(status.pid, signal.SIGKILL)
    killed_at = time.perf_counter()
    while True:
        try:
            leader = (await ask(nats_url)).leader
        except BusUnavailable:
            leader = None
        if leader not in (None, first):
            return time.perf_counter() - killed_at
        await asyncio.sleep(0.02)


if __name__ == "__main__":
    main()
