"""From the X-Request-ID of one request, whether it succeeded or failed, its story is found in the logs of all
services: what one grep over their standard output would find."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import ADMIN, Stack, eventually, running, track

Line = Mapping[str, Any]


@dataclass
class Logs:
    lines: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, process: str, line: str) -> None:
        self.lines.append((process, line))

    def grep(self, text: str) -> list[Line]:
        return [json.loads(line) for _, line in self.lines if text in line]

    def events(self, text: str) -> set[tuple[str, str]]:
        return {(line["service"], line["event"]) for line in self.grep(text)}

    def one(self, text: str, event: str) -> Line:
        (line,) = (line for line in self.grep(text) if line["event"] == event)
        return line


@pytest.fixture(scope="module")
def logs() -> Logs:
    return Logs()


@pytest.fixture(scope="module")
async def told(new_database: NewDatabase, new_vhost: NewVhost, logs: Logs) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        running(database_url, amqp_url, on_line=logs) as stack,
    ):
        yield stack


@pytest.fixture
async def stack(told: Stack) -> Stack:
    await told.fill(3)
    return told


async def until_told(logs: Logs, text: str, *wanted: tuple[str, str]) -> None:
    async def all_told() -> bool:
        return set(wanted) <= logs.events(text)

    await eventually(all_told)


async def test_an_allocation_is_told_by_gateway_and_allocator(stack: Stack, logs: Logs) -> None:
    response = await stack.allocate("ada", X_Instruqt_Track_ID="dns-101")
    request_id, lease = response.headers["X-Request-ID"], response.json()
    await until_told(logs, request_id, ("gateway", "request.handled"), ("allocator", "lease.granted"))

    ids = {
        "request_id": request_id,
        "holder": "ada",
        "track_name": "dns-101",
        "sandbox_id": lease["sandbox_id"],
    }
    assert ids.items() <= logs.one(request_id, "request.handled").items()
    granted = logs.one(request_id, "lease.granted")
    assert ids.items() <= granted.items()
    assert granted["epoch"] == await stack.database.fetchval(
        "SELECT epoch FROM allocator_epoch WHERE queue = 'allocator.commands'"
    )
    assert granted["batch_id"]


async def test_those_of_one_batch_are_found_by_its_id(stack: Stack, logs: Logs) -> None:
    await stack.allocate("ada", X_Request_ID="batch-of-one")
    await until_told(logs, "batch-of-one", ("allocator", "lease.granted"))
    batch_id = logs.one("batch-of-one", "lease.granted")["batch_id"]
    assert {line["request_id"] for line in logs.grep(batch_id)} == {"batch-of-one"}


async def test_a_release_is_told_to_the_end_of_the_deletion(stack: Stack, logs: Logs) -> None:
    lease = (await stack.allocate("ada")).json()
    released = await stack.client.post(
        f"{stack.url}/v1/sandboxes/{lease['sandbox_id']}/mark-for-deletion",
        headers={**track("ada"), "X-Request-ID": "the-release-of-ada"},
    )
    assert released.status_code == 200
    await eventually(stack.nothing_pending)
    await until_told(
        logs,
        "the-release-of-ada",
        ("gateway", "request.handled"),
        ("allocator", "lease.released"),
        ("reaper", "csp.deleted"),
        ("allocator", "sandbox.deleted"),
    )
    assert {line["sandbox_id"] for line in logs.grep("the-release-of-ada")} == {lease["sandbox_id"]}
    told = await stack.database.fetchval(
        "SELECT data->>'request_id' FROM history WHERE sandbox_id = $1 AND type = 'sandbox.deletion_requested'",
        lease["sandbox_id"],
    )
    assert told == "the-release-of-ada"


async def test_a_deletion_that_fails_is_told_with_the_request_that_asked_for_it(stack: Stack, logs: Logs) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_deletes": 1})
    lease = (await stack.allocate("ada")).json()
    released = await stack.release(lease["sandbox_id"], "ada")
    await eventually(stack.nothing_pending)
    await until_told(
        logs,
        released.headers["X-Request-ID"],
        ("reaper", "csp.delete_failed"),
        ("allocator", "sandbox.deletion_postponed"),
        ("reaper", "csp.deleted"),
    )


async def test_a_refusal_is_told_with_its_code(stack: Stack, logs: Logs) -> None:
    for student in ("ada", "bob", "eve"):
        assert (await stack.allocate(student)).status_code == 201
    refused = await stack.allocate("grace")
    request_id = refused.headers["X-Request-ID"]
    assert refused.status_code == 409
    await until_told(logs, request_id, ("gateway", "request.handled"), ("allocator", "lease.refused"))
    assert logs.one(request_id, "request.handled")["code"] == "POOL_EXHAUSTED"
    assert logs.one(request_id, "lease.refused")["holder"] == "grace"

    refused = await stack.release("1", "grace")
    request_id = refused.headers["X-Request-ID"]
    await until_told(logs, request_id, ("gateway", "request.handled"), ("allocator", "release.refused"))
    assert logs.one(request_id, "request.handled")["code"] == "SANDBOX_NOT_FOUND"


async def test_a_request_that_never_reaches_a_route_is_told_too(stack: Stack, logs: Logs) -> None:
    refused = await stack.client.post(f"{stack.url}/v1/allocate", headers={"Authorization": "Bearer nonsense"})
    request_id = refused.headers["X-Request-ID"]
    await until_told(logs, request_id, ("gateway", "request.handled"))
    assert logs.one(request_id, "request.handled")["code"] == "UNAUTHORIZED"


async def test_requests_that_the_database_fails_are_told_by_the_allocator(stack: Stack, logs: Logs) -> None:
    """An operator's lock takes longer than a statement may wait."""
    async with stack.database.acquire() as operator, operator.transaction():
        await operator.execute("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE")
        refused = await stack.allocate("ada", X_Request_ID="locked-out")
    assert refused.status_code == 503
    await until_told(
        logs,
        "locked-out",
        ("gateway", "request.handled"),
        ("allocator", "commands.refused"),
    )
    batch_id = logs.one("locked-out", "commands.refused")["batch_id"]
    assert ("allocator", "database.lost") in logs.events(batch_id)

    async def answers() -> bool:
        return (await stack.allocate("ada")).status_code in (200, 201)

    await eventually(answers)


