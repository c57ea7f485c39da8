"""Fixtures for the tests of devstack: private servers and isolated settings.

A module instead of a conftest.py, because mypy would confuse it with the conftest.py of other packages.
"""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import AbstractAsyncContextManager, contextmanager
from pathlib import Path
from typing import TypeVar

import pytest

from devstack import packages, postgres, rabbitmq
from devstack.output import Terminal
from devstack.postgres import PrivatePostgres
from devstack.rabbitmq import PrivateRabbitMQ
from devstack.settings import Settings, load

S = TypeVar("S")


class RecordingTerminal(Terminal):
    """Stores the lines instead of printing them."""

    def __init__(self) -> None:
        super().__init__(colours=False)
        self.lines: list[str] = []

    def _write(self, text: str) -> None:
        self.lines.append(text)


@pytest.fixture
def terminal() -> RecordingTerminal:
    return RecordingTerminal()


@pytest.fixture
def settings_from(tmp_path: Path) -> Callable[..., Settings]:
    """Build settings of a clone in a temporary directory. The environment has only the given variables."""

    def make(**environ: str) -> Settings:
        return load(environ, root=tmp_path)

    return make


@pytest.fixture(scope="session")
def postgres_binaries(server_programs: None) -> None:  # noqa: ARG001 - puts the test into the server lane
    _require("PostgreSQL", "postgresql", postgres.find_binaries)


@pytest.fixture(scope="session")
def rabbitmq_binaries(server_programs: None) -> None:  # noqa: ARG001 - puts the test into the server lane
    _require("RabbitMQ", "rabbitmq-server", rabbitmq.find_binaries)


@pytest.fixture(scope="session")
def own_postgres_url(postgres_binaries: None) -> Iterator[str]:  # noqa: ARG001 - installs PostgreSQL or RabbitMQ
    """URL of the superuser on a private server for the whole test session."""
    with _running(PrivatePostgres()) as server:
        yield server.url


@pytest.fixture(scope="session")
def own_amqp_url(rabbitmq_binaries: None) -> Iterator[str]:  # noqa: ARG001 - installs PostgreSQL or RabbitMQ
    with _running(PrivateRabbitMQ()) as server:
        yield server.url


@contextmanager
def _running(server: AbstractAsyncContextManager[S]) -> Iterator[S]:
    # A separate event loop, because the loop of a test ends with the test.
    with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
        started = runner.run(server.__aenter__())
        try:
            yield started
        finally:
            runner.run(server.__aexit__(None, None, None))


def _require(name: str, package: str, binaries: Callable[[], Path | None]) -> None:
    if binaries() is None and packages.can_install():
        with asyncio.Runner(loop_factory=asyncio.new_event_loop) as runner:
            runner.run(packages.install(package, RecordingTerminal()))
    if binaries() is None:
        pytest.skip(f"{name} is not installed here")
