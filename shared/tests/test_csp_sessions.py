"""Session pool and user client against the simulator, or against mock answers that the simulator cannot give."""

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass

import httpx
import pytest

from csp_simulator.app import create_app
from csp_simulator.testing import serving
from sandbox_broker.csp.http import CspError, CspHttp, CspRefused, CspUnauthorized, CspUnavailable
from sandbox_broker.csp.sessions import (
    ACCOUNT_SWITCH,
    SIGN_IN,
    SessionClient,
    SessionExpired,
    SessionPool,
    SwitchRefused,
    hidden_forms,
)
from sandbox_broker.csp.users import UserClient

from .shared_harness import CannedTransport

EMAIL = "administrator@example.com"
PASSWORD = 'pass"wörd-0123456789'
STUDENT = "student-1@labs.example.com"
STUDENT_PASSWORD = "Abcdef12!?"
UNKNOWN = "00000000-0000-4000-8000-00000000ffff"


@dataclass
class Csp:
    control: httpx.AsyncClient
    pool: SessionPool
    users: UserClient
    accounts: list[str]

    async def behave(self, **switches: object) -> None:
        (await self.control.patch("/_control/behaviour", json=switches)).raise_for_status()

    async def count(self, path: str) -> int:
        """Return the number of calls whose path contains `path`."""
        response = await self.control.get("/_control/calls", params={"path_contains": path})
        return len(response.json()["calls"])

    async def user_records(self) -> list[dict[str, object]]:
        records: list[dict[str, object]] = (await self.control.get("/_control/users")).json()["users"]
        return records


def soon() -> float:
    return asyncio.get_running_loop().time() + 30


@pytest.fixture
async def csp() -> AsyncIterator[Csp]:
    async with (
        serving(create_app(accounts=3, email=EMAIL, password=PASSWORD)) as url,
        httpx.AsyncClient(base_url=url, verify=False) as control,
    ):
        http = CspHttp(f"{url}/v2", secrets=hidden_forms(PASSWORD), timeout_sec=30)
        records = (await control.get("/_control/accounts")).json()["accounts"]
        active = [
            record for record in records if (record["account_type"], record["state"]) == ("sandbox", "active")
        ]
        pool = SessionPool(SessionClient(http, EMAIL, PASSWORD), refusal_pause_sec=0.2)
        yield Csp(control, pool, UserClient(http), [record["id"].rpartition("/")[2] for record in active])
        await http.aclose()


async def create_student(csp: Csp, jwt: str) -> str | None:
    groups = await csp.users.list_groups(jwt, soon())
    return await csp.users.create_user(
        jwt, email=STUDENT, name="student-1", group_ids=[groups["user"]], deadline=soon()
    )


async def test_a_user_is_created_found_and_deleted(csp: Csp) -> None:
    async with csp.pool.in_account(csp.accounts[0], soon()) as jwt:
        user_id = await create_student(csp, jwt)
        assert user_id is not None
        assert await create_student(csp, jwt) is None
        assert await csp.users.find_user(jwt, STUDENT, soon()) == user_id
        await csp.users.set_password(jwt, user_id, STUDENT_PASSWORD, soon())
        assert [record["has_password"] for record in await csp.user_records()] == [True]
        for _ in range(2):
            await csp.users.delete_user(jwt, user_id, soon())
        assert await csp.users.find_user(jwt, STUDENT, soon()) is None
    assert await csp.user_records() == []


async def test_one_session_serves_one_account_after_the_other(csp: Csp) -> None:
    for account in csp.accounts:
        async with csp.pool.in_account(account, soon()) as jwt:
            await create_student(csp, jwt)
    assert await csp.count(SIGN_IN) == 1
    assert [record["account"] for record in await csp.user_records()] == csp.accounts


async def test_concurrent_accounts_have_separate_sessions(csp: Csp) -> None:
    async def create(account: str) -> None:
        async with csp.pool.in_account(account, soon()) as jwt:
            await create_student(csp, jwt)

    await asyncio.gather(*map(create, csp.accounts))
    assert sorted(str(record["account"]) for record in await csp.user_records()) == sorted(csp.accounts)


async def test_an_expired_session_is_replaced(csp: Csp) -> None:
    async with csp.pool.in_account(csp.accounts[0], soon()):
        await csp.behave(reject_tokens=True)
    await csp.behave(reject_tokens=False, jwt_lifetime_sec=0)
    with pytest.raises(CspError):
        async with csp.pool.in_account(csp.accounts[1], soon()):
            pass
    await csp.behave(jwt_lifetime_sec=3600)
    async with csp.pool.in_account(csp.accounts[1], soon()) as jwt:
        await create_student(csp, jwt)
    assert [record["account"] for record in await csp.user_records()] == [csp.accounts[1]]


