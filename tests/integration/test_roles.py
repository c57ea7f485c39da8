"""Least privilege: each service works with its PostgreSQL role and RabbitMQ user, and has no further rights."""

import asyncio
import shutil
import uuid
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import get_args
from urllib.parse import urlsplit, urlunsplit

import aio_pika
import asyncpg
import pytest
from aio_pika.abc import AbstractConnection, AbstractIncomingMessage
from aiormq.exceptions import ChannelAccessRefused, ChannelNotFoundEntity, ChannelPreconditionFailed
from pamqp.commands import Basic
from pamqp.common import FieldTable

from devstack.conditions import wait_until
from devstack.postgres import PrivatePostgres
from devstack.private import make_directory, service_account, write
from devstack.rabbitmq import PrivateRabbitMQ
from sandbox_broker.contract import commands, topology
from sandbox_broker.contract.codec import ReplyEnvelope, encode_commands
from sandbox_broker.contract.commands import (
    AllocateSandbox,
    ApplyListing,
    ApplyPolicies,
    BeginListing,
    ClaimAccess,
    ClaimCreations,
    ClaimDeletions,
    ClaimLease,
    CleanUpNow,
    Command,
    ConfirmRestore,
    DeleteStale,
    DropDeadLetter,
    EndCleanup,
    EndCreations,
    EndLease,
    EndPlay,
    EndTokenLeases,
    ExpireLeases,
    ExtendLease,
    ForgetStudent,
    HurryDeletions,
    IssueToken,
    ListedAccount,
    PurgeAudit,
    PurgePersonalData,
    PurgeRecords,
    RecordAccess,
    RecordAccessFailure,
    RecordAccessRemoval,
    RecordCreation,
    RecordCreationFailure,
    RecordDeletion,
    RecordDeletionFailure,
    RecordJob,
    RecordTokenUses,
    RefreshSandboxes,
    ReleaseSandbox,
    ReplaceSandbox,
    ReplayDeadLetter,
    ResumeStock,
    RetryDeletion,
    RevokeToken,
    RotateAccessKeys,
    ServeWaiting,
    StageListing,
    SuspendToken,
    SyncPool,
)
from sandbox_broker.contract.replies import Refused, Reply
from sandbox_broker.contract.tokens import TokenGrant
from sandbox_broker.database.schema import VIEWS, metadata
from sandbox_broker.declare import declare
from sandbox_broker.messaging.connection import open_channel
from sandbox_broker.migrate import migrate
from tests.integration.stack import PORTS, ROOT, Stack, run_stack

PASSWORD = "secret"
DATABASE = "sandbox_broker"
OWNER, GATEWAY, ALLOCATOR = "sandbox_broker", "sandbox_broker_gateway", "sandbox_broker_allocator"
TABLES = tuple(metadata.tables)

USERS = ("gateway", "allocator", "reaper", "csp-syncer", "provisioner", "keda")
RECEIVES_REPLIES = ("gateway", "reaper", "csp-syncer", "provisioner")
"""Users with a reply queue."""
DEFAULT = ""
"""The default exchange, which routes to every queue by name. Denied to all users."""
PUBLISHES: Mapping[str, set[str]] = {
    # Not the exchange for replies, so the gateway cannot forge a reply. The right for the dead letters is for the
    # length of the queue of the same name.
    "gateway": {topology.COMMANDS.name, topology.DEAD_LETTERS.name},
    "allocator": {topology.COMMANDS.name, topology.DEAD_LETTERS.name, topology.EVENTS.name, topology.REPLIES.name},
    "reaper": {
        topology.COMMANDS_FROM_REAPER.name,
        topology.DEAD_LETTERS.name,
        topology.REPLIES.name,
        topology.TICKS.name,
    },
    "csp-syncer": {
        topology.COMMANDS_FROM_SYNCER.name,
        topology.DEAD_LETTERS.name,
        topology.REPLIES.name,
        topology.TICKS.name,
    },
    "provisioner": {
        topology.COMMANDS_FROM_PROVISIONER.name,
        topology.DEAD_LETTERS.name,
        topology.REPLIES.name,
        topology.TICKS.name,
    },
    "keda": set(),
}


