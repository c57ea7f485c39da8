"""Test harness of the allocator: a pool in a real database, and builders of commands."""

import itertools
import json
import uuid
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any, Literal

import asyncpg

from allocator.handlers import leases, listings
from allocator.policy_book import PolicyBook, default_terms
from allocator.routing import STUDENTS, Lane
from allocator.settings import Settings
from allocator.waiting_line import WaitingLimits, WaitingLine
from allocator.write_session import WriteSession
from devstack.conditions import wait_until_blocked
from sandbox_broker.contract import topology
from sandbox_broker.contract.codec import encode_commands
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ApplyListing,
    BeginListing,
    Command,
    ListedAccount,
    RefreshSandboxes,
    ReleaseSandbox,
    StageListing,
)
from sandbox_broker.contract.policies import Policy
from sandbox_broker.contract.replies import (
    LeaseGranted,
    ListingApplied,
    ListingBegun,
    Refused,
    Reply,
    SandboxesRefreshed,
)
from sandbox_broker.contract.tokens import Sender
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.runtime.access_keys import AccessKeys

DEFAULT_TERMS = default_terms(Settings(amqp_url="amqp://127.0.0.1", database_url="postgresql://x", _env_file=None))
WAITING = WaitingLimits(ttl_sec=60, max_places=2000)
ACCESS_KEY = "c2FuZGJveC1icm9rZXItdGVzdC1rZXktMDEyMzQ1Njc="
BROKEN_HOLD = timedelta(hours=24)
RUN = uuid.UUID(int=8)
"""Id of a clean-up run."""


def allocate_command(
    holder: str,
    prefix: str | None = None,
    key: str | None = None,
    track: str | None = None,
    wait_sec: int | None = None,
    access: Literal["user"] | None = None,
) -> AllocateSandbox:
    return AllocateSandbox(
        request_id="request",
        holder=holder,
        name_prefix=prefix,
        idempotency_key=key,
        track_name=track,
        wait_sec=wait_sec,
        access=access,
    )


def release_command(sandbox_id: str, holder: str) -> ReleaseSandbox:
    return ReleaseSandbox(request_id="request", sandbox_id=sandbox_id, holder=holder)


def account(number: int, name: str | None = None, external_id: str | None = None) -> ListedAccount:
    """Return the account of sandbox number `number` of Pool.fill."""
    return ListedAccount(
        sandbox_id=str(number), external_id=external_id or f"account-{number}", name=name or f"sandbox-{number}"
    )


def granted_lease(reply: Reply) -> LeaseGranted:
    assert isinstance(reply, LeaseGranted), reply
    return reply


def refusal_code(reply: Reply) -> str:
    assert isinstance(reply, Refused), reply
    return reply.code


