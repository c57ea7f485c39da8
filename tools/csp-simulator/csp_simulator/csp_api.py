"""The part of the CSP API that the broker uses: list, create, find and delete accounts."""

import json
import re
from collections.abc import Mapping
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.accounts import AccountStore
from csp_simulator.calls import ACCOUNT_NAME
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
            Route("/v2/sandbox/accounts", self.create_account, methods=["POST"]),
            Route("/v2/sandbox/accounts", self.find_accounts, methods=["GET"]),
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

    async def create_account(self, request: Request) -> Response:
        if self._is_unauthorized(request):
            return UNAUTHORIZED
        try:
            body = await request.json()
        except (ValueError, RecursionError):
            body = None
        name = body.get("name") if isinstance(body, dict) else None
        if not isinstance(name, str) or not name.strip():
            return build_error(400, "name must be a non-blank string")
        admin_user = body.get("admin_user")
        if admin_user is not None and not (isinstance(admin_user, dict) and {"email", "name"} <= admin_user.keys()):
            return build_error(400, "admin_user must have email and name")
        request.scope[ACCOUNT_NAME] = name
        settings = dict(self._faults.settings)

        def create() -> Response:
            quota = settings["create_quota"]
            if quota is not None and self._accounts.count_sandboxes() >= quota:
                return build_error(settings["create_quota_status"], f"the quota of {quota} sandboxes is used up")
            external_id = self._accounts.create_account(
                name,
                listed_after_sec=settings["create_listed_after_sec"],
                usable_after_sec=settings["create_usable_after_sec"],
            )
            account_id = f"identity/accounts/{external_id}"
            return JSONResponse({"result": {"id": account_id, "admin_user": {"account_id": account_id}}})

        return await self._faults.respond("create", create)

    async def find_accounts(self, request: Request) -> Response:
        if self._is_unauthorized(request):
            return UNAUTHORIZED
        query = request.query_params
        filtered = NAME_FILTER.fullmatch(query.get("_filter", ""))
        limit, offset = query.get("_limit", "100"), query.get("_offset", "0")
        if filtered is None:
            return build_error(400, '_filter must be name=="…"; a doubled quote stands for a quote in the name')
        if not (limit.isdecimal() and offset.isdecimal()):
            return build_error(400, "_limit and _offset must be integers from 0")
        name = request.scope[ACCOUNT_NAME] = filtered[1].replace('""', '"')

        def find() -> Response:
            found = self._accounts.find_sandboxes(name)
            return JSONResponse({"results": found[int(offset) : int(offset) + int(limit)]})

        return await self._faults.respond("find", find)

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


NAME_FILTER = re.compile(r'\s*name\s*==\s*"((?:[^"]|"")*)"\s*')
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
