"""How both scripts ask (the lines they share): settings, retries, the time budget, redirects, proxies."""

import re
import time
from collections.abc import Callable
from email.utils import formatdate

import pytest

from .conftest import TOKEN, CannedServer, Reply, Track, json_reply, lease, page, refusal

# Too short for a second attempt: a fault that would be retried ends in "gave up" at once.
ONE_ATTEMPT = "0.2"


@pytest.mark.parametrize(
    "reply",
    [
        page(403),
        json_reply(403, {"message": "Forbidden"}),
        page(429),
        page(502),
        refusal(503, "ALLOCATOR_UNAVAILABLE"),
        refusal(504, "ALLOCATION_TIMEOUT"),
        Reply(drops=True),
    ],
    ids=["WAF", "WAF JSON", "429", "502", "503", "504", "hang-up"],
)
def test_what_may_pass_is_asked_again(track: Track, broker: CannedServer, reply: Reply) -> None:
    broker.replies = [reply]
    run = track.allocate(BROKER_TIMEOUT_SEC=ONE_ATTEMPT)
    assert run.code == 1
    assert "gave up at attempt 1" in run.err
    assert "safe to run this again" in run.err


@pytest.mark.parametrize(
    ("reply", "advice"),
    [
        (refusal(400, "MISSING_SANDBOX_ID"), "Check INSTRUQT_PARTICIPANT_ID"),
        (refusal(401, "UNAUTHORIZED"), "Check BROKER_API_TOKEN"),
        (refusal(403, "FORBIDDEN"), "Check that BROKER_API_TOKEN"),
        (page(401), "Check BROKER_API_TOKEN"),
        (page(404), "Check BROKER_API_URL"),
        (refusal(405, "METHOD_NOT_ALLOWED"), "Check BROKER_API_URL"),
    ],
    ids=["400", "401", "403", "401 HTML", "404", "405"],
)
def test_a_refusal_ends_at_once_and_says_what_to_do(
    track: Track, broker: CannedServer, reply: Reply, advice: str
) -> None:
    broker.replies = [reply]
    run = track.allocate()
    assert run.code == 1
    assert advice in run.err
    assert len(broker.calls) == 1


def test_pauses_grow_until_a_retry_succeeds_and_the_log_announces_each(track: Track, broker: CannedServer) -> None:
    broker.replies = [page(403), page(503), lease()]
    run = track.allocate()
    assert run.code == 0
    assert re.search(r"attempt 1: HTTP 403 without the broker's JSON .* Trying again in 0\.\d s", run.out)
    assert re.search(r"attempt 2: HTTP 503 .* Trying again in [01]\.\d s", run.out)
    first, second, third = (call.at for call in broker.calls)
    assert second - first >= 0.25
    assert third - second >= 0.5


def test_the_server_says_how_long_to_wait(track: Track, broker: CannedServer) -> None:
    broker.replies = [page(429, retry_after="1"), lease()]
    assert track.allocate().code == 0
    assert broker.calls[1].at - broker.calls[0].at >= 1 + 0.25


@pytest.mark.parametrize(
    "reply",
    [
        lambda: page(429, retry_after="300"),
        lambda: page(429, retry_after=formatdate(time.time() + 360, usegmt=True)),
        lambda: refusal(429, "RATE_LIMITED", retry_after=300.0),
        lambda: json_reply(429, {"detail": {"code": "RATE_LIMITED"}, "retry_after": 300}),
    ],
    ids=["seconds", "date", "detail", "body"],
)
def test_a_wait_beyond_the_budget_gives_up_at_once(
    track: Track, broker: CannedServer, reply: Callable[[], Reply]
) -> None:
    broker.replies = [reply()]
    run = track.allocate()
    assert run.code == 1
    assert re.search(r"The next would be in 3\d\d\.\d s", run.err)
    assert len(broker.calls) == 1


@pytest.mark.parametrize("nonsense", ["soon", "-5", "nan", "1 s", "Mon, 99 Foo 2025", "\xb2"])
def test_a_retry_after_that_means_nothing_is_ignored(track: Track, broker: CannedServer, nonsense: str) -> None:
    broker.replies = [page(429, retry_after=nonsense)]
    run = track.allocate(BROKER_TIMEOUT_SEC=ONE_ATTEMPT)
    assert run.code == 1
    assert "would be in 0." in run.err


@pytest.mark.parametrize("nonsense", [b"NaN", b'"soon"', b"[1]", b"-1"])
def test_a_retry_after_in_the_body_that_means_nothing_is_ignored(
    track: Track, broker: CannedServer, nonsense: bytes
) -> None:
    broker.replies = [Reply(429, b'{"detail": {"code": "RATE_LIMITED", "retry_after": ' + nonsense + b"}}")]
    run = track.allocate(BROKER_TIMEOUT_SEC=ONE_ATTEMPT)
    assert run.code == 1
    assert "would be in 0." in run.err


