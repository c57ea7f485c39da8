"""Broker in containers, started from docker-compose.yml."""

import asyncio
import json
import os
import secrets
import tempfile
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import yaml
from cryptography.fernet import Fernet

from csp_simulator.app import DEFAULT_EMAIL, DEFAULT_PASSWORD
from devstack import packages
from devstack.conditions import wait_until
from devstack.output import Terminal
from devstack.ports import free_port
from devstack.processes import run
from tests.integration import instruqt_events
from tests.integration.stack import ADMIN, ADMIN_TOKEN, CSP_TOKEN, ROOT, TRACK_TOKEN

FILE = ROOT / "docker-compose.yml"
SERVICES: Mapping[str, Any] = yaml.safe_load(FILE.read_text())["services"]
BUILT = {name: service["build"]["args"] for name, service in SERVICES.items() if "build" in service}
OURS = ("gateway", "allocator", "reaper", "csp-syncer", "provisioner", "console")
SERVERS = ("postgres", "rabbitmq", "csp-simulator")
BASE = os.environ.get("PYTHON_IMAGE") or "python:3.13-slim"
PORTS = ("GATEWAY_PORT", "CONSOLE_PORT", "RABBITMQ_MANAGEMENT_PORT", "CSP_SIMULATOR_PORT")
ACCOUNTS = 3000
"""More accounts than all tests use."""
ACCESS_DOMAIN = "labs.example.com"
BUILD_SEC = 900.0
UP_SEC = 600.0


@dataclass(frozen=True)
class Compose:
    """Compose project of a running broker."""

    command: tuple[str, ...]
    environment: Mapping[str, str]
    client: httpx.AsyncClient

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.environment['GATEWAY_PORT']}"

    @property
    def simulator(self) -> str:
        return f"http://127.0.0.1:{self.environment['CSP_SIMULATOR_PORT']}"

    async def call(self, *arguments: str, timeout: float = UP_SEC) -> str:
        return await _call(*self.command, *arguments, environment=self.environment, timeout=timeout)

    async def container(self, service: str) -> str:
        """Return the id of the container of a service, running or not."""
        return (await self.call("ps", "--all", "--quiet", service)).strip()

    async def inspect(self, service: str) -> dict[str, Any]:
        details: dict[str, Any] = json.loads(await run_docker("inspect", await self.container(service)))[0]
        return details

    async def kill(self, service: str) -> None:
        """Run `docker kill` and wait for its effect."""
        await run_docker("kill", await self.container(service))
        await wait_until(lambda: self.is_stopped(service))

    async def is_stopped(self, service: str) -> bool:
        """Return whether the container has ended and Docker does not restart it."""
        return bool((await self.inspect(service))["State"]["Status"] == "exited")

    async def crash(self, services: Sequence[str]) -> None:
        """End the processes of the containers with SIGKILL at once, like the kernel without memory."""
        pids = [(await self.inspect(service))["State"]["Pid"] for service in services]
        program = f"import os; [os.kill(pid, 9) for pid in {pids}]"
        # In the process namespace of the engine, because a process cannot kill process 1 of its own namespace.
        rights = ("--pid=host", "--user=0", "--cap-add=KILL", "--network=none")
        image = (await self.inspect("reaper"))["Image"]
        await run_docker("run", "--rm", *rights, "--entrypoint=python", image, "-c", program)

    async def python(self, service: str, program: str) -> str:
        """Run a Python program in the container of a service. Return its output."""
        return await run_docker("exec", await self.container(service), "python", "-c", program)

    async def wait_until_healthy(self) -> None:
        async def are_all_healthy() -> bool:
            states = [(await self.inspect(service))["State"] for service in (*SERVERS, *OURS)]
            return all(state["Running"] and state["Health"]["Status"] == "healthy" for state in states)

        await wait_until(are_all_healthy, within_sec=UP_SEC)

    async def admin(self, method: str, path: str, **parameters: str) -> Any:
        response = await self.client.request(
            method, f"{self.url}/v1/admin/{path}", headers=ADMIN, params=parameters
        )
        response.raise_for_status()
        return response.json()

    async def leases(self) -> list[dict[str, Any]]:
        """Return all leases, open and ended."""
        leases: list[dict[str, Any]] = []
        page: dict[str, str] = {}
        while True:
            response = await self.admin("GET", "allocations", limit="500", **page)
            leases += response["allocations"]
            if response["cursor"] is None:
                return leases
            page = {"cursor": response["cursor"]}


