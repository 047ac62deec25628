"""Where `pdserve up` says what it runs, so that other commands in the same folder find it: `.pdserve/up.json`."""

import os
from pathlib import Path

from pydantic import BaseModel, ValidationError

FOLDER = ".pdserve"
NAME = "up.json"


class RunFile(BaseModel):
    """A running `pdserve up`."""

    pid: int
    nats_url: str
    redis_url: str
    address: str
    logs: str


def write(folder: Path, run: RunFile) -> None:
    """Its addresses may hold passwords, so only its owner may read it."""
    path = folder / FOLDER / NAME
    path.touch(mode=0o600)
    path.write_text(run.model_dump_json(indent=2))


def remove(folder: Path) -> None:
    (folder / FOLDER / NAME).unlink(missing_ok=True)


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
