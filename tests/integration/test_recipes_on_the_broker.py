"""Recipes of instruqt/README.md and options of its scripts, with the running broker.

Each test runs the Python scripts, and then the shell scripts in their place.
"""

import asyncio
import os
import re
import shutil
import sys
from dataclasses import dataclass, field
from pathlib import Path

import asyncpg
import pytest
import yaml

from devstack.conditions import wait_until
from instruqt.tests.recipes import PAGE, read_recipe
from tests.integration.stack import ADMIN, ROOT, TRACK_TOKEN, Stack

HOUR = 3600


@dataclass
class LabHost:
    """Host of a student's lab. Its scripts are in the home directory, as in the recipes."""

    stack: Stack
    home: Path
    language: str
    student: str
    variables: dict[str, str] = field(default_factory=dict)

    async def run(self, script: str, **variables: str | None) -> tuple[int, str]:
        """Run a script of the page. Return the exit code and the output."""
        if self.language == "shell":
            script = re.sub(r"python3 (instruqt_broker_\w+)\.py", r"sh \1.sh", script)
        path = self.home.parent / "script"
        path.write_text(script.replace("/root", str(self.home)))
        path.chmod(0o755)
        environment = {
            "PATH": f"{self.home.parent / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}",
            "BROKER_API_URL": self.stack.url,
            "BROKER_API_TOKEN": TRACK_TOKEN,
            "BROKER_WAIT_SEC": "0",
            "INSTRUQT_PARTICIPANT_ID": self.student,
            **self.variables,
            **variables,
        }
        process = await asyncio.create_subprocess_exec(
            path,
            cwd=self.home,
            env={name: value for name, value in environment.items() if value is not None},
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.STDOUT,
        )
        output, _ = await process.communicate()
        return process.returncode or 0, output.decode()

    async def succeed(self, script: str, **variables: str | None) -> str:
        code, output = await self.run(script, **variables)
        assert code == 0, output
        return output

    async def allocate(self, *options: str, **variables: str | None) -> tuple[int, str]:
        words = " ".join(("python3 instruqt_broker_allocation.py", *options))
        return await self.run(f"#!/bin/sh\n{words}\n", **variables)

    def read(self, name: str) -> str:
        return (self.home / name).read_text().strip()

    def add_command(self, name: str, text: str) -> None:
        path = self.home.parent / "bin" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text(f"#!/bin/sh\n{text}\n")
        path.chmod(0o755)

    async def lease(self, sandbox_id: str | None = None) -> asyncpg.Record:
        """Return the lease of the sandbox in the files."""
        row = await self.stack.database.fetchrow(
            "SELECT *, extract(epoch FROM expires_at - coalesce(claimed_at, allocated_at))::float AS sec "
            "FROM leases WHERE sandbox_id = $1",
            sandbox_id or self.read("sandbox_id.txt"),
        )
        assert row is not None
        return row


@pytest.fixture(params=["python", "shell"])
def host(request: pytest.FixtureRequest, stack: Stack, tmp_path: Path) -> LabHost:
    home = tmp_path / "root"
    home.mkdir()
    for script in (ROOT / "instruqt").glob("instruqt_broker_*"):
        shutil.copy(script, home)
    return LabHost(stack, home, request.param, f"student-{request.param}")


@pytest.mark.parametrize("recipe", ["plain track", "image without Python"])
async def test_a_track_allocates_and_releases(host: LabHost, recipe: str) -> None:
    scripts = read_recipe(recipe)
    output = await host.succeed(scripts["setup"])
    lease = await host.lease()
    assert (lease["holder"], lease["mode"], lease["sec"]) == (host.student, "active", 4 * HOUR)
    assert f"This student works in {host.read('sandbox_name.txt')}" in output
    sandbox_id = host.read("sandbox_id.txt")
    await host.succeed(scripts["setup"])
    assert host.read("sandbox_id.txt") == sandbox_id
    await host.succeed(scripts["cleanup"])
    assert (await host.lease())["end_reason"] == "student"
    await host.succeed(scripts["cleanup"])


@pytest.mark.parametrize("unset", [None, ""], ids=["unset", "empty"])
async def test_a_hot_start_gives_one_account_to_the_student(host: LabHost, unset: str | None) -> None:
    scripts = read_recipe("hot start")
    await host.succeed(scripts["setup"], INSTRUQT_PARTICIPANT_ID=unset)
    prepared = await host.lease()
    assert (prepared["mode"], prepared["claimed_at"], prepared["sec"]) == ("standby", None, 24 * HOUR)
    assert prepared["holder"] == host.read("holder_id.txt")
    await host.succeed(scripts["setup"], INSTRUQT_PARTICIPANT_ID=unset)
    await host.succeed(scripts["challenge"], INSTRUQT_PARTICIPANT_ID=unset)
    assert await host.lease() == prepared
    await host.succeed(scripts["challenge"])
    claimed = await host.lease()
    assert (claimed["holder"], claimed["mode"], claimed["sec"]) == (host.student, "active", 4 * HOUR)
    await host.succeed(scripts["challenge"])
    assert await host.lease() == claimed
    assert await host.stack.database.fetchval("SELECT count(*) FROM leases") == 1
    await host.succeed(scripts["cleanup"])
    assert (await host.lease())["end_reason"] == "student"


