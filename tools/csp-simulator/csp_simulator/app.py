"""The application: the CSP API under /v2, the control API under /_control, and /healthz."""

import traceback
from pathlib import Path

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Mount, Route

from csp_simulator.accounts import Accounts
from csp_simulator.api import Api
from csp_simulator.behaviour import Faults
from csp_simulator.calls import Calls
from csp_simulator.control import Control

DEFAULT_TOKEN = "simulator-token"


def create_app(
    *,
    accounts: int = 50,
    token: str = DEFAULT_TOKEN,
    name_prefix: str = "sandbox-",
    state_file: Path | None = None,
    seed: int | None = None,
) -> Starlette:
    """Build a simulator of its own, topped up to `accounts` active sandboxes.

    `seed` makes the error rates repeatable. Raises accounts.StateError for an unusable state file.
    """
    stock = Accounts(state_file)
    stock.add(max(0, accounts - stock.active_count()), name_prefix)
    faults = Faults(seed)
    # An application of its own, so that its error answers pass through the call record as well.
    calls = Calls(Starlette(routes=Api(stock, faults, token).routes(), exception_handlers=ERROR_HANDLERS))
    control = Control(stock, faults, calls, name_prefix)
    return Starlette(
        routes=[
            Route("/healthz", _healthz),
            Mount("/v2", app=calls),
            Mount("/_control", routes=control.routes()),
        ],
        exception_handlers=ERROR_HANDLERS,
    )


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
