"""Secrets in logs: at DEBUG level and during many failures, no service logs a token, a password or a JWT."""

import asyncio
from collections import Counter, defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from itertools import cycle
from urllib.parse import quote, urlsplit, urlunsplit

import asyncpg
import pytest

from devstack.conditions import wait_until
from devstack.postgres import PrivatePostgres
from devstack.rabbitmq import PrivateRabbitMQ
from sandbox_broker.migrate import migrate
from sandbox_broker.runtime.access_keys import AccessKeys
from tests.integration.stack import Stack, run_stack

TRACK = "track-9f2c61d0b7"
ADMIN = "admin-4e8a07c35d"
CSP = "csp-token-71b3e2f6aa"
DATABASE_PASSWORD = "database/b0d9 4417"
QUEUE_PASSWORD = "queue/e7716c0f"
NIOSXAAS_PASSWORD = 'niosxaas"55d0c2'
LOGIN_PASSWORD = 'login"9e01ab'
ACCESS_KEY = "c2FuZGJveC1icm9rZXItdGVzdC1rZXktMDEyMzQ1Njc="
STUDENT_PASSWORD = "Student-77c0!?"
UNKNOWN_TOKEN = "unknown-token-c81f"
JWT = "eyJhbGciOiJub25lIn0.eyJzdWIiOiJzZWNyZXQifQ.c2VjcmV0"
SECRETS = {
    TRACK,
    ADMIN,
    CSP,
    *(form for text in (DATABASE_PASSWORD, QUEUE_PASSWORD) for form in (text, quote(text, safe=""))),
    'niosxaas"55d0c2',
    'niosxaas\\"55d0c2',
    LOGIN_PASSWORD,
    'login\\"9e01ab',
    ACCESS_KEY,
    STUDENT_PASSWORD,
    UNKNOWN_TOKEN,
    "eyJhbGciOiJub25lIn0",
    "c2VjcmV0",
}


