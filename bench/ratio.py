"""Does the live ratio find the best split by itself, and again when the mix of requests changes?

    .venv/bin/python -m bench.ratio CODE.csv CONV.csv [--instances 4] [--clients 16] [--factor 0.125] [--seconds 30]

Two traces of Azure's LLM inference dataset (columns TIMESTAMP, ContextTokens, GeneratedTokens): code (long prompts,
short answers) and conversation (the other way round), lengths scaled by one factor, in a closed loop. First every fixed
split is measured with both, then a system that begins with the worst split for the first mix runs with its controller
on, and the mix changes half-way. All splits run in one system: `pdserve flip` brings the next one about.

The engine is real. On a machine with fewer cores than instances each gets a share of the time (--share), as if it had a
slower device to itself; with --engine mock it computes nothing, and the figures say nothing about real serving.
"""

import argparse
import asyncio
import itertools
import json
import os
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from bench.load import Item, LoadClient, load_client, read_trace, throughput
from bench.running import machine, pdserve_up
from pdserve.admin import ask_admin
from pdserve.status import ask
from shared.messages.control import AdminRequest
from shared.messages.records import Role

_seeds = itertools.count()
"""No prompt comes twice, or the prefix cache would make whatever is measured later faster."""
WARM_S = 6.0
"""How long after a change of split or mix its throughput is not counted yet."""
WINDOW_S = 6.0
"""Over so long the live ratio's throughput is taken, to be compared with the best fixed one's."""
BOUND = 0.95
LONGEST = 2000


@dataclass(slots=True)
class Timeline:
    """The splits of a live run, as they came: when (seconds after its start), prefill and decode instances."""

    started_at: float
    splits: list[tuple[float, int, int]] = field(default_factory=list)

    def see(self, num_prefill: int, num_decode: int) -> None:
        if not self.splits or self.splits[-1][1:] != (num_prefill, num_decode):
            self.splits.append((time.monotonic() - self.started_at, num_prefill, num_decode))

    def between(self, first_s: float, last_s: float) -> list[tuple[float, int, int]]:
        return [one for one in self.splits if first_s <= one[0] < last_s]


