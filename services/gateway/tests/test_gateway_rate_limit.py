"""Rate limit per student, and per address without a known token."""

import time
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from devstack.conditions import wait_until
from gateway.web import client_address
from gateway.web.rate_limit import Rate, RateLimit

from .gateway_harness import (
    ADMIN,
    OTHER_TRACK_TOKEN,
    STUDENT,
    TRACK,
    TRACK_TOKEN,
    create_app_without_servers,
    detail,
    raw,
    sample,
)

PROXY = "10.1.2.3"


def client(app: FastAPI, address: str = "192.0.2.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, client=(address, 4711))
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


async def statuses(
    app: FastAPI, *headers: dict[str, str], path: str = "/v1/sandboxes/%00", address: str = "192.0.2.1"
) -> list[int]:
    async with client(app, address) as http:
        return [(await http.get(path, headers=sent)).status_code for sent in headers]


def student(name: str, token: dict[str, str] = TRACK) -> dict[str, str]:
    return {**token, "X-Instruqt-Sandbox-ID": name}


async def test_a_student_beyond_the_limit_gets_429_with_retry_after() -> None:
    app = create_app_without_servers(rate_limit="3/5 minutes")
    begun = int(time.time())
    async with client(app) as http:
        for left in (2, 1, 0):
            served = await http.post("/v1/allocate", headers=STUDENT)
            assert served.status_code == 503  # no allocator is running
            assert served.headers["X-RateLimit-Limit"] == "3"
            assert served.headers["X-RateLimit-Remaining"] == str(left)
            assert begun + 300 <= int(served.headers["X-RateLimit-Reset"]) <= time.time() + 301
        for path in ("/v1/allocate", "/v1/admin/sync", "/nope"):
            refused = await http.post(path, headers=STUDENT)
            assert (refused.status_code, detail(refused)["code"]) == (429, "RATE_LIMITED")
            assert "with this token for one student" in detail(refused)["message"]
            assert 0 < detail(refused)["retry_after"] <= int(refused.headers["X-RateLimit-Reset"]) - begun
            assert refused.headers["X-RateLimit-Remaining"] == "0"
            assert refused.headers["X-Content-Type-Options"] == "nosniff"


@pytest.mark.parametrize(
    ("path", "sent", "answers"),
    [
        ("/v1/sandboxes/1", {}, {401, 429}),
        ("/v1/sandboxes/1", {"Authorization": "Bearer wrong"}, {401, 429}),
        ("/v1/sandboxes/1", {"X-Instruqt-Sandbox-ID": "student-1"}, {401, 429}),
        ("/v1/admin/stats", {}, {401, 429}),
        ("/v1/docs", {}, {200, 429}),
        ("/v1/docs/start.js", {}, {200, 429}),
        ("/v1/openapi.json", {}, {200, 429}),
        ("/nope", {}, {404, 429}),
        ("/v1/allocate", {}, {405, 429}),
    ],
)
async def test_requests_without_a_known_token_do_not_affect_known_tokens(
    path: str, sent: dict[str, str], answers: set[int]
) -> None:
    app = create_app_without_servers(rate_limit="50/hour")
    assert set(await statuses(app, *[sent] * 80, path=path)) == answers
    async with client(app) as http:
        for token in (TRACK, ADMIN):
            allocation = await http.post("/v1/allocate", headers=student("student-1", token))
            assert (allocation.status_code, allocation.headers["X-RateLimit-Remaining"]) == (503, "49")
        assert (await http.get("/v1/admin/jobs/x", headers=ADMIN)).status_code == 404
        for public in ("/v1/docs", "/v1/openapi.json"):
            assert (await http.get(public, headers=TRACK)).status_code == 200
        refused = await http.get(path, headers=sent)
        assert (refused.status_code, detail(refused)["code"]) == (429, "RATE_LIMITED")
        assert "without a known token from this address" in detail(refused)["message"]


async def test_public_routes_have_the_full_limit_per_address() -> None:
    app = create_app_without_servers(rate_limit="50/hour")
    assert await statuses(app, *[{}] * 51, path="/v1/docs/start.js") == [200] * 50 + [429]


async def test_each_student_behind_one_address_has_a_separate_limit() -> None:
    app = create_app_without_servers(rate_limit="2/hour")
    for name in ("ada", "ben", "chi"):
        assert await statuses(app, *[student(name)] * 3) == [404, 404, 429]
    assert await statuses(app, student("ada"), address="192.0.2.2") == [429]  # also from another address


@pytest.mark.parametrize(
    ("one", "other", "shared"),
    [
        (student("ada"), {**TRACK, "X-Track-ID": "ada"}, True),
        (student("ada"), {**TRACK, "X-Instruqt-Sandbox-ID": "  ada  "}, True),
        (student("ada"), {**student("ada"), "X-Track-ID": "ben"}, True),
        ({**TRACK, "X-Track-ID": "ada"}, {**TRACK, "X-Track-ID": "ben"}, False),
        (student("ada"), student("Ada"), False),
        (student("ada"), TRACK, False),
        (student("ada"), student("ada", ADMIN), False),
        (student("ada"), student("ada", {"Authorization": f"Bearer {OTHER_TRACK_TOKEN}"}), False),
        (TRACK, {"Authorization": TRACK["Authorization"].replace("Bearer", "bearer ")}, True),
        (student("x" * 128), student("x" * 128 + "y"), True),
    ],
)
async def test_known_tokens_are_counted_by_token_and_student(
    one: dict[str, str], other: dict[str, str], shared: bool
) -> None:
    app = create_app_without_servers(rate_limit="1/hour")
    assert await statuses(app, one, path="/nope") == [404]
    assert await statuses(app, other, path="/nope") == [429 if shared else 404]


async def test_every_response_to_a_known_token_counts() -> None:
    app = create_app_without_servers(rate_limit="5/hour", cors_allowed_origins="*")
    async with client(app) as http:
        preflight: dict[str, str | bytes] = {
            "Origin": "https://labs.example.com",
            "Access-Control-Request-Method": "POST",
            **STUDENT,
        }
        cases: tuple[tuple[str, str, dict[str, str | bytes], int, str | None], ...] = (
            ("HEAD", "/v1/sandboxes/%00", {**STUDENT}, 404, "4"),
            ("GET", "/v1/admin/stats", {**STUDENT}, 403, "3"),
            ("OPTIONS", "/v1/allocate", preflight, 200, None),
            ("OPTIONS", "/v1/allocate", {**STUDENT}, 405, "2"),
            ("POST", "/v1/allocate", {**STUDENT, "X-Instruqt-Track-ID": "ü".encode()}, 400, "1"),
            ("GET", "/v1/docs", {**STUDENT}, 200, "0"),
            ("HEAD", "/v1/sandboxes/%00", {**STUDENT}, 429, "0"),
        )
        for method, path, sent, status, left in cases:
            answer = await http.request(method, path, headers=raw(sent))
            assert (answer.status_code, answer.headers.get("X-RateLimit-Remaining")) == (status, left)


async def test_each_address_without_a_token_has_a_separate_limit() -> None:
    app = create_app_without_servers(rate_limit="1/hour")
    for address in ("192.0.2.1", "192.0.2.2", "2001:db8:0:1::1", "2001:db8:0:2::1"):
        assert await statuses(app, {}, {}, path="/nope", address=address) == [404, 429]
    # The owner of an IPv6 network chooses the second half of its addresses.
    assert await statuses(app, {}, path="/nope", address="2001:db8:0:1::2") == [429]


async def test_many_addresses_do_not_displace_the_counters_of_known_tokens() -> None:
    app = create_app_without_servers(rate_limit="3/hour")
    limit = app.state.context.rate_limits
    limit.addresses._max_counters = limit.failures._max_counters = limit.students._max_counters = 4
    assert await statuses(app, *[STUDENT] * 3) == [404] * 3
    for number in range(20):
        invented = {"X-Instruqt-Sandbox-ID": f"invented-{number}", "Authorization": f"Bearer invented-{number}"}
        assert await statuses(app, invented, address=f"198.51.100.{number}") == [401]
    assert await statuses(app, STUDENT) == [429]
    assert [len(counted._windows) for counted in (limit.students, limit.addresses, limit.failures)] == [1, 4, 4]


async def test_counters_of_many_students_take_bounded_memory_without_tokens() -> None:
    app = create_app_without_servers(rate_limit="3/hour")
    students = app.state.context.rate_limits.students
    students._max_counters = 4
    for number in range(20):
        assert await statuses(app, student(f"{number}" * 5000)) == [400]
    assert len(students._windows) == 4
    assert max(len(key) for key in students._windows) == 32 + 128
    assert not any(TRACK_TOKEN.encode() in key for key in students._windows)


def test_the_oldest_counter_is_reset_beyond_the_maximum() -> None:
    counted = RateLimit(Rate(1, 3600), max_counters=3)
    for key in ("a", "b", "c"):
        assert not counted.hit(key).is_exceeded
    assert counted.hit("a").is_exceeded
    assert not counted.hit("d").is_exceeded  # replaces "a", because its window ends first
    assert [counted.hit(key).is_exceeded for key in ("b", "c", "d")] == [True, True, True]
    assert not counted.hit("a").is_exceeded
    assert len(counted._windows) == 3


def test_ended_windows_are_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1_000.0
    monkeypatch.setattr(time, "time", lambda: now)
    counted = RateLimit(Rate(1, 60), max_counters=1000)
    for number in range(10):
        counted.hit(f"old-{number}")
    now += 60
    assert not counted.hit("old-0").is_exceeded
    for number in range(5):
        assert counted.hit(f"new-{number}").reset == now + 60
    assert set(counted._windows) == {"old-0", *(f"new-{number}" for number in range(5))}


def _past(unix_seconds: int) -> bool:
    return time.time() >= unix_seconds


async def test_a_new_window_accepts_requests_again() -> None:
    app = create_app_without_servers(rate_limit="2/second")
    assert (await statuses(app, *[STUDENT] * 10))[-1] == 429
    served: list[int] = []
    async with client(app) as http:
        while 404 not in served:
            refused = await http.get("/v1/sandboxes/%00", headers=STUDENT)
            await wait_until(partial(_past, int(refused.headers["X-RateLimit-Reset"])))
            served += await statuses(app, STUDENT)


async def test_the_limit_can_be_disabled() -> None:
    app = create_app_without_servers(rate_limit="")
    async with client(app) as http:
        for _ in range(50):
            response = await http.get("/v1/sandboxes/%00", headers=STUDENT)
            assert response.status_code == 404
            assert not [name for name in response.headers if name.startswith("x-ratelimit")]
        assert (await http.post("/v1/allocate", headers=STUDENT)).status_code == 503
    assert await statuses(app, *[{}] * 50) == [401] * 50


async def test_operations_routes_have_no_limit() -> None:
    app = create_app_without_servers(rate_limit="1/hour")
    async with client(app) as http:
        for path, status in (("/healthz", 200), ("/metrics", 200), ("/readyz", 503)) * 3:
            assert (await http.get(path)).status_code == status
    assert await statuses(app, STUDENT) == [404]


async def test_clients_behind_a_trusted_proxy_are_counted_separately() -> None:
    app = create_app_without_servers(rate_limit="1/hour", trusted_proxies="10.0.0.0/8, 192.0.2.9")
    for address in ("198.51.100.1", "198.51.100.2"):
        forwarded = {"X-Forwarded-For": address}
        assert await statuses(app, forwarded, forwarded, path="/nope", address=PROXY) == [404, 429]
        assert await statuses(app, forwarded, path="/nope", address="192.0.2.9") == [429]
    assert await statuses(app, {}, {}, path="/nope", address=PROXY) == [404, 429]


async def test_x_forwarded_for_of_untrusted_clients_is_ignored() -> None:
    app = create_app_without_servers(rate_limit="1/hour", trusted_proxies="10.0.0.0/8")
    forged = [{"X-Forwarded-For": f"198.51.100.{number}"} for number in range(3)]
    assert await statuses(app, *forged, path="/nope", address="203.0.113.1") == [404, 429, 429]
    through = [{"X-Forwarded-For": f"198.51.100.{number}, 203.0.113.2"} for number in range(3)]
    assert await statuses(app, *through, path="/nope", address=PROXY) == [404, 429, 429]


@pytest.mark.parametrize(
    ("peer", "forwarded", "expected"),
    [
        ("203.0.113.1", ["198.51.100.1"], "203.0.113.1"),
        (PROXY, [], PROXY),
        (PROXY, ["198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
        (PROXY, ["198.51.100.1, 10.9.9.9"], "198.51.100.1"),
        (PROXY, ["10.9.9.9, 10.9.9.8"], "10.9.9.9"),
        (PROXY, ["198.51.100.1:4711"], "198.51.100.1"),
        (PROXY, ["[2001:db8::1]:4711"], "2001:db8::1"),
        (PROXY, ["2001:db8::1"], "2001:db8::1"),
        (PROXY, ["fe80::1%eth0 level=error"], "fe80::1"),
        (PROXY, ["::ffff:198.51.100.1"], "198.51.100.1"),
        (PROXY, ["198.51.100.1, nonsense"], PROXY),
        (PROXY, [""], PROXY),
        ("::ffff:10.1.2.3", ["198.51.100.1"], "198.51.100.1"),
        ("fd00::1", ["198.51.100.1"], "198.51.100.1"),
    ],
)
def test_the_client_is_the_last_address_that_is_not_a_trusted_proxy(
    peer: str, forwarded: list[str], expected: str
) -> None:
    find_client = client_address.build_client_address(client_address.parse_networks("10.0.0.0/8,fd00::/8"))
    scope: dict[str, Any] = {
        "client": (peer, 1),
        "headers": [(b"x-forwarded-for", value.encode()) for value in forwarded],
    }
    found = find_client(scope)
    assert found.full == expected
    network = {"2001:db8::1": "2001:db8::/64", "fe80::1": "fe80::/64"}
    assert found.counted == network.get(expected, expected)


async def test_authentication_failures_are_counted_by_reason() -> None:
    app = create_app_without_servers()

    def counts() -> list[float]:
        return [sample("broker_auth_failures_total", reason=r) for r in ("missing", "unknown", "forbidden")]

    before = counts()
    async with client(app) as http:
        await http.post("/v1/allocate")
        await http.get("/v1/admin/stats", headers={"Authorization": "Basic eHh4"})
        for _ in range(3):
            await http.post("/v1/allocate", headers={"Authorization": "Bearer wrong"})
        await http.get("/v1/admin/stats", headers=TRACK)
        await http.get("/v1/admin/jobs/x", headers=ADMIN)
    assert [after - earlier for after, earlier in zip(counts(), before, strict=True)] == [2, 3, 1]


async def test_guessing_tokens_is_limited_per_address() -> None:
    app = create_app_without_servers(rate_limit="400/hour")  # a twentieth of them for failures
    guesses = [{"Authorization": f"Bearer guess-{number}"} for number in range(15)]
    assert await statuses(app, *guesses, *[{}] * 5) == [401] * 20
    async with client(app) as http:
        for method, path in (("GET", "/v1/sandboxes/1"), ("POST", "/v1/allocate"), ("GET", "/v1/admin/stats")):
            refused = await http.request(method, path, headers={"Authorization": "Bearer again"})
            assert (refused.status_code, detail(refused)["code"]) == (429, "RATE_LIMITED")
            assert 0 < detail(refused)["retry_after"] <= 3601
    assert await statuses(app, {}, address="192.0.2.2") == [401]


async def test_a_wrong_token_does_not_lock_out_other_tracks() -> None:
    app = create_app_without_servers(rate_limit="100/hour")
    wrong = {**STUDENT, "Authorization": "Bearer wrong"}
    assert await statuses(app, *[wrong] * 11) == [401] * 10 + [429]
    assert await statuses(app, STUDENT, wrong, STUDENT) == [404, 429, 404]
