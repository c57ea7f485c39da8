"""CSP client: create an account, find an account by name."""

import json
from collections.abc import AsyncIterator, Callable
from typing import Any

import httpx
import pytest
from prometheus_client import REGISTRY

from csp_simulator.app import create_app
from csp_simulator.testing import serving
from sandbox_broker.csp import client as csp_client
from sandbox_broker.csp import http as csp_http
from sandbox_broker.csp.client import CspClient, CspRefused, CspUnauthorized, CspUnavailable

from .shared_harness import CannedTransport

TOKEN = "test-token-0123456789"
NAME = "lab-adventure-7"
UUID = "00000000-0000-4000-8000-00000000ffff"
CREATED = {"result": {"id": f"identity/accounts/{UUID}", "admin_user": {"account_id": f"identity/accounts/{UUID}"}}}


@pytest.fixture
async def simulator() -> AsyncIterator[httpx.AsyncClient]:
    """Yield a client for the root of a running simulator without sandboxes."""
    async with (
        serving(create_app(accounts=0, token=TOKEN)) as url,
        httpx.AsyncClient(base_url=url, verify=False) as client,
    ):
        yield client


@pytest.fixture
async def csp(simulator: httpx.AsyncClient) -> AsyncIterator[CspClient]:
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN) as client:
        yield client


async def behave(simulator: httpx.AsyncClient, **switches: object) -> None:
    (await simulator.patch("/_control/behaviour", json=switches)).raise_for_status()


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> CspClient:
    return CspClient("http://csp.test/v2", TOKEN, transport=CannedTransport(respond))


async def create(csp: CspClient, name: str = NAME, admin_user: dict[str, str] | None = None) -> str:
    return await csp.create_account(name, description="a sandbox", tags={"owner": "broker"}, admin_user=admin_user)


# Creation


async def test_a_created_account_is_listed_and_found(csp: CspClient) -> None:
    external_id = await create(csp)
    (account,) = (await csp.list_accounts()).accounts
    assert (account.external_id, account.name) == (external_id, NAME)
    assert await csp.find_account_by_name(NAME) == external_id


@pytest.mark.parametrize("admin_user", [None, {"email": "admin@example.com", "name": "Admin"}])
async def test_the_request_has_the_fields_of_csp(admin_user: dict[str, str] | None) -> None:
    requests: list[httpx.Request] = []

    def respond(request: httpx.Request) -> httpx.Response:
        requests.append(request)
        return httpx.Response(200, json=CREATED)

    async with answering(respond) as csp:
        assert await create(csp, admin_user=admin_user) == UUID
    (request,) = requests
    assert (request.method, request.url.path) == ("POST", "/v2/sandbox/accounts")
    body = {"name": NAME, "description": "a sandbox", "state": "active", "tags": {"owner": "broker"}}
    assert json.loads(request.content) == body | ({} if admin_user is None else {"admin_user": admin_user})


@pytest.mark.parametrize("status", [400, 402, 403, 422])
@pytest.mark.parametrize(
    "body",
    [
        {"error": [{"message": "the licence\nis used up"}]},
        {"error": {"message": "the licence is  used up"}},
        "the licence is used up",
    ],
)
async def test_a_refusal_holds_the_reason_of_csp(status: int, body: object) -> None:
    response = httpx.Response(status, text=body) if isinstance(body, str) else httpx.Response(status, json=body)
    async with answering(lambda _: response) as csp:
        with pytest.raises(CspRefused) as caught:
            await create(csp)
    assert str(caught.value) == f"CSP refused the creation with {status}: the licence is used up"
    assert caught.value.status == status


async def test_a_used_up_quota_is_a_refusal(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, create_quota=1)
    await create(csp)
    with pytest.raises(CspRefused, match="the quota of 1 sandboxes is used up"):
        await create(csp, "other")


@pytest.mark.parametrize("secret", [TOKEN, "eyJhbGciOiJIUzI1NiJ9.e30.c2lnbmF0dXJl"])
async def test_a_reason_never_holds_a_secret_and_is_bounded(secret: str) -> None:
    body = {"error": [{"message": f"{secret} may not create " + "x" * 10_000}]}
    async with answering(lambda _: httpx.Response(403, json=body)) as csp:
        with pytest.raises(CspRefused) as caught:
            await create(csp)
    assert secret not in str(caught.value)
    assert len(str(caught.value)) < 2 * csp_http.MAX_EXCERPT


@pytest.mark.parametrize(
    "response",
    [
        *(httpx.Response(status, json={}) for status in (404, 405, 408, 409, 425, 429, 500, 502, 503, 504)),
        httpx.Response(200, html="<html>"),
        httpx.Response(200, json={}),
        httpx.Response(200, json={"result": {"id": "7"}}),
        httpx.Response(200, json={"result": [UUID]}),
        httpx.Response(200, text="created"),
        httpx.Response(302, headers={"Location": "/"}),
    ],
    ids=lambda response: f"{response.status_code} {response.text[:20]}",
)
async def test_any_other_answer_may_be_retried(response: httpx.Response) -> None:
    async with answering(lambda _: response) as csp:
        with pytest.raises(CspUnavailable) as caught:
            await create(csp)
    assert caught.value.status == response.status_code


