"""The part of the CSP API that the broker uses: list accounts, delete an account."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from csp_simulator.accounts import AccountStore
from csp_simulator.error_responses import build_error
from csp_simulator.faults import FaultInjector


class CspApi:
    def __init__(self, accounts: AccountStore, faults: FaultInjector, token: str) -> None:
        self._accounts = accounts
        self._faults = faults
        self._token = token

    def routes(self) -> list[Route]:
        return [
            Route("/v2/current_user/accounts", self.list_accounts, methods=["GET"]),
            Route("/v2/sandbox/accounts/{external_id}", self.delete_account, methods=["DELETE"]),
        ]

    async def list_accounts(self, request: Request) -> Response:
        if self._is_unauthorized(request):
            return UNAUTHORIZED
        # The settings are those at the arrival of the call. The records are those at the time of the response.
        settings = dict(self._faults.settings)

        def build_response() -> Response:
            body = self._accounts.build_listing(
                settings["listing_fraction"], settings["listing_duplicates"], settings["listing_malformed"]
            )
            if settings["listing_cut_short"]:
                body = body[: len(body) // 2]
            return Response(body, media_type="application/json")

        return await self._faults.respond("listing", build_response)

    async def delete_account(self, request: Request) -> Response:
        if self._is_unauthorized(request):
            return UNAUTHORIZED
        external_id = request.path_params["external_id"]
        stay_listed = self._faults.settings["deleted_stay_listed"]
        is_undeletable = external_id in self._faults.settings["undeletable"]

        def delete() -> Response:
            if not self._accounts.delete_sandbox(external_id, stay_listed):
                return build_error(404, "account not found")
            return Response(status_code=204)

        return await self._faults.respond("delete", delete, must_fail=is_undeletable)

    def _is_unauthorized(self, request: Request) -> bool:
        accepted = f"Token {self._token}"
        return self._faults.settings["reject_tokens"] or request.headers.get("authorization") != accepted


UNAUTHORIZED = build_error(401, "the token is missing or wrong")
