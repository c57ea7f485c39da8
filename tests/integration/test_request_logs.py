"""Logs of a request: a search for its X-Request-ID finds its log lines in all services, also after a failure."""

import json
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest

from devstack.conditions import wait_until
from devstack.testing import NewDatabase, NewVhost
from tests.integration.stack import ADMIN, Stack, run_stack, track_headers

Line = Mapping[str, Any]


@dataclass
class Logs:
    lines: list[tuple[str, str]] = field(default_factory=list)

    def __call__(self, process: str, line: str) -> None:
        self.lines.append((process, line))

    def grep(self, text: str) -> list[Line]:
        """Return the log lines that contain `text`, as grep over the services' output would."""
        return [json.loads(line) for _, line in self.lines if text in line]

    def events(self, text: str) -> set[tuple[str, str]]:
        return {(line["service"], line["event"]) for line in self.grep(text)}

    def find_one(self, text: str, event: str) -> Line:
        (line,) = (line for line in self.grep(text) if line["event"] == event)
        return line


@pytest.fixture(scope="module")
def logs() -> Logs:
    return Logs()


@pytest.fixture(scope="module")
async def logged_stack(new_database: NewDatabase, new_vhost: NewVhost, logs: Logs) -> AsyncIterator[Stack]:
    async with (
        new_database() as database_url,
        new_vhost() as amqp_url,
        run_stack(database_url, amqp_url, on_line=logs) as stack,
    ):
        yield stack


@pytest.fixture
async def stack(logged_stack: Stack) -> Stack:
    await logged_stack.fill(3)
    return logged_stack


async def wait_for_events(logs: Logs, text: str, *expected: tuple[str, str]) -> None:
    async def are_all_logged() -> bool:
        return set(expected) <= logs.events(text)

    await wait_until(are_all_logged)


async def test_gateway_and_allocator_log_an_allocation(stack: Stack, logs: Logs) -> None:
    response = await stack.allocate("ada", X_Instruqt_Track_ID="dns-101")
    request_id, lease = response.headers["X-Request-ID"], response.json()
    await wait_for_events(logs, request_id, ("gateway", "request.handled"), ("allocator", "lease.granted"))

    ids = {
        "request_id": request_id,
        "holder": "ada",
        "track_name": "dns-101",
        "sandbox_id": lease["sandbox_id"],
    }
    assert ids.items() <= logs.find_one(request_id, "request.handled").items()
    granted = logs.find_one(request_id, "lease.granted")
    assert ids.items() <= granted.items()
    assert granted["epoch"] == await stack.database.fetchval(
        "SELECT epoch FROM allocator_epoch WHERE queue = 'allocator.commands'"
    )
    assert granted["batch_id"]


async def test_the_batch_id_finds_all_requests_of_a_batch(stack: Stack, logs: Logs) -> None:
    await stack.allocate("ada", X_Request_ID="batch-of-one")
    await wait_for_events(logs, "batch-of-one", ("allocator", "lease.granted"))
    batch_id = logs.find_one("batch-of-one", "lease.granted")["batch_id"]
    assert {line["request_id"] for line in logs.grep(batch_id)} == {"batch-of-one"}


async def test_a_release_is_logged_until_the_deletion(stack: Stack, logs: Logs) -> None:
    lease = (await stack.allocate("ada")).json()
    released = await stack.client.post(
        f"{stack.url}/v1/sandboxes/{lease['sandbox_id']}/mark-for-deletion",
        headers={**track_headers("ada"), "X-Request-ID": "the-release-of-ada"},
    )
    assert released.status_code == 200
    await wait_until(stack.nothing_pending)
    await wait_for_events(
        logs,
        "the-release-of-ada",
        ("gateway", "request.handled"),
        ("allocator", "lease.released"),
        ("reaper", "csp.deleted"),
        ("allocator", "sandbox.deleted"),
    )
    assert {line["sandbox_id"] for line in logs.grep("the-release-of-ada")} == {lease["sandbox_id"]}
    request_id = await stack.database.fetchval(
        "SELECT data->>'request_id' FROM history WHERE sandbox_id = $1 AND type = 'sandbox.deletion_requested'",
        lease["sandbox_id"],
    )
    assert request_id == "the-release-of-ada"


