"""Operations routes of every service: /healthz, /readyz and /metrics."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Check = Callable[[], Awaitable[str | None]]
"""Readiness check. It returns None if the component works, otherwise a short description of the problem."""

CHECK_TIMEOUT_SEC = 2.0
RETRY_AFTER_SEC = 2


def routes(checks: Mapping[str, Check]) -> list[Route]:
    """Return the routes. `checks` are the readiness checks by name: {"queue": …, "database": …}. A stopping service
    (`app.state.stopping`) is not ready, regardless of the checks."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        if getattr(request.app.state, "stopping", False):
            return _not_ready(request, "stopping", {}, "This service is stopping. Send requests to another one.")
        problems = await asyncio.gather(*(_run(check) for check in checks.values()))
        report = {name: problem or "ok" for name, problem in zip(checks, problems, strict=True)}
        if not any(problems):
            return JSONResponse({"status": "ready", "checks": report})
        failures = "; ".join(f"{name}: {problem}" for name, problem in report.items() if problem != "ok")
        message = f"This service is not ready ({failures}). It retries by itself."
        return _not_ready(request, "unavailable", report, message)

    async def metrics(_: Request) -> Response:
        return Response(generate_latest(), media_type=CONTENT_TYPE_LATEST)

    return [Route("/healthz", healthz), Route("/readyz", readyz), Route("/metrics", metrics)]


def _not_ready(request: Request, status: str, report: Mapping[str, str], message: str) -> Response:
    detail = {
        "code": "NOT_READY",
        "message": message,
        "request_id": getattr(request.state, "request_id", None) or str(uuid.uuid4()),
        "retry_after": RETRY_AFTER_SEC,
    }
    body = {"status": status, "checks": report, "detail": detail}
    return JSONResponse(body, 503, {"Retry-After": str(RETRY_AFTER_SEC)})


async def _run(check: Check) -> str | None:
    try:
        async with asyncio.timeout(CHECK_TIMEOUT_SEC):
            return await check()
    except TimeoutError:
        return f"no answer in {CHECK_TIMEOUT_SEC:g} s"
