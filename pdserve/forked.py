"""Instances, forked from a server that has torch loaded already, so that any number of them starts at once."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path

from pdserve.children import die_with_parent
from shared.settings import InstanceSettings, adopt_environment, environment_of

PRELOADED = ["shared.instance.process", "transformers.models.auto.modeling_auto"]


def fork_server(preload: list[str]) -> ForkServerContext:
    """A fork server that imports torch and the given modules as soon as it is first used."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([*PRELOADED, *preload])
    return context


@dataclass(slots=True)
class Forked:
    """An instance: a `Child` that comes from a fork server. Its settings say which role it plays."""

    name: str
    settings: Mapping[str, object]
    log: Path
    context: ForkServerContext
    _process: ForkServerProcess | None = field(default=None, init=False)
    _lifeline: Connection | None = field(default=None, init=False)
    """Our end of a pipe on which nothing is ever sent: it breaks when this process ends."""

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    def exit_code(self) -> int | None:
        return self._process.exitcode if self._process else None

    def start(self) -> None:
        if self._lifeline is not None:
            self._lifeline.close()
        theirs, self._lifeline = self.context.Pipe(duplex=False)
        process = self.context.Process(
            target=_run_instance,
            args=(dict(self.settings), str(self.log), environment_of({}), theirs),
            name=self.name,
        )
        _ensure_fork_server()
        process.start()
        self._process = process
        theirs.close()

    def terminate(self) -> None:
        if self._process:
            self._process.terminate()

    def kill(self) -> None:
        if self._process:
            self._process.kill()


def _ensure_fork_server() -> None:
    """Starts the fork server if it does not run, with SIGINT blocked: a Ctrl-C would end it while it imports torch.

    This process hears of a Ctrl-C at once, and ends the fork server by its pipe.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        forkserver.ensure_running()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _run_instance(settings: dict[str, object], log: str, environment: dict[str, str], lifeline: Connection) -> None:
    """The life of a forked instance: away from the terminal and its Ctrl-C, its words in its log."""
    os.setsid()
    die_with_parent()
    threading.Thread(target=_die_when_it_breaks, args=(lifeline,), daemon=True).start()
    adopt_environment(environment)
    with Path(log).open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from shared.instance.process import serve
    from shared.process import run_service

    run_service(InstanceSettings, serve, overrides=settings)


def _die_when_it_breaks(lifeline: Connection) -> None:
    """Our parent is the fork server, which lives as long as its children do; so we watch the launcher itself."""
    try:
        lifeline.recv_bytes()
    except EOFError:
        os.kill(os.getpid(), signal.SIGKILL)
