"""How long `pdserve up` takes to its first answer, and what idle processes weigh.

    .venv/bin/python -m bench.startup [--rounds 3]

Each round starts `pdserve up` in an empty folder and waits for the first token of a first request; the bound is 8 s.
Memory is the resident set of each process after that, read from /proc; the bound on gateway and controller is 120 MB
each. The first round may read files from disk that later ones find in memory.
"""

import argparse
import asyncio
import time
from pathlib import Path

import httpx

from bench.running import Running, machine, pdserve_up
from pdserve.status import ask


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    rounds = parser.parse_args().rounds
    print(machine())
    for number in range(1, rounds + 1):
        with pdserve_up() as running:
            asked_at = time.perf_counter()
            first_answer(running)
            total_s = running.ready_s + time.perf_counter() - asked_at
            print(f"round {number}: ready after {running.ready_s:.1f} s, first answer after {total_s:.1f} s")
            if number == rounds:
                print("resident MB: " + ", ".join(f"{name} {mb:.0f}" for name, mb in memory_mb(running).items()))


def first_answer(running: Running) -> None:
    body = {"model": "demo", "prompt": "Hello", "max_tokens": 1}
    httpx.post(f"{running.url}/v1/completions", json=body, timeout=60, trust_env=False).raise_for_status()


def memory_mb(running: Running) -> dict[str, float]:
    """Resident set of each service, by its kind."""
    while not ((status := asyncio.run(ask(running.nats_url))).gateways and status.instances):
        time.sleep(0.1)
    found = {one.role: _resident_mb(one.pid) for one in status.instances}
    for gateway in status.gateways:
        found["gateway"] = _resident_mb(gateway.pid)
    for folder in Path("/proc").glob("[0-9]*"):
        if b"services.controller" in (folder / "cmdline").read_bytes() and status.controller:
            found["controller"] = _resident_mb(int(folder.name))
    return found


def _resident_mb(pid: int) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


if __name__ == "__main__":
    main()
