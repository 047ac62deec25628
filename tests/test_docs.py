"""Docs name what the code has: every setting, subject, message verb, Redis key and error code."""

from pathlib import Path

import pytest

from shared import errors
from shared.registry import keys
from shared.settings import PREFIX, ControllerSettings, GatewaySettings, InstanceSettings, UpSettings

ROOT = Path(__file__).parents[1]


def test_every_setting_stands_in_operations() -> None:
    page = (ROOT / "docs/operations.md").read_text()
    for name in {
        name
        for kind in (GatewaySettings, InstanceSettings, ControllerSettings, UpSettings)
        for name in kind.model_fields
    }:
        assert f"`{PREFIX}{name.upper()}`" in page, name


def test_every_error_stands_in_the_protocol_with_its_status() -> None:
    page = (ROOT / "docs/protocol.md").read_text()
    kinds = [errors.RequestError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    for kind in (one for one in kinds[1:] if one.__module__ == errors.__name__):
        assert f"| `{kind.code}` | {kind.status} |" in page, kind


@pytest.mark.parametrize("verb", ["prefill", "decode", "cancel", "assign"])
def test_every_subject_of_an_instance_stands_in_the_architecture(verb: str) -> None:
    assert f"`pdserve.v1.instance.<id>.{verb}`" in (ROOT / "docs/architecture.md").read_text()


def test_every_key_stands_in_the_architecture() -> None:
    page = (ROOT / "docs/architecture.md").read_text()
    for key in (
        keys.INSTANCES,
        keys.GATEWAYS,
        keys.GATEWAYS_WITH_OPEN,
        keys.MAPS,
        keys.MAP_VERSIONS,
        keys.LEADER,
        keys.TERM,
        keys.instance("<id>"),
        keys.heartbeat("<id>"),
        keys.gateway("<id>"),
        keys.open_answers("<id>"),
        keys.claimed_answers("<id>"),
    ):
        assert f"`{key}`" in page, key
