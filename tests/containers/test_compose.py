"""docker-compose.yml with images built from this clone: images, isolation, operation, failures."""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import httpx
import pytest

from devstack.conditions import wait_until
from devstack.processes import run
from tests.chaos.client import History, Students
from tests.containers.compose import ACCESS_DOMAIN, ACCOUNTS, BASE, OURS, SERVERS, Compose, run_docker
from tests.integration.stack import ADMIN_TOKEN, ROOT, TRACK_TOKEN, track_headers

pytestmark = pytest.mark.timeout(1800)

MAX_IMAGE_MB = 78
MAX_DATABASE_IMAGE_MB = 125
"""Size of an image above its base, for services without and with an account in PostgreSQL. With the official slim
base (120 MB), the total is below 200 MB and 250 MB."""
STUDENTS = 8
WARM_UP_SEC = 3.0
PATIENCE_SEC = 120.0

INSPECT_PROCESS = """
import json, os, pathlib

def try_write(path):
    try:
        pathlib.Path(path, "x").write_text("x")
    except OSError as error:
        return error.strerror
    return "written"

status = dict(line.split(":", 1) for line in pathlib.Path("/proc/1/status").read_text().splitlines())
print(json.dumps({
    "user": os.getuid(),
    "group": os.getgid(),
    "process 1": pathlib.Path("/proc/1/cmdline").read_text().split(chr(0))[:2],
    "capabilities": {int(status[name], 16) for name in ("CapPrm", "CapEff", "CapBnd")} == {0},
    "new privileges": status["NoNewPrivs"].strip() == "0",
    "written": {path: try_write(path) for path in ("/", "/tmp", "/opt/broker", "/etc", "/var/tmp")},
}))
"""

ASSERT_REFUSED = """
import asyncio, asyncpg, os

async def main():
    connection = await asyncpg.connect(os.environ["DATABASE_URL"])
    for statement in {statements!r}:
        try:
            await connection.execute(statement)
        except asyncpg.InsufficientPrivilegeError:
            continue
        raise SystemExit(f"not refused: {{statement}}")

asyncio.run(main())
"""


ASSERT_REACHABLE = """
import socket

socket.create_connection(({host!r}, {port}), timeout=10).close()
"""

ASSERT_UNREACHABLE = """
import socket

try:
    socket.create_connection(({host!r}, {port}), timeout=10).close()
except OSError:
    raise SystemExit(0)
raise SystemExit("reached")
"""


async def test_an_image_is_small(images: dict[str, str]) -> None:
    base = int(await run_docker("image", "inspect", "--format", "{{.Size}}", BASE))

    for service, image in images.items():
        size = int(await run_docker("image", "inspect", "--format", "{{.Size}}", image))
        limit = MAX_DATABASE_IMAGE_MB if service in ("gateway", "allocator") else MAX_IMAGE_MB
        assert size - base < limit * 1_000_000, image


@pytest.mark.parametrize("service", [*OURS, "csp-simulator"])
async def test_a_service_is_process_1_without_privileges_or_write_access(compose: Compose, service: str) -> None:
    state = json.loads(await compose.python(service, INSPECT_PROCESS))

    assert (state["user"], state["group"]) == (10001, 10001)
    assert state["process 1"] == ["python", "/opt/broker/serve.py"]
    assert state["capabilities"], "process 1 has capabilities"
    assert not state["new privileges"]
    assert set(state["written"].values()) == {"Read-only file system"}, state["written"]


async def test_the_database_refuses_statements_beyond_the_rights_of_a_service(compose: Compose) -> None:
    writes = ["DELETE FROM sandboxes", "UPDATE leases SET holder = 'me'", "INSERT INTO outbox DEFAULT VALUES"]
    await compose.python("gateway", ASSERT_REFUSED.format(statements=writes))
    await compose.python(
        "allocator", ASSERT_REFUSED.format(statements=["DROP TABLE leases", "CREATE TABLE mine ()"])
    )


async def test_ports_are_published_on_loopback_only(compose: Compose) -> None:
    for service in ("gateway", "rabbitmq", "csp-simulator"):
        published = (await compose.inspect(service))["NetworkSettings"]["Ports"].values()
        addresses = {binding["HostIp"] for bindings in published for binding in bindings or []}
        assert addresses == {"127.0.0.1"}, service