async def test_an_html_page_with_status_403_is_no_refusal() -> None:
    async with answering(lambda _: httpx.Response(403, html="<html>blocked")) as csp:
        with pytest.raises(CspUnauthorized):
            await create(csp)


async def test_a_rejected_token_is_no_refusal(csp: CspClient, simulator: httpx.AsyncClient) -> None:
    await behave(simulator, reject_tokens=True)
    with pytest.raises(CspUnauthorized):
        await create(csp)
    with pytest.raises(CspUnauthorized):
        await csp.find_account_by_name(NAME)


@pytest.mark.parametrize("status", [504, "hang", "cut"])
async def test_an_account_created_despite_the_error_is_found_by_its_name(
    simulator: httpx.AsyncClient, status: object
) -> None:
    await behave(simulator, fail_next_creates=1, create_error_status=status, create_error_after_effect=True)
    async with CspClient(str(simulator.base_url.join("/v2")), TOKEN, timeout_sec=0.5) as csp:
        with pytest.raises(CspUnavailable):
            await create(csp)
        found = await csp.find_account_by_name(NAME)
        (account,) = (await csp.list_accounts()).accounts
    assert found == account.external_id


@pytest.mark.parametrize("name", ["", " ", "a\nb", "a" * 256])
async def test_an_invalid_name_is_refused_without_a_call(name: str) -> None:
    def respond(_: httpx.Request) -> httpx.Response:
        raise AssertionError("called")

    async with answering(respond) as csp:
        with pytest.raises(ValueError, match="the name is"):
            await create(csp, name)
        with pytest.raises(ValueError, match="the name is"):
            await csp.find_account_by_name(name)


# Look-up by name


@pytest.mark.parametrize("name", [NAME, 'a"b', '"', 'x" or name=="' + NAME, "a\\", "a&b=c#d%20+ e", "Füße", "a'b"])
async def test_a_name_is_found_exactly(csp: CspClient, name: str) -> None:
    await create(csp, "another")
    if name != NAME:
        await create(csp, NAME)
    assert await csp.find_account_by_name(name) is None
    assert await create(csp, name) == await csp.find_account_by_name(name)


@pytest.mark.parametrize("state", ["pending", "disabled"])
async def test_an_account_in_any_state_is_found(csp: CspClient, simulator: httpx.AsyncClient, state: str) -> None:
    external_id = await create(csp)
    await simulator.patch(f"/_control/accounts/{external_id}", json={"state": state})
    assert await csp.find_account_by_name(NAME) == external_id


def record(number: int, name: str) -> dict[str, Any]:
    return {"id": f"identity/accounts/00000000-0000-4000-8000-{number:012d}", "name": name}


@pytest.mark.parametrize("page_size", [1, 3, 100])
async def test_a_server_that_ignores_filter_or_limit_is_read_page_by_page(page_size: int) -> None:
    records = [record(number, f"other-{number}") for number in range(10)] + [record(77, NAME)]

    def respond(request: httpx.Request) -> httpx.Response:
        start = int(request.url.params["_offset"])
        return httpx.Response(200, json={"results": records[start : start + page_size]})

    async with answering(respond) as csp:
        assert await csp.find_account_by_name(NAME) == "00000000-0000-4000-8000-000000000077"
        assert await csp.find_account_by_name(NAME.upper()) is None


async def test_a_look_up_ends_at_its_bound_of_pages() -> None:
    calls = 0

    def respond(_: httpx.Request) -> httpx.Response:
        nonlocal calls
        calls += 1
        return httpx.Response(200, json={"results": [record(1, "other")]})

    async with answering(respond) as csp:
        with pytest.raises(CspUnavailable, match="pages"):
            await csp.find_account_by_name(NAME)
    assert calls == csp_client.MAX_FIND_PAGES


@pytest.mark.parametrize(
    "response",
    [
        httpx.Response(503, json={}),
        httpx.Response(404, json={}),
        httpx.Response(200, html="<html>"),
        httpx.Response(200, json={}),
        httpx.Response(200, json={"results": [{"id": "7", "name": NAME}]}),
    ],
    ids=lambda response: f"{response.status_code} {response.text[:20]}",
)
async def test_an_unusable_look_up_is_never_taken_for_a_missing_account(response: httpx.Response) -> None:
    async with answering(lambda _: response) as csp:
        with pytest.raises(CspUnavailable):
            await csp.find_account_by_name(NAME)


@pytest.mark.parametrize("operation", ["create", "find"])
async def test_an_endless_answer_is_dropped(csp: CspClient, simulator: httpx.AsyncClient, operation: str) -> None:
    await behave(simulator, **{f"fail_next_{operation}s": 1, f"{operation}_error_status": "flood"})
    with pytest.raises(CspUnavailable, match="more than"):
        await (create(csp) if operation == "create" else csp.find_account_by_name(NAME))


async def test_a_refusal_is_not_measured_as_a_refused_token() -> None:
    def count(outcome: str) -> float:
        labels = {"operation": "create_account", "outcome": outcome}
        return REGISTRY.get_sample_value("broker_csp_request_seconds_count", labels) or 0.0

    before = count("refused"), count("unauthorized")
    async with answering(lambda _: httpx.Response(403, json={})) as csp:
        with pytest.raises(CspRefused):
            await create(csp)
    assert (count("refused"), count("unauthorized")) == (before[0] + 1, before[1])