SENDS: Mapping[str, topology.Exchange] = {
    "gateway": topology.COMMANDS,
    "reaper": topology.COMMANDS_FROM_REAPER,
    "csp-syncer": topology.COMMANDS_FROM_SYNCER,
    "provisioner": topology.COMMANDS_FROM_PROVISIONER,
}
"""User -> exchange for its commands."""
ID = uuid.UUID(int=7)
FORGED = ListedAccount(sandbox_id="999", external_id="of-a-customer", name="sandbox-999")
COMMANDS: tuple[Command, ...] = (
    AllocateSandbox(request_id="r", holder="mallory"),
    ReleaseSandbox(request_id="r", sandbox_id="1", holder="mallory"),
    EndPlay(request_id="r", holder="mallory", ended_at=0),
    ServeWaiting(),
    ExtendLease(request_id="r", extension_id=ID, sandbox_id="1", extension_sec=60, note="forged"),
    ClaimLease(request_id="r", sandbox_id="1", holder="mallory"),
    ReplaceSandbox(request_id="r", sandbox_id="1", holder="mallory", reason="forged"),
    ApplyPolicies(request_id="r", policies=()),
    ExpireLeases(grace_sec=0, limit=1000),
    ClaimDeletions(run_id=ID, limit=1000, claim_sec=3600),
    HurryDeletions(run_id=ID, limit=1000, claim_sec=3600),
    EndCleanup(run_id=ID),
    RecordDeletion(sandbox_id="1"),
    RecordDeletionFailure(run_id=ID, sandbox_id="1", attempts=0, error="forged"),
    EndLease(request_id="r", sandbox_id="1", note="forged"),
    RetryDeletion(request_id="r", sandbox_id="1"),
    BeginListing(),
    StageListing(listing_id=1, accounts=(FORGED,)),
    ApplyListing(listing_id=1, total=1, max_stale_fraction=1, force=True),
    RefreshSandboxes(listing_id=1, limit=1000),
    DeleteStale(stale_for_sec=0, limit=1000),
    PurgeRecords(status="deleted", limit=1000),
    ClaimCreations(run_id=ID, limit=1000, claim_sec=3600),
    EndCreations(run_id=ID),
    RecordCreation(creation_id=1, external_id="of-a-customer"),
    RecordCreationFailure(run_id=ID, creation_id=1, attempts=0, error="forged"),
    ResumeStock(request_id="r", name_prefix="lab-"),
    IssueToken(
        request_id="r",
        key_id="0123456789abcdef",
        token_hash="ab" * 32,
        grant=TokenGrant(name="forged", role="admin"),
    ),
    RevokeToken(request_id="r", name="lab"),
    SuspendToken(request_id="r", name="lab"),
    EndTokenLeases(request_id="r", name="lab", note="forged", limit=1000),
    RecordTokenUses(uses={"0123456789abcdef": 1}),
    ClaimAccess(limit=100, max_running=1000, claim_sec=3600, email_domain="mallory.example", removal_wait_sec=0),
    RecordAccess(sandbox_id="1", claim_id=ID, user_id="of-a-customer"),
    RecordAccessFailure(sandbox_id="1", claim_id=ID, error="forged", retry_in_sec=0, failed=True),
    RecordAccessRemoval(sandbox_id="1", claim_id=ID),
    RotateAccessKeys(request_id="r", limit=1000),
    ForgetStudent(request_id="r", student="mallory"),
    PurgeAudit(for_sec=0, limit=1000),
    PurgePersonalData(for_sec=0, limit=1000),
    RecordJob(job_id=ID, kind="sync"),
    ReplayDeadLetter(request_id="r", dead_letter_id=ID),
    DropDeadLetter(request_id="r", dead_letter_id=ID),
    ConfirmRestore(request_id="r"),
    SyncPool(request_id="r", force=True),
    CleanUpNow(request_id="r", job_id=ID),
)
"""One command of each type."""


@dataclass(frozen=True)
class Servers:
    """Private servers, because roles and users belong to a whole server."""

    postgres: str
    """URL of the broker's database for the superuser."""
    rabbitmq: str
    """URL for the administrator."""
    read_rabbitmq_log: Callable[[], str]

    def database_url(self, role: str) -> str:
        return _with_user(self.postgres, role)

    def amqp_url(self, user: str) -> str:
        return _with_user(self.rabbitmq, user)


