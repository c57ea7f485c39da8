"""Named tokens: every route with every role, issue, revocation on several gateways, and timing of a wrong token."""

import asyncio
import hashlib
import hmac
import random
import secrets
import statistics
import time
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import asyncpg
import pytest
from pydantic import SecretStr

from devstack.conditions import wait_until
from gateway.api import role_table
from gateway.web import named_tokens, roles
from gateway.web.auth import Auth
from gateway.web.client_address import UNKNOWN
from gateway.web.named_tokens import NamedToken, NamedTokens
from sandbox_broker.contract.commands import AllocateSandbox, EndLease, IssueToken, RecordJob, RecordTokenUses
from sandbox_broker.contract.tokens import Role, Sender

from .gateway_harness import (
    ADMIN,
    STUDENT,
    TRACK,
    Gateway,
    client,
    create_app_without_servers,
    detail,
    running,
)

PATH = "/v1/admin/tokens"
PLACEHOLDERS = {
    "{sandbox_id}": "1",
    "{name}": "lab",
    "{dead_letter_id}": str(secrets.token_hex(4)),
    "{job_id}": "1",
}
ROLES = ("track", "viewer", "operator", "admin")


@pytest.fixture
async def database(clean_database: str) -> AsyncIterator[asyncpg.Connection]:
    connection = await asyncpg.connect(clean_database)
    yield connection
    await connection.close()


@pytest.fixture
async def gateway(amqp_url: str, clean_database: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=clean_database, admin_wait_sec=5) as gateway:
        yield gateway


async def insert_token(
    database: asyncpg.Connection, name: str, role: str = "track", *, pepper: bytes = b"", **fields: Any
) -> dict[str, str]:
    """Insert a named token; return its header."""
    key_id = secrets.token_hex(8)
    token = f"sbt_{key_id}_{secrets.token_urlsafe(32)}"
    columns = {
        "key_id": key_id,
        "name": name,
        "role": role,
        "token_hash": hmac.digest(pepper, token.encode(), "sha256"),
        "pepper_id": hashlib.sha256(pepper).hexdigest()[:8] if pepper else None,
        **fields,
    }
    parameters = ", ".join(f"${number}" for number in range(1, len(columns) + 1))
    await database.execute(f"INSERT INTO tokens ({', '.join(columns)}) VALUES ({parameters})", *columns.values())
    await database.execute("UPDATE policy_set SET version = version + 1")
    return {"Authorization": f"Bearer {token}"}


def fill(path: str) -> str:
    for placeholder, value in PLACEHOLDERS.items():
        path = path.replace(placeholder, value)
    return path


DOCUMENT = create_app_without_servers().openapi()
ROUTES = list(role_table.list_routes(DOCUMENT))


