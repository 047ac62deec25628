"""The address that an instance gives others for fetching its KV, above all where it listens on every one of its own."""

import socket

import pytest

from shared import addresses
from shared.addresses import advertised
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
