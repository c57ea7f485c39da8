"""Requests of both scripts (their shared lines): settings, retries, time budget, redirects, proxies.

The tests run the allocation scripts only.
"""

import contextlib
import re
import socket
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from .conftest import (
    LEASE,
    SCRIPTS,
    TOKEN,
    CannedServer,
    Reply,
    Track,
    build_html_reply,
    build_json_reply,
    build_lease_reply,
    build_refusal,
)

# Too short for a second attempt, so a retryable fault ends in "gave up" at once.
ONE_ATTEMPT = "0.2"


@pytest.mark.parametrize(
    "reply",
    [
        build_html_reply(403),
        build_json_reply(403, {"message": "Forbidden"}),
        build_html_reply(404),
        Reply(404, b"404 page not found\n"),
        build_json_reply(404, {"detail": "Not Found"}),
        build_html_reply(429),
        build_html_reply(502),
        build_refusal(503, "ALLOCATOR_UNAVAILABLE"),
        build_refusal(504, "ALLOCATION_TIMEOUT"),
        Reply(drops=True),
    ],
    ids=["WAF", "WAF JSON", "ingress", "ingress text", "other JSON", "429", "502", "503", "504", "hang-up"],
)
def test_a_transient_fault_is_retried(track: Track, broker: CannedServer, reply: Reply) -> None:
    broker.replies = [reply]
    run = track.allocate(BROKER_TIMEOUT_SEC=ONE_ATTEMPT)
    assert run.code == 1
    assert "gave up at attempt 1" in run.err
    assert "safe to run this again" in run.err


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (build_refusal(400, "MISSING_SANDBOX_ID"), "Check INSTRUQT_PARTICIPANT_ID"),
        (build_refusal(401, "UNAUTHORIZED"), "Check BROKER_API_TOKEN"),
        (build_refusal(403, "FORBIDDEN"), "Check that BROKER_API_TOKEN"),
        (build_html_reply(401), "Check BROKER_API_TOKEN"),
        (build_refusal(404, "NOT_FOUND"), "Check BROKER_API_URL"),
        (build_refusal(405, "METHOD_NOT_ALLOWED"), "Check BROKER_API_URL"),
    ],
    ids=["400", "401", "403", "401 HTML", "404", "405"],
)
def test_a_refusal_ends_the_script_at_once_with_advice(
    track: Track, broker: CannedServer, reply: Reply, advice: str
) -> None:
    broker.replies = [reply]
    run = track.allocate()
    assert run.code == 1
    assert advice in run.err
    assert len(broker.calls) == 1


def test_pauses_grow_and_are_logged_until_a_retry_succeeds(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_html_reply(403), build_html_reply(503), build_lease_reply()]
    run = track.allocate()
    assert run.code == 0
    assert re.search(r"attempt 1: HTTP 403 without the broker's JSON .* Trying again in 0\.\d s", run.out)
    assert re.search(r"attempt 2: HTTP 503 .* Trying again in [01]\.\d s", run.out)
    first, second, third = (call.at for call in broker.calls)
    assert second - first >= 0.25
    assert third - second >= 0.5


def test_an_ingress_that_restarts_is_retried_until_the_broker_answers(track: Track, broker: CannedServer) -> None:
    not_found = Reply(404, b"404 page not found\n")
    broker.replies = [not_found, not_found, build_lease_reply()]
    assert track.allocate().code == 0
    assert len(broker.calls) == 3


def test_retry_after_extends_the_pause(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_html_reply(429, retry_after="1"), build_lease_reply()]
    assert track.allocate().code == 0
    assert broker.calls[1].at - broker.calls[0].at >= 1 + 0.25


@pytest.mark.parametrize(
    "reply",
    [
        lambda: build_html_reply(429, retry_after="300"),
        lambda: build_html_reply(429, retry_after=formatdate(time.time() + 360, usegmt=True)),
        lambda: build_refusal(429, "RATE_LIMITED", retry_after=300.0),
        lambda: build_json_reply(429, {"detail": {"code": "RATE_LIMITED"}, "retry_after": 300}),
    ],
    ids=["seconds", "date", "detail", "body"],
)
def test_a_retry_after_beyond_the_budget_ends_the_script_at_once(
    track: Track, broker: CannedServer, reply: Callable[[], Reply]
) -> None:
    broker.replies = [reply()]
    run = track.allocate()
    assert run.code == 1
    assert re.search(r"The next attempt would be in 3\d\d\.\d s", run.err)
    assert len(broker.calls) == 1


