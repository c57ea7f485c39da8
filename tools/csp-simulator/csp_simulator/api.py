"""The CSP API as the broker sees it: list the accounts, delete one."""

import asyncio

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.accounts import Accounts
from csp_simulator.behaviour import Faults


class Api:
    """Every call is judged as it arrives, waits out its latency, and only then takes effect.

    So an account that is being deleted stays listed until its deletion is answered, and of two
    deletions of the same account the one that ends later finds it gone.
    """

    def __init__(self, accounts: Accounts, faults: Faults, token: str) -> None:
        self._accounts = accounts
        self._faults = faults
        self._token = token

    def routes(self) -> list[Route]:
        return [
            Route("/current_user/accounts", self.list_accounts, methods=["GET"]),
            Route("/sandbox/accounts/{external_id}", self.delete_account, methods=["DELETE"]),
        ]

    async def list_accounts(self, request: Request) -> Response:
        self._authorize(request)
        behaviour, error = self._faults.behaviour, self._faults.for_listing()
        await asyncio.sleep(behaviour.listing_latency_sec)
        if error is not None:
            return error
        body = self._accounts.listing(behaviour.listing_fraction)
        if behaviour.listing_cut_short:
            body = body[: len(body) // 2]
        return Response(body, media_type="application/json")

    async def delete_account(self, request: Request) -> Response:
        self._authorize(request)
        behaviour, error = self._faults.behaviour, self._faults.for_delete()
        await asyncio.sleep(behaviour.delete_latency_sec)
        if error is not None:
            return error
        if not self._accounts.delete(request.path_params["external_id"]):
            return JSONResponse({"error": "account not found"}, 404)
        return Response(status_code=204)

    def _authorize(self, request: Request) -> None:
        expected = f"Token {self._token}"
        if self._faults.behaviour.reject_tokens or request.headers.get("authorization") != expected:
            raise HTTPException(401, "the token is missing or wrong")
