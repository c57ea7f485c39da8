"""The control API: set the accounts and the behaviour, read the call record. It asks for no token."""

from dataclasses import asdict
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.accounts import Accounts, problem_with
from csp_simulator.behaviour import Faults
from csp_simulator.calls import Calls

MAX_ACCOUNTS = 1_000_000


class Control:
    def __init__(self, accounts: Accounts, faults: Faults, calls: Calls, name_prefix: str) -> None:
        self._accounts = accounts
        self._faults = faults
        self._calls = calls
        self._name_prefix = name_prefix

    def routes(self) -> list[Route]:
        return [
            Route("/accounts", self.list_accounts, methods=["GET"]),
            Route("/accounts", self.replace_accounts, methods=["PUT"]),
            Route("/accounts", self.add_accounts, methods=["POST"]),
            Route("/accounts/{external_id}", self.drop_account, methods=["DELETE"]),
            Route("/behaviour", self.show_behaviour, methods=["GET"]),
            Route("/behaviour", self.patch_behaviour, methods=["PATCH"]),
            Route("/calls", self.list_calls, methods=["GET"]),
            Route("/calls", self.clear_calls, methods=["DELETE"]),
            Route("/reset", self.reset, methods=["POST"]),
        ]

    async def list_accounts(self, _: Request) -> Response:
        return Response(self._accounts.dump(), media_type="application/json")

    async def replace_accounts(self, request: Request) -> Response:
        body = await _object(request, {"accounts", "raw"})
        if len(body) != 1:
            raise HTTPException(400, "give either accounts (checked) or raw (listed as they are)")
        [(name, records)] = body.items()
        if not isinstance(records, list):
            raise HTTPException(400, f"{name} must be a list")
        if name == "accounts" and (problem := problem_with(records)):
            raise HTTPException(400, problem)
        self._accounts.replace(records)
        return await self.list_accounts(request)

    async def add_accounts(self, request: Request) -> Response:
        body = await _object(request, {"count", "name_prefix"})
        if "count" not in body:
            raise HTTPException(400, "count is missing")
        added = self._accounts.add(_count(body, "count"), self._prefix(body))
        return JSONResponse({"accounts": added}, 201)

    async def drop_account(self, request: Request) -> Response:
        if not self._accounts.drop(request.path_params["external_id"]):
            raise HTTPException(404, "no account has this id")
        return Response(status_code=204)

    async def show_behaviour(self, _: Request) -> Response:
        return JSONResponse(asdict(self._faults.behaviour))

    async def patch_behaviour(self, request: Request) -> Response:
        changes = await _object(request)
        try:
            self._faults.patch(changes)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return await self.show_behaviour(request)

    async def list_calls(self, request: Request) -> Response:
        query = request.query_params
        calls = self._calls.select(query.get("method"), query.get("path_contains", ""))
        return JSONResponse({"calls": [asdict(call) for call in calls]})

    async def clear_calls(self, _: Request) -> Response:
        self._calls.clear()
        return Response(status_code=204)

    async def reset(self, request: Request) -> Response:
        body = await _object(request, {"accounts", "name_prefix"})
        count, name_prefix = _count(body, "accounts"), self._prefix(body)
        self._faults.reset()
        self._calls.clear()
        self._accounts.reset(count, name_prefix)
        return await self.list_accounts(request)

    def _prefix(self, body: dict[str, Any]) -> str:
        name_prefix = body.get("name_prefix", self._name_prefix)
        if not isinstance(name_prefix, str):
            raise HTTPException(400, "name_prefix must be a text")
        return name_prefix


def _count(body: dict[str, Any], name: str) -> int:
    count = body.get(name, 0)
    if isinstance(count, bool) or not isinstance(count, int) or not 0 <= count <= MAX_ACCOUNTS:
        raise HTTPException(400, f"{name} must be an integer from 0 to {MAX_ACCOUNTS}")
    return count


async def _object(request: Request, known: set[str] | None = None) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body must be JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    if known is not None and (unknown := sorted(set(body) - known)):
        raise HTTPException(400, f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return body
