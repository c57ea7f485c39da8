"""PostgreSQL and RabbitMQ in containers, for tests and for `make run`."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from devstack import infrastructure, postgres, rabbitmq, shared_servers
from devstack.errors import CannotRun
from devstack.infrastructure import find_servers
from devstack.ports import free_port
from devstack.processes import run
from devstack.settings import Settings
from tests.containers.compose import run_docker
from tests.integration.stack import ROOT

pytest_plugins = ("devstack.fixtures",)

SettingsFrom = Callable[..., Settings]

IMAGES = {name: os.environ[name] for name in ("POSTGRES_IMAGE", "RABBITMQ_IMAGE") if name in os.environ}
WRITE_URLS = """
import json, os

def test_write_urls(servers, worker_id):
    database, broker = servers
    with open(os.environ["URL_DIRECTORY"] + "/" + worker_id, "w") as file:
        json.dump([database.url, broker.url], file)
"""


@pytest.mark.parametrize("workers", [0, 2])
async def test_the_containers_are_shared_by_all_workers_and_removed_afterwards(
    tmp_path: Path, workers: int
) -> None:
    (tmp_path / "test_urls.py").write_text(WRITE_URLS)
    directory = tmp_path / "urls"
    directory.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "AMQP_URL")}
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "devstack.testing", "-p", "no:cacheprovider"]
    spread = ["-n", str(workers), "--dist", "each" if workers else "no"]
    code, output = await run(
        [sys.executable, "-m", "pytest", *options, *spread, tmp_path],
        env={**environment, "URL_DIRECTORY": str(directory)},
        cwd=tmp_path,
        timeout=170,
    )

    assert code == 0, output
    urls = {file.name: json.loads(file.read_text()) for file in directory.iterdir()}
    assert set(urls) == ({"gw0", "gw1"} if workers else {"master"})
    ((database, broker),) = {tuple(pair) for pair in urls.values()}
    assert "broker:" in database, "not in a container"
    assert await postgres.unavailable_reason(f"{database}/postgres") is not None
    assert await rabbitmq.unavailable_reason(broker) is not None


async def test_a_server_named_by_a_variable_gets_no_container(settings_from: SettingsFrom) -> None:
    url = "amqp://guest:guest@broker.example/"
    async with shared_servers.start_shared_servers(settings_from(AMQP_URL=url)) as started:
        assert started.amqp_url is None
        assert await postgres.unavailable_reason(f"{started.postgres_url}/postgres") is None


async def test_an_unavailable_image_is_reported_with_its_variable(
    settings_from: SettingsFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_POSTGRES_IMAGE", "sandbox-broker.invalid/nothing:0")

    with pytest.raises(
        CannotRun, match=r"cannot run sandbox-broker\.invalid/nothing:0: .* set TEST_POSTGRES_IMAGE"
    ):
        async with shared_servers.start_shared_servers(settings_from()):
            pass


async def test_make_run_starts_missing_servers_in_containers_and_removes_them(
    settings_from: SettingsFrom, terminal: Any
) -> None:
    # Direct the search on this machine to ports without a listener.
    unused_ports = {"PGPORT": str(free_port()), "RABBITMQ_NODE_PORT": str(free_port())}
    settings = settings_from(**unused_ports, **IMAGES)

    async with AsyncExitStack() as stack:
        database, broker = await find_servers(settings, terminal, stack)

        assert await postgres.unavailable_reason(f"{database.url}/postgres") is None
        assert await rabbitmq.unavailable_reason(broker.url) is None

    names = await run_docker("ps", "--all", "--format", "{{.Names}}")
    assert infrastructure._container_prefix(settings) not in names
