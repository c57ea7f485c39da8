"""What the allocator's tests share: a pool in a real database, and short ways to ask for things."""

import asyncio
import itertools
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from typing import Any

import asyncpg

from allocator import store
from allocator.handlers import listings, students
from allocator.lanes import STUDENTS, Lane
from allocator.writer import Writer
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
from sandbox_broker.contract.replies import (
    LeaseGranted,
    ListingApplied,
    ListingBegun,
    Refused,
    Reply,
    SandboxesRefreshed,
)
from sandbox_broker.messaging.publisher import Publisher

LAB = timedelta(hours=4)
RUN = uuid.UUID(int=8)
"""Of the clean-up."""


def ask(
    holder: str, prefix: str | None = None, key: str | None = None, track: str | None = None
) -> AllocateSandbox:
    return AllocateSandbox(
        request_id="request", holder=holder, name_prefix=prefix, idempotency_key=key, track_name=track
    )


def done(sandbox_id: str, holder: str) -> ReleaseSandbox:
    return ReleaseSandbox(request_id="request", sandbox_id=sandbox_id, holder=holder)


def account(number: int, name: str | None = None, external_id: str | None = None) -> ListedAccount:
    """The account that Pool.fill makes under the same number."""
    return ListedAccount(
        sandbox_id=str(number), external_id=external_id or f"account-{number}", name=name or f"sandbox-{number}"
    )


def granted(reply: Reply) -> LeaseGranted:
    assert isinstance(reply, LeaseGranted), reply
    return reply


def refusal(reply: Reply) -> str:
    assert isinstance(reply, Refused), reply
    return reply.code


async def until(condition: Callable[[], Awaitable[object]], *, timeout_sec: float = 60) -> None:
    """Waits until the condition is true; the test fails if that takes longer than `timeout_sec`."""
    async with asyncio.timeout(timeout_sec):
        while not await condition():  # noqa: ASYNC110 (nothing tells us)
            await asyncio.sleep(0.01)