async def test_the_allocator_has_no_route_out_of_the_inner_network(compose: Compose) -> None:
    await compose.python("reaper", ASSERT_REACHABLE.format(host="csp-simulator", port=9200))
    await compose.python("allocator", ASSERT_REACHABLE.format(host="postgres", port=5432))
    outer = (await compose.inspect("csp-simulator"))["NetworkSettings"]["Networks"]
    (address,) = (network["IPAddress"] for network in outer.values())
    await compose.python("reaper", ASSERT_REACHABLE.format(host=address, port=9200))
    await compose.python("allocator", ASSERT_UNREACHABLE.format(host=address, port=9200))


async def test_logs_contain_the_names_of_the_services(compose: Compose) -> None:
    """Redaction would remove a service name that equals a password."""
    for service in OURS:
        logged = await run_docker("logs", await compose.container(service))
        assert f'"service":"{service}"' in logged.replace(": ", ":"), logged[-2000:]


def script_environment(compose: Compose, student: str) -> dict[str, str]:
    """Return the environment of the Instruqt scripts on the machine of a student."""
    return {
        "PATH": "/usr/bin:/bin",
        "BROKER_API_TOKEN": TRACK_TOKEN,
        "BROKER_API_URL": f"{compose.url}/v1",
        "INSTRUQT_PARTICIPANT_ID": student,
    }


async def test_the_instruqt_scripts_allocate_and_release_a_sandbox(compose: Compose, tmp_path: Path) -> None:
    environment = {**script_environment(compose, "ada"), "INSTRUQT_TRACK_SLUG": "dns-101"}
    code, output = await run(["bash", ROOT / "instruqt" / "test_allocation.sh"], env=environment, cwd=tmp_path)
    assert code == 0, output
    sandbox_id = (tmp_path / "sandbox_id.txt").read_text()

    clean_up = ROOT / "instruqt" / "instruqt_broker_cleanup.py"
    code, output = await run([sys.executable, clean_up], env=environment, cwd=tmp_path)
    assert code == 0, output

    async def is_deleted() -> bool:
        sandbox = await compose.admin("GET", f"sandboxes/{sandbox_id}")
        return bool(sandbox["status"] == "deleted")

    await wait_until(is_deleted)


async def test_a_login_inside_the_sandbox_ends_with_the_lease(compose: Compose, tmp_path: Path) -> None:
    environment = script_environment(compose, "grace")
    script = ROOT / "instruqt" / "instruqt_broker_allocation.py"
    code, output = await run([sys.executable, script, "--access"], env=environment, cwd=tmp_path)
    assert code == 0, output
    email, password, external_id = (
        (tmp_path / name).read_text() for name in ("user_email.txt", "user_password.txt", "external_id.txt")
    )
    assert email == f"grace@{ACCESS_DOMAIN}"
    assert password not in output
    sign_in = await compose.client.post(
        f"{compose.simulator}/v2/session/users/sign_in", json={"email": email, "password": password}
    )
    assert sign_in.status_code == 200, sign_in.text
    for service in OURS:
        assert password not in await run_docker("logs", await compose.container(service)), service

    clean_up = ROOT / "instruqt" / "instruqt_broker_cleanup.py"
    code, output = await run([sys.executable, clean_up], env=environment, cwd=tmp_path)
    assert code == 0, output

    async def are_user_and_account_gone() -> bool:
        users = (await compose.client.get(f"{compose.simulator}/_control/users")).text
        accounts = (await compose.client.get(f"{compose.simulator}/_control/accounts")).text
        return email not in users and external_id not in accounts

    await wait_until(are_user_and_account_gone, within_sec=PATIENCE_SEC)


async def test_the_console_shows_the_pool(compose: Compose) -> None:
    url = f"http://127.0.0.1:{compose.environment['CONSOLE_PORT']}"
    async with httpx.AsyncClient(follow_redirects=True, trust_env=False) as browser:
        overview = await browser.post(f"{url}/sign-in", data={"token": ADMIN_TOKEN, "next": "/"})
    assert overview.status_code == 200, overview.text
    assert "Pool over time" in overview.text


async def test_an_ended_service_is_restarted(compose: Compose) -> None:
    before = await started_at(compose, ["reaper"])
    await compose.python("reaper", "import os, signal; os.kill(1, signal.SIGTERM)")
    await wait_until_restarted(compose, before)


