"""Settings are read once, and a wrong one stops the start with a sentence."""

import pytest

from shared import settings
from shared.errors import SettingsInvalid
from shared.settings import ControllerSettings, GatewaySettings, InstanceSettings, Settings


def test_defaults_environment_and_overrides(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_HTTP_PORT", "9000")
    monkeypatch.setenv("PDSERVE_NATS_URL", "nats://there:4222")
    found = settings.load(GatewaySettings, nats_url="nats://here:4222")
    assert (found.http_port, found.nats_url, found.http_host) == (9000, "nats://here:4222", "127.0.0.1")


def test_a_setting_of_another_service_is_no_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_PREFILL_SLOTS", "3")
    settings.load(ControllerSettings)
    assert settings.load(InstanceSettings).prefill_slots == 3


@pytest.mark.parametrize(
    ("kind", "name", "value", "sentence"),
    [
        (
            GatewaySettings,
            "PDSERVE_HTPP_PORT",
            "1",
            "PDSERVE_HTPP_PORT is no setting of pdserve: did you mean PDSERVE_HTTP_PORT",
        ),
        (GatewaySettings, "PDSERVE_HTTP_PORT", "many", "PDSERVE_HTTP_PORT='many' cannot be used: .*integer"),
        (GatewaySettings, "PDSERVE_HTTP_PORT", "70000", "less than or equal to 65535"),
        (GatewaySettings, "PDSERVE_HEARTBEAT_S", "-1", "PDSERVE_HEARTBEAT_S='-1' cannot be used"),
        (InstanceSettings, "PDSERVE_GROUP", "a b", "PDSERVE_GROUP='a b' cannot be used"),
        (InstanceSettings, "PDSERVE_ROLE", "both", "PDSERVE_ROLE='both' cannot be used: .*'spare'"),
        (ControllerSettings, "PDSERVE_CONTROL", "on", "PDSERVE_CONTROL='on' cannot be used: .*'advise'"),
    ],
)
def test_a_wrong_one_is_named(
    monkeypatch: pytest.MonkeyPatch, kind: type[Settings], name: str, value: str, sentence: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(SettingsInvalid, match=sentence):
        settings.load(kind)


def test_a_group_is_the_wish_of_an_instance(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSERVE_GROUP", "chat-2")
    assert settings.load(InstanceSettings).group == "chat-2"
    assert not hasattr(settings.load(GatewaySettings), "group")


def test_they_are_frozen() -> None:
    with pytest.raises(Exception, match="frozen"):
        settings.load(GatewaySettings).http_port = 1  # type: ignore[misc]


def test_the_name_that_clients_use() -> None:
    assert GatewaySettings(model="org/name").served_model_name == "org/name"
    assert GatewaySettings(model=settings.DEMO_MODEL).served_model_name == "demo"
    assert GatewaySettings(model="org/name", model_name="mine").served_model_name == "mine"


def test_api_keys_are_a_list() -> None:
    assert GatewaySettings(api_keys="a, b,").api_key_set == {"a", "b"}
