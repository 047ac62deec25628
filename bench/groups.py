"""A group for each scenario against one mixed pool of the same instances: goodput and prefix hits.

    .venv/bin/python -m bench.groups CODE.csv CONV.csv [--seconds 40] [--clients 12] [--factor 0.125]

Two traces of Azure's LLM inference dataset at once, each in a closed loop, lengths scaled by one factor. Each
scenario has prompts of its own that many requests begin with (--prefixes of --prefix-tokens tokens). Both ways have six
instances and a controller that keeps the ratio: *mixed* is one group for all, *groups* is one for each scenario.
Goodput counts requests per second whose first token and whose further ones came within the objectives.
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

from bench.load import Item, LoadClient, Outcome, load_client, read_trace
from bench.ratio import LONGEST, endless, report_failures
from bench.running import machine, pdserve_up

NUM_INSTANCES = 6
WAYS = {
    "mixed": "groups:\n  - {name: default, prefill: 3, decode: 3}\n",
    # The default group, which there has to be, serves the code.
    "groups": "groups:\n  - {name: conv, prefill: 1, decode: 2}\n  - {name: default, prefill: 2, decode: 1}\n",
}


@dataclass(frozen=True, slots=True)
class Result:
    """One scenario in one way."""

    way: str
    scenario: str
    requests_per_s: float
    goodput_per_s: float
    cached_share: float
    mean_ttft_s: float
    mean_tpot_s: float


def main() -> None:
    arguments = _arguments()
    print(machine())
    print(
        f"{NUM_INSTANCES} instances, {arguments.engine} engine, {arguments.share:g} of a core each; lengths x "
        f"{arguments.factor:g}; 2 x {arguments.clients} clients; objectives: TTFT {arguments.ttft_ms:g} ms, TPOT "
        f"{arguments.tpot_ms:g} ms; {arguments.prefixes} prefixes of {arguments.prefix_tokens} tokens each"
    )
    os.environ["PDSERVE_ENGINE_SHARE"] = str(arguments.share)
    os.environ["PDSERVE_PREFILL_SLOTS"] = "4"
    os.environ["PDSERVE_KV_POOL_BYTES"] = str(arguments.pool_bytes)
    mixes = {
        "code": read_trace(arguments.code, arguments.factor, longest=LONGEST - arguments.prefix_tokens),
        "conv": read_trace(arguments.conv, arguments.factor, longest=LONGEST - arguments.prefix_tokens),
    }
    results = [one for way in WAYS for one in _run(way, mixes, arguments)]
    _compare(results)
    if arguments.out:
        Path(arguments.out).write_text(json.dumps([asdict(one) for one in results], indent=2))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("code", help="the trace of code completion")
    parser.add_argument("conv", help="the trace of conversation")
    parser.add_argument("--clients", type=int, default=12, help="for each scenario")
    parser.add_argument("--factor", type=float, default=0.125, help="of both lengths")
    parser.add_argument("--seconds", type=float, default=40.0, help="measured, after as long again to settle")
    parser.add_argument("--share", type=float, default=0.2, help="of a core, for each instance")
    parser.add_argument("--ttft-ms", type=float, default=2000.0)
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
        groups.write_text(WAYS[way])
        options = ("--groups", str(groups), "--threads", "1", "--engine", arguments.engine)
        with pdserve_up(*options) as running:
            return asyncio.run(_measure(running.nats_url, way, mixes, arguments))


async def _measure(
    nats_url: str, way: str, mixes: dict[str, list[Item]], arguments: argparse.Namespace
) -> list[Result]:
    first = time.monotonic() + arguments.seconds
    last = first + arguments.seconds
    results = []
    async with load_client(nats_url, 1) as code, load_client(nats_url, 2) as conv:
        clients = {"code": code, "conv": conv}
        await asyncio.gather(*(_load(clients[name], name, mixes[name], last, arguments) for name in mixes))
        for name, client in clients.items():
            report_failures(client)
            results.append(_result(way, name, client.outcomes, first, last, arguments))
            print(_line(results[-1]), flush=True)
    return results


async def _load(
    client: LoadClient, scenario: str, items: list[Item], until: float, arguments: argparse.Namespace
) -> None:
    """One scenario's clients, each request with one of its prefixes."""
    choose = random.Random(scenario)
    prefixes = [[choose.randrange(10, 4000) for _ in range(arguments.prefix_tokens)] for _ in range(arguments.prefixes)]
    mix = endless(items, 3)

    async def one() -> None:
        while time.monotonic() < until:
            item = next(mix)
            whole = Item(0.0, item.num_prompt_tokens + arguments.prefix_tokens, item.num_output_tokens)
            await client.send(whole, scenario=scenario, prefix=choose.choice(prefixes))

    await asyncio.gather(*(one() for _ in range(arguments.clients)))


def _result(
    way: str, scenario: str, outcomes: Sequence[Outcome], first: float, last: float, arguments: argparse.Namespace
) -> Result:
    done = [one for one in outcomes if one.error is None and one.done_at and first <= one.done_at < last]
    good = [one for one in done if one.ttft_s <= arguments.ttft_ms / 1e3 and _tpot_s(one) <= arguments.tpot_ms / 1e3]
    return Result(
        way=way,
        scenario=scenario,
        requests_per_s=len(done) / (last - first),
        goodput_per_s=len(good) / (last - first),
        cached_share=sum(one.cached_tokens for one in done) / sum(one.item.num_prompt_tokens for one in done),
        mean_ttft_s=sum(one.ttft_s for one in done) / len(done),
        mean_tpot_s=sum(map(_tpot_s, done)) / len(done),
    )


def _tpot_s(one: Outcome) -> float:
    assert one.done_at is not None
    assert one.first_token_at is not None
    return (one.done_at - one.first_token_at) / max(1, one.num_tokens - 1)


def _line(one: Result) -> str:
    return (
        f"{one.way:>7} {one.scenario}: {one.requests_per_s:6.2f} requests/s, goodput {one.goodput_per_s:6.2f}/s, "
        f"{one.cached_share:.0%} of prompt tokens cached, TTFT {one.mean_ttft_s:.2f} s, "
        f"TPOT {1000 * one.mean_tpot_s:.0f} ms"
    )


def _compare(results: Sequence[Result]) -> None:
    totals = {way: sum(one.goodput_per_s for one in results if one.way == way) for way in WAYS}
    print(f"goodput of both together: {totals['groups'] / max(1e-9, totals['mixed']):.2f}x the mixed pool's")
    for scenario in ("code", "conv"):
        by_way = {one.way: one for one in results if one.scenario == scenario}
        gain = by_way["groups"].goodput_per_s / max(1e-9, by_way["mixed"].goodput_per_s)
        print(f"  {scenario}: {gain:.2f}x, cached {by_way['groups'].cached_share - by_way['mixed'].cached_share:+.0%}")


if __name__ == "__main__":
    main()
