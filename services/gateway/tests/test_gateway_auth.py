"""Bearer tokens and roles."""

import asyncio
import sys
import uuid
from collections.abc import AsyncIterator
from textwrap import dedent

import asyncpg
import pytest

from devstack.testing import clear_tables

from .gateway_harness import (
    ADMIN,
    ADMIN_TOKEN,
    OTHER_TRACK_TOKEN,
    STUDENT,
    TRACK,
    TRACK_TOKEN,
    Gateway,
    client,
    create_app_without_servers,
    detail,
    raw,
    running,
)

TRACK_ROUTES = [
    ("POST", "/v1/allocate"),
    ("POST", "/v1/sandboxes/1/mark-for-deletion"),
    ("GET", "/v1/sandboxes/1"),
]
ADMIN_ROUTES = [
    ("GET", "/v1/admin/stats"),
    ("POST", "/v1/admin/sync"),
    ("GET", "/v1/admin/sync"),
    ("GET", "/v1/admin/leaks"),
    ("GET", "/v1/admin/waiting"),
    ("GET", "/v1/admin/status"),
    ("GET", "/v1/admin/dead-letters"),
    ("POST", f"/v1/admin/dead-letters/{uuid.UUID(int=7)}/replay"),
    ("DELETE", f"/v1/admin/dead-letters/{uuid.UUID(int=7)}"),
    ("POST", "/v1/admin/auto-delete-stale"),
    ("POST", "/v1/admin/bulk-delete?status=stale"),
]


@pytest.fixture(scope="module")
async def gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    database = await asyncpg.connect(database_url)
    await clear_tables(database)  # of rows from other tests, which the routes may not be able to read
    await database.close()
    async with running(amqp_url, database_url=database_url) as gateway:
        yield gateway


@pytest.mark.parametrize(("method", "path"), TRACK_ROUTES + ADMIN_ROUTES)
async def test_a_missing_token_is_401_with_an_instruction(gateway: Gateway, method: str, path: str) -> None:
    response = await gateway.client.request(method, path)
    assert response.status_code == 401
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert detail(response)["code"] == "UNAUTHORIZED"
    assert "Authorization: Bearer" in detail(response)["message"]


