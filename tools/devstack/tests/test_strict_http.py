"""Reference reader of request framing: it detects each kind of unsafe server."""

import pytest

from devstack.strict_http import Ending, Request, Response, Verdict, find_violation, read_requests

HOST = b"Host: x\r\n"
GET = b"GET /a HTTP/1.1\r\n" + HOST + b"\r\n"
UPGRADE = (
    b"POST /b HTTP/1.1\r\n" + HOST + b"Connection: Upgrade\r\nUpgrade: x\r\nContent-Length: 40\r\n\r\n" + b"x" * 40
)
BROKEN = b"POST /early HTTP/1.1\r\n" + HOST + b"Transfer-Encoding: chunked\r\n\r\nx"
A = Request(b"GET", b"/a", ((b"host", b"x"),), b"")
B = Request(b"POST", b"/b", ((b"content-length", b"40"), (b"host", b"x")), b"x" * 40)
EARLY = Request(b"POST", b"/early", ((b"host", b"x"), (b"transfer-encoding", b"chunked")), None)


@pytest.mark.parametrize(
    ("stream", "verdicts", "ending"),
    [
        (GET + UPGRADE + b"\r\n" + GET, [Verdict.SERVE] * 3, Ending.OPEN),
        (GET + GET[:-2], [Verdict.SERVE], Ending.INCOMPLETE),
        (UPGRADE[:-1], [Verdict.SERVE], Ending.INCOMPLETE),
        (GET + b"nonsense\r\n\r\n", [Verdict.SERVE], Ending.ILLEGAL),
        (BROKEN + b"\r\n", [Verdict.MAY_REFUSE], Ending.ILLEGAL),
        (b"GET /a HTTP/1.0\r\n\r\n" + GET, [Verdict.SERVE], Ending.CLOSED),
        (b"GET  /a HTTP/1.1\r\n" + HOST + b"\r\n", [Verdict.MAY_REFUSE], Ending.OPEN),
        (b"GET /a HTTP/1.1\nHost: x\n\n", [Verdict.MAY_REFUSE], Ending.OPEN),
        (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n" + GET, [Verdict.REFUSE], Ending.CLOSED),
        (b"GET /a HTTP/1.1\r\n" + HOST + b"Content-Length: 0\r\n" * 2 + b"\r\n", [Verdict.REFUSE], Ending.CLOSED),
    ],
)
def test_the_requests_of_a_stream_are_read(stream: bytes, verdicts: list[Verdict], ending: Ending) -> None:
    reading = read_requests(stream)
    assert [read.verdict for read in reading.requests] == verdicts
    assert reading.ending is ending


@pytest.mark.parametrize(
    ("stream", "executed", "responses", "closed", "violation"),
    [
        (UPGRADE + GET, [B, A], [Response(200, 0), Response(200, 1)], False, None),
        (UPGRADE + GET, [B], [Response(200, 0)], False, "1 responses to 2 requests"),
        (UPGRADE + GET, [B, A], [Response(200, 1), Response(200, 0)], False, "belongs to request 1"),
        (UPGRADE + GET, [A], [Response(200, 0)], False, "request 0 was executed as"),
        (UPGRADE + GET, [B, A, A], [Response(200, 0), Response(200, 1)], False, "does not contain it"),
        (UPGRADE + GET, [B], [Response(200, 0), Response(400, None)], True, "refuses a request that is valid"),
        (UPGRADE + GET, [B, A], [Response(200, 0), Response(200, 1)], True, "closed after a valid stream"),
        (GET + b"nonsense\r\n\r\n", [A], [Response(200, 0), Response(400, None)], True, None),
        (GET + b"nonsense\r\n\r\n", [A], [Response(200, 0), Response(400, None)], False, "refuses"),
        (BROKEN + b"\r\n", [EARLY], [Response(200, 0)], True, None),
        (BROKEN + b"\r\n", [EARLY], [Response(200, 0), Response(400, None)], True, "refuses"),
        (b"CONNECT x:1 HTTP/1.1\r\n" + HOST + b"\r\n", [], [Response(400, None)], True, None),
    ],
)
def test_violations_of_a_server_are_found(
    stream: bytes, executed: list[Request], responses: list[Response], closed: bool, violation: str | None
) -> None:
    result = find_violation(read_requests(stream), responses, executed, continues=0, closed=closed)
    assert (result is None) == (violation is None), result
    assert violation is None or violation in str(result)


def test_an_interim_response_needs_an_expectation() -> None:
    assert find_violation(read_requests(GET), [Response(200, 0)], [A], continues=1, closed=False) is not None
