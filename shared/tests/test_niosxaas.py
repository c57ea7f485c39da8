"""NIOSXaaS client against the simulator, or against mock answers that the simulator cannot give."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest

from csp_simulator.app import create_app
from csp_simulator.testing import serving
from sandbox_broker.csp import sessions
from sandbox_broker.csp.client import CspError, CspUnauthorized, CspUnavailable
from sandbox_broker.csp.niosxaas import API_ROOT, SERVICES, CleanedAccount, NiosxaasClient

from .shared_harness import CannedTransport

SIGN_IN, ACCOUNT_SWITCH, CURRENT_USER = (
    f"{API_ROOT}{path}" for path in (sessions.SIGN_IN, sessions.ACCOUNT_SWITCH, sessions.CURRENT_USER)
)
EMAIL = "broker@example.com"
PASSWORD = 'pass"wörd-0123456789'
UNKNOWN = "00000000-0000-4000-8000-00000000ffff"
JWT = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJicm9rZXIifQ.c2lnbmF0dXJl"


@pytest.fixture
async def simulator() -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client for a running simulator with three sandboxes, and services in two of them and at home."""
    app = create_app(accounts=3, email=EMAIL, password=PASSWORD)
    async with serving(app) as url, httpx.AsyncClient(base_url=url, verify=False) as client:
        first, second, _ = await external_ids(client)
        await have_services(client, {first: ["a", "b", "a"], second: ["b"], "home": ["a", "b"]})
        yield client


@pytest.fixture
async def niosxaas(simulator: httpx.AsyncClient) -> AsyncIterator[NiosxaasClient]:
    async with NiosxaasClient(str(simulator.base_url), EMAIL, PASSWORD) as client:
        yield client


async def external_ids(simulator: httpx.AsyncClient) -> list[str]:
    records = (await simulator.get("/_control/accounts")).json()["accounts"]
    return [r["id"].rpartition("/")[2] for r in records if (r["account_type"], r["state"]) == ("sandbox", "active")]


async def have_services(simulator: httpx.AsyncClient, services: dict[str, list[Any]]) -> None:
    (await simulator.put("/_control/services", json={"services": services})).raise_for_status()


async def services(simulator: httpx.AsyncClient) -> list[list[str]]:
    """Return the names of the remaining services by account."""
    left = (await simulator.get("/_control/services")).json()["services"]
    return [[record["name"] for record in records] for records in left.values()]


async def behave(simulator: httpx.AsyncClient, **switches: object) -> None:
    (await simulator.patch("/_control/behaviour", json=switches)).raise_for_status()


async def asked(simulator: httpx.AsyncClient) -> list[tuple[str, str]]:
    calls = (await simulator.get("/_control/calls")).json()["calls"]
    return [(call["method"], call["path"]) for call in calls]


def answering(respond: Callable[[httpx.Request], httpx.Response], **options: Any) -> NiosxaasClient:
    transport = CannedTransport(respond)
    return NiosxaasClient("http://niosxaas.test", EMAIL, PASSWORD, transport=transport, **options)


def listing(results: object) -> Callable[[httpx.Request], httpx.Response]:
    """Return a handler for a session in the account UNKNOWN with these services."""
    current_user = {"result": {"account_id": f"identity/accounts/{UNKNOWN}"}}

    def respond(request: httpx.Request) -> httpx.Response:
        body: object = {CURRENT_USER: current_user, SERVICES: {"results": results}}.get(
            request.url.path, {"jwt": JWT}
        )
        return httpx.Response(200, json=body)

    return respond


async def test_only_the_services_of_the_account_are_deleted(
    niosxaas: NiosxaasClient, simulator: httpx.AsyncClient
) -> None:
    first, *_ = await external_ids(simulator)
    assert await niosxaas.clean_account(first) == CleanedAccount(("a", "b", "a"), (), ())
    assert await services(simulator) == [[], ["b"], ["a", "b"]]


async def test_only_services_of_the_chosen_name_are_deleted(simulator: httpx.AsyncClient) -> None:
    first, *_ = await external_ids(simulator)
    async with NiosxaasClient(str(simulator.base_url), EMAIL, PASSWORD, service_name="a") as niosxaas:
        assert await niosxaas.clean_account(first) == CleanedAccount(("a", "a"), (), ())
    assert await services(simulator) == [["b"], ["b"], ["a", "b"]]


