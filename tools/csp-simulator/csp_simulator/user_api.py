"""Groups and users of the account that a session is switched to."""

import re

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.error_responses import build_error
from csp_simulator.faults import FaultInjector
from csp_simulator.request_body import read_object
from csp_simulator.session_api import UNAUTHORIZED, SessionApi
from csp_simulator.sessions import Sessions
from csp_simulator.users import UserStore, find_password_problem, list_groups

EMAIL_FILTER = re.compile(r'\s*email\s*==\s*"((?:[^"]|"")*)"\s*')


class UserApi:
    def __init__(
        self, session_api: SessionApi, sessions: Sessions, users: UserStore, faults: FaultInjector
    ) -> None:
        self._session_api = session_api
        self._sessions = sessions
        self._users = users
        self._faults = faults

    def routes(self) -> list[Route]:
        return [
            Route("/v2/groups", self.list_groups, methods=["GET"]),
            Route("/v2/users", self.create_user, methods=["POST"]),
            Route("/v2/users", self.find_users, methods=["GET"]),
            Route("/v2/users/{user_id}/password", self.set_password, methods=["POST"]),
            Route("/v2/users/{user_id}", self.delete_user, methods=["DELETE"]),
        ]

    async def list_groups(self, request: Request) -> Response:
        if (account := self._find_account(request)) is None:
            return UNAUTHORIZED
        return await self._faults.respond("group_listing", lambda: JSONResponse({"results": list_groups(account)}))

    async def create_user(self, request: Request) -> Response:
        if (account := self._find_account(request)) is None:
            return UNAUTHORIZED
        body = await read_object(request)
        name, email, kind, group_ids = (body.get(key) for key in ("name", "email", "type", "group_ids"))
        known_ids = {group["id"] for group in list_groups(account)}
        if not isinstance(name, str) or not name.strip():
            return build_error(400, "name must be a non-blank string")
        if not isinstance(email, str) or not re.fullmatch(r"[^@\s]{1,64}@[^@\s]+", email):
            return build_error(400, "email must be an address")
        if kind != "interactive":
            return build_error(400, "type must be interactive")
        if not isinstance(group_ids, list) or not group_ids or not known_ids.issuperset(map(str, group_ids)):
            return build_error(400, "group_ids must be ids of groups of this account")

        def create() -> Response:
            user = self._users.create_user(account, email, name, kind, group_ids)
            if user is None:
                return build_error(409, "the user exists")
            return JSONResponse({"result": user.to_record()}, 201)

        return await self._faults.respond("user_create", create)

    async def find_users(self, request: Request) -> Response:
        if (account := self._find_account(request)) is None:
            return UNAUTHORIZED
        filtered = EMAIL_FILTER.fullmatch(request.query_params.get("_filter", ""))
        if filtered is None:
            return build_error(400, '_filter must be email=="…"; a doubled quote stands for a quote in the email')
        email = filtered[1].replace('""', '"')

        def find() -> Response:
            return JSONResponse({"results": [user.to_record() for user in self._users.find_users(account, email)]})

        return await self._faults.respond("user_find", find)

    async def set_password(self, request: Request) -> Response:
        if (account := self._find_account(request)) is None:
            return UNAUTHORIZED
        password = (await read_object(request)).get("new_password")
        if problem := find_password_problem(password):
            return build_error(400, problem)

        def change() -> Response:
            if not self._users.set_password(account, request.path_params["user_id"], str(password)):
                return build_error(404, "user not found")
            return JSONResponse({})

        return await self._faults.respond("user_password", change)

    async def delete_user(self, request: Request) -> Response:
        if (account := self._find_account(request)) is None:
            return UNAUTHORIZED

        def delete() -> Response:
            if not self._users.delete_user(account, request.path_params["user_id"]):
                return build_error(404, "user not found")
            return Response(status_code=204)

        return await self._faults.respond("user_delete", delete)

    def _find_account(self, request: Request) -> str | None:
        """Return the account of the administrator's session. None: the JWT is invalid, or not switched."""
        jwt = self._session_api.extract_valid_jwt(request)
        if jwt is None or self._sessions.get_user(jwt) is not None:
            return None
        return self._sessions.get_account(jwt)
