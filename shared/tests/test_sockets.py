"""Listening sockets on the address families of the kernel, and the limit of open files."""

import errno
import os
import socket
import subprocess
import sys
from textwrap import dedent
from typing import Any

import pytest
import structlog

from devstack.ports import free_port
from sandbox_broker.runtime.sockets import open_listeners, parse_addresses


def bound_addresses(listeners: list[socket.socket]) -> list[Any]:
    addresses = [listener.getsockname()[:2] for listener in listeners]
    for listener in listeners:
        listener.close()
    return addresses


def test_without_addresses_a_port_is_bound_on_all_addresses_of_both_families() -> None:
    port = free_port()
    assert bound_addresses(open_listeners(port)) == [("0.0.0.0", port), ("::", port)]


def test_only_listed_addresses_are_bound() -> None:
    port = free_port()
    addresses = parse_addresses("127.0.0.1, ::1,127.0.0.1,")
    assert addresses == ["127.0.0.1", "::1"]
    assert bound_addresses(open_listeners(port, addresses)) == [("127.0.0.1", port), ("::1", port)]


@pytest.mark.parametrize("failure", [errno.EAFNOSUPPORT, errno.EADDRNOTAVAIL])
@pytest.mark.parametrize(
    ("listed", "bound"), [("", "0.0.0.0"), ("127.0.0.1,::1", "127.0.0.1")], ids=["all", "listed"]
)
def test_without_ipv6_in_the_kernel_ipv4_is_served(
    monkeypatch: pytest.MonkeyPatch, failure: int, listed: str, bound: str
) -> None:
    """IPv6 is missing in the kernel, or disabled for all interfaces."""

    class Ipv4Only(socket.socket):
        def __init__(self, family: int = socket.AF_INET, *arguments: Any) -> None:
            if family == socket.AF_INET6 and failure == errno.EAFNOSUPPORT:
                raise OSError(failure, os.strerror(failure))
            super().__init__(family, *arguments)

        def bind(self, address: Any) -> None:
            if self.family == socket.AF_INET6:
                raise OSError(failure, os.strerror(failure))
            super().bind(address)

    monkeypatch.setattr(socket, "socket", Ipv4Only)
    port = free_port()
    with structlog.testing.capture_logs() as logged:
        assert bound_addresses(open_listeners(port, parse_addresses(listed))) == [(bound, port)]
    assert [entry["event"] for entry in logged] == ["service.ipv6_disabled"]
    with pytest.raises(OSError, match=rf"cannot listen on \[::1\]:{port}: ") as refused:
        open_listeners(port, ["::1"])
    assert refused.value.errno == failure


@pytest.mark.parametrize(("taken", "shown"), [("0.0.0.0", "0.0.0.0"), ("::", "[::]"), ("::1", "[::]")])
def test_a_port_in_use_on_one_family_raises_an_error_with_the_address(taken: str, shown: str) -> None:
    port = free_port()
    (first,) = open_listeners(port, [taken])
    with first:
        first.listen()
        with pytest.raises(OSError, match="Address already in use") as refused:
            open_listeners(port)
        assert refused.value.strerror == f"cannot listen on {shown}:{port}: Address already in use"
    assert len(bound_addresses(open_listeners(port))) == 2  # the failed attempt has closed its sockets


@pytest.mark.parametrize("address", ["192.0.2.1", "2001:db8::1", "fe80::1%nowhere0"])
def test_a_foreign_address_raises_an_error(address: str) -> None:
    with pytest.raises(OSError, match="cannot listen on "):
        open_listeners(free_port(), [address])


def test_the_limit_of_open_files_is_raised_to_the_hard_limit() -> None:
    program = """
        import resource
        from structlog.testing import capture_logs
        from sandbox_broker.runtime.sockets import raise_open_file_limit

        resource.setrlimit(resource.RLIMIT_NOFILE, (256, 1000))
        with capture_logs() as logged:
            raise_open_file_limit()
        print(resource.getrlimit(resource.RLIMIT_NOFILE), logged)
    """
    output = subprocess.run(
        [sys.executable, "-c", dedent(program)], capture_output=True, text=True, check=True
    ).stdout
    assert output.startswith("(1000, 1000) ")
    assert "'event': 'service.open_file_limit'" in output
    assert "'limit': 1000" in output
