"""Free TCP ports."""

import os
import random
import socket
from collections import deque
from pathlib import Path

_EPHEMERAL = Path("/proc/sys/net/ipv4/ip_local_port_range")
_LOWEST = 20_000
_MAX_RESERVED = 200
"""More than one process needs at a time, and less than its limit of open files."""
_used: set[int] = set()
_reservations: deque[int] = deque()
"""File descriptors, because Python would warn about sockets that are open at its end."""
# A separate generator, because two test runs that seed the shared one would choose the same ports.
_random = random.SystemRandom()


def free_port() -> int:
    """Return a port of 127.0.0.1 without a listener, each port only once per process.

    The port is below the kernel's range for outgoing connections, so it stays free while a server restarts.
    """
    highest = _lowest_ephemeral_port() - 1
    while True:
        port = _random.randint(_LOWEST, highest)
        if port not in _used and is_free(port, host="127.0.0.1") and _reserve(port):
            _used.add(port)
            return port


def _reserve(port: int) -> bool:
    """Reserve the port until its server listens. Return False if another process has reserved it.

    Test runs start many servers at the same time, and a random port is not rare enough. No server uses the UDP port
    with the same number, and the kernel frees it when this process ends.
    """
    reservation = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        reservation.bind(("127.0.0.1", port))
    except OSError:
        reservation.close()
        return False
    _reservations.append(reservation.detach())
    if len(_reservations) > _MAX_RESERVED:
        os.close(_reservations.popleft())
    return True


def is_free(port: int, *, host: str = "") -> bool:
    """Return True if a server could listen on the port now, on every IPv4 address or on `host`.

    On a machine without IPv6, an IPv6 address counts as free.
    """
    if ":" in host and not _has_ipv6():
        return True
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET, socket.SOCK_STREAM) as probe:
        # Servers set this option too. It ignores closing connections, but not listeners.
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