class Pool:
    """A database to fill, to write through any number of allocators' connections, and to look into."""

    def __init__(self, url: str, stack: AsyncExitStack, observer: asyncpg.Connection) -> None:
        self.url = url
        self._stack = stack
        self._observer = observer
        self._numbers = itertools.count(1)
        self.publisher = Publisher("amqp://127.0.0.1:1/", "nobody")
        """Of the writers; it is not connected."""

    async def writer(self, epoch: int | None = None, *, lane: Lane = STUDENTS) -> Writer:
        """An allocator's connection, on the lane's present epoch unless another is given."""
        connection = await store.connect(
            self.url, lane.queue.name, statement_timeout_sec=lane.statement_timeout_sec, plans=lane.plans
        )
        self._stack.callback(connection.terminate)
        if epoch is None:
            epoch = await self.value("SELECT epoch FROM allocator_epoch WHERE queue = $1", lane.queue.name)
        return Writer(connection, epoch, LAB, self.publisher)

    async def fill(self, names: int | Sequence[str], status: str = "available") -> list[str]:
        """Adds sandboxes, the first the one that is available longest; returns their ids."""
        numbers = [next(self._numbers) for _ in (range(names) if isinstance(names, int) else names)]
        ids = [str(number) for number in numbers]
        await self._observer.execute(
            """
            INSERT INTO sandboxes (sandbox_id, external_id, name, status, status_since)
            SELECT id, 'account-' || id, name, $3, now() - interval '1 day' + place * interval '1 second'
            FROM unnest($1::text[], $2::text[]) WITH ORDINALITY AS new (id, name, place)
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
        found: list[asyncpg.Record] = await self._observer.fetch(query, *arguments)
        return found

    async def execute(self, query: str, *arguments: object) -> None:
        await self._observer.execute(query, *arguments)

    async def status(self, sandbox_id: str) -> str | None:
        status: str | None = await self.value("SELECT status FROM sandboxes WHERE sandbox_id = $1", sandbox_id)
        return status

    async def events(self, subject: str | None = None) -> list[str]:
        """The types of the events in the outbox, all of them or those of one sandbox."""
        return await self.column(
            "SELECT type FROM outbox WHERE $1::text IS NULL OR subject = $1 ORDER BY outbox_id", subject
        )

    async def state(self) -> list[Any]:
        """All that a statement could have changed."""
        return [
            await self._observer.fetch(f"SELECT * FROM {table} ORDER BY 1")
            for table in (
                "sandboxes",
                "leases",
                "outbox",
                "jobs",
                "csp_listings",
                "csp_accounts",
                "allocator_epoch",
                "cleanup_duty",
                "dead_letters",
            )
        ]

    async def until_waiting(self, writer: Writer) -> None:
        """Returns when the writer's statement waits for somebody's lock."""
        pid = writer.connection.get_server_pid()
        await until(lambda: self.value("SELECT cardinality(pg_blocking_pids($1)) > 0", pid))

    async def lease(self, holder: str) -> str:
        """Fills one more sandbox and leases it; returns its id."""
        (sandbox_id,) = await self.fill(1)
        await self.execute(
            "UPDATE sandboxes SET status_since = '2000-01-01' WHERE sandbox_id = $1", sandbox_id
        )  # the next to be given
        (reply,) = await students.allocate_sandbox(await self.writer(), [ask(holder)])
        assert granted(reply).sandbox_id == sandbox_id
        return sandbox_id

    async def pending(self) -> str:
        """A sandbox that waits for its deletion; its holder was `gone`."""
        sandbox_id = await self.lease("gone")
        await students.release_sandbox(await self.writer(), [done(sandbox_id, "gone")])
        return sandbox_id

    async def dead_letter(self, *commands: Command, queue: str = topology.ALLOCATOR_COMMANDS.name) -> uuid.UUID:
        """One that has died a moment ago."""
        found: uuid.UUID = await self.value(
            "INSERT INTO dead_letters VALUES (gen_random_uuid(), now(), $1, 'why', '{}', NULL, NULL, NULL, $2) "
            "RETURNING dead_letter_id",
            queue,
            encode_commands(commands),
        )
        return found

    async def overdue(self, holder: str, by: timedelta = timedelta(hours=1)) -> str:
        """A sandbox whose lease should have ended a while ago."""
        sandbox_id = await self.lease(holder)
        await self.execute("UPDATE leases SET expires_at = now() - $2::interval WHERE holder = $1", holder, by)
        return sandbox_id

    async def sound(self) -> None:
        """The invariants: one lease per sandbox and holder, what is leased is allocated, nothing is told twice."""
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


async def allocate(writer: Writer, *commands: AllocateSandbox) -> list[Reply]:
    return await students.allocate_sandbox(writer, commands)


async def release(writer: Writer, *commands: ReleaseSandbox) -> list[Reply]:
    return await students.release_sandbox(writer, commands)


async def begin(writer: Writer) -> int:
    reply = await listings.begin_listing(writer, BeginListing())
    assert isinstance(reply, ListingBegun)
    return reply.listing_id


async def stage(
    writer: Writer, listing_id: int, accounts: Sequence[ListedAccount], unreadable: Sequence[str] = ()
) -> None:
    await listings.stage_listing(
        writer, StageListing(listing_id=listing_id, accounts=tuple(accounts), unreadable=tuple(unreadable))
    )


async def apply(
    writer: Writer,
    listing_id: int,
    total: int,
    *,
    force: bool = False,
    max_stale_fraction: float = 1,
) -> Reply:
    return await listings.apply_listing(
        writer,
        ApplyListing(listing_id=listing_id, total=total, max_stale_fraction=max_stale_fraction, force=force),
    )


async def refresh(writer: Writer, listing_id: int, *, limit: int = 500) -> int:
    """Returns the pieces it took."""
    after, pieces = None, 0
    while True:
        command = RefreshSandboxes(listing_id=listing_id, after=after, limit=limit)
        reply = await listings.refresh_sandboxes(writer, command)
        assert isinstance(reply, SandboxesRefreshed)
        if reply.last is None:
            return pieces
        after, pieces = reply.last, pieces + 1


async def sync(
    writer: Writer, accounts: Sequence[ListedAccount], unreadable: Sequence[str] = (), **options: Any
) -> Reply:
    """A whole listing, from its beginning to the last name."""
    listing_id = await begin(writer)
    await stage(writer, listing_id, accounts, unreadable)
    reply = await apply(writer, listing_id, len(accounts) + len(unreadable), **options)
    if isinstance(reply, ListingApplied):
        await refresh(writer, listing_id)
    return reply
