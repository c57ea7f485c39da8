"""Connection to a gateway with two addresses. The first address does not answer."""

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from brokerctl.client import AdminClient
from brokerctl.config import Config
from brokerctl.errors import Unavailable

NAME = "two-addresses.test"
ATTEMPT_SEC = 3.0


class Answer(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200)
        self.end_headers()
        self.wfile.write(b"{}")

    def log_message(self, *_: object) -> None:
        """Keep the test output free of access logs."""


@pytest.fixture
def port() -> Iterator[int]:
    with HTTPServer(("127.0.0.1", 0), Answer) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()


@pytest.fixture
def addresses(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Addresses of NAME, which a test sets."""
    monkeypatch.setenv("NO_PROXY", NAME)
    listed: list[str] = []
    resolve = socket.getaddrinfo

    def getaddrinfo(host: Any, *rest: Any) -> list[Any]:
        return [info for name in (listed if host == NAME else [host]) for info in resolve(name, *rest)]

    monkeypatch.setattr(socket, "getaddrinfo", getaddrinfo)
    return listed


def get(port: int) -> object:
    return AdminClient(Config(f"http://{NAME}:{port}", "a-token")).get("status", dict[str, Any])


def test_a_silent_first_address_delays_a_request_briefly(addresses: list[str], port: int) -> None:
    addresses[:] = ["127.0.0.2", "127.0.0.1"]
    with contextlib.ExitStack() as sockets:
        listener = sockets.enter_context(socket.socket())
        listener.bind(("127.0.0.2", port))
        listener.listen(0)
        for _ in range(3):  # fills the queue of the listener, so that the kernel drops further packets
            client = sockets.enter_context(socket.socket())
            client.setblocking(False)
            client.connect_ex(("127.0.0.2", port))
        began = time.monotonic()
        assert get(port) == {}
        assert time.monotonic() - began < ATTEMPT_SEC


@pytest.mark.parametrize("listed", [["127.0.0.3", "127.0.0.1"], ["127.0.0.1", "127.0.0.3"]])
def test_an_address_that_refuses_is_skipped(addresses: list[str], port: int, listed: list[str]) -> None:
    addresses[:] = listed
    assert get(port) == {}


def test_no_address_answers(addresses: list[str], port: int) -> None:
    addresses[:] = ["127.0.0.2", "127.0.0.3"]
    with pytest.raises(Unavailable, match="refused"):
        get(port)