async def test_shadow_mode_deletes_no_service_and_returns_the_names(simulator: httpx.AsyncClient) -> None:
    first, *_ = await external_ids(simulator)
    before = await services(simulator)
    async with NiosxaasClient(str(simulator.base_url), EMAIL, PASSWORD, shadow_mode=True) as niosxaas:
        assert await niosxaas.clean_account(first) == CleanedAccount((), ("a", "b", "a"), ())
    assert await services(simulator) == before
    assert "DELETE" not in [method for method, _ in await asked(simulator)]


async def test_clean_account_is_idempotent(niosxaas: NiosxaasClient, simulator: httpx.AsyncClient) -> None:
    first, _, empty = await external_ids(simulator)
    await niosxaas.clean_account(first)
    for external_id in (first, empty):
        assert await niosxaas.clean_account(external_id) == CleanedAccount((), (), ())


async def test_concurrent_clean_ups_use_separate_sessions(
    niosxaas: NiosxaasClient, simulator: httpx.AsyncClient
) -> None:
    await simulator.post("/_control/reset", json={"accounts": 20})
    ids = await external_ids(simulator)
    await have_services(simulator, {**{account: [f"of {account}"] for account in ids}, "home": ["keep"]})
    await behave(simulator, account_switch_latency_spread_sec=0.1, service_listing_latency_spread_sec=0.1)
    cleaned = await asyncio.gather(*(niosxaas.clean_account(account) for account in ids))
    assert cleaned == [CleanedAccount((f"of {account}",), (), ()) for account in ids]
    assert await services(simulator) == [[]] * 20 + [["keep"]]


async def test_sessions_share_no_cookie() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        assert "Cookie" not in request.headers
        answer = listing([])(request)
        answer.headers["Set-Cookie"] = "session=1; Path=/"
        return answer

    async with answering(respond) as niosxaas:
        for _ in range(2):
            await niosxaas.clean_account(UNKNOWN)


async def test_a_failed_deletion_does_not_stop_the_others(
    niosxaas: NiosxaasClient, simulator: httpx.AsyncClient
) -> None:
    first, *_ = await external_ids(simulator)
    await behave(simulator, fail_next_service_deletes=1, service_delete_error_status=503)
    cleaned = await niosxaas.clean_account(first)
    assert (cleaned.deleted, cleaned.would_delete) == (("b", "a"), ())
    assert cleaned.failed == (
        'a: CSP answered the deletion of a service with 503: {"error":[{"message":"injected by the simulator"}]}',
    )
    assert await niosxaas.clean_account(first) == CleanedAccount(("a",), (), ())


@pytest.mark.parametrize(
    ("response", "deleted"),
    [
        (httpx.Response(200, json={}), True),
        (httpx.Response(202), True),
        (httpx.Response(204), True),
        (httpx.Response(404, json={}), True),
        (httpx.Response(404, text="<html>"), False),
        (httpx.Response(200, text="<html>"), False),
        (httpx.Response(302), False),
        (httpx.Response(403, json={}), False),
        (httpx.Response(409, json={}), False),
        (httpx.Response(429, json={}), False),
        (httpx.Response(500, json={}), False),
    ],
)
async def test_outcome_of_a_deletion(response: httpx.Response, deleted: bool) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.method == "DELETE":
            assert request.url.path == f"{SERVICES}/x-1"
            return response
        return listing([{"id": "infra/universal_service/x-1", "name": "n"}])(request)

    async with answering(respond) as niosxaas:
        cleaned = await niosxaas.clean_account(UNKNOWN)
    assert (cleaned.deleted == ("n",), len(cleaned.failed)) == (deleted, 0 if deleted else 1)


@pytest.mark.parametrize(
    "record",
    [
        None,
        5,
        {},
        {"id": "infra/universal_service/x"},
        {"id": "infra/universal_service/x", "name": None},
        {"id": "infra/universal_service/", "name": "n"},
        {"id": "infra/universal_service/../../accounts/x", "name": "n"},
        {"id": "infra/universal_service/x?y", "name": "n"},
        {"id": "infra/universal_service/x\n", "name": "n"},
        {"id": "infra/universal_service/ü", "name": "n"},
        {"id": ["infra/universal_service/x"], "name": "n"},
        {"name": "n"},
    ],
)
async def test_an_unreadable_record_is_reported_and_does_not_stop_the_others(record: object) -> None:
    sound = {"id": "infra/universal_service/y", "name": "sound"}
    async with answering(listing([record, sound])) as niosxaas:
        cleaned = await niosxaas.clean_account(UNKNOWN)
    assert cleaned.deleted == ("sound",)
    assert cleaned.failed == ("record 0: the id or the name of the service cannot be read",)


async def test_a_record_of_another_name_is_ignored_with_any_id() -> None:
    async with answering(listing([{"id": 5, "name": "other"}]), service_name="n") as niosxaas:
        assert await niosxaas.clean_account(UNKNOWN) == CleanedAccount((), (), ())


