"""PostgreSQL and RabbitMQ in containers: for the tests, and for `make run`."""

import json
import os
import sys
from collections.abc import Callable
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest

from devstack import containers, infrastructure, postgres, rabbitmq
from devstack.errors import CannotRun
from devstack.infrastructure import find_servers
from devstack.ports import free_port
from devstack.processes import run
from devstack.settings import Settings
from tests.containers.compose import docker
from tests.integration.stack import ROOT

pytest_plugins = ("devstack.fixtures",)

SettingsFrom = Callable[..., Settings]

IMAGES = {name: os.environ[name] for name in ("POSTGRES_IMAGE", "RABBITMQ_IMAGE") if name in os.environ}
WRITES_WHERE_THEY_ARE = """
import json, os

def test_where_they_are(servers, worker_id):
    database, broker = servers
    with open(os.environ["WHERE"] + "/" + worker_id, "w") as file:
        json.dump([database.url, broker.url], file)
"""


@pytest.mark.parametrize("workers", [0, 2])
async def test_those_of_a_test_run_are_shared_by_its_workers_and_go_with_it(tmp_path: Path, workers: int) -> None:
    (tmp_path / "test_where.py").write_text(WRITES_WHERE_THEY_ARE)
    where = tmp_path / "where"
    where.mkdir()
    environment = {name: value for name, value in os.environ.items() if name not in ("DATABASE_URL", "AMQP_URL")}
    options = ["-c", str(ROOT / "pyproject.toml"), "-p", "devstack.testing", "-p", "no:cacheprovider"]
    spread = ["-n", str(workers), "--dist", "each" if workers else "no"]
    code, said = await run(
        [sys.executable, "-m", "pytest", *options, *spread, tmp_path],
        env={**environment, "WHERE": str(where)},
        cwd=tmp_path,
        timeout=170,
    )

    assert code == 0, said
    seen = {file.name: json.loads(file.read_text()) for file in where.iterdir()}
    assert set(seen) == ({"gw0", "gw1"} if workers else {"master"})
    ((database, broker),) = {tuple(urls) for urls in seen.values()}
    assert "broker:" in database, "not in a container"
    assert await postgres.unavailable_reason(f"{database}/postgres") is not None
    assert await rabbitmq.unavailable_reason(broker) is not None


async def test_what_a_variable_names_is_not_put_in_a_container(settings_from: SettingsFrom) -> None:
    url = "amqp://guest:guest@broker.example/"
    async with containers.start_containers(settings_from(AMQP_URL=url)) as had:
        assert had.amqp_url is None
        assert await postgres.unavailable_reason(f"{had.postgres_url}/postgres") is None


async def test_an_image_that_cannot_be_had_is_named_with_the_variable_that_says_another(
    settings_from: SettingsFrom, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEST_POSTGRES_IMAGE", "sandbox-broker.invalid/nothing:0")

    with pytest.raises(
        CannotRun, match=r"cannot run sandbox-broker\.invalid/nothing:0: .* set TEST_POSTGRES_IMAGE"
    ):
        async with containers.start_containers(settings_from()):
            pass


async def test_make_run_puts_what_is_missing_in_containers_and_removes_them_in_the_end(
    settings_from: SettingsFrom, terminal: Any
) -> None:
    # The looked-at ports of this machine are ones where nobody listens.
    nothing_local = {"PGPORT": str(free_port()), "RABBITMQ_NODE_PORT": str(free_port())}
    settings = settings_from(**nothing_local, **IMAGES)

    async with AsyncExitStack() as stack:
        database, broker = await find_servers(settings, terminal, stack)

        assert await postgres.unavailable_reason(f"{database.url}/postgres") is None
        assert await rabbitmq.unavailable_reason(broker.url) is None

    names = await docker("ps", "--all", "--format", "{{.Names}}")
    assert infrastructure._container_prefix(settings) not in names
