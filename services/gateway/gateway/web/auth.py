"""Bearer-token authentication with named tokens, and with the lists of tokens in the settings."""

import hashlib
import hmac
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Literal, NamedTuple, TypeGuard

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from pydantic import SecretStr
from starlette.types import Scope

from gateway import metrics
from gateway.api.errors import ApiError
from gateway.web import rate_limit, roles
from gateway.web.client_address import ClientAddress
from gateway.web.headers import BLANKS, Fields
from gateway.web.named_tokens import NamedToken, NamedTokens, looks_named
from gateway.web.rate_limit import RateLimit
from sandbox_broker.contract.tokens import Role, Sender

CallerRole = Role | Literal["unknown", "missing", "unchecked"]
"""`unknown`: there is no such token. `missing`: the request has no token, or more than one. `unchecked`: the token
may be a named one, and the database does not answer."""

# Only for the OpenAPI document and the docs page, because the middleware identifies the caller.
_track_token = HTTPBearer(
    scheme_name="trackToken",
    auto_error=False,
    description="A token of BROKER_API_TOKEN, or one with the role track.",
)
_admin_token = HTTPBearer(
    scheme_name="adminToken",
    auto_error=False,
    description="A token of BROKER_ADMIN_TOKEN, or a named token with the role of the route. Track routes accept "
    "the role admin, too.",
)


class Caller(NamedTuple):
    """Sender of a request, identified by its token. The middleware puts it into the request's state."""

    role: CallerRole
    token_hash: bytes = b""
    """Hash of a known token, for counters."""
    actor: str = ""
    """Name of the token, or `$` and the setting that lists it."""
    named: NamedToken | None = None

    @property
    def has_known_token(self) -> bool:
        return bool(self.token_hash)


_UNKNOWN = Caller("unknown")
_MISSING = Caller("missing")
_UNCHECKED = Caller("unchecked")

_MAX_SENDERS = 5000
"""In memory."""

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
        named_tokens: NamedTokens,
    ) -> None:
        """The tokens are comma-separated lists. A token in both lists is an admin token."""
        admins, tracks = _split_tokens(admin_tokens), _split_tokens(track_tokens)
        self._tokens = [*admins, *tracks]
        # Hash the known tokens once, so that no request hashes its token.
        self._callers = [
            *(_build_caller("admin", token, "$BROKER_ADMIN_TOKEN") for token in admins),
            *(_build_caller("track", token, "$BROKER_API_TOKEN") for token in tracks),
        ]
        self._named_tokens = named_tokens
        self._failures = failures
        self._client_address = client_address

    async def identify(self, headers: Sequence[tuple[bytes, bytes]], fields: Fields) -> Caller:
        """Compare the token of a request with all known tokens, each in constant time.

        `headers` are all headers as sent, `fields` the same by name. A named token that is not accepted is checked
        again with fresh tokens, whatever is wrong with it, so that the time says nothing about it.
        """
        token = _read_token(headers, fields)
        if token is None:
            return _MISSING
        matches = [hmac.compare_digest(known, token) for known in self._tokens]
        if True in matches:
            return self._callers[matches.index(True)]
        named = self._named_tokens.find(token)
        if named is None and looks_named(token):
            await self._named_tokens.refresh_for_unknown()
            named = self._named_tokens.find(token)
            if named is None and not self._named_tokens.is_fresh:
                return _UNCHECKED
        return _UNKNOWN if named is None else Caller(named.role, named.token_hash, named.name, named)

    def require_track_token(self, scope: Scope) -> None:
        """Accept the roles track and admin."""
        caller: Caller = scope["state"]["caller"]
        if not _is_role(caller.role):
            raise self._unauthorized(scope, caller)
        if caller.role not in roles.TRACK_ROLES:
            raise _forbidden(caller, "track")

    def require_admin_token(self, scope: Scope, path: str) -> None:
        """Accept the roles that may use the admin route. `path` is the template of the route."""
        caller: Caller = scope["state"]["caller"]
        if not _is_role(caller.role):
            raise self._unauthorized(scope, caller)
        required = roles.required_role(scope["method"], path)
        if not roles.is_permitted(caller.role, required):
            raise _forbidden(caller, required)
        # The status of a broker without its database is needed most.
        if caller.named is not None and not self._named_tokens.is_fresh and path != "/v1/admin/status":
            raise ApiError("DATABASE_UNAVAILABLE")

    def _unauthorized(self, scope: Scope, caller: Caller) -> ApiError:
        metrics.AUTH_FAILURES.labels(reason=caller.role).inc()
        if caller is _UNCHECKED:
            return ApiError("DATABASE_UNAVAILABLE")
        return self.limit_failures(scope) or ApiError(
            "UNAUTHORIZED", _PROBLEMS[caller.role], headers={"WWW-Authenticate": "Bearer"}
        )

    def limit_failures(self, scope: Scope) -> ApiError | None:
        """Count a refused request by client address. Return RATE_LIMITED if the address exceeds the limit."""
        if self._failures is None:
            return None
        status = self._failures.hit(self._client_address(scope).counted)
        return rate_limit.build_error(status, known_token=False) if status.is_exceeded else None


def build_sender(scope: Scope, reason: str | None = None) -> Sender:
    """Return the sender of a command for the audit."""
    caller: Caller = scope["state"]["caller"]
    key_id = None if caller.named is None else caller.named.key_id
    return _build_sender(caller.actor, key_id, scope["state"]["client"].full, reason)


@lru_cache(_MAX_SENDERS)
def _build_sender(actor: str, key_id: str | None, address: str, reason: str | None) -> Sender:
    """Return the sender, which is the same for most requests of a token."""
    return Sender(actor=actor, key_id=key_id, address=address, reason=reason)


def build_student_sender(scope: Scope) -> Sender | None:
    """Return the sender of a command of a student; None with a token of a setting."""
    caller: Caller = scope["state"]["caller"]
    return None if caller.named is None else build_sender(scope)


def _read_token(headers: Sequence[tuple[bytes, bytes]], fields: Fields) -> bytes | None:
    # Two Authorization headers count as none, because a proxy may have checked the other one.
    if len(fields) != len(headers) and [name for name, _ in headers].count(b"authorization") > 1:
        return None
    scheme, _, token = fields.get(b"authorization", b"").partition(b" ")
    token = token.strip(BLANKS)
    return token if scheme.lower() == b"bearer" and token else None


def _is_role(role: CallerRole) -> TypeGuard[Role]:
    return role in roles.RANKS


def _forbidden(caller: Caller, required: Role) -> ApiError:
    metrics.AUTH_FAILURES.labels(reason="forbidden").inc()
    return ApiError("FORBIDDEN", parameters={"cause": "role", "required": required, "role": caller.role})


def _build_caller(role: Role, token: bytes, actor: str) -> Caller:
    return Caller(role, hashlib.sha256(token).digest(), actor)


def _split_tokens(listed: SecretStr) -> list[bytes]:
    return [part.strip().encode() for part in listed.get_secret_value().split(",") if part.strip()]


async def require_track_token(
    request: Request, _: object = Security(_track_token), __: object = Security(_admin_token)
) -> None:
    """Dependency of track routes."""
    request.app.state.context.auth.require_track_token(request.scope)


async def require_admin_token(request: Request, _: object = Security(_admin_token)) -> None:
    """Dependency of admin routes: `roles.required_role` has the role of each."""
    request.app.state.context.auth.require_admin_token(request.scope, request.scope["route"].path)
