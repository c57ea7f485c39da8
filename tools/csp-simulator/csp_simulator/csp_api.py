"""The part of the CSP API that the broker uses: list accounts, delete an account."""

import json
from collections.abc import Mapping
from typing import Any

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
            headers: dict[str, str] = {}
            if settings["listing_page_size"]:
                body, headers = _cut_page(body, settings, request)
            if settings["listing_cut_short"]:
                body = body[: len(body) // 2]
            return Response(body, media_type="application/json", headers=headers)

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


def _cut_page(listing: bytes, settings: Mapping[str, Any], request: Request) -> tuple[bytes, dict[str, str]]:
    """Return the body and the headers of the page that the request asks for."""
    size, form = settings["listing_page_size"], settings["listing_page_form"]
    records = json.loads(listing)["results"]
    query = request.query_params
    start = int(query.get("_offset") or query.get("_page_token", "").removeprefix("page-") or 0)
    end, total = start + size, len(records)
    last = total - settings["listing_pages_missing"] * size
    document: dict[str, Any] = {"results": records[start : min(end, max(last, 0))]}
    headers: dict[str, str] = {}
    link = str(request.url.include_query_params(_offset=end))
    if form == "total":
        document["page"] = {"total_size": total, "offset": start}
    elif form == "token":
        document["page"] = {"page_token": f"page-{end}" if end < total else "null"}
    elif form == "next":
        document["next"] = link if end < total else None
    elif end < total:
        headers["Link"] = f'<{link}>; rel="next"'
    return json.dumps(document).encode(), headers
