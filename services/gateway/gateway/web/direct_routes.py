"""Direct routes: ASGI handlers that bypass the framework.

The routing, dependencies and exception handlers of FastAPI take more processor time than such a route itself.
"""

from collections.abc import Mapping

from starlette.types import ASGIApp, Receive, Scope, Send


class DirectRoutes:
    """Middleware that passes a request to the handler of its method and path in `routes`, and every other request
    to `app`."""

    def __init__(self, app: ASGIApp, routes: Mapping[tuple[str, str], ASGIApp]) -> None:
        self._app = app
        self._routes = routes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        handler = self._routes.get((scope["method"], scope["path"])) if scope["type"] == "http" else None
        await (handler or self._app)(scope, receive, send)
