"""The part of the NIOSXaaS API that the broker uses: sessions, the current user, and services."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.accounts import AccountStore
from csp_simulator.error_responses import build_error
from csp_simulator.faults import FaultInjector
from csp_simulator.records import extract_external_id
from csp_simulator.services import ServiceStore
from csp_simulator.sessions import Sessions

SERVICES_PATH = "/api/universalinfra/v1/universalservices"
HOME_ACCOUNT = "00000000-0000-4000-8000-000000000001"
"""External id of the user's own account, which is not in the listing."""


class NiosxaasApi:
    def __init__(
        self,
        accounts: AccountStore,
        services: ServiceStore,
        sessions: Sessions,
        faults: FaultInjector,
        credentials: tuple[str, str],
    ) -> None:
        """`credentials` are the accepted email and password."""
        self._accounts = accounts
        self._services = services
        self._sessions = sessions
        self._faults = faults
        self._credentials = credentials

    def routes(self) -> list[Route]:
        return [
            Route("/v2/session/users/sign_in", self.sign_in, methods=["POST"]),
            Route("/v2/session/account_switch", self.switch_account, methods=["POST"]),
            Route("/v2/current_user", self.show_current_user, methods=["GET"]),
            Route(SERVICES_PATH, self.list_services, methods=["GET"]),
            Route(SERVICES_PATH + "/{service_id}", self.delete_service, methods=["DELETE"]),
        ]

    async def sign_in(self, request: Request) -> Response:
        body = await _read_object(request)
        if self._faults.settings["reject_tokens"] or (body.get("email"), body.get("password")) != self._credentials:
            return build_error(401, "the email or the password is wrong")
        return await self._faults.respond(
            "sign_in", lambda: JSONResponse({"jwt": self._sessions.sign_in(self._lifetime_sec)})
        )

    async def switch_account(self, request: Request) -> Response:
        if (jwt := self._extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        external_id = extract_external_id(await _read_object(request))

        def switch() -> Response:
            if external_id is None or not self._accounts.has_active_sandbox(external_id):
                return build_error(404, "account not found")
            has_no_effect = self._faults.settings["account_switch_without_effect"]
            account = self._sessions.get_account(jwt) if has_no_effect else external_id
            return JSONResponse({"jwt": self._sessions.switch_account(jwt, account, self._lifetime_sec)})

        return await self._faults.respond("account_switch", switch)

    async def show_current_user(self, request: Request) -> Response:
        if (jwt := self._extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        account = self._sessions.get_account(jwt) or HOME_ACCOUNT
        user = {"email": self._credentials[0], "account_id": f"identity/accounts/{account}"}
        return await self._faults.respond("current_user", lambda: JSONResponse({"result": user}))

    async def list_services(self, request: Request) -> Response:
        if (jwt := self._extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        account = self._sessions.get_account(jwt)
        return await self._faults.respond(
            "service_listing", lambda: JSONResponse({"results": self._services.list_services(account)})
        )

    async def delete_service(self, request: Request) -> Response:
        if (jwt := self._extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        account = self._sessions.get_account(jwt)

        def delete() -> Response:
            if not self._services.delete_service(account, request.path_params["service_id"]):
                return build_error(404, "service not found")
            return Response(status_code=204)

        return await self._faults.respond("service_delete", delete)

    @property
    def _lifetime_sec(self) -> float:
        return float(self._faults.settings["jwt_lifetime_sec"])

    def _extract_valid_jwt(self, request: Request) -> str | None:
        scheme, _, jwt = request.headers.get("authorization", "").partition(" ")
        is_accepted = (
            scheme == "Bearer" and self._sessions.is_valid(jwt) and not self._faults.settings["reject_tokens"]
        )
        return jwt if is_accepted else None


UNAUTHORIZED = build_error(401, "the JWT is missing, wrong or outdated")


async def _read_object(request: Request) -> dict[str, Any]:
    """Return the JSON body, or an empty object if the body is missing or invalid."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
