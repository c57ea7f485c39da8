"""OpenAPI document and docs page."""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from typing import Any
from urllib.parse import urljoin, urlsplit

import httpx
import openapi_spec_validator
import pytest
from fastapi import FastAPI
from openapi_schema_validator import OAS31Validator

from devstack.settings import ROOT
from gateway.api import docs
from gateway.api.error_page import render_page
from gateway.api.error_table import ERRORS
from sandbox_broker.contract.types import MAX_ID_LENGTH

from .gateway_harness import STUDENT, TRACK, client, create_app_without_servers, detail

PAGE = "http://gateway/v1/docs"
DOCUMENT = "/v1/openapi.json"
DEAD_LETTERS = "/v1/admin/dead-letters"
REPLAYED = {200, 400, 401, 403, 404, 409, 413, 429, 500, 503, 504}
CHANGE_OF_LEASE = {200, 400, 401, 403, 404, 409, 413, 429, 500, 503, 504}
EVENTS = "/v1/instruqt/events"
WEBHOOK_HEADERS = {"webhook-id", "webhook-timestamp", "webhook-signature"}
TOKENS = "/v1/admin/tokens"
RETRY_DELETION = "/v1/admin/sandboxes/{sandbox_id}/retry-deletion"

STATUSES = {
    ("post", "/v1/allocate"): {200, 201, 202, 400, 401, 403, 409, 413, 429, 500, 503, 504},
    ("post", "/v1/sandboxes/{sandbox_id}/mark-for-deletion"): {200, 400, 401, 403, 404, 413, 429, 500, 503, 504},
    ("get", "/v1/sandboxes/{sandbox_id}"): {200, 400, 401, 403, 404, 413, 429, 500, 503},
    ("post", EVENTS): {200, 400, 401, 404, 413, 429, 500, 503, 504},
    ("get", "/v1/admin/stats"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/stats/history"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/events"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/whoami"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/sandboxes"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/sandboxes/{sandbox_id}"): {200, 400, 401, 403, 404, 413, 429, 500, 503},
    ("get", "/v1/admin/allocations"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("post", "/v1/admin/sync"): {200, 202, 400, 401, 403, 409, 413, 429, 500, 502, 503},
    ("get", "/v1/admin/sync"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/leaks"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/sandboxes/{sandbox_id}/access"): {200, 202, 400, 401, 403, 404, 410, 413, 429, 500, 503},
    ("post", "/v1/admin/access/rotate-keys"): {200, 400, 401, 403, 409, 413, 429, 500, 503, 504},
    ("post", "/v1/sandboxes/{sandbox_id}/extend"): CHANGE_OF_LEASE,
    ("post", "/v1/sandboxes/{sandbox_id}/claim"): CHANGE_OF_LEASE,
    ("post", "/v1/sandboxes/{sandbox_id}/replace"): {201, 202, *CHANGE_OF_LEASE},
    ("post", "/v1/admin/sandboxes/{sandbox_id}/extend"): CHANGE_OF_LEASE,
    ("post", "/v1/admin/sandboxes/{sandbox_id}/replace"): {201, *CHANGE_OF_LEASE},
    ("get", "/v1/admin/stock"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/stock/creations"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("post", "/v1/admin/stock/resume"): {200, 400, 401, 403, 404, 413, 429, 500, 503, 504},
    ("get", "/v1/admin/waiting"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/policies"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("put", "/v1/admin/policies"): {200, 400, 401, 403, 413, 429, 500, 503, 504},
    ("post", "/v1/admin/auto-delete-stale"): {200, 400, 401, 403, 413, 429, 500, 503, 504},
    ("post", "/v1/admin/bulk-delete"): {200, 400, 401, 403, 413, 429, 500, 503, 504},
    ("post", "/v1/admin/cleanup"): {200, 202, 400, 401, 403, 413, 429, 500, 502, 503},
    ("post", "/v1/admin/sandboxes/{sandbox_id}/release"): {200, 400, 401, 403, 404, 409, 413, 429, 500, 503, 504},
    ("post", RETRY_DELETION): {200, 400, 401, 403, 404, 409, 413, 429, 500, 503, 504},
    ("post", "/v1/admin/restore/confirm"): {200, 400, 401, 403, 413, 429, 500, 503, 504},
    ("get", "/v1/admin/jobs/{job_id}"): {200, 400, 401, 403, 404, 413, 429, 500, 503},
    ("get", "/v1/admin/status"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", "/v1/admin/audit"): {200, 400, 401, 403, 413, 429, 500, 503},
    ("post", "/v1/admin/forget"): {200, 400, 401, 403, 409, 413, 429, 500, 503, 504},
    ("get", TOKENS): {200, 400, 401, 403, 413, 429, 500, 503},
    ("post", TOKENS): {201, 400, 401, 403, 409, 413, 429, 500, 503, 504},
    ("delete", f"{TOKENS}/{{name}}"): {204, 400, 401, 403, 404, 413, 429, 500, 503, 504},
    ("post", f"{TOKENS}/{{name}}/suspend"): {200, 400, 401, 403, 404, 413, 429, 500, 503, 504},
    ("post", f"{TOKENS}/{{name}}/resume"): {200, 400, 401, 403, 404, 413, 429, 500, 503, 504},
    ("get", DEAD_LETTERS): {200, 400, 401, 403, 413, 429, 500, 503},
    ("get", f"{DEAD_LETTERS}/{{dead_letter_id}}"): {200, 400, 401, 403, 404, 413, 429, 500, 503},
    ("delete", f"{DEAD_LETTERS}/{{dead_letter_id}}"): {200, 400, 401, 403, 404, 413, 429, 500, 503, 504},
    ("post", f"{DEAD_LETTERS}/{{dead_letter_id}}/replay"): REPLAYED,
    ("get", "/healthz"): {200},
    ("get", "/readyz"): {200, 500, 503},
    ("get", "/metrics"): {200},
}
CODES_WITHOUT_ROUTE = {
    "NOT_FOUND",
    "METHOD_NOT_ALLOWED",
    "MALFORMED_REQUEST",
    "HEADERS_TOO_LARGE",
    "CORS_REFUSED",
    "STOPPING",
}
TRACK_HEADERS = {"X-Instruqt-Sandbox-ID", "X-Track-ID", "X-Lease-Secret"}


@pytest.fixture(scope="module")
async def http() -> AsyncIterator[httpx.AsyncClient]:
    async with client(create_app_without_servers()) as http:
        yield http


@pytest.fixture(scope="module")
async def document(http: httpx.AsyncClient) -> Any:
    response = await http.get("/v1/openapi.json")
    assert response.headers["Content-Type"] == "application/json"
    return json.loads(response.content)


def operations(document: Any) -> dict[tuple[str, str], Any]:
    return {
        (method, path): operation
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    }


async def test_the_document_lists_every_route_and_status(document: Any) -> None:
    assert document["openapi"].startswith("3.")
    found = {
        route: {int(status) for status in operation["responses"] if status != "default"}
        for route, operation in operations(document).items()
    }
    assert found == STATUSES


async def test_the_document_describes_every_error_with_its_action(document: Any) -> None:
    described: set[str] = set()
    for operation in operations(document).values():
        for status, response in operation["responses"].items():
            content = response.get("content", {}).get("application/json", {})
            for code, example in content.get("examples", {}).items():
                spec = ERRORS[code]
                assert int(status) == spec.status
                assert f"`{code}`: {spec.meaning}. {spec.advice}" in response["description"]
                detail = example["value"]["detail"]
                assert (detail["code"], detail.get("retry_after")) == (code, spec.retry_after)
                described.add(code)
    assert described == ERRORS.keys() - CODES_WITHOUT_ROUTE


def test_docs_errors_md_is_current() -> None:
    assert (ROOT / "docs" / "errors.md").read_text() == render_page()  # `make docs` renews it
    for code, spec in ERRORS.items():
        assert f"| {spec.status} | `{code}` | {spec.meaning} | {spec.advice} |" in render_page()


async def test_every_error_has_the_error_schema_in_the_document(document: Any) -> None:
    for (_, path), operation in operations(document).items():
        for status, response in operation["responses"].items():
            if path.startswith("/v1") and not status.startswith("2"):
                assert response["content"]["application/json"]["schema"] == {"$ref": "#/components/schemas/Error"}
    assert not any("ValidationError" in name for name in document["components"]["schemas"])


async def test_the_document_lists_the_headers(document: Any) -> None:
    for (_, path), operation in operations(document).items():
        sent = {parameter["name"] for parameter in operation.get("parameters", ()) if parameter["in"] == "header"}
        if path == "/v1/allocate":
            assert sent == TRACK_HEADERS | {
                "X-Instruqt-Track-ID",
                "X-Sandbox-Name-Prefix",
                "Idempotency-Key",
                "Prefer",
                "X-Lease-Mode",
                "X-Sandbox-Access",
            }
        elif path == "/v1/sandboxes/{sandbox_id}/extend":
            assert sent == TRACK_HEADERS | {"Idempotency-Key"}
        elif path.endswith("/extend"):
            assert sent == {"Idempotency-Key"}
        elif path.endswith("/claim"):
            assert sent == TRACK_HEADERS | {"X-New-Holder"}
        elif path == "/v1/sandboxes/{sandbox_id}/replace":
            assert sent == TRACK_HEADERS | {"Prefer"}
        elif path.startswith("/v1/sandboxes/"):
            assert sent == TRACK_HEADERS
        elif path == EVENTS:
            assert sent == WEBHOOK_HEADERS
        elif path == "/v1/admin/events":
            assert sent == {"last-event-id"}
        else:
            assert sent == set()
        for status, response in operation["responses"].items():
            assert "X-Request-ID" in response["headers"]
            assert ("X-RateLimit-Remaining" in response["headers"]) == path.startswith("/v1")
            assert ("Deprecation" in response["headers"]) == ("X-Track-ID" in sent)
            assert ("WWW-Authenticate" in response["headers"]) == (status == "401" and path != EVENTS)
    exhausted = document["paths"]["/v1/allocate"]["post"]["responses"]["409"]
    assert exhausted["headers"]["Retry-After"]["schema"] == {"type": "integer"}


async def test_the_document_describes_valid_header_values(document: Any) -> None:
    for (_, path), operation in operations(document).items():
        for parameter in operation.get("parameters", ()):
            if parameter["in"] == "header" and parameter["name"] not in WEBHOOK_HEADERS:
                assert parameter["required"] == (parameter["name"] == "X-Instruqt-Sandbox-ID"), path
                schema = parameter["schema"]
                if parameter["name"] in ("X-Track-ID", "Prefer"):  # the gateway ignores invalid values
                    assert schema.keys() - {"examples"} == {"type", "title"}
                    continue
                if parameter["name"] == "X-Lease-Mode":
                    assert schema["enum"] == ["active", "standby"]
                    continue
                if parameter["name"] == "X-Sandbox-Access":
                    assert schema["enum"] == ["user"]
                    continue
                if parameter["name"] == "last-event-id":  # not an id of a student
                    assert schema["pattern"] == "^[0-9]*$"
                    continue
                assert (schema["type"], schema["maxLength"]) == ("string", MAX_ID_LENGTH)
                validator = OAS31Validator(schema)
                assert validator.is_valid("inst-student-1 a~!%_")
                assert validator.is_valid("") == (not parameter["required"])
                assert not validator.is_valid("ü")


async def test_the_document_describes_both_tokens(document: Any) -> None:
    schemes = document["components"]["securitySchemes"]
    assert {name: (scheme["type"], scheme["scheme"]) for name, scheme in schemes.items()} == {
        "trackToken": ("http", "bearer"),
        "adminToken": ("http", "bearer"),
    }
    for (_, path), operation in operations(document).items():
        if path.startswith("/v1/admin"):
            assert operation["security"] == [{"adminToken": []}]
        elif path == EVENTS:  # a signature takes the place of a token
            assert "security" not in operation
        elif path.startswith("/v1"):
            assert operation["security"] == [{"trackToken": []}, {"adminToken": []}]
        else:
            assert "security" not in operation


async def test_the_document_is_valid(document: Any) -> None:
    assert document["openapi"].startswith("3.1.")
    openapi_spec_validator.validate(document)


async def test_every_field_has_a_valid_example(document: Any) -> None:
    examples = 0
    for schema in document["components"]["schemas"].values():
        for described in schema["properties"].values():
            given = described.get("examples") or described.get("enum") or [described.get("const")]
            if "$ref" in json.dumps(described):
                continue  # the referenced schema has its own examples
            validator = OAS31Validator({**described, "components": document["components"]})
            for example in given:
                validator.validate(example)
                examples += 1
    assert examples


async def test_every_reference_in_the_document_resolves(document: Any) -> None:
    for reference in re.findall(r'"\$ref": "#/([^"]+)"', json.dumps(document)):
        target = document
        for part in reference.split("/"):
            target = target[part]


async def test_concurrent_requests_build_the_document_once(monkeypatch: pytest.MonkeyPatch) -> None:
    built = 0
    build = docs._build

    def count(app: FastAPI) -> tuple[bytes, str]:
        nonlocal built
        built += 1
        return build(app)

    monkeypatch.setattr(docs, "_build", count)
    async with client(create_app_without_servers()) as http:
        responses = await asyncio.gather(*(http.get(DOCUMENT) for _ in range(5)))
    assert built == 1
    assert len({response.content for response in responses}) == 1


async def test_all_gateways_of_a_version_send_the_same_strong_etag(http: httpx.AsyncClient) -> None:
    response = await http.get(DOCUMENT)
    assert re.fullmatch('"[0-9a-f]{32}"', response.headers["ETag"])
    assert response.headers["Cache-Control"] == "no-cache"
    async with client(create_app_without_servers(rate_limit="1/hour", broker_api_token="other-tokens")) as other:
        same = await other.get(DOCUMENT)
        assert (same.content, same.headers["ETag"]) == (response.content, response.headers["ETag"])
        refused = await other.get(DOCUMENT)
    assert (refused.status_code, refused.headers["Cache-Control"]) == (429, "no-store")
    assert "ETag" not in refused.headers


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize(
    ("if_none_match", "status"),
    [
        (["{etag}"], 304),
        (["W/{etag}"], 304),
        (['"other", {etag}'], 304),
        (['"other"', "W/{etag}"], 304),
        (["*"], 304),
        (['"other"'], 200),
        (["{bare}"], 200),
        (["nonsense"], 200),
        ([""], 200),
    ],
)
async def test_a_matching_etag_gets_304_without_a_body(
    http: httpx.AsyncClient, method: str, if_none_match: list[str], status: int
) -> None:
    full = await http.get(DOCUMENT)
    etag = full.headers["ETag"]
    sent = [("If-None-Match", value.format(etag=etag, bare=etag.strip('"'))) for value in if_none_match]
    response = await http.request(method, DOCUMENT, headers=sent)
    assert response.status_code == status
    assert (response.headers["ETag"], response.headers["Cache-Control"]) == (etag, "no-cache")
    assert "X-Request-ID" in response.headers
    if status == 304:
        assert response.content == b""
        assert "Content-Type" not in response.headers


async def test_other_responses_of_the_api_are_not_stored(http: httpx.AsyncClient) -> None:
    for path in (PAGE, "/v1/docs/start.js", "/v1/sandboxes/1", "/v1/nope"):
        response = await http.get(path, headers={"If-None-Match": "*"})
        assert (response.status_code != 304, response.headers["Cache-Control"]) == (True, "no-store")


async def test_the_docs_can_be_disabled() -> None:
    async with client(create_app_without_servers(docs_enabled=False)) as http:
        for path in (DOCUMENT, *docs._FILES, "/v1/nope"):
            for headers in ({}, TRACK):
                response = await http.get(path, headers={"If-None-Match": "*", **headers})
                assert (response.status_code, detail(response)["code"]) == (404, "NOT_FOUND")
                assert detail(response)["message"] == f"{path} does not exist. Check the path."
                assert response.headers["Cache-Control"] == "no-store"
        assert (await http.post("/v1/allocate", headers=STUDENT)).status_code == 503  # no allocator is running


async def test_the_gateway_serves_the_page_and_its_assets(http: httpx.AsyncClient) -> None:
    page = await http.get(PAGE)
    assert page.headers["Content-Type"].startswith("text/html")
    references = re.findall(r'(?:src|href)="([^"]+)"', page.text)
    assert len(references) == 4
    for reference in references:
        assert not urlsplit(reference).netloc
        assert not reference.startswith("/")  # relative, so that it works behind a proxy with a path prefix
        asset = await http.get(urljoin(PAGE, reference))
        assert asset.status_code == 200
        assert asset.content
        kind = {"js": "text/javascript", "css": "text/css", "png": "image/png"}[reference.rsplit(".", 1)[1]]
        assert asset.headers["Content-Type"].startswith(kind)


async def test_the_page_has_no_inline_code_that_its_policy_blocks(http: httpx.AsyncClient) -> None:
    page = await http.get(PAGE)
    assert not re.search(r"<script(?![^>]*\bsrc=)", page.text)
    assert not re.search(r"<style|\son\w+=", page.text)
    policy = page.headers["Content-Security-Policy"]
    assert "script-src 'self';" in policy
    start = await http.get("/v1/docs/start.js")
    assert 'url: "openapi.json"' in start.text  # relative to the page


async def test_the_style_sheet_loads_only_data_urls(http: httpx.AsyncClient) -> None:
    style = (await http.get("/v1/docs/assets/swagger-ui.css")).text
    assert all(url.startswith("data:") for url in re.findall(r"url\([\"']?([^\"')]+)", style))
