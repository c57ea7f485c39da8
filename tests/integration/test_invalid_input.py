"""Error responses of the API to invalid input."""

import httpx
import pytest

from tests.integration import wire
from tests.integration.stack import ADMIN, TRACK_TOKEN, Stack, track_headers

TOKEN = {"Authorization": f"Bearer {TRACK_TOKEN}"}
ALLOCATE = ("POST", "/v1/allocate")
UNKNOWN_SANDBOX = "/v1/sandboxes/no-such-sandbox"


@pytest.mark.parametrize(
    ("request_line", "headers", "status", "code"),
    [
        (ALLOCATE, {}, 401, "UNAUTHORIZED"),
        (ALLOCATE, {"Authorization": "Bearer wrong"}, 401, "UNAUTHORIZED"),
        (ALLOCATE, {"Authorization": "Basic d3Jvbmc="}, 401, "UNAUTHORIZED"),
        (ALLOCATE, {"X-Instruqt-Sandbox-ID": "x" * 500}, 401, "UNAUTHORIZED"),
        (ALLOCATE, TOKEN, 400, "MISSING_SANDBOX_ID"),
        (ALLOCATE, track_headers(""), 400, "MISSING_SANDBOX_ID"),
        (ALLOCATE, track_headers("x" * 500), 400, "INVALID_HEADER"),
        (ALLOCATE, {**track_headers("ada"), "X-Sandbox-Name-Prefix": "x" * 129}, 400, "INVALID_HEADER"),
        (("POST", f"{UNKNOWN_SANDBOX}/mark-for-deletion"), track_headers("ada"), 404, "SANDBOX_NOT_FOUND"),
        (("GET", UNKNOWN_SANDBOX), track_headers("ada"), 404, "SANDBOX_NOT_FOUND"),
        (("GET", "/v1/allocate"), track_headers("ada"), 405, "METHOD_NOT_ALLOWED"),
        (("DELETE", "/v1/admin/stats"), ADMIN, 405, "METHOD_NOT_ALLOWED"),
        (("GET", "/v1/nothing-here"), ADMIN, 404, "NOT_FOUND"),
        (("GET", "/"), {}, 404, "NOT_FOUND"),
        (("GET", "/v1/admin/stats"), TOKEN, 403, "FORBIDDEN"),
        (("POST", "/v1/admin/sync?force=perhaps"), ADMIN, 400, "INVALID_REQUEST"),
    ],
)
async def test_an_invalid_request_gets_its_error_code(
    stack: Stack, request_line: tuple[str, str], headers: dict[str, str], status: int, code: str
) -> None:
    method, path = request_line
    response = await stack.client.request(method, stack.url + path, headers=headers)
    assert (response.status_code, response.json()["detail"]["code"]) == (status, code)
    detail = response.json()["detail"]
    assert detail["message"]
    assert detail["request_id"] == response.headers["x-request-id"]
    assert ("www-authenticate" in response.headers) == (status == 401)


@pytest.mark.parametrize(
    "sent",
    [
        b"\x16\x03\x01\x02\x00\x01\x00",  # TLS
        b"nonsense\r\n\r\n",
        b"GET /v1/docs HTTP/9.9\r\nHost: x\r\n\r\n",
        b"GET no-slash HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET /\xff HTTP/1.1\r\nHost: x\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nNo colon here\r\n\r\n",
        b"GET / HTTP/1.1\r\nHost: x\r\nX-Track-ID: a\x00b\r\n\r\n",
        b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nContent-Length: many\r\n\r\n",
        b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"POST /v1/allocate HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\nnot a length\r\n",
    ],
)
async def test_malformed_http_gets_the_same_error_body(stack: Stack, sent: bytes) -> None:
    response = await wire.send_request(stack.url, sent)
    assert response.error == (400, "MALFORMED_REQUEST")
    detail = response.json["detail"]
    assert detail["request_id"] == response.headers["X-Request-ID"]
    assert detail["message"]
    assert response.headers["Content-Type"] == "application/json"
    assert response.headers["X-Content-Type-Options"] == "nosniff"


async def test_releasing_the_sandbox_of_another_student_is_refused(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    response = await stack.release(lease["sandbox_id"], "eve")
    assert (response.status_code, response.json()["detail"]["code"]) == (403, "NOT_SANDBOX_OWNER")
    assert (await stack.stats())["allocated"] == 1


async def test_the_idempotency_key_of_another_student_is_refused(stack: Stack) -> None:
    first = await stack.allocate("ada", Idempotency_Key="k1")
    assert first.status_code == 201
    assert (await stack.allocate("ada", Idempotency_Key="k1")).json() == first.json()
    assert (await stack.allocate("ada", Idempotency_Key="k2")).json() == first.json()
    stolen = await stack.allocate("eve", Idempotency_Key="k1")
    assert (stolen.status_code, stolen.json()["detail"]["code"]) == (409, "IDEMPOTENCY_KEY_CONFLICT")


@pytest.mark.parametrize("prefix", ["sand%", "sandbox_", "*", "Sandbox-", "'; DROP TABLE leases; --", "\\"])
async def test_a_prefix_has_no_wildcards(stack: Stack, prefix: str) -> None:
    refused = await stack.allocate("ada", X_Sandbox_Name_Prefix=prefix)
    assert (refused.status_code, refused.json()["detail"]["code"]) == (409, "POOL_EXHAUSTED")
    assert prefix in refused.json()["detail"]["message"]


async def test_a_large_body_is_refused(stack: Stack) -> None:
    response = await stack.client.post(
        f"{stack.url}/v1/allocate", headers=track_headers("ada"), content=b"x" * 70_000
    )
    assert (response.status_code, response.json()["detail"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_the_docs_page_loads_only_local_assets(stack: Stack) -> None:
    page = await stack.client.get(f"{stack.url}/v1/docs")
    assert page.status_code == 200
    assert "http" not in page.text.replace("http-equiv", "")
    for asset in (
        "docs/assets/swagger-ui-bundle.js",
        "docs/assets/swagger-ui.css",
        "docs/start.js",
        "openapi.json",
    ):
        response: httpx.Response = await stack.client.get(f"{stack.url}/v1/{asset}")
        assert response.status_code == 200, asset


async def test_the_document_is_not_sent_again_to_a_client_that_has_it(stack: Stack) -> None:
    document = f"{stack.url}/v1/openapi.json"
    full = await stack.client.get(document)
    for _ in range(3):  # on one connection, which a body after 304 would break
        repeated = await stack.client.get(document, headers={"If-None-Match": full.headers["ETag"]})
        assert (repeated.status_code, repeated.content) == (304, b"")
        assert (repeated.headers["ETag"], repeated.headers["Cache-Control"]) == (full.headers["ETag"], "no-cache")
        assert "Transfer-Encoding" not in repeated.headers
    assert (await stack.client.get(document)).content == full.content