async def test_a_long_workshop_has_its_own_time_and_extensions(host: LabHost) -> None:
    scripts = read_recipe("long workshop")
    policies = {"policies": yaml.safe_load(scripts["policy"])}
    url = f"{host.stack.url}/v1/admin/policies"
    assert (await host.stack.client.put(url, headers=ADMIN, json=policies)).status_code == 200
    host.variables["INSTRUQT_TRACK_SLUG"] = "dns-workshop"
    await host.succeed(read_recipe("plain track")["setup"])
    assert (await host.lease())["sec"] == 8 * HOUR
    for hours in (10, 12):
        await host.succeed(scripts["challenge"])
        assert (await host.lease())["sec"] == hours * HOUR
    assert "the lab continues" in await host.succeed(scripts["challenge"])
    assert (await host.lease())["sec"] == 12 * HOUR
    await host.succeed(read_recipe("plain track")["cleanup"])


async def test_a_paused_track_prepares_each_sandbox_once(host: LabHost) -> None:
    scripts = read_recipe("paused track")
    prepare = host.home / "prepare_sandbox.sh"
    prepare.write_text("#!/bin/sh\necho prepared >>prepared.log\n")
    prepare.chmod(0o755)
    await host.succeed(scripts["setup"])
    await host.succeed(scripts["setup"])
    first = host.read("sandbox_id.txt")
    await host.stack.database.execute("UPDATE leases SET expires_at = now() - interval '1 day'")

    async def is_expired() -> bool:
        return bool((await host.lease())["end_reason"] == "expired")

    await wait_until(is_expired)
    assert "THIS IS ANOTHER SANDBOX THAN BEFORE" in await host.succeed(scripts["setup"])
    assert host.read("sandbox_id.txt") != first
    assert host.read("prepared.log").split() == ["prepared", "prepared"]
    await host.succeed(read_recipe("plain track")["cleanup"])


async def test_a_track_of_the_newer_generation_finds_its_ids(host: LabHost) -> None:
    scripts = read_recipe("existing tracks")
    await host.succeed(scripts["setup"])
    lease = await host.lease(host.read("subtenant_id.txt"))
    row = await host.stack.database.fetchrow(
        "SELECT external_id, name FROM sandboxes WHERE sandbox_id = $1", lease["sandbox_id"]
    )
    assert row is not None
    assert tuple(row) == (host.read("sandbox_id.txt"), host.read("sandbox_name.txt"))
    await host.succeed(scripts["cleanup"])
    assert (await host.lease(lease["sandbox_id"]))["end_reason"] == "student"


async def test_a_failed_destroy_of_terraform_does_not_keep_the_sandbox(host: LabHost) -> None:
    scripts = read_recipe("Terraform")
    host.add_command("terraform", 'echo "$1 $TF_VAR_student_tenant" >>terraform.log; [ "$1" != destroy ]')
    await host.succeed(scripts["setup"])
    assert "terraform destroy failed" in await host.succeed(scripts["cleanup"])
    assert (await host.lease())["end_reason"] == "student"
    name = host.read("sandbox_name.txt")
    assert host.read("terraform.log").splitlines() == [f"init {name}", f"apply {name}", f"destroy {name}"]
    assert (await host.run(scripts["cleanup"], BROKER_API_TOKEN="unknown-track-token"))[0] == 0


async def test_a_broken_sandbox_is_replaced(host: LabHost) -> None:
    (section,) = re.findall(r"^## A broken sandbox\n(.*?)(?=^## )", PAGE, re.M | re.S)
    (script,) = re.findall(r"^```bash\n(.*?)^```", section, re.M | re.S)
    await host.succeed(read_recipe("plain track")["setup"])
    broken = host.read("sandbox_id.txt")
    await host.succeed(f"#!/bin/bash\n{script}")
    lease = await host.lease(broken)
    assert (lease["end_reason"], lease["end_note"]) == ("broken", "DNS does not answer")
    assert (await host.lease())["replaces"] == broken
    code, output = await host.allocate("--replace", "'still broken'")
    assert (code, "REPLACEMENT_LIMIT" in output) == (1, True)
    assert (await host.stack.admin("POST", f"sandboxes/{broken}/retry-deletion", end_hold="true")).is_success
    await host.succeed(read_recipe("plain track")["cleanup"])


async def test_a_student_waits_for_a_sandbox_and_for_a_replacement(host: LabHost) -> None:
    stack = host.stack
    await stack.fill(1)
    first = LabHost(stack, host.home, host.language, "first")
    assert (await first.allocate())[0] == 0
    broken = host.read("sandbox_id.txt")
    code, output = await first.allocate("--replace", "broken")
    assert (code, "POOL_EXHAUSTED" in output) == (1, True)
    for waiting, options in ((first, ("--replace", "broken")), (host, ())):
        script = asyncio.create_task(waiting.allocate(*options, BROKER_WAIT_SEC="100"))

        async def waits() -> bool:
            return bool((await stack.admin("GET", "waiting")).json()["waiting"])

        await wait_until(waits)
        await stack.control("POST", "accounts", {"count": 1, "name_prefix": "new-"})
        await stack.sync(force="true")
        code, output = await script
        assert code == 0, output
        assert "position" in output
        assert (await host.lease())["holder"] == waiting.student
    assert (await host.lease(broken))["end_reason"] == "broken"
    assert (await stack.admin("POST", f"sandboxes/{broken}/retry-deletion", end_hold="true")).is_success