class Pool:
    """Pool in a test database: fills it, opens write sessions, and inspects it."""

    def __init__(self, url: str, stack: AsyncExitStack, observer: asyncpg.Connection) -> None:
        self.url = url
        self._stack = stack
        self._observer = observer
        self._numbers = itertools.count(1)
        self._session: WriteSession | None = None
        self.publisher = Publisher("amqp://127.0.0.1:1/", "unconnected")
        """Publisher of the write sessions; it is not connected."""

    async def write_session(self, epoch: int | None = None, *, lane: Lane = STUDENTS) -> WriteSession:
        """Connect a write session under the current epoch of the lane, or under `epoch`."""
        session = WriteSession(
            Primary(self.url),
            lane.queue.name,
            self.publisher,
            policies=PolicyBook(DEFAULT_TERMS),
            waiting_line=WaitingLine(WAITING),
            broken_hold=BROKEN_HOLD,
            access_keys=AccessKeys(ACCESS_KEY),
            statement_timeout_sec=lane.statement_timeout_sec,
            planner_settings=lane.planner_settings,
        )
        await session.connect()
        self._stack.callback(session.close)
        if epoch is None:
            epoch = await self.value("SELECT epoch FROM allocator_epoch WHERE queue = $1", lane.queue.name)
        session.epoch = epoch
        return session

    async def fill(self, names: int | Sequence[str], status: str = "available") -> list[str]:
        """Insert sandboxes, the longest available first; return their ids."""
        numbers = [next(self._numbers) for _ in (range(names) if isinstance(names, int) else names)]
        ids = [str(number) for number in numbers]
        await self._observer.execute(
            """
            INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since)
            SELECT id, 'account-' || id, name, $3, now() - interval '1 day' + number * interval '1 second'
            FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS new (id, name, number)
            """,
            ids,
            [f"sandbox-{number}" for number in numbers] if isinstance(names, int) else list(names),
            status,
        )
        return ids

    async def value(self, query: str, *arguments: object) -> Any:
        return await self._observer.fetchval(query, *arguments)

    async def column(self, query: str, *arguments: object) -> list[Any]:
        return [row[0] for row in await self._observer.fetch(query, *arguments)]

    async def rows(self, query: str, *arguments: object) -> list[asyncpg.Record]:
        rows: list[asyncpg.Record] = await self._observer.fetch(query, *arguments)
        return rows

    async def execute(self, query: str, *arguments: object) -> None:
        await self._observer.execute(query, *arguments)

    def transaction(self) -> Any:
        """Return a transaction for the following statements of the pool itself."""
        return self._observer.transaction()

    async def status(self, sandbox_id: str) -> str | None:
        status: str | None = await self.value("SELECT status FROM sandboxes WHERE sandbox_id = $1", sandbox_id)
        return status

    async def events(self, subject: str | None = None) -> list[str]:
        """Return the types of the events in the outbox, of all or of one sandbox."""
        return await self.column(
            "SELECT type FROM outbox WHERE $1::text IS NULL OR subject = $1 ORDER BY outbox_id", subject
        )

    async def state(self) -> list[Any]:
        """Return the content of all writable tables."""
        return [
            await self._observer.fetch(f"SELECT * FROM {table} ORDER BY 1")
            for table in (
                "sandboxes",
                "leases",
                "lease_extensions",
                "outbox",
                "jobs",
                "csp_listings",
                "csp_accounts",
                "allocator_epoch",
                "cleanup_duty",
                "creations",
                "stock_prefixes",
                "creation_duty",
                "accesses",
                "dead_letters",
                "waiting",
                "policies",
                "policy_set",
                "tokens",
                "token_uses",
                "audit",
            )
        ]

    async def stock_rule(self, name_prefix: str, min: int, max: int, **more: object) -> None:
        """Apply a policy with this stock rule, besides those of other prefixes."""
        document = {"name": name_prefix, "stock": {"name_prefix": name_prefix, "min": min, "max": max, **more}}
        await self.execute(
            "INSERT INTO policies (name, document) VALUES ($1, $2) "
            "ON CONFLICT (name) DO UPDATE SET document = excluded.document",
            name_prefix,
            json.dumps(document),
        )

    async def until_waiting(self, session: WriteSession) -> None:
        """Wait until the statement of the session waits for a lock."""
        await wait_until_blocked(session.connection, self._observer)

    async def _own_session(self) -> WriteSession:
        """Return the session of the pool itself, under the current epoch. It remembers no place in the line.
        One connection serves a whole test, because other tests need the connections of the server, too."""
        if self._session is None:
            self._session = await self.write_session()
        session = self._session
        session.epoch = await self.value("SELECT epoch FROM allocator_epoch WHERE queue = $1", STUDENTS.queue.name)
        session.waiting_line.epoch = 0
        return session

    async def lease(self, holder: str) -> str:
        """Insert a sandbox and lease it; return its id."""
        (sandbox_id,) = await self.fill(1)
        await self.execute(
            "UPDATE sandboxes SET status_since = '2000-01-01' WHERE sandbox_id = $1", sandbox_id
        )  # makes it the next to be allocated
        (reply,) = await leases.allocate_sandbox(await self._own_session(), [allocate_command(holder)])
        assert granted_lease(reply).sandbox_id == sandbox_id
        return sandbox_id

    async def pending(self) -> str:
        """Return a sandbox with a pending deletion; its holder was `gone`."""
        sandbox_id = await self.lease("gone")
        await leases.release_sandbox(await self._own_session(), [release_command(sandbox_id, "gone")])
        return sandbox_id

    async def dead_letter(self, *commands: Command, queue: str = topology.ALLOCATOR_COMMANDS.name) -> uuid.UUID:
        """Insert a dead letter with the present as its time of death; return its id."""
        dead_letter_id: uuid.UUID = await self.value(
            "INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), $1, 'why', '{}', NULL, NULL, NULL, $2) "
            "RETURNING dead_letter_id",
            queue,
            encode_commands(commands),
        )
        return dead_letter_id

    async def apply_policies(self, *policies: Policy) -> None:
        """Replace all policies."""
        await self.execute("DELETE FROM policies")
        for policy in policies:
            await self.execute(
                "INSERT INTO policies (name, document) VALUES ($1, $2)",
                policy.name,
                json.dumps(policy.to_document()),
            )
        await self.execute("UPDATE policy_set SET version = version + 1, applied_at = now()")
        await self.execute("UPDATE allocator_epoch SET policy_version = version FROM policy_set")

    async def token(self, name: str, key_id: str, **fields: object) -> Sender:
        """Insert a named token of the role track; return the sender of its commands."""
        columns = {"key_id": key_id, "name": name, "role": "track", "token_hash": b"hash", **fields}
        parameters = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
        await self.execute(
            f"INSERT INTO tokens ({', '.join(columns)}) VALUES ({parameters})",
            *columns.values(),
        )
        await self.execute("UPDATE policy_set SET version = version + 1")
        await self.execute("UPDATE allocator_epoch SET policy_version = version FROM policy_set")
        return Sender(actor=name, key_id=key_id, address="192.0.2.1")

    async def overdue(self, holder: str, by: timedelta = timedelta(hours=1)) -> str:
        """Lease a sandbox with a lease overdue by `by`; return its id."""
        sandbox_id = await self.lease(holder)
        await self.execute("UPDATE leases SET expires_at = now() - $2::interval WHERE holder = $1", holder, by)
        return sandbox_id

    async def assert_sound(self) -> None:
        """Check: one lease per sandbox and holder, leased sandboxes are allocated, no event is written twice."""
        active = await self._observer.fetch(
            "SELECT l.holder, l.sandbox_id, s.status FROM leases l JOIN sandboxes s USING (sandbox_id) "
            "WHERE l.ended_at IS NULL"
        )
        assert len({row["holder"] for row in active}) == len(active)
        assert len({row["sandbox_id"] for row in active}) == len(active)
        assert {row["status"] for row in active} <= {"allocated"}
        assert await self.value("SELECT count(*) FROM sandboxes WHERE status = 'allocated'") == len(active)
        assert not await self.column(
            "SELECT subject FROM outbox WHERE subject IS NOT NULL AND type <> 'sandbox.stale' "
            "AND type <> 'sandbox.restored' GROUP BY subject, type HAVING count(*) > 1"
        )