def _with_user(url: str, user: str) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"{user}:{PASSWORD}@{parts.hostname}:{parts.port}"))


@pytest.fixture(scope="module")
async def servers_with_roles(server_programs: None) -> AsyncIterator[Servers]:
    async with PrivatePostgres() as postgres, PrivateRabbitMQ() as rabbitmq:
        servers = Servers(postgres.url.removesuffix("/postgres") + f"/{DATABASE}", rabbitmq.url, rabbitmq.read_log)
        await _create_roles(postgres, servers)
        await _create_users(rabbitmq)
        await migrate(servers.database_url(OWNER))
        await declare(servers.amqp_url("migration"))
        yield servers


async def _create_roles(postgres: PrivatePostgres, servers: Servers) -> None:
    administrator = await asyncpg.connect(postgres.url)
    await administrator.execute(f"CREATE DATABASE {DATABASE}")
    await administrator.close()
    connection = await asyncpg.connect(servers.postgres)
    for _ in range(2):  # the script is idempotent
        await connection.execute((ROOT / "deploy" / "postgres" / "roles.sql").read_text())
    for role in (OWNER, GATEWAY, ALLOCATOR):
        await connection.execute(f"ALTER ROLE {role} PASSWORD '{PASSWORD}'")
    await connection.close()


async def _create_users(rabbitmq: PrivateRabbitMQ) -> None:
    # A copy of the file, because the account of RabbitMQ may have no access to the clone.
    user = service_account("rabbitmq")
    directory = make_directory("definitions", user)
    try:
        definitions = directory / "definitions.json"
        write(definitions, (ROOT / "deploy" / "rabbitmq" / "definitions.json").read_text(), user)
        await rabbitmq.run_rabbitmqctl("import_definitions", str(definitions))
    finally:
        shutil.rmtree(directory)
    for name in ("migration", *USERS):
        await rabbitmq.run_rabbitmqctl("change_password", name, PASSWORD)


@pytest.fixture(scope="module")
async def stack_with_roles(servers_with_roles: Servers) -> AsyncIterator[Stack]:
    servers = servers_with_roles
    own = {
        "gateway": {
            "DATABASE_URL": servers.database_url(GATEWAY),
            "AMQP_URL": servers.amqp_url("gateway"),
        },
        "allocator": {
            "DATABASE_URL": servers.database_url(ALLOCATOR),
            "AMQP_URL": servers.amqp_url("allocator"),
        },
        "reaper": {"AMQP_URL": servers.amqp_url("reaper")},
        "csp_syncer": {"AMQP_URL": servers.amqp_url("csp-syncer")},
        "provisioner": {"AMQP_URL": servers.amqp_url("provisioner")},
    }
    async with run_stack(servers.postgres, servers.rabbitmq, settings_of=own) as stack:
        yield stack


async def test_the_services_work_with_their_own_roles(stack_with_roles: Stack) -> None:
    stack = stack_with_roles
    await stack.fill(10)  # includes a sync by an administrator

    leases = [(await stack.allocate(f"student-{number}")).json() for number in range(3)]
    assert len({lease["sandbox_id"] for lease in leases}) == 3
    assert (await stack.release(leases[0]["sandbox_id"], "student-0")).status_code == 200
    await wait_until(stack.nothing_pending)
    # One lease expires and is found by a tick of the reaper.
    await stack.database.execute(
        "UPDATE leases SET allocated_at = allocated_at - interval '1 day', expires_at = expires_at - "
        "interval '1 day' WHERE holder = 'student-1'"
    )

    async def are_two_deleted() -> bool:
        return (await stack.stats())["deleted"] == 2

    await wait_until(are_two_deleted)
    released = await stack.admin("POST", f"sandboxes/{leases[2]['sandbox_id']}/release", reason="class ended")
    assert released.status_code == 200, released.text
    cleaned = await stack.admin("POST", "cleanup")
    assert cleaned.status_code in (200, 202), cleaned.text
    await wait_until(stack.nothing_pending)
    assert (await stack.stats())["deleted"] == 3
    assert (await stack.admin("GET", "leaks")).status_code == 200
    purged = await stack.admin("POST", "auto-delete-stale", grace_period_hours="0")
    assert purged.status_code == 200, purged.text
    await stack.assert_sound()

    # A standby allocator takes over with the same rights.
    await stack.start_service("allocator", name="second allocator")
    stack.processes["allocator"].kill()
    await stack.processes["allocator"].wait()

    async def can_allocate() -> bool:
        return (await stack.allocate("student-9")).status_code in (200, 201)

    await wait_until(can_allocate)


