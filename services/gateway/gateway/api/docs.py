"""Docs page (Swagger UI) and OpenAPI document.

The gateway serves all files itself, so that the page works without internet access and without inline scripts.
"""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gateway.api.responses import describe_header, responses
from gateway.audit import MAX_REASON
from gateway.web.headers import STUDENT
from gateway.web.roles import required_role

_STATIC = files("gateway") / "static"
# Only the files of fastapi-offline are used: a release of Swagger UI, locked by its hash like every dependency.
_SWAGGER_UI = files("fastapi_offline") / "static"

_FILES = {
    "/v1/docs": (_STATIC / "docs.html", "text/html"),
    "/v1/docs/start.js": (_STATIC / "start.js", "text/javascript"),
    "/v1/docs/assets/swagger-ui-bundle.js": (_SWAGGER_UI / "swagger-ui-bundle.js", "text/javascript"),
    "/v1/docs/assets/swagger-ui.css": (_SWAGGER_UI / "swagger-ui.css", "text/css"),
    "/v1/docs/assets/favicon.png": (_SWAGGER_UI / "favicon.png", "image/png"),
}

OPERATIONS: Mapping[str, Mapping[str, Any]] = {
    "/healthz": {"tags": ["operations"], "summary": "Liveness of the process"},
    "/readyz": {
        "tags": ["operations"],
        "summary": "Readiness: connections to RabbitMQ and the database",
        "responses": responses("NOT_READY", "INTERNAL_ERROR"),
    },
    "/metrics": {
        "tags": ["operations"],
        "summary": "Metrics for Prometheus",
        "response_class": PlainTextResponse,
    },
}
"""OpenAPI entries of the routes of sandbox_broker.observability.health, by path."""

_RATE_LIMIT_HEADERS = {
    "X-RateLimit-Limit": describe_header(
        "requests per window, for one student with this token, or for one address without a known token; absent "
        "without a rate limit",
        "integer",
    ),
    "X-RateLimit-Remaining": describe_header("remaining requests of this window", "integer"),
    "X-RateLimit-Reset": describe_header("end of the window in Unix seconds", "integer"),
}

_ETAG = re.compile(r'"[^"]*"')


def add_routes(app: FastAPI) -> None:
    """Add the docs page and the OpenAPI document. Call it last, because it describes existing routes."""
    for path, (file, media_type) in _FILES.items():
        app.add_api_route(path, _build_handler(file.read_bytes(), media_type), include_in_schema=False)
    built: tuple[bytes, str] | None = None
    build_lock = asyncio.Lock()

    async def openapi(request: Request) -> Response:
        nonlocal built
        async with build_lock:
            if built is None:
                # In a thread, because it takes long and would delay the requests of students on the event loop.
                built = await asyncio.to_thread(_build, app)
        content, etag = built
        request.scope["state"]["revalidate"] = True  # the middleware adds the Cache-Control header
        if _matches(request.headers.getlist("If-None-Match"), etag):
            return Response(status_code=304, headers={"ETag": etag})
        return Response(content, headers={"ETag": etag}, media_type="application/json")

    app.add_api_route("/v1/openapi.json", openapi, include_in_schema=False)


def _build(app: FastAPI) -> tuple[bytes, str]:
    """Return the document and its entity tag. All gateways of one version have the same tag."""
    content = bytes(JSONResponse(_document(app)).body)
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _matches(if_none_match: list[str], etag: str) -> bool:
    """Compare weakly (RFC 9110, section 8.8.3.2): W/ is ignored, because compressing proxies add it."""
    listed = ",".join(if_none_match)
    return listed.strip() == "*" or etag in _ETAG.findall(listed)


def _build_handler(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def serve() -> Response:
        return Response(content, media_type=media_type)

    return serve


def _describe_admin_route(method: str, path: str, operation: dict[str, Any]) -> None:
    """Add the required role, and the reason for the audit to a route that changes something."""
    role = required_role(method, path)
    operation["x-required-role"] = role
    operation["description"] = f"{operation['description']}\n\nRequires the role `{role}`."
    parameters = operation.setdefault("parameters", [])
    if method != "GET" and all(parameter["name"] != "reason" for parameter in parameters):
        parameters.append(
            {
                "name": "reason",
                "in": "query",
                "required": False,
                "description": "reason for the audit",
                "schema": {"type": "string", "maxLength": MAX_REASON},
            }
        )


def _document(app: FastAPI) -> dict[str, Any]:
    """Return the document of FastAPI with the header that the gateway itself requires, and with the headers that
    the middleware adds to every response."""
    document = app.openapi()
    for path, operations in document["paths"].items():
        for method, operation in operations.items():
            if path.startswith("/v1/admin"):
                _describe_admin_route(method.upper(), path, operation)
            for parameter in operation.get("parameters", ()):
                parameter["required"] |= parameter["name"] == STUDENT
            parameters = {parameter["name"] for parameter in operation.get("parameters", ())}
            for response in operation["responses"].values():
                headers = response.setdefault("headers", {})
                headers["X-Request-ID"] = describe_header(
                    "the id from the request if it was well-formed, otherwise a new one"
                )
                if path.startswith("/v1"):
                    headers.update(_RATE_LIMIT_HEADERS)
                if "X-Track-ID" in parameters:
                    headers["Deprecation"] = describe_header("`true` if the gateway read X-Track-ID")
    return document