@pytest.mark.parametrize("invalid", ["soon", "-5", "nan", "1 s", "Mon, 99 Foo 2025", "\xb2"])
def test_an_invalid_retry_after_header_is_ignored(track: Track, broker: CannedServer, invalid: str) -> None:
    broker.replies = [build_html_reply(429, retry_after=invalid)]
    run = track.allocate(BROKER_TIMEOUT_SEC=ONE_ATTEMPT)
    assert run.code == 1
    assert "would be in 0." in run.err


@pytest.mark.parametrize("invalid", [b"NaN", b'"soon"', b"[1]", b"-1"])
def test_an_invalid_retry_after_in_the_body_is_ignored(track: Track, broker: CannedServer, invalid: bytes) -> None:
    broker.replies = [Reply(429, b'{"detail": {"code": "RATE_LIMITED", "retry_after": ' + invalid + b"}}")]
    run = track.allocate(BROKER_TIMEOUT_SEC=ONE_ATTEMPT)
    assert run.code == 1
    assert "would be in 0." in run.err


@pytest.mark.parametrize(
    "reply",
    [build_html_reply(503), Reply(hangs=True), Reply(201, b" " * 1000, trickles=True)],
    ids=["errors", "hangs", "trickles"],
)
def test_the_script_gives_up_when_its_budget_is_used_up(track: Track, broker: CannedServer, reply: Reply) -> None:
    broker.replies = [reply]
    run = track.allocate(BROKER_TIMEOUT_SEC="0.6")
    assert run.code == 1
    assert "gave up" in run.err
    assert track.files() == {}


@pytest.mark.parametrize("host", ["closed port", "unknown name"])
def test_an_unreachable_broker_is_named(track: Track, closed_origin: str, host: str) -> None:
    url = closed_origin if host == "closed port" else "http://broker.invalid"
    run = track.allocate(BROKER_API_URL=url, BROKER_TIMEOUT_SEC="0.5")
    assert run.code == 1
    assert "no response (" in run.err
    assert f"reaches {url}/v1" in run.err


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_is_not_followed(
    track: Track, broker: CannedServer, start_server: Callable[[], CannedServer], status: int
) -> None:
    other_server = start_server()
    broker.replies = [Reply(status, headers={"Location": f"{other_server.origin}/v1/allocate"})]
    run = track.allocate()
    assert run.code == 1
    assert f"a redirect to {other_server.origin}/v1/allocate that is not followed. Check BROKER_API_URL" in run.err
    assert other_server.calls == []


def test_an_echoed_token_is_masked_in_the_log(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_refusal(400, "BAD", f"bad header Bearer {TOKEN}\n\x1b[31mred")]
    run = track.allocate()
    assert "bad header Bearer ***?[31mred" in run.err


@pytest.mark.parametrize("variable", ["BROKER_API_TOKEN", "INSTRUQT_PARTICIPANT_ID"])
@pytest.mark.parametrize("value", [None, " \n"], ids=["missing", "blank"])
def test_a_missing_required_variable_is_named(
    track: Track, broker: CannedServer, variable: str, value: str | None
) -> None:
    run = track.allocate(launcher=(), **{variable: value})
    assert run.code == 2
    assert f"{variable} environment variable not set" in run.err
    assert broker.calls == []


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("BROKER_API_TOKEN", "tok\ren"),
        ("INSTRUQT_PARTICIPANT_ID", "student\nX-Evil: 1"),
        ("INSTRUQT_TRACK_SLUG", "tränk"),
        ("SANDBOX_NAME_PREFIX", "a\x7fb"),
        ("BROKER_TIMEOUT_SEC", "0"),
        ("BROKER_TIMEOUT_SEC", "nan"),
        ("BROKER_TIMEOUT_SEC", "2 minutes"),
        ("BROKER_API_URL", "broker.example.com"),
        ("BROKER_API_URL", "ftp://broker.example.com"),
        ("BROKER_API_URL", "https://broker:port/v1"),
        ("BROKER_API_URL", "https://user:password@broker/v1"),
        ("BROKER_API_URL", "https://broker/v1?x=1"),
        ("BROKER_API_URL", "https://broker /v1"),
    ],
    ids=repr,
)
def test_an_invalid_variable_is_named(track: Track, broker: CannedServer, variable: str, value: str) -> None:
    run = track.allocate(launcher=(), **{variable: value})
    assert run.code == 2
    assert variable in run.err
    assert broker.calls == []


