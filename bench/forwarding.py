"""On-demand forwarding against a queue in each prefill instance: whose first tokens come in time under load?

    .venv/bin/python -m bench.forwarding TRACE.csv [--half first|second|both] [--loads 1 2 4 5] [--ttft-ms 1000]

The arrivals of a half of the trace (Azure's LLM inference dataset; columns TIMESTAMP, ContextTokens, GeneratedTokens)
are replayed faster and faster; lengths are scaled by one factor. Load 1 is `--base` of what the prefill instances can
compute, measured first. Both ways have the same instances and the same requests, one way after the other at each load:

- *on demand*: instances accept what they can start in their next step, the gateway keeps the waiting requests in the
  order of `services/gateway/routing.py`, and sheds those that cannot be served in time any more (P/D-Serve,
  arXiv 2408.08147, 3.4);
- *queue*: instances accept everything and compute it in the order of arrival (`PDSERVE_MAX_UNCOMPUTED_TOKENS`); the
  gateway chooses the instance with the fewest open requests, and nothing is shed.

In time is a first token within the objective, at the client. A request that was shed is not in time. Decode instances
compute no prompts here (`PDSERVE_LOCAL_PREFILL=off`), so that what prefill achieves can be compared with the best
schedule in hindsight (`bench/hindsight.py`) of the same arrivals, at the speed that was measured on the idle system.
`bench.schedule` simulates the same without a system.
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
from itertools import cycle
from pathlib import Path

import numpy as np

from bench.hindsight import best_in_hindsight, upper_bound
from bench.load import Item, Outcome, at_rate, load_client, read_trace
from bench.running import Running, machine, pdserve_up
from bench.schedule import HALVES, LONGEST, Speed, half_of

MANY_SLOTS = 4096
MANY_TOKENS = 2**30
PROBE_S = 8.0
SPEED_TOKENS = (16, 250, 500, 1000, 1500, 1900)
SPEED_ROUNDS = 3
"""Each of these prompts is sent alone so often, and the quickest counts."""


@dataclass(frozen=True, slots=True)
class Point:
    """One way at one load. `best` and `at_most` are first tokens in time, of a schedule that knows all arrivals; they
    are known at the end."""

    half: str
    way: str
    load: float
    sent: int
    in_time: int
    shed: int
    failed: int
    median_ttft_s: float
    best: int = 0
    at_most: int = 0

    @property
    def share(self) -> float:
        """Of all requests."""
        return self.in_time / self.sent

    @property
    def share_of_accepted(self) -> float:
        """Of those that were not shed."""
        return self.in_time / max(1, self.sent - self.shed)


def main() -> None:
    arguments = _arguments()
    print(machine())
    print(
        f"{arguments.prefill} prefill and {arguments.decode} decode instances, {arguments.engine} engine, "
        f"{arguments.share:g} of a core each; lengths x {arguments.factor:g}; objective {arguments.ttft_ms:g} ms"
    )
    os.environ["PDSERVE_ENGINE_SHARE"] = str(arguments.share)
    os.environ["PDSERVE_LOCAL_PREFILL"] = "off"
    items = read_trace(arguments.trace, arguments.factor, longest=LONGEST)
    items = [replace(one, num_output_tokens=min(one.num_output_tokens, arguments.max_output)) for one in items]
    halves = {half: half_of(items, half) for half in (HALVES if arguments.half == "both" else [arguments.half])}
    seconds = []
    with _system(arguments, "on demand") as running:
        seconds.append(asyncio.run(_prefill_seconds(running)))
        capacity = {half: asyncio.run(_capacity(running, part, arguments)) for half, part in halves.items()}
    played: list[tuple[Point, list[Outcome]]] = []
    for way in ("queue", "on demand"):
        with _system(arguments, way) as running:
            seconds.append(asyncio.run(_prefill_seconds(running)))
            for half, part in halves.items():
                per_s = arguments.base * capacity[half]
                print(f"{half} half: prefill computes {capacity[half]:.2f} requests/s; load 1 is {per_s:.2f}/s")
                for load in arguments.loads:
                    outcomes = asyncio.run(_play(running, load, at_rate(part, per_s * load, arguments.seconds)))
                    played.append((_point(half, way, load, outcomes, arguments.ttft_ms / 1000), outcomes))
                    _print(played[-1][0])
    # Other programs on the machine make prompts slower, never quicker.
    speed = fitted_speed(SPEED_TOKENS, [min(times) for times in zip(*seconds, strict=True)])
    print(f"a prompt of 500 tokens takes {speed.of_chunk(0, 500):.3f} s, one of 1,900 {speed.of_chunk(0, 1900):.3f} s")
    points = [_with_best(point, outcomes, speed, arguments) for point, outcomes in played]
    for half in halves:
        _compare([one for one in points if one.half == half])
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(_plain(points), indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("trace", help="CSV with TIMESTAMP, ContextTokens, GeneratedTokens")
    parser.add_argument("--half", choices=[*HALVES, "both"], default="both", help="which half of the trace")
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
    os.environ["PDSERVE_MAX_UNCOMPUTED_TOKENS"] = str(MANY_TOKENS if is_queue else 0)
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
    async with load_client(running.nats_url) as client:
        end = time.monotonic() + PROBE_S
        await client.closed_loop(
            cycle(items), 2 * arguments.prefill * arguments.slots, lambda: time.monotonic() >= end, priority="batch"
        )
        done = [one for one in client.outcomes if one.first_token_at and end - PROBE_S / 2 <= one.first_token_at < end]
    return len(done) / (PROBE_S / 2)


async def _prefill_seconds(running: Running) -> list[float]:
    """Measures how long prompts of `SPEED_TOKENS` take on the idle system."""
    async with load_client(running.nats_url) as client:
        quickest = []
        for num_tokens in SPEED_TOKENS:
            rounds = [await client.send(Item(0.0, num_tokens, 1)) for _ in range(SPEED_ROUNDS + 1)]
            quickest.append(min(one.ttft_s for one in rounds[1:]))
    return quickest


def fitted_speed(num_tokens: Sequence[int], seconds: Sequence[float]) -> Speed:
    """Returns the speed that explains best (least squares) how long prompts of these lengths take.

    Nothing in it is negative. What a request takes besides, messages and the step itself, is `step_s`, which the best
    schedule in hindsight does without.
    """
    columns = [np.ones(len(num_tokens)), np.array(num_tokens, float), np.array([n * (n + 1) / 2 for n in num_tokens])]
    step_s, token_s, pair_s = _least_squares(columns, seconds)
    if min(token_s, pair_s) < 0:
        step_s, token_s = _least_squares(columns[:2], seconds)
        pair_s = 0.0
    return Speed(max(0.0, step_s), max(0.0, token_s), pair_s)


def _least_squares(
    columns: "Sequence[np.ndarray[tuple[int], np.dtype[np.float64]]]", values: Sequence[float]
) -> list[float]:
    # Columns of like size: pairs are a million times as many as tokens.
    scales = [float(column.max()) for column in columns]
    matrix = np.stack([column / scale for column, scale in zip(columns, scales, strict=True)], axis=1)
    solution = np.linalg.lstsq(matrix, np.array(values), rcond=None)[0]
    return [float(value) / scale for value, scale in zip(solution, scales, strict=True)]


async def _play(running: Running, load: float, items: Sequence[Item]) -> list[Outcome]:
    """Sends requests at their times."""
    async with load_client(running.nats_url, seed=int(load * 10)) as client:
        await client.open_loop(items)
        return client.outcomes


def _point(half: str, way: str, load: float, outcomes: Sequence[Outcome], ttft_s: float) -> Point:
    shed = [one for one in outcomes if one.error is not None and one.error.startswith(("overloaded", "no_instance"))]
    times = sorted(one.ttft_s for one in outcomes)
    return Point(
        half=half,
        way=way,
        load=load,
        sent=len(outcomes),
        in_time=sum(one.ttft_s <= ttft_s and one.error is None for one in outcomes),
        shed=len(shed),
        failed=sum(one.error is not None for one in outcomes) - len(shed),
        median_ttft_s=times[len(times) // 2],
    )


def _with_best(point: Point, outcomes: Sequence[Outcome], speed: Speed, arguments: argparse.Namespace) -> Point:
    arrived_at = [one.sent_at for one in outcomes]
    service_s = [speed.of_chunk(0, one.item.num_prompt_tokens) for one in outcomes]
    requests = (arrived_at, service_s, arguments.ttft_ms / 1000, arguments.prefill)
    return replace(point, best=best_in_hindsight(*requests), at_most=upper_bound(*requests))


def _print(point: Point) -> None:
    print(
        f"{point.way:>10} at {point.load:g}x: {point.sent} requests, {point.share:6.1%} in time, "
        f"{point.share_of_accepted:6.1%} of those accepted; {point.shed} shed, {point.failed} failed; "
        f"median TTFT {point.median_ttft_s:.2f} s",
        flush=True,
    )


def _compare(points: Sequence[Point]) -> None:
    queue = {one.load: one for one in points if one.way == "queue"}
    for one in points:
        if one.way == "on demand":
            print(
                f"{one.half} half at {one.load:g}x: on demand {100 * (one.share - queue[one.load].share):+.1f} "
                f"percentage points beside the queue, {one.in_time / max(1, one.best):.2f} of the best schedule in "
                f"hindsight ({one.best / one.sent:.1%}, at most {one.at_most / one.sent:.1%})"
            )


def _plain(points: Sequence[Point]) -> list[dict[str, object]]:
    return [{name: getattr(one, name) for name in Point.__slots__} for one in points]


if __name__ == "__main__":
    main()
