"""The admin API, as this tool asks it."""

import queue
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar
from urllib.parse import quote

import httpx

from brokerctl.config import Config
from brokerctl.problems import Misconfigured, Problem, Refused, Unavailable

TIMEOUT_SEC = 30.0
"""Above what the gateway takes at most (ADMIN_WAIT_SEC)."""
LARGEST_PAGE = 500

T = TypeVar("T")


class Api:
    def __init__(self, config: Config) -> None:
        self.url = config.url
        self._client = httpx.Client(
            base_url=f"{config.url}/v1/admin",
            headers={"Authorization": f"Bearer {config.token}"},
            timeout=TIMEOUT_SEC,
            verify=config.url.startswith("https:"),  # reading all certificates takes a while, and http needs none
        )

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
        given = {name: value for name, value in parameters.items() if value is not None}
        try:
            response = self._client.request(method, path, params=given)
        except httpx.TimeoutException:
            raise Unavailable(
                f"The gateway at {self.url} did not answer within {TIMEOUT_SEC:g} s. It may still do what was "
                "asked: look before you ask again."
            ) from None
        except (httpx.HTTPError, httpx.InvalidURL, OSError) as error:
            raise Unavailable(no_gateway(self.url, str(error) or type(error).__name__)) from None
        try:
            body: dict[str, Any] = response.json()
            if response.is_success:
                return body
            detail = body["detail"]
            detail["code"], detail["message"]
        except (ValueError, LookupError, TypeError):
            raise Unavailable(
                f"What answers at {self.url} is not the broker (HTTP {response.status_code}). "
                "Check BROKER_API_URL, and what is between here and the gateway."
            ) from None
        raise _problem(response.status_code, detail)


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
