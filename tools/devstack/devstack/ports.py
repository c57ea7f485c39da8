"""Which TCP ports are free."""

import random
import socket
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000
_given: set[int] = set()
# Not the shared generator: a test run that seeds it would give the same ports as the run beside it.
_random = random.SystemRandom()


def free_port() -> int:
    """A port on 127.0.0.1 that nobody listens on, never the same one twice in this process.

    It lies below the range from which the kernel takes the ports of outgoing connections, so that it is still
    free after a server that had it was stopped and is to come back on it.
    """
    highest = _lowest_ephemeral_port() - 1
    while True:
        port = _random.randint(_LOWEST, highest)
        if port not in _given and is_free(port, host="127.0.0.1"):
            _given.add(port)
            return port


def is_free(port: int, *, host: str = "") -> bool:
    """Return whether a server could listen on the port now, on every IPv4 address or on `host`.

    An IPv6 address that this machine does not have counts as free.
    """
    if ":" in host and not _has_ipv6():
        return True
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # As servers do: connections that are winding down do not count, a listener does.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _has_ipv6() -> bool:
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True


def _lowest_ephemeral_port() -> int:
    try:
        return int(_EPHEMERAL.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return 32_768
