"""The docs page and the OpenAPI document: all from our own address, so that they work with no internet and no
inline script."""

import asyncio
import hashlib
import re
from collections.abc import Awaitable, Callable, Mapping
from importlib.resources import files
from typing import Any

from fastapi import FastAPI, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response

from gateway.api.schemas import header, responses
from gateway.web.headers import STUDENT

_OURS = files("gateway") / "static"
# fastapi-offline is used for the files it carries: a released Swagger UI, hash-locked like the rest.
_SWAGGER_UI = files("fastapi_offline") / "static"

_FILES = {
    "/v1/docs": (_OURS / "docs.html", "text/html"),
    "/v1/docs/start.js": (_OURS / "start.js", "text/javascript"),
    "/v1/docs/assets/swagger-ui-bundle.js": (_SWAGGER_UI / "swagger-ui-bundle.js", "text/javascript"),
    "/v1/docs/assets/swagger-ui.css": (_SWAGGER_UI / "swagger-ui.css", "text/css"),
    "/v1/docs/assets/favicon.png": (_SWAGGER_UI / "favicon.png", "image/png"),
}

OPERATIONS: Mapping[str, Mapping[str, Any]] = {
    "/healthz": {"tags": ["operations"], "summary": "Is the process alive?"},
    "/readyz": {
        "tags": ["operations"],
        "summary": "Do the queue and the database answer?",
        "responses": responses("NOT_READY", "INTERNAL_ERROR"),
    },
    "/metrics": {
        "tags": ["operations"],
        "summary": "Metrics for Prometheus",
        "response_class": PlainTextResponse,
    },
}
"""How the routes of sandbox_broker.observability.health are described."""

_LIMIT_HEADERS = {
    "X-RateLimit-Limit": header(
        "requests in a window, of one student with this token, or of the address without a known token; absent "
        "where there is no limit",
        "integer",
    ),
    "X-RateLimit-Remaining": header("what is left of them", "integer"),
    "X-RateLimit-Reset": header("Unix seconds, when the window ends", "integer"),
}


_ETAG = re.compile(r'"[^"]*"')


def add_routes(app: FastAPI) -> None:
    """Add the docs page and the OpenAPI document. Call it last: the document describes the routes that exist."""
    for path, (file, media_type) in _FILES.items():
        app.add_api_route(path, _serving(file.read_bytes(), media_type), include_in_schema=False)
    built: tuple[bytes, str] | None = None
    one_at_a_time = asyncio.Lock()

    async def openapi(request: Request) -> Response:
        nonlocal built
        async with one_at_a_time:
            if built is None:
                # In a thread, because it takes long and students wait for this event loop.
                built = await asyncio.to_thread(_build, app)
        content, etag = built
        request.scope["state"]["revalidate"] = True  # the middleware adds the Cache-Control header
        if _matches(request.headers.getlist("If-None-Match"), etag):
            return Response(status_code=304, headers={"ETag": etag})
        return Response(content, headers={"ETag": etag}, media_type="application/json")

    app.add_api_route("/v1/openapi.json", openapi, include_in_schema=False)


def _build(app: FastAPI) -> tuple[bytes, str]:
    """Return the document and its entity tag, which all gateways of one version share."""
    content = bytes(JSONResponse(_document(app)).body)
    return content, f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def _matches(if_none_match: list[str], etag: str) -> bool:
    """Weak comparison of RFC 9110, section 8.8.3.2: W/ does not count, since proxies that compress add it."""
    listed = ",".join(if_none_match)
    return listed.strip() == "*" or etag in _ETAG.findall(listed)


def _serving(content: bytes, media_type: str) -> Callable[[], Awaitable[Response]]:
    async def serve() -> Response:
        return Response(content, media_type=media_type)

    return serve


def _document(app: FastAPI) -> dict[str, Any]:
    """FastAPI's, and in it what that cannot know: the header that we require ourselves, with an error of our own,
    and the headers that the middleware adds to every response."""
    document = app.openapi()
    for path, operations in document["paths"].items():
        for operation in operations.values():
            for parameter in operation.get("parameters", ()):
                parameter["required"] |= parameter["name"] == STUDENT
            parameters = {parameter["name"] for parameter in operation.get("parameters", ())}
            for response in operation["responses"].values():
                headers = response.setdefault("headers", {})
                headers["X-Request-ID"] = header("the request's own one if it was well-formed, or a new one")
                if path.startswith("/v1"):
                    headers.update(_LIMIT_HEADERS)
                if "X-Track-ID" in parameters:
                    headers["Deprecation"] = header("`true` where X-Track-ID was read")
    return document
