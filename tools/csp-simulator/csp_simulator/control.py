"""Control API: accounts, services, users, faults, scripts and recorded calls. It requires no token."""

from dataclasses import asdict, dataclass
from typing import Any

from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator import script
from csp_simulator.accounts import AccountStore
from csp_simulator.calls import CallRecorder
from csp_simulator.faults import FaultInjector
from csp_simulator.records import find_problem
from csp_simulator.services import ServiceStore
from csp_simulator.session_api import SessionApi
from csp_simulator.switches import SWITCHES, is_count, is_number
from csp_simulator.users import UserStore

MAX_ACCOUNTS = 1_000_000


@dataclass(frozen=True, slots=True)
class ControlApi:
    """Routes of the control API. `GET /_control` shows the docstring of each handler."""

    accounts: AccountStore
    services: ServiceStore
    users: UserStore
    session_api: SessionApi
    faults: FaultInjector
    calls: CallRecorder
    player: script.ScriptPlayer
    name_prefix: str

    def routes(self) -> list[Route]:
        return [
            Route("/accounts", self.list_accounts, methods=["GET"]),
            Route("/accounts", self.replace_accounts, methods=["PUT"]),
            Route("/accounts", self.add_accounts, methods=["POST"]),
            Route("/accounts/disturb", self.disturb_accounts, methods=["POST"]),
            Route("/accounts/{external_id}", self.change_account, methods=["PATCH"]),
            Route("/accounts/{external_id}", self.drop_account, methods=["DELETE"]),
            Route("/services", self.list_services, methods=["GET"]),
            Route("/services", self.replace_services, methods=["PUT"]),
            Route("/users", self.list_users, methods=["GET"]),
            Route("/behaviour", self.show_behaviour, methods=["GET"]),
            Route("/behaviour", self.patch_behaviour, methods=["PATCH"]),
            Route("/script", self.show_script, methods=["GET"]),
            Route("/script", self.play_script, methods=["PUT"]),
            Route("/script", self.stop_script, methods=["DELETE"]),
            Route("/calls", self.list_calls, methods=["GET"]),
            Route("/calls", self.clear_calls, methods=["DELETE"]),
            Route("/reset", self.reset, methods=["POST"]),
        ]

    async def index(self, _: Request) -> Response:
        routes = {
            f"{min(route.methods or {'?'} - {'HEAD'})} /_control{route.path}": " ".join(
                (route.endpoint.__doc__ or "").split()
            )
            for route in self.routes()
        }
        switches = {
            name: {
                "now": self.faults.settings[name],
                "default": switch.default,
                "rule": switch.rule,
                "meaning": switch.meaning,
            }
            for name, switch in SWITCHES.items()
        }
        return JSONResponse({"routes": routes, "switches": switches, "scripts": script.list_bundled()})

    async def list_accounts(self, _: Request) -> Response:
        """List all records."""
        return Response(self.accounts.dump_records(), media_type="application/json")

    async def replace_accounts(self, request: Request) -> Response:
        """Replace all records with {"accounts": […]}, which are validated, or {"raw": […]}, which are not."""
        body = await _read_object(request, {"accounts", "raw"})
        if len(body) != 1:
            raise HTTPException(400, "give either accounts (validated) or raw (not validated)")
        [(name, records)] = body.items()
        if not isinstance(records, list):
            raise HTTPException(400, f"{name} must be a list")
        if name == "accounts" and (problem := find_problem(records)):
            raise HTTPException(400, problem)
        self.accounts.replace_records(records)
        return await self.list_accounts(request)

    async def add_accounts(self, request: Request) -> Response:
        """Add {"count": 5, "name_prefix": "lab-"} new sandboxes, or {"raw": […]} without validation."""
        body = await _read_object(request, {"count", "name_prefix", "raw"})
        if isinstance(raw := body.get("raw"), list) and len(body) == 1:
            self.accounts.append_records(raw)
            return JSONResponse({"accounts": raw}, 201)
        if "count" not in body:
            raise HTTPException(400, "count is missing")
        created = self.accounts.create_sandboxes(_read_count(body, "count"), self._read_name_prefix(body))
        return JSONResponse({"accounts": created}, 201)

    async def disturb_accounts(self, request: Request) -> Response:
        """Change random sandboxes: {"drop": 1, "rename": 2, "new_id": 1}."""
        try:
            counts = script.parse_disturbances(await _read_object(request, set(script.DISTURBANCES) - {"add"}))
        except script.ScriptError as error:
            raise HTTPException(400, str(error)) from error
        return JSONResponse(self.accounts.disturb_sandboxes(**counts))

    async def change_account(self, request: Request) -> Response:
        """Change fields of a record to any value, also its id: {"name": "other"}."""
        record = self.accounts.update_account(request.path_params["external_id"], await _read_object(request))
        if record is None:
            raise HTTPException(404, "no account has this id")
        return JSONResponse(record)

    async def drop_account(self, request: Request) -> Response:
        """Remove an account without a deletion through the CSP API."""
        if not self.accounts.remove_account(request.path_params["external_id"]):
            raise HTTPException(404, "no account has this id")
        return Response(status_code=204)

    async def list_services(self, _: Request) -> Response:
        """List the NIOSXaaS services by account UUID."""
        return Response(self.services.dump_records(), media_type="application/json")

    async def replace_services(self, request: Request) -> Response:
        """Replace all services: {"services": {"<account uuid>": ["name", …]}}; "home" is the user's own account."""
        names = (await _read_object(request, {"services"})).get("services")
        if not isinstance(names, dict) or not all(isinstance(items, list) for items in names.values()):
            raise HTTPException(400, "services must be an object of lists")
        self.services.replace_services(names)
        return await self.list_services(request)

    async def list_users(self, _: Request) -> Response:
        """List the users inside all accounts, also of deleted accounts, without their passwords."""
        return Response(self.users.dump_records(), media_type="application/json")

    async def show_behaviour(self, _: Request) -> Response:
        """Show the current switches."""
        return JSONResponse(self.faults.settings)

    async def patch_behaviour(self, request: Request) -> Response:
        """Set some switches and keep the others: {"delete_error_rate": 0.2}."""
        changes = await _read_object(request)
        try:
            self.faults.update_settings(changes)
        except ValueError as error:
            raise HTTPException(400, str(error)) from error
        return await self.show_behaviour(request)

    async def show_script(self, _: Request) -> Response:
        """Show the progress of the current script."""
        return JSONResponse(self.player.get_progress())

    async def play_script(self, request: Request) -> Response:
        """Play {"name": "bad-day", "speed": 100}, or custom steps:
        {"steps": [{"at_sec": 60, "behaviour": {…switches…}, "accounts": {"add": 5, "drop": 1}}]}."""
        body = await _read_object(request, {"name", "steps", "speed"})
        name, speed = body.get("name"), body.get("speed", 1)
        if not is_number(speed, 1, 10_000):
            raise HTTPException(400, "speed must be a number from 1 to 10000")
        if ("name" in body) == ("steps" in body):
            raise HTTPException(400, "give either name or steps")
        if "name" in body and name not in script.list_bundled():
            raise HTTPException(400, f"name must be one of {', '.join(script.list_bundled())}")
        try:
            steps = script.load(str(name)) if "name" in body else script.parse(body["steps"])
        except script.ScriptError as error:
            raise HTTPException(400, str(error)) from error
        self.player.play(steps, speed)
        return await self.show_script(request)

    async def stop_script(self, _: Request) -> Response:
        """Stop the script. Its changes stay."""
        self.player.stop()
        return Response(status_code=204)

    async def list_calls(self, request: Request) -> Response:
        """List the last 100,000 ended calls and the running calls; filter with
        ?method=DELETE&path_contains=sandbox&status=500&after_seq=17."""
        query = request.query_params
        method, path_contains = query.get("method"), query.get("path_contains", "")
        try:
            status, after_seq = query.get("status"), int(query.get("after_seq", 0))
            ended = self.calls.list_ended(method, path_contains, None if status is None else int(status), after_seq)
        except ValueError as error:
            raise HTTPException(400, "status and after_seq must be integers") from error
        running = self.calls.list_running(method, path_contains)
        return JSONResponse(
            {"calls": [asdict(call) for call in ended], "running": [asdict(call) for call in running]}
        )

    async def clear_calls(self, _: Request) -> Response:
        """Clear the record of ended calls."""
        self.calls.clear()
        return Response(status_code=204)

    async def reset(self, request: Request) -> Response:
        """Restart with {"accounts": 5, "name_prefix": "lab-", "seed": 1}: no faults, script or recorded calls."""
        body = await _read_object(request, {"accounts", "name_prefix", "seed"})
        count, name_prefix = _read_count(body, "accounts"), self._read_name_prefix(body)
        seed = body.get("seed")
        if seed is not None and type(seed) is not int:
            raise HTTPException(400, "seed must be an integer")
        self.player.stop()
        self.faults.reset(seed)
        self.calls.clear()
        self.services.replace_services({})
        self.users.clear()
        self.session_api.reset()
        self.accounts.reset(count, name_prefix, seed)
        return await self.list_accounts(request)

    def _read_name_prefix(self, body: dict[str, Any]) -> str:
        name_prefix = body.get("name_prefix", self.name_prefix)
        if not isinstance(name_prefix, str):
            raise HTTPException(400, "name_prefix must be a string")
        return name_prefix


def _read_count(body: dict[str, Any], name: str) -> int:
    count = body.get(name, 0)
    if not is_count(count) or count > MAX_ACCOUNTS:
        raise HTTPException(400, f"{name} must be an integer from 0 to {MAX_ACCOUNTS}")
    return count


async def _read_object(request: Request, known: set[str] | None = None) -> dict[str, Any]:
    try:
        body = await request.json()
    except (ValueError, RecursionError) as error:
        raise HTTPException(400, "the body must be JSON") from error
    if not isinstance(body, dict):
        raise HTTPException(400, "the body must be a JSON object")
    if known is not None and (unknown := sorted(set(body) - known)):
        raise HTTPException(400, f"unknown: {', '.join(unknown)}; known: {', '.join(sorted(known))}")
    return body
