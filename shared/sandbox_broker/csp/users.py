"""Client of CSP's groups and users in the account of a session. Its errors are defined in csp/http.py.

Each call takes the JWT of a session that is switched into the account (`sessions.py`). It raises SessionExpired if
CSP refuses the JWT, CspRefused if CSP refuses the request itself, and CspUnavailable.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any

import httpx

from sandbox_broker.csp.http import Answer, CspError, CspHttp, CspRefused, CspUnavailable
from sandbox_broker.csp.sessions import SessionExpired, bearer

_USER_ID = re.compile(r"(?:identity/users/)?([\w-]{1,128})", re.ASCII)
_REFUSALS = frozenset({400, 403, 422})
"""Statuses of a request that CSP refuses for a lasting reason, such as a password rule or a missing right."""


class UserClient:
    """Groups and users of one account, one attempt per call. `deadline` is on the loop's clock."""

    def __init__(self, http: CspHttp) -> None:
        self._http = http

    async def list_groups(self, jwt: str, deadline: float) -> dict[str, str]:
        """Return the ids of the groups of the account by their names."""
        what = "the listing of groups"
        answer = await self._ask("GET", "/groups", jwt, deadline, operation="list_groups", what=what)
        return {
            record["name"]: record["id"]
            for record in self._read_results(answer, what, jwt)
            if isinstance(record, dict)
            and isinstance(record.get("name"), str)
            and isinstance(record.get("id"), str)
        }

    async def create_user(
        self, jwt: str, *, email: str, name: str, group_ids: Sequence[str], deadline: float
    ) -> str | None:
        """Create a user without a password, and return its id. None: the account has a user with this email."""
        what = "the creation of a user"
        body = {"name": name, "email": email, "type": "interactive", "group_ids": list(group_ids)}
        answer = await self._ask("POST", "/users", jwt, deadline, operation="create_user", what=what, json=body)
        if answer.status == 409 and not answer.is_html:
            return None
        if answer.status not in (200, 201) or answer.is_html:
            raise self._failure(answer, what, jwt)
        result = (answer.read_object() or {}).get("result")
        user_id = _read_user_id(result)
        if user_id is None:
            raise CspUnavailable(f"CSP answered {what} without the id of the user", answer.status)
        return user_id

    async def find_user(self, jwt: str, email: str, deadline: float) -> str | None:
        """Return the id of the user with exactly this email. None without such a user."""
        what = "the look-up of a user"
        # In Infoblox's filter grammar a doubled quote stands for the quote, and no other character is special.
        quoted = email.replace('"', '""')
        url = self._http.base_url.join("users").copy_merge_params({"_filter": f'email=="{quoted}"'})
        answer = await self._ask("GET", url, jwt, deadline, operation="find_user", what=what)
        for record in self._read_results(answer, what, jwt):
            # CSP could ignore the filter. A user with another email is not ours.
            if isinstance(record, dict) and str(record.get("email")).lower() == email.lower():
                if (user_id := _read_user_id(record)) is None:
                    raise CspUnavailable(f"CSP answered {what} without a readable id", answer.status)
                return user_id
        return None

    async def set_password(self, jwt: str, user_id: str, password: str, deadline: float) -> None:
        what = "the change of a password"
        path = f"/users/{user_id}/password"
        answer = await self._ask(
            "POST", path, jwt, deadline, operation="set_password", what=what, json={"new_password": password}
        )
        if answer.status not in (200, 201, 202, 204) or answer.is_html:
            # Without a quotation, because CSP could repeat the password.
            raise self._failure(answer, what, jwt, quote=False)

    async def delete_user(self, jwt: str, user_id: str, deadline: float) -> None:
        """Delete the user. A user that the account does not have counts as deleted."""
        what = "the deletion of a user"
        answer = await self._ask("DELETE", f"/users/{user_id}", jwt, deadline, operation="delete_user", what=what)
        if answer.status not in (200, 202, 204, 404) or answer.is_html:
            raise self._failure(answer, what, jwt)

    async def _ask(
        self,
        method: str,
        path: httpx.URL | str,
        jwt: str,
        deadline: float,
        *,
        operation: str,
        what: str,
        json: Mapping[str, Any] | None = None,
    ) -> Answer:
        return await self._http.ask(
            method, path, operation=operation, what=what, json=json, headers=bearer(jwt), deadline=deadline
        )

    def _read_results(self, answer: Answer, what: str, jwt: str) -> list[Any]:
        document = answer.read_object()
        # For an account without records, CSP may answer with an empty object.
        records = document.get("results") or [] if document is not None else None
        if answer.status != 200 or answer.is_html or not isinstance(records, list):
            raise self._failure(answer, what, jwt)
        return records

    def _failure(self, answer: Answer, what: str, jwt: str, *, quote: bool = True) -> CspError:
        failure = self._http.failure(answer, what=what, quote=quote, hide=jwt)
        if answer.is_html:
            return CspUnavailable(str(failure), answer.status)
        if answer.status == 401:
            return SessionExpired(str(failure), answer.status)
        if answer.status in _REFUSALS:
            return CspRefused(str(failure), answer.status)
        return failure


def _read_user_id(record: object) -> str | None:
    """Return the bare id of a user record."""
    match = _USER_ID.fullmatch(str(record.get("id"))) if isinstance(record, dict) else None
    return match and match[1]
