"""Allocate a sandbox from the broker's pool for the student of this lab.

For the lifecycle scripts of an Instruqt track. Requires Python 3.8 or newer, no packages.

    python3 instruqt_broker_allocation.py                  setup: allocate a sandbox
    python3 instruqt_broker_allocation.py --standby        setup with hot start: allocate it before a student exists
    python3 instruqt_broker_allocation.py --claim          start the time of a standby lease for the student
    python3 instruqt_broker_allocation.py --extend HOURS   extend the lease
    python3 instruqt_broker_allocation.py --replace REASON get another sandbox for a broken one
    ... --access                                             also get a login inside the sandbox, and wait for it

Environment:

    BROKER_API_TOKEN         required; the track's token
    INSTRUQT_PARTICIPANT_ID  set by Instruqt, unique per student; required except with --standby
    INSTRUQT_TRACK_SLUG      set by Instruqt; name of the lab, for the operator's statistics
    SANDBOX_NAME_PREFIX      prefix of the sandbox name, case-sensitive; unset: any sandbox
    BROKER_API_URL           base URL of the broker, with or without /v1
    BROKER_TIMEOUT_SEC       time limit for attempts without an answer of the broker (120)
    BROKER_WAIT_SEC          longest wait in line while no sandbox is free (900); 0: fail at once
    BROKER_ACCESS_SEC        longest wait for the login inside the sandbox (600)
    BROKER_OUTPUT_DIR        directory of the files; unset: the working directory

Writes sandbox_id.txt, external_id.txt, sandbox_name.txt and sandbox_env.sh, and lease_secret.txt, which the broker
requires for this lease from then on. With --access also user_email.txt, user_password.txt, user_id.txt and
user_credentials.sh. Only this user can read the secret and the login. On a host with Instruqt's agent, sets the
variables of sandbox_env.sh there, too. A repeated run returns the same sandbox. Exit code: 0 done, 1 refused or no
response, 2 misconfigured.
"""

import platform
import sys

# Older versions parse this file too, down to Python 2.7: no annotations, no f-strings, ASCII only.
if sys.version_info < (3, 8):
    sys.stderr.write(
        "sandbox broker: ERROR: this is Python {}. Run the script with Python 3.8 or newer,"
        " or use instruqt_broker_allocation.sh, which needs no Python.\n".format(platform.python_version())
    )
    sys.exit(2)

import argparse
import contextlib
import errno
import json
import os
import queue
import random
import re
import secrets
import selectors
import shlex
import shutil
import socket
import stat
import subprocess
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import uuid
from email.utils import parsedate_to_datetime
from http.client import HTTPConnection, HTTPException, HTTPMessage, HTTPSConnection
from typing import Any, Callable, Dict, List, Mapping, NamedTuple, NoReturn, Optional, Sequence, TextIO, Tuple  # noqa: F401 (type comments)

SCRIPT = "instruqt_broker_allocation"
HOLDER = "X-Instruqt-Sandbox-ID"
OPTIONAL_HEADERS = {
    "X-Instruqt-Track-ID": "INSTRUQT_TRACK_SLUG",
    "X-Sandbox-Name-Prefix": "SANDBOX_NAME_PREFIX",
}
STANDBY_VARIABLES = ("INSTRUQT__SANDBOX_ID", "_SANDBOX_ID")  # the sandbox of Instruqt; set with hot start, too
LEASE_FIELDS = ("sandbox_id", "external_id", "name")
EXTENSION_FIELDS = ("expires_at", "max_expires_at")
ACCOUNT_FILE, NAME_FILE, SHELL_FILE = "external_id.txt", "sandbox_name.txt", "sandbox_env.sh"
LOGIN_FIELDS = ("email", "password", "user_id", "login_url")
LOGIN_FILES = ("user_email.txt", "user_password.txt", "user_id.txt")
CREDENTIALS_FILE = "user_credentials.sh"
DEFAULT_WAIT_SEC = 900.0
DEFAULT_ACCESS_SEC = 600.0
ACCESS_PROGRESS_SEC = 15.0
TOOL_TIMEOUT_SEC = 10.0
MAX_REASON = 500
ADVICE = {
    400: "Check INSTRUQT_PARTICIPANT_ID, INSTRUQT_TRACK_SLUG, SANDBOX_NAME_PREFIX and the arguments.",
    401: "Check BROKER_API_TOKEN in the track's secrets. The broker rejects it. It may have been replaced.",
    403: "Check that BROKER_API_TOKEN is the token for tracks, and that the files belong to this student.",
    404: "Check BROKER_API_URL, and that the broker's version supports this command.",
    409: "Start the lab again when other students have finished, or ask the broker's operator for more"
    " sandboxes. If SANDBOX_NAME_PREFIX is set, only sandboxes whose names start with it count.",
}


