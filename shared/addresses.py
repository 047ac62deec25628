"""Under which address others reach a server of this machine."""

import ipaddress
import re
import socket

ELSEWHERE = ("192.0.2.1", 9)
"""An address that no network has (RFC 5737), behind the default route."""


def shown(url: str) -> str:
    """A URL as it may be seen: without user and password."""
    return re.sub(r"//[^/@]*@", "//", url)


def advertised(host: str) -> str:
    """Where others reach a server that listens on `host`: there, or for a wildcard (0.0.0.0) at this machine's address.

    That is its address towards the default route, or where there is none, its name.
    """
    if not _is_wildcard(host):
        return host
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(ELSEWHERE)  # sends nothing: it only looks up the route
        except OSError:
            return socket.gethostname()
        address: str = probe.getsockname()[0]
        return address


def _is_wildcard(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_unspecified
    except ValueError:
        return False  # a name
