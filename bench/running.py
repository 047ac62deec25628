"""A `pdserve up` of its own for a benchmark, and words about the machine it runs on."""

import os
import platform
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from pdserve import runfile

START_TIMEOUT_S = 300.0


@dataclass(frozen=True, slots=True)
class Running:
    """A system that serves: where, and how long it took from the command to the first possible request."""

    url: str
    nats_url: str
    """An operator's, who may also send requests."""
    folder: Path
    ready_s: float


@contextmanager
def pdserve_up(*arguments: str) -> Iterator[Running]:
    """Runs `pdserve up` with these arguments on a free port in an empty folder."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    command = [str(Path(sys.executable).with_name("pdserve")), "up", "--port", str(port), *arguments]
    with tempfile.TemporaryDirectory(prefix="pdserve-bench-") as folder:
        started_at = time.perf_counter()
        process = subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        try:
            _wait_until_ready(process)
            ready_s = time.perf_counter() - started_at
            run = runfile.read(Path(folder))
            assert run is not None
            yield Running(f"http://127.0.0.1:{port}", run.nats_url, Path(folder), ready_s)
        finally:
            process.send_signal(signal.SIGINT)
            process.wait(60)
            assert process.stdout is not None
            process.stdout.close()


def _wait_until_ready(process: "subprocess.Popen[str]") -> None:
    assert process.stdout is not None
    said = []
    for line in process.stdout:
        said.append(line)
        if line.startswith("ready in"):
            return
    raise SystemExit(f"pdserve up did not come up:\n{''.join(said)}")


def machine() -> str:
    """The machine in a line."""
    model = "unknown processor"
    if Path("/proc/cpuinfo").exists():
        names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text())
        model = names[0] if names else model
    return f"{model}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
