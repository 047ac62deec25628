"""The address that an instance gives others for fetching its KV, above all where it listens on every one of its own."""

import socket
from pathlib import Path
from urllib.parse import quote

import pytest

from shared import addresses
from shared.addresses import advertised, credentials, resolved, shown
from shared.kv.fetcher import KVFetcher
from shared.kv.holder import KVHolder
from tests.harness import eventually
from tests.kv.test_transfer import LAYOUT, Held, pieces


@pytest.mark.parametrize("host", ["127.0.0.1", "10.1.2.3", "prefill-1.example"])
def test_an_address_is_given_as_it_is(host: str) -> None:
    assert advertised(host) == host


def test_for_a_wildcard_it_is_one_of_this_machine_and_no_wildcard() -> None:
    address = advertised("0.0.0.0")
    assert address != "0.0.0.0"
    with socket.create_server((address, 0)):  # an address of another machine cannot be listened on
        pass


def test_without_a_route_it_is_this_machines_name(monkeypatch: pytest.MonkeyPatch) -> None:
    refused_at_once = ("255.255.255.255", 9)  # as an address without a route is
    monkeypatch.setattr(addresses, "ELSEWHERE", refused_at_once)
    assert advertised("0.0.0.0") == socket.gethostname()


async def test_kv_is_fetched_at_the_address_that_is_given() -> None:
    everywhere = KVHolder(LAYOUT, "0.0.0.0", 0, 5.0)
    fetcher = KVFetcher(LAYOUT, 5.0)
    async with everywhere.serving():
        held = Held(everywhere, pieces(50_000))
        into = pieces(50_000)
        into[0][:] = bytes(50_000)
        assert held.ticket.host == everywhere.host == advertised("0.0.0.0")
        await fetcher.fetch(held.ticket, into, 10.0)
        assert b"".join(into) == b"".join(held.views)
        await eventually(lambda: held.let_go == [True])
        fetcher.close()


@pytest.mark.parametrize(
    ("url", "as_shown"),
    [
        ("nats://127.0.0.1:4222", "nats://127.0.0.1:4222"),
        ("nats://u:p@h:1", "nats://h:1"),
        ("nats://u:p%2Fw%231@h:1", "nats://h:1"),
        ("nats://u:p/w#1@h:1", "nats://h:1"),
        ("nats://u:p@w//@h:1", "nats://h:1"),
        ("nats://u:p?w@h:1", "nats://h:1"),
        ("u:secret@h:1", "h:1"),
        ("u:p\nw@h", "h"),
        ("h:1", "h:1"),
        ("redis://h:1/0?password=secret", "redis://h:1/0"),
        ("unix:///tmp/redis.sock", "unix:///tmp/redis.sock"),
        ("unix://u:p@/tmp/redis.sock", "unix:///tmp/redis.sock"),
    ],
)
def test_a_password_is_never_shown(url: str, as_shown: str) -> None:
    assert shown(url) == as_shown


@pytest.mark.parametrize("password", ["p/w#1", "@:?&%", "a b", "é\u4e2d", "100%", "[::1]", "\\'\"", "p"])
def test_a_password_may_have_any_character(password: str) -> None:
    address = credentials(f"nats://us%40er:{quote(password, safe='')}@h:4222")
    assert (address.url, address.user, address.password) == ("nats://h:4222", "us@er", password)
    assert password not in repr(address) or password == "p"


@pytest.mark.parametrize(
    ("url", "user", "password", "bare"),
    [
        ("nats://h", None, None, "nats://h"),
        ("h:4222", None, None, "h:4222"),
        ("nats://token@h", "token", None, "nats://h"),
        ("u:p@h:4222", "u", "p", "h:4222"),
        ("tls://u:@[::1]:4222", "u", "", "tls://[::1]:4222"),
    ],
)
def test_a_url_is_taken_apart(url: str, user: str | None, password: str | None, bare: str) -> None:
    address = credentials(url)
    assert (address.url, address.user, address.password) == (bare, user, password)


@pytest.mark.parametrize(
    "url", ["nats://u:p/secret#1@h:4222", "nats://u:secret?x@h", "nats://u:p@h:secret", "nats://[u:secret@h", "nats://"]
)
def test_a_url_that_cannot_be_parsed_is_not_quoted(url: str) -> None:
    with pytest.raises(ValueError, match="percent-encoded") as caught:
        credentials(url)
    assert "secret" not in str(caught.value)


def test_a_url_may_stand_in_a_file(tmp_path: Path) -> None:
    path = tmp_path / "nats url"
    path.write_text("nats://u:p@h:1\n")
    assert resolved(f"file://{quote(str(path))}") == "nats://u:p@h:1"
    assert resolved("nats://h") == "nats://h"
    with pytest.raises(ValueError, match="cannot be read from /nowhere"):
        resolved("file:///nowhere")