async def test_the_start_of_the_services_causes_no_refusal(
    servers_with_roles: Servers, stack_with_roles: Stack
) -> None:
    """Every refusal is an error in RabbitMQ's log, and would hide those of an attack."""
    stack = stack_with_roles
    replaced = [queue.replaces for queue in topology.QUEUES if queue.replaces is not None]
    connection = await aio_pika.connect(servers_with_roles.rabbitmq)
    async with connection, connection.channel() as channel:
        for name in replaced:
            await channel.declare_queue(name, durable=True)
        await _mark_log(servers_with_roles, "begin")
        for module in PORTS:
            await stack.processes[module].stop()
            await stack.start_service(module)

        async def are_replaced_queues_deleted() -> bool:
            listed = [await _exists(connection, name) for name in replaced]
            return not any(listed)

        await wait_until(are_replaced_queues_deleted)  # the last step of the start, with the first tick

    await _mark_log(servers_with_roles, "end")
    lines = servers_with_roles.read_rabbitmq_log().splitlines()
    begin, end = (next(n for n, line in enumerate(lines) if f"'{mark}'" in line) for mark in ("begin", "end"))
    assert [line for line in lines[begin + 1 : end] if "access_refused" in line] == []


async def _mark_log(servers: Servers, mark: str) -> None:
    """Write a refusal that contains the mark into RabbitMQ's log. The log arrives in its file with a delay."""
    connection = await aio_pika.connect(servers.amqp_url("keda"))
    async with connection:
        channel = await open_channel(connection, confirms=False)
        with pytest.raises(ChannelAccessRefused):
            await channel.queue_declare(mark, durable=True)

    async def is_written() -> bool:
        return f"'{mark}'" in servers.read_rabbitmq_log()

    await wait_until(is_written)


async def _exists(connection: AbstractConnection, queue: str) -> bool:
    channel = await open_channel(connection, confirms=False)
    try:
        await channel.queue_declare(queue, passive=True)
    except ChannelNotFoundEntity:
        return False
    await channel.close()
    return True


async def test_the_gateway_can_read_every_table_and_view(servers_with_roles: Servers) -> None:
    connection = await asyncpg.connect(servers_with_roles.database_url(GATEWAY))
    for table in (*TABLES, *(view.name for view in VIEWS)):
        await connection.execute(f"SELECT FROM {table}")
    await connection.close()


@pytest.mark.parametrize("table", TABLES)
async def test_the_gateway_cannot_write_any_table(servers_with_roles: Servers, table: str) -> None:
    column = next(iter(metadata.tables[table].columns)).name
    statements = [
        f"INSERT INTO {table} DEFAULT VALUES",
        f"UPDATE {table} SET {column} = DEFAULT",
        f"DELETE FROM {table}",
        f"TRUNCATE {table}",
        f"SELECT FROM {table} FOR UPDATE",
    ]
    await _assert_refused(servers_with_roles.database_url(GATEWAY), statements)


@pytest.mark.parametrize("role", [GATEWAY, ALLOCATOR])
async def test_no_service_can_change_the_schema(servers_with_roles: Servers, role: str) -> None:
    await _assert_refused(
        servers_with_roles.database_url(role),
        [
            "CREATE TABLE mine (id int)",
            "CREATE SCHEMA mine",
            "CREATE TEMPORARY TABLE mine (id int)",
            "CREATE ROLE mine",
            "DROP TABLE sandboxes",
            "ALTER TABLE sandboxes ADD COLUMN mine int",
            "CREATE INDEX mine ON sandboxes (name)",
            "TRUNCATE leases",
            f"SET ROLE {OWNER}",
        ],
    )


async def _assert_refused(url: str, statements: list[str]) -> None:
    connection = await asyncpg.connect(url)
    try:
        for statement in statements:
            with pytest.raises(asyncpg.InsufficientPrivilegeError):
                await connection.execute(statement)
    finally:
        await connection.close()