ACCESS_ADVICE = dict(ADVICE)
ACCESS_ADVICE[404] = "The sandbox was allocated without a login. Release it, and allocate it with --access."
ACCESS_ADVICE[410] = "Allocate a sandbox first."


# --- Shared lines: identical in both scripts, because each script works alone. A test compares them. ---

DEFAULT_API_URL = "https://api-sandbox-broker.highvelocitynetworking.com/v1"
DEFAULT_BUDGET_SEC = 120.0
REQUEST_TIMEOUT_SEC = 10.0  # the broker itself responds within 5 s
MIN_REQUEST_TIMEOUT_SEC = 0.05
CONNECT_STAGGER_SEC = 0.25  # as RFC 8305 recommends
BACKOFF_SEC = (0.5, 10.0)  # first and longest pause
MAX_PAUSE_SEC = 86400.0
DEFAULT_LINE_PAUSE_SEC = 5.0
MAX_LINE_PAUSE_SEC = 20.0  # a student loses the place in the waiting line after 60 s without a request
MAX_BODY_BYTES = 1 << 20
SANDBOX_FILE, HOLDER_FILE, SECRET_FILE = "sandbox_id.txt", "holder_id.txt", "lease_secret.txt"
NOT_OWNER = "NOT_SANDBOX_OWNER"


class ScriptError(Exception):
    """Reason to end the script: code 1 for a refusal or no response, code 2 for a mistake in the track's setup."""

    def __init__(self, exit_code, message):
        # type: (int, str) -> None
        super().__init__(message)
        self.exit_code = exit_code


class Response(
    NamedTuple("Response", [("status", int), ("headers", HTTPMessage), ("body", Dict[str, Any]), ("failure", str)])
):
    """Response to one request. Status 0 means no response; `failure` is the reason."""

    @property
    def error(self):
        # type: () -> Dict[str, Any]
        """Error object of the broker. Empty if a WAF, proxy or load balancer in front of it responded."""
        detail = self.body.get("detail")
        return detail if isinstance(detail, dict) and is_text(detail.get("code")) else {}

    @property
    def is_success(self):
        # type: () -> bool
        return self.status // 100 == 2

    @property
    def is_place_in_line(self):
        # type: () -> bool
        """True if the student waits in line. The same request is then repeated."""
        return self.status == 202 and self.body.get("status") == "waiting"

    def __str__(self):
        # type: () -> str
        if not self.status:
            return "no response ({})".format(self.failure)
        if self.error:
            request_id = self.error.get("request_id", "unknown")
            return "{} {}: {} [request {}]".format(
                self.status, self.error["code"], self.error.get("message"), request_id
            )
        if "Location" in self.headers:
            return "HTTP {}, a redirect to {} that is not followed".format(self.status, self.headers["Location"])
        return "HTTP {} without the broker's JSON (did a WAF, proxy or load balancer answer?)".format(self.status)


def no_response(failure):
    # type: (str) -> Response
    return Response(0, HTTPMessage(), {}, failure)


def to_printable(message):
    # type: (str) -> str
    """Return one line of printable ASCII, with the token masked in case a server echoed it."""
    token = os.environ.get("BROKER_API_TOKEN", "").strip()
    message = message.replace(token, "***") if token else message
    return re.sub(r"[^ -~]+", "?", message)


def print_line(message, stream=None):
    # type: (str, Optional[TextIO]) -> None
    target = stream or sys.stdout
    target.write("sandbox broker: " + to_printable(message) + "\n")
    target.flush()


def is_text(value):
    # type: (object) -> bool
    """Return True for a non-blank string that files and shell variables can hold."""
    return isinstance(value, str) and bool(value.strip()) and not re.search("[\0\ud800-\udfff]", value)


def read_header_value(variable, if_missing=""):
    # type: (str, str) -> str
    """Read an environment variable for use as a header value.

    With `if_missing`, the variable is required, and this text is the advice if it is blank.
    """
    value = os.environ.get(variable, "").strip()
    if not value and if_missing:
        raise ScriptError(2, "{} environment variable not set. {}".format(variable, if_missing))
    if not re.fullmatch("[ -~]*", value):
        raise ScriptError(
            2,
            "{} has characters that are invalid in an HTTP header. Use plain ASCII on one line.".format(variable),
        )
    return value