@pytest.mark.parametrize(
    ("suffix", "path"),
    [
        ("", "/v1/allocate"),
        ("/v1/", "/v1/allocate"),
        ("/broker", "/broker/v1/allocate"),
    ],
)
def test_the_base_url_may_omit_v1(track: Track, broker: CannedServer, suffix: str, path: str) -> None:
    assert track.allocate(BROKER_API_URL=f" {broker.origin}{suffix}\n").code == 0
    assert [call.path for call in broker.calls] == [path]


def test_whitespace_around_a_value_is_stripped(track: Track, broker: CannedServer) -> None:
    assert track.allocate(BROKER_API_TOKEN=f" {TOKEN}\n", BROKER_TIMEOUT_SEC=" ").code == 0
    assert broker.calls[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_local_broker_bypasses_the_proxy(track: Track, broker: CannedServer, closed_origin: str) -> None:
    assert track.allocate(http_proxy=closed_origin, https_proxy=closed_origin).code == 0
    assert len(broker.calls) == 1


def test_a_remote_broker_is_reached_through_the_proxy(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_html_reply(503), build_lease_reply()]
    run = track.allocate(http_proxy=broker.origin, BROKER_API_URL="http://broker.invalid")
    assert run.code == 0
    assert [call.path for call in broker.calls] == ["http://broker.invalid/v1/allocate"] * 2


def test_https_goes_through_a_proxy_tunnel_at_each_attempt(track: Track, broker: CannedServer) -> None:
    broker.replies = [build_html_reply(502)]
    run = track.allocate(https_proxy=broker.origin, BROKER_API_URL=None, BROKER_TIMEOUT_SEC="2.5")
    assert run.code == 1
    assert len(broker.calls) >= 2
    assert {(call.method, call.path) for call in broker.calls} == {
        ("CONNECT", "api-sandbox-broker.highvelocitynetworking.com:443")
    }
    assert all("Authorization" not in call.headers for call in broker.calls)


@pytest.mark.parametrize("first", ["silent", "closed"])
@pytest.mark.parametrize("script", ["instruqt_broker_allocation.py", "instruqt_broker_cleanup.py"])
def test_one_attempt_reaches_the_second_address_of_a_name(
    python_track: Track, broker: CannedServer, script: str, first: str
) -> None:
    """The first address drops packets, as with broken IPv6, or refuses."""
    port = broker.server_address[1]
    (python_track.directory / "sandbox_id.txt").write_text("2012224")
    broker.replies = [build_json_reply(201, {**LEASE, "status": "pending_deletion"})]
    patch = (
        "import socket; resolve = socket.getaddrinfo; socket.getaddrinfo = lambda host, *rest: "
        "[info for address in ('127.0.0.2', '127.0.0.1') for info in resolve(address, *rest)]"
    )
    python_track.environment["BROKER_API_URL"] = f"http://two-addresses.test:{port}/v1"
    python_track.environment["NO_PROXY"] = "*"
    with contextlib.ExitStack() as sockets:
        if first == "silent":
            listener = sockets.enter_context(socket.socket())
            listener.bind(("127.0.0.2", port))
            listener.listen(0)
            for _ in range(3):  # fills the queue of the listener, so that the kernel drops further packets
                client = sockets.enter_context(socket.socket())
                client.setblocking(False)
                client.connect_ex(("127.0.0.2", port))
        run = python_track.run_patched(patch, SCRIPTS / script)
    assert run.code == 0, run.err
    assert "attempt 1" not in run.out + run.err
    assert len(broker.calls) == 1
