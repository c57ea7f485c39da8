"""The API of NIOSXaaS as the broker sees it: sign in, switch to an account, show the current user, list and delete
the services of the account."""

from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.accounts import Accounts
from csp_simulator.answers import refusal
from csp_simulator.faults import Faults
from csp_simulator.records import external_id_of
from csp_simulator.services import Services
from csp_simulator.sessions import Sessions

SERVICES = "/api/universalinfra/v1/universalservices"
HOME_ACCOUNT = "00000000-0000-4000-8000-000000000001"
"""The user's own account. It is not in the listing."""


class Niosxaas:
    def __init__(
        self, accounts: Accounts, services: Services, sessions: Sessions, faults: Faults, user: tuple[str, str]
    ) -> None:
        """`user` is the email and the password that it accepts."""
        self._accounts = accounts
        self._services = services
        self._sessions = sessions
        self._faults = faults
        self._user = user

    def routes(self) -> list[Route]:
        return [
            Route("/v2/session/users/sign_in", self.sign_in, methods=["POST"]),
            Route("/v2/session/account_switch", self.switch_account, methods=["POST"]),
            Route("/v2/current_user", self.show_current_user, methods=["GET"]),
            Route(SERVICES, self.list_services, methods=["GET"]),
            Route(SERVICES + "/{service_id}", self.delete_service, methods=["DELETE"]),
        ]

    async def sign_in(self, request: Request) -> Response:
        body = await _object(request)
        if self._faults.settings["reject_tokens"] or (body.get("email"), body.get("password")) != self._user:
            return refusal(401, "the email or the password is wrong")
        return await self._faults.play(
            "sign_in", lambda: JSONResponse({"jwt": self._sessions.sign_in(self._lifetime_sec)})
        )

    async def switch_account(self, request: Request) -> Response:
        if (jwt := self._valid_jwt(request)) is None:
            return REFUSED
        external_id = external_id_of(await _object(request))

        def switch() -> Response:
            if external_id is None or not self._accounts.has(external_id):
                return refusal(404, "account not found")
            stays = self._faults.settings["account_switch_without_effect"]
            account = self._sessions.account_of(jwt) if stays else external_id
            return JSONResponse({"jwt": self._sessions.switch(jwt, account, self._lifetime_sec)})

        return await self._faults.play("account_switch", switch)

    async def show_current_user(self, request: Request) -> Response:
        if (jwt := self._valid_jwt(request)) is None:
            return REFUSED
        account = self._sessions.account_of(jwt) or HOME_ACCOUNT
        user = {"email": self._user[0], "account_id": f"identity/accounts/{account}"}
        return await self._faults.play("current_user", lambda: JSONResponse({"result": user}))

    async def list_services(self, request: Request) -> Response:
        if (jwt := self._valid_jwt(request)) is None:
            return REFUSED
        account = self._sessions.account_of(jwt)
        return await self._faults.play(
            "service_listing", lambda: JSONResponse({"results": self._services.listing(account)})
        )

    async def delete_service(self, request: Request) -> Response:
        if (jwt := self._valid_jwt(request)) is None:
            return REFUSED
        account = self._sessions.account_of(jwt)

        def delete() -> Response:
            if not self._services.delete(account, request.path_params["service_id"]):
                return refusal(404, "service not found")
            return Response(status_code=204)

        return await self._faults.play("service_delete", delete)

    @property
    def _lifetime_sec(self) -> float:
        return float(self._faults.settings["jwt_lifetime_sec"])

    def _valid_jwt(self, request: Request) -> str | None:
        scheme, _, jwt = request.headers.get("authorization", "").partition(" ")
        accepted = (
            scheme == "Bearer" and self._sessions.is_valid(jwt) and not self._faults.settings["reject_tokens"]
        )
        return jwt if accepted else None


REFUSED = refusal(401, "the JWT is missing, wrong or outdated")


async def _object(request: Request) -> dict[str, Any]:
    """The body; an empty object where there is none."""
    try:
        body = await request.json()
    except (ValueError, RecursionError):
        return {}
    return body if isinstance(body, dict) else {}