def read_participant_id(is_required=True):
    # type: (bool) -> str
    advice = "Instruqt sets it in lifecycle scripts only." if is_required else ""
    return read_header_value("INSTRUQT_PARTICIPANT_ID", advice)


def build_headers():
    # type: () -> Dict[str, str]
    token = read_header_value("BROKER_API_TOKEN", "Add it to the track's secrets. The broker's operator has it.")
    return {
        "Authorization": "Bearer " + token,
        "User-Agent": "{}/1.1 Python/{}".format(SCRIPT, platform.python_version()),
        "Content-Type": "application/json",
    }


def read_api_url():
    # type: () -> str
    """Return the API's base URL without a trailing slash. BROKER_API_URL may omit the /v1."""
    url = os.environ.get("BROKER_API_URL", "").strip() or DEFAULT_API_URL
    match = re.fullmatch(r"(https?://(?:[\w.-]+|\[[\w:.]+\])(?::\d{1,5})?)((?:/[\w./~%-]*)?)", url, re.A | re.I)
    if not match:
        raise ScriptError(2, "BROKER_API_URL is not a web address. Example: https://broker.example.com/v1")
    origin, path = match.group(1), match.group(2).rstrip("/")
    return origin + (path if path.endswith("/v1") else path + "/v1")


def read_seconds(variable, default, minimum):
    # type: (str, float, float) -> float
    """Return the seconds in an environment variable. `minimum` is the smallest valid value."""
    text = os.environ.get(variable, "").strip()
    try:
        seconds = float(text) if text else default
    except ValueError:
        seconds = -1.0
    if not minimum <= seconds < float("inf"):
        raise ScriptError(2, "{} is not a number of seconds. Example: {:g}".format(variable, default))
    return seconds


def read_time_budget():
    # type: () -> float
    """Return the time limit for all attempts together, in seconds."""
    return read_seconds("BROKER_TIMEOUT_SEC", DEFAULT_BUDGET_SEC, 0.001)


def find_directory():
    # type: () -> str
    """Return the path of the directory of the files: BROKER_OUTPUT_DIR, or else the working directory."""
    try:
        return os.path.abspath(os.environ.get("BROKER_OUTPUT_DIR", "").strip() or os.getcwd())
    except OSError as error:
        raise ScriptError(
            2, "cannot write the working directory: {}. Run this in a writable directory.".format(error.strerror)
        )


def read_id(directory, name):
    # type: (str, str) -> str
    """Return the id in the file `name`, or "" without one. Raises OSError or ValueError for an unreadable file."""
    try:
        with open(os.path.join(directory, name), encoding="utf-8") as file:
            return file.read(1000).strip()
    except FileNotFoundError:
        return ""


def read_sandbox_id(directory):
    # type: (str) -> str
    """Return the sandbox id from the allocation's file, or "" without one."""
    try:
        return read_id(directory, SANDBOX_FILE)
    except (OSError, ValueError) as error:
        raise ScriptError(
            2, "cannot read {}: {}. Run this where the allocation script ran.".format(SANDBOX_FILE, error)
        )


def read_kept_holder(directory):
    # type: (str) -> str
    """Return the id under which a standby lease was taken, or "" without one."""
    try:
        holder = read_id(directory, HOLDER_FILE)
    except (OSError, ValueError):
        return ""
    return holder if re.fullmatch("[ -~]*", holder) else ""


def read_secret(directory):
    # type: (str) -> str
    """Return the secret of the lease, or "" without one. The broker changes a lease only for its secret."""
    try:
        secret = read_id(directory, SECRET_FILE)
    except NotADirectoryError:
        return ""
    except (OSError, ValueError) as error:
        raise ScriptError(
            2, "cannot read {}: {}. Run this as the user who allocated the sandbox.".format(SECRET_FILE, error)
        )
    return secret if re.fullmatch("[ -~]{16,128}", secret) else ""


class AnyStatusProcessor(urllib.request.HTTPErrorProcessor):
    """Return responses of any status. Redirects are not followed, because they would forward the token."""

    def http_response(self, request, response):  # noqa: ARG002 (urllib's signature)
        # type: (urllib.request.Request, Any) -> Any
        return response

    https_response = http_response


def start_connecting(info):
    # type: (Tuple[Any, ...]) -> socket.socket
    """Begin a connection without waiting. `info` is of getaddrinfo. Raises OSError, for example without IPv6."""
    family, kind, protocol, _, address = info
    attempt = socket.socket(family, kind, protocol)
    attempt.setblocking(False)
    code = attempt.connect_ex(address)
    if code not in (0, errno.EINPROGRESS, errno.EWOULDBLOCK):
        attempt.close()
        raise OSError(code, os.strerror(code))
    return attempt


