"""Wiring of the gateway: the HTTP application and its connections to RabbitMQ and PostgreSQL."""

from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from http import HTTPStatus

import structlog
from fastapi import Depends, FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Match
from starlette.types import ASGIApp

from gateway import metrics
from gateway.allocator_client import AllocatorClient
from gateway.api import docs, errors
from gateway.api.errors import ApiError
from gateway.context import Context
from gateway.event_feed import EventFeed
from gateway.queries.queue_metrics import QueueMetrics
from gateway.queries.status import StatusReporter
from gateway.routes import (
    access,
    admin_actions,
    admin_audit,
    admin_dead_letters,
    admin_events,
    admin_policies,
    admin_read,
    admin_stock,
    admin_students,
    admin_sync,
    admin_tokens,
    instruqt,
    lease_changes,
    track,
)
from gateway.settings import Settings
from gateway.web import auth, client_address, cors, rate_limit, request_middleware, uvicorn_protocol
from gateway.web.connection_limit import ConnectionLimit
from gateway.web.direct_routes import DirectRoutes
from gateway.web.named_tokens import NamedTokens
from gateway.web.students_per_address import StudentsPerAddress
from gateway.web.webhook_signature import WebhookVerifier
from sandbox_broker.database import connections
from sandbox_broker.database.primary import Primary
from sandbox_broker.messaging.publisher import Publisher
from sandbox_broker.messaging.rpc_client import RpcClient
from sandbox_broker.observability import health
from sandbox_broker.runtime import service, startup
from sandbox_broker.runtime.access_keys import parse_access_keys

log = structlog.get_logger()

POOL_TIMEOUT_SEC = 2
"""Longest wait of a read for a database connection."""


DIRECT_ROUTES: DirectRoutes = {("POST", track.ALLOCATE): track.fast_allocate}


def create_app(settings: Settings) -> FastAPI:
    primary = Primary(settings.database_url)
    engine = connections.create_engine(primary, pool_size=5, max_overflow=5, pool_timeout=POOL_TIMEOUT_SEC)
    publisher = Publisher(settings.amqp_url, "gateway")
    rpc_client = RpcClient(settings.amqp_url, "gateway", publisher)
    allocator = AllocatorClient(publisher, rpc_client)
    metrics.IN_FLIGHT.set_function(lambda: allocator.in_flight)

    async def queue() -> str | None:
        return None if rpc_client.connected else "not connected to RabbitMQ"

    async def database() -> str | None:
        return await connections.check_connection(engine)

    tokens = NamedTokens(engine, rpc_client, settings.token_pepper)
    event_feed = EventFeed(
        settings.amqp_url,
        max_streams=settings.max_event_streams,
        is_stopping=lambda: getattr(app.state, "stopping", False),
    )
    metrics.EVENT_STREAMS.set_function(lambda: event_feed.count)
    tasks = service.lifespan(
        publisher.run,
        rpc_client.run,
        allocator.run,
        allocator.watch,
        QueueMetrics(publisher).watch,
        primary.watch,
        tokens.watch,
        tokens.record_uses,
        event_feed.run,
        event_feed.end_at_stop,
    )

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncIterator[None]:
        async with tasks(app):
            yield
        await engine.dispose()

    app = FastAPI(
        # RequestMiddleware creates the spans, metrics and log lines.
        telemetry={"tracing": False, "metrics": False, "logs": False},
        title="Sandbox Broker",
        version="1",
        summary="Leases pre-created Infoblox CSP accounts to Instruqt students",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        lifespan=lifespan,
        exception_handlers={
            ApiError: _api_error,
            HTTPException: _http_exception,
            RequestValidationError: _invalid_request,
            Exception: _raise,
        },
    )
    rate_limits = rate_limit.build_rate_limits(settings.rate_limit) if settings.rate_limit else None
    find_client = client_address.build_client_address(settings.trusted_proxies)
    authentication = auth.Auth(
        settings.broker_api_token,
        settings.broker_admin_token,
        rate_limits.failures if rate_limits else None,
        find_client,
        tokens,
    )
    status_reporter = StatusReporter(publisher, engine)
    app.state.context = Context(
        settings,
        authentication,
        tokens,
        WebhookVerifier(settings.instruqt_webhook_secret),
        rate_limits,
        StudentsPerAddress(students_rate) if (students_rate := settings.students_per_address_alert) else None,
        find_client,
        engine,
        publisher,
        rpc_client,
        allocator,
        event_feed,
        status_reporter,
        parse_access_keys(settings.access_keys),
    )
    app.include_router(track.router, dependencies=[Depends(auth.require_track_token)])
    app.include_router(instruqt.router)  # the signature of a webhook takes the place of a token
    app.include_router(lease_changes.router, dependencies=[Depends(auth.require_track_token)])
    app.include_router(access.router, dependencies=[Depends(auth.require_track_token)])
    app.include_router(access.admin_router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(lease_changes.admin_router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_read.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_actions.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_sync.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_dead_letters.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_events.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_stock.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_policies.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_audit.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_students.router, dependencies=[Depends(auth.require_admin_token)])
    app.include_router(admin_tokens.router, dependencies=[Depends(auth.require_admin_token)])
    # Add them as routes of FastAPI, because the OpenAPI document and the metrics contain no other routes.
    for route in health.routes({"queue": queue, "database": database}):
        app.add_api_route(
            route.path,
            route.endpoint,
            include_in_schema=settings.ops_port is None,
            **docs.OPERATIONS[route.path],
        )
    if settings.docs_enabled:
        docs.add_routes(app)
    # Around the layers of FastAPI, not between them as with add_middleware, because a direct route passes none.
    stack: ASGIApp = request_middleware.RequestMiddleware(app.build_middleware_stack(), direct_routes=DIRECT_ROUTES)
    if settings.cors_allowed_origins:
        stack = cors.CrossOriginMiddleware(stack, settings.cors_allowed_origins)
    app.middleware_stack = stack
    return app


async def _api_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)  # noqa: S101 (for the type of handlers in Starlette)
    return errors.build_response(error, request.scope["state"])