async def build_images() -> dict[str, str]:
    images = {}
    for arguments in BUILT.values():
        service = arguments["SERVICE"]
        if service in images:
            continue
        images[service] = f"sandbox-broker-built/{service}"
        build = {**arguments, "PYTHON_IMAGE": BASE}
        options = [part for name, value in build.items() for part in ("--build-arg", f"{name}={value}")]
        # The network of the host, because some machines reach the package index only through it.
        await run_docker(
            "build", "--network=host", *options, "--tag", images[service], str(ROOT), timeout=BUILD_SEC
        )
    return images


@asynccontextmanager
async def run_compose(images: Mapping[str, str]) -> AsyncIterator[Compose]:
    with tempfile.TemporaryDirectory() as directory:
        # Replaces .env of the clone. Created by the command in the documentation.
        settings = Path(directory) / ".env"
        settings.write_text((ROOT / ".env.example").read_text())
        code, output = await run(["sh", ROOT / "deploy" / "compose" / "fill-env.sh", settings])
        assert code == 0, output
        project = f"sandbox-broker-test-{secrets.token_hex(4)}"
        command = (
            *await _compose_command(),
            "--project-name",
            project,
            "--file",
            str(FILE),
            "--env-file",
            str(settings),
        )
        environment = {
            **os.environ,
            **{f"{service.upper().replace('-', '_')}_IMAGE": image for service, image in images.items()},
            **{name: str(free_port()) for name in PORTS},
            "BROKER_API_TOKEN": TRACK_TOKEN,
            "BROKER_ADMIN_TOKEN": ADMIN_TOKEN,
            "CSP_API_TOKEN": CSP_TOKEN,
            "CSP_SIMULATOR_ACCOUNTS": str(ACCOUNTS),
            "RATE_LIMIT": "",  # all students come from one address
            "ADMIN_WAIT_SEC": "50",  # on a busy machine the first sync takes longer than the default
            "CLEANUP_CONCURRENCY": "20",
            "CLEANUP_BATCH_DELAY_SEC": "0",
            "DELETION_BACKOFF_BASE_SEC": "0.5",
            "DELETION_BACKOFF_MAX_SEC": "2",
            "DELETION_MAX_ATTEMPTS": "1000",
            "CIRCUIT_BREAKER_TIMEOUT_SEC": "2",
            "CLEANUP_INTERVAL_SEC": "5",
            "INSTRUQT_WEBHOOK_SECRET": instruqt_events.SECRET,
            "CSP_LOGIN_EMAIL": DEFAULT_EMAIL,
            "CSP_LOGIN_PASSWORD": DEFAULT_PASSWORD,
            "ACCESS_EMAIL_DOMAIN": ACCESS_DOMAIN,
            "ACCESS_KEYS": Fernet.generate_key().decode(),
        }
        async with httpx.AsyncClient(timeout=60, trust_env=False) as client:
            compose = Compose(command, environment, client)
            try:
                await compose.call("up", "--detach", "--no-build")
                await compose.wait_until_healthy()
                assert (await compose.admin("POST", "sync"))["synced"] == ACCOUNTS
                yield compose
            finally:
                await compose.call("down", "--volumes", "--timeout", "5")


async def run_docker(*arguments: str, timeout: float = 60) -> str:
    return await _call("docker", *arguments, environment=os.environ, timeout=timeout)


async def _call(*command: str, environment: Mapping[str, str], timeout: float) -> str:
    """Run a command and return its output. Fails with the output for an exit code other than 0."""
    child = await asyncio.create_subprocess_exec(
        *command,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=environment,
        cwd=ROOT,
    )
    async with asyncio.timeout(timeout):
        output, errors = await child.communicate()
    assert child.returncode == 0, f"{' '.join(command)}:\n{(output + errors).decode()[-4000:]}"
    return output.decode()


async def _compose_command() -> tuple[str, ...]:
    """Return the command of Docker's Compose plugin, or of Debian's docker-compose if the plugin is missing."""
    if (await run(["docker", "compose", "version"]))[0] == 0:
        return "docker", "compose"
    return (await packages.find_or_install(["docker-compose"], "docker-compose", Terminal()),)