def connect_to_first(address, timeout, *_):
    # type: (Tuple[str, int], float, object) -> socket.socket
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


def race_addresses(connection):
    # type: (HTTPConnection) -> HTTPConnection
    connection._create_connection = connect_to_first  # type: ignore[attr-defined]  # http.client has no option
    return connection


class RacingHTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        # type: (urllib.request.Request) -> Any
        return self.do_open(lambda host, **options: race_addresses(HTTPConnection(host, **options)), request)


class RacingHTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        # type: (urllib.request.Request) -> Any
        return self.do_open(lambda host, **options: race_addresses(HTTPSConnection(host, **options)), request)


def post_once(url, headers, content, seconds):
    # type: (str, Dict[str, str], Optional[bytes], float) -> Response
    """Send one POST, or one GET if `content` is None. Use the configured proxy unless the broker runs on this machine."""
    is_local = urllib.parse.urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1")
    opener = urllib.request.build_opener(
        AnyStatusProcessor,
        RacingHTTPHandler,
        RacingHTTPSHandler,
        urllib.request.ProxyHandler({} if is_local else None),
    )
    # A new Request per attempt, because urllib modifies a proxied one and would not tunnel it again.
    method = "GET" if content is None else "POST"
    request = urllib.request.Request(url, data=content, headers=headers, method=method)
    try:
        with opener.open(request, timeout=seconds) as response:
            received = response.read(MAX_BODY_BYTES)
    except (OSError, HTTPException, ValueError) as error:
        return no_response(str(getattr(error, "reason", error)) or type(error).__name__)
    try:
        body = json.loads(received)
    except (ValueError, RecursionError):
        body = {}
    return Response(response.status, response.headers, body if isinstance(body, dict) else {}, "")


def post_with_deadline(url, headers, content, seconds):
    # type: (str, Dict[str, str], Optional[bytes], float) -> Response
    """Run `post_once` for at most `seconds`, even if the name look-up hangs or the body arrives byte by byte."""
    responses = queue.Queue()  # type: queue.Queue[Response]
    threading.Thread(target=lambda: responses.put(post_once(url, headers, content, seconds)), daemon=True).start()
    try:
        return responses.get(timeout=seconds)
    except queue.Empty:
        return no_response("waited {:.1f} s".format(seconds))


def is_final(response, is_complete):
    # type: (Response, Callable[[Dict[str, Any]], bool]) -> bool
    """Return True if a retry cannot help: after a complete success or a refusal by the broker itself.

    A 403 without the broker's JSON comes from a WAF, a 404 from an ingress that restarts. Both pass.
    """
    if response.is_success:
        return is_complete(response.body)
    if response.status in (403, 404):
        return bool(response.error)
    return response.status not in (0, 408, 429) and response.status < 500


def read_retry_after(response):
    # type: (Response) -> float
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


def describe_place(body):
    # type: (Dict[str, Any]) -> str
    estimate = body.get("estimated_wait_sec")
    duration = "The wait is not known yet."
    if isinstance(estimate, (int, float)) and 0 <= estimate < MAX_PAUSE_SEC:
        duration = "The estimated wait is {:.0f} s.".format(estimate)
    return "no sandbox is free; waiting in line at position {}. {}".format(
        body.get("position", "unknown"), duration
    )


