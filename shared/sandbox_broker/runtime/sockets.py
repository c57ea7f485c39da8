"""Listening sockets of a service, and its limit of open files."""

import resource
import socket
from collections.abc import Sequence
from ipaddress import ip_address

import structlog

ALL_ADDRESSES = ("0.0.0.0", "::")
"""A socket for each family. On one socket for both, the address of an IPv4 client would begin with ::ffff:."""

log = structlog.get_logger()


def parse_addresses(listed: str) -> list[str]:
    """Return the IP addresses of a comma-separated list. Raises ValueError."""
    return list(dict.fromkeys(str(ip_address(part.strip())) for part in listed.split(",") if part.strip()))


def open_listeners(port: int, addresses: Sequence[str] = ()) -> list[socket.socket]:
    """Bind `port` on each of `addresses`; without any, on all addresses of IPv4 and IPv6.

    Without IPv6 in the kernel, IPv6 addresses are left out as long as an IPv4 address remains.
    Raises OSError with a text for the operator, such as "cannot listen on [::]:8080: Address already in use".
    """
    wanted = addresses or ALL_ADDRESSES
    if not _has_ipv6():
        ipv4 = [address for address in wanted if ":" not in address]
        if ipv4 and len(ipv4) < len(wanted):
            log.info("service.ipv6_disabled", left_out=[address for address in wanted if ":" in address])
            wanted = ipv4
    listeners: list[socket.socket] = []
    try:
        for address in wanted:
            listeners.append(_bind(address, port))
    except OSError:
        for listener in listeners:
            listener.close()
        raise
    return listeners


def raise_open_file_limit() -> None:
    """Raise the soft limit of open files to the hard limit: each connection is an open file, and 1,024 is a usual
    soft limit."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    except (OSError, ValueError) as error:  # macOS refuses an unlimited soft limit
        log.warning("service.open_file_limit_kept", limit=soft, error=str(error))
    else:
        log.info("service.open_file_limit", limit=hard, before=soft)


def _bind(address: str, port: int) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    listener: socket.socket | None = None
    try:
        listener = socket.socket(family, socket.SOCK_STREAM)
        # A restart does not wait for connections of the previous process that are still in TIME_WAIT.
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        # getaddrinfo, because an address like fe80::1%eth0 needs the number of its interface.
        listener.bind(socket.getaddrinfo(address, port, type=socket.SOCK_STREAM, flags=socket.AI_NUMERICHOST)[0][4])
    except OSError as error:
        if listener is not None:
            listener.close()
        shown = f"[{address}]" if family == socket.AF_INET6 else address
        raise OSError(error.errno, f"cannot listen on {shown}:{port}: {error.strerror}") from error
    return listener


def _has_ipv6() -> bool:
    """Return whether IPv6 is available. The kernel may lack IPv6, or it may be disabled for all interfaces. In both
    cases even ::1 does not exist."""
    try:
        with socket.socket(socket.AF_INET6, socket.SOCK_STREAM) as probe:
            probe.bind(("::1", 0))
    except OSError:
        return False
    return True
