"""Allocate a sandbox from the broker's pool for the student of this lab.

For the setup hook of an Instruqt track. Requires Python 3.8 or newer, no packages. Environment:

    BROKER_API_TOKEN         required; the track's token
    INSTRUQT_PARTICIPANT_ID  required; set by Instruqt, unique per student
    INSTRUQT_TRACK_SLUG      set by Instruqt; name of the lab, for the operator's statistics
    SANDBOX_NAME_PREFIX      prefix of the sandbox name, case-sensitive; unset: any sandbox
    BROKER_API_URL           base URL of the broker, with or without /v1
    BROKER_TIMEOUT_SEC       time limit for all attempts together (120)

Writes sandbox_id.txt, external_id.txt, sandbox_name.txt and sandbox_env.sh into the working directory.
A repeated run returns the same sandbox. Exit code: 0 done, 1 refused or no response, 2 misconfigured.
"""

import contextlib
import errno
import json
import os
import platform
import queue
import random
import re
import selectors
import shlex
import socket
import stat
import sys
import tempfile
import threading
import time
import urllib.parse
import urllib.request
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection
from typing import Any, Dict, Mapping, NamedTuple, NoReturn, Optional, Sequence, TextIO, Tuple

SCRIPT = "instruqt_broker_allocation"
OPTIONAL_HEADERS = {
    "X-Instruqt-Track-ID": "INSTRUQT_TRACK_SLUG",
    "X-Sandbox-Name-Prefix": "SANDBOX_NAME_PREFIX",
}
LEASE_FIELDS = ("sandbox_id", "external_id", "name")
SANDBOX_FILE, ACCOUNT_FILE, NAME_FILE = "sandbox_id.txt", "external_id.txt", "sandbox_name.txt"
SHELL_FILE = "sandbox_env.sh"
ADVICE = {
    400: "Check INSTRUQT_PARTICIPANT_ID, INSTRUQT_TRACK_SLUG and SANDBOX_NAME_PREFIX.",
    401: "Check BROKER_API_TOKEN in the track's secrets. The broker rejects it. It may have been replaced.",
    403: "Check that BROKER_API_TOKEN is the token for tracks.",
    409: "Start the lab again when other students have finished, or ask the broker's operator for more"
    " sandboxes. If SANDBOX_NAME_PREFIX is set, only sandboxes whose names start with it count.",
}


# --- Shared lines: identical in both scripts, because each script works alone. A test compares them. ---

DEFAULT_API_URL = "https://api-sandbox-broker.highvelocitynetworking.com/v1"
DEFAULT_BUDGET_SEC = 120.0
REQUEST_TIMEOUT_SEC = 10.0  # the broker itself responds within 5 s
MIN_REQUEST_TIMEOUT_SEC = 0.05
CONNECT_STAGGER_SEC = 0.25  # as RFC 8305 recommends
BACKOFF_SEC = (0.5, 10.0)  # first and longest pause
MAX_PAUSE_SEC = 86400.0
MAX_BODY_BYTES = 1 << 20
MIN_PYTHON = (3, 8)


class Response(NamedTuple):
    """Response to one request. Status 0 means no response; `failure` is the reason."""

    status: int
    headers: HTTPMessage
    body: Dict[str, Any]
    failure: str = ""

    @property
    def error(self) -> Dict[str, Any]:
        """Error object of the broker. Empty if a WAF, proxy or load balancer in front of it responded."""
        detail = self.body.get("detail")
        return detail if isinstance(detail, dict) and is_text(detail.get("code")) else {}

    def __str__(self) -> str:
        if not self.status:
            return f"no response ({self.failure})"
        if self.error:
            request_id = self.error.get("request_id", "unknown")
            return f"{self.status} {self.error['code']}: {self.error.get('message')} [request {request_id}]"
        if "Location" in self.headers:
            return f"HTTP {self.status}, a redirect to {self.headers['Location']} that is not followed"
        return f"HTTP {self.status} without the broker's JSON (did a WAF, proxy or load balancer answer?)"


def print_line(message: str, stream: Optional[TextIO] = None) -> None:
    """Print one line of printable ASCII, with the token masked in case a server echoed it."""
    token = os.environ.get("BROKER_API_TOKEN", "").strip()
    message = message.replace(token, "***") if token else message
    print("sandbox broker:", re.sub(r"[^ -~]+", "?", message), file=stream or sys.stdout, flush=True)


def exit_with_error(exit_code: int, message: str) -> NoReturn:
    """End the script: code 1 for a refusal or no response, code 2 for a mistake in the track's setup."""
    print_line(f"ERROR: {message}", sys.stderr)
    sys.exit(exit_code)