def main() -> None:
    arguments = _arguments()
    print(machine())
    factor = f"lengths x {arguments.factor:g}, {arguments.clients} clients, {arguments.instances} instances"
    factor += f" of {arguments.prefill_slots} prefill or {arguments.decode_slots} decode slots"
    print(f"{arguments.engine} engine, {arguments.share:g} of a core each; {factor}")
    os.environ["PDSERVE_ENGINE_SHARE"] = str(arguments.share)
    os.environ["PDSERVE_PREFILL_SLOTS"] = str(arguments.prefill_slots)
    os.environ["PDSERVE_DECODE_SLOTS"] = str(arguments.decode_slots)
    mixes = {
        "code": read_trace(arguments.code, arguments.factor, longest=LONGEST),
        "conv": read_trace(arguments.conv, arguments.factor, longest=LONGEST),
    }
    options = ["--threads", "1", "--control", "off", "--engine", arguments.engine]
    if arguments.model:
        options += ["--model", arguments.model]
    split = ["--prefill", "1", "--decode", str(arguments.instances - 1)]
    with pdserve_up(*split, *options) as running:
        result = asyncio.run(_measure(running.nats_url, mixes, arguments))
    if arguments.out:
        Path(arguments.out).write_text(json.dumps(result, indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", help="the trace of code completion")
    parser.add_argument("conv", help="the trace of conversation")
    parser.add_argument("--instances", type=int, default=4)
    parser.add_argument("--clients", type=int, default=16)
    parser.add_argument("--factor", type=float, default=0.125, help="of both lengths")
    parser.add_argument("--seconds", type=float, default=30.0, help="for each fixed split; three times that live")
    parser.add_argument("--share", type=float, default=0.25, help="of a core, for each instance")
    parser.add_argument("--prefill-slots", type=int, default=4)
    parser.add_argument("--decode-slots", type=int, default=6, help="requests that an instance has memory for")
    parser.add_argument("--engine", choices=["torch", "mock"], default="torch")
    parser.add_argument("--model", help="a folder; the demonstration model unless given")
    parser.add_argument("--out", metavar="FILE.json")
    return parser.parse_args()


def endless(items: list[Item], seed: int) -> Iterator[Item]:
    """The trace's requests in random order, for ever: any 36 that follow each other have the whole mix.

    They are one each of 6 x 6 equal parts, by length of the prompt and then of the answer, so that a stretch of half a
    minute is like any other; lengths vary so much that it would not be otherwise.
    """
    order = random.Random(seed)
    by_prompt = _parts(sorted(items, key=lambda one: one.num_prompt_tokens))
    cells = [cell for part in by_prompt for cell in _parts(sorted(part, key=lambda one: one.num_output_tokens))]
    while True:
        yield from (order.choice(cell) for cell in order.sample(cells, len(cells)))


def _parts(items: list[Item]) -> list[list[Item]]:
    """Cut into six of nearly equal size."""
    return [items[len(items) * number // 6 : len(items) * (number + 1) // 6] for number in range(6)]


async def _measure(nats_url: str, mixes: dict[str, list[Item]], arguments: argparse.Namespace) -> dict[str, object]:
    num_instances = arguments.instances
    fixed: dict[str, dict[int, float]] = {name: {} for name in mixes}
    print(f"{'split':>8} " + " ".join(f"{name + ' req/s':>14}" for name in mixes))
    for num_prefill in range(1, num_instances):
        await bring_about(nats_url, num_prefill)
        for name, items in mixes.items():
            fixed[name][num_prefill] = await _fixed(nats_url, items, arguments)
        row = " ".join(f"{fixed[name][num_prefill]:>14.2f}" for name in mixes)
        print(f"{num_prefill:>5}P{num_instances - num_prefill}D {row}", flush=True)
    names = list(mixes)
    worst = min(fixed[names[0]], key=lambda split: fixed[names[0]][split])
    await bring_about(nats_url, worst)
    live = await _live(nats_url, mixes, fixed, arguments)
    return {"fixed": fixed, "live": live}


async def _fixed(nats_url: str, items: list[Item], arguments: argparse.Namespace) -> float:
    """Requests per second of the split that there is."""
    end = time.monotonic() + WARM_S + arguments.seconds
    async with load_client(nats_url, seed=next(_seeds)) as client:
        await client.closed_loop(endless(items, 1), arguments.clients, lambda: time.monotonic() >= end)
        report_failures(client)
        return throughput(client.outcomes, end - arguments.seconds, end)


async def _live(
    nats_url: str, mixes: dict[str, list[Item]], fixed: dict[str, dict[int, float]], arguments: argparse.Namespace
) -> dict[str, object]:
    """The controller on: the first mix, then the second."""
    await ask_admin(nats_url, "control", AdminRequest(control="auto"))
    results: dict[str, object] = {}
    timeline = Timeline(time.monotonic())
    watching = asyncio.create_task(_watch(nats_url, timeline))
    for name, items in mixes.items():
        async with load_client(nats_url, seed=next(_seeds)) as client:
            started_at = time.monotonic()
            end = started_at + 3 * arguments.seconds
            await client.closed_loop(
                endless(items, 2),
                arguments.clients,
                lambda end=end: time.monotonic() >= end,  # type: ignore[misc]
            )
            report_failures(client)
            results[name] = _judge(name, client, started_at, end, fixed[name], timeline)
    watching.cancel()
    print("decisions:")
    for one in (await ask(nats_url)).decisions:
        if "changes" in one.what:
            print(f"  {one.at - time.time() + time.monotonic() - timeline.started_at:6.1f} s  {one.what}: {one.why}")
    return results


def _judge(
    name: str, client: LoadClient, started_at: float, end: float, fixed: dict[int, float], timeline: Timeline
) -> dict[str, object]:
    best, worst = max(fixed.values()), min(fixed.values())
    last = throughput(client.outcomes, end - (end - started_at) / 2, end)
    offset = started_at - timeline.started_at
    changes = timeline.between(offset, end - timeline.started_at)
    reached = next(
        (
            at
            for at in itertools.takewhile(lambda at: started_at + at + WINDOW_S < end, range(200))
            if throughput(client.outcomes, started_at + at, started_at + at + WINDOW_S) >= BOUND * best
        ),
        None,
    )
    print(
        f"live, {name}: {last:.2f} req/s in the second half, {last / best:.2f} of the best fixed split, "
        f"{last / worst:.2f} of the worst; a window of {WINDOW_S:g} s as good as {BOUND:g} of the best begins after "
        f"{reached} s; splits: {', '.join(f'{at - offset:.0f} s {p}P{d}D' for at, p, d in changes) or 'no change'}",
        flush=True,
    )
    return {"req_per_s": last, "of_best": last / best, "of_worst": last / worst, "reached_s": reached}


async def _watch(nats_url: str, timeline: Timeline) -> None:
    while True:
        [group] = (await ask(nats_url)).groups
        timeline.see(len(group.prefill), len(group.decode))
        await asyncio.sleep(0.5)


async def bring_about(nats_url: str, num_prefill: int) -> None:
    """Flips instances until the one group has so many for prefill."""
    while True:
        [group] = (await ask(nats_url)).groups
        if len(group.prefill) == num_prefill:
            return
        role: Role = "prefill" if len(group.prefill) < num_prefill else "decode"
        instance = (group.decode if role == "prefill" else group.prefill)[0]
        answer = await ask_admin(nats_url, "flip", AdminRequest(instance=instance, role=role))
        if not answer.ok:
            raise SystemExit(f"the split cannot be brought about: {answer.message}")


def report_failures(client: LoadClient, but: str | None = None) -> None:
    """Says how many requests failed, other than by errors that begin like `but`."""
    errors = [one.error for one in client.outcomes if one.error is not None]
    failed = [error for error in errors if but is None or not error.startswith(but)]
    if failed:
        print(f"{len(failed)} of {len(client.outcomes)} requests failed, at first: {failed[0]}")


if __name__ == "__main__":
    main()
