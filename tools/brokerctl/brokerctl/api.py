"""The admin API, as this tool asks it."""

import json
import queue
import threading
from collections.abc import Callable, Iterator
from http.client import HTTPException
from typing import Any, Generic, TypeVar
from urllib.error import URLError
from urllib.parse import quote, urlencode
from urllib.request import HTTPHandler, HTTPSHandler, OpenerDirector, ProxyHandler, Request, UnknownHandler

from brokerctl.config import Config
from brokerctl.problems import Misconfigured, Problem, Refused, Unavailable

TIMEOUT_SEC = 30.0
"""Above what the gateway takes at most (ADMIN_WAIT_SEC)."""
LARGEST_PAGE = 500

T = TypeVar("T")


class Api:
    """With what Python brings along: to import an HTTP library takes longer than most answers."""

    def __init__(self, config: Config) -> None:
        self.url = config.url
        self._headers = {"Authorization": f"Bearer {config.token}", "User-Agent": "brokerctl"}
        # Nothing that follows a redirection, which would take the token elsewhere.
        self._opener = OpenerDirector()
        self._opener.add_handler(ProxyHandler())
        self._opener.add_handler(HTTPHandler())
        if config.url.startswith("https:"):  # reading all certificates takes a while, and http needs none
            self._opener.add_handler(HTTPSHandler())
        self._opener.add_handler(UnknownHandler())

    def get(self, path: str, **parameters: Any) -> dict[str, Any]:
        """Raises Problem, as all of these."""
        return self.request("GET", path, **parameters)

    def post(self, path: str, **parameters: Any) -> dict[str, Any]:
        return self.request("POST", path, **parameters)

    def delete(self, path: str) -> dict[str, Any]:
        return self.request("DELETE", path)

    def pages(self, path: str, name: str, limit: int, **parameters: Any) -> Iterator[dict[str, Any]]:
        """The first `limit` entries of a listing, whose pages have them under `name`."""
        cursor: str | None = None
        left = limit
        while left > 0:
            page = self.get(path, **parameters, limit=min(left, LARGEST_PAGE), cursor=cursor)
            yield from page[name]
            left -= len(page[name])
            cursor = page["cursor"]
            if cursor is None:
                return

    def request(self, method: str, path: str, **parameters: Any) -> dict[str, Any]:
        given = urlencode({name: value for name, value in parameters.items() if value is not None})
        url = f"{self.url}/v1/admin/{path}?{given}".rstrip("?")
        request = Request(url, method=method, headers=self._headers)
        try:
            with self._opener.open(request, timeout=TIMEOUT_SEC) as response:
                status, content = response.status, response.read()
        except (OSError, HTTPException, UnicodeError) as error:
            reason = error.reason if isinstance(error, URLError) else error
            if isinstance(reason, TimeoutError):
                raise Unavailable(
                    f"The gateway at {self.url} did not answer within {TIMEOUT_SEC:g} s. It may still do what was "
                    "asked: look before you ask again."
                ) from None
            raise Unavailable(no_gateway(self.url, str(reason) or type(reason).__name__)) from None
        try:
            body: dict[str, Any] = json.loads(content)
            if 200 <= status < 300:
                return body
            detail = body["detail"]
            detail["code"], detail["message"]
        except (ValueError, LookupError, TypeError):
            raise Unavailable(
                f"What answers at {self.url} is not the broker (HTTP {status}). "
                "Check BROKER_API_URL, and what is between here and the gateway."
            ) from None
        raise _problem(status, detail)


def path(part: str) -> str:
    """A part of a path, whatever somebody has typed."""
    return quote(part, safe="")


def no_gateway(url: str, reason: str) -> str:
    return f"No gateway answers at {url} ({reason}). Check BROKER_API_URL, and whether the gateway runs."


def _problem(status: int, detail: dict[str, Any]) -> Problem:
    message = f"{detail['message']} ({detail['code']}, request {detail.get('request_id')})"
    if status in (401, 403):
        return Misconfigured(f"{message} Check BROKER_ADMIN_TOKEN.", detail=detail)
    if status >= 500 or "retry_after" in detail:
        return Unavailable(message, detail=detail)
    return Refused(message, detail=detail)


class Asking(Generic[T]):
    """A question in a thread of its own, for those who cannot wait for it without an end. It may be left behind:
    looking up a name is something that nothing interrupts."""

    def __init__(self, ask: Callable[[], T]) -> None:
        self._answers: queue.SimpleQueue[tuple[T | None, Exception | None]] = queue.SimpleQueue()
        self._ask = ask
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        try:
            self._answers.put((self._ask(), None))
        except Exception as error:  # noqa: BLE001 (raised where the answer is waited for)
            self._answers.put((None, error))

    def answer(self, within_sec: float) -> T:
        """Raises TimeoutError, or what the question raised."""
        try:
            answer, error = self._answers.get(timeout=within_sec)
        except queue.Empty:
            raise TimeoutError(f"no answer in {within_sec:g} s") from None
        if error is not None:
            raise error
        return answer  # type: ignore[return-value]