@pytest.mark.parametrize(
    "value",
    [
        b"",
        b"Bearer",
        b"Bearer ",
        b"Bearer  \t ",
        TRACK_TOKEN.encode(),
        b"Basic " + TRACK_TOKEN.encode(),
        b"Token " + TRACK_TOKEN.encode(),
        b"Bearer" + TRACK_TOKEN.encode(),
        b"Bearer unknown",
        b"Bearer " + TRACK_TOKEN.upper().encode(),
        b"Bearer " + TRACK_TOKEN[:-1].encode(),
        f"Bearer {TRACK_TOKEN}, {OTHER_TRACK_TOKEN}".encode(),
        f"Bearer {TRACK_TOKEN} {OTHER_TRACK_TOKEN}".encode(),
        "Bearer tökén".encode(),
        "Bearer tökén".encode("latin-1"),
        b"Bearer \xff\xfe\x00",
        b"Bearer " + b"x" * 10_000,
    ],
)
@pytest.mark.parametrize("path", ["/v1/allocate", "/v1/admin/sync"])
async def test_a_malformed_or_unknown_token_is_401(gateway: Gateway, path: str, value: bytes) -> None:
    response = await gateway.client.post(path, headers=raw({"Authorization": value, "X-Instruqt-Sandbox-ID": "s"}))
    assert (response.status_code, detail(response)["code"]) == (401, "UNAUTHORIZED")
    assert response.headers["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("second", [b"Bearer unknown", b"", b"Bearer " + ADMIN_TOKEN.encode()])
@pytest.mark.parametrize(("method", "path"), TRACK_ROUTES + ADMIN_ROUTES)
async def test_two_tokens_count_as_none(gateway: Gateway, method: str, path: str, second: bytes) -> None:
    for tokens in ([*raw(ADMIN), (b"authorization", second)], [(b"authorization", second), *raw(ADMIN)]):
        headers = [*tokens, (b"x-instruqt-sandbox-id", b"s")]
        response = await gateway.client.request(method, path, headers=headers)
        assert (response.status_code, detail(response)["code"]) == (401, "UNAUTHORIZED")


@pytest.mark.parametrize("token", [TRACK_TOKEN, OTHER_TRACK_TOKEN, ADMIN_TOKEN])
@pytest.mark.parametrize("scheme", ["Bearer", "bearer", "BEARER"])
async def test_every_listed_token_works_on_track_routes(gateway: Gateway, scheme: str, token: str) -> None:
    assert (await gateway.allocate(Authorization=f"{scheme} {token}")).status_code == 201


@pytest.mark.parametrize(("method", "path"), ADMIN_ROUTES)
async def test_a_track_token_on_an_admin_route_is_403(gateway: Gateway, method: str, path: str) -> None:
    response = await gateway.client.request(method, path, headers=TRACK)
    assert (response.status_code, detail(response)["code"]) == (403, "FORBIDDEN")
    assert (await gateway.client.request(method, path, headers=ADMIN)).status_code == 200


async def test_tokens_are_compared_as_utf_8_bytes() -> None:
    app = create_app_without_servers(broker_api_token="schlüsselbund-à,plain-enough")
    async with client(app) as http:

        async def status(value: bytes) -> int:
            headers = raw({"Authorization": b"Bearer " + value, "X-Instruqt-Sandbox-ID": "s"})
            return (await http.post("/v1/allocate", headers=headers)).status_code

        assert await status("schlüsselbund-à".encode()) == 503  # a known token, but no allocator
        assert await status("schlüsselbund-à".encode("latin-1")) == 401
        assert await status("schlüsselbund-".encode()) == 401


@pytest.mark.parametrize(
    "headers",
    [{}, {"X-Instruqt-Sandbox-ID": ""}, {"X-Instruqt-Sandbox-ID": "x" * 500}, {"X-Track-ID": "ü".encode()}],
)
@pytest.mark.parametrize(("method", "path"), TRACK_ROUTES)
async def test_the_token_is_checked_before_any_other_header(
    gateway: Gateway, method: str, path: str, headers: dict[str, str | bytes]
) -> None:
    without = await gateway.client.request(method, path, headers=raw(headers))
    assert without.status_code == 401
    wrong = await gateway.client.request(method, path, headers=raw({**headers, "Authorization": "Bearer wrong"}))
    assert wrong.status_code == 401
    right = await gateway.client.request(method, path, headers=raw({**headers, **TRACK}))
    assert right.status_code == 400


async def test_the_token_is_checked_before_query_parameters(gateway: Gateway) -> None:
    assert (await gateway.client.post("/v1/admin/sync?force=perhaps")).status_code == 401
    assert (await gateway.client.post("/v1/admin/sync?force=perhaps", headers=TRACK)).status_code == 403
    assert (await gateway.client.post("/v1/admin/sync?force=perhaps", headers=ADMIN)).status_code == 400


async def test_no_response_contains_the_token(gateway: Gateway) -> None:
    secret = "a-secret-token"
    for method, path in [*TRACK_ROUTES, *ADMIN_ROUTES, ("GET", "/nope"), ("PUT", "/v1/allocate")]:
        response = await gateway.client.request(
            method, path, headers={**STUDENT, "Authorization": f"Bearer {secret}"}
        )
        assert secret not in response.text + str(response.headers)


async def test_no_token_is_logged_even_in_a_traceback() -> None:
    program = """
        import asyncio, httpx
        from gateway.main import create_app
        from gateway.routes import track
        from gateway.settings import Settings
        from sandbox_broker.observability import logging
        from starlette.types import Scope

        settings = Settings(
            _env_file=None,
            amqp_url="amqp://guest:amqp-secret@127.0.0.1:1/",
            database_url="postgresql://user:database-secret@127.0.0.1:1/x",
            broker_api_token="track-secret",
            broker_admin_token="admin-secret",
        )
        logging.configure(settings, "gateway")

        async def crash(scope: Scope, *_: object, **__: object) -> None:
            token = dict(scope["headers"])[b"authorization"]
            raise RuntimeError("something broke")

        track.request_allocator = crash

        async def main() -> None:
            app = create_app(settings)
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://gateway") as client:
                for token in ("track-secret", "admin-secret", "client-secret"):
                    headers = {"Authorization": f"Bearer {token}", "X-Instruqt-Sandbox-ID": "student-1"}
                    response = await client.post("/v1/allocate", headers=headers)
                    print(response.status_code, response.text)

        asyncio.run(main())
    """
    # Asynchronous, so that the connections of other gateways in this process keep their heartbeats.
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", dedent(program), stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
    )
    output = (await process.communicate())[0].decode()
    assert process.returncode == 0
    assert "RuntimeError" in output
    assert "request.handled" in output
    assert "secret" not in output
