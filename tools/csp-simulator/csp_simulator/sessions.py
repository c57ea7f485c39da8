"""Sessions of users: their JWTs and the account each session is switched to."""

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
    """Sessions with one account each. A switch invalidates all earlier JWTs of its session."""

    def __init__(self, now: Callable[[], float] = time.time) -> None:
        self._now = now
        self._key = secrets.token_bytes(32)
        self._accounts: dict[str, str | None] = {}  # by session id, oldest first; None: the user's own account
        self._users: dict[str, str | None] = {}  # by session id; None: the administrator

    def sign_in(self, lifetime_sec: float, account: str | None = None, user_id: str | None = None) -> str:
        """Start a session and return its JWT. Without a user it is a session of the administrator."""
        if len(self._accounts) >= MAX_SESSIONS:
            oldest = next(iter(self._accounts))
            del self._accounts[oldest], self._users[oldest]
        session = secrets.token_hex(8)
        self._accounts[session], self._users[session] = account, user_id
        return self._issue_jwt(session, lifetime_sec)

    def switch_account(self, jwt: str, external_id: str | None, lifetime_sec: float) -> str:
        """Switch the session of a valid JWT to the account (None: the user's own) and return a new JWT."""
        session = str(self._read_claims(jwt)["session"])
        self._accounts[session] = external_id
        return self._issue_jwt(session, lifetime_sec)

    def is_valid(self, jwt: str) -> bool:
        claims = self._read_claims(jwt)
        return (
            claims.get("exp", 0) > self._now()
            and claims["session"] in self._accounts
            and claims["account"] == self._accounts[claims["session"]]
        )

    def get_account(self, jwt: str) -> str | None:
        """Return the account of a valid JWT, or None for the user's own account."""
        account: str | None = self._read_claims(jwt)["account"]
        return account

    def get_user(self, jwt: str) -> str | None:
        """Return the user id of a valid JWT, or None for the administrator."""
        return self._users[self._read_claims(jwt)["session"]]

    def _issue_jwt(self, session: str, lifetime_sec: float) -> str:
        claims = {
            "session": session,
            "account": self._accounts[session],
            "exp": self._now() + lifetime_sec,
        }
        signed = f"{_encode_json({'alg': 'HS256', 'typ': 'JWT'})}.{_encode_json(claims)}"
        return f"{signed}.{self._sign(signed)}"

    def _read_claims(self, jwt: str) -> dict[str, Any]:
        """Return the claims, or an empty object if the signature is not ours."""
        signed, _, signature = jwt.rpartition(".")
        if not hmac.compare_digest(signature.encode(), self._sign(signed).encode()):
            return {}
        payload = signed.partition(".")[2]
        claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4)))
        return claims

    def _sign(self, signed: str) -> str:
        return _encode_base64(hmac.digest(self._key, signed.encode(), hashlib.sha256))


def _encode_json(part: dict[str, Any]) -> str:
    return _encode_base64(json.dumps(part).encode())


def _encode_base64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()
