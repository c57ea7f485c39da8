"""How often one address may ask."""

import time
from functools import partial
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from gateway import addresses

from .gateway_harness import ADMIN, STUDENT, TRACK, create_app_without_servers, detail, sample, until

PROXY = "10.1.2.3"


def client(app: FastAPI, address: str = "192.0.2.1") -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, client=(address, 4711))
    return httpx.AsyncClient(transport=transport, base_url="http://gateway")


async def statuses(app: FastAPI, *headers: dict[str, str], address: str = "192.0.2.1") -> list[int]:
    async with client(app, address) as http:
        return [(await http.get("/v1/sandboxes/%00", headers=sent)).status_code for sent in headers]


async def test_an_address_is_refused_past_the_limit_and_told_how_long() -> None:
    app = create_app_without_servers(rate_limit="3/5 minutes")
    begun = int(time.time())
    async with client(app) as http:
        for left in (2, 1, 0):
            served = await http.post("/v1/allocate", headers=STUDENT)
            assert served.status_code == 503  # nobody to ask
            assert served.headers["X-RateLimit-Limit"] == "3"
            assert served.headers["X-RateLimit-Remaining"] == str(left)
            assert begun + 300 <= int(served.headers["X-RateLimit-Reset"]) <= time.time() + 301
        for path in ("/v1/allocate", "/v1/admin/sync", "/nope"):
            refused = await http.post(path, headers=STUDENT)
            assert (refused.status_code, detail(refused)["code"]) == (429, "RATE_LIMITED")
            assert 0 < detail(refused)["retry_after"] <= int(refused.headers["X-RateLimit-Reset"]) - begun
            assert refused.headers["X-RateLimit-Remaining"] == "0"
            assert refused.headers["X-Content-Type-Options"] == "nosniff"


async def test_each_address_has_a_limit_of_its_own() -> None:
    app = create_app_without_servers(rate_limit="1/hour")
    for address in ("192.0.2.1", "192.0.2.2", "2001:db8:0:1::1", "2001:db8:0:2::1"):
        assert await statuses(app, STUDENT, STUDENT, address=address) == [404, 429]
    # The owner of an IPv6 network chooses the second half of its addresses.
    assert await statuses(app, STUDENT, address="2001:db8:0:1::2") == [429]


def _past(unix_seconds: int) -> bool:
    return time.time() >= unix_seconds


async def test_the_window_ends() -> None:
    app = create_app_without_servers(rate_limit="2/second")
    assert (await statuses(app, *[STUDENT] * 10))[-1] == 429
    served: list[int] = []
    async with client(app) as http:
        while 404 not in served:
            refused = await http.get("/v1/sandboxes/%00", headers=STUDENT)
            await until(partial(_past, int(refused.headers["X-RateLimit-Reset"])))
            served += await statuses(app, STUDENT)


async def test_the_limit_may_be_switched_off() -> None:
    app = create_app_without_servers(rate_limit="")
    async with client(app) as http:
        for _ in range(50):
            response = await http.get("/v1/sandboxes/%00", headers=STUDENT)
            assert response.status_code == 404
            assert not [name for name in response.headers if name.startswith("x-ratelimit")]
        assert (await http.post("/v1/allocate", headers=STUDENT)).status_code == 503
    assert await statuses(app, *[{}] * 50) == [401] * 50


async def test_the_platform_may_always_ask() -> None:
    app = create_app_without_servers(rate_limit="1/hour")
    async with client(app) as http:
        for path, status in (("/healthz", 200), ("/metrics", 200), ("/readyz", 503)) * 3:
            assert (await http.get(path)).status_code == status
    assert await statuses(app, STUDENT) == [404]


