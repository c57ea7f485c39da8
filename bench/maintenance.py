"""Maintenance work of the broker (sync, expiry, purge), started as in production and awaited."""

import asyncio
import hashlib
import time
import uuid
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager

import asyncpg
import httpx

from bench.servers import ADMIN_TOKEN, TOKEN, Servers
from devstack.errors import CannotRun
from sandbox_broker.contract import topology
from sandbox_broker.contract.commands import PurgeRecords
from sandbox_broker.messaging.outcome import CommandNotDone, CommandRefused
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.runtime.service import cancel_and_wait

_PURGE_BATCH_SIZE = 500
"""Batch size of the csp-syncer."""
_REPLY_TIMEOUT_SEC = 60.0
"""Longer than the allocator's statement timeout."""
_ADMIN_TIMEOUT_SEC = 300.0
_POLL_INTERVAL_SEC = 0.1

_MAKE_OVERDUE = "UPDATE leases SET expires_at = now() - interval '1 hour' WHERE starts_with(holder, $1)"

# Leases past production's grace period of 30 minutes.
_HAS_OVERDUE = """
SELECT EXISTS (SELECT FROM leases WHERE ended_at IS NULL AND expires_at <= now() - interval '30 minutes')
"""


async def put_csp_accounts(servers: Servers, accounts: int) -> None:
    """Give the CSP simulator the accounts of the sandboxes of `pool.fill`. Every 50th has another name."""
    records = [_build_account(number) for number in range(1, accounts + 1)]
    async with _admin_client() as client:
        (await client.put(f"{servers.csp_url}/_control/accounts", json={"raw": records})).raise_for_status()


def _build_account(number: int) -> dict[str, object]:
    digits = hashlib.md5(str(number).encode(), usedforsecurity=False).hexdigest()
    return {
        "account_type": "sandbox",
        "state": "active",
        "id": f"identity/accounts/{uuid.UUID(digits)}",
        "name": f"sandbox-{number}" if number % 50 else f"renamed-{number}",
        "csp_id": 1_000_000 + number,
        "created_at": "2025-03-27T16:53:47.605459Z",
        "sfdc_account_id": None,
    }


async def replace_sandboxes(servers: Servers, sandboxes: Mapping[str, str]) -> list[float]:
    """Replace the sandbox of each student, one after the other. Return the duration of each request in ms.

    `sandboxes` has the sandbox ids by student. Raises CannotRun if a replacement is refused.
    """
    durations = []
    async with httpx.AsyncClient(timeout=_ADMIN_TIMEOUT_SEC, trust_env=False) as client:
        for student, sandbox_id in sandboxes.items():
            url = f"{servers.broker.url}/v1/sandboxes/{sandbox_id}/replace"
            headers = {"Authorization": f"Bearer {TOKEN}", "X-Instruqt-Sandbox-ID": student}
            began = time.perf_counter()
            response = await client.post(url, headers=headers, json={"reason": "broken"})
            durations.append((time.perf_counter() - began) * 1e3)
            if response.status_code != 201:
                raise CannotRun(f"a replacement was answered {response.status_code}: {response.text}", status=1)
    return durations


async def run_sync(servers: Servers) -> dict[str, int]:
    """Run a sync over the admin API. Returns the response body; raises CannotRun if the sync fails."""
    async with _admin_client() as client:
        response = await client.post(f"{servers.broker.url}/v1/admin/sync")
    if response.status_code != 200:
        raise CannotRun(f"the sync failed: {response.status_code} {response.text[:300]}", status=1)
    counts: dict[str, int] = response.json()
    return counts


def _admin_client() -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    return httpx.AsyncClient(headers=headers, timeout=_ADMIN_TIMEOUT_SEC, trust_env=False)


async def expire_leases(student_prefix: str, database: asyncpg.Connection) -> None:
    """Make the leases of these students overdue and wait until the reaper has ended them."""
    await database.execute(_MAKE_OVERDUE, student_prefix)
    while await database.fetchval(_HAS_OVERDUE):  # noqa: ASYNC110 (no event to wait for)
        await asyncio.sleep(_POLL_INTERVAL_SEC)


@asynccontextmanager
async def connect_rpc_client(servers: Servers) -> AsyncIterator[RpcClient]:
    """Connect an RPC client for allocator commands."""
    publisher = Publisher(servers.amqp_url, "bench")
    rpc_client = RpcClient(servers.amqp_url, "bench", publisher)
    tasks = [asyncio.create_task(run()) for run in (publisher.run, rpc_client.run)]
    try:
        yield rpc_client
    finally:
        for task in reversed(tasks):
            await cancel_and_wait(task)


async def purge_deleted(rpc_client: RpcClient, *, deleted_for_sec: float) -> int:
    """Purge all records of sandboxes that were deleted at least `deleted_for_sec` ago. Returns their number."""
    purged = 0
    while True:
        count = await purge_batch(rpc_client, deleted_for_sec=deleted_for_sec)
        purged += count or 0
        if count != _PURGE_BATCH_SIZE:
            return purged


async def purge_batch(rpc_client: RpcClient, *, deleted_for_sec: float) -> int | None:
    """Send one purge command, which the csp-syncer repeats every hour until no records are left.

    Returns the number of purged records, or None if the allocator refused the command. Then no record is purged and
    the command can be repeated later. Raises CannotRun without a reply.
    """
    command = PurgeRecords(status="deleted", for_sec=deleted_for_sec, limit=_PURGE_BATCH_SIZE)
    try:
        reply = await rpc_client.request(topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=_REPLY_TIMEOUT_SEC)
    except CommandRefused:
        return None
    except CommandNotDone as error:
        raise CannotRun(f"the purge got no reply: {error}", status=1) from error
    return reply.count