@pytest.mark.parametrize("user", USERS)
async def test_a_user_cannot_consume_from_queues_of_others(servers_with_roles: Servers, user: str) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        for queue in topology.QUEUES:
            if queue.owner != user:
                channel = await open_channel(connection, confirms=False)
                with pytest.raises(ChannelAccessRefused):
                    await channel.basic_get(queue.name)
                channel = await open_channel(connection, confirms=False)
                with pytest.raises(ChannelAccessRefused):
                    await channel.queue_purge(queue.name)


@pytest.mark.parametrize("user", PUBLISHES)
async def test_a_user_cannot_publish_to_other_exchanges(servers_with_roles: Servers, user: str) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        for exchange in [*(exchange.name for exchange in topology.EXCHANGES), DEFAULT]:
            if exchange not in PUBLISHES[user]:
                channel = await open_channel(connection, confirms=True)
                with pytest.raises(ChannelAccessRefused):
                    await channel.basic_publish(b"{}", exchange=exchange, properties=Basic.Properties())


def test_the_commands_include_each_type() -> None:
    assert {type(command) for command in COMMANDS} == set(get_args(get_args(commands.AnyCommand)[0]))


@pytest.mark.parametrize(("user", "exchange"), SENDS.items())
async def test_a_command_is_refused_without_the_right_of_its_sender(
    stack_with_roles: Stack, servers_with_roles: Servers, user: str, exchange: topology.Exchange
) -> None:
    """Covers each queue reachable for the user. The message headers name the exchange of another sender."""
    stack = stack_with_roles
    await stack.fill(3)
    before = await stack.stats()
    forged = [command for command in COMMANDS if type(command) not in exchange.commands]
    assert forged
    queues = [binding.queue.name for binding in topology.BINDINGS if binding.exchange is exchange]
    async with await aio_pika.connect(servers_with_roles.amqp_url(user)) as connection:
        for queue in queues:
            allowed: Command = RecordJob(job_id=uuid.uuid4(), kind="sync")
            if RecordJob not in exchange.commands:
                allowed = EndCreations(run_id=ID)
            *replies, last = await _send_commands(connection, exchange, queue, [*forged, allowed])
            for command, reply in zip(forged, replies, strict=True):
                assert isinstance(reply, Refused), (command, reply)
                assert reply.code == "INVALID_COMMAND"
                assert f"{command.type} may not be sent over the exchange '{exchange.name}'" in reply.message
            assert (last.type == "Recorded") == (queue == topology.ALLOCATOR_MAINTENANCE.name)

    async def are_all_dead_letters() -> bool:
        rows = await stack.database.fetch("SELECT DISTINCT unnest(commands) AS type FROM dead_letters")
        return {row["type"] for row in rows} >= {command.type for command in forged}

    await wait_until(are_all_dead_letters)
    assert await stack.stats() == before
    await stack.assert_sound()


async def test_a_replay_by_an_administrator_gives_a_forged_command_no_rights(
    stack_with_roles: Stack, servers_with_roles: Servers
) -> None:
    stack = stack_with_roles
    await stack.fill(1)
    async with await aio_pika.connect(servers_with_roles.amqp_url("gateway")) as connection:
        (reply,) = await _send_commands(
            connection, topology.COMMANDS, topology.ALLOCATOR_MAINTENANCE.name, [RecordDeletion(sandbox_id="1")]
        )
    assert isinstance(reply, Refused)

    async def is_dead_letter() -> bool:
        return bool(await stack.database.fetchval("SELECT count(*) = 1 FROM dead_letters"))

    await wait_until(is_dead_letter)
    dead_letter_id = await stack.database.fetchval("SELECT dead_letter_id FROM dead_letters")
    replayed = await stack.admin("POST", f"dead-letters/{dead_letter_id}/replay")
    assert (replayed.status_code, replayed.json()["detail"]["code"]) == (409, "NOT_REPLAYABLE")
    assert (await stack.admin("DELETE", f"dead-letters/{dead_letter_id}")).status_code == 200