async def test_a_sync_is_told_by_who_lists_and_who_writes(stack: Stack, logs: Logs) -> None:
    synced = await stack.client.post(f"{stack.url}/v1/admin/sync", headers=ADMIN)
    request_id = synced.headers["X-Request-ID"]
    assert synced.status_code == 200
    await until_told(
        logs,
        request_id,
        ("gateway", "request.handled"),
        ("csp-syncer", "sync.completed"),
        ("allocator", "sync.applied"),
    )
    assert (
        logs.one(request_id, "sync.completed")["listing_id"] == logs.one(request_id, "sync.applied")["listing_id"]
    )


async def test_a_cleanup_is_told_by_gateway_and_reaper(stack: Stack, logs: Logs) -> None:
    cleaned = await stack.client.post(f"{stack.url}/v1/admin/cleanup", headers=ADMIN)
    request_id = cleaned.headers["X-Request-ID"]
    await until_told(logs, request_id, ("gateway", "request.handled"), ("reaper", "job.ended"))


async def test_an_expiry_is_told_under_its_tick(stack: Stack, logs: Logs) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.database.execute("UPDATE leases SET expires_at = now() - interval '1 day' WHERE ended_at IS NULL")

    async def expired() -> bool:
        return ("allocator", "lease.expired") in logs.events(f'"sandbox_id":"{lease["sandbox_id"]}"')

    await eventually(expired)
    (line,) = (line for line in logs.grep(lease["sandbox_id"]) if line["event"] == "lease.expired")
    assert line["request_id"].startswith("tick-")
    await eventually(stack.nothing_pending)
