"""The application: the APIs under /v2 and /api, the control API under /_control, and /healthz."""

import traceback
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route
from starlette.types import ASGIApp, Receive, Scope, Send

from csp_simulator.accounts import Accounts
from csp_simulator.api import Api
from csp_simulator.calls import Calls
from csp_simulator.control import Control
from csp_simulator.faults import Faults
from csp_simulator.niosxaas import Niosxaas
from csp_simulator.script import Player
from csp_simulator.services import Services
from csp_simulator.sessions import Sessions

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
    """Build a simulator of its own, topped up to `accounts` active sandboxes.

    `seed` makes chance and the ids of new accounts repeatable. Raises accounts.StateError for an
    unusable state file.
    """
    stock, services, faults = Accounts(state_file, seed), Services(), Faults(seed)
    stock.add(max(0, accounts - stock.active_count()), name_prefix)
    api = Api(stock, faults, token)
    niosxaas = Niosxaas(stock, services, Sessions(), faults, (email, password))
    # An application of its own, so that its error answers pass through the call record as well.
    calls = Calls(Starlette(routes=[*api.routes(), *niosxaas.routes()], exception_handlers=ERROR_HANDLERS))
    player = Player(faults, stock, name_prefix)
    control = Control(stock, services, faults, calls, player, name_prefix)
    return Starlette(
        routes=[
            Route("/healthz", _healthz),
            Route("/_control", control.index),
            Mount("/_control", routes=control.routes()),
            Mount("/", app=calls),
        ],
        middleware=[Middleware(CatchUp, player)],
        exception_handlers=ERROR_HANDLERS,
    )


class CatchUp:
    """Lets the script catch up before every request."""

    def __init__(self, app: ASGIApp, player: Player) -> None:
        self._app = app
        self._player = player

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._player.catch_up()
        await self._app(scope, receive, send)


async def _healthz(_: Request) -> Response:
    return PlainTextResponse("ok")


async def _json_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


async def _internal_error(_: Request, error: Exception) -> Response:
    # uvicorn is kept quiet, because it would also complain of every hanging call that a stop ends.
    traceback.print_exception(error)
    return JSONResponse({"error": "the simulator failed; its output says why"}, 500)


ERROR_HANDLERS = {HTTPException: _json_error, Exception: _internal_error}