@pytest.mark.parametrize("role", ROLES)
async def test_every_route_accepts_exactly_the_roles_of_its_table(
    gateway: Gateway, database: asyncpg.Connection, role: Role, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A stream of events would not end.
    monkeypatch.setattr(gateway.app.state.context.event_feed, "_max_streams", 0)
    headers = await insert_token(database, role, role)
    assert len(ROUTES) > 30
    for method, path in ROUTES:
        is_permitted = role in role_table.permitted_roles(method, path)
        response = await gateway.client.request(method, fill(path), headers=headers)
        is_forbidden = response.status_code == 403 and detail(response)["code"] == "FORBIDDEN"
        assert is_forbidden is not is_permitted, (method, path, response.status_code, response.text)


def test_the_roles_of_routes_with_an_exception_exist() -> None:
    assert set(roles._EXCEPTIONS) <= set(ROUTES)


@pytest.mark.parametrize(
    ("method", "path", "permitted"),
    [
        ("POST", "/v1/allocate", ("track", "admin")),
        ("GET", "/v1/admin/stats", ("viewer", "operator", "admin")),
        ("GET", "/v1/admin/policies", ("viewer", "operator", "admin")),
        ("PUT", "/v1/admin/policies", ("admin",)),
        ("POST", "/v1/admin/sync", ("operator", "admin")),
        ("DELETE", "/v1/admin/dead-letters/{dead_letter_id}", ("operator", "admin")),
        ("GET", "/v1/admin/audit", ("operator", "admin")),
        ("GET", "/v1/admin/tokens", ("admin",)),
        ("POST", "/v1/admin/a-new-route", ("operator", "admin")),
    ],
)
def test_the_table_has_the_roles_of_the_contract(method: str, path: str, permitted: tuple[str, ...]) -> None:
    assert role_table.permitted_roles(method, path) == permitted


def test_the_security_page_has_the_table_of_roles() -> None:
    page = Path("docs/security.md").read_text()
    assert role_table.replace_table(page, role_table.build_table(DOCUMENT)) == page, "run make docs"


async def test_a_token_is_issued_without_its_secret_in_the_command(gateway: Gateway) -> None:
    body = {"name": "lab", "role": "track", "tracks": ["lab-a"], "max_active": 5}
    response = await gateway.client.post(f"{PATH}?reason=new+lab", headers=ADMIN, json=body)
    assert response.status_code == 201, response.text
    answer = response.json()
    assert (answer["name"], answer["role"]) == ("lab", "track")
    command = next(command for command in gateway.maintenance.commands if isinstance(command, IssueToken))
    assert command.grant.tracks == ("lab-a",)
    assert command.token_hash == hmac.digest(b"", answer["token"].encode(), "sha256").hex()
    assert answer["token"] not in command.model_dump_json()
    assert command.sender == Sender(actor="$BROKER_ADMIN_TOKEN", address="127.0.0.1", reason="new lab")


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"role": "track"}, "name"),
        ({"name": "a b", "role": "track"}, "name"),
        ({"name": "a", "role": "root"}, "role"),
        ({"name": "a", "role": "viewer", "max_active": 1}, "body"),
        ({"name": "a", "role": "track", "max_active": -1}, "max_active"),
        ({"name": "a", "role": "track", "track": ["x"]}, "track"),
    ],
)
async def test_an_invalid_token_is_refused_with_its_field(gateway: Gateway, body: Any, field: str) -> None:
    response = await gateway.client.post(PATH, headers=ADMIN, json=body)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")
    assert [problem["field"] for problem in detail(response)["fields"]] == [field]


async def test_tokens_are_listed_without_secrets(gateway: Gateway, database: asyncpg.Connection) -> None:
    await insert_token(database, "b", tracks=["lab"], max_rate=3)
    headers = await insert_token(database, "a", "viewer")
    token = headers["Authorization"].removeprefix("Bearer ")
    await database.execute("UPDATE tokens SET revoked_at = now() WHERE name = 'c'")
    response = await gateway.client.get(PATH, headers=ADMIN)
    listed = response.json()["tokens"]
    assert [(entry["name"], entry["role"], entry["tracks"], entry["max_rate"]) for entry in listed] == [
        ("a", "viewer", [], None),
        ("b", "track", ["lab"], 3),
    ]
    assert "hash" not in response.text
    assert token not in response.text


async def test_a_student_with_a_named_token_is_identified(gateway: Gateway, database: asyncpg.Connection) -> None:
    headers = await insert_token(database, "lab")
    key_id = headers["Authorization"].split("_")[1]
    secret = "s" * 16
    response = await gateway.client.post("/v1/allocate", headers={**STUDENT, **headers, "X-Lease-Secret": secret})
    assert response.status_code == 201
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert command.sender == Sender(actor="lab", key_id=key_id, address="127.0.0.1")
    assert command.secret_hash == hashlib.sha256(secret.encode()).hexdigest()


async def test_a_token_of_a_setting_sends_no_sender(gateway: Gateway) -> None:
    assert (await gateway.allocate()).status_code == 201
    (command,) = gateway.allocator.commands
    assert isinstance(command, AllocateSandbox)
    assert (command.sender, command.secret_hash) == (None, None)


@pytest.mark.parametrize("secret", ["short", "x" * 129, "ü" * 16])
async def test_an_invalid_lease_secret_is_refused(gateway: Gateway, secret: str) -> None:
    response = await gateway.allocate(X_Lease_Secret=secret.encode())
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_HEADER")
    assert secret not in response.text