async def _http_exception(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101
    headers = error.headers
    if error.status_code == HTTPStatus.METHOD_NOT_ALLOWED:
        headers = {"Allow": ", ".join(_allowed_methods(request))}
    settings = request.app.state.context.settings
    response_error = errors.from_status(
        error.status_code, request.method, request.scope["path"], headers, docs_enabled=settings.docs_enabled
    )
    return errors.build_response(response_error, request.scope["state"])


def _allowed_methods(request: Request) -> list[str]:
    """Return the methods of all routes of the path. Some paths have several routes."""
    scope = {"type": "http", "path": request.scope["path"], "root_path": "", "headers": []}
    return [
        method
        for method in sorted(request_middleware.METHODS)
        if any(route.matches({**scope, "method": method})[0] is Match.FULL for route in request.app.routes)
    ]


async def _invalid_request(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)  # noqa: S101
    fields = [{"field": _field(problem), "problem": str(problem["msg"])} for problem in error.errors()]
    names = ", ".join(field["field"] for field in fields)
    message = f"The request has invalid parameters: {names}. Correct them, then send the request again."
    return errors.build_response(ApiError("INVALID_REQUEST", message, fields=fields), request.scope["state"])


async def _raise(_: Request, error: Exception) -> Response:
    """Leave the response to RequestMiddleware. Starlette would send one of its own."""
    raise error


def _field(problem: Mapping[str, object]) -> str:
    location = problem["loc"]
    return str(location[-1]) if isinstance(location, tuple | list) and location else "request"


def main() -> None:
    settings = startup.prepare(Settings, "gateway")
    log.warning(
        "tokens.without_name",
        settings=["BROKER_API_TOKEN", "BROKER_ADMIN_TOKEN"],
        advice="These tokens have no limits and no name in the audit. Create named ones: brokerctl token create.",
    )
    connection_limit = ConnectionLimit(settings.max_connections_per_address, settings.trusted_proxies)
    service.run(
        create_app(settings),
        settings.gateway_port,
        ops_port=settings.ops_port,
        bind_host=settings.bind_host,
        protocol=uvicorn_protocol.build_protocol(settings.client_timeout_sec, connection_limit),
        drain_sec=settings.drain_sec,
    )