async def test_behind_a_trusted_proxy_its_client_counts() -> None:
    app = create_app_without_servers(rate_limit="1/hour", trusted_proxies="10.0.0.0/8, 192.0.2.9")
    for client_address in ("198.51.100.1", "198.51.100.2"):
        forwarded = {**STUDENT, "X-Forwarded-For": client_address}
        assert await statuses(app, forwarded, forwarded, address=PROXY) == [404, 429]
        assert await statuses(app, forwarded, address="192.0.2.9") == [429]
    assert await statuses(app, STUDENT, STUDENT, address=PROXY) == [404, 429]


async def test_nobody_else_chooses_the_address_they_are_counted_as() -> None:
    app = create_app_without_servers(rate_limit="1/hour", trusted_proxies="10.0.0.0/8")
    made_up = [{**STUDENT, "X-Forwarded-For": f"198.51.100.{number}"} for number in range(3)]
    assert await statuses(app, *made_up, address="203.0.113.1") == [404, 429, 429]
    through = [{**STUDENT, "X-Forwarded-For": f"198.51.100.{number}, 203.0.113.2"} for number in range(3)]
    assert await statuses(app, *through, address=PROXY) == [404, 429, 429]


@pytest.mark.parametrize(
    ("peer", "forwarded", "counted"),
    [
        ("203.0.113.1", ["198.51.100.1"], "203.0.113.1"),
        (PROXY, [], PROXY),
        (PROXY, ["198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1, 198.51.100.1"], "198.51.100.1"),
        (PROXY, ["1.1.1.1", "198.51.100.1"], "198.51.100.1"),
        (PROXY, ["198.51.100.1, 10.9.9.9"], "198.51.100.1"),
        (PROXY, ["10.9.9.9, 10.9.9.8"], "10.9.9.9"),
        (PROXY, ["198.51.100.1:4711"], "198.51.100.1"),
        (PROXY, ["[2001:db8::1]:4711"], "2001:db8::/64"),
        (PROXY, ["2001:db8::1"], "2001:db8::/64"),
        (PROXY, ["::ffff:198.51.100.1"], "198.51.100.1"),
        (PROXY, ["198.51.100.1, nonsense"], PROXY),
        (PROXY, [""], PROXY),
        ("::ffff:10.1.2.3", ["198.51.100.1"], "198.51.100.1"),
        ("fd00::1", ["198.51.100.1"], "198.51.100.1"),
    ],
)
def test_the_client_is_the_last_address_that_no_proxy_of_ours_has(
    peer: str, forwarded: list[str], counted: str
) -> None:
    client_address = addresses.client_address(addresses.networks("10.0.0.0/8,fd00::/8"))
    scope: dict[str, Any] = {
        "client": (peer, 1),
        "headers": [(b"x-forwarded-for", value.encode()) for value in forwarded],
    }
    assert client_address(scope) == counted


async def test_failed_attempts_are_counted_by_their_reason() -> None:
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


async def test_who_tries_token_after_token_is_told_to_wait() -> None:
    app = create_app_without_servers(rate_limit="400/hour")  # of which a twentieth may fail
    guesses = [{"Authorization": f"Bearer guess-{number}"} for number in range(15)]
    assert await statuses(app, *guesses, *[{}] * 5) == [401] * 20
    async with client(app) as http:
        for method, path in (("GET", "/v1/sandboxes/1"), ("POST", "/v1/allocate"), ("GET", "/v1/admin/stats")):
            refused = await http.request(method, path, headers={"Authorization": "Bearer again"})
            assert (refused.status_code, detail(refused)["code"]) == (429, "RATE_LIMITED")
            assert 0 < detail(refused)["retry_after"] <= 3601
    assert await statuses(app, {}, address="192.0.2.2") == [401]


async def test_a_wrong_token_of_one_track_does_not_lock_out_the_others() -> None:
    app = create_app_without_servers(rate_limit="100/hour")
    wrong = {**STUDENT, "Authorization": "Bearer wrong"}
    assert await statuses(app, *[wrong] * 11) == [401] * 10 + [429]
    assert await statuses(app, STUDENT, wrong, STUDENT) == [404, 429, 404]
