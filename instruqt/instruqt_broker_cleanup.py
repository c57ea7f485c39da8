"""Hand the student's sandbox back to the broker, which deletes it: for the cleanup hook of an Instruqt track.

Reads sandbox_id.txt, which instruqt_broker_allocation.py wrote, from the working directory. Nothing to clean
up is success, and so is cleaning up twice or late. Needs Python 3.8 or newer and nothing else. Environment:

    BROKER_API_TOKEN         required; the track's token
    INSTRUQT_PARTICIPANT_ID  required; set by Instruqt, the same student as at allocation
    BROKER_API_URL           where the broker is, with or without /v1
    BROKER_TIMEOUT_SEC       how long to keep trying, all attempts together (120)

Exit code: 0 done or nothing to do, 1 refused or no answer, 2 misconfigured.
"""

from __future__ import annotations

import json
import os
import platform
import queue
import random
import re
import sys
import threading
import time
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPException, HTTPMessage
from typing import Any, Mapping, NamedTuple, NoReturn, Sequence, TextIO

SCRIPT = "instruqt_broker_cleanup"
SANDBOX_FILE = "sandbox_id.txt"
RELEASE_FIELDS = ("sandbox_id", "status")
ADVICE = {
    400: "Check INSTRUQT_PARTICIPANT_ID and what sandbox_id.txt contains.",
    401: "Check BROKER_API_TOKEN in the track's secrets: it is not, or no longer, a token of this broker.",
    403: "Check that INSTRUQT_PARTICIPANT_ID is the student's for whom sandbox_id.txt was written.",
}


# --- Shared by both scripts, line for line, because each travels alone; a test compares them. ---

DEFAULT_API_URL = "https://api-sandbox-broker.highvelocitynetworking.com/v1"
DEFAULT_BUDGET_SEC = 120.0
REQUEST_TIMEOUT_SEC = 10.0  # the broker itself answers within 5
SHORTEST_REQUEST_SEC = 0.05
BACKOFF_SEC = (0.5, 10.0)  # the first pause and the longest
LONGEST_PAUSE_SEC = 86400.0
LARGEST_BODY = 1 << 20


class Answer(NamedTuple):
    """What came back from one request; status 0 means that nothing did, and `failure` says why."""

    status: int
    headers: HTTPMessage
    body: dict[str, Any]
    failure: str = ""

    @property
    def error(self) -> dict[str, Any]:
        """The broker's own error; {} when something in front of it (WAF, proxy, load balancer) answered."""
        detail = self.body.get("detail")
        return detail if isinstance(detail, dict) and is_text(detail.get("code")) else {}

    def __str__(self) -> str:
        if not self.status:
            return f"no answer ({self.failure})"
        if self.error:
            request_id = self.error.get("request_id", "unknown")
            return f"{self.status} {self.error['code']}: {self.error.get('message')} [request {request_id}]"
        if "Location" in self.headers:
            return f"HTTP {self.status}, a redirect to {self.headers['Location']} that is not followed"
        return f"HTTP {self.status} without the broker's JSON (did a WAF, proxy or load balancer answer?)"


def say(message: str, stream: TextIO | None = None) -> None:
    """Print one line of plain ASCII; whatever a server put into the message, the token is not in it."""
    token = os.environ.get("BROKER_API_TOKEN", "").strip()
    message = message.replace(token, "***") if token else message
    print("sandbox broker:", re.sub(r"[^ -~]+", "?", message), file=stream or sys.stdout, flush=True)


def stop(exit_code: int, message: str) -> NoReturn:
    """End the script: 1 when the broker refuses or stays away, 2 when the track must be corrected."""
    say(f"ERROR: {message}", sys.stderr)
    sys.exit(exit_code)


def is_text(value: object) -> bool:
    """Whether this is a string that a file and a shell variable can hold, and not a blank one."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)


def header_value(variable: str, missing: str = "") -> str:
    """Read a variable that travels as a header; `missing` is what to do when a required one is blank."""
    value = os.environ.get(variable, "").strip()
    if not value and missing:
        stop(2, f"{variable} environment variable not set. {missing}")
    if not re.fullmatch("[ -~]*", value):
        stop(2, f"{variable} has characters that an HTTP header cannot carry. Use plain ASCII on one line.")
    return value


def broker_headers() -> dict[str, str]:
    token = header_value("BROKER_API_TOKEN", "Add it to the track's secrets; the broker's operator has it.")
    holder = header_value("INSTRUQT_PARTICIPANT_ID", "Instruqt sets it in lifecycle scripts; is this one?")
    return {
        "Authorization": f"Bearer {token}",
        "X-Instruqt-Sandbox-ID": holder,
        "User-Agent": f"{SCRIPT}/1.0 Python/{platform.python_version()}",
        "Content-Type": "application/json",
    }


def broker_url() -> str:
    """The API's base address; BROKER_API_URL may lack the /v1 or end in a slash."""
    url = os.environ.get("BROKER_API_URL", "").strip() or DEFAULT_API_URL
    match = re.fullmatch(r"(https?://(?:[\w.-]+|\[[\w:.]+\])(?::\d{1,5})?)((?:/[\w./~%-]*)?)", url, re.A | re.I)
    if not match:
        stop(2, "BROKER_API_URL is not a web address. It should look like https://broker.example.com/v1")
    origin, path = match[1], match[2].rstrip("/")
    return origin + (path if path.endswith("/v1") else f"{path}/v1")