@pytest.mark.parametrize("results", [[], None])
async def test_an_account_may_have_no_services(results: object) -> None:
    async with answering(listing(results)) as niosxaas:
        assert await niosxaas.clean_account(UNKNOWN) == CleanedAccount((), (), ())


@pytest.mark.parametrize("text", ["", "oops", "[]", "null", '{"results": {"a": 1}}', "<html>", "[" * 100_000])
async def test_an_invalid_listing_raises_csp_unavailable(text: str) -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        return httpx.Response(200, text=text) if request.url.path == SERVICES else listing([])(request)

    async with answering(respond) as niosxaas:
        with pytest.raises(CspUnavailable, match="CSP answered the listing of services with 200"):
            await niosxaas.clean_account(UNKNOWN)


@pytest.mark.parametrize("operation", ["sign_in", "account_switch", "current_user", "service_listing"])
@pytest.mark.parametrize(
    ("status", "html", "error"),
    [
        ("bomb", False, CspUnavailable),
        (500, False, CspUnavailable),
        (500, True, CspUnavailable),
        (200, True, CspUnavailable),
        (404, False, CspUnavailable),
        (429, False, CspUnavailable),
        ("cut", False, CspUnavailable),
        (401, False, CspUnauthorized),
        (403, True, CspUnauthorized),
    ],
)
async def test_every_call_before_the_deletion_must_succeed(
    niosxaas: NiosxaasClient,
    simulator: httpx.AsyncClient,
    operation: str,
    status: object,
    html: bool,
    error: type[CspError],
) -> None:
    first, *_ = await external_ids(simulator)
    before = await services(simulator)
    rates = {f"{operation}_error_rate": 1, f"{operation}_error_status": status, f"{operation}_error_html": html}
    await behave(simulator, retry_after_sec=7, **rates)
    with pytest.raises(CspError) as caught:
        await niosxaas.clean_account(first)
    assert type(caught.value) is error
    assert getattr(caught.value, "retry_after", None) == (7 if status == 429 else None)
    assert await services(simulator) == before


async def test_a_wrong_password_raises_csp_unauthorized(simulator: httpx.AsyncClient) -> None:
    first, *_ = await external_ids(simulator)
    async with NiosxaasClient(str(simulator.base_url), EMAIL, "wrong-password") as niosxaas:
        with pytest.raises(CspUnauthorized, match=r"^CSP answered the sign-in with 401$"):
            await niosxaas.clean_account(first)


async def test_an_unknown_account_is_not_confused_with_another(
    niosxaas: NiosxaasClient, simulator: httpx.AsyncClient
) -> None:
    with pytest.raises(CspUnavailable, match=r"^CSP answered the account switch with 404$"):
        await niosxaas.clean_account(UNKNOWN)
    assert [path for _, path in await asked(simulator)] == [SIGN_IN, ACCOUNT_SWITCH]


@pytest.mark.parametrize("jwt", [None, "", 5, "a b", "a\nb", "tøken", "x" * 20_000])
async def test_a_session_without_a_valid_jwt_raises_csp_unavailable(jwt: object) -> None:
    async with answering(lambda _: httpx.Response(200, json={"jwt": jwt})) as niosxaas:
        with pytest.raises(CspUnavailable, match=r"^CSP answered the sign-in without a JWT$"):
            await niosxaas.clean_account(UNKNOWN)


async def test_no_service_is_deleted_if_the_account_switch_had_no_effect(
    niosxaas: NiosxaasClient, simulator: httpx.AsyncClient
) -> None:
    first, *_ = await external_ids(simulator)
    before = await services(simulator)
    await behave(simulator, account_switch_without_effect=True)
    with pytest.raises(CspUnavailable) as caught:
        await niosxaas.clean_account(first)
    assert str(caught.value) == (
        "CSP is in identity/accounts/00000000-0000-4000-8000-000000000001 after the switch to "
        f"identity/accounts/{first}. Nothing was changed."
    )
    assert await services(simulator) == before
    assert [path for _, path in await asked(simulator)] == [SIGN_IN, ACCOUNT_SWITCH, CURRENT_USER]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "oops",
        "[]",
        "{}",
        '{"result": null}',
        '{"result": []}',
        '{"result": {}}',
        '{"result": {"account_id": null}}',
        '{"result": {"account_id": ["identity/accounts/00000000-0000-4000-8000-00000000ffff"]}}',
        '{"result": {"account_id": "00000000-0000-4000-8000-00000000ffff"}}',
        '{"result": {"account_id": "identity/accounts/00000000-0000-4000-8000-00000000ffff\\n"}}',
        '{"account_id": "identity/accounts/00000000-0000-4000-8000-00000000ffff"}',
    ],
)
async def test_no_service_is_deleted_if_the_current_account_is_unreadable(text: str) -> None:
    paths: list[str] = []

    def respond(request: httpx.Request) -> httpx.Response:
        paths.append(request.url.path)
        return httpx.Response(200, text=text) if request.url.path == CURRENT_USER else listing([])(request)

    async with answering(respond) as niosxaas:
        with pytest.raises(CspUnavailable, match=r"the current user without an account\. Nothing was changed"):
            await niosxaas.clean_account(UNKNOWN)
    assert paths == [SIGN_IN, ACCOUNT_SWITCH, CURRENT_USER]


