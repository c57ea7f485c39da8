"""Who is signed in to NIOSXaaS, and to which account the session has been switched."""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

MAX_SESSIONS = 10_000


class Sessions:
    """A session is switched as a whole: a JWT of before its last switch is no longer accepted."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._key = secrets.token_bytes(32)
        self._accounts: dict[str, str | None] = {}  # by session, the oldest first; None: the user's own

    def sign_in(self, lifetime_sec: float) -> str:
        """The JWT of a new session, in the user's own account."""
        if len(self._accounts) >= MAX_SESSIONS:
            del self._accounts[next(iter(self._accounts))]
        session = secrets.token_hex(8)
        self._accounts[session] = None
        return self._jwt(session, lifetime_sec)

    def switch(self, jwt: str, external_id: str | None, lifetime_sec: float) -> str:
        """The JWT with which to act in this account (None: the user's own); `jwt` must be valid."""
        session = str(self._claims(jwt)["session"])
        self._accounts[session] = external_id
        return self._jwt(session, lifetime_sec)

    def is_valid(self, jwt: str) -> bool:
        claims = self._claims(jwt)
        return (
            claims.get("exp", 0) > self._now()
            and claims["session"] in self._accounts
            and claims["account"] == self._accounts[claims["session"]]
        )

    def account_of(self, jwt: str) -> str | None:
        """The account that a valid JWT acts in; None: the user's own."""
        account: str | None = self._claims(jwt)["account"]
        return account

    def _jwt(self, session: str, lifetime_sec: float) -> str:
        claims = {
            "session": session,
            "account": self._accounts[session],
            "exp": self._now() + lifetime_sec,
        }
        signed = f"{_encode({'alg': 'HS256', 'typ': 'JWT'})}.{_encode(claims)}"
        return f"{signed}.{self._signature(signed)}"

    def _claims(self, jwt: str) -> dict[str, Any]:
        """Empty if it is not one of ours."""
        signed, _, signature = jwt.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._signature(signed).encode()):
            return {}
        payload = signed.partition(".")[2]
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return claims

    def _signature(self, signed: str) -> str:
        return _base64(hmac.digest(self._key, signed.encode(), hashlib.sha256))


def _encode(part: dict[str, Any]) -> str:
    return _base64(json.dumps(part).encode())


def _base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
