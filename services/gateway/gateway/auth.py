"""Who may call: bearer tokens, from a list each, so that they are rotated without downtime."""

import hmac
from dataclasses import dataclass

from fastapi import Request, Security
from fastapi.security import HTTPBearer
from pydantic import SecretStr

from gateway.errors import ApiError
from gateway.headers import BLANKS, Fields

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
    """Judges the header fields of a request; raises ApiError where they do not suffice."""

    api: Tokens
    admin: Tokens

    def track(self, given: Fields) -> None:
        """Track routes: either token will do."""
        candidate = _candidate(given)
        if not (self.api.hold(candidate) | self.admin.hold(candidate)):
            raise _unknown()

    def administration(self, given: Fields) -> None:
        """Admin routes: the admin token alone."""
        candidate = _candidate(given)
        if self.admin.hold(candidate):
            return
        if self.api.hold(candidate):
            raise ApiError("FORBIDDEN", "This route needs the admin token; yours is a track token.")
        raise _unknown()


def _candidate(given: Fields) -> bytes:
    scheme, _, token = given.get(b"authorization", b"").partition(b" ")
    token = token.strip(BLANKS)
    if scheme.lower() != b"bearer" or not token:
        raise _unauthorized("Send the header 'Authorization: Bearer <token>'.")
    return token


def _unauthorized(message: str) -> ApiError:
    return ApiError("UNAUTHORIZED", message, headers={"WWW-Authenticate": "Bearer"})


def _unknown() -> ApiError:
    return _unauthorized("This token is not known here. Check it, or ask the operator for a new one.")


async def track(request: Request, _: object = Security(_track_token), __: object = Security(_admin_token)) -> None:
    """The dependency of track routes."""
    request.app.state.context.auth.track(dict(request.scope["headers"]))


async def administration(request: Request, _: object = Security(_admin_token)) -> None:
    """The dependency of admin routes."""
    request.app.state.context.auth.administration(dict(request.scope["headers"]))
