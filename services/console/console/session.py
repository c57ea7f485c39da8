"""Session: an encrypted cookie, because the console has no database and its replicas share no state.

A session is a dict with `token`, `name`, `role`, `csrf` and `began_at` for a signed-in person. During a sign-in
with OpenID Connect it holds the state of the sign-in.
"""

import base64
import hashlib
import hmac
import json
import secrets
import time
from collections.abc import Sequence
from dataclasses import dataclass
from http.cookies import SimpleCookie
from typing import Any

from cryptography.fernet import Fernet, InvalidToken, MultiFernet
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from console.settings import ROLES, Role

MAX_COOKIE = 3800
"""Bytes. Browsers drop cookies over 4,096."""


@dataclass(frozen=True, slots=True)
class Person:
    """The signed-in person."""

    name: str
    role: Role
    token: str
    csrf: str

    def has_role(self, role: Role) -> bool:
        """Return whether the role includes the rights of `role`."""
        return ROLES.index(self.role) >= ROLES.index(role)


class SessionCookies:
    """Encryption of sessions. The first secret encrypts, all of them decrypt."""

    def __init__(self, key_texts: Sequence[str], *, hours: float, secure: bool) -> None:
        self._fernet = MultiFernet([Fernet(_derive_key(text)) for text in key_texts])
        self._max_age_sec = int(hours * 3600)
        self._secure = secure
        # A browser accepts the prefix __Host- from this host over TLS only.
        self.name = "__Host-console" if secure else "console_session"

    def read(self, cookies: str) -> tuple[dict[str, Any], bool]:
        """Return the session and whether the cookie was refused: too old, forged, or of a secret that is gone."""
        jar: SimpleCookie = SimpleCookie()
        jar.load(cookies)
        if self.name not in jar:
            return {}, False
        try:
            session = json.loads(self._fernet.decrypt(jar[self.name].value.encode(), ttl=None))
        except (InvalidToken, ValueError):
            return {}, True
        if "began_at" in session and time.time() - session["began_at"] > self._max_age_sec:
            return {}, True
        return session, False

    def render(self, session: dict[str, Any]) -> str:
        """Return the value of Set-Cookie. An empty session removes the cookie."""
        value = self._fernet.encrypt(json.dumps(session).encode()).decode() if session else ""
        if len(value) > MAX_COOKIE:
            raise ValueError("the session is too large for a cookie")
        age = self._max_age_sec if session else 0
        secure = "; Secure" if self._secure else ""
        return f"{self.name}={value}; Path=/; Max-Age={age}; HttpOnly; SameSite=Lax{secure}"


class SessionMiddleware:
    """Puts the session into `scope["session"]`, and sends it back if a route changed it."""

    def __init__(self, app: ASGIApp, cookies: SessionCookies) -> None:
        self._app = app
        self._cookies = cookies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        sent = dict(scope["headers"]).get(b"cookie", b"").decode("latin-1")
        session, refused = self._cookies.read(sent)
        scope["session"] = session
        scope.setdefault("state", {})["session_expired"] = refused
        before = json.dumps(session)

        async def send_with_cookie(message: Message) -> None:
            if message["type"] == "http.response.start" and (refused or json.dumps(scope["session"]) != before):
                headers = MutableHeaders(scope=message)
                headers.append("set-cookie", self._cookies.render(scope["session"]))
            await send(message)

        await self._app(scope, receive, send_with_cookie)


def sign_in(request: Request, *, name: str, role: Role, token: str) -> None:
    """Begin a new session, so that a session before the sign-in becomes invalid."""
    request.session.clear()
    request.session.update(
        name=name, role=role, token=token, csrf=secrets.token_urlsafe(24), began_at=int(time.time())
    )


def read_person(request: Request) -> Person | None:
    session = request.session
    if "token" not in session:
        return None
    return Person(session["name"], session["role"], session["token"], session["csrf"])


def is_csrf_valid(person: Person, sent: str) -> bool:
    return hmac.compare_digest(person.csrf.encode(), sent.encode())


def _derive_key(text: str) -> bytes:
    return base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest())
