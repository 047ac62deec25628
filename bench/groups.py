"""A group for each scenario against one mixed pool of the same instances: goodput and prefix hits.

    .venv/bin/python -m bench.groups CODE.csv CONV.csv [--rates 6 4] [--seconds 60] [--factor 0.125]

Two traces of Azure's LLM inference dataset at once, with their own arrivals at a speed that gives `--rates` requests
per second, lengths scaled by one factor. Each scenario has prompts of its own that many requests begin with
(--prefixes of --prefix-tokens tokens). Both ways get the same requests, and have six instances, the same objectives and
a controller that keeps the ratio: *mixed* is one group for all, *groups* is one for each scenario. Goodput is requests
per second whose first token and whose further ones came within the objectives; what was ended early is not among them.
"""

import argparse
import asyncio
import json
import os
import random
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from bench.load import Item, LoadClient, Outcome, at_rate, load_client, read_trace
from bench.ratio import LONGEST, report_failures
from bench.running import machine, pdserve_up

SCENARIOS = ("code", "conv")
WAYS = {
    "mixed": {"default": (4, 2)},
    # The default group, which there has to be, serves the code.
    "groups": {"conv": (1, 1), "default": (3, 1)},
}
"""Prefill and decode instances that groups begin with."""
NUM_INSTANCES = 6


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario in one way; shares are of the requests sent, or of the prompt tokens of those done."""

    way: str
    scenario: str
    sent_per_s: float
    goodput_per_s: float
    share_shed: float
    share_cached: float
    mean_ttft_s: float
    mean_tpot_s: float


def main() -> None:
    arguments = _arguments()
    print(machine())
    print(
        f"{NUM_INSTANCES} instances, {arguments.engine} engine, {arguments.share:g} of a core each; lengths x "
        f"{arguments.factor:g}; objectives: TTFT {arguments.ttft_ms:g} ms, TPOT {arguments.tpot_ms:g} ms; "
        f"{arguments.prefixes} prefixes of {arguments.prefix_tokens} tokens for each scenario"
    )
    os.environ["PDSERVE_ENGINE_SHARE"] = str(arguments.share)
    os.environ["PDSERVE_PREFILL_SLOTS"] = "4"
    os.environ["PDSERVE_KV_POOL_BYTES"] = str(arguments.pool_bytes)
    longest = LONGEST - arguments.prefix_tokens
    traces = dict(zip(SCENARIOS, (arguments.code, arguments.conv), strict=True))
    mixes = {name: read_trace(path, arguments.factor, longest=longest) for name, path in traces.items()}
    results = [one for way in WAYS for one in _run(way, mixes, arguments)]
    _compare(results)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps([asdict(one) for one in results], indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", help="the trace of code completion")
    parser.add_argument("conv", help="the trace of conversation")
    parser.add_argument("--rates", type=float, nargs=2, default=[6.0, 4.0], help="requests per second: code, conv")
    parser.add_argument("--factor", type=float, default=0.125, help="of both lengths")
    parser.add_argument("--seconds", type=float, default=60.0, help="measured, after half as long to settle")
    parser.add_argument("--share", type=float, default=0.2, help="of a core, for each instance")
    parser.add_argument("--ttft-ms", type=float, default=1500.0)
    parser.add_argument("--tpot-ms", type=float, default=60.0)
    parser.add_argument("--prefixes", type=int, default=8, help="of each scenario")
    parser.add_argument("--prefix-tokens", type=int, default=256)
    parser.add_argument("--pool-bytes", type=int, default=2**27)
    parser.add_argument("--engine", choices=["torch", "mock"], default="torch")
    parser.add_argument("--out", metavar="FILE.json")
    return parser.parse_args()


def _run(way: str, mixes: dict[str, list[Item]], arguments: argparse.Namespace) -> list[Result]:
    with tempfile.TemporaryDirectory() as folder:
        groups = Path(folder) / "groups.yaml"
        groups.write_text(_groups_file(way, arguments))
        options = ("--groups", str(groups), "--threads", "1", "--engine", arguments.engine)
        with pdserve_up(*options) as running:
            return asyncio.run(_measure(running.nats_url, way, mixes, arguments))


def _groups_file(way: str, arguments: argparse.Namespace) -> str:
    objectives = f"ttft_ms: {arguments.ttft_ms}, tpot_ms: {arguments.tpot_ms}"
    groups = [
        f"  - {{name: {name}, prefill: {prefill}, decode: {decode}, {objectives}}}\n"
        for name, (prefill, decode) in WAYS[way].items()
    ]
    return "groups:\n" + "".join(groups)


async def _measure(
    nats_url: str, way: str, mixes: dict[str, list[Item]], arguments: argparse.Namespace
) -> list[Result]:
    settle_s = arguments.seconds / 2
    first = time.monotonic() + settle_s
    async with load_client(nats_url, 1) as code, load_client(nats_url, 2) as conv:
        clients = dict(zip(SCENARIOS, (code, conv), strict=True))
        parts = {
            name: at_rate(mixes[name], rate, settle_s + arguments.seconds)
            for name, rate in zip(SCENARIOS, arguments.rates, strict=True)
        }
        await asyncio.gather(*(_load(clients[name], name, parts[name], arguments) for name in SCENARIOS))
        results = []
        for name, client in clients.items():
            report_failures(client, but="overloaded")
            results.append(_result(way, name, [one for one in client.outcomes if one.sent_at >= first], arguments))
            print(_line(results[-1]), flush=True)
    return results


async def _load(client: LoadClient, scenario: str, items: Sequence[Item], arguments: argparse.Namespace) -> None:
    """One scenario's requests at their times, each with one of its prefixes."""
    choose = random.Random(scenario)
    prefixes = [[choose.randrange(10, 4000) for _ in range(arguments.prefix_tokens)] for _ in range(arguments.prefixes)]
    started_at = time.monotonic()
    async with asyncio.TaskGroup() as tasks:
        for item in items:
            whole = Item(item.at_s, item.num_prompt_tokens + arguments.prefix_tokens, item.num_output_tokens)
            await asyncio.sleep(max(0.0, started_at + item.at_s - time.monotonic()))
            tasks.create_task(client.send(whole, scenario=scenario, prefix=choose.choice(prefixes)))


