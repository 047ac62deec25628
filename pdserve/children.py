"""Child processes of `pdserve up`: how they start, are watched, and end. None outlives this process."""

import ctypes
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from shared.settings import environment_of

PR_SET_PDEATHSIG = 1


def die_with_parent() -> None:
    """Asks the kernel (Linux) to kill this process when its parent dies."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


class Child(Protocol):
    """A started process."""

    name: str
    log: Path

    @property
    def pid(self) -> int | None: ...

    def exit_code(self) -> int | None:
        """None while it runs."""

    def start(self) -> None: ...

    def terminate(self) -> None: ...

    def kill(self) -> None: ...


@dataclass(slots=True)
class Program:
    """A service that is a program of its own: `python -m <module>` with settings."""

    name: str
    module: str
    settings: Mapping[str, object]
    log: Path
    _process: "subprocess.Popen[bytes] | None" = field(default=None, init=False)

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def exit_code(self) -> int | None:
        return self._process.poll() if self._process else None

    def start(self) -> None:
        with self.log.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", self.module],
                env=environment_of(self.settings),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )

    def terminate(self) -> None:
        if self._process:
            self._process.terminate()

    def kill(self) -> None:
        if self._process:
            self._process.kill()


def wait_for_exit(children: list[Child], timeout_s: float) -> list[Child]:
    """Waits until all have ended, and returns those that have not."""
    end = time.monotonic() + timeout_s
    while (
        alive := [one for one in children if one.pid is not None and one.exit_code() is None]
    ) and time.monotonic() < end:
        time.sleep(0.02)
    return alive


def last_words(log: Path) -> str:
    """The last line that a process wrote."""
    lines = log.read_text(errors="replace").strip().splitlines() if log.exists() else []
    return lines[-1] if lines else "it said nothing"