def check_python_version() -> None:
    """End the script with one line on an older Python. Python 3.6 parses this file, so the check runs there."""
    if sys.version_info < MIN_PYTHON:
        found, required = platform.python_version(), ".".join(map(str, MIN_PYTHON))
        exit_with_error(2, f"this is Python {found}. Run the script with Python {required} or newer.")


def is_text(value: object) -> bool:
    """Return True for a non-blank string that files and shell variables can hold."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)


def read_header_value(variable: str, if_missing: str = "") -> str:
    """Read an environment variable for use as a header value.

    With `if_missing`, the variable is required, and this text is the advice if it is blank.
    """
    value = os.environ.get(variable, "").strip()
    if not value and if_missing:
        exit_with_error(2, f"{variable} environment variable not set. {if_missing}")
    if not re.fullmatch("[ -~]*", value):
        exit_with_error(
            2, f"{variable} has characters that are invalid in an HTTP header. Use plain ASCII on one line."
        )
    return value


def build_headers() -> Dict[str, str]:
    token = read_header_value("BROKER_API_TOKEN", "Add it to the track's secrets. The broker's operator has it.")
    holder = read_header_value("INSTRUQT_PARTICIPANT_ID", "Instruqt sets it in lifecycle scripts only.")
    return {
        "Authorization": f"Bearer {token}",
        "X-Instruqt-Sandbox-ID": holder,
        "User-Agent": f"{SCRIPT}/1.0 Python/{platform.python_version()}",
        "Content-Type": "application/json",
    }


def read_api_url() -> str:
    """Return the API's base URL without a trailing slash. BROKER_API_URL may omit the /v1."""
    url = os.environ.get("BROKER_API_URL", "").strip() or DEFAULT_API_URL
    match = re.fullmatch(r"(https?://(?:[\w.-]+|\[[\w:.]+\])(?::\d{1,5})?)((?:/[\w./~%-]*)?)", url, re.A | re.I)
    if not match:
        exit_with_error(2, "BROKER_API_URL is not a web address. Example: https://broker.example.com/v1")
    origin, path = match[1], match[2].rstrip("/")
    return origin + (path if path.endswith("/v1") else f"{path}/v1")


def read_time_budget() -> float:
    """Return the time limit for all attempts together, in seconds."""
    text = os.environ.get("BROKER_TIMEOUT_SEC", "").strip()
    try:
        seconds = float(text) if text else DEFAULT_BUDGET_SEC
    except ValueError:
        seconds = 0.0
    if not 0 < seconds < float("inf"):
        exit_with_error(2, "BROKER_TIMEOUT_SEC is not a number of seconds above 0. Example: 120")
    return seconds


class AnyStatusProcessor(urllib.request.HTTPErrorProcessor):
    """Return responses of any status. Redirects are not followed, because they would forward the token."""

    def http_response(self, request: urllib.request.Request, response: Any) -> Any:  # noqa: ARG002 (urllib's signature)
        return response

    https_response = http_response


def start_connecting(info: Tuple[Any, ...]) -> socket.socket:
    """Begin a connection without waiting. `info` is of getaddrinfo. Raises OSError, for example without IPv6."""
    family, kind, protocol, _, address = info
    attempt = socket.socket(family, kind, protocol)
    attempt.setblocking(False)
    code = attempt.connect_ex(address)
    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        attempt.close()
        raise OSError(code, os.strerror(code))
    return attempt


def connect_to_first(address: Tuple[str, int], timeout: float, *_: object) -> socket.socket:
    """Connect to the address of the name that answers first. Try one more address each CONNECT_STAGGER_SEC.

    `socket.create_connection`, which this replaces, waits `timeout` for a silent address, as with broken IPv6.
    """
    waiting = socket.getaddrinfo(address[0], address[1], 0, socket.SOCK_STREAM)
    error = OSError("the name has no address")
    deadline = time.monotonic() + timeout
    with contextlib.ExitStack() as cleanup, selectors.DefaultSelector() as selector:
        while waiting or selector.get_map():
            if waiting:
                try:
                    attempt = start_connecting(waiting.pop(0))
                except OSError as refused:
                    error = refused
                else:
                    cleanup.callback(attempt.close)
                    selector.register(attempt, selectors.EVENT_WRITE, attempt)
            left = deadline - time.monotonic()
            if left <= 0:
                raise socket.timeout("timed out")
            for key, _events in selector.select(min(left, CONNECT_STAGGER_SEC) if waiting else left):
                selector.unregister(key.data)
                code = key.data.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
                if code == 0:
                    connected = key.data.dup()  # the other sockets and this one are closed here
                    connected.settimeout(timeout)
                    return connected  # type: ignore[no-any-return]  # `data` of a selector's key is untyped
                error = OSError(code, os.strerror(code))
    raise error