async def test_crashed_containers_are_restarted_and_the_leases_kept(compose: Compose) -> None:
    """The order of a start is lost: each service waits for the servers by itself."""
    services = (*OURS, *SERVERS)
    lease = await allocate(compose, "crash")
    before = await started_at(compose, services)
    await compose.crash(services)
    await wait_until_restarted(compose, before)
    assert await allocate(compose, "crash") == lease


async def test_killed_containers_stay_down_until_compose_up(compose: Compose) -> None:
    services = (*OURS, *SERVERS)
    lease = await allocate(compose, "kill")
    for service in services:
        await compose.kill(service)
    assert [service for service in services if not await compose.is_stopped(service)] == []
    await compose.call("up", "--detach", "--no-build")
    await compose.wait_until_healthy()
    assert await allocate(compose, "kill") == lease


async def allocate(compose: Compose, student: str) -> str:
    """Return the sandbox of the student, as soon as the broker serves it."""
    sandbox_ids: list[str] = []

    async def is_served() -> bool:
        try:
            response = await compose.client.post(f"{compose.url}/v1/allocate", headers=track_headers(student))
        except httpx.TransportError:
            return False
        if response.status_code in (200, 201):
            sandbox_ids.append(response.json()["sandbox_id"])
        return bool(sandbox_ids)

    await wait_until(is_served, within_sec=PATIENCE_SEC)
    return sandbox_ids[0]


async def started_at(compose: Compose, services: Sequence[str]) -> dict[str, str]:
    """Return the time at which each container started last."""
    return {service: (await compose.inspect(service))["State"]["StartedAt"] for service in services}


async def wait_until_restarted(compose: Compose, before: Mapping[str, str]) -> None:
    """Wait until the containers have started later than `before`, and all containers are healthy."""

    async def are_restarted() -> bool:
        now = await started_at(compose, list(before))
        return all(now[service] != time for service, time in before.items())

    await wait_until(are_restarted, within_sec=PATIENCE_SEC)
    await compose.wait_until_healthy()


async def test_no_lease_is_lost_when_containers_are_killed_under_load(compose: Compose) -> None:
    history, chance = History(), random.Random(8)
    async with Students([compose.url], history, chance) as students:
        work = asyncio.create_task(students.run(STUDENTS))
        await asyncio.sleep(WARM_UP_SEC)
        for service in (*OURS, *SERVERS):
            await compose.kill(service)
            await asyncio.sleep(chance.uniform(0.5, 2))
            await run_docker("start", await compose.container(service))
            await compose.wait_until_healthy()
            served = await students.probe(f"after-{service}", until=time.time() + PATIENCE_SEC)
            assert served is not None, f"no student got a sandbox after the kill of {service}"
        students.stop()
        await work

    async def is_nothing_pending() -> bool:
        stats = await compose.admin("GET", "stats")
        return bool(stats["pending_deletion"] == stats["on_hold"])  # broken sandboxes stay for a day

    await wait_until(is_nothing_pending, within_sec=PATIENCE_SEC)
    # A refusal (4xx) is an answer, for example at the limit of replacements.
    assert [run for run in history.script_runs if run.last.status is None or run.last.status >= 500] == []
    assert_no_lease_lost(history, await compose.leases())
    stats = await compose.admin("GET", "stats")
    assert (stats["total"], stats["deletion_failed"]) == (ACCOUNTS, 0)


def assert_no_lease_lost(history: History, leases: Sequence[dict[str, Any]]) -> None:
    """Check that every confirmed response holds, and that no sandbox or student has two leases."""
    leases_by_key = {(lease["sandbox_id"], lease["holder"]): lease for lease in leases}
    confirmed = [operation for operation in history.operations if operation.outcome == "ok"]
    assert len(confirmed) > len(OURS) + len(SERVERS)  # the load was effective
    for operation in confirmed:
        held = {operation.sandbox_id, operation.new_sandbox_id} - {None}
        assert all((sandbox_id, operation.student) in leases_by_key for sandbox_id in held), operation
        if operation.kind == "release":  # the end of the play or a replacement may come before it
            assert leases_by_key[str(operation.sandbox_id), operation.student]["ended_at"] is not None, operation
    assert max(Counter(lease["sandbox_id"] for lease in leases).values()) == 1
    assert max(Counter(lease["holder"] for lease in leases if lease["ended_at"] is None).values()) == 1
