"""HTTP client of the gateway's admin API."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from http import HTTPStatus
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from typing import Any, Generic, TypedDict, TypeVar
from urllib.error import URLError
from urllib.parse import quote, urlencode
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, UnknownHandler

from brokerctl.answers import InvalidAnswer, Shape, validate_answer
from brokerctl.config import Config
from brokerctl.connect import connect_to_first
from brokerctl.errors import CommandError, Misconfigured, OtherApi, Refused, Unavailable

TIMEOUT_SEC = 30.0
"""Longer than the gateway's own limit for an admin request (ADMIN_WAIT_SEC)."""
MAX_PAGE_SIZE = 500
MAX_ANSWER_BYTES = 64 << 20

T = TypeVar("T")


class _ErrorDetail(TypedDict):
    code: str
    message: str


class _ErrorBody(TypedDict):
    detail: _ErrorDetail


class _Page(TypedDict):
    cursor: str | None


def _race_addresses(connection: HTTPConnection) -> HTTPConnection:
    connection._create_connection = connect_to_first  # type: ignore[attr-defined]
    return connection


class _RacingHTTPHandler(HTTPHandler):
    def http_open(self, request: Request) -> Any:
        return self.do_open(lambda host, **options: _race_addresses(HTTPConnection(host, **options)), request)


class _RacingHTTPSHandler(HTTPSHandler):
    def https_open(self, request: Request) -> Any:
        return self.do_open(lambda host, **options: _race_addresses(HTTPSConnection(host, **options)), request)


class AdminClient:
    """HTTP client of the admin API.

    It uses urllib, because importing an HTTP library takes longer than most requests.
    """

    def __init__(self, config: Config) -> None:
        self.url = config.url
        self._headers = {"Authorization": f"Bearer {config.token}", "User-Agent": "brokerctl"}
        # No HTTPRedirectHandler, because a redirect would send the token to another host.
        self._opener = OpenerDirector()
        self._opener.add_handler(
            ProxyHandler({"http": config.proxy, "https": config.proxy} if config.proxy else {})
        )
        self._opener.add_handler(_RacingHTTPHandler())
        if config.url.startswith("https:"):  # only then, because the handler loads all CA certificates
            self._opener.add_handler(_RacingHTTPSHandler())
        self._opener.add_handler(UnknownHandler())

    def get(self, path: str, shape: type[Shape], **parameters: Any) -> Shape:
        """Return the JSON body, which has the shape. Raises `CommandError`, like every method of this class."""
        return self.request("GET", path, shape, **parameters)

    def post(self, path: str, shape: type[Shape], **parameters: Any) -> Shape:
        return self.request("POST", path, shape, **parameters)

    def put(self, path: str, shape: type[Shape], body: Any, **parameters: Any) -> Shape:
        return self.request("PUT", path, shape, body, **parameters)

    def delete(self, path: str, shape: type[Shape], **parameters: Any) -> Shape:
        return self.request("DELETE", path, shape, **parameters)

    def iterate_entries(
        self, path: str, field: str, shape: type[Shape], limit: int, **parameters: Any
    ) -> Iterator[Shape]:
        """Yield at most `limit` entries of a paginated route. Each page holds its entries in `field`."""
        cursor: str | None = None
        left = limit
        while left > 0:
            page = self.get(path, dict[str, Any], **parameters, limit=min(left, MAX_PAGE_SIZE), cursor=cursor)
            try:
                entries = validate_answer(page.get(field), list[shape])  # type: ignore[valid-type]
                next_cursor = validate_answer(page, _Page)["cursor"]
            except InvalidAnswer as error:
                raise self._reject_answer(str(error)) from None
            yield from entries
            left -= len(entries)
            if next_cursor is None:
                return
            if next_cursor == cursor:
                raise self._reject_answer("the cursor of a page leads to the same page")
            cursor = next_cursor

    def request(self, method: str, path: str, shape: type[Shape], body: Any = None, **parameters: Any) -> Shape:
        """Send a request for `path` below /v1/admin, with `body` as JSON. The query omits parameters with the value
        None."""
        query = urlencode({name: value for name, value in parameters.items() if value is not None})
        url = f"{self.url}/v1/admin/{path}?{query}".rstrip("?")
        request = Request(url, method=method, headers=self._headers)
        if body is not None:
            request.data = json.dumps(body).encode()
            request.add_header("Content-Type", "application/json")
        try:
            with self._opener.open(request, timeout=TIMEOUT_SEC) as response:
                status, content = response.status, response.read(MAX_ANSWER_BYTES + 1)
        except (OSError, HTTPException, UnicodeError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):
                raise Unavailable(
                    f"The gateway at {self.url} did not answer within {TIMEOUT_SEC:g} s. It may still complete the "
                    "request: check the state before you repeat the command."
                ) from None
            raise Unavailable(
                describe_unreachable_gateway(self.url, str(reason) or type(reason).__name__)
            ) from None
        try:
            answer = None if status == HTTPStatus.NO_CONTENT else _parse_json(content)
            if 200 <= status < 300:
                return validate_answer(answer, shape)
            detail = validate_answer(answer, _ErrorBody)["detail"]
        except InvalidAnswer as error:
            if status >= 500:
                raise Unavailable(
                    f"{self.url} answers HTTP {status} without this broker's JSON. No gateway behind the load "
                    "balancer or proxy seems to be ready."
                ) from None
            raise self._reject_answer(f"HTTP {status}: {error}") from None
        raise _build_error(status, dict(detail))

    def _reject_answer(self, reason: str) -> OtherApi:
        return OtherApi(
            f"{self.url} answers, but it is not this broker's API ({reason}). Check BROKER_API_URL, the proxies in "
            "front of the gateway, and whether brokerctl has the version of the gateway."
        )


