"""Who may call: bearer tokens, from a list each, so that they are rotated without downtime."""

import hmac
from collections.abc import Callable
from dataclasses import dataclass

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from pydantic import SecretStr
from starlette.types import Scope

from gateway import metrics
from gateway.errors import ApiError
from gateway.headers import BLANKS
from gateway.limits import RateLimit, exceeded

# For the OpenAPI document and the docs page alone; the judging is done below.
_track_token = HTTPBearer(scheme_name="trackToken", auto_error=False, description="One of BROKER_API_TOKEN")
_admin_token = HTTPBearer(
    scheme_name="adminToken",
    auto_error=False,
    description="One of BROKER_ADMIN_TOKEN; it works on track routes too",
)


class Tokens:
    """A comma-separated list of tokens; a candidate is compared with all of them in constant time."""

    def __init__(self, listed: SecretStr) -> None:
        self._tokens = [part.strip().encode() for part in listed.get_secret_value().split(",") if part.strip()]

    def hold(self, candidate: bytes) -> bool:
        return bool(sum([hmac.compare_digest(token, candidate) for token in self._tokens]))


@dataclass(frozen=True, slots=True)
class Auth:
    """Judges the token of a request; raises ApiError where it does not suffice.

    Requests without a known token are counted by address, and past a limit told to wait. A known token is never
    refused for others at the same address: whole classes come from one, and one of their tracks may have a wrong
    token.
    """

    api: Tokens
    admin: Tokens
    failures: RateLimit | None
    client_address: Callable[[Scope], str]

    def track(self, scope: Scope) -> None:
        """Track routes: either token will do."""
        candidate = self._candidate(scope)
        if not (self.api.hold(candidate) | self.admin.hold(candidate)):
            raise self._unknown(scope)

    def administration(self, scope: Scope) -> None:
        """Admin routes: the admin token alone."""
        candidate = self._candidate(scope)
        if self.admin.hold(candidate):
            return
        if self.api.hold(candidate):
            metrics.AUTH_FAILURES.labels(reason="forbidden").inc()
            raise ApiError("FORBIDDEN", "This route needs the admin token; yours is a track token.")
        raise self._unknown(scope)

    def _candidate(self, scope: Scope) -> bytes:
        # Of two, a proxy before us may have looked at the other one.
        given = [value for field, value in scope["headers"] if field == b"authorization"]
        scheme, _, token = (given[0] if len(given) == 1 else b"").partition(b" ")
        token = token.strip(BLANKS)
        if scheme.lower() != b"bearer" or not token:
            raise self._failure(scope, "missing", "Send the header 'Authorization: Bearer <token>', once.")
        return token

    def _unknown(self, scope: Scope) -> ApiError:
        message = "This token is not known here. Check it, or ask the operator for a new one."
        return self._failure(scope, "unknown", message)

    def _failure(self, scope: Scope, reason: str, message: str) -> ApiError:
        metrics.AUTH_FAILURES.labels(reason=reason).inc()
        if self.failures is not None:
            standing = self.failures.hit(self.client_address(scope))
            if standing.over:
                return exceeded(standing, "Too many requests without a known token")
        return ApiError("UNAUTHORIZED", message, headers={"WWW-Authenticate": "Bearer"})


async def track(request: Request, _: object = Security(_track_token), __: object = Security(_admin_token)) -> None:
    """The dependency of track routes."""
    request.app.state.context.auth.track(request.scope)


async def administration(request: Request, _: object = Security(_admin_token)) -> None:
    """The dependency of admin routes."""
    request.app.state.context.auth.administration(request.scope)
