"""Invalid settings: the service exits with one line that names the variable."""

import asyncio
import os
import sys
from pathlib import Path

import pytest

import allocator.settings
import console.settings
import csp_syncer.settings
import gateway.settings
import provisioner.settings
import reaper.settings
from devstack.ports import free_port
from devstack.processes import run
from sandbox_broker.runtime.settings import ProcessSettings, load
from tests.integration.stack import PORTS, ROOT

SETTINGS: dict[str, type[ProcessSettings]] = {
    "gateway": gateway.settings.Settings,
    "allocator": allocator.settings.Settings,
    "reaper": reaper.settings.Settings,
    "csp_syncer": csp_syncer.settings.Settings,
    "provisioner": provisioner.settings.Settings,
    "console": console.settings.Settings,
}
DATABASE = ["gateway", "allocator"]
CSP = ["reaper", "csp_syncer", "provisioner"]
VALID = {
    "DATABASE_URL": "postgresql://user:hidden@localhost/x",
    "AMQP_URL": "amqp://guest:hidden@localhost/",
    "BROKER_API_TOKEN": "one-track-token",
    "BROKER_ADMIN_TOKEN": "one-admin-token",
    "CSP_API_TOKEN": "one-csp-token",
    "CONSOLE_SECRET": "one-console-secret",
    "CSP_BASE_URL": "http://127.0.0.1:1/v2",
}


def replace_setting(environment: dict[str, str], variable: str, value: str | None) -> dict[str, str]:
    changed = {**environment, variable: value}
    return {name: text for name, text in changed.items() if text is not None}


@pytest.mark.parametrize(
    ("modules", "variable", "value"),
    [
        (DATABASE, "DATABASE_URL", None),
        (DATABASE, "DATABASE_URL", "nonsense"),
        ([*DATABASE, *CSP], "AMQP_URL", None),
        ([*DATABASE, *CSP], "AMQP_URL", "http://127.0.0.1"),
        (["gateway"], "BROKER_API_TOKEN", None),
        (["gateway"], "BROKER_ADMIN_TOKEN", " , "),
        (["gateway"], "BROKER_API_TOKEN", "short"),
        (["gateway"], "BROKER_API_TOKEN", "dev-track-token"),
        (["gateway"], "BROKER_ADMIN_TOKEN", "one-track-token"),
        (["console"], "CONSOLE_SECRET", None),
        (["console"], "CONSOLE_SECRET", "short"),
        (["console"], "OIDC_ROLES", "instructors=owner"),
        (CSP, "CSP_API_TOKEN", None),
        (CSP, "CSP_API_TOKEN", "dev-csp-token"),
        (CSP, "CSP_BASE_URL", "http://csp.example/v2"),
        (["reaper"], "NIOSXAAS_BASE_URL", "http://csp.example"),
        (CSP, "CSP_BASE_URL", "csp.example"),
        (["reaper"], "CLEANUP_CONCURRENCY", "many"),
        (["provisioner"], "CREATE_PER_MINUTE", "0"),
    ],
)
def test_an_invalid_setting_is_reported_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    modules: list[str],
    variable: str,
    value: str | None,
) -> None:
    monkeypatch.chdir(tmp_path)  # a directory without .env
    for module in modules:
        for name in SETTINGS[module].model_fields:
            monkeypatch.delenv(name.upper(), raising=False)
        for name, text in replace_setting(VALID, variable, value).items():
            monkeypatch.setenv(name, text)
        with pytest.raises(SystemExit) as stopped:
            load(SETTINGS[module])
        assert stopped.value.code == 2
        line = capsys.readouterr().err
        assert line.count("\n") == 1, line
        assert variable in line
        assert "hidden" not in line


@pytest.mark.parametrize(
    ("modules", "variable", "value"),
    [
        ([*DATABASE, *CSP], "AMQP_URL", None),
        ([*DATABASE, *CSP], "AMQP_URL", "amqp://guest:secret@127.0.0.1:1/"),
        (DATABASE, "DATABASE_URL", "postgresql://user:secret@127.0.0.1:1/none"),
    ],
    ids=["setting", "RabbitMQ", "PostgreSQL"],
)
async def test_a_service_does_not_start_without_a_setting_or_server(
    database_url: str, amqp_url: str, modules: list[str], variable: str, value: str | None
) -> None:
    servers = {"PATH": os.environ["PATH"], "DATABASE_URL": database_url, "AMQP_URL": amqp_url}
    environment = replace_setting({**VALID, **servers}, variable, value)

    async def start(module: str) -> tuple[int, str]:
        settings = {**environment, PORTS[module]: str(free_port())}
        return await run([sys.executable, "-m", module], env=settings, cwd=ROOT / "tests")

    for code, output in await asyncio.gather(*(start(module) for module in modules)):
        assert code == 2
        assert len(output.splitlines()) == 1, output
        assert variable in output
        assert "secret" not in output