class Request(object):
    """A POST to the broker, or a GET, repeated until its response is final."""

    def __init__(self, url, headers, body, is_complete):
        # type: (str, Dict[str, str], Optional[Dict[str, Any]], Callable[[Dict[str, Any]], bool]) -> None
        self.url = url
        self.headers = headers
        self.content = b"" if body is None else json.dumps(body).encode()  # type: Optional[bytes]
        self.is_complete = is_complete

    def send(self, budget, wait):
        # type: (float, float) -> Response
        """Return the final response. Raises ScriptError when the time is used up.

        Attempts without a response of the broker use up `budget` (seconds). With `wait` above 0, the student may
        wait that long in line. Each place in line starts the budget again.
        """
        line_end = time.monotonic() + wait
        deadline = time.monotonic() + budget
        backoff, max_backoff = BACKOFF_SEC
        attempt = 1
        place = ""
        while True:
            left = max(MIN_REQUEST_TIMEOUT_SEC, deadline - time.monotonic())
            response = self.try_once(min(REQUEST_TIMEOUT_SEC, left), line_end - time.monotonic() if wait else 0.0)
            if response.is_place_in_line:
                if str(response.body.get("position")) != place:
                    place = str(response.body.get("position"))
                    print_line(describe_place(response.body))
                pause = min(MAX_LINE_PAUSE_SEC, read_retry_after(response) or DEFAULT_LINE_PAUSE_SEC)
                left = line_end - time.monotonic()
                if left <= 0:
                    raise ScriptError(
                        1,
                        "no sandbox became free in the {:g} s of BROKER_WAIT_SEC; the last position in line was {}."
                        " Start the lab again later, or ask the broker's operator for more sandboxes.".format(
                            wait, place
                        ),
                    )
                time.sleep(min(pause * random.uniform(0.9, 1.0), left))  # noqa: S311 (jitter)
                deadline, backoff, attempt = time.monotonic() + budget, BACKOFF_SEC[0], 1
                continue
            if is_final(response, self.is_complete):
                return response
            pause = read_retry_after(response) + backoff * random.uniform(0.5, 1.0)  # noqa: S311 (jitter)
            left = deadline - time.monotonic()
            if pause + MIN_REQUEST_TIMEOUT_SEC > left:
                raise ScriptError(
                    1,
                    "gave up at attempt {}: {}. The next attempt would be in {:.1f} s, past the"
                    " {:g} s of BROKER_TIMEOUT_SEC. It is safe to run this again. If it keeps failing,"
                    " check BROKER_API_URL and that this machine reaches {}, or contact the broker's operator.".format(
                        attempt, response, pause, budget, self.url
                    ),
                )
            print_line(
                "attempt {}: {}. Trying again in {:.1f} s, for {:.0f} s at most.".format(
                    attempt, response, pause, left
                )
            )
            time.sleep(pause)
            backoff = min(backoff * 2, max_backoff)
            attempt += 1

    def try_once(self, seconds, wait):
        # type: (float, float) -> Response
        headers = dict(self.headers)
        if wait > 0:  # RFC 7240. A broker without a waiting line ignores the header.
            headers["Prefer"] = "respond-async, wait={:.0f}".format(max(1.0, wait))
        return post_with_deadline(self.url, headers, self.content, seconds)


def send_for_holders(request, holders, budget, wait):
    # type: (Request, Sequence[str], float, float) -> Response
    """Send the request under each student id until the broker knows the sandbox under it; return the response.

    A claim can give a standby lease to another id than it was taken under, and either id may be the present one.
    """
    for holder in holders[:-1]:
        request.headers["X-Instruqt-Sandbox-ID"] = holder
        response = request.send(budget, wait)
        if response.error.get("code") != NOT_OWNER:
            return response
    request.headers["X-Instruqt-Sandbox-ID"] = holders[-1]
    return request.send(budget, wait)


def find_holders(directory):
    # type: (str) -> List[str]
    """Return the student ids under which the sandbox of the files may be leased."""
    kept = read_kept_holder(directory)
    participant = read_participant_id(is_required=not kept)
    return [holder for holder in (participant, kept if kept != participant else "") if holder]


def build_sandbox_url(url, sandbox_id, action):
    # type: (str, str, str) -> str
    return "{}/sandboxes/{}/{}".format(url, urllib.parse.quote(sandbox_id, safe=""), action)


def raise_refused(response, advice):
    # type: (Response, Mapping[int, str]) -> NoReturn
    raise ScriptError(1, "{}. {}".format(response, advice.get(response.status, "Check BROKER_API_URL.")))


# --- End of the shared lines. ---


def find_standby_holder(directory):
    # type: (str) -> str
    """Return the student id for a standby lease: the participant, else the sandbox of Instruqt, else a new id.

    With hot start, Instruqt runs the setup before a participant exists. The id is kept for --claim and the cleanup.
    """
    holder = read_participant_id(is_required=False)
    if holder:
        return holder
    for variable in STANDBY_VARIABLES:
        holder = holder or read_header_value(variable)
    holder = holder or read_kept_holder(directory) or "standby-{}".format(uuid.uuid4())
    write_files(directory, {HOLDER_FILE: holder})
    return holder


def raise_unwritable(path, reason):
    # type: (str, Optional[str]) -> NoReturn
    raise ScriptError(2, "cannot write {}: {}. Run this in a writable directory.".format(path, reason))