def _parse_json(content: bytes) -> Any:
    if len(content) > MAX_ANSWER_BYTES:
        raise InvalidAnswer(f"more than {MAX_ANSWER_BYTES >> 20} MiB")
    try:
        return json.loads(content)
    except ValueError:
        raise InvalidAnswer("no JSON") from None
    except RecursionError:
        raise InvalidAnswer("JSON that is nested too deeply") from None


def quote_segment(value: str) -> str:
    """Escape user input for use as one segment of a URL path."""
    return quote(value, safe="")


def describe_unreachable_gateway(url: str, reason: str) -> str:
    return f"No gateway answers at {url} ({reason}). Check BROKER_API_URL and whether the gateway runs."


def _build_error(status: int, detail: dict[str, Any]) -> CommandError:
    message = f"{detail['message']} ({detail['code']}, request {detail.get('request_id')})"
    if status in (401, 403):
        return Misconfigured(f"{message} Check BROKER_ADMIN_TOKEN.", detail=detail)
    if status >= 500 or "retry_after" in detail:
        return Unavailable(message, detail=detail)
    return Refused(message, detail=detail)


class BackgroundCall(Generic[T]):
    """Function call in a daemon thread, so the caller can stop waiting for it.

    The thread may outlive the wait, because a DNS lookup cannot be interrupted.
    """

    def __init__(self, function: Callable[[], T]) -> None:
        self._outcome: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()
        self._function = function
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._outcome.put((self._function(), None))
        except Exception as error:  # noqa: BLE001 (result() raises it in the caller's thread)
            self._outcome.put((None, error))

    def result(self, timeout_sec: float) -> T:
        """Return the result, or raise the function's exception. Raises TimeoutError after `timeout_sec`."""
        try:
            result, error = self._outcome.get(timeout=timeout_sec)
        except queue.Empty:
            raise TimeoutError(f"no answer in {timeout_sec:g} s") from None
        if error is not None:
            raise error
        return result  # type: ignore[return-value]
