"""Test lanes: the fast lane has every test that needs no server, the server lane has the others.

A test belongs to the server lane if it uses the fixture `server_programs`, directly or through other fixtures. All
fixtures that connect to PostgreSQL or RabbitMQ use it. A test that starts a server program without this fixture
fails, so the fast lane starts no server.
"""

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

FIXTURE = "server_programs"
_PROGRAMS = {
    *("postgres", "initdb", "rabbitmq-server", "epmd", "docker", "docker-compose", "dockerd"),
    *("haproxy", "nginx", "prometheus", "promtool", "chromium", "chromium-browser", "google-chrome", "wrk"),
    *("apt-get", "make"),
}
_MODULES = {
    "gateway",
    "allocator",
    "reaper",
    "csp_syncer",
    "provisioner",
    "console",
    "devstack",
    "devstack.demo",
    "bench",
}
_fast_test: str | None = None
"""Id of the running test, if it belongs to the fast lane."""


@pytest.fixture(scope="session")
def server_programs() -> None:
    """Put the test into the server lane, and allow it to start programs such as PostgreSQL or a service."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--lane",
        choices=("all", "fast", "servers"),
        default="all",
        help="fast: tests that need no server; servers: the others",
    )


def pytest_configure() -> None:
    sys.addaudithook(_refuse_servers)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Deselect the tests of the other lane."""
    lane = config.getoption("lane")
    if lane == "all":
        return
    others = [item for item in items if needs_servers(item) != (lane == "servers")]
    items[:] = [item for item in items if needs_servers(item) == (lane == "servers")]
    config.hook.pytest_deselected(items=others)


def needs_servers(item: pytest.Item) -> bool:
    """Return True if the test uses the fixture `server_programs`. pytest lists indirect fixtures too."""
    return FIXTURE in getattr(item, "fixturenames", ())


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    global _fast_test  # noqa: PLW0603 - an audit hook has no other access to the running test
    _fast_test = None if needs_servers(item) else item.nodeid
    try:
        return (yield)
    finally:
        _fast_test = None


def _refuse_servers(event: str, arguments: tuple[object, ...]) -> None:
    if _fast_test is None or event != "subprocess.Popen":
        return
    command = arguments[1]
    words = [command] if isinstance(command, str | bytes | Path) else command
    assert isinstance(words, Sequence)
    program = _find_server([str(word) for word in words])
    if program is not None:
        raise AssertionError(
            f"{_fast_test} starts {program} in the fast lane. "
            f"Use the fixture {FIXTURE}, which puts the test into the server lane."
        )


def _find_server(command: Sequence[str]) -> str | None:
    """Return the server program that the command starts, also behind a launcher such as setpriv."""
    for index, word in enumerate(command):
        if Path(word).name in _PROGRAMS or (word in _MODULES and index > 0 and command[index - 1] == "-m"):
            return word
    return None