def check_directory(directory):
    # type: (str) -> None
    """Create the directory of the files. Raises ScriptError if it or a file of an earlier run is not writable.

    The check runs before the allocation, because the cleanup could not release a sandbox without a record of it.
    """
    try:
        os.makedirs(directory, exist_ok=True)
        tempfile.TemporaryFile(dir=directory).close()
        for name in (SANDBOX_FILE, ACCOUNT_FILE, NAME_FILE, SHELL_FILE, SECRET_FILE):
            path = os.path.join(directory, name)
            obstacle = find_obstacle(path)
            if obstacle:
                raise ScriptError(
                    2, "cannot replace {}: {}. Remove it or use another directory.".format(path, obstacle)
                )
    except OSError as error:
        raise_unwritable(directory, error.strerror)


def find_obstacle(path):
    # type: (str) -> str
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


def write_files(directory, contents, mode=0o644):
    # type: (str, Mapping[str, str], int) -> None
    """Write each file atomically, readable for hooks of other users unless `mode` says otherwise. All are on disk under temporary names before the first is renamed."""
    staged = {}  # type: Dict[str, str]
    try:
        for name, text in contents.items():
            with tempfile.NamedTemporaryFile("w", dir=directory, delete=False, encoding="utf-8") as file:
                staged[file.name] = os.path.join(directory, name)
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(file.name, mode)
        for temporary, path in staged.items():
            os.replace(temporary, path)
    except OSError as error:
        raise_unwritable(error.filename2 or directory, error.strerror)
    finally:
        for temporary in staged:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


def create_secret(directory):
    # type: (str) -> str
    """Return the secret for the lease, and keep it for the other commands and the cleanup, readable for this user
    only. The file exists before the first request, so a repeated request has the same secret."""
    secret = read_secret(directory)
    if secret:
        return secret
    path = os.path.join(directory, SECRET_FILE)
    descriptor, temporary = tempfile.mkstemp(dir=directory)  # mode 600
    try:
        with os.fdopen(descriptor, "w") as file:
            file.write(secrets.token_hex(32))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise_unwritable(directory, error.strerror)
    return read_secret(directory)


def read_earlier_sandbox_id(directory):
    # type: (str) -> str
    """Return the sandbox id in the file of an earlier run, or "" without one."""
    try:
        return read_id(directory, SANDBOX_FILE)
    except (OSError, ValueError):
        return ""


def write_lease(lease, directory):
    # type: (Mapping[str, str], str) -> None
    variables = build_variables(lease)
    exports = " ".join("{}={}".format(variable, shlex.quote(value)) for variable, value in variables.items())
    contents = {
        SANDBOX_FILE: lease["sandbox_id"],  # first, because the cleanup needs it
        ACCOUNT_FILE: lease["external_id"],
        NAME_FILE: lease["name"],
        SHELL_FILE: "export {}\n".format(exports),
    }
    write_files(directory, contents)


def build_variables(lease):
    # type: (Mapping[str, str]) -> Dict[str, str]
    return {
        "STUDENT_TENANT": lease["name"],
        "CSP_ACCOUNT_ID": lease["external_id"],
        "SANDBOX_ID": lease["sandbox_id"],
    }


def run_tool(name, arguments):
    # type: (str, Sequence[str]) -> None
    """Run a command of Instruqt if the host has it. Raw images have none. Its failure is no failure of the lab."""
    program = shutil.which(name)
    if program is None:
        return
    try:
        subprocess.check_output([program] + list(arguments), timeout=TOOL_TIMEOUT_SEC)  # noqa: S603, RUF005
    except (OSError, ValueError, subprocess.SubprocessError) as error:
        print_line("{} failed, and the script goes on: {}".format(name, error))


def format_time(seconds):
    # type: (float) -> str
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime(seconds))


def is_lease(body):
    # type: (Dict[str, Any]) -> bool
    return all(is_text(body.get(field)) for field in LEASE_FIELDS)


def is_login(body):
    # type: (Dict[str, Any]) -> bool
    if body.get("status") == "ready":
        return all(is_text(body.get(field)) for field in LOGIN_FIELDS)
    return body.get("status") in ("pending", "failed")


def is_extension(body):
    # type: (Dict[str, Any]) -> bool
    return all(isinstance(body.get(field), int) for field in EXTENSION_FIELDS)


