"""`pdserve status`: what the controller sees, and what it has decided."""

import asyncio
import time
from collections.abc import Sequence
from pathlib import Path

from pdserve import runfile
from shared import settings
from shared.addresses import shown
from shared.bus import connection, subjects
from shared.bus.connection import Bus
from shared.errors import BusUnavailable, PeerUnavailable
from shared.messages.control import GroupStatus, InstanceStatus, Status, StatusRequest, merged_status

TIMEOUT_S = 3.0
NUM_DECISIONS = 8
"""How many of the latest are shown; --json has more."""


def show_status(nats_url: str | None, *, as_json: bool, folder: Path) -> int:
    """Prints the status; raises `BusUnavailable` where nobody can tell it."""
    status = asyncio.run(ask(nats_url or find_nats(folder)))
    if as_json:
        print(status.model_dump_json(indent=2))
    else:
        show(status)
    return 0


def show_groups(nats_url: str | None, *, folder: Path) -> int:
    """Prints groups alone; raises likewise."""
    for group in asyncio.run(ask(nats_url or find_nats(folder))).groups:
        _show_group(group)
    return 0


def find_nats(folder: Path) -> str:
    """The NATS server of the `pdserve up` in this folder, or the one that the settings name."""
    run = runfile.read(folder)
    url = run.nats_url if run is not None else settings.given("nats_url")
    if url is None:
        raise BusUnavailable("no `pdserve up` runs in this folder: start one, go to its folder, or give --nats URL")
    return url


async def ask(nats_url: str) -> Status:
    """The controller's answer, all pages of it. Raises `BusUnavailable` where no controller answers."""
    async with connection.connect(nats_url, name="pdserve-status", timeout_s=TIMEOUT_S) as bus:
        try:
            pages = [await _page(bus, 0)]
            for number in range(1, pages[0].num_pages):
                pages.append(await _page(bus, number))
        except PeerUnavailable as error:
            raise BusUnavailable(
                f"no controller answers at {shown(nats_url)}: is `python -m services.controller` running, "
                "and may this NATS user ask it?"
            ) from error
    return merged_status(pages)


async def _page(bus: Bus, number: int) -> Status:
    return await bus.request(subjects.STATUS, StatusRequest(page=number), Status, timeout_s=TIMEOUT_S)


def show(status: Status) -> None:
    """Groups, then a line for each instance and gateway, then the latest decisions."""
    lead = "nobody leads" if status.leader is None else f"{status.leader} leads"
    print(f"{lead}; ratio control: {status.control}")
    for group in status.groups:
        _show_group(group)
    print_table([COLUMNS, *(_row(one) for one in status.instances)])
    for gateway in status.gateways:
        waits = f"{gateway.open_requests} open requests, {gateway.waiting_requests} waiting"
        print(f"gateway {gateway.id}: {gateway.address}, {waits}, pid {gateway.pid} on {gateway.host}")
        for name, number in gateway.failures.items():
            print(f"  {number} attempts failed at {name} in the last minute: it is avoided until one succeeds")
        for link, number in gateway.link_failures.items():
            source, _, target = link.partition(">")
            print(f"  {number} KV transfers failed from {source} to {target} in the last minute: the path is avoided")
    if status.upgrade is not None:
        print(status.upgrade)
    for one in status.decisions[-NUM_DECISIONS:]:
        at = time.strftime("%H:%M:%S", time.localtime(one.at))
        print(f"{at} {one.group}: {one.what}, since {one.why}: {one.outcome or 'under way'}")


COLUMNS = (
    "INSTANCE",
    "GROUP",
    "ROLE",
    "STATE",
    "SLOTS",
    "LEASED",
    "BLOCKS FREE",
    "CACHED",
    "EPOCH",
    "BEAT",
    "PID",
    "HOST",
)


def _row(one: InstanceStatus) -> tuple[str, ...]:
    return (
        one.id,
        one.group or "-",
        one.role or "-",
        "late" if one.late else one.state,
        f"{one.slots_used}/{one.slots_total}",
        str(one.slots_leased),
        f"{one.blocks_free}/{one.blocks_total}",
        str(one.blocks_cached),
        str(one.epoch),
        f"{one.heartbeat_age_s:.1f} s",
        str(one.pid),
        one.host,
    )


def _show_group(group: GroupStatus) -> None:
    late = f", {len(group.late)} late" if group.late else ""
    scenario = f" (scenario {group.scenario})" if group.scenario != group.name else ""
    what = f"{group.model or 'nobody'}, {len(group.prefill)} prefill, {len(group.decode)} decode{late}"
    print(f"group {group.name}{scenario}: {what}; {group.open} open requests, {group.waiting} waiting")
    figures = [f"{name} {_shown(group.load.get(key), factor)}" for name, key, factor in FIGURES if group.load.get(key)]
    if figures:
        print(f"  {', '.join(figures)}")


FIGURES = (
    ("arrivals/s", "arrivals_per_s", 1.0),
    ("done/s", "done_per_s", 1.0),
    ("TTFT ms", "ttft_s", 1000.0),
    ("TPOT ms", "tpot_s", 1000.0),
    ("E2E s", "e2e_s", 1.0),
    ("T_p s", "held_prefill_s", 1.0),
    ("T_d s", "held_decode_s", 1.0),
    ("prefill busy %", "prefill_busy", 100.0),
    ("decode busy %", "decode_busy", 100.0),
    ("refusals/s", "refusals_per_s", 1.0),
)


def _shown(value: float | None, factor: float) -> str:
    return f"{(value or 0.0) * factor:.3g}"


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows in columns as wide as they need to be; ids stay whole, to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
