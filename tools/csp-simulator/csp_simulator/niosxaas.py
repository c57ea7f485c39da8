"""The part of the NIOSXaaS API that the broker uses: the services of the account of a session."""

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from csp_simulator.error_responses import build_error
from csp_simulator.faults import FaultInjector
from csp_simulator.services import ServiceStore
from csp_simulator.session_api import UNAUTHORIZED, SessionApi
from csp_simulator.sessions import Sessions

SERVICES_PATH = "/api/universalinfra/v1/universalservices"


class NiosxaasApi:
    def __init__(
        self, session_api: SessionApi, sessions: Sessions, services: ServiceStore, faults: FaultInjector
    ) -> None:
        self._session_api = session_api
        self._sessions = sessions
        self._services = services
        self._faults = faults

    def routes(self) -> list[Route]:
        return [
            Route(SERVICES_PATH, self.list_services, methods=["GET"]),
            Route(SERVICES_PATH + "/{service_id}", self.delete_service, methods=["DELETE"]),
        ]

    async def list_services(self, request: Request) -> Response:
        if (jwt := self._session_api.extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        account = self._sessions.get_account(jwt)
        return await self._faults.respond(
            "service_listing", lambda: JSONResponse({"results": self._services.list_services(account)})
        )

    async def delete_service(self, request: Request) -> Response:
        if (jwt := self._session_api.extract_valid_jwt(request)) is None:
            return UNAUTHORIZED
        account = self._sessions.get_account(jwt)

        def delete() -> Response:
            if not self._services.delete_service(account, request.path_params["service_id"]):
                return build_error(404, "service not found")
            return Response(status_code=204)

        return await self._faults.respond("service_delete", delete)
