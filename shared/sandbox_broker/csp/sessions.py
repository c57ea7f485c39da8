"""Sessions of CSP users: sign in, and switch into an account. Its errors are defined in csp/http.py.

The client verifies the account of a session after each switch. `GET /current_user` with the JWT of the account
switch must answer `{"result": {"account_id": "identity/accounts/<uuid>"}}` with the uuid of that account. Otherwise
the next calls would change the account of another customer. The client assumes that CSP derives this answer from
the JWT, as for every other call. Infoblox does not document the call. Public scripts use it to find the current
account.

A switch affects the whole session, so each session serves one account at a time.
"""

import asyncio
import json
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from sandbox_broker.csp.http import ACCOUNT_ID, CspError, CspHttp, CspUnauthorized, CspUnavailable

SIGN_IN = "/session/users/sign_in"
ACCOUNT_SWITCH = "/session/account_switch"
CURRENT_USER = "/current_user"

_JWT = re.compile(r"[!-~]{1,16384}")


def hidden_forms(secret: str) -> tuple[str, ...]:
    """Return the secret and its JSON forms, because an answer of CSP would quote it as JSON."""
    return secret, *(json.dumps(secret, ensure_ascii=ascii_only)[1:-1] for ascii_only in (True, False))


def bearer(jwt: str) -> dict[str, str]:
    return {"Authorization": f"Bearer {jwt}"}


class SwitchRefused(CspUnavailable):
    """CSP does not switch into the account yet. A new account needs minutes."""


class SessionExpired(CspUnavailable):
    """CSP refuses the JWT. A new sign-in helps."""


class SessionClient:
    """Sign-in and account switch, one attempt per call."""

    def __init__(self, http: CspHttp, email: str, password: str, *, root: str = "") -> None:
        """`root` is the path of the API below the base URL of `http`, for example /v2."""
        self._http = http
        self._user = {"email": email, "password": password}
        self._root = root

    async def sign_in(self, deadline: float) -> str:
        """Start a session and return its JWT. Raises CspUnavailable, or CspUnauthorized for a wrong password."""
        return await self._request_jwt("the sign-in", SIGN_IN, self._user, deadline)

    async def switch(self, jwt: str, external_id: str, deadline: float) -> str:
        """Switch the session into the account, and return the new JWT. The old one is invalid then.

        Raises CspUnavailable or CspUnauthorized.
        """
        body = {"id": _account_id(external_id)}
        return await self._request_jwt("the account switch", ACCOUNT_SWITCH, body, deadline, headers=bearer(jwt))

    async def require_current_account(self, jwt: str, external_id: str, deadline: float) -> None:
        """Raise CspUnavailable unless CSP confirms that `jwt` acts in the account."""
        what = "the current user"
        answer = await self._http.ask(
            "GET",
            f"{self._root}{CURRENT_USER}",
            operation="current_user",
            what=what,
            headers=bearer(jwt),
            deadline=deadline,
        )
        if answer.status != 200 or answer.is_html:
            raise self._http.failure(answer, what=what, hide=jwt)
        user = (answer.read_object() or {}).get("result")
        current = user.get("account_id") if isinstance(user, dict) else None
        if not isinstance(current, str) or ACCOUNT_ID.fullmatch(current) is None:
            raise CspUnavailable(f"CSP answered {what} without an account. Nothing was changed.", answer.status)
        if current.lower() != _account_id(external_id):
            raise CspUnavailable(
                f"CSP is in {current.lower()} after the switch to {_account_id(external_id)}. Nothing was changed.",
                answer.status,
            )

    async def _request_jwt(
        self,
        what: str,
        path: str,
        body: dict[str, str],
        deadline: float,
        *,
        headers: dict[str, str] | None = None,
    ) -> str:
        """Return the JWT of the answer. Errors never quote the answer, because it may hold a JWT."""
        answer = await self._http.ask(
            "POST",
            f"{self._root}{path}",
            operation=path.rpartition("/")[2],
            what=what,
            json=body,
            headers=headers,
            deadline=deadline,
        )
        if answer.status not in (200, 201) or answer.is_html:
            raise self._http.failure(answer, what=what, quote=False)
        jwt = (answer.read_object() or {}).get("jwt")
        if not isinstance(jwt, str) or not _JWT.fullmatch(jwt):
            raise CspUnavailable(f"CSP answered {what} without a JWT", answer.status)
        return jwt


class SessionPool:
    """Signed-in sessions, so that most accounts cost no sign-in. A new one replaces a session that has expired."""

    def __init__(self, client: SessionClient, refusal_pause_sec: float) -> None:
        """After a refused sign-in, the pool tries the next one `refusal_pause_sec` later, because CSP may lock the
        user after several refusals."""
        self._client = client
        self._refusal_pause_sec = refusal_pause_sec
        self._idle: list[str] = []
        self._sign_in_lock = asyncio.Lock()
        self._refusal: CspUnauthorized | None = None
        self._refused_until = 0.0

    @property
    def is_refused(self) -> bool:
        """Whether CSP refused the last sign-in."""
        return self._refusal is not None

    @asynccontextmanager
    async def in_account(self, external_id: str, deadline: float) -> AsyncIterator[str]:
        """Yield a JWT in the account. Raises CspUnauthorized if CSP refuses the sign-in, SwitchRefused, or
        CspUnavailable.

        The session returns to the pool unless the block raises SessionExpired.
        """
        jwt = await self._enter(external_id, deadline)
        is_expired = False
        try:
            yield jwt
        except SessionExpired:
            is_expired = True
            raise
        finally:
            if not is_expired:
                self._idle.append(jwt)

    async def _enter(self, external_id: str, deadline: float) -> str:
        """Return a JWT in the account, from an idle session or after a sign-in."""
        while self._idle:
            try:
                return await self._switch(self._idle.pop(), external_id, deadline)
            except SessionExpired:
                continue
        try:
            return await self._switch(await self._sign_in(deadline), external_id, deadline)
        except SessionExpired as error:
            # A new JWT cannot be outdated, so the refusal is about the account.
            raise SwitchRefused(str(error), error.status) from error

    async def _switch(self, jwt: str, external_id: str, deadline: float) -> str:
        try:
            switched = await self._client.switch(jwt, external_id, deadline)
        except CspError as error:
            if error.status == 401:
                raise SessionExpired(str(error), 401) from error
            if error.status is None:
                raise  # the switch may have taken effect, so the JWT may be invalid
            self._idle.append(jwt)
            retry_after = error.retry_after if isinstance(error, CspUnavailable) else None
            raise SwitchRefused(str(error), error.status, retry_after) from error
        try:
            await self._client.require_current_account(switched, external_id, deadline)
        except CspUnauthorized as error:
            raise SessionExpired(str(error), error.status) from error
        return switched

    async def _sign_in(self, deadline: float) -> str:
        # One at a time, so that a wrong password costs one attempt and not one for each worker.
        async with self._sign_in_lock:
            if self._refusal is not None and asyncio.get_running_loop().time() < self._refused_until:
                raise CspUnauthorized(str(self._refusal), self._refusal.status)
            try:
                jwt = await self._client.sign_in(deadline)
            except CspUnauthorized as error:
                self._refusal = error
                self._refused_until = asyncio.get_running_loop().time() + self._refusal_pause_sec
                raise
            self._refusal = None
            return jwt


def _account_id(external_id: str) -> str:
    return f"identity/accounts/{external_id.lower()}"
