"""Instruqt's scripts in the images of lab hosts, with the running broker: Alpine and Debian without Python, and the
oldest and the newest Python.

The variables ALPINE_IMAGE, DEBIAN_IMAGE, OLDEST_PYTHON_IMAGE and NEWEST_PYTHON_IMAGE replace the official images.
"""

import os
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from instruqt.tests.recipes import read_recipe
from tests.containers.compose import BUILD_SEC, run_docker
from tests.integration.stack import ROOT, TRACK_TOKEN, Stack, run_stack

pytestmark = pytest.mark.timeout(1800)

IMAGES = {
    "alpine": os.environ.get("ALPINE_IMAGE") or "alpine:3",
    "debian": os.environ.get("DEBIAN_IMAGE") or "debian:stable-slim",
    "oldest python": os.environ.get("OLDEST_PYTHON_IMAGE") or "python:3.8-slim",
    "newest python": os.environ.get("NEWEST_PYTHON_IMAGE") or "python:3-slim",
}
ADD_CURL = """
RUN command -v curl || apk add --no-cache curl || \\
    { apt-get update -qq && apt-get install -y -qq --no-install-recommends curl ca-certificates; }
"""
SHELL_ONLY = ("alpine", "debian")
"""Images without Python. Their scripts need curl."""


@dataclass(frozen=True)
class LabHost:
    container: str
    environment: dict[str, str]
    extension: str
    """Of the scripts: sh or py."""

    async def run(self, script: str) -> str:
        """Run a script of a recipe and return its output. Fails for an exit code other than 0."""
        options = [part for name, value in self.environment.items() for part in ("--env", f"{name}={value}")]
        shell = script.partition("\n")[0].removeprefix("#!")
        return await run_docker("exec", *options, self.container, shell, "-c", script, timeout=120)

    async def allocate(self, *options: str) -> str:
        command = "sh" if self.extension == "sh" else "python3"
        words = " ".join((command, f"instruqt_broker_allocation.{self.extension}", *options))
        return await self.run(f"#!/bin/sh\ncd /root && {words}")


@pytest.fixture(scope="module")
async def stack(new_database: NewDatabase, new_vhost: NewVhost) -> AsyncIterator[Stack]:
    async with new_database() as database_url, new_vhost() as amqp_url, run_stack(database_url, amqp_url) as stack:
        await stack.fill(2 * len(IMAGES) + 1)
        yield stack


@asynccontextmanager
async def run_lab_host(stack: Stack, name: str, directory: Path) -> AsyncIterator[LabHost]:
    """Start a container of the image, on the network of this machine, with the scripts in /root."""
    tag = f"sandbox-broker-built/lab-host-{name.replace(' ', '-')}"
    dockerfile = directory / "Dockerfile"
    dockerfile.write_text(f"FROM {IMAGES[name]}\n{ADD_CURL if name in SHELL_ONLY else ''}")
    await run_docker("build", "--network=host", "--tag", tag, str(directory), timeout=BUILD_SEC)
    container = f"lab-host-{secrets.token_hex(4)}"
    await run_docker("run", "--detach", "--network=host", "--name", container, "--entrypoint=sleep", tag, "900")
    try:
        for script in (ROOT / "instruqt").glob("instruqt_broker_*"):
            await run_docker("cp", str(script), f"{container}:/root/")
        environment = {
            "BROKER_API_URL": stack.url,
            "BROKER_API_TOKEN": TRACK_TOKEN,
            "BROKER_WAIT_SEC": "0",
            "INSTRUQT_PARTICIPANT_ID": f"student-of-{name}",
        }
        yield LabHost(container, environment, "sh" if name in SHELL_ONLY else "py")
    finally:
        await run_docker("rm", "--force", container)


@pytest.mark.parametrize("name", IMAGES)
async def test_the_scripts_run_in_the_images_of_lab_hosts(stack: Stack, name: str, tmp_path: Path) -> None:
    recipe = read_recipe("image without Python" if name in SHELL_ONLY else "plain track")
    student = f"student-of-{name}"
    async with run_lab_host(stack, name, tmp_path) as host:
        if name in SHELL_ONLY:
            assert await host.run("#!/bin/sh\ncommand -v python3 || echo none") == "none\n"
        await host.allocate("--standby")
        claimed = await host.allocate("--claim")
        assert "claimed" in claimed
        await host.allocate("--extend", "1")
        await host.allocate("--replace", "broken")
        assert "This student works in" in await host.run(recipe["setup"])
        leases = await stack.database.fetch(
            "SELECT mode, end_reason, extended_sec FROM leases WHERE holder = $1 ORDER BY lease_id", student
        )
        assert list(map(tuple, leases)) == [("active", "broken", 3600), ("active", None, 3600)]
        await host.run(recipe["cleanup"])

    async def is_released() -> bool:
        active = "SELECT count(*) FROM leases WHERE holder = $1 AND ended_at IS NULL"
        return bool(await stack.database.fetchval(active, student) == 0)

    await wait_until(is_released)