def _result(way: str, scenario: str, sent: Sequence[Outcome], arguments: argparse.Namespace) -> Result:
    done = [one for one in sent if one.error is None]
    good = [one for one in done if one.ttft_s <= arguments.ttft_ms / 1e3 and _tpot_s(one) <= arguments.tpot_ms / 1e3]
    return Result(
        way=way,
        scenario=scenario,
        sent_per_s=len(sent) / arguments.seconds,
        goodput_per_s=len(good) / arguments.seconds,
        share_shed=sum(one.error is not None and one.error.startswith("overloaded") for one in sent) / len(sent),
        share_cached=sum(one.cached_tokens for one in done) / max(1, sum(one.item.num_prompt_tokens for one in done)),
        mean_ttft_s=sum(one.ttft_s for one in done) / max(1, len(done)),
        mean_tpot_s=sum(map(_tpot_s, done)) / max(1, len(done)),
    )


def _tpot_s(one: Outcome) -> float:
    assert one.done_at is not None
    assert one.first_token_at is not None
    return (one.done_at - one.first_token_at) / max(1, one.num_tokens - 1)


def _line(one: Result) -> str:
    return (
        f"{one.way:>7} {one.scenario}: {one.sent_per_s:5.2f} requests/s, goodput {one.goodput_per_s:5.2f}/s, "
        f"{one.share_shed:.0%} ended early; {one.share_cached:.0%} of prompt tokens cached, TTFT {one.mean_ttft_s:.2f} "
        f"s, TPOT {1000 * one.mean_tpot_s:.0f} ms"
    )


def _compare(results: Sequence[Result]) -> None:
    of = {(one.way, one.scenario): one for one in results}
    for scenario in SCENARIOS:
        groups, mixed = of["groups", scenario], of["mixed", scenario]
        gain = groups.goodput_per_s / max(1e-9, mixed.goodput_per_s)
        print(
            f"{scenario}: goodput {gain:.2f}x the mixed pool's, cached {groups.share_cached - mixed.share_cached:+.0%}"
        )
    total = {way: sum(of[way, scenario].goodput_per_s for scenario in SCENARIOS) for way in WAYS}
    print(f"both: goodput {total['groups'] / max(1e-9, total['mixed']):.2f}x")


if __name__ == "__main__":
    main()
