"""Common parts of all responses: request id, security headers, error body, metrics and log."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import StreamingResponse
from structlog.testing import capture_logs

from csp_simulator.testing import serving
from gateway.routes import track

from .gateway_harness import (
    ADMIN,
    STUDENT,
    TRACK,
    Gateway,
    client,
    create_app_without_servers,
    detail,
    raw,
    running,
    sample,
)

UUID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
LIMIT = 64 * 1024

# Method, path, headers, expected status.
REQUESTS: list[tuple[str, str, dict[str, str], int]] = [
    ("POST", "/v1/allocate", STUDENT, 201),
    ("POST", "/v1/sandboxes/1/mark-for-deletion", STUDENT, 200),
    ("GET", "/v1/sandboxes/unknown", STUDENT, 404),
    ("GET", "/v1/admin/stats", ADMIN, 200),
    ("GET", "/v1/admin/stats", TRACK, 403),
    ("POST", "/v1/admin/sync?force=perhaps", ADMIN, 400),
    ("POST", "/v1/allocate", {}, 401),
    ("POST", "/v1/allocate", TRACK, 400),
    ("GET", "/v1/docs", {}, 200),
    ("GET", "/v1/openapi.json", {}, 200),
    ("GET", "/v1/docs/assets/swagger-ui.css", {"Range": "bytes=99999999-"}, 200),
    ("GET", "/v1/docs/assets/../main.py", {}, 404),
    ("GET", "/v1/docs/assets/", {}, 404),
    ("GET", "/healthz", {}, 200),
    ("GET", "/readyz", {}, 200),
    ("GET", "/metrics", {}, 200),
    ("GET", "/", {}, 404),
    ("GET", "/v1", {}, 404),
    ("GET", "/nope?x=1", {}, 404),
    ("GET", "/nope", {"Host": "["}, 404),
    ("GET", "/v1/admin/nope", ADMIN, 404),
    ("GET", "/v1/allocate", STUDENT, 405),
    ("PUT", "/v1/allocate", STUDENT, 405),
    ("DELETE", "/v1/sandboxes/1", STUDENT, 405),
    ("OPTIONS", "/v1/allocate", STUDENT, 405),
    ("POST", "/healthz", {}, 405),
    ("DELETE", "/v1/admin/sync", ADMIN, 405),
    ("BREW", "/v1/docs", {}, 405),
    # No redirects, because a redirect lacks the error body, and clients turn a redirected POST into a GET.
    ("POST", "/v1/allocate/", STUDENT, 404),
    ("GET", "/v1/docs/", {}, 404),
    ("GET", "/v1/sandboxes/", STUDENT, 404),
    ("POST", "/v1//allocate", STUDENT, 404),
    ("POST", "/v1/sandboxes//mark-for-deletion", STUDENT, 404),
    ("GET", "/v1/sandboxes/a%2Fb", STUDENT, 404),
    ("GET", "/v1/sandboxes/%00", STUDENT, 404),
    ("GET", "/v1/sandboxes/%ff%fe", STUDENT, 404),
    ("GET", "/v1/sandboxes/%0a%0dX-Evil:%20yes", STUDENT, 404),
    ("POST", "/v1/sandboxes/%00/mark-for-deletion", STUDENT, 404),
    ("POST", f"/v1/sandboxes/{'9' * 129}/mark-for-deletion", STUDENT, 404),
    ("POST", "/v1/sandboxes/%C3%BC/mark-for-deletion", STUDENT, 404),
    ("GET", f"/v1/sandboxes/{'9' * 5000}", STUDENT, 404),
]


@pytest.fixture(scope="module")
async def shared_gateway(amqp_url: str, database_url: str) -> AsyncIterator[Gateway]:
    async with running(amqp_url, database_url=database_url) as gateway:
        yield gateway


@pytest.fixture
def gateway(shared_gateway: Gateway) -> Gateway:
    shared_gateway.reset()
    return shared_gateway


@pytest.fixture
def broken(monkeypatch: pytest.MonkeyPatch) -> FastAPI:
    """Gateway with a POST /v1/allocate that raises."""

    async def crash(*_: object, **__: object) -> None:
        raise RuntimeError("SELECT secret FROM somewhere")

    monkeypatch.setattr(track, "request_allocator", crash)
    return create_app_without_servers()


@pytest.mark.parametrize(("method", "path", "headers", "status"), REQUESTS)
async def test_every_response_has_a_request_id_security_headers_and_the_error_body(
    gateway: Gateway, method: str, path: str, headers: dict[str, str], status: int
) -> None:
    response = await gateway.client.request(method, path, headers=headers)
    assert response.status_code == status
    assert UUID.fullmatch(response.headers["X-Request-ID"])
    assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert response.headers["X-Frame-Options"] == "DENY"
    assert response.headers["Referrer-Policy"] == "no-referrer"
    assert response.headers["Strict-Transport-Security"].startswith("max-age=")
    assert "default-src 'none'" in response.headers["Content-Security-Policy"]
    if path.startswith("/v1"):
        expected = "no-cache" if path == "/v1/openapi.json" else "no-store"
        assert response.headers["Cache-Control"] == expected
    if status >= 300:
        assert response.headers["Content-Type"] == "application/json"
        assert detail(response)["message"]
    if status == 405:
        assert response.headers["Allow"] in ("GET", "POST", "GET, POST")


async def test_405_lists_the_methods_of_all_routes_of_the_path(gateway: Gateway) -> None:
    response = await gateway.client.delete("/v1/admin/sync", headers=ADMIN)
    assert response.headers["Allow"] == "GET, POST"
    assert detail(response)["message"] == "/v1/admin/sync does not support DELETE. Use GET, POST."


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics", "/v1/docs", "/v1/openapi.json"])
async def test_head_is_get_without_a_body(gateway: Gateway, path: str) -> None:
    async with serving(gateway.app) as url:
        get, head = await gateway.client.get(path), None
        async with asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
            writer.write(f"HEAD {path} HTTP/1.1\r\nHost: gateway\r\nConnection: close\r\n\r\n".encode())
            head = await reader.read()
            writer.close()
            await writer.wait_closed()
    assert head.startswith(b"HTTP/1.1 200")
    assert head.endswith(b"\r\n\r\n")  # no body after the headers
    if path != "/metrics":  # its length changes
        assert f"content-length: {get.headers['content-length']}".encode() in head.lower()


@pytest.mark.parametrize("given", ["a", "01J-abc_DEF.ghi:7", "x" * 128])
async def test_a_well_formed_request_id_is_kept(gateway: Gateway, given: str) -> None:
    response = await gateway.allocate(X_Request_ID=given)
    assert response.headers["X-Request-ID"] == given
    (command,) = gateway.allocator.commands
    assert getattr(command, "request_id", None) == given
    refused = await gateway.client.get("/nope", headers={"X-Request-ID": given})
    assert detail(refused)["request_id"] == given


@pytest.mark.parametrize(
    "given", [b"", b" ", b"x" * 129, b"two words", b"<script>", "ü".encode(), b"a\r\nb", b"\x00"]
)
async def test_a_malformed_request_id_is_replaced(gateway: Gateway, given: bytes) -> None:
    response = await gateway.client.get("/healthz", headers=raw({"X-Request-ID": given}))
    assert UUID.fullmatch(response.headers["X-Request-ID"])


async def test_an_invalid_query_parameter_is_named(gateway: Gateway) -> None:
    response = await gateway.client.post("/v1/admin/sync?force=perhaps", headers=ADMIN)
    assert detail(response)["code"] == "INVALID_REQUEST"
    (field,) = detail(response)["fields"]
    assert field["field"] == "force"
    assert field["problem"]


async def test_an_exception_is_500_without_its_text(broken: FastAPI) -> None:
    with capture_logs() as logs:
        async with client(broken) as http:
            response = await http.post("/v1/allocate", headers=STUDENT)
    assert (response.status_code, detail(response)["code"]) == (500, "INTERNAL_ERROR")
    assert detail(response)["retry_after"]
    assert "SELECT" not in response.text
    assert "Traceback" not in response.text
    assert {"event": "request.failed", "request_id": response.headers["X-Request-ID"]}.items() <= logs[0].items()
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_an_exception_during_a_response_closes_the_connection() -> None:
    app = create_app_without_servers()

    async def crash_half_way(_: Request) -> StreamingResponse:
        async def body() -> AsyncIterator[bytes]:
            yield b"half of "
            raise RuntimeError

        return StreamingResponse(body(), headers={"Content-Length": "20"})

    app.add_api_route("/half", crash_half_way, response_model=None)
    with capture_logs() as logs:
        async with serving(app) as url, asyncio.timeout(30):
            reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
            writer.write(b"GET /half HTTP/1.1\r\nHost: gateway\r\n\r\n")
            answer = await reader.read()
            writer.close()
            await writer.wait_closed()
    assert "request.failed" in [line["event"] for line in logs]
    assert answer.endswith(b"half of ")
    assert answer.count(b"HTTP/1.1") == 1


async def _chunks(size: int) -> AsyncIterator[bytes]:
    for start in range(0, size, 1024):
        yield b"x" * min(1024, size - start)


async def test_a_body_of_64_kib_is_accepted(gateway: Gateway) -> None:
    for body in (b"x" * LIMIT, _chunks(LIMIT), b"{}", b"not JSON"):
        response = await gateway.client.post("/v1/allocate", headers=STUDENT, content=body)
        assert response.status_code == 201


async def test_a_larger_body_is_413_with_and_without_content_length(gateway: Gateway) -> None:
    for body in (b"x" * (LIMIT + 1), _chunks(LIMIT + 1), _chunks(10 * LIMIT)):
        response = await gateway.client.post("/v1/allocate", headers=STUDENT, content=body)
        assert (response.status_code, detail(response)["code"]) == (413, "PAYLOAD_TOO_LARGE")
        assert response.headers["X-Content-Type-Options"] == "nosniff"
    assert gateway.allocator.commands == []


async def test_an_endless_body_is_413_before_its_end(gateway: Gateway) -> None:
    async with serving(gateway.app) as url, asyncio.timeout(20):
        reader, writer = await asyncio.open_connection(urlsplit(url).hostname, urlsplit(url).port)
        head = "".join(f"{name}: {value}\r\n" for name, value in STUDENT.items())
        writer.write(f"POST /v1/allocate HTTP/1.1\r\nHost: x\r\n{head}Transfer-Encoding: chunked\r\n\r\n".encode())
        writer.write(b"10001\r\n" + b"x" * 0x10001 + b"\r\n")  # without the last chunk
        assert (await reader.readline()).startswith(b"HTTP/1.1 413")
        writer.close()
        await writer.wait_closed()


@pytest.mark.parametrize(
    ("method", "path", "endpoint", "status"),
    [
        ("POST", "/v1/allocate", "/v1/allocate", "201"),
        ("POST", "/v1/sandboxes/1/mark-for-deletion", "/v1/sandboxes/{sandbox_id}/mark-for-deletion", "200"),
        ("GET", "/v1/sandboxes/unknown-1", "/v1/sandboxes/{sandbox_id}", "404"),
        ("GET", "/v1/sandboxes/unknown-2", "/v1/sandboxes/{sandbox_id}", "404"),
        ("PUT", "/v1/sandboxes/1", "/v1/sandboxes/{sandbox_id}", "405"),
        ("GET", "/v1/admin/stats", "/v1/admin/stats", "403"),
        ("POST", "/v1/admin/sync?force=perhaps", "/v1/admin/sync", "403"),
        ("GET", "/v1/docs", "/v1/docs", "200"),
        ("GET", "/v1/openapi.json", "/v1/openapi.json", "200"),
        ("GET", "/healthz", "/healthz", "200"),
        ("GET", "/readyz", "/readyz", "200"),
        ("GET", "/metrics", "/metrics", "200"),
        ("HEAD", "/healthz", "/healthz", "200"),
        ("GET", "/some/path/42", "unknown", "404"),
        ("GET", "/v1/sandboxes//", "unknown", "404"),
    ],
)
async def test_latency_is_labelled_with_the_route_and_not_the_path(
    gateway: Gateway, method: str, path: str, endpoint: str, status: str
) -> None:
    labels = {"method": method, "endpoint": endpoint, "status": status}
    before = sample("broker_request_latency_seconds_count", **labels)
    await gateway.client.request(method, path, headers=STUDENT)
    assert sample("broker_request_latency_seconds_count", **labels) == before + 1


async def test_unknown_methods_share_one_label(gateway: Gateway) -> None:
    labels = {"method": "other", "endpoint": "/healthz", "status": "405"}
    before = sample("broker_request_latency_seconds_count", **labels)
    for method in ("BREW", "FROB1", "FROB2"):
        await gateway.client.request(method, "/healthz")
    assert sample("broker_request_latency_seconds_count", **labels) == before + 3


@pytest.mark.parametrize(
    ("path", "headers"),
    [
        ("/v1/%61dmin/stats", ADMIN),
        ("/v1/ad%6Din/stats", ADMIN),
        ("/v1/ad%6din/stats", ADMIN),
        ("/v1%2Fadmin%2fstats", ADMIN),
        ("/%761/admin/stats", ADMIN),
        ("/v1/sandboxes/%31", STUDENT),
        ("/v1/sandboxes/a%2Db", STUDENT),
        ("/v1/sandboxes/%2E%2e/admin/stats", ADMIN),
        ("/%68ealthz", {}),
        ("/metric%73", {}),
    ],
)
async def test_a_needlessly_encoded_path_is_404(gateway: Gateway, path: str, headers: dict[str, str]) -> None:
    response = await gateway.client.get(path, headers=headers)
    assert (response.status_code, detail(response)["code"]) == (404, "NOT_FOUND")
    assert "percent-encoded" in detail(response)["message"]


async def test_a_needlessly_encoded_allocate_path_allocates_no_sandbox(gateway: Gateway) -> None:
    for path in ("/v1/%61llocate", "/v1%2Fallocate", "/%76%31/allocate"):
        response = await gateway.client.post(path, headers=STUDENT)
        assert (response.status_code, detail(response)["code"]) == (404, "NOT_FOUND")
    assert gateway.allocator.commands == []


LONG_ID = '"\\' * 64


@pytest.mark.parametrize(
    ("method", "path"),
    [
        ("GET", "/v1/" + "x" * 15_000),
        ("GET", "/v1/" + "%C3%BC" * 2_500),
        ("GET", "/v1/sandboxes/" + "9" * 15_000),
        ("POST", "/v1/sandboxes/" + "%22" * 5_000 + "/mark-for-deletion"),
        ("POST", "/v1/allocate"),
        ("PUT", "/v1/allocate"),
    ],
)
@pytest.mark.parametrize("token", [STUDENT, ADMIN, {}])
async def test_the_log_of_a_request_is_short_for_any_path(
    gateway: Gateway, method: str, path: str, token: dict[str, str]
) -> None:
    headers = {**token, "X-Instruqt-Sandbox-ID": LONG_ID, "X-Instruqt-Track-ID": LONG_ID, "X-Request-ID": "r" * 128}
    with capture_logs() as logs:
        response = await gateway.client.request(method, path, headers=headers)
    assert sum(line["event"] == "request.handled" for line in logs) == 1
    assert sum(len(json.dumps(line)) for line in logs) < 1_900  # without the service, the level and the time
    if response.status_code in (404, 405):
        assert len(response.content) < 1_000


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("POST", "/v1/allocate", 401), ("GET", "/v1/sandboxes/1", 401), ("GET", "/v1/admin/stats", 401)],
)
async def test_the_log_of_an_unauthorized_request_names_the_client_and_the_claimed_track(
    gateway: Gateway, method: str, path: str, status: int
) -> None:
    headers = {"Authorization": "Bearer revoked", "X-Instruqt-Track-ID": " dns-101 "}
    with capture_logs() as logs:
        response = await gateway.client.request(method, path, headers=headers)
    assert response.status_code == status
    (line,) = (line for line in logs if line["event"] == "request.handled")
    assert (line["code"], line["claimed_track"], line["client"]) == ("UNAUTHORIZED", "dns-101", "127.0.0.1")


@pytest.mark.parametrize(
    ("sent", "logged"),
    [
        (b"dns\tevent=lease.granted", "dns?event=lease.granted"),
        (b"\x1b[31mred", "?[31mred"),
        ("dns-ü".encode(), "dns-??"),
        (b"x" * 300, "x" * 128),
    ],
)
async def test_a_claimed_track_is_printable_and_short(gateway: Gateway, sent: bytes, logged: str) -> None:
    with capture_logs() as logs:
        await gateway.client.post("/v1/allocate", headers=[(b"x-instruqt-track-id", sent)])
    (line,) = (line for line in logs if line["event"] == "request.handled")
    assert line["claimed_track"] == logged


async def test_the_log_of_an_authorized_request_names_the_client_and_claims_no_track(gateway: Gateway) -> None:
    with capture_logs() as logs:
        await gateway.client.get("/v1/sandboxes/0", headers={**STUDENT, "X-Instruqt-Track-ID": "dns-101"})
    (line,) = (line for line in logs if line["event"] == "request.handled")
    assert line["client"] == "127.0.0.1"
    assert "claimed_track" not in line