async def test_a_failed_deletion_is_logged_with_the_id_of_the_release(stack: Stack, logs: Logs) -> None:
    await stack.control("PATCH", "behaviour", {"fail_next_deletes": 1})
    lease = (await stack.allocate("ada")).json()
    released = await stack.release(lease["sandbox_id"], "ada")
    await wait_until(stack.nothing_pending)
    await wait_for_events(
        logs,
        released.headers["X-Request-ID"],
        ("reaper", "csp.delete_failed"),
        ("allocator", "sandbox.deletion_postponed"),
        ("reaper", "csp.deleted"),
    )


async def test_a_refusal_is_logged_with_its_code(stack: Stack, logs: Logs) -> None:
    for student in ("ada", "bob", "eve"):
        assert (await stack.allocate(student)).status_code == 201
    refused = await stack.allocate("grace")
    request_id = refused.headers["X-Request-ID"]
    assert refused.status_code == 409
    await wait_for_events(logs, request_id, ("gateway", "request.handled"), ("allocator", "lease.refused"))
    assert logs.find_one(request_id, "request.handled")["code"] == "POOL_EXHAUSTED"
    assert logs.find_one(request_id, "lease.refused")["holder"] == "grace"

    refused = await stack.release("1", "grace")
    request_id = refused.headers["X-Request-ID"]
    await wait_for_events(logs, request_id, ("gateway", "request.handled"), ("allocator", "release.refused"))
    assert logs.find_one(request_id, "request.handled")["code"] == "SANDBOX_NOT_FOUND"


async def test_a_request_refused_before_routing_is_logged(stack: Stack, logs: Logs) -> None:
    refused = await stack.client.post(f"{stack.url}/v1/allocate", headers={"Authorization": "Bearer nonsense"})
    request_id = refused.headers["X-Request-ID"]
    await wait_for_events(logs, request_id, ("gateway", "request.handled"))
    assert logs.find_one(request_id, "request.handled")["code"] == "UNAUTHORIZED"


async def test_the_allocator_logs_requests_that_fail_in_the_database(stack: Stack, logs: Logs) -> None:
    """The failure is a lock held for longer than the statement timeout."""
    async with stack.database.acquire() as operator, operator.transaction():
        await operator.execute("LOCK TABLE leases IN ACCESS EXCLUSIVE MODE")
        refused = await stack.allocate("ada", X_Request_ID="locked-out")
    assert refused.status_code == 503
    await wait_for_events(
        logs,
        "locked-out",
        ("gateway", "request.handled"),
        ("allocator", "commands.refused"),
    )
    batch_id = logs.find_one("locked-out", "commands.refused")["batch_id"]
    assert ("allocator", "database.lost") in logs.events(batch_id)

    async def succeeds() -> bool:
        return (await stack.allocate("ada")).status_code in (200, 201)

    await wait_until(succeeds)


async def test_csp_syncer_and_allocator_log_a_sync(stack: Stack, logs: Logs) -> None:
    synced = await stack.client.post(f"{stack.url}/v1/admin/sync", headers=ADMIN)
    request_id = synced.headers["X-Request-ID"]
    assert synced.status_code == 200
    await wait_for_events(
        logs,
        request_id,
        ("gateway", "request.handled"),
        ("csp-syncer", "sync.completed"),
        ("allocator", "sync.applied"),
    )
    assert (
        logs.find_one(request_id, "sync.completed")["listing_id"]
        == logs.find_one(request_id, "sync.applied")["listing_id"]
    )


async def test_gateway_and_reaper_log_a_cleanup(stack: Stack, logs: Logs) -> None:
    cleaned = await stack.client.post(f"{stack.url}/v1/admin/cleanup", headers=ADMIN)
    request_id = cleaned.headers["X-Request-ID"]
    await wait_for_events(logs, request_id, ("gateway", "request.handled"), ("reaper", "job.ended"))


async def test_an_expiry_is_logged_with_the_id_of_its_tick(stack: Stack, logs: Logs) -> None:
    lease = (await stack.allocate("ada")).json()
    await stack.database.execute("UPDATE leases SET expires_at = now() - interval '1 day' WHERE ended_at IS NULL")

    async def is_expired() -> bool:
        return ("allocator", "lease.expired") in logs.events(f'"sandbox_id":"{lease["sandbox_id"]}"')

    await wait_until(is_expired)
    (line,) = (line for line in logs.grep(lease["sandbox_id"]) if line["event"] == "lease.expired")
    assert line["request_id"].startswith("tick-")
    await wait_until(stack.nothing_pending)