def race_addresses(connection: HTTPConnection) -> HTTPConnection:
    connection._create_connection = connect_to_first  # type: ignore[attr-defined]  # http.client has no option
    return connection


class RacingHTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(lambda host, **options: race_addresses(HTTPConnection(host, **options)), request)


class RacingHTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(lambda host, **options: race_addresses(HTTPSConnection(host, **options)), request)


def post_once(url: str, headers: Dict[str, str], seconds: float) -> Response:
    """Send one POST without a body. Use the configured proxy unless the broker runs on this machine."""
    is_local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(
        AnyStatusProcessor,
        RacingHTTPHandler,
        RacingHTTPSHandler,
        urllib.request.ProxyHandler({} if is_local else None),
    )
    # A new Request per attempt, because urllib modifies a proxied one and would not tunnel it again.
    request = urllib.request.Request(url, data=b"", headers=headers, method="POST")
    try:
        with opener.open(request, timeout=seconds) as response:
            content = response.read(MAX_BODY_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        return Response(0, HTTPMessage(), {}, str(getattr(error, "reason", error)) or type(error).__name__)
    try:
        body = json.loads(content)
    except (ValueError, RecursionError):
        body = {}
    return Response(response.status, response.headers, body if isinstance(body, dict) else {})


def post_with_deadline(url: str, headers: Dict[str, str], seconds: float) -> Response:
    """Run `post_once` for at most `seconds`, even if the name look-up hangs or the body arrives byte by byte."""
    responses: "queue.Queue[Response]" = queue.Queue()
    threading.Thread(target=lambda: responses.put(post_once(url, headers, seconds)), daemon=True).start()
    try:
        return responses.get(timeout=seconds)
    except queue.Empty:
        return Response(0, HTTPMessage(), {}, f"waited {seconds:.1f} s")


def is_final(response: Response, required_fields: Sequence[str]) -> bool:
    """Return True if a retry cannot help: after a complete success or a refusal by the broker itself.

    A 403 without the broker's JSON comes from a WAF, a 404 from an ingress that restarts. Both pass.
    """
    if response.status // 100 == 2:
        return all(is_text(response.body.get(field)) for field in required_fields)
    if response.status in (403, 404):
        return bool(response.error)
    return response.status not in (0, 408, 429) and response.status < 500


def read_retry_after(response: Response) -> float:
    """Return the seconds to wait from the Retry-After header (number or date), else from the body, else 0."""
    header = response.headers.get("Retry-After", "").strip()
    try:
        if header and not header[0].isdigit():
            seconds = parsedate_to_datetime(header).timestamp() - time.time()
        else:
            seconds = float(header or response.error.get("retry_after") or response.body.get("retry_after") or 0)
    except (ValueError, TypeError, OverflowError, IndexError):
        seconds = 0.0
    return min(MAX_PAUSE_SEC, max(0.0, seconds))


def post_with_retries(url: str, headers: Dict[str, str], required_fields: Sequence[str], budget: float) -> Response:
    """Send the request until the response is final. End the script when the time budget is used up."""
    deadline = time.monotonic() + budget
    backoff, max_backoff = BACKOFF_SEC
    attempt = 1
    while True:
        left = max(MIN_REQUEST_TIMEOUT_SEC, deadline - time.monotonic())
        response = post_with_deadline(url, headers, min(REQUEST_TIMEOUT_SEC, left))
        if is_final(response, required_fields):
            return response
        pause = read_retry_after(response) + backoff * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
        left = deadline - time.monotonic()
        if pause + MIN_REQUEST_TIMEOUT_SEC > left:
            exit_with_error(
                1,
                f"gave up at attempt {attempt}: {response}. The next attempt would be in {pause:.1f} s, past the"
                f" {budget:g} s of BROKER_TIMEOUT_SEC. It is safe to run this again. If it keeps failing,"
                f" check BROKER_API_URL and that this machine reaches {url}, or contact the broker's operator.",
            )
        print_line(f"attempt {attempt}: {response}. Trying again in {pause:.1f} s, for {left:.0f} s at most.")
        time.sleep(pause)
        backoff = min(backoff * 2, max_backoff)
        attempt += 1


def exit_refused(response: Response, advice: Mapping[int, str]) -> NoReturn:
    exit_with_error(1, f"{response}. {advice.get(response.status, 'Check BROKER_API_URL.')}")


# --- End of the shared lines. ---


def exit_unwritable(path: str, reason: Optional[str]) -> NoReturn:
    exit_with_error(2, f"cannot write {path}: {reason}. Run this in a writable directory.")


def check_working_directory() -> str:
    """Return the path of the working directory. End the script if it or a file of an earlier run is not writable.

    The check runs before the allocation, because the cleanup could not release a sandbox without a record of it.
    """
    directory = "the working directory"
    try:
        directory = os.getcwd()
        tempfile.TemporaryFile(dir=directory).close()
        for name in (SANDBOX_FILE, ACCOUNT_FILE, NAME_FILE, SHELL_FILE):
            path = os.path.join(directory, name)
            obstacle = find_obstacle(path)
            if obstacle:
                exit_with_error(2, f"cannot replace {path}: {obstacle}. Remove it or use another directory.")
    except OSError as error:
        exit_unwritable(directory, error.strerror)
    return directory


def find_obstacle(path: str) -> str:
    """Return the reason why the file at `path` cannot be replaced, or "" if it can or does not exist."""
    try:
        file, directory = os.lstat(path), os.stat(os.path.dirname(path))
    except FileNotFoundError:
        return ""
    if stat.S_ISDIR(file.st_mode):
        return "it is a directory"
    # In a sticky directory, for example /tmp, only root and the owner of the file or the directory can replace it.
    user = os.geteuid() if hasattr(os, "geteuid") else 0  # Windows has no user ids and no sticky directories
    if directory.st_mode & stat.S_ISVTX and user not in (0, file.st_uid, directory.st_uid):
        return "it belongs to another user, and the directory is sticky"
    return ""


def write_files(directory: str, contents: Mapping[str, str]) -> None:
    """Write each file atomically. All are on disk under temporary names before the first is renamed."""
    staged: Dict[str, str] = {}
    try:
        for name, text in contents.items():
            with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
                staged[file.name] = os.path.join(directory, name)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, 0o644)  # readable for hooks of other users; contains no secrets
        for temporary, path in staged.items():
            os.replace(temporary, path)
    except OSError as error:
        exit_unwritable(error.filename2 or directory, error.strerror)
    finally:
        for temporary in staged:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def read_earlier_sandbox_id(directory: str) -> str:
    """Return the sandbox id in the file of an earlier run, or "" without one."""
    try:
        with open(os.path.join(directory, SANDBOX_FILE), encoding="utf-8") as file:
            return file.read(1000).strip()
    except (OSError, ValueError):
        return ""


