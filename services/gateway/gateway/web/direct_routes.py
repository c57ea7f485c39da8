"""Direct routes: functions that handle a request without FastAPI.

The routing, dependencies and exception handlers of FastAPI take more processor time than such a route itself.
RequestMiddleware calls these functions.
"""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import NamedTuple

from starlette.types import Scope

from gateway.web.headers import Fields


class DirectResponse(NamedTuple):
    status: int
    body: bytes
    """JSON."""
    headers: Sequence[tuple[bytes, bytes]] = ()
    """Further header fields, by lower-case names."""


DirectRoute = Callable[[Scope, Fields], Awaitable[DirectResponse]]
"""Handler of a request with these header fields. May raise ApiError or ClientDisconnected."""

DirectRoutes = Mapping[tuple[str, str], DirectRoute]
"""Direct routes by method and path. Both must match exactly."""