def keep_lease(response, directory, outcome):
    # type: (Response, str, str) -> None
    """Write the files of a lease, and set the variables of Instruqt's agent."""
    earlier_id = read_earlier_sandbox_id(directory)
    lease = response.body
    write_lease(lease, directory)
    print_line(
        "{} sandbox {} (id {}, account {})".format(
            outcome, lease["name"], lease["sandbox_id"], lease["external_id"]
        )
    )
    if earlier_id not in ("", lease["sandbox_id"]):
        print_line(
            "THIS IS ANOTHER SANDBOX THAN BEFORE. The files named sandbox {}, which this student does"
            " not hold. Work done in that sandbox is not in this one.".format(earlier_id)
        )
    print_line("the files are in {}".format(directory))
    for variable, value in build_variables(lease).items():
        run_tool("agent", ["variable", "set", variable, value])


class Setup(object):
    """Settings of a run, from the environment."""

    def __init__(self):
        # type: () -> None
        self.headers = build_headers()
        self.url = read_api_url()
        self.budget = read_time_budget()
        self.wait = read_seconds("BROKER_WAIT_SEC", DEFAULT_WAIT_SEC, 0.0)
        self.access_sec = read_seconds("BROKER_ACCESS_SEC", DEFAULT_ACCESS_SEC, 0.0)
        self.directory = find_directory()
        secret = read_secret(self.directory)
        if secret:
            self.headers["X-Lease-Secret"] = secret


def allocate(setup, is_standby, has_access):
    # type: (Setup, bool, bool) -> None
    headers = setup.headers
    if has_access:
        headers["X-Sandbox-Access"] = "user"
    for header, variable in OPTIONAL_HEADERS.items():
        value = read_header_value(variable)
        if value:
            headers[header] = value
    if not is_standby:
        headers[HOLDER] = read_participant_id()
    check_directory(setup.directory)
    if is_standby:
        headers[HOLDER] = find_standby_holder(setup.directory)
        headers["X-Lease-Mode"] = "standby"
    headers["X-Lease-Secret"] = create_secret(setup.directory)
    print_line("requesting a sandbox from {}".format(setup.url))
    response = Request(setup.url + "/allocate", headers, None, is_lease).send(setup.budget, setup.wait)
    if not response.is_success:
        raise_refused(response, ADVICE)
    keep_lease(response, setup.directory, "allocated" if response.status == 201 else "this student already holds")


def claim(setup):
    # type: (Setup) -> None
    sandbox_id = require_sandbox_id(setup.directory)
    kept = read_kept_holder(setup.directory)
    participant = read_participant_id(is_required=not kept)
    setup.headers[HOLDER] = kept or participant
    if kept and participant not in ("", kept):
        setup.headers["X-New-Holder"] = participant
    check_directory(setup.directory)
    request = Request(build_sandbox_url(setup.url, sandbox_id, "claim"), setup.headers, None, is_lease)
    print_line("claiming sandbox {} at {}".format(sandbox_id, setup.url))
    response = request.send(setup.budget, 0.0)
    if not response.is_success:
        raise_refused(response, ADVICE)
    keep_lease(response, setup.directory, "claimed")


def extend(setup, hours):
    # type: (Setup, float) -> None
    sandbox_id, holders = require_sandbox_id(setup.directory), find_holders(setup.directory)
    url = build_sandbox_url(setup.url, sandbox_id, "extend")
    setup.headers["Idempotency-Key"] = str(uuid.uuid4())  # a repeated request extends once
    print_line("extending the lease of sandbox {} by {:g} h at {}".format(sandbox_id, hours, setup.url))
    request = Request(url, setup.headers, {"hours": hours}, is_extension)
    response = send_for_holders(request, holders, setup.budget, 0.0)
    if not response.is_success:
        raise_refused(response, ADVICE)
    expires_at, max_expires_at = (format_time(response.body[field]) for field in EXTENSION_FIELDS)
    print_line(
        "the lease of sandbox {} ends at {}. Extensions are possible until {}.".format(
            sandbox_id, expires_at, max_expires_at
        )
    )


def replace(setup, reason):
    # type: (Setup, str) -> None
    sandbox_id, holders = require_sandbox_id(setup.directory), find_holders(setup.directory)
    check_directory(setup.directory)
    url = build_sandbox_url(setup.url, sandbox_id, "replace")
    print_line("replacing sandbox {} at {}".format(sandbox_id, setup.url))
    request = Request(url, setup.headers, {"reason": reason}, is_lease)
    response = send_for_holders(request, holders, setup.budget, setup.wait)
    if not response.is_success:
        raise_refused(response, ADVICE)
    keep_lease(response, setup.directory, "allocated")


