"""Prometheus with the alerts of deploy/prometheus, for services on this machine in tests and in the demo."""

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
        """Return the current samples of an expression, each with `metric` and `value`.

        Raises httpx.HTTPStatusError for an invalid expression.
        """
        samples: list[dict[str, Any]] = (await self._get("query", query=expression))["result"]
        return samples

    async def firing(self) -> list[dict[str, Any]]:
        """Return the firing alerts, each with `labels` and `annotations`."""
        return [alert for alert in (await self._get("alerts"))["alerts"] if alert["state"] == "firing"]

    async def unavailable_reason(self) -> str | None:
        """Return the reason why a request fails, or None if it succeeds."""
        try:
            await self._get("status/config")
        except httpx.HTTPError as error:
            return f"{type(error).__name__} {error}"
        return None

    async def _get(self, path: str, **parameters: str) -> Any:
        response = await self._client.get(f"{self.url}/api/v1/{path}", params=parameters)
        response.raise_for_status()
        return response.json()["data"]


async def find_promtool(terminal: Terminal) -> str:
    """Return the path of promtool, which checks and tests rules. Raises CannotRun."""
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
    scrape_interval_sec: float = 1,
    evaluation_interval_sec: float = 1,
) -> AsyncIterator[Prometheus]:
    """Run Prometheus on `port` with its files in `directory`. `ports` is by service name. Raises CannotRun."""
    program = await packages.find_or_install(["prometheus"], _PACKAGE, terminal)
    intervals = {"scrape_interval": scrape_interval_sec, "evaluation_interval": evaluation_interval_sec}
    configuration = _configure(directory, ports, rules, {**intervals, "scrape_timeout": scrape_interval_sec})
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


def _configure(directory: Path, ports: Mapping[str, int], rules: Path, seconds: Mapping[str, float]) -> Path:
    """Write the configuration as JSON, a subset of YAML. The instance label contains the service name."""
    targets = [
        {"targets": [f"127.0.0.1:{port}"], "labels": {"instance": f"{name}:{port}"}} for name, port in ports.items()
    ]
    configuration = {
        "global": {name: f"{round(value * 1000)}ms" for name, value in seconds.items()},
        "rule_files": [str(rules)],
        "scrape_configs": [{"job_name": JOB, "static_configs": targets}],
    }
    directory.mkdir(parents=True, exist_ok=True)
    path = directory / "prometheus.yml"
    path.write_text(json.dumps(configuration))
    return path
