"""What idle light services weigh: their resident set, shared pages and all."""

from pathlib import Path

from tests.harness import System

BOUND_MB = 120


def resident_mb(pid: int | None) -> float:
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    raise AssertionError("no VmRSS")


def test_gateway_and_controller_are_light(system: System) -> None:
    assert resident_mb(system.gateway.pid) < BOUND_MB
    assert resident_mb(system.controller.pid) < BOUND_MB
