"""Sessions of the CSP API: sign-in, account switch, and the current user."""

import time

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.accounts import AccountStore
from csp_simulator.error_responses import build_error
from csp_simulator.faults import FaultInjector
from csp_simulator.records import extract_external_id
from csp_simulator.request_body import read_object
from csp_simulator.sessions import Sessions
from csp_simulator.users import UserStore

HOME_ACCOUNT = "00000000-0000-4000-8000-000000000001"
"""External id of the administrator's own account, which is not in the listing."""
UNAUTHORIZED = build_error(401, "the JWT is missing, wrong or outdated")


class SessionApi:
    def __init__(
        self,
        accounts: AccountStore,
        users: UserStore,
        sessions: Sessions,
        faults: FaultInjector,
        credentials: tuple[str, str],
    ) -> None:
        """`credentials` are the email and password of the administrator."""
        self._accounts = accounts
        self._users = users
        self._sessions = sessions
        self._faults = faults
        self._credentials = credentials
        self._first_switches: dict[str, float] = {}

    def routes(self) -> list[Route]:
        return [
            Route("/v2/session/users/sign_in", self.sign_in, methods=["POST"]),
            Route("/v2/session/account_switch", self.switch_account, methods=["POST"]),
            Route("/v2/current_user", self.show_current_user, methods=["GET"]),
        ]

    async def sign_in(self, request: Request) -> Response:
        body = await read_object(request)
        given = (body.get("email"), body.get("password"))
        user = self._users.sign_in(*given)
        is_known = user is not None or given == self._credentials
        settings = self._faults.settings
        if not is_known or settings["reject_tokens"] or settings["reject_sign_ins"]:
            return build_error(401, "the email or the password is wrong")

        def start() -> Response:
            account, user_id = (None, None) if user is None else (user.account, user.id)
            return JSONResponse({"jwt": self._sessions.sign_in(self._lifetime_sec, account, user_id)})

        return await self._faults.respond("sign_in", start)

    async def switch_account(self, request: Request) -> Response:
        if (jwt := self.extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        if self._sessions.get_user(jwt) is not None:
            return build_error(403, "this user has no other account")
        external_id = extract_external_id(await read_object(request))

        def switch() -> Response:
            if external_id is None or not self._accounts.has_active_sandbox(external_id):
                return build_error(404, "account not found")
            if not self._is_ready(external_id):
                return build_error(
                    self._faults.settings["account_switch_not_ready_status"], "the account is not ready"
                )
            has_no_effect = self._faults.settings["account_switch_without_effect"]
            account = self._sessions.get_account(jwt) if has_no_effect else external_id
            return JSONResponse({"jwt": self._sessions.switch_account(jwt, account, self._lifetime_sec)})

        return await self._faults.respond("account_switch", switch)

    async def show_current_user(self, request: Request) -> Response:
        if (jwt := self.extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        account = self._sessions.get_account(jwt) or HOME_ACCOUNT
        user = self._users.find_user(self._sessions.get_user(jwt))
        email = self._credentials[0] if user is None else user.email
        body = {"email": email, "account_id": f"identity/accounts/{account}"}
        return await self._faults.respond("current_user", lambda: JSONResponse({"result": body}))

    def extract_valid_jwt(self, request: Request) -> str | None:
        scheme, _, jwt = request.headers.get("authorization", "").partition(" ")
        if scheme != "Bearer" or self._faults.settings["reject_tokens"] or not self._sessions.is_valid(jwt):
            return None
        user_id = self._sessions.get_user(jwt)
        return jwt if user_id is None or self._users.find_user(user_id) is not None else None

    def reset(self) -> None:
        """Forget the first switches. The next switch into each account is its first one."""
        self._first_switches.clear()

    def _is_ready(self, external_id: str) -> bool:
        now = time.monotonic()
        first = self._first_switches.setdefault(external_id, now)
        return now >= first + float(self._faults.settings["account_switch_ready_after_sec"])

    @property
    def _lifetime_sec(self) -> float:
        return float(self._faults.settings["jwt_lifetime_sec"])