async def test_commands_of_administrators_carry_who_why_and_from_where(
    gateway: Gateway, database: asyncpg.Connection
) -> None:
    headers = await insert_token(database, "night-shift", "operator")
    await gateway.client.post("/v1/admin/sandboxes/1/release?reason=class+over", headers=headers)
    await gateway.client.post("/v1/admin/sync?reason=new+accounts", headers=headers)
    senders = [
        (type(command), command.sender.actor, command.sender.reason, command.sender.address)
        for command in gateway.maintenance.commands
        if isinstance(command, EndLease | RecordJob) and command.sender is not None
    ]
    assert senders == [
        (EndLease, "night-shift", "class over", "127.0.0.1"),
        (RecordJob, "night-shift", "new accounts", "127.0.0.1"),
    ]
    response = await gateway.client.post(f"/v1/admin/sync?reason={'x' * 501}", headers=headers)
    assert (response.status_code, detail(response)["code"]) == (400, "INVALID_REQUEST")


async def test_every_gateway_refuses_a_revoked_token_within_5_s(
    amqp_url: str, clean_database: str, database: asyncpg.Connection
) -> None:
    async with AsyncExitStack() as stack:
        gateways = [
            await stack.enter_async_context(running(amqp_url, database_url=clean_database, far_sides=False))
            for _ in range(3)
        ]
        headers = await insert_token(database, "night-shift", "viewer")

        async def statuses() -> list[int]:
            answers = [gateway.client.get("/v1/admin/stats", headers=headers) for gateway in gateways]
            return [response.status_code for response in await asyncio.gather(*answers)]

        assert await statuses() == [200] * 3  # a new token works at once, on every gateway
        for column in ("suspended_at", "revoked_at"):
            await database.execute(f"UPDATE tokens SET {column} = now()")
            await database.execute("UPDATE policy_set SET version = version + 1")
            changed_at = time.monotonic()
            accepted_after_sec = 0.0  # the latest accepted request

            async def are_all_refused() -> bool:
                nonlocal accepted_after_sec
                sent_after_sec = time.monotonic() - changed_at  # noqa: B023 (called in this pass of the loop only)
                answers = await statuses()
                if 200 in answers:
                    accepted_after_sec = sent_after_sec
                return answers == [401] * 3

            await wait_until(are_all_refused)
            assert accepted_after_sec < 5
            if column == "suspended_at":
                await database.execute("UPDATE tokens SET suspended_at = NULL")
                await database.execute("UPDATE policy_set SET version = version + 1")
                assert await statuses() == [200] * 3


async def test_an_expired_token_is_unknown(gateway: Gateway, database: asyncpg.Connection) -> None:
    headers = await insert_token(database, "old", "viewer")
    assert (await gateway.client.get("/v1/admin/stats", headers=headers)).status_code == 200
    await database.execute("UPDATE tokens SET expires_at = now()")
    await database.execute("UPDATE policy_set SET version = version + 1")
    await gateway.app.state.context.tokens.refresh()
    response = await gateway.client.get("/v1/admin/stats", headers=headers)
    assert (response.status_code, detail(response)["code"]) == (401, "UNAUTHORIZED")


async def test_a_pepper_can_be_replaced(amqp_url: str, clean_database: str, database: asyncpg.Connection) -> None:
    old, new, other = (character * 24 for character in "onx")
    tokens = [
        await insert_token(database, key or "none", "viewer", pepper=key.encode()) for key in ("", old, other)
    ]
    async with running(
        amqp_url, database_url=clean_database, far_sides=False, token_pepper=f"{new},{old}"
    ) as gateway:
        answers = [await gateway.client.get("/v1/admin/stats", headers=headers) for headers in tokens]
        assert [response.status_code for response in answers] == [200, 200, 401]
        issued = gateway.app.state.context.tokens.generate()
        assert issued.token_hash == hmac.digest(new.encode(), issued.token.encode(), "sha256").hex()


async def test_without_the_database_a_named_token_is_not_called_unknown() -> None:
    token = f"sbt_{'0' * 16}_{'x' * 43}"
    async with client(create_app_without_servers()) as http:
        for method, path in (("GET", "/v1/admin/stats"), ("POST", "/v1/allocate")):
            response = await http.request(method, path, headers={**STUDENT, "Authorization": f"Bearer {token}"})
            assert (response.status_code, detail(response)["code"]) == (503, "DATABASE_UNAVAILABLE")


