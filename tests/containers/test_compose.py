"""docker-compose.yml with images built from this clone: what it promises to whoever runs it."""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from devstack.processes import run
from tests.chaos.client import History, Students
from tests.containers.compose import ACCOUNTS, BASE, OURS, SERVERS, Compose, docker
from tests.integration.stack import ROOT, TRACK_TOKEN, eventually

pytestmark = pytest.mark.timeout(1800)

MOST_MB = 125
"""Of an image above its base; with the official slim base that is less than 250 MB in all."""
PLACES = 8
UNDISTURBED_SEC = 3.0
PATIENCE_SEC = 120.0

INSIDE = """
import json, os, pathlib

def written(path):
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
    "written": {path: written(path) for path in ("/", "/tmp", "/opt/broker", "/etc", "/var/tmp")},
}))
"""

REFUSED = """
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


REACHES = """
import socket

socket.create_connection(({host!r}, {port}), timeout=10).close()
"""

REACHES_NOT = """
import socket

try:
    socket.create_connection(({host!r}, {port}), timeout=10).close()
except OSError:
    raise SystemExit(0)
raise SystemExit("reached")
"""


async def test_an_image_is_small(images: dict[str, str]) -> None:
    base = int(await docker("image", "inspect", "--format", "{{.Size}}", BASE))

    for image in images.values():
        size = int(await docker("image", "inspect", "--format", "{{.Size}}", image))
        assert size - base < MOST_MB * 1_000_000, image


@pytest.mark.parametrize("service", [*OURS, "csp-simulator"])
async def test_a_service_is_process_1_of_a_user_that_may_nothing_and_writes_nowhere(
    compose: Compose, service: str
) -> None:
    found = json.loads(await compose.python(service, INSIDE))

    assert (found["user"], found["group"]) == (10001, 10001)
    assert found["process 1"] == ["python", "/opt/broker/serve.py"]
    assert found["capabilities"], "process 1 has some"
    assert not found["new privileges"]
    assert set(found["written"].values()) == {"Read-only file system"}, found["written"]


async def test_the_database_refuses_a_service_what_is_not_its_own(compose: Compose) -> None:
    writes = ["DELETE FROM sandboxes", "UPDATE leases SET holder = 'me'", "INSERT INTO outbox DEFAULT VALUES"]
    await compose.python("gateway", REFUSED.format(statements=writes))
    await compose.python("allocator", REFUSED.format(statements=["DROP TABLE leases", "CREATE TABLE mine ()"]))


async def test_ports_are_published_on_this_machine_alone(compose: Compose) -> None:
    for service in ("gateway", "rabbitmq", "csp-simulator"):
        published = (await compose.inspect(service))["NetworkSettings"]["Ports"].values()
        addresses = {binding["HostIp"] for bindings in published for binding in bindings or []}
        assert addresses == {"127.0.0.1"}, service


async def test_the_allocator_has_no_route_out_of_the_inner_network(compose: Compose) -> None:
    await compose.python("reaper", REACHES.format(host="csp-simulator", port=9200))
    await compose.python("allocator", REACHES.format(host="postgres", port=5432))
    outer = (await compose.inspect("csp-simulator"))["NetworkSettings"]["Networks"]
    (address,) = (network["IPAddress"] for network in outer.values())
    await compose.python("reaper", REACHES.format(host=address, port=9200))
    await compose.python("allocator", REACHES_NOT.format(host=address, port=9200))


async def test_logs_name_the_services(compose: Compose) -> None:
    """A password that equals the name of a service would black the name out."""
    for service in OURS:
        logged = await docker("logs", await compose.container(service))
        assert f'"service":"{service}"' in logged.replace(": ", ":"), logged[-2000:]


async def test_a_student_gets_a_sandbox_and_gives_it_back_with_the_scripts_for_a_track(
    compose: Compose, tmp_path: Path
) -> None:
    environment = {
        "PATH": "/usr/bin:/bin",
        "BROKER_API_TOKEN": TRACK_TOKEN,
        "BROKER_API_URL": f"{compose.url}/v1",
        "INSTRUQT_PARTICIPANT_ID": "ada",
        "INSTRUQT_TRACK_SLUG": "dns-101",
    }
    code, said = await run(["bash", ROOT / "instruqt" / "test_allocation.sh"], env=environment, cwd=tmp_path)
    assert code == 0, said
    sandbox_id = (tmp_path / "sandbox_id.txt").read_text()

    clean_up = ROOT / "instruqt" / "instruqt_broker_cleanup.py"
    code, said = await run([sys.executable, clean_up], env=environment, cwd=tmp_path)
    assert code == 0, said

    async def deleted() -> bool:
        found = await compose.admin("GET", f"sandboxes/{sandbox_id}")
        return bool(found["status"] == "deleted")

    await eventually(deleted)


async def test_a_service_that_ends_is_started_again(compose: Compose) -> None:
    before = (await compose.inspect("reaper"))["State"]["StartedAt"]
    await compose.python("reaper", "import os, signal; os.kill(1, signal.SIGTERM)")

    async def started_again() -> bool:
        state = (await compose.inspect("reaper"))["State"]
        return bool(state["Running"] and state["StartedAt"] != before)

    await eventually(started_again)
    await compose.until_all_are_healthy()


async def test_any_container_may_be_killed_while_students_are_at_work_and_nothing_is_lost(compose: Compose) -> None:
    history, chance = History(), random.Random(8)
    async with Students([compose.url], history, chance) as students:
        work = asyncio.create_task(students.run(PLACES))
        await asyncio.sleep(UNDISTURBED_SEC)
        for service in (*OURS, *SERVERS):
            container = await compose.container(service)
            await docker("kill", container)
            await asyncio.sleep(chance.uniform(0.5, 2))
            await docker("start", container)
            await compose.until_all_are_healthy()
            served = await students.probe(f"after-{service}", until=time.time() + PATIENCE_SEC)
            assert served is not None, f"nobody was given a sandbox after {service} was killed"
        students.stop()
        await work

    async def nothing_is_pending() -> bool:
        return bool((await compose.admin("GET", "stats"))["pending_deletion"] == 0)

    await eventually(nothing_is_pending, within_sec=PATIENCE_SEC)
    assert [script for script in history.script_runs if not script.succeeded] == []
    assert_nothing_was_lost(history, await compose.leases())
    stats = await compose.admin("GET", "stats")
    assert (stats["total"], stats["deletion_failed"]) == (ACCOUNTS, 0)


def assert_nothing_was_lost(history: History, leases: Sequence[dict[str, Any]]) -> None:
    """What students were told is so, and nobody has two or what another has had."""
    by_both = {(lease["sandbox_id"], lease["holder"]): lease for lease in leases}
    told = [operation for operation in history.operations if operation.outcome == "ok"]
    assert len(told) > len(OURS) + len(SERVERS)  # there was work
    for operation in told:
        lease = by_both[operation.sandbox_id, operation.student]
        if operation.kind == "release":
            assert lease["end_reason"] == "student", operation
    assert max(Counter(lease["sandbox_id"] for lease in leases).values()) == 1
    assert max(Counter(lease["holder"] for lease in leases if lease["ended_at"] is None).values()) == 1