async def test_the_case_of_an_account_id_does_not_matter() -> None:
    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == CURRENT_USER:
            return httpx.Response(200, json={"result": {"account_id": f"identity/accounts/{UNKNOWN.upper()}"}})
        return listing([])(request)

    async with answering(respond) as niosxaas:
        assert await niosxaas.clean_account(UNKNOWN.upper()) == CleanedAccount((), (), ())


@pytest.mark.parametrize("operation", ["sign_in", "account_switch", "current_user", "service_listing"])
async def test_a_hanging_call_times_out(simulator: httpx.AsyncClient, operation: str) -> None:
    first, *_ = await external_ids(simulator)
    await behave(simulator, **{f"{operation}_error_rate": 1, f"{operation}_error_status": "hang"})
    async with NiosxaasClient(str(simulator.base_url), EMAIL, PASSWORD, timeout_sec=0.5) as niosxaas:
        with pytest.raises(CspUnavailable, match=r"^CSP gave no answer to the .+ within 0\.5 s$"):
            await niosxaas.clean_account(first)


async def test_the_time_out_applies_to_the_whole_account(simulator: httpx.AsyncClient) -> None:
    first, *_ = await external_ids(simulator)
    await behave(simulator, fail_next_service_deletes=1, service_delete_error_status="hang")
    async with NiosxaasClient(str(simulator.base_url), EMAIL, PASSWORD, timeout_sec=2) as niosxaas:
        cleaned = await niosxaas.clean_account(first)
    assert cleaned.deleted == ()
    assert cleaned.failed == (
        "a: CSP gave no answer to the deletion of a service within 2 s",
        "b: no time was left for the deletion of a service",
        "a: no time was left for the deletion of a service",
    )
    assert [method for method, _ in await asked(simulator)].count("DELETE") <= 1


@pytest.mark.parametrize("external_id", ["", "..", f"{UNKNOWN}\n", f"identity/accounts/{UNKNOWN}"])
async def test_clean_account_accepts_only_a_uuid(niosxaas: NiosxaasClient, external_id: str) -> None:
    with pytest.raises(ValueError, match="must be a uuid"):
        await niosxaas.clean_account(external_id)


@pytest.mark.parametrize("user", [("", PASSWORD), (" ", PASSWORD), (EMAIL, ""), (EMAIL, " ")])
def test_blank_credentials_are_refused(user: tuple[str, str]) -> None:
    with pytest.raises(ValueError, match="must not be blank"):
        NiosxaasClient("http://niosxaas.test", *user)


@pytest.mark.parametrize("where", [SIGN_IN, ACCOUNT_SWITCH, CURRENT_USER, SERVICES, f"{SERVICES}/x"])
@pytest.mark.parametrize("status", [200, 401, 500])
async def test_no_message_holds_a_secret_that_csp_returns(where: str, status: int) -> None:
    opaque = "opaque-jwt-0123456789"

    def respond(request: httpx.Request) -> httpx.Response:
        if request.url.path == where:
            echo = {"headers": dict(request.headers), "body": request.content.decode(), "seen": PASSWORD, "j": JWT}
            return httpx.Response(status, text=f"not json {PASSWORD} {json.dumps(echo, ensure_ascii=False)}")
        if request.method == "POST":
            return httpx.Response(200, json={"jwt": opaque})
        return listing([{"id": "infra/universal_service/x", "name": f"n {JWT}"}])(request)

    async with answering(respond) as niosxaas:
        try:
            message = str(await niosxaas.clean_account(UNKNOWN))
        except CspError as error:
            message = f"{error} {error!r}"
        assert PASSWORD not in repr(niosxaas)
    for secret in ("wörd", "w\\u00f6rd", "0123456789", opaque, JWT, JWT.split(".")[1]):
        assert secret not in message
