"""The CSP API as the broker sees it: list the accounts, delete one."""

from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from csp_simulator.accounts import Accounts
from csp_simulator.answers import refusal
from csp_simulator.faults import Faults


class Api:
    def __init__(self, accounts: Accounts, faults: Faults, token: str) -> None:
        self._accounts = accounts
        self._faults = faults
        self._token = token

    def routes(self) -> list[Route]:
        return [
            Route("/v2/current_user/accounts", self.list_accounts, methods=["GET"]),
            Route("/v2/sandbox/accounts/{external_id}", self.delete_account, methods=["DELETE"]),
        ]

    async def list_accounts(self, request: Request) -> Response:
        if self._is_refused(request):
            return REFUSED
        # As they are when the call arrives, though the records are those of when it is answered.
        settings = dict(self._faults.settings)

        def listing() -> Response:
            body = self._accounts.listing(
                settings["listing_fraction"], settings["listing_duplicates"], settings["listing_malformed"]
            )
            if settings["listing_cut_short"]:
                body = body[: len(body) // 2]
            return Response(body, media_type="application/json")

        return await self._faults.play("listing", listing)

    async def delete_account(self, request: Request) -> Response:
        if self._is_refused(request):
            return REFUSED
        stay_listed = self._faults.settings["deleted_stay_listed"]

        def delete() -> Response:
            if not self._accounts.delete(request.path_params["external_id"], stay_listed):
                return refusal(404, "account not found")
            return Response(status_code=204)

        return await self._faults.play("delete", delete)

    def _is_refused(self, request: Request) -> bool:
        accepted = f"Token {self._token}"
        return self._faults.settings["reject_tokens"] or request.headers.get("authorization") != accepted


REFUSED = refusal(401, "the token is missing or wrong")
