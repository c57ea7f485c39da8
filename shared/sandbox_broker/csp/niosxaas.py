"""Client of NIOSXaaS: delete the services inside an account. Its errors are defined in csp/http.py.

The client verifies the account of its session before the first deletion (`sessions.py`).
"""

import asyncio
import re
from dataclasses import dataclass
from typing import Self

import httpx

from sandbox_broker.csp.http import EXTERNAL_ID, CspError, CspHttp
from sandbox_broker.csp.sessions import SessionClient, bearer, hidden_forms

API_ROOT = "/v2"
"""Path of the session calls below the base URL."""
SERVICES = "/api/universalinfra/v1/universalservices"

_SERVICE_ID = re.compile(r"infra/universal_service/([\w-]{1,128})", re.ASCII)


@dataclass(frozen=True, slots=True)
class CleanedAccount:
    deleted: tuple[str, ...]  # names of the deleted services
    would_delete: tuple[str, ...]  # names of the services kept by shadow mode
    failed: tuple[str, ...]  # a line for each failed or unreadable service


@dataclass(frozen=True, slots=True)
class _Service:
    key: str
    name: str


class NiosxaasClient:
    """NIOSXaaS client. It can clean accounts concurrently. Retries belong to the caller."""

    def __init__(
        self,
        base_url: str,
        email: str,
        password: str,
        *,
        service_name: str = "",
        shadow_mode: bool = False,
        timeout_sec: float = 30,
        transport: httpx.AsyncBaseTransport | None = None,
    ) -> None:
        """`service_name` limits the deletion to services of this name, empty for all. `shadow_mode` deletes no
        service.

        `timeout_sec` bounds the whole clean-up of one account. Raises ValueError for a blank email or password.
        """
        if not email.strip() or not password.strip():
            raise ValueError("the NIOSXaaS email and password must not be blank")
        self._service_name = service_name
        self._shadow_mode = shadow_mode
        self._timeout_sec = timeout_sec
        self._http = CspHttp(base_url, secrets=hidden_forms(password), timeout_sec=timeout_sec, transport=transport)
        self._sessions = SessionClient(self._http, email, password, root=API_ROOT)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.aclose()

    async def aclose(self) -> None:
        await self._http.aclose()

    async def clean_account(self, external_id: str) -> CleanedAccount:
        """Delete the services inside one account. The method is idempotent.

        A failed deletion of one service does not stop the others. Raises CspUnavailable or CspUnauthorized, before
        any deletion, if the account of the session cannot be verified or the services cannot be listed. Raises
        ValueError if `external_id` is not a uuid.
        """
        if not EXTERNAL_ID.fullmatch(external_id):
            raise ValueError("external_id must be a uuid")
        deadline = asyncio.get_running_loop().time() + self._timeout_sec
        # A separate session for each account, because a switch affects the whole session. In another account, the
        # same calls would delete the services of another customer.
        own = await self._sessions.sign_in(deadline)
        jwt = await self._sessions.switch(own, external_id, deadline)
        await self._sessions.require_current_account(jwt, external_id, deadline)
        services, failed = await self._services(jwt, deadline)
        names = tuple(self._http.line(service.name) for service in services)
        if self._shadow_mode:
            return CleanedAccount(deleted=(), would_delete=names, failed=failed)
        deleted: list[str] = []
        for service, name in zip(services, names, strict=True):
            try:
                await self._delete(service, jwt, deadline)
            except CspError as error:
                failed += (f"{name}: {error}",)
            else:
                deleted.append(name)
        return CleanedAccount(deleted=tuple(deleted), would_delete=(), failed=failed)

    async def _services(self, jwt: str, deadline: float) -> tuple[list[_Service], tuple[str, ...]]:
        """Return the services to delete, and a line for each record without a readable id or name."""
        what = "the listing of services"
        answer = await self._http.ask(
            "GET", SERVICES, operation="list_services", what=what, headers=bearer(jwt), deadline=deadline
        )
        document = answer.read_object()
        # For an account without services, CSP may answer with an empty object.
        records = document.get("results") or [] if document is not None else None
        if answer.status != 200 or not isinstance(records, list):
            raise self._http.failure(answer, what=what, hide=jwt)
        services: list[_Service] = []
        unclear: list[str] = []
        for index, record in enumerate(records):
            key, name = _key_and_name(record)
            if name is not None and self._service_name not in ("", name):
                continue
            if key is None or name is None:
                unclear.append(f"record {index}: the id or the name of the service cannot be read")
            else:
                services.append(_Service(key, name))
        return services, tuple(unclear)

    async def _delete(self, service: _Service, jwt: str, deadline: float) -> None:
        path, what = f"{SERVICES}/{service.key}", "the deletion of a service"
        answer = await self._http.ask(
            "DELETE", path, operation="delete_service", what=what, headers=bearer(jwt), deadline=deadline
        )
        if answer.status not in (200, 202, 204, 404) or answer.is_html:
            raise self._http.failure(answer, what=what, hide=jwt)


def _key_and_name(record: object) -> tuple[str | None, str | None]:
    if not isinstance(record, dict):
        return None, None
    match = _SERVICE_ID.fullmatch(str(record.get("id")))
    name = record.get("name")
    return match and match[1], name if isinstance(name, str) else None
