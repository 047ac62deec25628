"""Where `pdserve up` says what it runs, so that other commands in the same folder find it: `.pdserve/up.json`."""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from pydantic import BaseModel, ValidationError

from pdserve.nats_accounts import write_private

FOLDER = ".pdserve"
NAME = "up.json"
NATS_URLS = "nats"


class RunFile(BaseModel):
    """A running `pdserve up`."""

    pid: int
    nats_url: str
    """For operators' commands."""
    nats_client_url: str
    """For a client of the request API."""
    redis_url: str
    address: str
    logs: str


def write(folder: Path, run: RunFile, clients: Mapping[str, str]) -> None:
    """Writes the run file, and the NATS URL of each client to `nats/<name>.url` beside it.

    They contain passwords, so only their owner may read them.
    """
    for name, url in clients.items():
        write_private(client_path(folder, name), url + "\n")
    write_private(folder / FOLDER / NAME, run.model_dump_json(indent=2))


def client_path(folder: Path, name: str) -> Path:
    """Where the NATS URL of a client of the request API is written."""
    return folder / FOLDER / NATS_URLS / f"{name}.url"


def remove(folder: Path) -> None:
    (folder / FOLDER / NAME).unlink(missing_ok=True)
    shutil.rmtree(folder / FOLDER / NATS_URLS, ignore_errors=True)


def read(folder: Path) -> RunFile | None:
    """The `pdserve up` that runs in `folder`; None if there is none, or if it has died."""
    try:
        run = RunFile.model_validate_json((folder / FOLDER / NAME).read_text())
    except (FileNotFoundError, NotADirectoryError, ValidationError):
        return None
    return run if _is_alive(run.pid) else None


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
