"""What is not HTTP never reaches the application; it gets the one error body all the same."""

import uuid

import structlog
from starlette.responses import Response
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from gateway import errors, middleware

log = structlog.get_logger()


class Protocol(HttpToolsProtocol):
    """uvicorn's, but for its answer to what the parser refuses."""

    def send_400_response(self, msg: str) -> None:
        request_id = str(uuid.uuid4())
        response = errors.response(errors.malformed(), {"request_id": request_id})
        log.info("request.malformed", request_id=request_id, problem=msg)
        self.transport.write(_head(response, request_id) + bytes(response.body))
        self.transport.close()


def _head(response: Response, request_id: str) -> bytes:
    headers = [
        *response.raw_headers,
        (b"x-request-id", request_id.encode()),
        *middleware.SECURITY_HEADERS,
        middleware.NO_STORE,
        (b"connection", b"close"),
    ]
    return b"HTTP/1.1 400 Bad Request\r\n" + b"".join(b"%b: %b\r\n" % header for header in headers) + b"\r\n"
