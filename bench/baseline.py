"""Baseline for comparison: a plain service with FastAPI, a connection pool and one transaction per request.

It has one process, no queue and no events. Like the broker, it guarantees one lease per sandbox and per student
with unique indexes, checks a token, writes a log line per request and exports metrics. The code follows the
documentation of FastAPI, asyncpg and structlog.

    python -m uvicorn bench.baseline:create_app --factory
"""

import logging
import os
import secrets
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated

import asyncpg
import orjson
import structlog
from fastapi import Depends, FastAPI, Header, HTTPException, Request, Response
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from prometheus_client import Counter, Histogram, make_asgi_app
from pydantic import BaseModel
from starlette.types import ASGIApp, Message, Receive, Scope, Send

SCHEMA = """
CREATE TABLE sandboxes (
    sandbox_id text PRIMARY KEY,
    external_id text NOT NULL UNIQUE,
    name text NOT NULL,
    sfdc_account_id text,
    status text NOT NULL,
    status_since timestamptz NOT NULL DEFAULT now()
);
CREATE INDEX sandboxes_available ON sandboxes (status_since, sandbox_id) WHERE status = 'available';
CREATE TABLE leases (
    lease_id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
    sandbox_id text NOT NULL,
    holder text NOT NULL,
    track_name text,
    idempotency_key text,
    allocated_at timestamptz NOT NULL DEFAULT now(),
    expires_at timestamptz NOT NULL,
    ended_at timestamptz
);
CREATE UNIQUE INDEX leases_one_per_sandbox ON leases (sandbox_id);
CREATE UNIQUE INDEX leases_one_per_holder ON leases (holder) WHERE ended_at IS NULL;
CREATE UNIQUE INDEX leases_one_per_idempotency_key ON leases (idempotency_key) WHERE idempotency_key IS NOT NULL;
"""

FIND_LEASE = """
SELECT s.sandbox_id, s.name, s.external_id, s.sfdc_account_id, l.allocated_at, l.expires_at
FROM leases l JOIN sandboxes s USING (sandbox_id)
WHERE l.holder = $1 AND l.ended_at IS NULL
"""
LOCK_AVAILABLE = """
SELECT sandbox_id, name, external_id, sfdc_account_id FROM sandboxes
WHERE status = 'available' ORDER BY status_since, sandbox_id LIMIT 1 FOR UPDATE SKIP LOCKED
"""
MARK_ALLOCATED = "UPDATE sandboxes SET status = 'allocated', status_since = now() WHERE sandbox_id = $1"
INSERT_LEASE = """
INSERT INTO leases (sandbox_id, holder, track_name, idempotency_key, expires_at)
VALUES ($1, $2, $3, $4, now() + interval '4 hours')
RETURNING allocated_at, expires_at
"""

POOL_SIZE = 10

REQUESTS = Counter("requests_total", "Requests by route and status", ["path", "status"])
LATENCY = Histogram("request_latency_seconds", "Requests by route", ["path"])

structlog.configure(
    cache_logger_on_first_use=True,
    wrapper_class=structlog.make_filtering_bound_logger(logging.INFO),
    processors=[
        structlog.contextvars.merge_contextvars,
        structlog.processors.add_log_level,
        structlog.processors.format_exc_info,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        structlog.processors.JSONRenderer(serializer=orjson.dumps),
    ],
    logger_factory=structlog.BytesLoggerFactory(),
)
log = structlog.get_logger()


class Lease(BaseModel):
    sandbox_id: str
    name: str
    external_id: str
    allocated_at: int
    expires_at: int
    sfdc_account_id: str | None


class RequestMiddleware:
    """Write a log line and update the metrics for each request."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        request_id = str(uuid.uuid4())
        status = 500

        async def send_with_request_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"].append((b"x-request-id", request_id.encode()))
            await send(message)

        try:
            await self._app(scope, receive, send_with_request_id)
        finally:
            seconds = time.perf_counter() - began
            path = scope["path"]
            REQUESTS.labels(path, status).inc()
            LATENCY.labels(path).observe(seconds)
            log.info(
                "request",
                request_id=request_id,
                method=scope["method"],
                path=path,
                status=status,
                duration_ms=round(seconds * 1000, 1),
            )


async def allocate_sandbox(
    pool: asyncpg.Pool, holder: str, track_name: str | None, idempotency_key: str | None
) -> tuple[Lease | None, bool]:
    """Return the student's lease, or allocate a sandbox. The flag states whether the lease is new.

    The lease is None if the pool is empty.
    """
    try:
        async with pool.acquire() as connection, connection.transaction():
            if existing := await connection.fetchrow(FIND_LEASE, holder):
                return _build_lease(existing, existing), False
            sandbox = await connection.fetchrow(LOCK_AVAILABLE)
            if sandbox is None:
                return None, False
            await connection.execute(MARK_ALLOCATED, sandbox["sandbox_id"])
            lease = await connection.fetchrow(
                INSERT_LEASE, sandbox["sandbox_id"], holder, track_name, idempotency_key
            )
            assert lease is not None
            return _build_lease(sandbox, lease), True
    except asyncpg.UniqueViolationError:  # a concurrent request of the same student won
        existing = await pool.fetchrow(FIND_LEASE, holder)
        if existing is None:
            raise
        return _build_lease(existing, existing), False


def _build_lease(sandbox: asyncpg.Record, lease: asyncpg.Record) -> Lease:
    return Lease(
        sandbox_id=sandbox["sandbox_id"],
        name=sandbox["name"],
        external_id=sandbox["external_id"],
        sfdc_account_id=sandbox["sfdc_account_id"],
        allocated_at=int(lease["allocated_at"].timestamp()),
        expires_at=int(lease["expires_at"].timestamp()),
    )


def create_app() -> FastAPI:
    token = os.environ["BROKER_API_TOKEN"].encode()
    bearer = HTTPBearer()

    async def require_token(credentials: Annotated[HTTPAuthorizationCredentials, Depends(bearer)]) -> None:
        if not secrets.compare_digest(credentials.credentials.encode(), token):
            raise HTTPException(401, headers={"WWW-Authenticate": "Bearer"})

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        async with asyncpg.create_pool(
            os.environ["DATABASE_URL"], min_size=POOL_SIZE, max_size=POOL_SIZE
        ) as app.state.pool:
            yield

    app = FastAPI(lifespan=lifespan)
    app.add_middleware(RequestMiddleware)
    app.mount("/metrics", make_asgi_app())

    @app.get("/readyz")
    async def readyz() -> None:
        await app.state.pool.execute("SELECT")

    @app.post("/v1/allocate", status_code=201, dependencies=[Depends(require_token)])
    async def post_allocate(
        request: Request,
        response: Response,
        x_instruqt_sandbox_id: Annotated[str, Header(min_length=1, max_length=128)],
        x_instruqt_track_id: Annotated[str | None, Header()] = None,
        idempotency_key: Annotated[str | None, Header()] = None,
    ) -> Lease:
        lease, is_new = await allocate_sandbox(
            request.app.state.pool, x_instruqt_sandbox_id, x_instruqt_track_id, idempotency_key
        )
        if lease is None:
            raise HTTPException(409, "No available sandboxes in pool", {"Retry-After": "30"})
        if not is_new:
            response.status_code = 200
        return lease

    return app
