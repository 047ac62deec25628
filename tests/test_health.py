"""`python -m shared.health`, as containers run it: real servers, real records, a real controller."""

import asyncio
import re
import subprocess
import sys
from pathlib import Path

import pytest

from pdserve.children import Program, wait_for_exit
from shared import settings
from shared.registry import registry
from shared.settings import hostname
from tests.harness import wait_until
from tests.registry.test_view import record


def check(service: str, **given: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "shared.health", service]
    return subprocess.run(
        command, env=settings.environment_of(given), capture_output=True, text=True, timeout=30, check=False
    )


@pytest.mark.parametrize(
    ("record_of", "sentence"),
    [
        ({}, "is in the registry"),
        ({"host": "elsewhere"}, "is in the registry"),
        ({"host": hostname(), "state": "draining"}, "is draining"),
        ({"host": hostname()}, None),
        ({"host": hostname(), "role": "decode", "group": "other"}, None),
    ],
)
def test_an_instance_is_well_while_its_record_is_in_the_registry(
    redis_url: str, record_of: dict[str, str], sentence: str | None
) -> None:
    async def write() -> None:
        async with registry.connect(redis_url, ttl_s=60.0, timeout_s=5.0) as records:
            await records.write_instance(record("i1", **record_of))

    if record_of:
        asyncio.run(write())
    done = check("instance", redis_url=redis_url)
    assert done.returncode == (0 if sentence is None else 1), done.stderr
    assert sentence is None or sentence in done.stderr


def test_a_controller_is_well_while_it_answers(nats_url: str, redis_url: str, tmp_path: Path) -> None:
    urls = {"nats_url": nats_url, "redis_url": redis_url}
    done = check("controller", **urls)
    assert done.returncode == 1
    assert "no controller answers" in done.stderr
    controller = Program("controller", "services.controller", urls, tmp_path / "controller.log")
    controller.start()
    try:
        wait_until(lambda: check("controller", **urls).returncode == 0)
    finally:
        controller.terminate()
        wait_for_exit([controller], 20.0)


def test_without_servers_it_is_a_sentence_and_no_traceback() -> None:
    nowhere = {"nats_url": "nats://127.0.0.1:1", "redis_url": "redis://127.0.0.1:1"}
    for service in ("instance", "controller"):
        done = check(service, **nowhere)
        assert done.returncode == 1
        assert "Traceback" not in done.stderr
        assert re.search("[Ss]tart (one|a server) there or set PDSERVE_", done.stderr)


def test_it_imports_no_torch() -> None:
    code = "import sys, shared.health; sys.exit(bool({'torch', 'transformers', 'numpy'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=30)