def write_lease(lease: Mapping[str, str], directory: str) -> None:
    variables = {
        "STUDENT_TENANT": lease["name"],
        "CSP_ACCOUNT_ID": lease["external_id"],
        "SANDBOX_ID": lease["sandbox_id"],
    }
    exports = " ".join(f"{variable}={shlex.quote(value)}" for variable, value in variables.items())
    contents = {
        SANDBOX_FILE: lease["sandbox_id"],  # first, because the cleanup needs it
        ACCOUNT_FILE: lease["external_id"],
        NAME_FILE: lease["name"],
        SHELL_FILE: f"export {exports}\n",
    }
    write_files(directory, contents)


def main() -> None:
    check_python_version()
    headers, url, budget = build_headers(), read_api_url(), read_time_budget()
    for header, variable in OPTIONAL_HEADERS.items():
        value = read_header_value(variable)
        if value:
            headers[header] = value
    directory = check_working_directory()
    earlier_id = read_earlier_sandbox_id(directory)
    print_line(f"requesting a sandbox from {url}")
    response = post_with_retries(f"{url}/allocate", headers, LEASE_FIELDS, budget)
    if response.status // 100 != 2:
        exit_refused(response, ADVICE)
    lease = response.body
    write_lease(lease, directory)
    outcome = "allocated" if response.status == 201 else "this student already holds"
    print_line(f"{outcome} sandbox {lease['name']} (id {lease['sandbox_id']}, account {lease['external_id']})")
    if earlier_id not in ("", lease["sandbox_id"]):
        print_line(
            f"THIS IS ANOTHER SANDBOX THAN BEFORE. The files named sandbox {earlier_id}, which this student does"
            " not hold. Work done in that sandbox is not in this one."
        )
    print_line(f"the files are in {directory}")


if __name__ == "__main__":
    main()
