"""A Prometheus that watches services on this machine by the alerts of deploy/prometheus, for tests and the demo."""

import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx

from devstack import packages
from devstack.output import Terminal
from devstack.private import wait_until
from devstack.processes import spawn
from devstack.settings import ROOT

RULES = ROOT / "deploy" / "prometheus" / "alerts.yml"
JOB = "sandbox-broker"
_PACKAGE = "prometheus"


@dataclass(frozen=True, slots=True)
class Prometheus:
    url: str
    _client: httpx.AsyncClient

    async def query(self, expression: str) -> list[dict[str, Any]]:
        """The samples that it has now, each with `metric` and `value`. Raises httpx.HTTPStatusError for an
        expression that is none."""
        found: list[dict[str, Any]] = (await self._get("query", query=expression))["result"]
        return found

    async def firing(self) -> list[dict[str, Any]]:
        """The alerts that fire now, each with `labels` and `annotations`."""
        return [alert for alert in (await self._get("alerts"))["alerts"] if alert["state"] == "firing"]

    async def unavailable_reason(self) -> str | None:
        """Why it does not answer; None when it does."""
        try:
            await self._get("status/config")
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}"
        return None

    async def _get(self, path: str, **parameters: str) -> Any:
        answer = await self._client.get(f"{self.url}/api/v1/{path}", params=parameters)
        answer.raise_for_status()
        return answer.json()["data"]


async def find_promtool(terminal: Terminal) -> str:
    """The path of the program that checks and tests rules. Raises CannotRun where it cannot be had."""
    return await packages.find_or_install(["promtool"], _PACKAGE, terminal)


def is_installed() -> bool:
    return packages.find_program(["prometheus"]) is not None


@asynccontextmanager
async def start_prometheus(
    ports: Mapping[str, int],
    directory: Path,
    port: int,
    terminal: Terminal,
    *,
    rules: Path = RULES,
    interval_sec: float = 1,
) -> AsyncIterator[Prometheus]:
    """Prometheus on this port, which looks at each service by name, its files in this directory. Raises CannotRun
    where it cannot be had."""
    program = await packages.find_or_install(["prometheus"], _PACKAGE, terminal)
    configuration = _configure(directory, ports, rules, interval_sec)
    process = await spawn(
        "prometheus",
        [
            program,
            f"--config.file={configuration}",
            f"--storage.tsdb.path={directory / 'data'}",
            f"--web.listen-address=127.0.0.1:{port}",
            "--log.level=warn",
        ],
    )
    try:
        async with httpx.AsyncClient(trust_env=False, timeout=30) as client:
            prometheus = Prometheus(f"http://127.0.0.1:{port}", client)
            await wait_until(prometheus.unavailable_reason, process, "Prometheus")
            yield prometheus
    finally:
        await process.stop()


def _configure(directory: Path, ports: Mapping[str, int], rules: Path, interval_sec: float) -> Path:
    """Writes the configuration; as JSON, which is YAML too. A target is shown by the service's name."""
    interval = f"{round(interval_sec * 1000)}ms"
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": f"{name}:{port}"}} for name, port in ports.items()
    ]
    configuration = {
        "global": {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": JOB, "static_configs": targets}],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "prometheus.yml"
    path.write_text(json.dumps(configuration))
    return path
