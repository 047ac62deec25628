"""A worker seen from the driver: started, asked, and stopped (SIGSTOP) whenever it is not its turn."""

import json
import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Self

from bench.peers.worker import Load

ROOT = Path(__file__).resolve().parents[2]


class PeerFailed(Exception):
    """A worker ended, and why."""


class Worker:
    """One engine, loaded. A context manager; what it prints goes to a log.

    Attributes:
        load_s: from the start of the process until it can compute, imports included.
        loaded: its version and its memory after loading.
        peak_mb: the most memory that it has had resident so far.
    """

    def __init__(self, command: list[str], environment: Mapping[str, str], load: Load, log: Path) -> None:
        self._log = log
        self._command = command
        self._environment = environment
        self._load = load
        self.load_s = 0.0
        self.loaded: dict[str, Any] = {}
        self.peak_mb = 0.0

    def __enter__(self) -> Self:
        started_at = time.perf_counter()
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                self._command,
                cwd=ROOT,
                env={**os.environ, **self._environment},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                start_new_session=True,  # so that signals reach its own children as well
            )
        try:
            self.loaded = self.ask(asdict(self._load))
        except BaseException:
            self.__exit__()
            raise
        self.load_s = time.perf_counter() - started_at
        return self

    def __exit__(self, *_: object) -> None:
        self._signal(signal.SIGKILL)
        self._process.wait()
        for stream in (self._process.stdin, self._process.stdout):
            assert stream is not None
            stream.close()

    def ask(self, question: Mapping[str, Any]) -> dict[str, Any]:
        """Let it work until it answers.

        Raises:
            PeerFailed: it ended instead.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._signal(signal.SIGCONT)
        try:
            print(json.dumps(question), file=self._process.stdin, flush=True)
            line = self._process.stdout.readline()
        except BrokenPipeError:
            line = ""
        if not line:
            raise PeerFailed(last_line(self._log))
        self._signal(signal.SIGSTOP)
        answer: dict[str, Any] = json.loads(line)
        self.peak_mb = answer["peak_mb"]
        return answer

    def _signal(self, number: signal.Signals) -> None:
        with suppress(ProcessLookupError):
            os.killpg(self._process.pid, number)


def last_line(log: Path) -> str:
    """What a worker said last: of a traceback, the error."""
    lines = log.read_text(errors="replace").split("\n")
    return next((line.strip() for line in reversed(lines) if line.strip()), "it said nothing")