async def test_a_session_that_expires_in_the_account_is_not_used_again(csp: Csp) -> None:
    async def list_groups_after_the_end() -> None:
        async with csp.pool.in_account(csp.accounts[0], soon()) as jwt:
            await csp.behave(reject_tokens=True)
            await csp.users.list_groups(jwt, soon())

    with pytest.raises(SessionExpired):
        await list_groups_after_the_end()
    await csp.behave(reject_tokens=False)
    async with csp.pool.in_account(csp.accounts[0], soon()):
        assert await csp.count(SIGN_IN) == 2


@pytest.mark.parametrize("status", [403, 404, 503])
async def test_a_refused_switch_keeps_the_session(csp: Csp, status: int) -> None:
    await csp.behave(account_switch_ready_after_sec=3600, account_switch_not_ready_status=status)
    with pytest.raises(SwitchRefused):
        async with csp.pool.in_account(csp.accounts[0], soon()):
            pass
    await csp.behave(account_switch_ready_after_sec=0)
    async with csp.pool.in_account(csp.accounts[0], soon()):
        pass
    assert await csp.count(SIGN_IN) == 1


async def test_a_refused_sign_in_pauses_all_sign_ins(csp: Csp) -> None:
    async def enter(account: str) -> None:
        async with csp.pool.in_account(account, soon()):
            pass

    await csp.behave(reject_sign_ins=True)
    results = await asyncio.gather(*map(enter, csp.accounts), return_exceptions=True)
    assert [type(result) for result in results] == [CspUnauthorized] * 3
    assert await csp.count(SIGN_IN) == 1
    assert csp.pool.is_refused
    await csp.behave(reject_sign_ins=False)
    async with asyncio.timeout(30):
        while csp.pool.is_refused:
            try:
                await enter(csp.accounts[0])
            except CspUnauthorized:
                await asyncio.sleep(0.02)


async def test_a_switch_without_effect_changes_no_account(csp: Csp) -> None:
    await csp.behave(account_switch_without_effect=True)
    with pytest.raises(CspUnavailable, match="Nothing was changed"):
        async with csp.pool.in_account(csp.accounts[0], soon()):
            pass


async def test_a_password_against_the_rules_is_refused_without_its_text(csp: Csp) -> None:
    async with csp.pool.in_account(csp.accounts[0], soon()) as jwt:
        user_id = await create_student(csp, jwt)
        assert user_id is not None
        with pytest.raises(CspRefused, match=r"^CSP answered the change of a password with 400$"):
            await csp.users.set_password(jwt, user_id, "weak", soon())


def answering(respond: Callable[[httpx.Request], httpx.Response]) -> tuple[SessionPool, UserClient]:
    transport = CannedTransport(respond)
    http = CspHttp("http://csp.test/v2", secrets=hidden_forms(PASSWORD), timeout_sec=5, transport=transport)
    return SessionPool(SessionClient(http, EMAIL, PASSWORD), refusal_pause_sec=60), UserClient(http)


@pytest.mark.parametrize(
    "where",
    [SIGN_IN, ACCOUNT_SWITCH, "/current_user", "/groups", "/users", "/users/u-1", "/users/u-1/password"],
)
@pytest.mark.parametrize("status", [200, 400, 401, 500])
async def test_no_message_holds_a_secret_that_csp_returns(where: str, status: int) -> None:
    opaque = "opaque-jwt-0123456789"

    def respond(request: httpx.Request) -> httpx.Response:
        path = request.url.path.removeprefix("/v2")
        if path == where:
            echo = {"headers": dict(request.headers), "body": request.content.decode(), "seen": PASSWORD}
            return httpx.Response(status, text=f"not json {json.dumps(echo, ensure_ascii=False)}")
        bodies: dict[str, object] = {
            "/current_user": {"result": {"account_id": f"identity/accounts/{UNKNOWN}"}},
            "/groups": {"results": [{"id": "g-1", "name": "user"}]},
            "/users": {"result": {"id": "u-1"}, "results": []},
        }
        return httpx.Response(200, json=bodies.get(path, {"jwt": opaque}))

    pool, users = answering(respond)
    messages: list[str] = []
    try:
        async with pool.in_account(UNKNOWN, soon()) as jwt:
            for call in (
                users.list_groups(jwt, soon()),
                users.create_user(jwt, email=STUDENT, name="s", group_ids=["g-1"], deadline=soon()),
                users.find_user(jwt, STUDENT, soon()),
                users.set_password(jwt, "u-1", STUDENT_PASSWORD, soon()),
                users.delete_user(jwt, "u-1", soon()),
            ):
                try:
                    await call
                except CspError as error:
                    messages.append(f"{error} {error!r}")
    except CspError as error:
        messages.append(f"{error} {error!r}")
    assert messages or status == 200  # the bodies of deletions and changes are not read
    for secret in ("wörd", "w\\u00f6rd", opaque, STUDENT_PASSWORD):
        assert all(secret not in message for message in messages)
