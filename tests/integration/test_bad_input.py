"""What the API answers to what it cannot accept."""

import httpx
import pytest

from tests.integration import wire
from tests.integration.stack import ADMIN, TRACK_TOKEN, Stack, track

TOKEN = {"Authorization": f"Bearer {TRACK_TOKEN}"}
ALLOCATE = ("POST", "/v1/allocate")
STRANGE = "/v1/sandboxes/no-such-sandbox"


@pytest.mark.parametrize(
    ("request_line", "headers", "status", "code"),
    [
        (ALLOCATE, {}, 401, "UNAUTHORIZED"),
        (ALLOCATE, {"Authorization": "Bearer wrong"}, 401, "UNAUTHORIZED"),
        (ALLOCATE, {"Authorization": "Basic d3Jvbmc="}, 401, "UNAUTHORIZED"),
        (ALLOCATE, {"X-Instruqt-Sandbox-ID": "x" * 500}, 401, "UNAUTHORIZED"),
        (ALLOCATE, TOKEN, 400, "MISSING_SANDBOX_ID"),
        (ALLOCATE, track(""), 400, "MISSING_SANDBOX_ID"),
        (ALLOCATE, track("x" * 500), 400, "INVALID_HEADER"),
        (ALLOCATE, {**track("ada"), "X-Sandbox-Name-Prefix": "x" * 129}, 400, "INVALID_HEADER"),
        (("POST", f"{STRANGE}/mark-for-deletion"), track("ada"), 404, "SANDBOX_NOT_FOUND"),
        (("GET", STRANGE), track("ada"), 404, "SANDBOX_NOT_FOUND"),
        (("GET", "/v1/allocate"), track("ada"), 405, "METHOD_NOT_ALLOWED"),
        (("DELETE", "/v1/admin/stats"), ADMIN, 405, "METHOD_NOT_ALLOWED"),
        (("GET", "/v1/nothing-here"), ADMIN, 404, "NOT_FOUND"),
        (("GET", "/"), {}, 404, "NOT_FOUND"),
        (("GET", "/v1/admin/stats"), TOKEN, 403, "FORBIDDEN"),
        (("POST", "/v1/admin/sync?force=perhaps"), ADMIN, 400, "INVALID_REQUEST"),
    ],
)
async def test_bad_requests_are_told_what_to_do(
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
async def test_what_is_not_http_gets_the_same_error_body(stack: Stack, sent: bytes) -> None:
    answer = await wire.send(stack.url, sent)
    assert answer.error == (400, "MALFORMED_REQUEST")
    detail = answer.json["detail"]
    assert detail["request_id"] == answer.headers["X-Request-ID"]
    assert detail["message"]
    assert answer.headers["Content-Type"] == "application/json"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"


async def test_another_students_sandbox_is_not_given_back(stack: Stack) -> None:
    lease = (await stack.allocate("ada")).json()
    response = await stack.release(lease["sandbox_id"], "eve")
    assert (response.status_code, response.json()["detail"]["code"]) == (403, "NOT_SANDBOX_OWNER")
    assert (await stack.stats())["allocated"] == 1


async def test_a_key_of_another_student_is_refused(stack: Stack) -> None:
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


async def test_a_body_that_is_too_large_is_refused(stack: Stack) -> None:
    response = await stack.client.post(f"{stack.url}/v1/allocate", headers=track("ada"), content=b"x" * 70_000)
    assert (response.status_code, response.json()["detail"]["code"]) == (413, "PAYLOAD_TOO_LARGE")


async def test_the_docs_page_needs_nothing_from_elsewhere(stack: Stack) -> None:
    page = await stack.client.get(f"{stack.url}/v1/docs")
    assert page.status_code == 200
    assert "http" not in page.text.replace("http-equiv", "")
    for asset in (
        "docs/assets/swagger-ui-bundle.js",
        "docs/assets/swagger-ui.css",
        "docs/start.js",
        "openapi.json",
    ):
        answer: httpx.Response = await stack.client.get(f"{stack.url}/v1/{asset}")
        assert answer.status_code == 200, asset


async def test_a_client_that_has_the_document_is_not_sent_it_again(stack: Stack) -> None:
    document = f"{stack.url}/v1/openapi.json"
    full = await stack.client.get(document)
    for _ in range(3):  # on one connection, which a body after 304 would break
        again = await stack.client.get(document, headers={"If-None-Match": full.headers["ETag"]})
        assert (again.status_code, again.content) == (304, b"")
        assert (again.headers["ETag"], again.headers["Cache-Control"]) == (full.headers["ETag"], "no-cache")
        assert "Transfer-Encoding" not in again.headers
    assert (await stack.client.get(document)).content == full.content