async def _send_commands(
    connection: aio_pika.abc.AbstractConnection,
    exchange: topology.Exchange,
    queue: str,
    commands: Sequence[Command],
) -> Sequence[Reply]:
    """Send an envelope and return its replies. Its headers imitate dead-lettering from another exchange."""
    others = [sender.name for sender in SENDS.values() if sender is not exchange]
    headers: FieldTable = {
        "x-death": [
            {"queue": queue, "reason": "rejected", "count": 1, "exchange": other, "routing-keys": [queue]}
            for other in others
        ],
        "x-first-death-exchange": others[0],
    }
    replies: asyncio.Future[AbstractIncomingMessage] = asyncio.get_running_loop().create_future()

    async def store_reply(message: AbstractIncomingMessage) -> None:
        replies.set_result(message)

    async with connection.channel() as channel, asyncio.timeout(60):
        own = await channel.declare_queue(exclusive=True)
        await own.bind(topology.REPLIES.name, own.name)
        await own.consume(store_reply, no_ack=True)
        sender = await channel.get_exchange(exchange.name, ensure=False)
        envelope = aio_pika.Message(encode_commands(commands), reply_to=own.name, headers=headers)
        await sender.publish(envelope, queue)
        return ReplyEnvelope.model_validate_json((await replies).body).replies


@pytest.mark.parametrize("user", SENDS)
async def test_a_user_cannot_reach_other_exchanges_indirectly(servers_with_roles: Servers, user: str) -> None:
    url = servers_with_roles.amqp_url(user)
    connection = await aio_pika.connect(url)
    async with connection:
        for name in [*(exchange.name for exchange in topology.EXCHANGES), DEFAULT]:
            if name in PUBLISHES[user]:
                continue
            # Dead-lettering from its own queue to the exchange.
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.queue_declare(
                    exclusive=True,
                    arguments={
                        "x-dead-letter-exchange": name,
                        "x-dead-letter-routing-key": topology.ALLOCATOR_MAINTENANCE.name,
                    },
                )
            # A binding from an exchange with read permission to the exchange.
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.exchange_bind(name, topology.REPLIES.name, routing_key="key")
            # The exchange as the alternate exchange for unroutable messages.
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.exchange_declare("amq.gen-mine", arguments={"alternate-exchange": name})
        # Another user id in the message properties.
        channel = await open_channel(connection, confirms=True)
        with pytest.raises(ChannelPreconditionFailed):
            await channel.basic_publish(
                b"{}", exchange=SENDS[user].name, properties=Basic.Properties(user_id="allocator")
            )


@pytest.mark.parametrize("user", USERS)
async def test_a_user_cannot_change_the_topology(servers_with_roles: Servers, user: str) -> None:
    # The gateway may read events and write to the queues (for their lengths), so it could bind one to events.
    source = topology.DEAD_LETTERS if user == "gateway" else topology.EVENTS
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        for queue in topology.QUEUES:
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.queue_delete(queue.name)
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.queue_bind(queue.name, source.name, "#")
        for exchange in topology.EXCHANGES:
            channel = await open_channel(connection, confirms=False)
            with pytest.raises(ChannelAccessRefused):
                await channel.exchange_delete(exchange.name)
        channel = await open_channel(connection, confirms=False)
        with pytest.raises(ChannelAccessRefused):
            await channel.queue_declare("mine", durable=True)


@pytest.mark.parametrize("user", RECEIVES_REPLIES)
async def test_a_user_can_bind_its_queue_to_its_exchanges_only(servers_with_roles: Servers, user: str) -> None:
    allowed = {topology.REPLIES, topology.EVENTS} if user == "gateway" else {topology.REPLIES}
    connection = await aio_pika.connect(servers_with_roles.amqp_url(user))
    async with connection:
        channel = await open_channel(connection, confirms=False)
        own = (await channel.queue_declare(exclusive=True)).queue or ""
        for exchange in allowed:
            await channel.queue_bind(own, exchange.name, own)
        for exchange in topology.EXCHANGES:
            if exchange not in allowed:
                channel = await open_channel(connection, confirms=False)
                with pytest.raises(ChannelAccessRefused):
                    await channel.queue_bind(own, exchange.name, "#")


async def test_the_autoscaler_can_read_the_length_of_a_queue(servers_with_roles: Servers) -> None:
    connection = await aio_pika.connect(servers_with_roles.amqp_url("keda"))
    async with connection:
        channel = await open_channel(connection, confirms=False)
        declared = await channel.queue_declare(topology.ALLOCATOR_COMMANDS.name, passive=True)
        assert declared.message_count is not None
