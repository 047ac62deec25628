"""A NATS client on a plain socket, which sends bytes that no library would."""

import socket
from types import TracebackType
from typing import Self
from urllib.parse import urlsplit

CONNECT = b'CONNECT {"verbose":false,"pedantic":false,"headers":true,"no_responders":true%s}\r\n'


class RawClient:
    """A connection. `send` returns what the server said once it has handled all that was sent."""

    def __init__(self, nats_url: str, user: str = "", password: str = "") -> None:
        parts = urlsplit(nats_url)
        self._socket = socket.create_connection((parts.hostname or "", parts.port or 0), timeout=5)
        self._socket.recv(65536)  # INFO
        login = f',"user":"{user}","pass":"{password}"'.encode() if user else b""
        self.said = self.send(CONNECT % login)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._socket.close()

    def send(self, data: bytes) -> bytes:
        """Sends, and returns everything up to the server's answer to a ping behind it, or to the end."""
        self._socket.sendall(data + b"PING\r\n")
        said = b""
        while not said.endswith(b"PONG\r\n") and (more := self._socket.recv(65536)):
            said += more
        return said.removesuffix(b"PONG\r\n")


def pub(subject: bytes, payload: bytes, reply: bytes = b"") -> bytes:
    return b"PUB %s %s %d\r\n%s\r\n" % (subject, reply, len(payload), payload)


def hpub(subject: bytes, headers: bytes, payload: bytes, reply: bytes = b"") -> bytes:
    return b"HPUB %s %s %d %d\r\n%s%s\r\n" % (
        subject,
        reply,
        len(headers),
        len(headers) + len(payload),
        headers,
        payload,
    )