@asynccontextmanager
async def pool_in(url: str) -> AsyncIterator[Pool]:
    observer = await asyncpg.connect(url)
    async with AsyncExitStack() as stack:
        stack.callback(observer.terminate)
        yield Pool(url, stack, observer)


async def allocate(session: WriteSession, *commands: AllocateSandbox) -> list[Reply]:
    return await leases.allocate_sandbox(session, commands)


async def release(session: WriteSession, *commands: ReleaseSandbox) -> list[Reply]:
    return await leases.release_sandbox(session, commands)


async def begin(session: WriteSession) -> int:
    reply = await listings.begin_listing(session, BeginListing())
    assert isinstance(reply, ListingBegun)
    return reply.listing_id


async def stage(
    session: WriteSession, listing_id: int, accounts: Sequence[ListedAccount], unreadable: Sequence[str] = ()
) -> None:
    await listings.stage_listing(
        session, StageListing(listing_id=listing_id, accounts=tuple(accounts), unreadable=tuple(unreadable))
    )


async def apply(
    session: WriteSession,
    listing_id: int,
    total: int,
    *,
    force: bool = False,
    max_stale_fraction: float = 1,
    max_growth_fraction: float | None = None,
) -> Reply:
    return await listings.apply_listing(
        session,
        ApplyListing(
            listing_id=listing_id,
            total=total,
            max_stale_fraction=max_stale_fraction,
            max_growth_fraction=max_growth_fraction,
            force=force,
        ),
    )


async def refresh(session: WriteSession, listing_id: int, *, limit: int = 500) -> int:
    """Refresh all names; return the number of batches."""
    after, batches = None, 0
    while True:
        command = RefreshSandboxes(listing_id=listing_id, after=after, limit=limit)
        reply = await listings.refresh_sandboxes(session, command)
        assert isinstance(reply, SandboxesRefreshed)
        if reply.last is None:
            return batches
        after, batches = reply.last, batches + 1


async def sync(
    session: WriteSession, accounts: Sequence[ListedAccount], unreadable: Sequence[str] = (), **options: Any
) -> Reply:
    """Run a complete sync, from begin_listing to the last refresh."""
    listing_id = await begin(session)
    await stage(session, listing_id, accounts, unreadable)
    reply = await apply(session, listing_id, len(accounts) + len(unreadable), **options)
    if isinstance(reply, ListingApplied):
        await refresh(session, listing_id)
    return reply
