"""On-demand forwarding against a queue in each prefill instance: whose first tokens come in time under load?

    .venv/bin/python -m bench.forwarding TRACE.csv [--loads 1 2 4 5] [--ttft-ms 1000] [--seconds 40]

The trace's arrivals (Azure's LLM inference dataset; columns TIMESTAMP, ContextTokens, GeneratedTokens) are played
faster and faster; lengths are scaled by one factor. Load 1 is `--base` of what the prefill instances can compute,
measured first. Both ways have the same instances and the same requests, one way after the other at each load:

- *on demand*: prefill has few slots and no queue, the gateway keeps who waits in the order of deadlines, asks one
  instance after another, and ends a request early that none can serve in time (P/D-Serve, arXiv 2408.08147, 3.4);
- *queue*: prefill accepts whatever comes, and computes it in the order of arrival; the gateway chooses the instance
  with the fewest open streams, and nothing ends early.

In time is a first token within the objective, at the client. A request that was ended early is not in time.
"""

import argparse
import asyncio
import json
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from bench.load import Item, Outcome, at_rate, load_client, read_trace
from bench.running import Running, machine, pdserve_up

LONGEST = 2000
MANY_SLOTS = 4096
PROBE_S = 8.0


@dataclass(frozen=True, slots=True)
class Point:
    """One way at one load."""

    way: str
    load: float
    sent: int
    in_time: int
    shed: int
    failed: int
    median_ttft_s: float

    @property
    def share(self) -> float:
        """Of all requests."""
        return self.in_time / self.sent

    @property
    def share_of_accepted(self) -> float:
        """Of those that were not ended early."""
        return self.in_time / max(1, self.sent - self.shed)


def main() -> None:
    arguments = _arguments()
    print(machine())
    print(
        f"{arguments.prefill} prefill and {arguments.decode} decode instances, {arguments.engine} engine, "
        f"{arguments.share:g} of a core each; lengths x {arguments.factor:g}; objective {arguments.ttft_ms:g} ms"
    )
    os.environ["PDSERVE_ENGINE_SHARE"] = str(arguments.share)
    items = read_trace(arguments.trace, arguments.factor, longest=LONGEST)
    items = [replace(one, num_output_tokens=min(one.num_output_tokens, arguments.max_output)) for one in items]
    with _system(arguments, "on demand") as running:
        capacity = asyncio.run(_capacity(running, items, arguments))
    print(f"the prefill instances compute {capacity:.2f} requests/s; load 1 is {arguments.base * capacity:.2f}/s")
    points = []
    for way in ("queue", "on demand"):
        with _system(arguments, way) as running:
            for load in arguments.loads:
                points.append(
                    asyncio.run(_play(running, way, load, arguments.base * capacity * load, items, arguments))
                )
                _print(points[-1])
    _compare(points, arguments.loads)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(_plain(points), indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--loads", type=float, nargs="+", default=[1, 2, 4, 5], help="multiples of the base load")
    parser.add_argument("--base", type=float, default=0.22, help="load 1, as a share of what prefill can compute")
    parser.add_argument("--ttft-ms", type=float, default=1000.0)
    parser.add_argument("--seconds", type=float, default=40.0, help="for each point")
    parser.add_argument("--factor", type=float, default=0.25, help="of both lengths")
    parser.add_argument("--max-output", type=int, default=16, help="answers are cut here: this is about prefill")
    parser.add_argument("--prefill", type=int, default=2)
    parser.add_argument("--decode", type=int, default=2)
    parser.add_argument("--slots", type=int, default=4, help="of a prefill instance, on demand")
    parser.add_argument("--share", type=float, default=0.25, help="of a core, for each instance")
    parser.add_argument("--engine", choices=["torch", "mock"], default="torch")
    parser.add_argument("--out", metavar="FILE.json")
    return parser.parse_args()


@contextmanager
def _system(arguments: argparse.Namespace, way: str) -> Iterator[Running]:
    """A system that forwards in one of the two ways."""
    is_queue = way == "queue"
    os.environ["PDSERVE_PREFILL_SLOTS"] = str(MANY_SLOTS if is_queue else arguments.slots)
    objective = "" if is_queue else f"    ttft_ms: {arguments.ttft_ms}\n"
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder) / "groups.yaml"
        groups.write_text(
            f"groups:\n  - name: default\n    prefill: {arguments.prefill}\n    decode: {arguments.decode}\n{objective}"
        )
        options = ("--groups", str(groups), "--threads", "1", "--control", "off", "--engine", arguments.engine)
        with pdserve_up(*options) as running:
            yield running


async def _capacity(running: Running, items: Sequence[Item], arguments: argparse.Namespace) -> float:
    """Requests per second with prefill always at work."""
    # Batch requests wait as long as they have to (PDSERVE_TTFT_TIMEOUT_S).
    endless = iter(items * 100)
    async with load_client(running.nats_url) as client:
        end = time.monotonic() + PROBE_S
        await client.closed_loop(
            endless, 2 * arguments.prefill * arguments.slots, lambda: time.monotonic() >= end, priority="batch"
        )
        done = [one for one in client.outcomes if one.first_token_at and end - PROBE_S / 2 <= one.first_token_at < end]
    return len(done) / (PROBE_S / 2)


async def _play(
    running: Running, way: str, load: float, per_s: float, items: Sequence[Item], arguments: argparse.Namespace
) -> Point:
    """The beginning of the trace at a speed that gives so many requests per second."""
    async with load_client(running.nats_url, seed=int(load * 10)) as client:
        await client.open_loop(at_rate(items, per_s, arguments.seconds))
        return _point(way, load, client.outcomes, arguments.ttft_ms / 1000)


def _point(way: str, load: float, outcomes: Sequence[Outcome], ttft_s: float) -> Point:
    shed = [one for one in outcomes if one.error is not None and one.error.startswith(("overloaded", "no_instance"))]
    times = sorted(one.ttft_s for one in outcomes)
    return Point(
        way=way,
        load=load,
        sent=len(outcomes),
        in_time=sum(one.ttft_s <= ttft_s and one.error is None for one in outcomes),
        shed=len(shed),
        failed=sum(one.error is not None for one in outcomes) - len(shed),
        median_ttft_s=times[len(times) // 2],
    )


def _print(point: Point) -> None:
    print(
        f"{point.way:>10} at {point.load:g}x: {point.sent} requests, {point.share:6.1%} in time, "
        f"{point.share_of_accepted:6.1%} of those accepted; {point.shed} ended early, {point.failed} failed; "
        f"median TTFT {point.median_ttft_s:.2f} s",
        flush=True,
    )


def _compare(points: Sequence[Point], loads: Sequence[float]) -> None:
    shares = {(one.way, one.load): one.share for one in points}
    gains = {load: shares["on demand", load] - shares["queue", load] for load in loads}
    best = max(gains, key=lambda load: gains[load])
    print(f"on demand is {100 * gains[best]:.0f} percentage points better at {best:g}x")


def _plain(points: Sequence[Point]) -> list[dict[str, object]]:
    return [{name: getattr(one, name) for name in Point.__slots__} for one in points]


if __name__ == "__main__":
    main()
