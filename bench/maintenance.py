"""What the broker does beside the students, started as it is started in production, and followed to its end."""

import asyncio
import hashlib
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import asyncpg
import httpx

from bench.servers import ADMIN_TOKEN, Servers
from devstack.errors import CannotRun
from sandbox_broker import topology
from sandbox_broker.bus import Disconnected, Publisher, Requester, Unroutable
from sandbox_broker.messages import Purged, PurgeRecords
from sandbox_broker.service import cancel

_PURGE_PIECE = 500
"""As the csp-syncer has it."""
_ANSWER_SEC = 60.0
"""Longer than the allocator gives the statement."""
_SYNC_SEC = 300.0
_BETWEEN_LOOKS_SEC = 0.1

_MAKE_OVERDUE = "UPDATE leases SET expires_at = now() - interval '1 hour' WHERE starts_with(holder, $1)"

# What has waited in vain for the grace period of production.
_OVERDUE = """
SELECT EXISTS (SELECT FROM leases WHERE ended_at IS NULL AND expires_at <= now() - interval '30 minutes')
"""


async def list_in_csp(servers: Servers, accounts: int) -> None:
    """CSP has what `pool.fill` makes of so many, each fiftieth under another name."""
    records = [_account(number) for number in range(1, accounts + 1)]
    async with _client() as client:
        (await client.put(f"{servers.csp}/_control/accounts", json={"raw": records})).raise_for_status()


def _account(number: int) -> dict[str, object]:
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


async def sync(servers: Servers) -> dict[str, int]:
    """What the administrator is told who asks for a sync; raises CannotRun when it was not done."""
    async with _client() as client:
        answer = await client.post(f"{servers.ours.url}/v1/admin/sync")
    if answer.status_code != 200:
        raise CannotRun(f"the sync was answered {answer.status_code} {answer.text[:300]}", status=1)
    found: dict[str, int] = answer.json()
    return found


def _client() -> httpx.AsyncClient:
    headers = {"Authorization": f"Bearer {ADMIN_TOKEN}"}
    return httpx.AsyncClient(headers=headers, timeout=_SYNC_SEC, trust_env=False)


async def expire(students: str, database: asyncpg.Connection) -> None:
    """Makes the leases of all students of that name overdue. The reaper ends them from its next tick on; returns
    when it has."""
    await database.execute(_MAKE_OVERDUE, students)
    while await database.fetchval(_OVERDUE):  # noqa: ASYNC110 (nothing tells us)
        await asyncio.sleep(_BETWEEN_LOOKS_SEC)


@asynccontextmanager
async def asking(servers: Servers) -> AsyncIterator[Requester]:
    """Asks the allocator, as the other services do."""
    publisher = Publisher(servers.amqp_url, "bench")
    requester = Requester(servers.amqp_url, "bench", publisher)
    running = [asyncio.create_task(run()) for run in (publisher.run, requester.run)]
    try:
        yield requester
    finally:
        for task in reversed(running):
            await cancel(task)


async def purge(requester: Requester, *, deleted_for_sec: float) -> int:
    """Forgets all records of sandboxes that have been deleted for so long; returns how many there were."""
    purged = 0
    while True:
        count = await purge_piece(requester, deleted_for_sec=deleted_for_sec)
        purged += count or 0
        if count != _PURGE_PIECE:
            return purged


async def purge_piece(requester: Requester, *, deleted_for_sec: float) -> int | None:
    """The command that the csp-syncer repeats every hour until nothing is left. None when the allocator could not
    do it; nothing is purged then, and it is to be tried again later."""
    command = PurgeRecords(status="deleted", for_sec=deleted_for_sec, limit=_PURGE_PIECE)
    try:
        reply = await requester.request(topology.ALLOCATOR_MAINTENANCE, command, timeout_sec=_ANSWER_SEC)
    except (Disconnected, Unroutable, TimeoutError) as error:
        raise CannotRun(f"the purge was not answered: {error}", status=1) from error
    return reply.count if isinstance(reply, Purged) else None
