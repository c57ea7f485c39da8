"""The operations routes that every service has: /healthz, /readyz and /metrics."""

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Mapping

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

Check = Callable[[], Awaitable[str | None]]
"""Answers None when all is well, else what is wrong in a few words."""

CHECK_TIMEOUT_SEC = 2.0
RETRY_AFTER_SEC = 2


def routes(checks: Mapping[str, Check]) -> list[Route]:
    """`checks` are what readiness depends on, by name: {"queue": …, "database": …}. A service that is about to stop
    (`app.state.stopping`) is not ready, whatever they say."""

    async def healthz(_: Request) -> Response:
        return JSONResponse({"status": "ok"})

    async def readyz(request: Request) -> Response:
        if getattr(request.app.state, "stopping", False):
            return _not_ready(request, "stopping", {}, "This service is stopping. Send requests to another one.")
        problems = await asyncio.gather(*(_run(check) for check in checks.values()))
        report = {name: problem or "ok" for name, problem in zip(checks, problems, strict=True)}
        if not any(problems):
            return JSONResponse({"status": "ready", "checks": report})
        wrong = "; ".join(f"{name}: {problem}" for name, problem in report.items() if problem != "ok")
        message = f"This service cannot work now ({wrong}). It tries again by itself."
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
