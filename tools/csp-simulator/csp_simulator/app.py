"""ASGI application: the simulated APIs under /v2 and /api, the control API under /_control, and /healthz."""

import traceback
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from csp_simulator.accounts import AccountStore
from csp_simulator.calls import CallRecorder
from csp_simulator.control import ControlApi
from csp_simulator.csp_api import CspApi
from csp_simulator.faults import FaultInjector
from csp_simulator.niosxaas import NiosxaasApi
from csp_simulator.script import ScriptPlayer
from csp_simulator.services import ServiceStore
from csp_simulator.session_api import SessionApi
from csp_simulator.sessions import Sessions
from csp_simulator.user_api import UserApi
from csp_simulator.users import UserStore

DEFAULT_TOKEN = "simulator-token"
DEFAULT_EMAIL = "simulator@example.com"
DEFAULT_PASSWORD = "simulator-password"


def create_app(
    *,
    accounts: int = 50,
    token: str = DEFAULT_TOKEN,
    email: str = DEFAULT_EMAIL,
    password: str = DEFAULT_PASSWORD,
    name_prefix: str = "sandbox-",
    state_file: Path | None = None,
    seed: int | None = None,
) -> Starlette:
    """Build an independent simulator with at least `accounts` active sandboxes.

    `seed` makes random choices and the ids of new accounts repeatable. Raises `accounts.StateError` for an
    unusable state file.
    """
    account_store, services, faults = AccountStore(state_file, seed), ServiceStore(), FaultInjector(seed)
    account_store.create_sandboxes(max(0, accounts - account_store.count_active()), name_prefix)
    csp_api = CspApi(account_store, faults, token)
    sessions, users = Sessions(), UserStore()
    session_api = SessionApi(account_store, users, sessions, faults, (email, password))
    niosxaas = NiosxaasApi(session_api, sessions, services, faults)
    user_api = UserApi(session_api, sessions, users, faults)
    routes = [route for api in (csp_api, session_api, niosxaas, user_api) for route in api.routes()]
    # A separate application, because the recorder must also see its error responses.
    calls = CallRecorder(Starlette(routes=routes, exception_handlers=ERROR_HANDLERS))
    player = ScriptPlayer(faults, account_store, name_prefix)
    control = ControlApi(account_store, services, users, session_api, faults, calls, player, name_prefix)
    return Starlette(
        routes=[
            Route("/healthz", _answer_healthz),
            Route("/_control", control.index),
            Mount("/_control", routes=control.routes()),
            Mount("/", app=calls),
        ],
        middleware=[Middleware(ScriptMiddleware, player)],
        exception_handlers=ERROR_HANDLERS,
    )


class ScriptMiddleware:
    """Apply the due steps of the script before every request."""

    def __init__(self, app: ASGIApp, player: ScriptPlayer) -> None:
        self._app = app
        self._player = player

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._player.apply_due_steps()
        await self._app(scope, receive, send)


async def _answer_healthz(_: Request) -> Response:
    return PlainTextResponse("ok")


async def _handle_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _handle_internal_error(_: Request, error: Exception) -> Response:
    # Print the error here: uvicorn's log is off, because it would report every injected hang that a stop ends.
    traceback.print_exception(error)
    return JSONResponse({"error": "the simulator failed; its standard error has the reason"}, 500)


ERROR_HANDLERS = {HTTPException: _handle_http_error, Exception: _handle_internal_error}