def time_budget() -> float:
    text = os.environ.get("BROKER_TIMEOUT_SEC", "").strip()
    try:
        seconds = float(text) if text else DEFAULT_BUDGET_SEC
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        stop(2, "BROKER_TIMEOUT_SEC is not a number of seconds above 0, such as 120.")
    return seconds


class EveryAnswer(urllib.request.HTTPErrorProcessor):
    """Hands over every answer as it came: errors are ours to judge, a redirect would take the token along."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:  # noqa: ARG002
        return response

    https_response = http_response


def exchange(url: str, headers: dict[str, str], seconds: float) -> Answer:
    """One POST without a body, through the machine's proxy unless the broker is on this machine."""
    local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(EveryAnswer, urllib.request.ProxyHandler({} if local else None))
    # A new Request each time: urllib changes one that went through a proxy, and would not tunnel it again.
    request = urllib.request.Request(url, data=b"", headers=headers, method="POST")
    try:
        with opener.open(request, timeout=seconds) as response:
            content = response.read(LARGEST_BODY)
    except (OSError, HTTPException, ValueError) as error:
        return Answer(0, HTTPMessage(), {}, str(getattr(error, "reason", error)) or type(error).__name__)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = {}
    return Answer(response.status, response.headers, body if isinstance(body, dict) else {})


def send(url: str, headers: dict[str, str], seconds: float) -> Answer:
    """`exchange`, over after these seconds even if a name look-up hangs or the answer trickles in."""
    answers: queue.Queue[Answer] = queue.Queue()
    threading.Thread(target=lambda: answers.put(exchange(url, headers, seconds)), daemon=True).start()
    try:
        return answers.get(timeout=seconds)
    except queue.Empty:
        return Answer(0, HTTPMessage(), {}, f"waited {seconds:.1f} s")


def is_final(answer: Answer, fields: Sequence[str]) -> bool:
    """Whether asking again would change nothing: a complete success, or a refusal by the broker itself."""
    if answer.status // 100 == 2:
        return all(is_text(answer.body.get(field)) for field in fields)
    if answer.status == 403:
        return bool(answer.error)
    return answer.status not in (0, 408, 429) and answer.status < 500


def requested_pause(answer: Answer) -> float:
    """Seconds that Retry-After (a number or a date) or else the body asks us to wait; 0 without either."""
    header = answer.headers.get("Retry-After", "").strip()
    try:
        if header and not header[0].isdigit():
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        else:
            seconds = float(header or answer.error.get("retry_after") or answer.body.get("retry_after") or 0)
    except (ValueError, TypeError, OverflowError, IndexError):
        seconds = 0.0
    return min(LONGEST_PAUSE_SEC, max(0.0, seconds))


def post(url: str, headers: dict[str, str], fields: Sequence[str], budget: float) -> Answer:
    """Ask until the answer is final; a success has all these fields. Ends the script once time is up."""
    deadline = time.monotonic() + budget
    backoff, longest_backoff = BACKOFF_SEC
    attempt = 1
    while True:
        left = max(SHORTEST_REQUEST_SEC, deadline - time.monotonic())
        answer = send(url, headers, min(REQUEST_TIMEOUT_SEC, left))
        if is_final(answer, fields):
            return answer
        pause = requested_pause(answer) + backoff * random.uniform(0.5, 1.0)  # noqa: S311
        left = deadline - time.monotonic()
        if pause + SHORTEST_REQUEST_SEC > left:
            stop(
                1,
                f"gave up at attempt {attempt}: {answer}. The next would be in {pause:.1f} s, past the"
                f" {budget:g} s of BROKER_TIMEOUT_SEC. It is safe to run this again. If it keeps failing,"
                f" check that this machine reaches {url}, or tell the broker's operator.",
            )
        say(f"attempt {attempt}: {answer}. Trying again in {pause:.1f} s, for {left:.0f} s at most.")
        time.sleep(pause)
        backoff = min(backoff * 2, longest_backoff)
        attempt += 1


def refuse(answer: Answer, advice: Mapping[int, str]) -> NoReturn:
    stop(1, f"{answer}. {advice.get(answer.status, 'Check BROKER_API_URL.')}")


# --- End of the shared lines. ---


def recorded_sandbox() -> str:
    """The id that the allocation left in the working directory, or "" without one."""
    try:
        with open(SANDBOX_FILE, encoding="utf-8") as file:
            return file.read().strip()
    except FileNotFoundError:
        return ""
    except (OSError, ValueError) as error:
        stop(2, f"cannot read {SANDBOX_FILE}: {error}. Run this where the allocation script ran.")


def main() -> None:
    sandbox_id = recorded_sandbox()
    if not sandbox_id:
        say(f"nothing to clean up: no sandbox is recorded in {SANDBOX_FILE}")
        return
    headers, url, budget = broker_headers(), broker_url(), time_budget()
    say(f"handing sandbox {sandbox_id} back to {url}")
    path = f"sandboxes/{urllib.parse.quote(sandbox_id, safe='')}/mark-for-deletion"
    answer = post(f"{url}/{path}", headers, RELEASE_FIELDS, budget)
    if answer.error.get("code") == "SANDBOX_NOT_FOUND":
        say(f"nothing to clean up: the broker does not know sandbox {sandbox_id} (any more)")
    elif answer.status // 100 != 2:
        refuse(answer, ADVICE)
    else:
        # The files stay: later hooks may read them, and the broker takes a second hand-back as done.
        say(f"sandbox {sandbox_id} is handed back ({answer.body['status']}); the broker deletes it")


if __name__ == "__main__":
    main()
