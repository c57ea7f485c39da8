"""Whatever is provoked, at the level that says most: no token, no password and no JWT is in any line of any
service."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import pytest

from devstack.postgres import PrivatePostgres
from devstack.rabbitmq import PrivateRabbitMQ
from sandbox_broker.migrate import migrate
from tests.integration.stack import Stack, eventually, running

TRACK = "track-9f2c61d0b7"
ADMINISTRATION = "admin-4e8a07c35d"
CSP = "csp-token-71b3e2f6aa"
DATABASE_PASSWORD = "database/b0d9 4417"
QUEUE_PASSWORD = "queue/e7716c0f"
NIOSXAAS_PASSWORD = 'niosxaas"55d0c2'
STRANGERS = "somebodys-token-c81f"
JWT = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJzZWNyZXQifQ.c2VjcmV0"
SECRETS = {
    TRACK,
    ADMINISTRATION,
    CSP,
    *(form for text in (DATABASE_PASSWORD, QUEUE_PASSWORD) for form in (text, quote(text, safe=""))),
    'niosxaas"55d0c2',
    'niosxaas\\"55d0c2',
    STRANGERS,
    "eyJhbGciOiJub25lIn0",
    "c2VjcmV0",
}


@asynccontextmanager
async def talkative_csp() -> AsyncIterator[str]:
    """Answers every call with all that it was sent, token and password included, and a JWT; mostly as an error.
    Each method meets every kind of error, whatever other calls come between, and nothing is ever deleted."""
    errors = ("500 Oops", "401 No", "429 Later")
    statuses = defaultdict(lambda: cycle((*errors, "200 Fine")), {"DELETE": cycle(errors)})

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        asked = await reader.read(1 << 16)
        method = asked.decode().partition(" ")[0]
        body = asked + f"\nyour new one: {JWT}\n".encode()
        head = f"HTTP/1.1 {next(statuses[method])}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _as(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    netloc = f"{user}:{quote(password, safe='')}@{parts.hostname}:{parts.port}"
    return urlunsplit(parts._replace(netloc=netloc))


@pytest.fixture(scope="module")
async def servers() -> AsyncIterator[tuple[PrivatePostgres, PrivateRabbitMQ]]:
    async with PrivatePostgres() as postgres, PrivateRabbitMQ() as rabbitmq:
        administrator = await asyncpg.connect(postgres.url)
        await administrator.execute(f"CREATE ROLE broker SUPERUSER LOGIN PASSWORD '{DATABASE_PASSWORD}'")
        await administrator.close()
        await rabbitmq.run_rabbitmqctl("add_user", "broker", QUEUE_PASSWORD)
        await rabbitmq.run_rabbitmqctl("set_permissions", "broker", ".*", ".*", ".*")
        yield postgres, rabbitmq


async def test_no_secret_is_in_any_line_whatever_happens(servers: tuple[PrivatePostgres, PrivateRabbitMQ]) -> None:
    postgres, rabbitmq = servers
    database_url = _as(postgres.url, "broker", DATABASE_PASSWORD)
    await migrate(database_url)
    lines: list[str] = []
    async with talkative_csp() as csp:
        settings = {
            "LOG_LEVEL": "DEBUG",
            "BROKER_API_TOKEN": f"another-track-token, {TRACK}",
            "BROKER_ADMIN_TOKEN": ADMINISTRATION,
            "CSP_API_TOKEN": CSP,
            "CSP_BASE_URL": f"{csp}/v2",
            "NIOSXAAS_ENABLED": "true",
            "NIOSXAAS_BASE_URL": csp,
            "NIOSXAAS_EMAIL": "somebody@example.com",
            "NIOSXAAS_PASSWORD": NIOSXAAS_PASSWORD,
            "CIRCUIT_BREAKER_TIMEOUT_SEC": "0.1",
            "DELETION_MAX_ATTEMPTS": "1000",
            "DELETION_BACKOFF_MAX_SEC": "0.5",
        }
        async with running(
            database_url,
            _as(rabbitmq.url, "broker", QUEUE_PASSWORD),
            settings=settings,
            settings_of={module: {"LOG_FORMAT": "console"} for module in ("allocator", "csp_syncer")},
            on_line=lambda process, line: lines.append(f"{process} {line}"),
        ) as stack:
            await _provoke(stack, postgres, rabbitmq, lines)
    found = [line for line in lines if any(secret in line for secret in SECRETS)]
    assert found == []
    assert sum("***" in line for line in lines) > 3  # the test is worth something: there was something to hide


async def _provoke(stack: Stack, postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ, lines: list[str]) -> None:
    def told(event: str, number: int = 1) -> None:
        seen = Counter(event in line for line in lines)
        assert seen[True] >= number, event

    async def until_told(event: str, number: int = 1) -> None:
        async def is_told() -> bool:
            return sum(event in line for line in lines) >= number

        await eventually(is_told)

    async def ask(method: str, path: str, token: str) -> int:
        given = {"Authorization": f"Bearer {token}", "X-Instruqt-Sandbox-ID": "ada"}
        return (await stack.client.request(method, f"{stack.url}{path}", headers=given)).status_code

    async def works() -> bool:
        return await ask("POST", "/v1/allocate", TRACK) in (200, 201, 409)

    # Tokens that are wrong, misplaced or malformed.
    assert await ask("POST", "/v1/allocate", STRANGERS) == 401
    assert await ask("POST", "/v1/allocate", JWT) == 401
    assert await ask("GET", "/v1/admin/stats", TRACK) == 403
    assert await ask("GET", f"/v1/sandboxes/{JWT}", TRACK) == 404
    assert await ask("GET", f"/v1/{TRACK}/{quote(DATABASE_PASSWORD, safe='')}", TRACK) == 404
    await eventually(works)

    # CSP that answers with what it was told, for deletions, for listings, for services.
    await stack.database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status, deletion_requested_at, deletion_due_at) "
        "VALUES ('7', 'af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3', 's', 'pending_deletion', now(), now())"
    )

    async def csp_was_asked() -> bool:
        await ask("POST", "/v1/admin/cleanup", ADMINISTRATION)
        await ask("POST", "/v1/admin/sync", ADMINISTRATION)
        asked = ("csp.delete_failed", "cleanup.unauthorized", "services.not_removed", "sync.refused")
        return all(any(event in line for line in lines) for event in asked)

    await eventually(csp_was_asked)

    # CrashPoints of ours, with all of the traceback.
    await stack.database.execute(
        "ALTER TABLE jobs RENAME TO hidden_jobs; ALTER TABLE leases RENAME TO hidden_leases"
    )
    assert await ask("GET", f"/v1/admin/jobs/{'0' * 8}-0000-0000-0000-{'0' * 12}", ADMINISTRATION) == 500
    assert await ask("POST", "/v1/allocate", TRACK) == 500
    await until_told("request.failed")
    await until_told("command.failed")
    await stack.database.execute(
        "ALTER TABLE hidden_jobs RENAME TO jobs; ALTER TABLE hidden_leases RENAME TO leases"
    )

    # Servers that go, refuse the password, and come back.
    await rabbitmq.run_rabbitmqctl("change_password", "broker", "changed")
    await rabbitmq.run_rabbitmqctl("close_all_connections", "the test")
    await until_told("rabbitmq.disconnected", 8)
    await rabbitmq.kill()
    await until_told("rabbitmq.disconnected", 16)
    await rabbitmq.start()
    await rabbitmq.run_rabbitmqctl("change_password", "broker", QUEUE_PASSWORD)
    await eventually(works)
    await postgres.kill()
    await ask("POST", "/v1/allocate", TRACK)
    await ask("GET", "/v1/admin/stats", ADMINISTRATION)
    await until_told("database.")
    await postgres.start()
    await eventually(works)
    told("request.handled", 5)
