import socket
import subprocess
import sys
from random import Random

import pytest

from devstack import ports
from devstack.ports import free_port, is_free


def test_free_ports_are_distinct_and_have_no_listener() -> None:
    returned = [free_port() for _ in range(50)]

    assert len(set(returned)) == 50
    assert all(is_free(port, host="127.0.0.1") for port in returned)


def test_a_port_that_another_process_has_chosen_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    choose = (
        "from random import Random; from devstack import ports; ports._random = Random(4711); "
        "print(ports.free_port(), flush=True); input()"
    )
    with subprocess.Popen([sys.executable, "-c", choose], stdin=-1, stdout=-1, text=True) as other:
        assert other.stdin is not None
        assert other.stdout is not None
        chosen = int(other.stdout.readline())
        monkeypatch.setattr(ports, "_random", Random(4711))
        assert free_port() != chosen
        monkeypatch.setattr(ports, "_random", Random(4711))
        other.communicate("\n")
        assert free_port() == chosen


def test_a_port_with_a_listener_on_one_address_is_not_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        assert not is_free(listener.getsockname()[1])


def test_a_listener_on_another_address_does_not_count() -> None:
    with socket.create_server(("127.0.0.2", 0)) as listener:
        port = listener.getsockname()[1]
        assert is_free(port, host="127.0.0.1")
        assert not is_free(port, host="127.0.0.2")


def test_a_port_with_an_ipv6_listener_is_not_free_on_ipv6() -> None:
    with socket.create_server(("::1", 0), family=socket.AF_INET6) as listener:
        assert not is_free(listener.getsockname()[1], host="::1")


def test_a_port_with_only_closing_connections_is_free() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)):
            served, _ = listener.accept()
            served.close()  # the side that closes first keeps the address in TIME_WAIT

    assert is_free(port)
