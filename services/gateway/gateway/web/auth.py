"""Bearer-token authentication. Each role accepts a list of tokens, so tokens can be rotated without downtime."""

import hashlib
import hmac
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from pydantic import SecretStr
from starlette.types import Scope

from gateway import metrics
from gateway.api.errors import ApiError
from gateway.web import rate_limit
from gateway.web.client_address import ClientAddress
from gateway.web.headers import BLANKS, Fields
from gateway.web.rate_limit import RateLimit

Role = Literal["admin", "track", "unknown", "missing"]
"""`unknown`: the token is not configured. `missing`: the request has no token, or more than one."""

# Only for the OpenAPI document and the docs page, because the middleware identifies the caller.
_track_token = HTTPBearer(scheme_name="trackToken", auto_error=False, description="A token of BROKER_API_TOKEN")
_admin_token = HTTPBearer(
    scheme_name="adminToken",
    auto_error=False,
    description="A token of BROKER_ADMIN_TOKEN. Track routes accept it too.",
)


@dataclass(frozen=True, slots=True)
class Caller:
    """Sender of a request, identified by its token. The middleware puts it into the request's state."""

    role: Role
    token_hash: bytes = b""
    """SHA-256 of a known token, for counters."""

    @property
    def has_known_token(self) -> bool:
        return bool(self.token_hash)


_UNKNOWN = Caller("unknown")
_MISSING = Caller("missing")

_PROBLEMS = {
    "missing": "The token is missing. Send the header 'Authorization: Bearer <token>' once.",
    "unknown": "The token is unknown. Check it, or ask the operator for a new one.",
}


class Auth:
    """Authentication of callers, and the check of their roles. Raises ApiError for a role that does not suffice.

    Requests without a known token are counted by client address and refused with 429 beyond a limit. A known token
    is never refused because of other clients at its address: a whole class shares one address, and one of its
    tracks may have a wrong token.
    """

    def __init__(
        self,
        track_tokens: SecretStr,
        admin_tokens: SecretStr,
        failures: RateLimit | None,
        client_address: Callable[[Scope], ClientAddress],
    ) -> None:
        """The tokens are comma-separated lists. A token in both lists is an admin token."""
        admins, tracks = _split_tokens(admin_tokens), _split_tokens(track_tokens)
        self._tokens = [*admins, *tracks]
        # Hash the known tokens once, so that no request hashes its token.
        self._callers = [
            *(_build_caller("admin", token) for token in admins),
            *(_build_caller("track", token) for token in tracks),
        ]
        self._failures = failures
        self._client_address = client_address

    def identify(self, headers: Sequence[tuple[bytes, bytes]], fields: Fields) -> Caller:
        """Compare the token of a request with all known tokens, each in constant time.

        `headers` are all headers as sent, `fields` the same by name.
        """
        # Two Authorization headers count as none, because a proxy may have checked the other one.
        if len(fields) != len(headers) and [name for name, _ in headers].count(b"authorization") > 1:
            return _MISSING
        scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
        token = token.strip(BLANKS)
        if scheme.lower() != b"bearer" or not token:
            return _MISSING
        matches = [hmac.compare_digest(known, token) for known in self._tokens]
        return self._callers[matches.index(True)] if True in matches else _UNKNOWN

    def require_track_token(self, scope: Scope) -> None:
        """Accept a track token or an admin token."""
        caller: Caller = scope["state"]["caller"]
        if not caller.has_known_token:
            raise self._unauthorized(scope, caller)

    def require_admin_token(self, scope: Scope) -> None:
        caller: Caller = scope["state"]["caller"]
        if caller.role == "admin":
            return
        if caller.has_known_token:
            metrics.AUTH_FAILURES.labels(reason="forbidden").inc()
            raise ApiError(
                "FORBIDDEN",
                "This route requires an admin token, and the request has a track token. Send an admin token.",
            )
        raise self._unauthorized(scope, caller)

    def _unauthorized(self, scope: Scope, caller: Caller) -> ApiError:
        metrics.AUTH_FAILURES.labels(reason=caller.role).inc()
        return self.limit_failures(scope) or ApiError(
            "UNAUTHORIZED", _PROBLEMS[caller.role], headers={"WWW-Authenticate": "Bearer"}
        )

    def limit_failures(self, scope: Scope) -> ApiError | None:
        """Count a refused request by client address. Return RATE_LIMITED if the address exceeds the limit."""
        if self._failures is None:
            return None
        status = self._failures.hit(self._client_address(scope).counted)
        return rate_limit.build_error(status, known_token=False) if status.is_exceeded else None


def _build_caller(role: Role, token: bytes) -> Caller:
    return Caller(role, hashlib.sha256(token).digest())


def _split_tokens(listed: SecretStr) -> list[bytes]:
    return [part.strip().encode() for part in listed.get_secret_value().split(",") if part.strip()]


async def require_track_token(
    request: Request, _: object = Security(_track_token), __: object = Security(_admin_token)
) -> None:
    """Dependency of track routes."""
    request.app.state.context.auth.require_track_token(request.scope)


async def require_admin_token(request: Request, _: object = Security(_admin_token)) -> None:
    """Dependency of admin routes."""
    request.app.state.context.auth.require_admin_token(request.scope)