@asynccontextmanager
async def echoing_csp() -> AsyncIterator[str]:
    """Run a CSP whose responses contain the whole request, with its token and password, and a JWT.

    Most responses are errors. Each method has its own cycle of errors. Every deletion fails.
    """
    errors = ("500 Oops", "401 No", "429 Later")
    statuses = defaultdict(lambda: cycle((*errors, "200 Fine")), {"DELETE": cycle(errors)})

    async def respond(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        request = await reader.read(1 << 16)
        method = request.decode().partition(" ")[0]
        body = request + f"\nnew token: {JWT}\n".encode()
        head = f"HTTP/1.1 {next(statuses[method])}\r\nContent-Length: {len(body)}\r\nConnection: close\r\n\r\n"
        writer.write(head.encode() + body)
        with suppress(ConnectionError):
            await writer.drain()
        writer.close()

    server = await asyncio.start_server(respond, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def _with_credentials(url: str, user: str, password: str) -> str:
    parts = urlsplit(url)
    netloc = f"{user}:{quote(password, safe='')}@{parts.hostname}:{parts.port}"
    return urlunsplit(parts._replace(netloc=netloc))


@pytest.fixture(scope="module")
async def servers(server_programs: None) -> AsyncIterator[tuple[PrivatePostgres, PrivateRabbitMQ]]:
    async with PrivatePostgres() as postgres, PrivateRabbitMQ() as rabbitmq:
        administrator = await asyncpg.connect(postgres.url)
        await administrator.execute(f"CREATE ROLE broker SUPERUSER LOGIN PASSWORD '{DATABASE_PASSWORD}'")
        await administrator.close()
        await rabbitmq.run_rabbitmqctl("add_user", "broker", QUEUE_PASSWORD)
        await rabbitmq.run_rabbitmqctl("set_permissions", "broker", ".*", ".*", ".*")
        yield postgres, rabbitmq


async def test_no_log_line_contains_a_secret(servers: tuple[PrivatePostgres, PrivateRabbitMQ]) -> None:
    postgres, rabbitmq = servers
    database_url = _with_credentials(postgres.url, "broker", DATABASE_PASSWORD)
    await migrate(database_url)
    lines: list[str] = []
    async with echoing_csp() as csp:
        settings = {
            "LOG_LEVEL": "DEBUG",
            "BROKER_API_TOKEN": f"another-track-token, {TRACK}",
            "BROKER_ADMIN_TOKEN": ADMIN,
            "CSP_API_TOKEN": CSP,
            "CSP_BASE_URL": f"{csp}/v2",
            "NIOSXAAS_ENABLED": "true",
            "NIOSXAAS_BASE_URL": csp,
            "NIOSXAAS_EMAIL": "user@example.com",
            "NIOSXAAS_PASSWORD": NIOSXAAS_PASSWORD,
            "CSP_LOGIN_EMAIL": "administrator@example.com",
            "CSP_LOGIN_PASSWORD": LOGIN_PASSWORD,
            "ACCESS_KEYS": ACCESS_KEY,
            "ACCESS_EMAIL_DOMAIN": "labs.example.com",
            "CIRCUIT_BREAKER_TIMEOUT_SEC": "0.1",
            "STOCK_INTERVAL_SEC": "2",
            "DELETION_MAX_ATTEMPTS": "1000",
            "DELETION_BACKOFF_MAX_SEC": "0.5",
        }
        async with run_stack(
            database_url,
            _with_credentials(rabbitmq.url, "broker", QUEUE_PASSWORD),
            settings=settings,
            settings_of={module: {"LOG_FORMAT": "console"} for module in ("allocator", "csp_syncer")},
            on_line=lambda process, line: lines.append(f"{process} {line}"),
        ) as stack:
            with rabbitmq.log_in_errors():
                await _cause_failures(stack, postgres, rabbitmq, lines)
    assert [line for line in lines if any(secret in line for secret in SECRETS)] == []
    assert sum("***" in line for line in lines) > 3  # secrets were redacted, so the test is effective


async def _cause_failures(
    stack: Stack, postgres: PrivatePostgres, rabbitmq: PrivateRabbitMQ, lines: list[str]
) -> None:
    def assert_logged(event: str, number: int = 1) -> None:
        counts = Counter(event in line for line in lines)
        assert counts[True] >= number, event

    async def wait_for_log(event: str, number: int = 1) -> None:
        async def is_logged() -> bool:
            return sum(event in line for line in lines) >= number

        await wait_until(is_logged)

    async def send_request(method: str, path: str, token: str) -> int:
        headers = {"Authorization": f"Bearer {token}", "X-Instruqt-Sandbox-ID": "ada"}
        return (await stack.client.request(method, f"{stack.url}{path}", headers=headers)).status_code

    async def can_allocate() -> bool:
        return await send_request("POST", "/v1/allocate", TRACK) in (200, 201, 409)

    # Unknown, misplaced and malformed tokens.
    assert await send_request("POST", "/v1/allocate", UNKNOWN_TOKEN) == 401
    assert await send_request("POST", "/v1/allocate", JWT) == 401
    assert await send_request("GET", "/v1/admin/stats", TRACK) == 403
    assert await send_request("GET", f"/v1/sandboxes/{JWT}", TRACK) == 404
    assert await send_request("GET", f"/v1/{TRACK}/{quote(DATABASE_PASSWORD, safe='')}", TRACK) == 404
    await wait_until(can_allocate)

    # Responses of CSP with secrets: deletions, listings, services.
    await stack.database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status, deletion_requested_at, deletion_due_at) "
        "VALUES ('7', 'af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c3', 's', 'pending_deletion', now(), now())"
    )

    async def are_csp_failures_logged() -> bool:
        await send_request("POST", "/v1/admin/cleanup", ADMIN)
        await send_request("POST", "/v1/admin/sync", ADMIN)
        events = ("csp.delete_failed", "cleanup.unauthorized", "services.not_removed", "sync.refused")
        return all(any(event in line for line in lines) for event in events)

    await wait_until(are_csp_failures_logged)

    # Responses of CSP to the sign-in for a login inside a sandbox.
    await stack.database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status) "
        "VALUES ('8', 'af06cbf7-b07c-4c4f-bfa4-bd7dd0e2d4c8', 'l', 'allocated')"
    )
    await stack.database.execute(
        "INSERT INTO leases (sandbox_id, holder, expires_at) VALUES ('8', 'lovelace', now() + interval '1 hour')"
    )
    await stack.database.execute(
        "INSERT INTO accesses (sandbox_id, groups, password, password_key) VALUES ('8', '[\"user\"]', $1, 'key')",
        AccessKeys(ACCESS_KEY).encrypt(STUDENT_PASSWORD),
    )

    await wait_for_log("csp.login_failed", 2)

    # Internal errors, logged with a traceback.
    await stack.database.execute(
        "ALTER TABLE jobs RENAME TO hidden_jobs; ALTER TABLE leases RENAME TO hidden_leases"
    )
    assert await send_request("GET", f"/v1/admin/jobs/{'0' * 8}-0000-0000-0000-{'0' * 12}", ADMIN) == 500
    assert await send_request("POST", "/v1/allocate", TRACK) == 500
    await wait_for_log("request.failed")
    await wait_for_log("command.failed")
    await stack.database.execute(
        "ALTER TABLE hidden_jobs RENAME TO jobs; ALTER TABLE hidden_leases RENAME TO leases"
    )

    # Outages and refused passwords of the servers.
    await rabbitmq.run_rabbitmqctl("change_password", "broker", "changed")
    await rabbitmq.run_rabbitmqctl("close_all_connections", "the test")
    await wait_for_log("rabbitmq.disconnected", 8)
    await rabbitmq.sync_queue_metadata()
    await rabbitmq.kill()
    await wait_for_log("rabbitmq.disconnected", 16)
    await rabbitmq.start()
    await rabbitmq.run_rabbitmqctl("change_password", "broker", QUEUE_PASSWORD)
    await wait_until(can_allocate)
    await postgres.kill()
    await send_request("POST", "/v1/allocate", TRACK)
    await send_request("GET", "/v1/admin/stats", ADMIN)
    await wait_for_log("database.")
    await postgres.start()
    await wait_until(can_allocate)
    assert_logged("request.handled", 5)
