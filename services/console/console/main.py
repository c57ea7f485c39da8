"""Wiring of the console."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import httpx2
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.staticfiles import StaticFiles
from starlette.types import Scope

from console.api_client import ApiProblem
from console.live_feed import LiveFeeds
from console.rendering import build_environment, render
from console.routes import actions, exports, live, pages, signing_in, tokens
from console.session import SessionCookies, SessionMiddleware
from console.settings import Settings
from console.web import EdgeMiddleware, NotSignedIn, Refused
from sandbox_broker.observability import health
from sandbox_broker.runtime import service, startup
from sandbox_broker.runtime.settings import split_tokens

STATIC = Path(__file__).parent / "static"


def create_app(settings: Settings) -> FastAPI:
    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        # No proxy from the environment, because it would read the tokens.
        limits = httpx2.Limits(max_connections=2 * settings.max_console_streams + 50)
        async with httpx2.AsyncClient(
            base_url=settings.broker_api_url, trust_env=False, limits=limits, follow_redirects=False
        ) as client:
            app.state.http = client
            yield

    app = FastAPI(
        title="Sandbox Broker Console",
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        lifespan=lifespan,
        telemetry={"tracing": False, "metrics": False, "logs": False},
        exception_handlers={
            NotSignedIn: _to_sign_in,
            Refused: _refused,
            ApiProblem: _api_problem,
            RequestValidationError: _invalid,
            HTTPException: _http_error,
        },
    )
    app.state.settings = settings
    app.state.templates = build_environment()
    app.state.oauth = signing_in.build_oauth(settings)
    app.state.feeds = LiveFeeds(settings.max_console_streams)
    for router in (signing_in.router, exports.router, tokens.router, pages.router, actions.router, live.router):
        app.include_router(router)
    app.routes.extend(health.routes({}))
    app.mount("/static", CachedFiles(directory=STATIC), name="static")
    cookies = SessionCookies(
        split_tokens(settings.console_secret),
        hours=settings.console_session_hours,
        secure=settings.is_behind_tls,
    )
    app.add_middleware(SessionMiddleware, cookies=cookies)
    app.add_middleware(EdgeMiddleware, secure=settings.is_behind_tls)
    return app


class CachedFiles(StaticFiles):
    """Static files that a browser keeps for an hour. They change with a new version only."""

    async def get_response(self, path: str, scope: Scope) -> Response:
        response = await super().get_response(path, scope)
        response.headers["cache-control"] = "public, max-age=3600"
        return response


async def _to_sign_in(request: Request, _: Exception) -> Response:
    # An open page must not show the sign-in inside itself.
    if request.headers.get("hx-request") == "true":
        return Response(status_code=204, headers={"HX-Refresh": "true"})
    path = request.url.path if request.method == "GET" and request.url.path != "/events" else "/"
    query = f"?{request.url.query}" if request.url.query else ""
    return RedirectResponse(httpx2.URL("/sign-in", params={"next": f"{path}{query}"}).raw_path.decode(), 303)


async def _refused(request: Request, error: Exception) -> Response:
    assert isinstance(error, Refused)  # noqa: S101 (for the type of handlers in Starlette)
    return render(request, "error.html", error.status, title=error.title, text=error.text)


async def _api_problem(request: Request, error: Exception) -> Response:
    assert isinstance(error, ApiProblem)  # noqa: S101 (as above)
    if error.status == 401:  # the token was revoked
        request.session.clear()
        return await _to_sign_in(request, error)
    if error.is_outage:
        title = "The broker does not answer"
        text = f"{error.message} Students are not affected by this page. It tries again by itself."
        return render(request, "error.html", 503, title=title, text=text, is_outage=True)
    titles = {403: "Your role does not permit this", 404: "Not found"}
    title = titles.get(error.status, "The broker refused the request")
    return render(request, "error.html", error.status, title=title, text=error.message)


async def _invalid(request: Request, _: Exception) -> Response:
    text = "The address of this page has an invalid value. Use the links and forms of the console."
    return render(request, "error.html", 400, title="The address is not valid", text=text)


async def _http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)  # noqa: S101 (as above)
    text = "There is no such page. Use the menu."
    title = "Not found" if error.status_code == 404 else "The request was refused"
    return render(request, "error.html", error.status_code, title=title, text=text)


def main() -> None:
    settings = startup.prepare(Settings, "console")
    service.run(create_app(settings), settings.console_port, bind_host=settings.bind_host)