async def test_uses_are_recorded_once_a_minute(
    gateway: Gateway, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    headers = await insert_token(database, "lab", "viewer")
    key_id = headers["Authorization"].split("_")[1]
    tokens: NamedTokens = gateway.app.state.context.tokens
    monkeypatch.setattr(named_tokens, "RECORD_USES_SEC", 0)
    recording = asyncio.create_task(tokens.record_uses())
    for _ in range(3):
        await gateway.client.get("/v1/admin/stats", headers=headers)
    await wait_until(lambda: any(isinstance(command, RecordTokenUses) for command in gateway.maintenance.commands))
    recording.cancel()
    (uses, *_) = [command for command in gateway.maintenance.commands if isinstance(command, RecordTokenUses)]
    assert set(uses.uses) == {key_id}
    assert uses.uses[key_id] % 60 == 0


@pytest.mark.parametrize("headers", [{}, TRACK])
async def test_the_audit_is_not_for_students(gateway: Gateway, headers: dict[str, str]) -> None:
    assert (await gateway.client.get("/v1/admin/audit", headers=headers)).status_code in (401, 403)


async def test_audit_pages_are_filtered_and_newest_first(gateway: Gateway, database: asyncpg.Connection) -> None:
    for number in range(5):
        await database.execute(
            "INSERT INTO audit (actor, action, object, reason, request_id, address, outcome) "
            "VALUES ($1, 'lease.release', $2, 'why', 'r', '192.0.2.1', 'done')",
            f"actor-{number % 2}",
            str(number),
        )

    async def objects(**filters: str) -> tuple[list[str], str | None]:
        response = await gateway.client.get("/v1/admin/audit", headers=ADMIN, params=filters)
        assert response.status_code == 200, response.text
        body = response.json()
        assert body["count"] == len(body["entries"])
        return [entry["object"] for entry in body["entries"]], body["cursor"]

    assert await objects() == (["4", "3", "2", "1", "0"], None)
    first, cursor = await objects(actor="actor-0", limit="2")
    assert first == ["4", "2"]
    assert cursor is not None
    assert await objects(actor="actor-0", limit="2", cursor=cursor) == (["0"], None)
    assert (await objects(object="3"))[0] == ["3"]
    assert (await objects(action="token.create"))[0] == []
    assert (await objects(until="1"))[0] == []
    wrong = await gateway.client.get("/v1/admin/audit", headers=ADMIN, params={"cursor": cursor})
    assert detail(wrong)["code"] == "INVALID_CURSOR"


class Secret(bytes):
    """Bytes that only hmac.compare_digest may compare."""

    __hash__ = bytes.__hash__

    def __eq__(self, other: object) -> bool:
        raise AssertionError("compared by ==, which stops at the first difference")


KEY_ID = "0" * 16
RIGHT = f"sbt_{KEY_ID}_{'a' * 43}".encode()
WRONG = {
    "last": RIGHT[:-1] + b"b",
    "first": f"sbt_{KEY_ID}_{'b' * 43}".encode(),
    "key": f"sbt_{'1' * 16}_{'a' * 43}".encode(),
    "same": RIGHT[:-1] + b"c",
}
"""Wrong tokens: in the last characters, in all characters of the secret, in the key id, in the last one again."""


def one_token() -> NamedTokens:
    """Return the copy of a gateway that knows only RIGHT."""
    tokens = NamedTokens(None, None, SecretStr(""))  # type: ignore[arg-type]
    token_hash = Secret(hmac.digest(b"", RIGHT, "sha256"))
    tokens._tokens = {KEY_ID.encode(): NamedToken(KEY_ID, "lab", "track", False, None, token_hash, None)}
    return tokens


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> list[tuple[bytes, bytes]]:
    """Arguments of the calls of hmac.compare_digest."""
    calls: list[tuple[bytes, bytes]] = []
    compare = hmac.compare_digest

    def record(left: bytes, right: bytes) -> bool:
        calls.append((bytes(left), bytes(right)))
        return compare(left, right)

    monkeypatch.setattr(hmac, "compare_digest", record)
    return calls


@pytest.mark.parametrize("kind", WRONG)
def test_a_wrong_token_is_compared_once_by_its_hash(compared: list[tuple[bytes, bytes]], kind: str) -> None:
    """A comparison of hashes reveals nothing about the beginning of the token."""
    tokens = one_token()
    assert tokens.find(WRONG[kind]) is None
    stored = bytes(32) if kind == "key" else hmac.digest(b"", RIGHT, "sha256")
    assert compared == [(hmac.digest(b"", WRONG[kind], "sha256"), stored)]
    assert tokens.find(RIGHT) is not None


@pytest.mark.parametrize("token", [b"b" * 24, b"a" * 23 + b"b", b"c" * 24, b"a" * 24])
async def test_a_token_is_compared_in_constant_time_with_every_token_of_the_settings(
    compared: list[tuple[bytes, bytes]], token: bytes
) -> None:
    known = [b"admin" * 5, b"a" * 24, b"c" * 24]
    auth = Auth(SecretStr(f"{'a' * 24},{'c' * 24}"), SecretStr("admin" * 5), None, lambda _: UNKNOWN, one_token())
    auth._tokens = [Secret(secret) for secret in known]
    header = b"Bearer " + token
    caller = await auth.identify([(b"authorization", header)], {b"authorization": header})
    assert caller.role == ("track" if token in known else "unknown")
    assert compared == [(secret, token) for secret in known]


def test_the_time_for_a_wrong_token_does_not_depend_on_its_beginning() -> None:
    """Compare medians of interleaved calls. They differ by 2 % on a busy machine. A look-up that hashes no token
    with an unknown key id makes them differ by a factor of 5. The tests above cover smaller differences."""
    tokens = one_token()
    times: dict[str, list[int]] = {name: [] for name in WRONG}
    names = list(WRONG)
    for _ in range(3000):
        random.shuffle(names)
        for name in names:
            started = time.perf_counter_ns()
            tokens.find(WRONG[name])
            times[name].append(time.perf_counter_ns() - started)
    medians = {name: statistics.median(values) for name, values in times.items()}
    # All kinds share the pauses of a busy machine.
    assert max(medians.values()) < 2 * min(medians.values()), medians


async def test_a_lease_is_read_only_with_its_token_and_its_secret(
    gateway: Gateway, database: asyncpg.Connection, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = "the secret of student-1"
    await database.execute(
        "INSERT INTO sandboxes (sandbox_id, external_id, name, status) VALUES ('7', 'u-7', 'lab-7', 'allocated')"
    )
    await database.execute(
        "INSERT INTO leases (sandbox_id, holder, expires_at, token, secret_hash) "
        "VALUES ('7', 'student-1', now(), 'a', $1)",
        hashlib.sha256(secret.encode()).digest(),
    )
    own = await insert_token(database, "a", tracks=["a"])
    other = await insert_token(database, "b", tracks=["b"])

    async def read(headers: dict[str, str], **more: str) -> str:
        sent = {**STUDENT, **headers, **{name.replace("_", "-"): value for name, value in more.items()}}
        response = await gateway.client.get("/v1/sandboxes/7", headers=sent)
        if response.status_code == 403:
            assert "lab-7" not in response.text
        return "200" if response.status_code == 200 else str(detail(response)["code"])

    assert await read(own, X_Lease_Secret=secret) == "200"
    assert await read(own) == "NOT_SANDBOX_OWNER"
    assert await read(own, X_Lease_Secret=secret[:-1] + "2") == "NOT_SANDBOX_OWNER"
    assert await read(other, X_Lease_Secret=secret) == "FORBIDDEN_SCOPE"
    assert await read(TRACK, X_Lease_Secret=secret) == "200"
    # The gateway has not read the tokens for so long that it may miss a revocation.
    monkeypatch.setattr(NamedTokens, "is_fresh", False)
    assert await read(own, X_Lease_Secret=secret) == "DATABASE_UNAVAILABLE"
    assert await read(TRACK, X_Lease_Secret=secret) == "200"