def fetch_login(setup):
    # type: (Setup) -> None
    """Wait for the login inside the sandbox, and write its files. Raises ScriptError if the broker cannot create
    it, or the time is over."""
    sandbox_id, holders = read_sandbox_id(setup.directory), find_holders(setup.directory)
    request = Request(build_sandbox_url(setup.url, sandbox_id, "access"), setup.headers, None, is_login)
    request.content = None
    print_line("waiting for the login inside sandbox {}; a new sandbox needs some minutes".format(sandbox_id))
    began = told = time.monotonic()
    while True:
        response = send_for_holders(request, holders, setup.budget, 0.0)
        if not response.is_success:
            raise_refused(response, ACCESS_ADVICE)
        status, waited = response.body["status"], time.monotonic() - began
        if status == "ready":
            break
        if status == "failed":
            reason = response.body.get("reason")
            raise ScriptError(
                1, "there is no login inside the sandbox yet: {} Run this again later.".format(reason)
            )
        left = setup.access_sec - waited
        if left <= 0:
            raise ScriptError(
                1,
                "the login was not ready after the {:g} s of BROKER_ACCESS_SEC. Run this again later, or ask the"
                " broker's operator.".format(setup.access_sec),
            )
        if time.monotonic() - told >= ACCESS_PROGRESS_SEC:
            told = time.monotonic()
            print_line("the login is not ready after {:.0f} s; waiting {:.0f} s more at most".format(waited, left))
        pause = min(MAX_LINE_PAUSE_SEC, read_retry_after(response) or DEFAULT_LINE_PAUSE_SEC, left)
        time.sleep(pause * random.uniform(0.9, 1.0))  # noqa: S311 (jitter)
    write_login(response.body, setup.directory)


def write_login(login, directory):
    # type: (Mapping[str, Any], str) -> None
    email, password, user_id, url = (login[field] for field in LOGIN_FIELDS)
    contents = dict(zip(LOGIN_FILES, (email, password, user_id)))  # noqa: B905 (`strict` needs Python 3.10)
    variables = {
        "CSP_USER_EMAIL": email,
        "CSP_USER_PASSWORD": password,
        "CSP_USER_ID": user_id,
        "CSP_LOGIN_URL": url,
    }
    exports = " ".join("{}={}".format(variable, shlex.quote(value)) for variable, value in variables.items())
    contents[CREDENTIALS_FILE] = "export {}\n".format(exports)
    write_files(directory, contents, 0o600)  # the password of the student
    print_line("the student signs in at {} as {}; the password is in {}".format(url, email, LOGIN_FILES[1]))


def require_sandbox_id(directory):
    # type: (str) -> str
    sandbox_id = read_sandbox_id(directory)
    if not sandbox_id:
        raise ScriptError(
            2,
            "{} is missing or empty in {}. Allocate a sandbox first, in the same directory.".format(
                SANDBOX_FILE, directory
            ),
        )
    return sandbox_id


def parse_hours(text):
    # type: (str) -> float
    hours = float(text)
    if not 0 < hours < float("inf"):
        raise ValueError
    return int(hours) if hours == int(hours) else hours


def parse_reason(text):
    # type: (str) -> str
    if not is_text(text) or len(text) > MAX_REASON:
        raise ValueError
    return text.strip()


def parse_arguments():
    # type: () -> argparse.Namespace
    parser = argparse.ArgumentParser(description="Allocate a sandbox for the student of this lab.")
    actions = parser.add_mutually_exclusive_group()
    actions.add_argument("--standby", action="store_true", help="allocate before a student exists (hot start)")
    actions.add_argument("--claim", action="store_true", help="start the time of a standby lease")
    actions.add_argument("--extend", type=parse_hours, metavar="HOURS", help="extend the lease by this time")
    actions.add_argument(
        "--replace", type=parse_reason, metavar="REASON", help="get another sandbox for a broken one"
    )
    parser.add_argument(
        "--access", action="store_true", help="also get a login inside the sandbox, and wait for it"
    )
    return parser.parse_args()


def run(arguments):
    # type: (argparse.Namespace) -> None
    setup = Setup()
    if arguments.claim:
        claim(setup)
    elif arguments.extend is not None:
        extend(setup, arguments.extend)
    elif arguments.replace is not None:
        replace(setup, arguments.replace)
    else:
        allocate(setup, arguments.standby, arguments.access)
    if arguments.access:
        fetch_login(setup)


def main():
    # type: () -> None
    arguments = parse_arguments()
    try:
        run(arguments)
    except ScriptError as error:
        print_line("ERROR: {}".format(error), sys.stderr)
        run_tool("fail-message", [to_printable(str(error))])
        sys.exit(error.exit_code)


if __name__ == "__main__":
    main()