@pytest.mark.parametrize(
    "reply",
    [page(503), Reply(hangs=True), Reply(201, b" " * 1000, trickles=True)],
    ids=["errors", "hangs", "trickles"],
)
def test_it_gives_up_when_its_budget_is_used_up(track: Track, broker: CannedServer, reply: Reply) -> None:
    broker.replies = [reply]
    run = track.allocate(BROKER_TIMEOUT_SEC="0.6")
    assert run.code == 1
    assert "gave up" in run.err
    assert track.files() == {}


@pytest.mark.parametrize("host", ["closed port", "unknown name"])
def test_a_broker_that_cannot_be_reached_is_named(track: Track, closed_origin: str, host: str) -> None:
    url = closed_origin if host == "closed port" else "http://broker.invalid"
    run = track.allocate(BROKER_API_URL=url, BROKER_TIMEOUT_SEC="0.5")
    assert run.code == 1
    assert "no answer (" in run.err
    assert f"reaches {url}/v1" in run.err


@pytest.mark.parametrize("status", [302, 307])
def test_a_redirect_does_not_take_the_token_along(
    track: Track, broker: CannedServer, start_server: Callable[[], CannedServer], status: int
) -> None:
    elsewhere = start_server()
    broker.replies = [Reply(status, headers={"Location": f"{elsewhere.origin}/v1/allocate"})]
    run = track.allocate()
    assert run.code == 1
    assert f"a redirect to {elsewhere.origin}/v1/allocate that is not followed. Check BROKER_API_URL" in run.err
    assert elsewhere.calls == []


def test_a_server_that_echoes_the_token_does_not_get_it_into_the_log(track: Track, broker: CannedServer) -> None:
    broker.replies = [refusal(400, "BAD", f"bad header Bearer {TOKEN}\n\x1b[31mred")]
    run = track.allocate()
    assert "bad header Bearer ***?[31mred" in run.err


@pytest.mark.parametrize("variable", ["BROKER_API_TOKEN", "INSTRUQT_PARTICIPANT_ID"])
@pytest.mark.parametrize("value", [None, " \n"], ids=["missing", "blank"])
def test_a_required_variable_is_named(track: Track, broker: CannedServer, variable: str, value: str | None) -> None:
    run = track.allocate(**{variable: value})
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
def test_a_wrong_variable_is_named(track: Track, broker: CannedServer, variable: str, value: str) -> None:
    run = track.allocate(**{variable: value})
    assert run.code == 2
    assert variable in run.err
    assert broker.calls == []


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("", "/v1/allocate"),
        ("/v1/", "/v1/allocate"),
        ("/broker", "/broker/v1/allocate"),
    ],
)
def test_the_address_may_be_written_with_or_without_v1(
    track: Track, broker: CannedServer, written: str, path: str
) -> None:
    assert track.allocate(BROKER_API_URL=f" {broker.origin}{written}\n").code == 0
    assert [call.path for call in broker.calls] == [path]


def test_blanks_around_a_value_do_not_matter(track: Track, broker: CannedServer) -> None:
    assert track.allocate(BROKER_API_TOKEN=f" {TOKEN}\n", BROKER_TIMEOUT_SEC=" ").code == 0
    assert broker.calls[0].headers["Authorization"] == f"Bearer {TOKEN}"


def test_a_broker_on_this_machine_is_not_asked_through_the_proxy(
    track: Track, broker: CannedServer, closed_origin: str
) -> None:
    assert track.allocate(http_proxy=closed_origin, https_proxy=closed_origin).code == 0
    assert len(broker.calls) == 1


def test_another_broker_is_asked_through_the_proxy(track: Track, broker: CannedServer) -> None:
    broker.replies = [page(503), lease()]
    run = track.allocate(http_proxy=broker.origin, BROKER_API_URL="http://broker.invalid")
    assert run.code == 0
    assert [call.path for call in broker.calls] == ["http://broker.invalid/v1/allocate"] * 2


def test_a_proxy_sees_only_a_tunnel_to_a_broker_on_https_at_each_attempt(
    track: Track, broker: CannedServer
) -> None:
    broker.replies = [page(502)]
    run = track.allocate(https_proxy=broker.origin, BROKER_API_URL=None, BROKER_TIMEOUT_SEC="2.5")
    assert run.code == 1
    assert len(broker.calls) >= 2
    assert {(call.method, call.path) for call in broker.calls} == {
        ("CONNECT", "api-sandbox-broker.highvelocitynetworking.com:443")
    }
    assert all("Authorization" not in call.headers for call in broker.calls)
