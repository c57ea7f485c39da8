"""Invalid settings: the service exits with one line that names the variable."""

import asyncio
import os
import sys

import pytest

from devstack.ports import free_port
from devstack.processes import run
from tests.integration.stack import PORTS, ROOT

DATABASE = ["gateway", "allocator"]
CSP = ["reaper", "csp_syncer"]


@pytest.mark.parametrize(
    ("modules", "variable", "value"),
    [
        (DATABASE, "DATABASE_URL", None),
        (DATABASE, "DATABASE_URL", "nonsense"),
        (DATABASE, "DATABASE_URL", "postgresql://user:secret@127.0.0.1:1/none"),
        ([*DATABASE, *CSP], "AMQP_URL", None),
        ([*DATABASE, *CSP], "AMQP_URL", "http://127.0.0.1"),
        ([*DATABASE, *CSP], "AMQP_URL", "amqp://guest:secret@127.0.0.1:1/"),
        (["gateway"], "BROKER_API_TOKEN", None),
        (["gateway"], "BROKER_ADMIN_TOKEN", " , "),
        (["gateway"], "BROKER_API_TOKEN", "short"),
        (["gateway"], "BROKER_API_TOKEN", "dev-track-token"),
        (["gateway"], "BROKER_ADMIN_TOKEN", "one-track-token"),
        (CSP, "CSP_API_TOKEN", None),
        (CSP, "CSP_API_TOKEN", "dev-csp-token"),
        (CSP, "CSP_BASE_URL", "http://csp.example/v2"),
        (["reaper"], "NIOSXAAS_BASE_URL", "http://csp.example"),
        (CSP, "CSP_BASE_URL", "csp.example"),
        (["reaper"], "CLEANUP_CONCURRENCY", "many"),
    ],
)
async def test_an_invalid_setting_is_reported_in_one_line(
    database_url: str, amqp_url: str, modules: list[str], variable: str, value: str | None
) -> None:
    environment = {
        "PATH": os.environ["PATH"],
        "DATABASE_URL": database_url,
        "AMQP_URL": amqp_url,
        "BROKER_API_TOKEN": "one-track-token",
        "BROKER_ADMIN_TOKEN": "one-admin-token",
        "CSP_API_TOKEN": "one-csp-token",
        "CSP_BASE_URL": "http://127.0.0.1:1/v2",
    }
    environment.pop(variable, None)
    if value is not None:
        environment[variable] = value

    async def start(module: str) -> tuple[int, str]:
        settings = {**environment, PORTS[module]: str(free_port())}
        return await run([sys.executable, "-m", module], env=settings, cwd=ROOT / "tests")

    for code, output in await asyncio.gather(*(start(module) for module in modules)):
        assert code == 2
        assert len(output.splitlines()) == 1, output
        assert variable in output
        assert "secret" not in output
