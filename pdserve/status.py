"""`pdserve status`: what the controller sees."""

import asyncio
from collections.abc import Sequence
from pathlib import Path

from pdserve import runfile
from shared import settings
from shared.addresses import shown
from shared.bus import connection, subjects
from shared.bus.messages import Message, Status
from shared.errors import BusUnavailable, PeerUnavailable

TIMEOUT_S = 3.0


def show_status(nats_url: str | None, *, as_json: bool, folder: Path) -> int:
    """Prints the status; raises `BusUnavailable` where nobody can tell it."""
    status = asyncio.run(ask(nats_url or find_nats(folder)))
    if as_json:
        print(status.model_dump_json(indent=2))
    else:
        show(status)
    return 0


def find_nats(folder: Path) -> str:
    """The NATS server of the `pdserve up` in this folder, or the one that the settings name."""
    run = runfile.read(folder)
    url = run.nats_url if run is not None else settings.given("nats_url")
    if url is None:
        raise BusUnavailable("no `pdserve up` runs in this folder: start one, go to its folder, or give --nats URL")
    return url


async def ask(nats_url: str) -> Status:
    """The controller's answer."""
    async with connection.connect(nats_url, name="pdserve-status", timeout_s=TIMEOUT_S) as bus:
        try:
            return await bus.request(subjects.STATUS, Message(), Status, timeout_s=TIMEOUT_S)
        except PeerUnavailable as error:
            raise BusUnavailable(
                f"no controller answers at {shown(nats_url)}: is `python -m services.controller` running?"
            ) from error


def show(status: Status) -> None:
    """Groups, then a line for each instance and gateway."""
    for group in status.groups:
        late = f", {len(group.late)} late" if group.late else ""
        print(f"group {group.name}: {group.model}, {len(group.prefill)} prefill, {len(group.decode)} decode{late}")
    rows = [("INSTANCE", "ROLE", "STATE", "SLOTS", "BLOCKS FREE", "CACHED", "EPOCH", "HEARTBEAT", "PID", "HOST")]
    for one in status.instances:
        rows.append(
            (
                one.id,
                one.role,
                "late" if one.late else one.state,
                f"{one.slots_used}/{one.slots_total}",
                f"{one.blocks_free}/{one.blocks_total}",
                str(one.blocks_cached),
                str(one.epoch),
                f"{one.heartbeat_age_s:.1f} s",
                str(one.pid),
                one.host,
            )
        )
    print_table(rows)
    for gateway in status.gateways:
        waits = f"{gateway.open_requests} open requests, {gateway.waiting_requests} waiting"
        print(f"gateway {gateway.id}: {gateway.address}, {waits}, pid {gateway.pid} on {gateway.host}")


def print_table(rows: Sequence[tuple[str, ...]]) -> None:
    """Rows in columns as wide as they need to be; ids stay whole, to be copied."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
